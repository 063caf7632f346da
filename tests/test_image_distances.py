"""Distances of images against their definitions, written out."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import trunks
from torch import Tensor

from siv_core.use import image_distances

# SSIM.


def naive_ssim(x: Tensor, y: Tensor) -> float:
    """Window by window, weight by weight, in double precision."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True):
        for top in range(a.shape[0] - 10):
            for left in range(a.shape[1] - 10):
                p, q = (image[top : top + 11, left : left + 11] for image in (a, b))
                mu_p, mu_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mu_p) ** 2).sum(), (window * (q - mu_q) ** 2).sum()
                covariance = (window * (p - mu_p) * (q - mu_q)).sum()
                score = (2 * mu_p * mu_q + 1e-4) * (2 * covariance + 9e-4)
                values.append(score / ((mu_p**2 + mu_q**2 + 1e-4) * (var_p + var_q + 9e-4)))
    return float(np.mean(values))


def test_ssim_against_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 2, 13, 17, generator=generator)
    y = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    y[2] = 1 - x[2]
    expected = [naive_ssim(a, b) for a, b in zip(x, y, strict=True)]
    assert expected[2] < 0
    assert image_distances.ssim(x, y).tolist() == pytest.approx(expected, abs=1e-5)


def test_ssim_of_constant_images() -> None:
    x, y = torch.full((1, 1, 11, 11), 0.2), torch.full((1, 1, 11, 11), 0.6)
    assert image_distances.ssim(x, y).item() == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-4)


# LPIPS.


def lpips_by_hand(backbone: str, x: Tensor, y: Tensor) -> list[float]:
    """Zhang et al. 2018, equation 1: unit-length features after five ReLUs, squared differences, weighted, averaged, summed."""
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    after = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}[backbone]
    package = Path(str(importlib.metadata.distribution("lpips").locate_file("lpips")))
    heads = torch.load(package / "weights" / "v0.1" / f"{backbone}.pth", map_location="cpu", weights_only=True)
    features, totals = trunks.trunk(backbone), torch.zeros(len(x))
    a, b = ((2 * image - 1 - shift) / scale for image in (x, y))
    for index, layer in enumerate(features[: after[-1] + 1]):
        a, b = layer(a), layer(b)
        if index in after:
            unit_a, unit_b = (f / f.square().sum(1, keepdim=True).sqrt() for f in (a, b))
            weights = heads[f"lin{after.index(index)}.model.1.weight"]
            totals += ((unit_a - unit_b).square() * weights).sum(dim=1).mean(dim=(1, 2))
    return totals.tolist()


@torch.no_grad()
def test_lpips_is_the_papers_with_the_files_weights(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    distance, identity = image_distances.lpips_distance(backbone, torch.device("cpu"))
    assert (torch.get_rng_state() == state).all()
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(3, 3, 32, 32, generator=generator), torch.rand(3, 3, 32, 32, generator=generator)
    found = distance(x, y)
    assert found.tolist() == pytest.approx(lpips_by_hand(backbone, x, y), rel=1e-4)
    assert found.min() > 0
    assert distance(x, x).tolist() == [0, 0, 0]
    grey_x, grey_y = x[:, :1], y[:, :1]
    torch.testing.assert_close(distance(grey_x, grey_y), distance(grey_x.repeat(1, 3, 1, 1), grey_y.repeat(1, 3, 1, 1)))
    monkeypatch.setattr(image_distances, "LPIPS_PIXELS", 2 * 32 * 32)
    torch.testing.assert_close(distance(x, y), found)
    assert len(identity["trunk_sha256"]) == len(identity["heads_sha256"]) == 64


# The rest.


def test_mse_psnr_and_unit() -> None:
    x, y = torch.full((2, 3, 4, 4), -1.0), torch.full((2, 3, 4, 4), -0.8)
    a, b = (image_distances.unit(image, (-1.0, 1.0)) for image in (x, y))
    assert image_distances.mse(a, b).tolist() == pytest.approx([0.01, 0.01])
    assert image_distances.psnr(a, b).tolist() == pytest.approx([20, 20])
    assert image_distances.unit(torch.tensor([-3.0, 0.0, 7.0]), (-1.0, 1.0)).tolist() == [0, 0.5, 1]


def test_the_nearest_image_of_many() -> None:
    generator = torch.Generator().manual_seed(0)
    x, among = torch.rand(9, 1, 5, 5, generator=generator), torch.rand(40, 1, 5, 5, generator=generator)
    expected = [int(min(range(40), key=lambda j: float((one - among[j]).square().sum()))) for one in x]
    positions = torch.arange(40) + 100
    for size in (1, 7, 40):
        parts = zip(positions.split(size), among.split(size), strict=True)
        assert (image_distances.nearest(x, parts) - 100).tolist() == expected
