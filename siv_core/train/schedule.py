"""Which stage a step is in, and how far that has faded in: the only place that knows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

from attrs import frozen

from siv_core.recipe.convert import Length
from siv_core.recipe.recipe import StagePlan


@frozen
class Schedule:
    """The stages of a run in steps. `step` counts steps that are done: the next one to be taken has that number."""

    plans: tuple[StagePlan, ...]
    ends: tuple[int, ...]  # the step at which each stage is over

    @classmethod
    def of(cls, plans: Sequence[StagePlan], epoch_images: int) -> Schedule:
        return cls(tuple(plans), tuple(stage_ends([(plan.length, plan.batch) for plan in plans], epoch_images)))

    @property
    def total(self) -> int:
        return self.ends[-1]

    def first(self, number: int) -> int:
        """The steps that are done when this stage begins."""
        return self.ends[number - 1] if number else 0

    def steps(self, number: int) -> int:
        return self.ends[number] - self.first(number)

    def images(self) -> list[int]:
        """The images that have been seen when each stage is over."""
        return list(accumulate(self.steps(number) * plan.batch for number, plan in enumerate(self.plans)))

    def next(self, step: int) -> int:
        """The stage in which the next step is taken, after `step` < total."""
        return next(i for i, end in enumerate(self.ends) if step < end)

    def made(self, step: int) -> int:
        """The stage that made the state after `step` steps."""
        return next(i for i, end in enumerate(self.ends) if step <= end)

    def fade(self, number: int, step: int) -> float:
        """How far the stage has faded in when its step after `step` steps is done, in [0, 1]; 1 where it does not fade."""
        plan = self.plans[number]
        fade_steps = math.ceil(plan.fade * self.steps(number))
        t = min(1.0, (step - self.first(number) + 1) / fade_steps) if fade_steps else 1.0
        return t if plan.fade_shape == "linear" else (1 - math.cos(math.pi * t)) / 2


def stage_ends(lengths: Iterable[tuple[Length, int]], epoch_images: int) -> list[int]:
    """The step at which each stage is over, from their (length, batch)."""
    return list(accumulate(length.steps(batch, epoch_images) for length, batch in lengths))
