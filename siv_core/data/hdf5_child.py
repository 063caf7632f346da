"""The child process in which HDF5 files are opened: it reads a question from `hdf5.ask`, answers it and ends.

What it reads lies in the file itself: no link is followed, no external storage or virtual set read, no foreign filter used.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siv_core.data.hdf5_file import COLUMNS, Answer, form, is_format_1, offset_of, own_dataset, unreadable
from siv_core.data.hdf5_survey import extent, survey
from siv_core.errors import UserError, one_line

MOST_VALUES = 1_000_000  # of a label or a factor: a network with more classes cannot be built, and a damaged number is as large


def main() -> None:
    """Read a question, answer it, end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process decides
    request = json.loads(sys.stdin.buffer.read())
    path = Path(request["path"])
    for limit, value in ((resource.RLIMIT_AS, request["memory"]), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS knows the first one by name only
            resource.setrlimit(limit, (value, value))
    questions: dict[str, Callable[..., Iterator[Answer]]] = {"look": look, "blocks": blocks, "survey": survey, "extent": extent}
    _hurry(request["seconds"], request["patience"])
    try:
        for answer, array in questions[request["question"]](path, **request["details"]):
            _hurry(0, 0)  # how long the other side takes to listen is its own affair
            _send(answer, array)
            _hurry(request["seconds"], request["patience"])
        _send({"end": True})
    except UserError as error:
        _send({"problems": error.problems})
    except Exception as error:  # whatever a damaged file makes the library run into
        _send({"problems": [unreadable(path, error)]})
    os._exit(0)  # closing a damaged file is not tried


def _hurry(computing: float, waiting: float) -> None:
    """End this process after so many seconds, even out of native code: neither signal has a handler."""
    signal.setitimer(signal.ITIMER_PROF, computing)
    signal.setitimer(signal.ITIMER_REAL, waiting)


def _send(answer: dict[str, Any], array: NDArray[Any] | None = None) -> None:
    out = sys.stdout.buffer
    header = {} if array is None else {"array": [array.dtype.str, array.shape]}
    out.write(json.dumps({**answer, **header}).encode() + b"\n")
    if array is not None:
        out.write(np.ascontiguousarray(array).data)
    out.flush()


def look(path: Path, images: str, labels: str, factors: str) -> Iterator[Answer]:
    """What a file holds; then its columns, each after a line with its name.

    Of format 1: {native: true, shape, offset, source, sha256, value_range, factor_sizes}. Of another layout, with the data sets
    `images` and, where they are there, `labels` [N] and `factors` [N, F]: {native: false, shape, dtype, kind, itemsize, axes,
    about, factor_sizes}.
    """
    import h5py

    with h5py.File(path, "r") as file:
        facts, columns = _format_1(file, path) if is_format_1(file) else _foreign(file, path, images, labels, factors)
        yield facts, None
        for name, values in columns.items():
            yield {"column": name}, values


def blocks(path: Path, images: str, like: list[Any], axis: int, block: int, numbers: list[int]) -> Iterator[Answer]:
    """{block: number} and samples as they are stored, which this axis counts; `like` is [shape, dtype] of what was looked at
    before."""
    import h5py

    with h5py.File(path, "r") as file:
        dataset = own_dataset(file, images, path)
        if [list(dataset.shape), str(dataset.dtype)] != like:
            raise UserError(f"{one_line(path)}: was changed while it was read; try again")
        for number in numbers:
            yield {"block": number}, dataset[(slice(None),) * axis + (slice(number * block, (number + 1) * block),)]


def _format_1(file: Any, path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.int64]]]:
    where, problems = one_line(path), []
    if not file.attrs["complete"]:
        problems.append(f"{where}: is not complete; remove it, so that it is made again")
    columns: dict[str, NDArray[np.int64]] = {}
    facts: dict[str, Any] = {"native": True, "factor_sizes": None}
    with _collected(problems, path):
        images = own_dataset(file, "images", path)
        if images.dtype != np.uint8 or images.ndim != 4 or images.chunks is not None or not images.size:
            raise UserError(f"{where}: images must be uint8 [N, C, H, W], contiguous, not empty; it is {images}")
        facts |= {"shape": list(images.shape), "offset": offset_of(images, path)}
    if "shape" in facts:
        for name, axes in COLUMNS.items():
            with _collected(problems, path):
                if name in file:
                    columns[name] = _column(file, name, path, facts["shape"][0], axes)
    with _collected(problems, path):
        if "factors" in columns:
            facts["factor_sizes"] = _factor_sizes(file, path, columns["factors"])
    with _collected(problems, path):
        low, high = facts["value_range"] = [float(value) for value in file.attrs["value_range"]]
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(
                f"{where}: the attribute value_range must be two finite numbers, the lower one first; it is {low}, {high}"
            )
        facts |= {name: str(file.attrs[name]) for name in ("source", "sha256")}
    if problems:
        raise UserError(problems)
    return facts, columns


@contextlib.contextmanager
def _collected(problems: list[str], path: Path) -> Iterator[None]:
    """What is wrong with this part is told together with the rest."""
    try:
        yield
    except UserError as error:
        problems += error.problems
    except Exception as error:  # whatever a damaged file makes the library run into
        problems.append(unreadable(path, error))


def _foreign(
    file: Any, path: Path, images: str, labels: str, factors: str
) -> tuple[dict[str, Any], dict[str, NDArray[np.int64]]]:
    dataset = own_dataset(file, images, path)
    facts = {"native": False, **form(dataset), "about": one_line(dataset), "factor_sizes": None}
    columns, problems = {}, list[str]()
    given = {"labels": labels, "factors": factors} if dataset.ndim else {}
    for column, name in given.items():
        with _collected(problems, path):
            if name and name in file:
                columns[column] = _foreign_column(own_dataset(file, name, path), column, name, path)
    if problems:
        raise UserError(problems)
    if "factors" in columns:
        values = columns["factors"]
        names = [f"factor_{i}" for i in range(values.shape[1])]
        with contextlib.suppress(Exception):  # an attribute of another meaning
            own = [name.decode() if isinstance(name, bytes) else str(name) for name in file[factors].attrs["names"]]
            names = own if len(set(own)) == len(own) == len(names) else names
        facts["factor_sizes"] = dict(zip(names, (values.max(axis=0) + 1).tolist(), strict=True))
    return facts, columns


def _foreign_column(dataset: Any, column: str, name: str, path: Path) -> NDArray[np.int64]:
    """Labels [N] or factors [N, F] as they should be; how many there have to be is told by who knows the images' axes."""
    squeezed = [size for size in dataset.shape or () if size != 1] if column == "labels" else list(dataset.shape or ())
    whole = dataset.dtype.kind in "uib" and len(squeezed) <= COLUMNS[column] and bool(dataset.size)
    values = dataset[()] if whole else np.zeros(0, np.int64)
    if not whole or not _counts(values) or (column == "factors" and values.ndim != 2):
        one = "one for each image" if column == "labels" else "a row [F] for each image"
        raise UserError(
            f"{one_line(path)}: '{one_line(name)}' must be whole numbers from 0 on and below {MOST_VALUES:,}, {one}; it is"
            f' {one_line(dataset)}. Write them so, name another with data.{column}, or leave them out with data.{column} = ""'
        )
    return (values.reshape(-1) if column == "labels" else values).astype(np.int64)


def _counts(values: NDArray[Any]) -> bool:
    return bool((values >= 0).all() and (values < MOST_VALUES).all())


def _column(file: Any, name: str, path: Path, n: int, axes: int) -> NDArray[np.int64]:
    dataset = own_dataset(file, name, path)
    fits = np.issubdtype(dataset.dtype, np.integer) and dataset.ndim == axes and len(dataset) == n
    values = dataset[()] if fits else np.zeros(0, np.int64)
    if not fits or not _counts(values):
        rows = f"{n} rows of whole numbers from 0 on and below {MOST_VALUES:,}, as many as there are images, with {axes} axes"
        raise UserError(f"{one_line(path)}: '{name}' must be {rows}; it is {dataset}")
    if name == "split" and (values > 1).any():
        raise UserError(
            f"{one_line(path)}: 'split' must be 0 (train) or 1 (held out) for each image; it goes up to {values.max()}"
        )
    return np.ascontiguousarray(values, dtype=np.int64)


def _factor_sizes(file: Any, path: Path, values: NDArray[np.int64]) -> dict[str, int]:
    attributes = file["factors"].attrs
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in attributes["names"]]
    sizes = [int(size) for size in attributes["sizes"]]
    if not len(set(names)) == len(names) == len(sizes) == values.shape[1]:
        reason = f"the attributes names and sizes of 'factors' do not fit its {values.shape[1]} columns"
        raise UserError(f"{one_line(path)}: {reason}")
    if (values >= sizes).any() or max(sizes, default=0) > MOST_VALUES:
        raise UserError(f"{one_line(path)}: 'factors' has values beyond its sizes {sizes}, or these beyond {MOST_VALUES}")
    return dict(zip(names, sizes, strict=True))


if __name__ == "__main__":
    main()
