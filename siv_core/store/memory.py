"""How much memory there is (and how many cores), a refusal of what asks for more before the machine has to give it, and what is
kept between steps."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from siv_core.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

MEMINFO = "/proc/meminfo"
UNKNOWN = 4 << 30  # what a machine that does not say is taken to have free, in bytes
CGROUPS = (  # limit and use of this process's container: of version 2, of version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free(device: torch.device | str = "cpu") -> int:
    """Bytes that this process can still get there; on the CPU what the system calls available, within its container's limit."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in Path(MEMINFO).read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux, which alone tells what is free: half of what there is
        pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else 0
        return pages * os.sysconf("SC_PAGE_SIZE") // 2 or UNKNOWN
    for limit, used in CGROUPS:
        try:
            return min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such container, or one without a limit
            continue
    return available


def size_of(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers; of modules on the device "meta" what they would take."""
    return sum(x.numel() * x.element_size() for module in modules for x in (*module.parameters(), *module.buffers()))


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
