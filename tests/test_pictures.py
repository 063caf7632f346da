"""Pictures, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from siv_core.data import feed
from siv_core.errors import UserError
from siv_core.latents import Gaussian
from siv_core.model import Model
from siv_core.nets import Priors
from siv_core.protocols import Batch, Measurement, Spec
from siv_core.use import evaluate, own_pictures, pictures

GAP = 2


def flat(values, size=64):
    """Images [N, size, size, 3] of one grey level each."""
    return np.stack([np.full((size, size, 3), value, np.uint8) for value in values])


def cell(sheet, row, column, size=64):
    top, left = GAP + row * (size + GAP), GAP + column * (size + GAP)
    return sheet[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("value_range", "value", "level"),
    [
        ((0, 1), 0.0, 0),
        ((0, 1), 1.0, 255),
        ((0, 1), 0.5, 128),
        ((-1, 1), 0.0, 128),
        ((-1, 1), -1.0, 0),
        ((0, 1), 1.7, 255),
        ((0, 1), -9, 0),
    ],
)
def test_levels(value_range, value, level):
    shown = pictures.to_uint8(torch.full((2, 1, 3, 4), float(value)), value_range)
    assert shown.shape == (2, 3, 4, 3)
    assert (shown == level).all()


def test_colours_keep_their_places():
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    shown = pictures.to_uint8(x, (0, 1))
    assert (shown == np.rint(x.numpy().transpose(0, 2, 3, 1) * 255)).all()


def test_bytes_come_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        x = levels.float() * ((high - low) / 255) + low
        assert (pictures.to_uint8(x, (low, high))[0, :, :, 0] == levels[0, 0].numpy()).all()


def test_a_grid():
    sheet = pictures.grid(flat([10, 20, 30, 40, 50]), 3)
    assert sheet.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    for i, value in enumerate([10, 20, 30, 40, 50]):
        assert (cell(sheet, i // 3, i % 3) == value).all()
    assert (cell(sheet, 1, 2) == 255).all()
    inside = np.zeros(sheet.shape[:2], bool)
    for i in range(6):
        cell(inside, i // 3, i % 3)[:] = True
    assert (sheet[~inside] == 255).all()


@pytest.mark.parametrize(("size", "shown"), [(8, 64), (60, 120), (64, 64), (65, 65), (3, 66), (1, 64)])
def test_small_images_are_enlarged_by_whole_factors(size, shown):
    image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    sheet = pictures.grid(image, 1)
    assert sheet.shape == (shown + 4, shown + 4, 3)
    factor = shown // size
    assert (sheet[2:-2, 2:-2][::factor, ::factor] == image[0]).all()
    assert (sheet[2:-2, 2:-2][factor - 1 :: factor, factor - 1 :: factor] == image[0]).all()


def test_a_matrix():
    left, top = flat([11, 12]), flat([21, 22, 23])
    cells = flat([31, 32, 33, 41, 42, 43])
    sheet = pictures.matrix(left, top, cells)
    assert (cell(sheet, 0, 0) == 255).all()
    for i in range(2):
        assert (cell(sheet, i + 1, 0) == 11 + i).all()
        for j in range(3):
            assert (cell(sheet, 0, j + 1) == 21 + j).all()
            assert (cell(sheet, i + 1, j + 1) == 31 + 10 * i + j).all()
    assert (sheet[66:68, 66:] == 0).all()  # the lines lie in the gaps
    assert (sheet[66:, 66:68] == 0).all()


def test_class_by_class():
    sheet = pictures.by_class(flat([10, 20, 11, 12, 13]), [1, 7, 1, 1, 1], 3)
    assert sheet.shape == (3 * 66 + 2, pictures.MARGIN + 3 * 66 + 2, 3)
    images, margin = sheet[:, pictures.MARGIN :], sheet[:, : pictures.MARGIN]
    places = [[10, 11, 12], [13, 255, 255], [20, 255, 255]]
    assert all((cell(images, row, column) == value).all() for row, line in enumerate(places) for column, value in enumerate(line))
    dark = [bool((margin[66 * row : 66 * (row + 1)] < 100).any()) for row in range(3)]
    assert dark == [True, False, True], "a number before the first row of each class"


@pytest.mark.parametrize("label", [0, 88, 1888])
def test_the_number_of_a_class_fits_its_margin(label):
    margin = pictures.by_class(flat([10]), [label], 1)[:, : pictures.MARGIN]
    assert (margin[:, 0] == 255).all()
    assert (margin < 100).any()


def test_ends_and_corners_stand_apart():
    apart = pictures.APART
    sheet = pictures.strips(flat([1, 2]), flat([11, 12, 13, 21, 22, 23]), flat([3, 4]))
    assert sheet.shape == (2 * 66 + 2, 5 * 66 + 2 + 2 * apart, 3)
    for row in range(2):
        for column, value in enumerate([1 + row, 11 + 10 * row, 12 + 10 * row, 13 + 10 * row, 3 + row]):
            shift = apart * ((column > 0) + (column > 3))
            assert (cell(sheet[:, shift:], row, column) == value).all()
    square = pictures.cornered(flat([1, 2, 3, 4]), flat(range(10, 19)))
    assert (cell(square, 0, 0) == 1).all()
    assert (cell(square, 1, 0) == 255).all()
    assert (cell(square, 2, 0) == 3).all()
    assert (cell(square[:, 2 * apart :], 0, 4) == 2).all()
    assert (cell(square[:, 2 * apart :], 2, 4) == 4).all()
    assert (cell(square[:, apart:], 1, 2) == 14).all()


def test_png(tmp_path):
    sheet = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    pictures.save_png(tmp_path / "a.png", sheet)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert (np.asarray(picture) == sheet).all()


def line(images, **values):
    return {"step": images // 64, "images_seen": images, "phases": {"encoder": values, "decoder": values}}


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [line(64, rec_real=3.0, kl_real=0.0, loss=-1.0, gradient_norm=2.0)],
        [line(64 * i, rec_real=3.0 / i, kl_real=float(i), loss=1.0, gradient_norm=2.0) for i in range(1, 9)],
        [line(64, rec_real="nan", kl_real=-1.0, loss="inf", gradient_norm=2.0), line(128, **{"kl_real.z": 1.0, "kl_real": 2.0})],
    ],
)
def test_curves_are_a_picture(tmp_path, lines):
    pictures.curves(tmp_path / "curves.png", lines)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1100, 700)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10


def test_new_stages_are_marked_in_curves(tmp_path):
    lines = [line(64 * i, rec_real=3.0, kl_real=1.0, loss=1.0, gradient_norm=2.0) for i in range(1, 9)]
    shown = []
    for name, stages in (("none", ()), ("one", (512,)), ("three", (128, 256, 512))):
        pictures.curves(tmp_path / f"{name}.png", lines, stages)
        with Image.open(tmp_path / f"{name}.png") as picture:
            shown.append(np.asarray(picture.convert("L")).astype(int))
    none, one, three = shown
    assert np.array_equal(none, one)  # the end of the last one is the end
    columns = (none != three).sum(axis=0)
    assert (columns > 100).sum() >= 4  # two dotted lines in each of two columns of panels


def test_a_collage_has_one_pair_four_halves_and_sixteen_quarters():
    n = 25  # a column of 21, and four of the next
    above = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    below = above + 100
    sheet = pictures.collage(above, below)
    assert sheet.shape == (3 * 8 + 2 * 8, 2 * 16 + 8, 3)
    assert (sheet[:8, :8] == 0).all()
    assert (sheet[:8, 8:16] == 100).all()
    halves = [sheet[16 + y : 20 + y, x : x + 4, 0] for y in (0, 4) for x in (0, 8)]
    assert [np.unique(half).tolist() for half in halves] == [[1], [2], [3], [4]]
    assert (sheet[16:20, 4:8] == 101).all()
    assert (sheet[38:40, 14:16] == 120).all()  # the last quarter's second half
    assert (sheet[:8, 24:32] == 21).all()
    assert (sheet[20:24, 32:] == 255).all()  # there are no more
    assert pictures.collage(above[:1, :6, :6], below[:1, :6, :6]).shape == (2 * 6 + 8, 12, 3)  # 6 is halved once


# -- pictures of a model ---------------------------------------------------------------------------------------------------------


class Doubling(nn.Module):
    """Encoder and decoder of a model whose reconstruction of x is 2x."""

    def forward(self, x, labels=None, noise=None):
        if isinstance(x, dict):
            return 2 * x["z"].unflatten(1, (1, 2, 2))
        return {"z": Gaussian(x.flatten(1), x.flatten(1))}


def doubling() -> Model:
    return Model(Doubling(), Doubling(), Priors({}), Spec((1, 2, 2)), {"z": 4}, None, torch.device("cpu"))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 12, 16, 20])
def test_reconstructions_stand_below_their_originals(count):
    x = torch.arange(1, count + 1).view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 255.0
    sheet = evaluate.reconstructions(doubling(), x)
    columns = min(count, 8)
    assert sheet.shape == (-(-count // columns) * 2 * 66 + 2, columns * 66 + 2, 3)
    for i in range(-(-count // columns) * columns):
        row, column = 2 * (i // columns), i % columns
        assert (cell(sheet, row, column) == (i + 1 if i < count else 255)).all()
        assert (cell(sheet, row + 1, column) == (2 * (i + 1) if i < count else 255)).all()


def test_translating_needs_two_groups():
    with pytest.raises(UserError, match="this model has the latent groups z"):
        evaluate.translation(doubling(), Batch(torch.zeros(1, 1, 2, 2)), Batch(torch.zeros(1, 1, 2, 2)))


class Pair(nn.Module):
    """Class: the upper row's mean; content: the lower one's; the decoder puts them back."""

    def forward(self, x, labels=None, noise=None):
        if isinstance(x, dict):
            return torch.stack([x["class"], x["content"]], dim=1)[:, None].expand(-1, 1, 2, 2)
        upper, lower = x[:, 0, 0, :1], x[:, 0, 1, :1]
        return {"class": Gaussian(upper, upper), "content": Gaussian(lower, lower)}


def test_translation_takes_class_by_row_and_content_by_column():
    model = Model(
        Pair(), Pair(), Priors({}), Spec((1, 2, 2)), {"class": 1, "content": 1}, ("class", "content"), torch.device("cpu")
    )
    classes, contents = torch.rand(2, 1, 2, 2), torch.rand(3, 1, 2, 2)
    cells = evaluate.translation(model, Batch(classes), Batch(contents)).cells.unflatten(0, (2, 3))
    for i in range(2):
        for j in range(3):
            assert torch.equal(cells[i, j, 0, 0], classes[i, 0, 0, :1].expand(2))
            assert torch.equal(cells[i, j, 0, 1], contents[j, 0, 1, :1].expand(2))
    combined = model.combine({"class": classes, "content": contents[:2]})
    assert torch.equal(combined[1], cells[1, 1])


def test_own_pictures_shrink_as_the_data_does():
    big = np.random.default_rng(0).integers(0, 256, (1, 3, 24, 24), dtype=np.uint8)
    fitted, changes = own_pictures.fit(Image.fromarray(big[0].transpose(1, 2, 0)), Spec((3, 8, 8)))
    assert torch.equal(fitted, feed.to_float(torch.from_numpy(big), Spec((3, 8, 8)))[0])
    assert changes == ["24 × 24 resized to 8 × 8"]


class Metric:
    def __init__(self, problem=""):
        self.problem = problem

    def measure(self, model, data, progress):
        if self.problem:
            raise UserError([self.problem, "and more"])
        return Measurement({"one": 1.0, "two": "no reason"}, {"how": "so"})


def test_a_metric_that_cannot_be_taken_stops_no_other():
    metrics = {"bad": Metric("no factors"), "good": Metric()}
    lines, drawn = evaluate.measure(metrics, None, None, {"by": "run"}, lambda what, done, total: None)
    assert drawn == {}
    assert all(line.pop("wall")["seconds"] >= 0 for line in lines)
    assert lines == [
        {"metric": "bad", "name": "all", "skipped": "no factors; and more", "protocol": {}, "by": "run"},
        {"metric": "good", "name": "one", "value": 1.0, "protocol": {"how": "so"}, "by": "run"},
        {"metric": "good", "name": "two", "skipped": "no reason", "protocol": {"how": "so"}, "by": "run"},
    ]
