"""Where a run computes, and in which arithmetic."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from siv_core.errors import UserError
from siv_core.recipe.options import Train
from siv_core.train import parallel


def nvidia_present() -> bool:
    """Whether the machine has an NVIDIA device, usable or not. Asks the operating system, not torch."""
    return any(Path(name).exists() for name in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA where there is an NVIDIA device, else the CPU. A device that is there and does not work is an error."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if name == "cpu" or (name == "auto" and not nvidia_present() and not torch.cuda.is_available()):
        return torch.device("cpu")
    try:
        device = parallel.local_device(torch.device("cuda" if name == "auto" else name))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable ({error}); `--device cpu` does without it") from error
    return device


def set_precision(train: Train) -> None:
    """What a recipe says of the arithmetic, for this process."""
    torch.set_float32_matmul_precision("high" if train.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = train.precision == "tf32"
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
