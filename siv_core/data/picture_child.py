"""A child process that decodes pictures for `picture_pool`: it reads a line of JSON, answers it, and ends with its input.

It loads no torch, writes no file and has bounded memory. An answer is a line of JSON and, where that tells its shape, an array.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import resource
import signal
import sys
import traceback
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from siv_core.data.picture import Fitting, decoded, fitted, pixels
from siv_core.data.picture_list import LMDB, MOST_OF_A_PICTURE
from siv_core.errors import UserError, one_line

MEMORY = 4 << 30  # bytes of address space: a picture of the most pixels that are read takes a tenth
KEYS_AT_ONCE = 50_000


class Changed(Exception):
    """A picture is no longer what it was when the place was listed."""


def main() -> None:
    """Answer until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process decides
    for limit, value in ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))
    import PIL.Image

    PIL.Image.init()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        with contextlib.suppress(ValueError, OSError):
            # a memory map of an LMDB is as large as that
            most = MEMORY if request["kind"] != "lmdb" else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
        try:
            answer, array = _keys(**request) if "after" in request else block(**request)
        except UserError as error:
            answer, array = {"problems": error.problems}, b""
        except Exception:
            answer, array = {"bug": traceback.format_exc()}, b""
        out = sys.stdout.buffer
        try:
            out.write(json.dumps(answer).encode() + b"\n")
            out.write(array)
            out.flush()
        except BrokenPipeError:
            break
    os._exit(0)


def block(place: str, kind: str, entries: list[list[Any]], fitting: dict[str, Any] | None) -> tuple[dict[str, Any], Any]:
    """The images of these pictures, and what was done to each. A damaged one is black and in `damaged`, with the reason."""
    how = None if fitting is None else Fitting(**{**fitting, "box": tuple(fitting["box"])})
    rows = np.zeros((0 if how is None else len(entries), *(() if how is None else (how.channels, how.size, how.size))), np.uint8)
    damaged: dict[int, str] = {}
    changed: list[str] = []
    sizes, modes, changes = Counter[str](), Counter[str](), Counter[str]()
    for i, (name, size, time) in enumerate(entries):
        where = one_line(os.path.join(place, name)) if kind == "folder" else f"{one_line(place)}: {one_line(name)}"
        try:
            source = _opened(place, kind, name, size, time, where)
            picture, told = decoded(source, where)
            if how is None:
                _, more = pixels(picture, 3)
            else:
                rows[i], more = fitted(picture, how, where)
        except Changed:
            changed.append(name)
            continue
        except UserError as error:
            damaged[i] = error.problems[0]
            continue
        sizes[f"{picture.width} × {picture.height}"] += 1
        modes[picture.mode] += 1
        changes.update(line.partition(":")[0] if how else line for line in (*told, *more))
    about = {"damaged": damaged, "changed": changed, "sizes": sizes, "modes": modes, "changes": changes}
    return {**about, "shape": rows.shape}, rows.data


def _opened(place: str, kind: str, name: str, size: int, time: int, where: str) -> Path | BinaryIO:
    """The picture of this name, for the decoder."""
    try:
        if kind == "zip":
            with _zip(place).open(name) as member:
                data = member.read(MOST_OF_A_PICTURE)
            return io.BytesIO(data)
        if kind == "lmdb":
            with _lmdb(place).begin(buffers=False) as transaction:
                data = transaction.get(name.encode("latin-1"))
            if data is None:
                raise Changed
            return io.BytesIO(data)
        path = Path(place, name)
        if size >= 0:
            about = path.stat()
            if (about.st_size, about.st_mtime_ns) != (size, time):
                raise Changed
        return path
    except Changed:
        raise
    except (FileNotFoundError, NotADirectoryError, KeyError) as error:
        raise Changed from error
    except Exception as error:  # whatever a damaged archive makes the reader run into
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{where}: no picture that can be read ({one_line(reason)[:300]})") from error


@functools.lru_cache(maxsize=1)
def _zip(place: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(place)


@functools.lru_cache(maxsize=1)
def _lmdb(place: str) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise UserError("reading an LMDB needs the package lmdb: pip install 'siv[lsun]'") from error
    try:
        return lmdb.open(place, readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise UserError(f"{one_line(place)}: its {LMDB} cannot be read as an LMDB ({one_line(error)})") from error


def _keys(place: str, kind: str, after: str, most: int) -> tuple[dict[str, Any], Any]:
    """The next keys of an LMDB, as text, in their order."""
    found, opened = list[str](), _lmdb(place)
    try:
        with opened.begin(buffers=False) as transaction:
            cursor = transaction.cursor()
            there = cursor.set_range(after.encode("latin-1") + b"\0") if after else cursor.first()
            while there and len(found) < min(most, KEYS_AT_ONCE):
                key = cursor.key().decode("latin-1")
                if key <= (found[-1] if found else after):  # a tree that leads round in a circle has no end
                    raise ValueError("they are not in order")
                found.append(key)
                there = cursor.next()
    except Exception as error:  # whatever a damaged tree of keys makes the library run into
        raise UserError(f"{one_line(place)}: its keys cannot be read ({one_line(error)[:300]}); get it again") from error
    return {"keys": found}, b""


if __name__ == "__main__":
    main()
