"""Pictures of the plane: samples over data, exp(ELBO) on a grid, and what the clean divergences of `density2d` are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siv_core.use.pictures import Picture

PIXELS = 380  # of a panel
DATA_COLOUR, SAMPLE_COLOUR = "#b9b9b9", "#c8371f"

Floats = NDArray[np.float64]


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
