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
from typing import Any

import attrs
import torch

from siv_core import build, checkpoint, files, recipe
from siv_core.build import Built
from siv_core.convert import Length
from siv_core.errors import UserError
from siv_core.protocols import Spec
from siv_core.rundir import RunDir
from siv_core.trainer import Trainer, stage_ends

LIBRARIES = ("siv", "torch", "torchvision", "numpy", "safetensors", "h5py", "pluggy", "attrs", "cattrs")
DECIDES_BITS = ("threads", "processes", "device", "torch", "numpy", "siv")
KEPT = ("time", "command", "libraries", "device", "threads", "processes")  # of an earlier manifest


# -- what a resume finds -----------------------------------------------------------------------------------------------------


def newest(found: RunDir, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, None before the first; a damaged one is told."""
    steps = checkpoint.steps(found.checkpoints)
    for step in reversed(steps):
        path = checkpoint.path_of(found.checkpoints, str(step))
        wrong = checkpoint.problems(path)
        if not wrong:
            return path
        for line in wrong:
            say(f"{line}; trying the checkpoint before it")
    if steps:
        raise UserError(
            f"{found.checkpoints}: none of its {len(steps)} checkpoints is whole; move this folder away to start the run over"
        )
    return None


def check_same(found: RunDir, built: Built, path: Path) -> None:
    """A `UserError` where going on from this checkpoint would not go on with the same run."""
    before, now = earlier(found).get("data", {}).get("fingerprint"), built.dataset.fingerprint()
    if before not in (None, now):
        raise UserError(
            f"{found.path}: trained on other data: fingerprint {before} then, {now} of '{built.recipe.data.name}' now;"
            " bring the earlier data back, or start a new run"
        )
    same_recipe(found, path)
    problems = changed_lengths(built, found, int(files.read_json(path / "state.json")["step"]))
    if problems:
        raise UserError(problems)


def same_recipe(found: RunDir, path: Path) -> None:
    """A `UserError` where a checkpoint was saved by another recipe's run; those of earlier versions do not tell."""
    saved = files.read_json(path / "state.json").get("resolved")
    if saved is not None:
        differing = recipe.differences(found.resolved(), saved)
        if differing:
            raise UserError([f"{path}: saved by another recipe; these differ:", *differing, *checkpoint.offer(path)])


def changed_lengths(built: Built, found: RunDir, step: int) -> list[str]:
    """What is wrong with the stages' new lengths when `step` steps are done: the past cannot be changed."""
    images, before = len(built.dataset.rows("train")), found.resolved()["stages"]
    try:
        old = stage_ends([(Length.parse(stage["length"]), stage["batch"]) for stage in before], images)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{found.path / 'resolved.json'}: damaged, a stage's length is not what siv writes ({error})") from error
    new = ends_of(built)
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


def complete(found: RunDir, built: Built, path: Path) -> bool:
    """Whether there is nothing left to do: trained to the end, drawn, and measured with these metrics."""
    step = files.read_json(path / "state.json")["step"]
    measured = found.resolved().get("metrics") == built.recipe.resolved()["metrics"]
    return found.state() == "finished" and bool(step == ends_of(built)[-1]) and measured


def ends_of(built: Built) -> list[int]:
    """The step at which each stage is over."""
    return stage_ends([(plan.length, plan.batch) for plan in built.recipe.stages], len(built.dataset.rows("train")))


def earlier(found: RunDir) -> dict[str, Any]:
    """The manifest of the start before this one."""
    return found.manifest() if (found.path / "manifest.json").exists() else {}


def spec_of(manifest: Mapping[str, Any]) -> Spec | None:
    """What a run's manifest says of its data."""
    saved = manifest.get("spec")
    if not saved:
        return None
    try:
        return Spec(**{**saved, "shape": tuple(saved["shape"]), "value_range": tuple(saved["value_range"])})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the run's manifest.json: damaged, 'spec' is not what siv writes ({error})") from error


# -- what a start writes -----------------------------------------------------------------------------------------------------


def write_head(found: RunDir, trainer: Trainer, say: Callable[[str], None], offsets: Mapping[str, int]) -> None:
    """What a run writes before its first step, or before it goes on."""
    found.cut(dict(offsets))
    before, read = earlier(found), trainer.built.recipe
    checkpoint.prune(
        found.checkpoints, read.train.keep_every, trainer.counters.step
    )  # a kill may have come between save and this
    now = manifest(trainer)
    for what in changed_machine(before, now):
        say(f"{what}: the last bits may differ from a run that was not interrupted")
    files.write_bytes(found.path / "recipe.toml", read.source)
    past = [*before.get("history", []), {key: before.get(key) for key in KEPT}] if before else []
    found.write("manifest", {**now, "history": past})
    files.write_json(found.path / "resolved.json", read.resolved())
    found.status("running", step=trainer.counters.step)
    found.log(f"start: {shlex.join(sys.argv)}")
    say(f"run directory {found.path}")


def changed_machine(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What bits depend on and is not as it was at the last start."""
    if not before:
        return []
    old, new = ({**m["libraries"], **m} for m in (before, now))
    return [f"{key} {old.get(key)} before, {new[key]} now" for key in DECIDES_BITS if old.get(key) != new[key]]


def manifest(trainer: Trainer) -> dict[str, Any]:
    """Where and with what a run was made."""
    read = trainer.built.recipe
    used = {(choice.kind, choice.name) for choice in (read.data, read.reconstruction, *read.network, *read.metrics.values())}
    used |= {("prior", choice.name) for choice in read.prior.values()}
    used |= {("objective", plan.objective.name) for plan in read.stages}
    device, data = trainer.device, trainer.built.dataset
    about: dict[str, Any] = getattr(data, "about", dict)()
    return {
        "recipe": read.name,
        "profiles": list(read.profiles),
        "automatic_profile": read.automatic_profile,
        "sets": list(read.sets),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "seed": read.train.seed,
        "threads": torch.get_num_threads(),
        "processes": trainer.parallel.world,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu ({platform.processor() or platform.machine()})",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "plugins": {f"{kind} {name}": str(trainer.built.catalogue.owner(kind, name)) for kind, name in sorted(used)},
        "git": _git(),
        "data": {"name": read.data.name, "fingerprint": data.fingerprint(), "residency": trainer.feed.residency, **about},
        "spec": attrs.asdict(attrs.evolve(trainer.built.spec, factors=dict(trainer.built.spec.factors))),
        "reconstruction": getattr(trainer.built.reconstruction, "identity", None),
        "warnings": trainer.health.told,
        "parameters": {name: build.size_of(player.module) for name, player in trainer.players.items()},
    }


def _git() -> str | None:
    """The commit of siv's own checkout, if it runs from one."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
