"""Metric `reconstruction`: how near the reconstructions of held-out images are to the originals: MSE, PSNR, SSIM, LPIPS.

A reconstruction is D of the posterior mean. Beside each value stands what two images score that know nothing of the model: the
mean of the training images, and the training image nearest to each original. A model worth its training is better than both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from siv_core import inputs, latents
from siv_core.component import Component, option
from siv_core.data import feed
from siv_core.errors import UserError
from siv_core.hookspecs import hookimpl
from siv_core.model import Model
from siv_core.protocols import Dataset, Measurement, Metric, Progress, Rows, Spec
from siv_core.seeding import stream_seed
from siv_core.use import image_distances
from siv_core.use.evaluate import labels_of, mean_and_error, some

WHAT = "reconstruction"
BASELINES = {  # shown in place of the decoder's image
    "mean_image": "the mean of the training images",
    "nearest_train": "the training image nearest to the original by squared error",
}
BROKEN = "the decoder's images are not finite"


@frozen
class ReconstructionConfig:
    count: int = option(0, doc="held-out images, by a seeded choice; 0: all", ge=0)
    train_images: int = option(5000, doc="training images that the baselines are made of, by a seeded choice; 0: all", ge=0)
    lpips: tuple[str, ...] = option(
        image_distances.LPIPS_NAMES, doc="backbones of LPIPS v0.1; [] leaves it out", choices=image_distances.LPIPS_NAMES
    )
    seed: int = option(0, doc="of the choices, and of decoders with noise of their own", ge=0)
    batch: int = option(128, doc="images in memory at once", ge=1)


@frozen(eq=False)
class Table:
    """The chosen images of a split."""

    rows: Rows
    positions: Tensor
    model: Model
    batch: int
    what: str

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(positions, their images in the value range on the model's device), a batch at a time."""
        for at in self.positions.split(self.batch):
            x = feed.images(self.rows, at, self.model.spec, self.model.device)
            inputs.in_range(x, self.model.spec.value_range, f"{WHAT}: {self.what}")
            yield at, x

    def units(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same in [0, 1]."""
        return ((at, image_distances.unit(x, self.model.spec.value_range)) for at, x in self.parts())


@frozen(eq=False)
class Sums:
    """Values of single images by name, until their mean and its standard error are asked for."""

    kept: dict[str, list[Tensor]] = field(factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        self.kept.setdefault(name, []).append(values.double().cpu())

    def values(self) -> dict[str, float | str]:
        found: dict[str, float | str] = {}
        for name, parts in self.kept.items():
            found |= mean_and_error(name, torch.cat(parts), BROKEN)
        return found


@frozen
class Reconstruction:
    config: ReconstructionConfig

    def needs(self) -> Iterable[str]:
        return image_distances.needs(self.config.lpips)

    @torch.no_grad()
    def measure(self, model: Model, data: Dataset, progress: Progress) -> Measurement:
        shown, trained = (
            self._table(model, data, "held_out", self.config.count),
            self._table(model, data, "train", self.config.train_images),
        )
        compared, skipped, identity = image_distances.available(model.spec.shape, self.config.lpips, model.device)
        mean, sums, total = self._mean(trained, progress), Sums(), len(shown.positions)
        for number, (at, x) in enumerate(shown.parts()):
            truth = image_distances.unit(x, model.spec.value_range)
            near = image_distances.nearest(truth, self._told(trained, progress, number * self.config.batch, total))
            images = {
                "": self._reconstructed(model, x, labels_of(shown.rows, at, model), number),
                "mean_image": mean.expand_as(truth),
                "nearest_train": self._read(trained, near),
            }
            for variant, image in images.items():
                for name, distance in compared.items():
                    progress(WHAT, number * self.config.batch, total)
                    sums.add(f"{name}.{variant}" if variant else name, distance(image, truth))
        values = sums.values()
        return Measurement({**values, **_ratio(values), **skipped}, self._protocol(model, shown, trained, identity))

    def _table(self, model: Model, data: Dataset, split: str, count: int) -> Table:
        rows = data.rows(split)
        if not len(rows):
            raise UserError(f"{WHAT}: the split '{split}' is empty")
        return Table(
            rows, some(data, split, count or len(rows), self.config.seed), model, self.config.batch, f"images of {split}"
        )

    def _mean(self, trained: Table, progress: Progress) -> Tensor:
        total = torch.zeros(trained.model.spec.shape, dtype=torch.float64)
        for number, (_, x) in enumerate(trained.units()):
            progress(f"{WHAT}: mean image", number * self.config.batch, len(trained.positions))
            total += x.double().sum(dim=0).cpu()
        return (total / len(trained.positions)).float().to(trained.model.device)

    def _told(self, trained: Table, progress: Progress, done: int, total: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in trained.units():
            progress(f"{WHAT}: nearest training images", done, total)
            yield part

    def _read(self, table: Table, positions: Tensor) -> Tensor:
        spec = table.model.spec
        return image_distances.unit(feed.images(table.rows, positions, spec, table.model.device), spec.value_range)

    def _reconstructed(self, model: Model, x: Tensor, labels: Tensor | None, number: int) -> Tensor:
        seed = stream_seed(self.config.seed, WHAT, number)  # for a decoder with noise of its own
        shown = model.decode(latents.means(model.encode(x, labels)), labels, seed)
        return image_distances.unit(shown, model.spec.value_range)

    def _protocol(self, model: Model, shown: Table, trained: Table, identity: dict[str, Any]) -> dict[str, Any]:
        return {
            "split": "held_out",
            "images": len(shown.positions),
            "of": len(shown.rows),
            "choice": "all" if len(shown.positions) == len(shown.rows) else "seeded, without replacement",
            "seed": self.config.seed,
            "batch": self.config.batch,
            "codes": "posterior means",
            "shape": list(model.spec.shape),
            "value_range": list(model.spec.value_range),
            "conditional": model.spec.conditional,
            "compared": "scaled to [0, 1], the decoder's clamped to it; mse is a mean over C·H·W; mean of each image's values",
            "se": "standard error of that mean: deviation of the images' values over the root of their number",
            **image_distances.PROTOCOL,
            "lpips": identity,
            "baselines": BASELINES,
            "train_images": len(trained.positions),
            "mse.ratio": "mse over that of the better baseline",
        }


def _ratio(values: dict[str, float | str]) -> dict[str, float | str]:
    """mse over that of the better baseline: below 1 the model shows more than an image that anybody has."""
    own, others = values["mse"], [values[f"mse.{name}"] for name in BASELINES]
    best = min(value for value in others if not isinstance(value, str))
    if isinstance(own, str):
        return {"mse.ratio": own}
    return {"mse.ratio": own / best if best > 0 else "a baseline is already perfect"}


def build(config: ReconstructionConfig, spec: Spec, groups: dict[str, int], translate: tuple[str, str] | None) -> Metric:
    if spec.kind != "image":
        raise UserError(f"metric {WHAT}: needs images, this data is {spec.kind} {list(spec.shape)}")
    return Reconstruction(config)


@hookimpl
def siv_components() -> list[Component]:
    summary = "MSE, PSNR, SSIM, LPIPS of held-out images' reconstructions, beside the mean and the nearest training image"
    return [Component("metric", "reconstruction", ReconstructionConfig, build, summary)]
