"""Network `style`: an encoder of styles and a style-based decoder, which grow from 4 × 4 pixels stage by stage.

Architecture of ALAE (Pidhorskyi et al. 2020, arXiv:2004.04467) with the generator of StyleGAN (Karras et al. 2019,
arXiv:1812.04948), as Soft-IntroVAE's published code has it (Daniel & Tamar 2021, sections 6.2 and 9.2):

    encoder   w_E = Σ over blocks and their two layers of C_i [mean; standard deviation] of its maps;  (mu, log σ²) = F_E(w_E)
    decoder   w = F_D(z / √⟨z²⟩);  x = to_rgb of blocks that take (scale, offset) = A_i w, two layers a block, from a constant

K blocks go from 4 to 4 · 2^(K−1) pixels; block k has min(max_channels, start_channels · 2^(K−1−k)) of them. A stage of a recipe
with a smaller `data.size` uses the coarse blocks alone, and the new one fades in (Karras et al. 2018, arXiv:1710.10196).
Learning rates are equalised: a weight is what it is in use, and `lr_factors` holds what other implementations multiply it with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from attrs import frozen
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from siv_core import Component, Gaussian, Networks, Spec, Stage, UserError, full_precision, hookimpl, option, with_labels

COARSEST = 4  # pixels a side of the first block
FUSED_FROM = 128  # pixels a side from which a convolution doubles or halves by itself
MAPPING_RATE = 0.1  # on the learning rate of the mappings' layers
SLOPE = 0.2


@frozen
class StyleConfig:
    start_channels: int = option(64, doc="of the finest block", ge=1, le=4096)
    max_channels: int = option(512, doc="of any block", ge=1, le=4096)
    z_dim: int = option(512, doc="dimensions of z and of a style", ge=1, le=65536)
    encoder_mapping: int = option(3, doc="layers from the encoder's styles to the posterior", ge=1, le=64)
    decoder_mapping: int = option(8, doc="layers from z to the decoder's styles", ge=1, le=64)
    noise: bool = option(True, doc="each layer of the decoder adds noise, one plane for all channels, at learned strengths")
    style_mixing: float = option(
        0.9,
        doc="share of the training's samples of the prior whose finer layers have the style of another z ~ N(0, I)",
        ge=0,
        le=1,
    )
    truncated_layers: int = option(8, doc="a truncation moves the styles of so many layers, the coarsest; 0: of all", ge=0)
    published: bool = option(
        False,
        doc="as the published code has it, for released weights: two leaky ReLUs behind from_rgb and one on mu and log σ², no"
        " epsilon in standard deviations, and without noise a fixed bump in its place",
    )


# -- layers ----------------------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """Weights drawn at gain / √inputs; `rate` times that is the factor on their learning rate, `rate` that of the bias."""

    def __init__(self, inputs: int, outputs: int, gain: float = math.sqrt(2), rate: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        self.rates = initialise(self, gain, inputs, rate)


class Convolution(nn.Conv2d):
    """Of odd kernels, keeping the size, or at `scale` 2 or ½ doubling or halving it by 4 × 4 kernels: the 3 × 3 one summed over
    its four neighbouring places, which is that before a halving by means or, turned round, behind a doubling by repetition."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, gain: float = math.sqrt(2), *, bias: bool = True, scale: float = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.rates, self.scale = initialise(self, gain, inputs * kernel**2), scale

    def forward(self, x: Tensor) -> Tensor:
        if self.scale == 1:
            return super().forward(x)
        wide = F.pad(self.weight, (1, 1, 1, 1))
        wide = wide[:, :, 1:, 1:] + wide[:, :, :-1, 1:] + wide[:, :, 1:, :-1] + wide[:, :, :-1, :-1]
        if self.scale > 1:
            return F.conv_transpose2d(x, wide.transpose(0, 1), self.bias, stride=2, padding=1)
        return F.conv2d(x, wide / 4, self.bias, stride=2, padding=1)


def initialise(layer: nn.Linear | nn.Conv2d, gain: float, fan_in: int, rate: float = 1.0) -> dict[str, float]:
    """Draw the weights, and what their learning rate is multiplied with: {parameter: factor}."""
    std = gain / math.sqrt(fan_in)
    nn.init.normal_(layer.weight, 0.0, std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return {"weight": rate * std, **({"bias": rate} if layer.bias is not None else {})}


def equalised(module: nn.Module) -> dict[str, float]:
    """{parameter: factor on the learning rate} of all layers in it; the others have 1."""
    layers = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, Linear | Convolution))
    return {f"{name}.{of}": factor for name, layer in layers for of, factor in layer.rates.items()}


def blur(x: Tensor) -> Tensor:
    """[1 2 1] ⊗ [1 2 1] / 16 on every channel, zeros outside: two means of 2 × 2."""
    return F.avg_pool2d(F.avg_pool2d(x, 2, 1, padding=1), 2, 1)


def fused(k: int) -> bool:
    """Whether block k's convolution doubles or halves by itself."""
    return COARSEST << k >= FUSED_FROM


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Mapping(nn.Module):
    """Layers with leaky ReLUs between them, and behind the last one if `closed`."""

    def __init__(self, widths: tuple[int, ...], *, closed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(a, b, rate=MAPPING_RATE) for a, b in pairwise(widths))
        self.closed = closed

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.leaky_relu(layer(x), SLOPE)
        x = full_precision(last, x)
        return F.leaky_relu(x, SLOPE) if self.closed else x


# -- encoder ---------------------------------------------------------------------------------------------------------------------


class EncoderBlock(nn.Module):
    """x [N, inputs, H, W] to [N, outputs, H/2, W/2] and what its two layers add to the style, [N, d]."""

    def __init__(self, inputs: int, outputs: int, k: int, config: StyleConfig) -> None:
        super().__init__()
        d = config.z_dim
        self.fused, self.eps = fused(k), 0.0 if config.published else 1e-8
        self.first = Convolution(inputs, inputs, 3)
        self.second = Convolution(inputs, outputs, 3, scale=0.5 if self.fused else 1)
        self.first_style, self.second_style = Linear(2 * inputs, d), Linear(2 * outputs, d)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, first = self.read(F.leaky_relu(self.first(x), SLOPE))
        x = self.second(blur(x))
        x, second = self.read(F.leaky_relu(x if self.fused else F.avg_pool2d(x, 2), SLOPE))
        return x, self.first_style(first) + self.second_style(second)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x with mean 0 and variance 1 over the pixels, and what was taken out of it: [N, 2C]."""
        var, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        return F.group_norm(x, x.shape[1], eps=1e-5), torch.cat([mean, torch.sqrt(var + self.eps)], dim=1)


class Encoder(nn.Module):
    """x [N, C, H, W] of the stage's size to the Gaussian code z."""

    def __init__(self, config: StyleConfig, spec: Spec, widths: tuple[int, ...], conditions: int) -> None:
        super().__init__()
        (low, high), d = spec.value_range, config.z_dim
        outputs = (min(config.max_channels, 2 * widths[0]), *widths[:-1])
        self.from_rgb = nn.ModuleList(Convolution(spec.shape[0], width, 1) for width in widths)
        self.blocks = nn.ModuleList(EncoderBlock(a, b, k, config) for k, (a, b) in enumerate(zip(widths, outputs, strict=True)))
        hidden = (d,) * (config.encoder_mapping - 1)
        self.mapping = Mapping((d + conditions, *hidden, 2 * d), closed=config.published)
        self.slope = SLOPE**2 if config.published else SLOPE
        self.conditions, self.centre, self.extent = conditions, (low + high) / 2, (high - low) / 2
        self.stage = Growth(len(widths))

    def set_stage(self, stage: Stage) -> None:
        self.stage.enter(stage)

    def lr_factors(self) -> dict[str, float]:
        return equalised(self)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Gaussian]:
        k, fade = self.stage
        h, style = self.blocks[k](self.features(x, k))
        if fade is not None:
            below = self.features(F.avg_pool2d(x, 2), k - 1)
            h = torch.lerp(below.to(h.dtype), h, fade.to(h.dtype))  # on CUDA autocast leaves norms in float32, not convolutions
            style = style * fade.to(style.dtype)
        for block in reversed(self.blocks[:k]):
            h, more = block(h)
            style = style + more
        mu, logvar = self.mapping(with_labels(style, labels, self.conditions)).chunk(2, dim=1)
        return {"z": Gaussian(mu, logvar)}

    def features(self, x: Tensor, k: int) -> Tensor:
        return F.leaky_relu(self.from_rgb[k]((x - self.centre) / self.extent), self.slope)


# -- decoder ---------------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Noise, bias, leaky ReLU, instance norm and style behind a convolution."""

    def __init__(self, channels: int, style: int, bump: float, *, noisy: bool) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(channels)) if noisy else None
        self.bias = nn.Parameter(torch.zeros(channels))
        self.style = Linear(style, 2 * channels, gain=1)
        self.bump = bump  # the width of what stands in for noise, 0: nothing does

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """x [N, C, H, W] with style w [N, d] and noise [N, 1, H, W]."""
        bias = self.bias[:, None, None]
        if noise is not None and self.strength is not None:
            x = x + torch.addcmul(bias, self.strength[:, None, None], noise).to(x.dtype)
        elif self.bump:
            x = x + 0.8 * self.bump / math.sqrt(2 * math.pi) * torch.exp(-x.square() / (2 * self.bump**2)) + bias
        else:
            x = x + bias.to(x.dtype)
        x = F.group_norm(F.leaky_relu(x, SLOPE), x.shape[1], eps=1e-8)
        scale, offset = self.style(w)[..., None, None].chunk(2, dim=1)
        return torch.addcmul(offset, x, 1 + scale)


class DecoderBlock(nn.Module):
    """x [N, inputs, H, W] to [N, outputs, 2H, 2W]; the first one keeps the size."""

    def __init__(self, inputs: int, outputs: int, k: int, config: StyleConfig) -> None:
        super().__init__()
        bump = math.sqrt(k + 1) if config.published else 0.0
        self.fused = fused(k)
        self.grow = Convolution(inputs, outputs, 3, bias=False, scale=2 if self.fused else 1) if k else None
        self.keep = Convolution(outputs, outputs, 3, bias=False)
        self.layers = nn.ModuleList(Layer(outputs, config.z_dim, bump, noisy=config.noise) for _ in range(2))

    def forward(self, x: Tensor, styles: Tensor, noise: tuple[Tensor | None, Tensor | None]) -> Tensor:
        if self.grow is not None:
            x = blur(self.grow(x if self.fused else double(x)))
        x = self.layers[0](x, styles[:, 0], noise[0])
        return self.layers[1](self.keep(x), styles[:, 1], noise[1])


class Decoder(nn.Module):
    """z [N, d] to images [N, C, H, W] of the stage's size, by way of styles [N, 2K, d], one a layer, coarse to fine."""

    def __init__(self, config: StyleConfig, spec: Spec, widths: tuple[int, ...], conditions: int) -> None:
        super().__init__()
        (low, high), d = spec.value_range, config.z_dim
        self.mapping = Mapping((d + conditions, *(d,) * config.decoder_mapping), closed=True)
        self.constant = nn.Parameter(torch.ones(1, widths[0], COARSEST, COARSEST))
        self.blocks = nn.ModuleList(DecoderBlock(a, b, k, config) for k, (a, b) in enumerate(pairwise((widths[0], *widths))))
        self.to_rgb = nn.ModuleList(Convolution(width, spec.shape[0], 1, gain=0.03) for width in widths)
        self.conditions, self.z_dim, self.noisy, self.mixing = conditions, d, config.noise, config.style_mixing
        self.truncated_layers = config.truncated_layers or 2 * len(widths)
        self.centre, self.extent = (low + high) / 2, (high - low) / 2
        self.stage = Growth(len(widths))

    def set_stage(self, stage: Stage) -> None:
        self.stage.enter(stage)

    def lr_factors(self) -> dict[str, float]:
        return equalised(self)

    @property
    def layers_in_use(self) -> int:
        """Of the 2K, at the size of the present stage."""
        return 2 * (self.stage.level + 1)

    def draw(self, n: int, generator: Generator, use: str) -> dict[str, Any]:
        """Planes of noise for each layer; for training's samples of the prior another z, and the layer from which it holds."""
        device, layers = generator.device, self.layers_in_use
        drawn: dict[str, Any] = {}
        if self.noisy:
            sides = [COARSEST << (layer // 2) for layer in range(layers)]
            drawn["planes"] = tuple(torch.randn(n, 1, side, side, generator=generator, device=device) for side in sides)
        if use == "prior" and self.mixing:
            mixed = torch.rand(n, generator=generator, device=device) < self.mixing
            first = torch.randint(1, layers + 1, (n,), generator=generator, device=device)
            drawn["z"] = torch.randn(n, self.z_dim, generator=generator, device=device)
            drawn["from"] = torch.where(mixed, first, layers)  # at 2K, and at `layers` of this stage, nothing of it is seen
        return drawn

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None, noise: Any = None) -> Tensor:
        styles, noise = self.styles(codes, labels), noise or {}
        if "z" in noise:
            other = self.styles({"z": noise["z"]}, labels)
            own = torch.arange(styles.shape[1], device=styles.device) < noise["from"][:, None]
            styles = torch.where(own[..., None], styles, other)
        return self.render(styles, noise)

    def styles(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
        """w of z for every layer, [N, 2K, d]."""
        z = codes["z"]
        direction = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        w = self.mapping(with_labels(direction, labels, self.conditions))
        # in memory as styles that were kept are: products of matrices round by how these lie
        return w[:, None].repeat(1, 2 * len(self.blocks), 1)

    def render(self, styles: Tensor, noise: Any = None) -> Tensor:
        """Images of styles [N, 2K, d]; without noise nothing is random."""
        k, fade = self.stage
        planes: tuple[Tensor | None, ...] = (noise or {}).get("planes", (None,) * (2 * k + 2))
        h = self.constant.repeat(len(styles), 1, 1, 1)
        before: Tensor | None = None
        for i, block in enumerate(self.blocks[: k + 1]):
            if i == k and fade is not None:
                before = double(full_precision(self.to_rgb[k - 1], h))
            h = block(h, styles[:, 2 * i : 2 * i + 2], (planes[2 * i], planes[2 * i + 1]))
        x = full_precision(self.to_rgb[k], h)
        if before is not None and fade is not None:
            x = torch.lerp(before, x, fade.to(x.dtype))
        return self.centre + self.extent * x


# -- growing ---------------------------------------------------------------------------------------------------------------------


class Growth:
    """Which block is the finest in use, and how far it has faded in: None where it has, or where there is none before it."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.level = blocks, blocks - 1
        self.fade: Tensor | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.level, self.fade))

    def enter(self, stage: Stage) -> None:
        sizes = [COARSEST << k for k in range(self.blocks)]
        if stage.shape[1] not in sizes or stage.shape[1] != stage.shape[2]:
            size, known = " × ".join(map(str, stage.shape[1:])), ", ".join(map(str, sizes))
            raise UserError(f"data.size: network 'style' has blocks for {known} pixels a side, not for {size}")
        self.level = sizes.index(stage.shape[1])
        self.fade = stage.fade if self.level else None


def build(config: StyleConfig, spec: Spec) -> Networks:
    levels = check(config, spec)
    widths = tuple(min(config.max_channels, config.start_channels << k) for k in reversed(range(levels)))
    conditions = (spec.classes or 0) if spec.conditional else 0
    encoder, decoder = (made(config, spec, widths, conditions) for made in (Encoder, Decoder))
    return Networks(
        encoder, decoder, groups={"z": config.z_dim}, normal_prior="network.style_mixing" if config.style_mixing else ""
    )


def check(config: StyleConfig, spec: Spec) -> int:
    """How many blocks there are; a `UserError` for data of another kind."""
    if spec.kind != "image":
        raise UserError(f"network 'style' is for images, this data has shape {spec.shape}: use mlp")
    _, height, width = spec.shape
    levels = (height // COARSEST).bit_length()
    if not levels or height != width or COARSEST << (levels - 1) != height:
        size = f"{height} × {width}"
        raise UserError(f"network 'style' is for squares of 4, 8, 16, 32, … pixels a side, not for {size}: set data.size")
    return levels


@hookimpl
def siv_components() -> list[Component]:
    summary = "style-based encoder and decoder that grow from 4 × 4 pixels by stages, for images"
    return [Component("network", "style", StyleConfig, build, summary, "arXiv:2012.13253")]
