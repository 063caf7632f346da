"""The terms that objectives are made of: per-sample values [N], in nats or in units of the reconstruction loss.

Weights and means are applied in `objectives`, once. See docs/math.md for the symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siv_core.latents import Codes, Gaussian, Posterior
from siv_core.protocols import Distribution, Noise, Spec, Terms


class Betas(NamedTuple):
    """The weights of an ELBO: −ELBO(x) = rec · r(x, D(z)) + Σ_g kl[g] · K_g(x)."""

    rec: float
    kl: Mapping[str, float]  # of all latent groups

    @property
    def decoder(self) -> float | None:
        """B_r / B_k, with which −(B_r / B_k) r(x, D(z)) is ln p(x ∣ z) in nats up to its constant; None where the groups' B_k
        differ (then this ELBO is that of no model), or one of the weights is 0."""
        weights = set(self.kl.values())
        return self.rec / weights.pop() if self.rec and len(weights) == 1 and 0 not in weights else None


def kl(q: Posterior, prior: Mapping[str, Distribution], noise: Noise, labels: Tensor | None = None) -> dict[str, Tensor]:
    """KL[q_g(z ∣ x) ‖ p_g(z)] of each latent group, with labels that to p_g(z ∣ y): {group: [N]}."""
    return {group: prior[group].kl(gaussian, noise.get(group), labels) for group, gaussian in q.items()}


def regulariser(
    prior: Mapping[str, Any], z: Codes, q: Posterior, noise: Noise, mean: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """Σ_g of what the groups' priors ask of the codes z ~ q of data, 0-dim; None where none of them asks anything."""
    asked = {
        group: p.regulariser(z[group], mean, q[group], noise.get(group))
        for group, p in prior.items()
        if hasattr(p, "regulariser")
    }
    return total(asked) if asked else None


def weighted(values: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """Σ_g weight_g · value_g, [N]."""
    return total({group: weights[group] * value for group, value in values.items()})


def total(values: Mapping[str, Tensor]) -> Tensor:
    """Σ_g value_g, [N]."""
    return reduce(torch.add, values.values())


def kl_terms(kind: str, kl: Mapping[str, Tensor]) -> Terms:
    """Named per-sample KLs: over all groups and, where there are several, of each."""
    named = {f"kl_{kind}": total(kl)}
    if len(kl) > 1:
        named.update({f"kl_{kind}.{group}": value for group, value in kl.items()})
    return named


def scale_of(scale: float, spec: Spec) -> float:
    """A recipe's `scale`, where 0 stands for 1/(C·H·W)."""
    return scale or 1.0 / spec.dims


def entropy(q: Gaussian) -> Tensor:
    """Entropy of a diagonal Gaussian in nats, [N]."""
    return 0.5 * (q.logvar + math.log(2 * math.pi) + 1).sum(dim=1)


def sampled_kl(log_prob: Callable[[Tensor], Tensor], q: Gaussian, noise: Tensor) -> Tensor:
    """KL[q ‖ p] with the exact entropy of q and a sampled cross-entropy, [N].

    `noise` is standard normal [N, S, d]; `log_prob` maps [N·S, d] to [N·S].
    """
    n, draws, d = noise.shape
    z = q.mu[:, None] + noise * torch.exp(0.5 * q.logvar)[:, None]  # [N, S, d]
    return -entropy(q) - log_prob(z.reshape(n * draws, d)).reshape(n, draws).mean(dim=1)


def log_normaliser(power: int, beta: float, dims: int) -> float:
    """ln ∫ exp(−beta · Σ |x − y|^power) dx over all x of `dims` numbers, in nats.

    power 2: a Gaussian of variance 1/(2 beta), ½ dims ln(π / beta); 1: a Laplace distribution of scale 1/beta.
    """
    return dims * (math.log(2) + math.lgamma(1 + 1 / power) - math.log(beta) / power)


def best_beta(power: int, mean: float, dims: int) -> float:
    """The beta under which samples with this mean of Σ |x − y|^power are the likeliest: of a Gaussian 1/(2 · variance)."""
    return dims / (power * mean)


def importance_weighted(log_weights: Tensor) -> Tensor:
    """ln (1/M) Σ_m w_m [N] of ln w [N, M]: the bound of Burda et al. 2016 (arXiv:1509.00519, equation 8), in expectation between
    the ELBO, which is their mean, and ln p(x)."""
    return torch.logsumexp(log_weights, dim=1) - math.log(log_weights.shape[1])
