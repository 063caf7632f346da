"""Files that are downloaded: whole and of the right digest, or not there."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from siv_core.errors import UserError
from siv_core.protocols import Progress
from siv_core.store import files

CHUNK = 1 << 20
KIB = 1024


def fetch(url: str, target: Path, md5: str, most: int, progress: Progress) -> None:
    """Bring `url` to `target`, unless it is there already; what has not this MD5, or over `most` bytes, is a `UserError` and not
    kept. The digest is what protects where a host offers no https."""
    from http.client import HTTPException

    files.make_folder(target.parent)
    files.remove_leftovers(target.parent, f"-{target.name}")  # of a download that was killed
    if target.is_file() and files.digest(target, "md5") == md5:
        return
    with files.replacing(target) as file:
        try:
            _download(url, file, target.name, most, progress)
        except (OSError, HTTPException) as error:  # HTTPException: an answer that is no HTTP, or breaks off
            raise UserError(f"{url}: cannot be fetched ({error}); get {target.name} elsewhere and put it at {target}") from error
        actual = files.digest(Path(file.name), "md5")
        if actual != md5:
            raise UserError(f"{url}: what came has the MD5 {actual}, the original has {md5}; nothing was kept")


def _download(url: str, file: BinaryIO, name: str, most: int, progress: Progress) -> None:
    from urllib.request import urlopen

    with urlopen(url, timeout=60) as response:
        total, done = int(response.headers.get("Content-Length") or 0), 0
        while chunk := response.read(CHUNK):
            done += len(chunk)
            if max(done, total) > most:
                raise UserError(f"{url}: offers more than {most >> 20} MiB; the original is smaller, nothing was kept")
            file.write(chunk)
            progress(f"fetching {name} (KiB)", done // KIB, max(done, total) // KIB)
    file.flush()
