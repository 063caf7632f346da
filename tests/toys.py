"""Small components that prove the shape of the core: what each needs is cheap in it, without a special case."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import nn
from torch.nn import functional as F

from siv_core import latents
from siv_core.component import Component, option
from siv_core.latents import Gaussian
from siv_core.losses import kl, sampled_kl, total, weighted
from siv_core.objectives import soft_intro_vae
from siv_core.protocols import Networks, Objective, Phase, Shadow, Spec
from siv_core.recipe import build
from siv_core.recipe.catalogue import Catalogue, Owner
from siv_core.recipe.recipe import Recipe, parse
from siv_core.runs.watchers import Silent
from siv_core.store.rundir import RunDir
from siv_core.train.parallel import Parallel
from siv_core.train.trainer import Trainer

SMALL = """
format = 1
[data]
name = "digits"
[network]
name = "mlp"
z_dim = 3
hidden = [16]
"""  # the head of a recipe text; an objective and [train] follow
SOFT = (
    SMALL
    + """
[objective]
name = "soft_intro_vae"
beta_neg = 4.0
"""
)
ADAIN = """
[network]
name = "adain"
dims = { class = 4, content = 4 }
encoder_channels = [4, 4, 4]
encoder_hidden = [8]
stem_kernel = 0
decoder_channels = [4, 4, 4]
output_channels = 4
output_kernels = [3, 3]
"""
DIGITS = {
    "format": 1,
    "data": {"name": "digits"},
    "network": {"name": "mlp", "z_dim": 3, "hidden": [16]},
    "objective": {"name": "soft_intro_vae", "beta_neg": 4.0},
    "train": {"batch": 64, "length": "4 steps", "tick": "2 steps", "preview": "1000 steps"},
}


def tree(**tables: Any) -> dict[str, Any]:
    """The small digits recipe with these tables in place of its own; None takes one away."""
    merged = {**DIGITS, **tables}
    return {key: value for key, value in merged.items() if value is not None}


def with_toys(catalogue: Catalogue) -> Catalogue:
    owner = Owner("toys", "tests", "0")
    return evolve(catalogue, components={**catalogue.components, **{(c.kind, c.name): (c, owner) for c in TOYS}})


def trainer(catalogue: Catalogue, folder: Path, recipe: dict[str, Any], *, toys_too: bool = True) -> Trainer:
    """A trainer of a recipe tree at step 0."""
    known = with_toys(catalogue) if toys_too else catalogue
    read = parse(recipe, Path("toy.toml"), b"", known, (), (), False)
    data = build.dataset(read, known)
    data.prepare(lambda what, done, total: None)
    built = build.build(read, known, data)
    return Trainer.of(built, RunDir.at(folder), torch.device("cpu"), Parallel(), Silent())


def read(catalogue: Catalogue, text: str) -> Recipe:
    """A recipe of this text."""
    return parse(tomllib.loads(text), Path("r.toml"), b"", catalogue, (), (), False)


@frozen
class NoOptions:
    pass


# -- a VampPrior: the encoder inside the prior -------------------------------------------------------------------------------


@frozen
class VampOptions:
    components: int = option(5, doc="pseudo-inputs", ge=1)


class Mixture:
    """Equal weights, diagonal Gaussians [K, d]."""

    def __init__(self, parts: Gaussian) -> None:
        self.parts = parts

    def sample(self, noise: torch.Tensor, labels: Any = None) -> torch.Tensor:
        mu, logvar = self.parts
        which = (noise[:, 0] * len(mu)).long()
        return mu[which] + noise[:, 1:] * torch.exp(0.5 * logvar[which])

    def log_prob(self, z: torch.Tensor, labels: Any = None) -> torch.Tensor:
        mu, logvar = self.parts
        square = (z[:, None] - mu).square() / logvar.exp()
        each = -0.5 * (square + logvar + math.log(2 * math.pi)).sum(dim=2)
        return torch.logsumexp(each, dim=1) - math.log(len(mu))

    def kl(self, q: Gaussian, noise: torch.Tensor, labels: Any = None) -> torch.Tensor:
        return sampled_kl(self.log_prob, q, noise)

    def detach(self) -> Mixture:
        return Mixture(Gaussian(self.parts.mu.detach(), self.parts.logvar.detach()))


class Vamp(nn.Module):
    def __init__(self, components: int, dim: int, shape: tuple[int, ...], conditional: bool = False) -> None:
        super().__init__()
        self.conditional = conditional
        self.register_buffer("labels", torch.zeros(components, dtype=torch.int64))
        self.dim = dim
        self.pseudo_inputs = nn.Parameter(torch.zeros(components, *shape))

    def begin(self, stage: Any, batches: Any, encode: Any) -> None:
        if stage.number:
            return
        x, labels = next(batches)
        self.pseudo_inputs.copy_(x[: len(self.pseudo_inputs)])
        if labels is not None:
            self.labels.copy_(labels[: len(self.labels)])

    def realise(self, encode: Any) -> Mixture:
        return Mixture(encode(self.pseudo_inputs, self.labels if self.conditional else None))

    def draw(self, n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.cat([torch.rand(n, 1, generator=generator), torch.randn(n, self.dim, generator=generator)], dim=1)

    def draw_kl(self, n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(n, 8, self.dim, generator=generator)


# -- a flow as a third player ------------------------------------------------------------------------------------------------


class AffineFlow(nn.Module):
    """z = a ⊙ eps + b, learned; its own distribution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_a, self.b = nn.Parameter(torch.full((dim,), 0.3)), nn.Parameter(torch.full((dim,), 0.5))

    def realise(self, encode: Any) -> AffineMap:
        return AffineMap(self.log_a, self.b)


class AffineMap:
    def __init__(self, log_a: torch.Tensor, b: torch.Tensor) -> None:
        self.log_a, self.b = log_a, b

    def sample(self, noise: torch.Tensor, labels: Any = None) -> torch.Tensor:
        return noise * self.log_a.exp() + self.b

    def log_prob(self, z: torch.Tensor, labels: Any = None) -> torch.Tensor:
        eps = (z - self.b) / self.log_a.exp()
        return (-0.5 * (eps.square() + math.log(2 * math.pi)) - self.log_a).sum(dim=1)

    def kl(self, q: Gaussian, noise: Any, labels: Any = None) -> torch.Tensor:
        s = 2 * self.log_a
        return 0.5 * (s - q.logvar - 1 + (q.logvar.exp() + (q.mu - self.b).square()) / s.exp()).sum(dim=1)

    def detach(self) -> AffineMap:
        return AffineMap(self.log_a.detach(), self.b.detach())


def three_player_decoder_loss(nets: Any, batch: Any, noise: Any, c: Any, carry: Any) -> Any:
    """The decoder's half, and for the prior alone s Σ_g B_k KL[sg q(z|x) ‖ p], with q of before the encoder's update."""
    prior = nets.prior(frozen=False)
    still = {group: p.detach() for group, p in prior.items()}
    half = soft_intro_vae.decoder_half(
        nets, still, batch, noise, c, carry, fakes=("rec", "prior"), stop_gradient="official", share_noise=True
    )
    fit = kl(half.q, prior, noise["kl"]["real"], batch.labels)
    loss = half.loss + c["scale"] * weighted(fit, c["beta_kl"])
    return loss.mean(), {**half.terms, "kl_fit": total(fit)}, half.carry


def build_three_players(config: Any, spec: Spec, groups: dict[str, int]) -> Objective:
    base = soft_intro_vae.build_soft_intro_vae(config, spec, groups)
    decoder = Phase("decoder", ("decoder", "prior"), three_player_decoder_loss)
    return evolve(base, phases=(base.phases[0], decoder))


def prior_loss(nets: Any, batch: Any, noise: Any, c: Any, carry: Any) -> Any:
    """s Σ_g B_k KL[sg q(z|x) ‖ p]."""
    q = latents.detach_posterior(nets.encoder(*batch))
    fit = kl(q, nets.prior(frozen=False), noise["kl"]["real"], batch.labels)
    return (c["scale"] * weighted(fit, c["beta_kl"])).mean(), {"kl_fit": total(fit)}, carry


def build_own_phase(config: Any, spec: Spec, groups: dict[str, int]) -> Objective:
    """The prior in a phase of its own, between the two others."""
    base = soft_intro_vae.build_soft_intro_vae(config, spec, groups)
    return evolve(base, phases=(base.phases[0], Phase("prior", ("prior",), prior_loss), base.phases[1]))


# -- a bootstrap target as a shadow ------------------------------------------------------------------------------------------


def bootstrap_decoder_loss(nets: Any, batch: Any, noise: Any, c: Any, carry: Any) -> Any:
    """The fakes are decoded again by the target, which no gradient changes."""
    redirected = evolve(nets, decoder=Redirected(nets.decoder, nets.shadows["decoder@target"]))
    settings = {"fakes": ("rec", "prior"), "stop_gradient": "official", "share_noise": True}
    return soft_intro_vae.decoder_loss(redirected, batch, noise, c, carry, **settings)


class Redirected:
    """The decoder for the first two calls of the phase (x_rec, x_prior), the target for those after."""

    def __init__(self, decoder: Any, target: Any) -> None:
        self.calls, self.decoder, self.target = 0, decoder, target

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return (self.decoder if self.calls <= 2 else self.target)(*arguments)


def build_bootstrap(config: Any, spec: Spec, groups: dict[str, int]) -> Objective:
    base = soft_intro_vae.build_soft_intro_vae(config, spec, groups)
    decoder = Phase("decoder", ("decoder",), bootstrap_decoder_loss)
    return evolve(base, phases=(base.phases[0], decoder), shadows=(Shadow("target", "decoder", copy_every_images=128),))


# -- a VampPrior that hands over to a mixture, and bounds that are taken when it does ----------------------------------------


class HandOver(Vamp):
    """A Vamp in stage 0; then the mixture it was, with means, log-variances and bounds of its own."""

    batch_statistic = True  # its regulariser

    def __init__(self, components: int, dim: int, shape: tuple[int, ...]) -> None:
        super().__init__(components, dim, shape)
        self.mu, self.logvar = (nn.Parameter(torch.zeros(components, dim)) for _ in range(2))
        self.register_buffer("bounds", torch.zeros(2, dim))
        self.stage = 0
        self.begun: list[int] = []

    def set_stage(self, stage: Any) -> None:
        self.stage = stage.number

    def begin(self, stage: Any, batches: Any, encode: Any) -> None:
        self.begun.append(stage.number)
        super().begin(stage, batches, encode)
        if stage.number == 1:
            parts = super().realise(encode).parts
            self.mu.copy_(parts.mu)
            self.logvar.copy_(parts.logvar)
            self.bounds.copy_(torch.stack([parts.logvar.amin(dim=0) - 0.1, parts.logvar.amax(dim=0) + 0.1]))

    def realise(self, encode: Any) -> Mixture:
        return Spread(Gaussian(self.mu, self.logvar)) if self.stage else super().realise(encode)

    def logvar_bounds(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (self.bounds[0], self.bounds[1]) if self.stage else None

    def lr_factors(self) -> dict[str, float]:
        return {"logvar": 0.25}


class Spread(Mixture):
    """A mixture that wants all its parts in use: minus the entropy of the batch's mean responsibilities."""

    def detach(self) -> Mixture:
        return Spread(super().detach().parts)

    def regulariser(self, z: torch.Tensor, mean: Any, q: Any, noise: Any) -> torch.Tensor:
        mu, logvar = self.parts
        each = -0.5 * ((z[:, None] - mu).square() / logvar.exp() + logvar).sum(dim=2)  # [N, K]
        share = mean(each.softmax(dim=1))  # [K]
        return (share * (share + 1e-8).log()).sum()


# -- batch norm --------------------------------------------------------------------------------------------------------------


def normed(spec: Spec) -> Networks:
    """Convolutions with batch norm, small enough to train in a second."""
    c, h, w = spec.shape
    # no bias before a batch norm: its gradient would be rounding, whose sign Adam follows
    encoder = nn.Sequential(
        nn.Conv2d(c, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * h * w, 6)
    )
    decoder = nn.Sequential(
        nn.Linear(3, 16, bias=False),
        nn.BatchNorm1d(16, momentum=None),
        nn.ReLU(),
        nn.Linear(16, c * h * w),
        nn.Unflatten(1, spec.shape),
    )
    return Networks(NormedEncoder(encoder), NormedDecoder(decoder), {"z": 3}, batch_statistics=True)


class NormedEncoder(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, Gaussian]:
        return {"z": Gaussian(*self.body(x).chunk(2, dim=1))}


class NormedDecoder(NormedEncoder):
    def forward(self, codes: dict[str, torch.Tensor], labels: Any = None, noise: Any = None) -> torch.Tensor:  # type: ignore[override]
        return self.body(codes["z"]).sigmoid()


# -- a network that grows ----------------------------------------------------------------------------------------------------


class GrowingEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 6)
        self.seen: list[Any] = []

    def set_stage(self, stage: Any) -> None:
        self.seen.append(stage)

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, Gaussian]:
        assert x.shape[1:] == self.seen[-1].shape, (x.shape, self.seen[-1].shape)
        return {"z": Gaussian(*self.linear(F.adaptive_avg_pool2d(x, 4).flatten(1)).chunk(2, dim=1))}


class GrowingDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.refine = nn.Linear(3, 16), nn.Conv2d(1, 1, 3, padding=1)
        self.stage: Any = None
        self.fades: list[float] = []

    def set_stage(self, stage: Any) -> None:
        self.stage = stage

    def forward(self, codes: dict[str, torch.Tensor], labels: Any = None, noise: Any = None) -> torch.Tensor:
        x = self.linear(codes["z"]).sigmoid().unflatten(1, (1, 4, 4))
        if self.stage.shape[1] == 8:
            fade = 1.0 if self.stage.fade is None else self.stage.fade
            if self.training:
                self.fades.append(float(fade))
            x = F.interpolate(x, scale_factor=2.0)
            x = x + fade * self.refine(x)
        else:
            x = x + 0 * self.refine(x)
        return x


TOYS = [
    Component(
        "prior", "vamp", VampOptions, lambda config, dim, spec: Vamp(config.components, dim, spec.shape, spec.conditional), "toy"
    ),
    Component("prior", "flow", NoOptions, lambda config, dim, spec: AffineFlow(dim), "toy"),
    Component("prior", "hand_over", VampOptions, lambda config, dim, spec: HandOver(config.components, dim, spec.shape), "toy"),
    Component("objective", "three_players", soft_intro_vae.SoftIntroVAEConfig, build_three_players, "toy"),
    Component("objective", "own_phase", soft_intro_vae.SoftIntroVAEConfig, build_own_phase, "toy"),
    Component("objective", "bootstrap", soft_intro_vae.SoftIntroVAEConfig, build_bootstrap, "toy"),
    Component(
        "network", "growing", NoOptions, lambda config, spec: Networks(GrowingEncoder(), GrowingDecoder(), {"z": 3}), "toy"
    ),
    Component("network", "normed", NoOptions, lambda config, spec: normed(spec), "toy"),
]


def weights(trainer: Trainer, player: str) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainer.players[player].module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)
