"""Several runs trained as one: each phase of a step mapped over the runs' weights, batches, noise and coefficients.

With θ_r the weights, x_r the batch, ε_r the noise and c_r the coefficients of run r, one backward pass through

    Σ_r L(θ_r, x_r, ε_r, c_r)

gives the gradients of each run, since they share no weight. A run stays a `Trainer` with its own counters, optimisers, statistics
and checkpoints; the parameters of its modules are slices of tensors [R, …], so that what one of them does to its weights is
seen here. Its numbers are those it has alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from siv_core.errors import UserError
from siv_core.protocols import Batch, Nets, Noise, Phase
from siv_core.recipe.build import Built
from siv_core.train.schedule import Schedule
from siv_core.train.step import play
from siv_core.train.trainer import Trainer

MAPPING = ("vmap", "functorch", "batching rule")  # words of errors that torch has for what it cannot map


class Stack:
    """Runs in lockstep, all in the same stage and `alike`."""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = list(trainers)
        self.active = [_active(trainer) for trainer in trainers]
        called = {f"{rule.of}@{rule.name}" for rule in self.active[0].objective.shadows}
        self.swapped, *others = (Swapped(_modules(trainer, called)) for trainer in trainers)
        self.weights = _stacked([self.swapped, *others])
        self.coeffs = pytree.tree_map(lambda *own: torch.stack(own), *(active.coeffs for active in self.active))

    def holds(self, trainers: Sequence[Trainer]) -> bool:
        """Whether these are its runs, in the stage that it was made in."""
        pairs = zip(self.trainers, trainers, strict=False)
        return len(trainers) == len(self.trainers) and all(
            ours is theirs and theirs.active is active for (ours, theirs), active in zip(pairs, self.active, strict=True)
        )

    def step(self) -> None:
        """One step of every run: what `Trainer.step` does for one."""
        active = self.active[0]
        drawn = [trainer.drawn(own) for trainer, own in zip(self.trainers, self.active, strict=True)]
        batch, noise = pytree.tree_map(lambda *own: torch.stack(own) if isinstance(own[0], Tensor) else own[0], *drawn)
        carry: dict[str, Any] = {}
        phases = active.objective.phases
        for phase in phases:
            leaves = [w for player in phase.updates for name, w in self.weights.items() if name.startswith(f"of.{player}.")]
            leaves = [w for w in leaves if w.requires_grad]
            if not leaves:
                continue
            own = Phase(phase.name, phase.updates, partial(self._mapped, phase))
            keep = active.nets.keep_graphs and phase is not phases[-1]
            played = play(own, leaves, active.nets, batch, noise, self.coeffs, carry, 1.0, keep)  # type: ignore[arg-type]
            carry = played.carry
            gradients = [[None] * len(self.trainers) if g is None else g.unbind() for g in played.gradients]
            for run, trainer in enumerate(self.trainers):
                trainer.move(phase, self.active[run], [g[run] for g in gradients], played.row[run], played.names)

    def _mapped(
        self, phase: Phase, nets: Nets, batch: Batch, noise: Noise, coeffs: dict[str, Any], carry: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        """The phase's loss [R], terms [R, N] and carry."""
        leaves, tree = pytree.tree_flatten((self.weights, batch, noise, coeffs, carry))
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        kept: list[Any] = []

        def one(*tensors: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
            own = list(leaves)
            for i, tensor in zip(at, tensors, strict=True):
                own[i] = tensor
            weights, *others = pytree.tree_unflatten(own, tree)
            loss, terms, carry = functional_call(self.swapped, weights, (partial(phase.loss, nets, *others),))
            carried, shape = pytree.tree_flatten(carry)
            kept[:] = [shape, [None if isinstance(leaf, Tensor) else leaf for leaf in carried]]
            return loss, terms, [leaf for leaf in carried if isinstance(leaf, Tensor)]

        try:
            loss, terms, carried = vmap(one)(*(leaves[i] for i in at))
        except (RuntimeError, ValueError) as error:
            if not any(word in str(error) for word in MAPPING):
                raise  # it would be as wrong in a run alone
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"phase '{phase.name}' cannot be mapped over runs ({reason}): leave --stack out") from error
        shape, others = kept
        found: Iterator[Tensor] = iter(carried)
        return loss, terms, pytree.tree_unflatten([next(found) if leaf is None else leaf for leaf in others], shape)


class Swapped(nn.Module):
    """Calls a function while its modules have other weights; a prior may be its own distribution, which is asked later."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.of = nn.ModuleDict(modules)

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


# -- which runs can be one -------------------------------------------------------------------------------------------------------


def unfit(built: Built) -> list[str]:
    """Why runs of this recipe cannot be trained as one, whatever the others are."""
    train, reasons = built.recipe.train, []
    if built.networks.batch_statistics:
        reasons.append('its network takes statistics of a batch and keeps them (norm = "batch")')
    if train.micro_batch:
        reasons.append("train.micro_batch cuts its batches")
    reasons += [f"train.{key} is for a run alone" for key in ("compile", "graphs") if getattr(train, key)]
    return reasons


def alike(built: Built) -> dict[str, Any]:
    """What must be equal in runs that are trained as one, as a resolved recipe without its numbers: seeds, Adam's settings and
    coefficients of objectives. Which phases an objective has, and with which settings, is told by their functions."""
    tree = built.recipe.resolved()
    del tree["metrics"], tree["places"]
    ends = Schedule.of(built.recipe.stages, len(built.dataset.rows("train"))).ends
    tree["train"] = {**tree["train"], "seed": 0}
    for stage, plan, end in zip(tree["stages"], built.recipe.stages, ends, strict=True):
        objective = built.objective(plan)
        own = {key: value for key, value in stage["objective"].items() if key not in objective.coeffs}
        phases = [[phase.name, list(phase.updates), *_function(phase.loss, stage["objective"])] for phase in objective.phases]
        stage.update(objective={**own, "phases": phases, "coefficients": sorted(objective.coeffs)}, optim=None, ends=end)
    return tree


def _function(loss: Any, config: dict[str, Any]) -> list[Any]:
    """A loss by its name and what is fixed in it; one that may have numbers hidden in it with all of its objective's settings."""
    if isinstance(loss, partial):
        return [*_function(loss.func, config), repr(loss.args), repr(loss.keywords)]
    name = f"{loss.__module__}.{loss.__qualname__}" if hasattr(loss, "__qualname__") else repr(loss)
    return [name] if getattr(loss, "__closure__", ...) is None else [name, config]


# -- their weights ---------------------------------------------------------------------------------------------------------------


def _active(trainer: Trainer) -> Any:
    assert trainer.active
    return trainer.active


def _modules(trainer: Trainer, called: set[str]) -> dict[str, nn.Module]:
    """Players, and those shadows that the objective calls."""
    shadows = {follower.key: follower.module for follower in trainer.followers if follower.key in called}
    return {**{name: player.module for name, player in trainer.players.items()}, **shadows}


def _stacked(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of equal modules, [R, …] each; the modules' own become slices of them."""
    stacked = {}
    for name, value in [*modules[0].named_parameters(), *modules[0].named_buffers()]:
        own = [module.get_parameter(name) if isinstance(value, nn.Parameter) else module.get_buffer(name) for module in modules]
        together = torch.stack([one.data for one in own])
        for one, slice_ in zip(own, together.unbind(), strict=True):
            one.data = slice_
        stacked[name] = together.requires_grad_(value.requires_grad)
    return stacked
