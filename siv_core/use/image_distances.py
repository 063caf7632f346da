"""How far images are from others: MSE, PSNR, SSIM and LPIPS, one number an image; and the nearest of many.

All compare images in [0, 1]: `unit` brings them there. What cannot be computed is told with its reason.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siv_core.errors import UserError
from siv_core.store import files, weights

Distance = Callable[[Tensor, Tensor], Tensor]  # (image, truth), both [N, C, H, W] in [0, 1] -> [N]

LEAST_MSE = 1e-10  # keeps the PSNR of equal images finite, at 100 dB
SSIM_WINDOW, SSIM_SIGMA, SSIM_K = 11, 1.5, (0.01, 0.03)
LPIPS_PIXELS = 1 << 16  # of the images compared at once: VGG's feature maps take about 2 kB a pixel
LPIPS_NAMES = ("alex", "vgg")
PROTOCOL: dict[str, Any] = {  # of the values that need no weights
    "psnr": {"peak": 1, "least_mse": LEAST_MSE},
    "ssim": {"window": SSIM_WINDOW, "sigma": SSIM_SIGMA, "k": list(SSIM_K), "data_range": 1, "padding": "valid"},
}


def unit(x: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Images of this value range in [0, 1]; what lies outside is clamped to it."""
    low, high = value_range
    return ((x - low) / (high - low)).clamp(0, 1)


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean of (x − y)² over C·H·W, [N]."""
    return (x - y).square().flatten(1).mean(dim=1)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [N]: −10 log₁₀ of the mean squared error, for a peak of 1."""
    return -10 * torch.log10(mse(x, y).clamp_min(LEAST_MSE))


def _windows(size: int, like: Tensor) -> Tensor:
    """[size - 10, size]: each row a window. On a CPU two small matrix products are several times faster than a convolution."""
    offsets = torch.arange(SSIM_WINDOW, dtype=like.dtype, device=like.device) - SSIM_WINDOW // 2
    weights = torch.softmax(-offsets.square() / (2 * SSIM_SIGMA**2), dim=0)
    matrix = like.new_zeros(size - SSIM_WINDOW + 1, size)
    for row in range(len(matrix)):
        matrix[row, row : row + SSIM_WINDOW] = weights
    return matrix


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, equation 13) [N]: mean over channels and every whole window; data range 1."""
    down, across = _windows(x.shape[2], x), _windows(x.shape[3], x).T
    mu_x, mu_y, xx, yy, xy = (down @ image @ across for image in (x, y, x * x, y * y, x * y))
    c1, c2 = (k**2 for k in SSIM_K)
    luminance = (2 * mu_x * mu_y + c1) / (mu_x.square() + mu_y.square() + c1)
    structure = (2 * (xy - mu_x * mu_y) + c2) / (xx - mu_x.square() + yy - mu_y.square() + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


class Backbone(NamedTuple):
    trunk: str  # torchvision's file: the first 8 digits of its sha256 stand before the suffix
    heads: str  # sha256 of the linear heads v0.1 that come with the package lpips
    smallest: int  # pixels a side below which a pooling layer has nothing left


BACKBONES = {
    "alex": Backbone("alexnet-owt-7be5be79.pth", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0", 31),
    "vgg": Backbone("vgg16-397923af.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868", 16),
}


def read_weights(backbone: str) -> tuple[tuple[bytes, str], tuple[bytes, str]]:
    """Trunk and heads, each as bytes with their sha256."""
    trunk, heads, _ = BACKBONES[backbone]
    path = files.data_root() / "weights" / trunk
    bundled = importlib.metadata.distribution("lpips").locate_file(f"lpips/weights/v0.1/{backbone}.pth")
    return (
        weights.read(
            path, path.stem.rpartition("-")[2], f"download https://download.pytorch.org/models/{trunk} into {path.parent}"
        ),
        weights.read(Path(str(bundled)), heads, "pip install --force-reinstall --no-deps lpips==0.1.4"),
    )


def lpips_distance(backbone: str, device: torch.device) -> tuple[Distance, dict[str, str]]:
    """LPIPS v0.1 (Zhang et al. 2018) with weights checked on the very bytes that are loaded, and what identifies it."""
    (trunk, trunk_sha256), (heads, heads_sha256) = read_weights(backbone)
    with warnings.catch_warnings():
        # lpips 0.1.4, its last release, asks torchvision for an untrained trunk by an argument that was renamed in 0.13
        warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated", UserWarning)
        warnings.filterwarnings("ignore", "Arguments other than a weight enum", UserWarning)
        import lpips

        # on "meta" nothing is initialised: no random number is used up, and VGG's 500 MB classifier is never made
        with torch.device("meta"):
            net = lpips.LPIPS(net=backbone, version="0.1", pretrained=False, pnet_rand=True, verbose=False)
    its, state = (weights.state_dict(data, Path(backbone)) for data in (trunk, heads))
    state.update({f"net.{name}": its["features." + name.partition(".")[2]] for name in net.net.state_dict()})
    net.load_state_dict(state, strict=False, assign=True)  # not strict: lpips has its heads under two names each
    net.to(device).eval()

    def distance(x: Tensor, y: Tensor) -> Tensor:
        size = max(1, LPIPS_PIXELS // (x.shape[2] * x.shape[3]))
        pairs = zip(*((2 * image.expand(-1, 3, -1, -1) - 1).split(size) for image in (x, y)), strict=True)
        return torch.cat([net(a, b).flatten() for a, b in pairs])

    about = {"package": importlib.metadata.version("lpips"), "version": "0.1", "input": "[-1, 1], grey repeated to 3 channels"}
    return distance, {**about, "trunk_sha256": trunk_sha256, "heads_sha256": heads_sha256}


def needs(backbones: Iterable[str]) -> list[str]:
    """A line for each of these backbones of LPIPS whose weights are not at hand, with the remedy."""
    problems = []
    for backbone in backbones:
        try:
            read_weights(backbone)
        except UserError as error:
            problems.append(f"lpips_{backbone}: {error}")
    return problems


def available(
    shape: Sequence[int], backbones: Iterable[str], device: torch.device
) -> tuple[dict[str, Distance], dict[str, str], dict[str, Any]]:
    """What can be computed of images [C, H, W] by name, why the rest cannot, and which LPIPS it is."""
    distances: dict[str, Distance] = {"mse": mse, "psnr": psnr, "ssim": ssim}
    skipped, identity = {}, {}
    channels, side = shape[0], min(shape[1:])
    if side < SSIM_WINDOW:
        skipped["ssim"] = f"images of {side} pixels are smaller than its window of {SSIM_WINDOW}"
        del distances["ssim"]
    for backbone in backbones:
        name, smallest = f"lpips_{backbone}", BACKBONES[backbone].smallest
        if channels not in (1, 3) or side < smallest:
            skipped[name] = f"takes grey or RGB images of at least {smallest} pixels, not {channels} channels of {side}"
            continue
        try:
            distances[name], identity[name] = lpips_distance(backbone, device)
        except UserError as error:
            skipped[name] = str(error)
    return distances, skipped, identity


def nearest(x: Tensor, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Positions [n], on the CPU, of the images nearest to each of x [n, …] by squared error among `parts`: (positions [m], their
    images [m, …]) in turn. Among equally near ones it is the first."""
    best, found = torch.full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.int64)
    for at, among in parts:
        distance, index = torch.cdist(x.flatten(1), among.flatten(1)).min(dim=1)
        nearer = distance.cpu() < best
        best, found = torch.where(nearer, distance.cpu(), best), torch.where(nearer, at[index.cpu()], found)
    return found
