"""Files and archives of others, read into memory within bounds: nothing is unpacked to disk, no announced size is believed."""

from __future__ import annotations

import gzip
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from siv_core.errors import UserError, one_line

MOST_TIMES_SMALLER = 100  # an archive than what is in it: its images are compressed already
GZIP = b"\x1f\x8b"
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError, zlib.error, OverflowError, NotImplementedError)


class Inflated(gzip.GzipFile):
    """The bytes of a tar.gz; one that announces more than any archive of images holds is no such archive."""

    def __init__(self, file: BinaryIO, most_in_a_file: int) -> None:
        super().__init__(fileobj=file)
        self.most_in_a_file = most_in_a_file
        self.most = max(most_in_a_file, MOST_TIMES_SMALLER * os.fstat(file.fileno()).st_size)

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= self.most_in_a_file + tarfile.BLOCKSIZE or self.tell() > self.most:
            raise tarfile.ReadError("it unpacks to far more than an archive of images does")
        return super().read(size)


def tar_gz(
    file: BinaryIO, name: str, wanted: Callable[[PurePosixPath], bool], most: int, take: Callable[[PurePosixPath], bool]
) -> Iterator[tuple[str, int, bytes]]:
    """(file name, size, bytes) of the wanted files in a tar.gz of this `name`, in its order; of those that are not to be taken
    the bytes are empty. A `UserError` where one has over `most` bytes, is no regular file, or the archive is damaged."""
    total = file.seek(0)
    try:
        with Inflated(file, most) as inflated, tarfile.open(fileobj=inflated, mode="r:") as tar:
            for member in tar:
                path, where = PurePosixPath(member.name), f"{name}: {one_line(member.name)}"
                total += member.size
                if member.size < 0 or total > inflated.most:
                    raise tarfile.ReadError("it unpacks to far more than an archive of images does")
                if not wanted(path):
                    continue
                if path.is_absolute() or ".." in path.parts or not member.isreg():
                    raise UserError(f"{where} is no regular file inside the archive")
                check_size(member.size, where, most)
                reader = tar.extractfile(member) if take(path) else None
                yield path.name, member.size, reader.read() if reader else b""
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"{name}: cannot be read as a tar.gz archive ({one_line(error)})") from error


def zipped(file: BinaryIO, name: str, wanted: Callable[[PurePosixPath], bool], most: int) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of the wanted files in a zip of this `name`, in its order; refused as by `tar_gz`."""
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                path, where = PurePosixPath(member.filename), f"{name}: {one_line(member.filename)}"
                if not wanted(path):
                    continue
                if path.is_absolute() or ".." in path.parts or member.is_dir() or member.flag_bits & 1:
                    raise UserError(f"{where} is no plain file inside the archive")
                with archive.open(member) as reader:
                    data = reader.read(most + 1)
                check_size(len(data), where, most)
                yield path.name, data
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"{name}: cannot be read as a zip archive ({one_line(error)})") from error


def check_size(size: int, where: str, most: int, what: str = "such a file") -> None:
    if size > most:
        raise UserError(f"{where}: has {size >> 20} MiB; {what} takes far less than {most >> 20} MiB")


def read(path: Path, most: int, what: str = "such a file") -> bytes:
    """The bytes of a regular file of at most `most` bytes: a device or a pipe might never end."""
    try:
        if not path.is_file():
            raise UserError(f"{one_line(path)}: is no regular file")
        check_size(path.stat().st_size, one_line(path), most, what)
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{one_line(path)}: cannot be read ({error.strerror})") from error


def inflated(data: bytes, most: int) -> bytes:
    """What gzip made these bytes of; a ValueError where they are damaged, or become over `most`."""
    pieces, size, rest = [], 0, data
    while rest:  # a file may be made of several streams
        inflater = zlib.decompressobj(wbits=31)
        try:
            piece = inflater.decompress(rest, most - size + 1)
        except zlib.error as error:
            raise ValueError(f"damaged, what gzip made cannot be unpacked ({error})") from error
        size += len(piece)
        if size > most:
            raise ValueError(f"it unpacks to more than {most >> 20} MiB")
        if not inflater.eof:
            raise ValueError(f"it breaks off: unpacked it has {size:,} bytes, and no end")
        pieces.append(piece)
        rest = inflater.unused_data.lstrip(b"\0")
    return b"".join(pieces)
