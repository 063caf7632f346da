"""Which pictures lie at a place: a folder with all that is in it, a zip file, or an LMDB of encoded pictures.

A folder or a zip is listed by names [a/b.png] in the order of their code points; of an LMDB the keys are the names. `state` is
what changes when a picture does: a digest of names, sizes and times of a folder, size, time and inode of a file. Nothing is
unpacked to disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from attrs import frozen

from siv_core.data import datafile
from siv_core.data.picture import SUFFIXES
from siv_core.errors import UserError, one_line

MOST_OF_A_PICTURE = 256 << 20  # bytes, unpacked
MOST_IN_ALL = 64 << 20  # bytes that a zip may unpack to, beside
MOST_TIMES_SMALLER = 100  # so many times its own size: pictures are compressed already
LMDB = "data.mdb"


class Entry(NamedTuple):
    """A picture: its name, and its size in bytes and time of change where they are known beforehand, else −1 and 0."""

    name: str
    size: int = -1
    time: int = 0


@frozen(eq=False)
class Listing:
    place: Path
    kind: str  # "folder", "zip" or "lmdb"
    state: str
    entries: Sequence[Entry]
    others: Sequence[str] = ()  # names of what lies there and is no picture; a folder without any ends with a slash


def kind_of(place: Path) -> str:
    """What lies there; a `UserError` for what pictures are not read from."""
    if place.is_dir():
        return "lmdb" if (place / LMDB).exists() else "folder"
    if place.is_file() and zipfile.is_zipfile(place):
        return "zip"
    reason = "is neither a folder nor a zip file" if place.exists() else "there is no such folder or zip file"
    raise UserError(f"{one_line(place)}: {reason}")


def listed(place: Path) -> Listing:
    """All pictures of a folder or a zip file, with those in its folders; a `UserError` where there is none."""
    kind = kind_of(place)
    if kind == "lmdb":
        raise UserError(f"{one_line(place)}: is an LMDB, not a folder of pictures")
    found = _of_zip(place) if kind == "zip" else _of_folder(place)
    if not found.entries:
        left = left_out(found.others)
        told = f"no pictures in this {kind} ({', '.join(SUFFIXES)}){f'; it has {left}' if left else ''}"
        raise UserError(f"{one_line(place)}: {told}")
    return found


def state(place: Path) -> str:
    """The state of what lies there now, without its pictures being read."""
    kind = kind_of(place)
    if kind == "folder":
        return _of_folder(place).state
    return _digest(repr(datafile.state(place / LMDB if kind == "lmdb" else place)))


def is_picture(name: str) -> bool:
    """By its ending."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def hidden(name: str) -> bool:
    """macOS's shadows of pictures, and what else is not meant to be seen."""
    return name.startswith(".") or name == "__MACOSX"


def left_out(names: Sequence[str]) -> str:
    """Counts and names of what is no picture; "" of nothing."""
    folders, others = [name for name in names if name.endswith("/")], [name for name in names if not name.endswith("/")]
    told = []
    for found, one, more in (
        (folders, "folder without pictures", "folders without pictures"),
        (others, "file of another ending", "files of other endings"),
    ):
        if found:
            shown = ", ".join(map(one_line, found[:3])) + (", …" if len(found) > 3 else "")
            told.append(f"{len(found):,} {one if len(found) == 1 else more} ({shown})")
    return " and ".join(told)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


# -- folders ---------------------------------------------------------------------------------------------------------------------


def _of_folder(place: Path) -> Listing:
    entries: list[Entry] = []
    others: list[str] = []
    _scan(os.fspath(place), "", (), entries, others)
    entries.sort()
    lines = "".join(f"{entry.name}\0{entry.size}\0{entry.time}\n" for entry in entries)
    return Listing(place, "folder", _digest(lines), entries, sorted(others))


def _scan(folder: str, prefix: str, above: tuple[tuple[int, int], ...], entries: list[Entry], others: list[str]) -> None:
    """What lies in a folder and in those in it; links are followed, but never round in a circle."""
    before = len(entries)
    try:
        about = os.stat(folder)
        here = (*above, (about.st_dev, about.st_ino))
        if here[-1] in above:
            raise UserError(f"{one_line(folder)}: is a link to a folder that it lies in; take it away")
        with os.scandir(folder) as found:
            inside = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{one_line(folder)}: this folder cannot be read ({error.strerror})") from error
    for entry in inside:
        name = prefix + entry.name
        if hidden(entry.name):
            continue
        if entry.is_dir():
            _scan(entry.path, f"{name}/", here, entries, others)
        elif is_picture(name):
            entries.append(_entry(entry, name))
        else:
            others.append(name)
    if prefix and len(entries) == before:
        others[:] = [*(name for name in others if not name.startswith(prefix)), prefix]


def _entry(entry: os.DirEntry[str], name: str) -> Entry:
    """With its size and time; a pipe or a link that leads nowhere has neither, and is told of where it is read."""
    try:
        about = entry.stat()
    except OSError:
        return Entry(name)
    return Entry(name, about.st_size, about.st_mtime_ns) if stat.S_ISREG(about.st_mode) else Entry(name)


# -- zip files -------------------------------------------------------------------------------------------------------------------


def _of_zip(place: Path) -> Listing:
    where = one_line(place)
    state = _digest(repr(datafile.state(place)))
    try:
        with zipfile.ZipFile(place) as opened:
            members = opened.infolist()
    except Exception as error:  # whatever a damaged directory makes the reader run into
        raise UserError(f"{where}: cannot be read as a zip file ({one_line(error)[:300]}); get it again") from error
    problems = list(_zip_problems(where, members, place.stat().st_size))
    if problems:
        raise UserError([*problems[:20], *([f"{where}: … and {len(problems) - 20:,} more"] if len(problems) > 20 else [])])
    seen = [member for member in members if not member.is_dir() and not any(map(hidden, member.filename.split("/")))]
    entries = sorted(Entry(member.filename, member.file_size) for member in seen if is_picture(member.filename))
    others = sorted(member.filename for member in seen if not is_picture(member.filename))
    return Listing(place, "zip", state, entries, others)


def _zip_problems(where: str, members: Sequence[zipfile.ZipInfo], size: int) -> Iterator[str]:
    """What no zip of pictures has, and one that is out to do harm may have."""
    for name, times in Counter(member.filename for member in members).items():
        if times > 1:
            yield f"{where}: {one_line(name)} is in it {times} times; zip the pictures anew"
    for member in members:
        name, kind = member.orig_filename, member.external_attr >> 16
        parts = name.removesuffix("/").split("/")
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or {"", ".", ".."} & set(parts) or set(name) & {"\\", "\0"}:
            yield f"{where}: {one_line(name)} is no plain path inside the zip; zip the pictures anew"
        elif stat.S_ISLNK(kind):
            yield f"{where}: {one_line(name)} is a link; zip the pictures themselves"
        elif member.flag_bits & 1:
            yield f"{where}: {one_line(name)} is encrypted; unpack it and give the folder"
        elif member.file_size > MOST_OF_A_PICTURE:
            yield f"{where}: {one_line(name)} unpacks to {member.file_size >> 20:,} MiB; no picture takes that"
    total = sum(member.file_size for member in members)
    if total > MOST_IN_ALL + MOST_TIMES_SMALLER * size:
        yield f"{where}: has {size:,} bytes and unpacks to {total:,}, far more than pictures do"
