"""Pictures to a data file of format 1: the one way in which folders, zips and LMDBs of pictures are prepared and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core.data import datafile, picture_pool
from siv_core.data.picture import SUFFIXES, Fitting
from siv_core.data.picture_classes import arrange
from siv_core.data.picture_list import Entry, Listing, left_out, listed
from siv_core.errors import UserError, one_line
from siv_core.protocols import Progress

MOST_IN_BLOCK, BLOCK_BYTES = 512, 8 << 20  # pictures decoded at a time, and what they may take encoded or as images
MOST_TOLD = 200  # problems that are told one by one


@frozen
class Facts:
    """What came of pictures: how many are images now, what was done to how many, the smallest and the largest, the damaged."""

    images: int
    changes: dict[str, int]
    sizes: tuple[str, ...]
    damaged: dict[str, str]  # name -> why it is left out


def write(
    path: Path,
    place: Path,
    kind: str,
    entries: Sequence[Entry],
    fitting: Fitting,
    *,
    source: str,
    progress: Progress,
    damaged: str = "error",
    labels: NDArray[np.int64] | None = None,
    split: NDArray[np.uint8] | None = None,
    before: Callable[[Facts], None] = lambda facts: None,
) -> None:
    """Make the data file `path` of these pictures, a row each, in their order; interrupted, it goes on where it stopped.

    `damaged` "error": after all were looked at, a `UserError` with every picture that cannot be read; what is done is kept for
    the next time. "skip": they are left out, with their labels and splits. `before` is told what came of it, just before the
    file is there. A picture that is no longer as it was listed is a `UserError`: the place has changed meanwhile.
    """
    shape = (len(entries), fitting.channels, fitting.size, fitting.size)
    block, told = _block_size(entries, shape), dict[str, Any]()

    def rows_of(number: int) -> Sequence[Entry]:
        return entries[number * block : (number + 1) * block]

    def tick() -> None:
        progress(f"preparing {path.name}", len(told), -(-len(entries) // block))

    def produce(numbers: list[int]) -> Iterator[datafile.Block]:
        answers = picture_pool.decoded(place, kind, rows_of, numbers, fitting, tick)
        return _blocks(answers, place, told, refuse=damaged == "error")

    def dropped() -> list[int]:
        gone = {int(number) * block + int(i): why for number, one in told.items() for i, why in one.get("damaged", {}).items()}
        if len(gone) == len(entries):
            raise UserError([f"{one_line(place)}: none of its {len(entries):,} pictures can be read", *list(gone.values())[:3]])
        before(_facts(told, {entries[row].name: gone[row] for row in sorted(gone)}, len(entries) - len(gone)))
        return sorted(gone)

    datafile.write(
        path,
        shape=shape,
        block=block,
        produce=produce,
        progress=progress,
        source=source,
        labels=labels,
        split=split,
        told=told,
        dropped=dropped,
    )


def _blocks(
    answers: Iterator[picture_pool.Answer], place: Path, told: dict[str, Any], *, refuse: bool
) -> Iterator[datafile.Block]:
    """The blocks, and in `told` what the journal keeps of each; to refuse damaged pictures is to name all of them at the end."""
    problems: list[tuple[int, str]] = []
    for number, about, rows in answers:
        if about["changed"]:
            name = one_line(about["changed"][0])
            raise UserError(f"{one_line(place)}: {name} was changed or taken away while pictures were read; run it again")
        if about["damaged"] and refuse:
            problems += [(number, why) for why in about["damaged"].values()]
            continue
        told[str(number)] = _short(about)
        yield number, rows
    problems += [(int(number), why) for number, one in told.items() for why in one.get("damaged", {}).values()]
    if refuse and problems:
        raise UserError(refused([why for _, why in sorted(problems)]))


def refused(problems: Sequence[str]) -> list[str]:
    """The lines of an error for pictures that cannot be read."""
    rest = len(problems) - MOST_TOLD
    more = [f"… and {rest:,} more; `siv data check` of the place names all"] if rest > 0 else []
    remedy = f'{len(problems):,} pictures cannot be used: mend or remove them, or data.damaged = "skip" goes on without'
    return [*problems[:MOST_TOLD], *more, remedy]


def _block_size(entries: Sequence[Entry], shape: datafile.Shape) -> int:
    encoded = sum(max(0, entry.size) for entry in entries) // len(entries)
    largest = max(shape[1] * shape[2] * shape[3], encoded, 1)
    return max(1, min(MOST_IN_BLOCK, BLOCK_BYTES // largest, len(entries)))


def _short(about: dict[str, Any]) -> dict[str, Any]:
    """What the journal keeps of a block."""
    sizes = sorted(about["sizes"], key=_area)
    short = {"changes": about["changes"], "sizes": [sizes[0], sizes[-1]] if sizes else [], "damaged": about["damaged"]}
    return {name: value for name, value in short.items() if value}


def _area(size: str) -> tuple[int, int]:
    width, height = map(int, size.split(" × "))
    return width * height, width


def _facts(told: dict[str, Any], damaged: dict[str, str], images: int) -> Facts:
    changes = Counter[str]()
    for one in told.values():
        changes.update(one.get("changes", {}))
    sizes = sorted({size for one in told.values() for size in one.get("sizes", [])}, key=_area)
    ends = (sizes[0], sizes[-1]) if len(sizes) > 1 else tuple(sizes)
    return Facts(images, dict(changes.most_common(20)), ends, damaged)


def check(path: Path, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """What a picture, or a folder or zip of them, holds after decoding each; what cannot be read is in `problems`."""
    whole = path.is_dir() or path.suffix.lower() not in SUFFIXES
    found = listed(path) if whole else Listing(path.parent, "folder", "", [Entry(path.name)])
    per = _block_size(found.entries, (0, 3, 1, 1))
    starts = range(0, len(found.entries), per)
    problems: list[str] = []
    modes, sizes, changes, done = Counter[str](), Counter[str](), Counter[str](), 0
    what = f"reading {one_line(path.name)}"

    def rows_of(number: int) -> Sequence[Entry]:
        return found.entries[starts[number] : starts[number] + per]

    tick = lambda: progress(what, done, len(found.entries))  # noqa: E731
    for number, about, _ in picture_pool.decoded(found.place, found.kind, rows_of, range(len(starts)), None, tick):
        done += len(rows_of(number))
        problems += about["damaged"].values()
        problems += [f"{one_line(path)}: {one_line(name)} is not there, or has just been changed" for name in about["changed"]]
        modes.update(about["modes"]), sizes.update(about["sizes"]), changes.update(about["changes"])
    progress(what, len(found.entries), len(found.entries))
    report = {"path": str(path), "kind": "pictures", "pictures": len(found.entries), "readable": modes.total()}
    for name, counts in (("modes", modes), ("sizes", sizes), ("changes", changes)):
        report[name] = dict(counts.most_common())
    left = left_out(found.others)
    return {**report, **(_folders(found) if whole else {}), "not_taken": [left] if left else [], "problems": sorted(problems)}


def _folders(found: Listing) -> dict[str, Any]:
    """What `image_folder` would make of the folders, or why not."""
    try:
        arranged = arrange([entry.name for entry in found.entries], one_line(found.place))
    except UserError as error:
        return {"folders": list(error.problems)}
    return {"folders": list(arranged.notes)} if arranged.notes else {}
