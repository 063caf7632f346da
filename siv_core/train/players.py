"""Players: the modules of a game with their optimisers, as data; shadows: copies of players that follow them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from attrs import define, evolve
from torch import Tensor, nn

from siv_core.nets import lr_factors
from siv_core.protocols import Shadow
from siv_core.store import checkpoint


class Kept(Protocol):
    """State of a training, registered once under a name: a checkpoint saves and restores it by that."""

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and JSON for `state.json`. Every process asks; the main one writes."""

    def restore(self, tensors: dict[str, Tensor], data: dict[str, Any], where: str) -> None:
        """Go back to what `kept` gave; a `UserError` that begins with `where` for what does not fit."""


@define
class Weights:
    """Parameters and buffers of a module."""

    module: nn.Module

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.module.state_dict(), {}

    def restore(self, tensors: dict[str, Tensor], data: dict[str, Any], where: str) -> None:
        checkpoint.restore_module(self.module, tensors, where)


@define
class Player:
    """A module that learns. `parameters` may be empty (a fixed prior); then there is no optimiser."""

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]
    optimiser: torch.optim.Adam | None

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Player:
        factors = lr_factors(module)
        named = [(key, parameter) for key, parameter in module.named_parameters() if parameter.requires_grad]
        groups: dict[float, list[nn.Parameter]] = {}
        for key, parameter in named:
            groups.setdefault(factors.get(key, 1.0), []).append(parameter)
        tables: list[dict[str, Any]] = [{"params": own, "factor": factor} for factor, own in groups.items()]
        return cls(name, module, [p for _, p in named], torch.optim.Adam(tables, fused=True) if tables else None)

    def configure(self, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        for group in self.optimiser.param_groups if self.optimiser else ():
            group.update(lr=lr * group["factor"], betas=betas, eps=eps, weight_decay=weight_decay)

    def reset_optimiser(self) -> None:
        if self.optimiser:
            self.optimiser.state.clear()

    def step(self, gradients: list[Tensor | None]) -> None:
        """One Adam step along these gradients; a parameter without one stays as it is."""
        if self.optimiser:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else laid_out(gradient, parameter)
            self.optimiser.step()
            for parameter in self.parameters:
                parameter.grad = None

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The moments; the weights are kept beside them."""
        return checkpoint.optimiser_tensors(self.module, self.optimiser), {}

    def restore(self, tensors: dict[str, Tensor], data: dict[str, Any], where: str) -> None:
        checkpoint.restore_optimiser(self.module, self.optimiser, tensors, where)


def laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the parameter's own order of memory: the fused Adam goes through both as they lie there."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)


@define
class Follower:
    """A shadow at work."""

    rule: Shadow
    module: nn.Module

    @classmethod
    def of(cls, rule: Shadow, player: Player, epoch_images: int) -> Follower:
        if rule.copy_every_epochs is not None:
            first = rule.copy_every_epochs if rule.first_copy_epochs is None else rule.first_copy_epochs
            rule = evolve(
                rule,
                copy_every_images=rule.copy_every_epochs * epoch_images,
                first_copy_images=first * epoch_images,
                copy_every_epochs=None,
                first_copy_epochs=None,
            )
        return cls(rule, copy.deepcopy(player.module).requires_grad_(False))

    @property
    def key(self) -> str:
        return f"{self.rule.of}@{self.rule.name}"

    @torch.no_grad()
    def follow(self, source: nn.Module, images_before: int, images_now: int) -> None:
        """Called after every step: an average moves by 1 − ½^(images/half-life), a copy at each of its marks."""
        rule = self.rule
        if rule.copy_every_images is not None:
            first = rule.copy_every_images if rule.first_copy_images is None else rule.first_copy_images
            if (images_now - first) // rule.copy_every_images > max(-1, (images_before - first) // rule.copy_every_images):
                self.module.load_state_dict(source.state_dict())
        elif rule.half_life_images is not None:
            half_life = min(rule.half_life_images, rule.warm_up * images_now) if rule.warm_up else rule.half_life_images
            averaged = list(zip(self.module.parameters(), source.parameters(), strict=True))
            for mine, theirs in zip(self.module.buffers(), source.buffers(), strict=True):
                if rule.average_buffers and mine.is_floating_point():
                    averaged.append((mine, theirs))  # type: ignore[arg-type]
                else:
                    mine.copy_(theirs)
            if averaged:
                weight = 1 - 0.5 ** ((images_now - images_before) / half_life)
                torch._foreach_lerp_([mine for mine, _ in averaged], [theirs for _, theirs in averaged], weight)


# -- what `begin` changes --------------------------------------------------------------------------------------------------------


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those too that no checkpoint holds."""
    return dict([*module.named_parameters(), *module.named_buffers()])


def changed(before: Mapping[str, Tensor], module: nn.Module) -> list[str]:
    """Names of the parameters and buffers that are not as they were; a `ValueError` where a checkpoint would not have them."""
    now = state_of(module)
    if before.keys() != now.keys():
        raise ValueError(f"`begin` may change weights, not add or remove them: {', '.join(sorted(before.keys() ^ now.keys()))}")
    names = [name for name, value in now.items() if not torch.equal(value, before[name])]
    lost = [name for name in names if name not in module.state_dict()]
    if lost:
        raise ValueError(f"`begin` changed what no checkpoint holds: {', '.join(lost)}; make it a persistent buffer")
    return names


@torch.no_grad()
def take_over(names: list[str], player: Player, followers: list[Follower]) -> None:
    """What `begin` changed reaches the shadows as it is, and Adam forgets what it knew of it."""
    now = player.module.state_dict()
    for follower in followers:
        theirs = follower.module.state_dict()
        for name in names:
            theirs[name].copy_(now[name])
    parameters = dict(player.module.named_parameters())
    for name in names:
        if player.optimiser and name in parameters:
            player.optimiser.state.pop(parameters[name], None)
