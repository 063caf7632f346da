"""What asks for more memory than there is gets a sentence before anything is taken."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from conftest import TINY

from siv_core.errors import UserError
from siv_core.recipe import build
from siv_core.recipe.recipe import load, parse
from siv_core.runs import check as inspect
from siv_core.store import memory


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


@pytest.mark.parametrize(
    ("meminfo", "pages", "limits", "free"),
    [
        ("MemTotal: 100 kB\nMemAvailable:   40 kB\n", {}, (), 40 * 1024),
        ("MemAvailable: 40 kB\n", {}, [("10000", "4000")], 6000),  # the container's limit is the smaller one
        ("MemAvailable: 40 kB\n", {}, [("max", "4000")], 40 * 1024),  # version 2 without a limit
        ("MemAvailable: 40 kB\n", {}, [(None, None), ("9223372036854771712", "4000")], 40 * 1024),  # version 1 without one
        (None, {"SC_PHYS_PAGES": 10}, (), 5 * 4096),  # no Linux: half of what there is
        (None, {}, (), 4 << 30),
    ],
)
def test_what_is_free_is_read_where_the_machine_says_it(monkeypatch, tmp_path, meminfo, pages, limits, free):
    def told(name, text):
        if text is not None:
            (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    monkeypatch.setattr(memory, "MEMINFO", told("meminfo", meminfo))
    monkeypatch.setattr(memory, "CGROUPS", [(told(f"limit{i}", a), told(f"used{i}", b)) for i, (a, b) in enumerate(limits)])
    monkeypatch.setattr(memory.os, "sysconf_names", pages)
    monkeypatch.setattr(memory.os, "sysconf", {**pages, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert memory.free() == free


def test_weights_are_counted_before_they_are_made(made, catalogue):
    built = made()
    assert build._weights_in_bytes(built.recipe, catalogue, built.spec) == memory.size_of(*built.modules.values()) > 0


def test_weights_come_out_as_without_the_guard(made):
    weights = [p.clone() for p in made().networks.encoder.parameters()]
    again = [p.clone() for p in made().networks.encoder.parameters()]
    assert all(map(torch.equal, weights, again))


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (("network.hidden=[65536, 65536]",), "network: its weights would take at least 34.4 GB of memory, 1 GB are free here"),
        (("network.z_dim=100000",), "--set network.z_dim=100000: network.z_dim: must be >= 1 and <= 65536, got 100000"),
        (("train.batch=1000000000000",), "train.batch: training with 1,000,000,000,000 would take at least 280 TB of memory"),
        (("train.batch=9223372036854775807",), "train.batch: training with 9,223,372,036,854,775,807 would take at least "),
        (("network.hidden=[8000, 8000]",), "train.batch: training with 64 would take at least 2.0"),
    ],
)
def test_a_recipe_that_asks_for_too_much(made, monkeypatch, catalogue, sets, told):
    monkeypatch.setattr(memory, "free", lambda device="cpu": 1_000_000_000)
    with pytest.raises(UserError) as error:
        build.room(made(*sets), on_cpu=True)
    assert told in str(error.value)


def test_a_check_takes_no_memory_for_the_batch(made, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device="cpu": 10**18)
    built = made("train.batch=1000000000000")
    small = made("train.batch=1000000")
    assert inspect.flops(built, 0) == 10**6 * inspect.flops(small, 0)


def test_operations_are_counted_by_hand(catalogue):
    """Soft-IntroVAE with two layers a network; a gradient to weights costs as much as the layer, and so does one to its input."""
    n, (e1, e2), (d1, d2) = 64, (64 * 16, 16 * 6), (3 * 16, 16 * 64)
    counts = {}
    for kept in (False, True):
        train = {"batch": n, "length": "1 steps", "keep_graphs": kept}
        tree = toys.tree(objective={"name": "soft_intro_vae", "gamma_r": 0.0}, train=train)
        read = parse(tree, Path("toy.toml"), b"", catalogue, (), (), False)
        counts[kept] = inspect.flops(build.build(read, catalogue, build.dataset(read, catalogue)), 0)
    # E of x, x_rec and x_prior, D of four codes; back through D of three of them, to E's weights from three images
    encoder = 3 * (e1 + e2) + 4 * (d1 + d2) + 3 * (d1 + d2) + 3 * (e1 + 2 * e2)
    # D of two codes, unless they are kept, E of two fakes; back through E to both, to D's weights from two codes
    decoder = 2 * (d1 + d2) + 2 * (e1 + e2) + 2 * (e1 + e2) + 2 * (d1 + 2 * d2)
    assert counts[False] == 2 * n * (encoder + decoder)
    assert counts[False] - counts[True] == 2 * n * 2 * (d1 + d2)


def test_a_run_to_start_from_that_is_not_there(catalogue, tmp_path):
    path = tmp_path / "some.toml"
    path.write_text(TINY + '[init]\nrun = "nowhere"\n')
    with pytest.raises(UserError, match=rf"some.toml:\d+: init.run: {os.getcwd()}/nowhere: no run here"):
        inspect.check(load(path, catalogue), catalogue)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory_is_there_for_the_next_step(kept):
    """64 MB, allocated and freed again and again in a fresh process: 16,000 new pages a time, or none once it has its place."""
    code = f"""
import resource, torch
from siv_core.store import memory
{"memory.keep_what_is_freed()" if kept else ""}
def work():
    torch.full((16_000_000,), 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults = [work() for _ in range(20)]
print(faults[-1] - faults[10])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (int(done.stdout) < 2_000) is kept
