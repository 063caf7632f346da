"""Distances of feature sets against independent computations, closed forms, and sets whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from siv_core import UserError
from siv_core.use import distances, feature_sets
from siv_core.use.feature_sets import Features, ToBytes


def features(n: int, dims: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated, and positive like what comes out of a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dims, dims, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / math.sqrt(dims)
    return (torch.randn(n, dims, generator=generator, dtype=torch.float64) @ mixing + shift).relu() * (1 + 0.1 * seed)


def by_sqrtm(x: Tensor, y: Tensor) -> float:
    a, b = x.numpy(), y.numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real))


def frechet(x: Tensor, y: Tensor) -> float:
    return distances.frechet(distances.moments(x), distances.moments(y))


# -- Fréchet distance ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "dims"), [(500, 400, 32), (3000, 2000, 128), (64, 65, 63), (100, 100, 2)])
def test_frechet_equals_two_independent_computations(n: int, m: int, dims: int) -> None:
    x, y = features(n, dims, 1), features(m, dims, 2, 0.3)
    found = frechet(x, y)
    assert found == pytest.approx(by_sqrtm(x, y), rel=1e-6)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert frechet(y, x) == pytest.approx(found, rel=1e-9)


def test_frechet_in_closed_form() -> None:
    """Of commuting covariances: Σ (√λ − √μ)² beside the means' distance."""
    a, b = distances.Moments(3), distances.Moments(3)
    for one, mean, variances in ((a, [1.0, 2, 3], [4.0, 9, 0]), (b, [1.0, 0, 3], [1.0, 16, 25])):
        one.n, one.mean = 101, torch.tensor(mean, dtype=torch.float64)
        one.scatter = 100 * torch.diag(torch.tensor(variances, dtype=torch.float64))
    assert distances.frechet(a, b) == pytest.approx(4 + 1 + 1 + 25, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 400), (2, 2)])
def test_frechet_of_fewer_samples_than_dimensions(n: int, m: int) -> None:
    """The trace of the root is the sum of the singular values of one centred table against the other: an exact form of rank n."""
    x, y = features(n, 128, 1), features(m, 128, 2, 0.3)
    a, b = ((z - z.mean(0)).numpy() / math.sqrt(len(z) - 1) for z in (x, y))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + (a**2).sum() + (b**2).sum()
    expected -= 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    assert frechet(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [10, 1000])
def test_equal_sets_are_at_no_distance(n: int) -> None:
    x = features(n, 64, 1)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x.flip(0)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("batch", [1, 7, 100, 1000])
def test_moments_do_not_depend_on_the_pieces(batch: int) -> None:
    x = 1000 + features(300, 16, 1)  # far from the origin, where a sum of squares loses its digits
    found = distances.Moments(16)
    for part in x.split(batch):
        found.add(part)
    found.add(x[:0])
    assert found.n == 300
    np.testing.assert_allclose(found.mean.numpy(), x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="1 samples have no covariance"):
        frechet(features(1, 4, 1), features(9, 4, 1))


# -- kernel distance -------------------------------------------------------------------------------------------------------------


def plain_mmd2(x: Tensor, y: Tensor) -> float:
    def kernel(a: list[float], b: list[float]) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    xs, ys = x.tolist(), y.tolist()
    n, m = len(xs), len(ys)
    within_x = sum(kernel(a, b) for i, a in enumerate(xs) for j, b in enumerate(xs) if i != j) / (n * (n - 1))
    within_y = sum(kernel(a, b) for i, a in enumerate(ys) for j, b in enumerate(ys) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in xs for b in ys) / (n * m)


def test_one_block_equals_a_plain_loop_and_torch_fidelity() -> None:
    x, y = features(40, 16, 1), features(40, 16, 2)
    found = float(distances._mmd2(x, y))
    assert found == pytest.approx(plain_mmd2(x, y), rel=1e-10)
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=40, verbose=False)
    assert found == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)


def test_kernel_distance_agrees_with_torch_fidelity_within_its_error() -> None:
    x, y = features(4000, 16, 1), features(4000, 16, 2, 0.1)
    found = distances.kernel_distance(x, y, 0)
    theirs = kid_features_to_metric(x, y, kid_subsets=100, kid_subset_size=400, verbose=False)
    assert (found.blocks, found.size) == (10, 400)
    assert abs(found.value - theirs["kernel_inception_distance_mean"]) < 4 * found.error
    assert found.value > 10 * found.error


def test_kernel_distance_of_one_law_is_zero_within_its_error() -> None:
    """Over 40 pairs of sets the values are 0 on average, and their spread is what the errors say."""
    pairs = [
        (torch.randn(200, 4, generator=g, dtype=torch.float64), torch.randn(200, 4, generator=g, dtype=torch.float64))
        for g in (torch.Generator().manual_seed(i) for i in range(40))
    ]
    found = [distances.kernel_distance(x, y, i) for i, (x, y) in enumerate(pairs)]
    values = np.array([one.value for one in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert 0.7 < values.std() / np.mean([one.error for one in found]) < 1.4
    assert min(values) < 0 < max(values)


def test_kernel_distance_follows_its_seed_alone() -> None:
    x, y = features(300, 8, 1), features(250, 8, 2)
    state = torch.get_rng_state()
    assert distances.kernel_distance(x, y, 3) == distances.kernel_distance(x, y, 3)
    assert distances.kernel_distance(x, y, 3) != distances.kernel_distance(x, y, 4)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="19 samples are too few"):
        distances.kernel_distance(x, y[:19], 0)


# -- precision and recall --------------------------------------------------------------------------------------------------------


def plain_precision(x: Tensor, manifold: Tensor, k: int) -> float:
    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).square().sum().sqrt())

    radii = [sorted(apart(a, b) for j, b in enumerate(manifold) if j != i)[k - 1] for i, a in enumerate(manifold)]
    return sum(any(apart(a, b) <= r for b, r in zip(manifold, radii, strict=True)) for a in x) / len(x)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_equal_a_plain_loop_and_torch_fidelity(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "CHUNK", 17)
    x, y = features(60, 6, 1), 5 + features(50, 6, 2, 0.3) - 5
    precision, recall = distances.precision_recall(x, y, k)
    assert precision == plain_precision(x, y, k)
    assert recall == plain_precision(y, x, k)
    assert precision != recall
    theirs = prc_features_to_metric(x, y, prc_neighborhood=k, prc_batch_size=10000, save_cpu_ram=False, verbose=False)
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]))


def test_a_collapsed_set_is_precise_and_recalls_nothing() -> None:
    real = features(300, 8, 1)
    collapsed = real[:1].expand(300, 8) + 1e-6 * features(300, 8, 3)
    precision, recall = distances.precision_recall(collapsed, real, 3)
    assert precision == 1
    assert recall <= 1 / 300


def test_a_set_that_is_too_wide_recalls_and_is_not_precise() -> None:
    generator = torch.Generator().manual_seed(0)
    real, wide = (torch.randn(300, 4, generator=generator, dtype=torch.float64) * scale for scale in (1, 10))
    precision, recall = distances.precision_recall(wide, real, 3)
    assert precision < 0.1
    assert recall > 0.9


def test_equal_sets_cover_each_other() -> None:
    x = features(100, 8, 1)
    assert distances.precision_recall(x, x, 3) == (1, 1)
    with pytest.raises(ValueError, match="3 samples have no 3 neighbours"):
        distances.precision_recall(x[:3], x, 3)


# -- sets of images --------------------------------------------------------------------------------------------------------------


def test_images_are_rounded_to_256_levels() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (-4.0, 4.0)):
        to_bytes = ToBytes((low, high), "samples")
        exact = levels / 255 * (high - low) + low
        assert torch.equal(to_bytes(exact), levels)
        step = (high - low) / 255
        assert torch.equal(to_bytes((exact + 0.4 * step).clamp(low, high)), levels)
        assert to_bytes.clipped == 0


def test_a_little_too_much_is_cut_off_and_counted() -> None:
    to_bytes = ToBytes((0.0, 1.0), "samples")
    x = torch.full((1, 1, 2, 5), 0.5)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -0.1, 1.1
    assert to_bytes(x).flatten().tolist() == [0, 255, *[128] * 8]
    assert to_bytes.clipped == 0.2


@pytest.mark.parametrize(
    "wrong",
    [lambda x: 2 * x - 1, lambda x: 255 * x, lambda x: x - 0.5, lambda x: x * torch.nan, lambda x: x / torch.zeros(())],
)
def test_images_of_another_range_are_refused(wrong: object) -> None:
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert ToBytes((0.0, 1.0), "samples")(x).dtype == torch.uint8
    with pytest.raises(UserError, match=r"samples: (go from|have values that are not finite)"):
        ToBytes((0.0, 1.0), "samples")(wrong(x))  # type: ignore[operator]


def collected(x: Tensor, batch: int, kept: int = 10_000) -> Features:
    return feature_sets.collect(x.split(batch), lambda part: part * 2, lambda done: None, kept)


def test_what_is_kept_does_not_grow() -> None:
    x = features(300, 16, 1)
    few = collected(x, 32, kept=50)
    assert torch.equal(few.first, 2 * x[:50])
    assert few.moments.n == 300


@pytest.mark.parametrize("batch", [7, 50, 300])
def test_values_do_not_depend_on_the_batch(batch: int) -> None:
    x, y = features(300, 16, 1), features(200, 16, 2)
    (expected, _), (found, about) = (feature_sets.compare("fid", collected(x, b), collected(y, b), 3, 0) for b in (1000, batch))
    assert list(found) == ["fid", "kid", "kid.se", "precision", "recall"]
    assert found == pytest.approx(expected, rel=1e-9)
    assert about["fid"] == {"samples": 300, "reference": 200, "covariance": "over N - 1"}
    assert about["kid"]["samples"] == about["precision, recall"]["reference"] == 200


def test_what_cannot_be_taken_has_its_reason() -> None:
    found, about = feature_sets.compare("fid", collected(features(3, 16, 1), 8), collected(features(90, 16, 2), 8), 3, 0)
    assert isinstance(found["fid"], float)
    assert "fewer samples than 16 dimensions" in about["fid"]["note"]
    assert found["kid"] == found["kid.se"] == "3 samples are too few for 10 blocks of two"
    assert found["precision"] == found["recall"] == "3 samples have no 3 neighbours each"
    with pytest.raises(UserError, match="not finite"):
        collected(features(3, 16, 1) * math.inf, 2)
    with pytest.raises(UserError, match="no images"):
        feature_sets.collect([], lambda x: x, lambda done: None)
