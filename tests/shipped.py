"""The first steps of each shipped recipe, in float64, narrow networks on random data, by as many processes as torchrun started.

python tests/shipped.py FOLDER            torchrun --nproc-per-node 2 tests/shipped.py FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from safetensors.torch import save_file
from torch.utils._pytree import tree_map

from siv_core.errors import UserError
from siv_core.protocols import Spec
from siv_core.recipe import build, recipe
from siv_core.recipe import catalogue as catalogues
from siv_core.recipe.convert import Length
from siv_core.recipe.recipe import Recipe
from siv_core.runs import timing
from siv_core.runs.watchers import Silent
from siv_core.store.rundir import RunDir
from siv_core.train import parallel
from siv_core.train.trainer import Trainer

RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.toml"))
ON_A_CPU = ("cars3d_translation", "mnist")  # their profile `cpu`
STEPS, BATCH, SIZE = 20, 6, 32


def narrow(read: Recipe) -> Recipe:
    """Its stages of up to 32 pixels in 20 steps of 6; widths divided, and residual networks of at most three levels."""
    kept = [plan for plan in read.stages if (plan.size or 0) <= SIZE]
    steps = [STEPS // len(kept) + (i < STEPS % len(kept)) for i in range(len(kept))]
    stages = tuple(evolve(plan, length=Length(n, "steps"), batch=BATCH) for plan, n in zip(kept, steps, strict=True))
    network = tuple(evolve(choice, config=narrowed(choice.config)) for choice in read.network)
    train = evolve(read.train, batch=BATCH, precision="fp32")  # no autocast: all is float64
    return evolve(read, stages=stages, network=network, train=train)


def narrowed(config: Any) -> Any:
    lists = ("channels", "encoder_channels", "encoder_hidden", "decoder_channels")
    widths = {name: tuple(max(8, one // 16) for one in getattr(config, name)[:3]) for name in lists if hasattr(config, name)}
    single = {"start_channels": 4, "max_channels": 8, "output_channels": 8, "z_dim": 8}
    return evolve(config, **widths, **{name: width for name, width in single.items() if hasattr(config, name)})


def spec_of(read: Recipe, catalogue: catalogues.Catalogue) -> Spec:
    try:
        return build.dataset(read, catalogue).spec
    except UserError:  # which classes there are tells the data
        return Spec((3, SIZE, SIZE), classes=10)


def wide(one: Any) -> Any:
    return one.double() if isinstance(one, torch.Tensor) and one.is_floating_point() else one


class Wide(Trainer):
    """Steps in float64: in float32 Adam's first steps, ±rate however small the gradient, make more of rounding."""

    def drawn(self, active: Any) -> Any:
        return tuple(tree_map(wide, one) for one in super().drawn(active))


def train(path: Path, catalogue: catalogues.Catalogue, processes: parallel.Parallel, folder: Path) -> None:
    """What the steps told and the weights they ended with, from the main process."""
    sets = ['reconstruction={name="mse"}'] if path.stem == "cars3d_translation" else []  # VGG's weights are not at hand
    read = narrow(recipe.load(path, catalogue, ("cpu",) if path.stem in ON_A_CPU else (), sets))
    built = build.build(read, catalogue, None, spec_of(read, catalogue))
    built.dataset = timing.RandomData(built.spec)
    trainer = Wide.of(built, RunDir(Path()), torch.device("cpu"), processes, Silent())
    told = []
    for number in range(len(read.stages)):
        active = timing.enter(trainer, number)
        for _ in range(trainer.schedule.ends[number] - trainer.schedule.first(number)):
            trainer.advance(active)
        told.append(trainer.stats.flush())
    if processes.main:
        (folder / f"{path.stem}.json").write_text(json.dumps(told))
        modules = {name: player.module for name, player in trainer.players.items()}
        tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / f"{path.stem}.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    timing.RANDOM_IMAGES = 32
    at_work = parallel.start(torch.device("cpu"))
    for one in RECIPES:
        train(one, catalogues.load(), at_work, Path(sys.argv[1]))
