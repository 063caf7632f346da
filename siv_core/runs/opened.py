"""A run that is there, opened for use: its model from its own recipe and a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from siv_core.errors import UserError
from siv_core.model import Model
from siv_core.nets import set_stage, stage_of
from siv_core.protocols import Dataset
from siv_core.recipe import build, resolved
from siv_core.recipe import catalogue as catalogues
from siv_core.recipe import recipe as recipes
from siv_core.recipe.build import Built
from siv_core.runs import record
from siv_core.runs.device import pick_device
from siv_core.store import files
from siv_core.store.checkpoint import Checkpoint, offer, path_of
from siv_core.store.rundir import RunDir


def load(run_path: str | Path, checkpoint: str | int = "last", weights: str = "auto", device: str = "auto") -> Model:
    """The model of a run: its networks as it resolved to them, their weights from a checkpoint. Needs no data.

    `weights`: raw, ema, or auto, which is ema where the checkpoint has averages; `Model.name` says which it came to.
    """
    return open_run(run_path, str(checkpoint), weights, device).model


@frozen(eq=False)
class Opened:
    """A run that was opened for use."""

    built: Built
    model: Model
    run_dir: RunDir
    step: int


def open_run(
    run: str | Path, checkpoint: str, weights: str, device: str, sets: Sequence[str] = (), *, noise: bool = True
) -> Opened:
    """As `load`, with what belongs to the model. `sets` may say where the data lie now, and what to measure; without `noise` a
    decoder that has some of its own gets none."""
    run_dir = RunDir.existing(files.expanded(run))
    manifest, catalogue = run_dir.manifest(), catalogues.load()
    recipe = resolved.load(run_dir.path / "resolved.json", run_dir.resolved(), manifest, catalogue, sets)
    built = build.build(recipe, catalogue, build.dataset(recipe, catalogue), record.spec_of(manifest))
    saved = Checkpoint.open(path_of(run_dir.checkpoints, checkpoint))
    model = model_of(built, saved, weights, pick_device(device))
    record.same_recipe(run_dir, saved)
    return Opened(built, model if noise else model.without_noise(), run_dir, saved.step)


def model_of(built: Built, saved: Checkpoint, weights: str, device: torch.device) -> Model:
    """The networks of `built` with the weights of a checkpoint in them."""
    used = saved.load(built.modules, weights)
    stage = saved.state["stage"]
    if stage["number"] >= len(built.recipe.stages):
        told = f"{saved.path}: saved in stage {stage['number']}, which this recipe does not have"
        raise UserError([told, *offer(saved.path)])
    plan, modules = built.recipe.stages[stage["number"]], built.place(device)
    set_stage(modules.values(), stage_of(stage["number"], built.shape(plan), stage["fade"], device))
    return built.model(modules, device, f"{saved.name}, {used} weights", plan)


def start_of(recipe: recipes.Recipe) -> Checkpoint:
    """The checkpoint that `[init]` names."""
    assert recipe.init
    try:
        saved = Checkpoint.open(path_of(RunDir.existing(Path(recipe.init.run)).checkpoints, recipe.init.checkpoint))
        saved.which(recipe.init.weights)
    except UserError as error:
        raise recipe.told(f"init.run: {line}" for line in error.problems) from error
    return saved


def need_data(one: Opened, progress: Any) -> str:
    """Prepare the data of a run, and see that they are what it was trained on: a line that says so, or a `UserError`."""
    data, name = one.built.dataset, one.built.recipe.data.name
    places = [f"{key}={path}" for key, path in one.built.recipe.places_of().items() if key.startswith("data.") and path]
    lacking = data.missing()
    if lacking:
        told = f"data '{name}' is not at hand: {lacking}"
        raise UserError(told + (f" (here by --set {places[0].partition('=')[0]}=…)" if places else ""))
    data.prepare(progress)
    known = record.same_data(one.run_dir, one.built)
    at = f" at {places[0].partition('=')[2]}" if places else ""
    whose = "those of the run" if known else "compared with none, as the run knows none"
    return f"data '{name}'{at}, {whose}: fingerprint {data.fingerprint()}"


def data_to_draw(one: Opened) -> tuple[Dataset | None, str | None]:
    """The run's data, prepared, to be drawn under samples; or None and why, which is no reason not to sample."""
    try:
        need_data(one, lambda what, done, total: None)
    except UserError as error:
        return None, f"samples without the data: {'; '.join(error.problems)}"
    return one.built.dataset, None


def dataset_by_name(name: str, sets: tuple[str, ...] = ()) -> Any:
    """A data set outside a recipe, with `KEY=VALUE` options."""
    catalogue = catalogues.load()
    catalogue.get("dataset", name)
    return build.component(catalogue, recipes.dataset_choice(catalogue, name, sets))
