"""What a run writes about itself, and what a resume compares with it."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import attrs
import cattrs
import torch

from siv_core.errors import UserError
from siv_core.model import Model
from siv_core.protocols import Metric, Spec
from siv_core.recipe import recipe as recipes
from siv_core.recipe.build import Built
from siv_core.recipe.convert import Length
from siv_core.store import checkpoint, files
from siv_core.store.checkpoint import Checkpoint
from siv_core.store.rundir import RunDir
from siv_core.train.schedule import Schedule, stage_ends
from siv_core.train.stage import arithmetic
from siv_core.train.trainer import Trainer
from siv_core.use import evaluate, pictures

LIBRARIES = ("siv", "torch", "torchvision", "numpy", "safetensors", "h5py", "pluggy", "attrs", "cattrs")
DECIDES_BITS = ("threads", "processes", "device", "precision", "torch", "numpy", "siv")
KEPT = ("time", "command", "libraries", "device", "precision", "threads", "processes")  # of an earlier manifest


# -- what a resume finds -----------------------------------------------------------------------------------------------------


def newest(run_dir: RunDir, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, opened, None before the first; a damaged one is told."""
    steps = checkpoint.steps(run_dir.checkpoints)
    for step in reversed(steps):
        opened = checkpoint.read(checkpoint.path_of(run_dir.checkpoints, str(step)))
        if isinstance(opened, Checkpoint):
            return opened
        for line in opened:
            say(f"{line}; trying the checkpoint before it")
    if steps:
        raise UserError(
            f"{run_dir.checkpoints}: none of its {len(steps)} checkpoints is whole; move this folder away to start the run over"
        )
    return None


def check_same(run_dir: RunDir, built: Built, saved: Checkpoint) -> None:
    """A `UserError` where going on from this checkpoint would not go on with the same run."""
    same_data(run_dir, built)
    same_recipe(run_dir, saved)
    problems = changed_lengths(built, run_dir, saved.step)
    if problems:
        raise UserError(problems)


def same_data(run_dir: RunDir, built: Built) -> bool:
    """Whether the data at hand are those that the run was trained on: False where it knows of none. A `UserError` where they are
    others."""
    before, now = earlier(run_dir).get("data", {}).get("fingerprint"), built.dataset.fingerprint()
    if before not in (None, now, now.partition("+")[0]):  # earlier versions took the digest of the images alone
        places = {key: path for key, path in built.recipe.places_of().items() if key.startswith("data.") and path}
        there = "".join(f", {key} = {path}" for key, path in places.items())
        elsewhere = "".join(f", say where they are (--set {key}=…)" for key in places)
        raise UserError(
            f"{run_dir.path}: trained on other data: fingerprint {before} then, {now} of '{built.recipe.data.name}' now{there};"
            f" bring the earlier data back{elsewhere}, or start a new run"
        )
    return before is not None


def same_recipe(run_dir: RunDir, saved: Checkpoint) -> None:
    """A `UserError` where a checkpoint was saved by another recipe's run; those of earlier versions do not tell."""
    resolved = saved.state.get("resolved")
    differing = [] if resolved is None else recipes.differences(run_dir.resolved(), resolved)
    if differing:
        raise UserError([f"{saved.path}: saved by another recipe; these differ:", *differing, *checkpoint.offer(saved.path)])


def changed_lengths(built: Built, run_dir: RunDir, step: int) -> list[str]:
    """What is wrong with the stages' new lengths when `step` steps are done: the past cannot be changed."""
    images, before = len(built.dataset.rows("train")), run_dir.resolved()["stages"]
    try:
        old = stage_ends([(Length.parse(stage["length"]), stage["batch"]) for stage in before], images)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{run_dir.path / 'resolved.json'}: damaged, a stage's length is not what siv writes ({error})"
        ) from error
    new = schedule_of(built).ends
    # the last stage is never over: a finished run may be given a longer one
    current = next((i for i, end in enumerate(old[:-1]) if step < end), len(old) - 1)
    problems = []
    for i, plan in enumerate(built.recipe.stages[: current + 1]):
        place = "train.length" if built.recipe.train.length else f"stages[{i}].length"
        if i < current and new[i] != old[i]:
            problems.append(f"{place}: this stage was over at step {old[i]}: leave its length at {before[i]['length']!r}")
        elif i == current and plan.fade and new[i] != old[i] and step > (old[i - 1] if i else 0):
            length = before[i]["length"]
            problems.append(f"{place}: this stage has begun to fade in, over a share of its length: leave that at {length!r}")
        elif i == current and new[i] < step:
            problems.append(
                f"{place}: the run is at step {step} already, and '{plan.length}' ends at {new[i]}: give a longer one"
            )
    return problems


def complete(run_dir: RunDir, built: Built, saved: Checkpoint) -> bool:
    """Whether there is nothing left to do: trained to the end, drawn, and measured with these metrics."""
    measured = run_dir.resolved().get("metrics") == built.recipe.resolved()["metrics"]
    return run_dir.state() == "finished" and saved.step == schedule_of(built).total and measured


def schedule_of(built: Built) -> Schedule:
    return Schedule.of(built.recipe.stages, len(built.dataset.rows("train")))


def earlier(run_dir: RunDir) -> dict[str, Any]:
    """The manifest of the start before this one."""
    return run_dir.manifest() if (run_dir.path / "manifest.json").exists() else {}


def spec_of(manifest: Mapping[str, Any]) -> Spec | None:
    """What a run's manifest says of its data."""
    saved = manifest.get("spec")
    if not saved:
        return None
    try:
        return cattrs.structure(saved, Spec)
    except (cattrs.BaseValidationError, TypeError, ValueError) as error:
        raise UserError(f"the run's manifest.json: damaged, 'spec' is not what siv writes ({error})") from error


class Shows(Protocol):
    """Who is told what is written, and how far it is."""

    def say(self, line: str) -> None: ...
    def wrote(self, path: Path) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...


# -- what a measurement writes --------------------------------------------------------------------------------------------------


def measured_as(built: Built, model: Model, by: str, step: int) -> dict[str, Any]:
    """What stands in every line of a measurement; lines `by` "evaluate" outlast a resume."""
    checkpoint_name, _, weights = model.name.partition(", ")
    return {
        "by": by,
        "step": step,
        "checkpoint": checkpoint_name if by != "training" else None,  # whether that step has one is for others to say
        "weights": weights.removesuffix(" weights"),
        "data": {"name": built.recipe.data.name, "fingerprint": built.dataset.fingerprint()},
        "siv": version("siv"),
    }


def append_metrics(
    built: Built,
    metrics: Mapping[str, Metric],
    model: Model,
    run_dir: RunDir,
    about: dict[str, Any],
    watcher: Shows,
    suffix: str | None,
) -> list[dict[str, Any]]:
    """Measure, write a line for each value and the metrics' pictures, and give the lines.

    Pictures are images/METRIC_NAME`suffix`.png; without a suffix they go into outputs/ under a name that is free.
    """
    if model.batch_statistics:
        metrics = {**metrics, recipes.GAP: evaluate.TrainEvalGap(built.recipe.train.seed)}
    lines, drawn = evaluate.measure(metrics, model, built.dataset, about, watcher.progress, run_dir.log)
    for warning in evaluate.gap_warnings(lines):
        watcher.say(warning)
        run_dir.log(warning)
    run_dir.append("metrics", *lines)
    for name, picture in drawn.items():
        path = (
            run_dir.images / f"{name}{suffix}.png"
            if suffix is not None
            else files.free_names(run_dir.path / "outputs", name, [".png"])[0]
        )
        pictures.save_png(path, picture)
        watcher.wrote(path)
    return lines


# -- what a start writes -----------------------------------------------------------------------------------------------------


def write_head(run_dir: RunDir, trainer: Trainer, say: Callable[[str], None], offsets: Mapping[str, int]) -> None:
    """What a run writes before its first step, or before it goes on."""
    run_dir.cut(dict(offsets))
    before, recipe = earlier(run_dir), trainer.built.recipe
    checkpoint.prune(
        run_dir.checkpoints, recipe.train.keep_every, trainer.counters.step
    )  # a kill may have come between save and this
    now = manifest(trainer)
    for what in changed_machine(before, now):
        say(f"{what}: the last bits may differ from a run that was not interrupted")
    files.write_bytes(run_dir.path / "recipe.toml", recipe.source)
    past = [*before.get("history", []), {key: before.get(key) for key in KEPT}] if before else []
    run_dir.write("manifest", {**now, "history": past})
    files.write_json(run_dir.path / "resolved.json", recipe.resolved())
    run_dir.status("running", step=trainer.counters.step)
    run_dir.log(f"start: {shlex.join(sys.argv)}")
    say(f"run directory {run_dir.path}")


def changed_machine(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What bits depend on and is not as it was at the last start."""
    if not before:
        return []
    old, new = ({**m["libraries"], **m} for m in (before, now))
    return [f"{key} {old[key]} before, {new[key]} now" for key in DECIDES_BITS if key in old and old[key] != new[key]]


def manifest(trainer: Trainer) -> dict[str, Any]:
    """Where and with what a run was made."""
    recipe = trainer.built.recipe
    used = {(choice.kind, choice.name) for choice in (recipe.data, recipe.reconstruction, *recipe.network)}
    used |= {("metric", plan.choice.name) for plan in recipe.metrics.values()}
    used |= {("prior", choice.name) for choice in recipe.prior.values()}
    used |= {("objective", plan.objective.name) for plan in recipe.stages}
    device, data = trainer.device, trainer.built.dataset
    about: dict[str, Any] = getattr(data, "about", dict)()
    return {
        **made_by(recipe),
        "processes": trainer.parallel.world,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu ({platform.processor() or platform.machine()})",
        "precision": arithmetic(recipe.train.precision, device),
        "plugins": {f"{kind} {name}": str(trainer.built.catalogue.owner(kind, name)) for kind, name in sorted(used)},
        "git": _git(),
        "data": {
            "name": recipe.data.name,
            "fingerprint": data.fingerprint(),
            "residency": trainer.feed.residency,
            "notes": getattr(data, "notes", list)(),
            **about,
        },
        "spec": spec_told(trainer.built.spec),
        "reconstruction": getattr(trainer.built.reconstruction, "identity", None),
        "warnings": trainer.health.told,
        "parameters": {name: sum(map(torch.numel, player.parameters)) for name, player in trainer.players.items()},
    }


def made_by(recipe: recipes.Recipe) -> dict[str, Any]:
    """What a manifest says of the recipe, the command and the machine, whatever is made by it."""
    return {
        "recipe": recipe.name,
        "profiles": list(recipe.profiles),
        "automatic_profile": recipe.automatic_profile,
        "sets": list(recipe.sets),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "seed": recipe.train.seed,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def spec_told(spec: Spec) -> dict[str, Any]:
    """What a manifest says of the data's `Spec`: the inverse of `spec_of`."""
    return attrs.asdict(attrs.evolve(spec, factors=dict(spec.factors)))


def _git() -> str | None:
    """The commit of siv's own checkout, if it runs from one."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
