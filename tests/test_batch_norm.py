"""Networks that take statistics of their batch: refused where these would be others, shared by processes, and the gap told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from torch import nn

from siv_core.errors import PluginError, UserError
from siv_core.protocols import Spec
from siv_core.recipe.build import network_problems
from siv_core.recipe.recipe import GAP
from siv_core.runs.watchers import Silent
from siv_core.train import stage
from siv_core.train.parallel import Parallel, SharedBatchNorm, share_statistics
from siv_core.train.trainer import Trainer
from siv_core.use.evaluate import TrainEvalGap, gap_warnings, measure


def normed(catalogue, folder, **train):
    return toys.trainer(
        catalogue, folder, toys.tree(network={"name": "normed"}, train={"batch": 64, "length": "4 steps", **train})
    )


def test_micro_batches_are_refused_with_the_reason(catalogue, tmp_path):
    with pytest.raises(UserError, match=r"train\.micro_batch: network 'normed' takes statistics of the whole batch"):
        normed(catalogue, tmp_path, micro_batch=16)
    normed(catalogue, tmp_path, micro_batch=64)  # the whole batch


def test_a_network_that_does_not_say_so_is_told():
    networks = toys.normed(Spec((1, 8, 8)))
    assert list(network_problems(networks)) == []
    assert list(network_problems(networks._replace(batch_statistics=False))) == [
        "it has batch norm and does not say so: Networks(…, batch_statistics=True)"
    ]


def test_statistics_of_another_kind_cannot_be_shared(catalogue, tmp_path):
    t = toys.trainer(catalogue, tmp_path, toys.tree())
    t.built.networks = t.built.networks._replace(batch_statistics=True)
    with pytest.raises(UserError, match="cannot be shared by several processes"):
        Trainer.of(t.built, t.rundir, t.device, Parallel(rank=0, world=2), Silent())


@pytest.mark.parametrize(
    ("objective", "passes"),
    # (encoder, decoder) of each phase: docs/math.md. x, x_rec and x_prior are encoded one after the other
    [
        ("vae", {"vae": (1, 1)}),
        ("soft_intro_vae", {"encoder": (3, 4), "decoder": (2, 4)}),
        ("intro_vae", {"encoder": (3, 2), "decoder": (2, 2)}),
    ],
)
@pytest.mark.parametrize("keep_graphs", [False, True])
def test_passes_that_move_running_statistics_are_as_documented(catalogue, tmp_path, objective, passes, keep_graphs):
    recipe = toys.tree(
        network={"name": "normed"},
        objective={"name": objective},
        train={"batch": 64, "length": "4 steps", "keep_graphs": keep_graphs},
    )
    t = toys.trainer(catalogue, tmp_path, recipe)
    active = stage.enter(t, 0)  # looks at the networks without moving them

    def counts():
        return tuple(
            int(dict(t.players[name].module.named_buffers())["body.1.num_batches_tracked"]) for name in ("encoder", "decoder")
        )

    assert counts() == (0, 0)
    whole, phases = active.objective.phases, {}
    from attrs import evolve

    before, carries, pieces = counts(), [{}], None
    from siv_core.seeding import Streams

    batch = t.feed.batch(torch.arange(64), active.stage.shape, torch.contiguous_format)
    pieces = [(batch, active.objective.draw(64, Streams(0, 0), active.sources))]
    active = evolve(active, objective=evolve(active.objective, phases=whole))
    for phase in active.objective.phases:
        t.play(phase, active, pieces, carries)
        phases[phase.name] = tuple(b - a for a, b in zip(before, counts(), strict=True))
        before = counts()
    if keep_graphs and "decoder" in passes:  # x_rec and x_prior of the encoder's phase are taken over
        passes = {**passes, "decoder": (passes["decoder"][0], passes["decoder"][1] - 2)}
    assert phases == passes


def test_use_moves_nothing(catalogue, tmp_path):
    t = normed(catalogue, tmp_path)
    assert t.run() == "finished"
    before = {name: toys.weights(t, name) for name in t.players}
    model = t.model()
    x = torch.rand(40, 1, 8, 8)
    eval_x, train_x = model.reconstruct(x), model.in_training_mode().reconstruct(x)
    assert not torch.allclose(eval_x, train_x)
    # the statistics of the batch itself, by hand
    encoder, decoder = t.players["encoder"].module, t.players["decoder"].module
    import copy

    with torch.no_grad():
        by_hand = copy.deepcopy(decoder)({"z": copy.deepcopy(encoder)(x)["z"].mu})
    torch.testing.assert_close(train_x, by_hand)
    assert all(toys.same(before[name], toys.weights(t, name)) for name in t.players)


def test_every_evaluation_tells_the_gap(catalogue, tmp_path):
    t = normed(catalogue, tmp_path)
    assert t.run() == "finished"
    model = t.model()
    assert model.batch_statistics == 64
    lines, _ = measure({GAP: TrainEvalGap(0)}, model, t.built.dataset, {}, lambda what, done, total: None)
    values = {line["name"]: line["value"] for line in lines}
    x = t.built.dataset.rows("held_out")
    assert lines[0]["protocol"]["batch"] == 64
    assert lines[0]["protocol"]["images"] == len(x) // 64 * 64
    for term in ("rec", "kl"):
        assert values[f"{term}.gap"] == pytest.approx(
            (values[f"{term}.eval"] - values[f"{term}.train"]) / values[f"{term}.train"]
        )
    warned = [name for name in ("rec", "kl") if abs(values[f"{name}.gap"]) > 0.1]
    assert len(gap_warnings(lines)) == len(warned)
    # where running statistics are those of the batches, there is no gap
    held = t.built.dataset.rows("held_out")
    from siv_core.data import feed

    x = feed.images(held, torch.arange(len(held)), t.built.spec)[:64]
    for module in (t.players["encoder"].module, t.players["decoder"].module):
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.reset_running_stats()
                norm.momentum = 1.0
    with torch.no_grad():
        z = t.players["encoder"].module(x)["z"].mu
        t.players["decoder"].module({"z": z})
    at = t.model()
    torch.testing.assert_close(at.energy(x)[0], at.in_training_mode().energy(x)[0], rtol=0.05, atol=1e-3)


def test_shared_norm_is_the_plain_one_in_a_single_process(monkeypatch):
    """With nothing to add from others it has the same output, gradients and running statistics, in both of its momenta."""
    monkeypatch.setattr("siv_core.train.parallel.dist.all_reduce", lambda x: None)
    for plain in (nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None), nn.BatchNorm1d(3, affine=False)):
        torch.manual_seed(0)
        shape = (5, 3, 4, 4) if isinstance(plain, nn.BatchNorm2d) else (5, 3)
        import copy

        shared = nn.Sequential(copy.deepcopy(plain))
        assert share_statistics(shared) == 1
        assert isinstance(shared[0], SharedBatchNorm)
        for _ in range(2):
            x = torch.randn(shape) * 3 + 1
            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            a, b = shared(ours), plain(theirs)
            torch.testing.assert_close(a, b)
            weight = torch.randn(shape)
            for one, two in zip(
                torch.autograd.grad((a * weight).sum(), [ours, *shared.parameters()]),
                torch.autograd.grad((b * weight).sum(), [theirs, *plain.parameters()]),
                strict=True,
            ):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dict(shared[0].named_buffers()), dict(plain.named_buffers()))
        shared.eval(), plain.eval()
        torch.testing.assert_close(shared(x), plain(x))


def test_shared_norm_keeps_precision_layout_and_type(monkeypatch):
    """Its mean and variance come of sums of squares, but far from 0 it is as near to float64 as the plain one is."""
    monkeypatch.setattr("siv_core.train.parallel.dist.all_reduce", lambda x: None)
    torch.manual_seed(0)
    shared, plain, exact = (nn.Sequential(nn.BatchNorm2d(4)) for _ in range(3))
    share_statistics(shared), exact.double()
    x = torch.randn(8, 4, 16, 16) + 3000
    weight = torch.randn_like(x)
    errors = {}
    for name, norm in (("shared", shared), ("plain", plain)):
        mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
        y, z = norm(mine), exact(theirs)
        pairs = (y, z), (*torch.autograd.grad(y, mine, weight), *torch.autograd.grad(z, theirs, weight.double()))
        errors[name] = [float((a.detach() - b.detach()).abs().max()) for a, b in pairs]
    assert all(a < 10 * b for a, b in zip(errors["shared"], errors["plain"], strict=True)), errors
    last = shared(torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_())
    assert last.is_contiguous(memory_format=torch.channels_last)
    half = torch.randn(2, 4, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    y = shared(half)
    assert y.dtype == torch.autograd.grad(y.sum(), half)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["forward", "sync"])
def test_a_norm_with_a_way_of_its_own_is_refused(kind):
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 5 * super().forward(x)

    if kind == "forward":
        with pytest.raises(UserError, match="the statistics of its Scaled cannot be shared"):
            share_statistics(nn.Sequential(Scaled(2)))
    else:
        assert share_statistics(nn.Sequential(nn.SyncBatchNorm(2))) == 1


def test_the_gap_moves_nothing_of_a_prior_either(catalogue, tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def realise(self, encode):
            self.seen += self.training
            return toys.AffineMap(torch.zeros(3), torch.zeros(3))

    t = normed(catalogue, tmp_path)
    t.built.priors.groups["z"] = Counting()
    assert t.run() == "finished"
    seen = t.built.priors.groups["z"].seen.clone()
    assert seen > 0
    measure({GAP: TrainEvalGap(0)}, t.model(), t.built.dataset, {}, lambda what, done, total: None)
    assert t.built.priors.groups["z"].seen == seen


RECIPE = """
format = 1
[data]
name = "digits"
[network]
name = "normed"
[prior]
name = "hand_over"
[objective]
name = "soft_intro_vae"
beta_neg = 4.0
[train]
batch = 64
length = "4 steps"
tick = "1 steps"
checkpoint = "2 steps"
keep_every = 1
preview = "100 steps"
[[stages]]
length = "2 steps"
objective = { name = "vae" }
[[stages]]
length = "2 steps"
""".replace('length = "4 steps"\n', "", 1)


@pytest.mark.slow
def test_one_and_two_gloo_processes_agree(tmp_path):
    """Batch norm, a prior's regulariser and a hand-over: everything that takes a mean over the whole batch."""
    (tmp_path / "r.toml").write_text(RECIPE)
    script = "import sys; sys.path.insert(0, sys.argv[1]); import crash; crash.train_with_toys(sys.argv[2], sys.argv[3])"
    here = str(Path(__file__).parent)
    two = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    (tmp_path / "train.py").write_text(script)
    for name, launcher in (("one", []), ("two", two)):
        command = [sys.executable, *launcher, str(tmp_path / "train.py"), here, str(tmp_path / "r.toml"), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    from safetensors.torch import load_file

    for step in (2, 4):
        for player in ("encoder", "decoder", "prior"):
            ours, theirs = (
                load_file(tmp_path / name / f"checkpoints/step_{step:08d}/{player}.safetensors") for name in ("two", "one")
            )
            for key, value in theirs.items():
                if value.is_floating_point():
                    # a weight of Adam's first steps moves by the rate in the direction of a sign: where the gradient is all but 0
                    # that may be the other one
                    wrong = ((ours[key] - value).abs() > 1e-4 + 1e-3 * value.abs()).float().mean()
                    assert wrong < 0.02, (step, player, key, wrong)
                else:
                    assert torch.equal(ours[key], value), (step, player, key)
    stats = [
        [json.loads(line) for line in (tmp_path / name / "stats.jsonl").read_text().splitlines()][1:] for name in ("one", "two")
    ]
    for one, other in zip(*stats, strict=True):
        for phase, terms in one["phases"].items():
            assert other["phases"][phase] == pytest.approx(terms, rel=2e-3, abs=1e-4)
    assert "regulariser" in stats[0][-1]["phases"]["encoder"]
    for name in ("one", "two"):  # the gap is the main process's own affair: it waits for no other
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()][1:]
        gap = {line["name"]: line.get("value", line.get("skipped")) for line in lines if line["metric"] == GAP}
        assert gap.keys() == {f"{term}.{kind}" for term in ("rec", "kl") for kind in ("eval", "train", "gap")}
        assert all(isinstance(value, float) for value in gap.values()), gap


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": {"z": 0}}, "its latent group 'z' has 0 dimensions, expected a whole number of at least 1"),
        ({"groups": {"z": -3}}, "its latent group 'z' has -3 dimensions"),
        ({"groups": {"z": 2.5}}, "its latent group 'z' has 2.5 dimensions"),
        ({"groups": {"z": True}}, "its latent group 'z' has True dimensions"),
        ({"groups": {}}, "its groups are {}, expected"),
        ({"groups": None}, "its groups are None, expected"),
        ({"groups": {1: 3}}, r"its groups are \{1: 3\}, expected"),
        ({"translate": ("z", "w")}, r"translate is \('z', 'w'\), expected two of its groups z"),
        ({"encoder": print}, "its encoder is a builtin_function_or_method, expected an nn.Module"),
    ],
)
def test_what_a_network_returns_is_checked_where_it_is_built(catalogue, tmp_path, change, words):
    from attrs import evolve

    component, owner = toys.with_toys(catalogue).components["network", "normed"]
    wrong = evolve(component, build=lambda config, spec: toys.normed(spec)._replace(**change))
    broken = evolve(toys.with_toys(catalogue), components={**catalogue.components, ("network", "normed"): (wrong, owner)})
    with pytest.raises(PluginError, match=rf"plugin 'toys' of tests 0: network 'normed': {words}"):
        toys.trainer(broken, tmp_path, toys.tree(network={"name": "normed"}), toys_too=False)
