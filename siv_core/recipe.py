"""A recipe: one TOML file, its profiles and the command line's overrides, resolved into components and stages.

Order: recipe < profiles < `--set`. Tables merge key by key; a table whose `name` changes is replaced whole, and so are lists.
"""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from siv_core.catalogue import Catalogue
from siv_core.component import option
from siv_core.convert import Length, plain, structure
from siv_core.errors import UserError, near_miss

FORMAT = 1
STAGED = ("objective", "optim", "train", "data")  # what a stage may change; of train only batch, of data only size
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
class Optim:
    """Adam (Kingma & Ba 2015) of one player."""

    lr: float = option(2e-4, doc="learning rate", gt=0)
    betas: tuple[float, float] = option((0.9, 0.999), doc="decay of the two moments, a step", ge=0, lt=1)
    eps: float = option(1e-8, doc="added to the root of the second moment", gt=0)
    weight_decay: float = option(0.0, doc="L2 added to the gradient", ge=0)


@frozen
class ShadowOptions:
    """`[shadow]`: exponential averages of players, which models use where they are kept."""

    of: tuple[str, ...] = option(
        ("encoder", "decoder", "prior"), doc="the players to average", choices=("encoder", "decoder", "prior")
    )
    half_life: Length = option(Length(10_000, "images"), doc="after this long a weight counts half")


@frozen
class Train:
    """`[train]`."""

    batch: int = option(64, doc="samples a step, over all processes and micro-batches", ge=1)
    length: Length | None = option(None, doc="how long to train; with [[stages]] the stages say it")
    seed: int = option(0, doc="of everything random", ge=0, lt=2**63)
    micro_batch: int = option(0, doc="samples a forward pass, less memory, same result; 0: the whole batch", ge=0)
    keep_graphs: bool = option(False, doc="later phases reuse what earlier ones made: less time with small networks, more memory")
    precision: str = option("fp32", doc="of the networks; losses are always fp32", choices=("fp32", "tf32", "bf16"))
    deterministic: bool = option(False, doc="on CUDA: only algorithms that give the same bits again")
    channels_last: bool = option(False, doc="memory layout of images and convolutions")
    conditional: bool = option(False, doc="give the labels to the networks")
    logvar_bound: float = option(20.0, doc="log-variances are clamped to ± this; 0 leaves them free", ge=0)
    clip_gradient: float = option(0.0, doc="largest gradient norm of a phase; 0: no clipping", ge=0)
    residency: str = option("auto", doc="where the data lies; never changes a bit", choices=("auto", "device", "host"))
    tick: Length = option(Length(50, "steps"), doc="a line of statistics every so long")
    preview: Length = option(Length(1000, "steps"), doc="a preview picture every so long, and two early ones")
    checkpoint: Length = option(Length(1000, "steps"), doc="a checkpoint every so long, and at the end")
    keep_every: int = option(0, doc="keep every so many-th checkpoint beside the two newest; 0: none", ge=0)


@frozen
class Init:
    """`[init]`: start from another run's weights."""

    run: str = option(doc="its run directory")
    checkpoint: str = option("last", doc="step number or last")
    weights: str = option("raw", doc="which of its weights", choices=("raw", "ema"))


@frozen
class StageOptions:
    """One entry of `[[stages]]`, beside the tables it overrides."""

    length: Length = option(doc="how long this stage lasts")
    fade: float = option(0.0, doc="share of the stage over which what is new fades in", ge=0, le=1)
    reset_optimisers: bool = option(False, doc="forget the moments at the start of this stage")


@frozen
class StageData:
    """`data` inside a stage."""

    size: int = option(doc="pixels a side in this stage, by area averaging", ge=1)


@frozen
class StagePlan:
    """What holds during one stage."""

    length: Length
    objective: Choice
    optim: dict[str, Optim]  # "" for all players, or a player's own
    batch: int
    size: int | None = None
    fade: float = 0.0
    reset_optimisers: bool = False


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
    metrics: dict[str, Choice]
    init: Init | None
    profiles: tuple[str, ...]
    automatic_profile: bool
    sets: tuple[str, ...] = field(default=())

    def resolved(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON types; what `resolved.json` holds and a resume compares."""
        network = [choice.tree() for choice in self.network]
        return {
            "format": FORMAT,
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
            "metrics": {name: choice.tree() for name, choice in self.metrics.items()},
            "init": plain(self.init) if self.init else None,
        }


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Dotted keys in which two resolved recipes differ, leaving out what may change between a run and its continuation:
    lengths, cadences, residency and metrics."""
    if FREE.fullmatch(where):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in {**old, **new} for line in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{where}[{i}]")]
    return [] if old == new else [f"{where}: the run has {old!r}, the recipe {new!r}"]


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
    source = _read(path)
    try:
        tree = tomllib.loads(source.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # tomllib lets through what Python says of long numbers and deep nests
        raise UserError(f"{path}: not TOML ({error})") from error
    return parse(tree, path, source, catalogue, tuple(profiles), tuple(sets), cpu_only)


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
    known = tree.get("profiles", {})
    named = known if isinstance(known, dict) else {}
    wrong = [f"profiles.{key}" for key, table in named.items() if not isinstance(table, dict)] if known is named else ["profiles"]
    if wrong:
        raise UserError(f"{path}: {key}: expected a table" for key in wrong)
    automatic = cpu_only and "cpu" in known and not {"none", "cpu"} & set(profiles)
    chosen = (("cpu",) if automatic else ()) + tuple(name for name in profiles if name != "none")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise UserError(f"{path}: no profile '{name}'{near_miss(name, known)}" for name in unknown)
    merged = {key: value for key, value in tree.items() if key != "profiles"}
    for over in (*(known[name] for name in chosen), *map(_set, sets)):
        merged = overlay(merged, over)
    problems: list[str] = []
    recipe = _Reader(catalogue, problems).recipe(merged, path.stem, source)
    if recipe is None or problems:
        raise UserError(f"{path}: {line}" for line in problems)
    return evolve(recipe, profiles=chosen, automatic_profile=automatic, sets=sets)


def as_before(recipe: Recipe, manifest: dict[str, Any]) -> Recipe:
    """A recipe read from a run's copy of it, under the name and with the profiles it was first read with."""
    return evolve(recipe, name=manifest["recipe"], automatic_profile=manifest["automatic_profile"])


def overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`merge` for whole recipes: stages and a length say the same thing, so the one that comes later takes the other's place."""
    merged = merge(base, over)
    train = over.get("train")
    if "stages" in over and isinstance(merged.get("train"), dict):
        merged["train"].pop("length", None)
    elif isinstance(train, dict) and "length" in train:
        merged.pop("stages", None)
    return merged


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, as the module's head says; neither is changed."""
    merged = copy.deepcopy(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name", old.get("name")) == old.get("name"):
            merged[key] = merge(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def dataset_choice(catalogue: Catalogue, name: str, sets: tuple[str, ...]) -> Choice:
    """A data set outside a recipe, from its name and `KEY=VALUE` options."""
    table: dict[str, Any] = {"name": name}
    for setting in sets:
        table = merge(table, _set(setting))
    problems: list[str] = []
    choice = _Reader(catalogue, problems).choice("dataset", table, "data")
    if choice is None:
        raise UserError(problems)
    return choice


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > 1_000_000:
            raise UserError(f"{path}: over 1 MB, this is no recipe")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); `siv recipes ls` lists those siv ships") from error


def _set(setting: str) -> dict[str, Any]:
    """{"train": {"batch": 8}} from "train.batch=8"; what is no TOML value is taken as a string."""
    key, sign, text = setting.partition("=")
    if not sign or not key:
        raise UserError(f"--set {setting}: expected KEY=VALUE, such as --set train.batch=8")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return dict(value)


class _Reader:
    """Tables into `Choice`s and options; every problem is noted and reading goes on."""

    TABLES = ("format", "data", "network", "reconstruction", "objective", "prior", "optim", "shadow", "train", "stages")
    OPTIONAL = ("metrics", "init")

    def __init__(self, catalogue: Catalogue, problems: list[str]) -> None:
        self.catalogue, self.problems = catalogue, problems

    def recipe(self, tree: dict[str, Any], name: str, source: bytes) -> Recipe | None:
        if tree.get("format") != FORMAT:
            self.problems.append(f"format: this siv reads recipes with `format = {FORMAT}`, got {tree.get('format')!r}")
        known = (*self.TABLES, *self.OPTIONAL)
        self.problems += [f"{key}: unknown table{near_miss(key, known)}" for key in tree if key not in known]
        for key, kind in (("stages", list), ("metrics", dict), ("optim", dict), ("prior", dict), ("network", dict)):
            if not isinstance(tree.get(key, kind()), kind):
                self.problems.append(f"{key}: expected {'a list of tables' if kind is list else 'a table'}")
                return None
        train = self.options(Train, tree, "train")
        data = self.choice("dataset", tree.get("data"), "data")
        metrics = {
            key: self.choice("metric", {"name": key, **table} if isinstance(table, dict) else table, f"metrics.{key}")
            for key, table in tree.get("metrics", {}).items()
        }
        parts = {
            "data": data,
            "network": self.network(tree.get("network")),
            "reconstruction": self.choice("reconstruction", tree.get("reconstruction", {"name": "mse"}), "reconstruction"),
            "prior": self.prior(tree.get("prior", {})),
            "stages": self.stages(tree, train) if train else (),
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
        return {"": self.choice("prior", {"name": "standard_normal"}, "prior"), **named}

    def stages(self, tree: dict[str, Any], train: Train) -> tuple[StagePlan | None, ...]:
        tables = tree.get("stages", [])
        if bool(tables) == (train.length is not None):
            self.problems.append('train.length: give either a length such as "400 epochs" or [[stages]], which have theirs')
            return ()
        if not tables:
            return (self.stage(tree, {"length": str(train.length)}, ""),)
        return tuple(self.stage(tree, table, f"stages[{i}].") for i, table in enumerate(tables))

    def stage(self, tree: dict[str, Any], table: Any, where: str) -> StagePlan | None:
        if not isinstance(table, dict):
            self.problems.append(f"{where}: expected a table")
            return None
        over = {key: table[key] for key in STAGED if isinstance(table.get(key), dict)}
        own = {key: value for key, value in table.items() if key not in over}
        options = structure(StageOptions, own, where.rstrip(".") or "train", self.problems)
        wrong = over.get("train", {}).keys() - {"batch"}
        self.problems += [f"{where}train.{name}: a stage may change only train.batch" for name in sorted(wrong)]
        data = structure(StageData, over["data"], f"{where}data", self.problems) if "data" in over else None
        merged = merge({key: value for key, value in tree.items() if key in STAGED}, over)
        objective = self.choice("objective", merged.get("objective"), f"{where}objective")
        optim = self.optim(merged.get("optim", {}), f"{where}optim")
        batch = self.options(Train, merged, f"{where}train") if "train" in over else None
        if options is None or objective is None:
            return None
        return StagePlan(
            length=options.length,
            objective=objective,
            optim=optim,
            batch=batch.batch if batch else tree.get("train", {}).get("batch", Train().batch),
            size=data.size if data else None,
            fade=options.fade,
            reset_optimisers=options.reset_optimisers,
        )

    def optim(self, table: dict[str, Any], where: str) -> dict[str, Optim]:
        players = {key: value for key, value in table.items() if isinstance(value, dict)}
        common = {key: value for key, value in table.items() if key not in players}
        found = {"": structure(Optim, common, where, self.problems)}
        for player, own in players.items():
            found[player] = structure(Optim, {**common, **own}, f"{where}.{player}", self.problems)
        return found
