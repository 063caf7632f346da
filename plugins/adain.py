"""Network `adain`: two encoders and an AdaIN decoder, for translating content between classes.

Architecture of LORD (Gabbay & Hoshen 2020) with Gaussian heads, as Soft-IntroVAE uses it (Daniel & Tamar 2021, sections 6.4 and
9.3). The class code reaches the image only through AdaIN, the content code only through the first layer: that is the whole
inductive bias. The paper names four encoder convolutions; LORD's code, and this one by default, has five.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional as F

from siv_core import Component, Gaussian, Networks, Spec, UserError, full_precision, hookimpl, option

CLASS, CONTENT = "class", "content"


@frozen
class AdaINConfig:
    dims: dict[str, int] = option({CLASS: 256, CONTENT: 128}, doc="dimensions of the class and the content code", ge=1, le=65536)
    encoder_channels: tuple[int, ...] = option(
        (64, 128, 256, 256, 256), doc="of the encoders' convolutions; all but the stem halve the size", ge=1, le=65536
    )
    encoder_hidden: tuple[int, ...] = option((256, 256), doc="units of the encoders' hidden linear layers", ge=1, le=65536)
    class_pooling: bool = option(False, doc="the class encoder averages over the pixels: it sees what is there, not where")
    content_normalisation: bool = option(False, doc="instance norm in the content encoder: it sees shapes, not colours")
    stem_kernel: int = option(
        7, doc="odd kernel size of the encoders' first convolution; 0: no stem, all halve the size", ge=0, le=15
    )
    decoder_channels: tuple[int, ...] = option(
        (256, 256, 256, 256), doc="of the decoder's blocks, each twice as large", ge=1, le=65536
    )
    output_channels: int = option(64, doc="between the decoder's last two convolutions", ge=1, le=65536)
    output_kernels: tuple[int, int] = option((5, 7), doc="odd kernel sizes of the decoder's last two convolutions", ge=1, le=15)
    normalise_content: bool = option(False, doc="instance-normalise the first map, which only the content code has made")
    slope: float = option(0.01, doc="of the leaky ReLUs; LORD's TensorFlow code has 0.3", ge=0, lt=1)
    scale: str = option("direct", doc="AdaIN multiplies by scale, or by 1 + scale", choices=("direct", "one_plus"))
    output: str = option("sigmoid", doc="last activation; sigmoid maps onto the value range", choices=("sigmoid", "linear"))


class Encoder(nn.Module):
    """x [N, C, H, W] to one Gaussian code: convolutions, then linear layers; LORD has neither normalisation nor pooling."""

    def __init__(
        self,
        channels: tuple[int, ...],
        widths: tuple[int, ...],
        stem_kernel: int,
        slope: float,
        pooling: bool,
        normalisation: bool,
    ) -> None:
        super().__init__()
        stem = [nn.Conv2d(channels[0], channels[1], stem_kernel, padding=stem_kernel // 2)] if stem_kernel else []
        down = [nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(channels[len(stem) :])]
        self.convolutions = nn.ModuleList([*stem, *down])
        self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.slope, self.pooling, self.normalisation = slope, pooling, normalisation

    def forward(self, x: Tensor) -> Gaussian:
        for layer in self.convolutions:
            x = layer(x)
            x = F.leaky_relu(normalised(x) if self.normalisation else x, self.slope)
        h = x.mean(dim=(2, 3)) if self.pooling else x.flatten(1)
        *hidden, head = self.linear
        for layer in hidden:
            h = F.leaky_relu(layer(h), self.slope)
        mu, logvar = full_precision(head, h).chunk(2, dim=1)
        return Gaussian(mu, logvar)


class TwoEncoders(nn.Module):
    """Equal encoders without shared weights, one a latent group."""

    def __init__(self, encoders: dict[str, nn.Module]) -> None:
        super().__init__()
        for group, encoder in encoders.items():
            self.add_module(group, encoder)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Gaussian]:
        return {group: encoder(x) for group, encoder in self.named_children()}


class DoublingConvolution(nn.Conv2d):
    """A 3 x 3 convolution of x [N, C, H, W] doubled by nearest neighbours, zeros around it: [N, C', 2H, 2W].

    Two neighbours in a doubled row are one pixel of x, so that each output pixel sees 2 x 2 of them: a transposed convolution of
    stride 2, whose 4 x 4 kernel sums the taps that fall together, takes 4 products where the doubled map takes 9.
    """

    taps: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        taps = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])  # from a side of the kernel to one of the wider kernel
        self.register_buffer("taps", torch.kron(taps, taps), persistent=False)  # [9, 16]

    def forward(self, x: Tensor) -> Tensor:
        kernel = full_precision(lambda weight: weight.flatten(2) @ self.taps, self.weight).unflatten(2, (4, 4))
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


class AdaINDecoder(nn.Module):
    """Content code through linear layers to a small map; blocks (doubling convolution, leaky ReLU, AdaIN); two convolutions."""

    def __init__(
        self,
        dims: dict[str, int],
        channels: tuple[int, ...],
        bottom: tuple[int, int],
        output: tuple[tuple[int, int], tuple[int, int]],
        slope: float,
        one_plus: bool,
        normalise_content: bool,
        value_range: tuple[float, float] | None,
    ) -> None:
        super().__init__()
        height, width = bottom
        flat = channels[0] * height * width
        widths = (dims[CONTENT], max(1, flat // 8), max(1, flat // 4), flat)
        self.content = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        before = (channels[0], *channels[:-1])
        self.blocks = nn.ModuleList(DoublingConvolution(a, b) for a, b in zip(before, channels, strict=True))
        self.modulation = nn.ModuleList(nn.Linear(dims[CLASS], 2 * c) for c in channels)
        inputs = (channels[-1], output[0][0])
        self.output = nn.ModuleList(nn.Conv2d(a, b, k, padding=k // 2) for a, (b, k) in zip(inputs, output, strict=True))
        self.bottom, self.slope, self.one_plus, self.value_range = bottom, slope, one_plus, value_range
        self.normalise_content = normalise_content

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None, noise: None = None) -> Tensor:
        h = codes[CONTENT]
        for layer in self.content:
            h = F.leaky_relu(layer(h), self.slope)
        x = h.unflatten(1, (-1, *self.bottom))
        if self.normalise_content:
            x = normalised(x)
        for convolution, modulation in zip(self.blocks, self.modulation, strict=True):
            x = F.leaky_relu(convolution(x), self.slope)
            x = self.adain(x, modulation(codes[CLASS]))
        wide, last = self.output
        x = full_precision(last, F.leaky_relu(wide(x), self.slope))
        if self.value_range is None:
            return x
        low, high = self.value_range
        return low + (high - low) * torch.sigmoid(x)

    def adain(self, x: Tensor, parameters: Tensor) -> Tensor:
        """Instance-normalise x [N, C, H, W] and give it the offset and scale in `parameters` [N, 2C], interleaved by channel."""
        offset, scale = parameters.unflatten(1, (-1, 2)).unbind(2)  # [N, C] each
        return normalised(x, 1 + scale if self.one_plus else scale, offset)


def normalised(x: Tensor, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """x [N, C, H, W] with mean 0 and variance 1 over the pixels of each sample and channel (population variance + 1e-5), times
    `scale` plus `offset` [N, C]: one group norm over the channels of all samples, each its own group."""
    n, c = x.shape[:2]
    maps = x.reshape(1, n * c, *x.shape[2:])
    weight, bias = (None, None) if scale is None or offset is None else (scale.flatten(), offset.flatten())
    return torch.group_norm(maps, n * c, weight, bias, eps=1e-5).view(x.shape)  # F's refuses maps of one pixel, which become 0


def build(config: AdaINConfig, spec: Spec) -> Networks:
    check(config, spec)
    channels, height, width = spec.shape
    shrink = 2 ** halvings(config)
    last = config.encoder_channels[-1]
    flat = last * (height // shrink) * (width // shrink)
    pooled = {CLASS: config.class_pooling, CONTENT: False}
    encoders = {
        group: Encoder(
            channels=(channels, *config.encoder_channels),
            widths=(last if pooled[group] else flat, *config.encoder_hidden, 2 * dim),
            stem_kernel=config.stem_kernel,
            slope=config.slope,
            pooling=pooled[group],
            normalisation=group == CONTENT and config.content_normalisation,
        )
        for group, dim in config.dims.items()
    }
    grow = 2 ** len(config.decoder_channels)
    decoder = AdaINDecoder(
        dims=config.dims,
        channels=config.decoder_channels,
        bottom=(height // grow, width // grow),
        output=((config.output_channels, config.output_kernels[0]), (channels, config.output_kernels[1])),
        slope=config.slope,
        one_plus=config.scale == "one_plus",
        normalise_content=config.normalise_content,
        value_range=spec.value_range if config.output == "sigmoid" else None,
    )
    return Networks(TwoEncoders(dict(encoders)), decoder, groups=dict(config.dims), translate=(CLASS, CONTENT))


def halvings(config: AdaINConfig) -> int:
    """How often the encoders halve the size."""
    return len(config.encoder_channels) - bool(config.stem_kernel)


def check(config: AdaINConfig, spec: Spec) -> None:
    """A `UserError` for whatever does not fit this data."""
    problems = []
    if spec.kind != "image":
        raise UserError(f"network 'adain' is for images, this data has shape {spec.shape}: use mlp")
    if spec.conditional:
        problems.append("network 'adain' takes no labels: leave train.conditional out")
    if config.dims.keys() != {CLASS, CONTENT}:
        problems.append(f"network.dims: needs the groups {CLASS} and {CONTENT}, got {', '.join(config.dims) or 'none'}")
    for name, times in (("encoder", halvings(config)), ("decoder", len(config.decoder_channels))):
        if any(size % 2**times for size in spec.shape[1:]):
            size = "x".join(map(str, spec.shape[1:]))
            problems.append(f"network.{name}_channels: images of {size} cannot be halved {times} times; give fewer channels")
    if any(kernel % 2 == 0 for kernel in (config.stem_kernel or 1, *config.output_kernels)):
        problems.append("network: stem_kernel and output_kernels must be odd")
    if problems:
        raise UserError(problems)


@hookimpl
def siv_components() -> list[Component]:
    return [
        Component(
            "network",
            "adain",
            AdaINConfig,
            build,
            "class and content encoder, AdaIN decoder: image translation",
            "arXiv:1906.11796",
        )
    ]
