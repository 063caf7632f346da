"""`[search]`: trials that Optuna proposes one after the other, each an ordinary run.

A study lives in its storage: a journal file in the sweep's folder, or a database that any number of machines ask. What a trial is
worth is a metric of its run; in the middle of training (`metrics.NAME.every`) the same metric tells the pruner which to give up.
"""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen

from siv_core.component import option
from siv_core.errors import UserError
from siv_core.recipe.convert import structure
from siv_core.store.rundir import RunDir, busy

if TYPE_CHECKING:
    import optuna

HOST = "host"  # of a trial: the machine that has proposed it


@frozen
class SearchOptions:
    """`[search]`."""

    metric: str = option(doc='what is searched for, such as "density2d.official.kl"')
    direction: str = option(doc="which of its values are better", choices=("minimize", "maximize"))
    trials: int = option(doc="how many in all, those that are pruned too", ge=1)
    sampler: str = option("tpe", doc="how values are proposed", choices=("tpe", "random"))
    startup: int = option(10, doc="trials that have ended before the sampler and the pruner judge", ge=1)
    pruner: str = option("none", doc="which trials are given up, by `metrics.NAME.every`", choices=("none", "median", "halving"))
    seed: int = option(0, doc="of the sampler", ge=0)
    storage: str = option("", doc="URL of a database that several machines share; empty: a journal in the sweep's folder")
    ranges: dict[str, Any] = field(factory=dict)  # checked one by one


@frozen
class Range:
    """Where the value of a key lies."""

    low: float = option(0.0, doc="least")
    high: float = option(0.0, doc="largest")
    log: bool = option(False, doc="proposed evenly in the logarithm")
    step: float = option(0.0, doc="between two values; 0: any", ge=0)
    choices: tuple[Any, ...] = field(default=())
    whole: bool = False  # whole numbers

    def value(self, trial: optuna.trial.Trial, key: str) -> Any:
        """As this trial has it."""
        if self.choices:
            return self.shown(trial.suggest_categorical(key, [json.dumps(choice) for choice in self.choices]))
        if self.whole:
            return trial.suggest_int(key, int(self.low), int(self.high), step=int(self.step) or 1, log=self.log)
        return trial.suggest_float(key, self.low, self.high, step=self.step or None, log=self.log)

    def shown(self, value: Any) -> Any:
        """What a study's parameter stands for."""
        return json.loads(value) if self.choices else value

    def ends(self) -> tuple[Any, ...]:
        """Values that a recipe has to take."""
        return self.choices or ((int(self.low), int(self.high)) if self.whole else (self.low, self.high))


def read(table: Any, problems: list[str]) -> tuple[SearchOptions, dict[str, Range]] | None:
    """The options and ranges of a `[search]` table; what is wrong goes to `problems`."""
    if not isinstance(table, dict):
        problems.append("search: expected a table")
        return None
    asked = table.get("ranges", {})
    options = structure(SearchOptions, {key: value for key, value in table.items() if key != "ranges"}, "search", problems)
    leaves = dict(_ranges(asked)) if isinstance(asked, dict) else {}
    if not leaves:
        problems.append(
            'search.ranges: nothing to search: give keys and ranges, such as "optim.lr" = { low = 1e-4, high = 1e-2 }'
        )
    found = {key: _range(key, one, problems) for key, one in leaves.items()}
    ranges = {key: one for key, one in found.items() if one}
    return (options, ranges) if options and len(ranges) == len(found) > 0 else None


def at_the_ends(ranges: Mapping[str, Range]) -> list[dict[str, Any]]:
    """Values at the ends of all ranges, and each of the choices: the first of all, one key after the other with another, so that
    one that changes nothing is found, and the last of all, the largest networks."""
    ends = {key: one.ends() for key, one in ranges.items()}
    first, last = ({key: own[i] for key, own in ends.items()} for i in (0, -1))
    apart = [first, *({**first, key: value} for key, own in ends.items() for value in own[1:])]
    return apart if last in apart else [*apart, last]


def _ranges(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their ranges: tables with `low` or `choices`, or what is no table and is told so."""
    for key, value in table.items():
        if isinstance(value, dict) and value and not {"low", "high", "choices"} & value.keys():
            yield from _ranges(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _range(key: str, table: Any, problems: list[str]) -> Range | None:
    where, before = f"search.ranges.{key}", len(problems)
    if not isinstance(table, dict) or ("choices" in table) == bool({"low", "high"} & table.keys()):
        problems.append(f"{where}: expected {{ low = …, high = … }}, with log or step, or {{ choices = [ … ] }}")
        return None
    if "choices" in table:
        choices = table["choices"]
        if not isinstance(choices, list) or len(choices) < 2 or len(table) > 1:
            problems.append(f"{where}: expected two choices at least, and nothing else")
            return None
        return Range(choices=tuple(choices))
    whole = all(type(table.get(name, 0)) is int for name in ("low", "high", "step"))
    found = structure(Range, {name: value for name, value in table.items() if name != "whole"}, where, problems)
    problems += [f"{where}.{name}: missing" for name in ("low", "high") if name not in table]
    if found and len(problems) == before:
        if not (math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high):
            problems.append(f"{where}: low has to be below high")
        if found.log and (found.low <= 0 or found.step):
            problems.append(f"{where}: log takes a low above 0, and no step")
    if found is None or len(problems) > before:
        return None
    return evolve(found, whole=whole)


# -- the study -------------------------------------------------------------------------------------------------------------------


class Search:
    """A study at work: trials out of it, what they came to into it."""

    def __init__(self, options: SearchOptions, ranges: Mapping[str, Range], root: Path, name: str) -> None:
        self.options, self.ranges, self.root = options, ranges, root
        self.study = open_study(options, root, name)

    def values(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        return {key: self.ranges[key].shown(value) for key, value in trial.params.items() if key in self.ranges}

    def begun(self) -> dict[str, optuna.trial.FrozenTrial]:
        """{name of the run: trial} of all that were ever proposed and have all their values."""
        return {run_name(one.number): one for one in self.study.trials if one.params.keys() == self.ranges.keys()}

    def left(self) -> int:
        """How many are still to be proposed."""
        return max(0, self.options.trials - len(self.begun()))

    def ask(self) -> str | None:
        """The name of the next trial, or None where there are enough."""
        if not self.left():
            return None
        trial = self.study.ask()
        trial.set_user_attr(HOST, platform.node())
        for key, one in self.ranges.items():
            try:
                one.value(trial, key)
            except ValueError as error:
                self.study.tell(trial, state=_state("FAIL"))
                told = f"is not what the study was begun with ({error}): take another folder, or another name of the file"
                raise UserError(f"search.ranges.{key}: {told}") from error
        return run_name(trial.number)

    def mine(self) -> list[str]:
        """Open ones that this machine may go on with: its own, and those whose run another one has left."""
        found = []
        for name in self.open():
            run, here = RunDir(self.root / name), self.begun()[name].user_attrs.get(HOST) == platform.node()
            if not busy(run) and (here or (run.path / "status.json").exists()):
                found.append(name)
        return found

    def open(self) -> list[str]:
        """Those whose worth is not known."""
        return [name for name, one in self.begun().items() if not one.state.is_finished()]

    def give_up(self, name: str) -> bool:
        """Tell the pruner what the run has measured in the middle of training; whether it says to end it."""
        import optuna

        trial = self.begun().get(name)
        if self.options.pruner == "none" or trial is None or trial.state.is_finished():
            return False
        lines = [line for line in RunDir(self.root / name).read("metrics") if line.get("by") == "training" and "value" in line]
        values = {int(line["step"]): float(line["value"]) for line in lines if _name(line) == self.options.metric}
        new = values.keys() - trial.intermediate_values.keys()
        own = optuna.trial.Trial(self.study, trial._trial_id)
        for step in sorted(new):
            own.report(values[step], step)
        poor = bool(new) and own.should_prune()  # asked in any case: halving notes which rungs a trial has reached
        return poor and sum(one.state.name == "COMPLETE" for one in self.begun().values()) >= self.options.startup

    def tell(self, name: str, state: str, value: float | None) -> None:
        """How a run ended: finished with this value, pruned, diverged or failed. A run that was stopped goes on another time."""
        if state not in ("finished", "pruned", "diverged", "failed") or name not in self.open():
            return
        if state == "finished" and value is not None and math.isfinite(value):
            self.study.tell(number(name), value)
        else:
            self.study.tell(number(name), state=_state("PRUNED" if state == "pruned" else "FAIL"))


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def _name(line: Mapping[str, Any]) -> str:
    return f"{line['metric']}.{line['name']}"


def run_name(trial: int) -> str:
    return f"trial-{trial:04d}"


def number(name: str) -> int:
    return int(name.rpartition("-")[2])


def open_study(options: SearchOptions, root: Path, name: str) -> optuna.Study:
    """The study of this name in its storage, made where there is none."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    except ImportError as error:
        raise UserError(f"[search] takes Optuna ({error}): pip install 'siv[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruners = {
        "none": optuna.pruners.NopPruner(),
        "median": optuna.pruners.MedianPruner(n_startup_trials=options.startup),
        "halving": optuna.pruners.SuccessiveHalvingPruner(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if options.storage:
            storage: Any = options.storage
        else:
            path = os.fspath(root / "search.journal")
            storage = optuna.storages.JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
        try:
            study = optuna.create_study(
                study_name=name,
                storage=storage,
                pruner=pruners[options.pruner],
                direction="minimize" if options.direction == "minimize" else "maximize",
                load_if_exists=True,
            )
            # a search that goes on, and another machine, propose other values than those that are there
            seed = None if options.storage else options.seed + len(study.trials)
            study.sampler = sampler_of(options, seed)
            return study
        except Exception as error:
            if not options.storage:
                raise
            raise UserError(f"search.storage: {options.storage}: cannot be used ({type(error).__name__}: {error})") from error


def sampler_of(options: SearchOptions, seed: int | None) -> Any:
    from optuna import samplers

    if options.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    return samplers.TPESampler(n_startup_trials=options.startup, seed=seed, constant_liar=True)


def pictures(search: Search, root: Path) -> Iterator[tuple[Path, str]]:
    """(file, why it was not drawn) of the history, and of what the values' worth hangs on."""
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as drawn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, draw in (("history", drawn.plot_optimization_history), ("importance", drawn.plot_param_importances)):
            try:
                draw(search.study, target_name=search.options.metric)
                pyplot.gcf().savefig(root / f"{name}.png", bbox_inches="tight", dpi=120)
                yield root / f"{name}.png", ""
            except (ValueError, RuntimeError, ImportError) as error:
                yield root / f"{name}.png", str(error)
            finally:
                pyplot.close("all")
