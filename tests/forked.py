"""`siv` as a fork of a process that has torch already: a real process, without the seconds that imports take at every start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import crash

COMMAND = Path(sysconfig.get_path("scripts")) / "siv"
Done = subprocess.CompletedProcess[str]


class Siv:
    """The command in hand; what it prints is kept in files, so that nobody has to read while it works."""

    def __init__(self, folder: Path, *arguments: Any, env: Mapping[str, str] | None = None) -> None:
        crash.preload()
        self.returncode: int | None = None
        self.arguments = [str(COMMAND), *map(str, arguments)]
        self.kept = tempfile.TemporaryDirectory(prefix="siv-forked-")
        places = (str(folder), self.kept.name, {**os.environ, **(env or {})})
        self.process = crash.CONTEXT.Process(target=_siv, args=(*places, self.arguments))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Standard output and standard error after the end, or `TimeoutExpired` as of `subprocess`."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        self.returncode = self.process.exitcode
        out, err = ((Path(self.kept.name) / name).read_text(encoding="utf-8") for name in ("out", "err"))
        self.kept.cleanup()
        return out, err


def run(folder: Path, *arguments: Any, seconds: float) -> Done:
    """The command up to its end."""
    process = Siv(folder, *arguments)
    try:
        out, err = process.communicate(seconds)
    except BaseException:
        process.kill()
        process.communicate(60)
        raise
    return Done(process.arguments, process.returncode, out, err)


def _siv(folder: str, kept: str, environment: dict[str, str], arguments: list[str]) -> None:
    """In the child: all that a new process has of its own, then the command."""
    import numpy as np

    assert "preloaded" in sys.modules
    from siv_core import cli

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    streams = [os.open(os.path.join(kept, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for name in ("out", "err")]
    for number, descriptor in enumerate((nowhere, *streams)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.argv = arguments
    np.random.seed()  # noqa: NPY002  (as it is in a new process; Python's own generator does so at every fork)
    cli.main()
