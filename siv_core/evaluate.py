"""What a finished or a running model shows: metrics, and pictures of samples, reconstructions and translations."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from siv_core import feed, pictures, plane
from siv_core.catalogue import blame, words
from siv_core.errors import SivError, UserError
from siv_core.model import Model
from siv_core.protocols import Dataset, Measurement, Metric, Progress, Spec
from siv_core.seeding import Streams

SHOWN = 8  # images a row of a picture
POINTS = 5000  # data and samples in a picture of the plane
PLANE_GRID = 300  # points a side of its density


def measure(
    metrics: Mapping[str, Metric],
    model: Model,
    data: Dataset,
    about: dict[str, Any],
    progress: Progress,
    log: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """A line for each value: metric, name, value or the reason why it was skipped, protocol; `about` is in each.

    A metric that cannot be taken at all is one line of the name "all"; the others go on. The traceback of one that raises goes
    to `log`.
    """
    lines: list[dict[str, Any]] = []
    for name, metric in metrics.items():
        try:
            found = _lines(name, metric.measure(model, data, progress))
        except UserError as error:
            found = _lines(name, Measurement({"all": "; ".join(error.problems)}, {}))
        except SivError:  # a wish to stop
            raise
        except Exception as error:  # of a plugin: what was trained, and the other metrics, are not lost for it
            log(f"metric {name} failed\n{''.join(traceback.format_exception(error)).rstrip()}")
            found = _lines(name, Measurement({"all": f"failed: {blame(error) or words(error)}"}, {}))
        lines += [{**line, **about} for line in found]
    return lines


def _lines(name: str, measured: Measurement) -> list[dict[str, Any]]:
    json.dumps(measured.protocol)  # raises here, not when the line is written
    return [
        {
            "metric": name,
            "name": value_name,
            **({"skipped": value} if isinstance(value, str) else {"value": float(value)}),
            "protocol": measured.protocol,
        }
        for value_name, value in measured.values.items()
    ]


def some(data: Dataset, split: str, count: int, seed: int) -> Tensor:
    """Positions [count] of a split: a seeded choice, in order."""
    size = len(data.rows(split))
    chosen = torch.randperm(size, generator=Streams(seed, 0)("show"))[: min(count, size)]
    return chosen.sort().values


def held_out(data: Dataset, model: Model, count: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """`count` seeded images of the held-out split, and their labels where the model takes some."""
    rows, positions = data.rows("held_out"), some(data, "held_out", count, seed)
    labels = rows.labels[rows.at(positions)] if model.spec.conditional and rows.labels is not None else None
    return feed.images(rows, positions, model.spec), labels


def reconstructions(model: Model, x: Tensor, labels: Tensor | None = None) -> pictures.Picture:
    """Originals above, their reconstructions below, `SHOWN` a row."""
    above, below = (pictures.to_uint8(images, model.spec.value_range) for images in (x, model.reconstruct(x, labels)))
    columns = min(len(above), SHOWN)
    blank = np.full((-len(above) % columns, *above.shape[1:]), 255, np.uint8)
    rows = [np.concatenate([half, blank]).reshape(-1, columns, *half.shape[1:]) for half in (above, below)]
    return pictures.grid(np.stack(rows, axis=1).reshape(-1, *above.shape[1:]), columns)


def drawable(spec: Spec) -> bool:
    """Whether there is a picture of such data: images, and points of the plane."""
    return spec.kind == "image" or plane.is_plane(spec)


def in_plane(models: Mapping[str, Model], data: Dataset | None, seed: int, count: int = POINTS) -> pictures.Picture:
    """Samples over held-out data, and the density exp(ELBO), of one model or of several {title: model} side by side."""
    spec = next(iter(models.values())).spec
    points = plane.grid(spec.value_range, PLANE_GRID)
    panels = []
    for title, model in models.items():
        rec, kl = model.energy(points)
        energy = (rec + kl).cpu().unflatten(0, (PLANE_GRID, PLANE_GRID))
        real = held_out(data, model, POINTS, seed)[0] if data else None
        panels.append(plane.Panel(model.sample(count, seed).cpu(), energy, real, title))
    return plane.draw(panels, spec.value_range)


def preview(model: Model, data: Dataset, seed: int = 0) -> pictures.Picture:
    """Held-out images, their reconstructions, and samples below; of points, samples over data and the density."""
    if plane.is_plane(model.spec):
        return in_plane({"": model}, data, seed)
    shown = [reconstructions(model, *held_out(data, model, SHOWN, seed))]
    shown.append(pictures.grid(pictures.to_uint8(model.sample(2 * SHOWN, seed), model.spec.value_range), SHOWN))
    width = max(picture.shape[1] for picture in shown)
    padded = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in shown]
    return np.concatenate(padded)


@frozen(eq=False)
class Translation:
    """Every class image with the content of every content image: `cells` [R·K, …], row by row."""

    classes: Tensor  # [R, …]
    contents: Tensor  # [K, …]
    cells: Tensor

    def picture(self, value_range: tuple[float, float]) -> pictures.Picture:
        parts = [pictures.to_uint8(x, value_range) for x in (self.classes, self.contents, self.cells)]
        return pictures.matrix(*parts)


def translated_groups(model: Model) -> tuple[str, str]:
    """The class group and the content group of a model that has them."""
    if model.translate is None:
        raise UserError(
            f"this model has the latent groups {', '.join(model.groups)}: translating takes a class and a content group,"
            " such as those of the network 'adain'"
        )
    return model.translate


def translation(model: Model, classes: Tensor, contents: Tensor) -> Translation:
    """The papers' matrix from class images [R, …] and content images [K, …]."""
    class_group, content_group = translated_groups(model)
    class_codes = model.encode(classes)[class_group].mu
    content_codes = model.encode(contents)[content_group].mu
    rows, columns = len(classes), len(contents)
    codes = {class_group: class_codes.repeat_interleave(columns, 0), content_group: content_codes.repeat(rows, 1)}
    return Translation(classes, contents, model.decode(codes))


def held_out_pairs(data: Dataset, model: Model, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Class images and content images, `count` each, of the held-out split; all of different classes where factors tell."""
    rows = data.rows("held_out")
    order = torch.randperm(len(rows), generator=Streams(seed, 0)("translate"))
    if rows.factors is not None:
        identity = rows.factors[rows.at(order), 0].tolist()  # the first factor is the data's own idea of a class
        first: dict[int, int] = {}
        for position, one in zip(order.tolist(), identity, strict=True):
            first.setdefault(one, position)
        if len(first) >= 2 * count:
            order = torch.tensor(list(first.values()))
    chosen = order[: 2 * count]
    half = len(chosen) // 2
    x = feed.images(rows, chosen, model.spec)
    return x[:half], x[half:]


def final_pictures(model: Model, data: Dataset, folder: Path, seed: int) -> list[Path]:
    """samples.png, reconstructions.png and, where the model has two groups for it, translation.png; of points samples.png."""
    if not drawable(model.spec):
        return []
    if plane.is_plane(model.spec):
        pictures.save_png(folder / "samples.png", in_plane({"": model}, data, seed))
        return [folder / "samples.png"]
    value_range = model.spec.value_range
    made = {
        "samples": pictures.grid(pictures.to_uint8(model.sample(8 * SHOWN, seed), value_range), SHOWN),
        "reconstructions": reconstructions(model, *held_out(data, model, 4 * SHOWN, seed)),
    }
    if model.translate and not model.spec.conditional:  # two images of different classes have no label in common
        made["translation"] = translation(model, *held_out_pairs(data, model, SHOWN, seed)).picture(value_range)
    paths = []
    for name, picture in made.items():
        paths.append(folder / f"{name}.png")
        pictures.save_png(paths[-1], picture)
    return paths
