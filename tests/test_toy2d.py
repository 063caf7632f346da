"""The data set `toy2d` against its definitions, and endless data through the trainer."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from scipy.special import i0e, ndtr
from scipy.stats import kstest

from siv_core.data import feed
from siv_core.protocols import Batch, Rows, Spec
from siv_core.recipe import build
from siv_core.recipe import recipe as recipes
from siv_core.runs import check as inspect
from siv_core.runs import session
from siv_core.runs.record import schedule_of
from siv_core.seeding import DataOrder, Streams
from siv_core.testing import check_dataset
from siv_core.train.parallel import Parallel
from siv_core.use import evaluate

SETS = ("8gaussians", "spiral", "checkerboard", "rings", "25gaussians")
N = 40_000


def dataset(catalogue, name, **options):
    component = catalogue.get("dataset", "toy2d")
    return component.build(component.config(set=name, **options))


@pytest.fixture(scope="module")
def drawn(catalogue):
    """N samples of each set, in float64."""
    return {name: dataset(catalogue, name).law.draw(N, torch.Generator().manual_seed(3)).double().numpy() for name in SETS}


@pytest.mark.parametrize("name", SETS)
def test_conformance(catalogue, name):
    data = dataset(catalogue, name, epoch_images=300, held_out=200)
    check_dataset(data)
    train, held_out = data.rows("train"), data.rows("held_out")
    assert (len(train), len(held_out)) == (300, 200)
    assert held_out.draw is None
    low, high = data.spec.value_range
    assert low == -high == (-2.0 if name == "8gaussians" else -4.0)
    assert train.x.min() > low - 1e-6
    assert train.x.max() < high + 1e-6
    assert not torch.isin(train.x[held_out.index], train.x[train.index]).any()  # other draws


def test_the_fingerprint_is_that_of_the_law(catalogue):
    told = [dataset(catalogue, name).fingerprint() for name in SETS]
    told += [dataset(catalogue, "rings", held_out=5).fingerprint(), dataset(catalogue, "rings", epoch_images=5).fingerprint()]
    assert len(set(told)) == 7
    assert told[3] == dataset(catalogue, "rings").fingerprint()


def test_an_unknown_split(catalogue):
    with pytest.raises(Exception, match="no split 'test'; there are train and held_out"):
        dataset(catalogue, "rings").rows("test")


# -- the laws: naive definitions, point by point ---------------------------------------------------------------------------------


def naive(name, rng):
    """One sample by the definition's own words."""
    if name == "8gaussians":
        angle = rng.integers(8) * math.pi / 4
        point = np.array([2 * math.cos(angle), 2 * math.sin(angle)]) + 0.02 * rng.standard_normal(2)
        return point / 1.414
    if name == "25gaussians":
        point = np.array([2.0 * rng.integers(-2, 3), 2.0 * rng.integers(-2, 3)]) + 0.05 * rng.standard_normal(2)
        return 2 * point / 2.828
    if name == "spiral":
        t = math.sqrt(rng.random()) * math.radians(540)
        point = np.array([-t * math.cos(t) + 0.5 * rng.random(), t * math.sin(t) + 0.5 * rng.random()])
        return rng.choice([1, -1]) * point / 3 + 0.1 * rng.standard_normal(2)
    if name == "checkerboard":
        u = rng.uniform(-2, 2)
        return 2 * np.array([u, rng.random() - 2 * rng.integers(2) + math.floor(u) % 2])
    angle = 2 * math.pi * rng.random()
    return rng.choice([3, 2.25, 1.5, 0.75]) * np.array([math.cos(angle), math.sin(angle)]) + 0.08 * rng.standard_normal(2)


@pytest.mark.parametrize("name", SETS)
def test_samples_have_the_law_of_the_definition(drawn, name):
    """Kolmogorov-Smirnov of two independent samples along four directions and the radius; a false alarm is rarer than 1e-4."""
    rng = np.random.default_rng(11)
    x, y = drawn[name], np.stack([naive(name, rng) for _ in range(6000)])
    projections = [lambda p, a=a: p @ np.array([math.cos(a), math.sin(a)]) for a in (0.0, 0.5, 1.3, 2.2)]
    for project in [*projections, lambda p: np.linalg.norm(p, axis=1), lambda p: p[:, 0] * p[:, 1]]:
        assert kstest(project(x), project(y)).pvalue > 1e-5


@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("8gaussians", (2**2 / 2 + 0.02**2) / 1.414**2),
        ("25gaussians", (8 + 0.05**2) * (2 / 2.828) ** 2),
        ("checkerboard", 16 / 3),
        ("rings", (9 + 2.25**2 + 1.5**2 + 0.75**2) / 8 + 0.08**2),
    ],
)
def test_moments_in_closed_form(drawn, name, variance):
    x = drawn[name]
    error = 5 / math.sqrt(N)
    assert np.abs(x.mean(axis=0)).max() < error * math.sqrt(variance)
    assert x.var(axis=0) == pytest.approx([variance] * 2, rel=error)


def test_the_spirals_radius_in_closed_form(drawn):
    """E|x|² = (E t² + 2 E a² + 2 E a E[t sin t − t cos t])/9 + 2 σ²; the last mean by quadrature."""
    t = 3 * math.pi * np.sqrt((np.arange(100_000) + 0.5) / 100_000)
    expected = ((t**2).mean() + 2 / 12 + 2 * 0.25 * (t * np.sin(t) - t * np.cos(t)).mean()) / 9 + 2 * 0.01
    assert (drawn["spiral"] ** 2).sum(axis=1).mean() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", SETS)
def test_samples_are_independent_of_each_other(drawn, name):
    """No row tells of the row after it, nor of the one in the other half: every correlation is that of chance."""
    x = drawn[name]
    features = np.stack([x[:, 0], x[:, 1], (x**2).sum(axis=1), x[:, 0] * x[:, 1]], axis=1)
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    for a, b in ((features[:-1], features[1:]), (features[: N // 2], features[N // 2 :])):
        assert np.abs(a.T @ b / len(a)).max() < 5 / math.sqrt(len(a))


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("name", SETS)
def test_any_number_is_drawn(catalogue, name, n):
    assert dataset(catalogue, name).law.draw(n, torch.Generator().manual_seed(0)).shape == (n, 2)


# -- the geometry ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "modes", "outside"),
    [
        ("8gaussians", 8, math.exp(-4.5)),
        ("25gaussians", 25, math.exp(-4.5)),
        ("checkerboard", 8, 0.0),
        ("rings", 32, 0.0027),
        ("spiral", 16, None),
    ],
)
def test_pieces_and_support(catalogue, drawn, name, modes, outside):
    law, x = dataset(catalogue, name).law, torch.from_numpy(drawn[name]).float()
    assert law.modes == modes
    shares = torch.bincount(law.mode_of(x), minlength=modes) / N
    assert len(shares) == modes
    tolerance = 0.15 if name == "spiral" else 5 / math.sqrt(N / modes)  # the spiral's pieces overlap at its heart
    assert torch.allclose(shares * modes, torch.ones(modes), atol=tolerance)
    off = (law.distance(x) > law.tolerance).double().mean().item()
    if outside is None:
        assert 1e-5 < off < 0.0027  # most of its points have room on all sides
    else:
        assert off == pytest.approx(outside, abs=5 * math.sqrt((outside + 1e-9) / N))


def test_distances_by_hand(catalogue):
    points = torch.tensor([[0.0, 0.0], [3.5, 3.5], [1.0, -1.0], [2.0, 0.5]])
    assert dataset(catalogue, "rings").law.distance(points).tolist() == pytest.approx(
        [0.75, math.hypot(3.5, 3.5) - 3, 1.5 - math.sqrt(2), 2.25 - math.hypot(2, 0.5)], abs=1e-6
    )
    assert dataset(catalogue, "checkerboard").law.distance(points).tolist() == pytest.approx([0, 0, 1, 0], abs=1e-6)
    far = dataset(catalogue, "8gaussians").law.distance(points)
    radius = 2 / 1.414
    by_hand = [radius, math.hypot(3.5, 3.5) - radius, radius - math.sqrt(2), math.hypot(2 - radius, 0.5)]
    assert far.tolist() == pytest.approx(by_hand, abs=1e-6)


def test_distance_to_the_spiral_is_the_naive_one(catalogue):
    law, points = dataset(catalogue, "spiral").law, torch.rand(50, 2, generator=torch.Generator().manual_seed(1)) * 8 - 4
    t = np.sqrt(np.linspace(0, 1, 4001)) * 3 * math.pi
    curve = np.stack([-t * np.cos(t), t * np.sin(t)], axis=1) / 3
    for point, found in zip(points.double().numpy(), law.distance(points).tolist(), strict=True):
        nearest = min(
            np.linalg.norm(np.maximum(np.maximum(curve - p, p - curve - 0.5 / 3), 0), axis=1).min() for p in (point, -point)
        )
        assert found == pytest.approx(nearest, abs=0.02)


# -- entropies -------------------------------------------------------------------------------------------------------------------


def rings_entropy():
    r = (np.arange(200_000) + 0.5) / 200_000 * 5
    s2 = 0.08**2
    p = np.mean([np.exp(-((r - q) ** 2) / (2 * s2)) * i0e(r * q / s2) / (2 * math.pi * s2) for q in (3, 2.25, 1.5, 0.75)], axis=0)
    return -(2 * math.pi * r * p * np.log(np.maximum(p, 1e-300))).sum() * 5 / 200_000


def spiral_entropy():
    """The density is a mean over t of products of smoothed boxes."""
    grid = np.linspace(-4.5, 4.5, 301)
    t = 3 * math.pi * np.sqrt((np.arange(800) + 0.5) / 800)

    def box(c):
        return (ndtr((grid - c[:, None]) / 0.1) - ndtr((grid - c[:, None] - 1 / 6) / 0.1)) * 6

    p = box(-t * np.cos(t) / 3).T @ box(t * np.sin(t) / 3) / len(t)
    p = (p + p[::-1, ::-1]) / 2
    return -(p * np.log(np.maximum(p, 1e-300))).sum() * (grid[1] - grid[0]) ** 2


@pytest.mark.parametrize(
    ("name", "entropy"),
    [
        ("8gaussians", math.log(8) + 1 + math.log(2 * math.pi * (0.02 / 1.414) ** 2)),
        ("25gaussians", math.log(25) + 1 + math.log(2 * math.pi * (0.05 / 1.414) ** 2)),
        ("checkerboard", math.log(8 * 4)),
        ("rings", rings_entropy()),
        ("spiral", spiral_entropy()),
    ],
)
def test_entropies(catalogue, name, entropy):
    assert dataset(catalogue, name).law.entropy == pytest.approx(entropy, abs=3e-4)


# -- endless data in training ----------------------------------------------------------------------------------------------------


def recipe(**train):
    return toys.tree(
        data={"name": "toy2d", "set": "spiral", "epoch_images": 160},
        network={"name": "mlp", "z_dim": 2, "hidden": [8]},
        train={"batch": 64, "length": "3 steps", "tick": "1 steps", "preview": "1000 steps", **train},
    )


def test_a_step_sees_fresh_samples_that_depend_on_seed_and_step_alone():
    rows = Rows(torch.zeros(5, 2), draw=lambda n, generator: Batch(torch.rand(n, 2, generator=generator)))
    source = feed.Feed(rows, Spec((2,), kind="array"), torch.device("cpu"), "auto", conditional=False)
    assert source.residency == "drawn"

    def taken(share, step):
        return source.next(DataOrder(5, 0), 0, 64, share, Streams(1, step), (2,), torch.contiguous_format).x

    whole = taken(slice(0, 64), 5)
    assert torch.equal(whole, taken(slice(0, 64), 5))
    assert not torch.isin(whole, taken(slice(0, 64), 6)).any()
    for world in (2, 4):
        shares = [taken(Parallel(rank, world).share(64), 5) for rank in range(world)]
        assert torch.equal(torch.cat(shares), whole)


def test_labels_of_endless_data_reach_conditional_networks():
    rows = Rows(torch.zeros(5, 2), draw=lambda n, generator: Batch(torch.zeros(n, 2), torch.arange(n)))
    for conditional in (False, True):
        source = feed.Feed(rows, Spec((2,), kind="array", classes=64), torch.device("cpu"), "auto", conditional=conditional)
        labels = source.next(DataOrder(5, 0), 0, 8, slice(2, 5), Streams(0, 0), (2,), torch.contiguous_format).labels
        assert (labels is None) if not conditional else labels.tolist() == [2, 3, 4]


def test_micro_batches_agree_and_the_table_is_never_read(catalogue, tmp_path):
    found = []
    for micro in (0, 16):
        trainer = toys.trainer(catalogue, tmp_path / str(micro), recipe(micro_batch=micro))
        trainer.feed.tables[0] = torch.full_like(trainer.feed.tables[0], math.nan)
        assert trainer.run() == "finished"
        found.append(toys.weights(trainer, "decoder"))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-6)


def test_lengths_in_epochs_use_the_nominal_number(catalogue, tmp_path):
    trainer = toys.trainer(catalogue, tmp_path, recipe(length="2 epochs"))
    assert trainer.schedule.ends == (5,)  # 320 images, 64 a step


RECIPE = """
format = 1
[data]
name = "toy2d"
set = "rings"
[network]
name = "mlp"
hidden = [16]
[objective]
name = "soft_intro_vae"
[train]
batch = 32
length = "9 steps"
tick = "2 steps"
checkpoint = "4 steps"
"""


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    (tmp_path / "toy.toml").write_text(RECIPE)
    session.run(tmp_path / "toy.toml", run_dir=tmp_path / "whole", device="cpu")
    session.run(tmp_path / "toy.toml", run_dir=tmp_path / "cut", device="cpu", sets=["train.length=5 steps"])
    session.resume(tmp_path / "cut", device="cpu", sets=["train.length=9 steps"])
    for name in ("encoder", "decoder"):
        weights = [(tmp_path / run / f"checkpoints/step_00000009/{name}.safetensors").read_bytes() for run in ("whole", "cut")]
        assert weights[0] == weights[1]


def test_held_out_samples_are_a_table(catalogue):
    data = dataset(catalogue, "rings", held_out=50)
    positions = evaluate.some(data, "held_out", 8, 0)
    assert feed.images(data.rows("held_out"), positions, data.spec).shape == (8, 2)


# -- the shipped recipes ---------------------------------------------------------------------------------------------------------

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TABLE_5 = {  # of the paper: beta_rec, beta_kl, beta_neg
    "8gaussians": (0.2, 0.3, 0.9),
    "spiral": (0.2, 0.5, 1.0),
    "checkerboard": (0.2, 0.1, 0.2),
    "rings": (0.2, 0.2, 1.0),
}


@pytest.mark.parametrize("name", TABLE_5)
def test_recipes_have_the_values_of_table_5_and_the_published_schedule(catalogue, name):
    read = recipes.load(RECIPES / f"toy2d_{name}.toml", catalogue)
    data = build.dataset(read, catalogue)
    built = build.build(read, catalogue, data)
    assert read.data.config.set == name
    assert list(schedule_of(built).ends) == [2000, 10_000, 15_000, 30_000]
    assert [plan.objective.name for plan in read.stages] == ["vae", *["soft_intro_vae"] * 3]
    assert [plan.optim[""].lr for plan in read.stages] == [2e-4, 2e-4, 2e-5, 2e-6]
    assert {plan.batch for plan in read.stages} == {512}
    assert not any(plan.reset_optimisers for plan in read.stages)
    beta_rec, beta_kl, beta_neg = TABLE_5[name]
    for plan in read.stages:
        coeffs = built.objective(plan).coeffs
        scale = 1.0 if plan.objective.name == "vae" else 0.5
        assert (coeffs["beta_rec"], coeffs["beta_kl"], coeffs["scale"]) == (beta_rec, {"z": beta_kl}, scale)
    assert (coeffs["beta_neg"], coeffs["gamma_r"], coeffs["alpha"], coeffs["gamma"]) == ({"z": beta_neg}, 0.0, 2.0, 1.0)
    assert built.betas(read.stages[-1]).decoder == beta_rec / beta_kl  # which density2d goes by
    assert inspect.learning(built.networks.encoder) == 199_172
    assert inspect.learning(built.networks.decoder) == 198_658  # the published decoder has an unused scalar beside
