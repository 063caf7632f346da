"""`siv recipes`: those that come with siv, also from a wheel; the sweeps over them are called `sweeps/NAME`."""

from __future__ import annotations

import os
import re
from importlib.resources import files as resources
from pathlib import Path

import click

from siv_core.cli_common import PATH, json_option, print_json
from siv_core.errors import UserError, near_miss


def shipped() -> dict[str, str]:
    """{name: text}, as the package `siv_recipes` has them."""
    package, texts = resources("siv_recipes"), {}
    for prefix, folder in (("", package), ("sweeps/", package / "sweeps")):
        found = {entry.name: entry for entry in folder.iterdir() if entry.name.endswith(".toml")}
        texts.update({f"{prefix}{name.removesuffix('.toml')}": found[name].read_text("utf-8") for name in sorted(found)})
    return texts


def text_of(name: str) -> str:
    known = shipped()
    if name not in known:
        raise UserError(f"no recipe '{name}' comes with siv{near_miss(name, known)}")
    return known[name]


@click.group()
def recipes() -> None:
    """The recipes and sweeps that come with siv: list, show, copy."""


@recipes.command("ls")
@json_option
def recipes_ls(as_json: bool) -> None:
    """List the recipes, each with its first comment."""
    listed = {name: text.splitlines()[0].lstrip("# ") for name, text in shipped().items()}
    if as_json:
        print_json(listed)
    else:
        for name, line in listed.items():
            click.echo(f"{name:24} {line}")


@recipes.command("show")
@click.argument("name")
def recipes_show(name: str) -> None:
    """Print the recipe NAME."""
    click.echo(text_of(name), nl=False)


@recipes.command("copy")
@click.argument("name")
@click.argument("destination", type=PATH, required=False)
def recipes_copy(name: str, destination: Path | None) -> None:
    """Copy the recipe NAME to DESTINATION (default: NAME.toml here), to edit it; nothing is overwritten.

    A sweep finds its recipes by their paths from its own file: with `siv recipes copy sweeps/NAME`, copy these here too.
    """
    from siv_core import files

    text = text_of(name)
    path = destination or Path(f"{name}.toml")
    path = path / f"{name}.toml" if path.is_dir() else path
    if path.exists():
        raise UserError(f"{path}: is there already; give another destination")
    files.make_folder(path.parent)
    files.write_bytes(path, text.encode())
    click.echo(f"wrote {path}")
    for recipe in dict.fromkeys(re.findall(r'^recipe = "(.+)"', text, re.M)):
        varied = Path(os.path.normpath(path.parent / recipe))
        if not varied.exists():
            click.echo(f"it varies {varied}: `siv recipes copy {varied.stem} {varied}` brings that")
