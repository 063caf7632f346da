"""Latent groups: diagonal Gaussians by name, their samples and their KL to the standard normal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BEYOND = 1e-3  # slope of a log-variance beyond its bound: what is there finds back by it, where a clamp has no gradient


class Gaussian(NamedTuple):
    """A diagonal Gaussian a row."""

    mu: Tensor  # [N, d]
    logvar: Tensor  # [N, d], natural log of the variance


Posterior = dict[str, Gaussian]  # group -> q(z_group | x)
Codes = dict[str, Tensor]  # group -> z [N, d]


def sample(q: Posterior, noise: Codes) -> Codes:
    """z = mu + sigma · eps for each group; `noise` is standard normal [N, d]."""
    return {group: mu + noise[group] * torch.exp(0.5 * logvar) for group, (mu, logvar) in q.items()}


def means(q: Posterior) -> Codes:
    return {group: gaussian.mu for group, gaussian in q.items()}


def detach(codes: Codes) -> Codes:
    return {group: z.detach() for group, z in codes.items()}


def detach_posterior(q: Posterior) -> Posterior:
    return {group: Gaussian(mu.detach(), logvar.detach()) for group, (mu, logvar) in q.items()}


def kl_standard(q: Gaussian) -> Tensor:
    """KL[q ‖ N(0, I)] in nats [N], summed over the latent dimensions (Kingma & Welling 2014, appendix B)."""
    mu, logvar = q
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(dim=1)


def log_prob(q: Gaussian, z: Tensor) -> Tensor:
    """ln q(z ∣ x) [N] of z [N, d]."""
    return -0.5 * ((z - q.mu).square() / q.logvar.exp() + q.logvar + math.log(2 * math.pi)).sum(dim=1)


def largest_logvar(q: Posterior) -> Tensor:
    """The largest absolute log-variance of each sample [N], over all groups and without gradient: a sign of health."""
    return torch.cat([gaussian.logvar.detach() for gaussian in q.values()], dim=1).abs().amax(dim=1)


def bound_logvar(q: Posterior, bound: float | None) -> Posterior:
    """Log-variances held at ±bound, beyond which they go on with `BEYOND` as their slope; None leaves them free."""
    if bound is None:
        return q
    return {
        group: Gaussian(mu, torch.add(logvar.clamp(-bound, bound), F.softshrink(logvar, bound), alpha=BEYOND))
        for group, (mu, logvar) in q.items()
    }


def bound_groups(q: Posterior, bounds: Mapping[str, tuple[Tensor, Tensor] | None]) -> Posterior:
    """Log-variances of these groups held in the same way between (low [d], high [d]); None and groups that are not named stay
    free."""
    given = {group: pair for group, pair in bounds.items() if pair is not None}
    held = {}
    for group, (low, high) in given.items():
        mu, logvar = q[group]
        beyond = F.relu(logvar - high) - F.relu(low - logvar)
        held[group] = Gaussian(mu, torch.add(logvar.clamp(low, high), beyond, alpha=BEYOND))
    return {**q, **held}
