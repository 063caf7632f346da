"""Work in a child process that dies by SIGKILL, at its n-th flush or rename or after a while. Used by test_resume, test_kills."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

PLUGINS = ("digits", "mlp", "pixel_losses", "standard_normal", "latent_probes", "rendered_cars", "hdf5")
CONTEXT = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Load torch once; every child is then a quick fork of the same clean process."""
    ours = ["crash", "siv_core.cli", "siv_core.session", "siv_core.evaluate", *(f"siv_plugins.{name}" for name in PLUGINS)]
    CONTEXT.set_forkserver_preload([*ours, "torch._dynamo", "matplotlib.figure", "PIL.Image", "sklearn.datasets", "h5py"])


def in_child(
    function: Any, *arguments: Any, kill_at: int = 0, kill_after: float | None = None, seconds: float = 120
) -> tuple[int, int]:
    """(exit code, number of flushes and renames): −9 after a kill."""
    counted = CONTEXT.Value("i", 0)
    child = CONTEXT.Process(target=_work, args=(counted, kill_at, function, arguments))
    child.start()
    if kill_after is not None:
        child.join(kill_after)
        child.kill()
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


def nothing() -> None:
    """For the time that the first child takes."""


def train(recipe: str, run_dir: str, *sets: str) -> None:
    from siv_core import session

    session.run(recipe, run_dir=Path(run_dir), sets=sets, device="cpu")


def train_quickly(recipe: str, run_dir: str) -> None:
    """As `train`, with a blank picture for the curves: drawing them takes longer than all the rest and is not what is tried."""
    import numpy as np

    from siv_core import pictures

    pictures.curves = lambda path, lines: pictures.save_png(path, np.full((len(lines), 8, 3), 255, np.uint8))
    train(recipe, run_dir)


def evaluate(run_dir: str) -> None:
    import contextlib
    import io

    from siv_core.cli import cli

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


def prepare(recipe: str) -> None:
    from siv_core import build, catalogue
    from siv_core import recipe as recipes

    known = catalogue.load()
    data = build.dataset(recipes.load(Path(recipe), known), known)
    data.prepare(lambda what, done, total: None)
