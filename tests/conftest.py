"""What all tests share. No test touches the user's data or more than one thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys

from siv_core import catalogue as catalogues

Done = subprocess.CompletedProcess[str]

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


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Operations this small only wait for each other's threads."""
    torch.set_num_threads(1)


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
    """`siv_in(folder, "run", recipe, …)`: the installed command, started in a folder."""
    command = Path(sysconfig.get_path("scripts")) / "siv"

    def run(folder: Path, *arguments: Any, seconds: float = 60, env: dict[str, str] | None = None) -> Done:
        return subprocess.run(
            [sys.executable, str(command), *map(str, arguments)],
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


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A recipe that trains in a fraction of a second."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path
