"""HDF5 files of format 1: written once and whole, read by memory map.

`images` uint8 [N, C, H, W], contiguous and uncompressed; optional `labels` int64 [N], `factors` int64 [N, F] (attribute `names`,
`sizes`), `split` uint8 [N] (0 train, 1 held out). Attributes: format, source, sha256 (of the image bytes), value_range, complete.
While a file is made its images grow in `FILE.partial`, and `FILE.partial.json` says how far they are: a killed preparation goes
on where it stopped, and nothing half-written bears the file's own name. `FILE.lock` keeps a second process from it meanwhile.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core import files
from siv_core.errors import UserError
from siv_core.protocols import Progress, Rows

FORMAT = 1
BUILT_IN_FILTERS = {"gzip", "lzf", "shuffle", "fletcher32", "scaleoffset"}

COLUMNS = {"labels": 1, "factors": 2, "split": 1}  # name -> number of axes

Block = tuple[int, NDArray[np.uint8]]


@frozen(eq=False)
class Table:
    """What a data file holds. `images` is memory-mapped: reading it costs what is touched."""

    images: NDArray[np.uint8]  # [N, C, H, W]
    source: str
    sha256: str
    value_range: tuple[float, float] = (0.0, 1.0)
    labels: NDArray[np.int64] | None = None
    factors: NDArray[np.int64] | None = None
    factor_sizes: dict[str, int] | None = None
    split: NDArray[np.uint8] | None = None


def write(
    path: Path,
    *,
    shape: tuple[int, int, int, int],
    block: int,
    produce: Callable[[list[int]], Iterator[Block]],
    progress: Progress,
    source: str,
    labels: NDArray[np.int64] | None = None,
    factors: NDArray[np.int64] | None = None,
    factor_sizes: dict[str, int] | None = None,
    split: NDArray[np.uint8] | None = None,
) -> None:
    """Make a data file of `shape` [N, C, H, W] from blocks of `block` rows.

    `produce(numbers)` yields (number, uint8 rows) for the block numbers that are still missing, in any order. `source` says what
    the rows are made from; a partial file of another source starts over. While another process makes the same file this one
    waits, and has nothing left to do afterwards.
    """
    files.make_folder(path.parent)
    wait = f"waiting for another process that prepares {path.name}"
    with files.alone(path, lambda: progress(wait, 0, 1)) as waited:
        if waited:
            progress(wait, 1, 1)
        if not path.exists():
            images = _grow(path, shape, block, produce, progress, source)
            _write_whole(path, Table(images, source, _sha256(images), (0.0, 1.0), labels, factors, factor_sizes, split))
            for left in _partial(path):
                left.unlink()


def _partial(path: Path) -> tuple[Path, Path]:
    """The images of an unfinished file, and the journal of its blocks."""
    return path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.json")


def _grow(
    path: Path,
    shape: tuple[int, int, int, int],
    block: int,
    produce: Callable[[list[int]], Iterator[Block]],
    progress: Progress,
    source: str,
) -> NDArray[np.uint8]:
    """All images, in the partial file, from where an interrupted preparation stopped."""
    partial, journal = _partial(path)
    count = -(-shape[0] // block)
    key = {"format": FORMAT, "source": source, "shape": list(shape), "block": block}
    done = _journal(journal, key) if partial.exists() and partial.stat().st_size == int(np.prod(shape)) else set()
    what = f"preparing {path.name}"
    progress(what, len(done), count)
    images: NDArray[np.uint8] = np.memmap(partial, np.uint8, "r+" if done else "w+", shape=shape)
    try:
        for number, rows in produce([number for number in range(count) if number not in done]):
            images[number * block : (number + 1) * block] = rows
            done.add(number)
            if len(done) % 8 == 0:
                _note(images, journal, key, done)
            progress(what, len(done), count)
    finally:
        _note(images, journal, key, done)
    if len(done) < count:
        raise RuntimeError(f"{path}: {count - len(done)} of {count} blocks were not produced")
    return images


def _journal(path: Path, key: dict[str, Any]) -> set[int]:
    try:
        noted = files.read_json(path)
    except UserError:
        return set()
    return set(noted["done"]) if {name: noted.get(name) for name in key} == key else set()


def _note(images: NDArray[np.uint8], journal: Path, key: dict[str, Any], done: set[int]) -> None:
    """The images first, then that they are there."""
    if isinstance(images, np.memmap):
        images.flush()
    files.write_json(journal, {**key, "done": sorted(done)})


def _write_whole(path: Path, table: Table) -> None:
    import h5py

    temporary = path.with_name(f"{files.TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with h5py.File(temporary, "w") as file:
            file.create_dataset("images", data=table.images)
            attributes = {"format": FORMAT, "source": table.source, "sha256": table.sha256, "value_range": table.value_range}
            file.attrs.update({**attributes, "complete": True})
            if table.labels is not None:
                file.create_dataset("labels", data=table.labels)
            if table.split is not None:
                file.create_dataset("split", data=table.split)
            if table.factors is not None and table.factor_sizes is not None:
                factors = file.create_dataset("factors", data=table.factors)
                factors.attrs["names"] = list(table.factor_sizes)
                factors.attrs["sizes"] = list(table.factor_sizes.values())
        with temporary.open("rb+") as raw:
            os.fsync(raw.fileno())
        os.replace(temporary, path)
        files.sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> Table:
    """Open a file of format 1. Whatever could lead outside the file, or is not as the format says, is a `UserError`."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT or not file.attrs.get("complete", False):
                raise UserError(f"{path}: no complete data file of format {FORMAT}; `siv data check {path}` says more")
            images = own_dataset(file, "images", path)
            if images.dtype != np.uint8 or images.ndim != 4 or images.chunks is not None or not images.size:
                raise UserError(f"{path}: images must be uint8 [N, C, H, W], contiguous, not empty; it is {images}")
            shape, offset = images.shape, images.id.get_offset()
            if offset is None:
                raise UserError(f"{path}: 'images' is announced, but nothing was ever written to it")
            arrays = {name: _column(file, name, path, shape[0], axes) for name, axes in COLUMNS.items()}
            sizes = None if arrays["factors"] is None else _factor_sizes(file, path, arrays["factors"])
            low, high = (float(value) for value in file.attrs["value_range"])
            source, sha256 = str(file.attrs["source"]), str(file.attrs["sha256"])
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a data file ({error})") from error
    # copy-on-write: torch wants writable memory, the file is never written to
    mapped: NDArray[np.uint8] = np.memmap(path, np.uint8, "c", offset=offset, shape=shape)
    labels, factors, split = arrays["labels"], arrays["factors"], arrays["split"]
    return Table(mapped, source, sha256, (low, high), labels, factors, sizes, None if split is None else split.astype(np.uint8))


def held_out_groups(group: NDArray[np.int64], held_out: int, seed: int) -> list[int]:
    """The chosen values of `group`, in order."""
    values = np.unique(group)
    if not 0 < held_out < len(values):
        raise UserError(f"{held_out} of {len(values)} groups cannot be held out: at least one must stay on either side")
    chosen = np.random.Generator(np.random.PCG64(seed)).choice(values, held_out, replace=False)
    return sorted(chosen.tolist())


def rows_by_group(table: Table, group: NDArray[np.int64], held_out: int, seed: int, split: str) -> Rows:
    """A split of rows where whole groups (the values of `group` [N]) are held out: `held_out` of them, by a seeded choice.

    The choice depends on the values, the number and the seed alone, so that it is the same for every size of the images.
    """
    import torch

    inside = np.isin(group, held_out_groups(group, held_out, seed))
    index = np.flatnonzero({"train": ~inside, "held_out": inside}[split])
    labels, factors = (None if array is None else torch.from_numpy(array) for array in (table.labels, table.factors))
    return Rows(torch.from_numpy(table.images), labels, factors, torch.from_numpy(index))


def own_dataset(file: Any, name: str, path: Path) -> Any:
    """The data set `name` if its bytes lie in this very file: no link, external storage, virtual set or foreign filter."""
    import h5py

    if name not in file:
        raise UserError(f"{path}: has no data set '{name}'; it has: {', '.join(file) or 'nothing'}")
    parts = name.strip("/").split("/")
    steps = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    if not all(isinstance(file.get(step, getlink=True), h5py.HardLink) for step in steps):
        raise UserError(f"{path}: '{name}' is a link; only data inside the file itself is read")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{path}: '{name}' is no data set")
    if dataset.external or dataset.is_virtual:
        raise UserError(f"{path}: '{name}' lies in other files; only data inside the file itself is read")
    foreign = set(filters_of(dataset)) - BUILT_IN_FILTERS
    if foreign:
        raise UserError(f"{path}: '{name}' needs the filter {', '.join(sorted(foreign))}; only HDF5's own are used")
    return dataset


def filters_of(dataset: Any) -> list[str]:
    """Names of the filters its chunks go through."""
    known = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}
    plist = dataset.id.get_create_plist()
    codes = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    return [known.get(code, f"number {code}") for code in codes]


def _column(file: Any, name: str, path: Path, n: int, axes: int) -> NDArray[np.int64] | None:
    if name not in file:
        return None
    values = own_dataset(file, name, path)[()]
    if not np.issubdtype(values.dtype, np.integer) or values.ndim != axes or len(values) != n or (values < 0).any():
        rows = f"{n} rows of whole numbers from 0 on, as many as there are images, with {axes} axes"
        raise UserError(f"{path}: '{name}' must be {rows}; it is {values.dtype} {list(values.shape)}")
    return np.ascontiguousarray(values, dtype=np.int64)


def _factor_sizes(file: Any, path: Path, values: NDArray[np.int64]) -> dict[str, int]:
    attributes = file["factors"].attrs
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in attributes["names"]]
    sizes = [int(size) for size in attributes["sizes"]]
    if not len(set(names)) == len(names) == len(sizes) == values.shape[1]:
        raise UserError(f"{path}: the attributes names and sizes of 'factors' do not fit its {values.shape[1]} columns")
    if (values >= sizes).any():
        raise UserError(f"{path}: 'factors' has values beyond its sizes {sizes}")
    return dict(zip(names, sizes, strict=True))


def check(path: Path) -> dict[str, Any]:
    """What is in a data file, after reading every byte of it; a `UserError` when its images are not those that were written."""
    table = read(path)
    actual = _sha256(table.images)
    if actual != table.sha256:
        raise UserError(f"{path}: damaged, the images' sha256 is {actual}, the file was written with {table.sha256}")
    return {
        "path": str(path),
        "images": list(table.images.shape),
        "source": table.source,
        "sha256": table.sha256,
        "factors": table.factor_sizes or {},
        "classes": None if table.labels is None else int(table.labels.max()) + 1,
        "held_out": None if table.split is None else int(table.split.sum()),
        "lowest": int(table.images.min()),
        "highest": int(table.images.max()),
    }


def _sha256(images: NDArray[np.uint8]) -> str:
    return hashlib.sha256(images.data).hexdigest()
