"""What a recipe would do, before it does it: parameters, lengths, operations, what is not at hand; time and memory when asked."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from siv_core.errors import UserError
from siv_core.nets import Priors, make_nets, set_stage, sources, tree_map
from siv_core.protocols import Batch, Progress, Stage
from siv_core.recipe import build, fits, forward
from siv_core.recipe.build import Built
from siv_core.recipe.catalogue import Catalogue
from siv_core.recipe.recipe import Recipe
from siv_core.runs import device as devices
from siv_core.runs import opened, session, timing
from siv_core.seeding import Streams
from siv_core.train.step import play, tensors_of
from siv_core.use import evaluate


def check(recipe: Recipe, catalogue: Catalogue) -> dict[str, Any]:
    """A report as JSON types. Nothing is downloaded, prepared or trained."""
    data = build.dataset(recipe, catalogue)
    lacking = data.missing()
    report: dict[str, Any] = {"recipe": recipe.name, "profiles": list(recipe.profiles), "data": {"name": recipe.data.name}}
    try:
        built = build.build(recipe, catalogue, data)
        build.room(built, on_cpu=not devices.nvidia_present())
    except UserError:
        if lacking is None:
            raise
        return {**report, "not_at_hand": [f"data '{recipe.data.name}': {lacking}"]}
    problems = build.demands(built) if lacking is None else []
    if problems:
        raise UserError(problems)
    spec = built.spec
    report["notes"] = session.told_of(built) if lacking is None else fits.scales(built)
    report["data"].update(shape=list(spec.shape), value_range=list(spec.value_range), factors=dict(spec.factors))
    report["groups"] = built.networks.groups
    report["parameters"] = parameters(built)
    report["stages"] = [
        {
            "length": str(plan.length),
            "batch": plan.batch,
            "objective": plan.objective.name,
            "shape": list(built.shape(plan)),
            "fade": plan.fade,
            "views": {group: list(names) for group, names in plan.views.items()},
            "flops_per_step": flops(built, number),
        }
        for number, plan in enumerate(recipe.stages)
    ]
    if recipe.init:
        opened.start_of(recipe)
    needs = [f"metric {name}: {need}" for name, metric in built.metrics().items() for need in metric.needs()]
    report["not_at_hand"] = [*build.missing(built), *needs]
    return report


def parameters(built: Built) -> dict[str, dict[str, int]]:
    """Learning parameters of each player and of its parts."""
    counts = {}
    for name, module in built.modules.items():
        parts = {child: learning(part) for child, part in module.named_children() if learning(part)}
        counts[name] = {"all": learning(module), **(parts if len(parts) > 1 else {})}
    return counts


def learning(module: nn.Module) -> int:
    """Number of parameters that learn."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def flops(built: Built, number: int) -> int:
    """Floating-point operations of one step of this stage, a multiply-add counted as two; the meta device computes nothing."""
    plan = built.recipe.stages[number]
    modules = {name: copy.deepcopy(module).to("meta") for name, module in built.modules.items()}
    loss = built.reconstruction
    reconstruction = copy.deepcopy(loss).to("meta") if isinstance(loss, nn.Module) else loss
    objective = built.objective(plan)
    priors = modules["prior"]
    assert isinstance(priors, Priors)
    drawn = objective.draw(1, Streams(0, 0), sources(built.networks.groups, priors, modules["decoder"]))
    noise = tree_map(drawn, lambda x: torch.empty(plan.batch, *x.shape[1:], dtype=x.dtype, device="meta"))  # one row a sample
    labels = torch.zeros(plan.batch, dtype=torch.int64, device="meta") if built.spec.conditional else None
    batch = Batch(torch.empty(plan.batch, *built.shape(plan), device="meta"), labels)
    noise = {**noise, "views": dict.fromkeys(plan.views, batch.x)}
    set_stage(modules.values(), Stage(number, built.shape(plan)))
    forward.check_forward(built, modules, built.shape(plan), torch.device("meta"))
    kept = built.recipe.train.keep_graphs
    nets = make_nets({**modules, **_shadows(built, modules)}, reconstruction, keep_graphs=kept)
    coeffs = tensors_of(objective.coeffs, torch.device("meta"))
    carry: dict[str, Any] = {}
    with FlopCounterMode(display=False) as counter:
        for phase in objective.phases:
            moved = [p for player in phase.updates for p in modules[player].parameters() if p.requires_grad]
            if moved:
                keep = kept and phase is not objective.phases[-1]
                carry = play(phase, moved, nets, batch, noise, coeffs, carry, 1.0, keep).carry
    return int(counter.get_total_flops())


def _shadows(built: Built, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    rules = [rule for plan in built.recipe.stages for rule in built.objective(plan).shadows]
    return {f"{rule.of}@{rule.name}": modules[rule.of] for rule in rules}


# -- time and memory, by doing it ------------------------------------------------------------------------------------------------


def measure(recipe: Recipe, catalogue: Catalogue, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Time a step of each stage and peak memory, from real steps that are thrown away, as JSON types; times in seconds.

    Prepares the data where they are at hand, else takes random ones of their shape. Writes into no run directory.
    """
    ready = timing.ready(recipe, catalogue, progress)
    if ready.lacking:
        return {"not_measured": ready.lacking}
    built = ready.built
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer = timing.trainer_of(built, device)
    stages: list[dict[str, Any]] = []
    for number, plan in enumerate(recipe.stages):
        seconds = timing.seconds_per_step(trainer, timing.enter(trainer, number))
        trainer.counters.step = trainer.schedule.first(number) + 1  # timing went on beyond the stage
        if built.spec.kind == "image":
            evaluate.preview(trainer.model(), built.dataset, {}, recipe.train.seed)  # a run draws them: their memory
        steps = trainer.schedule.steps(number) if ready.at_hand or plan.length.unit != "epochs" else None
        stages.append({"objective": plan.objective.name, "seconds_per_step": seconds, "steps": steps})
        progress("measuring", number + 1, len(recipe.stages))
    known = [stage["seconds_per_step"] * stage["steps"] for stage in stages if stage["steps"] is not None]
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "data": ready.data,
        "stages": stages,
        "seconds": sum(known) if len(known) == len(stages) else None,
        "peak_bytes": timing.peak_bytes(),
        "device_peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
