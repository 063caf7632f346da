"""Shares of a batch, and a device for each process; what two processes compute together is in test_shapes."""

from __future__ import annotations

import pytest
import torch

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
