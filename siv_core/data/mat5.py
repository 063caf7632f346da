"""Arrays of bytes in MAT 5 files ("MAT-File Format", The MathWorks, chapter 1).

Read here in plain Python, since SciPy's reader ends the process by a segmentation fault on some damaged files.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from math import prod

import numpy as np
from numpy.typing import NDArray

HEADER = 128  # bytes
PEEK = 4096  # bytes of a variable in which its name stands: others need not be unpacked
BYTES, MATRIX, COMPRESSED = 2, 14, 15  # types of elements
DOUBLE_CLASS, UINT8_CLASS = 6, 9  # of a matrix; MATLAB stores doubles that are small whole numbers as bytes


def read_uint8(mat: bytes, wanted: str, most: int) -> tuple[tuple[int, ...], NDArray[np.uint8] | None]:
    """(shape, values) of a variable; no values of one that is not stored as plain bytes.

    A file that is damaged, or a variable of more than `most` bytes, is a ValueError.
    """
    try:
        return _read_uint8(mat, wanted, most)
    except (struct.error, zlib.error) as error:
        raise ValueError(str(error)) from error


def _read_uint8(mat: bytes, wanted: str, most: int) -> tuple[tuple[int, ...], NDArray[np.uint8] | None]:
    marks = {b"IM": "<", b"MI": ">"}
    if len(mat) < HEADER or mat[126:128] not in marks:
        raise ValueError("it has no header of one")
    order = marks[mat[126:128]]
    for kind, data in elements(memoryview(mat)[HEADER:], order):
        if kind == COMPRESSED:
            if _name(zlib.decompressobj().decompress(data, PEEK), order) not in (None, wanted):
                continue
            inflater = zlib.decompressobj()
            whole = inflater.decompress(data, most)
            if inflater.unconsumed_tail:
                raise ValueError(f"a variable has more than {most >> 20} MiB")
            kind, data = next(elements(memoryview(whole), order), (0, memoryview(b"")))
        if kind != MATRIX:
            continue
        (_, flags), (_, dims), (_, name), *rest = islice(elements(data, order), 4)
        if _text(name) != wanted:
            continue
        shape = struct.unpack(f"{order}{len(dims) // 4}i", dims)
        kinds = (UINT8_CLASS, DOUBLE_CLASS)
        plain = rest and rest[0][0] == BYTES and struct.unpack(f"{order}I", flags[:4])[0] & 0x8FF in kinds
        if not plain or len(rest[0][1]) != prod(shape) or min(shape) < 0:
            return shape, None
        return shape, np.frombuffer(rest[0][1], np.uint8).reshape(shape, order="F")
    raise ValueError("it has no such variable")


def _name(head: bytes, order: str) -> str | None:
    """The name of the variable that these first bytes are of; None where they do not tell."""
    if len(head) < 8 or struct.unpack_from(f"{order}I", head)[0] != MATRIX:
        return None
    parts = [data for _, data in islice(elements(memoryview(head)[8:], order), 3)]
    return _text(parts[2]) if len(parts) == 3 else None


def _text(name: memoryview) -> str:
    return bytes(name).rstrip(b"\0").decode("ascii", "replace")


def elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(type, bytes) of each element of a MAT 5 file, or of a variable in it."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start, end = at + 8, at + 8 + size + (0 if kind == COMPRESSED else -size % 8)
        if kind >> 16:  # up to four bytes, in the place of the size
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        if start + size > len(data):
            raise ValueError(f"it breaks off: an element of {size} bytes has {len(data) - start}")
        yield kind, data[start : start + size]
        at = end
