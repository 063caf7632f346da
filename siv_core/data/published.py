"""Sets of small images that were published as a few files: what the files are called, finding and reading them, and what tells
them from the published ones.

A set is data: `Known`, with the `Form`s that it was published in. Nothing here belongs to one set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from siv_core.data import archives, download
from siv_core.errors import UserError, one_line
from siv_core.protocols import Progress

MOST_IN_A_FILE = 1 << 30  # EMNIST's images by class have 547 MB
MOST_DOWNLOADED = 4 << 30
SPLITS = ("train", "held_out")

Bytes = NDArray[np.uint8]
Content = dict[str, Any]  # of one file: "images" uint8 [n, C, H, W], and int64 [n] by the name of a factor
Read = Callable[[bytes], Content]  # a ValueError says what is wrong with a file


@frozen
class File:
    name: str
    read: Read = field(eq=False)
    md5: str = ""  # of what is in it, "" where it is not known
    packed: str = ""  # of the .gz that is published

    @property
    def spellings(self) -> list[str]:
        """Names that people have it under; whether it is packed tell its bytes."""
        names = dict.fromkeys((self.name, self.name.replace("-idx", ".idx")))
        return [name + ending for name in names for ending in (("", ".gz") if "idx" in name else ("",))]


@frozen
class Form:
    """One of the forms a set is published in: files in a folder, perhaps in an archive too."""

    folders: tuple[str, ...]  # below the data root
    train: tuple[File, ...]
    held_out: tuple[File, ...]
    url: str  # of the archive, or of the folder that the files are in
    archive: str = ""
    inside: str = ""  # the folder in the archive that has the files
    md5: str = ""  # of the archive

    @property
    def files(self) -> tuple[File, ...]:
        return (*self.train, *self.held_out)


@frozen
class Known:
    name: str
    title: str
    shape: tuple[int, int, int]
    factors: dict[str, int]  # the first one is the label
    counts: tuple[int, int]  # published images of train and held_out
    forms: tuple[Form, ...]  # as they are looked for; the first one is fetched
    paper: str


@frozen
class Found:
    form: Form
    place: Path  # the folder, or the archive
    paths: dict[str, Path]  # by the file's name; empty of an archive


def there_is(folder: Path, file: File) -> Path | None:
    return next((folder / name for name in file.spellings if (folder / name).is_file()), None)


def places(form: Form, base: Path, *, here: bool) -> list[Path]:
    """Folders in which the files of a form are looked for; `here`: in `base` itself too."""
    return [*([base] if here else []), *(base / name for name in form.folders)]


def find(known: Known, base: Path, *, here: bool = False) -> Found | None:
    """The first form of the set that is whole, in a folder or as an archive."""
    for form in known.forms:
        folders = places(form, base, here=here)
        for folder in folders:
            paths = {file.name: path for file in form.files if (path := there_is(folder, file))}
            if len(paths) == len(form.files):
                return Found(form, folder, paths)
        for folder in (base, *folders) if form.archive else ():
            if (folder / form.archive).is_file():
                return Found(form, folder / form.archive, {})
    return None


def lacking(known: Known, base: Path, *, here: bool = False) -> str:
    """What is missing of a set that is not whole, where it was looked for, and what brings it."""
    forms, begun = [], []
    for form in known.forms:
        names = ", ".join(file.name for file in form.files)
        packed = " (packed as .gz or not)" if any("idx" in file.name for file in form.files) else ""
        forms.append(f"{names}{packed}{f', or {form.archive} with them' if form.archive else ''}")
        for folder in places(form, base, here=here):
            absent = [file.name for file in form.files if not there_is(folder, file)]
            if len(absent) < len(form.files):
                begun.append(f"{one_line(folder)} has not all of its files: {', '.join(absent)} is missing")
    folders = dict.fromkeys(name for form in known.forms for name in form.folders if name)
    where = f"{'in' if here else 'below'} {one_line(base)}{' and below it' if here else ''} in {', '.join(folders)}"
    told = f"the files of {known.title} are not at hand{''.join(f'; {one}' for one in begun)}: run `siv data fetch {known.name}`"
    return f"{told}, or put {'; or '.join(forms)} into {one_line(base / next(iter(folders)))}; looked for {where}"


def fetch(known: Known, folder: Path, progress: Progress) -> None:
    """Download the first form of a set into this folder, what is there already left out."""
    form = known.forms[0]
    if form.archive:
        download.fetch(form.url + form.archive, folder / form.archive, form.md5, MOST_DOWNLOADED, progress)
        return
    for file in form.files:
        name = f"{file.name}.gz" if file.packed else file.name
        download.fetch(form.url + name, folder / name, file.packed or file.md5, MOST_DOWNLOADED, progress)


def stored(found: Found, progress: Progress) -> Iterator[tuple[File, str, bytes, bool]]:
    """(file, where it is, its bytes as they are stored, whether it comes from the archive that was published)."""
    if found.paths:
        for number, file in enumerate(found.form.files):
            if file.name in found.paths:
                path = found.paths[file.name]
                progress(f"reading {one_line(path.name)}", number, len(found.form.files))
                yield file, one_line(path), archives.read(path, MOST_IN_A_FILE), False
        return
    name, by_name = one_line(found.place), {name: file for file in found.form.files for name in file.spellings}
    with found.place.open("rb") as opened:
        progress(f"checking the MD5 of {one_line(found.place.name)}", 0, 1)
        published = hashlib.file_digest(opened, "md5").hexdigest() == found.form.md5

        def wanted(path: PurePosixPath) -> bool:
            return path.name in by_name and path.parent.name == found.form.inside

        members: Iterator[tuple[str, bytes]]
        if found.form.archive.endswith(".zip"):
            members = archives.zipped(opened, name, wanted, MOST_IN_A_FILE)
        else:
            members = ((one, data) for one, _, data in archives.tar_gz(opened, name, wanted, MOST_IN_A_FILE, wanted))
        left = {file.name for file in found.form.files}
        while left:  # what comes after the last of them need not be unpacked
            member, data = next(members, ("", b""))
            if not member:
                return
            file = by_name[member]
            progress(f"reading {name}: {member}", len(found.form.files) - len(left), len(found.form.files))
            left.discard(file.name)
            yield file, f"{name}: {member}", data, published


def unpacked(raw: bytes) -> bytes:
    return archives.inflated(raw, MOST_IN_A_FILE) if raw.startswith(archives.GZIP) else raw


def difference(file: File, raw: bytes, data: bytes) -> str:
    """What tells this file from the published one, "" where it is that by its digest."""
    if file.md5:
        actual = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return "" if actual == file.md5 else f"{file.name} is not the published one (its MD5 is {actual}, that has {file.md5})"
    if file.packed and hashlib.md5(raw, usedforsecurity=False).hexdigest() == file.packed:
        return ""
    what = ".gz" if file.packed else "archive"
    return f"whether {file.name} is the published one is not known (only the published {what} has a known MD5)"


class Loaded(NamedTuple):
    images: list[Bytes]  # pieces [n, C, H, W], views of the files' bytes
    factors: NDArray[np.int64]  # [N, F]
    split: Bytes  # [N]
    notes: list[str]
    digest: str  # of all files


def load(known: Known, found: Found, progress: Progress) -> Loaded:
    """All of a set. A `UserError` tells all that is wrong with its files."""
    held: dict[str, Content] = {}
    problems, notes, digest, remedy = list[str](), list[str](), hashlib.sha256(), f"get it again: `siv data fetch {known.name}`"
    for file, where, raw, published in stored(found, progress):
        try:
            data = unpacked(raw)
            held[file.name] = file.read(data)
        except ValueError as error:
            problems.append(f"{where}: cannot be read as {known.title}'s {file.name}: {one_line(error)}; {remedy}")
            continue
        digest.update(hashlib.sha256(data).digest())
        told = "" if published else difference(file, raw, data)
        notes += [told] if told else []
    unread = [file.name for file in found.form.files if file.name not in held]
    if not problems and unread:
        problems = [f"{one_line(found.place)}: {name} is not in it; {remedy}" for name in unread]
    if problems:
        raise UserError(problems)
    parts = [joined(known, [held[file.name] for file in files], split) for split, files in splits(found.form)]
    problems = [f"{one_line(found.place)}: {problem}; {remedy}" for _, _, told in parts for problem in told]
    if problems:
        raise UserError(problems)
    counts = [len(factors) for _, factors, _ in parts]
    pairs = zip(SPLITS, counts, known.counts, strict=True)
    notes += [f"its part {split} has {n:,} images, the published one {of:,}" for split, n, of in pairs if n != of]
    return Loaded(
        [piece for images, _, _ in parts for piece in images],
        np.concatenate([factors for _, factors, _ in parts]),
        np.repeat(np.arange(2, dtype=np.uint8), counts),
        notes,
        digest.hexdigest()[:12],
    )


def splits(form: Form) -> Iterator[tuple[str, tuple[File, ...]]]:
    return zip(SPLITS, (form.train, form.held_out), strict=True)


def joined(known: Known, held: Sequence[Content], split: str) -> tuple[list[Bytes], NDArray[np.int64], list[str]]:
    """Images and factors [n, F] of a split out of its files, and what is wrong with them."""
    images = [content["images"] for content in held if "images" in content]
    count, problems = sum(map(len, images)), []
    columns = {name: np.concatenate([content[name] for content in held if name in content]) for name in known.factors}
    other = [list(piece.shape[1:]) for piece in images if piece.shape[1:] != known.shape]
    if other:
        problems.append(f"its images of '{split}' are {other[0]}, those of {known.title} {list(known.shape)}")
    if not count:
        problems.append(f"there are no images in its part '{split}'")
    for name, values in columns.items():
        classes = known.factors[name]
        if len(values) != count:
            problems.append(f"its part '{split}' has {count:,} images and {len(values):,} of '{name}'")
        elif count and not (values.min() >= 0 and values.max() < classes):
            problems.append(
                f"'{name}' in its part '{split}' goes from {values.min()} to {values.max()}, 0 … {classes - 1} are known"
            )
    return images, np.stack(list(columns.values()), axis=1) if not problems else np.zeros((0, 0), np.int64), problems


def rows_between(pieces: Sequence[Bytes], start: int, stop: int) -> Bytes:
    """Rows of pieces that lie one after the other."""
    taken = []
    for piece in pieces:
        taken.append(piece[max(0, start) : max(0, stop)])
        start, stop = start - len(piece), stop - len(piece)
    return np.concatenate(taken)


# -- `siv data check` ------------------------------------------------------------------------------------------------------------


def check(sets: Sequence[Known], path: Path, progress: Progress) -> dict[str, Any] | None:
    """What the files of these sets at `path` hold, a folder, an archive or one of them, after reading them all; None of a path
    without any. Sets of the same file names are told apart by digests, then by the path's own name."""
    groups: dict[tuple[str, ...], list[tuple[Known, Form]]] = {}
    for known in sets:
        for form in known.forms:
            groups.setdefault(tuple(file.name for file in form.files), []).append((known, form))
    held = [(group, found) for group in groups.values() for found in _seen(group[0][1], path)]
    if not held:
        return None
    report: dict[str, Any] = {"path": str(path), "kind": "", "datasets": [], "problems": []}
    titles = [_survey(group, found, report, progress) for group, found in held]
    return report | {"kind": "files of " + ", ".join(dict.fromkeys(titles))}


def _seen(form: Form, path: Path) -> Iterator[Found]:
    """What of a form is at a path, whole or not."""
    if not path.is_dir():
        paths = {file.name: path for file in form.files if path.name in file.spellings}
        if path.name == form.archive or (paths and _telling(form, path.parent)):
            yield Found(form, path, paths)
        return
    below = (Path(*parts[start:]) for parts in (Path(name).parts for name in form.folders) for start in range(len(parts)))
    for folder in dict.fromkeys((path, *(path / name for name in below))):
        paths = {file.name: there for file in form.files if (there := there_is(folder, file))}
        if paths and _telling(form, folder):
            yield Found(form, folder, paths)


def _telling(form: Form, folder: Path) -> bool:
    """Whether these names can be nothing else: anybody may have a file that is called `train`."""
    return folder.name == form.inside or not {file.name.removesuffix(".bin") for file in form.files} <= {"train", "test"}


def _survey(group: Sequence[tuple[Known, Form]], found: Found, report: dict[str, Any], progress: Progress) -> str:
    """A line in the report for each file, what is wrong with it and what is missing beside it; of which set the files are."""
    problems: list[str] = report["problems"]
    raw: dict[str, tuple[str, bytes, dict[str, str]]] = {}  # where it is, what is in it, what tells it from each set's file
    try:
        for file, where, data, published in stored(found, progress):
            raw[file.name] = (where, b"", {})
            try:
                plain = unpacked(data)
            except ValueError as error:
                problems.append(f"{where}: {one_line(error)}")
                continue
            told = {known.title: "" if published else difference(_named(form, file.name), data, plain) for known, form in group}
            raw[file.name] = (where, plain, told)
    except UserError as error:
        problems += error.problems
    same = {title for _, _, told in raw.values() for title, note in told.items() if not note}
    chosen = (
        [one for one in group if one[0].title in same] or [one for one in group if _named_in(one[0], found.place)] or [*group]
    )
    known, form = chosen[0]
    held: dict[str, Content] = {}
    for name, (where, plain, told) in raw.items():
        try:
            held[name] = _named(form, name).read(plain) if told else {}
        except ValueError as error:
            problems.append(f"{where}: {one_line(error)}")
        note = told.get(known.title) or "as published"
        report["datasets"] += [_line(f"{name}: {what}", values, note) for what, values in held.get(name, {}).items()]
    if found.place.is_dir() or not found.paths:
        problems += [f"{one_line(found.place)}: {file.name} is missing" for file in form.files if file.name not in raw]
        if all(held.get(file.name) for file in form.files):
            parts = [joined(known, [held[file.name] for file in files], split)[2] for split, files in splits(form)]
            problems += [f"{one_line(found.place)}: {problem}" for told_of in parts for problem in told_of]
    return " or ".join(dict.fromkeys(one.title for one, _ in chosen))


def _named(form: Form, name: str) -> File:
    return next(file for file in form.files if file.name == name)


def _named_in(known: Known, place: Path) -> bool:
    parts = place.parts[-3:]
    return any(part.lower().replace("-", "").replace("_", "") == known.name.replace("_", "") for part in parts)


def _line(name: str, values: NDArray[Any], note: str) -> dict[str, Any]:
    extent = (int(values.min()), int(values.max())) if values.size else ("", "")
    return {
        "name": name,
        "shape": list(values.shape),
        "dtype": str(values.dtype),
        "storage": note,
        "lowest": extent[0],
        "highest": extent[1],
    }
