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

from siv_core import Component, Progress, Rows, Spec, UserError, datafile, files, hookimpl, option

BLOCK = 256  # images converted at a time


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

    @cached_property
    def _native(self) -> bool:
        import h5py

        try:
            with h5py.File(self.source, "r") as file:
                return bool(file.attrs.get("format") == datafile.FORMAT and "complete" in file.attrs)
        except OSError as error:
            raise UserError(f"{self.source}: no HDF5 file that can be read ({error})") from error

    @property
    def path(self) -> Path:
        """The file of format 1 behind this data set; a conversion is named after what it was made from."""
        if self._native:
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
        return files.data_root() / "hdf5" / f"{self.source.stem}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.h5"

    def prepare(self, progress: Progress) -> None:
        if self._native or self.path.exists():
            return
        import h5py

        with h5py.File(self.source, "r") as file:
            images = datafile.own_dataset(file, self.config.images, self.source)
            self._check(images)
            n, height, width, channels = _order(images.shape, self.config.layout)
            datafile.write(
                self.path,
                shape=(n, channels, height, width),
                block=BLOCK,
                produce=lambda numbers: self._blocks(images, numbers),
                progress=progress,
                source=f"converted from {self.source.name}: {images}",
                labels=self._labels(file, n),
            )

    def _check(self, images: Any) -> None:
        """The layout and type that can be converted, before anything is read."""
        fits = images.ndim == len(self.config.layout) and all(images.shape)
        if not fits or (images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating)):
            raise UserError(
                f"{self.source}: '{self.config.images}' must be uint8 or float in [0, 1] with the axes {self.config.layout},"
                f" not empty; it is {images}. Set data.images and data.layout"
            )

    def _blocks(self, images: Any, numbers: list[int]) -> Iterator[datafile.Block]:
        for number in numbers:
            block = images[number * BLOCK : (number + 1) * BLOCK]
            if block.dtype != np.uint8:
                if not np.isfinite(block).all() or block.min() < 0 or block.max() > 1:
                    rows = f"{number * BLOCK} … {number * BLOCK + len(block) - 1}"
                    raise UserError(
                        f"{self.source}: images {rows} of '{self.config.images}' hold values outside [0, 1] or no numbers"
                    )
                block = np.rint(block * 255).astype(np.uint8)
            if self.config.layout == "NHW":
                block = block[:, None]
            yield number, block.transpose(0, 3, 1, 2) if self.config.layout == "NHWC" else block

    def _labels(self, file: Any, n: int) -> NDArray[np.int64] | None:
        if self.config.labels not in file:
            return None
        labels = datafile.own_dataset(file, self.config.labels, self.source)[()].reshape(-1)
        if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer) or (labels < 0).any():
            raise UserError(f"{self.source}: '{self.config.labels}' must be {n} whole numbers from 0 on, one for each image")
        return labels.astype(np.int64)

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
            import h5py

            with h5py.File(self.source, "r") as file:
                images = datafile.own_dataset(file, self.config.images, self.source)
                self._check(images)
                n, height, width, channels = _order(images.shape, self.config.layout)
                labels = self._labels(file, n)
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


def _order(shape: tuple[int, ...], layout: str) -> tuple[int, int, int, int]:
    """(N, H, W, C) from a shape in this layout."""
    sizes = dict(zip(layout, shape, strict=True))
    return sizes["N"], sizes["H"], sizes["W"], sizes.get("C", 1)


def build(config: HDF5Config) -> HDF5Images:
    return HDF5Images(config)


@hookimpl
def siv_components() -> list[Component]:
    return [Component("dataset", "hdf5", HDF5Config, build, "images in an HDF5 file of your own")]
