"""Work in a child process that dies by SIGKILL, at its n-th flush or rename or after a while. Used by test_resume, test_kills."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")


@functools.cache
def preload() -> None:
    """Load everything once, before the first child; every child is then a quick fork of the same clean process."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        CONTEXT.set_forkserver_preload(["preloaded", "crash", "forked", "readers"])
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def in_child(
    function: Any, *arguments: Any, kill_at: int = 0, kill_after: float | None = None, seconds: float = 120, **more: Any
) -> tuple[int, int]:
    """(exit code, number of flushes and renames): −9 after a kill."""
    preload()
    counted = CONTEXT.RawValue("i", 0)  # without a lock, which a killed child would keep
    child = CONTEXT.Process(target=_work, args=(counted, kill_at, function, arguments, more))
    child.start()
    if kill_after is not None:
        child.join(kill_after)
        child.kill()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        raise AssertionError("hangs")
    return child.exitcode, counted.value


def _work(counted: Any, kill_at: int, function: Any, arguments: Any, more: Any) -> None:
    """Both before and after each call that makes something durable is a moment to die at."""
    import torch

    torch.set_num_threads(1)

    def deadly(call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count()
            result = call(*args, **kwargs)
            count()
            return result

        return wrapped

    def count() -> None:
        counted.value += 1
        if counted.value == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    function(*arguments, **more)


def nothing() -> None:
    """For the time that the first child takes."""


def train(recipe: str, run_dir: str, *sets: str) -> None:
    from siv_core.runs import session

    session.run(recipe, run_dir=Path(run_dir), sets=sets, device="cpu")


def train_with_toys(recipe: str, run_dir: str) -> None:
    """As `train_quickly`, with the components of `toys`."""
    import toys

    from siv_core.recipe import catalogue
    from siv_core.runs import session

    draw_quickly()
    known = toys.with_toys(catalogue.load())
    catalogue.load = lambda: known
    session.run(recipe, run_dir=Path(run_dir), device="cpu")


def train_quickly(recipe: str, run_dir: str) -> None:
    draw_quickly()
    train(recipe, run_dir)


def draw_quickly() -> None:
    """A blank picture for the curves: drawing them takes longer than all the rest of a small run and is not what is tried."""
    import numpy as np

    from siv_core.use import pictures

    pictures.curves = lambda path, lines, stages: pictures.save_png(path, np.full((len(lines), 8, 3), 255, np.uint8))


def evaluate(run_dir: str) -> None:
    import contextlib
    import io

    from siv_core.cli.main import cli

    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(["evaluate", run_dir, "--device", "cpu", "--json"], standalone_mode=False)


def render(data: str) -> None:
    """A few small cars."""
    from siv_plugins import rendered_cars as plugin

    os.environ["SIV_DATA"], plugin.MODELS, plugin.STORED, plugin.AZIMUTHS, plugin.VIEWS = data, 20, 8, 1, 4
    plugin.RenderedCars(8, 1, 0).prepare(lambda what, done, total: None)


def convert(data: str, source: str) -> None:
    """An HDF5 file of another form, in small blocks."""
    from siv_plugins import hdf5 as plugin

    os.environ["SIV_DATA"], plugin.BLOCK = data, 16
    plugin.HDF5Images(plugin.HDF5Config(path=source)).prepare(lambda what, done, total: None)


NOT_PERMITTED = 77  # exit code where this machine lets nobody mount anything


def siv(
    folder: str, *commands: list[str], limit: int = 0, stdout: str = "", tmpfs: str = "", env: dict[str, str] | None = None
) -> None:
    """`siv` in `folder`, a command after the other; `out`, `err` and `codes` beside the folder say what came of them.

    `limit`: bytes a file may have. `tmpfs`: the size of the disk under the folder, which ["space", SIZE] changes and
    ["read-only"] makes read-only; a copy of it is left at `FOLDER.copy`.
    """
    import resource
    import shutil
    import sys

    from siv_core.cli import main as cli

    at = Path(folder)
    os.environ.update(env or {})
    if tmpfs:
        _private_mounts()
        _mount(folder, f"size={tmpfs}")
        shutil.copytree(f"{folder}.first", folder, dirs_exist_ok=True)
    os.chdir(folder)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    codes = []
    for number, name in ((1, stdout or f"{folder}.out"), (2, f"{folder}.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if stdout == os.devnull:  # a pipe that nobody reads from
        there, here = os.pipe()
        os.close(there)
        os.dup2(here, 1)
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding=encoding, closefd=False) for number in (1, 2))
    for command in commands:
        if command[0] == "space":
            _mount(folder, f"remount,size={command[1]}")
        elif command[0] == "read-only":
            _mount(folder, "remount,ro")
        else:
            sys.argv = ["siv", *command]
            try:
                cli.main()
                codes.append(0)
            except SystemExit as end:
                codes.append(end.code or 0)
            sys.stdout.flush()
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Path(f"{folder}.codes").write_text(" ".join(map(str, codes)))
    if tmpfs:
        shutil.copytree(at, f"{folder}.copy", dirs_exist_ok=True)


def _private_mounts() -> None:
    """What is mounted from here on is seen by this process alone and goes with it."""
    import ctypes

    new_mounts, new_user, recursive_private = 0x20000, 0x10000000, 0x44000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_mounts) and libc.unshare(new_mounts | new_user):
        os._exit(NOT_PERMITTED)
    if libc.mount(b"none", b"/", None, recursive_private, None):
        os._exit(NOT_PERMITTED)


def _mount(folder: str, options: str) -> None:
    import subprocess

    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=False).returncode:
        os._exit(NOT_PERMITTED)


def prepare(recipe: str) -> None:
    from siv_core.recipe import build, catalogue
    from siv_core.recipe import recipe as recipes

    known = catalogue.load()
    data = build.dataset(recipes.load(Path(recipe), known), known)
    data.prepare(lambda what, done, total: None)
