"""What later parts of the field need of the core, proven now on small components (see `toys`)."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from safetensors.torch import load_file
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from siv_core.component import per_group
from siv_core.errors import Diverged, UserError
from siv_core.nets import Priors, make_nets, sources
from siv_core.objectives.soft_intro_vae import SoftIntroVAEConfig, build_soft_intro_vae
from siv_core.protocols import Batch, Phase, Spec
from siv_core.recipe import build
from siv_core.recipe.recipe import parse
from siv_core.runs import check as inspect
from siv_core.runs import session
from siv_core.runs.watchers import Silent
from siv_core.seeding import Streams
from siv_core.testing import _toy_prior, check_objective, check_prior, leaves, toy_networks
from siv_core.train import stage
from siv_core.train.parallel import Parallel
from siv_core.train.stats import Stats
from siv_core.train.step import play, tensors_of
from siv_core.train.trainer import Trainer


def test_each_phase_moves_its_players_alone(catalogue, tmp_path):
    t = toys.trainer(catalogue, tmp_path, toys.tree())
    active = stage.enter(t, 0)
    noise = active.objective.draw(64, Streams(0, 0), active.sources)
    batch = t.feed.batch(torch.arange(64), active.stage.shape, torch.contiguous_format)
    carries = [{}]
    for phase in active.objective.phases:
        before = {name: toys.weights(t, name) for name in t.players}
        t.play(phase, active, [(batch, noise)], carries)
        for name in t.players:
            moved = not toys.same(before[name], toys.weights(t, name))
            assert moved == (name in phase.updates), (phase.name, name)
        assert all(p.grad is None for player in t.players.values() for p in player.parameters)


def test_vamp_prior_learns_through_the_encoder_in_the_warm_up_and_rests_later(catalogue, tmp_path):
    stages = [{"length": "3 steps", "objective": {"name": "vae"}}, {"length": "3 steps"}]
    train = {"batch": 64, "tick": "1 steps"}
    t = toys.trainer(catalogue, tmp_path, toys.tree(prior={"name": "vamp"}, stages=stages, train=train))
    assert t.run() == "finished"
    assert t.counters.step == 6
    lines = t.rundir.read("stats")
    assert [list(line["phases"]) for line in lines] == [["vae"]] * 3 + [["encoder", "decoder"]] * 3

    t = toys.trainer(catalogue, tmp_path / "again", toys.tree(prior={"name": "vamp"}, stages=stages, train=train))
    active = stage.enter(t, 0)
    first_images = t.feed.batch(t.order.take(0, 5), t.built.spec.shape, torch.contiguous_format).x
    assert torch.equal(t.built.priors.groups["z"].pseudo_inputs, first_images)
    start = toys.weights(t, "prior")
    t.step(active)
    after_warm_up = toys.weights(t, "prior")
    assert not toys.same(start, after_warm_up)
    t.counters.step = 3
    t.step(stage.enter(t, 1))
    assert toys.same(after_warm_up, toys.weights(t, "prior"))


def test_the_gradient_of_a_vamp_kl_reaches_the_encoder_through_the_pseudo_inputs():
    prior = toys.Vamp(4, 3, (1, 8, 8))
    encoder = torch.nn.Linear(64, 6)

    def encode(x, labels=None):
        return toys.Gaussian(*encoder(x.flatten(1)).chunk(2, dim=1))

    q = toys.Gaussian(torch.zeros(2, 3), torch.zeros(2, 3))
    value = prior.realise(encode).kl(q, prior.draw_kl(2, torch.Generator().manual_seed(0))).sum()
    assert torch.autograd.grad(value, encoder.bias, retain_graph=True)[0].abs().sum() > 0
    assert not prior.realise(encode).detach().kl(q, torch.randn(2, 8, 3)).requires_grad


@pytest.mark.parametrize("prior", [toys.Vamp(4, 3, (3, 32, 32)), toys.AffineFlow(3)], ids=["vamp", "flow"])
def test_toy_priors_keep_the_contract(prior):
    check_prior(prior, 3, Spec(shape=(3, 32, 32)))


def test_flow_prior_is_a_third_player(catalogue, tmp_path):
    recipe = toys.tree(
        prior={"name": "flow"}, objective={"name": "three_players", "beta_neg": 4.0}, optim={"prior": {"lr": 0.05}}
    )
    t = toys.trainer(catalogue, tmp_path, recipe)
    check_objective(toys.build_three_players(SoftIntroVAEConfig(), Spec((3, 4, 4)), {"a": 3, "b": 2}), Spec((3, 4, 4)))
    before = toys.weights(t, "prior")
    assert t.run() == "finished"
    assert not toys.same(before, toys.weights(t, "prior"))
    assert t.players["prior"].optimiser.param_groups[0]["lr"] == 0.05
    assert (tmp_path / "checkpoints/step_00000004/prior.optimiser.safetensors").exists()


def test_bootstrap_target_is_a_shadow(catalogue, tmp_path):
    recipe = toys.tree(objective={"name": "bootstrap", "beta_neg": 4.0, "gamma_r": 1.0})
    t = toys.trainer(catalogue, tmp_path, recipe)
    [target] = t.followers
    assert target.key == "decoder@target"
    assert toys.same(target.module.state_dict(), toys.weights(t, "decoder"))  # starts as a copy, not as noise
    active, states = stage.enter(t, 0), []
    for _ in range(4):
        t.step(active)
        t.counters.step += 1
        t.counters.images_seen += 64
        target.follow(t.players["decoder"].module, t.counters.images_seen - 64, t.counters.images_seen)
        states.append((copy.deepcopy(target.module.state_dict()), toys.weights(t, "decoder")))
    followed = [toys.same(shadow, decoder) for shadow, decoder in states]
    assert followed == [False, True, False, True]  # every 128 images
    t.save()
    saved = load_file(tmp_path / "checkpoints/step_00000004/decoder@target.safetensors")
    assert toys.same(saved, states[-1][0])


def test_a_half_life_in_steps_is_of_the_stages_batches(catalogue, tmp_path):
    shadow = {"of": ["decoder"], "half_life": "10 steps"}
    stages = [{"length": "2 steps", "train": {"batch": batch}} for batch in (8, 8)]
    t = toys.trainer(catalogue, tmp_path, toys.tree(shadow=shadow, stages=stages, train={"batch": 64}))
    assert [follower.rule.half_life_images for follower in t.followers] == [80]
    stages[1]["train"]["batch"] = 4
    told = "shadow.half_life: in steps, and the stages have batches of 4 and 8: say it in images or epochs"
    with pytest.raises(UserError, match=told):
        toys.trainer(catalogue, tmp_path / "other", toys.tree(shadow=shadow, stages=stages, train={"batch": 64}))


def test_average_follows_by_its_half_life(catalogue, tmp_path):
    recipe = toys.tree(shadow={"of": ["decoder"], "half_life": "64 images"})
    t = toys.trainer(catalogue, tmp_path, recipe)
    [average] = t.followers
    start = toys.weights(t, "decoder")
    assert t.run() == "finished"
    # half-life = batch: each step is the mean of the average and the decoder, so 4 steps leave a sixteenth of the start
    t2 = toys.trainer(catalogue, tmp_path / "again", recipe)
    expected, active = start, stage.enter(t2, 0)
    for _ in range(4):
        t2.step(active)
        t2.counters.step += 1
        t2.counters.images_seen += 64
        expected = {key: (expected[key] + value) / 2 for key, value in toys.weights(t2, "decoder").items()}
    torch.testing.assert_close(dict(average.module.state_dict()), expected)


def test_two_stages_with_a_fade(catalogue, tmp_path):
    stages = [{"length": "2 steps", "data": {"size": 4}}, {"length": "8 steps", "fade": 0.5, "optim": {"lr": 1e-5}}]
    recipe = toys.tree(network={"name": "growing"}, stages=stages, train={"batch": 64, "tick": "1 steps"})
    t = toys.trainer(catalogue, tmp_path, recipe)
    assert t.run() == "finished"
    encoder, decoder = t.built.networks.encoder, t.built.networks.decoder
    # told at each entry, and once more when the second has faded in
    assert [(stage.shape, stage.fade is None) for stage in encoder.seen] == [
        ((1, 4, 4), True),
        ((1, 8, 8), False),
        ((1, 8, 8), True),
    ]
    assert sorted(set(decoder.fades)) == [0.25, 0.5, 0.75, 1.0]
    assert decoder.fades == sorted(decoder.fades)
    assert t.players["encoder"].optimiser.param_groups[0]["lr"] == 1e-5


def test_a_size_that_the_network_does_not_grow_to_is_refused(catalogue, tmp_path):
    stages = [{"length": "2 steps", "data": {"size": 4}}, {"length": "2 steps"}]
    with pytest.raises(UserError, match=r"stages\[0\].data.size: 4 does not fit: network 'mlp' is made for \[1, 8, 8\] alone"):
        toys.trainer(catalogue, tmp_path, toys.tree(stages=stages, train={"batch": 64}))
    stages[0]["data"]["size"] = 8  # the data's own
    toys.trainer(catalogue, tmp_path, toys.tree(stages=stages, train={"batch": 64}))


@pytest.mark.parametrize("objective", ["soft_intro_vae", "intro_vae", "bootstrap_soft_intro_vae"])
def test_graphs_that_are_kept_save_two_decodings_and_change_no_gradient(catalogue, tmp_path, objective):
    ends, calls = {}, {}
    for keep in (False, True):
        # plain gradient steps in effect (a huge eps): Adam would blow up the last bits of gradients near 0
        options = {"objective": {"name": objective, "beta_neg": 4.0}, "optim": {"lr": 1e2, "eps": 1e3}}
        t = toys.trainer(
            catalogue, tmp_path / str(keep), toys.tree(**options, train={"batch": 32, "length": "5 steps", "keep_graphs": keep})
        )
        calls[keep] = []
        t.players["decoder"].module.register_forward_hook(lambda *_, made=calls[keep]: made.append(1))
        start = toys.weights(t, "decoder")
        assert t.run() == "finished"
        ends[keep] = [value for player in ("encoder", "decoder") for value in toys.weights(t, player).values()]
        assert not toys.same(start, toys.weights(t, "decoder"))
    torch.testing.assert_close(ends[True], ends[False], rtol=1e-5, atol=1e-6)
    assert len(calls[False]) - len(calls[True]) == 2 * 5


def test_a_loss_over_the_whole_batch_is_not_cut(catalogue, tmp_path):
    objective = {"name": "intro_vae", "preset": "hhb072"}
    with pytest.raises(UserError, match=r"train\.micro_batch: the loss of intro_vae is no mean over samples and cannot be cut"):
        toys.trainer(
            catalogue, tmp_path, toys.tree(objective=objective, train={"batch": 64, "micro_batch": 16, "length": "2 steps"})
        )
    t = toys.trainer(catalogue, tmp_path, toys.tree(objective=objective, train={"batch": 64, "length": "2 steps"}))
    Trainer.of(t.built, t.rundir, t.device, Parallel(rank=0, world=2), Silent())  # its means are taken over all processes


def test_statistics_are_means_over_samples_and_end_with_their_stage(catalogue, tmp_path):
    stats = Stats(Parallel())
    for n, value in ((2, 1.0), (6, 5.0)):
        stats.add("p", 0, n, ["term"], torch.tensor([n * value, value]), torch.tensor(value))
    assert stats.flush() == {"p": {"term": 4.0, "loss": 4.0, "gradient_norm": 4.0}}

    for step, value in enumerate(torch.linspace(-3, 7, 150).tolist()):  # more than wait to be added at once
        bad = {60: float("nan"), 70: float("inf")}.get(step, value)
        n = 1 + step % 3
        stats.add("p", step, n, ["term"], torch.tensor([n * value, bad]), torch.tensor(1.0))
    with pytest.raises(Diverged, match="since step 60: loss of phase 'p'"):
        stats.check()
    n, terms = 1 + np.arange(150) % 3, np.linspace(-3, 7, 150)
    assert stats.flush()["p"]["term"] == pytest.approx((n * terms).sum() / n.sum(), rel=1e-6)

    stages = [{"length": "3 steps", "objective": {"name": "vae"}}, {"length": "3 steps", "train": {"batch": 32}}]
    t = toys.trainer(catalogue, tmp_path, toys.tree(stages=stages, train={"batch": 64, "tick": "2 steps"}))
    assert t.run() == "finished"
    lines = [(line["step"], line["images"], list(line["phases"])) for line in t.rundir.read("stats")]
    assert lines == [
        (2, 128, ["vae"]),
        (3, 64, ["vae"]),
        (4, 32, ["encoder", "decoder"]),
        (6, 64, ["encoder", "decoder"]),
    ]


def test_a_model_sees_many_images_in_batches(catalogue, tmp_path, monkeypatch):
    t = toys.trainer(catalogue, tmp_path, toys.tree(train={"batch": 64, "length": "1 steps", "conditional": True}))
    one = t.model()
    x, labels = torch.rand(10, 1, 8, 8), torch.arange(10)
    whole = [one.sample(10), one.reconstruct(x, labels)]
    monkeypatch.setattr("siv_core.model.BATCH", 4)
    sizes = []
    one.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    for ours, theirs in zip([one.sample(10), one.reconstruct(x, labels)], whole, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert sizes == [4, 4, 2] * 2
    assert one.encode(x[:0], labels[:0])["z"].mu.shape == (0, 3)


def test_the_fade_blends_the_data_too(catalogue, tmp_path):
    from siv_core.data.feed import blend

    x = torch.rand(2, 1, 8, 8)
    half = x.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(blend(x, torch.tensor(0.25)), 0.25 * x + 0.75 * half)


def test_class_conditional_network(catalogue, tmp_path):
    train = {"batch": 64, "length": "6 steps", "conditional": True}
    t = toys.trainer(catalogue, tmp_path, toys.tree(train=train))
    assert t.run() == "finished"
    model = t.model()
    zeros, ones = (torch.full((2,), label) for label in (0, 1))
    assert not torch.equal(model.sample(2, labels=zeros), model.sample(2, labels=ones))


def test_four_runs_of_a_step_stack_with_vmap():
    """The loss is a pure function of its networks, so that vmap over their weights gives four runs at once."""
    spec, groups = Spec(shape=(1, 4, 4)), {"class": 3, "content": 2}
    runs = []
    for i in range(4):
        networks = toy_networks(spec, groups, torch.float64)
        for module in networks[:2]:
            for p in module.parameters():
                p.data += 0.1 * i * torch.cos(torch.arange(p.numel(), dtype=p.dtype)).view_as(p)
        runs.append(networks)
    priors = Priors({group: _toy_prior() for group in groups})
    objective = build_soft_intro_vae(SoftIntroVAEConfig(beta_neg=9.0), spec, groups)
    noise = objective.draw(6, Streams(0, 0), sources(groups, priors, runs[0].decoder))
    noise = torch.utils._pytree.tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) else x, noise)
    x = torch.rand(6, *spec.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    coeffs = tensors_of(objective.coeffs, torch.device("cpu"))
    base = {name: copy.deepcopy(getattr(runs[0], name)) for name in ("encoder", "decoder")}
    stacked = {name: stack_module_state([getattr(run, name) for run in runs])[0] for name in base}

    def one(phase, weights, carry):
        modules = {name: (lambda *a, name=name, **k: functional_call(base[name], weights[name], a, k)) for name in base}
        return phase.loss(make_nets({**modules, "prior": priors}, squared), Batch(x), noise, coeffs, carry)

    carry = {}
    alone = [{} for _ in runs]
    for phase in objective.phases:
        (mover,) = phase.updates

        def all_at_once(nets, batch, noise, coeffs, carry, phase=phase):
            return vmap(lambda weights, own: one(phase, weights, own))(stacked, carry)

        played = play(
            Phase(phase.name, phase.updates, all_at_once), list(stacked[mover].values()), None, None, None, None, carry, 0.5
        )
        carry = played.carry
        for i, run in enumerate(runs):
            modules = {"encoder": run.encoder, "decoder": run.decoder, "prior": priors}
            named = dict(modules[mover].named_parameters())
            nets = make_nets(modules, squared)
            single = play(phase, list(named.values()), nets, Batch(x), noise, coeffs, alone[i], 0.5)
            alone[i] = single.carry
            torch.testing.assert_close(played.row[i], single.row)
            assert played.names == single.names
            assert list(named) == list(stacked[mover])
            for ours, theirs in zip(played.gradients, single.gradients, strict=True):
                torch.testing.assert_close(ours[i], theirs)


def squared(x, y):
    return (x - y).square().flatten(1).sum(dim=1)


class NoReadBack(TorchDispatchMode):
    """Raises where a step would wait for the device to hand back a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise AssertionError(f"{func} in a step")
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_from_the_device(catalogue, tmp_path):
    recipe = toys.tree(train={**toys.DIGITS["train"], "clip_gradient": 1.0}, shadow={})
    t = toys.trainer(catalogue, tmp_path, recipe)
    active = stage.enter(t, 0)
    t.step(active)  # the first one makes the optimisers' state
    with NoReadBack():
        t.step(active)
        for follower in t.followers:
            follower.follow(t.players[follower.rule.of].module, 0, 64)
    with pytest.raises(AssertionError, match="in a step"), NoReadBack():
        torch.ones(1).item()


def test_bf16_networks_stay_close_to_fp32(catalogue, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        train = {**toys.DIGITS["train"], "length": "20 steps", "tick": "1 steps", "precision": precision}
        t = toys.trainer(catalogue, tmp_path / precision, toys.tree(train=train))
        assert t.run() == "finished"
        losses[precision] = [values["loss"] for line in t.rundir.read("stats") for values in line["phases"].values()]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_place(catalogue, tmp_path):
    t = toys.trainer(catalogue, tmp_path, toys.tree(train={**toys.DIGITS["train"], "length": "9 steps", "tick": "3 steps"}))

    class Poisoner(Silent):
        def stepped(self, step, steps, images_seen):
            if step == 4:
                t.players["decoder"].parameters[0].data.fill_(float("nan"))

    t.observer = Poisoner()
    with pytest.raises(Diverged, match=r"since step 4: rec_real of phase 'encoder'"):
        t.run()
    assert len(t.rundir.read("stats")) == 1  # the tick at step 3; nothing after it
    assert not list(t.rundir.checkpoints.iterdir())


def test_noise_does_not_depend_on_the_cut_of_the_batch(catalogue, tmp_path):
    t = toys.trainer(catalogue, tmp_path, toys.tree())
    active = stage.enter(t, 0)
    first, again, next_step = (list(leaves(active.objective.draw(64, Streams(0, s), active.sources))) for s in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, next_step, strict=True))
    flat = [x.flatten() for x in first]
    assert not any(torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])


RECIPE = (
    toys.SOFT
    + """
[train]
batch = 64
length = "12 steps"
tick = "1 steps"
preview = "1000 steps"
checkpoint = "1 steps"
keep_every = 1
"""
)


def first_moments(run, step=1):
    folder = run / f"checkpoints/step_{step:08d}"
    tensors = {
        f"{player}/{k}": v
        for player in ("encoder", "decoder")
        for k, v in load_file(folder / f"{player}.optimiser.safetensors").items()
    }
    return {key: value for key, value in tensors.items() if key.endswith("exp_avg")}


@pytest.mark.slow
def test_cutting_a_batch_changes_nothing_but_rounding(tmp_path, siv):
    """1 × 64, 4 × 16 accumulated and 2 × 32 in two gloo processes."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "siv_core.cli.main"]
    ways = {"whole": [], "accumulated": ["--set", "train.micro_batch=16"], "processes": []}
    for name, more in ways.items():
        command = ["run", str(recipe), "--run-dir", str(tmp_path / name), "--device", "cpu", *more]
        if name == "processes":
            done = subprocess.run([*two, *command], capture_output=True, text=True, timeout=240)
        else:
            done = siv(*command, seconds=240)
        assert done.returncode == 0, done.stderr
    runs = {name: tmp_path / name for name in ways}
    expected = first_moments(runs["whole"])
    for name in ("accumulated", "processes"):
        for key, value in first_moments(runs[name]).items():
            error = (value - expected[key]).norm() / expected[key].norm()
            assert error < 1e-5, (name, key, error)
        for ours, theirs in zip(*(read_stats(runs[n]) for n in (name, "whole")), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5)
    manifest = json.loads((runs["processes"] / "manifest.json").read_text())
    assert manifest["processes"] == 2

    # a run of two processes goes on with one, and says what that means
    half = tmp_path / "half"
    command = ["run", str(recipe), "--run-dir", str(half), "--device", "cpu", "--set", "train.length=6 steps"]
    done = subprocess.run([*two, *command], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    done = siv("run", "--resume", str(half), "--set", "train.length=12 steps", "--device", "cpu", seconds=240)
    assert done.returncode == 0, done.stderr
    assert "processes 2 before, 1 now" in done.stdout, done.stdout
    assert len(read_stats(half)) == len(read_stats(runs["whole"]))
    for ours, theirs in zip(read_stats(half), read_stats(runs["whole"]), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5)


MACHINES = """
set -e
unshare --net sleep infinity & other=$!
trap 'kill $other' EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add near type veth peer name far netns $other
ip address add 10.77.0.1/24 dev near && ip link set near up && ip link set lo up
there="nsenter --target $other --net"
$there ip address add 10.77.0.2/24 dev far && $there ip link set far up && $there ip link set lo up
GLOO_SOCKET_IFNAME=far PET_LOCAL_ADDR=10.77.0.2 PET_RDZV_CONF=is_host=false $there "$@" > far.txt 2>&1 & second=$!
GLOO_SOCKET_IFNAME=near PET_LOCAL_ADDR=10.77.0.1 PET_RDZV_CONF=is_host=true "$@" > near.txt 2>&1 && wait $second
"""  # this network namespace is one machine, a second one joined to it by a cable is the other; no names, only addresses
UNSHARED = ["unshare", "--user", "--map-root-user", "--net"]


@pytest.mark.slow
@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("unshare", "nsenter", "ip"))
    or subprocess.run([*UNSHARED, "true"], check=False, capture_output=True).returncode != 0,
    reason="needs network namespaces of its own",
)
def test_two_machines_train_like_one_process(tmp_path, siv):
    (tmp_path / "r.toml").write_text(RECIPE)
    command = ["run", "r.toml", "--device", "cpu", "--run-dir"]
    done = siv(*command, "one", seconds=240)
    assert done.returncode == 0, done.stderr
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29500"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meet, "-m", "siv_core.cli.main", *command, "two"]
    done = subprocess.run(
        [*UNSHARED, "bash", "-c", MACHINES, "machines", *torchrun],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    told = [(tmp_path / name).read_text() for name in ("near.txt", "far.txt")]
    assert done.returncode == 0, (done.stderr, *told)
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["processes"] == 2
    for ours, theirs in zip(read_stats(tmp_path / "two"), read_stats(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_brings_a_run_back_after_a_lost_process(tmp_path):
    """One of two processes is killed after a checkpoint; the run ends with the bytes of an undisturbed one."""
    text = RECIPE.replace('"12 steps"', '"400 steps"').replace(
        'checkpoint = "1 steps"\nkeep_every = 1', 'checkpoint = "20 steps"'
    )
    (tmp_path / "r.toml").write_text(text)
    command = [
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=3",
        "-m",
        "siv_core.cli.main",
        "run",
        "r.toml",
        "--device",
        "cpu",
    ]
    ends = {}
    for name in ("whole", "killed"):
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *command, "--run-dir", name],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if name == "killed":
            until = time.monotonic() + 200
            while not list((tmp_path / name / "checkpoints").glob("step_*")) and time.monotonic() < until:
                time.sleep(0.1)
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(workers[-1]), signal.SIGKILL)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        assert ("going on from" in out) == (name == "killed")
        assert "Traceback" not in out
        ends[name] = sorted((tmp_path / name / "checkpoints").glob("step_*"))[-1]
    for ours in ends["killed"].glob("*.safetensors"):
        assert ours.read_bytes() == (ends["whole"] / ours.name).read_bytes(), ours.name


def read_stats(run):
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()][1:]
    return [{f"{p}.{k}": v for p, values in line["phases"].items() for k, v in values.items()} for line in lines]


def test_per_group_numbers():
    assert per_group(2.0, {"a": 1, "b": 1}) == {"a": 2.0, "b": 2.0}
    assert per_group({"a": 1.0}, {"a": 1, "b": 1}) == {"a": 1.0}


GROWING = """
format = 1
[data]
name = "digits"
[network]
name = "growing"
[objective]
name = "soft_intro_vae"
[train]
batch = 8
tick = "1 steps"
preview = "2 steps"
checkpoint = "1 steps"
keep_every = 1
[[stages]]
length = "2 steps"
data = { size = 4 }
[[stages]]
length = "4 steps"
fade = 1.0
"""


def test_a_growing_network_is_in_the_stage_of_its_checkpoint(catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr("siv_core.recipe.catalogue.load", lambda: toys.with_toys(catalogue))
    (tmp_path / "growing.toml").write_text(GROWING)
    done = session.run(tmp_path / "growing.toml", run_dir=tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "images" / "preview_00000002.png").exists()  # in the first stage: of 4 × 4
    for step, shape, fade in ((1, (1, 4, 4), None), (2, (1, 4, 4), None), (3, (1, 8, 8), 0.25), (6, (1, 8, 8), None)):
        model = done.model(str(step), device="cpu")
        assert model.decoder.stage.shape == model.spec.shape == shape
        assert model.decoder.stage.fade == fade
        assert model.sample(2).shape == (2, *shape)
        assert model.reconstruct(torch.rand(2, *shape)).shape == (2, *shape)


def test_the_operations_of_a_growing_network_are_those_of_its_stages(catalogue):
    known = toys.with_toys(catalogue)
    read = parse(tomllib.loads(GROWING), Path("growing.toml"), b"", known, (), (), False)
    built = build.build(read, known, build.dataset(read, known))
    small, large = (inspect.flops(built, number) for number in (0, 1))
    refine = 2 * 8 * 9 * 64  # the 3 × 3 convolution of the decoder on 8 samples, which is at 4 × 4 in the first stage
    assert large - small >= 3 * refine
    assert not built.networks.encoder.seen  # checked on copies


def test_a_prior_gets_labels_where_the_networks_do(catalogue, tmp_path):
    train = {"batch": 64, "length": "3 steps", "conditional": True}
    t = toys.trainer(catalogue, tmp_path, toys.tree(prior={"name": "vamp"}, train=train))
    assert t.run() == "finished"
    first = t.feed.batch(t.order.take(0, 5), t.built.spec.shape, torch.contiguous_format)
    assert torch.equal(t.built.priors.groups["z"].labels, first.labels)
