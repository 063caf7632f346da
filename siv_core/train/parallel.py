"""Several processes under `torchrun`: each takes its share of the global batch, and one flattened sum joins the gradients.

With one process everything here is the identity.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from siv_core.errors import SivError, UserError

PATIENCE = timedelta(days=7)  # for the main process, which measures and draws while the others wait


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """A `SivError` where another process does not answer: what is wrong with it, it says itself."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise SivError(
            f"another process of this run is gone or does not answer ({reason}): the last checkpoint is good and the same command"
            " goes on; `torchrun --max-restarts N` starts it again by itself"
        ) from error


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
            with answered():
                dist.all_reduce(flat)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def mean(self, x: Tensor) -> Tensor:
        """[N, …] to its mean over the samples of all processes, with gradient."""
        if self.world == 1:
            return x.mean(dim=0)
        count = torch.tensor([len(x)], dtype=x.dtype, device=x.device)
        total = summed(torch.cat([x.sum(dim=0).flatten(), count]))
        return (total[:-1] / total[-1]).view(x.shape[1:])

    @torch.no_grad()
    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the main one's values, in place."""
        if self.world > 1:
            for tensor in tensors:
                with answered():
                    dist.broadcast(tensor, src=0)

    def largest(self, value: int) -> int:
        """The largest of the processes' values: how they agree that one of them was asked to stop."""
        if self.world == 1:
            return value
        agreed = torch.tensor(value)
        with answered():
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.control)
        return int(agreed)

    def wait(self) -> None:
        if self.world > 1:
            with answered():
                dist.barrier(group=self.control)


class _Summed(torch.autograd.Function):
    """The sum over the processes; each of them needs the gradients of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def summed(x: Tensor) -> Tensor:
    """The sum of x over the processes, with gradient. All of them have to call it, and go backwards through it, together."""
    total: Tensor = _Summed.apply(x)
    return total


class _SharedNorm(torch.autograd.Function):
    """x [N, C, …] normalised by mean and population variance over the samples of all processes, through which its gradient goes;
    with them, [C] each, and the number of values that they are of. A message forward, another backward, [2C + 1] and [2C].

    What is made of all pixels is made by torch's fused batch norm with given statistics; written out it is a dozen passes over x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        over = [0, *range(2, x.dim())]
        mean = wide.mean(dim=over, keepdim=True)
        variance = (wide - mean).square().mean(dim=over)  # [C]; torch.var_mean takes ten times as long
        own = mean.flatten().double()
        total = torch.cat([own, variance + own.square(), own.new_ones(1)]) * (x.numel() // x.shape[1])
        dist.all_reduce(total)
        n = total[-1]
        mean, square = (total[:-1] / n).chunk(2)
        mean, variance = mean.to(wide.dtype), (square - mean.square()).to(wide.dtype)
        ctx.save_for_backward(x, weight, mean, variance, n)
        ctx.eps = eps
        y = F.batch_norm(wide, mean, variance, weight, bias, training=False, eps=eps).to(x.dtype)
        ctx.mark_non_differentiable(mean, variance, n)
        return y, mean, variance, n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """dx = w/σ (dy − ⟨dy⟩ − x̂ ⟨dy x̂⟩), means over all processes; the sums of dy x̂ and dy are those of w and b."""
        x, weight, mean, variance, n = ctx.saved_tensors
        wide, dy_wide = x.to(mean.dtype), dy.to(mean.dtype)
        inverse = torch.rsqrt(variance + ctx.eps)  # [C]
        scale = inverse if weight is None else weight * inverse
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy_wide, wide, torch.ones_like(mean), mean, variance, mean, inverse, False, ctx.eps, [False, True, True]
        )
        total = torch.cat([d_weight, d_bias]).double()
        dist.all_reduce(total)
        along, offset = ((part / n).to(mean.dtype) * -scale for part in total.chunk(2))
        dx = F.batch_norm(wide, mean, variance, along, offset, training=False, eps=ctx.eps)
        dx = dx.addcmul_(dy_wide, scale.view(1, -1, *[1] * (x.dim() - 2))).to(x.dtype)
        return dx, None if weight is None else d_weight, None if weight is None else d_bias, None


class SharedBatchNorm(_BatchNorm):
    """Batch norm over the samples of all processes, on any device (torch's own needs CUDA); in evaluation it is the plain one."""

    plain: type[_BatchNorm]  # what it was

    def alone(self) -> None:
        """Take the statistics of this process's samples again: for a copy that the others do not run."""
        self.__class__ = self.plain  # type: ignore[assignment]

    def _check_input_dim(self, input: Tensor) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, variance, n = _SharedNorm.apply(x, self.weight, self.bias, self.eps)
        self._move(mean, variance * (n / (n - 1)))
        return y

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor) -> None:
        """The running statistics, as the plain one moves them."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


def share_statistics(module: nn.Module) -> int:
    """Let every batch norm in a module take its statistics over all processes; how many there were. Weights and names stay.

    One with a way of its own to normalise is a `UserError`: what it does cannot be known.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    for norm in norms:
        if type(norm).forward not in (_BatchNorm.forward, SharedBatchNorm.forward, nn.SyncBatchNorm.forward):
            name = type(norm).__name__
            raise UserError(f"network: the statistics of its {name} cannot be shared by several processes; use one")
        plain, norm.__class__ = type(norm), SharedBatchNorm
        object.__setattr__(norm, "plain", plain)
    return len(norms)


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
        store, rank, world = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        # torchrun keeps its store when it starts the processes again, with the addresses of those that are gone
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=own, rank=rank, world_size=world)
        atexit.register(dist.destroy_process_group)  # left to the end of Python, gloo's threads abort four of ten processes
    return Parallel(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))  # type: ignore[arg-type]
