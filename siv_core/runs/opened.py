"""A run that is there, opened for use: its model from its own recipe and a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from siv_core.errors import UserError
from siv_core.model import Model
from siv_core.nets import set_stage
from siv_core.protocols import Stage
from siv_core.recipe import build
from siv_core.recipe import catalogue as catalogues
from siv_core.recipe import recipe as recipes
from siv_core.recipe.build import Built
from siv_core.runs import record
from siv_core.runs.device import pick_device
from siv_core.store import checkpoint
from siv_core.store.checkpoint import Checkpoint
from siv_core.store.rundir import RunDir


def load(run_path: str | Path, checkpoint: str = "last", weights: str = "auto", device: str = "auto") -> Model:
    """The model of a run: its networks from its own recipe, their weights from a checkpoint. Needs no data.

    `weights`: raw, ema, or auto, which is ema where the checkpoint has averages; `Model.name` says which it came to.
    """
    return open_run(run_path, checkpoint, weights, device).model


@frozen(eq=False)
class Opened:
    """A run that was opened for use."""

    built: Built
    model: Model
    run_dir: RunDir
    step: int


def open_run(run_path: str | Path, step: str, weights: str, device: str) -> Opened:
    """As `load`, with what belongs to the model."""
    run_dir = RunDir.existing(Path(run_path))
    manifest = run_dir.manifest()
    catalogue = catalogues.load()
    try:
        recipe = recipes.load(run_dir.path / "recipe.toml", catalogue, ("none", *manifest["profiles"]), manifest["sets"])
    except UserError as error:
        hint = "siv 0.1, which made this run, called the samples of the prior 'fake': write 'prior' in its recipe.toml"
        old = manifest["format"] == 1 and "fake" in str(error)
        raise UserError([*error.problems, *([hint] if old else [])]) from error
    data = build.dataset(recipe, catalogue)
    built = build.build(recipe, catalogue, data, record.spec_of(manifest) if data.missing() else None)
    saved = Checkpoint.open(checkpoint.path_of(run_dir.checkpoints, step))
    model = model_of(built, saved, weights, pick_device(device))
    record.same_recipe(run_dir, saved)
    return Opened(built, model, run_dir, saved.step)


def model_of(built: Built, saved: Checkpoint, weights: str, device: torch.device) -> Model:
    """The networks of `built` with the weights of a checkpoint in them."""
    used = saved.load(built.modules, weights)
    stage = saved.state["stage"]
    if stage["number"] >= len(built.recipe.stages):
        told = f"{saved.path}: saved in stage {stage['number']}, which this recipe does not have"
        raise UserError([told, *checkpoint.offer(saved.path)])
    plan, modules = built.recipe.stages[stage["number"]], built.place(device)
    set_stage(modules.values(), Stage(stage["number"], built.shape(plan), torch.tensor(stage["fade"], device=device)))
    return built.model(modules, device, f"{saved.name}, {used} weights", plan)


def start_of(recipe: recipes.Recipe) -> Checkpoint:
    """The checkpoint that `[init]` names."""
    assert recipe.init
    try:
        saved = Checkpoint.open(checkpoint.path_of(RunDir.existing(Path(recipe.init.run)).checkpoints, recipe.init.checkpoint))
        saved.which(recipe.init.weights)
    except UserError as error:
        raise recipe.told(f"init.run: {line}" for line in error.problems) from error
    return saved


def need_data(built: Built, progress: Any) -> None:
    """Prepare the data of a run, or say what is missing."""
    lacking = built.dataset.missing()
    if lacking:
        raise UserError(f"data '{built.recipe.data.name}' is not at hand: {lacking}")
    built.dataset.prepare(progress)


def dataset_by_name(name: str, sets: tuple[str, ...] = ()) -> Any:
    """A data set outside a recipe, with `KEY=VALUE` options."""
    catalogue = catalogues.load()
    catalogue.get("dataset", name)
    return build.component(catalogue, recipes.dataset_choice(catalogue, name, sets))
