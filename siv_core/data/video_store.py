"""Decoded videos on disk: one file each while a data set is prepared, which goes on where it stopped; then one data file."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core.data import datafile, video
from siv_core.protocols import Progress
from siv_core.store import files

BLOCK = 512  # rows of a data file that are written at once


@frozen
class Kept:
    """The file with a video's frames (`images` uint8 [n, size, size], `numbers` int64 [n] from 1), and how many it has in all."""

    path: Path
    total: int


def kept(
    store: Path, videos: Sequence[video.Video], size: int, fit: str, every: int, progress: Progress
) -> tuple[dict[str, Kept], dict[str, str]]:
    """{name: its frames} and {name: why it has none}; what an earlier call left in the folder `store` is taken as it is."""
    files.make_folder(store)
    files.remove_leftovers(store)
    paths = {one.name: store / f"{one.name}-{_state(one)}.npz" for one in videos}
    left = [one for one in videos if not paths[one.name].exists()]
    what, done, problems = "decoding videos", len(videos) - len(left), {}
    progress(what, done, len(videos))
    for one, answer in video.decoded(left, size, fit, every):
        if isinstance(answer, str):
            problems[one.name] = answer
        else:
            with files.replacing(paths[one.name]) as file:
                np.savez(file, images=answer.images, numbers=answer.numbers, total=answer.total)
        done += 1
        progress(what, done, len(videos))
    found = {}
    for name, path in paths.items():
        if name not in problems:
            with np.load(path) as stored:
                found[name] = Kept(path, int(stored["total"]))
    return found, problems


def _state(one: video.Video) -> str:
    """Changes with the file of a video, and with the frames that are wanted of it."""
    if one.member:
        with zipfile.ZipFile(one.path) as archive:
            about = archive.getinfo(one.member)
            state = (about.file_size, about.CRC)
    else:
        state = (one.path.stat().st_size, one.path.stat().st_mtime_ns)
    return hashlib.sha256(repr((str(one.path), one.member, state, one.ranges)).encode()).hexdigest()[:16]


def write(
    path: Path,
    videos: Mapping[str, Kept],
    factors_of: Callable[[str], tuple[int, ...]],
    factor_sizes: Mapping[str, int],
    progress: Progress,
) -> None:
    """A data file of all frames, video by video. Factors are those of its video, the first of which is the label too, and the
    number of the frame, counted from 0."""
    paths, names = [one.path for one in videos.values()], list(videos)
    numbers = []
    for one in paths:
        with np.load(one) as stored:
            numbers.append(stored["numbers"])
    rows = [(*factors_of(name), number - 1) for name, some in zip(names, numbers, strict=True) for number in some.tolist()]
    factors, ends = np.array(rows, np.int64), np.cumsum([len(some) for some in numbers])
    with np.load(paths[0]) as stored:
        side = stored["images"].shape[-1]

    def between(first: int, last: int) -> Iterator[NDArray[np.uint8]]:
        for at in range(int(np.searchsorted(ends, first, "right")), len(paths)):
            begin = int(ends[at - 1]) if at else 0
            if begin >= last:
                return
            with np.load(paths[at]) as stored:
                yield stored["images"][max(0, first - begin) : last - begin]

    def produce(blocks: list[int]) -> Iterator[datafile.Block]:
        for block in blocks:
            yield block, np.concatenate(list(between(block * BLOCK, (block + 1) * BLOCK)))[:, None]

    digest = hashlib.sha256(repr(([one.name for one in paths], factors.tobytes())).encode()).hexdigest()
    datafile.write(
        path,
        shape=(len(factors), 1, side, side),
        block=BLOCK,
        produce=produce,
        progress=progress,
        source=f"frames {digest} of {len(paths)} videos",
        labels=np.ascontiguousarray(factors[:, 0]),
        factors=factors,
        factor_sizes=dict(factor_sizes),
    )
