"""Another program's checkpoint as a run of ours: `siv import`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from siv_core.errors import UserError, one_line
from siv_core.protocols import Converted, Spec, Weights
from siv_core.recipe import build
from siv_core.recipe import catalogue as catalogues
from siv_core.recipe import recipe as recipes
from siv_core.recipe.build import Built
from siv_core.recipe.recipe import Choice
from siv_core.runs import record
from siv_core.runs.watchers import Lines, Watcher
from siv_core.store import checkpoint, files, weights
from siv_core.store.rundir import RunDir

DIGITS = 64  # of a sha256


def bring(
    name: str,
    file: str | Path,
    recipe_path: str | Path,
    run_dir: str | Path,
    sha256: str | None = None,
    *,
    profiles: Sequence[str] = (),
    sets: Sequence[str] = (),
    watcher: Watcher | None = None,
) -> RunDir:
    """Make a run directory of the weights in `file`, which are of the format `name`; a recipe tells network, data and metrics.
    What is there can be used and measured, and a new run can start from it (`[init]`).

    The file is opened once its `sha256` is what was given, and nothing in it is run. A `UserError` where the recipe's network,
    its options or the size of its images are not those of the weights, or the folder is not empty.
    """
    watcher = watcher or Lines()
    catalogue = catalogues.load()
    component = catalogue.get("weights", name)
    reader: Weights = build.component(catalogue, Choice("weights", name, component.config()))
    recipe = recipes.load(files.expanded(recipe_path), catalogue, tuple(profiles), tuple(sets))
    if [choice.name for choice in recipe.network] != [reader.network]:
        own = " and ".join(repr(choice.name) for choice in recipe.network)
        raise UserError(f"network.name: is {own}, {name} are weights of '{reader.network}'")
    path = files.expanded(file)
    data, digest = _checked(path, sha256)
    found = reader.convert(weights.state_dict(data, path))
    _same_options(recipe.network[0], found)
    dataset = build.dataset(recipe, catalogue)
    lacking = dataset.missing()
    spec = Spec(found.shape) if lacking else dataset.spec
    said = getattr(recipe.data.config, "size", 0)  # of data that are not at hand all that is known
    if lacking and said and said != found.shape[-1]:
        raise UserError(f"data.size: {said}, the weights are for {found.shape[-1]}: set data.size, or take other data")
    if spec.shape != found.shape:
        own, size = (" × ".join(map(str, shape)) for shape in (spec.shape, found.shape))
        raise UserError(f"data: of {own}, the weights are for {size}: set data.size, or take other data")
    built = build.build(recipe, catalogue, dataset, spec)
    tensors = _fitted(built, found, path)
    target = _empty(files.expanded(run_dir))
    if any(True for _ in built.priors.parameters()):
        watcher.say("the prior is not in the file: it is as this seed makes it")
    for line in (*found.notes, *([f"data '{recipe.data.name}' is not at hand: {lacking}"] if lacking else [])):
        watcher.say(line)
    _write(RunDir.at(target), built, tensors, {"format": name, "file": str(path), "sha256": digest, "notes": list(found.notes)})
    watcher.say(f"run directory {target}")
    return RunDir(target)


def _checked(path: Path, sha256: str | None) -> tuple[bytes, str]:
    if sha256 is not None and not re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", sha256.lower()):
        raise UserError(f"--sha256 {sha256}: expected {DIGITS} digits of 0-9 and a-f")
    data, digest = weights.read(path, (sha256 or "").lower(), "fetch it again, or compare the digest with its publisher's")
    if sha256 is None:
        raise UserError(
            f"{one_line(path)}: its sha256 is {digest}: where that is what its publisher says, give --sha256 {digest}"
        )
    return data, digest


def _same_options(choice: Choice, found: Converted) -> None:
    own = choice.tree()
    differing = [key for key, value in found.config.items() if own.get(key) != value]
    if differing:
        told = [
            f"network.{key}: is {json.dumps(own.get(key))}, the weights have {json.dumps(found.config[key])}" for key in differing
        ]
        remedy = " ".join(f"--set network.{key}={json.dumps(found.config[key])}" for key in differing)
        raise UserError([*told, f"network '{choice.name}' must be as the weights are: {remedy}"])


def _fitted(built: Built, found: Converted, path: Path) -> checkpoint.Tensors:
    """The players' tensors by file of a checkpoint, once the networks have taken them."""
    for key, tensors in found.players.items():
        module: nn.Module = built.modules[key.partition("@")[0]]
        checkpoint.restore_module(module, tensors, f"{one_line(path)}: {key}")
    return {**found.players, "prior": dict(built.modules["prior"].state_dict())}


def _empty(path: Path) -> Path:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{one_line(path)}: is there already; give --run-dir a folder that is not")
    return path


def _write(run_dir: RunDir, built: Built, tensors: checkpoint.Tensors, source: dict[str, Any]) -> None:
    recipe = built.recipe
    last = len(recipe.stages) - 1
    state = {
        "images_seen": 0,
        "number": 1,
        "tick_images": 0,
        "stage": {"number": last, "fade": 1.0},
        "stats": {"names": {}, "samples": {}},
        "offsets": {},
        "resolved": recipe.resolved(),
    }
    checkpoint.save(run_dir.checkpoints, 0, tensors, state)
    files.write_bytes(run_dir.path / "recipe.toml", recipe.source)
    files.write_json(run_dir.path / "resolved.json", recipe.resolved())
    owner = built.catalogue.owner
    manifest = {
        **record.made_by(recipe),
        "imported": source,
        "processes": 1,
        "device": None,
        "plugins": {f"network {choice.name}": str(owner("network", choice.name)) for choice in recipe.network},
        "data": {"name": recipe.data.name, "fingerprint": None, "notes": []},
        "spec": record.spec_told(built.spec),
        "warnings": [],
        "history": [],
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in built.modules.items()},
    }
    run_dir.write("manifest", manifest)
    run_dir.status("imported", step=0)
