"""Files that are whole or not there: every write goes to a temporary name, is flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from siv_core.errors import UserError

TEMPORARY = ".siv-tmp-"  # prefix of everything half-written; the next start removes what a killed process left
WAIT_SECONDS = 0.2  # between two looks at a lock that another process has


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` in one step when the block ends well."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file; a `UserError` names the file that is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error})") from error


def append_json(path: Path, value: Any) -> None:
    """One line more at the end of a JSONL file, on disk when this returns."""
    with path.open("ab") as file:
        file.write((json.dumps(finite_or_text(value), allow_nan=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[Any]:
    """Every whole line; a last line without its end (a killed writer) is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1] if line.strip()]


def finite_or_text(value: Any) -> Any:
    """The same tree with nan and inf spelt as strings, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: finite_or_text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_text(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
        with lock.open("a+") as file:
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


def remove_leftovers(folder: Path) -> None:
    """Take away what a killed process left half-written in `folder`."""
    for entry in folder.glob(TEMPORARY + "*"):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def data_root() -> Path:
    """Where prepared data and weights live: SIV_DATA, else the user's data folder."""
    chosen = os.environ.get("SIV_DATA")
    if chosen:
        return Path(chosen).expanduser()
    share = os.environ.get("XDG_DATA_HOME")
    try:
        return Path(share) / "siv" if share else Path.home() / ".local" / "share" / "siv"
    except RuntimeError as error:
        raise UserError("no home folder is known: set SIV_DATA to a folder for data and weights") from error
