"""Which settings of `[train]` make a step faster on this machine: each stage's steps timed with each of them, by turns with the
recipe's own.

Layout, kept graphs, compiled phases and micro-batches change how the same numbers are computed, up to rounding; the precision of
the networks changes the numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

import attrs
import torch
from attrs import evolve, field, mutable

from siv_core.errors import UserError
from siv_core.protocols import Progress
from siv_core.recipe import build
from siv_core.recipe.build import Built
from siv_core.recipe.catalogue import Catalogue
from siv_core.recipe.recipe import Recipe, StagePlan
from siv_core.runs import device as devices
from siv_core.runs import timing
from siv_core.train import compiled
from siv_core.train.stage import arithmetic
from siv_core.train.trainer import Trainer

ROUNDS = 3  # timed pieces of each row, by turns with the recipe's own
WORTH_TELLING = 0.97  # of the time: what saves less is not told from noise
QUICK = ("channels_last", "keep_graphs", "precision")  # `siv check --measure` tries these
WITHOUT_KEPT = ("compile", "graphs")  # tried on top of what is best without kept graphs
TRIED = (*QUICK, *WITHOUT_KEPT, "micro_batch")
Change = dict[str, Any]  # keys of `[train]` -> values


@mutable
class Row:
    """One setting. `shares`: a step's time over that with the recipe's own settings, by kind of stage."""

    change: Change
    shares: dict[int, float] = field(factory=dict)
    bytes: int | None = None
    left_out: str = ""

    def seconds(self, per_step: dict[int, float], kinds: dict[int, int]) -> float:
        """Of a training with so many steps of each kind of stage."""
        return sum(self.shares[kind] * per_step[kind] * steps for kind, steps in kinds.items())


def kinds_of(trainer: Trainer, at_hand: bool) -> dict[int, int]:
    """{the first stage of those whose steps take the same time: steps of them all}; 1 each where a length is not known."""
    kinds: dict[int, int] = {}
    firsts: dict[Any, int] = {}
    for number, plan in enumerate(trainer.schedule.plans):
        known = at_hand or plan.length.unit != "epochs"
        first = firsts.setdefault(_kind(plan), number)
        kinds[first] = kinds.get(first, 0) + (trainer.schedule.steps(number) if known else 1)
    return kinds


def _kind(plan: StagePlan) -> Any:
    """What the time of a step depends on."""
    return plan.objective.name, repr(plan.objective.config), plan.size, plan.batch, bool(plan.fade), repr(plan.views)


def tune(
    recipe: Recipe, catalogue: Catalogue, device: torch.device, progress: Progress, tried: Sequence[str] = TRIED
) -> dict[str, Any]:
    """A report as JSON types: the rows, best first, and the lines for the recipe. Prepares the data where they are at hand, else
    takes random ones of their shape; writes into no run directory and changes nothing."""
    ready = timing.ready(recipe, catalogue, progress)
    if ready.lacking:
        return {"not_measured": ready.lacking}
    rows, per_step, kinds = compare(ready.built, catalogue, device, progress, tried, at_hand=ready.at_hand)
    timed = [row for row in rows if not row.left_out]
    timed.sort(key=lambda row: row.seconds(per_step, kinds))
    own = sum(per_step[kind] * steps for kind, steps in kinds.items())
    told = [{**_told(row), "share": row.seconds(per_step, kinds) / own} for row in timed]
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "data": ready.data,
        "stages": [
            {"stage": number + 1, "objective": recipe.stages[number].objective.name, "steps": steps, "seconds": per_step[number]}
            for number, steps in kinds.items()
        ],
        "rows": told,
        "left_out": [{"change": row.change, "reason": row.left_out} for row in rows if row.left_out],
        "lines": _best(told, same_numbers=True),
        "lines_of_other_numbers": _best(told, same_numbers=False),
    }


def _told(row: Row) -> dict[str, Any]:
    return {
        "change": row.change,
        "numbers": "others" if "precision" in row.change else "equal to rounding" if row.change else "as they are",
        "shares": {str(kind): share for kind, share in row.shares.items()},
        "bytes": row.bytes,
    }


def _best(told: list[dict[str, Any]], *, same_numbers: bool) -> Change:
    """The change that saves most, where it saves what is worth telling; micro-batches save memory."""
    allowed = [one for one in told if ("precision" not in one["change"]) == same_numbers]
    best = min(allowed, key=lambda one: one["share"], default=None)
    return dict(best["change"]) if best and best["share"] < WORTH_TELLING else {}


# -- doing it --------------------------------------------------------------------------------------------------------------------


def compare(
    built: Built,
    catalogue: Catalogue,
    device: torch.device,
    progress: Progress,
    tried: Sequence[str] = TRIED,
    *,
    at_hand: bool = True,
) -> tuple[list[Row], dict[int, float], dict[int, int]]:
    """Rows, the first of them the recipe's own settings; seconds a step with these by kind of stage; those kinds."""
    base = timing.trainer_of(built, device)
    kinds = kinds_of(base, at_hand)
    per_step = {}
    for kind in kinds:
        per_step[kind] = timing.seconds_per_step(base, timing.enter(base, kind))
    rows: list[Row] = []
    changes = [{}, *changes_of(built, device, tried)]  # the recipe's own once more: how far it is from 1 is noise
    for number, change in enumerate(changes):
        progress("timing settings", number, len(changes))
        rows.append(_row(base, built, catalogue, change, device, kinds))
    progress("timing settings", len(changes), len(changes))
    # compiling takes minutes, so it is tried on top of what is best without it
    changes = list(_without_kept(rows, per_step, kinds, built.recipe, device, tried))
    for number, change in enumerate(changes):
        progress("timing compiled and recorded phases", number, len(changes))
        rows.append(_row(base, built, catalogue, change, device, kinds))
    if changes:
        progress("timing compiled and recorded phases", len(changes), len(changes))
    devices.set_precision(built.recipe.train)
    return rows, per_step, kinds


def changes_of(built: Built, device: torch.device, tried: Sequence[str]) -> Iterator[Change]:
    """All combinations of what costs little to try, and half the batch at once."""
    recipe, train = built.recipe, built.recipe.train
    values: dict[str, list[Any]] = {}
    if "precision" in tried:
        values["precision"] = ["fp32", "bf16", *(["tf32"] if device.type == "cuda" else [])]
    if "channels_last" in tried and any(p.dim() == 4 for module in built.modules.values() for p in module.parameters()):
        values["channels_last"] = [False, True]
    if (
        "keep_graphs" in tried
        and not (train.compile or train.graphs)
        and any(plan.objective.name != "vae" for plan in recipe.stages)
    ):
        values["keep_graphs"] = [False, True]
    own = {**attrs.asdict(train), "precision": arithmetic(train.precision, device)}
    for chosen in product(*values.values()):
        change = {key: value for key, value in zip(values, chosen, strict=True) if value != own[key]}
        if change:
            yield change
    if "micro_batch" in tried and not train.micro_batch and train.batch > 1:
        yield {"micro_batch": (train.batch + 1) // 2}


def _without_kept(
    rows: list[Row],
    per_step: dict[int, float],
    kinds: dict[int, int],
    recipe: Recipe,
    device: torch.device,
    tried: Sequence[str],
) -> Iterator[Change]:
    """Compiled and recorded phases on top of the best row without kept graphs, for the same and for other numbers; where the
    recipe keeps graphs and no row is without, on its own settings but for that."""
    possible = [key for key in WITHOUT_KEPT if key in tried and not getattr(recipe.train, key)]
    if device.type != "cuda" and "graphs" in possible and set(tried) >= set(TRIED):  # where it was asked for, why not is told
        possible.remove("graphs")
    for same in (True, False) if possible else ():
        fitting = [
            row
            for row in rows
            if not row.left_out
            and ("precision" not in row.change) == same
            and "micro_batch" not in row.change
            and not row.change.get("keep_graphs", recipe.train.keep_graphs)
        ]
        if fitting or same:
            best = min(fitting, key=lambda row: row.seconds(per_step, kinds)).change if fitting else {"keep_graphs": False}
            for number in range(1, len(possible) + 1):
                for keys in combinations(possible, number):
                    yield {**best, **dict.fromkeys(keys, True)}


def _row(base: Trainer, built: Built, catalogue: Catalogue, change: Change, device: torch.device, kinds: dict[int, int]) -> Row:
    """The change timed in each kind of stage, or why it is left out."""
    row = Row(change)
    try:
        if change.get("compile") and compiled.lacking(device):
            raise UserError(compiled.lacking(device))
        memory = timing.Memory.of(device)
        recipe = evolve(built.recipe, train=evolve(built.recipe.train, **change))
        other = timing.trainer_of(build.build(recipe, catalogue, built.dataset), device)
        for kind in kinds:
            timing.timed(other, timing.enter(other, kind), timing.WARM_UP_STEPS)
            row.shares[kind] = _share(base, other, kind)
        row.bytes = memory.taken()
    except UserError as error:
        row.left_out = "; ".join(error.problems)
    except torch.OutOfMemoryError:
        row.left_out = "the device has not enough memory"
    return row


def _share(base: Trainer, other: Trainer, kind: int) -> float:
    """The time of a step of `other` over that of `base`: the median of timed pieces, by turns."""
    assert other.active
    pairs = ((base, timing.enter(base, kind)), (other, other.active))
    timing.timed(*pairs[0], 1)  # where it is compiled, this compiles it again
    ratios, size = [], 1
    for _ in range(ROUNDS):
        seconds = []
        for trainer, active in pairs:
            devices.set_precision(trainer.built.recipe.train)
            seconds.append(timing.timed(trainer, active, size) / size)
        size = max(1, round(timing.BLOCK_SECONDS / max(seconds)))
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)
