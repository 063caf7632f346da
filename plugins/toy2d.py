"""Data set `toy2d`: five densities in the plane, drawn afresh for every batch on the device that trains.

The laws are those of the published code of Soft-IntroVAE (Daniel & Tamar 2021, sections 6.1 and 9.2), with independent samples:
the published spiral pairs every point with its mirror image, and the published rings resample a lattice of angles that depends on
the size of the batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from attrs import frozen
from torch import Generator, Tensor

from siv_core import Batch, Component, Progress, Rows, Spec, UserError, hookimpl, option
from siv_core.seeding import normal, stream_seed

VERSION = 1  # of the laws below: goes up when one of them changes, and the fingerprints with it
BLOCK = 1024  # points compared with a whole curve at once


@frozen
class Toy2DConfig:
    set: str = option("8gaussians", doc="which density", choices=("8gaussians", "spiral", "checkerboard", "rings", "25gaussians"))
    epoch_images: int = option(50_000, doc="nominal length of an epoch: training never sees a sample twice", ge=1)
    held_out: int = option(10_000, doc="samples of the held-out split, drawn once under a seed of their own", ge=1)


@frozen
class Law:
    """One density and its geometry, for metrics such as density2d; points are [n, 2]."""

    half_range: float  # L: pictures and metrics look at [−L, L]²
    draw: Callable[[int, Generator], Tensor]  # independent samples on the generator's device
    modes: int  # pieces, equally probable or nearly so
    mode_of: Callable[[Tensor], Tensor]  # the piece [n] (int64) that each point is nearest to
    distance: Callable[[Tensor], Tensor]  # of each point to the support without its noise, [n]
    tolerance: float  # up to this distance a point is on the support
    entropy: float  # differential entropy in nats
    about: str  # the pieces and the tolerance in words


def uniform(n: int, generator: Generator) -> Tensor:
    """[n] in [0, 1) on the generator's device."""
    return torch.rand(n, generator=generator, device=generator.device)


def choice(n: int, of: int, generator: Generator) -> Tensor:
    """[n] integers 0 … of − 1, equally probable."""
    return torch.randint(of, (n,), generator=generator, device=generator.device)


def polar(radius: Any, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


# -- Gaussians -------------------------------------------------------------------------------------------------------------------


def draw_gaussians(n: int, generator: Generator, *, centres: Tensor, std: float) -> Tensor:
    return centres.to(generator.device)[choice(n, len(centres), generator)] + std * normal(n, 2, generator)


def to_centres(x: Tensor, centres: Tensor) -> Tensor:
    """Distances [n, K]; the formula with a matrix product is not exact enough for these Gaussians."""
    return torch.cdist(x, centres.to(x), compute_mode="donot_use_mm_for_euclid_dist")


def nearest_centre(x: Tensor, *, centres: Tensor) -> Tensor:
    return to_centres(x, centres).argmin(dim=1)


def distance_to_centres(x: Tensor, *, centres: Tensor) -> Tensor:
    return to_centres(x, centres).amin(dim=1)


def gaussians(centres: Tensor, std: float, half_range: float, where: str) -> Law:
    return Law(
        half_range=half_range,
        draw=partial(draw_gaussians, centres=centres, std=std),
        modes=len(centres),
        mode_of=partial(nearest_centre, centres=centres),
        distance=partial(distance_to_centres, centres=centres),
        tolerance=3 * std,
        entropy=math.log(len(centres)) + math.log(2 * math.pi * math.e * std**2),  # they do not overlap
        about=f"{len(centres)} Gaussians {where}, std {std:.5f}; on the support: within 3 std of a centre",
    )


EIGHT = polar(2 / 1.414, torch.arange(8) * (math.pi / 4))
GRID = torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3)) * (2 * 2 / 2.828)


# -- spiral: t = 3π √U, x = ± (−t cos t + a, t sin t + b) / 3 + noise, a and b ~ U(0, ½) ----------------------------------------

TURN, SPREAD, SPIRAL_STD, ARM_PIECES = 3 * math.pi, 0.5, 0.1, 8
ARM_POINTS = 512  # that stand for an arm; neighbours are 0.03 apart


def arm(t: Tensor) -> Tensor:
    """The lower left corners [n, 2], times 3, of the squares that the first arm's points lie in before the noise."""
    return torch.stack([-t * t.cos(), t * t.sin()], dim=1)


def draw_spiral(n: int, generator: Generator) -> Tensor:
    t = TURN * uniform(n, generator).sqrt()
    corner = torch.rand(n, 2, generator=generator, device=generator.device) * SPREAD
    sign = 1 - 2 * choice(n, 2, generator)[:, None]
    return sign * (arm(t) + corner) / 3 + SPIRAL_STD * normal(n, 2, generator)


def along_spiral(x: Tensor, *, squares: bool) -> tuple[Tensor, Tensor]:
    """Distance [n] to the nearest point of both arms (its square or its square's centre), and which of the 2 K it is [n]."""
    half = SPREAD / 6  # of a square's side
    centres = arm(TURN * ((torch.arange(ARM_POINTS) + 0.5) / ARM_POINTS).sqrt()) / 3 + half  # equally probable points
    centres = torch.cat([centres, -centres]).to(x)
    found = []
    for block in x.split(BLOCK):
        away = [(block[:, axis, None] - centres[:, axis]).abs() for axis in (0, 1)]  # each [n, 2 K]
        if squares:
            away = [(one - half).clamp_(min=0) for one in away]
        found.append((away[0].square_() + away[1].square_()).min(dim=1))
    return torch.cat([f.values for f in found]).sqrt(), torch.cat([f.indices for f in found])


def spiral_piece(x: Tensor) -> Tensor:
    return along_spiral(x, squares=False)[1] // (ARM_POINTS // ARM_PIECES)


def distance_to_spiral(x: Tensor) -> Tensor:
    return along_spiral(x, squares=True)[0]


# -- checkerboard: u ~ U(−2, 2), v = U(0, 1) − 2 Bernoulli(½) + (⌊u⌋ mod 2), x = 2 (u, v) ---------------------------------------


def draw_checkerboard(n: int, generator: Generator) -> Tensor:
    u = 4 * uniform(n, generator) - 2
    v = uniform(n, generator) - 2 * choice(n, 2, generator) + u.floor().remainder(2)
    return 2 * torch.stack([u, v], dim=1)


def square_centres() -> Tensor:
    columns = torch.arange(-2, 2).repeat_interleave(2)
    rows = columns.remainder(2) - 2 * torch.arange(2).repeat(4)
    return torch.stack([2.0 * columns + 1, 2.0 * rows + 1], dim=1)


def to_squares(x: Tensor) -> Tensor:
    """Distances [n, 8] to the filled squares."""
    return ((x[:, None] - square_centres().to(x)).abs() - 1).clamp(min=0).square().sum(dim=2).sqrt()


def nearest_square(x: Tensor) -> Tensor:
    return to_squares(x).argmin(dim=1)


def distance_to_squares(x: Tensor) -> Tensor:
    return to_squares(x).amin(dim=1)


# -- rings -----------------------------------------------------------------------------------------------------------------------

RADII, RING_STD, SECTORS = torch.tensor([3.0, 2.25, 1.5, 0.75]), 0.08, 8


def draw_rings(n: int, generator: Generator) -> Tensor:
    radius = RADII.to(generator.device)[choice(n, len(RADII), generator)]
    return polar(radius, 2 * math.pi * uniform(n, generator)) + RING_STD * normal(n, 2, generator)


def to_rings(x: Tensor) -> Tensor:
    """Distances [n, 4]."""
    return (x.norm(dim=1, keepdim=True) - RADII.to(x)).abs()


def ring_sector(x: Tensor) -> Tensor:
    turns = torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi) + 0.5  # [0, 1]
    return to_rings(x).argmin(dim=1) * SECTORS + (turns * SECTORS).long().clamp(max=SECTORS - 1)


def distance_to_rings(x: Tensor) -> Tensor:
    return to_rings(x).amin(dim=1)


LAWS = {
    "8gaussians": gaussians(EIGHT, 0.02 / 1.414, 2.0, "on a circle"),
    "25gaussians": gaussians(GRID, 0.05 * 2 / 2.828, 4.0, "on a grid"),
    "spiral": Law(
        half_range=4.0,
        draw=draw_spiral,
        modes=2 * ARM_PIECES,
        mode_of=spiral_piece,
        distance=distance_to_spiral,
        tolerance=3 * SPIRAL_STD,
        entropy=2.64543,
        about="2 arms in 8 equally probable pieces each; on the support: within 3 std of where points lie before noise",
    ),
    "checkerboard": Law(
        half_range=4.0,
        draw=draw_checkerboard,
        modes=8,
        mode_of=nearest_square,
        distance=distance_to_squares,
        tolerance=0.1,
        entropy=math.log(32),
        about="8 filled squares of side 2; on the support: at most 0.1 outside of one",
    ),
    "rings": Law(
        half_range=4.0,
        draw=draw_rings,
        modes=len(RADII) * SECTORS,
        mode_of=ring_sector,
        distance=distance_to_rings,
        tolerance=3 * RING_STD,
        entropy=2.62318,
        about="4 rings in 8 sectors each; on the support: within 3 std of the noise of a ring",
    ),
}


# -- the data set ----------------------------------------------------------------------------------------------------------------


class Toy2D:
    """An endless training split, and a held-out table; `law` tells metrics what no sample can."""

    def __init__(self, config: Toy2DConfig) -> None:
        self.config, self.law = config, LAWS[config.set]
        half_range = self.law.half_range
        self.spec = Spec(shape=(2,), kind="array", value_range=(-half_range, half_range))

    def missing(self) -> str | None:
        return None

    def prepare(self, progress: Progress) -> None:
        """Nothing to make: samples are drawn when they are asked for."""

    @cached_property
    def _table(self) -> Tensor:
        """What stands for the training split, then the held-out samples; each drawn under a seed that no training step has."""
        sizes = {"train": self.config.epoch_images, "held_out": self.config.held_out}
        seeds = {split: stream_seed(0, f"toy2d.{split}") for split in sizes}
        parts = [self.law.draw(n, torch.Generator().manual_seed(seeds[split])) for split, n in sizes.items()]
        return torch.cat(parts)

    def rows(self, split: str) -> Rows:
        if split not in ("train", "held_out"):
            raise UserError(f"data toy2d: no split '{split}'; there are train and held_out")
        train = torch.arange(self.config.epoch_images)
        if split == "train":
            return Rows(self._table, index=train, draw=lambda n, generator: Batch(self.law.draw(n, generator)))
        return Rows(self._table, index=len(train) + torch.arange(self.config.held_out))

    def fingerprint(self) -> str:
        """Of the law, not of the samples: their last bits differ from machine to machine."""
        told = f"toy2d {VERSION} {self.config.set} {self.config.epoch_images} {self.config.held_out}"
        return hashlib.sha256(told.encode()).hexdigest()

    def about(self) -> dict[str, Any]:
        return {"set": self.config.set, "pieces": self.law.about, "entropy_nats": self.law.entropy}


@hookimpl
def siv_components() -> list[Component]:
    summary = "8 Gaussians, spiral, checkerboard, rings or 25 Gaussians in the plane, drawn without end"
    return [Component("dataset", "toy2d", Toy2DConfig, Toy2D, summary, "arXiv:2012.13253")]
