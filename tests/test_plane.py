"""Pictures of densities in the plane: what is where in them, and who draws them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from siv_plugins import density2d as plane

from siv_core.errors import UserError
from siv_core.runs import opened, session, watchers
from siv_core.use import apply, evaluate

RED = np.array([200, 55, 31])


def around(x, y, n=200):
    return torch.tensor([x, y]) + 0.05 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0))


def centre_of(mask):
    """Middle of the true pixels as shares of the width and, from below, of the height."""
    rows, columns = np.nonzero(mask)
    return columns.mean() / mask.shape[1], 1 - rows.mean() / mask.shape[0]


def test_samples_and_density_are_where_they_belong():
    """Samples at (1, −1) are right and low in the left half, a density at (−1, 1) is left and high in the right half."""
    points = plane.square((-2.0, 2.0), 60)
    energy = ((points - torch.tensor([-1.0, 1.0])) ** 2).sum(dim=1).mul(20).unflatten(0, (60, 60))
    figure, [(first, second)] = plane.canvas(1, 2)
    plane.draw_samples(first, around(1, -1), None, 2.0)
    plane.draw_density(second, energy, 2.0)
    picture = plane.pixels(figure)
    assert picture.dtype == np.uint8
    left, right = np.split(picture, 2, axis=1)
    x, y = centre_of(np.abs(left.astype(int) - RED).sum(axis=2) < 60)
    assert 0.65 < x < 0.85
    assert 0.2 < y < 0.35
    inside = right[40:-40, 40:-20]  # without titles and ticks
    x, y = centre_of(inside.sum(axis=2) > 500)
    assert 0.1 < x < 0.4
    assert 0.6 < y < 0.9


def test_titles_count_and_tell_what_is_outside():
    axes = Figure().subplots()
    samples = torch.cat([around(0, 0), torch.tensor([[3.0, 0.0], [0.0, -9.0], [math.nan, 0.0], [0.0, math.inf]])])
    plane.draw_samples(axes, samples, around(1, 1, 1000), 2.0)
    assert axes.get_title() == "1,000 of data (grey), 204 samples, 4 outside"
    plane.draw_samples(axes, around(0, 0), around(1, 1), 2.0, "VAE")
    assert axes.get_title() == "VAE\n200 of data (grey), 200 samples"
    plane.draw_density(axes, torch.tensor([[math.log(2), math.inf], [math.nan, 3.0]]), 2.0)
    assert axes.get_title() == "exp(ELBO), at most 0.5"


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
[metrics.density2d]
redraws = 2
clean_samples = 1000
"""


@pytest.fixture(scope="module")
def coarse():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plane, "DRAWN_GRID", 30)
        patch.setattr(plane, "GRID", 30)
        patch.setattr(plane, "DATA_POINTS", 100)
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
    one = opened.open_run(run.path, "last", "auto", "cpu")
    model, metrics = one.model, one.built.metrics()
    told = apply.sample(model, tmp_path, 50, 0, metrics, one.built.dataset)
    assert [path.rpartition("/")[2] for path in told["files"]] == ["samples.safetensors", "samples.png"]
    assert told["notes"] == []
    one.built.dataset = SimpleNamespace(missing=lambda: "fetch it")
    data, note = opened.data_to_draw(one)
    told = apply.sample(model, tmp_path, 50, 0, metrics, data, note)
    assert told["notes"] == ["samples without the data: data 'toy2d' is not at hand: fetch it"]
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("samples", "samples-2")]
    assert not np.array_equal(*pictures)  # only the first has the data below


def test_reconstructing_points_needs_no_picture_and_takes_none(run, tmp_path):
    one = opened.open_run(run.path, "last", "auto", "cpu")
    model, built = one.model, one.built
    told = apply.reconstruct(model, built.dataset, tmp_path, [], 0, "points")
    assert [path.rpartition("/")[2] for path in told["files"]] == ["reconstructions.safetensors"]
    assert told["notes"] == ["held-out samples of points"]
    with pytest.raises(UserError, match=r"this model is of arrays \[2\]: pictures cannot be put into it; leave the files out"):
        apply.reconstruct(model, built.dataset, tmp_path, [tmp_path / "a.png"], 0, "")


def test_several_models_side_by_side(run):
    one = opened.open_run(run.path, "last", "auto", "cpu")
    metrics = one.built.metrics()
    alone, two, four = (
        evaluate.draw(dict.fromkeys(titles, one.model), metrics, one.built.dataset, 0, 50) for titles in ("a", "ab", "abcd")
    )
    assert alone.shape[1] == two.shape[1] == four.shape[1] / 2 == 2 * plane.PIXELS
    assert two.shape[0] == four.shape[0] == 2 * alone.shape[0]


def test_a_measurement_draws_what_it_compared(run):
    with Image.open(run.path / "images/density2d_histograms.png") as picture:
        assert picture.width == 3 * plane.PIXELS
    figure_of = plane.draw_histograms
    binned = [np.array([4.0, 0, 0, 0, 0]), np.array([0.0, 0, 0, 3, 1])]  # data low and left, model high and right or outside
    picture = figure_of(binned, 2.0)
    _, middle, surplus = np.split(picture.astype(int), 3, axis=1)
    x, y = centre_of(middle[40:-40, 40:-20].sum(axis=2) > 300)
    assert x > 0.5
    assert y > 0.5
    x, y = centre_of((surplus[..., 0] - surplus[..., 2])[40:-40, 40:-20] > 60)  # red: where the model has more
    assert x > 0.5
    assert y > 0.5


def test_data_without_a_metric_that_draws_it_is_told(tmp_path):
    (tmp_path / "plain.toml").write_text(RECIPE.partition("[metrics")[0])
    said = []

    class Listener(watchers.Silent):
        def say(self, line):
            said.append(line)

    done = session.run(tmp_path / "plain.toml", run_dir=tmp_path / "run", device="cpu", watcher=Listener())
    assert any("[metrics.density2d]" in line for line in said)
    assert [path.name for path in (done.path / "images").iterdir()] == ["curves.png"]
