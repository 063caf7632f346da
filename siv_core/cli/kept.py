"""`siv` that is asked for its end where the process that started it is gone: `python -m siv_core.cli.kept PARENT ARGUMENTS`.

Of a trial on a cluster: a worker that is lost is to leave nobody behind who works on its run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

PARENT_DEATH = 1  # PR_SET_PDEATHSIG of prctl(2)


def main() -> None:
    parent = int(sys.argv[1])
    with contextlib.suppress(AttributeError):  # not Linux: it ends by itself, and whoever goes on with the run waits
        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)
    from siv_core.cli import main as cli

    sys.argv = ["siv", *sys.argv[2:]]
    cli.main()


if __name__ == "__main__":
    main()
