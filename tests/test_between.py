"""Ways between codes and images: closed forms, and cases in which a great circle is not given."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from siv_core import latents
from siv_core.errors import UserError
from siv_core.latents import Gaussian
from siv_core.model import Model
from siv_core.nets import Priors
from siv_core.protocols import Spec
from siv_core.testing import _ToyPrior, toy_networks

WAYS = torch.linspace(0, 1, 9)


def randoms(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shoemake(a, b, t):
    """sin((1 − t) w) / sin w · a + sin(t w) / sin w · b, of one pair of lists of numbers."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    w = math.acos(dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)))
    first, second = math.sin((1 - t) * w) / math.sin(w), math.sin(t * w) / math.sin(w)
    return [first * x + second * y for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("dim", [2, 3, 128])
def test_of_equal_lengths_it_is_shoemakes(dim):
    a, b = (3 * nn.functional.normalize(randoms(5, dim, seed=seed), dim=1) for seed in (0, 1))
    for t in WAYS:
        z = latents.slerp(a, b, t)
        expected = torch.tensor([shoemake(x, y, float(t)) for x, y in zip(a.tolist(), b.tolist(), strict=True)])
        assert torch.allclose(z, expected, atol=1e-5)
        assert torch.allclose(z.norm(dim=1), torch.full((5,), 3.0), atol=1e-5)


def test_a_quarter_of_a_circle():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    third = latents.slerp(a, b, torch.tensor(1 / 3))  # 30 degrees, at a third of the way from length 1 to 3
    expected = (5 / 3) * torch.tensor([[math.cos(math.pi / 6), math.sin(math.pi / 6)]])
    assert torch.allclose(third, expected, atol=1e-6)


@pytest.mark.parametrize("path", latents.PATHS)
@pytest.mark.parametrize(
    "pair", ["any", "equal", "parallel", "opposite", "nearly opposite", "zero", "both zero", "one dimension"]
)
def test_ends_are_exact_and_nothing_is_undefined(path, pair):
    a = randoms(6, 1 if pair == "one dimension" else 4)
    b = {
        "any": randoms(6, 4, seed=1),
        "equal": a,
        "parallel": 2 * a,
        "opposite": -a,
        "nearly opposite": -a * (1 + 1e-6 * randoms(6, 4, seed=2)) if pair == "nearly opposite" else a,
        "zero": torch.zeros_like(a),
        "both zero": torch.zeros_like(a),
        "one dimension": -3 * a,
    }[pair]
    a = torch.zeros_like(a) if pair == "both zero" else a
    points = [latents.between({"z": a}, {"z": b}, t, path)["z"] for t in WAYS]
    assert torch.equal(points[0], a)
    assert torch.equal(points[-1], b)
    assert all(z.isfinite().all() and z.dtype == a.dtype for z in points)
    steps = torch.stack([(after - before).norm(dim=1) for before, after in itertools.pairwise(points)])
    longest = math.pi / 8 * torch.maximum(a.norm(dim=1), b.norm(dim=1)) + (a - b).norm(dim=1) / 8
    assert (steps <= longest + 1e-5).all(), "no jump anywhere, not before the end either"
    if pair in ("equal", "parallel", "zero", "both zero", "one dimension"):
        for t, z in zip(WAYS, points, strict=True):
            assert torch.allclose(z, torch.lerp(a, b, t), atol=1e-6), "the way is straight"


@pytest.mark.parametrize("dim", [2, 3, 50])
def test_opposite_directions_go_round(dim):
    a = randoms(7, dim)
    b = -2 * a
    for t in WAYS:
        z = latents.slerp(a, b, t)
        assert torch.allclose(z.norm(dim=1), (1 + t) * a.norm(dim=1), rtol=1e-5)
        cosine = nn.functional.cosine_similarity(z, a)
        assert torch.allclose(cosine, torch.cos(math.pi * t).expand(7), atol=1e-5)
    assert torch.equal(latents.slerp(a, b, WAYS[3]), latents.slerp(a, b, WAYS[3]))


def test_rows_do_not_see_each_other():
    a, b = randoms(4, 3), randoms(4, 3, seed=1)
    a[1], b[2] = 0, -a[2]
    whole = latents.slerp(a, b, WAYS[2])
    assert all(torch.equal(whole[i : i + 1], latents.slerp(a[i : i + 1], b[i : i + 1], WAYS[2])) for i in range(4))


# -- of a model ------------------------------------------------------------------------------------------------------------------

SPEC = Spec((3, 4, 6))
NETS = toy_networks(SPEC)
SMOOTH = Model(NETS.encoder, NETS.decoder, Priors({}), SPEC, NETS.groups, None, torch.device("cpu"))
CORNERS = torch.rand(4, 2, 3, 4, 6, generator=torch.Generator().manual_seed(0))


class Linear(nn.Module):
    """Two groups, the halves of a vector; encoder and decoder are linear and invert each other."""

    def forward(self, x, labels=None, noise=None):
        if isinstance(x, dict):
            return torch.cat([x["a"], x["b"]], dim=1)
        return {"a": Gaussian(x[:, :3], x[:, :3]), "b": Gaussian(x[:, 3:], x[:, 3:])}


LINEAR = Model(Linear(), Linear(), Priors({}), Spec((6,), kind="array"), {"a": 3, "b": 3}, None, torch.device("cpu"))


@pytest.mark.parametrize("path", ["linear", "spherical"])
def test_ends_are_reconstructions(path):
    x, y = CORNERS[:2]
    images = SMOOTH.interpolate(x, y, 4, path=path)
    assert images.shape == (4, 2, 3, 4, 6)
    assert torch.equal(images[0], SMOOTH.reconstruct(x))
    assert torch.equal(images[-1], SMOOTH.reconstruct(y))
    assert not torch.equal(images[1], images[2])
    assert torch.equal(SMOOTH.interpolate(x, y, 1, path=path)[0], SMOOTH.reconstruct(x))


def test_straight_lines_are_those_of_before():
    x, y = CORNERS[:2]
    a, b = (latents.means(SMOOTH.encode(image)) for image in (x, y))
    lines = [{group: torch.lerp(a[group], b[group], way) for group in a} for way in torch.linspace(0, 1, 5)]
    assert torch.equal(SMOOTH.interpolate(x, y, 5), torch.stack([SMOOTH.decode(codes) for codes in lines]))


def test_the_middle_of_a_straight_line_is_the_mean():
    x, y = randoms(4, 6), randoms(4, 6, seed=1)
    assert torch.allclose(LINEAR.interpolate(x, y, 3)[1], (x + y) / 2, atol=1e-6)


def test_a_great_circle_keeps_the_length_of_each_group():
    x = randoms(4, 6)
    y = torch.cat([x[:, [1, 2, 0]], -x[:, [4, 5, 3]]], dim=1)  # in each group of the length of x
    for z in LINEAR.interpolate(x, y, 6, path="spherical"):
        for half in (slice(0, 3), slice(3, 6)):
            assert torch.allclose(z[:, half].norm(dim=1), x[:, half].norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("path", ["linear", "spherical"])
def test_a_square_of_four(path):
    square = SMOOTH.blend(list(CORNERS), 3, path=path)
    assert square.shape == (3, 3, 2, 3, 4, 6)
    for number, (row, column) in enumerate([(0, 0), (0, -1), (-1, 0), (-1, -1)]):
        assert torch.equal(square[row, column], SMOOTH.reconstruct(CORNERS[number]))
    a, b, c, d = CORNERS
    sides = {"top": (a, b), "bottom": (c, d), "left": (a, c), "right": (b, d)}
    found = {"top": square[0], "bottom": square[-1], "left": square[:, 0], "right": square[:, -1]}
    for side, ends in sides.items():
        assert torch.equal(found[side], SMOOTH.interpolate(*ends, 3, path=path)), side
    assert SMOOTH.blend(list(CORNERS[:, :1])).shape[:2] == (7, 7)


def test_on_straight_lines_a_square_is_bilinear():
    corners = randoms(4, 5, 6)
    square = LINEAR.blend(list(corners), 5)
    for i in range(5):
        for j in range(5):
            s, t = i / 4, j / 4
            weights = torch.tensor([(1 - s) * (1 - t), (1 - s) * t, s * (1 - t), s * t])
            assert torch.allclose(square[i, j], (weights[:, None, None] * corners).sum(0), atol=1e-5)


@pytest.mark.parametrize("path", ["linear", "spherical"])
def test_between_equal_images_there_is_nothing_else(path):
    """The weights sum to one."""
    x = randoms(3, 6)
    assert torch.allclose(LINEAR.blend([x] * 4, 4, path=path), x.expand(4, 4, 3, 6), atol=1e-5)


def test_a_square_of_other_classes_is_shown_in_the_first():
    class E(nn.Module):
        def forward(self, x, labels):
            return {"z": Gaussian(labels[:, None].float(), torch.zeros(len(x), 1))}

    class D(nn.Module):
        def forward(self, codes, labels, noise=None):
            return codes["z"] + 100 * labels[:, None]

    spec = Spec((1,), kind="array", classes=5, conditional=True)
    model = Model(E(), D(), Priors({"z": _ToyPrior()}), spec, {"z": 1}, None, torch.device("cpu"))
    x, labels = torch.zeros(1, 1), [torch.tensor([label]) for label in (4, 1, 2, 3)]
    assert model.blend([x] * 4, 2, labels)[:, :, 0, 0].tolist() == [[404, 401], [402, 403]]
    assert model.interpolate(x, x, 3, labels[0], y_labels=labels[2])[:, 0, 0].tolist() == [404, 403, 402]


def test_what_cannot_be_blended():
    for corners in ([], list(CORNERS[:3])):
        with pytest.raises(UserError, match=r"corners: there are \d, expected four: top left, top right"):
            SMOOTH.blend(corners)
    with pytest.raises(UserError, match="labels: there are 2, expected four"):
        SMOOTH.blend(list(CORNERS), labels=[torch.zeros(2).long()] * 2)
    with pytest.raises(UserError, match="all must have as many"):
        SMOOTH.blend([*CORNERS[:3], CORNERS[3, :1]])
    with pytest.raises(
        UserError, match=r"path: is 'sperical', expected one of linear, spherical, styles; did you mean 'spherical'\?"
    ):
        SMOOTH.blend(list(CORNERS), path="sperical")
    with pytest.raises(UserError, match="path: is None, expected one of"):
        SMOOTH.interpolate(CORNERS[0], CORNERS[1], 3, path=None)
    for psi in (-0.1, 1.5, True, "1", math.nan):
        with pytest.raises(UserError, match=r"truncation: is .*, expected a number from 0 to 1"):
            SMOOTH.sample(2, truncation=psi)
    with pytest.raises(UserError, match="classes: this model takes none"):
        SMOOTH.sample_classes(2)
