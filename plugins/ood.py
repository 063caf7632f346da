"""Metric `ood`: how well a model, and simple scores beside it, tell other data sets from held-out images of its own.

What is measured stands in `siv_core.use.outliers` and docs/ood.md; `siv ood` measures the same of a run that is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
from attrs import frozen

from siv_core.component import Bounds, Component, option
from siv_core.errors import UserError
from siv_core.hookspecs import hookimpl
from siv_core.model import Model
from siv_core.protocols import Dataset, Measurement, Metric, Progress, Spec
from siv_core.use import ood_report, other_sets, outliers
from siv_core.use.scores import Settings

ANY = Bounds()
AGAINST = (
    'the other sets: names, or tables such as { name = "hdf5", path = "x.h5", as = "mine" }; flip_vertical and flip_horizontal'
    " are the run's own held-out images turned round"
)


def _written_out(given: Iterable[Any]) -> tuple[dict[str, Any], ...]:
    """Tables with every option, and places absolute: a run is what it resolved to, from any folder."""
    try:
        return tuple(map(other_sets.resolved, given))
    except UserError as error:
        raise ValueError(f"against: {'; '.join(error.problems)}") from error


@frozen
class OODConfig:
    against: tuple[str | dict[str, Any], ...] = attrs.field(
        converter=_written_out, metadata={"doc": AGAINST, "bounds": ANY, "place": False}, kw_only=True
    )
    scores: tuple[str, ...] = option(outliers.USUAL, doc="of the model, and simple ones beside it", choices=outliers.SCORES)
    count: int = option(1000, doc="images of each set, at most, by a seeded choice", ge=2)
    seed: int = option(0, doc="of that choice, and of the draws", ge=0)
    draws: int = option(5, doc="codes drawn for an image: elbo, iwae, likelihood_regret", ge=1)
    betas: str = option("objective", doc="of the ELBO: the objective's own, or one", choices=("objective", "one"))
    steps: int = option(100, doc="of Adam on an image's posterior: likelihood_regret", ge=1)
    lr: float = option(0.05, doc="of these steps at first, falling to 0", gt=0)
    fit_images: int = option(2000, doc="training images that ppca and nearest are fitted on, at most", ge=2)
    convert: bool = option(False, doc="images of another size or other channels are made the model's")
    batch: int = option(128, doc="images in memory at once", ge=1)


@frozen
class OOD:
    spec: Spec
    against: tuple[other_sets.Other, ...]
    options: outliers.Options

    def needs(self) -> Iterable[str]:
        for one in self.against:
            lacking = one.dataset.missing() if one.dataset is not None else None
            if lacking:
                yield f"{one.label}: data '{one.table['name']}': {lacking}"

    def fits(self, data: Dataset) -> Iterable[str]:
        for one in self.against:
            if one.dataset is None or not one.dataset.missing():
                reason = other_sets.unusable(one, self.spec, self.options.convert)
                if reason:
                    yield reason

    def measure(self, model: Model, data: Dataset, progress: Progress) -> Measurement:
        scored = outliers.score_sets(model, data, self.against, self.options, progress)
        values = outliers.values(scored)
        return Measurement(
            values, {**scored.protocol, "notes": scored.notes}, {"densities": ood_report.densities(scored, values)}
        )


def build(config: OODConfig, spec: Spec, groups: dict[str, int], translate: tuple[str, str] | None) -> Metric:
    if not config.against:
        raise UserError("metric ood: against: names no set; give one, such as flip_vertical")
    settings = Settings(config.draws, config.steps, config.lr, config.seed, config.betas)
    names = outliers.checked_scores(config.scores)
    options = outliers.Options(
        names, config.count, config.seed, config.fit_images, config.batch, config.convert, settings=settings
    )
    return OOD(spec, tuple(other_sets.others(config.against)), options)


@hookimpl
def siv_components() -> list[Component]:
    summary = "AUROC, AUPR and FPR95 of outliers by ELBO, KL, reconstruction, likelihood, regret, and by simple scores"
    return [Component("metric", "ood", OODConfig, build, summary, "arXiv:2012.13253")]
