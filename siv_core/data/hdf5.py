"""HDF5 files are opened by a child process alone: the library is native code, which a damaged file can crash or keep busy.

`ask` starts the child, `hdf5_child` without torch, and gives its answers one by one. The child has `SECONDS` of computing for
each answer and `MEMORY` bytes, may write no file and loads no filter from outside; its death becomes one sentence. An answer is a
line of JSON and, where it says so, the bytes of an array; the last one is {"end": true} or {"problems": [...]}.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from siv_core.data.hdf5_file import REMEDY, Answer
from siv_core.errors import UserError, how_it_ended, one_line

SECONDS = 10  # of computing for one answer, where an image takes milliseconds; a busy machine does not count
PATIENCE = 120  # seconds for one answer, whatever the reason
MEMORY = 4 << 30  # bytes of address space


def ask(path: Path, question: str, **details: Any) -> Iterator[Answer]:
    """The child's answers to `look`, `blocks` or `survey`; a `UserError` for whatever it or its death tells."""
    limits = {"seconds": SECONDS, "patience": PATIENCE, "memory": MEMORY}
    request = json.dumps({"path": str(path), "question": question, "details": details, **limits}).encode()
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    # -P: the folder one works in may hold somebody's h5py.py
    child: subprocess.Popen[bytes] = subprocess.Popen(
        [sys.executable, "-P", "-m", "siv_core.data.hdf5_child"], env=environment, **pipes
    )  # type: ignore[call-overload]
    with child:
        assert child.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(request)
            while True:
                answer, array = _next(child, path)
                if "problems" in answer:
                    raise UserError(answer["problems"])
                if "end" in answer:
                    return
                yield answer, array
        finally:
            child.kill()


def _next(child: subprocess.Popen[bytes], path: Path) -> Answer:
    assert child.stdout is not None
    try:
        answer = json.loads(child.stdout.readline())
        if "array" not in answer:
            return answer, None
        dtype, shape = answer.pop("array")
        wide = np.dtype(dtype)
        return answer, np.frombuffer(child.stdout.read(math.prod(shape) * wide.itemsize), wide).reshape(shape)
    except ValueError as error:  # an answer that breaks off
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)
        child.kill()
        raise UserError(_death(path, child.wait())) from error


def _death(path: Path, code: int) -> str:
    where = one_line(path)
    if code == -signal.SIGPROF:
        return f"{where}: HDF5 reads in it for more than {SECONDS} s without an end, as in a damaged file; {REMEDY}"
    if code == -signal.SIGALRM:
        return f"{where}: HDF5 had no answer in {PATIENCE} s: is its disk at work? Else {REMEDY}"
    return f"{where}: HDF5 broke down while it read it ({how_it_ended(code)}), as on a damaged file or without memory; {REMEDY}"
