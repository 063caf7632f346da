"""From rows as they are stored to the batches that networks see: conversion happens once, on the device."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from siv_core.protocols import Batch, Rows, Spec
from siv_core.seeding import Streams

HOST_SHARE = 0.3  # of the free memory that data may take to be held there
UNKNOWN_MEMORY = 4 << 30  # what a machine that does not say is taken to have free, in bytes


def to_float(x: Tensor, spec: Spec, shape: tuple[int, ...] | None = None) -> Tensor:
    """Stored rows as floats of the value range in `shape` (the data's own by default): uint8 is scaled, sizes are area means."""
    low, high = spec.value_range
    if x.dtype == torch.uint8:
        x = x.to(torch.float32) * ((high - low) / 255) + low
    shape = shape or spec.shape
    if len(shape) == 3 and x.shape[2:] != shape[1:]:
        x = F.interpolate(x, shape[1:], mode="area")
    return x


def blend(x: Tensor, fade: Tensor) -> Tensor:
    """What a fading stage shows: fade · x + (1 − fade) · x at half the resolution (Karras et al. 2018, appendix A)."""
    half = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="nearest")
    return torch.lerp(half, x, fade)


def images(rows: Rows, positions: Tensor, spec: Spec, device: torch.device | str = "cpu") -> Tensor:
    """The samples at these positions of a split as floats, [n, *spec.shape]."""
    return to_float(rows.x[rows.at(positions)].to(device), spec)


def batches(rows: Rows, spec: Spec, size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """A split from its first to its last sample, `size` at a time."""
    for positions in torch.arange(len(rows)).split(size):
        yield images(rows, positions, spec, device)


class Feed:
    """The training split, where `residency` puts it; the place never changes a bit of what comes out."""

    def __init__(self, rows: Rows, spec: Spec, device: torch.device, residency: str, *, conditional: bool) -> None:
        self.rows, self.spec, self.device, self.conditional = rows, spec, device, conditional
        size = rows.x.numel() * rows.x.element_size()
        self.endless = rows.draw is not None
        wanted = residency == "device" or (residency == "auto" and size <= HOST_SHARE * _free_bytes(device))
        fits = wanted and not self.endless  # an endless split's table is not for training
        self.x = rows.x if not fits else rows.x.clone() if device.type == "cpu" else rows.x.to(device)
        self.residency = "drawn" if self.endless else "device" if fits else "host"

    def take(self, positions: Tensor, shape: tuple[int, ...], memory_format: torch.memory_format) -> Batch:
        """A batch in `shape`, a size of the stage."""
        at = self.rows.at(positions)
        x = self.x[at.to(self.x.device)].to(self.device, non_blocking=True)
        return self._batch(x, None if self.rows.labels is None else self.rows.labels[at], shape, memory_format)

    def draw(self, n: int, share: slice, streams: Streams, shape: tuple[int, ...], memory_format: torch.memory_format) -> Batch:
        """Rows `share` of the n samples that a step of an endless split sees; all n are drawn, so that no share depends on it."""
        assert self.rows.draw is not None
        x, labels = self.rows.draw(n, streams("data"))
        return self._batch(x[share], None if labels is None else labels[share], shape, memory_format)

    def _batch(self, x: Tensor, labels: Tensor | None, shape: tuple[int, ...], memory_format: torch.memory_format) -> Batch:
        x = to_float(x, self.spec, shape)
        labels = labels.to(self.device) if self.conditional and labels is not None else None
        return Batch(x.contiguous(memory_format=memory_format) if x.ndim == 4 else x, labels)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    pages = [os.sysconf(name) if name in os.sysconf_names else 0 for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")]
    free, all_ = (count * os.sysconf("SC_PAGE_SIZE") for count in pages)
    # macOS does not say what is free: half of what there is
    return free or all_ // 2 or UNKNOWN_MEMORY
