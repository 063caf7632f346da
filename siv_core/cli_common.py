"""What the command groups share: the screen, JSON output and common options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from siv_core.console import Screen

PATH = click.Path(path_type=Path)
Command = Callable[..., Any]


def screen(as_json: bool = False, *, at_once: bool = False) -> Screen:
    """The console of a command that works for a while; it is ended with the command, whatever that one's end is.

    The first signal is a wish, which is granted where `progress` is called or a step ends; `at_once` is for commands that have
    nothing to save.
    """
    from siv_core.console import Screen

    made = Screen(stderr=as_json)
    click.get_current_context().call_on_close(made.end)
    made.listen(at_once=at_once)
    return made


def print_json(value: Any) -> None:
    from siv_core.files import finite_or_text

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
