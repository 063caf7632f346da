"""TOML values into config classes: strict, without coercion, all problems at once, in the user's words."""

from __future__ import annotations

import json
import math
import os
import re
import types
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Union, get_args, get_origin

import attrs
import cattrs
from attrs import NOTHING, frozen

from siv_core.component import Bounds
from siv_core.errors import UserError, near_miss
from siv_core.store import files

CONTAINERS: tuple[Any, ...] = (tuple, list, dict)
LARGEST = 2**63  # TOML's whole numbers are below it
LONGEST = 1e15  # whole numbers up to here are exact in floats
SHOWN = 8  # items of a wrong list or table
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)\s*([kM]?)\s+(steps?|epochs?|images?)")


@frozen
class Length:
    """How long something lasts: `"400 epochs"`, `"30000 steps"`, `"8M images"`."""

    count: float
    unit: str  # "steps", "epochs" or "images"

    @classmethod
    def parse(cls, text: str) -> Length:
        match = _LENGTH.fullmatch(text.strip())
        if not match or not float(match[1]):
            raise ValueError(f"""expected a length such as "400 epochs", "30000 steps" or "8M images", got {shown(text)}""")
        number, suffix, unit = match.groups()
        count = float(number) * {"": 1, "k": 1_000, "M": 1_000_000}[suffix]
        if count > LONGEST:
            raise ValueError(f"expected a length of at most {LONGEST:g}, got {shown(text)}")
        return cls(count, unit.rstrip("s") + "s")

    def __str__(self) -> str:
        return f"{format(Decimal(repr(self.count)), 'f').removesuffix('.0')} {self.unit}"  # no exponent: it is read again

    def steps(self, batch: int, epoch_images: int) -> int:
        """Whole steps, rounded up; at least one."""
        return max(1, math.ceil(self.images(batch, epoch_images) / batch - 1e-9))

    def images(self, batch: int, epoch_images: int) -> float:
        return {"steps": batch, "epochs": epoch_images, "images": 1}[self.unit] * self.count


def _type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", Length: "a length"}
    if kind in names:
        return names[kind]
    if _is_union(kind):
        return " or ".join(_type_name(member) for member in get_args(kind) if member is not type(None))
    origin = get_origin(kind)
    return {tuple: "a list", list: "a list", dict: "a table"}.get(origin, str(kind)) if origin else str(kind)


def _long_name(kind: Any) -> str:
    """With what is inside: "a number or a table of numbers", "a list of 2 whole numbers"."""
    if _is_union(kind):
        return " or ".join(_long_name(member) for member in get_args(kind) if member is not type(None))
    inner = get_args(kind)
    if get_origin(kind) not in CONTAINERS or not inner:
        return _type_name(kind)
    item = inner[1] if get_origin(kind) is dict else inner[0]
    fixed = f"{len(inner)} " if get_origin(kind) is tuple and Ellipsis not in inner else ""
    plural = {int: "whole numbers", float: "numbers", str: "strings"}.get(item, "values")
    return f"{_type_name(kind)} of {fixed}{plural}"


def shown(value: Any) -> str:
    """A value as TOML would write it, shortened where it is long."""
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
    elif type(value) is int and not -LARGEST <= value < LARGEST:  # Python refuses to write numbers of thousands of digits
        return f"a number of {value.bit_length()} bits"
    elif isinstance(value, (list, tuple)):
        text = f"[{', '.join(map(shown, value[:SHOWN]))}{', …' if len(value) > SHOWN else ''}]"
    elif isinstance(value, dict):
        pairs = [f"{key} = {shown(item)}" for key, item in list(value.items())[:SHOWN]]
        text = f"{{ {', '.join(pairs)}{', …' if len(value) > SHOWN else ''} }}" if value else "{}"
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _mismatch(kind: Any, value: Any) -> ValueError:
    return ValueError(f"expected {_type_name(kind)}, got {shown(value)}")


def _scalar(kind: type) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if type(value) is int and not -LARGEST <= value < LARGEST and kind in (int, float):
            raise ValueError(f"expected {_type_name(kind)} of at most 64 bits, got one of {value.bit_length()}")
        if kind is float and type(value) in (int, float):
            if not math.isfinite(value):
                raise ValueError(f"expected a finite number, got {value}")
            return float(value)
        if type(value) is not kind:
            raise _mismatch(kind, value)
        return value

    return structure


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=True, forbid_extra_keys=True)
    for kind in (int, float, bool, str):
        converter.register_structure_hook(kind, _scalar(kind))
    converter.register_structure_hook(Length, lambda value, _: Length.parse(_scalar(str)(value, str)))
    converter.register_unstructure_hook(Length, str)

    def union(kind: Any) -> Callable[[Any, Any], Any]:
        members = [member for member in get_args(kind) if member is not type(None)]  # a file cannot say None

        def structure(value: Any, _: Any) -> Any:
            if len(members) == 1:
                return converter.structure(value, members[0])
            for member in members:
                container = {dict: dict, tuple: list}.get(get_origin(member))
                if container is not None and isinstance(value, container):
                    return converter.structure(value, member)  # the shape fits: its own message is the better one
            for member in members:
                try:
                    return converter.structure(value, member)
                except (ValueError, cattrs.BaseValidationError):
                    continue
            raise _mismatch(kind, value)

        return structure

    def container(kind: Any) -> Callable[[Any, Any], Any]:
        shape: type = dict if get_origin(kind) is dict else list
        inner = loose.get_structure_hook(kind)

        def structure(value: Any, _: Any) -> Any:
            if not isinstance(value, shape):
                raise _mismatch(kind, value)
            return inner(value, kind)

        return structure

    loose = converter.copy()  # cattrs's own containers, which take a string for a list
    for each in (loose, converter):
        each.register_structure_hook_factory(_is_union, union)
    converter.register_structure_hook_factory(lambda kind: get_origin(kind) in CONTAINERS, container)
    return converter


_CONVERTER = _make_converter()


def _lines(error: Exception, where: str) -> list[str]:
    if isinstance(error, cattrs.BaseValidationError):
        return cattrs.transform_error(error, path=where, format_exception=lambda e, _: str(e))
    return [f"{error} @ {where}"]


def structure(cls: type, table: dict[str, Any], where: str, problems: list[str]) -> Any:
    """An instance of the config class `cls`, or None after what is wrong was added to `problems` as "key: reason"."""
    attrs.resolve_types(cls)
    before = len(problems)
    fields = {attribute.name: attribute for attribute in attrs.fields(cls)}
    for key in sorted(table.keys() - fields.keys()):
        problems.append(f"{where}.{key}: unknown key{near_miss(key, fields)}")
    values = {}
    for name, attribute in fields.items():
        if name not in table:
            if attribute.default is NOTHING:
                doc = attribute.metadata.get("doc", "")
                problems.append(f"{where}.{name}: missing ({_type_name(attribute.type)}{': ' + doc if doc else ''})")
            continue
        if attrs.has(attribute.type) and attribute.type is not Length:
            if isinstance(table[name], dict):
                values[name] = structure(attribute.type, table[name], f"{where}.{name}", problems)
            else:
                problems.append(f"{where}.{name}: expected a table, got {shown(table[name])}")
            continue
        try:
            values[name] = _CONVERTER.structure(table[name], attribute.type)
        except (ValueError, cattrs.BaseValidationError) as error:
            for line in _lines(error, f"{where}.{name}"):
                reason, _, place = line.rpartition(" @ ")
                place = re.sub(r"\['([^']*)'\]", r".\1", place)  # dotted, as the recipe has it
                problems.append(f"{place}: {reason}")
            continue
        bounds = attribute.metadata.get("bounds", Bounds())
        if not bounds.allows(values[name]):
            problems.append(f"{where}.{name}: must be {bounds}, got {shown(plain(values[name]))}")
        elif is_place(attribute) and values[name]:
            try:
                values[name] = os.path.abspath(files.expanded(values[name]))
            except UserError as error:
                problems.append(f"{where}.{name}: {error}")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return None


def is_place(attribute: attrs.Attribute[Any]) -> bool:
    """Whether this option says where something lies."""
    return bool(attribute.metadata.get("place", False))


def config_problem(cls: Any) -> str | None:
    """Why this cannot be the config class of a component, or None."""
    name = getattr(cls, "__name__", repr(cls))
    if not isinstance(cls, type) or not attrs.has(cls):
        return f"its config {cls!r} is no attrs class"
    try:
        attrs.resolve_types(cls)
    except Exception as error:  # an annotation is any expression
        return f"its config {name} has an annotation that cannot be resolved ({type(error).__name__}: {error})"
    for attribute in attrs.fields(cls):
        option = f"option '{attribute.name}' of its config {name}"
        if attribute.type is None:
            return f"{option} has no type"
        if isinstance(attribute.default, (list, dict, set)):
            return f"{option} has a mutable default, which all recipes would share: write a tuple, or a table with `option`"
        if is_place(attribute) and attribute.type is not str:
            return f"{option} is a place and has the type {attribute.type}: paths are strings"
        if attribute.default is NOTHING and not attribute.metadata.get("doc"):
            return f"{option} has neither a default nor a doc that says what to give: write `option(doc=…)`"
        try:
            _CONVERTER.get_structure_hook(attribute.type)
        except cattrs.StructureHandlerNotFoundError:
            return f"{option} has the type {attribute.type}, which no TOML value becomes"
    try:
        describe(cls)
        if all(attribute.default is not NOTHING for attribute in attrs.fields(cls)):
            cls()
    except Exception as error:  # a default that its own bounds refuse, or a factory that raises
        return f"its config {name} has a default that is not usable ({type(error).__name__}: {error})"
    return None


def plain(value: Any) -> Any:
    """The same value as JSON types, every default written out."""
    return json.loads(json.dumps(_CONVERTER.unstructure(value)))  # tuples become lists, as they will be when read back


def describe(cls: type) -> list[dict[str, Any]]:
    """The options of a config class, for people; those of a config class inside it with dotted names."""
    attrs.resolve_types(cls)
    rows: list[dict[str, Any]] = []
    for attribute in attrs.fields(cls):
        default: Any = attribute.default
        if hasattr(default, "factory"):  # attrs.Factory
            default = default.factory()
        if attrs.has(attribute.type) and attribute.type is not Length:
            rows += [{**row, "option": f"{attribute.name}.{row['option']}"} for row in describe(attribute.type)]
            continue
        rows.append(
            {
                "option": attribute.name,
                "type": _long_name(attribute.type),
                "default": "required" if default is NOTHING else plain(default),
                "bounds": str(attribute.metadata.get("bounds", "")),
                "meaning": attribute.metadata.get("doc", ""),
            }
        )
    return rows
