"""Steps that are done to be timed and thrown away: how long they take, and how much memory."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from attrs import frozen

from siv_core.protocols import Progress, Rows, Spec
from siv_core.recipe import build
from siv_core.recipe.build import Built
from siv_core.recipe.catalogue import Catalogue
from siv_core.recipe.recipe import Recipe
from siv_core.runs import device as devices
from siv_core.runs import watchers
from siv_core.store.rundir import RunDir
from siv_core.train import stage
from siv_core.train.parallel import Parallel
from siv_core.train.stage import ActiveStage
from siv_core.train.trainer import Trainer

WARM_UP_STEPS = 3  # the first allocate memory and the optimisers' moments
MEASURED_SECONDS = 4.0  # a stage, after the warm-up
BLOCKS = (3, 40)  # least and most pieces of a stage that are timed; their median does not mind an interruption
BLOCK_SECONDS = 0.1  # at least this long: a clock is read, and on CUDA waited for, at its ends only
RANDOM_IMAGES = 1024  # that stand in for data that is not at hand


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


@frozen
class Ready:
    """A recipe's parts with data to time steps on; without them where the reconstruction loss lacks something."""

    built: Built
    at_hand: bool  # the data; else they are random numbers
    lacking: str | None = None

    @property
    def data(self) -> str:
        return self.built.recipe.data.name if self.at_hand else f"random numbers of the shape {list(self.built.spec.shape)}"


def ready(recipe: Recipe, catalogue: Catalogue, progress: Progress) -> Ready:
    """Prepares the data where they are at hand, else takes random ones of their shape."""
    data = build.dataset(recipe, catalogue)
    built = build.build(recipe, catalogue, data)
    loss, at_hand = built.reconstruction, data.missing() is None
    lacking = getattr(loss, "missing", lambda: None)()
    if lacking:
        return Ready(built, at_hand, lacking)
    if at_hand:
        data.prepare(progress)
    else:
        built.dataset = RandomData(built.spec)
    getattr(loss, "prepare", lambda: None)()
    return Ready(built, at_hand)


def trainer_of(built: Built, device: torch.device) -> Trainer:
    """Of these parts; it writes into no run directory."""
    devices.set_precision(built.recipe.train)
    return Trainer.of(built, RunDir(Path()), device, Parallel(), watchers.Silent())


def enter(trainer: Trainer, number: int) -> ActiveStage:
    """This stage at its first step."""
    trainer.counters.step = trainer.schedule.first(number)
    trainer.active = stage.enter(trainer, number)
    return trainer.active


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


# -- memory ----------------------------------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """The most memory that this process ever had. `ru_maxrss` would count that of the process which started it."""
    told = _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if told is None else told


@frozen
class Memory:
    """What is taken from here on, at its peak; made before whatever takes it."""

    device: torch.device
    before: int | None

    @classmethod
    def of(cls, device: torch.device) -> Memory:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            return cls(device, torch.cuda.memory_allocated(device))
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:  # pages that the allocator has kept from before would hide what is taken
            trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        except OSError:  # not Linux, or not allowed
            return cls(device, None)
        return cls(device, _status("VmRSS"))

    def taken(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self.device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _status("VmHWM")
        return None if self.before is None or peak is None else max(0, peak - self.before)


def _status(name: str) -> int | None:
    """A line of what Linux tells of this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
