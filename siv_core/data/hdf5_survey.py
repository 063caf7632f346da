"""Surveys of HDF5 files by the child process: every number is read, the largest and the smallest are told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from siv_core.data.hdf5_file import Answer, filters_of, form, is_format_1, own_dataset, unusable
from siv_core.errors import UserError, one_line

SLAB = 16 << 20  # bytes that a survey reads at a time
MOST_ENTRIES = 1000  # of a file that it lists


def survey(path: Path) -> Iterator[Answer]:
    """{native}, then a line for each data set and each link: name, shape, dtype, kind, storage, lowest, highest, problem.

    Every number is read; {what, done, total} lines in between tell how far it is.
    """
    import h5py

    with h5py.File(path, "r") as file:
        yield {"native": is_format_1(file)}, None
        waiting, seen, count = [("", file)], {_address(file)}, 0
        while waiting:
            prefix, group = waiting.pop(0)
            for name in group:
                full, count = f"{prefix}{name}", count + 1
                if count > MOST_ENTRIES:
                    raise UserError(f"{one_line(path)}: has more than {MOST_ENTRIES} entries; no file of images has")
                try:
                    found = _entry(group, name)
                    again = _address(found) in seen
                    seen.add(_address(found))
                except UserError as error:
                    yield {"name": full, "problem": str(error)}, None
                    continue
                except Exception as error:  # whatever a damaged file makes the library run into
                    yield {"name": full, "problem": _short(error)}, None
                    continue
                if isinstance(found, h5py.Dataset):
                    yield from _surveyed(full, found, path)
                elif isinstance(found, h5py.Group) and again:
                    yield {"name": full, "problem": "leads back to a group that was listed already"}, None
                elif isinstance(found, h5py.Group):
                    waiting.append((f"{full}/", found))


def _entry(group: Any, name: str) -> Any:
    """What bears this name in a group, unless a link does."""
    import h5py

    link = group.get(name, getlink=True)
    if isinstance(link, h5py.HardLink):
        return group[name]
    to = one_line(f"{link.filename}:{link.path}" if isinstance(link, h5py.ExternalLink) else link.path)
    raise UserError(f"is a link to {to}; only data inside the file itself is read")


def _address(thing: Any) -> int:
    import h5py

    return int(h5py.h5o.get_info(thing.id).addr)


def _short(error: Exception) -> str:
    return f"cannot be read ({one_line(str(error) or type(error).__name__)[:300]})"


def _surveyed(name: str, dataset: Any, path: Path) -> Iterator[Answer]:
    entry: dict[str, Any] = {"name": name}
    try:
        storage = "contiguous" if dataset.chunks is None else f"chunks of {list(dataset.chunks)}"
        entry |= {**form(dataset), "storage": ", ".join([storage, *filters_of(dataset)]), "problem": unusable(dataset, path)}
        if entry["problem"] is None and dataset.shape and dataset.size and dataset.dtype.kind in "uifb":
            rows = max(1, SLAB // max(1, math.prod(dataset.shape[1:]) * dataset.dtype.itemsize))
            lowest, highest, nan = math.inf, -math.inf, 0
            for start in range(0, dataset.shape[0], rows):
                values = dataset[start : start + rows]
                good = values[np.isfinite(values)] if values.dtype.kind == "f" else values
                good = good.astype(np.uint8) if good.dtype.kind == "b" else good
                nan += values.size - good.size
                if good.size:
                    lowest, highest = min(lowest, good.min().item()), max(highest, good.max().item())
                yield {"what": f"reading {name}", "done": min(start + rows, dataset.shape[0]), "total": dataset.shape[0]}, None
            entry |= {"lowest": lowest, "highest": highest, "not_finite": nan}
    except Exception as error:  # whatever a damaged file makes the library run into
        entry["problem"] = _short(error)
    yield entry, None


def extent(path: Path, images: str) -> Iterator[Answer]:
    """The survey's answers for one data set."""
    import h5py

    with h5py.File(path, "r") as file:
        yield from _surveyed(images, own_dataset(file, images, path), path)
