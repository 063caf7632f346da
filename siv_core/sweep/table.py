"""What the trials of a sweep came to: read from their run directories, averaged over seeds, written as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attrs import frozen

from siv_core.errors import UserError, near_miss
from siv_core.recipe.recipe import Recipe, differences
from siv_core.store import files
from siv_core.store.rundir import RunDir, busy
from siv_core.sweep.names import short_names, shown
from siv_core.sweep.sweep import Sweep, for_each
from siv_core.sweep.trials import Trial

SAME_TO_BE_DONE = ("stages", "metrics")  # of what may change between a run and its continuation, what calls for more work


@frozen
class Outcome:
    """A trial and what its run directory says of it."""

    trial: Trial
    run: RunDir
    state: (
        str  # missing, running, stopped, pruned, diverged, failed, finished; "changed": finished as what the recipe no longer is
    )
    step: int
    values: dict[str, dict[str, Any]]  # "metric.name" -> {"value": …} or {"skipped": …}, and "protocol"; of finished ones
    wall_seconds: float  # of training, over all its starts


def outcomes(sweep: Sweep, recipes: Mapping[str, Recipe], root: Path) -> list[Outcome]:
    return [outcome(trial, recipes[trial.name], RunDir(root / trial.name)) for trial in sweep.trials]


def outcome(trial: Trial, read: Recipe, run: RunDir) -> Outcome:
    if not (run.path / "resolved.json").exists():
        return Outcome(trial, run, "missing", 0, {}, 0.0)
    status, state = files.read_json(run.path / "status.json") if (run.path / "status.json").exists() else {}, run.state()
    before, now = run.resolved(), read.resolved()
    if state in ("running", "new"):
        state = "running" if busy(run) else "stopped"  # the word of a process that was killed
    if state == "finished" and (any(before[key] != now[key] for key in SAME_TO_BE_DONE) or differences(before, now)):
        state = "changed"
    values = measured(run.read("metrics")) if state == "finished" else {}
    return Outcome(trial, run, state, status.get("step", 0), values, wall_seconds(run.read("stats")))


def measured(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The newest line of each value, of the checkpoint and the weights that the run itself measured last."""
    own = [line for line in lines if line.get("by") == "run"]
    about = [(line["checkpoint"], line["weights"]) for line in own[-1:]]
    kept = [line for line in lines if (line["checkpoint"], line["weights"]) in about]
    found = {f"{line['metric']}.{line['name']}": line for line in kept}
    # a metric that was skipped as a whole and could be taken later has both lines
    taken = {line["metric"] for name, line in found.items() if "value" in line}
    return {
        name: {"skipped": line["skipped"], "protocol": line["protocol"]}
        if "skipped" in line
        else {"value": float(line["value"]), "protocol": line["protocol"]}
        for name, line in found.items()
        if not (line["name"] == "all" and "skipped" in line and line["metric"] in taken)
    }


def wall_seconds(lines: Sequence[dict[str, Any]]) -> float:
    """Seconds in training; the clock of stats.jsonl begins anew at each start."""
    clock = [line["wall"]["seconds"] for line in lines]
    return round(sum(now for now, after in zip(clock, [*clock[1:], 0.0], strict=False) if after <= now), 3)


def check_owner(root: Path) -> None:
    """A `UserError` where the folder is there and no sweep's."""
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: is no folder")
    known = not root.exists() or (root / "sweep.toml").exists()
    if not known and any(entry.name not in ("lock", "logs") for entry in root.iterdir()):
        raise UserError(f"{root}: holds files that are no siv sweep; name an empty or a new folder with --root")


def check_folder(sweep: Sweep, recipes: Mapping[str, Recipe], root: Path) -> list[str]:
    """A `UserError` where the folder holds something else; else what a person should know of it."""
    check_owner(root)
    there = {path.parent.name for path in root.glob("*/resolved.json")}
    own = {trial.name for trial in sweep.trials}
    strangers = sorted(there - own)
    some = ", ".join(strangers[:3]) + (" …" if len(strangers) > 3 else "")
    if there and not there & own:
        raise UserError(f"{root}: holds the trials of another sweep ({some}); name another folder with --root")

    def same(name: str) -> None:
        lines = differences(RunDir.existing(root / name).resolved(), recipes[name].resolved())
        if lines:
            read = recipes[name]
            hint = " (no device here is NVIDIA's, so that profile cpu applies by itself)" if read.automatic_profile else ""
            raise UserError(f"{root} holds other runs, name another folder with --root: {line}{hint}" for line in lines)

    for_each(sweep, {name: name for name in sorted(there & own)}, same)
    return [f"{len(strangers)} runs in {root} are of no trial of {sweep.path}: {some}"] if strangers else []


# -- the table -------------------------------------------------------------------------------------------------------------------


def table(sweep: Sweep, found: Sequence[Outcome]) -> dict[str, Any]:
    """As JSON types: rows by `group_by`, in each cell mean, sample standard deviation, and the values of every seed."""
    names = list(sweep.table.metrics) or list(dict.fromkeys(name for one in found for name in one.values))
    groups: dict[str, list[Outcome]] = {}
    for one in found:
        groups.setdefault(repr([one.trial.value(key) for key in sweep.group_by]), []).append(one)
    rows = [row(sweep, group, names) for group in groups.values()]
    best = best_rows(sweep, list(groups.values()))
    return {
        "format": 1,
        "sweep": sweep.name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "siv": version("siv"),
        "group_by": list(sweep.group_by),
        "metrics": names,
        "rows": rows,
        "best": best,
        "notes": [*unknown_metrics(filter(None, [*names, sweep.table.best]), found), *map(best_in_words, best)],
    }


def best_rows(sweep: Sweep, groups: Sequence[Sequence[Outcome]]) -> list[dict[str, Any]]:
    """The best row of each label by `table.best`: of rows whose trials are all finished, by their mean."""
    name, sign = sweep.table.best, 1 if sweep.table.direction == "minimize" else -1
    found: dict[str, list[tuple[float, Sequence[Outcome]]]] = {}
    for group in groups if name else ():
        values = [one.values.get(name, {}).get("value", math.nan) for one in group]
        found.setdefault(group[0].trial.label, []).append((sign * statistics.fmean(values), group))
    best = []
    for label, of in found.items():
        known = [one for one in of if math.isfinite(one[0])]
        if known:
            mean, group = min(known, key=lambda one: one[0])
            key = {key: group[0].trial.value(key) for key in sweep.group_by}
            best.append(
                {"label": label, "by": name, "mean": sign * mean, "n": len(group), "key": key, "among": len(known), "of": len(of)}
            )
    return best


def best_in_words(best: Mapping[str, Any]) -> str:
    keys = {key: value for key, value in best["key"].items() if key != "label"}
    names = short_names(tuple(keys))
    settings = ", ".join(f"{names[key]} {shown(value)}" for key, value in keys.items())
    of = f"{best['among']} rows" if best["among"] == best["of"] else f"{best['among']} finished rows of {best['of']}"
    return (
        f"{best['label'] + ': ' if best['label'] else ''}of {of} the best {best['by']} is {best['mean']:.4g}, with {settings}; "
        "chosen on this number: report it with seeds or data that chose nothing"
    )


def unknown_metrics(names: Iterable[str], found: Sequence[Outcome]) -> list[str]:
    """What was asked for and no finished trial has."""
    known = {name for one in found for name in one.values}
    return [f"no trial has measured '{name}'{near_miss(name, known)}" for name in names if known and name not in known]


def row(sweep: Sweep, group: Sequence[Outcome], names: Sequence[str]) -> dict[str, Any]:
    return {
        "key": {key: group[0].trial.value(key) for key in sweep.group_by},
        "trials": [about(one) for one in group],
        "cells": {name: cell([one for one in group if name in one.values], name) for name in names},
        "note": note(group),
    }


def about(one: Outcome) -> dict[str, Any]:
    return {
        "trial": one.trial.name,
        "seed": one.trial.seed,
        "state": one.state,
        "step": one.step,
        "run": str(one.run.path),
        "wall_seconds": one.wall_seconds,
    }


def cell(group: Sequence[Outcome], name: str) -> dict[str, Any]:
    values = [{**about(one), **one.values[name]} for one in group]
    return {**average([value["value"] for value in values if "value" in value]), "values": values}


def average(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None below two values) and number; nan where a value is not finite."""
    if not all(map(math.isfinite, values)):
        return {"mean": math.nan, "sd": math.nan, "n": len(values)}
    return {
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def note(group: Sequence[Outcome]) -> str:
    """Which trials of a row have no values, and why: `seeds 3, 4 missing`."""
    lacking: dict[str, list[str]] = {}
    for one in group:
        if one.state != "finished":
            which = one.trial.title() if one.trial.seed is None else str(one.trial.seed)
            lacking.setdefault(one.state, []).append(which)
    words = {True: "seed", False: "seeds"}
    seeded = all(one.trial.seed is not None for one in group)
    if len(group) == 1:
        return "".join(lacking)
    return "; ".join(f"{words[len(who) == 1] + ' ' if seeded else ''}{', '.join(who)} {state}" for state, who in lacking.items())


# -- as text ---------------------------------------------------------------------------------------------------------------------


def number(one: Mapping[str, Any], of: int) -> str:
    """`1.25 ± 0.11`: the deviation to two digits, the mean to as many places; `(n=2)` where not all of a row count."""
    mean, sd, n = one["mean"], one["sd"], one["n"]
    if mean is None:
        return "skipped" if one["values"] else "–"
    if sd is None or not math.isfinite(sd) or sd == 0:
        text = f"{mean:.4g}" + (f" ± {sd:g}" if sd is not None else "")
    else:
        places = max(0, 1 - math.floor(math.log10(sd)))
        small = places <= 5 and abs(mean) < 1e6
        text = f"{mean:.{places}f} ± {sd:.{places}f}" if small else f"{mean:.4g} ± {sd:.2g}"
    return text if n == of else f"{text} (n={n})"


def text_rows(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the table as people read it; `n` is the number of finished trials."""
    heads, metrics = short_names(result["group_by"]), _without_owner(result["metrics"])
    lines = []
    for entry in result["rows"]:
        done = sum(trial["state"] == "finished" for trial in entry["trials"])
        keys = ["–" if value is None else shown(value) for value in entry["key"].values()]
        cells = [number(entry["cells"][name], done) for name in result["metrics"]]
        lines.append((*keys, *cells, f"{done} of {len(entry['trials'])}", entry["note"]))
    return (*heads.values(), *metrics, "n", "lacking"), lines


def _without_owner(names: Sequence[str]) -> list[str]:
    """`official.kl` of `density2d.official.kl`, where all are of one metric."""
    owners = {name.partition(".")[0] for name in names}
    return [name.partition(".")[2] for name in names] if len(owners) == 1 else list(names)


def markdown(result: Mapping[str, Any]) -> str:
    head, lines = text_rows(result)
    if not any(line[-1] for line in lines):
        head, lines = head[:-1], [line[:-1] for line in lines]

    def escaped(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"

    text = [escaped(head), f"|{'---|' * len(head)}", *map(escaped, lines)]
    about = f"Mean ± sample standard deviation of a row's trials; `siv sweep`, siv {result['siv']}, {result['time']}."
    return "\n".join([f"# {result['sweep']}", "", *text, "", about, *(f"- {line}" for line in result["notes"])]) + "\n"


def csv_text(result: Mapping[str, Any]) -> str:
    """A line a cell: the row's keys, metric, mean, sd, n, of how many trials, what is lacking."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*result["group_by"], "metric", "mean", "sd", "n", "of", "lacking"])
    for entry in result["rows"]:
        for name, one in entry["cells"].items():
            keys = ["" if value is None else shown(value) for value in entry["key"].values()]
            numbers = ["" if one[part] is None else one[part] for part in ("mean", "sd", "n")]
            writer.writerow([*keys, name, *numbers, len(entry["trials"]), entry["note"]])
    return out.getvalue()


def write(result: Mapping[str, Any], root: Path) -> Iterator[Path]:
    """table.md, table.csv and table.json."""
    texts = {"table.md": markdown(result), "table.csv": csv_text(result)}
    for name, text in texts.items():
        files.write_bytes(root / name, text.encode())
        yield root / name
    files.write_json(root / "table.json", files.finite_or_text(result))
    yield root / "table.json"


def title_of(one: Outcome) -> str:
    """Label, grid values and seed, above a picture."""
    seed = "" if one.trial.seed is None else f"seed {one.trial.seed}"
    return ", ".join(filter(None, [one.trial.title(), seed]))
