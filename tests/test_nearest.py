"""Whether a model copies its training set: a metric that knows one that does from one that does not."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve, frozen
from siv_plugins import nearest
from siv_plugins.nearest import NearestConfig

from siv_core import Spec, UserError
from siv_core.protocols import Rows

SPEC = Spec((1, 4, 4), value_range=(-1.0, 1.0))


@frozen
class Data:
    train: torch.Tensor
    held_out: torch.Tensor

    def rows(self, split):
        return Rows(self.train if split == "train" else self.held_out)


@frozen
class Draws:
    images: torch.Tensor

    def sample(self, n, seed):
        return self.images[:n]


def noise(n, seed):
    return 2 * torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) - 1


def measured(images, data=None, **config):
    metric = nearest.build(NearestConfig(**config), SPEC, {}, None)
    data = data or Data(noise(3000, 0), noise(200, 1))
    return metric.measure(Draws(images), data, lambda what, done, total: None)


def test_a_model_that_copies_is_found_out():
    data = Data(noise(3000, 0), noise(200, 1))
    found = measured(data.train[:200] + 1e-3, data, count=200)
    assert found.values["rmse"] == pytest.approx(5e-4, rel=0.02)  # of values in [0, 1]
    assert found.values["nearer_than_1_percent"] == 1.0
    assert found.pictures["pairs"].shape[0] < found.pictures["pairs"].shape[1]


def test_new_images_of_the_same_kind_are_as_near_as_held_out_ones():
    found = measured(noise(200, 2), count=200).values
    assert abs(found["rmse"] - found["held_out.rmse"]) < 4 * (found["rmse.se"] ** 2 + found["held_out.rmse.se"] ** 2) ** 0.5
    assert found["nearer_than_1_percent"] <= 0.05


def test_distances_are_those_of_a_naive_search():
    data = Data(noise(50, 0), noise(9, 1))
    images = noise(7, 2)
    found = measured(images, data, count=7)

    def naive(x):
        return torch.stack([((a - data.train) / 2).square().flatten(1).mean(dim=1).min().sqrt() for a in x])

    assert found.values["rmse"] == pytest.approx(naive(images).mean().item(), rel=1e-5)
    assert found.values["least"] == pytest.approx(naive(images).min().item(), rel=1e-5)
    assert found.protocol["held_out"] == 7


def test_bytes_and_a_part_of_the_rows():
    x = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Data(x, x)
    metric = nearest.build(NearestConfig(count=5), SPEC, {}, None)
    split = evolve(data.rows("train"), index=torch.arange(20))

    class Half:
        def rows(self, name):
            return split if name == "train" else Rows(x, index=torch.arange(20, 40))

    draws = Draws(x[20:25].float() / 127.5 - 1)  # images that are in the table and not in the split
    found = metric.measure(draws, Half(), lambda what, done, total: None)
    assert found.values["least"] > 0.05
    assert found.protocol["training images"] == 20


def test_it_is_of_images():
    with pytest.raises(UserError, match="metric nearest: needs images"):
        nearest.build(NearestConfig(), Spec((2,), kind="array"), {}, None)


def test_images_that_are_not_finite_are_told():
    images = noise(10, 2)
    images[3] = float("nan")
    found = measured(images, count=10).values
    assert isinstance(found["rmse"], str)
