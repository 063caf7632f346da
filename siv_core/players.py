"""Players: the modules of a game with their optimisers, as data; shadows: copies of players that follow them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from attrs import define, evolve
from torch import Tensor, nn

from siv_core import latents
from siv_core.latents import Codes, Gaussian, Posterior
from siv_core.protocols import Nets, Shadow, Sources, Stage
from siv_core.seeding import Streams, normal


def encode_group(encode: Callable[..., Posterior], group: str) -> Callable[..., Gaussian]:
    """The encoder as the prior of one group is given it: (x, labels=None) -> this group's posterior."""
    return lambda x, labels=None: encode(x, labels)[group]


def set_stage(modules: Iterable[Any], stage: Stage) -> None:
    """Tell those modules that care which stage it is; of priors, those of the groups."""
    for module in modules:
        for part in (module, *(module.groups.values() if isinstance(module, Priors) else ())):
            if hasattr(part, "set_stage"):
                part.set_stage(stage)


class Priors(nn.Module):
    """The priors of all latent groups as one player."""

    def __init__(self, priors: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.groups = nn.ModuleDict(priors)

    def forward(self, encode: Callable[..., Posterior]) -> dict[str, Any]:
        """{group: Distribution} of this phase."""

        priors: dict[str, Any] = dict(self.groups.items())  # nn.Module knows nothing of `realise`
        return {group: prior.realise(encode_group(encode, group)) for group, prior in priors.items()}


@define
class Player:
    """A module that learns. `parameters` may be empty (a fixed prior); then there is no optimiser."""

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]
    optimiser: torch.optim.Adam | None

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Player:
        parameters = [p for p in module.parameters() if p.requires_grad]
        return cls(name, module, parameters, torch.optim.Adam(parameters, fused=True) if parameters else None)

    def configure(self, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        if self.optimiser:
            self.optimiser.param_groups[0].update(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def reset_optimiser(self) -> None:
        if self.optimiser:
            self.optimiser.state.clear()

    def step(self, gradients: list[Tensor | None]) -> None:
        """One Adam step along these gradients; a parameter without one stays as it is."""
        if self.optimiser:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.optimiser.step()
            for parameter in self.parameters:
                parameter.grad = None


@define
class Follower:
    """A shadow at work."""

    rule: Shadow
    module: nn.Module

    @classmethod
    def of(cls, rule: Shadow, player: Player, epoch_images: int) -> Follower:
        if rule.copy_every_epochs is not None:
            rule = evolve(rule, copy_every_images=rule.copy_every_epochs * epoch_images, copy_every_epochs=None)
        return cls(rule, copy.deepcopy(player.module).requires_grad_(False))

    @property
    def key(self) -> str:
        return f"{self.rule.of}@{self.rule.name}"

    @torch.no_grad()
    def follow(self, source: nn.Module, images_before: int, images_now: int) -> None:
        """Called after every step: an average moves by 1 − ½^(images/half-life), a copy at each of its marks."""
        if self.rule.copy_every_images is not None:
            if images_now // self.rule.copy_every_images > images_before // self.rule.copy_every_images:
                self.module.load_state_dict(source.state_dict())
        elif self.rule.half_life_images is not None:
            weight = 1 - 0.5 ** ((images_now - images_before) / self.rule.half_life_images)
            pairs = list(zip(self.module.parameters(), source.parameters(), strict=True))
            if pairs:
                torch._foreach_lerp_([mine for mine, _ in pairs], [theirs for _, theirs in pairs], weight)
            for mine, theirs in zip(self.module.buffers(), source.buffers(), strict=True):
                mine.copy_(theirs)


def make_nets(
    modules: Mapping[str, Callable[..., Any]],
    reconstruction: Callable[[Tensor, Tensor], Tensor],
    logvar_bound: float | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Nets:
    """What objectives call. Networks run under `autocast`; what they return, and all loss arithmetic, is at least float32.

    `modules` holds "encoder", "decoder", "prior" and shadows ("decoder@target"); they may be functional calls.
    """

    def encoder(module: Callable[..., Any]) -> Callable[..., Posterior]:
        def encode(x: Tensor, labels: Tensor | None = None) -> Posterior:
            with autocast():
                q = module(x) if labels is None else module(x, labels)
            return latents.bound_logvar({group: Gaussian(*map(_widen, g)) for group, g in q.items()}, logvar_bound)

        return encode

    def decoder(module: Callable[..., Any]) -> Callable[..., Tensor]:
        def decode(codes: Codes, labels: Tensor | None = None, noise: Any = None) -> Tensor:
            with autocast():
                return _widen(module(codes, **_given(labels=labels, noise=noise)))

        return decode

    wrap: dict[str, Callable[..., Any]] = {"encoder": encoder, "decoder": decoder}
    nets: dict[str, Any] = {"reconstruction": reconstruction}
    for name, module in modules.items():
        kind = name.partition("@")[0]  # a shadow is called as its player is
        nets[name] = wrap[kind](module) if kind in wrap else module
    return nets


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def sources(groups: Mapping[str, int], priors: Priors, decoder: nn.Module) -> Sources:
    """Where the noise of a step comes from, by the players' own `draw`s where they have some."""
    draws = {group: getattr(module, "draw", None) for group, module in priors.groups.items()}
    kl_draws = {group: getattr(module, "draw_kl", None) for group, module in priors.groups.items()}
    sampled = {group: draw for group, draw in kl_draws.items() if draw}
    decoder_draw = getattr(decoder, "draw", None)

    def prior(n: int, streams: Streams, name: str) -> dict[str, Any]:
        generator = streams(name)
        return {group: draw(n, generator) if draw else normal(n, groups[group], generator) for group, draw in draws.items()}

    def posterior(n: int, streams: Streams, name: str) -> Codes:
        generator = streams(name)
        return {group: normal(n, dim, generator) for group, dim in groups.items()}

    def kl(n: int, streams: Streams, name: str) -> dict[str, Any]:
        generator = streams(name) if sampled else None  # a generator nobody draws from is not made
        return {group: draw(n, generator) for group, draw in sampled.items()}

    def decoder_noise(n: int, streams: Streams, name: str) -> Any:
        return decoder_draw(n, streams(name)) if decoder_draw else None

    return Sources(prior, posterior, kl, decoder_noise)


def tree_map(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same tree of dicts, tuples and named tuples with `function` of each tensor; what is no tensor stays."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: tree_map(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple):
        items = [tree_map(value, function) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return tree


def rows_of(tree: Any, rows: slice) -> Any:
    """The same tree of tensors with only these rows of each."""
    return tree_map(tree, lambda x: x[rows])


def slices(rows: slice, micro_batch: int) -> Iterator[slice]:
    """`rows` cut into pieces of at most `micro_batch` (0: one piece)."""
    step = micro_batch or (rows.stop - rows.start)
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))
