"""Priors `mixture` and `vamp`: Gaussian modes that may learn, alone or tied to encoded pseudo-inputs, for one latent group each.

p(z) = Σ_k w_k N(z; μ_k, diag exp s_k). VampPrior (Tomczak & Welling 2018, arXiv:1705.07120): (μ_k, s_k) = E(u_k) of inputs u_k
that learn. "Prior Learning in Introspective VAEs" (Athanasiadis et al. 2025, arXiv:2408.13805) trains a VAE with a VampPrior,
hands it over to a mixture, bounds the log-variances by what they are when the game begins, and lets the encoder pay for modes
that it leaves alone:

    s̃ = s − sp_b(s − u) + sp_b(l − s),  sp_b(t) = ln(1 + e^{bt}) / b,  b = 10 / (u − l);  l, u: least and largest of the modes
    h / ln K · Σ_k r̄_k ln r̄_k,  r̄_k = ⟨ w_k N_k(z) / p(z) ⟩ over codes z ~ q(z ∣ x) of the batch

The KL is in closed form for one mode, else sampled: the exact entropy of q and the cross-entropy of `draws` codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from attrs import frozen
from torch import Generator, Tensor, nn

from siv_core import Batch, Component, Gaussian, Spec, Stage, UserError, hookimpl, option, sampled_kl

SHARPNESS = 10.0  # of the variance clipping, over the width between the bounds
SOME = 2048  # training samples that noise has the mean and the deviation of
LEAST = 1e-8  # below what a share or a width is taken for 0

Encode = Callable[..., Gaussian]


@frozen
class MixtureConfig:
    modes: int = option(10, doc="K, how many Gaussians", ge=1, le=65536)
    start: str = option(
        "data",
        doc="of the modes: the posteriors of K training images by the untrained encoder, at random, or N(0, I) for one mode",
        choices=("data", "random", "standard"),
    )
    learns: bool = option(True, doc="false: modes and weights stay as they start, in the stages of a VAE too")
    learn_weights: bool = option(False, doc="the modes' weights learn too, from the KL of data alone")
    weights: tuple[float, ...] = option((), doc="of the modes, at first where they learn; empty: all alike", ge=0, le=1)
    draws: int = option(100, doc="S, codes an image that a KL to several modes is sampled with", ge=1, le=65536)
    logvar_rate: float = option(1.0, doc="factor on the learning rate of the log-variances", gt=0)
    clip_stage: int = option(
        0,
        doc="the stage, counted from 0, that begins with bounds on the log-variances, the least and the largest then; 0: none",
        ge=0,
    )
    responsibility: float = option(
        0.0, doc="h, what the encoder pays for a batch that leaves modes alone: the negative entropy of the mean shares", ge=0
    )


@frozen
class VampConfig(MixtureConfig):
    start: str = option(
        "data", doc="of the pseudo-inputs: training images, or noise around their mean", choices=("data", "random")
    )
    learns: bool = option(
        True,
        doc="false: pseudo-inputs and weights stay, and modes from the hand-over on; before it these follow the encoder",
    )
    hand_over: int = option(
        0, doc="the stage, counted from 0, that begins with the mixture that it was, from then on free; 0: none", ge=0
    )


# -- the distribution ------------------------------------------------------------------------------------------------------------


class Mixture:
    """Modes [K, d] with log-weights [K]."""

    def __init__(self, parts: Gaussian, log_weights: Tensor, responsibility: float = 0.0) -> None:
        self.parts, self.log_weights, self.responsibility = parts, log_weights, responsibility
        if responsibility:
            self.regulariser = self._left_alone

    def sample(self, noise: Any, labels: Tensor | None = None) -> Tensor:
        """z of a mode that is drawn by its weight; with gradient to means and log-variances, none to weights."""
        return self._drawn(noise, 1.0)

    def truncated(self, noise: Any, psi: float, labels: Tensor | None = None) -> Tensor:
        return self._drawn(noise, psi)

    def _drawn(self, noise: Any, psi: float) -> Tensor:
        mu, logvar = self.parts
        if len(mu) == 1:
            return mu + psi * noise["normal"] * torch.exp(0.5 * logvar)
        ends = self.log_weights.detach().exp().cumsum(dim=0)
        which = torch.searchsorted(ends / ends[-1], noise["which"], right=True).clamp(max=len(mu) - 1)
        return mu[which] + psi * noise["normal"] * torch.exp(0.5 * logvar[which])

    def joint(self, z: Tensor) -> Tensor:
        """ln w_k N(z; k) of z [N, d]: [N, K], by two products of matrices; nothing of the size N · K · d is made."""
        mu, logvar = (part.to(z.dtype) for part in self.parts)  # a model takes KLs in float64
        centre = mu.detach().mean(dim=0)  # squares are taken around it, so that little is lost where modes lie far from 0
        z, mu = z - centre, mu - centre
        precision = torch.exp(-logvar)  # [K, d]
        constant = ((mu.square() * precision) + logvar + math.log(2 * math.pi)).sum(dim=1)  # [K]
        square = z.square() @ precision.T - 2 * z @ (mu * precision).T  # [N, K]
        return self.log_weights - 0.5 * (square + constant)

    def log_prob(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.logsumexp(self.joint(z), dim=1)

    def responsibilities(self, z: Tensor) -> Tensor:
        """r_k(z), [N, K]."""
        return torch.softmax(self.joint(z), dim=1)

    def kl(self, q: Gaussian, noise: Any, labels: Tensor | None = None) -> Tensor:
        mu, logvar = self.parts
        if len(mu) > 1:
            return sampled_kl(self.log_prob, q, noise)
        ratio = q.logvar - logvar  # as `kl_standard` where mu and logvar are 0, to the last bit
        return -0.5 * (1 + ratio - (q.mu - mu).square() * torch.exp(-logvar) - ratio.exp()).sum(dim=1)

    def detach(self) -> Mixture:
        parts = Gaussian(self.parts.mu.detach(), self.parts.logvar.detach())
        return Mixture(parts, self.log_weights.detach(), self.responsibility)

    def _left_alone(self, z: Tensor, mean: Callable[[Tensor], Tensor], q: Gaussian, noise: Any) -> Tensor:
        """−1 where the batch is spread evenly over the modes, 0 where it lies in one, times h."""
        n, draws, d = noise.shape
        codes = q.mu[:, None] + noise * torch.exp(0.5 * q.logvar)[:, None]  # [N, S, d]
        each = self.responsibilities(codes.reshape(n * draws, d)).reshape(n, draws, -1).mean(dim=1)  # [N, K]
        share = mean(each)  # [K]
        return self.responsibility * (share * (share + LEAST).log()).sum() / math.log(len(share))


def clipped(logvar: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Log-variances [K, d] held softly between the bounds [d]; at any value finite, with a finite gradient."""
    sharpness = SHARPNESS / (high - low + LEAST)
    zero = torch.zeros((), dtype=logvar.dtype, device=logvar.device)
    above, below = (torch.logaddexp(sharpness * beyond, zero) / sharpness for beyond in (logvar - high, low - logvar))
    return logvar - above + below


# -- the modules -----------------------------------------------------------------------------------------------------------------


def taken(batches: Iterator[Batch], k: int) -> Batch:
    """The first k samples, or all where there are fewer."""
    some, there = list[Batch](), 0
    for batch in batches:
        some.append(batch)
        there += len(batch.x)
        if there >= k:
            break
    labels = [batch.labels for batch in some if batch.labels is not None]
    return Batch(torch.cat([batch.x for batch in some])[:k], torch.cat(labels)[:k] if labels else None)


class MixturePrior(nn.Module):
    """Modes with means and log-variances of their own."""

    bounds: Tensor
    logits: Tensor

    def __init__(self, config: MixtureConfig, dim: int) -> None:
        super().__init__()
        k, self.config, self.dim = config.modes, config, dim
        self.mu, self.logvar = (nn.Parameter(torch.zeros(k, dim)) for _ in range(2))
        if config.start == "random":
            nn.init.normal_(self.mu, std=1 / math.sqrt(k * dim))
            nn.init.normal_(self.logvar)
        weights = torch.tensor(config.weights or (1 / k,) * k)
        logits = weights.log().clamp_min(math.log(LEAST)) if config.weights else torch.zeros(k)
        if config.learn_weights:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)
        self.register_buffer("bounds", torch.zeros(2, dim))
        self.batch_statistic = config.responsibility > 0
        self.stages_named = {key: getattr(config, key) for key in ("clip_stage", "hand_over") if getattr(config, key, 0)}
        self.regularisers = ("responsibility",) if config.responsibility else ()
        self.learns_from = {"clip_stage": config.clip_stage} if config.clip_stage else {}
        self.stage = 0

    def set_stage(self, stage: Stage) -> None:
        self.stage = stage.number

    def begin(self, stage: Stage, batches: Iterator[Batch], encode: Encode) -> None:
        if stage.number == 0 and self.config.start == "data":
            self.start(batches, encode)
        if self.config.clip_stage and stage.number == self.config.clip_stage:
            logvar = self.parts(encode).logvar
            self.bounds.copy_(torch.stack([logvar.amin(dim=0), logvar.amax(dim=0)]))

    def start(self, batches: Iterator[Batch], encode: Encode) -> None:
        """The modes as the posteriors of the first K images."""
        q = encode(*self.first(batches))
        self.mu.copy_(q.mu)
        self.logvar.copy_(q.logvar)

    def first(self, batches: Iterator[Batch]) -> Batch:
        """The first K training samples; a `UserError` where there are fewer."""
        some = taken(batches, self.config.modes)
        if told := self.short_of(len(some.x)):
            raise UserError(told)
        return some

    def short_of(self, there: int) -> str:
        """Why modes do not start from so many training samples, or nothing."""
        k = self.config.modes
        if self.config.start != "data" or there >= k:
            return ""
        return f'prior.modes: {k} do not start from {there} training samples: give fewer, or start = "random"'

    def parts(self, encode: Encode) -> Gaussian:
        """Means and log-variances of the modes, unbounded."""
        return Gaussian(self.mu, self.logvar)

    def realise(self, encode: Encode) -> Mixture:
        parts = self.parts(encode)
        if self.config.clip_stage and self.stage >= self.config.clip_stage:
            parts = Gaussian(parts.mu, clipped(parts.logvar, *self.bounds))
        return Mixture(parts, torch.log_softmax(self.logits, dim=0), self.config.responsibility)

    def lr_factors(self) -> dict[str, float]:
        return {"logvar": self.config.logvar_rate}

    def draw(self, n: int, generator: Generator) -> dict[str, Tensor]:
        # nothing else, so that the groups after this one draw what they draw beside a normal prior
        return {"normal": torch.randn(n, self.dim, generator=generator, device=generator.device)}


class SampledMixturePrior(MixturePrior):
    """Of several modes: samples take one of them, their KL takes codes."""

    def draw(self, n: int, generator: Generator) -> dict[str, Tensor]:
        return {**super().draw(n, generator), "which": torch.rand(n, generator=generator, device=generator.device)}

    def draw_kl(self, n: int, generator: Generator) -> Tensor:
        return torch.randn(n, self.config.draws, self.dim, generator=generator, device=generator.device)


class VampPrior(SampledMixturePrior):
    """Modes that are the posteriors of pseudo-inputs, until they are handed over."""

    config: VampConfig
    labels: Tensor

    def __init__(self, config: VampConfig, dim: int, spec: Spec) -> None:
        super().__init__(config, dim)
        self.pseudo_inputs = nn.Parameter(torch.zeros(config.modes, *spec.shape))
        self.range = spec.value_range if spec.kind == "image" else None
        self.conditional = spec.conditional
        self.register_buffer("labels", torch.zeros(config.modes, dtype=torch.int64))
        self.noise = torch.randn(config.modes, *spec.shape) if config.start == "random" else None

    def begin(self, stage: Stage, batches: Iterator[Batch], encode: Encode) -> None:
        if stage.number == 0 and self.config.start == "random":
            self.around(taken(batches, SOME))
        if self.config.hand_over and stage.number == self.config.hand_over:
            q = self.encoded(encode)
            self.mu.copy_(q.mu)
            self.logvar.copy_(q.logvar)
        super().begin(stage, batches, encode)

    def start(self, batches: Iterator[Batch], encode: Encode) -> None:
        first = self.first(batches)
        self.pseudo_inputs.copy_(first.x)
        self.keep(first)

    def around(self, some: Batch) -> None:
        """Noise with the mean and the deviation of these images."""
        assert self.noise is not None
        self.pseudo_inputs.copy_(some.x.mean(dim=0) + some.x.std() * self.noise.to(some.x))
        self.keep(some)

    def keep(self, first: Batch) -> None:
        if first.labels is not None:
            self.labels.copy_(first.labels[torch.arange(len(self.labels), device=first.labels.device) % len(first.labels)])

    def parts(self, encode: Encode) -> Gaussian:
        free = self.config.hand_over and self.stage >= self.config.hand_over
        return super().parts(encode) if free else self.encoded(encode)

    def misfit(self, number: int, shape: tuple[int, ...]) -> str:
        """Why pseudo-inputs do not go into a stage of this shape, or nothing. Sizes only grow: a hand-over comes too late."""
        own = tuple(self.pseudo_inputs.shape[1:])
        if shape == own:
            return ""
        told = f"its pseudo-inputs have the data's {own[-1]} pixels a side, stage {number} has {shape[-1]}"
        return f"{told}: take a mixture that starts from data, or leave the sizes out"

    def encoded(self, encode: Encode) -> Gaussian:
        x: Tensor = self.pseudo_inputs
        if self.range:  # cut to the data's range; the gradient passes as if they were not, so none is lost at its ends
            x = x + (x.clamp(*self.range) - x).detach()
        return encode(x, self.labels if self.conditional else None)


def build_mixture(config: MixtureConfig, dim: int, spec: Spec) -> MixturePrior:
    check(config)
    return (MixturePrior if config.modes == 1 else SampledMixturePrior)(config, dim).requires_grad_(config.learns)


def build_vamp(config: VampConfig, dim: int, spec: Spec) -> VampPrior:
    check(config)
    if config.modes == 1:
        raise UserError("prior.modes: a vamp of one pseudo-input is one Gaussian: take the prior mixture with modes = 1")
    if config.clip_stage and config.clip_stage < config.hand_over:
        raise UserError(
            f"prior.clip_stage: {config.clip_stage} is before hand_over = {config.hand_over}: encoded modes need no bounds"
        )
    return VampPrior(config, dim, spec).requires_grad_(config.learns)


def check(config: MixtureConfig) -> None:
    """A `UserError` for what cannot be."""
    problems = []
    k = config.modes
    if config.weights and len(config.weights) != k:
        problems.append(f"prior.weights: there are {len(config.weights)} for {k} modes")
    elif config.weights and abs(sum(config.weights) - 1) > 1e-6:
        problems.append(f"prior.weights: their sum is {sum(config.weights):g}, expected 1")
    if config.start == "standard" and k > 1:
        problems.append(f"prior.start: standard is for one mode, {k} that are alike would stay alike: take data or random")
    if k == 1 and config.responsibility:
        problems.append("prior.responsibility: one mode is never left alone: leave it out")
    if k == 1 and config.learn_weights:
        problems.append("prior.learn_weights: one mode has the weight 1: leave it out")
    if config.learn_weights and not config.learns:
        problems.append("prior.learn_weights: nothing learns with learns = false: leave one of them out")
    if problems:
        raise UserError(problems)


@hookimpl
def siv_components() -> list[Component]:
    paper = "arXiv:2408.13805"
    return [
        Component("prior", "mixture", MixtureConfig, build_mixture, "K Gaussian modes, fixed or a player that learns", paper),
        Component(
            "prior", "vamp", VampConfig, build_vamp, "VampPrior: modes of encoded pseudo-inputs, handed over to a mixture", paper
        ),
    ]
