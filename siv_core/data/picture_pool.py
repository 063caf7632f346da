"""Pictures are decoded by child processes, one a core: native code stays out of the process, and all cores have work.

A child (`picture_child`, no torch) is asked for a block at a time and has only that in memory. It is started as a program of its
own: nothing of this process is forked, whatever threads it has, and nobody's script is run a second time. It ends with the pipe
that leads to it, however this process ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from siv_core.data.picture import Fitting
from siv_core.data.picture_list import Entry
from siv_core.errors import UserError, how_it_ended, one_line
from siv_core.store import memory

Answer = tuple[int, dict[str, Any], NDArray[np.uint8]]  # block number, what was told of it, images [n, C, S, S]
FEW = 64  # pictures that a second child is not started for
MOST_CHILDREN = 32
PIPE = 1 << 20  # bytes: fewer wakings than with the usual 64 KiB
LOOK = 0.3  # seconds between two calls of `waiting`


class Child:
    """One process, and the block that it is at work on."""

    def __init__(self) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        # -P: the folder one works in may hold somebody's PIL.py
        command = [sys.executable, "-P", "-m", "siv_core.data.picture_child"]
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, pipesize=PIPE
        )
        self.number = 0
        self.doing = ""

    def ask(self, doing: str, **request: Any) -> None:
        self.doing = doing
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise self._death() from error

    def answer(self) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        out = self.process.stdout
        assert out is not None
        try:
            told = json.loads(out.readline())
            shape = told.pop("shape", [0])
            rows = np.frombuffer(out.read(math.prod(shape)), np.uint8).reshape(shape)
        except ValueError as error:  # an answer that breaks off
            raise self._death() from error
        if "problems" in told:
            raise UserError(told["problems"])
        if "bug" in told:
            raise RuntimeError(f"while {self.doing}:\n{told['bug']}")
        return told, rows

    def _death(self) -> UserError:
        self.process.kill()
        how = how_it_ended(self.process.wait())
        why = "the machine had no memory left, somebody ended it, or a picture broke the decoder down"
        return UserError(
            f"{self.doing}: the process that decodes pictures ended ({how}): {why}; the same command goes on where it stopped"
        )

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe:
                    pipe.close()


def children(pictures: int, blocks: int) -> int:
    """How many are of use."""
    return 1 if pictures < FEW else max(1, min(memory.cores(), blocks, MOST_CHILDREN))


def decoded(
    place: Path,
    kind: str,
    blocks: Callable[[int], Sequence[Entry]],
    numbers: Sequence[int],
    fitting: Fitting | None,
    waiting: Callable[[], None],
) -> Iterator[Answer]:
    """(number, what was told, uint8 [n, C, S, S]) of each of these blocks of pictures, in any order.

    Told are `damaged` {number in the block: why}, whose rows are black, `changed` [names] of what is no longer as it was listed,
    and counts of `sizes`, `modes` and `changes`. Without a `fitting` the pictures are only looked at. `waiting` is called at
    least three times a second; what it raises ends all. A child that dies is a `UserError`.
    """
    if not numbers:
        return
    how = None if fitting is None else attrs.asdict(fitting)
    left = iter(numbers)
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())

        def give(child: Child) -> bool:
            child.number = next(left, -1)
            if child.number < 0:
                return False
            entries = blocks(child.number)
            names = f"{one_line(entries[0].name)} … {one_line(entries[-1].name)}"
            child.ask(f"{one_line(place)}: {names}", place=str(place), kind=kind, entries=entries, fitting=how)
            return True

        for _ in range(children(sum(len(blocks(number)) for number in numbers[:FEW]), len(numbers))):
            child = Child()
            stack.callback(child.end)
            assert child.process.stdout is not None
            if give(child):
                selector.register(child.process.stdout, selectors.EVENT_READ, child)
        while selector.get_map():
            ready = selector.select(LOOK)
            waiting()
            for key, _ in ready:
                child = key.data
                number, (told, rows) = child.number, child.answer()
                if not give(child):
                    selector.unregister(key.fileobj)
                yield number, told, rows


def keys(place: Path, most: int) -> list[str]:
    """The first `most` keys of an LMDB in their order (0: all), read by a child."""
    child, found = Child(), list[str]()
    try:
        while not most or len(found) < most:
            wanted = most - len(found) if most else sys.maxsize
            child.ask(
                f"{one_line(place)}: its keys", place=str(place), kind="lmdb", after=found[-1] if found else "", most=wanted
            )
            page = child.answer()[0]["keys"]
            if not page:
                break
            found += page
    finally:
        child.end()
    return found
