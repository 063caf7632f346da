"""HDF5 files of format 1: written once and whole, read by memory map.

`images` uint8 [N, C, H, W], contiguous and uncompressed; optional `labels` int64 [N], `factors` int64 [N, F] (attribute `names`,
`sizes`), `split` uint8 [N] (0 train, 1 held out). Attributes: format, source, sha256 (of the image bytes), value_range, complete.
While a file is made its images grow in `FILE.partial`, and `FILE.partial.json` says how far they are: a killed preparation goes
on where it stopped, and nothing half-written bears the file's own name. `FILE.lock` keeps a second process from it meanwhile.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core.data import foreign, hdf5
from siv_core.data.hdf5_file import COLUMNS, FORMAT
from siv_core.errors import UserError, one_line
from siv_core.protocols import Progress, Rows
from siv_core.store import files

Block = tuple[int, NDArray[np.uint8]]
Produce = Callable[[list[int]], Iterator[Block]]
Shape = tuple[int, int, int, int]
SLAB = 64 << 20  # bytes that are hashed between two looks at the progress


@frozen(eq=False)
class Table:
    """What a data file holds. `images` is memory-mapped: reading it costs what is touched."""

    images: NDArray[np.uint8]  # [N, C, H, W]
    source: str
    sha256: str
    value_range: tuple[float, float] = (0.0, 1.0)
    labels: NDArray[np.int64] | None = None
    factors: NDArray[np.int64] | None = None
    factor_sizes: dict[str, int] | None = None
    split: NDArray[np.uint8] | None = None


def write(
    path: Path,
    *,
    shape: Shape,
    block: int,
    produce: Produce,
    progress: Progress,
    source: str,
    labels: NDArray[np.int64] | None = None,
    factors: NDArray[np.int64] | None = None,
    factor_sizes: dict[str, int] | None = None,
    split: NDArray[np.uint8] | None = None,
    told: dict[str, Any] | None = None,
    dropped: Callable[[], Sequence[int]] = tuple,
) -> None:
    """Make a data file of `shape` [N, C, H, W] from blocks of `block` rows.

    `produce(numbers)` yields (number, uint8 rows) for the block numbers that are still missing, in any order. `source` says what
    the rows are made from; a partial file of another source starts over. While another process makes the same file this one
    waits, and has nothing left to do afterwards.

    `told` is what `produce` notes of its blocks (JSON by number, as text): kept in the journal, and filled from it. Once all
    blocks are made `dropped()` gives the rows that turned out to be none: they are left out, with their labels, factors, split.
    """
    files.make_folder(path.parent)
    wait = f"waiting for another process that prepares {path.name}"
    with files.alone(path, lambda: progress(wait, 0, 1)) as waited:
        if waited:
            progress(wait, 1, 1)
        files.remove_leftovers(path.parent, f"-{path.name}")
        if not path.exists():
            images = _grow(path, shape, block, produce, progress, source, {} if told is None else told)
            table = Table(images, source, "", (0.0, 1.0), labels, factors, factor_sizes, split)
            _write_whole(path, table, np.setdiff1d(np.arange(shape[0]), np.asarray(dropped(), np.int64)), progress)


def unfinished(path: Path) -> tuple[Path, Path]:
    """The images of an unfinished file, and the journal of its blocks."""
    return path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.json")


def _grow(
    path: Path, shape: Shape, block: int, produce: Produce, progress: Progress, source: str, told: dict[str, Any]
) -> NDArray[np.uint8]:
    """All images, in the partial file, from where an interrupted preparation stopped."""
    partial, journal = unfinished(path)
    count = -(-shape[0] // block)
    row = math.prod(shape[1:])
    key = {"format": FORMAT, "source": source, "shape": list(shape), "block": block}
    there = partial.exists() and partial.stat().st_size == shape[0] * row
    done = _journal(journal, key, count, told) if there else set()
    _need_room(path, 2 * shape[0] * row - len(done) * block * row)
    what = f"preparing {path.name}"
    progress(what, len(done), count)
    with _opened(partial, "r+b" if done else "w+b", shape[0] * row) as file:
        try:
            for number, rows in produce([number for number in range(count) if number not in done]):
                with files.writing(partial):
                    file.seek(number * block * row)
                    file.write(np.ascontiguousarray(rows, dtype=np.uint8).data)
                done.add(number)
                if len(done) % 8 == 0:
                    _note(file, journal, key, done, told)
                progress(what, len(done), count)
        finally:
            _note(file, journal, key, done, told)
    if len(done) < count:
        raise RuntimeError(f"{path}: {count - len(done)} of {count} blocks were not produced")
    return np.memmap(partial, np.uint8, "r", shape=shape)


def _opened(path: Path, mode: str, size: int) -> BinaryIO:
    """A file of this size, to be written: a memory map would end the process, untold, where the disk runs full."""
    with files.writing(path):
        file = cast(BinaryIO, path.open(mode))
        file.truncate(size)
    return file


def _need_room(path: Path, size: int) -> None:
    """A disk that is too small is told of before it is full: the images are there twice when the file itself is written."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        reason = f"making it takes {size / 2**30:,.1f} GiB, its disk has {free / 2**30:,.1f} GiB free"
        raise UserError(f"{one_line(path)}: {reason}; make room there, or set SIV_DATA to a folder on another disk")


def _journal(path: Path, key: dict[str, Any], count: int, told: dict[str, Any]) -> set[int]:
    """The blocks that are on disk, of which `told` is filled; none where the journal is damaged or another file's."""
    try:
        noted = files.read_json(path)
    except UserError:
        return set()
    if not isinstance(noted, dict) or {name: noted.get(name) for name in key} != key:
        return set()
    done, known = noted.get("done"), noted.get("told", {})
    if not isinstance(done, list) or not all(type(n) is int and 0 <= n < count for n in done) or not isinstance(known, dict):
        return set()
    told.update({name: known[name] for name in map(str, done) if name in known})
    return set(done)


def _note(file: BinaryIO, journal: Path, key: dict[str, Any], done: set[int], told: dict[str, Any]) -> None:
    """The images first, then that they are there."""
    with files.writing(journal):
        file.flush()
        os.fsync(file.fileno())
    files.write_json(journal, {**key, "done": sorted(done), **({"told": told} if told else {})})


def _write_whole(path: Path, table: Table, keep: NDArray[np.int64], progress: Progress) -> None:
    """The rows `keep` of the images, and their columns, under the file's own name."""
    import h5py

    temporary = path.with_name(f"{files.TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with h5py.File(temporary, "w") as file:
            digest = _copied(table.images, keep, file, progress, f"writing {path.name}")
            about = {"format": FORMAT, "source": table.source, "sha256": digest, "value_range": table.value_range}
            file.attrs.update(about | {"complete": True})
            if table.labels is not None:
                file.create_dataset("labels", data=table.labels[keep])
            if table.split is not None:
                file.create_dataset("split", data=table.split[keep])
            if table.factors is not None and table.factor_sizes is not None:
                factors = file.create_dataset("factors", data=table.factors[keep])
                factors.attrs["names"] = list(table.factor_sizes)
                factors.attrs["sizes"] = list(table.factor_sizes.values())
        with temporary.open("rb+") as raw:
            os.fsync(raw.fileno())
        for made_of in unfinished(path):  # now, since nobody looks for them once the file is there
            made_of.unlink()
        os.replace(temporary, path)
        files.sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _copied(images: Any, keep: NDArray[np.int64], file: Any, progress: Progress, what: str) -> str:
    """The SHA-256 of these rows, now `images` of an open file. What stays mapped counts as memory: each slab is mapped anew."""
    copy, digest = file.create_dataset("images", (len(keep), *images.shape[1:]), np.uint8), hashlib.sha256()
    slab = max(1, SLAB // max(1, math.prod(images.shape[1:])))
    for start in range(0, len(keep), slab):
        mapped = np.memmap(images.filename, np.uint8, "r", shape=images.shape)
        copy[start : start + slab] = rows = np.ascontiguousarray(mapped[keep[start : start + slab]])
        digest.update(rows.data)
        if len(keep) > slab:
            progress(what, min(start + slab, len(keep)), len(keep))
    return digest.hexdigest()


@frozen(eq=False)
class Looked:
    """What a file holds, as `hdf5_child.look` tells it."""

    facts: dict[str, Any]
    columns: dict[str, NDArray[np.int64]]

    @property
    def native(self) -> bool:
        """Whether it is of format 1."""
        return bool(self.facts["native"])


def look(path: Path, images: str = "images", labels: str = "labels", factors: str = "factors") -> Looked:
    """What `path` holds, found out by a child process, once for each state of the file."""
    return _look(path, images, labels, factors, state(path))


def state(path: Path) -> tuple[int, int, int]:
    """What changes when a file does; a `UserError` where there is none that can be read."""
    try:
        about = path.stat()
    except OSError as error:
        raise UserError(f"{one_line(path)}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(about.st_mode):  # a pipe or a device might never end
        raise UserError(f"{one_line(path)}: is no regular file")
    return about.st_size, about.st_mtime_ns, about.st_ino


@lru_cache(maxsize=8)
def _look(path: Path, images: str, labels: str, factors: str, state: tuple[int, int, int]) -> Looked:
    (facts, _), *rest = hdf5.ask(path, "look", images=images, labels=labels, factors=factors)
    return Looked(facts, {answer["column"]: values for answer, values in rest if values is not None})


def read(path: Path) -> Table:
    """Open a file of format 1. Whatever could lead outside the file, or is not as the format says, is a `UserError`."""
    looked = look(path)
    if not looked.native:
        raise UserError(f"{one_line(path)}: no complete data file of format {FORMAT}; `siv data check` says more")
    facts = looked.facts
    try:  # copy-on-write: torch wants writable memory, the file is never written to
        images: NDArray[np.uint8] = np.memmap(path, np.uint8, "c", offset=facts["offset"], shape=tuple(facts["shape"]))
    except (OSError, ValueError) as error:
        raise UserError(f"{one_line(path)}: its images cannot be mapped into memory ({error})") from error
    labels, factors, split = (values if values is None else values.copy() for values in map(looked.columns.get, COLUMNS))
    low, high = facts["value_range"]
    short = None if split is None else split.astype(np.uint8)
    return Table(images, facts["source"], facts["sha256"], (low, high), labels, factors, facts["factor_sizes"], short)


def verify(path: Path, progress: Progress) -> None:
    """A `UserError` where the images of a file of format 1 are not those it was written with; once for each state of the file."""
    key = (str(path), *state(path))
    if key in _verified:
        return
    table, what = read(path), f"checking the sha256 of {one_line(path.name)}"
    flat, digest = table.images.reshape(-1).data, hashlib.sha256()
    for start in range(0, len(flat), SLAB):
        progress(what, start, len(flat))
        digest.update(flat[start : start + SLAB])
    progress(what, len(flat), len(flat))
    if digest.hexdigest() != table.sha256:
        reason = f"damaged or changed, the images' sha256 is {digest.hexdigest()}, the file was written with {table.sha256}"
        raise UserError(f"{one_line(path)}: {reason}; remove it, so that it is made again")
    _verified.add(key)


_verified: set[tuple[str, int, int, int]] = set()


def held_out_groups(group: NDArray[np.int64], held_out: int, seed: int) -> list[int]:
    """The chosen values of `group`, in order."""
    values = np.unique(group)
    if not 0 < held_out < len(values):
        raise UserError(f"{held_out} of {len(values)} groups cannot be held out: at least one must stay on either side")
    chosen = np.random.Generator(np.random.PCG64(seed)).choice(values, held_out, replace=False)
    return sorted(chosen.tolist())


def rows_by_group(table: Table, group: NDArray[np.int64], held_out: int, seed: int, split: str) -> Rows:
    """A split of rows where whole groups (the values of `group` [N]) are held out: `held_out` of them, by a seeded choice.

    The choice depends on the values, the number and the seed alone, so that it is the same for every size of the images.
    """
    import torch

    inside = np.isin(group, held_out_groups(group, held_out, seed))
    index = np.flatnonzero({"train": ~inside, "held_out": inside}[split])
    labels, factors = (None if array is None else torch.from_numpy(array) for array in (table.labels, table.factors))
    return Rows(torch.from_numpy(table.images), labels, factors, torch.from_numpy(index))


def check(path: Path, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """What is in an HDF5 file after reading every byte of it; what makes it unusable is in the list `problems`.

    `datasets` has a line for each data set and link. Of format 1 there is what training would be told as well; of other files
    the options of the data set `hdf5` that would read them.
    """
    report: dict[str, Any] = {"path": str(path), "kind": "HDF5", "format": None, "datasets": [], "problems": []}
    try:
        looked = _surveyed(path, report, progress)
    except UserError as error:
        report["problems"] += error.problems
        return report
    if looked:
        report["format"] = FORMAT
        _check_format_1(path, report, progress)
    else:
        _check_foreign(path, report)
    return report


def _surveyed(path: Path, report: dict[str, Any], progress: Progress) -> bool:
    """Fill in `datasets` and what leads outside or cannot be read; whether the file is of format 1."""
    native = False
    state(path)
    for answer, _ in hdf5.ask(path, "survey"):
        if "what" in answer:
            progress(answer["what"], answer["done"], answer["total"])
        elif "native" in answer:
            native = answer["native"]
        else:
            report["datasets"].append(answer)
            if answer.get("problem"):
                report["problems"].append(f"{one_line(path)}: '{one_line(answer['name'])}' {answer['problem']}")
    return native


def _check_format_1(path: Path, report: dict[str, Any], progress: Progress) -> None:
    try:
        table = read(path)
    except UserError as error:
        report["problems"] += [problem for problem in error.problems if problem not in report["problems"]]
        return
    try:
        verify(path, progress)
    except UserError as error:
        report["problems"] += error.problems
    report |= {
        "images": list(table.images.shape),
        "value_range": list(table.value_range),
        "source": table.source,
        "sha256": table.sha256,
        "factors": table.factor_sizes or {},
        "classes": None if table.labels is None else int(table.labels.max()) + 1,
        "held_out": None if table.split is None else int(table.split.sum()),
        "lowest": int(table.images.min()),
        "highest": int(table.images.max()),
    }


def _check_foreign(path: Path, report: dict[str, Any]) -> None:
    """Which data sets the data set `hdf5` could take for images, and why it could not."""
    able, reasons = [], []
    for entry in report["datasets"]:
        why, more = _as_images(entry)
        if why is None:
            able.append(f'path = "{one_line(path)}", images = "{one_line(entry["name"])}"{more}')
        elif not entry.get("problem"):
            reasons.append(f"{one_line(path)}: '{one_line(entry['name'])}' cannot be images: {why}")
    report["options"] = able
    if not able:
        report["problems"] += reasons or ([] if report["problems"] else [f"{one_line(path)}: holds no data sets at all"])
    by_name = {entry["name"]: entry for entry in report["datasets"]}
    if "images" in by_name and _as_images(by_name["images"])[0] is None:
        report["problems"] += [problem for problem in _columns_of(path, by_name["images"]) if problem not in report["problems"]]


def _columns_of(path: Path, images: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the labels and factors that go with these images."""
    order = foreign.order_of(images["shape"], images["axes"])
    try:
        columns = look(path).columns
    except UserError as error:
        yield from error.problems
        return
    for name, values in columns.items() if order else ():
        n = images["shape"][(order or "").index("N")]
        if len(values) != n:
            yield f"{one_line(path)}: 'images' {foreign.unequal(n, name, len(values), name)}"


def _as_images(entry: dict[str, Any]) -> tuple[str | None, str]:
    """(why these are no images, "") or (None, the options of the data set `hdf5` that read them)."""
    shape, dtype = entry.get("shape", []), entry.get("dtype", "")
    if entry.get("problem"):
        return entry["problem"], ""
    if len(shape) not in (3, 4) or not all(shape):
        return f"they have 3 or 4 axes and are not empty, it is {shape}", ""
    if entry["kind"] not in "uifb":
        return f"they are numbers, it is {dtype}", ""
    if entry.get("not_finite"):
        return f"{entry['not_finite']} of its values are not finite", ""
    given, low, high = foreign.agreed_range(entry), entry["lowest"], entry["highest"]
    fits = given is not None and given[0] <= low and high <= given[1]
    value_range = "" if fits else f", {foreign.range_option(low, high)}"
    layout = foreign.order_of(shape, entry["axes"])
    return None, f'{value_range}, layout = "{layout}"' if layout else f"{value_range}, and a layout, which cannot be told"
