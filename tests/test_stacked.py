"""Runs trained as one: the same numbers as alone, each with its own files, and what cannot be joined."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch
import toys
from toys import SOFT

from siv_core.errors import UserError
from siv_core.nets import Priors
from siv_core.runs import opened, together
from siv_core.runs.watchers import Silent
from siv_core.store.rundir import RunDir
from siv_core.train import stacked, stage
from siv_core.train.stacked import Stack, alike, unfit

LINEAR = {"eps": 1.0}  # with so large an eps Adam's step is linear in the gradient, and rounding stays rounding
BOTH = {"name": "soft_intro_vae", "beta_neg": 4.0, "prior": "decoder"}
MODES = {"modes": 4, "draws": 3, "learn_weights": True}
CASES = {
    "vae": {"objective": {"name": "vae"}},
    "soft": {},
    "kept graphs": {"train": {"keep_graphs": True, "clip_gradient": 0.01}},
    "gamma_r": {"objective": {"name": "soft_intro_vae", "gamma_r": 1.0, "fakes": ["prior"], "stop_gradient": "full"}},
    "intro, batch": {"objective": {"name": "intro_vae", "preset": "hhb072"}},
    "bootstrap": {"objective": {"name": "bootstrap_soft_intro_vae", "copy_epochs": 1}},
    "vamp": {"prior": {"name": "vamp", **MODES}, "objective": BOTH},
    "mixture": {
        "prior": {"name": "mixture", "modes": 4, "draws": 3, "learn_weights": True, "responsibility": 2.0},
        "objective": BOTH,
    },
    "flow": {"prior": {"name": "flow"}, "objective": BOTH},  # is its own distribution
    "cnn": {"network": {"name": "residual_cnn", "channels": [8], "z_dim": 3}, "shadow": {"of": ["encoder"]}},
}


def numbers(run):
    """What may differ between runs that are one."""
    return {"beta_rec": 1.0 + run, "beta_kl": 0.5 + run}


def recipe(case, run):
    train = {"batch": 16, "length": "4 steps", "seed": run, **case.get("train", {})}
    objective = {**case.get("objective", {"name": "soft_intro_vae", "beta_neg": 4.0}), **numbers(run)}
    others = {key: value for key, value in case.items() if key not in ("train", "objective")}
    return toys.tree(**others, objective=objective, train=train, optim={**LINEAR, "lr": 0.05 / (1 + run)})


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_runs_have_the_numbers_that_they_have_alone(catalogue, tmp_path, case):
    runs = [toys.trainer(catalogue, tmp_path / f"stack{run}", recipe(case, run), toys_too=False) for run in range(3)]
    alone = [toys.trainer(catalogue, tmp_path / f"alone{run}", recipe(case, run), toys_too=False) for run in range(3)]
    agree(runs, alone)


def test_bounds_that_a_prior_has_are_each_run_s_own(catalogue, tmp_path):
    class Bounded(torch.nn.Module):
        def logvar_bounds(self):
            return self.low, self.low + 0.5

    trainers = [toys.trainer(catalogue, tmp_path / str(run), recipe({}, run % 3)) for run in range(6)]
    for run, trainer in enumerate(trainers):
        prior = trainer.built.priors.groups["z"]
        prior.__class__ = type("Own", (Bounded, type(prior)), {})
        prior.register_buffer("low", torch.full((3,), -1.0 - run % 3))
    agree(trainers[:3], trainers[3:])
    assert len({float(trainer.rundir.read("stats")[0]["phases"]["encoder"]["logvar_real"]) for trainer in trainers[:3]}) == 3


def agree(runs, alone):
    """Trained as one, and each alone."""
    assert not any(unfit(trainer.built) for trainer in runs)
    assert alike(runs[0].built) == alike(runs[1].built) == alike(runs[2].built)
    for trainer in runs:
        trainer.active = stage.enter(trainer, 0)
    before = [toys.weights(runs[0], name) for name in runs[0].players]
    stack = Stack(runs)
    assert all(toys.same(own, toys.weights(runs[0], name)) for own, name in zip(before, runs[0].players, strict=True))
    for _ in range(4):
        stack.step()
        for trainer in runs:
            trainer.count(trainer.active)
    for trainer in runs:
        trainer.tick(time.monotonic())
    for one, other in zip(runs, alone, strict=True):
        active = stage.enter(other, 0)
        for _ in range(4):
            other.advance(active)
        other.tick(time.monotonic())
        for name in one.kept:
            ours, theirs = one.kept[name].kept()[0], other.kept[name].kept()[0]
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        ours, theirs = (json.dumps(trainer.rundir.read("stats")[0]["phases"]) for trainer in (one, other))
        assert flat(json.loads(ours)) == pytest.approx(flat(json.loads(theirs)), rel=1e-4, abs=1e-6)
    moved = [toys.weights(trainer, "decoder") for trainer in runs]
    assert not toys.same(moved[0], moved[1])


def flat(phases):
    return {f"{phase}.{name}": value for phase, terms in phases.items() for name, value in terms.items()}


# -- which can be one ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"objective": {"beta_rec": 7.0}}, True),
        ({"objective": {"gamma_r": 0.5}}, True),
        ({"objective": {"gamma_r": 0.0}}, False),  # passes are left out
        ({"objective": {"stop_gradient": "full"}}, False),
        ({"objective": {"name": "vae"}}, False),
        ({"train": {"batch": 8}}, False),
        ({"train": {"length": "9 steps"}}, False),
        ({"network": {"name": "mlp", "z_dim": 3, "hidden": [8]}}, False),
        ({"train": {"seed": 5}}, True),
        ({"optim": {"betas": [0.5, 0.9]}}, True),
        ({"metrics": {"latent_probes": {"class_factor": "digit"}}}, True),
    ],
)
def test_runs_are_one_where_they_differ_in_numbers_alone(catalogue, tmp_path, other, same):
    base = {"objective": {"name": "soft_intro_vae", "gamma_r": 1.0}, "train": toys.DIGITS["train"]}
    changed = {**base, **{key: {**base.get(key, {}), **value} for key, value in other.items()}}
    if other.get("objective", {}).get("name") == "vae":
        changed["objective"] = {"name": "vae"}
    one, two = (toys.trainer(catalogue, tmp_path / str(i), toys.tree(**tables)).built for i, tables in enumerate((base, changed)))
    assert (alike(one) == alike(two)) == same


def test_a_loss_that_may_hide_numbers_counts_with_all_its_settings():
    hidden = 3.0
    assert stacked._function(lambda nets: hidden, {"beta": 1.0})[1:] == [{"beta": 1.0}]
    assert stacked._function(flat, {"beta": 1.0}) == [f"{flat.__module__}.flat"]


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"network": {"name": "residual_cnn", "channels": [8], "z_dim": 3, "norm": "batch"}}, "statistics of a batch"),
        ({"train": {**toys.DIGITS["train"], "micro_batch": 8}}, "micro_batch"),
    ],
)  # fmt: skip
def test_what_cannot_be_one_is_told(catalogue, tmp_path, tables, reason):
    [told] = unfit(toys.trainer(catalogue, tmp_path, toys.tree(**tables)).built)
    assert reason in told


def test_what_cannot_be_mapped_is_told_by_phase(catalogue, tmp_path, monkeypatch):
    runs = [toys.trainer(catalogue, tmp_path / str(run), recipe({}, run)) for run in range(2)]
    for trainer in runs:
        trainer.active = stage.enter(trainer, 0)

    def reading(self, encode):
        raise RuntimeError("vmap: It looks like you're calling .item() on a Tensor")

    monkeypatch.setattr(Priors, "forward", reading)
    with pytest.raises(UserError, match=r"phase 'encoder' cannot be mapped over runs \(vmap: .*\): leave --stack out"):
        Stack(runs).step()


# -- as a command ----------------------------------------------------------------------------------------------------------------

TINY = (
    SOFT
    + """
[train]
batch = 32
length = "12 steps"
tick = "3 steps"
checkpoint = "4 steps"
[metrics.latent_probes]
class_factor = "digit"
trained = []
"""
)
SWEEP = """
format = 1
recipe = "tiny.toml"
seeds = [0, 1]
[[trials]]
label = "soft"
grid = { "objective.beta_neg" = [2.0, 4.0] }
"""
WILD = (
    SWEEP
    + """
[[trials]]
label = "wild"
optim.lr = 1e30
[[trials]]
label = "wide"
network.hidden = [8]
"""
)


def test_a_stacked_sweep_is_a_sweep(siv, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "some.toml").write_text(SWEEP)
    done = siv("sweep", "some.toml", "--stack", "8", "--device", "cpu", "--root", "stack", seconds=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 trials are trained as one: soft_beta_neg=2.0_seed=0, soft_beta_neg=2.0_seed=1," in done.stdout
    plain = siv("sweep", "some.toml", "--device", "cpu", "--root", "plain", seconds=200)
    assert plain.returncode == 0, plain.stderr
    for seed in (0, 1):
        for beta in ("2.0", "4.0"):
            ours, theirs = (RunDir(tmp_path / root / f"soft_beta_neg={beta}_seed={seed}") for root in ("stack", "plain"))
            assert ours.state() == "finished"
            assert [line["step"] for line in ours.read("stats")] == [3, 6, 9, 12]
            first, other = (flat(run.read("stats")[0]["phases"]) for run in (ours, theirs))
            assert first == pytest.approx(other, rel=1e-3)
            assert ours.resolved() == theirs.resolved()
            files = [sorted(path.name for path in run.path.rglob("*") if path.is_file()) for run in (ours, theirs)]
            assert files[0] == files[1]
            assert "finished at step 12" in (tmp_path / "stack/logs" / f"{ours.path.name}.txt").read_text()
            opened.load(ours.path, device="cpu").sample(2)
    again = siv("sweep", "some.toml", "--stack", "8", "--device", "cpu", "--root", "stack", seconds=100)
    assert "4 trials (4 finished)" in again.stdout
    assert "starting" not in again.stdout


def test_one_that_diverges_leaves_the_others_and_one_of_another_shape_runs_alone(siv, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "some.toml").write_text(WILD.replace("[0, 1]", "[0]").replace("[2.0, 4.0]", "[2.0]"))
    done = siv("sweep", "some.toml", "--stack", "8", "--device", "cpu", seconds=200)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "2 trials are trained as one" in done.stdout
    assert "wide_seed=0 is not trained with soft_beta_neg=2.0_seed=0: they differ in network.hidden" in done.stdout
    states = {
        name: RunDir(tmp_path / f"runs/some/{name}").state()
        for name in ("soft_beta_neg=2.0_seed=0", "wild_seed=0", "wide_seed=0")
    }
    assert list(states.values()) == ["finished", "diverged", "finished"]
    assert "diverged wild_seed=0 (exit 3)" in done.stdout
    assert "no longer finite" in (tmp_path / "runs/some/logs/wild_seed=0.txt").read_text()


def member(folder, name, sets=()):
    return together.Member(name, str(folder / "tiny.toml"), (), tuple(sets), str(folder / name), str(folder / f"{name}.txt"))


class Stopping(Silent):
    """Asks for an end after so many questions."""

    def __init__(self, after):
        self.left = after

    def asked_to_stop(self):
        self.left -= 1
        return 0 if self.left >= 0 else signal.SIGTERM


def test_stopped_ones_go_on_and_those_behind_go_first(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    assert together.run([member(tmp_path, "a")], "cpu", Stopping(5)) == {"a": 143}
    members = [member(tmp_path, "a"), member(tmp_path, "b", ["train.seed=3"])]
    assert RunDir(tmp_path / "a").state() == "stopped"
    assert together.run(members, "cpu", Silent()) == {"a": 0, "b": 0}
    assert together.run([member(tmp_path, "c")], "cpu", Silent()) == {"c": 0}
    for name in "abc":
        assert [line["step"] for line in RunDir(tmp_path / name).read("stats")] == [3, 6, 9, 12]
    a, c = (flat(RunDir(tmp_path / name).read("stats")[0]["phases"]) for name in "ac")
    assert a == pytest.approx(c, rel=1e-3)
    assert together.run([member(tmp_path, "d", ["objective.beta=1"])], "cpu", Silent()) == {"d": 2}
    assert "error: --set objective.beta=1: objective.beta: unknown key" in (tmp_path / "d.txt").read_text()


class Measuring(Silent):
    """Asks for an end when all are trained and the first pictures are there."""

    def __init__(self, folder):
        self.folder = folder

    def asked_to_stop(self):
        return signal.SIGTERM if list(self.folder.glob("*/images/curves.png")) else 0


def test_a_stop_is_heard_while_runs_are_measured(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    members = [member(tmp_path, "a"), member(tmp_path, "b", ["train.seed=3"])]
    assert together.run(members, "cpu", Measuring(tmp_path)) == {"a": 143, "b": 143}
    assert not RunDir(tmp_path / "a").read("metrics")
    assert together.run(members, "cpu", Silent()) == {"a": 0, "b": 0}
    assert [len(RunDir(tmp_path / name).read("stats")) for name in "ab"] == [4, 4]
    assert RunDir(tmp_path / "a").read("metrics")
