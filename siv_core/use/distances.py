"""Distances between two sets of features [N, D]: Fréchet distance, kernel distance, precision and recall. All in float64.

Which features, of which images, is the business of who calls; so is what a number may be called.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from siv_core.seeding import Streams

BLOCK, BLOCKS = 1000, 10  # samples of a block of the kernel distance at most, and blocks at least
CHUNK = 1024  # rows of a matrix of distances that are there at once


class Moments:
    """Mean [D] and covariance [D, D] of features that come in pieces of any size (Chan et al. 1983, equations 2.1): the memory
    they take does not grow with N, and how they are cut changes them by rounding alone."""

    def __init__(self, dims: int) -> None:
        self.n = 0
        self.mean = torch.zeros(dims, dtype=torch.float64)
        self.scatter = torch.zeros(dims, dims, dtype=torch.float64)  # Σ (x − mean)(x − mean)ᵀ

    def add(self, features: Tensor) -> None:
        """Take in features [n, D]."""
        x = features.detach().to("cpu", torch.float64)
        if not len(x):
            return
        mean, n = x.mean(dim=0), self.n + len(x)
        x, step = x - mean, mean - self.mean
        self.scatter.addmm_(x.T, x).addr_(step, step, alpha=self.n * len(x) / n)
        self.mean += step * (len(x) / n)
        self.n = n

    @property
    def covariance(self) -> Tensor:
        """With N − 1 below the line, as in numpy.cov; of fewer than two samples a ValueError."""
        if self.n < 2:
            raise ValueError(f"{self.n} samples have no covariance")
        return self.scatter / (self.n - 1)


def moments(features: Tensor) -> Moments:
    """Of features [N, D] that are there at once."""
    found = Moments(features.shape[1])
    found.add(features)
    return found


def frechet(a: Moments, b: Moments) -> float:
    """|mu_a − mu_b|² + tr(A + B − 2 (A B)^½), of Gaussians with these moments (Dowson & Landau 1982; Heusel et al. 2017,
    equation 6).

    With A = F Fᵀ and B = G Gᵀ the trace of the root is the sum of the singular values of Fᵀ G: the roots of the eigenvalues of
    the symmetric product A^½ B A^½, without the loss of half the digits that taking those roots costs where an eigenvalue is 0.
    It is real for any moments, those of fewer samples than dimensions too; of N samples the distance is biased upwards by a term
    of the order of 1/N (Bińkowski et al. 2018, section 4), so only values at equal counts compare.
    """
    cov_a, cov_b = a.covariance, b.covariance
    root = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    between = (a.mean - b.mean).square().sum()
    return max(0.0, float(between + cov_a.trace() + cov_b.trace() - 2 * root))  # rounding alone would make it negative


def _factor(covariance: Tensor) -> Tensor:
    """F [D, rank] with F Fᵀ = covariance; directions in which it is zero to rounding are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    real = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, real] * values[real].sqrt()


class KernelDistance(NamedTuple):
    value: float
    error: float  # its standard error: the blocks' deviation over the root of their number
    blocks: int
    size: int  # samples of each set in a block


def kernel_distance(x: Tensor, y: Tensor, seed: int) -> KernelDistance:
    """Squared maximum mean discrepancy of x [N, D] and y [M, D] under the kernel (a·b / D + 1)³, unbiased (Bińkowski et al. 2018,
    section 4), as the mean over blocks: at equal distributions it is 0 on average and often negative.

    The published code draws 100 blocks of 1000 that overlap. These do not, so that their deviation tells the standard error: as
    many as there are samples for, each of at most `BLOCK` samples, `BLOCKS` at least. A ValueError where the smaller set has
    fewer than two samples for each.
    """
    least = min(len(x), len(y))
    size = min(BLOCK, least // BLOCKS)
    if size < 2:
        raise ValueError(f"{least} samples are too few for {BLOCKS} blocks of two")
    blocks = least // size
    orders = [torch.randperm(len(z), generator=Streams(seed, 0)(f"kernel.{side}")) for side, z in (("x", x), ("y", y))]
    parts = [order[: blocks * size].split(size) for order in orders]
    found = torch.stack([_mmd2(x[i].cpu().double(), y[j].cpu().double()) for i, j in zip(*parts, strict=True)])
    return KernelDistance(float(found.mean()), float(found.std() / blocks**0.5), blocks, size)


def _mmd2(x: Tensor, y: Tensor) -> Tensor:
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return within[0] + within[1] - 2 * xy.mean()


def precision_recall(samples: Tensor, reference: Tensor, k: int) -> tuple[float, float]:
    """Precision: the share of the samples [N, D] within the manifold of the reference [M, D]; recall: the share of the reference
    within that of the samples. A manifold is the union of balls around its members that reach to their k-th nearest other one
    (Kynkäänniemi et al. 2019, equations 1 to 3). A ValueError where a set has no more than k members.
    """
    least = min(len(samples), len(reference))
    if least <= k:
        raise ValueError(f"{least} samples have no {k} neighbours each")
    middle = reference.to("cpu", torch.float64).mean(dim=0)  # distances by matrix products lose digits far from the origin
    x, y = samples.to("cpu", torch.float64) - middle, reference.to("cpu", torch.float64) - middle
    return _covered(x, y, k), _covered(y, x, k)


def _covered(x: Tensor, manifold: Tensor, k: int) -> float:
    """Share of x in a ball of the manifold."""
    radii = torch.cat([_others(manifold, rows).kthvalue(k, dim=1).values for rows in torch.arange(len(manifold)).split(CHUNK)])
    return sum(int((torch.cdist(part, manifold) <= radii).any(dim=1).sum()) for part in x.split(CHUNK)) / len(x)


def _others(x: Tensor, rows: Tensor) -> Tensor:
    """Distances [R, N] of these rows to all, to themselves infinite."""
    distances = torch.cdist(x[rows], x)
    distances[torch.arange(len(rows)), rows] = torch.inf
    return distances
