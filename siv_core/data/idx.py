"""IDX files, as MNIST's are: two zero bytes, a byte for the type, one for the number of axes, the lengths of the axes as 32-bit
big-endian numbers, and the values, the last axis fastest (LeCun, Cortes and Burges, "The MNIST database", file formats)."""

from __future__ import annotations

import struct
from math import prod

import numpy as np
from numpy.typing import NDArray

UINT8 = 8  # the code of the type of bytes, the only one read here


def read(data: bytes, axes: int) -> NDArray[np.uint8]:
    """The values of a file of uint8 with so many axes, a view of its bytes; a ValueError says what it is instead."""
    magic = bytes((0, 0, UINT8, axes))
    if data[:4] != magic:
        raise ValueError(f"it begins with the bytes {data[:4].hex(' ') or 'of an empty file'}, not with {magic.hex(' ')}")
    start = 4 + 4 * axes
    if len(data) < start:
        raise ValueError(f"it breaks off: {len(data)} bytes, its header alone has {start}")
    shape = struct.unpack(f">{axes}I", data[4:start])
    if len(data) != start + prod(shape):
        told = "breaks off" if len(data) < start + prod(shape) else "does not end where it should"
        raise ValueError(f"it {told}: {list(shape)} values take {start + prod(shape):,} bytes, it has {len(data):,}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
