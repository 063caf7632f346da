"""Content transfer: decode the class code of one held-out image with the content code of another; the true image is known.

Target (class a, content w), class source (a, w' ≠ w), content source (a' ≠ a, w). a is one factor of the data, w all the others.
The papers that print such numbers (LORD, Soft-IntroVAE §6.4) do not say how they drew pairs; this drawing is siv's own.

Beside the model stand images that anybody could show, and what it shows itself where one of its codes is that of a stranger.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from siv_core.store import files, weights
from siv_core.use.evaluate import labels_of

Distance = Callable[[Tensor, Tensor], Tensor]  # (image, truth), both [N, C, H, W] in [0, 1] -> [N]
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
LEAST_MSE = 1e-10  # keeps the PSNR of equal images finite, at 100 dB
SSIM_WINDOW, SSIM_SIGMA, SSIM_K = 11, 1.5, (0.01, 0.03)
LPIPS_PIXELS = 1 << 16  # of the images compared at once: VGG's feature maps take about 2 kB a pixel


@frozen
class ContentTransferConfig:
    class_factor: str = option("model", doc="the factor of the data that the class code stands for; the others are the content")
    pairs: int = option(5, doc="source pairs drawn for every held-out image", ge=1)
    seed: int = option(0, doc="of the drawing of pairs", ge=0)
    batch: int = option(128, doc="images in memory at once", ge=1)
    lpips: tuple[str, ...] = option(("alex", "vgg"), doc="backbones of LPIPS v0.1; [] leaves it out", choices=("alex", "vgg"))


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


def mse(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().flatten(1).mean(dim=1)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    return -10 * torch.log10(mse(x, y).clamp_min(LEAST_MSE))


def _windows(size: int, like: Tensor) -> Tensor:
    """[size - 10, size]: each row a window. On a CPU two small matrix products are several times faster than a convolution."""
    offsets = torch.arange(SSIM_WINDOW, dtype=like.dtype, device=like.device) - SSIM_WINDOW // 2
    weights = torch.softmax(-offsets.square() / (2 * SSIM_SIGMA**2), dim=0)
    matrix = like.new_zeros(size - SSIM_WINDOW + 1, size)
    for row in range(len(matrix)):
        matrix[row, row : row + SSIM_WINDOW] = weights
    return matrix


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, equation 13) [N]: mean over channels and every whole window; data range 1."""
    down, across = _windows(x.shape[2], x), _windows(x.shape[3], x).T
    mu_x, mu_y, xx, yy, xy = (down @ image @ across for image in (x, y, x * x, y * y, x * y))
    c1, c2 = (k**2 for k in SSIM_K)
    luminance = (2 * mu_x * mu_y + c1) / (mu_x.square() + mu_y.square() + c1)
    structure = (2 * (xy - mu_x * mu_y) + c2) / (xx - mu_x.square() + yy - mu_y.square() + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


class Backbone(NamedTuple):
    trunk: str  # torchvision's file: the first 8 digits of its sha256 stand before the suffix
    heads: str  # sha256 of the linear heads v0.1 that come with the package lpips
    smallest: int  # pixels a side below which a pooling layer has nothing left


BACKBONES = {
    "alex": Backbone("alexnet-owt-7be5be79.pth", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0", 31),
    "vgg": Backbone("vgg16-397923af.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868", 16),
}


def read_weights(backbone: str) -> tuple[tuple[bytes, str], tuple[bytes, str]]:
    """Trunk and heads, each as bytes with their sha256."""
    trunk, heads, _ = BACKBONES[backbone]
    path = files.data_root() / "weights" / trunk
    bundled = importlib.metadata.distribution("lpips").locate_file(f"lpips/weights/v0.1/{backbone}.pth")
    return (
        weights.read(
            path, path.stem.rpartition("-")[2], f"download https://download.pytorch.org/models/{trunk} into {path.parent}"
        ),
        weights.read(Path(str(bundled)), heads, "pip install --force-reinstall --no-deps lpips==0.1.4"),
    )


def lpips_distance(backbone: str, device: torch.device) -> tuple[Distance, dict[str, str]]:
    """LPIPS v0.1 (Zhang et al. 2018) with weights checked on the very bytes that are loaded, and what identifies it."""
    (trunk, trunk_sha256), (heads, heads_sha256) = read_weights(backbone)
    with warnings.catch_warnings():
        # lpips 0.1.4, its last release, asks torchvision for an untrained trunk by an argument that was renamed in 0.13
        warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated", UserWarning)
        warnings.filterwarnings("ignore", "Arguments other than a weight enum", UserWarning)
        import lpips

        # on "meta" nothing is initialised: no random number is used up, and VGG's 500 MB classifier is never made
        with torch.device("meta"):
            net = lpips.LPIPS(net=backbone, version="0.1", pretrained=False, pnet_rand=True, verbose=False)
    its, state = (weights.state_dict(data, Path(backbone)) for data in (trunk, heads))
    state.update({f"net.{name}": its["features." + name.partition(".")[2]] for name in net.net.state_dict()})
    net.load_state_dict(state, strict=False, assign=True)  # not strict: lpips has its heads under two names each
    net.to(device).eval()

    def distance(x: Tensor, y: Tensor) -> Tensor:
        size = max(1, LPIPS_PIXELS // (x.shape[2] * x.shape[3]))
        pairs = zip(*((2 * image.expand(-1, 3, -1, -1) - 1).split(size) for image in (x, y)), strict=True)
        return torch.cat([net(a, b).flatten() for a, b in pairs])

    about = {"package": importlib.metadata.version("lpips"), "version": "0.1", "input": "[-1, 1], grey repeated to 3 channels"}
    return distance, {**about, "trunk_sha256": trunk_sha256, "heads_sha256": heads_sha256}


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
        best, found = torch.full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.int64)
        for at, among in self.parts(positions):
            distance, index = torch.cdist(x.flatten(1), among.flatten(1)).min(dim=1)
            nearer = distance.cpu() < best
            best, found = torch.where(nearer, distance.cpu(), best), torch.where(nearer, at[index.cpu()], found)
        return found


@frozen
class ContentTransfer:
    spec: Spec
    translate: tuple[str, str]
    config: ContentTransferConfig

    def needs(self) -> Iterable[str]:
        problems = []
        for backbone in self.config.lpips:
            try:
                read_weights(backbone)
            except UserError as error:
                problems.append(f"lpips_{backbone}: {error}")
        return problems

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
        distances, skipped, identity = self._distances(model.device)
        codes = self._encode(model, rows, progress)
        targets = torch.arange(len(rows)).repeat_interleave(self.config.pairs)
        sums: dict[str, float] = defaultdict(float)  # plain numbers: small tensors kept between the batches' large ones cost GBs

        def compare(variant: str, image: Tensor, truth: Tensor, what: str, done: int, total: int) -> None:
            for name, distance in distances.items():
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
        skipped |= {f"{name}.{baseline}": why for baseline, why in lacking.items() for name in distances}
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

    def _distances(self, device: torch.device) -> tuple[dict[str, Distance], dict[str, str], dict[str, Any]]:
        """What can be computed, why the rest cannot, and which LPIPS it is."""
        distances: dict[str, Distance] = {"mse": mse, "psnr": psnr, "ssim": ssim}
        skipped, identity = {}, {}
        channels, side = self.spec.shape[0], min(self.spec.shape[1:])
        if side < SSIM_WINDOW:
            skipped["ssim"] = f"images of {side} pixels are smaller than its window of {SSIM_WINDOW}"
            del distances["ssim"]
        for backbone in self.config.lpips:
            name, smallest = f"lpips_{backbone}", BACKBONES[backbone].smallest
            if channels not in (1, 3) or side < smallest:
                skipped[name] = f"takes grey or RGB images of at least {smallest} pixels, not {channels} channels of {side}"
                continue
            try:
                distances[name], identity[name] = lpips_distance(backbone, device)
            except UserError as error:
                skipped[name] = str(error)
        return distances, skipped, identity

    def _encode(self, model: Model, rows: Rows, progress: Progress) -> Codes:
        codes = {group: torch.empty(len(rows), model.groups[group], device=model.device) for group in self.translate}
        for at in torch.arange(len(rows)).split(self.config.batch):
            progress(f"{WHAT}: encoding", int(at[0]), len(rows))
            q = model.encode(feed.images(rows, at, self.spec, model.device), labels_of(rows, at, model))
            for group, kept in codes.items():
                kept[at] = q[group].mu
        return codes

    def _unit(self, x: Tensor) -> Tensor:
        low, high = self.spec.value_range
        return ((x - low) / (high - low)).clamp(0, 1)

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
            "psnr": {"peak": 1, "least_mse": LEAST_MSE},
            "ssim": {"window": SSIM_WINDOW, "sigma": SSIM_SIGMA, "k": list(SSIM_K), "data_range": 1, "padding": "valid"},
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
