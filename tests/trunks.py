"""Weight files of LPIPS in torchvision's layout, with random weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn
from torchvision import models
from torchvision.models import vgg

from siv_core.use.image_distances import BACKBONES, Backbone


def trunk(backbone: str) -> nn.Sequential:
    """torchvision's features with random weights; VGG's without the classifier, which is 500 MB."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if backbone == "alex":
            return models.AlexNet(num_classes=1).features
        return vgg.make_layers(vgg.cfgs["D"])


def save(backbone: str, root: Path) -> Backbone:
    """A trunk in a data folder, and the entry of the table that fits its digest."""
    (root / "weights").mkdir()
    raw = root / "raw.pth"
    torch.save({f"features.{name}": value for name, value in trunk(backbone).state_dict().items()}, raw)
    real = BACKBONES[backbone]
    name = f"{real.trunk.rpartition('-')[0]}-{hashlib.sha256(raw.read_bytes()).hexdigest()[:8]}.pth"
    raw.rename(root / "weights" / name)
    return real._replace(trunk=name)
