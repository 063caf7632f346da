"""Network `residual_cnn`: convolutional encoder and decoder with residual blocks, one latent group `z`.

Architecture of IntroVAE (Huang et al. 2018, appendix) as Soft-IntroVAE's published code has it (Daniel & Tamar 2021, table 6):

    encoder   conv 5×5, norm, leaky ReLU, halve; a block and halve for each further entry of `channels`; a block; linear
    decoder   linear, ReLU; a block and double for each entry from the last to the first; a block; conv 5×5
    block     leaky ReLU(norm(conv 3×3(leaky ReLU(norm(conv 3×3(x))))) + x), x through a conv 1×1 where the width changes

Labels, where networks are given them, are joined one-hot to what each linear layer gets: "class-conditional" of section 6.3.
Published channels, with norm = "batch", slope 0.2 and a linear output: (64, 128) at 28 px, (64, 128, 256) at 32,
(64, 128, 256, 512, 512) at 128, (64, 128, 256, 512, 512, 512) at 256, (16, 32, 64, 128, 256, 512, 512, 512) at 1024.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional as F

from siv_core import Component, Gaussian, Networks, Spec, UserError, full_precision, hookimpl, option, with_labels

MakeNorm = Callable[[int], nn.Module]  # channels -> the norm behind a convolution


@frozen
class ResidualCNNConfig:
    channels: tuple[int, ...] = option(
        (64, 128, 256),
        doc="of the encoder, each at half the size of the one before; the decoder's in reverse",
        ge=1,
        le=65536,
    )
    z_dim: int = option(128, doc="dimensions of z", ge=1, le=65536)
    norm: str = option("group", doc="behind the convolutions; batch is the published one", choices=("batch", "group", "none"))
    norm_groups: int = option(8, doc="into which norm = group parts the channels", ge=1, le=1024)
    slope: float = option(0.2, doc="of the leaky ReLUs", ge=0, lt=1)
    output: str = option("linear", doc="of the decoder; sigmoid maps onto the data's value range", choices=("linear", "sigmoid"))


class Block(nn.Module):
    """x [N, before, H, W] to [N, after, H, W]."""

    def __init__(self, before: int, after: int, norm: MakeNorm, slope: float) -> None:
        super().__init__()
        self.first, self.first_norm = convolution(before, after, 3, norm)
        self.second, self.second_norm = convolution(after, after, 3, norm)
        self.skip = nn.Identity() if before == after else nn.Conv2d(before, after, 1, bias=False)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.first_norm(self.first(x)), self.slope)
        return F.leaky_relu(self.second_norm(self.second(h)) + self.skip(x), self.slope)


class Encoder(nn.Module):
    """x [N, C, H, W] to the Gaussian code z."""

    def __init__(
        self, channels: tuple[int, ...], features: int, heads: int, norm: MakeNorm, slope: float, conditions: int
    ) -> None:
        super().__init__()
        self.stem, self.stem_norm = convolution(channels[0], channels[1], 5, norm)
        self.blocks = nn.ModuleList(Block(a, b, norm, slope) for a, b in pairwise(channels[1:]))
        self.last = Block(channels[-1], channels[-1], norm, slope)
        self.head = nn.Linear(features + conditions, heads)
        self.slope, self.conditions = slope, conditions

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Gaussian]:
        h = F.avg_pool2d(F.leaky_relu(self.stem_norm(self.stem(x)), self.slope), 2)
        for block in self.blocks:
            h = F.avg_pool2d(block(h), 2)
        h = with_labels(self.last(h).flatten(1), labels, self.conditions)
        mu, logvar = full_precision(self.head, h).chunk(2, dim=1)
        return {"z": Gaussian(mu, logvar)}


class Decoder(nn.Module):
    """z [N, d] to images [N, C, H, W]."""

    def __init__(
        self,
        widths: tuple[int, ...],
        z_dim: int,
        bottom: tuple[int, int],
        images: int,
        norm: MakeNorm,
        slope: float,
        conditions: int,
        value_range: tuple[float, float] | None,
    ) -> None:
        super().__init__()
        height, width = bottom
        self.first = nn.Linear(z_dim + conditions, widths[0] * height * width)
        self.blocks = nn.ModuleList(Block(a, b, norm, slope) for a, b in pairwise((widths[0], *widths)))
        self.last = Block(widths[-1], widths[-1], norm, slope)
        self.image = nn.Conv2d(widths[-1], images, 5, padding=2)
        self.bottom, self.conditions, self.value_range = bottom, conditions, value_range

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None, noise: None = None) -> Tensor:
        h = F.relu(self.first(with_labels(codes["z"], labels, self.conditions))).unflatten(1, (-1, *self.bottom))
        for block in self.blocks:
            h = F.interpolate(block(h), scale_factor=2.0, mode="nearest")
        x = full_precision(self.image, self.last(h))
        if self.value_range is None:
            return x
        low, high = self.value_range
        return low + (high - low) * torch.sigmoid(x)


def convolution(before: int, after: int, kernel: int, norm: MakeNorm) -> tuple[nn.Conv2d, nn.Module]:
    """A convolution that keeps the size and its norm, which has an offset of its own where there is one."""
    made = norm(after)
    return nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=isinstance(made, nn.Identity)), made


def build(config: ResidualCNNConfig, spec: Spec) -> Networks:
    check(config, spec)
    norms: dict[str, MakeNorm] = {
        "batch": nn.BatchNorm2d,
        "group": partial(nn.GroupNorm, config.norm_groups),
        "none": lambda channels: nn.Identity(),
    }
    norm = norms[config.norm]
    images, height, width = spec.shape
    shrink = 2 ** len(config.channels)
    bottom = height // shrink, width // shrink
    conditions = (spec.classes or 0) if spec.conditional else 0
    features = config.channels[-1] * bottom[0] * bottom[1]
    encoder = Encoder((images, *config.channels), features, 2 * config.z_dim, norm, config.slope, conditions)
    onto = spec.value_range if config.output == "sigmoid" else None
    decoder = Decoder(config.channels[::-1], config.z_dim, bottom, images, norm, config.slope, conditions, onto)
    return Networks(encoder, decoder, groups={"z": config.z_dim}, batch_statistics=config.norm == "batch")


def check(config: ResidualCNNConfig, spec: Spec) -> None:
    """A `UserError` for whatever does not fit this data."""
    if spec.kind != "image":
        raise UserError(f"network 'residual_cnn' is for images, this data has shape {spec.shape}: use mlp")
    problems, times = [], len(config.channels)
    if not times:
        problems.append("network.channels: give one number of channels at least")
    if any(size % 2**times for size in spec.shape[1:]):
        size = "x".join(map(str, spec.shape[1:]))
        problems.append(f"network.channels: images of {size} cannot be halved {times} times: give fewer, or set data.size")
    uneven = sorted({width for width in config.channels if width % config.norm_groups})
    if config.norm == "group" and uneven:
        several = ", ".join(map(str, uneven))
        problems.append(f"network.norm_groups: {several} channels cannot be parted into {config.norm_groups} equal groups")
    if problems:
        raise UserError(problems)


@hookimpl
def siv_components() -> list[Component]:
    summary = "convolutional encoder and decoder of residual blocks, for images; class-conditional with train.conditional"
    return [Component("network", "residual_cnn", ResidualCNNConfig, build, summary, "arXiv:1807.06358")]
