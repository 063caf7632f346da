"""A run in a child process that dies by SIGKILL at its n-th flush or rename. Used by test_resume."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Load torch once; every child is then a quick fork of the same clean process."""
    CONTEXT.set_forkserver_preload(["crash", "siv_core.session", "siv_core.evaluate", "matplotlib.figure", "PIL.Image"])


def in_child(function: Any, *arguments: Any, kill_at: int = 0, seconds: float = 120) -> tuple[int, int]:
    """(exit code, number of flushes and renames): −9 after a kill."""
    counted = CONTEXT.Value("i", 0)
    child = CONTEXT.Process(target=_work, args=(counted, kill_at, function, arguments))
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        raise AssertionError("hangs")
    return child.exitcode, counted.value


def _work(counted: Any, kill_at: int, function: Any, arguments: Any) -> None:
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
    function(*arguments)


def train(recipe: str, run_dir: str, *sets: str) -> None:
    from siv_core import session

    session.run(recipe, run_dir=Path(run_dir), sets=sets, device="cpu")


def prepare(recipe: str) -> None:
    from siv_core import build, catalogue
    from siv_core import recipe as recipes

    known = catalogue.load()
    data = build.dataset(recipes.load(Path(recipe), known), known)
    data.prepare(lambda what, done, total: None)
