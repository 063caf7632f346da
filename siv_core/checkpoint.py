"""Checkpoints: a folder of safetensors files and a `state.json` that names each with its size and digest.

A checkpoint appears under its name in one rename, whole, or not at all. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from siv_core.errors import UserError
from siv_core.files import TEMPORARY, digest, read_json, sync_folder, write_json

FORMAT = 1
Tensors = dict[str, dict[str, Tensor]]  # file stem -> name -> tensor


def save(folder: Path, step: int, tensors: Tensors, state: dict[str, Any]) -> Path:
    """Write `folder/step_00001000`; a whole one that is there already is left as it is (a resumed run made it again)."""
    final = folder / f"step_{step:08d}"
    if final.exists():
        if not problems(final):
            return final
        remove(final)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TEMPORARY}{os.getpid()}-{final.name}"
    temporary.mkdir()
    listing = {}
    for stem, named in tensors.items():
        path = temporary / f"{stem}.safetensors"
        save_file({key: value.detach().cpu().clone().contiguous() for key, value in named.items()}, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        listing[path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    write_json(temporary / "state.json", {"format": FORMAT, "step": step, **state, "files": listing})
    sync_folder(temporary)
    os.replace(temporary, final)
    sync_folder(folder)
    return final


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors on the CPU and the state; a damaged checkpoint is a `UserError`."""
    wrong = problems(path)
    if wrong:
        raise UserError(wrong)
    state = read_json(path / "state.json")
    stems = [Path(name).stem for name in state["files"]]
    return {stem: load_file(path / f"{stem}.safetensors") for stem in stems}, state


def problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint, a line each; nothing when it is whole."""
    try:
        state = read_json(path / "state.json")
    except UserError as error:
        return list(error.problems)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        return [f"{path}: this siv reads checkpoints of format {FORMAT}"]
    if not isinstance(state.get("files"), dict):
        return [f"{path / 'state.json'}: damaged, it names no files"]
    found = []
    for name, expected in state["files"].items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            found.append(f"{file}: missing")
        elif file.stat().st_size != expected["bytes"] or digest(file) != expected["sha256"]:
            found.append(f"{file}: damaged, its size or sha256 is not what was saved")
    return found


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*") if path.name[5:].isdigit())


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


def prune(folder: Path, keep_every: int) -> None:
    """Keep the two newest and, counted by their order in training, every `keep_every`-th."""
    for path in [folder / f"step_{step:08d}" for step in steps(folder)[:-2]]:
        with contextlib.suppress(UserError):  # a damaged one is left for its owner to look at
            if not keep_every or read_json(path / "state.json")["number"] % keep_every:
                remove(path)


def remove(path: Path) -> None:
    """Take the name away first, so that no half-deleted checkpoint is ever met."""
    doomed = path.with_name(f"{TEMPORARY}removed-{os.getpid()}-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def optimiser_tensors(module: nn.Module, optimiser: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """`parameter/moment` -> tensor."""
    if optimiser is None:
        return {}
    known = [(name, optimiser.state.get(parameter, {})) for name, parameter in module.named_parameters()]
    return {f"{name}/{key}": value for name, moments in known for key, value in moments.items()}


def restore_optimiser(module: nn.Module, optimiser: torch.optim.Optimizer | None, tensors: dict[str, Tensor]) -> None:
    if optimiser is None:
        return
    parameters = dict(module.named_parameters())
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
    """Load weights, or say which tensors are missing, unknown or of another shape."""
    own = module.state_dict()
    wrong = [f"{where}: tensor '{name}' is missing" for name in own.keys() - tensors.keys()]
    wrong += [f"{where}: tensor '{name}' is not part of this network" for name in tensors.keys() - own.keys()]
    wrong += [
        f"{where}: tensor '{name}' has shape {list(tensors[name].shape)}, the network needs {list(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if wrong:
        raise UserError(sorted(wrong))
    module.load_state_dict(tensors)
