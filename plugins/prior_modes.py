"""What becomes of a prior's modes: how evenly the codes of data are spread over them, how many are in use, and what each shows.

r_k(z) = w_k N_k(z) / p(z) are the shares of the modes in a code, r̄_k their mean over the codes z ~ q(z ∣ x) of all held-out
images: over the whole set, since a batch of N images cannot use more than N modes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from siv_core import Codes, Component, Dataset, Gaussian, Measurement, Metric, Model, Progress, Spec, UserError, hookimpl, option
from siv_core.data import feed
from siv_core.model import BATCH
from siv_core.seeding import Streams, normal
from siv_core.use import pictures
from siv_core.use.evaluate import labels_of

ROWS, COLUMNS = 20, 8  # modes in a picture, the heaviest ones, and images of each
DOTS = 2000  # codes in a plot


@frozen
class PriorModesConfig:
    count: int = option(0, doc="held-out images; 0: all", ge=0)
    seed: int = option(0, doc="of the codes, and of what is drawn", ge=0)


@frozen
class PriorModes:
    spec: Spec
    config: PriorModesConfig

    def needs(self) -> Iterable[str]:
        return ()

    @torch.no_grad()
    def measure(self, model: Model, data: Dataset, progress: Progress) -> Measurement:
        priors: dict[str, Any] = {group: prior for group, prior in model.prior().items() if hasattr(prior, "responsibilities")}
        if not priors:
            raise UserError(f"the prior of {' and '.join(model.groups)} has no modes: that takes one such as mixture or vamp")
        codes, images = self._codes(model, data, progress)
        values: dict[str, float | str] = {}
        drawn: dict[str, Any] = {}
        for group, prior in priors.items():
            z = codes[group]
            share = torch.stack([prior.responsibilities(part).double().sum(dim=0) for part in z.split(4096)]).sum(dim=0) / len(z)
            weights = prior.log_weights.double().exp()
            values |= {f"{group}.{name}": value for name, value in told(share, weights).items()}
            if self.spec.kind == "image":
                drawn[f"{group}_samples"] = self._samples(model, group, prior, weights)
            drawn[f"{group}_plane"] = plane(z, prior.parts, weights)
        protocol = {
            "assignment_entropy": "of the mean shares of the modes over all codes, over ln K: 1 evenly spread, 0 all in one mode",
            "active": "share of modes whose mean share is at least 1 / K^2",
            "weight_entropy": "of the modes' weights, over ln K",
            "codes": "one of each image's posterior",
            "split": "held_out",
            "images": images,
            "seed": self.config.seed,
        }
        return Measurement(values, protocol, drawn)

    def _codes(self, model: Model, data: Dataset, progress: Progress) -> tuple[Codes, int]:
        """One code z ~ q(z ∣ x) of each image, by group."""
        rows = data.rows("held_out")
        count = min(self.config.count or len(rows), len(rows))
        chosen = torch.randperm(len(rows), generator=Streams(self.config.seed, 0)("prior_modes"))[:count].sort().values
        parts: list[Codes] = []
        for number, at in enumerate(chosen.split(BATCH)):
            progress("prior_modes: codes", number * BATCH, count)
            q = model.encode(feed.images(rows, at, self.spec), labels_of(rows, at, model))
            generator = Streams(self.config.seed, number, model.device)("prior_modes.codes")
            parts.append(
                {group: mu + normal(len(mu), mu.shape[1], generator) * torch.exp(0.5 * s) for group, (mu, s) in q.items()}
            )
        return {group: torch.cat([part[group] for part in parts]) for group in model.groups}, count

    def _samples(self, model: Model, group: str, prior: Any, weights: Tensor) -> pictures.Picture:
        """A row for each mode, the heaviest first: its mean, then codes of it; other groups have the same codes in each row."""
        mu, logvar = prior.parts
        heaviest = weights.argsort(descending=True)[:ROWS].to(mu.device)
        generator = Streams(self.config.seed, 0, model.device)("prior_modes.samples")
        eps = normal(COLUMNS, mu.shape[1], generator)
        eps[0] = 0
        z = (mu[heaviest, None] + eps * torch.exp(0.5 * logvar[heaviest, None])).flatten(0, 1)
        others = model.sample_codes(COLUMNS, self.config.seed)[0]
        codes = {name: z if name == group else others[name].repeat(len(heaviest), 1) for name in model.groups}
        labels = None
        if model.spec.conditional and model.spec.classes:
            labels = (torch.arange(COLUMNS) % model.spec.classes).repeat(len(heaviest))
        return pictures.grid(pictures.to_uint8(model.decode(codes, labels, self.config.seed), self.spec.value_range), COLUMNS)


def told(share: Tensor, weights: Tensor) -> Mapping[str, float]:
    """Of K modes: the entropies are over ln K, 0 of a single one."""
    k = len(share)
    norm = math.log(k) if k > 1 else 1.0

    def entropy(p: Tensor) -> float:
        return float(-(torch.xlogy(p, p)).sum()) / norm

    active = float((share >= 1 / k**2).double().mean())
    return {"assignment_entropy": entropy(share), "active": active, "weight_entropy": entropy(weights), "modes": float(k)}


def plane(z: Tensor, parts: Gaussian, weights: Tensor) -> pictures.Picture:
    """Codes of data as dots and the modes as ellipses of two deviations, in the plane in which the codes differ most; of two
    dimensions as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Ellipse

    z, mu, var = z.double().cpu(), parts.mu.double().cpu(), parts.logvar.double().exp().cpu()
    d = z.shape[1]
    axes, centre = torch.eye(d, dtype=z.dtype)[:, :2], torch.zeros(d, dtype=z.dtype)
    if d > 2:
        centre = z.mean(dim=0)
        axes = torch.linalg.svd(z - centre, full_matrices=False).Vh[:2].T
    elif d == 1:
        axes = torch.tensor([[1.0, 0.0]], dtype=z.dtype)
    dots, means = ((x - centre) @ axes for x in (z[:DOTS], mu))
    figure = Figure(figsize=(6, 6))
    canvas = FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.scatter(dots[:, 0].numpy(), dots[:, 1].numpy(), s=3, color="0.6", linewidths=0)
    largest = float(weights.max())
    for mean, variance, weight in zip(means, var, weights.tolist(), strict=True):
        covariance = (axes.T * variance) @ axes
        sizes, turned = torch.linalg.eigh(covariance)
        angle = math.degrees(math.atan2(float(turned[1, 1]), float(turned[0, 1])))
        height, width = (4 * float(size.clamp_min(0)) ** 0.5 for size in sizes)
        how = {"fill": False, "edgecolor": "C3", "alpha": 0.25 + 0.75 * weight / largest, "linewidth": 1.2}
        panel.add_patch(Ellipse((float(mean[0]), float(mean[1])), width, height, angle=angle, **how))
    panel.scatter(means[:, 0].numpy(), means[:, 1].numpy(), s=14, marker="+", color="C3")
    panel.set_title("codes of data, and modes of the prior" + (f" (2 of {d} directions)" if d > 2 else ""))
    panel.set_aspect("equal", adjustable="datalim")
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.array(canvas.buffer_rgba())[:, :, :3].copy()  # type: ignore[no-untyped-call]


def build(config: PriorModesConfig, spec: Spec, groups: dict[str, int], translate: tuple[str, str] | None) -> Metric:
    return PriorModes(spec, config)


@hookimpl
def siv_components() -> list[Component]:
    summary = "how the codes of data are spread over a prior's modes, and what each mode shows"
    return [Component("metric", "prior_modes", PriorModesConfig, build, summary, "arXiv:2408.13805")]
