"""`siv recipes`: those that come with siv and with other distributions, also from a wheel.

A distribution offers the TOML files of a package by an entry point of the group `siv.recipes`; they are called
DISTRIBUTION/NAME, so that no name is ever taken by another. Sweeps over recipes are called sweeps/NAME.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import entry_points
from importlib.resources import files as resources
from importlib.resources.abc import Traversable
from pathlib import Path

import click

from siv_core.cli.common import PATH, json_option, print_json
from siv_core.errors import UserError, near_miss, one_line

GROUP = "siv.recipes"
SWEEPS = "sweeps/"


def offered() -> tuple[dict[str, Traversable], list[str]]:
    """{name: file}, siv's own first, and a line for each entry point that cannot be used."""
    found, broken = {**_inside(resources("siv_recipes"), ""), **_inside(resources("siv_recipes") / SWEEPS, SWEEPS)}, []
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.dist.name if point.dist else "?", point.name)):
        owner = point.dist.name if point.dist else "?"
        try:
            found = {**_inside(resources(point.value), f"{owner}/"), **found}
        except Exception as error:  # whatever a stranger's package raises is told, never fatal
            broken.append(one_line(f"recipes '{point.name}' of {owner} are not usable: {type(error).__name__}: {error}"))
    return dict(sorted(found.items(), key=lambda item: ("/" in item[0], item[0]))), broken


def _inside(folder: Traversable, prefix: str) -> dict[str, Traversable]:
    return {prefix + entry.name.removesuffix(".toml"): entry for entry in folder.iterdir() if entry.name.endswith(".toml")}


def source_of(name: str) -> bytes:
    known, broken = offered()
    if name not in known:
        raise UserError([f"there is no recipe '{name}'{near_miss(name, known)}", *broken])
    return known[name].read_bytes()


@click.group()
def recipes() -> None:
    """The recipes and sweeps that come with siv and with plugins: list, show, copy."""


@recipes.command("ls")
@json_option
def recipes_ls(as_json: bool) -> None:
    """List the recipes, each with its first comment."""
    known, broken = offered()
    listed = {}
    for name, entry in known.items():
        first = entry.read_bytes().partition(b"\n")[0].decode(errors="replace").strip()
        listed[name] = first.lstrip("# ") if first.startswith("#") else ""
    if as_json:
        print_json(listed)
    else:
        for name, line in listed.items():
            click.echo(one_line(f"{name:24} {line}"))
    for line in broken:
        click.echo(line, err=True)


@recipes.command("show")
@click.argument("name")
def recipes_show(name: str) -> None:
    """Print the recipe NAME."""
    click.echo(source_of(name), nl=False)


@recipes.command("copy")
@click.argument("name")
@click.argument("destination", type=PATH, required=False)
def recipes_copy(name: str, destination: Path | None) -> None:
    """Copy the recipe NAME to DESTINATION (default: NAME.toml here), to edit it; nothing is overwritten.

    A sweep finds its recipes by their paths from its own file: with `siv recipes copy sweeps/NAME`, copy these here too.
    """
    from siv_core.store import files

    source, path = source_of(name), destination or Path()
    if path.is_dir():
        path /= f"{name if name.startswith(SWEEPS) else name.rpartition('/')[2]}.toml"
        files.make_folder(path.parent)
    try:
        with path.open("xb") as file:
            file.write(source)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise UserError(f"{path}: is there already; give another destination") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another destination") from error
    click.echo(f"wrote {path}")
    for recipe in dict.fromkeys(re.findall(r'^recipe = "(.+)"', source.decode(), re.M)):
        varied = Path(os.path.normpath(path.parent / recipe))
        if not varied.exists():
            click.echo(f"it varies {varied}: `siv recipes copy {varied.stem} {varied}` brings that")
