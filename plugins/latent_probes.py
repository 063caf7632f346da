"""Latent probes: how much each latent group tells of each factor of the data, by the nearest neighbours of its codes.

Every held-out image is classified by the k others nearest to it in one group's posterior means. A group that tells nothing of a
factor comes out near that factor's chance, one that holds it near 1; where two groups are to divide the factors between them,
each should be far above chance on its own factors and near chance on the other's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from siv_core.component import Component, option
from siv_core.data import feed
from siv_core.errors import UserError
from siv_core.hookspecs import hookimpl
from siv_core.latents import Codes
from siv_core.model import Model
from siv_core.protocols import Dataset, Measurement, Metric, Progress, Rows, Spec
from siv_core.use.evaluate import labels_of

WHAT = "latent probes"
POSE = "pose"  # all factors but the class factor, taken together


@frozen
class LatentProbesConfig:
    k: int = option(5, doc="neighbours that vote", ge=1)
    class_factor: str = option("model", doc="the factor that the class group stands for; the other group stands for the others")
    batch: int = option(128, doc="images in memory at once", ge=1)


def nearest(codes: Tensor, queries: Tensor, k: int) -> Tensor:
    """Positions [Q, k] of the neighbours of `codes[queries]` among `codes`, nearest first, themselves left out."""
    # the formula with a matrix product loses the small distances, and with them that equal codes are equally far
    distances = torch.cdist(codes[queries], codes, compute_mode="donot_use_mm_for_euclid_dist")
    distances[torch.arange(len(queries)), queries] = torch.inf
    return distances.sort(dim=1, stable=True).indices[:, :k]


def vote(values: Tensor) -> Tensor:
    """The most frequent of each row's values [Q, k]; among equally frequent ones that of the nearest, which stands first."""
    k = values.shape[1]
    votes = (values[:, :, None] == values[:, None, :]).sum(dim=2)  # [Q, k]
    return values.gather(1, (votes * k - torch.arange(k)).argmax(dim=1, keepdim=True)).squeeze(1)


def accuracies(codes: Tensor, factors: Mapping[str, Tensor], k: int, batch: int, progress: Progress) -> dict[str, float]:
    """Share of the images whose factor's value their neighbours tell."""
    right = dict.fromkeys(factors, 0)
    for at in torch.arange(len(codes)).split(batch):
        progress(WHAT, int(at[0]), len(codes))
        neighbours = nearest(codes, at, k)
        for name, values in factors.items():
            right[name] += int((vote(values[neighbours]) == values[at]).sum())
    return {name: count / len(codes) for name, count in right.items()}


def chance(values: Tensor) -> float:
    """What naming the most frequent value always gets right."""
    return float(values.unique(return_counts=True)[1].max()) / len(values)


@frozen
class LatentProbes:
    spec: Spec
    translate: tuple[str, str] | None
    config: LatentProbesConfig

    def needs(self) -> Iterable[str]:
        return ()

    def measure(self, model: Model, data: Dataset, progress: Progress) -> Measurement:
        rows = data.rows("held_out")
        factors = self._factors(rows)
        codes = self._encode(model, rows, progress)
        values: dict[str, float | str] = {f"chance.{name}": chance(column) for name, column in factors.items()}
        for group, code in codes.items():
            told: Mapping[str, float | str] = dict.fromkeys(factors, "the codes are not finite")
            if code.isfinite().all():
                told = accuracies(code, factors, self.config.k, self.config.batch, progress)
            values.update({f"{group}.{name}": accuracy for name, accuracy in told.items()})
        if self.translate:
            values.update({f"above_chance_ratio.{name}": self._ratio(values, name, *self.translate) for name in factors})
        return Measurement(values, self._protocol(len(rows), list(factors)))

    def _factors(self, rows: Rows) -> dict[str, Tensor]:
        """The values [M] of each factor and, where there are several others beside the class factor, of their combination."""
        if rows.factors is None or len(rows) <= self.config.k:
            raise UserError(f"{WHAT}: the held-out split has no factors, or no more than k = {self.config.k} images")
        columns = rows.factors[rows.at(torch.arange(len(rows)))].T
        factors = dict(zip(self.spec.factors, columns, strict=True))
        others = [values for name, values in factors.items() if name != self.config.class_factor]
        if 1 < len(others) < len(factors) and POSE not in factors:
            factors[POSE] = torch.stack(others).unique(dim=1, return_inverse=True)[1]
        return factors

    def _encode(self, model: Model, rows: Rows, progress: Progress) -> Codes:
        """Posterior means of all groups, on the CPU: there the order of neighbours does not depend on the device."""
        codes = {group: torch.empty(len(rows), dim) for group, dim in model.groups.items()}
        for at in torch.arange(len(rows)).split(self.config.batch):
            progress(f"{WHAT}: encoding", int(at[0]), len(rows))
            q = model.encode(feed.images(rows, at, self.spec, model.device), labels_of(rows, at, model))
            for group, kept in codes.items():
                kept[at] = q[group].mu.to(kept)
        return codes

    def _ratio(self, values: Mapping[str, Any], name: str, class_group: str, content_group: str) -> float | str:
        """How far above chance the code is that should tell this factor, over how far the other one is."""
        groups = (class_group, content_group)
        own, other = groups if name == self.config.class_factor else reversed(groups)
        told, leaked = values[f"{own}.{name}"], values[f"{other}.{name}"]
        if isinstance(told, str) or isinstance(leaked, str):
            return "the codes are not finite"
        level = values[f"chance.{name}"]
        return float((told - level) / (leaked - level)) if leaked > level else "the other code is at chance"

    def _protocol(self, images: int, factors: list[str]) -> dict[str, Any]:
        about: dict[str, Any] = {
            "split": "held_out",
            "images": images,
            "factors": factors,
            "codes": "posterior means",
            "classifier": "nearest neighbours, Euclidean, the image itself left out, majority vote",
            "k": self.config.k,
            "ties": "equally many votes: the value of the nearest; equally far: the image that comes first in the split",
            "chance": "share of the most frequent value in the split",
        }
        if POSE in factors and POSE not in self.spec.factors:
            about[POSE] = f"all factors but {self.config.class_factor} taken together"
        if self.translate:
            about["above_chance_ratio"] = "(own code's accuracy - chance) / (other code's accuracy - chance)"
            about["own_code"] = {self.config.class_factor: self.translate[0], "all others": self.translate[1]}
        return about


def build(config: LatentProbesConfig, spec: Spec, groups: dict[str, int], translate: tuple[str, str] | None) -> Metric:
    if not spec.factors:
        raise UserError("metric latent_probes: needs data with factors, such as cars3d")
    if translate and config.class_factor not in spec.factors:
        known = ", ".join(spec.factors)
        raise UserError(f"metric latent_probes: class_factor: the data has no factor '{config.class_factor}'; factors: {known}")
    return LatentProbes(spec, translate, config)


@hookimpl
def siv_components() -> list[Component]:
    summary = "how much each latent group tells of each factor of the data: nearest neighbours of held-out codes"
    return [Component("metric", "latent_probes", LatentProbesConfig, build, summary)]
