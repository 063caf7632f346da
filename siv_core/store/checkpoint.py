"""Checkpoints: a folder of safetensors files and a `state.json` that names each with its size and digest.

A checkpoint appears under its name in one rename, whole, or not at all. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from attrs import frozen
from torch import Tensor, nn

from siv_core.errors import UserError
from siv_core.store import files
from siv_core.store.files import TEMPORARY, read_json, sync_folder, write_json, writing

FORMAT = 1
COUNTERS = ("step", "images_seen", "number", "tick_images")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what Adam keeps of a parameter
Tensors = dict[str, dict[str, Tensor]]  # file stem -> name -> tensor


def save(folder: Path, step: int, tensors: Tensors, state: dict[str, Any]) -> Path:
    """Write `folder/step_00001000`; a whole one that is there already is left as it is (a resumed run made it again)."""
    final = folder / f"step_{step:08d}"
    if os.path.lexists(final):
        if not problems(final):
            return final
        remove(final)
    files.make_folder(folder)
    temporary = folder / f"{TEMPORARY}{os.getpid()}-{final.name}"
    try:
        with writing(final):
            temporary.mkdir()
            listing = {f"{stem}.safetensors": _write(temporary / f"{stem}.safetensors", own) for stem, own in tensors.items()}
            write_json(temporary / "state.json", {"format": FORMAT, "step": step, **state, "files": listing})
            sync_folder(temporary)
            os.replace(temporary, final)
            sync_folder(folder)
    except BaseException:
        with contextlib.suppress(OSError, UserError):  # room for those who may need it; what stays goes at the next start
            files.remove(temporary)
        raise
    return final


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What `state.json` says of the file."""
    data = safetensors.torch.save({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()})
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@frozen(eq=False)
class Checkpoint:
    """One that was found whole: every file of it was read once, and what was loaded is what was hashed."""

    path: Path
    state: dict[str, Any]
    tensors: Tensors  # on the CPU

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read and check it all; a damaged checkpoint is a `UserError` that names the one before it."""
        opened = read(path)
        if isinstance(opened, list):
            raise UserError([*opened, *offer(path)])
        return opened

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def part(self, name: str) -> dict[str, Tensor]:
        """One file of it; a `UserError` where it has no such file."""
        if name not in self.tensors:
            raise UserError(f"{self.path / name}.safetensors: not in this checkpoint; is it one of another recipe?")
        return self.tensors[name]

    def which(self, weights: str) -> str:
        """Raw or ema: "auto" is the average where there is one."""
        if weights not in ("raw", "ema", "auto"):
            raise UserError(f"weights '{weights}': expected raw, ema or auto")
        averaged = any(name.endswith("@ema") for name in self.tensors)
        if weights == "ema" and not averaged:
            raise UserError(f"{self.path}: has no averaged weights; a recipe keeps them with a [shadow] table")
        return "ema" if averaged and weights != "raw" else "raw"

    def load(self, modules: Mapping[str, nn.Module], weights: str) -> str:
        """Give these players its weights; which ones these are."""
        used = self.which(weights)
        for name, module in modules.items():
            chosen = f"{name}@ema" if used == "ema" and f"{name}@ema" in self.tensors else name
            with self.fitting():
                restore_module(module, self.part(chosen), f"{self.path}/{chosen}")
        return used

    @contextlib.contextmanager
    def fitting(self) -> Iterator[None]:
        """Name the checkpoint before this one beside what keeps it from fitting."""
        try:
            yield
        except UserError as error:
            raise UserError([*error.problems, *offer(self.path)]) from error


def read(path: Path) -> Checkpoint | list[str]:
    """The checkpoint, or what is wrong with it, a line each."""
    try:
        state = read_json(path / "state.json")
    except UserError as error:
        return list(error.problems)
    wrong = files.format_problem(state, path / "state.json", FORMAT) or _state_problems(state, path)
    if wrong:
        return wrong
    tensors: Tensors = {}
    for name, expected in state["files"].items():
        file = path / name
        if not re.fullmatch(r"[^/\0]+\.safetensors", name):
            wrong.append(f"{path / 'state.json'}: damaged, it names a file {name!r}")
            continue
        if not file.is_file():
            wrong.append(f"{file}: missing")
            continue
        data = file.read_bytes()
        if {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} != expected:
            wrong.append(f"{file}: damaged, its size or sha256 is not what was saved")
            continue
        try:
            tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(data)
        except Exception as error:  # the reader lets through whatever it runs into
            wrong.append(f"{file}: damaged, not safetensors ({error})")
    return wrong or Checkpoint(path, state, tensors)


def problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint, a line each; nothing when it is whole."""
    found = read(path)
    return found if isinstance(found, list) else []


def _state_problems(state: dict[str, Any], path: Path) -> list[str]:
    """Whether `state.json` has all that a resume takes from it, each of its kind."""
    stats = _table(state.get("stats"))
    names, samples = _table(stats.get("names"), {"": None}), _table(stats.get("samples"), {"none": None})
    good = {key: _count(state.get(key)) for key in COUNTERS}
    stage = _table(state.get("stage"))
    fade = stage.get("fade")
    good["stage"] = _count(stage.get("number")) and isinstance(fade, (int, float)) and 0 <= fade <= 1
    good["files"] = bool(_table(state.get("files")))
    good["offsets"] = all(_count(value) for value in _table(state.get("offsets"), {"": None}).values())
    good["stats"] = names.keys() == samples.keys() and all(
        isinstance(names[phase], list) and all(isinstance(name, str) for name in names[phase]) and _count(samples[phase])
        for phase in names
    )
    wrong = [f"{path / 'state.json'}: damaged, '{key}' is missing or not what siv writes" for key in good if not good[key]]
    if not wrong and path.name != f"step_{state['step']:08d}":
        wrong = [f"{path}: holds the checkpoint of step {state['step']}; give the folder its own name back"]
    return wrong


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _table(value: Any, otherwise: dict[str, Any] | None = None) -> dict[str, Any]:
    return value if isinstance(value, dict) else otherwise or {}


def offer(path: Path) -> list[str]:
    """A line that names the newest whole checkpoint before `path` and how to take it; nothing where there is none."""
    before = [step for step in steps(path.parent) if step < _step(path.name)]
    for step in reversed(before):
        if not problems(path_of(path.parent, str(step))):
            take = f"--checkpoint {step} takes it, and a resume does so once {path.name} is moved away"
            return [f"the checkpoint of step {step} before it is whole: {take}"]
    return []


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    return sorted(step for path in folder.glob("step_*") if (step := _step(path.name)) >= 0)


def _step(name: str) -> int:
    """The step of a checkpoint's folder, −1 where it is none."""
    digits = name.removeprefix("step_")
    return int(digits) if re.fullmatch(r"[0-9]{8,18}", digits) and name == f"step_{int(digits):08d}" else -1


def path_of(folder: Path, which: str) -> Path:
    """The checkpoint of a step, or the newest for "last"."""
    known = steps(folder)
    if not known:
        raise UserError(f"{folder}: no checkpoint here yet")
    if which == "last":
        return folder / f"step_{known[-1]:08d}"
    if not re.fullmatch("[0-9]{1,18}", which) or int(which) not in known:
        raise UserError(f"{folder}: no checkpoint '{which}'; there are: {', '.join(map(str, known))} and last")
    return folder / f"step_{int(which):08d}"


def prune(folder: Path, keep_every: int, newest: int) -> None:
    """Keep the two newest up to step `newest` and, counted by their order in training, every `keep_every`-th.

    What lies beyond is damaged, else the run had gone on from it; it is left for its owner to look at.
    """
    for path in [folder / f"step_{step:08d}" for step in steps(folder) if step <= newest][:-2]:
        with contextlib.suppress(UserError, KeyError, TypeError):  # so is a damaged one
            if not keep_every or read_json(path / "state.json")["number"] % keep_every:
                remove(path)


def remove(path: Path) -> None:
    """Take the name away first, so that no half-deleted checkpoint is ever met."""
    doomed = path.with_name(f"{TEMPORARY}removed-{os.getpid()}-{path.name}")
    with writing(path):
        os.replace(path, doomed)
    files.remove(doomed)


def optimiser_tensors(module: nn.Module, optimiser: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """`parameter/moment` -> tensor."""
    if optimiser is None:
        return {}
    known = [(name, optimiser.state.get(parameter, {})) for name, parameter in module.named_parameters()]
    return {f"{name}/{key}": value for name, moments in known for key, value in moments.items()}


def restore_optimiser(module: nn.Module, optimiser: torch.optim.Optimizer | None, tensors: dict[str, Tensor], where: str) -> None:
    """Load moments; what does not belong to this network's parameters is a `UserError`."""
    parameters = dict(module.named_parameters()) if optimiser else {}
    expected = {}
    for name in {key.rpartition("/")[0] for key in tensors} & parameters.keys():  # one that never had a gradient has none
        scalar = torch.zeros(())
        expected.update({f"{name}/{moment}": scalar if moment == "step" else parameters[name] for moment in MOMENTS})
    _check_fit(expected, tensors, where)
    if optimiser is None:
        return
    optimiser.state.clear()
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        optimiser.state[parameters[name]][moment] = _laid_out_as(parameters[name], value)


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` on the parameter's device and, where it has its shape, in its strides."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    # fused Adam walks parameter and moments side by side in memory: contiguous moments of a channels-last weight are mixed up
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def restore_module(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Load weights, or say which tensors are missing, unknown, of another shape or type, or not finite."""
    _check_fit(module.state_dict(), tensors, where)
    module.load_state_dict(tensors)


def _check_fit(own: dict[str, Tensor], tensors: dict[str, Tensor], where: str) -> None:
    wrong = [f"{where}: tensor '{name}' is missing" for name in own.keys() - tensors.keys()]
    wrong += [f"{where}: tensor '{name}' is not part of this network" for name in tensors.keys() - own.keys()]
    for name in own.keys() & tensors.keys():
        needed, given = own[name], tensors[name]
        if given.shape != needed.shape:
            wrong.append(f"{where}: tensor '{name}' has shape {list(given.shape)}, the network needs {list(needed.shape)}")
        elif given.dtype != needed.dtype:
            wrong.append(f"{where}: tensor '{name}' is {given.dtype}, the network needs {needed.dtype}")
        elif not torch.isfinite(given).all() and torch.isfinite(needed).all():
            wrong.append(f"{where}: tensor '{name}' has values that are not finite")
    if wrong:
        raise UserError(sorted(wrong))
