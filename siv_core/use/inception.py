"""Inception-v3 as FID takes it: torch-fidelity's network, with weights from a file whose digest was checked.

Nothing is downloaded, and nothing of the file is unpickled but tensors.
"""

from __future__ import annotations

import io
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from siv_core.errors import UserError
from siv_core.seeding import Seeded
from siv_core.store import files, weights

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # pytorch-fid's pt_inception-… has the same bytes
LAYER = "2048"  # torch-fidelity's name of the pooled features before the classifier


class Inception(nn.Module):
    """uint8 [N, 1 or 3, H, W] -> features [N, 2048], float32; grey is repeated to three channels.

    torch-fidelity resizes to 299 × 299 as TensorFlow 1 did (bilinear, corners not aligned, no antialiasing) and scales to
    (x − 128) / 128.
    """

    def __init__(self, net: nn.Module, sha256: str) -> None:
        super().__init__()
        self.net, self.sha256 = net, sha256

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net(x.expand(-1, 3, -1, -1))[0]

    def about(self) -> dict[str, Any]:
        """What identifies the features, for a protocol."""
        return {
            "network": "Inception-v3 of FID, 2048 pooled features",
            "weights": FILE,
            "sha256": self.sha256,
            "resize": "to 299 x 299, bilinear as in TensorFlow 1, without antialiasing, by torch-fidelity",
            "input": "uint8, (x - 128) / 128; grey repeated to 3 channels",
        }


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "torch-fidelity")}


def path_of(weights_file: str) -> Path:
    """Where the weights are looked for: at a user's own place, or in the data root."""
    return Path(weights_file) if weights_file else files.data_root() / "weights" / FILE


def missing(path: Path) -> str | None:
    """What is not at hand and what would bring it; looks at names alone."""
    if util.find_spec("torch_fidelity") is None:
        return "torch-fidelity is not installed: pip install 'siv[metrics]'"
    if not path.is_file():
        return f"the weights of Inception-v3 are not at hand: get {URL} and put it at {path}"
    return None


def load(path: Path, device: torch.device) -> Inception:
    """The network in evaluation mode. A `UserError` where it is not at hand, or the file is another one."""
    lacking = missing(path)
    if lacking:
        raise UserError(lacking)
    data, sha256 = weights.read(path, SHA256, f"get it from {URL}")
    state = weights.state_dict(data, path)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    checked = io.BytesIO()  # torch-fidelity unpickles what it is given: it is given what was read as tensors alone
    torch.save(state, checked)
    checked.seek(0)
    try:
        with Seeded(0):  # its layers are initialised before they are loaded
            net = FeatureExtractorInceptionV3("inception-v3", [LAYER], feature_extractor_weights_path=checked)
    except RuntimeError as error:
        raise UserError(f"{path}: is not a state of torch-fidelity's Inception-v3 ({_first(error)})") from error
    return Inception(net, sha256).to(device).eval()


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
