"""Network `blobs`: images painted from a few Gaussian blobs, whose places, sizes and colours are decoded from z."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor, nn

from siv_core import Component, Gaussian, Networks, Spec, UserError, hookimpl, option


@frozen
class BlobsConfig:
    z_dim: int = option(8, doc="dimensions of z", ge=1)
    blobs: int = option(12, doc="blobs an image is painted from", ge=1)
    hidden: int = option(128, doc="units of the hidden layers", ge=1)


class Encoder(nn.Module):
    def __init__(self, pixels: int, hidden: int, z_dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(pixels, hidden), nn.SiLU(), nn.Linear(hidden, 2 * z_dim))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Gaussian]:
        mu, logvar = self.body(x.flatten(1)).chunk(2, dim=1)
        return {"z": Gaussian(mu, logvar)}


class Painter(nn.Module):
    """x = low + (high − low) · sigmoid(Σ_k colour_k · exp(−½ |pixel − centre_k|² / size_k²)), image corners at ±1."""

    def __init__(self, z_dim: int, hidden: int, blobs: int, spec: Spec) -> None:
        super().__init__()
        channels, height, width = spec.shape
        self.body = nn.Sequential(nn.Linear(z_dim, hidden), nn.SiLU(), nn.Linear(hidden, blobs * (3 + channels)))
        self.blobs, self.value_range = blobs, spec.value_range
        self.register_buffer("x", torch.linspace(-1, 1, width), persistent=False)
        self.register_buffer("y", torch.linspace(-1, 1, height)[:, None], persistent=False)

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None, noise: None = None) -> Tensor:
        parts = self.body(codes["z"]).unflatten(1, (self.blobs, -1))[..., None, None]  # [N, K, 3 + C, 1, 1]
        x, y, log_size = parts[:, :, :3].unbind(2)  # [N, K, 1, 1] each
        square = (self.x - x.tanh()).square() + (self.y - y.tanh()).square()  # [N, K, H, W]
        shapes = torch.exp(-0.5 * square * torch.exp(-2 * log_size.clamp(-3, 3)))
        low, high = self.value_range
        return low + (high - low) * torch.sigmoid((parts[:, :, 3:] * shapes[:, :, None]).sum(dim=1))


def build(config: BlobsConfig, spec: Spec) -> Networks:
    if spec.kind != "image":
        raise UserError(f"network 'blobs' is for images, this data has shape {spec.shape}: use mlp")
    encoder = Encoder(spec.dims, config.hidden, config.z_dim)
    return Networks(encoder, Painter(config.z_dim, config.hidden, config.blobs, spec), groups={"z": config.z_dim})


@hookimpl
def siv_components() -> list[Component]:
    return [Component("network", "blobs", BlobsConfig, build, "images painted from a few Gaussian blobs")]
