"""One phase of one step as a function of tensors: gradients of the phase's players and one row of statistics.

Nothing is read back, printed or kept here, so that the same function runs as it is, compiled, captured or stacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from siv_core.nets import rows_of, slices
from siv_core.protocols import Batch, Nets, Noise, Phase


class Played(NamedTuple):
    """What a phase gives for a piece of the batch of N samples. Of R stacked runs everything has an axis [R] in front."""

    gradients: tuple[Tensor | None, ...]  # of its parameters, of this piece's share of the mean loss
    row: Tensor  # [T + 1]: the terms summed over the samples, then the share of the loss
    names: tuple[str, ...]  # of the T terms
    carry: dict[str, Any]  # for the next phase


def play(
    phase: Phase,
    parameters: Sequence[nn.Parameter],
    nets: Nets,
    batch: Batch,
    noise: Noise,
    coeffs: dict[str, Any],
    carry: dict[str, Any],
    share: float,
    keep: bool = False,
) -> Played:
    """The phase's gradients for `parameters`, those of the players it updates and nobody else's: nothing has to be frozen.

    `share`: this piece's samples over those of the whole batch. `keep`: a later phase goes on with graphs made here. Stacked runs
    are a phase whose loss is mapped over the runs' weights (`torch.func.vmap`): their losses [R] share no weight, so that one
    backward pass gives the gradients of each.
    """
    loss, terms, carry = phase.loss(nets, batch, noise, coeffs, carry)
    loss = loss * share  # 0-dim, or [R]
    gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, parameters, torch.ones_like(loss), allow_unused=True, retain_graph=keep)
    sums = torch.stack([term.detach() for term in terms.values()], dim=-2).sum(dim=-1)  # [T]
    return Played(gradients, torch.cat([sums, loss.detach()[..., None]], dim=-1), tuple(terms), carry)


def added(pieces: Sequence[Played]) -> tuple[list[Tensor | None], Tensor]:
    """Gradients and rows summed over the pieces of a batch."""
    gradients, row = list(pieces[0].gradients), pieces[0].row
    for piece in pieces[1:]:
        gradients = [_add(before, new) for before, new in zip(gradients, piece.gradients, strict=True)]
        row = row + piece.row
    return gradients, row


def _add(before: Tensor | None, new: Tensor | None) -> Tensor | None:
    return new if before is None else before if new is None else before + new


def clipped(gradients: list[Tensor], largest: float) -> Tensor:
    """The norm of all gradients together, 0-dim; where it is above `largest` > 0 they are shrunk to that, in place."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if largest:
        torch._foreach_mul_(gradients, (largest / (norm + 1e-12)).clamp(max=1.0))
    return norm


def micro_batches(batch: Batch, noise: Noise, share: slice, n: int, micro_batch: int) -> list[tuple[Batch, Noise]]:
    """This process's batch (rows `share` of n) and the noise of all n samples, cut into pieces that belong together."""
    pieces = list(slices(share, micro_batch))
    if pieces == [slice(0, n)]:
        return [(batch, noise)]
    local = [slice(piece.start - share.start, piece.stop - share.start) for piece in pieces]
    return [(rows_of(batch, mine), rows_of(noise, piece)) for mine, piece in zip(local, pieces, strict=True)]


def tensors_of(coeffs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Numbers as 0-dim float64 tensors (which leave the type of what they multiply alone), tables as tables of tensors."""

    def tensor_of(value: Any) -> Any:
        if isinstance(value, Mapping):
            return tensors_of(value, device)
        return torch.tensor(float(value), dtype=torch.float64, device=device)

    return {name: tensor_of(value) for name, value in coeffs.items()}
