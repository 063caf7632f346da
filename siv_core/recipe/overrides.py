"""The layers of a recipe: its file, its profiles and the command line's `--set`, one on top of the other; and where a key stands.

Tables merge key by key; a table whose `name` changes is replaced whole, and so are lists.
"""

from __future__ import annotations

import copy
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from attrs import frozen

from siv_core.errors import UserError

LARGEST = 1_000_000  # bytes of a recipe
DEEPEST = 50  # tables within tables, or parts of a dotted key
LONGEST = 500  # lines of one statement for which line numbers are still looked up
ESCAPES = "; in double quotes a backslash begins an escape: put a path with backslashes in single quotes, 'C:\\data\\x.h5'"
NOT_TEXT = "a recipe is TOML, text in UTF-8; save it as that"

KeyPath = tuple[str | int, ...]  # of a value in a tree: keys of tables and positions in lists


# -- reading ---------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> bytes:
    """The bytes of a recipe; a `UserError` says why there are none."""
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            if found.st_size > LARGEST:
                raise UserError(f"{path}: {found.st_size:,} bytes; over 1 MB, this is no recipe")
            return path.read_bytes()
        if not stat.S_ISDIR(found.st_mode):  # a pipe or a device could keep us for ever
            raise UserError(f"{path}: no regular file; save the recipe as one")
        reason = "Is a directory"
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:  # a NUL in the name
        reason = str(error)
    raise UserError(f"{path}: cannot be read ({reason}); `siv recipes ls` lists those siv ships")


def tree_of(path: Path, source: bytes) -> dict[str, Any]:
    """The TOML tree in the bytes of a recipe; a `UserError` says what else they are."""
    if not source.strip():
        raise UserError(f"{path}: empty; `siv recipes copy digits` gives one to start from")
    if source.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: not TOML (UTF-16); {NOT_TEXT}")
    if source.startswith(b"\xef\xbb\xbf"):
        raise UserError(f"{path}: not TOML (it starts with a byte order mark); save it as UTF-8 without one")
    try:
        text = source.decode("utf-8")
    except UnicodeDecodeError as error:
        line = source[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not TOML (byte 0x{source[error.start]:02x} is no UTF-8); {NOT_TEXT}") from error
    try:
        return parsed(text)
    except (ValueError, RecursionError) as error:  # tomllib lets through what Python says of long numbers and deep nests
        line_told = re.search(r" \(at line (\d+), column \d+\)", str(error))
        place = f"{path}:{line_told[1]}" if line_told else f"{path}"
        written = text.split("\n")[int(line_told[1]) - 1] if line_told else ""
        raise UserError(f"{place}: not TOML ({error}){ESCAPES if chr(92) in written else ''}") from error


def parsed(text: str) -> dict[str, Any]:
    """TOML text as a tree; a ValueError or RecursionError where it is none, or deeper than anything here reads."""
    for piece in re.split(r"[=,{\n]", text):  # tomllib takes quadratic time for a dotted key of many parts
        if piece.count(".") > DEEPEST and sum(map(bool, map(str.strip, piece.split(".")))) > DEEPEST:
            raise ValueError(f"a key of more than {DEEPEST} parts")
    tree = tomllib.loads(text)
    level: list[Any] = [tree]
    for _ in range(DEEPEST):
        level = [child for value in level for _, child in _children(value)]
    if level:
        raise ValueError(f"nested more than {DEEPEST} deep")
    return tree


def setting(text: str) -> dict[str, Any]:
    """{"train": {"batch": 8}} from "train.batch=8"; what is no TOML value is taken as a string."""
    key, sign, given = text.partition("=")
    if not sign or not key.strip():
        raise UserError(f"--set {text}: expected KEY=VALUE, such as --set train.batch=8")
    try:
        path, _ = [*paths(parsed(f"{key.strip()} = 0"))][-1]
    except (ValueError, IndexError):
        raise UserError(f"--set {text}: expected a dotted key such as train.batch before the =; lists are given whole") from None
    try:
        found = parsed(f"value = {given}")
        value: Any = found["value"] if len(found) == 1 else given
    except (ValueError, RecursionError):
        value = given
    for part in reversed(path):
        value = {part: value}
    return dict(value)


# -- merging ---------------------------------------------------------------------------------------------------------------------


def overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`merge` for whole recipes: stages and a length say the same thing, so the one that comes later takes the other's place."""
    merged = merge(base, over)
    train = over.get("train")
    if "stages" in over and isinstance(merged.get("train"), dict):
        merged["train"].pop("length", None)
    elif isinstance(train, dict) and "length" in train:
        merged.pop("stages", None)
    return merged


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, as the module's head says; neither is changed."""
    merged = copy.deepcopy(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name", old.get("name")) == old.get("name"):
            merged[key] = merge(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


# -- where a key stands ----------------------------------------------------------------------------------------------------------


@frozen
class Layer:
    """One layer: its tree, and where that came from."""

    tree: dict[str, Any]
    place: str  # "some.toml", or "--set train.batch=8"
    within: KeyPath = ()  # of the tree in the file's, ("profiles", "cpu"); the file's text is looked up for the line


@frozen
class Places:
    """What a recipe was read from, for telling where a problem stands."""

    layers: tuple[Layer, ...]  # the file's own first
    merged: dict[str, Any]
    text: str

    def told(self, problems: Iterable[str]) -> UserError:
        """Problems "dotted.key: reason", each once and with its place: the `--set`, or the file and, where certain, the line.

        What a stage was given by a table outside it is told of that table: "objective.scale", not "stages[0].objective.scale".
        """
        merged = named(self.merged)
        own = [named(layer.tree) for layer in self.layers]
        lines = lines_of(self.text)
        told: dict[str, None] = {}
        for problem in problems:
            key, _, reason = problem.partition(": ")
            key = self._outside_stages(key, merged)
            known = key in merged or key.startswith("profiles")
            holding = [i for i, keys in enumerate(own) if key in keys and known and not reason.startswith("missing")]
            top = max(holding, default=0)  # the last layer that has the key; of a key that is missing, the file
            place = _place(self.layers[top], own[top][key] if holding else None, lines)
            told[f"{place}: {problem if key == problem else f'{key}: {reason}'}"] = None
        return UserError(told)

    def _outside_stages(self, key: str, merged: dict[str, KeyPath | None]) -> str:
        match = re.fullmatch(r"stages\[(\d+)\]\.((\w+).*)", key, re.DOTALL)
        if not match or key in merged:
            return key
        number, outside, table = match.groups()
        stages = self.merged.get("stages")
        if not stages:
            return outside
        name = self.merged.get(table, {}).get("name") if isinstance(self.merged.get(table), dict) else None
        own = stages[int(number)].get(table)
        renamed = isinstance(own, dict) and own.get("name", name) != name
        return outside if outside in merged and not renamed else key


def _place(layer: Layer, path: KeyPath | None, lines: dict[KeyPath, int]) -> str:
    line = lines.get((*layer.within, *path)) if path is not None and not layer.place.startswith("--set ") else None
    return f"{layer.place}:{line}" if line else layer.place


def paths(tree: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Every value below the root, as its path and its dotted key, "stages[0].objective.name"; a table before what is in it."""
    todo: list[tuple[KeyPath, str, Any]] = [(path, "", tree)]
    while todo:
        path, key, value = todo.pop()
        if path:
            yield path, key
        for part, child in reversed(_children(value)):
            dotted = f"{key}[{part}]" if isinstance(part, int) else f"{key}.{part}" if path else part
            todo.append(((*path, part), dotted, child))


def _children(value: Any) -> list[tuple[str | int, Any]]:
    return list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())


def named(tree: dict[str, Any]) -> dict[str, KeyPath | None]:
    """{dotted key: path}; None where a quoted key with dots in it makes two paths look the same."""
    found: dict[str, KeyPath | None] = {}
    for path, key in paths(tree):
        found[key] = None if key in found else path
    return found


def lines_of(text: str) -> dict[KeyPath, int]:
    """The line on which each key of a TOML text stands, counted from 1; nothing at all where that is not certain.

    The text is cut into statements, which are read one by one. That this was right is seen by the keys: they must be those of
    the whole text.
    """
    found: dict[KeyPath, int] = {}
    tables: Counter[KeyPath] = Counter()  # of each list of tables
    head: KeyPath = ()
    for number, statement in _statements(text):
        tree = tomllib.loads(statement)
        if not statement.lstrip(" \t").startswith("["):
            for path, _ in paths(tree):
                found.setdefault((*head, *path), number)
            continue
        head = ()
        for part in [part for part in list(paths(tree))[-1][0] if not isinstance(part, int)]:
            head = (*head, part)
            found.setdefault(head, number)
            if tables[head]:
                head = (*head, tables[head] - 1)
        if statement.lstrip(" \t").startswith("[["):
            listed = head[:-1] if isinstance(head[-1], int) else head
            tables[listed] += 1
            head = (*listed, tables[listed] - 1)
            found[head] = number
    try:
        whole = {path for path, _ in paths(tomllib.loads(text))}
    except (ValueError, RecursionError):
        return {}
    return found if found.keys() == whole else {}


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Statements of a TOML text with the numbers of their first lines; an end before that of the text where one is too long."""
    start, held = 1, ""
    for number, line in enumerate(text.split("\n"), 1):
        held = f"{held}\n{line}" if held else line
        try:
            tomllib.loads(held.removesuffix("\r"))
        except (ValueError, RecursionError):  # goes on in the next line
            if number - start >= LONGEST:
                return
            continue
        if held.strip():
            yield start, held.removesuffix("\r")
        start, held = number + 1, ""
