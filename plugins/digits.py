"""Data set `digits`: 1,797 real handwritten digits, 8 × 8 grey, that come inside scikit-learn's wheel (no download).

Origin: test part of Alpaydin & Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998).
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cached_property
from typing import Any

import numpy as np
from attrs import frozen

from siv_core import Component, Progress, Rows, Spec, hookimpl, option


@frozen
class DigitsConfig:
    held_out: int = option(397, doc="images kept from training, by a seeded choice", ge=1, le=1796)
    split_seed: int = option(0, doc="of that choice", ge=0)


class Digits:
    """Grey levels 0 … 16 as uint8, rounded to 255/16 steps; labels 0 … 9."""

    def __init__(self, held_out: int, split_seed: int) -> None:
        self.held_out, self.split_seed = held_out, split_seed

    spec = Spec(shape=(1, 8, 8), classes=10, factors={"digit": 10})

    def missing(self) -> str | None:
        if importlib.util.find_spec("sklearn") is None:
            return "the digits come with scikit-learn, which is not installed: pip install 'siv[digits]'"
        return None

    def prepare(self, progress: Progress) -> None:
        """Nothing to make: the wheel holds the data."""

    @cached_property
    def _arrays(self) -> Any:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
        return images, bunch.target.astype(np.int64)

    def rows(self, split: str) -> Rows:
        import torch

        images, labels = self._arrays
        order = np.random.Generator(np.random.PCG64(self.split_seed)).permutation(len(images))
        index = np.sort(order[: self.held_out] if split == "held_out" else order[self.held_out :])
        tensors = [torch.from_numpy(array) for array in (images, labels, index)]
        return Rows(tensors[0], labels=tensors[1], factors=tensors[1][:, None], index=tensors[2])

    def fingerprint(self) -> str:
        return hashlib.sha256(self._arrays[0].tobytes()).hexdigest()


def build(config: DigitsConfig) -> Digits:
    return Digits(config.held_out, config.split_seed)


@hookimpl
def siv_components() -> list[Component]:
    return [
        Component("dataset", "digits", DigitsConfig, build, "1,797 real handwritten digits of 8 × 8, in scikit-learn's wheel")
    ]
