"""The metric `density2d`: official numbers against naive implementations and known floors, clean ones against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attrs import evolve
from siv_plugins import density2d, toy2d
from siv_plugins.density2d import clean_jsd, clean_kl, counts, density, gnelbo, log_integral, official_jsd, official_kl
from torch import nn
from torch.nn import functional as F

from siv_core.errors import UserError
from siv_core.latents import Gaussian
from siv_core.losses import Betas
from siv_core.model import Model
from siv_core.nets import Priors
from siv_core.protocols import Batch, Rows, Spec
from siv_core.testing import build_seeded
from siv_core.use.evaluate import measure

QUICK = {"clean_samples": 4000, "redraws": 3}


def normals(n, seed, mean=0.0, std=1.0):
    return mean + std * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- official --------------------------------------------------------------------------------------------------------------------


def published_histogram(x, half_range):
    """As the published code takes it."""
    span = [[-half_range, half_range], [-half_range, half_range]]
    return torch.tensor(np.histogram2d(x[:, 0].numpy(), x[:, 1].numpy(), bins=100, density=True, range=span)[0])


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.5), (1.5, 0.1)])
def test_official_divergences_are_pytorchs_kl_div_with_batchmean(mean, std):
    x, y = normals(5000, 0).float(), normals(5000, 1, mean, std).float()
    p, q = published_histogram(x, 2), published_histogram(y, 2)
    assert np.allclose(density(x, 2), p.numpy(), rtol=1e-12)
    assert official_kl(density(x, 2), density(y, 2)) == pytest.approx(
        F.kl_div(torch.log(q + 1e-14), p, reduction="batchmean").item(), rel=1e-10
    )
    m = 0.5 * (p + q)
    halves = [F.kl_div(torch.log(one + 1e-14), m, reduction="batchmean").item() for one in (p, q)]
    assert official_jsd(density(x, 2), density(y, 2)) == pytest.approx(sum(halves) / 2, rel=1e-10)


def test_official_kl_term_by_term():
    p, q = np.array([[0.0, 2.0], [1.0, 1.0]]), np.array([[1.0, 1.0], [2.0, 0.0]])
    by_hand = 2 * math.log(2 / 1) + 1 * math.log(1 / 2) + 1 * (0 - math.log(1e-14))
    assert official_kl(p, q) == pytest.approx(by_hand / 2, rel=1e-12)


def test_samples_outside_are_left_out():
    stray = [torch.full((5, 2), value) for value in (7.0, math.nan, math.inf)]
    x = torch.cat([normals(100, 0, std=0.1), *stray])
    assert np.allclose(density(x, 2), density(x[:100], 2))
    assert density(x[100:], 2) is None


@pytest.mark.parametrize(
    ("name", "kl", "jsd"),
    [
        ("8gaussians", 0.69, 0.33),  # 0.70 ± 0.19 by the published sampler and 80 draws; five draws had given 0.53 ± 0.12
        ("spiral", 6.79, 3.12),
        ("checkerboard", 17.08, 8.10),
        ("rings", 7.78, 3.67),
    ],
)
def test_floors_of_the_published_metrics(catalogue, name, kl, jsd):
    """Data against data, as it was measured with the published code: the mean of ten draws is within 4 of its standard errors."""
    component = catalogue.get("dataset", "toy2d")
    law = component.build(component.config(set=name)).law
    drawn = [density(law.draw(5000, torch.Generator().manual_seed(i)), law.half_range) for i in range(40)]
    for divergence, expected, sd in ((official_kl, kl, 0.4 if kl > 1 else 0.19), (official_jsd, jsd, 0.17 if jsd > 1 else 0.07)):
        taken = [divergence(drawn[i], drawn[i + 10]) for i in (*range(10), *range(20, 30))]
        print(
            f"\n{name}, {divergence.__name__}: {np.mean(taken):.2f} ± {np.std(taken, ddof=1):.2f} (20 pairs)", end=""
        )  # with -s
        assert np.mean(taken) == pytest.approx(expected, abs=4 * sd / math.sqrt(20) + 0.005)


def test_a_constant_energy_gives_chance_level():
    grid, points = torch.full((1024**2,), 3.0, dtype=torch.float64), torch.full((12_800,), 3.0, dtype=torch.float64)
    assert gnelbo(grid, points) == pytest.approx(1e7 / (1024**2 + 12_800), rel=1e-12) == pytest.approx(9.42, abs=0.005)


def test_gnelbo_by_hand_and_when_an_energy_is_not_finite():
    grid = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert gnelbo(grid, torch.tensor([1.0, 3.0], dtype=torch.float64)) == pytest.approx(1e7 * 2 / 10)
    assert gnelbo(torch.tensor([1.0, math.inf, math.nan]), grid) == "the energy is not finite at 2 of 3 grid points"
    assert gnelbo(grid, torch.tensor([math.inf])) == "the energy is not finite at 1 of 1 data points"


# -- clean -----------------------------------------------------------------------------------------------------------------------


def naive_divergences(x, y, half_range, bins, smoothing):
    """Bin by bin, from dictionaries."""

    def count(points):
        found = {}
        for a, b in points.tolist():
            inside = abs(a) <= half_range and abs(b) <= half_range
            cell = tuple(min(int((v + half_range) / (2 * half_range) * bins), bins - 1) for v in (a, b)) if inside else "outside"
            found[cell] = found.get(cell, 0) + 1
        return found

    p, q = count(x), count(y)
    cells = [*((i, j) for i in range(bins) for j in range(bins)), "outside"]
    kl = jsd = 0.0
    for cell in cells:
        a = (p.get(cell, 0) + smoothing) / (len(x) + smoothing * len(cells))
        b = (q.get(cell, 0) + smoothing) / (len(y) + smoothing * len(cells))
        kl += a * math.log(a / b)
        a, b = p.get(cell, 0) / len(x), q.get(cell, 0) / len(y)
        jsd += sum(0.5 * one * math.log(2 * one / (a + b)) for one in (a, b) if one)
    return kl, jsd


def test_clean_divergences_are_the_naive_ones():
    x, y = normals(700, 0, std=1.2), normals(500, 1, 0.4, 1.5)  # some outside
    kl, jsd = naive_divergences(x, y, 2.0, 6, 0.5)
    p, q = counts(x, 2.0, 6), counts(y, 2.0, 6)
    assert (p.sum(), q.sum(), len(p)) == (700, 500, 37)
    assert p[-1] > 50
    assert clean_kl(p, q) == pytest.approx(kl, rel=1e-10)
    assert clean_jsd(p, q) == pytest.approx(jsd, rel=1e-10)


def test_two_gaussians_with_a_known_divergence():
    """KL[N(0, I) ‖ N(m, s² I)] = 2 ln s + (2 + |m|²)/(2 s²) − 1, up to the bins and to sampling."""
    p, q = counts(normals(400_000, 0), 6.0, 50), counts(normals(400_000, 1, 0.6, 1.4), 6.0, 50)
    expected = 2 * math.log(1.4) + (2 + 2 * 0.36) / (2 * 1.96) - 1
    assert clean_kl(p, q) == pytest.approx(expected, abs=0.01)


def test_the_clean_divergence_is_blind_within_a_bin():
    """The law of 8 Gaussians against one whose modes are half as wide: the true KL is 2 ln ½ + 4 − 1 = 1.61 nats, but a bin is
    5.7 of the law's σ wide. The value is a lower bound, as the protocol says; bins of ½ σ see what there is to see."""
    std = 0.02 / 1.414
    data, narrow = (
        toy2d.draw_gaussians(400_000, torch.Generator().manual_seed(seed), centres=toy2d.EIGHT, std=width * std)
        for seed, width in enumerate((1.0, 0.5))
    )
    assert clean_kl(counts(data, 2.0, 50), counts(narrow, 2.0, 50)) < 0.2
    fine = [counts(points, 2.0, 570) for points in (data, narrow)]
    seen = (fine[0] > 0) | (fine[1] > 0)  # half a count in each of 325,000 empty bins would be a law of its own
    assert 1.0 < clean_kl(fine[0][seen], fine[1][seen]) < 2 * math.log(0.5) + 3


def test_uniform_squares_with_known_divergences():
    """A square of side 2 against one of side 4 around it: KL = ln 4, JSD in closed form; apart: JSD = ln 2."""
    g = torch.Generator().manual_seed(0)
    small, large = torch.rand(300_000, 2, generator=g) * 2 - 1, torch.rand(300_000, 2, generator=g) * 4 - 2
    p, q = counts(small, 4.0, 40), counts(large, 4.0, 40)
    assert clean_kl(p, q) == pytest.approx(math.log(4), abs=0.01)
    jsd = 0.5 * math.log(1 / 0.625) + 0.5 * (0.25 * math.log(0.25 / 0.625) + 0.75 * math.log(2))
    assert clean_jsd(p, q) == pytest.approx(jsd, abs=0.005)
    assert clean_jsd(p, counts(small + 2.5, 4.0, 40)) == pytest.approx(math.log(2), rel=1e-6)
    assert clean_jsd(p, counts(small + 9, 4.0, 40)) == pytest.approx(math.log(2), rel=1e-6)  # all of it outside
    assert clean_kl(p, p) == clean_jsd(p, p) == 0.0


def test_the_integral_of_a_gaussian_is_one():
    side = torch.linspace(-4, 4, 1024, dtype=torch.float64)
    energy = 0.5 * (side[:, None] ** 2 + side**2) / 0.01 + math.log(2 * math.pi * 0.01)
    assert log_integral(energy, 4.0) == pytest.approx(0, abs=1e-9)
    assert log_integral(torch.zeros(1024, 1024, dtype=torch.float64), 4.0) == pytest.approx(math.log(64), rel=1e-12)
    energy[3, 4] = math.inf  # a density of 0
    assert log_integral(energy, 4.0) == pytest.approx(0, abs=1e-9)
    energy[3, 4] = math.nan
    assert math.isnan(log_integral(energy, 4.0))


# -- the whole metric, on models whose energy is known ---------------------------------------------------------------------------


class Encode(nn.Module):
    """mu = x / b, the log-variance a constant."""

    def __init__(self, b, logvar):
        super().__init__()
        self.b, self.logvar = b, logvar

    def forward(self, x, labels=None):
        return {"z": Gaussian(x / self.b, torch.full_like(x, self.logvar))}


class Decode(nn.Module):
    """D(z) = a b z, so that D(mu(x)) = a x and ‖x − D(mu(x))‖² = (1 − a)² |x|²."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, codes, labels=None, noise=None):
        return self.factor * codes["z"]


def linear_model(catalogue, half_range, b, logvar, a=1.0):
    prior = catalogue.get("prior", "standard_normal")
    spec = Spec((2,), kind="array", value_range=(-half_range, half_range))
    priors = Priors({"z": build_seeded(prior, prior.config(), 2, spec)})
    return Model(Encode(b, logvar), Decode(a * b), priors, spec, {"z": 2}, None, torch.device("cpu"))


class GaussianData:
    """N(0, s² I), drawn without end, that tells nothing of itself."""

    def __init__(self, std, half_range):
        self.std, self.spec = std, Spec((2,), kind="array", value_range=(-half_range, half_range))

    def rows(self, split):
        def draw(n, generator):
            return Batch(self.std * torch.randn(n, 2, generator=generator))

        x = draw(4000, torch.Generator().manual_seed(77)).x
        return Rows(x, draw=draw if split == "train" else None)


def taken(catalogue, model, data, **options):
    component = catalogue.get("metric", "density2d")
    metric = component.build(component.config(**{**QUICK, **options}), data.spec, model.groups, None)
    calls = []
    lines, _ = measure({"density2d": metric}, model, data, {}, lambda what, done, total: calls.append(what))
    assert {"density2d: energy on the grid", "density2d: official kl", "density2d: clean histograms"} <= set(calls)
    return {line["name"]: line.get("value", line.get("skipped")) for line in lines}, lines[0]["protocol"]


def test_a_model_that_is_right_reaches_every_floor(catalogue, monkeypatch):
    """x = b z: energy = |x|²/(2 b²) + constant, so the normalised energy is the law N(0, b² I) itself, and its samples too."""
    monkeypatch.setattr(density2d, "GRID", 257)
    b, logvar, half_range = 0.5, -3.0, 4.0
    values, protocol = taken(
        catalogue,
        linear_model(catalogue, half_range, b, logvar),
        GaussianData(b, half_range),
        beta_rec=0.2,
        beta_kl=0.3,
        clean_samples=100_000,
    )
    entropy = math.log(2 * math.pi * math.e * b**2)
    assert values["clean.nll"] == pytest.approx(entropy, abs=5 / math.sqrt(4000))
    variance = math.exp(logvar)
    kl = 0.5 * 2 * (variance + 1 - 1 - logvar)  # E|mu|² = 2
    elbo = -(0.2 / 0.3) * 2 * b**2 * variance - kl - math.log(math.pi * 0.3 / 0.2)
    assert values["clean.elbo"] == pytest.approx(elbo, abs=0.1)
    assert elbo < -entropy
    for name in ("official.kl", "official.jsd"):
        assert values[name] == pytest.approx(values[f"{name}.floor"], abs=5 * (values[f"{name}.sd"] + values[f"{name}.floor.sd"]))
    for name in ("clean.kl", "clean.jsd"):
        assert values[name] == pytest.approx(values[f"{name}.floor"], rel=0.25)
        assert 0 < values[name] < 0.01
    assert values["clean.nll.floor"] == "the data set does not tell its entropy"
    assert values["clean.modes"] == "the data set does not tell its modes and its support"
    assert protocol["beta"] == 0.2 / 0.3
    assert "the paper's unit" in protocol["official.gnelbo"]


def test_gnelbo_of_a_known_energy(catalogue, monkeypatch):
    """energy = |x|² (1/(2 b²) + (1 − a)²) + c: sums over the grid by hand."""
    monkeypatch.setattr(density2d, "GRID", 129)
    a, b, logvar = -0.5, 0.5, -3.0
    values, _ = taken(catalogue, linear_model(catalogue, 4.0, b, logvar, a), GaussianData(b, 4.0))
    side = np.linspace(-4, 4, 129)
    slope, c = 1 / (2 * b * b) + (1 - a) ** 2, math.exp(logvar) - 1 - logvar
    grid = (slope * (side[:, None] ** 2 + side**2) + c).sum()
    data = slope * 2 * b**2 + c
    assert values["official.gnelbo"] == pytest.approx(1e7 * data / (grid + 12_800 * data), rel=0.02)
    assert values["official.gnelbo.constant_energy"] == pytest.approx(1e7 / (129**2 + 12_800))


def test_likelihoods_of_a_model_that_reconstructs_badly(catalogue, monkeypatch):
    """exp(−energy), normalised, is N(0, v I) with 1/(2 v) = 1/(2 b²) + (1 − a)²; the ELBO decodes draws of z, with the betas."""
    monkeypatch.setattr(density2d, "GRID", 257)
    a, b, logvar, beta_rec, beta_kl = 0.4, 0.5, 0.0, 2.0, 0.3
    values, _ = taken(
        catalogue, linear_model(catalogue, 4.0, b, logvar, a), GaussianData(b, 4.0), beta_rec=beta_rec, beta_kl=beta_kl
    )
    v = 1 / (1 / b**2 + 2 * (1 - a) ** 2)
    assert values["clean.nll"] == pytest.approx(b**2 / v + math.log(2 * math.pi * v), abs=0.06)
    own = 1 / (1 / b**2 + 2 * beta_rec / beta_kl * (1 - a) ** 2)
    assert values["clean.nll.own_betas"] == pytest.approx(b**2 / own + math.log(2 * math.pi * own), abs=0.06)
    rec = (1 - a) ** 2 * 2 * b**2 + 2 * a**2 * b**2 * math.exp(logvar)
    kl = math.exp(logvar) - logvar  # E|mu|² = 2
    elbo = -beta_rec / beta_kl * rec - kl - math.log(math.pi * beta_kl / beta_rec)
    assert values["clean.elbo"] == pytest.approx(elbo, abs=0.06)


def test_the_betas_are_the_objectives(catalogue, monkeypatch):
    """Those of the model where the options say none: the same numbers; of neither, a reason."""
    monkeypatch.setattr(density2d, "GRID", 65)
    own, data = ("clean.elbo", "clean.nll.own_betas"), GaussianData(0.5, 4.0)
    model = linear_model(catalogue, 4.0, 0.5, 0.0, 0.4)
    said, protocol = taken(catalogue, evolve(model, betas=Betas(9.0, {"z": 1.0})), data, beta_rec=2.0, beta_kl=0.3)
    of_model, same = taken(catalogue, evolve(model, betas=Betas(2.0, {"z": 0.3})), data)
    assert said == of_model
    assert protocol == same
    none, _ = taken(catalogue, model, data)
    assert {none[name] for name in own} == {density2d.NO_BETA}
    assert {name: none[name] for name in none if name not in own} == {name: said[name] for name in said if name not in own}
    with pytest.raises(UserError, match="both or neither"):
        taken(catalogue, model, data, beta_rec=0.2)


def test_an_overflow_is_a_skipped_value_with_its_reason(catalogue, monkeypatch):
    monkeypatch.setattr(density2d, "GRID", 33)
    values, _ = taken(catalogue, linear_model(catalogue, 4.0, 0.5, 800.0), GaussianData(0.5, 4.0), beta_rec=1.0, beta_kl=1.0)
    assert values["official.gnelbo"] == values["official.gnelbo.sd"] == "the energy is not finite at 1089 of 1089 grid points"
    for name in ("clean.nll", "clean.nll.own_betas"):
        assert values[name] == "a held-out energy, or the integral over the grid, is not finite"
    assert values["clean.elbo"] == "the ELBO of a held-out sample is not finite"
    assert values["official.kl"] > 0  # the sampler is sound all the same


def test_a_large_log_variance_does_not_overflow(catalogue, monkeypatch):
    """exp(200) is far beyond float32."""
    monkeypatch.setattr(density2d, "GRID", 33)
    values, _ = taken(catalogue, linear_model(catalogue, 4.0, 0.5, 200.0), GaussianData(0.5, 4.0))
    assert values["official.gnelbo"] == pytest.approx(1e7 / (33**2 + 12_800), rel=1e-6)
    assert math.isfinite(values["clean.nll"])


def test_samples_that_are_not_finite_are_outside(catalogue, monkeypatch):
    monkeypatch.setattr(density2d, "GRID", 33)
    values, _ = taken(catalogue, linear_model(catalogue, 4.0, math.nan, 0.0), GaussianData(0.5, 4.0))
    assert values["official.kl"] == "none of 5000 samples lies inside the range"
    assert values["clean.outside"] == 1.0
    assert values["clean.jsd"] == pytest.approx(math.log(2))


@pytest.mark.parametrize(("b", "off"), [(0.02, 1.0), (1.0, 0.99)])
def test_modes_and_support(catalogue, monkeypatch, b, off):
    """A blob in the middle meets none of the eight Gaussians; of a wide one less than a tenth of their due lands in each."""
    monkeypatch.setattr(density2d, "GRID", 33)
    component = catalogue.get("dataset", "toy2d")
    data = component.build(component.config(held_out=100))
    found, protocol = taken(catalogue, linear_model(catalogue, 2.0, b, 0.0), data, clean_samples=40_000)
    assert found["clean.modes.floor"] == 1.0
    assert found["clean.off_support.floor"] == pytest.approx(math.exp(-4.5), abs=0.004)
    assert found["clean.mode_kl.floor"] < 0.002
    assert found["clean.off_support"] == pytest.approx(off, abs=0.02)
    assert found["clean.modes"] == 0.0
    assert isinstance(found["clean.mode_kl"], str) == (b < 1)
    assert "8 Gaussians" in protocol["modes"]
    assert found["clean.nll.floor"] == pytest.approx(data.law.entropy)


class LostModes:
    """Half of the samples in the first mode, half in the second of four; the support is everything."""

    modes, tolerance = 4, 1.0

    def mode_of(self, x):
        return x[:, 0].long()

    def distance(self, x):
        return x[:, 1]


def test_mode_shares_by_hand():
    points = torch.tensor([[0.0, 0], [0, 0], [1, 0], [1, 0], [2, 5], [3, math.nan]])
    found, off = density2d.piece_counts(LostModes(), points)
    assert found.tolist() == [2, 2, 0, 0]
    assert off == pytest.approx(2 / 6)
    assert density2d.kl_nats(found / 4, np.full(4, 0.25)) == pytest.approx(math.log(2))


def test_the_same_numbers_again_and_others_with_another_seed(catalogue, monkeypatch):
    monkeypatch.setattr(density2d, "GRID", 33)
    model, data = linear_model(catalogue, 4.0, 0.6, -1.0), GaussianData(0.5, 4.0)
    first, again, other = (taken(catalogue, model, data, seed=seed, beta_rec=1.0, beta_kl=1.0)[0] for seed in (0, 0, 1))
    assert first == again
    assert all(first[name] != other[name] for name in ("official.kl", "official.gnelbo", "clean.kl", "clean.elbo"))


def test_a_table_and_other_shapes_are_refused_in_words(catalogue):
    component = catalogue.get("metric", "density2d")
    with pytest.raises(UserError, match=r"needs points of two dimensions in \[-L, L\], such as toy2d; this is \[1, 8, 8\]"):
        component.build(component.config(), Spec((1, 8, 8)), {"z": 2}, None)
    model, data = linear_model(catalogue, 4.0, 0.6, -1.0), GaussianData(0.5, 4.0)
    metric = component.build(component.config(), data.spec, model.groups, None)
    data.rows = lambda split: Rows(torch.zeros(9, 2))
    ([line], _) = measure({"density2d": metric}, model, data, {}, lambda what, done, total: None)
    assert "needs a data set that draws its samples" in line["skipped"]
