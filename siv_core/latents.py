"""Latent groups: diagonal Gaussians by name, their samples, their KL to the standard normal, and ways from code to code."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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


# -- ways from one code to another -----------------------------------------------------------------------------------------------

OPPOSITE = 1e-6  # sine of the angle below which directions are equal or opposite: what float32 can tell apart


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """From a (t = 0) to b (t = 1), all [N, d], row by row: the direction turns evenly along the great circle, the length goes
    evenly from the one to the other.

    Of equal lengths that is Shoemake's slerp (1985; of latents: White 2016, arXiv:1609.04468), and the length stays. Opposite
    directions have no circle of their own: theirs goes by way of the axis that a has least of. A zero vector has no direction
    and one dimension no room to turn: there the way is straight. Both ends are exact. t is 0-dim.
    """
    wide = torch.stack([a, b]).double()
    lengths = wide.norm(dim=2, keepdim=True)
    u, v = wide / lengths.where(lengths > 0, 1)
    cosine = (u * v).sum(dim=1, keepdim=True)
    across = v - cosine * u
    sine = across.norm(dim=1, keepdim=True)
    axis = F.one_hot(u.abs().argmin(dim=1), u.shape[1]).to(u)
    substitute = axis - (axis * u).sum(dim=1, keepdim=True) * u
    around = (sine < OPPOSITE) & (cosine < 0)
    across = F.normalize(across.where(~around, substitute), dim=1)
    angle = torch.atan2(sine, cosine)
    turned = torch.lerp(lengths[0], lengths[1], t.double()) * (torch.cos(t * angle) * u + torch.sin(t * angle) * across)
    straight = (lengths == 0).any(dim=0) | (around & (substitute.norm(dim=1, keepdim=True) < OPPOSITE))
    z = torch.lerp(a, b, t).where(straight, turned.to(a.dtype))
    return torch.where(t == 0, a, torch.where(t == 1, b, z))


PATHS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": torch.lerp,
    "spherical": slerp,
    "styles": torch.lerp,  # between the styles of a decoder that has some
}


def between(a: Codes, b: Codes, t: Tensor, path: str = "linear") -> Codes:
    """Codes at the share t (0-dim) of the way from a to b, each group by itself."""
    return {group: PATHS[path](a[group], b[group], t) for group in a}


def truncated(styles: Tensor, means: Mapping[int | None, Tensor], psi: float, labels: Tensor | None) -> Tensor:
    """Styles [N, layers, d] whose first K layers are at the share psi of their way from the mean [K, d] of their label, of all
    without labels (Karras et al. 2019, section 3.2)."""
    moved = styles.clone()
    for label, mean in means.items():
        these = slice(None) if label is None or labels is None else (labels == label).nonzero()[:, 0].to(styles.device)
        moved[these, : len(mean)] = torch.lerp(mean, styles[these, : len(mean)], psi)
    return moved
