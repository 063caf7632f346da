"""The child process in which videos are decoded: it reads what is asked from `video.decoded`, answers video by video and ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import signal
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siv_core.data import feed
from siv_core.errors import UserError, one_line

MOST_BYTES = 256 << 20  # of one file: a video of KTH has one or two MiB
MOST_PIXELS = 4096 * 4096
MISCOUNTED = 2  # frames by which the header of a sound file may be out: DivX packs two into one, and leaves an empty one
SUFFIXES = (".png", ".jpg", ".jpeg")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # Pillow's, of 8 bits a channel


def main() -> None:
    """Read what is asked, answer it, end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process decides
    request = json.loads(sys.stdin.buffer.read())
    for limit, value in ((resource.RLIMIT_AS, request["memory"]), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS knows the first one by name only
            resource.setrlimit(limit, (value, value))
    for task in request["tasks"]:
        _hurry(request["seconds"], request["patience"])
        try:
            total, found = chosen(task, request)
        except UserError as error:
            _hurry(0, 0)  # how long the other side takes to listen is its own affair
            _send({"problem": "; ".join(error.problems)})
            continue
        except Exception as error:  # whatever a damaged file makes the libraries run into
            _hurry(0, 0)
            _send({"problem": f"cannot be read ({one_line(str(error) or type(error).__name__)[:300]})"})
            continue
        _hurry(0, 0)
        numbers, images = np.array(list(found), np.int64), list(found.values())
        _send({"total": total, "count": len(images), "size": request["size"]}, numbers.tobytes(), *(i.tobytes() for i in images))
    os._exit(0)


def _hurry(computing: float, waiting: float) -> None:
    """End this process after so many seconds, even out of native code: neither signal has a handler."""
    signal.setitimer(signal.ITIMER_PROF, computing)
    signal.setitimer(signal.ITIMER_REAL, waiting)


def _send(answer: dict[str, Any], *parts: bytes) -> None:
    out = sys.stdout.buffer
    out.write(json.dumps(answer).encode() + b"\n")
    for part in parts:
        out.write(part)
    out.flush()


def chosen(task: dict[str, Any], how: dict[str, Any]) -> tuple[int, dict[int, NDArray[np.uint8]]]:
    """How many frames a video has, and {number from 1: uint8 [size, size]} of those that are wanted, in their order."""
    wanted = wanted_of(task["ranges"], how["every"], how["most_frames"])
    found, total = {}, 0
    path = Path(task["path"])
    for number, read in enumerate(pictures(path) if path.is_dir() else frames(contents(path, task["member"])), 1):
        if number > how["most_frames"]:
            raise UserError(f"has more than {how['most_frames']} frames")
        if number in wanted:
            found[number] = fitted(read(), how["size"], how["fit"])
        total = number
    if not total:
        raise UserError("has no frames")
    return total, found


def wanted_of(ranges: list[list[int]] | None, every: int, most: int) -> set[int]:
    """Numbers of frames; ranges may overlap, and each frame is taken once."""
    return {number for first, last in ranges or [[1, most]] for number in range(first, min(last, most) + 1, every)}


def contents(path: Path, member: str) -> bytes:
    """The bytes of a file, or of a member of a zip file, whose check sum is compared."""
    if not member:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"has {path.stat().st_size >> 20} MiB; a video here takes less than {MOST_BYTES >> 20} MiB")
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo(member).file_size
        if size > MOST_BYTES:
            raise UserError(f"has {size >> 20} MiB; a video here takes less than {MOST_BYTES >> 20} MiB")
        return archive.read(member)


def frames(data: bytes) -> Iterator[Any]:
    """Of an avi file, each as a function that gives it in grey, uint8 [H, W], 0 black and 255 white however it is coded."""
    import av

    if data[:4] != b"RIFF" or data[8:12] != b"AVI ":
        raise UserError("is no avi file")
    announced, size = int.from_bytes(data[4:8], "little") + 8, len(data)
    if size + 1 < announced:  # the last chunk may lack the byte that makes it even
        raise UserError(f"is truncated: it has {size} of {announced} bytes")
    # by its name, since other formats open other files
    with av.open(io.BytesIO(data), "r", format="avi") as container:
        if not container.streams.video:
            raise UserError("has no video in it")
        stream = container.streams.video[0]
        if stream.codec_context.width * stream.codec_context.height > MOST_PIXELS:
            raise UserError(f"has frames of {stream.codec_context.width} × {stream.codec_context.height} pixels")
        stream.codec_context.thread_count = 1  # there is a process a core
        total = 0
        for frame in container.decode(stream):
            total += 1
            if frame.is_corrupt:
                raise UserError(f"is damaged in frame {total}")
            yield lambda frame=frame: frame.to_ndarray(format="gray")
        if total + MISCOUNTED < stream.frames:
            raise UserError(f"breaks off after {total} of {stream.frames} frames")


def pictures(folder: Path) -> Iterator[Any]:
    """Of a folder with a picture a frame, numbered in their names, each as a function that gives it in grey, uint8 [H, W]."""
    names = [entry.name for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".")]
    sizes: set[tuple[int, ...]] = set()
    for name in sorted(names, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]):
        yield lambda name=name: picture(folder / name, sizes)


def picture(path: Path, sizes: set[tuple[int, ...]]) -> NDArray[np.uint8]:
    """A frame; `sizes` are those met so far, which must stay one."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.mode not in MODES:
                raise UserError(f"{one_line(path.name)} has pixels of the kind {image.mode}, not of 8 bits")
            if image.width * image.height > MOST_PIXELS:
                raise UserError(f"{one_line(path.name)} has {image.width} × {image.height} pixels")
            sizes.add(image.size)
            if len(sizes) > 1:
                raise UserError(f"{one_line(path.name)} is of another size than the frames before it")
            return np.asarray(image.convert("L"))
    except OSError as error:
        raise UserError(f"{one_line(path.name)} cannot be read ({one_line(error)})") from error


def fitted(frame: NDArray[np.uint8], size: int, fit: str) -> NDArray[np.uint8]:
    """A frame [H, W] as [size, size]: its centre, or all of it stretched; area means, rounded once."""
    rows, columns = frame.shape
    top, left, height, width = feed.window(rows, columns, size, size, fit)
    if size > min(height, width):
        raise UserError(f"has frames of {columns} × {rows} pixels, too few for size = {size}")
    if (height, width) == (size, size):
        return np.ascontiguousarray(frame[top : top + height, left : left + width])
    part = frame[top : top + height, left : left + width].astype(np.float32)
    return np.rint(shares(height, size) @ part @ shares(width, size).T).astype(np.uint8)


@cache
def shares(n: int, m: int) -> NDArray[np.float32]:
    """[m, n]: how much of each of n pixels in a row lies in each of m larger ones, in parts of these."""
    edges, pixels = np.arange(m + 1)[:, None] * (n / m), np.arange(n)
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return (overlap.clip(min=0) * (m / n)).astype(np.float32)


if __name__ == "__main__":
    main()
