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

from siv_core.errors import UserError, one_line

FORMAT = 1
BUILT_IN_FILTERS = {"gzip", "lzf", "shuffle", "fletcher32", "scaleoffset"}
COLUMNS = {"labels": 1, "factors": 2, "split": 1}  # name -> number of axes
MOST_VALUES = 1_000_000  # of a label or a factor: a network with more classes cannot be built, and a damaged number is as large

SLAB = 16 << 20  # bytes that a survey reads at a time
MOST_ENTRIES = 1000  # of a file that it lists
REMEDY = "get the file again, or write its images into a new one"

Answer = tuple[dict[str, Any], NDArray[Any] | None]


def main() -> None:
    """Read a question, answer it, end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process decides
    request = json.loads(sys.stdin.buffer.read())
    path = Path(request["path"])
    for limit, value in ((resource.RLIMIT_AS, request["memory"]), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS knows the first one by name only
            resource.setrlimit(limit, (value, value))
    questions: dict[str, Callable[..., Iterator[Answer]]] = {"look": look, "blocks": blocks, "survey": survey}
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


def unreadable(path: Path, error: Exception) -> str:
    """The sentence for what the library says of a damaged file."""
    if isinstance(error, MemoryError):
        return f"{one_line(path)}: an image or a chunk of it takes more memory than there is for reading; {REMEDY}"
    reason = one_line(str(error) or type(error).__name__)[:300]
    return f"{one_line(path)}: cannot be read as an HDF5 file ({reason})"


def look(path: Path, images: str, labels: str) -> Iterator[Answer]:
    """What a file holds; then its columns, each after a line with its name.

    Of format 1: {native: true, shape, offset, source, sha256, value_range, factor_sizes}. Of another layout, with the data sets
    `images` and, where it is there, `labels` [N]: {native: false, shape, dtype, kind, itemsize, about}.
    """
    import h5py

    with h5py.File(path, "r") as file:
        facts, columns = _format_1(file, path) if is_format_1(file) else _foreign(file, path, images, labels)
        yield facts, None
        for name, values in columns.items():
            yield {"column": name}, values


def blocks(path: Path, images: str, like: list[Any], block: int, numbers: list[int]) -> Iterator[Answer]:
    """{block: number} and rows as they are stored; `like` is [shape, dtype] of what was looked at before."""
    import h5py

    with h5py.File(path, "r") as file:
        dataset = own_dataset(file, images, path)
        if [list(dataset.shape), str(dataset.dtype)] != like:
            raise UserError(f"{one_line(path)}: was changed while it was read; try again")
        for number in numbers:
            yield {"block": number}, dataset[number * block : (number + 1) * block]


def is_format_1(file: Any) -> bool:
    """Whether the file says so."""
    return bool(file.attrs.get("format") == FORMAT and "complete" in file.attrs)


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
        facts |= {"shape": list(images.shape), "offset": _offset(images, path)}
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


def _foreign(file: Any, path: Path, images: str, labels: str) -> tuple[dict[str, Any], dict[str, NDArray[np.int64]]]:
    dataset = own_dataset(file, images, path)
    columns = {}
    if dataset.ndim and labels and labels in file:
        column, n = own_dataset(file, labels, path), dataset.shape[0]
        values = column[()].reshape(-1) if column.size == n and np.issubdtype(column.dtype, np.integer) else None
        if values is None or not _counts(values):
            whole = f"{n} whole numbers from 0 on and below {MOST_VALUES:,}, one for each image"
            raise UserError(f"{one_line(path)}: '{labels}' must be {whole}; it is {column}")
        columns["labels"] = values.astype(np.int64)
    return {"native": False, **_form(dataset), "about": one_line(dataset)}, columns


def _form(dataset: Any) -> dict[str, Any]:
    dtype = dataset.dtype
    return {"shape": list(dataset.shape or ()), "dtype": str(dtype), "kind": dtype.kind, "itemsize": dtype.itemsize}


def own_dataset(file: Any, name: str, path: Path) -> Any:
    """The data set `name` if its bytes lie in this very file: no link, external storage, virtual set or foreign filter."""
    import h5py

    where = f"{one_line(path)}: '{one_line(name)}'"
    parts = name.strip("/").split("/")
    steps = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    for step in steps:  # before anything is followed
        if isinstance(file.get(step, getlink=True), (h5py.SoftLink, h5py.ExternalLink)):
            raise UserError(f"{where} is a link; only data inside the file itself is read")
        if not step or step not in file:
            has = ", ".join(sorted(map(one_line, file))[:20]) or "nothing"
            raise UserError(f"{one_line(path)}: has no data set '{one_line(name)}'; it has: {has}")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{where} is no data set")
    problem = _unusable(dataset, path)
    if problem:
        raise UserError(f"{where} {problem}")
    return dataset


def _unusable(dataset: Any, path: Path) -> str | None:
    """Why the bytes of a data set are not to be read, or are not there at all."""
    if dataset.external or dataset.is_virtual:
        return "lies in other files; only data inside the file itself is read"
    foreign = set(filters_of(dataset)) - BUILT_IN_FILTERS
    if foreign:
        return f"needs the filter {', '.join(sorted(foreign))}; only HDF5's own are used"
    if not dataset.shape or not dataset.size:
        return None
    if dataset.chunks is not None:
        written = dataset.id.get_num_chunks()
        announced = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        if written < announced:
            return f"is announced, but of its {announced} chunks only {written} were ever written"
    elif not dataset.id.get_storage_size():
        return "is announced, but nothing was ever written to it"
    elif dataset.id.get_offset() is not None and _end(dataset) > path.stat().st_size:
        return f"is truncated: it ends at byte {_end(dataset)}, the file at {path.stat().st_size}"
    return None


def _end(dataset: Any) -> int:
    return int(dataset.id.get_offset() + dataset.size * dataset.dtype.itemsize)


def _offset(dataset: Any, path: Path) -> int:
    offset = dataset.id.get_offset()
    if offset is None:
        raise UserError(f"{one_line(path)}: '{dataset.name}' must be contiguous, it is stored in the file's header")
    return int(offset)


def filters_of(dataset: Any) -> list[str]:
    """Names of the filters its chunks go through."""
    known = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}
    plist = dataset.id.get_create_plist()
    codes = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    return [known.get(code, f"number {code}") for code in codes]


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


# -- a survey --------------------------------------------------------------------------------------------------------------------


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
        entry |= {**_form(dataset), "storage": ", ".join([storage, *filters_of(dataset)]), "problem": _unusable(dataset, path)}
        if entry["problem"] is None and dataset.shape and dataset.size and dataset.dtype.kind in "uif":
            rows = max(1, SLAB // max(1, math.prod(dataset.shape[1:]) * dataset.dtype.itemsize))
            lowest, highest, nan = math.inf, -math.inf, 0
            for start in range(0, dataset.shape[0], rows):
                values = dataset[start : start + rows]
                good = values[np.isfinite(values)] if values.dtype.kind == "f" else values
                nan += values.size - good.size
                if good.size:
                    lowest, highest = min(lowest, good.min().item()), max(highest, good.max().item())
                yield {"what": f"reading {name}", "done": min(start + rows, dataset.shape[0]), "total": dataset.shape[0]}, None
            entry |= {"lowest": lowest, "highest": highest, "not_finite": nan}
    except Exception as error:  # whatever a damaged file makes the library run into
        entry["problem"] = _short(error)
    yield entry, None


if __name__ == "__main__":
    main()
