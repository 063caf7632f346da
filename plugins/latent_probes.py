"""Latent probes: how much each latent group tells of each factor of the data.

Three probes read a group's posterior means: the nearest neighbours, a linear map, and a small network. A group that tells
nothing of a factor comes out near that factor's chance, one that holds it near 1; where two groups are to divide the factors
between them, each should be far above chance on its own factors and near chance on the other's. What one probe cannot see
another may: a group tells nothing only where none of them reads anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional as F

from siv_core.component import Component, option
from siv_core.data import feed
from siv_core.errors import UserError
from siv_core.hookspecs import hookimpl
from siv_core.latents import Codes
from siv_core.model import Model
from siv_core.protocols import Dataset, Measurement, Metric, Progress, Rows, Spec
from siv_core.seeding import Seeded, Streams, stream_seed
from siv_core.use.evaluate import labels_of

WHAT = "latent probes"
POSE = "pose"  # all factors but the class factor, taken together
HIDDEN = {"linear": 0, "mlp": 256}  # units of the trained probes
STEPS, EVERY, LR, DECAY = 200, 10, 1e-2, 1e-4  # of their training: full batches, Adam; looked at every so many steps
KEPT_BACK = 0.2  # share of the images they are fitted on that chooses when to stop
NOT_FINITE = "the codes are not finite"


@frozen
class LatentProbesConfig:
    k: int = option(5, doc="neighbours that vote", ge=1)
    class_factor: str = option("model", doc="the factor that the class group stands for; the other group stands for the others")
    trained: tuple[str, ...] = option(
        ("linear", "mlp"), doc="probes that are fitted; [] leaves them out", choices=("linear", "mlp")
    )
    fit_images: int = option(5000, doc="training images that they are fitted on, at most, by a seeded choice", ge=10)
    seed: int = option(0, doc="of that choice, and of the probes", ge=0)
    batch: int = option(128, doc="images in memory at once", ge=1)


# -- nearest neighbours ----------------------------------------------------------------------------------------------------------


def nearest(codes: Tensor, queries: Tensor, k: int, kin: Tensor | None = None) -> Tensor:
    """Positions [Q, k] of the neighbours of `codes[queries]` among `codes`, nearest first, themselves left out; with `kin` [M]
    those of the same kin too."""
    # the formula with a matrix product loses the small distances, and with them that equal codes are equally far
    distances = torch.cdist(codes[queries], codes, compute_mode="donot_use_mm_for_euclid_dist")
    distances[torch.arange(len(queries)), queries] = torch.inf
    if kin is not None:
        distances[kin[queries, None] == kin] = torch.inf
    return distances.sort(dim=1, stable=True).indices[:, :k]


def vote(values: Tensor) -> Tensor:
    """The most frequent of each row's values [Q, k]; among equally frequent ones that of the nearest, which stands first."""
    k = values.shape[1]
    votes = (values[:, :, None] == values[:, None, :]).sum(dim=2)  # [Q, k]
    return values.gather(1, (votes * k - torch.arange(k)).argmax(dim=1, keepdim=True)).squeeze(1)


def neighbours_tell(codes: Tensor, values: Tensor, kin: Tensor | None, k: int, batch: int, shown: Callable[[int], None]) -> float:
    """Share of the images whose value their neighbours of another kin tell."""
    right = 0
    for at in torch.arange(len(codes)).split(batch):
        shown(int(at[0]))
        right += int((vote(values[nearest(codes, at, k, kin)]) == values[at]).sum())
    return right / len(codes)


# -- trained probes --------------------------------------------------------------------------------------------------------------


def fitted(codes: Tensor, values: Tensor, hidden: int, seed: int) -> Callable[[Tensor], Tensor]:
    """A classifier of codes [M, d] by `values` [M] that count from 0: cross-entropy, stopped where the images that were kept back
    are told best. Its answer to codes [Q, d] is [Q]."""
    order = torch.randperm(len(codes), generator=Streams(seed, 0)("probe"))
    back, own = order.split([max(1, round(KEPT_BACK * len(codes))), len(codes) - max(1, round(KEPT_BACK * len(codes)))])
    mean, scale = codes[own].mean(dim=0), codes[own].std(dim=0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    classes = int(values.max()) + 1
    with Seeded(stream_seed(seed, "probe.init")):
        sizes = [codes.shape[1], *([hidden] if hidden else []), classes]
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    network = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]
    optimiser = torch.optim.Adam(network.parameters(), LR, weight_decay=DECAY)
    x, best, state = (codes - mean) / scale, -1.0, network.state_dict()
    with torch.enable_grad():
        for step in range(1, STEPS + 1):
            optimiser.zero_grad()
            F.cross_entropy(network(x[own]), values[own]).backward()
            optimiser.step()
            if step % EVERY == 0:
                with torch.no_grad():
                    told = float((network(x[back]).argmax(dim=1) == values[back]).float().mean())
                if told > best:
                    best, state = told, {name: weight.clone() for name, weight in network.state_dict().items()}
    network.load_state_dict(state)
    network.requires_grad_(False)
    return lambda queries: network((queries - mean) / scale).argmax(dim=1)


# -- the metric ------------------------------------------------------------------------------------------------------------------


@frozen(eq=False)
class Split:
    """Codes and factors of some images."""

    codes: Codes  # {group: [M, d]}
    factors: dict[str, Tensor]  # {factor: [M]}


@frozen
class LatentProbes:
    spec: Spec
    translate: tuple[str, str] | None
    config: LatentProbesConfig

    def needs(self) -> Iterable[str]:
        return ()

    def fits(self, data: Dataset) -> Iterable[str]:
        rows = data.rows("held_out")
        if rows.factors is None or len(rows) <= self.config.k:
            yield f"the held-out split has no factors, or no more than k = {self.config.k} images"

    def measure(self, model: Model, data: Dataset, progress: Progress) -> Measurement:
        rows = data.rows("held_out")
        everyone = torch.arange(len(rows))
        for reason in self.fits(data):
            raise UserError(f"{WHAT}: {reason}")
        held_out = Split(self._encode(model, rows, everyone, progress), self._factors(rows, everyone))
        values: dict[str, float | str] = {
            f"chance.{name}": float(column.unique(return_counts=True)[1].max()) / len(column)
            for name, column in held_out.factors.items()
        }
        finite = all(bool(code.isfinite().all()) for code in held_out.codes.values())
        train = self._train(model, data, progress) if self.config.trained and finite else None
        for group, code in held_out.codes.items():
            for name in held_out.factors:
                told = self._told(group, name, held_out, train, progress)
                if not code.isfinite().all():
                    told = dict.fromkeys(told, NOT_FINITE)
                values.update({f"{probe}.{group}.{name}": value for probe, value in told.items()})
        if self.translate:
            for probe in ("knn", *self.config.trained):
                ratios = {name: self._ratio(values, probe, name, *self.translate) for name in held_out.factors}
                values.update({f"above_chance_ratio.{probe}.{name}": ratio for name, ratio in ratios.items()})
        return Measurement(values, self._protocol(len(rows), train, list(held_out.factors)))

    def _told(self, group: str, name: str, held_out: Split, train: Split | None, progress: Progress) -> dict[str, float | str]:
        """{probe: share of the held-out images whose value of this factor it reads from this group, or why it cannot}."""
        codes, values, kin = held_out.codes[group], held_out.factors[name], self._kin(name, held_out.factors)
        what = f"{WHAT}: {group}, {name}"
        told: dict[str, float | str] = dict.fromkeys(("knn", *self.config.trained), NOT_FINITE)
        if train is None and self.config.trained:
            return told
        told["knn"] = neighbours_tell(
            codes, values, kin, self.config.k, self.config.batch, lambda done: progress(what, done, len(codes))
        )
        if kin is not None and len(kin) - int(kin.unique(return_counts=True)[1].max()) < self.config.k:
            told["knn"] = f"some images have fewer than k = {self.config.k} others that differ in what is not asked"
        for number, probe in enumerate(self.config.trained):
            progress(f"{what}, {probe}", number, len(self.config.trained))
            told[probe] = self._trained(probe, group, name, held_out, train)
        return told

    def _trained(self, probe: str, group: str, name: str, held_out: Split, train: Split | None) -> float | str:
        assert train is not None
        codes, values, tested = held_out.codes[group], held_out.factors[name], slice(None)
        known = train.factors.get(name)
        if known is not None and bool(torch.isin(values, known).all()):
            fit_codes, fit_values = train.codes[group], known
        else:  # classes that no training image has: learned from one half of what else there is of them, tested on the other
            kin = self._kin(name, held_out.factors)
            if kin is None or len(kin.unique()) < 2:
                return "the training images have not all of its values, and the held-out ones cannot be halved"
            kinds = kin.unique()
            drawn = torch.randperm(len(kinds), generator=Streams(self.config.seed, 0)("half"))[: len(kinds) // 2]
            half = torch.isin(kin, kinds[drawn])
            fit_codes, fit_values, tested = codes[half], values[half], ~half  # type: ignore[assignment]
        if not fit_codes.isfinite().all():
            return NOT_FINITE
        known_values, counted = fit_values.unique(return_inverse=True)
        answer = fitted(fit_codes, counted, HIDDEN[probe], self.config.seed)
        return float((known_values[answer(codes[tested])] == values[tested]).float().mean())

    def _kin(self, name: str, factors: Mapping[str, Tensor]) -> Tensor | None:
        """What is not asked: the class of each image where another factor is, all others together where the class is."""
        own = self.config.class_factor
        if name != own:
            return factors.get(own)
        others = [values for other, values in factors.items() if other != own and (other != POSE or POSE in self.spec.factors)]
        return torch.stack(others).unique(dim=1, return_inverse=True)[1] if others else None

    def _factors(self, rows: Rows, at: Tensor) -> dict[str, Tensor]:
        """The values [M] of each factor and, where there are several others beside the class factor, of their combination."""
        assert rows.factors is not None
        factors = dict(zip(self.spec.factors, rows.factors[rows.at(at)].T, strict=True))
        others = [name for name in factors if name != self.config.class_factor]
        if 1 < len(others) < len(factors) and POSE not in factors:
            pose = torch.zeros_like(factors[others[0]])
            for name in others:  # numbered alike in every split
                pose = pose * self.spec.factors[name] + factors[name]
            factors[POSE] = pose
        return factors

    def _train(self, model: Model, data: Dataset, progress: Progress) -> Split:
        """A seeded choice of training images, which the trained probes are fitted on."""
        rows = data.rows("train")
        chosen = torch.randperm(len(rows), generator=Streams(self.config.seed, 0)("fit"))[: self.config.fit_images].sort().values
        known = self._factors(rows, chosen) if rows.factors is not None else {}
        return Split(self._encode(model, rows, chosen, progress), known)

    def _encode(self, model: Model, rows: Rows, positions: Tensor, progress: Progress) -> Codes:
        """Posterior means of all groups, on the CPU: there the order of neighbours does not depend on the device."""
        codes = {group: torch.empty(len(positions), dim) for group, dim in model.groups.items()}
        for at in torch.arange(len(positions)).split(self.config.batch):
            progress(f"{WHAT}: encoding", int(at[0]), len(positions))
            batch = positions[at]
            q = model.encode(feed.images(rows, batch, self.spec, model.device), labels_of(rows, batch, model))
            for group, kept in codes.items():
                kept[at] = q[group].mu.to(kept)
        return codes

    def _ratio(self, values: Mapping[str, Any], probe: str, name: str, class_group: str, content_group: str) -> float | str:
        """How far above chance the code is that should tell this factor, over how far the other one is."""
        groups = (class_group, content_group)
        own, other = groups if name == self.config.class_factor else reversed(groups)
        told, leaked = values[f"{probe}.{own}.{name}"], values[f"{probe}.{other}.{name}"]
        if isinstance(told, str) or isinstance(leaked, str):
            return str(told if isinstance(told, str) else leaked)
        level = values[f"chance.{name}"]
        return float((told - level) / (leaked - level)) if leaked > level else "the other code is at chance"

    def _protocol(self, images: int, train: Split | None, factors: list[str]) -> dict[str, Any]:
        about: dict[str, Any] = {
            "split": "held_out",
            "images": images,
            "factors": factors,
            "codes": "posterior means",
            "knn": "Euclidean, majority vote of k others that differ in what is not asked",
            "not_asked": f"{self.config.class_factor}, where another factor is asked; all others together, where it is",
            "k": self.config.k,
            "ties": "equally many votes: the value of the nearest; equally far: the image that comes first in the split",
            "chance": "share of the most frequent value in the split",
        }
        if train is not None:
            images = len(next(iter(train.codes.values())))
            about["trained"] = {
                "units": {probe: HIDDEN[probe] for probe in self.config.trained},
                "fitted_on": f"{images} images of the split train; of a factor whose values they have not all, the held-out"
                " images of half of what is not asked, tested on the others",
                "training": f"Adam, lr {LR:g}, weight decay {DECAY:g}, {STEPS} full batches, stopped by {KEPT_BACK:.0%}",
                "seed": self.config.seed,
            }
        if POSE in factors and POSE not in self.spec.factors:
            about[POSE] = f"all factors but {self.config.class_factor} taken together"
        if self.translate:
            about["above_chance_ratio"] = "(own code's accuracy - chance) / (other code's accuracy - chance), of each probe"
            about["own_code"] = {self.config.class_factor: self.translate[0], "all others": self.translate[1]}
        return about


def build(config: LatentProbesConfig, spec: Spec, groups: dict[str, int], translate: tuple[str, str] | None) -> Metric:
    if not spec.factors:
        own = "an HDF5 file of your own can have a data set 'factors' of whole numbers [N, F] (docs/data.md)"
        raise UserError(f"metric latent_probes: needs data with factors, such as cars3d; {own}")
    if translate and config.class_factor not in spec.factors:
        known = ", ".join(spec.factors)
        raise UserError(f"metric latent_probes: class_factor: the data has no factor '{config.class_factor}'; factors: {known}")
    return LatentProbes(spec, translate, config)


@hookimpl
def siv_components() -> list[Component]:
    summary = "how much each latent group tells of each factor of the data: nearest neighbours, and trained probes"
    return [Component("metric", "latent_probes", LatentProbesConfig, build, summary)]
