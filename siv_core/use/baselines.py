"""Simple scores of images that need no trained network, to stand beside a model's; a LARGER score is more of an outlier.

    png      bytes of the image as a PNG file: a code length, as minus a log-likelihood is one
    ppca     −ln p(x) in nats of the Gaussian of a linear VAE, probabilistic PCA (Tipping & Bishop 1999, J. R. Stat. Soc. B 61),
             with as many latent dimensions as the model has
    nearest  squared distance to the nearest training image

The last two are fitted on training images, with images as floats in [0, 1] and arrays as they are. float64.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from siv_core.protocols import Spec

NAMES = ("png", "ppca", "nearest")
FLOOR = 1 / 12 / 255**2  # variance of the rounding to 8 bits, below which no direction's is taken to be


@frozen(eq=False)
class Fitted:
    """What they need of training images."""

    x: Tensor  # [M, D]
    rows: Tensor  # [M] their positions in the training split
    mean: Tensor  # [D]
    directions: Tensor  # [D, k]
    variances: Tensor  # [k] along them
    rest: float  # variance along all other directions

    @classmethod
    def on(cls, x: Tensor, rows: Tensor, dims: int) -> Fitted:
        """Of training images x [M, D] with `dims` directions, or as many as M images have between them."""
        n, size = x.shape
        mean = x.mean(dim=0)
        centred = x - mean
        small = size <= n
        scatter = (centred.T @ centred if small else centred @ centred.T) / n
        values, vectors = torch.linalg.eigh(scatter)
        k = max(1, min(dims, n - 1, size - 1))
        top, axes = values[-k:].clamp(min=0), vectors[:, -k:]
        if not small:
            axes = centred.T @ axes / (n * top).clamp(min=1e-300).sqrt()
        rest = max(float(values.sum() - top.sum()) / max(1, size - k), FLOOR)
        return cls(x, rows, mean, axes, top.clamp(min=rest), rest)

    def ppca(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        along = centred @ self.directions  # [N, k]
        outside = (centred.square().sum(dim=1) - along.square().sum(dim=1)).clamp(min=0)
        size, k = len(self.mean), len(self.variances)
        logdet = float(self.variances.log().sum()) + (size - k) * math.log(self.rest)
        return 0.5 * ((along.square() / self.variances).sum(dim=1) + outside / self.rest + logdet + size * math.log(2 * math.pi))

    def nearest(self, x: Tensor, own: Tensor | None = None) -> Tensor:
        """`own` [N]: the positions of x where they are training images, which are not near themselves."""
        squares = x.square().sum(dim=1)[:, None] - 2 * x @ self.x.T + self.x.square().sum(dim=1)
        if own is not None:
            squares[own[:, None] == self.rows] = torch.inf
        return squares.amin(dim=1).clamp(min=0)


def flat(x: Tensor, spec: Spec) -> Tensor:
    """[N, D] float64 on the CPU, images scaled to [0, 1]."""
    low, high = spec.value_range if spec.kind == "image" else (0.0, 1.0)
    return ((x.detach().cpu().double() - low) / (high - low)).flatten(1)


def png(x: Tensor, spec: Spec) -> Tensor:
    """Bytes [N]; channels that are not 1 or 3 stand one below the other as grey."""
    low, high = spec.value_range
    levels = ((x.detach().cpu().double() - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8).numpy()
    return torch.tensor([_png_bytes(image) for image in levels], dtype=torch.float64)


def _png_bytes(image: np.ndarray[Any, Any]) -> int:
    from PIL import Image

    planes = image.transpose(1, 2, 0) if len(image) == 3 else image.reshape(-1, image.shape[2])
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(planes)).save(buffer, "png", compress_level=9)
    return len(buffer.getvalue())


def score(x: Tensor, spec: Spec, names: Sequence[str], fitted: Fitted | None, own: Tensor | None = None) -> dict[str, Tensor]:
    """{name: [N]} of images [N, …] in the value range of `spec`."""
    found: dict[str, Tensor] = {}
    if "png" in names:
        found["png"] = png(x, spec)
    if fitted is not None:
        points = flat(x, spec)
        if "ppca" in names:
            found["ppca"] = fitted.ppca(points)
        if "nearest" in names:
            found["nearest"] = fitted.nearest(points, own)
    return found


def protocol(names: Sequence[str], fitted: Fitted | None) -> dict[str, str]:
    """What the numbers depend on."""
    images, k = (len(fitted.x), len(fitted.variances)) if fitted else (0, 0)
    told = {
        "png": "no model: bytes of the image as PNG, 8 bits",
        "ppca": f"no network: -ln p(x) of probabilistic PCA with {k} dimensions, fitted on {images} training images, nats",
        "nearest": f"no model: squared distance in [0, 1] to the nearest of {images} training images, itself left out",
    }
    return {name: told[name] for name in names}
