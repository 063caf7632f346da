"""Metric `density2d`: how well a model knows a density in the plane (Daniel & Tamar 2021, section 6.1).

`official.…` are the numbers of the published code, unit for unit, so that they compare with the paper's Table 2: sums over
densities divided by the rows of a histogram, a reversed Jensen-Shannon divergence, a ratio of raw energies. `clean.…` are what
these names promise: masses, nats, and enough samples. Beside each stands its `floor`: what a perfect sampler, or a perfect
density, scores. A data set's `law`, where it has one as toy2d's, tells its entropy, its modes and its support. It also
draws models: samples over data, and exp(ELBO) on a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from siv_core import latents
from siv_core.component import Component, option
from siv_core.data.feed import images
from siv_core.errors import UserError
from siv_core.hookspecs import hookimpl
from siv_core.model import Model
from siv_core.protocols import Dataset, Measurement, Metric, Progress, Spec
from siv_core.seeding import Streams, normal, stream_seed
from siv_core.use.pictures import Picture

WHAT = "density2d"
GRID = 1024  # points a side of the energy's grid
SAMPLES, BINS, EPSILON = 5000, 100, 1e-14  # of the official histograms
DATA_POINTS = 100 * 128  # of the official gnELBO
PIECE_SAMPLES = 20_000  # that are asked which mode they belong to
CHUNK = 1 << 15  # points between two signs of life
SMOOTHING = 0.5  # counts added to every bin (Jeffreys' prior) before the clean KL
PIXELS = 380  # of a panel
DRAWN_DATA, DRAWN_GRID = 5000, 300  # points of data, and points a side of the density, in a picture
NO_BETA = "the objective has not one beta_rec / beta_kl: say both as options of the metric"
DATA_COLOUR, SAMPLE_COLOUR = "#b9b9b9", "#c8371f"

Floats = NDArray[np.float64]
Values = dict[str, float | str]


@frozen
class Density2DConfig:
    beta_rec: float = option(0.0, doc="with beta_kl, for clean.elbo and clean.nll.own_betas; 0: the objective's", ge=0)
    beta_kl: float = option(0.0, doc="see beta_rec", ge=0)
    redraws: int = option(10, doc="times that the official numbers are taken, each with fresh samples", ge=2)
    clean_samples: int = option(200_000, doc="of data and of model, for the clean divergences", ge=1000)
    clean_bins: int = option(50, doc="a side, for the clean divergences", ge=2)
    seed: int = option(0, doc="of every draw; not the training's", ge=0)


# -- official: as published ------------------------------------------------------------------------------------------------------


def histogram(points: Tensor, half_range: float, bins: int) -> Floats:
    """Counts [bins, bins] on [−L, L]²; points outside, or not finite, are in none."""
    x, y = points.double().numpy().T
    return np.histogram2d(x, y, bins=bins, range=[[-half_range, half_range]] * 2)[0]


def density(points: Tensor, half_range: float, bins: int = BINS) -> Floats | None:
    """Probability per unit area [bins, bins] of the points inside [−L, L]², as if there were no others; None without any."""
    inside = histogram(points, half_range, bins)
    return inside / inside.sum() / (2 * half_range / bins) ** 2 if inside.any() else None


def official_kl(p: Floats, q: Floats) -> float:
    """(1/rows) Σ p (ln p − ln(q + 1e-14)) over densities, 0 ln 0 = 0: PyTorch's kl_div with "batchmean"."""
    with np.errstate(divide="ignore", invalid="ignore"):
        own = np.where(p > 0, p * np.log(p), 0.0)
    return float((own - p * np.log(q + EPSILON)).sum() / len(p))


def official_jsd(p: Floats, q: Floats) -> float:
    """½ [KL(M ‖ p) + KL(M ‖ q)] with M = (p + q)/2: reversed, and not bounded by ln 2."""
    m = (p + q) / 2
    return (official_kl(m, p) + official_kl(m, q)) / 2


def gnelbo(grid: Tensor, points: Tensor) -> float | str:
    """Mean energy of data points over the sum of all energies, in 1e-7. A constant energy gives 1e7/(grid + data points)."""
    for energies, where in ((grid, "grid"), (points, "data")):
        wrong = int((~energies.isfinite()).sum())
        if wrong:
            return f"the energy is not finite at {wrong} of {len(energies)} {where} points"
    return float(points.mean() / (grid.sum() + points.sum())) * 1e7


# -- clean -----------------------------------------------------------------------------------------------------------------------


def counts(points: Tensor, half_range: float, bins: int) -> Floats:
    """[bins² + 1]: how many points are in each bin of [−L, L]², and how many outside."""
    inside = histogram(points, half_range, bins).ravel()
    return np.append(inside, len(points) - inside.sum())


def kl_nats(p: Floats, q: Floats) -> float:
    """KL[p ‖ q] of masses; where p is 0 there is nothing to add."""
    at = p > 0
    return float((p[at] * np.log(p[at] / q[at])).sum())


def smoothed(n: Floats) -> Floats:
    return (n + SMOOTHING) / (n.sum() + SMOOTHING * len(n))


def clean_kl(real: Floats, fake: Floats) -> float:
    """KL(real ‖ fake) in nats, from counts."""
    return kl_nats(smoothed(real), smoothed(fake))


def clean_jsd(real: Floats, fake: Floats) -> float:
    """In nats, at most ln 2, from counts, which need no smoothing."""
    p, q = real / real.sum(), fake / fake.sum()
    return (kl_nats(p, (p + q) / 2) + kl_nats(q, (p + q) / 2)) / 2


def log_integral(grid: Tensor, half_range: float) -> float:
    """ln ∫ exp(−energy) over [−L, L]², from energies [G, G] on a grid with both ends: the trapezoidal rule.

    An energy that overflowed is a density of 0, as it should be; one that is not a number makes the result not a number.
    """
    sides = torch.ones(len(grid), dtype=grid.dtype)
    sides[[0, -1]] = 0.5
    weights = sides[:, None] * sides * (2 * half_range / (len(grid) - 1)) ** 2
    return float(torch.logsumexp((weights.log() - grid).flatten(), dim=0))


# -- the metric ------------------------------------------------------------------------------------------------------------------


@frozen
class Sources:
    """Points [n, 2] of the data and of the model, on the CPU: another `what` or `i` gives other points."""

    draw: Callable[[int, torch.Generator], Any]
    model: Model
    seed: int

    def real(self, n: int, what: str, i: int = 0) -> Tensor:
        return self.draw(n, torch.Generator().manual_seed(stream_seed(self.seed, f"{WHAT}.real.{what}", i))).x

    def fake(self, n: int, what: str, i: int = 0) -> Tensor:
        return self.model.sample(n, stream_seed(self.seed, f"{WHAT}.fake.{what}", i)).cpu()


@frozen
class Density2D:
    half_range: float
    config: Density2DConfig

    def needs(self) -> Iterable[str]:
        return ()

    def measure(self, model: Model, data: Dataset, progress: Progress) -> Measurement:
        draw = data.rows("train").draw
        if draw is None:
            raise UserError(f"{WHAT}: needs a data set that draws its samples, such as toy2d; this one is a table")
        sources, law = Sources(draw, model, self.config.seed), getattr(data, "law", None)
        held_out = data.rows("held_out")
        x = images(held_out, torch.arange(len(held_out)), model.spec)
        grid = self.energies(model, square((-self.half_range, self.half_range), GRID), progress, "energy on the grid")
        values = self.gnelbo(model, grid[0] + grid[1], sources, progress) | self.histograms(sources, progress)
        beta = self.config.beta_rec / self.config.beta_kl if self.config.beta_rec else model.decoder_beta
        values |= self.likelihood(model, beta, grid, x, law)
        divergences, binned = self.divergences(law, sources, progress)
        pictures = {"histograms": draw_histograms(binned, self.half_range)}
        return Measurement(values | divergences, self.protocol(beta, len(x), law), pictures)

    def draw(self, models: Mapping[str, Model], data: Dataset | None, seed: int, count: int) -> Picture | None:
        """`count` samples over held-out data above, densities below, a column for each model; of one model beside each other."""
        if any(model.spec.conditional for model in models.values()):
            return None
        real = None
        if data:
            held_out = data.rows("held_out")
            chosen = torch.randperm(len(held_out), generator=Streams(seed, 0)("show"))[:DRAWN_DATA].sort().values
            real = images(held_out, chosen, next(iter(models.values())).spec)
        figure, axes = canvas(*((1, 2) if len(models) == 1 else (2, len(models))))
        points = square((-self.half_range, self.half_range), DRAWN_GRID)
        for (title, model), (above, below) in zip(models.items(), axes if len(models) == 1 else axes.T, strict=True):
            rec, kl = model.energy(points)
            draw_samples(above, model.sample(count, seed).cpu(), real, self.half_range, title)
            draw_density(below, (rec + kl).cpu().unflatten(0, (DRAWN_GRID, DRAWN_GRID)), self.half_range)
        return pixels(figure)

    def energies(self, model: Model, points: Tensor, progress: Progress, what: str) -> tuple[Tensor, Tensor]:
        """‖x − D(mu)‖² and KL of points [n, 2]: [n] each, float64 on the CPU."""
        parts = []
        for i, chunk in enumerate(points.split(CHUNK)):
            progress(f"{WHAT}: {what}", i * CHUNK, len(points))
            parts.append([part.cpu() for part in model.energy(chunk)])
        return torch.cat([rec for rec, _ in parts]), torch.cat([kl for _, kl in parts])

    def gnelbo(self, model: Model, grid: Tensor, sources: Sources, progress: Progress) -> Values:
        n = self.config.redraws
        points = torch.cat([sources.real(DATA_POINTS, "gnelbo", i) for i in range(n)])
        energies = torch.stack(self.energies(model, points, progress, "energy of data")).sum(dim=0)
        taken = [gnelbo(grid, own) for own in energies.chunk(n)]
        return {**mean_and_sd("official.gnelbo", taken), "official.gnelbo.constant_energy": 1e7 / (len(grid) + DATA_POINTS)}

    def histograms(self, sources: Sources, progress: Progress) -> Values:
        """KL and JSD as published, each of fresh samples; their floors are of the data against the data."""
        values: Values = {}
        nothing = f"none of {SAMPLES} samples lies inside the range"
        for name, divergence in (("kl", official_kl), ("jsd", official_jsd)):
            asked = {name: sources.fake, f"{name}.floor": sources.real}
            taken: dict[str, list[float | str]] = {key: [] for key in asked}
            for i in range(self.config.redraws):
                progress(f"{WHAT}: official {name}", i, self.config.redraws)
                p = density(sources.real(SAMPLES, f"{name}.data", i), self.half_range)
                for key, source in asked.items():
                    q = density(source(SAMPLES, key, i), self.half_range)
                    taken[key].append(nothing if p is None or q is None else divergence(p, q))
            for key, kept in taken.items():
                values.update(mean_and_sd(f"official.{key}", kept))
        return values

    def likelihood(self, model: Model, beta: float | None, grid: tuple[Tensor, Tensor], x: Tensor, law: Any) -> Values:
        """Of held-out samples x, in nats: the normalised energy (betas of 1, and the objective's) and the objective's ELBO."""
        rec, kl = (part.cpu() for part in model.energy(x))

        def nll(beta: float) -> float | str:
            energy = (beta * grid[0] + grid[1]).unflatten(0, (GRID, GRID))
            value = float((beta * rec + kl).mean()) + log_integral(energy, self.half_range)
            return value if math.isfinite(value) else "a held-out energy, or the integral over the grid, is not finite"

        def elbo(beta: float) -> float | str:
            z = latents.sample(model.encode(x), self.posterior_noise(model, len(x)))
            drawn_rec = (x - model.decode(z).cpu()).double().square().sum(dim=1)
            value = float((-beta * drawn_rec - kl).mean()) + math.log(beta / math.pi)  # of variance 1 / (2 beta)
            return value if math.isfinite(value) else "the ELBO of a held-out sample is not finite"

        entropy = "the data set does not tell its entropy" if law is None else law.entropy
        return {
            "clean.nll": nll(1.0),
            "clean.nll.own_betas": nll(beta) if beta else NO_BETA,
            "clean.nll.floor": entropy,
            "clean.elbo": elbo(beta) if beta else NO_BETA,
            "clean.elbo.floor": entropy if isinstance(entropy, str) else -entropy,
        }

    def posterior_noise(self, model: Model, n: int) -> dict[str, Tensor]:
        generator = Streams(self.config.seed, 0)(f"{WHAT}.posterior")
        return {group: normal(n, dim, generator).to(model.device) for group, dim in model.groups.items()}

    def divergences(self, law: Any, sources: Sources, progress: Progress) -> tuple[Values, list[Floats]]:
        """KL, JSD and mode coverage of many samples, and the same of the data against the data; and the counts of both."""
        drawn = []
        for i, source in enumerate((sources.real, sources.real, sources.fake)):
            progress(f"{WHAT}: clean histograms", i, 3)
            drawn.append(source(self.config.clean_samples, "clean", i))
        binned = [counts(points, self.half_range, self.config.clean_bins) for points in drawn]
        values: Values = {}
        for suffix, other in ((".floor", binned[1]), ("", binned[2])):
            values[f"clean.kl{suffix}"] = clean_kl(binned[0], other)
            values[f"clean.jsd{suffix}"] = clean_jsd(binned[0], other)
            values[f"clean.outside{suffix}"] = float(other[-1] / other.sum())
        if law is None:
            return {**values, "clean.modes": "the data set does not tell its modes and its support"}, [binned[0], binned[2]]
        due = piece_counts(law, drawn[0][:PIECE_SAMPLES])[0]
        for suffix, points in ((".floor", drawn[1]), ("", drawn[2])):
            found, off = piece_counts(law, points[:PIECE_SAMPLES])
            values[f"clean.modes{suffix}"] = float((found >= due / 10).mean())
            shares = found / max(found.sum(), 1)
            values[f"clean.mode_kl{suffix}"] = kl_nats(shares, due / due.sum()) if shares.any() else "no sample is on the support"
            values[f"clean.off_support{suffix}"] = off
        return values, [binned[0], binned[2]]

    def protocol(self, beta: float | None, held_out: int, law: Any) -> dict[str, Any]:
        config = self.config
        return {
            "energy": "KL + |x - D(mu)|^2 with the posterior mean, betas of 1, float64",
            "range": f"[-{self.half_range:g}, {self.half_range:g}]^2",
            "seed": config.seed,
            "sd": f"over {config.redraws} re-draws of all samples: the noise of the metric, not of training",
            "floor": "data against other data, the same calculation; of nll the data's entropy, of elbo minus that",
            "official.gnelbo": f"1e7 * mean energy of {DATA_POINTS} data points / (sum over {GRID} x {GRID} grid + over data);"
            " the paper's unit. No normalised density: a constant energy gives official.gnelbo.constant_energy",
            "official.kl": f"KL(data | model), {SAMPLES} + {SAMPLES} samples, {BINS} x {BINS} bins, densities per unit area,"
            f" q + {EPSILON:g}, samples outside left out, sum / {BINS}; the paper's unit",
            "official.jsd": "as official.kl: (KL(M | data) + KL(M | model)) / 2 with M their mean; reversed; the paper's unit",
            "clean.nll": f"nats; energy normalised over the {GRID} x {GRID} grid (trapezoidal rule), {held_out} held-out samples",
            "clean.nll.own_betas": "as clean.nll, of the objective's energy, KL + beta * |x - D(mu)|^2",
            "clean.elbo": f"nats; E_q log N(x; D(z), 1 / (2 beta)) - KL, one z a sample, {held_out} held-out samples",
            "beta": beta,
            "clean.kl": f"nats; KL(data | model) of masses, {config.clean_samples} samples each, {config.clean_bins} x"
            f" {config.clean_bins} bins of {2 * self.half_range / config.clean_bins:g} a side and one for all outside,"
            f" {SMOOTHING:g} added to each count; a lower bound of the densities' KL, blind to what is smaller than a bin",
            "clean.jsd": "nats, at most ln 2; the same bins, nothing added",
            "clean.outside": "share of the samples outside the range",
            "clean.modes": f"share of the modes with at least a tenth of the data's samples on it, {PIECE_SAMPLES} of each",
            "clean.mode_kl": "nats; KL(model | data) of the modes' shares of the samples on the support",
            "clean.off_support": "share of the samples that are not on the support",
            "modes": law.about if law else None,
        }


def mean_and_sd(name: str, taken: Sequence[float | str]) -> Values:
    """Two values, or the first reason why one could not be taken."""
    reasons = [value for value in taken if isinstance(value, str)]
    if reasons:
        return {name: reasons[0], f"{name}.sd": reasons[0]}
    numbers = np.array(taken, dtype=np.float64)
    return {name: float(numbers.mean()), f"{name}.sd": float(numbers.std(ddof=1))}


def piece_counts(law: Any, points: Tensor) -> tuple[Floats, float]:
    """Samples on the support in each of the data's modes, and the share that is off it (what is not finite is off)."""
    on = law.distance(points) <= law.tolerance
    found = torch.bincount(law.mode_of(points[on]), minlength=law.modes)
    return found.double().numpy(), float((~on).double().mean())


# -- pictures --------------------------------------------------------------------------------------------------------------------


def square(value_range: tuple[float, float], size: int) -> Tensor:
    """Points [size², 2] of the square with both ends, x slowest."""
    side = torch.linspace(*value_range, size)
    return torch.cartesian_prod(side, side)


def canvas(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure of square panels with room for a title, and its axes [rows, columns]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * PIXELS / 100, rows * (PIXELS + 20) / 100), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def pixels(figure: Any) -> Picture:
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())[:, :, :3].copy()


def draw_samples(axes: Any, samples: Tensor, data: Tensor | None, half_range: float, title: str = "") -> None:
    """Samples [n, 2] over data [m, 2]; how many of each, and how many of the samples lie outside, is told."""
    told = []
    if data is not None:
        axes.scatter(*data.double().numpy().T, s=6, color=DATA_COLOUR, linewidths=0)
        told.append(f"{len(data):,} of data (grey)")
    axes.scatter(*samples.double().numpy().T, s=1.6, color=SAMPLE_COLOUR, linewidths=0)
    outside = int((~(samples.abs() <= half_range).all(dim=1)).sum())
    told.append(f"{len(samples):,} samples" + (f", {outside:,} outside" if outside else ""))
    axes.set_title("\n".join(filter(None, [title, ", ".join(told)])), fontsize=8)
    axes.set(xlim=(-half_range, half_range), ylim=(-half_range, half_range), aspect="equal")
    axes.tick_params(labelsize=7)


def draw_density(axes: Any, energy: Tensor, half_range: float) -> None:
    """exp(−energy [G, G]) on `square`, not normalised: black where it is 0, bright at its largest; the largest is told."""
    density = np.nan_to_num(torch.exp(-energy.double()).numpy())
    draw_map(axes, density, half_range, f"exp(ELBO), at most {density.max():.3g}")


def draw_map(axes: Any, values: Floats, half_range: float, title: str, cmap: str = "inferno", **limits: float) -> None:
    """Values [G, G] on [−L, L]², first axis x."""
    extent = (-half_range, half_range) * 2
    axes.imshow(values.T, origin="lower", extent=extent, cmap=cmap, interpolation="nearest", **limits)
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=7)


def draw_histograms(binned: Sequence[Floats], half_range: float) -> Picture:
    """What the clean divergences are made of: roots of the shares of data and of model in one scale, and the model's surplus."""
    shares = [counted[:-1] / counted.sum() for counted in binned]
    side, most = math.isqrt(len(shares[0])), max(1e-12, *(float(share.max()) for share in shares)) ** 0.5
    data, model = (share.reshape(side, side) for share in shares)
    figure, [(left, middle, right)] = canvas(1, 3)
    draw_map(left, np.sqrt(data), half_range, "√ share of data", vmin=0.0, vmax=most)
    told = f"√ share of model, {binned[1][-1] / binned[1].sum():.1%} outside"
    draw_map(middle, np.sqrt(model), half_range, told, vmin=0.0, vmax=most)
    told = f"±√ of model − data, ½ Σ∣·∣ = {0.5 * np.abs(model - data).sum():.3f}"
    draw_map(right, np.sign(model - data) * np.sqrt(np.abs(model - data)), half_range, told, "RdBu_r", vmin=-most, vmax=most)
    return pixels(figure)


def build(config: Density2DConfig, spec: Spec, groups: dict[str, int], translate: tuple[str, str] | None) -> Metric:
    low, high = spec.value_range
    if spec.shape != (2,) or low != -high:
        raise UserError(f"metric {WHAT}: needs points of two dimensions in [-L, L], such as toy2d; this is {list(spec.shape)}")
    if bool(config.beta_rec) != bool(config.beta_kl):
        raise UserError(f"metric {WHAT}: beta_rec and beta_kl are told both or neither")
    return Density2D(high, config)


@hookimpl
def siv_components() -> list[Component]:
    summary = "gnELBO, KL and JSD as published and in nats, likelihood, mode coverage: for densities in the plane"
    return [Component("metric", "density2d", Density2DConfig, build, summary, "arXiv:2012.13253")]
