"""How other people's arrays are read as images: which axis is which, and which values are black and white."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FEW = ((1, 3), (2, 4))  # channels: an axis as short as that is taken for them, the likelier lengths first
REVERSED = "reversed"  # in place of an order: MATLAB wrote it, whose first axis is the file's last
RANGES = {"uint8": (0.0, 255.0), "bool": (0.0, 1.0), "f": (0.0, 1.0)}  # by type or kind of type; of others none is agreed


def agreed_range(facts: Mapping[str, Any]) -> tuple[float, float] | None:
    """The values that are black and white in numbers of this `dtype` and `kind`, None where everybody has their own."""
    return RANGES["bool"] if facts.get("logical") else RANGES.get(facts["dtype"]) or RANGES.get(facts["kind"])


def range_option(low: float, high: float) -> str:
    """The option that takes values from `low` to `high`, with every digit: rounded, it would not hold them."""
    return f"value_range = [{low!r}, {high!r}]"


def unequal(images: int, name: str, rows: int, key: str) -> str:
    """What is told of labels or factors that are not as many as the images."""
    return f"has {images} images, '{name}' {rows} rows: as many are needed; data.{key} = \"\" goes on without"


def order_of(shape: Sequence[int], axes: str | None) -> str | None:
    """The order of the axes as the file has them, "NCHW" or "NHW" in some order, or None where it cannot be told: what the file's
    attributes say (`axes`, see `hdf5_file.axes_of`), else by the lengths, of which that of the channels is short."""
    if axes and axes != REVERSED:
        return axes
    written = tuple(shape[::-1] if axes else shape)
    if len(written) == 3 and axes:  # MATLAB's [H, W, N], or as others have it; told by what is square
        fitting = [order for order, square in (("HWN", written[:2]), ("NHW", written[1:])) if square[0] == square[1]]
        fitting = fitting if len(fitting) == 1 else []
    elif len(written) == 3:
        fitting = ["NHW"]
    else:
        orders = ("HWCN", "NHWC", "NCHW") if axes else ("NCHW", "NHWC")
        fitting = [order for few in FEW for order in orders if written[order.index("C")] in few]
    return (fitting[0][::-1] if axes else fitting[0]) if fitting else None
