"""Frames of videos, decoded by child processes, one a core: the decoder is native code, which a damaged file can crash.

Each child, `video_child` without torch, has a share of the videos, `SECONDS` of computing for each and `MEMORY` bytes, and may
write no file. A child that dies costs the video it was at, of which that is told, and another one goes on with the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core.errors import how_it_ended
from siv_core.store import memory

SECONDS = 120  # of computing for one video, where one of KTH takes a tenth of a second
PATIENCE = 600  # seconds for one video, whatever the reason
MEMORY = 4 << 30  # bytes of address space
MOST_FRAMES = 4096  # of one video


@frozen
class Video:
    """Where a video is: an avi file, a `member` of a zip file, or a folder with a picture a frame."""

    name: str
    path: Path
    member: str = ""
    ranges: tuple[tuple[int, int], ...] | None = (
        None  # of frames that are wanted, from the first to the last, counted from 1; None: all
    )


@frozen(eq=False)
class Frames:
    total: int  # that the video has
    numbers: NDArray[np.int64]  # [n], of those that were wanted, counted from 1
    images: NDArray[np.uint8]  # [n, size, size], grey


class _Child:
    """A process and the videos that it has still to answer for."""

    def __init__(self, videos: Sequence[Video], how: dict[str, Any]) -> None:
        self.videos = list(videos)
        tasks = [{"path": str(v.path), "member": v.member, "ranges": v.ranges} for v in videos]
        limits = {"seconds": SECONDS, "patience": PATIENCE, "memory": MEMORY, "most_frames": MOST_FRAMES}
        # -P: the folder one works in may hold somebody's av.py; unbuffered, so that no byte is read before it is asked for
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-P", "-m", "siv_core.data.video_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin:
            request = json.dumps({**how, **limits, "tasks": tasks}).encode()
            while request:  # an unbuffered pipe may take a part
                request = request[self.process.stdin.write(request) :]

    def answer(self) -> Frames | str:
        """Of the first video that is left, which is then none any more."""
        try:
            found = json.loads(self._line())
            if "problem" in found:
                return str(found["problem"])
            count, size = found["count"], found["size"]
            numbers = np.frombuffer(self._bytes(8 * count), np.int64)
            return Frames(
                found["total"], numbers, np.frombuffer(self._bytes(count * size * size), np.uint8).reshape(-1, size, size)
            )
        except ValueError:  # an answer that breaks off
            self.process.kill()
            return _death(self.process.wait())
        finally:
            del self.videos[0]

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def _bytes(self, size: int) -> bytes:
        assert self.process.stdout is not None
        found = bytearray()
        while len(found) < size:
            piece = self.process.stdout.read(size - len(found))
            if not piece:
                raise ValueError("it breaks off")
            found += piece
        return bytes(found)

    def end(self) -> None:
        assert self.process.stdout is not None
        self.process.kill()
        self.process.stdout.close()
        self.process.wait()


def decoded(videos: Sequence[Video], size: int, fit: str, every: int) -> Iterator[tuple[Video, Frames | str]]:
    """Each video with its frames, or with why it has none, in the order in which they are done.

    Of each range the first frame is taken and then every `every`-th. Frames become `size` pixels a side, cut to their centre
    (`fit` "crop") or stretched, by area means.
    """
    how = {"size": size, "fit": fit, "every": every}
    workers = min(memory.cores(), len(videos))
    with selectors.DefaultSelector() as waiting, contextlib.ExitStack() as ending:

        def start(share: Sequence[Video]) -> None:
            child = _Child(share, how)
            ending.callback(child.end)
            assert child.process.stdout is not None
            waiting.register(child.process.stdout, selectors.EVENT_READ, child)

        for worker in range(workers):
            start(videos[worker::workers])
        while waiting.get_map():
            for key, _ in waiting.select():
                child: _Child = key.data
                video, answer = child.videos[0], child.answer()
                dead = child.process.poll() is not None
                if dead or not child.videos:
                    waiting.unregister(key.fileobj)
                if dead and child.videos:
                    start(child.videos)
                yield video, answer


def _death(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"is decoded for more than {SECONDS} s without an end, as where it is damaged"
    if code == -signal.SIGALRM:
        return f"was not decoded in {PATIENCE} s: is its disk at work?"
    return f"the decoder broke down over it ({how_it_ended(code)}), as on a damaged file or without memory"
