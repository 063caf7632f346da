"""How codes are spread over modes: models that spread them evenly, into one, or by halves."""

from __future__ import annotations

import math

import pytest
import torch
import toys
from attrs import frozen
from siv_plugins import prior_modes
from siv_plugins.mixture import Mixture
from siv_plugins.prior_modes import PriorModesConfig
from torch import nn

from siv_core import Gaussian, Model, Spec, UserError
from siv_core.nets import Priors
from siv_core.protocols import Rows

SPEC = Spec((1, 2, 2))


class Codes(nn.Module):
    """The posterior of an image is where its brightness says, narrowly."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def forward(self, x, labels=None):
        at = (x.flatten(1).mean(dim=1) * (len(self.places) - 1)).round().long()
        mu = self.places[at]
        return {"z": Gaussian(mu, torch.full_like(mu, -20.0))}


class Bright(nn.Module):
    def forward(self, codes, labels=None, noise=None):
        return (codes["z"].mean(dim=1) / 100)[:, None, None, None].expand(-1, 1, 2, 2).clamp(0, 1)


class Modes(nn.Module):
    def __init__(self, mu, weights):
        super().__init__()
        self.mixture = Mixture(Gaussian(mu, torch.zeros_like(mu)), torch.tensor(weights).log())

    def realise(self, encode):
        return self.mixture

    def draw(self, n, generator):
        return {"normal": torch.randn(n, self.mixture.parts.mu.shape[1], generator=generator), "which": torch.rand(n)}


@frozen
class Data:
    x: torch.Tensor

    def rows(self, split):
        return Rows(self.x)


def measured(places, modes, weights, images, **config):
    mu = torch.tensor(modes)
    model = Model(
        Codes(torch.tensor(places)),
        Bright(),
        Priors({"z": Modes(mu, weights)}),
        SPEC,
        {"z": mu.shape[1]},
        None,
        torch.device("cpu"),
    )
    data = Data(torch.tensor(images)[:, None, None, None].expand(-1, 1, 2, 2))
    metric = prior_modes.build(PriorModesConfig(**config), SPEC, {"z": mu.shape[1]}, None)
    return metric.measure(model, data, lambda what, done, total: None)


FOUR = [[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]]
EVEN = [0.25] * 4


def test_evenly_spread_codes_score_full():
    found = measured(FOUR, FOUR, EVEN, [0.0, 1 / 3, 2 / 3, 1.0] * 5)
    assert found.values["z.assignment_entropy"] == pytest.approx(1.0, abs=1e-6)
    assert found.values["z.active"] == 1.0
    assert found.values["z.weight_entropy"] == pytest.approx(1.0)
    assert found.protocol["images"] == 20


def test_codes_in_one_mode_score_nothing():
    found = measured(FOUR, FOUR, [0.7, 0.1, 0.1, 0.1], [0.0] * 20).values
    assert found["z.assignment_entropy"] == pytest.approx(0.0, abs=1e-6)
    assert found["z.active"] == 0.25
    expected = -(0.7 * math.log(0.7) + 0.3 * math.log(0.1)) / math.log(4)
    assert found["z.weight_entropy"] == pytest.approx(expected)


def test_two_of_four_by_halves():
    found = measured(FOUR, FOUR, EVEN, [0.0, 1.0] * 10).values
    assert found["z.assignment_entropy"] == pytest.approx(math.log(2) / math.log(4), abs=1e-6)
    assert found["z.active"] == 0.5


def test_a_mode_is_in_use_from_a_share_of_one_over_k_squared_on():
    """Of four modes: a sixteenth."""
    images = [1 / 3] + [0.0] * 15
    assert measured(FOUR, FOUR, EVEN, images).values["z.active"] == 0.5
    assert measured(FOUR, FOUR, EVEN, [*images, 0.0]).values["z.active"] == 0.25


def test_it_is_over_the_whole_set_and_not_by_batches(monkeypatch):
    monkeypatch.setattr(prior_modes, "BATCH", 2)
    found = measured(FOUR, FOUR, EVEN, sorted([0.0, 1 / 3, 2 / 3, 1.0] * 5)).values
    assert found["z.assignment_entropy"] == pytest.approx(1.0, abs=1e-6)


def test_rows_are_modes_by_their_weight():
    """The brightness of an image is the mean of its mode."""
    found = measured(FOUR, FOUR, [0.1, 0.2, 0.3, 0.4], [0.0] * 4)
    picture = found.pictures["z_samples"]
    cell = picture.shape[0] // 4
    means = [int(picture[row * cell + cell // 2, cell // 2, 0]) for row in range(4)]  # the first column
    assert means == [255, 128, 128, 0]  # modes 3, 2, 1, 0


@pytest.mark.parametrize("d", [1, 2, 5])
def test_the_plane_is_a_picture_of_any_number_of_dimensions(d):
    z = torch.randn(50, d, generator=torch.Generator().manual_seed(0))
    parts = Gaussian(torch.randn(3, d, generator=torch.Generator().manual_seed(1)), torch.zeros(3, d))
    picture = prior_modes.plane(z, parts, torch.tensor([0.5, 0.5, 0.0]))
    assert picture.shape == (600, 600, 3)
    red = (picture[..., 0].astype(int) - picture[..., 1]) > 60
    assert red.sum() > 100


def test_a_prior_without_modes_is_told(catalogue, tmp_path):
    t = toys.trainer(catalogue, tmp_path, toys.tree())
    metric = prior_modes.build(PriorModesConfig(), t.built.spec, t.built.networks.groups, None)
    with pytest.raises(UserError, match="the prior of z has no modes"):
        metric.measure(t.model(), t.built.dataset, lambda what, done, total: None)


def test_of_two_groups_those_with_modes(catalogue, tmp_path):
    import tomllib

    tree = {
        "format": 1,
        "data": {"name": "digits"},
        **tomllib.loads(toys.ADAIN),
        "prior": {"class": {"name": "mixture", "modes": 3, "draws": 2}, "content": {"name": "standard_normal"}},
        "objective": {"name": "vae"},
        "train": {"batch": 8, "length": "1 steps"},
    }
    t = toys.trainer(catalogue, tmp_path, tree)
    metric = prior_modes.build(PriorModesConfig(count=30), t.built.spec, t.built.networks.groups, None)
    found = metric.measure(t.model(), t.built.dataset, lambda what, done, total: None)
    assert {name.partition(".")[0] for name in found.values} == {"class"}
    assert found.pictures.keys() == {"class_samples", "class_plane"}
