"""Pictures of densities in the plane: samples over data, and exp(ELBO) on a grid; one model, or several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from siv_core.pictures import Picture
from siv_core.protocols import Spec

PIXELS = 380  # of a panel
DATA_COLOUR, SAMPLE_COLOUR = "#b9b9b9", "#c8371f"


@frozen(eq=False)
class Panel:
    """What is shown of one model."""

    samples: Tensor  # [n, 2]
    energy: Tensor | None = None  # −ELBO [G, G] in nats on `grid`, first axis x
    data: Tensor | None = None  # [m, 2], drawn below the samples
    title: str = ""


def is_plane(spec: Spec) -> bool:
    """Whether samples of this data are points that can be drawn, by a model that asks for no label."""
    return spec.kind == "array" and spec.shape == (2,) and not spec.conditional


def grid(value_range: tuple[float, float], size: int) -> Tensor:
    """Points [size², 2] of the square with both ends, x slowest."""
    side = torch.linspace(*value_range, size)
    return torch.cartesian_prod(side, side)


def draw(panels: Sequence[Panel], value_range: tuple[float, float]) -> Picture:
    """Samples above, densities below, a column for each model; of a single one they stand beside each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [draw_samples, draw_density] if any(panel.energy is not None for panel in panels) else [draw_samples]
    rows, columns = (1, len(kinds)) if len(panels) == 1 else (len(kinds), len(panels))
    figure = Figure(figsize=(columns * PIXELS / 100, rows * (PIXELS + 20) / 100), dpi=100, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib has no types
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, panel in enumerate(panels):
        for k, kind in enumerate(kinds):
            one = axes[0, k] if len(panels) == 1 else axes[k, i]
            kind(one, panel, value_range)
            one.set(xlim=value_range, ylim=value_range, aspect="equal")
            one.tick_params(labelsize=7)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[:, :, :3])


def draw_samples(axes: Any, panel: Panel, value_range: tuple[float, float]) -> None:
    told = [panel.title] if panel.title else []
    if panel.data is not None:
        axes.scatter(*panel.data.double().numpy().T, s=6, color=DATA_COLOUR, linewidths=0)
        told.append(f"{len(panel.data):,} of data (grey)")
    axes.scatter(*panel.samples.double().numpy().T, s=1.6, color=SAMPLE_COLOUR, linewidths=0)
    outside = int((~((panel.samples >= value_range[0]) & (panel.samples <= value_range[1])).all(dim=1)).sum())
    told.append(f"{len(panel.samples):,} samples" + (f", {outside:,} outside" if outside else ""))
    axes.set_title("\n".join([*told[:1], ", ".join(told[1:])]) if panel.title else ", ".join(told), fontsize=8)


def draw_density(axes: Any, panel: Panel, value_range: tuple[float, float]) -> None:
    """exp(−energy), not normalised: black where it is 0, bright at its largest; the largest is told."""
    if panel.energy is None:
        axes.set_title("no density", fontsize=8)
        return
    density = np.nan_to_num(torch.exp(-panel.energy.double()).numpy())
    axes.imshow(density.T, origin="lower", extent=(*value_range, *value_range), cmap="inferno", interpolation="nearest")
    axes.set_title(f"exp(ELBO), at most {density.max():.3g}", fontsize=8)
