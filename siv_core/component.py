"""What a plugin registers: components, and the options of their config classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
from attrs import NOTHING, frozen

KINDS = ("network", "reconstruction", "prior", "dataset", "objective", "metric", "weights")

PerGroup = float | dict[str, float]  # one number for all latent groups, or a table with one for each


@frozen
class Component:
    """A named thing a recipe can ask for. What `build` takes and returns stands in docs/writing_plugins.md, kind by kind."""

    kind: str
    name: str
    config: type  # a frozen attrs class whose fields are the recipe's keys
    build: Callable[..., Any]
    summary: str
    paper: str = ""


@frozen
class Bounds:
    """The values an option takes; numbers in tables and lists are checked one by one."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[Any, ...] | None = None

    def __str__(self) -> str:
        if self.choices is not None:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        signs = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return " and ".join(f"{sign} {limit:g}" for sign, limit in signs if limit is not None)

    def allows(self, value: Any) -> bool:
        if isinstance(value, dict):
            return all(self.allows(item) for item in value.values())
        if isinstance(value, (tuple, list)):
            return all(self.allows(item) for item in value)
        if self.choices is not None:
            return value in self.choices
        if not isinstance(value, (int, float)):
            return True
        if not math.isfinite(value):
            return False
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


def option(
    default: Any = NOTHING,
    *,
    doc: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[Any, ...] | None = None,
    place: bool = False,
) -> Any:
    """A field of a config class: its default, its bounds and the sentence `siv describe` shows.

    `default` may be a mutable table: every instance gets its own copy. Without a default the key must stand in the recipe.
    `place`: a path, "" for none, which arrives absolute and with `~` expanded; relative ones are from the working folder. Where
    something lies is no part of an experiment: it may differ from one use of a run to the next.
    """
    bounds = Bounds(ge=ge, gt=gt, le=le, lt=lt, choices=choices)

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not bounds.allows(value):
            raise ValueError(f"{attribute.name}: {value!r} is not {bounds}")

    metadata = {"doc": doc, "bounds": bounds, "place": place}
    if isinstance(default, dict):
        return attrs.field(factory=default.copy, validator=check, metadata=metadata, kw_only=True)
    return attrs.field(default=default, validator=check, metadata=metadata, kw_only=True)


def per_group(value: PerGroup, groups: dict[str, int]) -> dict[str, float]:
    """One number a group from a number or a table."""
    return dict(value) if isinstance(value, dict) else dict.fromkeys(groups, float(value))
