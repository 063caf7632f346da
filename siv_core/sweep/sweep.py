"""A sweep: one TOML file that varies a recipe, read into trials, each of which is an ordinary run.

Trials are the product of `[[trials]]` (override tables with a label), `[grid]` (keys and their values) and `seeds`.
"""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from siv_core.component import option
from siv_core.errors import UserError, near_miss
from siv_core.recipe import recipe as recipes
from siv_core.recipe.catalogue import Catalogue
from siv_core.recipe.convert import structure
from siv_core.recipe.recipe import Recipe
from siv_core.sweep import search
from siv_core.sweep.trials import Common, Trial, of_table, overlap, read_grid

FORMAT = 1
KINDS: dict[str, type] = {
    "grid": dict,
    "table": dict,
    "trials": list,
    "pictures": list,
    "search": dict,
}  # of a sweep file's tables
TAKEN = ("lock", "logs", "sweep.toml", "table.csv", "table.json", "table.md")  # siv's own names in a sweep's folder


@frozen
class TableOptions:
    """`[table]`."""

    metrics: tuple[str, ...] = option((), doc='values to show, such as "density2d.official.kl"; none: all')
    group_by: tuple[str, ...] = option((), doc='what makes a row: "label", "recipe", keys that vary; none: label and grid keys')
    best: str = option("", doc='the value that tells the best row of each label, such as "density2d.official.kl"')
    direction: str = option("minimize", doc="of `best`", choices=("minimize", "maximize"))


@frozen
class PictureOptions:
    """One entry of `[[pictures]]`."""

    kind: str = option(doc="what is drawn", choices=("line", "samples", "curves"))
    name: str = option(doc="of its file, without .png")
    title: str = option("", doc="above the picture")
    trials: tuple[str, ...] = option((), doc="labels of the trials in it; none: all")
    x: str = option("", doc="line: the key along the axis, such as objective.margin")
    y: tuple[str, ...] = option((), doc="line: values of metrics; curves: terms of stats.jsonl, such as kl_real; a panel each")
    constant: tuple[str, ...] = option((), doc="line: labels of trials without x, drawn as level lines")
    images: tuple[str, ...] = option(("samples.png",), doc="samples: pictures in the runs' images folders, a row each")
    columns: int = option(0, doc="samples: trials beside each other; 0: all of them", ge=0)


@frozen
class SweepOptions:
    """A sweep file, but for the tables that are read by themselves."""

    format: int = option(doc="1")
    recipe: str = option("", doc="the recipe that is varied, as a path from the sweep file")
    profiles: tuple[str, ...] = option((), doc="as --profile")
    sets: tuple[str, ...] = option((), doc='as --set: "KEY=VALUE"')
    seeds: tuple[int, ...] = option((), doc="values of train.seed; none: the recipe's")
    # these are checked one by one
    grid: dict[str, Any] = field(factory=dict)  # dotted keys and lists of their values
    trials: list[dict[str, Any]] = field(factory=list)  # override tables, each with a label
    table: dict[str, Any] = field(factory=dict)
    pictures: list[dict[str, Any]] = field(factory=list)
    search: dict[str, Any] = field(factory=dict)  # trials that are proposed one after the other


@frozen
class Sweep:
    name: str
    path: Path
    source: bytes
    trials: tuple[Trial, ...]
    table: TableOptions
    pictures: tuple[PictureOptions, ...]
    group_by: tuple[str, ...] = field(default=())  # with its default filled in
    search: tuple[search.SearchOptions, dict[str, search.Range]] | None = None
    proposed: Trial | None = None  # of a search: what its trials have in common


# -- reading ---------------------------------------------------------------------------------------------------------------------


def load(path: Path, sets: Sequence[str] = ()) -> Sweep:
    """Read a sweep file; a `UserError` lists all that is wrong with it. `sets` come last in every trial."""
    try:
        source = path.read_bytes()
        tree = tomllib.loads(source.decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); `siv recipes ls` lists the sweeps siv ships") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not TOML ({error})") from error
    if "network" in tree:
        raise UserError(f"{path}: is a recipe, no sweep: `siv run {path}` trains it")
    problems: list[str] = []
    sweep = _read(tree, path, source, tuple(sets), problems)
    if sweep is None or problems:
        raise UserError(f"{path}: {line}" for line in problems)
    return sweep


def _read(tree: dict[str, Any], path: Path, source: bytes, sets: tuple[str, ...], problems: list[str]) -> Sweep | None:
    if tree.get("format") != FORMAT:
        problems.append(f"format: this siv reads sweeps with `format = {FORMAT}`, got {tree.get('format')!r}")
        return None
    options = _options(tree, problems)
    table = structure(TableOptions, options.table, "table", problems)
    pictures = [structure(PictureOptions, one, f"pictures[{i}]", problems) for i, one in enumerate(options.pictures)]
    for i, picture in enumerate(pictures):
        problems += _picture_problems(picture, f"pictures[{i}]", pictures[:i]) if picture else []
    found, trials, proposed = (_search if options.search else _trials)(options, path, sets, problems)
    if problems:
        return None
    own = list(dict.fromkeys(key for trial in trials for key in trial.given()))
    for text in sets:
        taken = [key for key in own if overlap(key, re.sub(r"[\s\"']", "", text.partition("=")[0]))]
        problems += [f"--set {text}: the sweep itself sets {key}, and its names and table would not be true" for key in taken]
    known = {"label", "recipe", *own}
    grid = dict.fromkeys(key for trial in trials for key in trial.varied)
    group_by = table.group_by or (*(["label"] if options.trials else []), *grid)
    asked = [("table.group_by", key) for key in table.group_by]
    asked += [(f"pictures[{i}].x", picture.x) for i, picture in enumerate(pictures) if picture.x]
    problems += [f"{place}: no trial sets '{key}'{near_miss(key, known)}" for place, key in asked if key not in known]
    labels = {trial.label for trial in trials}
    for i, picture in enumerate(pictures):
        for place, one in [("trials", one) for one in picture.trials] + [("constant", one) for one in picture.constant]:
            if one not in labels:
                problems.append(f"pictures[{i}].{place}: no trial has the label '{one}'{near_miss(one, labels)}")
    return Sweep(path.stem, path, source, tuple(trials), table, tuple(pictures), group_by, found, proposed)


def _options(tree: dict[str, Any], problems: list[str]) -> SweepOptions:
    """What the file says; where a key of it is wrong, the others go on with the defaults, so that all is told at once."""
    tables: dict[str, Any] = {}
    for key, kind in KINDS.items():
        value = tree.get(key, kind())
        rows: Any = value
        if isinstance(value, kind) and (kind is dict or all(isinstance(one, dict) for one in rows)):
            tables[key] = value
        else:
            problems.append(f"{key}: expected {'a table' if kind is dict else 'a list of tables'}, got {value!r}")
    found: list[str] = []
    known = {key: value for key, value in tree.items() if key not in KINDS}
    options = structure(SweepOptions, known, "", found)
    problems += [line.removeprefix(".") for line in found]
    stand_in = SweepOptions(format=FORMAT, recipe=str(tree.get("recipe", "")), seeds=(0,) if "seeds" in tree else ())
    return evolve(options or stand_in, **tables)


def _picture_problems(picture: PictureOptions, where: str, earlier: Sequence[PictureOptions | None]) -> list[str]:
    """Options that its kind lacks or does not take, and a name that is taken."""
    takes = {"line": ("x", "y", "constant"), "samples": ("images", "columns"), "curves": ("y",)}
    needs = {"line": ("x", "y"), "samples": ("images",), "curves": ("y",)}
    default = PictureOptions(kind="line", name="")
    problems = [f"{where}.{key}: missing, a picture of kind '{picture.kind}' needs it" for key in needs[picture.kind]
                if not getattr(picture, key)]  # fmt: skip
    for key in ("x", "y", "constant", "images", "columns"):
        if key not in takes[picture.kind] and getattr(picture, key) != getattr(default, key):
            problems.append(f"{where}.{key}: a picture of kind '{picture.kind}' does not take it")
    if not re.fullmatch(r"\w[\w.-]*", picture.name, re.ASCII):
        problems.append(f"{where}.name: '{picture.name}' is no file name of letters, digits and _ . -")
    if any(other and other.name == picture.name for other in earlier):
        problems.append(f"{where}.name: another picture is called '{picture.name}'")
    return problems


def _search(
    options: SweepOptions, path: Path, sets: tuple[str, ...], problems: list[str]
) -> tuple[tuple[search.SearchOptions, dict[str, search.Range]] | None, list[Trial], Trial | None]:
    """What is searched; trials at the ends of the ranges, which recipes have to take; what all trials have in common."""
    problems += [
        f"search: goes without {key}, its trials are proposed one after the other"
        for key in ("grid", "trials", "seeds")
        if getattr(options, key)
    ]
    found = search.read(options.search, problems)
    if found is None or problems:
        return None, [], None
    made: list[Trial] = []
    for values in ({}, *search.at_the_ends(found[1])):
        made += of_table({}, "", _common(options, path, sets), {key: [value] for key, value in values.items()}, problems)
    return found, made[1:], made[0] if made else None


def _common(options: SweepOptions, path: Path, sets: tuple[str, ...]) -> Common:
    return Common(path.parent, options.recipe, options.profiles, options.sets, sets, options.seeds)


def _trials(options: SweepOptions, path: Path, sets: tuple[str, ...], problems: list[str]) -> tuple[None, list[Trial], None]:
    """The product of trials, grid and seeds; what is wrong goes to `problems`."""
    grid = read_grid(options.grid, "grid", problems)
    if not (problems or options.trials or options.grid or options.seeds):
        problems.append("nothing varies: give seeds, a [grid] or [[trials]]")
    if len(set(options.seeds)) < len(options.seeds):
        problems.append("seeds: one is there twice")
    for text in options.sets:
        if "=" not in text:
            problems.append(f"sets: '{text}': expected KEY=VALUE, such as train.batch=8")
    made: list[Trial] = []
    for i, table in enumerate(options.trials or ({},)):
        where = f"trials[{i}]" if options.trials else ""
        made += of_table(table, where, _common(options, path, sets), grid, problems)
    labels = [table.get("label") for table in options.trials]
    problems += [f"trials: '{one}' is the label of two" for one in dict.fromkeys(labels) if one and labels.count(one) > 1]
    folders: dict[str, Trial] = {}
    for trial in made:
        if trial.name.casefold() in TAKEN:
            problems.append(f"trial '{trial.title()}': {trial.name} in a sweep's folder is siv's own: rename it")
        other = folders.setdefault(trial.name.casefold(), trial)  # some file systems do not tell letters' case
        same = (other.label, other.varied) == (trial.label, trial.varied)  # then its label or its seed is there twice
        if not same and labels.count(trial.label) < 2:
            problems.append(f"trials '{other.title()}' and '{trial.title()}' would share the folder {trial.name}: rename one")
    return None, made, None


def chosen(sweep: Sweep, patterns: Sequence[str]) -> set[str]:
    """Names of the trials that fit a shell pattern of `patterns`; without patterns all of them."""
    names = [trial.name for trial in sweep.trials]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"--only {pattern}: no trial has such a name{near_miss(pattern, names)}; `--dry-run` lists them")
    return {name for pattern in patterns or ("*",) for name in fnmatch.filter(names, pattern)}


# -- checking --------------------------------------------------------------------------------------------------------------------


def resolve(sweep: Sweep, catalogue: Catalogue, *, cpu_only: bool) -> dict[str, Recipe]:
    """{trial: recipe}, every one checked; a `UserError` has each problem once, with the trials that have it."""

    def read(trial: Trial) -> Recipe:
        return recipes.load(trial.recipe, catalogue, trial.profiles, trial.sets, cpu_only=cpu_only)

    found = for_each(sweep, {trial.name: trial for trial in sweep.trials}, read)
    measured = {name for read in found.values() for name in read.metrics}
    asked = [("table.metrics", name) for name in sweep.table.metrics]
    asked += [("table.best", sweep.table.best)] if sweep.table.best else []
    asked += [(f"pictures[{i}].y", name) for i, one in enumerate(sweep.pictures) if one.kind == "line" for name in one.y]
    problems = [
        f"{sweep.path}: {place}: '{name}': no trial has a metric '{name.partition('.')[0]}'"
        f"{near_miss(name.partition('.')[0], measured)}"
        for place, name in asked
        if name.partition(".")[0] not in measured
    ]
    if problems:
        raise UserError(problems)
    return found


def check_distinct(sweep: Sweep, found: Mapping[str, Recipe]) -> None:
    """A `UserError` where trials that are to differ come to the same recipe; a search may well propose values twice."""
    problems, same = list[str](), dict[str, Trial]()
    for trial in sweep.trials:
        read_as = found[trial.name]
        other = same.setdefault(json.dumps([read_as.resolved(), read_as.places_of()], sort_keys=True, default=str), trial)
        if other is not trial:
            keys = ", ".join(key for key, value in trial.varied.items() if other.varied.get(key) != value) or "what they say"
            told = f"trials '{other.title()}' and '{trial.title()}' are one and the same: {keys} changes nothing"
            problems.append(f"{sweep.path}: {told}, as where each of the stages has its own")
    if problems:
        raise UserError(problems)


def for_each(sweep: Sweep, items: Mapping[str, Any], work: Callable[[Any], Any]) -> dict[str, Any]:
    """{trial: work(item)}; what fails for several trials is one problem with all their names."""
    done, wrong = {}, dict[str, list[str]]()
    for name, item in items.items():
        try:
            done[name] = work(item)
        except UserError as error:
            for line in error.problems:
                wrong.setdefault(line, []).append(name)
    if wrong:
        raise UserError(f"{sweep.path}: {line} (in {_some(names, len(sweep.trials))})" for line, names in wrong.items())
    return done


def _some(names: Sequence[str], total: int) -> str:
    if len(names) == total > 1:
        return f"all {total} trials"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
