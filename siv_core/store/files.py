"""Files that are whole or not there: every write goes to a temporary name, is flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from siv_core.errors import UserError

TEMPORARY = ".siv-tmp-"  # prefix of everything half-written; the next start removes what a killed process left
WAIT_SECONDS = 0.2  # between two looks at a lock that another process has
REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or ask for a larger quota",
    errno.EFBIG: "lift the limit on the size of files (ulimit -f), or the file system's own",
    errno.EROFS: "make it writable, or name another folder",
    errno.EACCES: "give yourself the right to write there, or name another folder",
    errno.EPERM: "give yourself the right to write there, or name another folder",
    errno.ENOENT: "the folder is gone: bring it back",
    errno.EIO: "the device fails: look at it before anything else is written there",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in words what keeps `path` from being written: a full disk, a folder that is read-only or gone."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "look at the folder and its file system")
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` in one step when the block ends well."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with writing(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written nothing was
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file; a `UserError` names the file that is missing or damaged."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path}: is no file")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error})") from error


def append_json(path: Path, *values: Any) -> None:
    """A line a value at the end of a JSONL file, all in one write and on disk when this returns; half a line that a killed or
    failed writer left at the end is taken away first."""
    lines = b"".join((json.dumps(finite_or_text(value), allow_nan=False) + "\n").encode() for value in values)
    with writing(path), path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size and _last_byte(file) != b"\n":
            file.seek(0)
            size = file.truncate(file.read().rfind(b"\n") + 1)
        try:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a last line without its end (a killed writer) is left out, another damaged one is a `UserError`."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            value = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            value = line
        if isinstance(value, dict):
            found.append(value)
        elif value is not None:
            raise UserError(f"{path}: line {number} is damaged, it is no JSON object; take it out, the others are good")
    return found


def format_problem(value: Any, path: Path, reads: int, oldest: int | None = None) -> list[str]:
    """What is wrong with the `format` of a file of ours, and what to do; nothing where it is one this siv reads,
    that from `oldest` on, or `reads` alone."""
    found = value.get("format") if isinstance(value, dict) else None
    if type(found) is not int:
        return [f"{path}: damaged, it does not give its format"]
    if found > reads:
        return [f"{path}: format {found} is of a newer siv, this one reads {reads}: update it (pip install --upgrade siv)"]
    if found < (reads if oldest is None else oldest):
        return [f"{path}: format {found} is of an older siv, this one reads {reads}: use the one that manifest.json names"]
    return []


def finite_or_text(value: Any) -> Any:
    """The same tree with nan and inf spelt as strings, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: finite_or_text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_text(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def free_names(folder: Path, name: str, suffixes: Iterable[str]) -> list[Path]:
    """`folder`/name`suffix` for each suffix, with the same number where one of them is taken: nothing is overwritten. The folder
    is made."""
    make_folder(folder)
    suffixes, stem, number = list(suffixes), name, 1
    while any((folder / f"{stem}{suffix}").exists() for suffix in suffixes):
        number += 1
        stem = f"{name}-{number}"
    return [folder / f"{stem}{suffix}" for suffix in suffixes]


def make_folder(path: Path) -> None:
    """The folder and those above it, unless it is there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: this folder cannot be made ({error.strerror})") from error


@contextlib.contextmanager
def alone(path: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Keep other processes from making `path` at the same time: `PATH.lock`, which goes with the process, however it ends.

    `waiting` is called again and again while another process has it; what it raises ends the wait. Gives whether one waited.
    """
    lock, waited = path.with_name(path.name + ".lock"), False
    while True:
        with writing(lock):
            file = lock.open("a+")
        with file:
            while not _locked(file):
                waited = True
                waiting()
                time.sleep(WAIT_SECONDS)
            # the one before took its lock file away when it was done: then this one guards nothing
            if _is_at(file, lock):
                try:
                    yield waited
                finally:
                    lock.unlink(missing_ok=True)
                return


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def sync_folder(path: Path) -> None:
    """Flush a folder's own entries, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def remove_leftovers(folder: Path, names: str = "") -> None:
    """Take away what a killed process left half-written in `folder`."""
    for entry in folder.glob(TEMPORARY + "*"):
        if names in entry.name:
            remove(entry)


def remove(path: Path) -> None:
    """Take away a file, a folder with all that is in it, or a link, but never what a link leads to."""
    with writing(path):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~name` put out in full; a `UserError` where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: whose home folder that is, is not known; write the path in full") from error


def data_root() -> Path:
    """Where prepared data and weights live: SIV_DATA, else the user's data folder."""
    chosen = os.environ.get("SIV_DATA")
    if chosen:
        return expanded(chosen)
    share = os.environ.get("XDG_DATA_HOME")
    try:
        return Path(share) / "siv" if share else Path.home() / ".local" / "share" / "siv"
    except RuntimeError as error:
        raise UserError("no home folder is known: set SIV_DATA to a folder for data and weights") from error
