"""What the data root holds and can be made again: conversions of foreign files, and preparations that did not come to their end.

A conversion is `hdf5/STEM-PLACE-STATE-HOW.h5`, named by digests of where its source lies, of the state that it was in, and of the
options it was read with. `NAME.from.json` beside it says where the source lies.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from siv_core.data import datafile
from siv_core.errors import UserError, one_line
from siv_core.store import files

FOLDER = "hdf5"


@frozen
class Leftover:
    """Files that nobody will read again, and why."""

    paths: tuple[Path, ...]
    reason: str

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths if path.exists())

    def remove(self) -> str:
        """What was removed, in words."""
        size = self.size
        for path in self.paths:
            if path.exists():
                files.remove(path)
        return f"removed {one_line(self.paths[0])} ({megabytes(size)}): {self.reason}"


def conversion(source: Path, how: str) -> Path:
    """Where the conversion of this file, as it is now, is kept."""
    state = hashlib.sha256(repr(datafile.state(source)).encode()).hexdigest()[:8]
    return files.data_root() / FOLDER / f"{source.stem[:60]}-{_place(source)}-{state}-{how}.h5"


def _place(source: Path) -> str:
    return hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]


def note(path: Path, source: Path) -> None:
    """Say what the conversion `path` is made from."""
    files.make_folder(path.parent)
    files.write_json(_beside(path), {"source": str(source.resolve()), "state": list(datafile.state(source))})


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.from.json")


def _all_of(path: Path) -> tuple[Path, ...]:
    """A conversion, whole or not, and what lies beside it."""
    return (path, *datafile.unfinished(path), _beside(path))


def discard(path: Path) -> None:
    """Take away a conversion that was refused."""
    for one in _all_of(path):
        one.unlink(missing_ok=True)


def remove_superseded(path: Path) -> list[str]:
    """Take away conversions of what the source of `path` was before; a sentence for each."""
    stem, place, state, _ = path.stem.rsplit("-", 3)
    others = {_conversion_of(one) for one in path.parent.glob(f"*-{place}-*.h5*")}
    old = [one for one in sorted(others) if one.stem.rsplit("-", 3)[:-1] not in ([stem, place, state],) and not _busy(one)]
    return [Leftover(_all_of(one), "of an earlier state of the same file").remove() for one in old]


def _conversion_of(entry: Path) -> Path:
    """The conversion that a file of its name belongs to."""
    return entry.with_name(entry.name[: entry.name.index(".h5") + 3])


def _busy(path: Path) -> bool:
    """Whether a process is making this file."""
    lock = path.with_name(f"{path.name}.lock")
    if not lock.exists():
        return False
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def leftovers(root: Path) -> Iterator[Leftover]:
    """What `siv data clean` takes away: nobody is at work on it, and all of it can be made again."""
    for entry in sorted(root.glob(f"{FOLDER}/*.h5")):
        reason = _outdated(entry)
        if reason and not _busy(entry):
            yield Leftover(_all_of(entry), reason)
    for entry in sorted(root.glob("*/*.partial")):
        path = _conversion_of(entry) if ".h5" in entry.name else entry.with_suffix("")
        if not path.exists() and not _busy(path):
            yield Leftover(_all_of(path)[1:], "a preparation that did not come to its end; the next one would go on with it")


def _outdated(path: Path) -> str | None:
    """Why this conversion is not read again, or None."""
    if not _beside(path).exists():
        return "a conversion by an earlier siv"
    try:
        about = files.read_json(_beside(path))
        source, state = Path(about["source"]), tuple(about["state"])
    except (UserError, KeyError, TypeError):
        return "a conversion whose source is not known any more"
    try:
        now = datafile.state(source)
    except UserError:
        return f"its source {one_line(source)} is gone"
    return None if now == state else f"its source {one_line(source)} has changed"


def sizes(root: Path) -> dict[str, int]:
    """Bytes in each folder of the data root."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    return {folder.name: sum(one.stat().st_size for one in folder.rglob("*") if one.is_file()) for folder in folders}


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
