"""Pictures of a sweep: values against a key, the trials' own pictures side by side, terms of training against steps."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siv_core.errors import UserError
from siv_core.store import files
from siv_core.sweep.names import last, shown
from siv_core.sweep.sweep import PictureOptions, Sweep
from siv_core.sweep.table import Outcome, average, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL_WIDTH, PANEL_HEIGHT = 5.2, 3.8  # inches of a panel with axes
CELL = 4.5  # of a picture among others
TICKS = 12  # so many values of x are ticked one by one


def draw(sweep: Sweep, found: Sequence[Outcome], root: Path) -> Iterator[tuple[Path, str]]:
    """Each picture's file, and why it was not drawn ("" where it was)."""
    for options in sweep.pictures:
        chosen = [one for one in found if not options.trials or one.trial.label in (*options.trials, *options.constant)]
        path = root / f"{options.name}.png"
        try:
            figure = KINDS[options.kind](options, chosen)
        except UserError as error:
            yield path, str(error)
            continue
        if options.title:
            figure.suptitle(options.title)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        files.write_bytes(path, buffer.getvalue())
        yield path, ""


def _figure(columns: int, width: float, heights: Sequence[float]) -> tuple[Figure, Any]:
    """A figure with `columns` panels of this width beside each other, a row for each height, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)


# -- values against a key --------------------------------------------------------------------------------------------------------


def line(options: PictureOptions, found: Sequence[Outcome]) -> Figure:
    """A panel a metric: mean over seeds with its standard deviation, a line for each set of trials, level lines for others."""
    lines, levels = series(options, found)
    places = filter(None, (place_of(one, options) for one in found))
    planned = Counter((label, str(x)) for label, x in places)
    for metric in options.y:
        if not any(values.get(metric) for points in lines.values() for values in points.values()):
            raise UserError(f"no finished trial has both {options.x} and a value of {metric}")
    figure, panels = _figure(len(options.y), PANEL_WIDTH, [PANEL_HEIGHT])
    for axes, metric in zip(panels.flat, options.y, strict=True):
        for label, points in lines.items():
            averages = {x: average(values[metric]) for x, values in points.items() if values.get(metric)}
            means, sds = _columns(averages.values())
            axes.errorbar(list(averages), means, sds, marker="o", markersize=4, capsize=3, linewidth=1.5, label=label)
            for x, one in averages.items():
                if one["n"] < planned[label, str(x)]:  # the mean of those that did not diverge must not pass for one of all
                    words = f"{one['n']} of {planned[label, str(x)]}"
                    side = "right" if x == list(averages)[-1] and len(averages) > 1 else "left"  # within the axes
                    offset = (-3 if side == "right" else 3, 4)
                    axes.annotate(words, (x, one["mean"]), offset, textcoords="offset points", fontsize=7, ha=side)
        for i, (label, values) in enumerate(levels.items()):
            if values.get(metric):
                (mean,), (sd,) = _columns([average(values[metric])])
                colour = f"C{len(lines) + i}"
                axes.axhline(mean, color=colour, linestyle="--", linewidth=1.5, label=label)
                axes.axhspan(mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
            else:
                axes.plot([], [], color=f"C{len(lines) + i}", linestyle="--", label=f"{label} (no value yet)")
        ticks = {x for points in lines.values() for x in points}
        if len(ticks) <= TICKS and all(isinstance(x, (int, float)) for x in ticks):
            axes.set_xticks(sorted(ticks), [f"{x:g}" for x in sorted(ticks)])
        axes.set_xlabel(last(options.x))
        axes.set_ylabel(metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


Values = dict[str, list[float]]  # metric -> a value a seed


def series(options: PictureOptions, found: Sequence[Outcome]) -> tuple[dict[str, dict[Any, Values]], dict[str, Values]]:
    """{line: {x: values}} in the order of x, and {label: values} of the level lines."""
    lines: dict[str, dict[Any, Values]] = {}
    levels: dict[str, Values] = {}
    for one in found:
        place = place_of(one, options)
        if one.trial.label in options.constant:
            target = levels.setdefault(one.trial.label, {})
        elif place is None:
            continue
        else:
            target = lines.setdefault(place[0], {}).setdefault(place[1], {})
        for metric in options.y:
            value = one.values.get(metric, {}).get("value")
            if value is not None:
                target.setdefault(metric, []).append(value)
    lines = {label: {x: values for x, values in points.items() if values} for label, points in lines.items()}
    ordered = {label: _sorted(points) for label, points in lines.items() if points}
    return ordered, levels


def place_of(one: Outcome, options: PictureOptions) -> tuple[str, Any] | None:
    """Label of its line and its x; None for a level line and where x is not set."""
    trial, x = one.trial, one.trial.value(options.x)
    if trial.label in options.constant or x is None:
        return None
    others = [f"{last(key)} {shown(value)}" for key, value in trial.varied.items() if key != options.x]
    at = x if isinstance(x, (int, float)) and not isinstance(x, bool) else shown(x)
    return ", ".join(filter(None, [trial.label, *others])), at


def _sorted(points: dict[Any, Values]) -> dict[Any, Values]:
    numbers = all(isinstance(x, (int, float)) for x in points)
    return dict(sorted(points.items())) if numbers else {str(x): values for x, values in points.items()}


def _columns(averages: Any) -> tuple[list[float], list[float]]:
    whole = list(averages)
    return [one["mean"] for one in whole], [one["sd"] or 0.0 for one in whole]


# -- the trials' own pictures ----------------------------------------------------------------------------------------------------


def samples(options: PictureOptions, found: Sequence[Outcome]) -> Figure:
    """The trials' pictures in their order, of several seeds the first that is finished; a trial without one keeps its place in
    its row, and a row of trials that have not been run is left out."""
    from PIL import Image

    places: dict[str, Outcome] = {}
    for one in found:
        title = one.trial.title()
        if title not in places or (one.state == "finished" and places[title].state != "finished"):
            places[title] = one
    shown_ones = list(places.values())
    finished = [one for one in shown_ones if one.state == "finished"]
    lacking = [one.run.images / name for one in finished for name in options.images if not (one.run.images / name).exists()]
    if not finished:
        raise UserError("no finished trial yet")
    if lacking:
        raise UserError(f"{lacking[0]}: is not there{f', nor are {len(lacking) - 1} others' if lacking[1:] else ''}")

    columns, rows = min(options.columns or len(shown_ones), len(shown_ones)), len(options.images)
    grid = [shown_ones[first : first + columns] for first in range(0, len(shown_ones), columns)]
    run = [row for row in grid if any(one.state != "missing" for one in row)]
    pictures = {(one.trial.name, name): np.asarray(Image.open(one.run.images / name).convert("RGB"))
                for one in finished for name in options.images}  # fmt: skip
    shapes = [pictures[finished[0].trial.name, name].shape for name in options.images]
    heights = [CELL * shape[0] / shape[1] + (0.3 if r == 0 else 0.1) for r, shape in enumerate(shapes)]
    figure, panels = _figure(columns, CELL, heights * len(run))
    for axes in panels.flat:
        axes.set_axis_off()
    if len(run) < len(grid):
        left_out = len(shown_ones) - sum(map(len, run))
        figure.supxlabel(f"left out: {left_out} that have not been run", fontsize=9, color="grey")
    for (place, column), one in [((i, k), one) for i, row in enumerate(run) for k, one in enumerate(row)]:
        for r, name in enumerate(options.images):
            axes = panels[place * rows + r, column]
            if one.state == "finished":
                axes.imshow(pictures[one.trial.name, name], interpolation="lanczos")
            else:
                axes.text(0.5, 0.5, "not run" if one.state == "missing" else one.state, ha="center", color="grey")
            if r == 0:
                axes.set_title(title_of(one) if one.state == "finished" else one.trial.title(), fontsize=9)
    return figure


# -- terms of training -----------------------------------------------------------------------------------------------------------


def curves(options: PictureOptions, found: Sequence[Outcome]) -> Figure:
    """A panel a term of stats.jsonl, against steps; a colour for each set of trials, a thin line for each of their seeds."""
    figure, panels = _figure(len(options.y), PANEL_WIDTH, [PANEL_HEIGHT])
    titles = list(dict.fromkeys(one.trial.title() for one in found))
    drawn = dict.fromkeys(options.y, False)
    for axes, term in zip(panels.flat, options.y, strict=True):
        labelled = set()
        for one in found:
            steps, values = term_of(one.run.read("stats"), term)
            if not steps:
                continue
            title, drawn[term] = one.trial.title(), True
            label = None if title in labelled else title
            labelled.add(title)
            axes.plot(steps, values, color=f"C{titles.index(title)}", linewidth=1, alpha=0.8, label=label)
        axes.set_xlabel("step")
        axes.set_ylabel(term)
        axes.grid(alpha=0.3)
    lacking = [term for term, there in drawn.items() if not there]
    if lacking:
        known = {name for one in found for entry in one.run.read("stats") for phase in entry["phases"].values() for name in phase}
        raise UserError(f"no run has the term '{lacking[0]}'; there are: {', '.join(sorted(known)) or 'none yet'}")
    for axes in panels.flat:
        axes.legend(fontsize=8)
    return figure


def term_of(lines: Sequence[Mapping[str, Any]], term: str) -> tuple[list[int], list[float]]:
    """Steps and values of `kl_real`, of the first phase that has it, or of one phase's `encoder.kl_real`."""
    phase, _, name = term.rpartition(".")
    steps, values = [], []
    for entry in lines:
        for own, terms in entry["phases"].items():
            if phase in ("", own) and name in terms:
                steps.append(entry["step"])
                values.append(float(terms[name]))
                break
    return steps, values


KINDS: dict[str, Callable[[PictureOptions, Sequence[Outcome]], Figure]] = {"line": line, "samples": samples, "curves": curves}
