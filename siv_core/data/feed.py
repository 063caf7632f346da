"""From rows as they are stored to the batches that networks see: conversion happens once, on the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from siv_core.data.ahead import Ahead
from siv_core.protocols import Batch, Rows, Spec
from siv_core.store import memory

if TYPE_CHECKING:  # torch is imported where it is used: the child that reads HDF5 files does without
    import torch
    from torch import Tensor

    from siv_core.seeding import DataOrder, Streams

HOST_SHARE = 0.3  # of the free memory that data may take to be held there


def to_float(x: Tensor, spec: Spec, shape: tuple[int, ...] | None = None) -> Tensor:
    """Stored rows as floats of the value range in `shape` (the data's own by default): uint8 is scaled, other proportions are
    cut to their centre or stretched (`spec.fit`), sizes are area means."""
    import torch
    from torch.nn import functional as F

    low, high = spec.value_range
    if x.dtype == torch.uint8:
        x = x.to(torch.float32) * ((high - low) / 255) + low
    shape = shape or spec.shape
    if len(shape) == 3 and x.shape[2:] != shape[1:]:
        top, left, height, width = window(x.shape[2], x.shape[3], shape[1], shape[2], spec.fit)
        x = F.interpolate(x[:, :, top : top + height, left : left + width], shape[1:], mode="area")
    return x


def window(height: int, width: int, to_height: int, to_width: int, fit: str) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the part of an image that is resized to another size: its centre in the proportions of
    that, or all of it where it is stretched."""
    if fit == "stretch":
        return 0, 0, height, width
    rows = min(height, max(1, round(width * to_height / to_width)))
    columns = min(width, max(1, round(height * to_width / to_height)))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def fitting(height: int, width: int, to_height: int, to_width: int, fit: str) -> str:
    """What that does to an image, in words and as width × height; "" where nothing has to be done."""
    if (height, width) == (to_height, to_width):
        return ""
    _, _, rows, columns = window(height, width, to_height, to_width, fit)
    cut = f", its centre of {columns} × {rows}" if (rows, columns) != (height, width) else ""
    stretched = rows * to_width != columns * to_height and abs(rows * to_width / (columns * to_height) - 1) > 0.01
    return f"{width} × {height}{cut} {'stretched' if stretched else 'resized'} to {to_width} × {to_height}"


def blend(x: Tensor, fade: Tensor) -> Tensor:
    """What a fading stage shows: fade · x + (1 − fade) · x at half the resolution (Karras et al. 2018, appendix A)."""
    import torch
    from torch.nn import functional as F

    half = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="nearest")
    return torch.lerp(half, x, fade)


def images(rows: Rows, positions: Tensor, spec: Spec, device: torch.device | str = "cpu") -> Tensor:
    """The samples at these positions of a split as floats, [n, *spec.shape]."""
    table = rows.x if tuple(rows.x.shape[1:]) == spec.shape else rows.pyramid.get(spec.shape[-1], rows.x)
    return to_float(table[rows.at(positions)].to(device), spec)


def batches(rows: Rows, spec: Spec, size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """A split from its first to its last sample, `size` at a time."""
    import torch

    for positions in torch.arange(len(rows)).split(size):
        yield images(rows, positions, spec, device)


class Feed:
    """The training split, where `residency` puts it; the place never changes a bit of what comes out."""

    def __init__(
        self, rows: Rows, spec: Spec, device: torch.device, residency: str, *, conditional: bool = False, flips: bool = False
    ) -> None:
        self.rows, self.spec, self.device, self.conditional, self.flips = rows, spec, device, conditional, flips
        self.endless = rows.draw is not None
        tables = {0: rows.x, **rows.pyramid}  # pixels a side -> rows; 0: as they are
        size = sum(table.numel() * table.element_size() for table in tables.values())
        wanted = residency == "device" or (residency == "auto" and size <= HOST_SHARE * memory.free(device))
        fits = wanted and not self.endless  # an endless split's table is not for training
        self.tables = {side: _placed(table, device) if fits else table for side, table in tables.items()}
        self.residency = "drawn" if self.endless else "device" if fits else "host"
        self.ahead: Ahead[tuple[Tensor, Tensor | None]] | None = Ahead() if self.residency == "host" else None

    @property
    def waited(self) -> float:
        """Seconds of all `next`s in which rows that are not on the device were waited for."""
        return self.ahead.waited if self.ahead else 0.0

    def batch(self, positions: Tensor, shape: tuple[int, ...], layout: torch.memory_format) -> Batch:
        """The samples at these positions of the split in `shape`, a size of the stage, which has rows of its own in a pyramid."""
        return self._batch(*self._fetched(positions, shape), shape, layout)

    def _fetched(self, positions: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Rows as they are stored, where their table is, and their labels."""
        at = self.rows.at(positions)
        side = 0 if tuple(self.rows.x.shape[1:]) == shape else shape[-1]
        table = self.tables.get(side, self.tables[0])
        x = table[at.to(table.device)]
        if table.device != self.device:  # from pinned memory a copy goes on beside the device's work
            x = x.pin_memory()
        return x, None if self.rows.labels is None else self.rows.labels[at]

    def next(
        self,
        order: DataOrder,
        images_seen: int,
        n: int,
        share: slice,
        streams: Streams,
        shape: tuple[int, ...],
        layout: torch.memory_format,
    ) -> Batch:
        """Rows `share` of the n samples of a step. What is drawn is drawn for all n, so that it does not depend on the share."""
        if self.endless:
            assert self.rows.draw is not None
            x, labels = self.rows.draw(n, streams("data"))
            batch = self._batch(x[share], None if labels is None else labels[share], shape, layout)
        elif self.ahead is None:
            batch = self.batch(order.take(images_seen, n)[share], shape, layout)
        else:
            key = images_seen, n, share.start, share.stop, shape
            rows = self.ahead.get(key, lambda: self._fetched(order.take(images_seen, n)[share], shape))
            following = order.take(images_seen + n, n)[share]
            self.ahead.start((images_seen + n, *key[1:]), partial(self._fetched, following, shape))
            batch = self._batch(*rows, shape, layout)
        if not self.flips:
            return batch
        import torch

        mirrored = torch.rand(n, generator=streams("flips"), device=self.device)[share] < 0.5
        return batch._replace(x=torch.where(mirrored[:, None, None, None], batch.x.flip(3), batch.x))

    def _batch(self, x: Tensor, labels: Tensor | None, shape: tuple[int, ...], layout: torch.memory_format) -> Batch:
        x = to_float(x.to(self.device, non_blocking=True), self.spec, shape)
        labels = labels.to(self.device) if self.conditional and labels is not None else None
        return Batch(x.contiguous(memory_format=layout) if x.ndim == 4 else x, labels)


def _placed(table: Tensor, device: torch.device) -> Tensor:
    return table.clone() if device.type == "cpu" else table.to(device)
