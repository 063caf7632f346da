"""What a finished or a running model shows: metrics, and pictures of samples, reconstructions and translations."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from siv_core.data import feed
from siv_core.errors import SivError, UserError
from siv_core.model import BATCH, Model
from siv_core.protocols import Batch, Dataset, Measurement, Metric, Progress, Rows
from siv_core.recipe.catalogue import blame, words
from siv_core.recipe.recipe import GAP
from siv_core.seeding import Streams
from siv_core.use import mixing, pictures
from siv_core.use.pictures import Picture

SHOWN = 8  # images a row of a picture
CLASSES = 16  # of a conditional model in a picture that nobody asked for class by class
DRAWN = 5000  # samples in a picture that a metric draws
GAP_IMAGES = 1024  # held-out ones that it takes
LARGE_GAP = 0.1  # a relative difference that is warned of


def measure(
    metrics: Mapping[str, Metric],
    model: Model,
    data: Dataset,
    about: dict[str, Any],
    progress: Progress,
    log: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], dict[str, Picture]]:
    """A line for each value: metric, name, value or the reason why it was skipped, protocol; `about` is in each. And pictures,
    by METRIC_NAME.

    A metric that cannot be taken at all is one line of the name "all"; the others go on. The traceback of one that raises goes
    to `log`. What it costs stands in the only entry that differs from run to run, `wall`.
    """
    lines: list[dict[str, Any]] = []
    drawn: dict[str, Picture] = {}
    for name, metric in metrics.items():
        begun = time.monotonic()
        try:
            measured = metric.measure(model, data, progress)
            found = _lines(name, measured)
            drawn.update({f"{name}_{title}": picture for title, picture in measured.pictures.items()})
        except UserError as error:
            found = _lines(name, Measurement({"all": "; ".join(error.problems)}, {}))
        except SivError:  # a wish to stop
            raise
        except Exception as error:  # of a plugin: what was trained, and the other metrics, are not lost for it
            log(f"metric {name} failed\n{''.join(traceback.format_exception(error)).rstrip()}")
            found = _lines(name, Measurement({"all": f"failed: {blame(error) or words(error)}"}, {}))
        wall = {"seconds": round(time.monotonic() - begun, 3)}
        lines += [{**line, **about, "wall": wall} for line in found]
    return lines, drawn


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


def mean_and_error(name: str, each: Tensor, broken: str) -> dict[str, float | str]:
    """NAME and NAME.se of values [N]: their mean and its standard error, their deviation (N − 1) over √N. Where one is not finite
    both are `broken`."""
    if not each.isfinite().all():
        return {name: broken, f"{name}.se": broken}
    error = float(each.std() / len(each) ** 0.5) if len(each) > 1 else "of one there is none"
    return {name: float(each.mean()), f"{name}.se": error}


@frozen
class TrainEvalGap:
    """How far networks that take statistics of the batch in training are from what they are with those of training: what x
    costs in both modes, (eval − train) / train of each. A large gap makes samples and codes of the model others than trained."""

    seed: int

    def needs(self) -> Iterable[str]:
        return ()

    def measure(self, model: Model, data: Dataset, progress: Progress) -> Measurement:
        x, labels = held_out(data, model, GAP_IMAGES, self.seed)
        size = min(model.batch_statistics, BATCH, len(x))
        values: dict[str, float | str] = {}
        costs = {}
        for mode, one in (("eval", model), ("train", model.in_training_mode())):
            taken = []
            for i, rows in enumerate(torch.arange(len(x)).split(size)[: len(x) // size]):  # whole batches, as in training
                progress(f"{GAP}: {mode}", i, len(x) // size)
                taken.append(one.energy(x[rows], None if labels is None else labels[rows], seed=self.seed))
            costs[mode] = [float(torch.cat(parts).mean()) for parts in zip(*taken, strict=True)]
            values.update({f"{term}.{mode}": cost for term, cost in zip(("rec", "kl"), costs[mode], strict=True)})
        for term, eval_cost, train_cost in zip(("rec", "kl"), *costs.values(), strict=True):
            gap = (eval_cost - train_cost) / train_cost if train_cost else math.nan
            values[f"{term}.gap"] = gap if math.isfinite(gap) else "it is not finite"
        about = {"images": len(x) // size * size, "batch": size, "split": "held_out", "gap": "(eval - train) / train"}
        return Measurement(values, {**about, "rec": "|x - D(mu)|^2", "kl": "nats", "seed": self.seed})


def gap_warnings(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each value of `TrainEvalGap` that is large."""
    large = [
        line
        for line in lines
        if line["metric"] == GAP and line["name"].endswith(".gap") and abs(line.get("value", 0)) > LARGE_GAP
    ]
    return [
        f"warning: {line['name'].removesuffix('.gap')} differs by {line['value']:+.0%} between evaluation and training mode: the"
        " running statistics of the network's batch norm are not those of its batches; longer training at a lower rate, a larger"
        " batch or another norm help"
        for line in large
    ]


def some(data: Dataset, split: str, count: int, seed: int) -> Tensor:
    """Positions [count] of a split: a seeded choice, in order."""
    size = len(data.rows(split))
    chosen = torch.randperm(size, generator=Streams(seed, 0)("show"))[: min(count, size)]
    return chosen.sort().values


def held_out(data: Dataset, model: Model, count: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """`count` seeded images of the held-out split, and their labels where the model takes some."""
    rows, positions = data.rows("held_out"), some(data, "held_out", count, seed)
    return feed.images(rows, positions, model.spec), labels_of(rows, positions, model)


def labels_of(rows: Rows, positions: Tensor, model: Model) -> Tensor | None:
    """The labels of these samples of a split, where the model takes some."""
    return rows.labels[rows.at(positions)] if model.spec.conditional and rows.labels is not None else None


def reconstructions(model: Model, x: Tensor, labels: Tensor | None = None) -> Picture:
    """Originals above, their reconstructions below, `SHOWN` a row."""
    above, below = (pictures.to_uint8(images, model.spec.value_range) for images in (x, model.reconstruct(x, labels)))
    columns = min(len(above), SHOWN)
    blank = np.full((-len(above) % columns, *above.shape[1:]), 255, np.uint8)
    rows = [np.concatenate([half, blank]).reshape(-1, columns, *half.shape[1:]) for half in (above, below)]
    return pictures.grid(np.stack(rows, axis=1).reshape(-1, *above.shape[1:]), columns)


def draw(
    models: Mapping[str, Model],
    metrics: Mapping[str, Metric],
    data: Dataset | None,
    seed: int,
    count: int = DRAWN,
    log: Callable[[str], None] | None = None,
) -> Picture | None:
    """The picture of data that is no image, by the first metric that draws some; None where there is no such metric.

    With a `log` a metric that raises costs its picture alone, and the log has the traceback.
    """
    metric = drawer(metrics)
    try:
        return metric.draw(models, data, seed, count) if metric else None
    except SivError:
        raise
    except Exception as error:
        if log is None:
            raise
        log(f"a picture failed\n{''.join(traceback.format_exception(error)).rstrip()}")
        return None


def drawer(metrics: Mapping[str, Metric]) -> Any:
    """The first metric that draws models, or None."""
    return next((metric for metric in metrics.values() if hasattr(metric, "draw")), None)


def preview(
    model: Model, data: Dataset, metrics: Mapping[str, Metric], seed: int = 0, log: Callable[[str], None] | None = None
) -> Picture | None:
    """Held-out images, their reconstructions, and samples below; of other data what a metric draws, or None."""
    if model.spec.kind != "image":
        return draw({"": model}, metrics, data, seed, log=log)
    above = reconstructions(model, *held_out(data, model, SHOWN, seed))
    shown = [np.pad(above, ((0, 0), (_margin(model), 0), (0, 0)), constant_values=255), samples(model, 2, seed)]
    width = max(picture.shape[1] for picture in shown)
    padded = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in shown]
    return np.concatenate(padded)


def samples(model: Model, rows: int, seed: int) -> Picture:
    """`rows` of samples, `SHOWN` a row; of a conditional model a row for each class, of the same noise along a column. Of more
    than `CLASSES` classes so many are shown, evenly from the first to the last."""
    if not model.spec.conditional:
        return pictures.grid(pictures.to_uint8(model.sample(rows * SHOWN, seed), model.spec.value_range), SHOWN)
    known = model.spec.classes or 0
    labels = torch.linspace(0, known - 1, min(known, CLASSES)).round().long()
    x = model.sample_classes(SHOWN, seed, labels.tolist()).flatten(0, 1)
    return pictures.by_class(pictures.to_uint8(x, model.spec.value_range), labels.repeat_interleave(SHOWN).tolist(), SHOWN)


def _margin(model: Model) -> int:
    """What `samples` has to the left of its images."""
    return pictures.MARGIN if model.spec.conditional else 0


@frozen(eq=False)
class Translation:
    """Every class image with the content of every content image: `cells` [R·K, …], row by row."""

    classes: Tensor  # [R, …]
    contents: Tensor  # [K, …]
    cells: Tensor

    def picture(self, value_range: tuple[float, float]) -> Picture:
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


def translation(model: Model, classes: Batch, contents: Batch) -> Translation:
    """The papers' matrix from class images [R, …] and content images [K, …]; of a conditional model with the class's label."""
    class_group, content_group = translated_groups(model)
    class_codes = model.encode(*classes)[class_group].mu
    content_codes = model.encode(*contents)[content_group].mu
    rows, columns = len(classes.x), len(contents.x)
    codes = {class_group: class_codes.repeat_interleave(columns, 0), content_group: content_codes.repeat(rows, 1)}
    labels = None if classes.labels is None else classes.labels.repeat_interleave(columns)
    return Translation(classes.x, contents.x, model.decode(codes, labels))


def held_out_pairs(data: Dataset, model: Model, count: int, seed: int) -> tuple[Batch, Batch]:
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
    if not half:
        raise UserError(
            f"a translation is shown between two held-out images, and there is {len(chosen)}; hold out more (data.held_out)"
        )
    x, labels = feed.images(rows, chosen, model.spec), labels_of(rows, chosen, model)
    return tuple(Batch(x[part], None if labels is None else labels[part]) for part in (slice(half), slice(half, None)))  # type: ignore[return-value]


def final_pictures(
    model: Model,
    data: Dataset,
    metrics: Mapping[str, Metric],
    folder: Path,
    seed: int,
    log: Callable[[str], None] | None = None,
) -> list[Path]:
    """samples.png, reconstructions.png and, where the model has two groups for it, translation.png, of a decoder with styles
    style_mixing.png; of data that is no image samples.png, where a metric draws it."""
    made: dict[str, Picture | None] = {}
    if model.spec.kind != "image":
        made["samples"] = draw({"": model}, metrics, data, seed, log=log)
    else:
        value_range = model.spec.value_range
        made["samples"] = samples(model, 8, seed)
        made["reconstructions"] = reconstructions(model, *held_out(data, model, 4 * SHOWN, seed))
        if model.has_styles:
            made["style_mixing"] = mixing.of_samples(model, SHOWN, seed).picture(value_range)
        if model.translate:
            made["translation"] = translation(model, *held_out_pairs(data, model, SHOWN, seed)).picture(value_range)
    paths = []
    for name, picture in made.items():
        if picture is not None:
            paths.append(folder / f"{name}.png")
            pictures.save_png(paths[-1], picture)
    return paths
