"""A recipe: one TOML file, its profiles and the command line's overrides, resolved into components and stages.

Order: recipe < profiles < `--set`; `overrides` says how they are read and merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attrs import evolve, field, fields, frozen

from siv_core.errors import UserError, near_miss
from siv_core.recipe.catalogue import Catalogue
from siv_core.recipe.convert import Length, is_place, plain, shown, structure
from siv_core.recipe.options import PLAYERS, Cadence, Init, Optim, ShadowOptions, StageData, StageOptions, Train
from siv_core.recipe.overrides import Layer, Places, merge, overlay, read, setting, tree_of

FORMAT = 1
STAGED = ("objective", "optim", "train", "data")  # what a stage may change; of train only batch, of data only size
EVERY = "every"
GAP = "train_eval_gap"  # what every model with statistics of the batch is measured with, as `use.evaluate` does
FREE = re.compile(r"metrics|stages\[\d+\]\.length|train\.(tick|preview|checkpoint|keep_every|residency)")  # see `differences`


@frozen
class Choice:
    """A component a recipe asked for, with its config."""

    kind: str
    name: str
    config: Any

    def tree(self) -> dict[str, Any]:
        return {"name": self.name, **plain(self.config)}


@frozen
class StagePlan:
    """What holds during one stage."""

    length: Length
    objective: Choice
    optim: dict[str, Optim]  # "" for all players, or a player's own
    batch: int
    size: int | None = None
    fade: float = 0.0
    fade_shape: str = "linear"
    reset_optimisers: bool = False
    views: dict[str, tuple[str, ...]] = field(factory=dict)


@frozen
class MetricPlan:
    """A metric a recipe asked for, and how often beside the end of training."""

    choice: Choice
    every: Length | None = None

    def tree(self) -> dict[str, Any]:
        return {**self.choice.tree(), **({"every": str(self.every)} if self.every else {})}


@frozen
class Recipe:
    """A recipe with every default filled in and every component found."""

    name: str
    source: bytes
    data: Choice
    network: tuple[Choice, ...]  # one, or (encoder's, decoder's)
    reconstruction: Choice
    prior: dict[str, Choice]  # group -> …; "" for all groups that are not named
    stages: tuple[StagePlan, ...]
    train: Train
    shadow: ShadowOptions | None
    metrics: dict[str, MetricPlan]
    init: Init | None
    profiles: tuple[str, ...]
    automatic_profile: bool
    sets: tuple[str, ...] = field(default=())
    places: Places | None = field(default=None, eq=False, repr=False)

    def told(self, problems: Iterable[str]) -> UserError:
        """Problems "dotted.key: reason" that were found after reading, with the places where they stand."""
        return self.places.told(problems) if self.places else UserError(problems)

    def places_of(self) -> dict[str, str]:
        """{dotted key: path} of the options that say where something lies."""
        network = ("network",) if len(self.network) == 1 else ("network.encoder", "network.decoder")
        choices = {"data": self.data, "reconstruction": self.reconstruction, **dict(zip(network, self.network, strict=True))}
        choices |= {f"metrics.{name}": plan.choice for name, plan in self.metrics.items()}
        configs = {**{key: choice.config for key, choice in choices.items()}, **({"init": self.init} if self.init else {})}
        return {
            f"{key}.{one.name}": getattr(config, one.name)
            for key, config in configs.items()
            for one in fields(type(config))
            if is_place(one)
        }

    def resolved(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON types; what `resolved.json` holds and a resume compares."""
        network = [choice.tree() for choice in self.network]
        return {
            "format": FORMAT,
            "places": [key for key in self.places_of() if key != "init.run"],  # which is known by its place alone
            "data": self.data.tree(),
            "network": network[0] if len(network) == 1 else {"encoder": network[0], "decoder": network[1]},
            "reconstruction": self.reconstruction.tree(),
            "prior": {group or "all": choice.tree() for group, choice in self.prior.items()},
            "stages": [
                {
                    **plain(stage),
                    "objective": stage.objective.tree(),
                    "optim": {player or "all": values for player, values in plain(stage.optim).items()},
                }
                for stage in self.stages
            ],
            "train": {key: value for key, value in plain(self.train).items() if key != "length"},
            "shadow": plain(self.shadow) if self.shadow else None,
            "metrics": {name: plan.tree() for name, plan in self.metrics.items()},
            "init": plain(self.init) if self.init else None,
        }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys in which two resolved recipes differ, leaving out what may change between a run and its continuation:
    lengths, cadences, residency and metrics, and where things lie (what lies there is told by its fingerprint)."""
    places = {"places"}
    for tree in (old, new):
        noted = tree.get("places") if isinstance(tree, dict) else None  # one of them may be what is left of a damaged file
        places |= {key for key in noted if isinstance(key, str)} if isinstance(noted, list) else set()

    def differing(old: Any, new: Any, where: str) -> list[str]:
        if FREE.fullmatch(where) or where in places:
            return []
        if isinstance(old, dict) and isinstance(new, dict):
            pairs = {key: (old.get(key), new.get(key)) for key in {**old, **new}}
            return [line for key, pair in pairs.items() for line in differing(*pair, f"{where}.{key}".lstrip("."))]
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differing(*pair, f"{where}[{i}]")]
        return [] if old == new else [f"{where}: the run has {old!r}, the recipe {new!r}"]

    return differing(old, new, "")


def load(
    path: Path,
    catalogue: Catalogue,
    profiles: Iterable[str] = (),
    sets: Iterable[str] = (),
    *,
    cpu_only: bool = False,
) -> Recipe:
    """Read and check a recipe; a `UserError` lists all that is wrong with it.

    `cpu_only`: no NVIDIA device is present, so that a profile named `cpu` applies by itself (`none` among the profiles
    turns that off).
    """
    source = read(path)
    return parse(tree_of(path, source), path, source, catalogue, tuple(profiles), tuple(sets), cpu_only)


def parse(
    tree: dict[str, Any],
    path: Path,
    source: bytes,
    catalogue: Catalogue,
    profiles: tuple[str, ...],
    sets: tuple[str, ...],
    cpu_only: bool,
) -> Recipe:
    """The recipe in a TOML tree; see `load`."""
    problems: list[str] = []
    known = tree.get("profiles", {})
    if not isinstance(known, dict):
        problems.append("profiles: expected a table of tables, such as [profiles.cpu.train]")
        known = {}
    problems += [f"profiles.{key}: expected a table" for key, table in known.items() if not isinstance(table, dict)]
    automatic = cpu_only and "cpu" in known and not {"none", "cpu"} & set(profiles)
    chosen = (("cpu",) if automatic else ()) + tuple(name for name in profiles if name != "none")
    hint = "" if known else "; the recipe has none"
    problems += [f"no profile '{name}'{near_miss(name, known) or hint}" for name in chosen if name not in known]
    layers = [Layer(tree, str(path))]
    layers += [Layer(known[name], str(path), ("profiles", name)) for name in chosen if isinstance(known.get(name), dict)]
    unread: list[str] = []
    for given in sets:
        try:
            layers.append(Layer(setting(given), f"--set {given}"))
        except UserError as error:
            unread += error.problems
    merged = {key: value for key, value in tree.items() if key != "profiles"}
    for layer in layers[1:]:
        merged = overlay(merged, layer.tree)
    places = Places(tuple(layers), merged, source.decode(errors="replace"))
    recipe = _Reader(catalogue, problems).recipe(merged, path.stem, source)
    if recipe is None or problems or unread:
        raise UserError((*unread, *places.told(problems).problems))
    return evolve(recipe, profiles=chosen, automatic_profile=automatic, sets=sets, places=places)


def with_each_profile(path: Path, catalogue: Catalogue, given: Iterable[str] = ()) -> list[str]:
    """What is wrong with a recipe as it is read with no profile, and with each of its own: what stands in it and is not in use
    now is looked at too. Not all profiles go together, so one is well if it is so alone or with the `given`; what `--set` says is
    meant for those in use."""
    source = read(path)
    tree, given = tree_of(path, source), tuple(name for name in given if name != "none")
    profiles = tree.get("profiles", {})
    problems: dict[str, None] = {}

    def wrong(*names: str) -> tuple[str, ...]:
        try:
            parse(tree, path, source, catalogue, ("none", *names), (), cpu_only=False)
        except UserError as error:
            return tuple(error.problems)
        return ()

    for extra in ((), *((name,) for name in profiles if name not in given)) if isinstance(profiles, dict) else ():
        told = f"with profile '{extra[0]}': " if extra else "without a profile: "
        known = {line.partition("profile: ")[2] or line for line in problems}
        lines = wrong(*given, *extra)
        if extra and given and lines:
            lines = wrong(*extra) and lines
        problems |= {f"{told}{line}": None for line in lines if line not in known}
    return list(problems)


def as_before(recipe: Recipe, manifest: dict[str, Any]) -> Recipe:
    """A recipe read from a run's copy of it, under the name and with the profiles it was first read with."""
    return evolve(recipe, name=manifest["recipe"], automatic_profile=manifest["automatic_profile"])


def dataset_choice(catalogue: Catalogue, name: str, sets: tuple[str, ...]) -> Choice:
    """A data set outside a recipe, from its name and `KEY=VALUE` options."""
    table: dict[str, Any] = {"name": name}
    for given in sets:
        table = merge(table, setting(given))
    return dataset_of(catalogue, table, "data")


def dataset_of(catalogue: Catalogue, table: dict[str, Any], where: str) -> Choice:
    """A data set outside a recipe's [data], from its table; a `UserError` lists what is wrong, as of `where`."""
    problems: list[str] = []
    choice = _Reader(catalogue, problems).choice("dataset", table, where)
    if choice is None:
        raise UserError(problems)
    return choice


class _Reader:
    """Tables into `Choice`s and options; every problem is noted and reading goes on."""

    TABLES = ("format", "data", "network", "reconstruction", "objective", "prior", "optim", "shadow", "train", "stages")
    OPTIONAL = ("metrics", "init")

    def __init__(self, catalogue: Catalogue, problems: list[str]) -> None:
        self.catalogue, self.problems = catalogue, problems

    def recipe(self, tree: dict[str, Any], name: str, source: bytes) -> Recipe | None:
        if "format" not in tree:
            self.problems.append(f"format: missing; a recipe for this siv begins with `format = {FORMAT}`")
        elif type(tree["format"]) is not int or tree["format"] != FORMAT:
            self.problems.append(f"format: this siv reads recipes with `format = {FORMAT}`, got {shown(tree['format'])}")
        known = (*self.TABLES, *self.OPTIONAL)
        self.problems += [f"{key}: unknown table{near_miss(key, known)}" for key in tree if key not in known]
        tree = dict(tree)
        for key, kind in (("stages", list), ("metrics", dict), ("optim", dict), ("prior", dict)):
            if not isinstance(tree.get(key, kind()), kind):
                self.problems.append(f"{key}: expected {'a list of tables' if kind is list else 'a table'}")
                del tree[key]  # what is wrong with the rest is told as well
        train = self.options(Train, tree, "train")
        data = self.choice("dataset", tree.get("data"), "data")
        metrics = {key: self.metric(key, table, f"metrics.{key}") for key, table in tree.get("metrics", {}).items()}
        parts = {
            "data": data,
            "network": self.network(tree.get("network")),
            "reconstruction": self.choice("reconstruction", tree.get("reconstruction", {"name": "mse"}), "reconstruction"),
            "prior": self.prior(tree.get("prior", {})),
            "stages": self.stages(tree, train),
            "shadow": self.options(ShadowOptions, tree, "shadow") if "shadow" in tree else None,
            "metrics": metrics,
            "init": self.options(Init, tree, "init") if "init" in tree else None,
        }
        if self.problems or train is None:
            return None
        return Recipe(name=name, source=source, train=train, profiles=(), automatic_profile=False, **parts)  # type: ignore[arg-type]

    def options(self, cls: type, tree: dict[str, Any], where: str) -> Any:
        table = tree.get(where.rpartition(".")[2], {})
        if not isinstance(table, dict):
            self.problems.append(f"{where}: expected a table")
            return None
        return structure(cls, table, where, self.problems)

    def choice(self, kind: str, table: Any, where: str) -> Choice | None:
        if not isinstance(table, dict) or not isinstance(table.get("name"), str):
            names = ", ".join(self.catalogue.names(kind))
            self.problems.append(f'{where}: expected a table with `name = "…"`, one of: {names}')
            return None
        try:
            component = self.catalogue.get(kind, table["name"])
        except UserError as error:
            self.problems.append(f"{where}.name: {error}")
            return None
        rest = {key: value for key, value in table.items() if key != "name"}
        config = structure(component.config, rest, where, self.problems)
        return None if config is None else Choice(kind, component.name, config)

    def metric(self, name: str, table: Any, where: str) -> MetricPlan | None:
        if not isinstance(table, dict):
            return self.choice("metric", table, where)  # type: ignore[return-value]  # None, with the reason
        if name == GAP:
            self.problems.append(f"{where}: this name is that of what every evaluation adds of its own; take another")
        rest = {key: value for key, value in table.items() if key != EVERY}
        choice = self.choice("metric", {"name": name, **rest}, where)
        cadence = structure(Cadence, {key: table[key] for key in table.keys() & {EVERY}}, where, self.problems)
        return MetricPlan(choice, cadence.every) if choice and cadence else None

    def network(self, table: Any) -> tuple[Choice | None, ...]:
        if isinstance(table, dict) and "name" not in table and {"encoder", "decoder"} <= table.keys():
            extra = table.keys() - {"encoder", "decoder"}
            self.problems += [f"network.{key}: unknown key beside encoder and decoder" for key in sorted(extra)]
            return tuple(self.choice("network", table[half], f"network.{half}") for half in ("encoder", "decoder"))
        return (self.choice("network", table, "network"),)

    def prior(self, table: dict[str, Any]) -> dict[str, Choice | None]:
        if "name" in table:
            return {"": self.choice("prior", table, "prior")}
        named = {group: self.choice("prior", value, f"prior.{group}") for group, value in table.items()}
        self.problems += [f"prior.{key}: no group; [prior] with a name is for all groups" for key in ("", "all") if key in named]
        return {"": self.choice("prior", {"name": "standard_normal"}, "prior"), **named}

    def stages(self, tree: dict[str, Any], train: Train | None) -> tuple[StagePlan | None, ...]:
        tables = tree.get("stages", [])
        if train and bool(tables) == (train.length is not None):
            self.problems.append('train.length: give either a length such as "400 epochs" or [[stages]], which have theirs')
        if not tables:
            length = train.length if train else None  # where it is not known the rest of the stage is read for its problems
            return (self.stage(tree, {"length": str(length or "1 step")}, ""),)
        return tuple(self.stage(tree, table, f"stages[{i}].") for i, table in enumerate(tables))

    def stage(self, tree: dict[str, Any], table: Any, where: str) -> StagePlan | None:
        if not isinstance(table, dict):
            self.problems.append(f"{where.rstrip('.')}: expected a table")
            return None
        wrong = [key for key in STAGED if key in table and not isinstance(table[key], dict)]
        self.problems += [f"{where}{key}: expected a table" for key in wrong]
        table = {key: value for key, value in table.items() if key not in wrong}
        over = {key: table[key] for key in STAGED if isinstance(table.get(key), dict)}
        own = {key: value for key, value in table.items() if key not in over}
        options = structure(StageOptions, own, where.rstrip(".") or "train", self.problems)
        others = over.get("train", {}).keys() - {"batch"}
        self.problems += [f"{where}train.{name}: a stage may change only train.batch" for name in sorted(others)]
        data = structure(StageData, over["data"], f"{where}data", self.problems) if "data" in over else None
        merged = merge({key: value for key, value in tree.items() if key in STAGED}, over)
        objective = self.choice("objective", merged.get("objective"), f"{where}objective")
        optim = self.optim(merged.get("optim", {}), f"{where}optim")
        batch = self.options(Train, merged, f"{where}train") if "train" in over else None
        if self.problems or options is None or objective is None:
            return None
        return StagePlan(
            length=options.length,
            objective=objective,
            optim=optim,
            batch=batch.batch if batch else tree.get("train", {}).get("batch", Train().batch),
            size=data.size if data else None,
            fade=options.fade,
            fade_shape=options.fade_shape,
            reset_optimisers=options.reset_optimisers,
            views=options.views,
        )

    def optim(self, table: dict[str, Any], where: str) -> dict[str, Optim]:
        players = {key: value for key, value in table.items() if isinstance(value, dict)}
        common = {key: value for key, value in table.items() if key not in players}
        found = {"": structure(Optim, common, where, self.problems)}
        for player, own in players.items():
            if player not in PLAYERS:
                self.problems.append(f"{where}.{player}: no such player{near_miss(player, PLAYERS)}")
            shared = common if found[""] else {}  # what is wrong for all is told once
            found[player] = structure(Optim, {**shared, **own}, f"{where}.{player}", self.problems)
        return found
