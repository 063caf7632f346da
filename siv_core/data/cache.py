"""What the data root holds and can be made again: conversions of foreign files, and preparations that did not come to their end.

A conversion is `hdf5/STEM-PLACE-STATE-HOW.h5`, named by digests of where its source lies, of the state that it was in, and of the
options it was read with; of pictures it lies in a folder of its data set's name. `NAME.from.json` beside it says where the source
lies, and of pictures what came of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import frozen

from siv_core.data import datafile, picture_list
from siv_core.errors import UserError, one_line
from siv_core.store import files

FOLDER = "hdf5"
NAME = re.compile(r"(?P<source>.*-[0-9a-f]{8})-(?P<state>[0-9a-f]{8})-[0-9a-f]{8}\.h5", re.DOTALL)
EARLIER = re.compile(r".*-[0-9a-f]{16}\.h5", re.DOTALL)  # siv 0.1's


@frozen
class Leftover:
    """Files that nobody will read again, and why."""

    paths: tuple[Path, ...]
    reason: str

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths if path.exists())

    def remove(self) -> str:
        """What was removed, in words."""
        size = self.size
        for path in self.paths:
            if path.exists():
                files.remove(path)
        return f"removed {one_line(self.paths[0])} ({megabytes(size)}): {self.reason}"


def conversion(source: Path, how: str, folder: str = FOLDER, state: str = "") -> Path:
    """Where the conversion of this file, as it is now, is kept; of pictures with the `state` of their listing."""
    state = (state or hashlib.sha256(repr(datafile.state(source)).encode()).hexdigest())[:8]
    place = hashlib.sha256(os.path.abspath(source).encode(errors="surrogateescape")).hexdigest()[:8]
    return files.data_root() / folder / f"{source.stem[:60]}-{place}-{state}-{how}.h5"


def note(path: Path, source: Path, state: str = "", **more: Any) -> None:
    """Say what the conversion `path` is made from, and more; by who makes it, while it keeps others away."""
    files.make_folder(path.parent)
    known = [state] if state else list(datafile.state(source))
    files.write_json(_beside(path), {"source": os.path.abspath(source), "state": known, **more})


def noted(path: Path) -> dict[str, Any]:
    """What is said of a conversion; nothing where that is gone or damaged."""
    try:
        about = files.read_json(_beside(path))
    except UserError:
        return {}
    return about if isinstance(about, dict) else {}


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.from.json")


def _all_of(path: Path) -> tuple[Path, ...]:
    """A conversion, whole or not, and what lies beside it."""
    return (path, *datafile.unfinished(path), _beside(path))


def discard(path: Path) -> None:
    """Take away a conversion that was refused."""
    for one in _all_of(path):
        one.unlink(missing_ok=True)


def remove_superseded(path: Path) -> list[str]:
    """Take away conversions of what the source of `path` was before; a sentence for each. Nothing of another name is touched."""
    own = NAME.fullmatch(path.name)
    assert own
    others = {match[0] for entry in path.parent.iterdir() if (match := NAME.match(entry.name)) and _belongs(entry.name, match[0])}
    old = [
        path.with_name(name)
        for name in sorted(others)
        if (match := NAME.fullmatch(name)) and match["source"] == own["source"] and match["state"] != own["state"]
    ]
    return [
        Leftover(_all_of(one), f"of an earlier state of the same {'file' if path.parent.name == FOLDER else 'pictures'}").remove()
        for one in old
        if not _busy(one)
    ]


def _belongs(name: str, conversion: str) -> bool:
    """Whether a file of this name is a conversion or lies beside it."""
    return name in {path.name for path in _all_of(Path(conversion))}


def _busy(path: Path) -> bool:
    """Whether a process is making this file."""
    lock = path.with_name(f"{path.name}.lock")
    if not lock.exists():
        return False
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def leftovers(root: Path) -> Iterator[Leftover]:
    """What `siv data clean` takes away: nobody is at work on it, and all of it can be made again. What does not bear a name of
    ours, or was not made by a conversion, is somebody's own."""
    for entry in sorted(root.glob("*/*.h5")):
        of_files = entry.parent.name == FOLDER
        ours = NAME.fullmatch(entry.name) if of_files or _beside(entry).exists() else None
        ours = ours or (EARLIER.fullmatch(entry.name) if of_files else None)
        reason = _outdated(entry) if ours and not entry.name.startswith(files.TEMPORARY) and not _busy(entry) else None
        if reason:
            yield Leftover(_all_of(entry), reason)
    for entry in sorted(root.glob("*/*.h5.from.json")):
        path = entry.with_name(entry.name.removesuffix(".from.json"))
        if NAME.fullmatch(path.name) and not any(one.exists() for one in _all_of(path)[:-1]) and not _busy(path):
            yield Leftover((entry,), "of a conversion that was never begun")
    for entry in sorted(root.glob("*/*.h5.partial")):
        path = entry.with_suffix("")
        known = datafile.unfinished(path)[1].exists() or _beside(path).exists()
        if known and not path.exists() and not _busy(path):
            yield Leftover(_all_of(path)[1:], "a preparation that did not come to its end; the next one would go on with it")


def _outdated(path: Path) -> str | None:
    """Why this conversion is not read again, or None."""
    if not _beside(path).exists():
        try:
            converted = str(datafile.look(path).facts.get("source", "")).startswith("converted from ")
        except UserError:
            converted = False
        return "a conversion by an earlier siv" if converted else None
    try:
        about = files.read_json(_beside(path))
        source, state = Path(about["source"]), tuple(about["state"])
    except (UserError, KeyError, TypeError):
        return None  # whose it is cannot be told
    try:
        now = datafile.state(source) if path.parent.name == FOLDER else (picture_list.state(source),)
    except UserError:
        return f"its source {one_line(source)} is gone"
    return None if now == state else f"its source {one_line(source)} has changed"


def sizes(root: Path) -> dict[str, int]:
    """Bytes in each folder of the data root."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    return {folder.name: sum(one.stat().st_size for one in folder.rglob("*") if one.is_file()) for folder in folders}


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
