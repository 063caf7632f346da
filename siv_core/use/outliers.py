"""Out-of-distribution detection: scores of a run's training and held-out images and of other sets, and what they tell apart.

A larger score is more of an outlier. Inliers are held-out images of the run's own data; outliers, the positive class, are those
of another set. The same numbers of held-out against training images are the chance check: a score that tells them apart knows
what the model was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from siv_core.data import feed
from siv_core.errors import UserError, near_miss
from siv_core.model import Model
from siv_core.protocols import Dataset, Progress, Spec
from siv_core.seeding import Streams
from siv_core.use import baselines, detection, evaluate, scores
from siv_core.use.other_sets import FLIPS, Other, changes, converted, unusable

SCORES = (*scores.NAMES, *baselines.NAMES)
USUAL = tuple(name for name in SCORES if name != "likelihood_regret")  # which costs hundreds of decodings an image
CHECK = "held_out_vs_train"
VALUES = ("auroc", "auroc_se", "aupr", "fpr95")
AREA = VALUES[:2]  # of `CHECK`
COLUMNS = ("score", "outliers", "against", "AUROC", "AUPR (chance)", "FPR95")
NUMBERS_AT_ONCE = 1 << 26  # of training images that baselines are fitted on


@frozen
class Options:
    """What is measured, beside of which sets."""

    names: tuple[str, ...] = USUAL  # of scores
    count: int = 1000  # images of each set, at most
    seed: int = 0  # of their choice
    fit_images: int = 2000  # training images that baselines are fitted on, at most
    batch: int = 128  # images that the networks see at once
    convert: bool = False  # images of another size or other channels are made the model's
    settings: scores.Settings = scores.Settings()


@frozen(eq=False)
class Scored:
    """Scores of each set, and why some are not there."""

    scores: dict[str, dict[str, Tensor]]  # {"train", "held_out" or a set's label: {score: [N] float64}}
    absent: dict[str, str]  # label of a set -> why it was not scored
    lacking: dict[str, str]  # score -> why it cannot be taken of this model
    notes: list[str]
    protocol: dict[str, Any]


@frozen(eq=False)
class _Set:
    """A split of a set, as the model is shown it."""

    positions: Tensor
    show: Callable[[Tensor], Tensor]  # positions -> images in the model's shape and range

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for positions in self.positions.split(size):
            yield positions, self.show(positions)


def score_sets(model: Model, data: Dataset, against: Sequence[Other], options: Options, progress: Progress) -> Scored:
    """Scores of the run's own `data`, which is prepared, and of each set; what cannot be had is said in the result."""
    lacking = {name: reason for name in options.names if (reason := _lacking(model, name, options))}
    names = [name for name in options.names if name not in lacking]
    absent = {one.label: reason for one in against if (reason := _absent(one, model.spec, options, progress))}
    there = [one for one in against if one.label not in absent]
    fitted = _fit(model, data, options, progress) if {"ppca", "nearest"} & set(names) else None
    sets = _sets(model, data, there, options)
    found = {label: _scored(model, one, label, names, fitted, options, progress) for label, one in sets.items()}
    notes = [
        f"{one.label}: {'; '.join(told)}" for one in there if one.dataset and (told := changes(one.dataset.spec, model.spec))
    ]
    return Scored(found, absent, lacking, notes, _protocol(model, names, fitted, there, found, options))


def _absent(one: Other, spec: Spec, options: Options, progress: Progress) -> str | None:
    """Why this set cannot be scored, or None once it is prepared."""
    try:
        reason = unusable(one, spec, options.convert)
        if reason is None and one.dataset is not None:
            one.dataset.prepare(progress)
    except UserError as error:
        return f"{one.label}: {'; '.join(error.problems)}"
    return reason


def _lacking(model: Model, name: str, options: Options) -> str | None:
    if name in baselines.NAMES:
        return "png: of images alone, these are arrays" if name == "png" and model.spec.kind != "image" else None
    return scores.lacking(model, name, options.settings)


def _sets(model: Model, data: Dataset, there: Sequence[Other], options: Options) -> dict[str, _Set]:
    spec = model.spec

    def own(split: str, axis: int | None = None) -> _Set:
        rows = data.rows(split)

        def show(positions: Tensor) -> Tensor:
            x = feed.images(rows, positions, spec)
            return x if axis is None else x.flip(axis)

        return _Set(evaluate.some(data, split, options.count, options.seed), show)

    def other(dataset: Dataset) -> _Set:
        rows, its = dataset.rows("held_out"), dataset.spec
        positions = evaluate.some(dataset, "held_out", options.count, options.seed)
        return _Set(positions, lambda at: converted(feed.images(rows, at, its), its, spec))

    sets = {"train": own("train"), "held_out": own("held_out")}
    for one in there:
        sets[one.label] = other(one.dataset) if one.dataset is not None else own("held_out", FLIPS[one.table["name"]])
    return sets


def _fit(model: Model, data: Dataset, options: Options, progress: Progress) -> baselines.Fitted:
    progress("ood: fitting baselines", 0, 1)
    rows, spec = data.rows("train"), model.spec
    count = max(2, min(options.fit_images, NUMBERS_AT_ONCE // spec.dims, len(rows)))
    positions = torch.randperm(len(rows), generator=Streams(options.seed, 0)("fit"))[:count].sort().values
    x = torch.cat([baselines.flat(feed.images(rows, at, spec), spec) for at in positions.split(options.batch)])
    return baselines.Fitted.on(x, positions, sum(model.groups.values()))


def _scored(
    model: Model,
    one: _Set,
    label: str,
    names: Sequence[str],
    fitted: baselines.Fitted | None,
    options: Options,
    progress: Progress,
) -> dict[str, Tensor]:
    own = [name for name in names if name in scores.NAMES]
    dtype = next((weight.dtype for weight in model.decoder.parameters()), torch.float32)
    parts, done = [], 0
    for positions, x in one.batches(options.batch):

        def tick(done: int = done) -> None:
            progress(f"ood: scoring {label}", done, len(one.positions))

        tick()
        found = scores.score(model, x.to(dtype), own, options.settings, tick) if own else {}
        found |= baselines.score(x, model.spec, names, fitted, positions if label == "train" else None)
        parts.append(found)
        done += len(positions)
    progress(f"ood: scoring {label}", done, done)
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def _protocol(
    model: Model,
    names: Sequence[str],
    fitted: baselines.Fitted | None,
    there: Sequence[Other],
    found: Mapping[str, Mapping[str, Tensor]],
    options: Options,
) -> dict[str, Any]:
    own = scores.protocol(model, [name for name in names if name in scores.NAMES], options.settings)
    simple = baselines.protocol([name for name in names if name in baselines.NAMES], fitted)
    sizes = {label: len(next(iter(values.values()))) if values else 0 for label, values in found.items()}
    return {
        **own,
        "scores": {**own["scores"], **simple},
        "positive": "outliers: images of the other set; inliers are held-out images of the run's own data",
        CHECK: "the same with training images as inliers and held-out ones as outliers: 0.5 is chance",
        "auroc": "ties counted half; standard error by DeLong et al. 1988, of images drawn independently",
        "aupr": "average precision; chance is the share of outliers among all",
        "fpr95": "share of inliers called outliers where at least 95 % of the outliers are",
        "images": sizes,
        "choice": f"at most {options.count} of each split, by seed {options.seed}",
        "sets": {one.label: _about(one, model.spec) for one in there},
    }


def _about(one: Other, own: Spec) -> dict[str, Any]:
    if one.dataset is None:
        return {
            **one.table,
            "of": "the same held-out images, turned round: the error of the AUROC is then an upper bound, roughly",
        }
    return {
        **one.table,
        "split": "held_out",
        "fingerprint": one.dataset.fingerprint(),
        "converted": changes(one.dataset.spec, own),
    }


# -- what they tell apart --------------------------------------------------------------------------------------------------------


def values(scored: Scored) -> dict[str, float | str]:
    """LABEL.SCORE.auroc, .auroc_se, .aupr and .fpr95 of each set, and the AUROC of `CHECK`. A string is why there is no number; a
    set or a score that is not there at all has one line of its name."""
    found: dict[str, float | str] = {**scored.absent, **scored.lacking}
    pairs = {label: ("held_out", label) for label in scored.scores if label not in ("train", "held_out")}
    for label, (inside, outside) in {**pairs, CHECK: ("train", "held_out")}.items():
        for name in scored.scores["held_out"]:
            told = _told(scored.scores[inside][name], scored.scores[outside][name])
            found.update({f"{label}.{name}.{value}": number for value, number in told.items() if label != CHECK or value in AREA})
    return found


def rows(scored: Scored, found: Mapping[str, float | str]) -> list[tuple[str, ...]]:
    """A line each score and set, the chance check first; in the order of `COLUMNS`."""
    sizes = scored.protocol["images"]
    lines: list[tuple[str, ...]] = []
    for name in scored.scores["held_out"]:
        for label in (CHECK, *(label for label in scored.scores if label not in ("train", "held_out"))):
            inside, outside = ("train", "held_out") if label == CHECK else ("held_out", label)
            area, error, precision, false = (found.get(f"{label}.{name}.{value}") for value in VALUES)
            if isinstance(area, str):
                lines.append((name, f"{sizes[outside]:,} {outside}", f"{sizes[inside]:,} {inside}", area, "", ""))
                continue
            chance = sizes[outside] / (sizes[outside] + sizes[inside])
            lines.append(
                (
                    name,
                    f"{sizes[outside]:,} {outside}",
                    f"{sizes[inside]:,} {inside}",
                    f"{area:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""),
                    f"{precision:.4f} ({chance:.2f})" if isinstance(precision, float) else "",
                    f"{false:.4f}" if isinstance(false, float) else "",
                )
            )
    return lines


def checked_scores(names: Sequence[str]) -> tuple[str, ...]:
    """These names, each once; a `UserError` for what is no score."""
    wrong = [f"score {name}: there is none{near_miss(name, SCORES)}" for name in names if name not in SCORES]
    if wrong:
        raise UserError(wrong)
    return tuple(dict.fromkeys(names))


def _told(inliers: Tensor, outliers: Tensor) -> dict[str, float | str]:
    lost = sum(int(scores.isnan().sum()) for scores in (inliers, outliers))
    if lost:
        return dict.fromkeys(VALUES, f"{lost} of {len(inliers) + len(outliers)} scores are no numbers")
    functions = (detection.auroc, detection.auroc_error, detection.aupr, detection.fpr95)
    told: dict[str, float | str] = {name: function(inliers, outliers) for name, function in zip(VALUES, functions, strict=True)}
    if min(len(inliers), len(outliers)) < 2:
        told["auroc_se"] = "takes two images of either kind"
    return told
