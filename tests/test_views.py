"""Views of training images: what each draws, that only its group's encoder sees it, and that a run with peers can be resumed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import toys
from attrs import evolve
from siv_plugins import adain
from torch.nn import functional as F

from siv_core.errors import UserError
from siv_core.latents import Gaussian
from siv_core.nets import make_nets
from siv_core.objectives import introspective
from siv_core.objectives.vae import VAEConfig, build_vae
from siv_core.protocols import Batch, Spec
from siv_core.seeding import Streams
from siv_core.store.checkpoint import Checkpoint
from siv_core.train import stage, views
from siv_core.train.step import tensors_of

TWO = {
    "name": "adain",
    "dims": {"class": 3, "content": 2},
    "encoder_channels": [4, 4, 4],
    "encoder_hidden": [8],
    "stem_kernel": 0,
    "decoder_channels": [4, 4, 4],
    "output_channels": 4,
    "output_kernels": [3, 3],
}


def uniform(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def two_stages(catalogue, folder, seen, *, lengths=("6 steps", "8 steps"), **tables):
    """Digits by two encoders; in the second stage the groups see these views."""
    stages = [{"length": lengths[0], "objective": {"name": "vae"}}, {"length": lengths[1], "views": seen}]
    train = {"batch": 32, "checkpoint": "4 steps", "keep_every": 1, "tick": "2 steps", **tables.pop("train", {})}
    tables = {"objective": {"name": "soft_intro_vae", "beta_neg": 4.0}, **tables}
    return toys.trainer(catalogue, folder, toys.tree(network=TWO, stages=stages, train=train, **tables))


# -- single views ----------------------------------------------------------------------------------------------------------------


def test_a_square_is_stretched_by_the_factors_that_were_drawn():
    """White square of side 8 in 32 pixels: its area grows by e^(most (2u − 1)) on each axis, and the background goes on."""
    x = F.pad(torch.ones(4, 1, 8, 8), (12,) * 4) + 0.25
    u = torch.tensor([[0.5, 0.5], [1.0, 0.5], [0.5, 0.0], [1.0, 1.0]])
    seen = views.stretched(x, u, 0.4)
    assert torch.allclose(seen[0], x[0], atol=1e-5)
    wide, high = (8 * torch.exp(0.4 * (2 * u[:, i] - 1)) for i in (0, 1))
    assert torch.allclose((seen - 0.25).sum(dim=(1, 2, 3)), wide * high, rtol=0.05)
    assert torch.allclose((seen - 0.25).amax(dim=2).sum(dim=(1, 2)), wide, rtol=0.1)  # over the rows: how wide
    assert torch.allclose((seen - 0.25).amax(dim=3).sum(dim=(1, 2)), high, rtol=0.1)
    assert torch.allclose(views.stretched(torch.full_like(x, 0.7), u, 0.4), torch.full_like(x, 0.7))


def test_flipped():
    x = uniform(3, 2, 4, 5)
    seen = views.flipped(x, torch.tensor([0.49, 0.5, 0.0]))
    assert torch.equal(seen, torch.stack([x[0].flip(2), x[1], x[2].flip(2)]))


@pytest.mark.parametrize("rest", [True, False])
def test_the_nearest_are_the_naive_ones(monkeypatch, rest):
    monkeypatch.setattr(views, "CHUNK", 7)
    own, others = uniform(40, 3), uniform(40, 2) if rest else None
    candidates = torch.arange(0, 40, 2)
    found = views.nearest(own, others, candidates, 3)
    for i in range(40):
        allowed = [j for j in candidates.tolist() if j != i]
        if rest:
            apart = {j: float((others[i] - others[j]).norm()) for j in candidates.tolist()}
            median = sorted(apart.values())[(len(apart) - 1) // 2]
            allowed = [j for j in allowed if apart[j] >= 0.7 * median]
        assert found[i].tolist() == sorted(allowed, key=lambda j: float((own[i] - own[j]).norm()))[:3]


def test_codes_that_hold_class_and_content_give_peers_of_the_same_class_and_another_content():
    classes, contents = torch.arange(60) // 12, torch.arange(60) % 12
    noise = 0.01 * torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    own, others = F.one_hot(classes, 5).float() + noise, F.one_hot(contents, 12).float()
    found = views.nearest(own, others, torch.arange(60), 4)
    assert (classes[found.long()] == classes[:, None]).all()
    assert (contents[found.long()] != contents[:, None]).all()


# -- who sees them ---------------------------------------------------------------------------------------------------------------


def test_each_group_has_the_posterior_of_its_view():
    networks = adain.build(adain.AdaINConfig(**{key: value for key, value in TWO.items() if key != "name"}), Spec((1, 8, 8)))
    calls = []

    def encoder(x, labels=None):
        calls.append(x)
        return networks.encoder(x)

    nets = make_nets({"encoder": encoder}, torch.sub)
    x, other, third = uniform(3, 5, 1, 8, 8)
    expected = {name: networks.encoder(image) for name, image in (("x", x), ("other", other), ("third", third))}

    def same(q, **of):
        return all(torch.equal(q[group].mu, expected[name][group].mu) for group, name in of.items()) and q.keys() == of.keys()

    assert same(nets.posterior(Batch(x), {}), content="x", **{"class": "x"})
    assert same(nets.posterior(Batch(x), {"views": {"content": other}}), content="other", **{"class": "x"})
    calls.clear()
    assert same(nets.posterior(Batch(x), {"views": {"content": other, "class": third}}), content="other", **{"class": "third"})
    assert len(calls) == 2, "the image itself need not be encoded"


def test_the_loss_reconstructs_the_image_from_the_codes_of_the_views():
    objective = build_vae(VAEConfig(beta_rec=0.5, scale=2.0), Spec((2,), kind="array"), {"a": 2, "b": 2})
    x, view = uniform(2, 6, 2)
    encode = lambda x, labels=None: {group: Gaussian(x * factor, x) for group, factor in (("a", 2.0), ("b", 3.0))}  # noqa: E731
    prior = SimpleNamespace(kl=lambda q, noise, labels: q.mu.sum(dim=1))
    nets = make_nets(
        {"encoder": encode, "decoder": lambda codes: codes["a"] + codes["b"], "prior": lambda encode: {"a": prior, "b": prior}},
        lambda x, y: (x - y).square().sum(dim=1),
    )
    zero = {"a": torch.zeros(6, 2), "b": torch.zeros(6, 2)}
    noise = {"posterior": zero, "kl": {"real": {}}, "decoder": {"rec": None}, "views": {"b": view}}
    loss, _, _ = objective.phases[0].loss(nets, Batch(x), noise, tensors_of(objective.coeffs, torch.device("cpu")), {})
    rec = (x - 2 * x - 3 * view).square().sum(dim=1)
    assert loss == pytest.approx(float(2 * (0.5 * rec + 2 * x.sum(dim=1) + 3 * view.sum(dim=1)).mean()), rel=1e-6)


def test_the_decoders_phase_encodes_the_views_again_where_it_takes_nothing_over():
    encode = lambda x, labels=None: {group: Gaussian(x * factor, x) for group, factor in (("a", 2.0), ("b", 3.0))}  # noqa: E731
    nets = make_nets({"encoder": encode, "decoder": lambda codes: codes["a"] + codes["b"]}, torch.sub)
    x, view = uniform(2, 6, 2)
    zero = {"a": torch.zeros(6, 2), "b": torch.zeros(6, 2)}
    prior = {group: SimpleNamespace(sample=lambda noise, labels: noise) for group in zero}
    noise = {"posterior_again": zero, "prior_again": zero, "decoder": {"rec": None, "prior": None}, "views": {"b": view}}
    q, made = introspective.decoder_phase_fakes(nets, prior, Batch(x), noise, {}, share_noise=False)
    assert torch.equal(q["a"].mu, 2 * x)
    assert torch.equal(q["b"].mu, 3 * view)
    assert torch.equal(made["rec"], 2 * x + 3 * view)


def test_what_is_drawn_does_not_depend_on_who_draws_it(catalogue, tmp_path):
    t = two_stages(catalogue, tmp_path, {"content": ["stretch", "flip"], "class": ["same_label"]})
    active = stage.enter(t, 1)
    x = t.feed.batch(t.order.take(0, 32), active.stage.shape, torch.contiguous_format).x

    def draw(share):
        return t.views.draw(active.plan.views, x[share], 0, 32, share, Streams(0, 3))

    whole = draw(slice(0, 32))
    assert {group: seen.shape for group, seen in whole.items()} == {"content": x.shape, "class": x.shape}
    for share in (slice(0, 20), slice(20, 32)):
        for group, seen in draw(share).items():
            assert torch.equal(seen[share], whole[group][share])
            assert not seen[: share.start].any()
            assert not seen[share.stop :].any()
    assert not torch.equal(whole["content"], x)
    both = t.views.draw({"content": ("flip",), "class": ("flip",)}, x, 0, 32, slice(0, 32), Streams(0, 3))
    assert not torch.equal(both["content"], both["class"]), "each group has draws of its own"


def test_views_of_the_same_label(catalogue, tmp_path):
    t = two_stages(catalogue, tmp_path, {"class": ["same_label"]})
    rows = torch.arange(1400)
    labels = t.feed.rows.labels[t.feed.rows.at(rows)]
    found = torch.stack(
        [t.views.same_label(rows, uniform(1400) if i == 0 else torch.full((1400,), i / 9.0001)) for i in range(10)]
    )
    assert (labels[found] == labels).all()
    assert (found.sort(dim=0).values.diff(dim=0) > 0).float().mean() > 0.95  # not always the same ones
    assert len(found[0].unique()) > 700


# -- whole runs ------------------------------------------------------------------------------------------------------------------


def test_peers_are_found_when_the_stage_begins_and_kept_with_the_run(catalogue, tmp_path):
    t = two_stages(catalogue, tmp_path / "run", {"content": ["stretch"], "class": ["peer"]})
    assert t.run() == "finished"
    assert t.views.peers["class"].shape == (1400, 4)
    saved = {step: Checkpoint.open(tmp_path / f"run/checkpoints/step_{step:08d}") for step in (4, 8, 12, 14)}
    assert saved[4].part("views") == {}
    assert torch.equal(saved[8].part("views")["class"], t.views.peers["class"])
    expected = toys.weights(t, "encoder")
    for step in (4, 8, 12):
        again = two_stages(catalogue, tmp_path / str(step), {"content": ["stretch"], "class": ["peer"]})
        again.resume(saved[step])
        assert again.run() == "finished"
        assert toys.same(toys.weights(again, "encoder"), expected)
    seen = {}
    for name, own in (("none", {}), ("content", {"content": ["stretch"]}), ("class", {"class": ["flip"]})):
        other = two_stages(catalogue, tmp_path / name, own)
        assert other.run() == "finished"
        assert not toys.same(toys.weights(other, "encoder"), expected)
        assert "views" not in other.kept
        seen[name] = toys.weights(other, "encoder")
    assert not toys.same(seen["none"], seen["content"])
    assert not toys.same(seen["none"], seen["class"])


def test_batches_that_are_cut_have_the_same_views(catalogue, tmp_path):
    runs = []
    for size in (0, 8):
        seen = {"content": ["stretch"], "class": ["same_label"]}
        t = two_stages(catalogue, tmp_path / str(size), seen, lengths=("1 step", "2 steps"), train={"micro_batch": size})
        assert t.run() == "finished"
        runs.append(t.rundir.read("stats")[-1]["phases"]["encoder"])
    assert runs[0]["rec_real"] == pytest.approx(runs[1]["rec_real"], rel=1e-4)
    assert runs[0]["kl_real"] == pytest.approx(runs[1]["kl_real"], rel=1e-4)


@pytest.mark.parametrize("table", [torch.zeros(1400, 4), torch.zeros(3, 4, dtype=torch.int32), torch.full((1400, 4), 1400).int()])
def test_a_damaged_table_of_peers_is_told(catalogue, tmp_path, table):
    t = two_stages(catalogue, tmp_path, {"class": ["peer"]})
    with pytest.raises(UserError, match="there: 'class' is no table of the peers of 1400 training images, 4 each"):
        t.views.restore({"class": table}, {}, "there")


@pytest.mark.parametrize("objective", ["vae", "soft_intro_vae", "intro_vae", "bootstrap_soft_intro_vae"])
def test_every_objective_takes_views(catalogue, tmp_path, objective):
    runs = []
    for number, seen in enumerate(({}, {"content": ["stretch"], "class": ["flip"]})):
        t = two_stages(catalogue, tmp_path / str(number), seen, lengths=("1 step", "2 steps"), objective={"name": objective})
        assert t.run() == "finished"
        runs.append(toys.weights(t, "decoder"))
    assert not toys.same(*runs)


def test_an_objective_that_encodes_the_images_alone_is_refused(catalogue, tmp_path):
    built = two_stages(catalogue, tmp_path, {"class": ["flip"]}).built
    plan = built.recipe.stages[1]
    assert built.unseen(plan, built.objective(plan)) == []
    [told] = built.unseen(plan, evolve(built.objective(plan), takes_views=False))
    assert "objective 'soft_intro_vae' encodes the images alone" in told


def test_what_does_not_fit_is_told_before_training(catalogue, tmp_path):
    def refused(reason, seen=None, **tables):
        with pytest.raises(UserError, match=reason):
            two_stages(catalogue, tmp_path / "never", seen or {"class": ["same_label"]}, **tables)

    refused("stages.views.clas: no such group; did you mean 'class'", {"clas": ["flip"]})
    refused("train.peers: 351 are too many of 1400 training images", {"class": ["peer"]}, train={"peers": 351})
    refused("one of 'flip', 'stretch', 'same_label', 'peer'", {"class": ["turn"]})
    fading = [{"length": "1 step", "fade": 0.5, "views": {"class": ["flip"]}}]
    with pytest.raises(UserError, match=r"stages.views: not in a stage that fades in"):
        toys.trainer(catalogue, tmp_path, toys.tree(network=TWO, stages=fading, train={"batch": 8}))
    plane = {"data": {"name": "toy2d"}, "network": {"name": "mlp"}, "stages": [{"length": "1 step", "views": {"z": ["flip"]}}]}
    with pytest.raises(UserError, match=r"stages.views: are of images, this data has shape \[2\]"):
        toys.trainer(catalogue, tmp_path, toys.tree(**plane, train={"batch": 8}))
    labelled = [{"length": "1 step", "views": {"z": ["same_label"]}}]
    with pytest.raises(UserError, match=r"another image has another label, which train.conditional gives"):
        toys.trainer(catalogue, tmp_path, toys.tree(stages=labelled, train={"batch": 8, "conditional": True}))
