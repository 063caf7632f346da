"""Pictures of densities in the plane: what is where in them, and who draws them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attrs import evolve
from matplotlib.figure import Figure
from PIL import Image

from siv_core import apply, evaluate, plane, session
from siv_core.errors import UserError
from siv_core.protocols import Spec

SPEC = Spec((2,), kind="array", value_range=(-2.0, 2.0))
RED = np.array([200, 55, 31])


def around(x, y, n=200):
    return torch.tensor([x, y]) + 0.05 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0))


def centre_of(mask):
    """Middle of the true pixels as shares of the width and, from below, of the height."""
    rows, columns = np.nonzero(mask)
    return columns.mean() / mask.shape[1], 1 - rows.mean() / mask.shape[0]


def test_samples_and_density_are_where_they_belong():
    """Samples at (1, −1) are right and low in the left half, a density at (−1, 1) is left and high in the right half."""
    points = plane.grid((-2.0, 2.0), 60)
    energy = ((points - torch.tensor([-1.0, 1.0])) ** 2).sum(dim=1).mul(20).unflatten(0, (60, 60))
    picture = plane.draw([plane.Panel(around(1, -1), energy)], (-2.0, 2.0))
    assert picture.dtype == np.uint8
    left, right = np.split(picture, 2, axis=1)
    x, y = centre_of(np.abs(left.astype(int) - RED).sum(axis=2) < 60)
    assert 0.65 < x < 0.85
    assert 0.2 < y < 0.35
    inside = right[40:-40, 40:-20]  # without titles and ticks
    x, y = centre_of(inside.sum(axis=2) > 500)
    assert 0.1 < x < 0.4
    assert 0.6 < y < 0.9


def test_several_models_stand_side_by_side():
    energy = torch.zeros(10, 10)
    one = plane.draw([plane.Panel(around(0, 0), energy)], (-2.0, 2.0))
    four = plane.draw([plane.Panel(around(0, 0), energy, around(0, 0), title) for title in "abcd"], (-2.0, 2.0))
    assert four.shape[1] == 2 * one.shape[1]
    assert four.shape[0] == 2 * one.shape[0]
    assert plane.draw([plane.Panel(around(0, 0))], (-2.0, 2.0)).shape[1] == one.shape[1] // 2  # no density, no panel for it


def test_titles_count_and_tell_what_is_outside():
    axes = Figure().subplots()
    samples = torch.cat([around(0, 0), torch.tensor([[3.0, 0.0], [0.0, -9.0], [math.nan, 0.0], [0.0, math.inf]])])
    plane.draw_samples(axes, plane.Panel(samples, data=around(1, 1, 1000)), (-2.0, 2.0))
    assert axes.get_title() == "1,000 of data (grey), 204 samples, 4 outside"
    plane.draw_samples(axes, plane.Panel(around(0, 0), data=around(1, 1), title="VAE"), (-2.0, 2.0))
    assert axes.get_title() == "VAE\n200 of data (grey), 200 samples"
    plane.draw_density(axes, plane.Panel(samples, torch.tensor([[math.log(2), math.inf], [math.nan, 3.0]])), (-2.0, 2.0))
    assert axes.get_title() == "exp(ELBO), at most 0.5"


def test_which_data_is_drawn():
    assert evaluate.drawable(SPEC)
    assert evaluate.drawable(Spec((1, 8, 8)))
    for spec in (evolve(SPEC, shape=(3,)), evolve(SPEC, conditional=True, classes=2)):
        assert not evaluate.drawable(spec)


RECIPE = """
format = 1
[data]
name = "toy2d"
set = "checkerboard"
held_out = 300
[network]
name = "mlp"
hidden = [8]
[objective]
name = "vae"
[train]
batch = 32
length = "4 steps"
preview = "2 steps"
"""


@pytest.fixture(scope="module")
def coarse():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "PLANE_GRID", 30)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, coarse):
    folder = tmp_path_factory.mktemp("plane")
    (folder / "plane.toml").write_text(RECIPE)
    return session.run(folder / "plane.toml", run_dir=folder / "run", device="cpu")


@pytest.mark.parametrize("name", ["preview_00000002", "samples"])
def test_a_run_draws_previews_and_a_last_picture(run, name):
    with Image.open(run.path / f"images/{name}.png") as picture:
        assert picture.width == 2 * plane.PIXELS


def test_sampling_draws_with_and_without_the_data(run, tmp_path):
    built, model, _, _ = session.open_run(run.path, "last", "auto", "cpu")
    told = apply.sample(model, tmp_path, 50, 0, built.dataset)
    assert [path.rpartition("/")[2] for path in told["files"]] == ["samples.safetensors", "samples.png"]
    assert told["notes"] == []
    absent = SimpleNamespace(missing=lambda: "fetch it")
    told = apply.sample(model, tmp_path, 50, 0, absent)
    assert told["notes"] == ["samples without the data, which is not at hand: fetch it"]
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("samples", "samples-2")]
    assert not np.array_equal(*pictures)  # only the first has the data below


def test_reconstructing_points_needs_no_picture_and_takes_none(run, tmp_path):
    built, model, _, _ = session.open_run(run.path, "last", "auto", "cpu")
    told = apply.reconstruct(model, built.dataset, tmp_path, [], 0)
    assert [path.rpartition("/")[2] for path in told["files"]] == ["reconstructions.safetensors"]
    assert told["notes"] == ["held-out samples of the run's data"]
    with pytest.raises(UserError, match=r"this model is of arrays \[2\]: pictures cannot be put into it; leave the files out"):
        apply.reconstruct(model, built.dataset, tmp_path, [tmp_path / "a.png"], 0)


def test_two_runs_side_by_side(run):
    built, model, _, _ = session.open_run(run.path, "last", "auto", "cpu")
    picture = evaluate.in_plane({"VAE": model, "Soft-IntroVAE": model}, built.dataset, 0)
    assert picture.shape[1] == 2 * plane.PIXELS
    assert picture.shape[0] > 1.9 * plane.PIXELS
