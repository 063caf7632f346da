"""`siv` as a fork of a process that has torch already: a real process, without the seconds that imports take at every start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import crash
import readers

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


# -- in the child ----------------------------------------------------------------------------------------------------------------


def _siv(folder: str, kept: str, environment: dict[str, str], arguments: list[str]) -> None:
    assert "preloaded" in sys.modules
    os.chdir(folder)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    streams = [os.open(os.path.join(kept, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for name in ("out", "err")]
    subprocess.Popen = _popen
    if readers.PLACE in environment:
        readers.use()
    _main((nowhere, *streams), environment, arguments)


def _main(streams: tuple[int, int, int], environment: Mapping[str, str], arguments: list[str]) -> None:
    """All that a new process has of its own, then the command."""
    import numpy as np

    from siv_core.cli import main as cli

    os.environ.clear()
    os.environ.update(environment)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.argv = arguments
    np.random.seed()  # noqa: NPY002  (as it is in a new process; Python's own generator does so at every fork)
    cli.main()


class Trial:
    """`python -P -m siv_core.cli.main …` of a sweep, as a fork of it in a session of its own; of `Popen` it has what is used."""

    def __init__(self, arguments: list[str], env: Mapping[str, str], log: int) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                for number in (signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                _main((os.open(os.devnull, os.O_RDONLY), log, log), env, arguments)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)

    def poll(self) -> int | None:
        return self._waited(os.WNOHANG)

    def wait(self) -> int | None:
        return self._waited(0)

    def _waited(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_REAL = subprocess.Popen


def _popen(command: Any, *more: Any, **options: Any) -> Any:
    if command[1:4] != ["-P", "-m", "siv_core.cli.main"]:
        return _REAL(command, *more, **options)
    assert (more, options["stdin"], options["start_new_session"]) == ((), subprocess.DEVNULL, True)
    assert options["stdout"] is options["stderr"]
    return Trial([command[3], *command[4:]], options["env"], options["stdout"].fileno())
