"""Views: what the encoder of a latent group sees in place of a training image, while the image itself is what is reconstructed.

What a view changes at random, its group cannot tell of the image: a stretched one not the proportions, one of the same class in
another content not the content. The other groups are left to tell it. `same_label` is the class supervision of LORD (Gabbay &
Hoshen 2020); `peer` guesses at it, by the nearest codes of the group itself, and needs no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor
from torch.nn import functional as F

from siv_core.data.feed import Feed
from siv_core.errors import UserError
from siv_core.latents import Posterior, means
from siv_core.recipe.options import Train
from siv_core.recipe.recipe import StagePlan
from siv_core.seeding import DataOrder, Streams

CANDIDATES = 20_000  # images among which peers are looked for, drawn once where there are more
NEAR = 0.7  # of the median distance: images whose other codes are nearer than that are of the same content, and no peers
CHUNK = 1024  # images whose distances to all candidates are in memory at once


def stretched(x: Tensor, uniform: Tensor, most: float) -> Tensor:
    """x [N, C, H, W] about its centre, each axis by e^(most · (2u − 1)), u [N, 2] in [0, 1); the border goes on outwards."""
    zoom = torch.exp(-most * (2 * uniform - 1))  # of the window that is shown
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = zoom.unbind(1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def flipped(x: Tensor, uniform: Tensor) -> Tensor:
    """x [N, C, H, W] mirrored left to right where u [N] is below ½."""
    return torch.where((uniform < 0.5)[:, None, None, None], x.flip(3), x)


def nearest(own: Tensor, others: Tensor | None, candidates: Tensor, k: int) -> Tensor:
    """Of each row of `own` [n, d] the k rows among `candidates` [m] (ascending) that are nearest to it, without itself and those
    whose `others` [n, e] are near: [n, k] int32, on the CPU."""
    found = torch.empty(len(own), k, dtype=torch.int32)
    for rows in torch.arange(len(own)).split(CHUNK):
        distance = torch.cdist(own[rows], own[candidates])  # [chunk, m]
        if others is not None:
            apart = torch.cdist(others[rows], others[candidates])
            distance[apart < NEAR * apart.median(dim=1, keepdim=True).values] = torch.inf
        distance[rows[:, None].to(candidates) == candidates] = torch.inf
        found[rows] = candidates[distance.topk(k, largest=False).indices].int().cpu()
    return found


@define
class Views:
    """Draws the views of a step. `peers` are those that a stage has found, {group: rows [images, count]}, kept with it."""

    feed: Feed
    order: DataOrder
    seed: int
    stretch: float
    count: int
    kept_for: tuple[str, ...]  # groups that have peers in some stage
    peers: dict[str, Tensor] = field(factory=dict)
    labelled: tuple[Tensor, ...] | None = None  # see `same_label`

    @classmethod
    def of(cls, feed: Feed, order: DataOrder, train: Train, stages: Sequence[StagePlan]) -> Views:
        """A `UserError` where the data have not what the stages' views ask for."""
        asked = [(group, name) for plan in stages for group, names in plan.views.items() for name in names]
        names, problems = {name for _, name in asked}, []
        if feed.endless and names & {"peer", "same_label"}:
            problems.append("stages.views: these data are drawn without end: there is no other image to see")
        elif "same_label" in names and feed.rows.labels is None:
            problems.append("stages.views: same_label: these data have no labels")
        elif "peer" in names and len(feed.rows) < 4 * train.peers:
            problems.append(
                f"train.peers: {train.peers} are too many of {len(feed.rows)} training images; take a quarter at most"
            )
        if problems:
            raise UserError(problems)
        groups = dict.fromkeys(group for group, name in asked if name == "peer")
        return cls(feed, order, train.seed, train.stretch, train.peers, tuple(groups))

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return dict(self.peers), {}

    def restore(self, tensors: dict[str, Tensor], data: dict[str, Any], where: str) -> None:
        """Those of an unfinished stage; a stage that begins finds its own."""
        n = len(self.feed.rows)
        for group, rows in tensors.items():
            fits = group in self.kept_for and rows.dtype == torch.int32 and tuple(rows.shape) == (n, self.count)
            if not fits or (rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < n):
                raise UserError(f"{where}: '{group}' is no table of the peers of {n} training images, {self.count} each")
        self.peers = dict(tensors)

    @torch.no_grad()
    def find(self, groups: Sequence[str], encode: Callable[..., Posterior], shape: tuple[int, ...]) -> None:
        """The peers of each training image by the codes of these groups."""
        n = len(self.feed.rows)
        parts = [means(encode(*self.feed.batch(rows, shape, torch.contiguous_format))) for rows in torch.arange(n).split(256)]
        codes = {group: torch.cat([part[group] for part in parts]).float() for group in parts[0]}
        order = torch.randperm(n, generator=Streams(self.seed, 0)("peers"))
        candidates = order[:CANDIDATES].sort().values.to(self.feed.device)
        for group in groups:
            rest = [code for name, code in codes.items() if name != group]
            self.peers[group] = nearest(codes[group], torch.cat(rest, dim=1) if rest else None, candidates, self.count)

    def draw(
        self, views: Mapping[str, tuple[str, ...]], x: Tensor, images_seen: int, n: int, share: slice, streams: Streams
    ) -> dict[str, Tensor]:
        """{group: views [n, …]} of this process's samples x [share, …] of a step. What is drawn is drawn for all n of it; rows of
        other processes are left empty."""
        drawn = {}
        for group, names in views.items():
            view = x
            for name in names:
                uniform = torch.rand(n, 2, generator=streams(f"views.{group}.{name}"), device=x.device)[share]
                if name == "flip":
                    view = flipped(view, uniform[:, 0])
                elif name == "stretch":
                    view = stretched(view, uniform, self.stretch)
                else:
                    rows, pick = self.order.take(images_seen, n)[share], uniform[:, 0].cpu()
                    others = self.peer(group, rows, pick) if name == "peer" else self.same_label(rows, pick)
                    view = self.feed.batch(others, tuple(x.shape[1:]), _layout(x)).x
            drawn[group] = view
            if len(view) < n:
                drawn[group] = view.new_zeros(n, *view.shape[1:])
                drawn[group][share] = view
        return drawn

    def peer(self, group: str, rows: Tensor, uniform: Tensor) -> Tensor:
        """One of the peers of each of these rows [N], by u [N] in [0, 1)."""
        peers = self.peers[group][rows]
        return peers.gather(1, (uniform * peers.shape[1]).long()[:, None])[:, 0].long()

    def same_label(self, rows: Tensor, uniform: Tensor) -> Tensor:
        """Any row with the label of each of these [N], itself too, by u [N] in [0, 1)."""
        if self.labelled is None:
            assert self.feed.rows.labels is not None
            labels = self.feed.rows.labels[self.feed.rows.at(torch.arange(len(self.feed.rows)))].cpu()
            _, label, counts = labels.unique(return_inverse=True, return_counts=True)
            self.labelled = (label, counts.cumsum(0) - counts, counts, label.argsort(stable=True))
        label, starts, counts, by_label = self.labelled
        own = label[rows]
        return by_label[starts[own] + (uniform.double() * counts[own]).long()]


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
