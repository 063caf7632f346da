"""Several processes under `torchrun`: each takes its share of the global batch, and one flattened sum joins the gradients.

With one process everything here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

from siv_core.errors import UserError


@frozen
class Parallel:
    rank: int = 0
    world: int = 1
    control: dist.ProcessGroup | None = None  # gloo, for decisions: never touches the device

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process's rows of n, at least one."""
        if n < self.world:
            reason = f"{n} images cannot be shared by {self.world} processes"
            raise UserError(f"train.batch: {reason}; make the batch larger or start fewer (torchrun --nproc-per-node)")
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the processes, in place and in one message."""
        if self.world > 1 and tensors:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def largest(self, value: int) -> int:
        """The largest of the processes' values: how they agree that one of them was asked to stop."""
        if self.world == 1:
            return value
        agreed = torch.tensor(value)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.control)
        return int(agreed)

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.control)


def local_device(device: torch.device) -> torch.device:
    """The device of this process: of several on a machine with CUDA each takes the one with its number, before any is used."""
    if _world() == 1 or device.type != "cuda" or device.index is not None:
        return device
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise UserError(
            f"--device {device}: process {number} of this machine needs a CUDA device of its own, there are {there};"
            " start fewer (torchrun --nproc-per-node)"
        )
    own = torch.device("cuda", number)
    torch.cuda.set_device(own)
    return own


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: torch.device) -> Parallel:
    """Join the processes `torchrun` started, if it did."""
    if _world() == 1:
        return Parallel()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Parallel(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))  # type: ignore[arg-type]
