"""What all tests share. No test touches the user's data or more than one thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import readers
import torch
import toys
import trunks

from siv_core.recipe import catalogue as catalogues
from siv_core.use import image_distances

Done = subprocess.CompletedProcess[str]
Trunk = tuple[str, Path, image_distances.Backbone]  # its name, the data root it lies in, and what fits its digest

TINY = (
    toys.SOFT
    + """
[train]
batch = 64
length = "12 steps"
tick = "3 steps"
checkpoint = "4 steps"
[metrics.latent_probes]
class_factor = "digit"
"""
)

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # theirs too, where `nohup` started the tests
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Operations this small only wait for each other's threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def children_that_read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """They start as forks; `test_hdf5.py` has tests of the real ones."""
    with readers.served(tmp_path_factory.mktemp("readers")), pytest.MonkeyPatch.context() as patch:
        patch.setattr("siv_core.data.hdf5.subprocess", subprocess)  # brings it back at the end
        readers.use()
        yield


@pytest.fixture(scope="session", autouse=True)
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty data folder for the whole session, for this process and those it starts."""
    folder = tmp_path_factory.mktemp("data_root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIV_DATA", str(folder))
        patch.delenv("SIV_DISABLE", raising=False)
        yield folder


@pytest.fixture(scope="session")
def catalogue() -> catalogues.Catalogue:
    """Everything that is installed."""
    return catalogues.load()


@pytest.fixture(scope="session")
def siv_in() -> Callable[..., Done]:
    """`siv_in(folder, "run", recipe, …)`: the command, started in a folder; a fork of a process that has torch already, and so
    are the trials of a sweep.

    With `fresh=True`, or an environment of its own, it is the installed command in a new interpreter: where imports, entry points
    or anything else that a start brings is what is tried.
    """

    def run(folder: Path, *arguments: Any, seconds: float = 60, env: dict[str, str] | None = None, fresh: bool = False) -> Done:
        if not fresh and env is None:
            return forked.run(folder, *arguments, seconds=seconds)
        return subprocess.run(
            [sys.executable, str(forked.COMMAND), *map(str, arguments)],
            cwd=folder,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    return run


@pytest.fixture
def siv(siv_in: Callable[..., Done], tmp_path: Path) -> Callable[..., Done]:
    """`siv("run", recipe, …)`: the installed command in this test's own folder."""
    return lambda *arguments, **more: siv_in(tmp_path, *arguments, **more)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, siv_in: Callable[..., Done]) -> tuple[Done, Path]:
    """What the shipped digits recipe said, and its run directory; trained once, and not to be changed."""
    folder = tmp_path_factory.mktemp("digits")
    recipe = Path(__file__).parent.parent / "recipes/digits.toml"
    return siv_in(folder, "run", recipe, "--run-dir", "run", "--device", "cpu", seconds=800), folder / "run"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A recipe that trains in a fraction of a second."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module", params=["alex", "vgg"])
def saved_trunk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, image_distances.Backbone]:
    """A data folder with a trunk of LPIPS in the real layout, and the entry of the table that fits its digest."""
    root = tmp_path_factory.mktemp(request.param)
    return request.param, root, trunks.save(request.param, root)


@pytest.fixture
def backbone(saved_trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backbone of LPIPS whose trunk is at hand, with random weights."""
    monkeypatch.setenv("SIV_DATA", str(saved_trunk[1]))
    monkeypatch.setitem(image_distances.BACKBONES, saved_trunk[0], saved_trunk[2])
    return saved_trunk[0]
