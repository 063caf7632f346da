"""A small classifier of a data set's own labels, trained here: its features and its answers judge samples where no network that
others trained is at hand. What it says holds for this data set, this classifier and nothing else.

It is trained once and kept in the data root's `classifiers`, under a digest of the data, of the settings and of `VERSION`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional as F

from siv_core.data import feed
from siv_core.errors import UserError
from siv_core.protocols import Progress, Rows, Spec
from siv_core.seeding import DataOrder, Seeded, Streams, stream_seed
from siv_core.store import files
from siv_core.use.feature_sets import ToBytes

VERSION = 1  # of everything below that changes a trained weight: add one with each change
FOLDER = "classifiers"
FORMAT = 1
WHAT = "classifier"
CHANNELS, GROUPS = (16, 32, 64, 64), 8
LEAST_SIDE = 8  # images are halved before a convolution until they are smaller
SCALED_BY = 5000  # training images, at most, that features are scaled by
SHOWN, EPOCHS = 120_000, (2, 40)  # training images it sees where the epochs are not given, and the bounds of those
EVALUATED = 512  # images at once


@frozen
class Settings:
    epochs: int = 0  # 0: as many as show it `SHOWN` images, within `EPOCHS`
    batch: int = 64
    lr: float = 4e-3  # Adam's, falling to 0 along a half cosine
    shift: int = 1  # pixels that training images are moved by at most, a side's eighth where that is less
    seed: int = 0


class Classifier(nn.Module):
    """uint8 images [N, C, H, W] -> (features [N, D], logits [N, classes]).

    Convolutions of 3 × 3, all but the first with group norm, ReLU; the channels' means of the last one are what the classes are
    read from. No batch norm, so that an image is judged alone. Features are the channels' means of every layer: what the last one
    has learned to tell is classes, and noise may look like a class to it (docs/metrics.md has the figures).
    """

    scales: Tensor

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = (channels, *CHANNELS)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        # at the first convolution's size a norm would cost as much again
        self.norms = nn.ModuleList([nn.Identity(), *(nn.GroupNorm(GROUPS, b) for b in CHANNELS[1:])])
        self.out = nn.Linear(CHANNELS[-1], classes)
        self.register_buffer("scales", torch.ones(len(CHANNELS)))

    def means(self, x: Tensor) -> list[Tensor]:
        """Of the channels of each layer: [N, channels]."""
        x = (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)  # half the time on a CPU
        found: list[Tensor] = []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            if found and min(x.shape[2:]) >= LEAST_SIDE:
                x = F.max_pool2d(x, 2)
            x = F.relu(norm(layer(x)))
            found.append(x.mean(dim=(2, 3)))
        return found

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        means = self.means(x)
        return torch.cat([part * scale for part, scale in zip(means, self.scales, strict=True)], dim=1), self.out(means[-1])

    def scale(self, images: Iterable[Tensor]) -> None:
        """Let every layer have the same variance over these images, which come in batches, and a feature one of 1 on average."""
        layers = map(torch.cat, zip(*map(self.means, images), strict=True))
        variances = torch.stack([means.var(dim=0, correction=0).sum() for means in layers])
        self.scales.copy_((sum(CHANNELS) / len(CHANNELS) / variances.clamp_min(1e-12)).sqrt())


@frozen(eq=False)
class Judge:
    """A trained classifier in evaluation mode, and what a protocol says of it."""

    net: Classifier
    about: dict[str, Any]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] and probabilities [N, classes] of uint8 images, on the CPU."""
        parts = [self.net(part) for part in x.split(EVALUATED)]
        features, logits = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        return features, logits.softmax(dim=1)


class Labelled(Protocol):
    """What of a data set a classifier asks for."""

    def rows(self, split: str) -> Rows: ...
    def fingerprint(self) -> str: ...


@frozen
class ByFactor:
    """A data set whose labels are the values of one of its factors."""

    data: Labelled
    column: int

    def rows(self, split: str) -> Rows:
        rows = self.data.rows(split)
        return attrs.evolve(rows, labels=None if rows.factors is None else rows.factors[:, self.column].contiguous())

    def fingerprint(self) -> str:
        return self.data.fingerprint()  # the labels are in a classifier's key beside it


def labelled(data: Labelled, spec: Spec, factor: str) -> tuple[Labelled, Spec]:
    """The same data with the values of this factor as labels; by no name as they are."""
    if not factor:
        return data, spec
    return ByFactor(data, list(spec.factors).index(factor)), attrs.evolve(spec, classes=spec.factors[factor])


def lacks(data: Labelled, spec: Spec) -> list[str]:
    """Why there can be none of these data, a sentence each."""
    if not spec.classes or any(data.rows(split).labels is None for split in ("train", "held_out")):
        return ["the data have no labels, which a classifier is trained on"]
    return [f"the split {split} has no images" for split in ("train", "held_out") if not len(data.rows(split))]


def trained(data: Labelled, spec: Spec, settings: Settings, device: torch.device, progress: Progress) -> Judge:
    """The classifier of these data, from the data root or trained now. Global random state stays as it is."""
    for reason in lacks(data, spec):
        raise UserError(f"{WHAT}: {reason}")
    folder = files.data_root() / FOLDER
    key = _key(data, spec, settings)
    path = folder / f"{key[:16]}.json"
    if not path.exists():
        files.make_folder(folder)
        with files.alone(path, lambda: progress("waiting for another process that trains this classifier", 0, 1)):
            files.remove_leftovers(folder, f"-{key[:16]}")
            if not path.exists():
                net = _new(spec, settings)
                about = _train(net.to(device), data, spec, settings, progress)
                _save(path, net, {"format": FORMAT, "key": key, **about})
    return _load(path, key, _new(spec, settings), device)


def _new(spec: Spec, settings: Settings) -> Classifier:
    with Seeded(stream_seed(settings.seed, "classifier.init")):
        net = Classifier(spec.shape[0], spec.classes or 0)
    return net.to(memory_format=torch.channels_last)


def _train(net: Classifier, data: Labelled, spec: Spec, settings: Settings, progress: Progress) -> dict[str, Any]:
    rows, device = data.rows("train"), next(net.parameters()).device
    epochs = settings.epochs or min(max(-(-SHOWN // len(rows)), EPOCHS[0]), EPOCHS[1])
    batch = min(settings.batch, len(rows))
    steps = max(1, epochs * len(rows) // batch)
    order = DataOrder(len(rows), stream_seed(settings.seed, "classifier.order"))
    optimiser = torch.optim.Adam(net.parameters(), settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    shift = min(settings.shift, min(spec.shape[1:]) // 8)
    net.train()
    with torch.enable_grad():
        for step in range(steps):
            progress(f"{WHAT}: training", step, steps)
            x, labels = _images(rows, order.take(step * batch, batch), spec, device)
            x = _moved(x, shift, Streams(settings.seed, step)("classifier.shift"))
            optimiser.zero_grad()
            F.cross_entropy(net(x)[1], labels).backward()
            optimiser.step()
            schedule.step()
    net.eval()
    some = torch.randperm(len(rows), generator=Streams(settings.seed, 0)("classifier.scale"))[:SCALED_BY]
    with torch.no_grad():
        net.scale(_images(rows, at, spec, device)[0] for at in some.split(EVALUATED))
        accuracy = _accuracy(net, data.rows("held_out"), spec, device, progress)
    return {
        "network": f"4 convolutions of 3 x 3 ({', '.join(map(str, CHANNELS))} channels), group norm, max pooling, ReLU, mean over"
        f" places, linear; version {VERSION}",
        "features": f"{sum(CHANNELS)}: the channels' means of all 4 layers, each layer scaled to the same variance over images of"
        " the split train, and all to one of 1 on average",
        "classes": spec.classes,
        "trained_on": {"split": "train", "images": len(rows), "epochs": epochs, "batch": batch, "steps": steps},
        "training": f"Adam, lr {settings.lr:g} falling to 0 along a half cosine, images moved by up to {shift} pixels",
        "seed": settings.seed,
        "held_out_accuracy": accuracy,
        "held_out_images": len(data.rows("held_out")),
        "torch": torch.__version__,
    }


def _accuracy(net: Classifier, rows: Rows, spec: Spec, device: torch.device, progress: Progress) -> float:
    right = 0
    for at in torch.arange(len(rows)).split(EVALUATED):
        progress(f"{WHAT}: held-out accuracy", int(at[0]), len(rows))
        x, labels = _images(rows, at, spec, device)
        right += int((net(x)[1].argmax(dim=1) == labels).sum())
    return right / len(rows)


def _images(rows: Rows, positions: Tensor, spec: Spec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Quantised, as those are that it will judge, with their labels."""
    assert rows.labels is not None
    x = ToBytes(spec.value_range, f"{WHAT}: images of the data")(feed.images(rows, positions, spec, device))
    return x, rows.labels[rows.at(positions)].to(device)


def _moved(x: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Each image moved by −by … by pixels down and to the right; its border is repeated."""
    n, channels, height, width = x.shape
    down, right = torch.randint(-by, by + 1, (2, n, 1), generator=generator).to(x.device)
    rows, columns = (
        (torch.arange(size, device=x.device) + step).clamp(0, size - 1) for size, step in ((height, down), (width, right))
    )
    image, channel = (torch.arange(size, device=x.device) for size in (n, channels))
    return x[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


# -- keeping it ------------------------------------------------------------------------------------------------------------------


def _key(data: Labelled, spec: Spec, settings: Settings) -> str:
    """Digest of everything that a trained weight follows from: a fingerprint may know nothing of labels and splits."""
    found = hashlib.sha256()
    about = [
        VERSION,
        data.fingerprint(),
        list(spec.shape),
        spec.classes,
        list(spec.value_range),
        spec.fit,
        attrs.asdict(settings),
    ]
    found.update(json.dumps(about, sort_keys=True).encode())
    for split in ("train", "held_out"):
        rows = data.rows(split)
        assert rows.labels is not None
        at = rows.at(torch.arange(len(rows)))
        for numbers in (at, rows.labels[at]):
            found.update(numbers.to(torch.int64).contiguous().numpy().tobytes())
    return found.hexdigest()


def _save(path: Path, net: nn.Module, about: Mapping[str, Any]) -> None:
    """The weights first: the JSON file says that all is there, and which weights they are."""
    from safetensors.torch import save

    state = {name: weight.detach().cpu().contiguous() for name, weight in net.state_dict().items()}
    data = save(state)
    files.write_bytes(path.with_suffix(".safetensors"), data)
    files.write_json(path, {**about, "sha256": hashlib.sha256(data).hexdigest()})


def _load(path: Path, key: str, net: Classifier, device: torch.device) -> Judge:
    from safetensors.torch import load

    weights, remedy = path.with_suffix(".safetensors"), "remove both files, and it is trained again"
    about = files.read_json(path)
    problems = files.format_problem(about, path, FORMAT)
    if problems:
        raise UserError(f"{problems[0]}; {remedy}")
    try:
        data = weights.read_bytes()
    except OSError as error:
        raise UserError(f"{weights}: cannot be read ({error.strerror}); {remedy}") from error
    if about.get("key") != key or about.get("sha256") != hashlib.sha256(data).hexdigest():
        raise UserError(f"{weights}: is not the one that {path.name} tells of; {remedy}")
    net.load_state_dict(load(data))
    return Judge(net.to(device).eval(), {name: value for name, value in about.items() if name not in ("format", "key")})
