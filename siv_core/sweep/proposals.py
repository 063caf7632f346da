"""The runs of a `[search]`: proposed, started, given up and told of, through `search` and `jobs`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from attrs import define, evolve

from siv_core.errors import UserError, near_miss
from siv_core.recipe.catalogue import Catalogue
from siv_core.recipe.recipe import Recipe
from siv_core.store.rundir import RunDir
from siv_core.sweep import jobs, search, table
from siv_core.sweep.names import shown, toml
from siv_core.sweep.sweep import Sweep, check_distinct, resolve
from siv_core.sweep.trials import Trial


def check(sweep: Sweep, recipes: dict[str, Recipe]) -> None:
    """A `UserError` where the recipe does not measure what is searched for, or when the pruner asks for it."""
    assert sweep.search
    check_distinct(sweep, recipes)
    options, problems = sweep.search[0], []
    name = options.metric.partition(".")[0]
    metrics = next(iter(recipes.values())).metrics
    if name not in metrics:
        problems.append(f"{sweep.path}: search.metric: the recipe has no metric '{name}'{near_miss(name, metrics)}")
    elif options.pruner != "none" and not metrics[name].every:
        problems.append(f"{sweep.path}: search.pruner: judges what is measured in training: set metrics.{name}.every")
    if problems:
        raise UserError(problems)


def ranges(sweep: Sweep) -> dict[str, str]:
    """{key: its range, as a person reads it}."""
    assert sweep.search
    told = {}
    for key, one in sweep.search[1].items():
        ends = one.ends()
        how = ", log" * one.log + (f", step {one.step:g}" if one.step else "")
        told[key] = " | ".join(map(shown, ends)) if one.choices else f"{ends[0]} … {ends[1]}{how}"
    return told


@define
class Proposals:
    """A search at work on its sweep; the `Source` of a crew."""

    sweep: Sweep
    search: search.Search
    catalogue: Catalogue
    root: Path
    device: str
    board: jobs.Board
    trial_steps: int
    cpu_only: bool  # no NVIDIA device is present: a profile named cpu applies by itself

    @classmethod
    def of(
        cls,
        sweep: Sweep,
        recipes: dict[str, Recipe],
        catalogue: Catalogue,
        root: Path,
        device: str,
        board: jobs.Board,
        *,
        cpu_only: bool,
    ) -> Proposals:
        """The data at hand and prepared, networks built at the ends of the ranges, the study opened."""
        assert sweep.search
        made = jobs.prepare(sweep, recipes, catalogue, board)
        found = search.Search(*sweep.search, root, sweep.name)
        return cls(sweep, found, catalogue, root, device, board, max(one.steps for one in made.values()), cpu_only)

    def check(self) -> list[str]:
        """A `UserError` where the folder holds runs of another study, or the study's values are of other recipes; else what a
        person should know."""
        sweep, recipes = self._begun()
        told = table.check_folder(sweep, recipes, self.root)
        asked = self.search.options.metric.partition(".")[0]
        for name, one in self.search.begun().items():
            run, now = RunDir(self.root / name), recipes[name].resolved()
            if one.state.name == "COMPLETE" and (run.path / "resolved.json").exists():
                before = run.resolved()
                differing = ["stages"] * (before["stages"] != now["stages"])
                differing += [f"metrics.{asked}"] * (before["metrics"].get(asked) != now["metrics"].get(asked))
                if differing:
                    reason = f"what {name} was worth is of other {' and '.join(differing)} than the recipe has now"
                    raise UserError(f"{self.root}: {reason}; name another folder with --root")
        return told

    def alone(self) -> AbstractContextManager[Any]:
        """No other command on the study, unless it lives in a database, of which several may ask."""
        return nullcontext() if self.search.options.storage else RunDir(self.root).locked()

    def work(self, crew: jobs.Crew, until: float | None) -> bool:
        """Runs that were begun before go on first; see `jobs.Crew.work`."""
        for name in self.search.mine():  # whoever ran them did not come to tell
            self.over(name, self._outcome(name).state)
        begun = [self._bundle(name) for name in self.search.mine()]
        left = self.search.left() + len(begun)
        self.board.say(f"{self.root}: {self.search.options.trials} trials, {left} of them to go, {crew.limit} at a time")
        return crew.work(begun, until, self)

    # -- as a source -------------------------------------------------------------------------------------------------------------

    def steps(self) -> int:
        return self.search.left() * self.trial_steps

    def next(self) -> jobs.Bundle | None:
        name = self.search.ask()
        return self._bundle(name) if name else None

    def give_up(self, name: str) -> bool:
        return self.search.give_up(name)

    def over(self, name: str, state: str) -> None:
        """The value of a finished run goes into the study; a stopped one stays open."""
        value = None
        if state == "finished":
            found = self._outcome(name).values.get(self.search.options.metric, {})
            value = found.get("value")
            if value is None:
                self.board.say(
                    f"{name}: has no value of {self.search.options.metric}: {found.get('skipped', 'it was not measured')}"
                )
        self.search.tell(name, state, value)

    # -- what there is -----------------------------------------------------------------------------------------------------------

    def outcomes(self) -> tuple[Sweep, list[table.Outcome]]:
        """The sweep with all its trials so far, and what they came to."""
        sweep, recipes = self._begun()
        found = table.outcomes(sweep, recipes, self.root)
        pruned = {name for name, one in self.search.begun().items() if one.state.name == "PRUNED"}
        return sweep, [evolve(one, state="pruned") if one.trial.name in pruned else one for one in found]

    def _begun(self) -> tuple[Sweep, dict[str, Recipe]]:
        """The sweep with all its trials so far, and their recipes."""
        sweep = evolve(self.sweep, trials=tuple(map(self._trial, self.search.begun())))
        return sweep, resolve(sweep, self.catalogue, cpu_only=self.cpu_only) if sweep.trials else {}

    def best(self) -> str:
        """The best trial so far in a line, or nothing."""
        done = [one for one in self.search.begun().values() if one.value is not None and one.state.name == "COMPLETE"]
        if not done:
            return ""
        one = (min if self.search.options.direction == "minimize" else max)(done, key=lambda trial: trial.value or 0.0)
        values = ", ".join(f"{key} {json.dumps(value)}" for key, value in self.search.values(one).items())
        return f"{search.run_name(one.number)}, {self.search.options.metric} {one.value:.6g}: {values}"

    def pictures(self) -> Iterator[tuple[Path, str]]:
        yield from search.pictures(self.search, self.root)

    def _trial(self, name: str) -> Trial:
        assert self.sweep.proposed
        values = self.search.values(self.search.begun()[name])
        sets = (*self.sweep.proposed.sets, *(f"{key}={toml(value)}" for key, value in values.items()))
        return evolve(self.sweep.proposed, name=name, sets=sets, varied=values)

    def _bundle(self, name: str) -> jobs.Bundle:
        trial = self._trial(name)
        log = self.root / "logs" / f"{name}.txt"
        log.parent.mkdir(exist_ok=True)
        [read] = resolve(evolve(self.sweep, trials=(trial,)), self.catalogue, cpu_only=self.cpu_only).values()
        command = jobs.command(trial, read, self.root / name, self.device)
        return jobs.Bundle((jobs.Job(name, command, RunDir(self.root / name), log, self.trial_steps),))

    def _outcome(self, name: str) -> table.Outcome:
        sweep = evolve(self.sweep, trials=(self._trial(name),))
        return table.outcomes(sweep, resolve(sweep, self.catalogue, cpu_only=self.cpu_only), self.root)[0]
