"""A large data set at the smaller sizes of growing networks: files of their own, made once, beside the data root's others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import attrs

from siv_core.data import datafile
from siv_core.protocols import Progress, Rows
from siv_core.store import files

FOLDER = "pyramids"
LARGE = 1 << 30  # bytes of images above which it takes longer to read them whole than it is worth
BLOCK_BYTES = 64 << 20


def with_sizes(rows: Rows, fingerprint: Callable[[], str], sides: Iterable[int], progress: Progress) -> Rows:
    """The same rows with a pyramid of these sizes, each read from a file of area means rounded to bytes, which is made where it
    is not there yet: all sizes from the images as they are stored. Small sets are left alone, and so are images that are
    no squares of bytes: their smaller sizes are means taken when they are asked for, unrounded.

    A set is known by its fingerprint. Like every data file they go on where they were interrupted, and a second process waits.
    """
    import torch

    table = rows.x
    stored = table.shape[-1]
    if table.dtype != torch.uint8 or table.ndim != 4 or table.shape[2] != stored or table.numel() <= LARGE or rows.draw:
        return rows
    pyramid = dict(rows.pyramid)
    for side in sorted({side for side in sides if side < stored} - pyramid.keys()):
        path = path_of(fingerprint(), side)
        if not path.exists():
            _write(path, rows, side, fingerprint(), progress)
        pyramid[side] = torch.from_numpy(datafile.read(path).images)
    return attrs.evolve(rows, pyramid=pyramid)


def path_of(fingerprint: str, side: int) -> Path:
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
    return files.data_root() / FOLDER / f"{digest}_{side}.h5"


def _write(path: Path, rows: Rows, side: int, fingerprint: str, progress: Progress) -> None:
    from torch.nn import functional as F

    n, channels, stored, _ = rows.x.shape
    block = max(1, min(n, BLOCK_BYTES // (channels * stored**2)))

    def produce(numbers: list[int]) -> Iterator[datafile.Block]:
        for number in numbers:
            whole = rows.x[number * block : (number + 1) * block].float()
            means = F.interpolate(whole, (side, side), mode="area")
            yield number, means.round().byte().numpy()

    datafile.write(
        path,
        shape=(n, channels, side, side),
        block=block,
        produce=produce,
        progress=progress,
        source=f"area means of {stored} pixels a side, of the data {fingerprint}",
    )
