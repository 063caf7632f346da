"""What a recipe would do, before it does it: parameters, lengths, floating-point operations, and what is not at hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from siv_core import build
from siv_core.build import Built
from siv_core.catalogue import Catalogue
from siv_core.errors import UserError
from siv_core.players import Priors, make_nets, set_stage, sources, tree_map
from siv_core.protocols import Batch, Stage
from siv_core.recipe import Recipe
from siv_core.seeding import Streams
from siv_core.trainer import tensors_of


def check(recipe: Recipe, catalogue: Catalogue) -> dict[str, Any]:
    """A report as JSON types. Nothing is downloaded, prepared or trained."""
    data = build.dataset(recipe, catalogue)
    lacking = data.missing()
    report: dict[str, Any] = {"recipe": recipe.name, "profiles": list(recipe.profiles), "data": {"name": recipe.data.name}}
    try:
        built = build.build(recipe, catalogue, data)
    except UserError:
        if lacking is None:
            raise
        return {**report, "not_at_hand": [f"data '{recipe.data.name}': {lacking}"]}
    spec = built.spec
    report["data"].update(shape=list(spec.shape), value_range=list(spec.value_range), factors=dict(spec.factors))
    report["groups"] = built.networks.groups
    report["parameters"] = parameters(built)
    report["stages"] = [
        {
            "length": str(plan.length),
            "batch": plan.batch,
            "objective": plan.objective.name,
            "flops_per_step": flops(built, number),
        }
        for number, plan in enumerate(recipe.stages)
    ]
    needs = [f"metric {name}: {need}" for name, metric in built.metrics().items() for need in metric.needs()]
    report["not_at_hand"] = [*build.missing(built), *needs]
    return report


def parameters(built: Built) -> dict[str, dict[str, int]]:
    """Learning parameters of each player and of its parts."""
    counts = {}
    for name, module in built.modules.items():
        parts = {child: build.size_of(part) for child, part in module.named_children() if build.size_of(part)}
        counts[name] = {"all": build.size_of(module), **(parts if len(parts) > 1 else {})}
    return counts


def flops(built: Built, number: int) -> int:
    """Floating-point operations of one step of this stage, a multiply-add counted as two; the meta device computes nothing."""
    plan = built.recipe.stages[number]
    modules = {name: copy.deepcopy(module).to("meta") for name, module in built.modules.items()}
    loss = built.reconstruction
    reconstruction = copy.deepcopy(loss).to("meta") if isinstance(loss, nn.Module) else loss
    objective = built.objective(plan)
    priors = modules["prior"]
    assert isinstance(priors, Priors)
    drawn = objective.draw(plan.batch, Streams(0, 0), sources(built.networks.groups, priors, modules["decoder"]))
    noise = tree_map(drawn, lambda x: x.to("meta"))
    labels = torch.zeros(plan.batch, dtype=torch.int64, device="meta") if built.spec.conditional else None
    batch = Batch(torch.empty(plan.batch, *built.shape(plan), device="meta"), labels)
    set_stage(modules.values(), Stage(number, built.shape(plan), torch.ones(())))
    nets = make_nets({**modules, **_shadows(built, modules)}, reconstruction)
    coeffs = tensors_of(objective.coeffs, torch.device("meta"))
    carry: dict[str, Any] = {}
    with FlopCounterMode(display=False) as counter:
        for phase in objective.phases:
            value, _, carry = phase.loss(nets, batch, noise, coeffs, carry)
            moved = [p for player in phase.updates for p in modules[player].parameters() if p.requires_grad]
            torch.autograd.grad(value, moved, allow_unused=True)
    return int(counter.get_total_flops())


def _shadows(built: Built, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    rules = [rule for plan in built.recipe.stages for rule in built.objective(plan).shadows]
    return {f"{rule.of}@{rule.name}": modules[rule.of] for rule in rules}
