"""Which components there are: entry points of the group `siv`, loaded one by one so that none can stop another.

siv's own plugins come first, then third parties by distribution and name. A name that is taken stays with its first owner;
the later one is listed as a failure. Nothing is ever overridden.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import attrs
import pluggy
from attrs import field, frozen

from siv_core import hookspecs
from siv_core.component import KINDS, Component
from siv_core.errors import UserError, near_miss

GROUP = "siv"


@frozen
class Owner:
    """Where a plugin comes from."""

    plugin: str  # entry point name
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"plugin '{self.plugin}' of {self.distribution} {self.version}"


@frozen
class Failure:
    """A plugin, or one of its components, that cannot be used, and why."""

    owner: Owner
    reason: str
    names: tuple[str, ...] = ()  # components that are missing because of it, where they are known
    details: str = field(default="", repr=False)  # the traceback


@frozen
class Catalogue:
    components: dict[tuple[str, str], tuple[Component, Owner]]  # (kind, name) -> …
    failures: tuple[Failure, ...]
    owners: tuple[Owner, ...]

    def get(self, kind: str, name: str) -> Component:
        """The component, or a `UserError` that quotes the failure behind a missing one."""
        if (kind, name) in self.components:
            return self.components[kind, name][0]
        hint = near_miss(name, self.names(kind))
        for failure in self.failures:
            if name in failure.names or name == failure.owner.plugin:
                hint = f"; {failure.owner} is not usable: {failure.reason}"
        raise UserError(f"no {kind} is called '{name}'{hint}")

    def owner(self, kind: str, name: str) -> Owner:
        return self.components[kind, name][1]

    def names(self, kind: str) -> list[str]:
        return sorted(name for k, name in self.components if k == kind)


def load(points: Iterable[EntryPoint] | None = None) -> Catalogue:
    """Load every entry point (those installed, unless given). SIV_DISABLE=name,name leaves plugins out."""
    manager = pluggy.PluginManager("siv")
    manager.add_hookspecs(hookspecs)
    disabled = set(filter(None, os.environ.get("SIV_DISABLE", "").split(",")))
    components: dict[tuple[str, str], tuple[Component, Owner]] = {}
    failures: list[Failure] = []
    owners: dict[str, Owner] = {}
    for point in sorted(entry_points(group=GROUP) if points is None else points, key=_precedence):
        owner = _owner(point)
        if point.name in disabled:
            failures.append(Failure(owner, "left out by SIV_DISABLE"))
        elif point.name in owners:
            failures.append(Failure(owner, f"its name is taken by {owners[point.name]}"))
        else:
            try:
                offered = _components(manager, point)
            except (Exception, SystemExit) as error:  # whatever a stranger's module raises is told, never fatal
                reason = f"{type(error).__name__}: {error}"
                failures.append(Failure(owner, reason, details=traceback.format_exc()))
                continue
            owners[point.name] = owner
            for component in offered:
                problem = _problem(component, components)
                if problem:
                    failures.append(Failure(owner, problem, names=(getattr(component, "name", "?"),)))
                else:
                    components[component.kind, component.name] = (component, owner)
    return Catalogue(components, tuple(failures), tuple(owners.values()))


def _components(manager: pluggy.PluginManager, point: EntryPoint) -> list[Any]:
    module = point.load()
    try:
        if manager.register(module, name=point.name) is None:
            raise UserError("its module is registered already under another name")
        manager.check_pending()
        if not manager.get_hookcallers(module):
            raise UserError("it has no function siv_components marked with siv_core.hookimpl")
        others = [plugin for plugin in manager.get_plugins() if plugin is not module]
        offered: list[list[Any]] = manager.subset_hook_caller("siv_components", others)()
        if not offered:  # pluggy leaves out None
            raise UserError("siv_components returned nothing; it is to return a list of Components")
    except BaseException:
        if manager.is_registered(module) and manager.get_name(module) == point.name:
            manager.unregister(module)
        raise
    return [component for items in offered for component in items]


def _problem(component: Any, taken: dict[tuple[str, str], tuple[Component, Owner]]) -> str | None:
    if not isinstance(component, Component):
        return f"siv_components returned {component!r}, which is no Component"
    if not isinstance(component.kind, str) or not isinstance(component.name, str):
        return f"a component's kind and name must be strings, not {component.kind!r} and {component.name!r}"
    if component.kind not in KINDS:
        return f"component '{component.name}': unknown kind '{component.kind}'{near_miss(component.kind, KINDS)}"
    if not attrs.has(component.config):
        return f"{component.kind} '{component.name}': its config {component.config!r} is no attrs class"
    if (component.kind, component.name) in taken:
        return f"{component.kind} '{component.name}' is taken by {taken[component.kind, component.name][1]}"
    return None


def _owner(point: EntryPoint) -> Owner:
    dist = point.dist
    return Owner(point.name, dist.name, dist.version) if dist else Owner(point.name, "?", "?")


def _precedence(point: EntryPoint) -> tuple[bool, str, str]:
    name = point.dist.name if point.dist else "?"
    return (name != "siv", name, point.name)
