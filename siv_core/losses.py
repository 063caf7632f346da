"""The terms that objectives are made of: per-sample values [N], in nats or in units of the reconstruction loss.

Weights and means are applied in `objectives`, once. See docs/math.md for the symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

from siv_core.latents import Gaussian, Posterior
from siv_core.protocols import Distribution, Noise


def kl(q: Posterior, prior: Mapping[str, Distribution], noise: Noise) -> dict[str, Tensor]:
    """KL[q_g(z | x) ‖ p_g(z)] of each latent group: {group: [N]}."""
    return {group: prior[group].kl(gaussian, noise.get(group)) for group, gaussian in q.items()}


def weighted(values: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """Σ_g weight_g · value_g, [N]."""
    return total({group: weights[group] * value for group, value in values.items()})


def total(values: Mapping[str, Tensor]) -> Tensor:
    """Σ_g value_g, [N]."""
    return reduce(torch.add, values.values())


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
