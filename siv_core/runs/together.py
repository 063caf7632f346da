"""Runs of one shape trained together in one process (`train/stacked.py`), each an ordinary run with a log of its own."""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import define, frozen

from siv_core.errors import SivError, Stopped, UserError
from siv_core.recipe import catalogue as catalogues
from siv_core.recipe import recipe as recipes
from siv_core.runs import session
from siv_core.runs.device import nvidia_present
from siv_core.runs.watchers import Lines, Watcher
from siv_core.store import files
from siv_core.train.stacked import Stack
from siv_core.train.trainer import Trainer, Training


@frozen
class Member:
    """One of the runs, as `siv run` is told of it."""

    name: str
    recipe: str
    profiles: tuple[str, ...]
    sets: tuple[str, ...]
    run_dir: str
    log: str


class Logged(Lines):
    """Writes what a run says into its log; whether to stop is asked of who watches them all."""

    def __init__(self, log: Path, whole: Watcher) -> None:
        super().__init__()
        self.log, self.whole = log, whole
        log.write_text("", encoding="utf-8")

    def say(self, line: str) -> None:
        with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{line}\n")

    def progress(self, what: str, done: int, total: int) -> None:
        if number := self.asked_to_stop():
            raise Stopped(number)
        super().progress(what, done, total)

    def asked_to_stop(self) -> int:
        return self.whole.asked_to_stop()


@define
class Live:
    """A run at work. `trainer` waits for its next step."""

    member: Member
    watcher: Logged
    training: Training[session.Run]
    trainer: Trainer


def run(members: Sequence[Member], device: str, whole: Watcher) -> dict[str, int]:
    """{name: exit code} of all, as `siv run` ends. Runs that are behind, as after a resume, go first until all are level."""
    catalogue, codes, live = catalogues.load(), dict[str, int](), list[Live]()
    for member in members:
        watcher = Logged(Path(member.log), whole)
        try:
            recipe = recipes.load(Path(member.recipe), catalogue, member.profiles, member.sets, cpu_only=not nvidia_present())
            request = session.Request(member.profiles, member.sets, Path(member.run_dir), device=device)
            training = session.steps(recipe, catalogue, request, watcher)
            live.append(Live(member, watcher, training, next(training)))
        except BaseException as error:
            codes[member.name] = _code(error, watcher)
    stack: Stack | None = None
    while live:
        step = min(one.trainer.counters.step for one in live)
        now = [one for one in live if one.trainer.counters.step == step]
        trainers = [one.trainer for one in now]
        failure: BaseException | None = None
        try:
            stack = stack if stack and stack.holds(trainers) else Stack(trainers)
            stack.step()
        except BaseException as error:
            failure, stack = error, None
        for one in now:
            try:
                one.trainer = next(one.training) if failure is None else one.training.throw(failure)
            except BaseException as error:
                codes[one.member.name] = _code(error, one.watcher)
                live.remove(one)
    return codes


def _code(error: BaseException, watcher: Logged) -> int:
    """The exit code that `siv run` would end with, after what it would say."""
    if isinstance(error, StopIteration):
        return 0
    if isinstance(error, UserError):
        for line in error.problems:
            watcher.say(f"error: {line}")
    elif isinstance(error, SivError):
        watcher.say(f"error: {error}" if error.exit_code < 128 else str(error))
    else:
        watcher.say("".join(traceback.format_exception(error)).rstrip())
    return getattr(error, "exit_code", 1)


def read(path: Path) -> tuple[list[Member], str, Path]:
    """Members, device and the file for their codes, from a plan that `write` made."""
    plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    members = [Member(**{**one, "profiles": tuple(one["profiles"]), "sets": tuple(one["sets"])}) for one in plan["members"]]
    return members, plan["device"], path.with_suffix(".ended")


def write(path: Path, members: Sequence[Member], device: str) -> None:
    tables = [{name: getattr(member, name) for name in Member.__annotations__} for member in members]
    files.write_json(path, {"device": device, "members": tables})
