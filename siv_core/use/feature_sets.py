"""Sets of images as a feature network sees them: quantised, checked at the door, streamed, and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from siv_core.data import feed
from siv_core.errors import UserError
from siv_core.model import Model
from siv_core.protocols import Rows, Spec
from siv_core.seeding import Streams
from siv_core.use import distances
from siv_core.use.evaluate import labels_of

Values = dict[str, float | str]  # a text is the reason why there is no number
Net = Callable[[Tensor], Tensor]  # uint8 [n, C, H, W] -> features [n, D]

KEPT = 10_000  # features of a set, at most, that the kernel distance, precision and recall are taken of
MIXED_UP = 0.05  # mean way of the numbers beyond the value range, in widths of it, from which images are not of it at all
NAMES = ("kid", "kid.se", "precision", "recall")


class ToBytes:
    """Images of a value range as uint8, rounded to the nearest of 256 levels.

    A decoder that ends in a linear layer overshoots a little: that is cut off, as in every picture file, and `clipped` tells how
    much of it there was. Images that lie beyond the range on the whole, or are not finite, are a `UserError`.
    """

    def __init__(self, value_range: tuple[float, float], what: str) -> None:
        self.low, self.high = value_range
        self.what, self.numbers, self.beyond = what, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        if not x.isfinite().all():
            raise UserError(f"{self.what}: have values that are not finite")
        inside = x.clamp(self.low, self.high)
        if float((x - inside).abs().mean()) > MIXED_UP * (self.high - self.low):
            low, high = (float(value) for value in x.aminmax())
            raise UserError(
                f"{self.what}: go from {low:g} to {high:g}, the value range of the data is [{self.low:g}, {self.high:g}]:"
                " scale them to it"
            )
        self.numbers += x.numel()
        self.beyond += int((x != inside).sum())
        return ((inside - self.low) * (255 / (self.high - self.low))).round().to(torch.uint8)

    @property
    def clipped(self) -> float:
        """Share of the numbers that lay beyond the range."""
        return self.beyond / max(self.numbers, 1)


@frozen(eq=False)
class Features:
    """What is kept of a set of images: the moments of all their features, and the first of the features themselves."""

    moments: distances.Moments
    first: Tensor  # [at most KEPT, D] on the CPU


def collect(images: Iterable[Tensor], net: Net, shown: Callable[[int], None], kept: int = KEPT) -> Features:
    """Features of uint8 images that come in batches. `shown(n)` is told how many are done, before each batch."""
    moments: distances.Moments | None = None
    first: list[Tensor] = []
    for x in images:
        shown(moments.n if moments else 0)
        found = net(x).detach().cpu()
        if not found.isfinite().all():
            raise UserError("the features of some images are not finite")
        moments = moments or distances.Moments(found.shape[1])
        room = kept - moments.n
        if room > 0:
            first.append(found[:room])
        moments.add(found)
    if moments is None:
        raise UserError("there are no images to be compared")
    return Features(moments, torch.cat(first))


def compare(name: str, samples: Features, reference: Features, k: int, seed: int) -> tuple[Values, dict[str, Any]]:
    """{`name`: Fréchet distance, kid, kid.se, precision, recall}, with the reason where there is none; and how they were taken.

    The kernel distance, precision and recall are taken of equally many of both, the first.
    """
    a, b, dims = samples.moments, reference.moments, len(samples.moments.mean)
    count = min(len(samples.first), len(reference.first))
    x, y = samples.first[:count], reference.first[:count]
    values: Values = {}
    about: dict[str, Any] = {
        "dimensions": dims,
        name: {"samples": a.n, "reference": b.n, "covariance": "over N - 1"},
        "kid": {"samples": count, "reference": count, "kernel": "(a.b / D + 1)^3, unbiased, mean of blocks that do not overlap"},
        "precision, recall": {"samples": count, "reference": count, "k": k},
    }
    if min(a.n, b.n) <= dims:
        about[name]["note"] = f"fewer samples than {dims} dimensions + 1: a covariance is singular, and the bias is large"
    try:
        values[name] = distances.frechet(a, b)
    except ValueError as error:
        values[name] = str(error)
    try:
        kid = distances.kernel_distance(x, y, seed)
        values.update({"kid": kid.value, "kid.se": kid.error})
        about["kid"].update(blocks=kid.blocks, block=kid.size)
    except ValueError as error:
        values.update(dict.fromkeys(NAMES[:2], str(error)))
    try:
        values["precision"], values["recall"] = distances.precision_recall(x, y, k)
    except ValueError as error:
        values.update(dict.fromkeys(NAMES[2:], str(error)))
    return values, about


# -- where images come from ------------------------------------------------------------------------------------------------------


def chosen(rows: Rows, count: int, seed: int) -> Tensor:
    """Positions of `count` images of a split, or of all where it has fewer: a seeded choice, in no order."""
    return torch.randperm(len(rows), generator=Streams(seed, 0)("reference"))[:count]


def of_data(rows: Rows, positions: Tensor, spec: Spec, batch: int, device: torch.device, what: str) -> Iterator[Tensor]:
    """These images of a split, quantised, `batch` at a time."""
    to_bytes = ToBytes(spec.value_range, what)
    for at in positions.split(batch):
        yield to_bytes(feed.images(rows, at, spec, device))


def labels_for(model: Model, rows: Rows, positions: Tensor, count: int) -> Tensor | None:
    """Labels [count] for samples of a conditional model: those of these images of the data, over and over."""
    return labels_of(rows, positions[torch.arange(count) % len(positions)], model)
