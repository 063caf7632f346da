"""How much memory there is, a refusal of what asks for more before the machine has to give it, and what is kept between steps."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from siv_core.errors import UserError

FACTORIES = {
    "empty",
    "empty_strided",
    "zeros",
    "ones",
    "full",
    "rand",
    "randn",
    "randint",
}  # those whose size is their first argument


def free() -> int:
    """Bytes that this process can still get: what the system calls available, within the limit of its container."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: all there is
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        return min(available, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit
        return available


def keep_what_is_freed() -> None:
    """From here on this process gives no freed memory back to the system, where glibc serves it; its peak stays what it was.

    A step on the CPU frees all that it allocates. glibc hands large blocks back, and the next step gets new pages, each at
    a page fault: thousands a step.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 1 << 30)


def need(what: str, size: int, remedy: str) -> None:
    """A `UserError` where `size` bytes are more than there are."""
    there = free()
    if size > there:
        raise UserError(f"{what} would take at least {text(size)} of memory, {text(there)} are free here: {remedy}")


def text(size: int) -> str:
    """13.2 GB."""
    power = max(0, min(6, int(math.log10(max(size, 1))) // 3))
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB', 'EB')[power]}"


class Bounded(TorchDispatchMode):
    """Within it new tensors on the CPU may take what is free at its start, and are refused before they are made."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.what, self.remedy, self.taken = what, remedy, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in FACTORIES and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            size = math.prod(args[0]) * (kwargs.get("dtype") or torch.get_default_dtype()).itemsize
            if size > 1_000_000:  # small ones are not worth a look at the system
                need(self.what, self.taken + size, self.remedy)
            self.taken += size
        return func(*args, **kwargs)
