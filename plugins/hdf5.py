"""Data set `hdf5`: images in an HDF5 file of one's own.

A file of siv's format 1 is read in place by memory map. Any other layout (compressed, chunked, [N, H, W, C], floats in [0, 1]) is
converted once into the data root; the file itself is never written to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core import Component, Progress, Rows, Spec, UserError, hookimpl, option
from siv_core.data import datafile, hdf5
from siv_core.errors import one_line
from siv_core.store import files

MOST_IN_BLOCK, BLOCK_BYTES = 256, 16 << 20  # images converted at a time


@frozen
class HDF5Config:
    path: str = option(doc="of the file")
    images: str = option("images", doc="name of the images' data set in the file")
    layout: str = option("NCHW", doc="order of its axes; NHW has one grey channel", choices=("NCHW", "NHWC", "NHW"))
    labels: str = option("labels", doc="name of the labels' data set; used where it is there")
    size: int = option(0, doc="pixels a side, by area averaging; 0: as stored", ge=0, le=4096)
    held_out: float = option(0.1, doc="share kept from training by a seeded choice, where the file has no split", gt=0, lt=1)
    split_seed: int = option(0, doc="of that choice", ge=0)


class HDF5Images:
    """The file, or what was converted from it."""

    def __init__(self, config: HDF5Config) -> None:
        self.config, self.source = config, Path(config.path).expanduser()

    def missing(self) -> str | None:
        if not self.source.is_file():
            return f"there is no file {self.source}; set data.path"
        return None

    @property
    def _looked(self) -> datafile.Looked:
        return datafile.look(self.source, self.config.images, self.config.labels)

    @property
    def path(self) -> Path:
        """The file of format 1 behind this data set; a conversion is named after what it was made from."""
        if self._looked.native:
            return self.source
        about = self.source.stat()
        key = (
            str(self.source.resolve()),
            about.st_size,
            about.st_mtime_ns,
            self.config.images,
            self.config.layout,
            self.config.labels,
        )
        return files.data_root() / "hdf5" / f"{self.source.stem[:60]}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.h5"

    def prepare(self, progress: Progress) -> None:
        looked = self._looked
        if looked.native or self.path.exists():
            return
        n, height, width, channels = self._order(looked)
        row = channels * height * width * looked.facts["itemsize"]
        block = max(1, min(MOST_IN_BLOCK, BLOCK_BYTES // row))
        datafile.write(
            self.path,
            shape=(n, channels, height, width),
            block=block,
            produce=lambda numbers: self._blocks(looked, block, numbers),
            progress=progress,
            source=f"converted from {one_line(self.source.name)}: {looked.facts['about']}",
            labels=looked.columns.get("labels"),
        )

    def _order(self, looked: datafile.Looked) -> tuple[int, int, int, int]:
        """(N, H, W, C), of the layout and type that can be converted, before anything is read."""
        shape = looked.facts["shape"]
        fits = len(shape) == len(self.config.layout) and all(shape)
        if not fits or (looked.facts["dtype"] != "uint8" and looked.facts["kind"] != "f"):
            raise UserError(
                f"{one_line(self.source)}: '{self.config.images}' must be uint8 or float in [0, 1] with the axes"
                f" {self.config.layout}, not empty; it is {looked.facts['about']}. Set data.images and data.layout"
            )
        sizes = dict(zip(self.config.layout, shape, strict=True))
        return sizes["N"], sizes["H"], sizes["W"], sizes.get("C", 1)

    def _blocks(self, looked: datafile.Looked, block: int, numbers: list[int]) -> Iterator[datafile.Block]:
        like = [looked.facts["shape"], looked.facts["dtype"]]
        for answer, rows in hdf5.ask(self.source, "blocks", images=self.config.images, like=like, block=block, numbers=numbers):
            assert rows is not None
            yield answer["block"], self._converted(rows, answer["block"] * block)

    def _converted(self, rows: NDArray[Any], first: int) -> NDArray[np.uint8]:
        """uint8 [n, C, H, W] of rows as they are stored, the first of which has this number."""
        if rows.dtype != np.uint8:
            if not np.isfinite(rows).all() or rows.min() < 0 or rows.max() > 1:
                raise UserError(
                    f"{one_line(self.source)}: images {first} … {first + len(rows) - 1} of '{self.config.images}' hold values"
                    " outside [0, 1] or no numbers; `siv data check` counts them"
                )
            rows = np.rint(rows * 255).astype(np.uint8)
        if self.config.layout == "NHW":
            rows = rows[:, None]
        return rows.transpose(0, 3, 1, 2) if self.config.layout == "NHWC" else rows

    @cached_property
    def _table(self) -> datafile.Table:
        return datafile.read(self.path)

    @property
    def spec(self) -> Spec:
        reason = self.missing()
        if reason:
            raise UserError(reason)
        if self.path.exists():
            shape, labels = self._table.images.shape[1:], self._table.labels
            factors, value_range = self._table.factor_sizes or {}, self._table.value_range
        else:
            _, height, width, channels = self._order(self._looked)
            labels = self._looked.columns.get("labels")
            shape, factors, value_range = (channels, height, width), {}, (0.0, 1.0)
        classes = None if labels is None else int(labels.max()) + 1
        size = (self.config.size,) * 2 if self.config.size else shape[1:]
        if size[0] > shape[1] or size[1] > shape[2]:
            raise UserError(f"data.size: {self.config.size} is more than the {shape[1]} × {shape[2]} pixels of {self.source}")
        return Spec((shape[0], *size), value_range=value_range, classes=classes, factors=factors)

    def rows(self, split: str) -> Rows:
        import torch

        table = self._table
        inside = table.split == 1 if table.split is not None else self._chosen(len(table.images))
        index = np.flatnonzero(inside if split == "held_out" else ~inside)
        if not len(index):
            raise UserError(f"{self.source}: no image is in the split '{split}', of {len(inside)} in all")
        arrays = (table.images, table.labels, table.factors, index)
        return Rows(*(None if array is None else torch.from_numpy(array) for array in arrays))  # type: ignore[arg-type]

    def _chosen(self, n: int) -> NDArray[np.bool_]:
        order = np.random.Generator(np.random.PCG64(self.config.split_seed)).permutation(n)
        inside = np.zeros(n, bool)
        inside[order[: min(max(1, round(self.config.held_out * n)), n - 1)]] = True
        return inside

    def fingerprint(self) -> str:
        return self._table.sha256


def build(config: HDF5Config) -> HDF5Images:
    return HDF5Images(config)


@hookimpl
def siv_components() -> list[Component]:
    return [Component("dataset", "hdf5", HDF5Config, build, "images in an HDF5 file of your own")]
