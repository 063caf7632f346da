"""Scores of images by a trained model: one number an image, float64; a LARGER score is more of an outlier.

With r the reconstruction loss of the model, K_g the KL of latent group g in nats, B the betas (`betas`) and z_1 … z_M ~ q(z ∣ x):

    elbo               B_r ⟨ r(x, D(z_m)) ⟩_m + Σ_g B_g K_g(x), the negative ELBO
    kl                 Σ_g K_g(x)
    reconstruction     r(x, D(mu))
    iwae               −ln ⟨ exp(−B_r/B_k · r(x, D(z_m))) p(z_m) / q(z_m ∣ x) ⟩_m, the negative importance-weighted
                       log-likelihood, but for a constant (Burda et al. 2016, arXiv:1509.00519, equation 8)
    likelihood_regret  max over (mu, log σ²) of this one image of its ELBO, minus its ELBO with the encoder's (Xiao, Yan & Amit
                       2020, arXiv:2003.02977; the published code optimises a copy of the encoder's weights instead)

The noise of all this is one row for each draw, the same for every image: a score depends on its image, the model and the
settings, and neither on the other images nor on how they are cut into batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from siv_core import latents, losses
from siv_core.errors import UserError
from siv_core.latents import Gaussian, Posterior
from siv_core.losses import Betas
from siv_core.model import Model
from siv_core.nets import sources, tree_map
from siv_core.protocols import Nets
from siv_core.seeding import Streams

NAMES = ("elbo", "kl", "reconstruction", "iwae", "likelihood_regret")
FITTING = 1_000_000  # number of the first draw of the optimisation: none of those that scores are taken with


@frozen
class Settings:
    """What scores depend on beside image and model."""

    draws: int = 5  # M, as in Soft-IntroVAE's figure 8
    steps: int = 100  # of Adam on (mu, log σ²)
    lr: float = 0.05  # of it at first; it falls to 0 on a line
    seed: int = 0  # of the draws
    betas: str = "objective"  # or "one"


def score(
    model: Model, x: Tensor, names: Sequence[str], settings: Settings, tick: Callable[[], None] = lambda: None
) -> dict[str, Tensor]:
    """{name: [N] float64, on the CPU} of images [N, …] in the model's value range. `tick` is called again and again.

    Of a conditional model each image has the label of its lowest `elbo`: images of another set have no labels that it knows, and
    no set is to have an advantage. A `UserError` where `lacking` has a reason.
    """
    reasons = [reason for name in names if (reason := lacking(model, name, settings))]
    if reasons:
        raise UserError(reasons)
    getattr(model.reconstruction, "prepare", lambda: None)()
    betas = betas_of(model, settings)
    labels = _likeliest(model, x, betas, settings, tick) if model.spec.conditional else None
    q = model.encode(x, labels)
    if labels is not None:
        labels = labels.to(model.device)
    found: dict[str, Tensor] = {}
    with model.differentiable() as nets:
        image = _Image(model, nets, nets.prior(frozen=True), x.to(model.device), labels, betas)
        with torch.no_grad():
            if {"elbo", "iwae"} & set(names):
                found = _sampled(image, q, settings, tick)
            if "kl" in names:
                found["kl"] = losses.total(image.kl(q, _noise(model, settings.seed, 0)))
            if "reconstruction" in names:
                found["reconstruction"] = image.rec(latents.means(q), _noise(model, settings.seed, 0))
        if "likelihood_regret" in names:
            better = _optimised(image, q, settings, tick)
            with torch.no_grad():
                noises = _matched([_noise(model, settings.seed, m) for m in range(settings.draws)])
                found["likelihood_regret"] = image.energy(q, noises) - image.energy(better, noises)
    return {name: found[name].detach().cpu() for name in names}


def lacking(model: Model, name: str, settings: Settings) -> str | None:
    """Why this score cannot be taken of this model, or None."""
    missing = getattr(model.reconstruction, "missing", lambda: None)()
    if name != "kl" and (model.reconstruction is None or missing):
        return f"{name}: {missing or 'this model has no reconstruction loss'}"
    if name == "iwae" and not betas_of(model, settings).decoder:
        return "iwae: the latent groups' weights of the KL differ, or are 0: there is no likelihood that it bounds; betas = 'one'"
    return None


def betas_of(model: Model, settings: Settings) -> Betas:
    """The weights of the ELBO: the objective's own where they are asked for and known, else ones."""
    own = model.betas if settings.betas == "objective" else None
    return own or Betas(1.0, dict.fromkeys(model.groups, 1.0))


def protocol(model: Model, names: Sequence[str], settings: Settings) -> dict[str, Any]:
    """What the numbers depend on, as JSON types."""
    betas, m = betas_of(model, settings), settings.draws
    known = settings.betas == "objective" and model.betas is not None
    told = {
        "elbo": f"negative ELBO: beta_rec * mean of r(x, D(z)) over {m} z ~ q + sum over groups of beta_kl * KL",
        "kl": "KL of q(z|x) to the prior, summed over the latent groups, nats",
        "reconstruction": "r(x, D(mu)), the loss that the model was trained with",
        "iwae": f"negative importance-weighted log-likelihood (arXiv:1509.00519), {m} draws, nats, where ln p(x|z) is"
        " -beta_rec / beta_kl * r(x, D(z)), without its constant",
        "likelihood_regret": "ELBO with (mu, logvar) optimised for this image, minus that with the encoder's (arXiv:2003.02977):"
        f" Adam, {settings.steps} steps, rate {settings.lr:g} falling to 0, two mirrored z a step; both ELBOs over the same {m}"
        " mirrored pairs of z, scaled to variance 1",
    }
    return {
        "sign": "a larger score is more of an outlier",
        "scores": {name: told[name] for name in names},
        "betas": {"of": "the objective" if known else "ones", "beta_rec": betas.rec, "beta_kl": dict(betas.kl)},
        "noise": f"seed {settings.seed}; the same for every image",
        **({"labels": "of each image the one with its lowest negative ELBO"} if model.spec.conditional else {}),
    }


@frozen(eq=False)
class _Image:
    """Images as the terms of an ELBO take them, on the model's device."""

    model: Model
    nets: Nets
    prior: Mapping[str, Any]  # {group: Distribution}
    x: Tensor
    labels: Tensor | None
    betas: Betas

    def kl(self, q: Posterior, noise: Mapping[str, Any]) -> dict[str, Tensor]:
        """{group: [N]}, float64: exp(logvar) has room there."""
        wide = {group: Gaussian(mu.double(), logvar.double()) for group, (mu, logvar) in q.items()}
        return losses.kl(wide, self.prior, _rows(noise["kl"], len(self.x)), self.labels)

    def rec(self, codes: latents.Codes, noise: Mapping[str, Any]) -> Tensor:
        """r(x, D(z)) [N], float64."""
        y = self.nets.decoder(codes, self.labels, _rows(noise["decoder"], len(self.x)))
        return self.nets.reconstruction(self.x, y).double()

    def energy(self, q: Posterior, noises: Sequence[Mapping[str, Any]]) -> Tensor:
        """The negative ELBO [N], the mean over these draws."""
        found = []
        for noise in noises:
            kl = losses.total({group: self.betas.kl[group] * value for group, value in self.kl(q, noise).items()})
            found.append(self.betas.rec * self.rec(self.codes(q, noise), noise) + kl)
        return torch.stack(found).mean(dim=0)

    def codes(self, q: Posterior, noise: Mapping[str, Any]) -> latents.Codes:
        drawn = {group: eps.to(q[group].mu.dtype) for group, eps in noise["posterior"].items()}
        return latents.sample(q, drawn)


def _sampled(image: _Image, q: Posterior, settings: Settings, tick: Callable[[], None]) -> dict[str, Tensor]:
    """elbo and iwae, from the same draws; without `iwae` where the betas have no ratio."""
    recs, log_ratios, kls, ratio = [], [], [], image.betas.decoder
    for m in range(settings.draws):
        tick()
        noise = _noise(image.model, settings.seed, m)
        z = image.codes(q, noise)
        recs.append(image.rec(z, noise))
        kls.append(losses.total({group: image.betas.kl[group] * value for group, value in image.kl(q, noise).items()}))
        log_p = losses.total({group: image.prior[group].log_prob(z[group], image.labels).double() for group in z})
        log_ratios.append(log_p - losses.total({group: latents.log_prob(q[group], z[group]).double() for group in z}))
    rec = torch.stack(recs)
    found = {"elbo": image.betas.rec * rec.mean(dim=0) + torch.stack(kls).mean(dim=0)}
    if ratio:
        found["iwae"] = -losses.importance_weighted((torch.stack(log_ratios) - ratio * rec).T)
    return found


def _optimised(image: _Image, q: Posterior, settings: Settings, tick: Callable[[], None]) -> Posterior:
    """Each image's own posterior after `steps` steps of Adam on its negative ELBO, from the encoder's.

    A step has noise of its own, as in the published code: few draws that stay can be fitted by themselves, variances grow where
    none of them looks. Each comes with its mirror image, and the rate falls to 0, so that little of what a step drew is left.
    """
    leaves = {group: Gaussian(*(part.clone().requires_grad_() for part in gaussian)) for group, gaussian in q.items()}
    flat = [part for gaussian in leaves.values() for part in gaussian]
    adam = torch.optim.Adam(flat, settings.lr)
    for step in range(settings.steps):
        tick()
        adam.param_groups[0]["lr"] = settings.lr * (1 - step / settings.steps)
        energy = image.energy(leaves, _mirrored(_noise(image.model, settings.seed, FITTING + step)))
        for part, gradient in zip(flat, torch.autograd.grad(energy.sum(), flat), strict=True):  # of no weight
            part.grad = gradient
        adam.step()
    return latents.detach_posterior(leaves)


def _likeliest(model: Model, x: Tensor, betas: Betas, settings: Settings, tick: Callable[[], None]) -> Tensor:
    """The label [N] with which each image has its lowest negative ELBO; the first of several."""
    energies = []
    for label in range(model.spec.classes or 1):
        labels = torch.full((len(x),), label)
        q = model.encode(x, labels)
        with model.differentiable() as nets, torch.no_grad():
            image = _Image(model, nets, nets.prior(frozen=True), x.to(model.device), labels.to(model.device), betas)
            draws = [_noise(model, settings.seed, m) for m in range(settings.draws)]
            energies.append(image.energy(q, draws).cpu())
        tick()
    return torch.stack(energies).nan_to_num(math.inf, math.inf).argmin(dim=0)


def _noise(model: Model, seed: int, number: int) -> dict[str, Any]:
    """What one draw takes, one row for all images; drawn on the CPU, so that devices have the same."""
    streams, drawn = Streams(seed, number), sources(model.groups, model.priors, model.decoder)
    tree = {
        "posterior": drawn.posterior(1, streams, "scores"),
        "kl": drawn.kl(1, streams, "scores.kl"),
        "decoder": drawn.decoder(1, streams, "scores.decoder", "model"),
    }
    on_device: dict[str, Any] = tree_map(tree, lambda part: part.to(model.device))
    return on_device


def _mirrored(noise: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A draw and its mirror image: what is odd in the noise of z cancels between them."""
    return noise, {**noise, "posterior": {group: -eps for group, eps in noise["posterior"].items()}}


def _matched(noises: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same draws with their mirror images, scaled so that each dimension of z has mean 0 and variance 1 over them: few draws
    would take a shift of means or variances for a gain."""
    stacked = {group: torch.stack([noise["posterior"][group] for noise in noises]) for group in noises[0]["posterior"]}
    scales = {group: eps.square().mean(dim=0).sqrt() for group, eps in stacked.items()}
    scaled = [{**noise, "posterior": {g: eps / scales[g] for g, eps in noise["posterior"].items()}} for noise in noises]
    return [one for noise in scaled for one in _mirrored(noise)]


def _rows(tree: Any, n: int) -> Any:
    """The same row for each of n images."""
    return tree_map(tree, lambda part: part.expand(n, *part.shape[1:]))
