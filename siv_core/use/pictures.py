"""Pictures: grids of images, the translation matrix and the curves of a run. Every file is whole or not there."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siv_core.store import files

Picture = NDArray[np.uint8]  # [H, W, 3]


def to_uint8(x: Tensor, value_range: tuple[float, float]) -> NDArray[np.uint8]:
    """[N, C, H, W] floats of the value range to [N, H, W, 3]; values outside are clipped, other channels as `shown_as` says."""
    low, high = value_range
    scaled = (x.detach().float().cpu() - low) * (255 / (high - low))
    channels_last = scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    if x.shape[1] == 1:
        shown = channels_last.expand(-1, -1, -1, 3)
    elif x.shape[1] == 2:
        shown = torch.cat([channels_last, torch.zeros_like(channels_last[..., :1])], dim=3)
    else:
        shown = channels_last[..., :3]
    return np.ascontiguousarray(shown.numpy())


def shown_as(channels: int) -> str:
    """What pictures show of images with so many channels, where that is not simply all; else ""."""
    if channels in (1, 3):
        return ""
    how = "the first as red, the second as green" if channels == 2 else "the first three as red, green and blue"
    return f"images of {channels} channels: pictures show {how}; arrays keep all"


def grid(images: NDArray[np.uint8], columns: int, *, gap: int = 2, least_pixels: int = 64) -> Picture:
    """Images [N, H, W, 3] in rows, small ones enlarged by whole factors to at least `least_pixels`."""
    factor = max(1, -(-least_pixels // max(images.shape[1:3])))
    big = images.repeat(factor, axis=1).repeat(factor, axis=2)
    n, height, width, _ = big.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(big):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def matrix(left: NDArray[np.uint8], top: NDArray[np.uint8], cells: NDArray[np.uint8]) -> Picture:
    """The papers' figure: `left` [R, …] down the side, `top` [K, …] along the top, `cells` [R·K, …] between them."""
    blank = np.full_like(left[:1], 255)
    rows = [np.concatenate([blank, top])]
    rows += [np.concatenate([left[i : i + 1], cells[i * len(top) : (i + 1) * len(top)]]) for i in range(len(left))]
    sheet = grid(np.concatenate(rows), len(top) + 1)
    side_y, side_x = sheet.shape[0] // (len(left) + 1), sheet.shape[1] // (len(top) + 1)
    sheet[side_y : side_y + 2, side_x:] = 0  # a line between the sources and what was made of them
    sheet[side_y:, side_x : side_x + 2] = 0
    return sheet


def collage(above: NDArray[np.uint8], below: NDArray[np.uint8], halvings: int = 2) -> Picture:
    """Pairs of images [N, H, W, 3] side by side: one at full size, under it four at half, then sixteen at a quarter; as many such
    columns as there are images for, as ALAE's code draws them. Sizes that cannot be halved are not."""
    n, height, width, _ = above.shape
    while height % 2**halvings or width % 2**halvings:
        halvings -= 1
    each = sum(4**level for level in range(halvings + 1))
    columns = -(-n // each)
    sheet = np.full(((halvings + 1) * (height + APART) - APART, columns * (2 * width + APART) - APART, 3), 255, np.uint8)
    i = 0
    for column in range(columns):
        for level in range(halvings + 1):
            k = 2**level
            for place in range(min(k * k, n - i)):
                pair = np.concatenate([above[i], below[i]], axis=1).reshape(height // k, k, 2 * width // k, k, 3)
                top = level * (height + APART) + place // k * (height // k)
                left = column * (2 * width + APART) + place % k * (2 * width // k)
                sheet[top : top + height // k, left : left + 2 * width // k] = pair.mean(axis=(1, 3)).round()
                i += 1
    return sheet


MARGIN = 40  # pixels left of the rows of `by_class`, for their numbers
APART = 8  # pixels between images and what a model made of them


def by_class(images: NDArray[np.uint8], labels: Sequence[int], columns: int) -> Picture:
    """Images [N, H, W, 3] of each label in a row of their own, or in several where there are more than `columns`; rising labels,
    each written before its first row."""
    from PIL import Image, ImageDraw, ImageFont

    blank = np.full_like(images[:1], 255)
    cells, firsts = list[NDArray[np.uint8]](), dict[int, int]()
    for label in sorted(set(labels)):
        firsts[label] = sum(map(len, cells)) // columns
        of_label = images[np.flatnonzero(np.asarray(labels) == label)]
        cells += [of_label, blank.repeat(-len(of_label) % columns, axis=0)]
    sheet = grid(np.concatenate(cells), columns)
    height = (sheet.shape[0] - 2) * columns // sum(map(len, cells))
    drawn = Image.fromarray(np.pad(sheet, ((0, 0), (MARGIN, 0), (0, 0)), constant_values=255))
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(16)
    for label, row in firsts.items():
        pen.text((MARGIN - 4, 1 + (row + 0.5) * height), str(label), fill="black", font=font, anchor="rm")
    return np.asarray(drawn)


def strips(left: NDArray[np.uint8], between: NDArray[np.uint8], right: NDArray[np.uint8]) -> Picture:
    """A row for each of `left` [R, …] and `right` [R, …] at its ends, what is `between` [R·K, …] them a little apart."""
    steps = len(between) // len(left)
    parts = zip(left[:, None], between.reshape(-1, steps, *between.shape[1:]), right[:, None], strict=True)
    sheet = grid(np.concatenate([np.concatenate(row) for row in parts]), steps + 2)
    width = (sheet.shape[1] - 2) // (steps + 2)
    return np.insert(sheet, np.repeat([width, width * (steps + 1)], APART), 255, axis=1)


def cornered(corners: NDArray[np.uint8], cells: NDArray[np.uint8]) -> Picture:
    """`cells` [K·K, …] as a square, and a little apart the four images [4, …] that its corners belong to."""
    side = round(len(cells) ** 0.5)
    left, right = (np.full((side, *cells.shape[1:]), 255, np.uint8) for _ in range(2))
    left[[0, -1]], right[[0, -1]] = corners[[0, 2]], corners[[1, 3]]
    return strips(left, cells, right)


def save_png(path: Path, picture: Picture) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    files.write_bytes(path, buffer.getvalue())


def curves(path: Path, lines: Sequence[dict[str, Any]], stages: Sequence[int] = ()) -> None:
    """Losses, KLs and reconstructions of a run over images seen, from the lines of stats.jsonl; `stages`: the images that had
    been seen when each one was over."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    series: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for phase, values in line["phases"].items():
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    xs, ys = series.setdefault(f"{phase}: {name}", ([], []))
                    xs.append(line["images_seen"])
                    ys.append(value)
    panels = {"reconstruction": "rec_", "KL (nats)": "kl_", "loss": "loss", "gradient norm": "gradient_norm"}
    figure = Figure(figsize=(11, 7))
    # a layout engine would double the time
    figure.subplots_adjust(left=0.065, right=0.99, bottom=0.07, top=0.96, hspace=0.3, wspace=0.14)
    FigureCanvasAgg(figure)
    for axes, (title, part) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for label, (xs, ys) in series.items():
            name = label.split(": ")[1]
            if name.startswith(part) and "." not in name:
                axes.plot(xs, ys, label=label, linewidth=1, marker="." if len(xs) < 3 else None)
        for end in stages[:-1]:
            axes.axvline(end, color="0.6", linewidth=0.8, linestyle=":")
        axes.set_title(title)
        axes.set_xlabel("images seen (dotted: a new stage)" if len(stages) > 1 else "images seen")
        if part != "loss" and any(min(ys) > 0 for label, (_, ys) in series.items() if label.split(": ")[1].startswith(part)):
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        if axes.lines:
            axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    files.write_bytes(path, buffer.getvalue())
