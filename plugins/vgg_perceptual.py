"""Reconstruction `vgg_perceptual`: distance of VGG-16 features, as the LORD family of papers measures reconstructions.

r(x, y) = factor · ( mean |x − y| + Σ_l mean |f_l(x) − f_l(y)| ), means over C·H·W of one sample. The f_l are relu1_2, relu2_2,
relu3_2, relu4_3 and pool5 of torchvision's VGG-16. The published codes name the convolutions before these ReLUs, but there the
ReLUs work in place and overwrite what was kept: all but the last of `glann`, which is conv4_3 itself.

Presets: `lord` (Gabbay & Hoshen 2020, PyTorch code): images in [0, 1] as they are. `normalised` (OverLORD, 2021): features of
images normalised as VGG was trained, pixels in [0, 1]. `glann` (Hoshen et al. 2019, at 64 px): images in [−1, 1], no pool5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from siv_core import Component, Spec, UserError, hookimpl, option
from siv_core.store import files, weights

FILE = "vgg16-397923af.pth"
URL = f"https://download.pytorch.org/models/{FILE}"
SHA256_BEGINS = "397923af"  # torchvision publishes these eight digits, in the file's name, and no more

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


@frozen
class VGGPerceptualConfig:
    preset: str = option(
        "lord",
        doc="lord: 5 layers of images in [0, 1]; normalised: as VGG was trained; glann: 4 layers of images in [−1, 1]",
        choices=tuple(PRESETS),
    )
    factor: float = option(0.0, doc="multiplies the distance; 0: C·H·W, so that a scale of 1/(C·H·W) gives it back", ge=0)
    weights: str = option(
        "imagenet", doc="random needs no file and is no perceptual loss: to try the machinery", choices=("imagenet", "random")
    )
    weights_file: str = option("", doc=f"torchvision's {FILE}; empty: weights/{FILE} in the data folder", place=True)


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
        self.preset, self.factor, self.value_range, self.weights_file = PRESETS[preset], factor, value_range, weights_file
        self.identity: dict[str, str | None] = {"network": "VGG-16", "preset": preset, "weights": source, "sha256": None}
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
        return f"the weights of VGG-16 are not at hand: get {URL} and put it at {self.weights_file}"

    def prepare(self) -> None:
        """Load the weights; the classifier's are left where they are."""
        if self.ready:
            return
        data, sha256 = weights.read(self.weights_file, SHA256_BEGINS, f"get it from {URL}")
        state = weights.state_dict(data, self.weights_file)
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
    file = Path(config.weights_file) if config.weights_file else files.data_root() / "weights" / FILE
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
