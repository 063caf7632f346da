"""What a person sees: progress bars on a terminal, lines elsewhere. Only this module knows rich."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from siv_core.errors import Stopped
from siv_core.runs.watchers import Lines

if TYPE_CHECKING:
    from siv_core.train.trainer import Trainer

SHOW_CURSOR = b"\x1b[?25h"


class Lasting:
    """A text stream that may lose its reader: a pipe or terminal that was closed, a disk that is full. Then it says so once, on
    standard error, and nothing more is printed; the work goes on."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())  # what is still buffered goes there too
        os.close(nowhere)
        with contextlib.suppress(OSError):
            line = f"standard output is lost ({error.strerror}): going on without it; the run's log.txt tells how it ends\n"
            os.write(2, line.encode())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))  # how the process then ends is for `cli` to say


class Screen(Lines):
    """Watches a run for a person; on a terminal as moving bars, elsewhere as lines. Takes the first signal as a wish to stop."""

    def __init__(self, *, stderr: bool = False) -> None:
        quiet = os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks
        self.console: Console = _Console(stderr=stderr, highlight=False, quiet=quiet)
        if not self.console.is_terminal:
            self.console.width = 200  # a file has no width to keep to
        super().__init__()
        self.at_once = False
        self.at_end: Callable[[], None] = lambda: None  # called where a signal ends the process at once
        self.live: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.shown = ""

    # -- signals -----------------------------------------------------------------------------------------------------------------

    def listen(self, *, at_once: bool = False) -> None:
        """The first SIGINT, SIGTERM or SIGHUP (the terminal is closed) asks for an end after a checkpoint, the second one ends at
        once; or already the first. What started us may have SIGHUP ignored (nohup): it stays so.

        Ending at once is not left to Python's KeyboardInterrupt, which imports of torch and numpy may swallow.
        """
        self.at_once = at_once
        if not at_once:
            self.console.file = cast(IO[str], Lasting(self.console.file))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._signalled)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminal()
        if self.signum or self.at_once:
            self._show_cursor()
            self.at_end()
            os._exit(128 + number)
        self.signum = number

    def _leave_terminal(self) -> None:
        """What is still told has nowhere to go: writing to a terminal that was closed is an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            if os.isatty(descriptor):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)

    # -- what is told ------------------------------------------------------------------------------------------------------------

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """Work that is counted: a bar, or a line every few seconds."""
        if self.signum:
            self.end()
            raise Stopped(self.signum)
        if not self.console.is_terminal:
            super().progress(what, done, total)
            return
        self._bar(what, done, total)
        if done >= total:
            self._end_bar(what)

    def beside(self, what: str, done: int, total: int) -> None:
        """A bar beside others on a terminal, and nothing elsewhere; `over` takes it away."""
        if self.console.is_terminal:
            self._bar(what, done, total)

    def over(self, what: str) -> None:
        if what in self.tasks:
            self._end_bar(what)

    # -- training ----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def training(self, trainer: Trainer, max_seconds: float | None) -> Iterator[None]:
        try:
            with super().training(trainer, max_seconds):
                yield
        finally:
            self.end()

    def stepped(self, step: int, steps: int, images_seen: int) -> None:
        super().stepped(step, steps, images_seen)
        if self.console.is_terminal:
            self._bar("training", step, steps, self.shown)

    def ticked(self, line: dict[str, Any]) -> None:
        """Numbers of a tick; on a terminal they stand beside the bar."""
        if self.console.is_terminal:
            self.shown, _ = self.numbers(line)
        else:
            super().ticked(line)

    def _bar(self, what: str, done: int, total: int, text: str = "") -> None:
        if self.live is None:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
            more = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
            plain = self.console.stderr  # then standard output carries JSON, which is not for the display
            self.live = Progress(*columns, *more, console=self.console, transient=True, redirect_stdout=not plain)
            self.live.start()
        if what not in self.tasks:
            self.tasks[what] = self.live.add_task(what, total=total, completed=done, text=text)
        self.live.update(self.tasks[what], completed=done, total=total, text=text)

    def _end_bar(self, what: str) -> None:
        """The last bar takes the live display with it, so that the terminal is as it was."""
        if self.live is not None:
            self.live.remove_task(self.tasks.pop(what))
        if not self.tasks:
            self.end()

    def end(self) -> None:
        """Give the terminal back: its cursor, and the standard output that rich redirects meanwhile."""
        live, self.live, self.tasks = self.live, None, {}
        if live is not None:
            live.stop()

    def _show_cursor(self) -> None:
        """By hand and without rich's locks, which the code that a signal interrupted may hold."""
        if self.live is not None:
            with contextlib.suppress(OSError, ValueError):
                os.write(self.console.file.fileno(), SHOW_CURSOR)

    # -- tables ------------------------------------------------------------------------------------------------------------------

    def table(self, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        self.end()
        self.say(title)  # not as the table's: a narrow one would break it, inside a path
        self.console.print(table, markup=False)
