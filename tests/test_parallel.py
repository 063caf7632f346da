"""Shares of a batch, a device for each process, shipped recipes by two; what else two compute together is in test_shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from siv_core.errors import UserError
from siv_core.train import parallel
from siv_core.train.parallel import Parallel


@pytest.mark.parametrize(("n", "world"), [(64, 1), (64, 2), (7, 3), (3, 3)])
def test_shares_are_the_whole_batch_once(n, world):
    shares = [Parallel(rank, world).share(n) for rank in range(world)]
    assert [i for share in shares for i in range(n)[share]] == list(range(n))
    assert min(share.stop - share.start for share in shares) >= n // world


def test_a_batch_that_is_too_small_is_refused_in_words():
    with pytest.raises(UserError, match=r"train.batch: 2 images cannot be shared by 3 processes; make the batch larger"):
        Parallel(0, 3).share(2)


@pytest.fixture
def machine(monkeypatch):
    """Two CUDA devices, as far as this process is told; the list is of those that were set."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    return chosen


def test_each_process_has_a_device_of_its_own(machine):
    assert parallel.local_device(torch.device("cuda")) == torch.device("cuda:1")
    assert machine == [torch.device("cuda:1")]


@pytest.mark.parametrize("name", ["cpu", "cuda:0"])
def test_a_device_that_was_named_stays(machine, name):
    assert parallel.local_device(torch.device(name)) == torch.device(name)
    assert machine == []


def test_one_process_keeps_its_device(machine, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE")
    assert parallel.local_device(torch.device("cuda")) == torch.device("cuda")


def test_more_processes_than_devices(machine, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 of this machine needs a CUDA device of its own, there are 2"):
        parallel.local_device(torch.device("cuda"))


LEAVING = """
import atexit, os, torch, torch.distributed as dist, torch.nn as nn
from siv_core.train import parallel
atexit.register(lambda: os.write(1, f"{at_work.rank} of {at_work.world} left: {not dist.is_initialized()}\\n".encode()))
at_work = parallel.start(torch.device("cpu"))
weight = nn.Parameter(torch.full((3,), float(at_work.rank)))
at_work.agree([weight])
weight.square().sum().backward()
assert weight.tolist() == weight.grad.tolist() == [0.0] * 3
"""


@pytest.mark.slow
def test_processes_agree_without_a_warning_and_leave_one_another_at_their_end(tmp_path):
    (tmp_path / "leaving.py").write_text(LEAVING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"}
    done = subprocess.run([*command, "leaving.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.splitlines()) == ["0 of 2 left: True", "1 of 2 left: True"]


# -- every shipped recipe --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_take_the_first_steps_of_every_shipped_recipe_like_one(tmp_path):
    """20 steps over all stages of each, batch norms with shared statistics among them, in float64: what is left is rounding."""
    script = Path(__file__).parent / "shipped.py"
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "SIV_DATA": str(tmp_path / "none"), "OMP_NUM_THREADS": "1"}
    for name, launcher in (("one", []), ("two", two)):
        (tmp_path / name).mkdir()
        command = [sys.executable, *launcher, str(script), str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    shipped = {path.stem for path in (script.parent.parent / "recipes").glob("*.toml")}
    assert {path.stem for path in (tmp_path / "one").glob("*.json")} == shipped
    for name in shipped:
        one, other = (json.loads((tmp_path / count / f"{name}.json").read_text()) for count in ("one", "two"))
        for ours, theirs in zip(other, one, strict=True):
            for phase, terms in theirs.items():
                assert ours[phase] == pytest.approx(terms, rel=1e-6, abs=1e-9), (name, phase)
        weights = [load_file(tmp_path / count / f"{name}.safetensors") for count in ("one", "two")]
        for key, value in weights[0].items():
            torch.testing.assert_close(
                weights[1][key], value, rtol=1e-5, atol=1e-6, msg=lambda text, of=(name, key): f"{of}: {text}"
            )
