"""Data set `photo_patches`: patches of the two photographs in scikit-learn's wheel (no download), which hold no digits: to try
out-of-distribution detection of models of `digits` or `mnist_small` on.

A patch is the area mean of `zoom` × `zoom` pixels for each of its own, since a few neighbouring pixels of a photograph are nearly
flat, and has a standard deviation of at least `CONTRAST` in its grey levels. Held-out patches come from the right quarter of each
photograph, those for training from the rest: no pixel is in both.
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cached_property
from pathlib import Path

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core import Component, Progress, Rows, Spec, UserError, hookimpl, option
from siv_core.errors import one_line

PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # CC BY 2.0; whose they are tells the README beside them
HEIGHT, WIDTH = 427, 640
CUT = 480  # the column at which the held-out part begins
CONTRAST = 10.0  # of 255 grey levels

Bytes = NDArray[np.uint8]


@frozen
class PhotoPatchesConfig:
    size: int = option(8, doc="pixels a side of a patch", ge=4, le=WIDTH - CUT)
    channels: int = option(1, doc="1: grey, 3: colour", choices=(1, 3))
    zoom: int = option(4, doc="pixels of the photograph, across and down, whose mean is one of a patch", ge=1, le=40)
    count: int = option(2000, doc="patches in all, half of them of each photograph", ge=4, le=100_000)
    held_out: int = option(400, doc="how many of them are held out", ge=2)
    seed: int = option(0, doc="of the choice of places", ge=0)


def patches(photograph: Bytes, columns: tuple[int, int], count: int, size: int, zoom: int, rng: np.random.Generator) -> Bytes:
    """Patches [count, size, size, 3] from between two columns of a photograph [H, W, 3], at places in a random order."""
    window = size * zoom
    tops, lefts = len(photograph) - window + 1, columns[1] - columns[0] - window + 1
    taken: list[Bytes] = []
    for place in rng.permutation(max(0, tops) * max(0, lefts)).tolist():
        top, left = place // lefts, columns[0] + place % lefts
        part = photograph[top : top + window, left : left + window].reshape(size, zoom, size, zoom, 3)
        patch = np.rint(part.mean(axis=(1, 3))).astype(np.uint8)
        if grey(patch).std() >= CONTRAST:
            taken.append(patch)
        if len(taken) == count:
            return np.stack(taken)
    told = f"data: the photographs have {len(taken)} patches of {window} × {window} pixels with some contrast, not {count}"
    raise UserError(f"{told}; ask for fewer (data.count, data.held_out) or smaller ones (data.size, data.zoom)")


def grey(patch: Bytes) -> NDArray[np.float64]:
    """Luma [...] of colours [..., 3] (ITU-R BT.601)."""
    return np.asarray(patch @ np.array([0.299, 0.587, 0.114]))


class PhotoPatches:
    def __init__(self, config: PhotoPatchesConfig) -> None:
        self.config = config
        self.spec = Spec((config.channels, config.size, config.size), classes=2, factors={"photograph": 2})

    def missing(self) -> str | None:
        if self._folder() is None:
            return "the photographs come with scikit-learn, which is not installed: pip install 'siv[digits]'"
        return None

    def _folder(self) -> Path | None:
        package = importlib.util.find_spec("sklearn")
        folder = Path(package.origin).parent / "datasets" / "images" if package and package.origin else None
        return folder if folder and all((folder / name).is_file() for name in PHOTOGRAPHS) else None

    def prepare(self, progress: Progress) -> None:
        """Nothing to make: patches are cut when they are asked for, in a fraction of a second."""

    def _photograph(self, name: str) -> Bytes:
        from PIL import Image

        folder = self._folder()
        if folder is None:
            raise UserError(self.missing() or "the photographs of scikit-learn are gone")
        try:
            with Image.open(folder / name, formats=("JPEG",)) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(
                f"{one_line(folder / name)}: cannot be read ({one_line(error)}); install scikit-learn again"
            ) from error
        if pixels.shape != (HEIGHT, WIDTH, 3):
            raise UserError(
                f"{one_line(folder / name)}: is {list(pixels.shape)}, not [{HEIGHT}, {WIDTH}, 3]; install scikit-learn again"
            )
        return pixels

    @cached_property
    def _arrays(self) -> tuple[Bytes, NDArray[np.int64], NDArray[np.bool_]]:
        """Images [N, C, size, size], which photograph [N] they are of, and whether they are held out [N]."""
        asked = self.config
        images, labels, held_out = [], [], []
        for number, name in enumerate(PHOTOGRAPHS):
            photograph = self._photograph(name)
            for part, columns in enumerate(((0, CUT), (CUT, WIDTH))):
                total = asked.held_out if part else asked.count - asked.held_out
                n = (total + 1 - number) // 2
                rng = np.random.Generator(np.random.PCG64([asked.seed, number, part]))
                images.append(patches(photograph, columns, n, asked.size, asked.zoom, rng))
                labels.append(np.full(n, number, np.int64))
                held_out.append(np.full(n, bool(part)))
        colour = np.concatenate(images)
        shown = colour if asked.channels == 3 else np.rint(grey(colour)).astype(np.uint8)[..., None]
        return np.ascontiguousarray(shown.transpose(0, 3, 1, 2)), np.concatenate(labels), np.concatenate(held_out)

    def rows(self, split: str) -> Rows:
        import torch

        images, labels, held_out = self._arrays
        index = np.flatnonzero({"train": ~held_out, "held_out": held_out}[split])
        tensors = [torch.from_numpy(array) for array in (images, labels, index)]
        return Rows(tensors[0], labels=tensors[1], factors=tensors[1][:, None], index=tensors[2])

    def fingerprint(self) -> str:
        return hashlib.sha256(self._arrays[0].tobytes()).hexdigest()


def build(config: PhotoPatchesConfig) -> PhotoPatches:
    if config.held_out > config.count - 2:
        raise UserError(f"data.held_out: {config.held_out} of {config.count} patches; two must be left for training at least")
    if config.size * config.zoom > WIDTH - CUT:
        most = f"{WIDTH - CUT} pixels of a photograph at most, data.size × data.zoom"
        raise UserError(f"data.zoom: a patch is {most}; at size {config.size} zoom can be {(WIDTH - CUT) // config.size}")
    return PhotoPatches(config)


@hookimpl
def siv_components() -> list[Component]:
    return [
        Component("dataset", "photo_patches", PhotoPatchesConfig, build, "patches of the two photographs in scikit-learn's wheel")
    ]
