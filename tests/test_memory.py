"""What asks for more memory than there is gets a sentence before anything is taken."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch
from conftest import TINY
from torch import nn

from siv_core import build, inspect, memory
from siv_core.errors import UserError
from siv_core.recipe import load


@pytest.fixture
def made(catalogue, tmp_path):
    """`made("train.batch=8")`: the tiny recipe, built."""

    def made(*sets: str):
        path = tmp_path / "some.toml"
        path.write_text(TINY)
        recipe = load(path, catalogue, (), sets)
        return build.build(recipe, catalogue, build.dataset(recipe, catalogue))

    return made


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (13_240_000_000, "13.2 GB"), (10**25, "1e+07 EB")]
)
def test_sizes_in_words(size, text):
    assert memory.text(size) == text


def test_free_is_between_nothing_and_all():
    assert 10_000_000 < memory.free() < 10**15


def test_tensors_beyond_what_is_free_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda: 100_000_000)
    with memory.Bounded("network: its weights", "fewer or narrower layers"):
        layers = [nn.Linear(2000, 2000) for _ in range(5)]  # 16 MB each
        with pytest.raises(UserError, match=r"network: its weights would take at least 112 MB of memory, 100 MB are free here"):
            layers += [nn.Linear(2000, 2000) for _ in range(5)]
        with pytest.raises(UserError, match=r"would take at least 4\.61 EB"):
            torch.empty(2**60, dtype=torch.float32)
        nn.Linear(10**6, 10**6, device="meta")  # takes nothing
    nn.Linear(2000, 2000)


def test_weights_come_out_as_without_the_guard(made):
    weights = [p.clone() for p in made().networks.encoder.parameters()]
    again = [p.clone() for p in made().networks.encoder.parameters()]
    assert all(map(torch.equal, weights, again))


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (("network.hidden=[65536, 65536]",), "network: its weights would take at least 17.2 GB of memory, 1 GB are free here"),
        (("network.z_dim=100000",), "--set network.z_dim=100000: network.z_dim: must be >= 1 and <= 65536, got 100000"),
        (("train.batch=1000000000000",), "train.batch: training with 1,000,000,000,000 would take at least 280 TB of memory"),
        (("train.batch=9223372036854775807",), "train.batch: training with 9,223,372,036,854,775,807 would take at least "),
        (("network.hidden=[8000, 8000]",), "train.batch: training with 64 would take at least 2.0"),
    ],
)
def test_a_recipe_that_asks_for_too_much(made, monkeypatch, catalogue, sets, told):
    monkeypatch.setattr(memory, "free", lambda: 1_000_000_000)
    with pytest.raises(UserError) as error:
        build.room(made(*sets), on_cpu=True)
    assert told in str(error.value)


def test_a_check_takes_no_memory_for_the_batch(made, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda: 10**18)
    built = made("train.batch=1000000000000")
    small = made("train.batch=1000000")
    assert inspect.flops(built, 0) == 10**6 * inspect.flops(small, 0)


def test_a_run_to_start_from_that_is_not_there(catalogue, tmp_path):
    path = tmp_path / "some.toml"
    path.write_text(TINY + '[init]\nrun = "nowhere"\n')
    with pytest.raises(UserError, match=r"some.toml:\d+: init.run: nowhere: no run here"):
        inspect.check(load(path, catalogue), catalogue)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory_is_there_for_the_next_step(kept):
    """64 MB, allocated and freed again and again in a fresh process: 16,000 new pages a time, or none once it has its place."""
    code = f"""
import resource, torch
from siv_core import memory
{"memory.keep_what_is_freed()" if kept else ""}
def work():
    torch.full((16_000_000,), 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults = [work() for _ in range(20)]
print(faults[-1] - faults[10])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (int(done.stdout) < 2_000) is kept
