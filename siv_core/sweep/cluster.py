"""Trials on the workers of a Dask scheduler, each an ordinary `siv` command there, on a folder that all of them share.

A worker that is lost takes its command with it; the scheduler gives the trial to another one, which goes on from its checkpoint.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import define

from siv_core.errors import UserError
from siv_core.runs.device import nvidia_present
from siv_core.store import files
from siv_core.store.rundir import RunDir, busy
from siv_core.sweep.jobs import Bundle

Client = Any  # of distributed, which has no types
SECONDS = 20  # for the scheduler to answer
POLL_SECONDS = 0.2


def connect(address: str) -> Client:
    """The scheduler at tcp://HOST:PORT, with one worker at least."""
    try:
        import distributed
    except ImportError as error:
        raise UserError(f"--on takes Dask ({error}): pip install 'siv[cluster]'") from error
    try:
        client: Client = distributed.Client(address, timeout=SECONDS, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TimeoutError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--on {address}: no Dask scheduler answers there ({reason}); `dask scheduler` starts one") from error
    if not client.scheduler_info(n_workers=-1)["workers"]:
        client.close()
        raise UserError(f"--on {address}: the scheduler has no workers; `dask worker {address}` on each machine starts some")
    return client


def slots(client: Client) -> int:
    """Trials at a time: a thread of a worker runs one."""
    return sum(client.nthreads().values())


def versions() -> dict[str, str]:
    """What has to be the same wherever a sweep works: asked here and on each worker."""
    import torch

    from siv_core.recipe import catalogue

    owners = {str(owner) for _, owner in catalogue.load().components.values()}
    return {"python": platform.python_version(), "torch": torch.__version__, "plugins": ", ".join(sorted(owners))}


def check(client: Client, root: Path) -> None:
    """A `UserError` where a worker has other versions or does not see the sweep's folder."""
    own, problems = versions(), []
    for worker, theirs in client.run(versions, on_error="return").items():
        if isinstance(theirs, BaseException):
            problems.append(f"worker {worker}: has no siv that answers ({type(theirs).__name__}: {theirs})")
            continue
        differing = [f"{name} {theirs[name]} (here {own[name]})" for name in own if theirs[name] != own[name]]
        problems += [f"worker {worker}: is refused, it has {line}: install the same versions there" for line in differing]
    if problems:
        raise UserError(problems)
    token, path = uuid.uuid4().hex, root / f"seen-{os.getpid()}"
    files.write_bytes(path, token.encode())
    try:
        for worker, seen in client.run(_read, str(path)).items():
            if seen != token:
                problems.append(f"worker {worker}: does not see {root}: the sweep's folder has to be on a disk that all share")
        for worker, there in client.run(os.path.isdir, os.getcwd()).items():
            if there is not True:
                problems.append(
                    f"worker {worker}: has no folder {os.getcwd()}, in which this command was given and its own would be"
                )
    finally:
        path.unlink(missing_ok=True)
    if problems:
        raise UserError(problems)


def on_cpus(client: Client) -> bool:
    """Whether no worker has an NVIDIA device, so that a profile named cpu applies by itself."""
    return not any(there is True for there in client.run(nvidia_present, on_error="return").values())


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        return f"{error}"


# -- a command on a worker -------------------------------------------------------------------------------------------------------


@define
class Remote:
    """A command on some worker, with what is used of a `Popen`."""

    future: Any  # of distributed: an exit code
    log: Path
    stop: Path  # a file there asks for its end
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self.future.done():
            self.returncode = int(self.future.result()) if self.future.status == "finished" else self._failed()
            self.stop.unlink(missing_ok=True)
        return self.returncode

    def _failed(self) -> int:
        """No command came to its end: a worker killed again and again, a scheduler that is gone. The log has the reason."""
        error = self.future.exception() if self.future.status == "error" else None
        reason = f"{type(error).__name__}: {error}" if error else f"the scheduler calls it {self.future.status}"
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"the cluster did not bring it to its end ({reason})\n")
        return 1

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(POLL_SECONDS)
        return code

    def terminate(self) -> None:
        self.stop.touch()

    def kill(self) -> None:
        self.terminate()
        self.future.cancel()


@define
class Cluster:
    """Starts bundles on workers."""

    client: Client

    def start(self, bundle: Bundle, environment: Mapping[str, str]) -> Remote:
        stop = bundle.log.absolute().with_suffix(".stop")
        stop.unlink(missing_ok=True)
        folder, log, runs = os.getcwd(), str(bundle.log.absolute()), tuple(str(job.run.path.absolute()) for job in bundle.jobs)
        future = self.client.submit(
            command, bundle.command, folder, dict(environment), log, str(stop), runs, pure=False, retries=3
        )
        return Remote(future, Path(log), stop)


def command(
    arguments: tuple[str, ...], folder: str, environment: dict[str, str], log: str, stop: str, runs: tuple[str, ...] = ()
) -> int:
    """Run on a worker: `siv` with these arguments to its end, which the file `stop` asks for; its exit code. The process of a
    worker that was lost may still be at its last step: these `runs` are waited for."""
    while any(busy(RunDir(Path(run))) for run in runs):
        if os.path.exists(stop):
            return 128 + signal.SIGTERM
        time.sleep(POLL_SECONDS)
    line = [sys.executable, "-P", "-m", "siv_core.cli.kept", str(os.getpid()), *arguments]
    with open(log, "ab") as file:
        process = subprocess.Popen(
            line, cwd=folder, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    asked = False
    while process.poll() is None:
        if not asked and os.path.exists(stop):
            asked = True
            process.terminate()
        time.sleep(POLL_SECONDS)
    return process.returncode
