"""The trials of a sweep at work: child processes with one thread each, a few at a time, which end together when asked to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from attrs import define, field, frozen

from siv_core.errors import UserError
from siv_core.recipe import build
from siv_core.recipe.catalogue import Catalogue
from siv_core.recipe.recipe import Recipe
from siv_core.runs import record
from siv_core.store import files
from siv_core.store.rundir import RunDir
from siv_core.sweep.sweep import Sweep, Trial, for_each
from siv_core.sweep.table import busy

POLL_SECONDS = 0.2
TAIL_LINES = 6  # of a failed trial's log
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")


class Board(Protocol):
    """Who is told how the trials come along."""

    at_end: Callable[[], None]  # called where a second signal ends the process

    def say(self, line: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def beside(self, what: str, done: int, total: int) -> None: ...
    def over(self, what: str) -> None: ...


@frozen
class Job:
    """One trial to be run."""

    name: str
    command: tuple[str, ...]
    run: RunDir
    log: Path
    steps: int


@define
class Working:
    """A job in hand; without a process where another `siv` is working on its run."""

    job: Job
    process: subprocess.Popen[bytes] | None


# -- before the first one --------------------------------------------------------------------------------------------------------


def prepare(sweep: Sweep, recipes: Mapping[str, Recipe], catalogue: Catalogue, board: Board) -> dict[str, int]:
    """{trial: its steps}: the data at hand and prepared, every trial built once. A `UserError` has all that does not fit."""
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
    steps: dict[str, int | UserError] = {}

    def built(name: str) -> int:
        tree = recipes[name].resolved()
        key = json.dumps({**tree, "train": {**tree["train"], "seed": 0}}, sort_keys=True)  # a seed changes no shape
        if key not in steps:
            try:
                made = build.build(recipes[name], catalogue, at_hand[name])
                lacking = build.missing(made)
                steps[key] = UserError(lacking) if lacking else record.schedule_of(made).total
            except UserError as error:
                steps[key] = error
        found = steps[key]
        if isinstance(found, UserError):
            raise found
        return found

    return for_each(sweep, {name: name for name in recipes}, built)


def command(trial: Trial, run: Path, device: str) -> tuple[str, ...]:
    """`siv run` for this trial, as it is started and as a person may start it."""
    profiles = [part for name in trial.profiles for part in ("--profile", name)]
    sets = [part for text in trial.sets for part in ("--set", text)]
    return ("run", str(trial.recipe), *profiles, *sets, "--run-dir", str(run), "--device", device)


# -- at work ---------------------------------------------------------------------------------------------------------------------


@define
class Crew:
    """Runs jobs; `ended` holds how each ended: finished, stopped, diverged or failed."""

    board: Board
    limit: int
    total: int = 0
    done: int = 0
    working: dict[str, Working] = field(factory=dict)
    ended: dict[str, str] = field(factory=dict)

    def work(self, jobs: Sequence[Job], until: float | None) -> bool:
        """All of them, or to the moment `until` of the monotonic clock; whether all were begun and ended by themselves.

        Raises `Stopped` at a signal; no child is left over in any case.
        """
        waiting = deque(jobs)
        self.total = sum(job.steps for job in jobs)
        self.board.at_end = self.kill
        try:
            while waiting or self.working:
                if until is not None and time.monotonic() >= until:
                    return False
                self.look(waiting)
                while waiting and len(self.working) < self.limit:
                    self.start(waiting.popleft())
                inside = sum(step_of(one.job) for one in self.working.values())
                before = sum(step_of(job) for job in waiting)
                # the last step is not the end: metrics and pictures come after it
                self.board.progress("steps of all trials", min(self.done + inside + before, self.total - 1), self.total)
                for one in self.working.values():
                    self.board.beside(one.job.name, step_of(one.job), one.job.steps)
                time.sleep(POLL_SECONDS)
            self.board.progress("steps of all trials", self.total, self.total)
            return True
        finally:
            self.stop()

    def start(self, job: Job) -> None:
        if busy(job.run):
            self.board.say(f"{job.name}: another process is working on it, waiting for that one")
            self.working[job.name] = Working(job, None)
            return
        step = step_of(job)
        self.board.say(f"{'going on with' if step else 'starting'} {job.name}{f' at step {step:,}' if step else ''}")
        environment = {**os.environ, **ONE_THREAD}
        line = [sys.executable, "-P", "-m", "siv_core.cli.main", *job.command]
        with job.log.open("wb") as log:
            # a session of its own: Ctrl-C in the terminal reaches the sweep alone, which passes it on once
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.working[job.name] = Working(job, process)

    def look(self, waiting: deque[Job]) -> None:
        """Take in what has ended."""
        for name, one in list(self.working.items()):
            if one.process is None and not busy(one.job.run):
                del self.working[name]
                waiting.appendleft(one.job)
            elif one.process is not None and one.process.poll() is not None:
                del self.working[name]
                self.board.over(name)
                self.done += one.job.steps
                self.ended[name] = self.told(one.job, one.process.returncode)

    def told(self, job: Job, code: int) -> str:
        """How it ended, in a word, after that was said."""
        state = {0: job.run.state() if code == 0 else "", 3: "diverged", 128 + signal.SIGTERM: "stopped"}.get(code, "failed")
        self.board.say(f"{state} {job.name}" + (f" ({_reason(code)}), see {job.log}" if state in ("failed", "diverged") else ""))
        if state == "failed":
            for line in tail(job.log):
                self.board.say(f"    {line}")
        return state

    def stop(self) -> None:
        """Ask every child for its end, and wait for the checkpoints."""
        children = {name: one for name, one in self.working.items() if one.process}
        for one in children.values():
            assert one.process
            one.process.terminate()
        for name, one in children.items():
            assert one.process
            code = one.process.wait()
            self.board.over(name)
            # one that was not yet listening has nothing to save
            self.ended[name] = "stopped" if code == -signal.SIGTERM else self.told(one.job, code)
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


def jobs_of(sweep: Sweep, names: Sequence[str], steps: Mapping[str, int], root: Path, device: str) -> list[Job]:
    files.make_folder(root / "logs")
    chosen = [trial for trial in sweep.trials if trial.name in names]
    return [
        Job(
            trial.name,
            command(trial, root / trial.name, device),
            RunDir(root / trial.name),
            root / "logs" / f"{trial.name}.txt",
            steps[trial.name],
        )
        for trial in chosen
    ]
