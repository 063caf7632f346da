"""Images with the styles of several others: the matrix of Karras et al. 2019 (arXiv:1812.04948), figure 3."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from siv_core.errors import UserError, near_miss
from siv_core.latents import means
from siv_core.model import Model
from siv_core.use import outputs, pictures
from siv_core.use.pictures import Picture

RANGES = {"coarse": (0, 4), "middle": (4, 8), "fine": (8, None)}  # layers of 4 and 8, of 16 and 32, and of more pixels a side
ROWS = 3  # samples whose styles are taken over


@frozen(eq=False)
class Mixing:
    """`cells` [L, R, K, …]: image k of the top with the styles of image r of the left in the layers of range l."""

    top: Tensor  # [K, …]
    left: Tensor  # [R, …]
    cells: Tensor

    def picture(self, value_range: tuple[float, float]) -> Picture:
        """A block of rows for each range."""
        left = self.left.repeat(len(self.cells), *[1] * (self.left.ndim - 1))
        return pictures.matrix(*(pictures.to_uint8(x, value_range) for x in (left, self.top, self.cells.flatten(0, 2))))


def mixed(model: Model, top: Tensor, left: Tensor, ranges: Sequence[range], seed: int) -> Tensor:
    """Images [L, R, K, …] of styles top [K, S, d] and left [R, S, d]."""
    layer = torch.arange(top.shape[1], device=top.device)[:, None]
    styles = [
        torch.where((layer >= taken.start) & (layer < taken.stop), left[:, None], top[None]) for taken in ranges
    ]  # each [R, K, S, d]
    shown = model.render(torch.stack(styles).flatten(0, 2), seed)
    return shown.unflatten(0, (len(ranges), len(left), len(top)))


def mix(
    model: Model,
    folder: Path,
    ranges: Sequence[str],
    given: Mapping[str, tuple[Tensor, list[str]]],
    count: int,
    seed: int,
) -> dict[str, Any]:
    """Images along the top with the styles of those down the left in these `ranges` of layers, a block of rows for each; samples
    of the prior, `count` and three, stand in for what is not `given` as "top" or "left"."""
    taken = [parsed(text, layers(model)) for text in ranges]
    if given and model.spec.conditional:
        raise UserError(f"--take {next(iter(given))}=…: this model encodes by label, and pictures here have none: leave it out")
    drawn = model.sample_styles(count + ROWS, seed)
    styles, shown, notes = dict[str, Tensor](), dict[str, Tensor](), list[str]()
    for side, samples in (("top", drawn[:count]), ("left", drawn[count:])):
        x, changed = given.get(side, (None, [f"{side}: samples of the prior"]))
        styles[side] = samples if x is None else model.styles(means(model.encode(x)))
        shown[side] = model.render(samples, seed) if x is None else x
        notes += changed
    made = Mixing(shown["top"], shown["left"], mixed(model, styles["top"], styles["left"], taken, seed))
    arrays = {"top": made.top, "left": made.left, "cells": made.cells}
    about = {"seed": seed, "layers": [[one.start, one.stop - 1] for one in taken]}
    return outputs.write(folder, "style_mixing", model, arrays, lambda: made.picture(model.spec.value_range), notes, about)


def of_samples(model: Model, columns: int, seed: int) -> Mixing:
    """Samples of the prior along the top and down the left, and what each named range of layers takes over."""
    ranges = list(named(layers(model)).values())
    styles = model.sample_styles(columns + ROWS, seed)
    top, left = styles[:columns], styles[columns:]
    return Mixing(model.render(top, seed), model.render(left, seed), mixed(model, top, left, ranges, seed))


def layers(model: Model) -> int:
    """How many layers the decoder has in use at this size of its images; a `UserError` where it has no styles."""
    if not model.has_styles:
        raise UserError("this model's decoder has no styles to mix: that takes one such as that of the network 'style'")
    decoder: Any = model.decoder
    return int(decoder.layers_in_use)


def named(count: int) -> dict[str, range]:
    """The named ranges that there are among so many layers."""
    found = {name: range(first, count if last is None else min(last, count)) for name, (first, last) in RANGES.items()}
    return {name: taken for name, taken in found.items() if len(taken)}


def parsed(text: str, count: int) -> range:
    """The layers of `coarse`, `middle`, `fine`, of a number or of two with a - between them, both included."""
    known = named(count)
    if text in known:
        return known[text]
    numbers = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text, re.ASCII)
    first, last = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (1, 0)
    if not first <= last < count:
        offered = f"{', '.join(known)} or layers 0 to {count - 1} such as 0-3"
        raise UserError(f"--mix {text}: this model has {count} layers: expected {offered}{near_miss(text, known)}")
    return range(first, last + 1)
