"""The trials of a sweep at work: child processes with one thread each, a few at a time, which end together when asked to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from attrs import define, evolve, field, frozen

from siv_core.errors import UserError
from siv_core.recipe import build
from siv_core.recipe.build import Built
from siv_core.recipe.catalogue import Catalogue
from siv_core.recipe.recipe import Recipe, differences
from siv_core.runs import record, together
from siv_core.store import files
from siv_core.store.rundir import RunDir, busy
from siv_core.sweep.sweep import Sweep, for_each
from siv_core.sweep.trials import Trial
from siv_core.train import stacked

POLL_SECONDS = 0.2
TAIL_LINES = 6  # of a failed trial's log
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class Board(Protocol):
    """Who is told how the trials come along."""

    at_end: Callable[[], None]  # called where a second signal ends the process

    def say(self, line: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def beside(self, what: str, done: int, total: int) -> None: ...
    def over(self, what: str) -> None: ...


class Source(Protocol):
    """Where jobs come from that are not known beforehand."""

    def steps(self) -> int:
        """Of all that are still to come."""

    def next(self) -> Bundle | None: ...
    def give_up(self, name: str) -> bool:
        """Asked again and again of what is at work."""

    def over(self, name: str, state: str) -> None: ...


@frozen
class Job:
    """One trial to be run."""

    name: str
    command: tuple[str, ...]
    run: RunDir
    log: Path
    steps: int


@frozen
class Bundle:
    """What one process runs: a trial, or several that are trained as one by the `plan` in a file."""

    jobs: tuple[Job, ...]
    plan: Path | None = None

    @property
    def name(self) -> str:
        return self.plan.stem if self.plan else self.jobs[0].name

    @property
    def command(self) -> tuple[str, ...]:
        return ("stack", str(self.plan)) if self.plan else self.jobs[0].command

    @property
    def log(self) -> Path:
        return self.plan.with_suffix(".txt") if self.plan else self.jobs[0].log

    def codes(self, code: int) -> dict[str, int]:
        """{trial: exit code} when the process ended with `code`."""
        told = self.plan.with_suffix(".ended") if self.plan else None
        own = json.loads(told.read_text()) if told and told.exists() else {}
        return {job.name: own.get(job.name, code) for job in self.jobs}


class Process(Protocol):
    """What is used of a `Popen`."""

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@define
class Working:
    """A bundle in hand; without a process where another `siv` is working on its run."""

    bundle: Bundle
    process: Process | None


def launched(bundle: Bundle, environment: Mapping[str, str]) -> Process:
    """As a child of this process."""
    line = [sys.executable, "-P", "-m", "siv_core.cli.main", *bundle.command]
    with bundle.log.open("wb") as log:
        # a session of its own: Ctrl-C in the terminal reaches the sweep alone, which passes it on once
        return subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
        )


# -- before the first one --------------------------------------------------------------------------------------------------------


@frozen
class Made:
    """What is known of a trial once it was built: its recipe, its steps, and what may be trained as one with it."""

    recipe: Recipe
    steps: int
    unfit: tuple[str, ...]
    alike: dict[str, Any]


def prepare(sweep: Sweep, recipes: Mapping[str, Recipe], catalogue: Catalogue, board: Board) -> dict[str, Made]:
    """The data at hand and prepared, every trial built once. A `UserError` has all that does not fit."""
    datasets: dict[str, Any] = {}

    def dataset(recipe: Recipe) -> Any:
        key = json.dumps(recipe.data.tree(), sort_keys=True)
        if key not in datasets:
            datasets[key] = build.dataset(recipe, catalogue)
        lacking = datasets[key].missing()
        if lacking:
            raise UserError(f"data '{recipe.data.name}' is not at hand: {lacking}")
        return datasets[key]

    at_hand = for_each(sweep, recipes, dataset)
    for one in datasets.values():
        one.prepare(board.progress)
    known: dict[str, Made | UserError] = {}
    number = {name: i for i, name in enumerate(recipes, start=1)}

    def built(name: str) -> Made:
        board.progress("networks of trials", number[name], len(number))
        tree = recipes[name].resolved()
        key = json.dumps({**tree, "train": {**tree["train"], "seed": 0}}, sort_keys=True)  # a seed changes no shape
        if key not in known:
            try:
                made = build.build(recipes[name], catalogue, at_hand[name])
                lacking = build.missing(made)
                known[key] = UserError(lacking) if lacking else _made(made)
            except UserError as error:
                known[key] = error
        found = known[key]
        if isinstance(found, UserError):
            raise found
        return evolve(found, recipe=recipes[name])

    return for_each(sweep, {name: name for name in recipes}, built)


def _made(built: Built) -> Made:
    return Made(built.recipe, record.schedule_of(built).total, tuple(stacked.unfit(built)), stacked.alike(built))


def command(trial: Trial, read: Recipe, run: Path, device: str) -> tuple[str, ...]:
    """`siv run` for this trial, as it is started and as a person may start it."""
    profiles = [part for name in profiles_of(read) for part in ("--profile", name)]
    sets = [part for text in trial.sets for part in ("--set", text)]
    return ("run", place(trial, run), *profiles, *sets, "--run-dir", str(run), "--device", device)


def profiles_of(read: Recipe) -> tuple[str, ...]:
    """What says that a recipe is to be read with the profiles that it has here: one named cpu would come or go by itself where
    another machine works on the trial."""
    offered = tomllib.loads(read.source.decode("utf-8")).get("profiles", {})
    return (("none",) if "cpu" in offered and "cpu" not in read.profiles else ()) + read.profiles


def place(trial: Trial, run: Path) -> str:
    """Of the trial's recipe, absolute where the run is: whoever works on it may be in another folder."""
    return str(trial.recipe.absolute() if run.is_absolute() else trial.recipe)


# -- at work ---------------------------------------------------------------------------------------------------------------------


@define
class Crew:
    """Runs bundles of jobs; `ended` holds how each job ended: finished, stopped, diverged or failed."""

    board: Board
    limit: int
    threads: int = 1  # of a process
    total: int = 0
    done: int = 0
    working: dict[str, Working] = field(factory=dict)
    ended: dict[str, str] = field(factory=dict)
    launch: Callable[[Bundle, Mapping[str, str]], Process] = launched
    given_up: set[str] = field(factory=set)  # that were asked for their end, by the source
    source: Source | None = None

    def work(self, bundles: Sequence[Bundle], until: float | None, source: Source | None = None) -> bool:
        """All of them and what `source` gives, or to the moment `until` of the monotonic clock; whether all were begun and ended
        by themselves.

        Raises `Stopped` at a signal; no child is left over in any case.
        """
        waiting, self.source = deque(bundles), source
        self.total = sum(job.steps for bundle in bundles for job in bundle.jobs) + (source.steps() if source else 0)
        self.board.at_end = self.kill
        try:
            while True:
                if until is not None and time.monotonic() >= until:
                    return False
                self.look(waiting)
                while len(self.working) < self.limit and (bundle := waiting.popleft() if waiting else self.more()):
                    self.start(bundle)
                if not self.working:
                    break
                inside = sum(step_of(job) for one in self.working.values() for job in one.bundle.jobs)
                before = sum(step_of(job) for bundle in waiting for job in bundle.jobs)
                # the last step is not the end: metrics and pictures come after it
                self.board.progress("steps of all trials", min(self.done + inside + before, self.total - 1), self.total)
                for one in self.working.values():
                    jobs = one.bundle.jobs
                    self.board.beside(one.bundle.name, sum(map(step_of, jobs)), sum(job.steps for job in jobs))
                time.sleep(POLL_SECONDS)
            self.board.progress("steps of all trials", self.total, self.total)
            return True
        finally:
            self.stop()

    def more(self) -> Bundle | None:
        return self.source.next() if self.source else None

    def start(self, bundle: Bundle) -> None:
        others = [job for job in bundle.jobs if busy(job.run)]
        if others:
            for job in others:
                self.board.say(f"{job.name}: another process is working on it, waiting for that one")
            self.working[bundle.name] = Working(bundle, None)
            return
        for job in bundle.jobs:
            step = step_of(job)
            self.board.say(f"{'going on with' if step else 'starting'} {job.name}{f' at step {step:,}' if step else ''}")
        if bundle.plan:
            bundle.plan.with_suffix(".ended").unlink(missing_ok=True)
        self.working[bundle.name] = Working(bundle, self.launch(bundle, dict.fromkeys(THREADS, str(self.threads))))

    def look(self, waiting: deque[Bundle]) -> None:
        """Take in what has ended."""
        for name, one in list(self.working.items()):
            if one.process is None and not any(busy(job.run) for job in one.bundle.jobs):
                del self.working[name]
                waiting.appendleft(one.bundle)
            elif one.process is not None and (code := one.process.poll()) is not None:
                del self.working[name]
                self.over(one.bundle, code)
            elif one.process is not None and self.source and name not in self.given_up and self.source.give_up(name):
                self.given_up.add(name)
                one.process.terminate()

    def over(self, bundle: Bundle, code: int) -> None:
        """A process ended: how each of its jobs did."""
        self.board.over(bundle.name)
        codes = bundle.codes(code)
        for job in bundle.jobs:
            self.done += job.steps
            own = job.log if job.log.exists() and job.log.stat().st_size else bundle.log
            self.ended[job.name] = self.told(job, codes[job.name], own)
            if self.source:
                self.source.over(job.name, self.ended[job.name])

    def told(self, job: Job, code: int, log: Path) -> str:
        """How it ended, in a word, after that was said."""
        state = {0: job.run.state() if code == 0 else "", 3: "diverged", 128 + signal.SIGTERM: "stopped"}.get(code, "failed")
        state = "pruned" if state == "stopped" and job.name in self.given_up else state
        self.board.say(f"{state} {job.name}" + (f" ({_reason(code)}), see {log}" if state in ("failed", "diverged") else ""))
        if state == "failed":
            for line in tail(log):
                self.board.say(f"    {line}")
        return state

    def stop(self) -> None:
        """Ask every child for its end, and wait for the checkpoints."""
        children = [one for one in self.working.values() if one.process]
        for one in children:
            assert one.process
            one.process.terminate()
        for one in children:
            assert one.process
            code = one.process.wait()
            # one that was not yet listening has nothing to save
            if code == -signal.SIGTERM:
                self.board.over(one.bundle.name)
                self.ended.update(dict.fromkeys((job.name for job in one.bundle.jobs), "stopped"))
            else:
                self.over(one.bundle, code)
        self.working.clear()

    def kill(self) -> None:
        for one in self.working.values():
            if one.process:
                one.process.kill()


def step_of(job: Job) -> int:
    """The step of the newest whole line of its stats.jsonl."""
    path = job.run.path / "stats.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65_536))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1]).get("step", 0)) if lines else 0


def tail(log: Path) -> list[str]:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-TAIL_LINES:]


def _reason(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed, as systems do that are short of memory"
    return f"ended by signal {-code}" if code < 0 else f"exit {code}"


def jobs_of(sweep: Sweep, names: Sequence[str], made: Mapping[str, Made], root: Path, device: str) -> list[Job]:
    files.make_folder(root / "logs")
    chosen = [trial for trial in sweep.trials if trial.name in names]
    return [
        Job(
            trial.name,
            command(trial, made[trial.name].recipe, root / trial.name, device),
            RunDir(root / trial.name),
            root / "logs" / f"{trial.name}.txt",
            made[trial.name].steps,
        )
        for trial in chosen
    ]


def bundled(
    sweep: Sweep, jobs: Sequence[Job], made: Mapping[str, Made], root: Path, device: str, most: int, board: Board
) -> list[Bundle]:
    """Up to `most` jobs that are alike to a bundle, in the order of the sweep; who stays alone, and why, is said."""
    trials = {trial.name: trial for trial in sweep.trials}
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        for reason in made[job.name].unfit:
            board.say(f"{job.name} runs alone: {reason}")
        own = job.name if made[job.name].unfit else json.dumps(made[job.name].alike, sort_keys=True)
        groups.setdefault(own, []).append(job)
    bundles: list[Bundle] = []
    for group in groups.values():
        for first in range(0, len(group), most):
            part = tuple(group[first : first + most])
            if len(part) == 1:
                bundles.append(Bundle(part))
                continue
            plan = root / "logs" / f"stack-{len(bundles)}.json"
            members = [
                together.Member(job.name, place(trial, job.run.path), profiles, trial.sets, str(job.run.path), str(job.log))
                for job in part
                for trial, profiles in [(trials[job.name], profiles_of(made[job.name].recipe))]
            ]
            together.write(plan, members, device)
            bundles.append(Bundle(part, plan))
            board.say(f"{len(part)} trials are trained as one: {', '.join(job.name for job in part)}")
    _say_what_differs(list(groups.values()), made, board)
    return bundles


def _say_what_differs(groups: list[list[Job]], made: Mapping[str, Made], board: Board) -> None:
    fit = [group[0] for group in groups if not made[group[0].name].unfit]
    for job in fit[1:]:
        keys = [line.partition(":")[0] for line in differences(made[fit[0].name].alike, made[job.name].alike)]
        board.say(f"{job.name} is not trained with {fit[0].name}: they differ in {', '.join(keys)}")
