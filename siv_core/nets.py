"""Networks and priors as objectives and models call them, and the trees of noise that go with a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from siv_core import latents
from siv_core.errors import near_miss
from siv_core.latents import Codes, Gaussian, Posterior
from siv_core.protocols import Nets, Sources, Stage
from siv_core.seeding import Streams, normal


class Priors(nn.Module):
    """The priors of all latent groups as one player."""

    def __init__(self, priors: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.groups = nn.ModuleDict(priors)

    def forward(self, encode: Callable[..., Posterior]) -> dict[str, Any]:
        """{group: Distribution} of this phase."""

        priors: dict[str, Any] = dict(self.groups.items())  # nn.Module knows nothing of `realise`
        return {group: prior.realise(encode_group(encode, group)) for group, prior in priors.items()}


def encode_group(encode: Callable[..., Posterior], group: str) -> Callable[..., Gaussian]:
    """The encoder as the prior of one group is given it: (x, labels=None) -> this group's posterior."""
    return lambda x, labels=None: encode(x, labels)[group]


def parts(module: Any) -> dict[str, Any]:
    """{prefix of its parameters' names: part}: a player itself and, of priors, those of the groups; all that is told a stage."""
    groups = module.groups.items() if isinstance(module, Priors) else ()
    return {"": module, **{f"groups.{group}.": prior for group, prior in groups}}


def lr_factors(module: nn.Module) -> dict[str, float]:
    """{parameter: factor} of what a module, or the prior of a group, says of its parameters' learning rates; the longer
    name holds. A `ValueError` for a name that there is not."""
    names = [name for name, _ in module.named_parameters()]
    found: dict[str, float] = {}
    for prefix, part in parts(module).items():
        for asked, factor in sorted(getattr(part, "lr_factors", dict)().items(), key=lambda item: len(item[0])):
            own = [name for name in names if name == prefix + asked or name.startswith(f"{prefix}{asked}.")]
            if not own:
                raise ValueError(f"lr_factors: there is no parameter '{asked}'{near_miss(prefix + asked, names)}")
            found.update(dict.fromkeys(own, float(factor)))
    return found


def stage_of(number: int, shape: tuple[int, ...], fade: float, device: torch.device) -> Stage:
    """The stage of this number when it has faded in so far, in [0, 1]."""
    return Stage(number, shape, torch.full((), fade, device=device) if fade < 1 else None)


def set_stage(modules: Iterable[Any], stage: Stage) -> None:
    """Tell those modules that care which stage it is; of priors, those of the groups."""
    for module in modules:
        for part in parts(module).values():
            if hasattr(part, "set_stage"):
                part.set_stage(stage)


def make_nets(
    modules: Mapping[str, Any],
    reconstruction: Callable[[Tensor, Tensor], Tensor],
    logvar_bound: float | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **settings: Any,
) -> Nets:
    """What objectives call. Networks run under `autocast`; what they return, and all loss arithmetic, is at least float32.

    `modules` holds "encoder", "decoder", "prior" and shadows ("decoder@target"); they may be functional calls. Log-variances are
    bounded here and nowhere else, to ±`logvar_bound` and to what the group's prior says, which is asked of
    `Priors` alone.
    `settings` are those of `Nets`.
    """
    limits = {group: prior.logvar_bounds for group, prior in getattr(modules.get("prior"), "groups", {}).items()
              if hasattr(prior, "logvar_bounds")}  # fmt: skip

    def encoder(module: Callable[..., Any]) -> Callable[..., Posterior]:
        def encode(x: Tensor, labels: Tensor | None = None) -> Posterior:
            with autocast():
                q = module(x) if labels is None else module(x, labels)
            q = latents.bound_logvar({group: Gaussian(*map(_widen, g)) for group, g in q.items()}, logvar_bound)
            return latents.bound_groups(q, {group: bounds() for group, bounds in limits.items()})

        return encode

    def decoder(module: Callable[..., Any]) -> Callable[..., Tensor]:
        def decode(codes: Codes, labels: Tensor | None = None, noise: Any = None) -> Tensor:
            with autocast():
                return _widen(module(codes, **_given(labels=labels, noise=noise)))

        return decode

    wrap: dict[str, Callable[..., Any]] = {"encoder": encoder, "decoder": decoder}
    # a shadow is called as its player is
    wrapped: dict[str, Any] = dict(modules)
    wrapped.update({name: wrap[kind](module) for name, module in modules.items() if (kind := name.partition("@")[0]) in wrap})
    encode: Any = wrapped.get("encoder")  # a model without a prior, or another player, lacks only that
    priors: Any = wrapped.get("prior")
    decode: Any = wrapped.get("decoder")
    return Nets(
        encoder=encode,
        decoder=decode,
        realise=lambda: priors(encode),
        reconstruction=reconstruction,
        shadows={name: called for name, called in wrapped.items() if "@" in name},
        **settings,
    )


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def with_labels(x: Tensor, labels: Tensor | None, conditions: int) -> Tensor:
    """x [N, D] with one-hot labels behind, [N, D + conditions], for networks that are given some; conditions = 0 leaves it
    alone. A `ValueError` where the labels are missing."""
    if not conditions:
        return x
    if labels is None:
        raise ValueError("this network was built with labels and was called without")
    one_hot = (labels[:, None] == torch.arange(conditions, device=x.device)).to(x.dtype)
    return torch.cat([x, one_hot], dim=1)


def full_precision(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """layer(x) in float32 at least, within autocast too: for an encoder's head and a decoder's last layers, since what bf16 makes
    of means, log-variances and pixels (a sigmoid above 0.998 is 1) the loss would see."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # on "meta" nothing is computed, and there is none
        return layer(_widen(x))
    with torch.autocast(x.device.type, enabled=False):
        return layer(_widen(x))


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

    def decoder_noise(n: int, streams: Streams, name: str, use: str) -> Any:
        return decoder_draw(n, streams(name), use) if decoder_draw else None

    return Sources(prior, posterior, kl, decoder_noise)


# -- trees of tensors ------------------------------------------------------------------------------------------------------------


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


def slices(rows: slice, size: int) -> Iterator[slice]:
    """`rows` cut into pieces of at most `size` (0: one piece)."""
    step = size or (rows.stop - rows.start)
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))
