"""`train.graphs`: a phase recorded once and replayed, by a stand-in for CUDA's recorder: same bits; what cannot be recorded.

The real recorder is in test_gpu.
"""

from __future__ import annotations

import re

import pytest
import torch
import toys
from torch.utils._pytree import tree_leaves

from siv_core.errors import UserError
from siv_core.runs.watchers import Silent
from siv_core.train import captured, stage
from siv_core.train.parallel import Parallel
from siv_core.train.step import play
from siv_core.train.trainer import Trainer


class Stand:
    """Like CUDA graphs: recording does nothing, a replay reads and writes the same tensors every time."""

    def __init__(self, trainer):
        self.trainer, self.recorded, self.replayed = trainer, 0, 0

    def warm(self, run):
        return run()

    def record(self, run):
        buffers = [(b, b.clone()) for player in self.trainer.players.values() for b in player.module.buffers()]
        played = run()
        for buffer, before in buffers:
            buffer.copy_(before)
        self.recorded += 1
        for tensor in written(played):
            tensor.fill_(float("nan"))  # nothing is there before the first replay

        def replay():
            self.replayed += 1
            for old, new in zip(written(played), written(run()), strict=True):
                old.copy_(new)

        return played, replay


def written(played):
    tensors = [leaf for leaf in tree_leaves((played.gradients, played.row, played.carry)) if isinstance(leaf, torch.Tensor)]
    return [tensor.data for tensor in tensors if tensor.is_floating_point()]


STEPS = {"train": {"batch": 8, "length": "9 steps", "tick": "3 steps"}}
RUNS = {
    "vae": {"objective": {"name": "vae"}},
    "soft": {"objective": {"name": "soft_intro_vae", "beta_neg": 4.0}},
    "hinge": {"objective": {"name": "intro_vae", "beta_neg": 2.0, "margin": 2.0}},
    "bootstrap": {"objective": {"name": "bootstrap_soft_intro_vae", "beta_neg": 4.0}},
    "third player": {
        "objective": {"name": "soft_intro_vae", "beta_neg": 4.0, "prior": "decoder"},
        "prior": {"name": "mixture", "modes": 3},
    },
    "batch norm": {"objective": {"name": "soft_intro_vae", "beta_neg": 4.0}, "network": {"name": "normed"}},
}


def trained(catalogue, folder, monkeypatch, tree, recorded):
    trainer = toys.trainer(catalogue, folder, tree)
    stand = Stand(trainer)
    with monkeypatch.context() as patch:
        if recorded:
            patch.setattr(stage, "phase_of", lambda train, device: captured.CapturedPlay(play, stand))
        trainer.run()
    return trainer, stand


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_has_the_bits_of_the_run_as_it_is(catalogue, tmp_path, monkeypatch, name):
    tree = toys.tree(**{**STEPS, **RUNS[name]})
    plain, _ = trained(catalogue, tmp_path / "plain", monkeypatch, tree, recorded=False)
    other, stand = trained(catalogue, tmp_path / "recorded", monkeypatch, tree, recorded=True)
    phases = len(other.active.objective.phases)
    assert (stand.recorded, stand.replayed) == (phases, phases * (9 - captured.WARM_UP))
    for player in plain.players:
        assert toys.same(toys.weights(plain, player), toys.weights(other, player)), player
    lines = [[{**line, "wall": None} for line in trainer.rundir.read("stats")] for trainer in (plain, other)]
    assert lines[0] == lines[1]


def test_what_has_faded_in_is_recorded_anew(catalogue, tmp_path, monkeypatch):
    """A graph of the fading networks would go on fading."""
    stages = [
        {"length": "1 steps", "data": {"size": 4}},
        {"length": "12 steps", "fade": 0.5, "objective": {"name": "vae"}},
    ]
    tree = toys.tree(network={"name": "growing"}, stages=stages, train={"batch": 8, "tick": "3 steps"})
    plain, _ = trained(catalogue, tmp_path / "plain", monkeypatch, tree, recorded=False)
    other, stand = trained(catalogue, tmp_path / "recorded", monkeypatch, tree, recorded=True)
    assert stand.recorded == 2
    for player in plain.players:
        assert toys.same(toys.weights(plain, player), toys.weights(other, player)), player


def test_what_cannot_be_recorded_is_told(catalogue, tmp_path, siv):
    both = {"batch": 8, "length": "1 steps", "graphs": True, "keep_graphs": True, "micro_batch": 4}
    with pytest.raises(UserError) as error:
        toys.trainer(catalogue, tmp_path, toys.tree(train=both)).run()
    assert [re.findall(r"train.graphs: (.*?):", line)[0] for line in error.value.problems] == [
        "a recorded phase leaves no graph to the next one",
        "pieces of a batch would be written over each other",
    ]
    shared = toys.trainer(catalogue, tmp_path, toys.tree(network={"name": "normed"}, train={**STEPS["train"], "graphs": True}))
    with pytest.raises(UserError, match=r"train\.graphs: network 'normed' takes statistics .*, over several processes: leave"):
        Trainer.of(shared.built, shared.rundir, shared.device, Parallel(rank=0, world=2), Silent())
    (tmp_path / "c.toml").write_text(toys.SOFT + "[train]\nlength = '1 steps'\ngraphs = true\n")
    ended = siv("run", "c.toml", "--run-dir", "run", "--device", "cpu")
    assert ended.returncode == 2
    assert "train.graphs: CUDA graphs need a CUDA device, this is 'cpu': leave train.graphs out" in ended.stderr
    assert not (tmp_path / "run").exists()
    measured = siv("check", "c.toml", "--measure", "--device", "cpu")
    assert measured.returncode == 2
    assert "train.graphs: CUDA graphs need a CUDA device" in measured.stderr


def test_a_phase_that_reads_a_number_back_is_told(catalogue, tmp_path, monkeypatch):
    class Refusing(Stand):
        def record(self, run):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    trainer = toys.trainer(catalogue, tmp_path, toys.tree(**STEPS))
    monkeypatch.setattr(stage, "phase_of", lambda train, device: captured.CapturedPlay(play, Refusing(trainer)))
    with pytest.raises(UserError, match=r"phase 'encoder' cannot be recorded \(operation .*capturing\): leave train"):
        trainer.run()
