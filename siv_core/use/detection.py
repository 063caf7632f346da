"""How well a score tells outliers from inliers. A LARGER score is more of an outlier, and outliers are the positive class.

Scores are [N] of each kind, in any unit: only their order counts. Scores that are equal stand at one threshold; infinite ones are
ranked as what they are. Numbers are fractions of 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Curve(NamedTuple):
    """What is told at each distinct score, from the largest down: an image is called an outlier when it has at least that."""

    found: Tensor  # [T] outliers called so
    false: Tensor  # [T] inliers called so


def curve(inliers: Tensor, outliers: Tensor) -> Curve:
    """Counts at every threshold, float64."""
    scores = torch.cat([outliers, inliers]).double()
    order = scores.argsort(descending=True, stable=True)
    positive = (order < len(outliers)).double()
    last = torch.ones(len(order), dtype=torch.bool)  # of the images with one score
    last[:-1] = scores[order][1:] != scores[order][:-1]
    return Curve(positive.cumsum(0)[last], (1 - positive).cumsum(0)[last])


def auroc(inliers: Tensor, outliers: Tensor) -> float:
    """The area under the curve of the true positive rate over the false positive rate: the share of pairs of an outlier and an
    inlier in which the outlier has the larger score, ties counted half. 0.5 is chance."""
    return int(_halves(inliers, outliers).sum()) / (2 * len(inliers) * len(outliers))


def auroc_error(inliers: Tensor, outliers: Tensor) -> float:
    """The standard error of `auroc` by DeLong, DeLong & Clarke-Pearson (Biometrics 44, 1988, equation 6 of one curve), for images
    drawn independently; nan with fewer than two of either kind."""
    if min(len(inliers), len(outliers)) < 2:
        return math.nan
    above = _halves(inliers, outliers).double() / (2 * len(inliers))  # of each outlier: the share of inliers below it
    below = 1 - _halves(outliers, inliers).double() / (2 * len(outliers))  # of each inlier: the share of outliers above it
    return math.sqrt(float(above.var()) / len(outliers) + float(below.var()) / len(inliers))


def aupr(inliers: Tensor, outliers: Tensor) -> float:
    """Average precision, Σ_t (recall_t − recall_{t−1}) · precision_t over thresholds from the largest score down. Chance is the
    share of outliers among all."""
    at = curve(inliers, outliers)
    recall = torch.cat([torch.zeros(1, dtype=torch.float64), at.found]) / len(outliers)
    return float((recall.diff() * at.found / (at.found + at.false)).sum())


def fpr95(inliers: Tensor, outliers: Tensor) -> float:
    """The share of inliers that are called outliers at the highest threshold at which at least 95 % of the outliers are."""
    at = curve(inliers, outliers)
    enough = at.found / len(outliers) >= 0.95
    return float(at.false[int(enough.double().argmax())]) / len(inliers)


def _halves(below: Tensor, of: Tensor) -> Tensor:
    """For each of `of` how many of `below` are smaller, in halves: equal ones count one, smaller ones two. [len(of)], int64."""
    ordered, values = below.double().sort().values, of.double()
    return torch.searchsorted(ordered, values, right=False) + torch.searchsorted(ordered, values, right=True)
