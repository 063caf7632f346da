"""The trials of a sweep file: the product of an entry of `[[trials]]`, of grids and of seeds.

What a trial changes is written as `siv run --set` takes it, so that its run directory tells and repeats it without the sweep.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from siv_core.errors import near_miss
from siv_core.sweep.names import folder_name, last, short_names, shown, toml

OWN = ("label", "recipe", "profiles", "grid")  # what an entry of [[trials]] has beside the tables it overrides
SEED = "train.seed"


@frozen
class Trial:
    """One run of a sweep."""

    name: str  # of its folder
    label: str
    recipe: Path
    profiles: tuple[str, ...]
    sets: tuple[str, ...]
    varied: dict[str, Any]  # dotted key -> value, of the grid
    overrides: dict[str, Any]  # dotted key -> value, of its table in [[trials]]
    seed: int | None  # None: the recipe's own

    def value(self, key: str) -> Any:
        """Of a dotted key, `label` or `recipe`; None where this trial does not set it."""
        seed = {} if self.seed is None else {SEED: self.seed}
        own = {"label": self.label, "recipe": self.recipe.stem, **self.overrides, **self.varied, **seed}
        return own.get(key)

    def given(self) -> tuple[str, ...]:
        """Dotted keys that the sweep sets in it."""
        return (*self.overrides, *self.varied, *([] if self.seed is None else [SEED]))

    def title(self) -> str:
        """Label and grid values, as a person reads them."""
        return ", ".join(filter(None, [self.label, *(f"{last(key)} {shown(value)}" for key, value in self.varied.items())]))


@frozen
class Common:
    """What all trials of a sweep file share."""

    folder: Path  # that recipes are named from
    recipe: str
    profiles: tuple[str, ...]
    sets: tuple[str, ...]  # before what a trial sets
    last: tuple[str, ...]  # after it
    seeds: tuple[int, ...]


@frozen
class Times:
    """Values of a grid that are multiples of another key's."""

    key: str
    factors: tuple[float, ...]


Grid = dict[str, list[Any] | Times]


def of_table(table: dict[str, Any], where: str, common: Common, shared: Grid, problems: list[str]) -> Iterator[Trial]:
    """The trials of one entry of `[[trials]]`."""
    label, source, profiles = table.get("label", ""), table.get("recipe", common.recipe), table.get("profiles", common.profiles)
    before = len(problems)
    if where and (not isinstance(label, str) or not label.strip()):
        problems.append(f'{where}.label: missing, such as label = "IntroVAE"')
    if not isinstance(source, str):
        problems.append(f"{where}.recipe: expected a string, got {source!r}")
    elif not source:
        problems.append(f"{where + '.' if where else ''}recipe: missing (a string: the recipe that is varied)")
    if not isinstance(profiles, (list, tuple)) or not all(isinstance(one, str) for one in profiles):
        problems.append(f"{where}.profiles: expected a list of strings, got {profiles!r}")
    own = table.get("grid", {})
    if not isinstance(own, dict):
        problems.append(f"{where}.grid: expected a table of keys and lists of values")
        own = {}
    grid = {**shared, **read_grid(own, f"{where}.grid", problems)}
    changed = {key: value for key, value in table.items() if key not in OWN}
    overrides = dict(leaves(changed))
    given = set(overrides) | ({SEED} if common.seeds else set())
    problems += [f"{where + ': ' if where else ''}{key} is varied and set: say it in one place" for key in grid
                 if any(overlap(key, other) for other in given)]  # fmt: skip
    if common.seeds and any(overlap(SEED, key) for key in overrides):
        problems.append(f"{where}: {SEED} is set although the sweep has seeds")
    problems += [f"{where}.{key}: {value!r} is no value a recipe takes" for key, value in overrides.items() if not plain(value)]
    if len(problems) > before:
        return
    names = short_names(tuple(grid))
    for varied in combinations(grid, overrides, where, problems):
        own_tables = followed(changed, {**overrides, **varied}, where, problems)
        settings = [*common.sets, *(f"{key}={toml(value)}" for key, value in own_tables.items())]
        settings += [f"{key}={toml(value)}" for key, value in varied.items()]
        if len(problems) > before:
            return
        for seed in common.seeds or (None,):
            parts = [label, *(f"{names[key]}={shown(value)}" for key, value in varied.items())]
            parts += [f"seed={seed}"] if seed is not None else []
            yield Trial(
                name=folder_name("_".join(filter(None, parts))),
                label=label,
                recipe=Path(os.path.normpath(common.folder / source)),
                profiles=tuple(profiles),
                sets=(*settings, *([f"{SEED}={seed}"] if seed is not None else []), *common.last),
                varied=varied,
                overrides=dict(leaves(own_tables)),
                seed=seed,
            )


# -- grids -----------------------------------------------------------------------------------------------------------------------


def read_grid(table: dict[str, Any], where: str, problems: list[str]) -> Grid:
    """{dotted key: values} of a table whose keys may be dotted, quoted or nested."""
    found: Grid = {}
    for key, values in leaves(table):
        if _is_times(values):
            factors = values["values"]
            if not isinstance(values["times"], str) or not _list_of_numbers(factors):
                problems.append(f'{where}.{key}: expected {{ times = "KEY", values = [NUMBER, …] }}, got {values!r}')
                continue
            found[key], values = Times(values["times"], tuple(factors)), factors
        elif not isinstance(values, list) or not values:
            problems.append(f"{where}.{key}: expected a list of values, got {values!r}")
            continue
        elif not all(map(plain, values)):
            problems.append(f"{where}.{key}: holds a value that no recipe takes")
            continue
        if any(value in values[:i] for i, value in enumerate(values)):
            problems.append(f"{where}.{key}: a value is there twice")
        else:
            found.setdefault(key, values)
    return found


def _list_of_numbers(values: Any) -> bool:
    return (
        isinstance(values, list) and bool(values) and all(plain(one) and type(one) in (int, float) and one > 0 for one in values)
    )


def combinations(grid: Grid, overrides: dict[str, Any], where: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    """{dotted key: value} of the product, in the order of the keys."""
    before = len(problems)
    for key, of in grid.items():
        if isinstance(of, Times):
            other = grid.get(of.key, [overrides.get(of.key)])
            if isinstance(other, Times) or not all(type(one) in (int, float) for one in other):
                known = [key for key, values in grid.items() if isinstance(values, list)] + [*overrides]
                problems.append(
                    f"{where + '.' if where else ''}grid.{key}: multiples of '{of.key}', of which the trial sets no numbers"
                    f"{near_miss(of.key, known)}"
                )
    if len(problems) > before:
        return
    choices = [list(of.factors) if isinstance(of, Times) else of for of in grid.values()]
    for chosen in itertools.product(*choices):
        values = dict(zip(grid, chosen, strict=True))
        base = {**overrides, **values}
        # 3 × 0.1 is 0.3 to whoever wrote it
        times = {key: float(f"{base[of.key] * values[key]:.12g}") for key, of in grid.items() if isinstance(of, Times)}
        yield {**values, **times}


def followed(value: Any, known: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    """The same with the value of KEY in place of each `{ same = "KEY" }`."""
    if _is_same(value):
        key = value["same"]
        if not isinstance(key, str) or key not in known or isinstance(known[key], dict):
            problems.append(f"{where}: the same as '{key}', which the trial does not set{near_miss(str(key), known)}")
            return None
        return known[key]
    if isinstance(value, dict):
        return {key: followed(one, known, f"{where}.{key}", problems) for key, one in value.items()}
    if isinstance(value, list):
        return [followed(one, known, f"{where}[{i}]", problems) for i, one in enumerate(value)]
    return value


# -- tables ----------------------------------------------------------------------------------------------------------------------


def overlap(key: str, other: str) -> bool:
    """Whether one of two dotted keys is the other or holds it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def leaves(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested tables; `{ same = … }` and `{ times = …, values = … }` are values."""
    for key, value in table.items():
        if isinstance(value, dict) and value and not _is_same(value) and not _is_times(value):
            yield from leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _is_same(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"same"}


def _is_times(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"times", "values"}


def plain(value: Any) -> bool:
    """Whether a recipe can hold it: no dates, no infinities."""
    if isinstance(value, dict):
        return all(map(plain, value.values()))
    if isinstance(value, list):
        return all(map(plain, value))
    return isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))
