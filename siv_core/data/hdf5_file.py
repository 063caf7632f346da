"""What an open HDF5 file holds, for the child process: data sets whose bytes lie in the file itself, their form, their axes."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from siv_core.errors import UserError, one_line

FORMAT = 1
COLUMNS = {"labels": 1, "factors": 2, "split": 1}  # name -> number of axes
BUILT_IN_FILTERS = {"gzip", "lzf", "shuffle", "fletcher32", "scaleoffset"}
REMEDY = "get the file again, or write its images into a new one"
Answer = tuple[dict[str, Any], NDArray[Any] | None]  # of the child: JSON, and an array where there is one


def _is_logical(dataset: Any) -> bool:
    """Whether MATLAB wrote no and yes, which it stores as bytes 0 and 1."""
    with contextlib.suppress(Exception):  # an attribute of another meaning
        name = dataset.attrs.get("MATLAB_class")
        return (name.decode() if isinstance(name, bytes) else name) == "logical"
    return False


AXES = {
    "N": ("n", "b", "i", "t", "z", "batch", "sample", "samples", "image", "images", "index", "time"),
    "C": ("c", "channel", "channels", "band", "bands", "color", "colour", "rgb"),
    "H": ("h", "y", "height", "row", "rows"),
    "W": ("w", "x", "width", "column", "columns", "col", "cols"),
}


def unreadable(path: Path, error: Exception) -> str:
    """The sentence for what the library says of a damaged file."""
    if isinstance(error, MemoryError):
        return f"{one_line(path)}: an image or a chunk of it takes more memory than there is for reading; {REMEDY}"
    reason = one_line(str(error) or type(error).__name__)[:300]
    if "lock file" in reason:
        return f"{one_line(path)}: another program has it open for writing; close it there, or wait for its end ({reason})"
    return f"{one_line(path)}: cannot be read as an HDF5 file ({reason})"


def is_format_1(file: Any) -> bool:
    """Whether the file says so."""
    return bool(file.attrs.get("format") == FORMAT and "complete" in file.attrs)


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
    problem = unusable(dataset, path)
    if problem:
        raise UserError(f"{where} {problem}")
    return dataset


def unusable(dataset: Any, path: Path) -> str | None:
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


def offset_of(dataset: Any, path: Path) -> int:
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


def form(dataset: Any) -> dict[str, Any]:
    dtype = dataset.dtype
    form = {"shape": list(dataset.shape or ()), "dtype": str(dtype), "kind": dtype.kind, "itemsize": dtype.itemsize}
    return {**form, "axes": axes_of(dataset), "logical": _is_logical(dataset)}


def axes_of(dataset: Any) -> str | None:
    """The order of the axes where an attribute of the data set tells it, as "NHWC"; "reversed" where MATLAB wrote it, whose first
    axis is the file's last."""
    with contextlib.suppress(Exception):  # an attribute of another meaning
        attributes = dataset.attrs
        if "DIMENSION_LABELS" in attributes:
            words = [word.decode() if isinstance(word, bytes) else str(word) for word in attributes["DIMENSION_LABELS"]]
        elif "axistags" in attributes:
            tags = attributes["axistags"]
            words = [axis["key"] for axis in json.loads(tags)["axes"]]
        else:
            return "reversed" if "MATLAB_class" in attributes else None
        letters = "".join(letter for word in words for letter, names in AXES.items() if word.strip().lower() in names)
        return letters if len(letters) == len(words) == len(set(letters)) else None
    return None
