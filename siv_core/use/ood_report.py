"""What out-of-distribution detection writes: a picture of the scores' densities, the scores, the numbers and their protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save

from siv_core.model import Model
from siv_core.store import files
from siv_core.use import pictures
from siv_core.use.outliers import Scored
from siv_core.use.pictures import Picture

Floats = NDArray[np.float64]
BINS, COLUMNS = 50, 3
TAIL = 0.005  # share of a set at either end that the axis may leave out
OWN = {"train": "#8c8c8c", "held_out": "#1f5fbf"}
COLOURS = ("#d9480f", "#2b8a3e", "#9c36b5", "#e0a800", "#0b7285", "#a61e4d")  # of the other sets, in turn


def write(folder: Path, scored: Scored, values: Mapping[str, float | str], model: Model) -> dict[str, Any]:
    """ood.png, ood.safetensors with the scores as "SET.SCORE" and ood.json; a name that is taken gets a number. What was written,
    and all that ood.json says."""
    paths = files.free_names(folder, "ood", (".json", ".safetensors", ".png"))
    about = {"values": dict(values), "protocol": scored.protocol, "notes": scored.notes, "model": model.name}
    files.write_json(paths[0], files.finite_or_text(about))
    arrays = {f"{label}.{name}": value for label, own in scored.scores.items() for name, value in own.items()}
    files.write_bytes(paths[1], save({key: value.contiguous() for key, value in arrays.items()}))
    pictures.save_png(paths[2], densities(scored, values))
    return {"files": [str(path) for path in paths], **about}


def densities(scored: Scored, values: Mapping[str, float | str]) -> Picture:
    """The histograms of Soft-IntroVAE's figure 8: a panel each score, the densities of training, held-out and other images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(scored.scores["held_out"])
    columns = 2 if len(names) == 4 else min(COLUMNS, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = Figure(figsize=(5 * columns, 3.6 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, name, {label: own[name].numpy() for label, own in scored.scores.items()}, values)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())[:, :, :3].copy()  # type: ignore[attr-defined]


def _panel(axes: Any, name: str, sets: Mapping[str, Floats], values: Mapping[str, float | str]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    finite = {label: scores[np.isfinite(scores)] for label, scores in sets.items()}
    edges, logarithmic = bins(list(finite.values()))
    others = iter(COLOURS * len(sets))
    for label, scores in finite.items():
        colour = OWN.get(label) or next(others)
        area = values.get(f"{label}.{name}.auroc")
        shown = label.replace("_", " ") + (f", AUROC {area:.3f}" if isinstance(area, float) else "")
        heights = np.histogram(scores, edges)[0] / max(1, len(sets[label]))
        axes.stairs(heights, edges, fill=label not in OWN, alpha=0.35 if label not in OWN else 1.0, color=colour, label=shown)
        axes.stairs(heights, edges, color=colour, linewidth=1.2)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    left = sum(len(scores) - int(((scores >= edges[0]) & (scores <= edges[-1])).sum()) for scores in sets.values())
    beyond = f"   ({left} beyond the axis)" if left else ""
    axes.set_title(f"{name.replace('_', ' ')}{beyond}", fontsize=10)
    axes.set_xlabel("score: larger is more of an outlier", fontsize=8)
    axes.set_ylabel("share of images", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.margins(x=0)
    lines = -(-len(sets) // 2)  # of the legend, which has room above the bars
    axes.set_ylim(0, max(axes.get_ylim()[1], 1e-9) / (0.94 - 0.075 * lines))
    axes.legend(fontsize=7, loc="upper center", ncols=2, frameon=False)


def bins(sets: list[Floats]) -> tuple[Floats, bool]:
    """Edges of the bars of one panel, and whether they stand on a logarithmic axis: where scores are positive and their middles
    lie far apart, one set would be a single bar."""
    ends = [np.quantile(scores, (TAIL, 1 - TAIL)) for scores in sets if len(scores)]
    if not ends:
        return np.linspace(0, 1, BINS + 1), False
    low, high = float(min(end[0] for end in ends)), float(max(end[1] for end in ends))
    if not high > low:
        low, high = low - 0.5, high + 0.5
    middles = [float(np.median(scores)) for scores in sets if len(scores)]
    if low > 0 and max(middles) > 8 * min(middles):
        return np.geomspace(low, high, BINS + 1), True
    if all((scores == scores.round()).all() for scores in sets):
        step = max(1, round((high - low) / BINS))  # a bar holds as many whole numbers as any other
        return np.arange(np.floor(low) - 0.5, high + step, step), False
    spread = 0.02 * (high - low)
    return np.linspace(low - spread, high + spread, BINS + 1), False
