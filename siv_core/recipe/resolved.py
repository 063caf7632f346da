"""A run's `resolved.json` as a recipe again: a run is what it resolved to, whatever its recipe's defaults have become since."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import evolve

from siv_core.errors import UserError
from siv_core.recipe.catalogue import Catalogue
from siv_core.recipe.overrides import setting
from siv_core.recipe.recipe import Recipe, as_before, parse


def load(
    path: Path, resolved: dict[str, Any], manifest: dict[str, Any], catalogue: Catalogue, sets: Sequence[str] = ()
) -> Recipe:
    """The recipe in `resolved`, which was read from `path`, with what `sets` say on top: places, and metrics.

    A `UserError` tells what the plugins that are installed no longer take, and which ones the run was made with.
    """
    try:
        _only_places_and_metrics(sets, resolved)
        tree = tree_of(resolved, earlier=manifest["format"] == 1)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"damaged, it is not what siv writes ({type(error).__name__}: {error})"
        raise UserError(f"{path}: {reason}; bring it back from a copy, every checkpoint's state.json has one") from error
    try:
        recipe = parse(tree, path, b"", catalogue, ("none",), tuple(sets), cpu_only=False)
    except UserError as error:
        made = ", ".join(sorted({str(owner) for owner in manifest.get("plugins", {}).values()}))
        hint = f"{path.parent}: the run was made with {made}; those versions read it"
        raise UserError([*error.problems, *([hint] if made and not sets else [])]) from error
    return as_before(evolve(recipe, profiles=tuple(manifest["profiles"])), manifest)


def tree_of(resolved: dict[str, Any], *, earlier: bool = False) -> dict[str, Any]:
    """The tables of a recipe that resolves to this. `earlier`: siv 0.1 called the samples of the prior "fake"."""
    tree = {key: value for key, value in resolved.items() if value is not None and key != "places"}
    priors = dict(resolved["prior"])
    common = priors.pop("all")
    tree["prior"] = priors or common
    tree["stages"] = [_stage(stage, earlier) for stage in resolved["stages"]]
    return tree


def sets_before(manifest: dict[str, Any], resolved: dict[str, Any]) -> list[str]:
    """What `--set` said of a run so far, and where its things lie: a relative path in its recipe was from the folder of then."""
    named = [*resolved.get("places", ()), *(["init.run"] if resolved.get("init") else [])]
    places = {key: value for key in named if (value := _at(resolved, key))}
    return [*(text for text in manifest["sets"] if text.partition("=")[0].strip() not in places), *map("=".join, places.items())]


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _stage(stage: dict[str, Any], earlier: bool) -> dict[str, Any]:
    table = {key: value for key, value in stage.items() if key not in ("batch", "size")}
    players = dict(stage["optim"])
    table |= {"optim": {**players.pop("all"), **players}, "train": {"batch": stage["batch"]}}
    if stage.get("size") is not None:
        table["data"] = {"size": stage["size"]}
    if earlier and "fakes" in stage["objective"]:
        fakes = ["prior" if name == "fake" else name for name in stage["objective"]["fakes"]]
        table["objective"] = {**stage["objective"], "fakes": fakes}
    return table


def _only_places_and_metrics(sets: Sequence[str], resolved: dict[str, Any]) -> None:
    """A run's model is what it was trained as: only where things lie, and what is measured, may be said anew."""
    places = resolved.get("places", ())
    problems = []
    for text in sets:
        for key in _leaves(setting(text)):
            data = key.partition(".")[0] == "data" and "places" not in resolved  # of siv 0.1, which did not note them
            if key not in places and not key.startswith("metrics.") and not data:
                can = ", ".join([*places, "metrics.NAME.KEY"])
                problems.append(f"--set {text}: a run stays what it is; here can be set: {can}")
    if problems:
        raise UserError(problems)


def _leaves(tree: dict[str, Any], before: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found += _leaves(value, f"{before}{key}.") if isinstance(value, dict) and value else [f"{before}{key}"]
    return found
