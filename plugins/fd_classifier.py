"""Distances of samples in the features of a small classifier that is trained here on the data set's own labels, and what it says
of the samples: for data sets without standard features, and machines without Inception's weights.

Beside each distance stands its floor: the same one between images of the data's other split and the reference, at equal counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from siv_core.component import Component, option
from siv_core.errors import UserError, near_miss
from siv_core.hookspecs import hookimpl
from siv_core.model import Model
from siv_core.protocols import Dataset, Measurement, Metric, Progress, Spec
from siv_core.use import classifier, distances, feature_sets
from siv_core.use.classifier import Judge
from siv_core.use.feature_sets import Features, Values

SURE = 0.9  # probability above which the classifier is sure
OTHER = {"train": "held_out", "held_out": "train"}
NOBODY = "the classifier is sure of no sample"


@frozen
class FdClassifierConfig:
    count: int = option(5000, doc="samples; the distances take as many of them as the smaller split has images", ge=2)
    reference: str = option("train", doc="split the samples are compared with", choices=tuple(OTHER))
    k: int = option(3, doc="neighbours that the balls of precision and recall reach to", ge=1)
    factor: str = option("", doc="of the data, whose values are the classes; empty: the data's labels are")
    epochs: int = option(0, doc="of the classifier's training; 0: 2 to 40, so that it sees about 120,000 images", ge=0)
    seed: int = option(0, doc="of the classifier, of samples, of the choice of images and of blocks", ge=0)
    batch: int = option(256, doc="images in memory at once", ge=1)


@frozen(eq=False)
class Seen:
    """What the classifier makes of a set of images."""

    features: Tensor  # [N, D]
    probabilities: Tensor  # [N, classes]

    def first(self, n: int) -> Features:
        return Features(distances.moments(self.features[:n]), self.features[:n])

    @property
    def sure(self) -> Tensor:
        return self.probabilities.amax(dim=1) > SURE

    @property
    def labels(self) -> Tensor:
        return self.probabilities.argmax(dim=1)


@frozen
class FdClassifier:
    spec: Spec
    config: FdClassifierConfig

    def needs(self) -> Iterable[str]:
        return ()

    def fits(self, data: Dataset) -> Iterable[str]:
        reasons = classifier.lacks(*classifier.labelled(data, self.spec, self.config.factor))
        return reasons or [
            f"the split {split} has {len(data.rows(split))} images, no more than k = {self.config.k}"
            for split in OTHER
            if len(data.rows(split)) <= self.config.k
        ]

    @torch.no_grad()
    def measure(self, model: Model, data: Dataset, progress: Progress) -> Measurement:
        for reason in self.fits(data):
            raise UserError(f"metric fd_classifier: {reason}")
        config, settings = self.config, classifier.Settings(epochs=self.config.epochs, seed=self.config.seed)
        judge = classifier.trained(*classifier.labelled(data, self.spec, config.factor), settings, model.device, progress)
        images = min(config.count, *(len(data.rows(split)) for split in OTHER))
        reference = self._of_data(data, config.reference, images, judge, model, progress)
        other = self._of_data(data, OTHER[config.reference], images, judge, model, progress)
        rows = data.rows(config.reference)
        wanted = feature_sets.labels_for(model, rows, feature_sets.chosen(rows, len(rows), config.seed), config.count)
        to_bytes = feature_sets.ToBytes(self.spec.value_range, "fd_classifier: samples of the model")
        made = map(to_bytes, model.samples(config.count, config.batch, config.seed, wanted))
        samples = _seen(made, judge, config.count, "fd_classifier: samples", progress)

        values, about = self._compared(samples, reference, images)
        values |= _told(samples, wanted)
        floor, _ = self._compared(other, reference, images)
        floor["sure"] = float(other.sure.double().mean())
        values["clipped"] = to_bytes.clipped
        values |= {f"floor.{name}": value for name, value in floor.items()}
        return Measurement(values, self._protocol(judge, about, images, len(rows), wanted is not None))

    def _compared(self, seen: Seen, reference: Seen, images: int) -> tuple[Values, dict[str, Any]]:
        return feature_sets.compare("fd", seen.first(images), reference.first(images), self.config.k, self.config.seed)

    def _of_data(self, data: Dataset, split: str, images: int, judge: Judge, model: Model, progress: Progress) -> Seen:
        rows = data.rows(split)
        positions = feature_sets.chosen(rows, images, self.config.seed)
        what = f"fd_classifier: {split}"
        made = feature_sets.of_data(rows, positions, self.spec, self.config.batch, model.device, f"{what}: images of the data")
        return _seen(made, judge, images, what, progress)

    def _protocol(self, judge: Judge, about: dict[str, Any], images: int, of: int, conditional: bool) -> dict[str, Any]:
        config = self.config
        return {
            "features": f"of a classifier trained on this data set's own {config.factor or 'labels'}: see classifier",
            "shape": list(self.spec.shape),
            "classifier": judge.about,
            "distances": about,
            "reference": {"split": config.reference, "images": images, "of": of},
            "samples": {
                "count": config.count,
                "in distances": images,
                "labels": "of the reference's images, in turn" if conditional else "none",
            },
            "floor": f"the split {OTHER[config.reference]}, {images} images, in place of the samples; the classifier was"
            " trained on one of the two splits",
            "sure": f"largest probability above {SURE:g}; shares of classes are of the samples it is sure of",
            "bit_depth": "images of both sets rounded to uint8; samples beyond the value range are cut to it, `clipped` of them",
            "seed": config.seed,
        }


def _seen(images: Iterator[Tensor], judge: Judge, total: int, what: str, progress: Progress) -> Seen:
    parts: list[tuple[Tensor, Tensor]] = []
    done = 0
    for x in images:
        progress(what, done, total)
        parts.append(judge(x))
        done += len(x)
    features, probabilities = (torch.cat(column) for column in zip(*parts, strict=True))
    return Seen(features, probabilities)


def _told(samples: Seen, wanted: Tensor | None) -> Values:
    """What the classifier says of the samples; of a conditional model also whether they are what they were to be."""
    values: Values = {"sure": float(samples.sure.double().mean())}
    counts = samples.labels[samples.sure].bincount(minlength=samples.probabilities.shape[1])
    shares = counts.double() / max(int(counts.sum()), 1)
    values["classes_found"] = float((counts > 0).sum())
    values["largest_class"] = float(shares.max()) if counts.sum() else NOBODY
    values["smallest_class"] = float(shares.min()) if counts.sum() else NOBODY
    if wanted is not None:
        values["label_agreement"] = float((samples.labels == wanted).double().mean())
    return values


def build(config: FdClassifierConfig, spec: Spec, groups: dict[str, int], translate: tuple[str, str] | None) -> Metric:
    if spec.kind != "image":
        raise UserError(f"metric fd_classifier: needs images, this data is {spec.kind} {list(spec.shape)}")
    if config.factor and config.factor not in spec.factors:
        hint = near_miss(config.factor, spec.factors) if spec.factors else "; they have none"
        raise UserError(f"metric fd_classifier: factor: '{config.factor}' is no factor of these data{hint}")
    return FdClassifier(spec, config)


@hookimpl
def siv_components() -> list[Component]:
    summary = "Fréchet and kernel distance, precision and recall in a classifier trained on the data's labels, and what it tells"
    return [Component("metric", "fd_classifier", FdClassifierConfig, build, summary)]
