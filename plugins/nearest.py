"""How near samples are to images of the training set, and how near unseen images of the data are: whether a model copies.

A model that stores training images draws them at a distance near 0; images that nobody has trained on show how near to the
training set the data themselves lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from attrs import frozen
from torch import Tensor

from siv_core import Component, Dataset, Measurement, Metric, Model, Progress, Spec, UserError, hookimpl, option
from siv_core.data import feed
from siv_core.protocols import Rows
from siv_core.use import evaluate, image_distances, pictures

SHOWN = 8  # samples in the picture, the nearest of all
PART = 2048  # training images compared at once


@frozen
class NearestConfig:
    count: int = option(500, doc="samples, and held-out images beside them", ge=2)
    seed: int = option(0, doc="of the samples and of the choice of images", ge=0)


@frozen
class Nearest:
    spec: Spec
    config: NearestConfig

    def needs(self) -> Iterable[str]:
        return ()

    @torch.no_grad()
    def measure(self, model: Model, data: Dataset, progress: Progress) -> Measurement:
        config, rows = self.config, data.rows("train")
        other, positions = data.rows("held_out"), evaluate.some(data, "held_out", config.count, config.seed)
        unseen = self._unit(feed.images(other, positions, self.spec))
        samples = self._unit(model.sample(config.count, config.seed).cpu())
        found, distances = self._nearest(torch.cat([samples, unseen]), rows, progress)
        of_samples, of_unseen = distances.split([len(samples), len(unseen)])
        broken = "a distance is not finite: the model's images are not"
        values = {**evaluate.mean_and_error("rmse", of_samples, broken)}
        values |= evaluate.mean_and_error("held_out.rmse", of_unseen, broken)
        limit = torch.quantile(of_unseen, 0.01)
        values["nearer_than_1_percent"] = float((of_samples < limit).double().mean())
        values["least"], values["held_out.least"] = float(of_samples.min()), float(of_unseen.min())
        closest = of_samples.argsort()[:SHOWN]
        pairs = torch.cat([samples[closest], self._unit(feed.images(rows, found[closest], self.spec))])
        picture = pictures.grid(pictures.to_uint8(pairs, (0.0, 1.0)), len(closest))
        protocol = {
            "rmse": "root of the mean squared error to the nearest training image, values in [0, 1], mean over images",
            "nearer_than_1_percent": "share of samples nearer to a training image than 99 % of held-out images: chance 0.01",
            "shape": list(self.spec.shape),
            "samples": len(samples),
            "held_out": len(unseen),
            "training images": len(rows),
            "seed": config.seed,
        }
        return Measurement(values, protocol, {"pairs": picture})

    def _unit(self, x: Tensor) -> Tensor:
        return image_distances.unit(x, self.spec.value_range)

    def _nearest(self, x: Tensor, rows: Rows, progress: Progress) -> tuple[Tensor, Tensor]:
        """The positions of the nearest training images, and how far they are: [N] each."""

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            for at in torch.arange(len(rows)).split(PART):
                progress("nearest: training images", int(at[0]), len(rows))
                yield at, self._unit(feed.images(rows, at, self.spec))

        found = image_distances.nearest(x, parts())
        near = torch.cat([self._unit(feed.images(rows, at, self.spec)) for at in found.split(PART)])
        return found, image_distances.mse(x, near).double().sqrt()


def build(config: NearestConfig, spec: Spec, groups: dict[str, int], translate: tuple[str, str] | None) -> Metric:
    if spec.kind != "image":
        raise UserError(f"metric nearest: needs images, this data is {spec.kind} {list(spec.shape)}")
    return Nearest(spec, config)


@hookimpl
def siv_components() -> list[Component]:
    summary = "how near samples are to training images, beside held-out images: whether a model copies"
    return [Component("metric", "nearest", NearestConfig, build, summary)]
