"""AUROC, average precision and FPR95 against scikit-learn, counting by hand, and what is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from siv_core.use import detection


def drawn(seed: int, n: int, m: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of inliers [n] and outliers [m]; few levels have many ties."""
    generator = torch.Generator().manual_seed(seed)
    inliers, outliers = torch.randn(n, generator=generator), torch.randn(m, generator=generator) + 0.7
    if levels:
        inliers, outliers = ((scores * levels).round() / levels for scores in (inliers, outliers))
    return inliers.double(), outliers.double()


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 40), (300, 200), (37, 1000)])
def test_they_are_those_of_scikit_learn(n, m, levels):
    for seed in range(5):
        inliers, outliers = drawn(seed, n, m, levels)
        truth, scores = np.r_[np.zeros(n), np.ones(m)], torch.cat([inliers, outliers]).numpy()
        assert detection.auroc(inliers, outliers) == pytest.approx(metrics.roc_auc_score(truth, scores), abs=1e-12)
        assert detection.aupr(inliers, outliers) == pytest.approx(metrics.average_precision_score(truth, scores), abs=1e-12)
        fpr, tpr, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
        assert detection.fpr95(inliers, outliers) == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-12)


def test_perfect_and_inverted_separation():
    inliers, outliers = torch.arange(10.0), torch.arange(10.0) + 100
    assert (detection.auroc(inliers, outliers), detection.aupr(inliers, outliers)) == (1.0, 1.0)
    assert detection.fpr95(inliers, outliers) == 0.0
    assert detection.auroc_error(inliers, outliers) == 0.0
    assert detection.auroc(outliers, inliers) == 0.0
    assert detection.fpr95(outliers, inliers) == 1.0


def test_equal_scores_are_chance():
    same = torch.zeros(8)
    assert detection.auroc(same, same[:4]) == 0.5
    assert detection.aupr(same, same[:4]) == pytest.approx(4 / 12)
    assert detection.fpr95(same, same[:4]) == 1.0


def test_infinite_scores_have_their_rank():
    inliers, outliers = torch.tensor([0.0, -math.inf]), torch.tensor([math.inf, 1.0])
    assert detection.auroc(inliers, outliers) == 1.0
    assert detection.auroc(outliers, torch.tensor([math.inf])) == 0.75


def test_equal_laws_come_within_two_errors_and_the_error_is_the_spread():
    """DeLong's error beside the deviation over 400 draws of both sets; about 95 % of the draws are within two of it."""
    generator = torch.Generator().manual_seed(0)
    found, errors = [], []
    for _ in range(400):
        inliers, outliers = torch.randn(60, generator=generator), torch.randn(90, generator=generator)
        found.append(detection.auroc(inliers, outliers))
        errors.append(detection.auroc_error(inliers, outliers))
    spread = float(np.std(found, ddof=1))
    assert spread == pytest.approx(float(np.mean(errors)), rel=4 / math.sqrt(2 * 400))  # four errors of a deviation of 400 draws
    within = np.mean(np.abs(np.array(found) - 0.5) < 2 * np.array(errors))
    assert 0.91 < within < 0.99
    assert abs(np.mean(found) - 0.5) < 4 * spread / math.sqrt(400)


def test_delong_by_its_double_sum():
    """The components of the variance as the paper writes them, pair by pair."""
    inliers, outliers = drawn(1, 23, 31, 2)
    pairs = np.array([[1.0 if o > i else 0.5 if o == i else 0.0 for i in inliers.tolist()] for o in outliers.tolist()])
    v10, v01 = pairs.mean(axis=1), pairs.mean(axis=0)
    expected = math.sqrt(v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01))
    assert detection.auroc_error(inliers, outliers) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(detection.auroc_error(inliers[:1], outliers))
