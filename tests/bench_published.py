"""siv's step against the published Soft-IntroVAE code's, interleaved: `just bench-published FOLDER [2d|cifar10]`.

FOLDER is a clone of https://github.com/taldatech/soft-intro-vae-pytorch (measured at commit b6dbf16). Its training function runs
as it is: where it asks its progress bar for the next step, siv does one of its own. Both draw their own data and noise. CIFAR-10
is random numbers of its shape for the published code, and for siv where it is not at hand.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_step import HERE, keep

from siv_core.recipe import catalogue, recipe
from siv_core.runs import timing
from siv_core.train.trainer import Trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "2d": {
        "recipe": "toy2d_8gaussians",
        "folder": "soft_intro_vae_2d",
        "module": "train_soft_intro_vae_2d",
        "function": "train_soft_intro_vae_toy",
        "options": {"batch_size": 512, "n_iter": 10**9, "beta_rec": 0.2, "beta_kl": 0.3, "beta_neg": 0.9, "test_iter": 10**9,
                    "save_interval": 10**9},
    },
    "cifar10": {
        "recipe": "cifar10",
        "folder": "soft_intro_vae",
        "module": "train_soft_intro_vae",
        "function": "train_soft_intro_vae",
        "options": {"dataset": "cifar10", "z_dim": 128, "batch_size": 32, "num_workers": 0, "num_epochs": 1, "beta_neg": 256,
                    "test_iter": 10**9, "with_fid": False},
    },
}  # fmt: skip


class Enough(Exception):
    """As many steps as were asked for."""


class Turns:
    """In the place of the published code's progress bar: times its steps, and siv's between them."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.trainer, self.steps, self.begun = trainer, steps, 0.0
        self.times: dict[str, list[float]] = {"siv": [], "published": []}

    def __call__(self, iterable: Iterable[Any]) -> Turns:
        self.items = iterable
        return self

    def __iter__(self) -> Iterator[Any]:
        active = self.trainer.active
        assert active
        for item in self.items:
            if self.begun:
                self.times["published"].append(time.perf_counter() - self.begun)
            begun = time.perf_counter()
            self.trainer.advance(active)
            self.times["siv"].append(time.perf_counter() - begun)
            if len(self.times["siv"]) > self.steps + 3:  # the first ones allocate
                raise Enough
            self.begun = time.perf_counter()
            yield item

    def set_description_str(self, *_: Any) -> None: ...

    def set_postfix(self, **_: Any) -> None: ...


class Random(torch.utils.data.Dataset[Any]):
    """In the place of torchvision's CIFAR-10."""

    def __init__(self, **_: Any) -> None:
        self.x = torch.rand(1024, 3, 32, 32)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.x[i], 0


def published(folder: Path, what: dict[str, Any]) -> Any:
    """Its module, with stand-ins for what only its data sets and its FID need."""
    for name in ("dataset", "metrics", "metrics.fid_score", "tqdm"):
        stand_in = types.ModuleType(name)
        stand_in.__file__ = __file__
        stand_in.__getattr__ = lambda attribute: None  # type: ignore[method-assign]
        sys.modules[name] = stand_in
    sys.path.insert(0, str(folder / what["folder"]))
    return importlib.import_module(what["module"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", nargs="?", choices=SETTINGS, default="2d")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    what = SETTINGS[arguments.what]
    torch.set_num_threads(arguments.threads)
    known = catalogue.load()
    read = recipe.load(HERE / f"recipes/{what['recipe']}.toml", known, (), arguments.set)
    trainer = timing.trainer_of(timing.ready(read, known, lambda what, done, total: None).built, torch.device("cpu"))
    introspective = next(i for i, plan in enumerate(read.stages) if plan.objective.name != "vae")
    timing.enter(trainer, introspective)
    module = published(arguments.folder.resolve(), what)
    module.tqdm = turns = Turns(trainer, arguments.steps)
    module.CIFAR10 = Random
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(Enough), contextlib.redirect_stdout(io.StringIO()):
        os.chdir(scratch)  # it writes where it stands
        getattr(module, what["function"])(**what["options"])
    times = {name: values[3 : arguments.steps + 3] for name, values in turns.times.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:9} {1e3 * value:9.2f} ms a step (median of {arguments.steps}, {torch.get_num_threads()} threads)")
    ratios = sorted(b / a for a, b in zip(times["siv"], times["published"], strict=True))
    quartiles = f"{ratios[len(ratios) // 4]:.2f} … {ratios[3 * len(ratios) // 4]:.2f}"
    print(f"published / siv: {statistics.median(ratios):.3f} (quartiles of pairs {quartiles})")
    about = {"recipe": what["recipe"], "beside": "published", "sets": arguments.set, "threads": torch.get_num_threads()}
    figures = {f"{name}_ms": 1e3 * value for name, value in medians.items()}
    print(keep(HERE / "bench", about, {**figures, "published / siv": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
