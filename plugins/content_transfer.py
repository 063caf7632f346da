"""Content transfer: decode the class code of one held-out image with the content code of another; the true image is known.

Target (class a, content w), class source (a, w' ≠ w), content source (a' ≠ a, w). a is one factor of the data, w all the others.
The papers that print such numbers (LORD, Soft-IntroVAE §6.4) do not say how they drew pairs; this drawing is siv's own.

Beside the model stand images that anybody could show, and what it shows itself where one of its codes is that of a stranger.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from siv_core.component import Component, option
from siv_core.data import feed
from siv_core.errors import UserError
from siv_core.hookspecs import hookimpl
from siv_core.latents import Codes
from siv_core.model import Model
from siv_core.protocols import Dataset, Measurement, Metric, Progress, Rows, Spec
from siv_core.seeding import stream_seed
from siv_core.use import image_distances
from siv_core.use.evaluate import labels_of

Ints = NDArray[np.int64]

WHAT = "content transfer"
BASELINES = {  # shown in place of the decoder's image
    "copy_class": "the class source",
    "copy_content": "the content source",
    "mean_image": "the mean of the training images",
}
LABELLED = {  # the same, from factors of the data, which the model is not told
    "view_mean": "the mean of the training images with the target's content",
    "class_mean": "the mean of the held-out images of the target's class, itself left out",
    "nearest_train": "of the training class nearest to the class source at its content, the image with the target's content",
}
STRANGERS = {  # the decoder's image of one code of the pair and that of a stranger; where a code is not used nothing changes
    "random_class": "the content source's content code with the class code of any image of another class",
    "random_content": "the class source's class code with the content code of any image of another content",
}


@frozen
class ContentTransferConfig:
    class_factor: str = option("model", doc="the factor of the data that the class code stands for; the others are the content")
    pairs: int = option(5, doc="source pairs drawn for every held-out image", ge=1)
    seed: int = option(0, doc="of the drawing of pairs", ge=0)
    batch: int = option(128, doc="images in memory at once", ge=1)
    lpips: tuple[str, ...] = option(
        image_distances.LPIPS_NAMES, doc="backbones of LPIPS v0.1; [] leaves it out", choices=image_distances.LPIPS_NAMES
    )


def positions_by(values: Ints) -> dict[int, Ints]:
    order = np.argsort(values, kind="stable")
    keys, starts = np.unique(values[order], return_index=True)
    return dict(zip(keys.tolist(), np.split(order, starts[1:]), strict=True))


def draw_sources(classes: Ints, contents: Ints, pairs: int, seed: int, names: list[str]) -> Ints:
    """Positions [2, T, pairs] of class and content sources: each uniform among the images that qualify, with replacement."""
    uniform = np.random.Generator(np.random.PCG64(seed)).random((len(classes), 2, pairs))
    sources = np.empty((2, len(classes), pairs), dtype=np.int64)
    of_class, of_content = positions_by(classes), positions_by(contents)
    for target, (a, w) in enumerate(zip(classes.tolist(), contents.tolist(), strict=True)):
        same_class, same_content = of_class[a], of_content[w]
        among = (same_class[contents[same_class] != w], same_content[classes[same_content] != a])
        for side, what in enumerate(("its class and other content", "its content and another class")):
            if not len(among[side]):
                raise UserError(
                    f"{WHAT}: held-out image {target} ({names[target]}): no other one in the split has {what};"
                    " hold out whole classes (of hdf5: data.held_out_by)"
                )
            sources[side, target] = among[side][(uniform[target, side] * len(among[side])).astype(np.int64)]
    return sources


@frozen(eq=False)
class Split:
    """The images of a split, and which class and content each of them is."""

    read: Callable[[Tensor], Tensor]  # positions -> [n, C, H, W] in [0, 1], on the model's device
    classes: Ints
    contents: Ints
    batch: int

    def parts(self, positions: Ints | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(positions, their images), a batch at a time; of all of them where none are given."""
        chosen = torch.arange(len(self.classes)) if positions is None else torch.from_numpy(positions)
        for at in chosen.split(self.batch):
            yield at, self.read(at)

    def mean(self, positions: Ints | None = None) -> Tensor:
        """[C, H, W], float64."""
        count = len(self.classes) if positions is None else len(positions)
        return sum((x.double().sum(dim=0) for _, x in self.parts(positions)), torch.zeros((), dtype=torch.float64)) / count

    def nearest(self, x: Tensor, positions: Ints) -> Tensor:
        """Positions [n] of those among `positions` that are nearest to each of x [n, …]."""
        return image_distances.nearest(x, self.parts(positions))


@frozen
class ContentTransfer:
    spec: Spec
    translate: tuple[str, str]
    config: ContentTransferConfig

    def needs(self) -> Iterable[str]:
        return image_distances.needs(self.config.lpips)

    def fits(self, data: Dataset) -> Iterable[str]:
        try:
            rows = data.rows("held_out")
            self._sources(rows)
        except UserError as error:
            return error.problems
        return ()

    @torch.no_grad()
    def measure(self, model: Model, data: Dataset, progress: Progress) -> Measurement:
        rows, train_rows = data.rows("held_out"), data.rows("train")
        held_out, train = self._split(rows, model.device), self._split(train_rows, model.device)
        sources, strangers = self._sources(rows), self._strangers(held_out)
        compared, skipped, identity = image_distances.available(self.spec.shape, self.config.lpips, model.device)
        codes = self._encode(model, rows, progress)
        targets = torch.arange(len(rows)).repeat_interleave(self.config.pairs)
        sums: dict[str, float] = defaultdict(float)  # plain numbers: small tensors kept between the batches' large ones cost GBs

        def compare(variant: str, image: Tensor, truth: Tensor, what: str, done: int, total: int) -> None:
            for name, distance in compared.items():
                progress(what, done, total)
                sums[f"{name}.{variant}" if variant else name] += float(distance(image, truth).double().sum())

        nearest, lacking = self._baselines(held_out, train, compare)
        for at in torch.arange(len(targets)).split(self.config.batch):
            place, truth = (WHAT, int(at[0]), len(targets)), held_out.read(targets[at])
            seed = stream_seed(self.config.seed, "content_transfer", int(at[0]))  # for a decoder with noise of its own
            own, other = sources[:, at], strangers[:, at]
            labels = labels_of(rows, own[0], model)  # of a conditional model: those of the class source
            pairs = {"": (own[0], own[1]), "random_class": (other[0], own[1]), "random_content": (own[0], other[1])}
            for variant, chosen in pairs.items():
                mixed = {group: codes[group][one.to(model.device)] for group, one in zip(self.translate, chosen, strict=True)}
                compare(variant, self._unit(model.decode(mixed, labels, seed)), truth, *place)
            compare("copy_class", held_out.read(own[0]), truth, *place)
            compare("copy_content", held_out.read(own[1]), truth, *place)
            if nearest is not None:
                compare("nearest_train", train.read(nearest(own[0], targets[at])), truth, *place)
        each = ("mean_image", "class_mean", "view_mean")  # of an image, not of a pair
        means = {name: total / len(rows if name.partition(".")[2] in each else targets) for name, total in sums.items()}
        skipped |= {f"{name}.{baseline}": why for baseline, why in lacking.items() for name in compared}
        return Measurement({**_values(means), **skipped}, self._protocol(len(rows), len(train_rows), identity))

    def _baselines(self, held_out: Split, train: Split, compare: Callable[..., None]) -> tuple[Any, dict[str, str]]:
        """Compare the means with what they are of. Gives (positions of class sources, of targets) -> positions of the training
        images that `nearest_train` shows, None where there are none, and why."""
        total, what = len(held_out.classes), f"{WHAT}: baselines"
        mean, trained = train.mean().float(), positions_by(train.contents)
        for at, truth in held_out.parts():
            compare("mean_image", mean.expand_as(truth), truth, what, int(at[0]), total)
        for own in positions_by(held_out.classes).values():
            mean, others = held_out.mean(own), max(len(own) - 1, 1)
            for at, truth in held_out.parts(own):
                rest = (mean * len(own) - truth.double()) / others  # without the image itself
                compare("class_mean", rest.float(), truth, what, int(at[0]), total)
        contents = positions_by(held_out.contents)
        if not contents.keys() <= trained.keys():
            reason = "the training images have not every content of the held-out ones"
            return None, dict.fromkeys(("view_mean", "nearest_train"), reason)
        nearest = torch.zeros(total, dtype=torch.int64)
        for content, own in contents.items():
            mean = train.mean(trained[content]).float()
            for at, truth in held_out.parts(own):
                compare("view_mean", mean.expand_as(truth), truth, what, int(at[0]), total)
                nearest[at] = train.nearest(truth, trained[content])
        names, row = map(torch.from_numpy, np.unique(train.classes, return_inverse=True))
        cells = torch.full((len(names), int(max(train.contents.max(), held_out.contents.max())) + 1), -1)
        cells[row, torch.from_numpy(train.contents)] = torch.arange(len(row))
        if any((cells[:, content] < 0).any() for content in contents):
            return None, {"nearest_train": "the training images have not every class with every content"}
        content_of = torch.from_numpy(held_out.contents)
        return lambda source, target: cells[row[nearest[source]], content_of[target]], {}

    def _split(self, rows: Rows, device: torch.device) -> Split:
        """A `UserError` where it is empty or has no factors."""
        if rows.factors is None or not len(rows):
            raise UserError(f"{WHAT}: the held-out split is empty or without factors")
        factors = rows.factors[rows.at(torch.arange(len(rows)))].numpy()
        column = list(self.spec.factors).index(self.config.class_factor)
        sizes = [size for name, size in self.spec.factors.items() if name != self.config.class_factor]
        contents = np.ravel_multi_index(tuple(np.delete(factors, column, axis=1).T), sizes)

        def read(at: Tensor) -> Tensor:
            return self._unit(feed.images(rows, at, self.spec, device))

        return Split(read, factors[:, column], contents, self.config.batch)

    def _sources(self, rows: Rows) -> Tensor:
        """Positions [2, T·pairs] of class and content sources."""
        split = self._split(rows, torch.device("cpu"))
        assert rows.factors is not None
        factors = rows.factors[rows.at(torch.arange(len(rows)))].tolist()
        names = [", ".join(f"{name} {value}" for name, value in zip(self.spec.factors, row, strict=True)) for row in factors]
        sources = draw_sources(split.classes, split.contents, self.config.pairs, self.config.seed, names)
        return torch.from_numpy(sources.reshape(2, -1))

    def _strangers(self, split: Split) -> Tensor:
        """Positions [2, T·pairs] of any image of another class, and of another content; each uniform, with replacement."""
        uniform = np.random.Generator(np.random.PCG64([self.config.seed, 1])).random((2, len(split.classes), self.config.pairs))
        chosen = np.empty(uniform.shape, dtype=np.int64)
        for side, values in enumerate((split.classes, split.contents)):
            for value, own in positions_by(values).items():
                others = np.flatnonzero(values != value)
                chosen[side, own] = others[(uniform[side, own] * len(others)).astype(np.int64)]
        return torch.from_numpy(chosen.reshape(2, -1))

    def _encode(self, model: Model, rows: Rows, progress: Progress) -> Codes:
        codes = {group: torch.empty(len(rows), model.groups[group], device=model.device) for group in self.translate}
        for at in torch.arange(len(rows)).split(self.config.batch):
            progress(f"{WHAT}: encoding", int(at[0]), len(rows))
            q = model.encode(feed.images(rows, at, self.spec, model.device), labels_of(rows, at, model))
            for group, kept in codes.items():
                kept[at] = q[group].mu
        return codes

    def _unit(self, x: Tensor) -> Tensor:
        return image_distances.unit(x, self.spec.value_range)

    def _protocol(self, targets: int, train: int, identity: dict[str, Any]) -> dict[str, Any]:
        own, others = self.config.class_factor, sorted(self.spec.factors.keys() - {self.config.class_factor})
        return {
            "split": "held_out",
            "pairs": {"targets": targets, "each": self.config.pairs, "seed": self.config.seed, "batch": self.config.batch},
            "drawing": "numpy PCG64; each source uniform in the split, with replacement",
            "class": {"factors": [own], "group": self.translate[0], "source": "same class, other content"},
            "content": {"factors": others, "group": self.translate[1], "source": "same content, other class"},
            "codes": "posterior means",
            "images": {"shape": list(self.spec.shape), "value_range": list(self.spec.value_range)},
            "compared": "scaled to [0, 1], the decoder's clamped to it; mse is a mean over C·H·W; average of each image's values",
            **image_distances.PROTOCOL,
            "lpips": identity,
            "mean_image": {"split": "train", "images": train},
            "baselines": BASELINES,
            "baselines that use labels": LABELLED,
            "codes of strangers": STRANGERS,
            "strangers": "numpy PCG64 of [seed, 1]; uniform among the images of the split that differ, with replacement",
        }


def _values(means: dict[str, float]) -> dict[str, float | str]:
    """With mse.ratio, mse over that of the best baseline that needs no labels: below 1 the model does better than copying; and
    mse over that of the content's mean image, which is told the content and knows no class: below 1 the class code is of use."""
    best = min(means[f"mse.{baseline}"] for baseline in BASELINES)
    ratio = {"mse.ratio": means["mse"] / best if best > 0 else "a baseline is already perfect"}
    if means.get("mse.view_mean"):
        ratio["mse.over_view_mean"] = means["mse"] / means["mse.view_mean"]
    broken = "the decoder's images are not finite"
    return {name: broken if value != value else value for name, value in {**means, **ratio}.items()}


def build(config: ContentTransferConfig, spec: Spec, groups: dict[str, int], translate: tuple[str, str] | None) -> Metric:
    if translate is None:
        raise UserError("metric content_transfer: needs a network with a class and a content group, such as adain")
    if spec.kind != "image" or spec.conditional:
        raise UserError("metric content_transfer: needs images made of codes alone: no arrays, and no train.conditional")
    if config.class_factor not in spec.factors or len(spec.factors) < 2:
        known = ", ".join(spec.factors) or "none"
        raise UserError(f"metric content_transfer: class_factor: needs '{config.class_factor}' and one more; factors: {known}")
    return ContentTransfer(spec, translate, config)


@hookimpl
def siv_components() -> list[Component]:
    summary = "exchange codes between held-out images: MSE, PSNR, SSIM, LPIPS to the true ones, beside what anybody could show"
    return [Component("metric", "content_transfer", ContentTransferConfig, build, summary, "arXiv:2012.13253")]
