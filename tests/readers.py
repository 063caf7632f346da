"""The child processes that read HDF5 files, as forks of one that has h5py: real processes, without the quarter of a second that
imports take in each.

`python readers.py SOCKET` is that one: a fork for each connection, with the two pipes that came with it. It ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

PLACE = "SIV_TESTS_READERS"  # where the socket is: for the tests' forks of `siv` too
PYTHON = sys.executable


# -- who asks --------------------------------------------------------------------------------------------------------------------


class Reader:
    """Of `Popen` what `siv_core.data.hdf5` uses."""

    def __init__(self, env: dict[str, str]) -> None:
        self.returncode: int | None = None
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(os.environ[PLACE])
        (ask, asks), (answers, answer) = os.pipe(), os.pipe()
        told = json.dumps({"env": env, "cwd": os.getcwd()}).encode()
        socket.send_fds(self.connection, [struct.pack("i", len(told))], [ask, answer])
        self.connection.sendall(told)
        os.close(ask), os.close(answer)
        self.stdin, self.stdout = os.fdopen(asks, "wb"), os.fdopen(answers, "rb")
        [self.pid] = struct.unpack("i", _exactly(self.connection, 4))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()
        self.wait()
        self.connection.close()

    def kill(self) -> None:
        if not select.select([self.connection], [], [], 0)[0]:  # else it has ended
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                [status] = struct.unpack("i", _exactly(self.connection, 4))
            except TimeoutError as error:
                raise subprocess.TimeoutExpired("reader", timeout or 0.0) from error
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _popen(command: list[str], **options: Any) -> Any:
    if command != [PYTHON, "-P", "-m", "siv_core.data.hdf5_child"]:  # a test has put another in its place
        return subprocess.Popen(command, **options)
    return Reader(options["env"])


def use() -> None:
    """From now on this process's children that read HDF5 files are forks."""
    from siv_core.data import hdf5

    names = {name: getattr(subprocess, name) for name in ("PIPE", "DEVNULL", "TimeoutExpired")}
    hdf5.subprocess = types.SimpleNamespace(Popen=_popen, **names)  # type: ignore[assignment]


@contextlib.contextmanager
def served(folder: Path) -> Any:
    """The process that forks them, for as long as it lasts."""
    path = folder / "readers"
    server = subprocess.Popen([PYTHON, "-P", __file__, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None
    assert server.stdout is not None
    with server:
        assert server.stdout.readline() == b"ready\n"
        os.environ[PLACE] = str(path)
        yield
        os.environ.pop(PLACE)
        server.stdin.close()


# -- who forks -------------------------------------------------------------------------------------------------------------------


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionError
        data += piece
    return data


def _serve(path: str) -> None:
    import h5py  # noqa: F401  (what every fork finds done)

    import siv_core.data.hdf5_child  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    print("ready", flush=True)
    while True:
        ready = select.select([server, 0], [], [])[0]
        if 0 in ready:
            return
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            _keep(connection)
        connection.close()


def _keep(connection: socket.socket) -> None:
    """Fork the reader, tell its number, wait for its end and tell how it ended."""
    try:
        head, pipes, _, _ = socket.recv_fds(connection, 4, 2)
        about = json.loads(_exactly(connection, struct.unpack("i", head)[0]))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        if pid == 0:
            connection.close()
            _read(*pipes, about)
        for pipe in pipes:
            os.close(pipe)
        connection.sendall(struct.pack("i", pid))
        connection.sendall(struct.pack("i", os.waitpid(pid, 0)[1]))
    finally:
        os._exit(0)


def _read(ask: int, answer: int, about: dict[str, Any]) -> None:
    from siv_core.data import hdf5_child

    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor, number in ((ask, 0), (answer, 1), (nowhere, 2)):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
        os.environ.clear()
        os.environ.update(about["env"])
        os.chdir(about["cwd"])
        hdf5_child.main()
    finally:
        os._exit(1)


if __name__ == "__main__":
    _serve(sys.argv[1])
