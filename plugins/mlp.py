"""Network `mlp`: fully connected encoder and decoder with one latent group `z`, for arrays and small images."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from attrs import frozen
from torch import Tensor, nn

from siv_core import Component, Gaussian, Networks, Spec, full_precision, hookimpl, option, with_labels


@frozen
class MLPConfig:
    z_dim: int = option(2, doc="dimensions of z", ge=1, le=65536)
    hidden: tuple[int, ...] = option((256, 256, 256, 256), doc="units of the hidden layers, encoder order", ge=1, le=65536)
    slope: float = option(0.0, doc="of the activation below zero; 0 is ReLU", ge=0, lt=1)
    output: str = option("linear", doc="of the decoder; sigmoid maps onto the data's value range", choices=("linear", "sigmoid"))


def layers(widths: tuple[int, ...], slope: float) -> nn.Sequential:
    """Linear layers with an activation between, none after the last."""
    parts: list[nn.Module] = []
    for before, after in pairwise(widths):
        parts += [nn.Linear(before, after), nn.LeakyReLU(slope) if slope else nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def through(body: nn.Sequential, x: Tensor) -> Tensor:
    *hidden, last = body
    for layer in hidden:
        x = layer(x)
    return full_precision(last, x)


class Encoder(nn.Module):
    def __init__(self, widths: tuple[int, ...], slope: float, conditions: int) -> None:
        super().__init__()
        self.conditions = conditions
        self.body = layers((widths[0] + conditions, *widths[1:-1], 2 * widths[-1]), slope)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Gaussian]:
        h = with_labels(x.flatten(1), labels, self.conditions)  # [N, D + conditions]
        mu, logvar = through(self.body, h).chunk(2, dim=1)
        return {"z": Gaussian(mu, logvar)}


class Decoder(nn.Module):
    def __init__(
        self,
        widths: tuple[int, ...],
        slope: float,
        conditions: int,
        shape: tuple[int, ...],
        value_range: tuple[float, float] | None,
    ) -> None:
        super().__init__()
        self.conditions, self.shape, self.value_range = conditions, shape, value_range
        self.body = layers((widths[0] + conditions, *widths[1:]), slope)

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None, noise: None = None) -> Tensor:
        x = through(self.body, with_labels(codes["z"], labels, self.conditions)).unflatten(1, self.shape)
        if self.value_range is None:
            return x
        low, high = self.value_range
        return low + (high - low) * torch.sigmoid(x)


def build(config: MLPConfig, spec: Spec) -> Networks:
    conditions = (spec.classes or 0) if spec.conditional else 0
    widths = (math.prod(spec.shape), *config.hidden, config.z_dim)
    onto = spec.value_range if config.output == "sigmoid" else None
    return Networks(
        Encoder(widths, config.slope, conditions),
        Decoder(widths[::-1], config.slope, conditions, spec.shape, onto),
        groups={"z": config.z_dim},
    )


@hookimpl
def siv_components() -> list[Component]:
    return [Component("network", "mlp", MLPConfig, build, "fully connected, one latent group z")]
