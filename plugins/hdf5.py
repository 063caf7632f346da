"""Data set `hdf5`: images in an HDF5 file of one's own.

A file of siv's format 1 is read in place by memory map. Any other layout (compressed, chunked, channels last, MATLAB's reversed
axes, floats, 16 bits) is converted once into the data root; the file itself is never written to.
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
from siv_core.data import cache, datafile, feed, foreign, hdf5
from siv_core.errors import near_miss, one_line

MOST_IN_BLOCK, BLOCK_BYTES = 256, 16 << 20  # images converted at a time


@frozen
class HDF5Config:
    path: str = option(doc="of the file", place=True)
    images: str = option("images", doc="name of the images' data set in the file")
    layout: str = option(
        "auto", doc="order of its axes, such as NCHW, NHWC or NHW (one grey channel); auto: by its attributes and its shape"
    )
    value_range: tuple[float, ...] = option(
        (), doc="two stored values that are black and white; empty: [0, 255] of uint8, [0, 1] of floats"
    )
    labels: str = option("labels", doc="name of the labels' data set [N]; used where it is there, empty: without")
    factors: str = option("factors", doc="name of the factors' data set [N, F]; used where it is there, empty: without")
    size: int = option(0, doc="pixels a side, by area averaging; 0: as stored", ge=0, le=4096)
    fit: str = option(
        "crop", doc="images of other proportions are cut to their centre, or stretched", choices=("crop", "stretch")
    )
    held_out: float = option(0.1, doc="share kept from training by a seeded choice, where the file has no split", gt=0, lt=1)
    held_out_by: str = option(
        "", doc="name of a factor, or labels: whole values of it are kept out, that share of them; empty: single images"
    )
    split_seed: int = option(0, doc="of that choice", ge=0)


class NotThese(UserError):
    """What the file holds cannot become images: there is nothing to go on with."""


class HDF5Images:
    """The file, or what was converted from it."""

    def __init__(self, config: HDF5Config) -> None:
        self.config, self.source = config, Path(config.path)
        self.removed: list[str] = []

    def missing(self) -> str | None:
        if not self.source.is_file():
            return f"there is no file {one_line(self.source)}; set data.path (a relative one is from the working folder)"
        return None

    @property
    def _looked(self) -> datafile.Looked:
        return datafile.look(self.source, self.config.images, self.config.labels, self.config.factors)

    @property
    def path(self) -> Path:
        """The file of format 1 behind this data set; a conversion is named after what it was made from, and how."""
        if self._looked.native:
            return self.source
        how = (self.config.images, self.config.layout, self.config.value_range, self.config.labels, self.config.factors)
        return cache.conversion(self.source, hashlib.sha256(repr(how).encode()).hexdigest()[:8])

    def prepare(self, progress: Progress) -> None:
        looked = self._looked
        if looked.native:
            datafile.verify(self.source, progress)
            return
        if not self.path.exists():
            self._convert(looked, progress)
        self.removed += cache.remove_superseded(self.path)

    def _convert(self, looked: datafile.Looked, progress: Progress) -> None:
        order, told = self._order(looked)
        low, high = self._range(looked)
        sizes = dict(zip(order, looked.facts["shape"], strict=True))
        shape = (sizes["N"], sizes.get("C", 1), sizes["H"], sizes["W"])
        row = int(np.prod(shape[1:])) * looked.facts["itemsize"]
        block = max(1, min(MOST_IN_BLOCK, BLOCK_BYTES // row))
        try:
            datafile.write(
                self.path,
                shape=shape,
                block=block,
                produce=lambda numbers: self._blocks(looked, order, (low, high), block, numbers),
                progress=progress,
                source=f"converted from {one_line(self.source.name)}: {looked.facts['about']}, axes {order}{told},"
                f" {low:g} … {high:g} as 0 … 255",
                labels=looked.columns.get("labels"),
                factors=looked.columns.get("factors"),
                factor_sizes=looked.facts["factor_sizes"],
            )
        except NotThese:
            cache.discard(self.path)
            raise

    def _order(self, looked: datafile.Looked) -> tuple[str, str]:
        """Letters for the axes as the file has them, NHW or NCHW in some order, and what told it, before anything is read."""
        shape, axes, asked = looked.facts["shape"], looked.facts["axes"], self.config.layout
        where = self._where
        if not 3 <= len(shape) <= 4 or not all(shape) or looked.facts["kind"] not in "uifb":
            told = f"must be images [N, C, H, W], [N, H, W, C] or [N, H, W] of numbers, not empty; it is {looked.facts['about']}"
            raise UserError(f"{where} {told}. Set data.images")
        order = foreign.order_of(shape, axes) if asked == "auto" else asked
        told = (
            f" (as {'MATLAB writes' if axes == foreign.REVERSED else 'its attributes say'})" if axes and asked == "auto" else ""
        )
        if order is None:
            raise UserError(f"{where} has the shape {shape}: which axis is which cannot be told; set data.layout, such as NCHW")
        if sorted(order) not in (sorted("NHW"), sorted("NCHW")) or len(order) != len(shape):
            raise UserError(f"{where} has the shape {shape}, and data.layout = '{order}' does not fit it; such as NCHW or NHW")
        n = shape[order.index("N")]
        for name, values in looked.columns.items():
            if len(values) != n:
                raise UserError(f"{where} {foreign.unequal(n, getattr(self.config, name), len(values), name)}")
        return order, told

    def _range(self, looked: datafile.Looked) -> tuple[float, float]:
        """The stored values that become 0 and 255."""
        if self.config.value_range:
            low, high = self.config.value_range
            return low, high
        agreed = foreign.agreed_range(looked.facts)
        if agreed is None:
            raise NotThese(f"{self._where} is {looked.facts['dtype']}, which has no agreed range: {self._extent()}")
        return agreed

    @property
    def _where(self) -> str:
        return f"{one_line(self.source)}: '{one_line(self.config.images)}'"

    def _extent(self) -> str:
        """What the values go from and to, and the key that takes it, after reading them all."""
        found = {}
        for answer, _ in hdf5.ask(self.source, "extent", images=self.config.images):
            found = answer
        if "lowest" not in found:
            return "it holds no numbers"
        if found["not_finite"]:
            many = f"{found['not_finite']} of its values are not finite"
            return f"{many}: mend them where they were made, or write the file without"
        low, high = found["lowest"], found["highest"]
        if low == high:
            return f"all its values are {low:g}; say with data.value_range which are black and white"
        such = f"data.{foreign.range_option(low, high)}"
        return f"its values go from {low:g} to {high:g}; say which are black and white, such as {such}"

    def _blocks(
        self, looked: datafile.Looked, order: str, value_range: tuple[float, float], block: int, numbers: list[int]
    ) -> Iterator[datafile.Block]:
        cache.note(self.path, self.source)
        about = {"like": [looked.facts["shape"], looked.facts["dtype"]], "axis": order.index("N")}
        for answer, rows in hdf5.ask(self.source, "blocks", images=self.config.images, **about, block=block, numbers=numbers):
            assert rows is not None
            yield answer["block"], self._converted(rows, order, value_range)

    def _converted(self, rows: NDArray[Any], order: str, value_range: tuple[float, float]) -> NDArray[np.uint8]:
        """uint8 [n, C, H, W] of images as they are stored."""
        low, high = value_range
        if rows.dtype != np.uint8 or value_range != foreign.RANGES["uint8"]:
            values = rows.astype(np.float64)
            if not np.isfinite(values).all() or values.min() < low or values.max() > high:
                raise NotThese(f"{self._where} holds values outside [{low:g}, {high:g}] or no numbers: {self._extent()}")
            rows = np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
        rows = rows if "C" in order else rows[..., None]
        return rows.transpose([(order if "C" in order else f"{order}C").index(axis) for axis in "NCHW"])

    @cached_property
    def _table(self) -> datafile.Table:
        return datafile.read(self.path)

    @property
    def _stored(self) -> tuple[int, int, int, int]:
        """[N, C, H, W] of the images in the file, before or after a conversion."""
        looked = self._looked
        if looked.native:
            n, channels, height, width = looked.facts["shape"]
            return n, channels, height, width
        sizes = dict(zip(self._order(looked)[0], looked.facts["shape"], strict=True))
        return sizes["N"], sizes.get("C", 1), sizes["H"], sizes["W"]

    @property
    def spec(self) -> Spec:
        reason = self.missing()
        if reason:
            raise UserError(reason)
        looked, (_, channels, height, width) = self._looked, self._stored
        if looked.native:
            self._takes_no_options()
        else:
            self._range(looked)
        labels = self._columns.get("labels")
        low, high = looked.facts.get("value_range", (0.0, 1.0))
        size = (self.config.size,) * 2 if self.config.size else (height, width)
        if size[0] > height or size[1] > width:
            raise UserError(
                f"data.size: {self.config.size} is more than the {height} × {width} pixels of {one_line(self.source)}"
            )
        return Spec(
            (channels, *size),
            value_range=(low, high),
            classes=None if labels is None else int(labels.max()) + 1,
            factors=looked.facts["factor_sizes"] or {} if "factors" in self._columns else {},
            fit=self.config.fit,
        )

    def _takes_no_options(self) -> None:
        """A `UserError` for options of how to read a file that says it itself."""
        asked, default = self.config, HDF5Config(path="")
        names = ("images", "layout", "value_range", "labels", "factors")
        given = [name for name in names if getattr(asked, name) not in (getattr(default, name), "")]
        if given:
            keys = ", ".join(f"data.{name}" for name in given)
            raise UserError(f"{keys}: {one_line(self.source)} is of siv's own format, which says it itself; leave it out")

    @property
    def _columns(self) -> dict[str, NDArray[np.int64]]:
        """Labels, factors and split, as far as they are wanted."""
        return {name: values for name, values in self._looked.columns.items() if getattr(self.config, name, name)}

    def notes(self) -> list[str]:
        """How the file is read, where that is not as it stands there."""
        looked, (_, _, height, width) = self._looked, self._stored
        told = []
        if not looked.native:
            (order, by), (low, high) = self._order(looked), self._range(looked)
            if self.config.layout == "auto" and order not in ("NCHW", "NHW"):
                told.append(f"its axes {looked.facts['shape']} are {order}{by or ', by the length of the last'}")
            if looked.facts["dtype"] not in ("uint8", "bool"):
                told.append(f"{looked.facts['dtype']}, {low:g} … {high:g}, rounded to 8 bits")
        size = self.config.size
        fitted = feed.fitting(height, width, size, size, self.config.fit) if size else ""
        told += [f"images of {fitted}"] if fitted else []
        return [f"{one_line(self.source)}: {line}" for line in told] + self.removed

    def counts(self) -> dict[str, int]:
        """How many images each split has."""
        inside = self._held_out()
        return {"train": int(len(inside) - inside.sum()), "held_out": int(inside.sum())}

    def about(self) -> dict[str, object]:
        """For the run's manifest: which values were held out, where whole ones were."""
        by = self.config.held_out_by
        return {"held_out": {by: np.unique(self._grouped(by)[self._held_out()]).tolist()}} if by else {}

    def rows(self, split: str) -> Rows:
        import torch

        table, inside, columns = self._table, self._held_out(), self._columns
        index = np.flatnonzero(inside if split == "held_out" else ~inside)
        if not len(index):
            raise UserError(f"{self.source}: no image is in the split '{split}', of {len(inside)} in all")
        arrays = (table.images, columns.get("labels"), columns.get("factors"), index)
        # what a child told is read-only, which torch does not know
        copies = (array if array is None or array.flags.writeable else array.copy() for array in arrays)
        return Rows(*(None if array is None else torch.from_numpy(array) for array in copies))  # type: ignore[arg-type]

    def _held_out(self) -> NDArray[np.bool_]:
        """Which images are kept from training."""
        n, share, by = self._stored[0], self.config.held_out, self.config.held_out_by
        if "split" in self._columns:
            if by:
                raise UserError(f"data.held_out_by: {one_line(self.source)} has a split of its own; leave it out")
            return self._columns["split"] == 1
        if by:
            group = self._grouped(by)
            values = len(np.unique(group))
            number = min(max(1, round(share * values)), max(1, values - 1))
            return np.isin(group, datafile.held_out_groups(group, number, self.config.split_seed))
        inside = np.zeros(n, bool)
        order = np.random.Generator(np.random.PCG64(self.config.split_seed)).permutation(n)
        inside[order[: min(max(1, round(share * n)), n - 1)]] = True
        return inside

    def _grouped(self, by: str) -> NDArray[np.int64]:
        """The values [N] of a factor, or of the labels."""
        names = list(self._looked.facts["factor_sizes"] or {}) if "factors" in self._columns else []
        if by in names:
            return self._columns["factors"][:, names.index(by)]
        if by == "labels" and "labels" in self._columns:
            return self._columns["labels"]
        known = [*names, *(["labels"] if "labels" in self._columns else [])]
        raise UserError(
            f"data.held_out_by: {one_line(self.source)} has no factor '{by}'{near_miss(by, known) or '; it has none'}"
        )

    def fingerprint(self) -> str:
        """The images' digest; that of labels, factors, split and a value range of its own follows a +."""
        table, columns = self._table, {name: np.ascontiguousarray(rows).tobytes() for name, rows in self._columns.items()}
        if "factors" in columns:
            columns["sizes"] = repr(table.factor_sizes).encode()
        if table.value_range != (0.0, 1.0):
            columns["value_range"] = repr(table.value_range).encode()
        if not columns:
            return table.sha256
        digest = hashlib.sha256(b"".join(name.encode() + data for name, data in columns.items()))
        return f"{table.sha256}+{digest.hexdigest()[:16]}"


def build(config: HDF5Config) -> HDF5Images:
    if config.value_range and not (len(config.value_range) == 2 and config.value_range[0] < config.value_range[1]):
        raise UserError(f"data.value_range: expected two numbers, the lower one first, got {list(config.value_range)}")
    return HDF5Images(config)


@hookimpl
def siv_components() -> list[Component]:
    return [Component("dataset", "hdf5", HDF5Config, build, "images in an HDF5 file of your own")]
