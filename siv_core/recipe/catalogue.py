"""Which components there are: entry points of the group `siv`, loaded one by one so that none can stop another.

siv's own plugins come first, then third parties by distribution and name. A name that is taken stays with its first owner;
the later one is listed as a failure. Nothing is ever overridden.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import traceback
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import attrs
import pluggy
from attrs import field, frozen

from siv_core import hookspecs
from siv_core.component import KINDS, Component
from siv_core.errors import PluginError, UserError, near_miss
from siv_core.recipe.convert import config_problem

GROUP = "siv"
SLOW_SECONDS = 2.0  # an import that takes longer is told; torch is there already, for every command that loads plugins needs it


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
    slow: tuple[str, ...] = ()  # a sentence for each plugin that takes long to import

    def get(self, kind: str, name: str) -> Component:
        """The component, or a `UserError` that quotes the failure behind a missing one."""
        if (kind, name) in self.components:
            return self.components[kind, name][0]
        hint = near_miss(name, self.names(kind))
        unknown = [f"{failure.owner} ({failure.reason})" for failure in self.failures if not failure.names]
        if unknown:
            hint += f"; these plugins, which may have it, are not usable: {', '.join(unknown)}"
        for failure in self.failures:
            if name in failure.names or name == failure.owner.plugin:
                hint = f"; {failure.owner} is not usable: {failure.reason}"
        raise UserError(f"no {kind} is called '{name}'{hint}")

    def failure(self, plugin: str) -> Failure:
        """Why a plugin, or one of its components, cannot be used; a `UserError` where nothing is wrong with it."""
        for failure in self.failures:
            if plugin == failure.owner.plugin:
                return failure
        if any(plugin == owner.plugin for owner in self.owners):
            raise UserError(f"plugin '{plugin}' is usable: it has no traceback")
        raise UserError(f"no plugin is called '{plugin}'{near_miss(plugin, {f.owner.plugin for f in self.failures})}")

    def owner(self, kind: str, name: str) -> Owner:
        return self.components[kind, name][1]

    def names(self, kind: str) -> list[str]:
        return sorted(name for k, name in self.components if k == kind)


def load(points: Iterable[EntryPoint] | None = None) -> Catalogue:
    """Load every entry point (those installed, unless given). SIV_DISABLE=name,name leaves plugins out."""
    manager = pluggy.PluginManager("siv")
    manager.add_hookspecs(hookspecs)
    disabled = {name.strip() for name in os.environ.get("SIV_DISABLE", "").split(",")} - {""}
    components: dict[tuple[str, str], tuple[Component, Owner]] = {}
    failures: list[Failure] = []
    owners: dict[str, Owner] = {}
    slow: list[str] = []
    ordered = sorted(entry_points(group=GROUP) if points is None else points, key=_precedence)
    for name in sorted(disabled - {point.name for point in ordered}):
        reason = f"SIV_DISABLE names it, there is none{near_miss(name, [point.name for point in ordered])}"
        failures.append(Failure(Owner(name, "?", "?"), reason, names=("",)))
    for point in ordered:
        owner = _owner(point)
        if point.name in disabled:
            failures.append(Failure(owner, "left out by SIV_DISABLE"))
        elif point.name in owners:
            failures.append(Failure(owner, f"its name is taken by {owners[point.name]}"))
        else:
            try:
                offered, seconds = _components(manager, point)
            except (Exception, SystemExit) as error:  # whatever a stranger's module raises is told, never fatal
                reason = f"{type(error).__name__}: {error}{_at(error, point)}"
                failures.append(Failure(owner, reason, details=traceback.format_exc()))
                continue
            owners[point.name] = owner
            if seconds > SLOW_SECONDS:
                slow.append(f"{owner} took {seconds:.1f} s to import: every command waits for it (SIV_DISABLE={point.name})")
            for component in offered:
                problem = _problem(component, components)
                if problem:
                    failures.append(Failure(owner, problem, names=(getattr(component, "name", "?"),)))
                else:
                    components[component.kind, component.name] = (component, owner)
    return Catalogue(components, tuple(failures), tuple(owners.values()), tuple(slow))


def _components(manager: pluggy.PluginManager, point: EntryPoint) -> tuple[list[Any], float]:
    """What a plugin offers, and how many seconds its import took."""
    importlib.import_module("torch")
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to the command, which may print JSON
        module = point.load()
        seconds = time.perf_counter() - started
        return _offered(manager, point, module), seconds


def _offered(manager: pluggy.PluginManager, point: EntryPoint, module: Any) -> list[Any]:
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
    wrong = config_problem(component.config)
    if wrong:
        return f"{component.kind} '{component.name}': {wrong}"
    reserved = {
        "name",
        *(("every",) if component.kind == "metric" else ()),
    }  # keys of the recipe's table that are not the config's
    for option in attrs.fields_dict(component.config).keys() & reserved:
        return f"{component.kind} '{component.name}': its option '{option}' has the name of a key that every such table has"
    if (component.kind, component.name) in taken:
        return f"{component.kind} '{component.name}' is taken by {taken[component.kind, component.name][1]}"
    return None


def _owner(point: EntryPoint) -> Owner:
    dist = point.dist
    return Owner(point.name, dist.name, dist.version) if dist else Owner(point.name, "?", "?")


def _precedence(point: EntryPoint) -> tuple[bool, str, str]:
    name = point.dist.name if point.dist else "?"
    return (name != "siv", name, point.name)


# -- exceptions of plugins -------------------------------------------------------------------------------------------------------


def blame(error: BaseException, points: Iterable[EntryPoint] | None = None) -> PluginError | None:
    """The same failure with the plugin, its version and the place, where code of a plugin stands in the traceback."""
    known = list(entry_points(group=GROUP) if points is None else points)
    for frame in reversed(list(traceback.walk_tb(error.__traceback__))):
        for point in known:
            if _is_of(frame[0].f_globals.get("__name__", ""), point):
                return PluginError(f"{_owner(point)}: {words(error)}{_at(error, point)}")
    return None


def words(error: BaseException) -> str:
    """An exception in one line, with its notes."""
    return "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])


def _is_of(module: str, point: EntryPoint) -> bool:
    """Whether a module belongs to a plugin: its own one, and all of a third party's package. What is in siv_core is siv's."""
    if point.module.startswith("siv_core"):
        return False
    package = point.module if point.module.startswith("siv_plugins.") else point.module.partition(".")[0]
    return module == package or module.startswith(package + ".")


def _at(error: BaseException, point: EntryPoint) -> str:
    """` (/folder/mine.py:12, in forward)`: the plugin's own innermost frame, nothing where it has none."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if _is_of(frame.f_globals.get("__name__", ""), point):
            return f" ({frame.f_code.co_filename}:{line}, in {frame.f_code.co_name})"
    return ""
