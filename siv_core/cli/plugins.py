"""`siv list-plugins` and `siv describe`: which components there are, and every option of one."""

from __future__ import annotations

from typing import Any

import click

from siv_core.cli.common import json_option, print_json
from siv_core.errors import UserError


@click.command("list-plugins")
@click.option("--kind", help="Only components of this kind.")
@click.option("--traceback", "failed", metavar="NAME", help="Show why the plugin NAME cannot be used, with its traceback.")
@json_option
def list_plugins(kind: str | None, failed: str | None, as_json: bool) -> None:
    """List the plugins, their components, and those that cannot be used."""
    from siv_core.cli.console import Screen
    from siv_core.component import KINDS
    from siv_core.errors import near_miss
    from siv_core.recipe import catalogue as catalogues

    if kind and kind not in KINDS:
        raise UserError(f"--kind {kind}: no such kind{near_miss(kind, KINDS)}")
    catalogue = catalogues.load()
    if failed:
        failure = catalogue.failure(failed)
        if as_json:
            print_json({"plugin": failed, "reason": failure.reason, "traceback": failure.details})
        else:
            click.echo(failure.details.rstrip() or f"no traceback: {failure.reason}")
        return
    components = [
        {
            "kind": k,
            "name": name,
            "summary": component.summary,
            "plugin": owner.plugin,
            "from": f"{owner.distribution} {owner.version}",
        }
        for (k, name), (component, owner) in sorted(catalogue.components.items())
        if kind in (None, k)
    ]
    broken = [
        {"plugin": f.owner.plugin, "from": f"{f.owner.distribution} {f.owner.version}", "reason": f.reason}
        for f in catalogue.failures
    ]
    if as_json:
        print_json({"components": components, "broken": broken, "slow": list(catalogue.slow)})
        return
    columns = ("kind", "name", "plugin", "from", "summary")
    out = Screen()
    out.table("Components", columns, [tuple(str(entry[column]) for column in columns) for entry in components])
    if broken:
        out.table("Not usable", ("plugin", "from", "reason"), [tuple(entry.values()) for entry in broken])
    for line in catalogue.slow:
        out.say(line)


@click.command()
@click.argument("kind")
@click.argument("name")
@json_option
def describe(kind: str, name: str, as_json: bool) -> None:
    """Show the options of component NAME of KIND: type, default, bounds, meaning, origin."""
    from siv_core.cli.console import Screen
    from siv_core.component import KINDS
    from siv_core.errors import near_miss
    from siv_core.recipe import catalogue as catalogues
    from siv_core.recipe import convert

    if kind not in KINDS:
        raise UserError(f"'{kind}' is no kind{near_miss(kind, KINDS)}")
    catalogue = catalogues.load()
    component = catalogue.get(kind, name)
    report: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "summary": component.summary,
        "paper": component.paper,
        "from": str(catalogue.owner(kind, name)),
        "options": convert.describe(component.config),
    }
    if as_json:
        print_json(report)
        return
    out = Screen()
    out.say(f"{kind} {name}: {component.summary}{f' ({component.paper})' if component.paper else ''}\n{report['from']}")
    columns = ("option", "type", "default", "bounds", "meaning")
    out.table("Options", columns, [tuple(str(row[column]) for column in columns) for row in report["options"]])
