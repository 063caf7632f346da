"""A run from its recipe to its last picture, and back from its directory: what `siv run` and the Python interface do."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from attrs import frozen

from siv_core import build, catalogue, checkpoint, evaluate, files, parallel, pictures, recipe, record, rundir
from siv_core.build import Built
from siv_core.errors import Diverged, SivError, Stopped, UserError
from siv_core.model import Model
from siv_core.players import set_stage
from siv_core.protocols import Stage
from siv_core.rundir import RunDir
from siv_core.trainer import Observer, Trainer


class Watcher(Observer, Protocol):
    """Who is told about a run, beside its progress in training."""

    def say(self, line: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def training(self, trainer: Trainer, max_seconds: float | None) -> Any:
        """A context around the training loop."""


class Silent:
    """Watches nothing."""

    def say(self, line: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def stepped(self, step: int, steps: int, images_seen: int) -> None: ...
    def ticked(self, line: dict[str, Any]) -> None: ...
    def wrote(self, path: Path) -> None: ...
    def asked_to_stop(self) -> int:
        return 0

    def training(self, trainer: Trainer, max_seconds: float | None) -> Any:
        return contextlib.nullcontext()


@frozen
class Run:
    """What a run left: its directory, and how it ended ("finished" or "stopped")."""

    path: Path
    state: str

    def model(self, checkpoint: str = "last", weights: str = "auto", device: str = "auto") -> Model:
        return load(self.path, checkpoint, weights, device)

    def metrics(self) -> list[dict[str, Any]]:
        return RunDir(self.path).read("metrics")


@frozen
class Request:
    """What was asked of `run`, beside the recipe."""

    profiles: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    run_dir: Path | None = None
    root: Path = Path("runs")
    device: str = "auto"
    max_seconds: float | None = None


# -- devices ---------------------------------------------------------------------------------------------------------------------


def nvidia_present() -> bool:
    """Whether the machine has an NVIDIA device, usable or not. Asks the operating system, not torch."""
    return any(Path(name).exists() for name in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA where there is an NVIDIA device, else the CPU. A device that is there and does not work is an error."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if name == "cpu" or (name == "auto" and not nvidia_present() and not torch.cuda.is_available()):
        return torch.device("cpu")
    try:
        device = parallel.local_device(torch.device("cuda" if name == "auto" else name))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable ({error}); `--device cpu` does without it") from error
    return device


# -- run -------------------------------------------------------------------------------------------------------------------------


def run(path: str | Path, *, watcher: Watcher | None = None, **overrides: Any) -> Run:
    """Train what a recipe says, measure it and draw it: `siv run` as a function.

    `overrides` are the fields of `Request`: profiles, sets (`"train.batch=8"`), run_dir, root, device, max_seconds. A `run_dir`
    with a run of the same recipe in it is continued.
    """
    overrides.update({key: Path(overrides[key]) for key in ("run_dir", "root") if overrides.get(key)})
    overrides.update({key: tuple(overrides[key]) for key in ("profiles", "sets") if key in overrides})
    request = Request(**overrides)
    known = catalogue.load()
    read = recipe.load(Path(path), known, request.profiles, request.sets, cpu_only=not nvidia_present())
    watcher = watcher or Silent()
    if read.automatic_profile:
        watcher.say("no NVIDIA device here: profile 'cpu' applies (turn it off with --profile none)")
    return start(read, known, request, watcher)


def resume(run_path: str | Path, *, watcher: Watcher | None = None, **overrides: Any) -> Run:
    """Go on with a run where it stopped; `sets` may give a longer length, other cadences or metrics."""
    found = RunDir.existing(Path(run_path))
    manifest = found.manifest()
    request = Request(
        profiles=("none", *manifest["profiles"]),
        sets=(*manifest["sets"], *overrides.get("sets", ())),
        run_dir=found.path,
        device=overrides.get("device", "auto"),
        max_seconds=overrides.get("max_seconds"),
    )
    known = catalogue.load()
    read = recipe.load(found.path / "recipe.toml", known, request.profiles, request.sets)
    return start(recipe.as_before(read, manifest), known, request, watcher or Silent())


def start(read: recipe.Recipe, known: catalogue.Catalogue, request: Request, watcher: Watcher) -> Run:
    """Data, networks, run directory, training, pictures and metrics, in this order."""
    for line in known.slow:
        watcher.say(line)
    device = pick_device(request.device)
    data = build.dataset(read, known)
    if data.missing():
        raise UserError(f"data '{read.data.name}' is not at hand: {data.missing()}")
    processes = parallel.start(device)
    for plan in read.stages:
        processes.share(plan.batch)  # a batch smaller than the number of processes is told before anything is made
    if processes.main:
        data.prepare(watcher.progress)
    processes.wait()
    built = build.build(read, known, data)
    build.room(built, on_cpu=device.type == "cpu")
    if read.init and not (request.run_dir and checkpoint.steps(request.run_dir / "checkpoints")):
        start_of(read)  # a run to start from that is not there is told before anything is made
    lacking = build.missing(built)
    if lacking:
        raise UserError(lacking)
    for name, metric in built.metrics().items():
        for need in metric.needs():
            watcher.say(f"metric {name}: will be skipped in part: {need}")
    set_precision(read.train)
    found = _run_dir(read, request, processes, watcher)
    with found.locked() if processes.main else contextlib.nullcontext():
        try:
            return _train_and_measure(built, found, device, processes, request, watcher)
        except Exception as error:
            if not isinstance(error, SivError):
                found.log("".join(traceback.format_exception(error)).rstrip())
            raise


def _train_and_measure(
    built: Built, found: RunDir, device: torch.device, processes: parallel.Parallel, request: Request, watcher: Watcher
) -> Run:
    read = built.recipe
    prepare = getattr(built.reconstruction, "prepare", None)
    if prepare:
        prepare()
    newest = record.newest(found, watcher.say)
    if newest:
        record.check_same(found, built, newest)
    if newest and record.complete(found, built, newest):
        watcher.say(f"{found.path} is finished; a longer length goes on with it (--set train.length, or the last stage's)")
        return Run(found.path, "finished")
    processes.wait()  # each has read by now what the main one is about to write anew
    if read.init and not newest:
        _restore(built, start_of(read), read.init.weights)
    trainer = Trainer.of(built, found, device, processes, watcher)
    if newest:
        trainer.resume(newest)
        watcher.say(f"going on from {newest}")
    if processes.main:
        offsets = files.read_json(newest / "state.json")["offsets"] if newest else {}
        record.write_head(found, trainer, watcher.say, offsets)

    def preview(name: str) -> None:
        if processes.main and evaluate.drawable(built.spec):
            model = built.model(device, plan=read.stages[trainer.standing()["number"]])
            pictures.save_png(found.images / f"{name}.png", evaluate.preview(model, built.dataset, read.train.seed))
            watcher.wrote(found.images / f"{name}.png")

    counters = trainer.counters
    try:
        with watcher.training(trainer, request.max_seconds):
            state = trainer.run(request.max_seconds, preview)
        if state == "finished" and processes.main:
            finish(built, found, device, watcher, counters.step)
    except Stopped as stop:
        _close(found, processes, "stopped", counters, watcher, f"{stop}; `siv run --resume {found.path}` goes on")
        raise
    except Diverged as error:
        _close(found, processes, "diverged", counters, watcher, f"diverged at step {counters.step}")
        raise trainer.diverged(error) from error
    except BaseException as error:
        with contextlib.suppress(UserError):  # where the disk is full or gone this cannot be noted either
            _close(found, processes, "failed", counters, watcher, "failed")
        if isinstance(error, UserError) and checkpoint.steps(found.checkpoints):
            raise UserError([*error.problems, f"once that is mended `siv run --resume {found.path}` goes on"]) from error
        raise
    _close(found, processes, state, counters, watcher, f"{state} at step {counters.step}, {counters.images_seen} images seen")
    return Run(found.path, state)


def finish(built: Built, found: RunDir, device: torch.device, watcher: Watcher, step: int) -> None:
    """Curves, pictures and the recipe's metrics of the checkpoint of this step, the last one."""
    path = checkpoint.path_of(found.checkpoints, str(step))
    pictures.curves(found.images / "curves.png", found.read("stats"))
    watcher.wrote(found.images / "curves.png")
    model = model_of(built, path, "auto", device)
    for picture in evaluate.final_pictures(model, built.dataset, found.images, built.recipe.train.seed):
        watcher.wrote(picture)
    append_metrics(built, model, found, path, "auto", watcher, by="run")


def append_metrics(
    built: Built, model: Model, found: RunDir, path: Path, weights: str, watcher: Watcher, *, by: str = "evaluate"
) -> list[dict[str, Any]]:
    """Measure, write a line for each value, and give the lines; those written `by` "evaluate" outlast a resume."""
    about = {
        "by": by,
        "checkpoint": path.name,
        "weights": used_weights(path, weights),
        "data": {"name": built.recipe.data.name, "fingerprint": built.dataset.fingerprint()},
        "siv": version("siv"),
    }
    lines = evaluate.measure(built.metrics(), model, built.dataset, about, watcher.progress, found.log)
    found.append("metrics", *lines)
    return lines


# -- load ------------------------------------------------------------------------------------------------------------------------


def load(run_path: str | Path, checkpoint: str = "last", weights: str = "auto", device: str = "auto") -> Model:
    """The model of a run: its networks from its own recipe, their weights from a checkpoint. Needs no data.

    `weights`: raw, ema, or auto, which is ema where the checkpoint has averages; `Model.name` says which it came to.
    """
    return open_run(run_path, checkpoint, weights, device)[1]


def open_run(run_path: str | Path, step: str, weights: str, device: str) -> tuple[Built, Model, RunDir, Path]:
    """As `load`, with what belongs to the model."""
    found = RunDir.existing(Path(run_path))
    manifest = found.manifest()
    known = catalogue.load()
    read = recipe.load(found.path / "recipe.toml", known, ("none", *manifest["profiles"]), manifest["sets"])
    data = build.dataset(read, known)
    built = build.build(read, known, data, record.spec_of(manifest) if data.missing() else None)
    path = checkpoint.path_of(found.checkpoints, step)
    model = model_of(built, path, weights, pick_device(device))
    record.same_recipe(found, path)
    return built, model, found, path


def model_of(built: Built, path: Path, weights: str, device: torch.device) -> Model:
    """The networks of `built` with the weights of a checkpoint in them."""
    used = _restore(built, path, weights)
    stage = files.read_json(path / "state.json")["stage"]
    if stage["number"] >= len(built.recipe.stages):
        raise UserError([f"{path}: saved in stage {stage['number']}, which this recipe does not have", *checkpoint.offer(path)])
    plan = built.recipe.stages[stage["number"]]
    fade = torch.tensor(stage["fade"], device=device)
    set_stage(built.modules.values(), Stage(stage["number"], built.shape(plan), fade))
    return built.model(device, f"{path.name}, {used} weights", plan)


def used_weights(path: Path, weights: str) -> str:
    """Raw or ema: "auto" is the average where the checkpoint has one."""
    if weights not in ("raw", "ema", "auto"):
        raise UserError(f"weights '{weights}': expected raw, ema or auto")
    averaged = any(path.glob("*@ema.safetensors"))
    if weights == "ema" and not averaged:
        raise UserError(f"{path}: has no averaged weights; a recipe keeps them with a [shadow] table")
    return "ema" if averaged and weights != "raw" else "raw"


def _restore(built: Built, path: Path, weights: str) -> str:
    """Give the networks a checkpoint's weights; which ones these are."""
    tensors, _ = checkpoint.load(path)
    used = used_weights(path, weights)
    for name, module in built.modules.items():
        averaged = f"{name}@ema" if used == "ema" and f"{name}@ema" in tensors else name
        with checkpoint.fitting(path):
            checkpoint.restore_module(module, checkpoint.part(tensors, averaged, path), f"{path}/{averaged}")
    return used


def start_of(read: recipe.Recipe) -> Path:
    """The checkpoint that `[init]` names."""
    assert read.init
    try:
        path = checkpoint.path_of(RunDir.existing(Path(read.init.run)).checkpoints, read.init.checkpoint)
        used_weights(path, read.init.weights)
    except UserError as error:
        raise read.told(f"init.run: {line}" for line in error.problems) from error
    return path


def need_data(built: Built, progress: Any) -> None:
    """Prepare the data of a run, or say what is missing."""
    lacking = built.dataset.missing()
    if lacking:
        raise UserError(f"data '{built.recipe.data.name}' is not at hand: {lacking}")
    built.dataset.prepare(progress)


def dataset_by_name(name: str, sets: tuple[str, ...] = ()) -> Any:
    """A data set outside a recipe, with `KEY=VALUE` options."""
    known = catalogue.load()
    known.get("dataset", name)
    return build.component(known, recipe.dataset_choice(known, name, sets))


# -- small things ----------------------------------------------------------------------------------------------------------------


def _run_dir(read: recipe.Recipe, request: Request, processes: parallel.Parallel, watcher: Watcher) -> RunDir:
    """The directory of this run; every process gets the same one."""
    resolved = read.resolved()
    if request.run_dir:
        found = RunDir.at(request.run_dir)
        if (found.path / "resolved.json").exists():
            differing = recipe.differences(found.resolved(), resolved)
            if differing:
                raise UserError([f"{found.path}: holds another run; these differ:", *differing])
        return found
    for path in rundir.unfinished(request.root, resolved):
        watcher.say(f"{path} is an unfinished run of the same recipe: `siv run --resume {path}` goes on with it")
    if processes.world > 1:
        raise UserError("several processes need a directory they all know: give --run-dir")
    return RunDir.create(request.root, read.name)


def _close(found: RunDir, processes: parallel.Parallel, state: str, counters: Any, watcher: Watcher, line: str) -> None:
    if processes.main:
        found.status(state, step=counters.step, images_seen=counters.images_seen)
        found.log(line)
        watcher.say(line)


def set_precision(train: recipe.Train) -> None:
    """What a recipe says of the arithmetic, for this process."""
    torch.set_float32_matmul_precision("high" if train.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = train.precision == "tf32"
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
