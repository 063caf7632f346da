"""Names and values of a sweep as text: for TOML, for people, for folders."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

LONGEST_NAME = 120  # letters of a trial's folder; file systems take 255 bytes


def toml(value: Any) -> str:
    """A TOML value on one line."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        keys = {key: key if re.fullmatch(r"[\w-]+", key, re.ASCII) else toml(key) for key in value}
        return "{" + ", ".join(f"{keys[key]} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def shown(value: Any) -> str:
    """A value as a person writes it, without quotes; a component by its name."""
    if isinstance(value, dict):
        rest = [f"{key} {shown(item)}" for key, item in value.items() if key != "name"]
        return " ".join(filter(None, [str(value.get("name", "")), *rest]))
    if isinstance(value, (list, tuple)):
        return "-".join(map(shown, value))
    return value if isinstance(value, str) else json.dumps(value)


def last(key: str) -> str:
    return key.rpartition(".")[2]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last word of each dotted key, or the whole key where two end alike."""
    ends = [last(key) for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def folder_name(text: str) -> str:
    """Safe on any file system and in a shell: other letters become `-`, and a long name ends in a digest."""
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "-", text).strip("-.") or "trial"
    if len(safe) <= LONGEST_NAME:
        return safe
    return f"{safe[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
