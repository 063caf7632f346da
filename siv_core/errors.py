"""What a user can mend, what training can run into, and how a run ends. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

import signal
from collections.abc import Iterable


class SivError(Exception):
    """A failure that is told in words; `cli.main` turns it into lines and an exit code."""

    exit_code = 1


class UserError(SivError):
    """Something the user can mend: one line a problem, each naming the place, the reason and the remedy. Exit 2."""

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = tuple(map(one_line, (problems,) if isinstance(problems, str) else problems))
        super().__init__("\n".join(self.problems))


class PluginError(SivError):
    """A plugin raised something it should not: a bug, but not siv's. Names the plugin, its version and the place. Exit 1."""


class Diverged(SivError):
    """A loss or a gradient is no longer finite; the last good checkpoint stays. Exit 3."""

    exit_code = 3


class Stopped(SivError):
    """A signal asked for an end; whoever catches it first saves what there is to save. Exit 128 + signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.exit_code = 128 + signum


def one_line(text: object, most: int = 2000) -> str:
    """Strangers' text as one line that does nothing to a terminal: what does not print is escaped, much is cut in the middle."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))
    return line if len(line) <= most else f"{line[: most // 2]} … {line[-most // 2 :]}"


def near_miss(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'beta_neg'?` or the list of what there is, ready to stand behind a message."""
    import difflib

    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""


def how_it_ended(code: int) -> str:
    """In words what a child process ended with, as `subprocess` tells it: below 0 a signal."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
