"""What a recipe would do, before it does it: parameters, lengths, operations, what is not at hand; time and memory when asked."""

from __future__ import annotations

import copy
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from siv_core.errors import UserError
from siv_core.nets import Priors, make_nets, set_stage, sources, tree_map
from siv_core.protocols import Batch, Progress, Rows, Spec, Stage
from siv_core.recipe import build, forward
from siv_core.recipe.build import Built
from siv_core.recipe.catalogue import Catalogue
from siv_core.recipe.recipe import Recipe
from siv_core.runs import device as devices
from siv_core.runs import opened, session, watchers
from siv_core.seeding import Streams
from siv_core.store.rundir import RunDir
from siv_core.train import stage
from siv_core.train.parallel import Parallel
from siv_core.train.stage import ActiveStage
from siv_core.train.step import play, tensors_of
from siv_core.train.trainer import Trainer
from siv_core.use import evaluate

WARM_UP_STEPS = 3  # the first allocate memory and the optimisers' moments
MEASURED_SECONDS = 4.0  # a stage, after the warm-up
BLOCKS = (3, 40)  # least and most pieces of a stage that are timed; their median does not mind an interruption
BLOCK_SECONDS = 0.1  # at least this long: a clock is read, and on CUDA waited for, at its ends only
COMPARED_ROUNDS = 3  # timed pieces of each of the settings that are compared, by turns
WORTH_TELLING = 0.97  # of the time: what saves less is not told from noise
RANDOM_IMAGES = 1024  # that stand in for data that is not at hand


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
    report["notes"] = session.told_of(built) if lacking is None else []
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
    nets = make_nets({**modules, **_shadows(built, modules)}, reconstruction)
    coeffs = tensors_of(objective.coeffs, torch.device("meta"))
    carry: dict[str, Any] = {}
    with FlopCounterMode(display=False) as counter:
        for phase in objective.phases:
            moved = [p for player in phase.updates for p in modules[player].parameters() if p.requires_grad]
            if moved:
                carry = play(phase, moved, nets, batch, noise, coeffs, carry, 1.0).carry
    return int(counter.get_total_flops())


def _shadows(built: Built, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    rules = [rule for plan in built.recipe.stages for rule in built.objective(plan).shadows]
    return {f"{rule.of}@{rule.name}": modules[rule.of] for rule in rules}


# -- time and memory, by doing it ------------------------------------------------------------------------------------------------


@frozen
class RandomData:
    """Stands in for data that is not at hand: random numbers of its shape, in memory. Nothing is learned from them."""

    spec: Spec

    def missing(self) -> None:
        return None

    def prepare(self, progress: Progress) -> None: ...

    def fingerprint(self) -> str:
        return "random"

    def rows(self, split: str) -> Rows:
        generator, shape = torch.Generator().manual_seed(0), (RANDOM_IMAGES, *self.spec.shape)
        labels = torch.arange(RANDOM_IMAGES) % (self.spec.classes or 10)
        if self.spec.kind == "image":
            return Rows(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), labels)
        low, high = self.spec.value_range
        return Rows(low + (high - low) * torch.rand(shape, generator=generator), labels)


def measure(recipe: Recipe, catalogue: Catalogue, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Time a step of each stage and peak memory, from real steps that are thrown away, as JSON types; times in seconds.

    Prepares the data where they are at hand, else takes random ones of their shape. Writes into no run directory.
    """
    data = build.dataset(recipe, catalogue)
    built = build.build(recipe, catalogue, data)
    loss = built.reconstruction
    lacking = getattr(loss, "missing", lambda: None)()
    if lacking:
        return {"not_measured": lacking}
    at_hand = data.missing() is None
    if at_hand:
        data.prepare(progress)
    else:
        built.dataset = RandomData(built.spec)
    devices.set_precision(recipe.train)
    getattr(loss, "prepare", lambda: None)()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer = Trainer.of(built, RunDir(Path()), device, Parallel(), watchers.Silent())
    stages: list[dict[str, Any]] = []
    for number, plan in enumerate(recipe.stages):
        trainer.counters.step = trainer.schedule.first(number)
        trainer.active = stage.enter(trainer, number)
        seconds = seconds_per_step(trainer, trainer.active)
        trainer.counters.step = trainer.schedule.first(number) + 1  # timing went on beyond the stage
        if built.spec.kind == "image":
            evaluate.preview(trainer.model(), built.dataset, {}, recipe.train.seed)  # a run draws them: their memory
        steps = trainer.schedule.steps(number) if at_hand or plan.length.unit != "epochs" else None
        stages.append({"objective": plan.objective.name, "seconds_per_step": seconds, "steps": steps})
        progress("measuring", number + 1, len(recipe.stages))
    peak = peak_bytes()
    known = [stage["seconds_per_step"] * stage["steps"] for stage in stages if stage["steps"] is not None]
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "data": recipe.data.name if at_hand else f"random numbers of the shape {list(built.spec.shape)}",
        "stages": stages,
        "seconds": sum(known) if len(known) == len(stages) else None,
        "peak_bytes": peak,
        "device_peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "settings": compare_settings(built, catalogue, device, progress),
    }


def compare_settings(built: Built, catalogue: Catalogue, device: torch.device, progress: Progress) -> list[dict[str, Any]]:
    """What a step of the last stage takes with other settings of `[train]`, as shares of its time with the recipe's: one setting
    changed at a time, and all together that save time; what the device has no memory for is left out. Steps are timed by turns.
    Precision changes what is computed, if little."""
    recipe = built.recipe
    base = _timed_trainer(built, catalogue, recipe, device)
    changes = list(_other_settings(recipe, built.spec))
    found: list[dict[str, Any]] = []
    for number, change in enumerate(changes):
        progress("comparing settings", number, len(changes) + 1)
        try:
            found.append({"change": change, "share": _share(base, built, catalogue, change, device)})
        except torch.OutOfMemoryError:
            continue
    saving: dict[str, Any] = {}
    for one in sorted(found, key=lambda one: one["share"], reverse=True):  # of two values of one setting the faster one
        saving |= one["change"] if one["share"] < WORTH_TELLING else {}
    if sum(one["share"] < WORTH_TELLING for one in found) > 1:
        found.append({"change": saving, "share": _share(base, built, catalogue, saving, device)})
    progress("comparing settings", len(changes) + 1, len(changes) + 1)
    devices.set_precision(recipe.train)
    return found


def _other_settings(recipe: Recipe, spec: Spec) -> Iterator[dict[str, Any]]:
    train = recipe.train
    yield from ({"precision": other} for other in ("fp32", "bf16") if other != train.precision)
    if spec.kind == "image":
        yield {"channels_last": not train.channels_last}
    if recipe.stages[-1].objective.name != "vae":
        yield {"keep_graphs": not train.keep_graphs}


def _timed_trainer(built: Built, catalogue: Catalogue, recipe: Recipe, device: torch.device) -> Trainer:
    """In the last stage of this recipe, with its first steps done."""
    again = build.build(recipe, catalogue, built.dataset)
    devices.set_precision(recipe.train)
    trainer = Trainer.of(again, RunDir(Path()), device, Parallel(), watchers.Silent())
    last = len(recipe.stages) - 1
    trainer.counters.step = trainer.schedule.first(last)
    trainer.active = stage.enter(trainer, last)
    timed(trainer, trainer.active, WARM_UP_STEPS)
    return trainer


def _share(base: Trainer, built: Built, catalogue: Catalogue, change: dict[str, Any], device: torch.device) -> float:
    """The time of a step with this change over that without it: the median of timed pieces, by turns."""
    recipe = evolve(built.recipe, train=evolve(built.recipe.train, **change))
    other = _timed_trainer(built, catalogue, recipe, device)
    ratios = []
    size = 1
    for _ in range(COMPARED_ROUNDS):
        seconds = []
        for trainer in (base, other):
            devices.set_precision(trainer.built.recipe.train)
            assert trainer.active
            seconds.append(timed(trainer, trainer.active, size) / size)
        size = max(1, round(BLOCK_SECONDS / max(seconds)))
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def seconds_per_step(trainer: Trainer, active: ActiveStage) -> float:
    """The median of timed pieces of training."""
    timed(trainer, active, WARM_UP_STEPS)
    size = max(1, round(BLOCK_SECONDS / max(timed(trainer, active, 1), 1e-4)))
    blocks: list[float] = []
    while len(blocks) < BLOCKS[0] or (len(blocks) < BLOCKS[1] and sum(blocks) < MEASURED_SECONDS):
        blocks.append(timed(trainer, active, size))
    return statistics.median(blocks) / size


def timed(trainer: Trainer, active: ActiveStage, steps: int) -> float:
    """Seconds that so many steps of training take."""
    started = time.perf_counter()
    for _ in range(steps):
        trainer.advance(active)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - started


def peak_bytes() -> int:
    """The most memory that this process ever had. `ru_maxrss` would count that of the process which started it."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
