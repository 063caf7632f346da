"""FID, KID, precision and recall of samples, and of reconstructions, in the features of Inception-v3, each with its protocol.

The network is torch-fidelity's, with the weights of the first FID (Heusel et al. 2017). The distances are siv's own
(siv_core/use/distances.py): they stream, and the roots are taken of singular values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from siv_core.component import Component, option
from siv_core.data import feed
from siv_core.errors import UserError
from siv_core.hookspecs import hookimpl
from siv_core.model import Model
from siv_core.protocols import Dataset, Measurement, Metric, Progress, Spec
from siv_core.seeding import stream_seed
from siv_core.use import feature_sets, inception
from siv_core.use.evaluate import labels_of

OFFICIAL = "official-train-mode"
RECONSTRUCTION = "reconstruction."  # before the names of values that are of reconstructions
OFFICIAL_BATCH = 32  # of the published CIFAR-10 runs: a value in this mode depends on it
MODES = {
    "standard": "network and decoder in evaluation mode",
    OFFICIAL: "network and decoder in training mode, with the statistics of batches of 32, as in the published code of"
    " Soft-IntroVAE; beyond that as in standard: the published code resizes from pixel centres and rounds samples down",
}


@frozen
class FidConfig:
    count: int = option(50_000, doc="samples, and images of the reference at most", ge=2)
    reference: str = option("train", doc="split the samples are compared with", choices=("train", "held_out"))
    mode: str = option(
        "standard",
        doc="official-train-mode: as the code behind the paper's 4.6 and 4.07, for no other comparison; under names of its own",
        choices=tuple(MODES),
    )
    reconstructions: bool = option(
        False, doc="held-out images and what the model makes of them are compared too, under names of their own"
    )
    k: int = option(3, doc="neighbours that the balls of precision and recall reach to", ge=1)
    seed: int = option(0, doc="of samples, of the choice of images and of blocks", ge=0)
    batch: int = option(64, doc=f"images in memory at once; in {OFFICIAL} they are {OFFICIAL_BATCH}", ge=1)
    weights_file: str = option("", doc=f"{inception.FILE}; empty: weights/{inception.FILE} in the data folder", place=True)


@frozen
class Fid:
    spec: Spec
    config: FidConfig

    def needs(self) -> Iterable[str]:
        lacking = inception.missing(inception.path_of(self.config.weights_file))
        return [lacking] if lacking else []

    def fits(self, data: Dataset) -> Iterable[str]:
        images = len(data.rows(self.config.reference))
        if images < max(2, self._batch if self._official else 2):
            yield f"the split {self.config.reference} has {images} images, too few for a covariance"

    @torch.no_grad()
    def measure(self, model: Model, data: Dataset, progress: Progress) -> Measurement:
        names = [prefix + name for prefix in ("", RECONSTRUCTION)[: 1 + self._both] for name in ("fid", *feature_sets.NAMES)]
        for reason in (*self.needs(), *self.fits(data)):
            return Measurement({self._called(name): reason for name in names}, self._protocol())
        net = inception.load(inception.path_of(self.config.weights_file), model.device).train(self._official)
        rows, batch = data.rows(self.config.reference), self._batch
        positions = feature_sets.chosen(rows, self._whole(min(self.config.count, len(rows))), self.config.seed)
        real = feature_sets.of_data(rows, positions, self.spec, batch, model.device, "fid: images of the data")
        reference = feature_sets.collect(real, net, _shown(progress, "fid: reference", len(positions)))
        count = self._whole(self.config.count)
        labels = feature_sets.labels_for(model, rows, positions, count)
        to_bytes = feature_sets.ToBytes(self.spec.value_range, "fid: samples of the model")
        made = map(to_bytes, self._samples(model, count, labels))
        samples = feature_sets.collect(made, net, _shown(progress, "fid: samples", count))
        values, about = feature_sets.compare("fid", samples, reference, self.config.k, self.config.seed)
        values["clipped"] = to_bytes.clipped
        protocol = self._protocol() | {
            "features": net.about(),
            "distances": about,
            "reference": {"split": self.config.reference, "images": len(positions), "of": len(rows), "augmentation": "none"},
            "samples": {"count": count, "labels": "none" if labels is None else "of the reference's images, in turn"},
            "versions": inception.versions(),
        }
        if self._both:
            of_them, protocol["reconstructions"] = self._of_reconstructions(model, data, net, progress)
            values |= of_them
        return Measurement({self._called(name): value for name, value in values.items()}, protocol)

    def _of_reconstructions(
        self, model: Model, data: Dataset, net: feature_sets.Net, progress: Progress
    ) -> tuple[feature_sets.Values, dict[str, Any]]:
        """Held-out images against their reconstructions, D of the posterior means: how much of the set a code keeps."""
        rows, spec = data.rows("held_out"), self.spec
        positions = feature_sets.chosen(rows, self.config.count, self.config.seed)
        to_bytes = feature_sets.ToBytes(spec.value_range, "fid: reconstructions of the model")
        made = (
            to_bytes(model.reconstruct(feed.images(rows, at, spec), labels_of(rows, at, model)))
            for at in positions.split(self._batch)
        )
        real = feature_sets.of_data(rows, positions, spec, self._batch, model.device, "fid: held-out images")
        originals = feature_sets.collect(real, net, _shown(progress, "fid: held-out images", len(positions)))
        shown = feature_sets.collect(made, net, _shown(progress, "fid: reconstructions", len(positions)))
        values, about = feature_sets.compare("fid", shown, originals, self.config.k, self.config.seed)
        values["clipped"] = to_bytes.clipped
        told = {"of": "posterior means", "reference": {"split": "held_out", "images": len(positions), "of": len(rows)}}
        return {RECONSTRUCTION + name: value for name, value in values.items()}, {**told, "distances": about}

    def _samples(self, model: Model, count: int, labels: Tensor | None) -> Iterator[Tensor]:
        if not self._official:
            yield from model.samples(count, self._batch, self.config.seed, labels)
            return
        model = model.in_training_mode()
        for number, at in enumerate(torch.arange(count).split(self._batch)):  # a decoder sees no more than such a batch
            seed = stream_seed(self.config.seed, "fid", number)
            yield model.sample(len(at), seed, None if labels is None else labels[at])

    @property
    def _official(self) -> bool:
        return self.config.mode == OFFICIAL

    @property
    def _both(self) -> bool:
        return self.config.reconstructions

    @property
    def _batch(self) -> int:
        return OFFICIAL_BATCH if self._official else self.config.batch

    def _whole(self, count: int) -> int:
        """Whole batches, where a result depends on its batch."""
        return max(self._batch, count // self._batch * self._batch) if self._official else count

    def _called(self, name: str) -> str:
        """Values of different modes never stand in one column."""
        return f"official_train_mode.{name}" if self._official else name

    def _protocol(self) -> dict[str, Any]:
        return {
            "shape": list(self.spec.shape),
            "mode": self.config.mode,
            "modes": MODES[self.config.mode],
            "batch": self._batch,
            "bit_depth": "images of both sets rounded to uint8; samples beyond the value range are cut to it, `clipped` of them",
            "seed": self.config.seed,
        }


def _shown(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    return lambda done: progress(what, done, total)


def build(config: FidConfig, spec: Spec, groups: dict[str, int], translate: tuple[str, str] | None) -> Metric:
    if spec.kind != "image" or spec.shape[0] not in (1, 3):
        raise UserError(f"metric fid: needs images with 1 or 3 channels, this data is {spec.kind} {list(spec.shape)}")
    if config.reconstructions and config.mode == OFFICIAL:
        raise UserError(f"metric fid: {OFFICIAL} is of samples alone: leave reconstructions out")
    return Fid(spec, config)


@hookimpl
def siv_components() -> list[Component]:
    summary = "FID, KID, precision and recall in Inception-v3's features (needs the extra `metrics` and a weight file)"
    return [Component("metric", "fid", FidConfig, build, summary, "arXiv:1706.08500")]
