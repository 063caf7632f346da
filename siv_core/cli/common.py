"""What the command groups share: the screen, JSON output and common options."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from siv_core.cli.console import Screen


class Place(click.Path):
    """A path, with `~` put out: a shell does that at the start of a word alone, as not in --run-dir=~/x."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from siv_core.store.files import expanded

        return expanded(str(super().convert(value, param, ctx)))


PATH = Place(path_type=Path)
Command = Callable[..., Any]


def screen(as_json: bool = False, *, at_once: bool = False) -> Screen:
    """The console of a command that works for a while; it is ended with the command, whatever that one's end is.

    The first signal is a wish, which is granted where `progress` is called or a step ends; `at_once` is for commands that have
    nothing to save.
    """
    from siv_core.cli.console import Screen

    made = Screen(stderr=as_json)
    click.get_current_context().call_on_close(made.end)
    made.listen(at_once=at_once)
    return made


def print_json(value: Any) -> None:
    from siv_core.store.files import finite_or_text

    click.echo(json.dumps(finite_or_text(value), indent=2, allow_nan=False))


def options(*added: Command) -> Command:
    """Several click options as one decorator."""

    def decorate(command: Command) -> Command:
        for option in reversed(added):
            command = option(command)
        return command

    return decorate


json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on standard output, progress on standard error."
)
set_option = click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one value, such as train.batch=8.")
device_option = click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute.")


def seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """90s, 8m, 2h or 1h30m as seconds."""
    if value is None:
        return None
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", value)
    if not match or not any(match.groups()):
        raise click.BadParameter("expected a time such as 8m, 90s or 1h30m")
    hours, minutes, rest = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60 * minutes + rest
