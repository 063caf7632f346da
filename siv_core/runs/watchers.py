"""Who is told how a run goes on, and asks it to stop: nobody, or whoever reads lines."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from attrs import frozen

from siv_core.errors import Stopped
from siv_core.train.observer import Observer

if TYPE_CHECKING:
    from siv_core.train.trainer import Trainer

LINE_SECONDS = 5.0  # between two lines of the same work
SHOWN = {"rec_real": "reconstruction", "kl_real": "KL real", "kl_rec": "KL x_rec", "kl_prior": "KL x_prior"}


class Watcher(Observer, Protocol):
    """Who is told about a run, beside its progress in training."""

    def say(self, line: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def training(self, trainer: Trainer, max_seconds: float | None) -> Any:
        """A context around the training loop."""


class Silent:
    """Says nothing. While it trains, the first Ctrl+C (SIGINT) asks for an end after the step in hand, with a checkpoint; the
    second one ends at once. A handler that somebody else has set stays, and so does all in other threads than the main one."""

    signum = 0
    interrupted = False  # by that Ctrl+C

    def say(self, line: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def stepped(self, step: int, steps: int, images_seen: int) -> None: ...
    def ticked(self, line: dict[str, Any]) -> None: ...
    def wrote(self, path: Path) -> None: ...

    def asked_to_stop(self) -> int:
        return self.signum

    @contextlib.contextmanager
    def training(self, trainer: Trainer, max_seconds: float | None) -> Iterator[None]:
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        self.signum, self.interrupted = 0, False  # it may have watched another run
        signal.signal(signal.SIGINT, self._interrupted)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum, self.interrupted = number, True


class Lines(Silent):
    """Prints a line now and then: in a notebook, a script, a log."""

    line_seconds = LINE_SECONDS

    def __init__(self) -> None:
        self.last_line: dict[str, float] = {}
        self.started: dict[str, tuple[float, int]] = {}
        self.step = (0, 0, 0)  # step, steps, images seen

    def say(self, line: str) -> None:
        sys.stdout.write(f"{line}\n")  # at once, for there may be several threads
        sys.stdout.flush()

    def wrote(self, path: Path) -> None:
        if path.suffix == ".png":
            self.say(f"wrote {path}")

    def progress(self, what: str, done: int, total: int) -> None:
        """Work that is counted: a line every few seconds, with the time that is left."""
        now = time.monotonic()
        self.started.setdefault(what, (now, done))
        if now - self.last_line.setdefault(what, now) >= self.line_seconds or (done >= total and done > self.started[what][1]):
            self.last_line[what] = now
            begun, before = self.started[what]
            left = f", {duration((now - begun) / (done - before) * (total - done))} left" if done > before else ""
            self.say(f"{what}: {done:,} of {total:,}{left}")
        if done >= total:
            self.started.pop(what), self.last_line.pop(what, None)

    @contextlib.contextmanager
    def training(self, trainer: Trainer, max_seconds: float | None) -> Iterator[None]:
        total, step = trainer.schedule.total, trainer.counters.step
        until = f", at most {duration(max_seconds)}" if max_seconds else ""
        self.say(f"training: {total - step:,} of {total:,} steps to go on {trainer.device}{until}")
        self.started["training"] = (time.monotonic(), step)
        with super().training(trainer, max_seconds):
            yield

    def stepped(self, step: int, steps: int, images_seen: int) -> None:
        self.step = (step, steps, images_seen)

    def ticked(self, line: dict[str, Any]) -> None:
        """The numbers of a tick, where a line is due."""
        step, steps, now = line["step"], self.step[1], time.monotonic()
        shown, seconds_left = self.numbers(line)
        if now - self.last_line.get("training", 0.0) >= self.line_seconds or step == steps:
            self.last_line["training"] = now
            self.say(f"step {step:,} of {steps:,}  {shown}  {duration(seconds_left)} left")

    def numbers(self, line: dict[str, Any]) -> tuple[str, float]:
        """What is shown of a tick, and the seconds that are left."""
        values = {name: value for phase in reversed(line["phases"].values()) for name, value in phase.items()}
        numbers = "  ".join(f"{label} {values[name]:.4g}" for name, label in SHOWN.items() if name in values)
        begun, before = self.started["training"]
        step, images_seen = line["step"], line["images_seen"]
        seconds = max(time.monotonic() - begun, 1e-9)
        speed = images_seen / step * (step - before) / seconds
        left = seconds / max(step - before, 1) * (self.step[1] - step)
        return f"{images_seen:,} images  {speed:.0f}/s  {numbers}", left


@frozen
class Patient:
    """Passes on what it is told, but for a wish to stop: in the middle of training that is granted after the step in hand."""

    watcher: Watcher

    def say(self, line: str) -> None:
        self.watcher.say(line)

    def wrote(self, path: Path) -> None:
        self.watcher.wrote(path)

    def progress(self, what: str, done: int, total: int) -> None:
        with contextlib.suppress(Stopped):
            self.watcher.progress(what, done, total)


def duration(seconds: float) -> str:
    """2 h 05 min, 3 min 20 s, 4 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
