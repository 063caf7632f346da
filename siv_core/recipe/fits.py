"""What of a recipe does not fit together, though each part of it is well: told before training, not when a stage begins."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from siv_core.errors import UserError
from siv_core.nets import set_stage
from siv_core.protocols import Networks, Stage

if TYPE_CHECKING:
    from siv_core.recipe.build import Built


def stages(built: Built, build_networks: Callable[[], Networks]) -> None:
    """A `UserError` for sizes that go back or that the network does not have: told now, not when one begins."""
    recipe, problems, largest = built.recipe, list[str](), 0
    if all(plan.size is None and not plan.fade for plan in recipe.stages):
        return
    with torch.device("meta"):  # others than those that train, which are told their stages once
        networks = build_networks()
    before: tuple[int, ...] = ()
    for i, plan in enumerate(recipe.stages):
        try:
            shape = built.shape(plan)
        except UserError:
            return  # told of the stage's objective
        told = _cannot_fade(built, before, shape) if plan.fade else ""
        problems += [f"stages[{i}].fade: {told}"] if told else []
        before = shape
        if shape[-1] < largest:
            problems.append(f"stages[{i}].data.size: {shape[-1]} after {largest}: networks grow, so sizes do too")
        largest = max(largest, shape[-1])
        try:
            set_stage(networks[:2], Stage(i, shape))
        except UserError as error:
            problems += [f"stages[{i}].{line}" for line in error.problems]
    if problems:
        raise UserError(problems)


def _cannot_fade(built: Built, before: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """Why nothing can fade in when a stage of this shape follows that one; nothing where it can."""
    if not all(hasattr(module, "set_stage") for module in built.networks[:2]):
        return f"network '{' and '.join(choice.name for choice in built.recipe.network)}' does not grow: leave it out"
    if len(shape) != 3 or before[1:] != (shape[1] // 2, shape[2] // 2) or shape[1] % 2 or shape[2] % 2:
        size, was = (" × ".join(map(str, one[1:])) for one in (shape, before))
        return f"what fades in is twice the size of the stage before it, this one is {size} after {was or 'nothing'}"
    return ""


def prior_stages(built: Built) -> None:
    """A `UserError` for stages that a prior waits for and that never come, or in which nothing moves it or pays what it asks."""
    problems, stages = list[str](), built.recipe.stages
    for group, prior in built.priors.groups.items():
        place = f"prior.{group}" if group in built.recipe.prior else "prior"
        named: dict[str, int] = getattr(prior, "stages_named", {})
        late = {key: number for key, number in named.items() if number >= len(stages)}
        problems += [f"{place}.{key}: is {number}, the stages are 0 to {len(stages) - 1}" for key, number in late.items()]
        misfit = getattr(prior, "misfit", lambda number, shape: "")
        misfits = [misfit(i, (built.spec.shape[0], plan.size, plan.size)) for i, plan in enumerate(stages) if plan.size]
        problems += [f"{place}: {line}" for line in list(filter(None, misfits))[:1]]
        for key, number in getattr(prior, "learns_from", {}).items():
            phases = [phase for plan in stages[number:] for phase in built.objective(plan).phases]
            if key not in late and not any("prior" in phase.updates for phase in phases):
                told = (
                    f'no objective moves the prior from stage {number} on: set objective.prior = "decoder" there, or leave it out'
                )
                problems.append(f"{place}.{key}: {told}")
        if not any(built.objective(plan).regularises for plan in stages):
            told = "the encoder of an introspective objective pays it, and no stage has one: leave it out"
            problems += [f"{place}.{key}: {told}" for key in getattr(prior, "regularisers", ())]
    if problems:
        raise UserError(problems)


def scales(built: Built) -> list[str]:
    """Notes on stages whose losses are multiplied by ten times more or less than those before them, which Adam feels by its
    running squares alone: after a growth its steps are some times too long for a while, after a fall by c they are c times too
    short until β₂ⁿ is 1/c², which is 4,600 steps for c = 10 and β₂ = 0.999."""
    notes, plans = list[str](), built.recipe.stages
    found = [built.objective(plan).coeffs.get("scale") for plan in plans]
    for i, (before, scale) in enumerate(itertools.pairwise(found), start=1):
        if not isinstance(before, float) or not isinstance(scale, float) or plans[i].reset_optimisers:
            continue
        if max(before, scale) >= 10 * min(before, scale) > 0:
            notes.append(
                f"stages[{i}]: its losses are multiplied by {scale:.4g}, those before it by {before:.4g}, whose running"
                " averages Adam keeps: give both objectives one scale, or set reset_optimisers"
            )
    return notes


def starts(built: Built) -> list[str]:
    """Why priors do not start from the prepared training data."""
    asking: list[Any] = [prior.short_of for prior in built.priors.groups.values() if hasattr(prior, "short_of")]
    there = len(built.dataset.rows("train")) if asking else 0
    return list(dict.fromkeys(filter(None, (short_of(there) for short_of in asking))))


def normal_priors(built: Built) -> None:
    """A `UserError` where the decoder draws codes of N(0, I) by itself and a prior is another distribution."""
    key, priors = built.networks.normal_prior, built.priors.groups.items() if built.networks.normal_prior else ()
    others = [group for group, prior in priors if [*prior.parameters(), *prior.buffers()]]
    if others:
        told = f"takes codes of N(0, I), the prior of '{others[0]}' is another one: turn it off, or leave the prior out"
        raise UserError(f"{key}: {told}")
