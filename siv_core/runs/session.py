"""A run from its recipe to its last picture, and back from its directory: what `siv run` and the Python interface do."""

from __future__ import annotations

import contextlib
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, fields, frozen

from siv_core.errors import Diverged, SivError, Stopped, UserError, near_miss
from siv_core.model import Model
from siv_core.recipe import build, fits, resolved
from siv_core.recipe import catalogue as catalogues
from siv_core.recipe import recipe as recipes
from siv_core.recipe.build import Built
from siv_core.runs import record
from siv_core.runs.device import nvidia_present, pick_device, set_precision
from siv_core.runs.opened import load, start_of
from siv_core.runs.watchers import Lines, Patient, Watcher
from siv_core.store import checkpoint, files, rundir
from siv_core.store.checkpoint import Checkpoint
from siv_core.store.rundir import RunDir
from siv_core.train import captured, compiled, parallel
from siv_core.train.stage import arithmetic
from siv_core.train.trainer import Trainer, Training, driven
from siv_core.use import evaluate, pictures


@frozen
class Run:
    """What a run left: its directory, and how it ended ("finished" or "stopped")."""

    path: Path
    state: str

    def model(self, checkpoint: str = "last", weights: str = "auto", device: str = "auto") -> Model:
        return load(self.path, checkpoint, weights, device)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl: by the run at its end, in the middle of training, and by `siv evaluate`."""
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


# -- run -------------------------------------------------------------------------------------------------------------------------


def run(path: str | Path, *, watcher: Watcher | None = None, **overrides: Any) -> Run:
    """Train what a recipe says, measure it and draw it: `siv run` as a function.

    `overrides` are the fields of `Request`: profiles, sets (`["train.batch=8"]`), run_dir, root, device, max_seconds. A `run_dir`
    with a run of the same recipe in it is continued. Prints lines as it goes on, `watcher=Silent()` none. Ctrl+C saves a
    checkpoint after the step in hand, notes "stopped", and is then the usual `KeyboardInterrupt`.
    """
    request = request_of(**overrides)
    watcher = watcher or Lines()
    catalogue = catalogues.load()
    recipe = recipes.load(files.expanded(path), catalogue, request.profiles, request.sets, cpu_only=not nvidia_present())
    if recipe.automatic_profile:
        watcher.say("no NVIDIA device here: profile 'cpu' applies (turn it off with --profile none)")
    return start(recipe, catalogue, request, watcher)


def resume(run_path: str | Path, *, watcher: Watcher | None = None, **overrides: Any) -> Run:
    """Go on with a run where it stopped, as `run` does: `siv run --resume` as a function.

    `overrides`: sets, which may give a longer length, other cadences or metrics, and where the data lie now; device, max_seconds.
    """
    run_dir = RunDir.existing(files.expanded(run_path))
    run_dir.to_go_on()
    manifest, asked = run_dir.manifest(), request_of(**overrides)
    if asked.profiles or asked.run_dir:
        raise UserError("resume takes recipe, profiles and folder from the run; only sets, device and max_seconds go with it")
    request = evolve(
        asked,
        profiles=("none", *manifest["profiles"]),
        sets=(*resolved.sets_before(manifest, run_dir.resolved()), *asked.sets),
        run_dir=run_dir.path,
    )
    catalogue = catalogues.load()
    recipe = recipes.load(run_dir.path / "recipe.toml", catalogue, request.profiles, request.sets)
    return start(recipes.as_before(recipe, manifest), catalogue, request, watcher or Lines())


def request_of(**overrides: Any) -> Request:
    """What was asked, from what a person gave: paths as text, lists as lists."""
    known = [attribute.name for attribute in fields(Request)]
    problems = [f"{key}: no such argument{near_miss(key, known)}" for key in overrides if key not in known]
    for key in ("profiles", "sets"):
        if isinstance(overrides.get(key), str):
            problems.append(f"{key}: is one string, expected a list of them: give [{overrides[key]!r}]")
        elif key in overrides:
            overrides[key] = tuple(overrides[key])
    if problems:
        raise UserError(problems)
    overrides.update({key: files.expanded(overrides[key]) for key in ("run_dir", "root") if overrides.get(key)})
    return Request(**overrides)


def start(recipe: recipes.Recipe, catalogue: catalogues.Catalogue, request: Request, watcher: Watcher) -> Run:
    """Data, networks, run directory, training, pictures and metrics, in this order."""
    return driven(steps(recipe, catalogue, request, watcher))


def steps(recipe: recipes.Recipe, catalogue: catalogues.Catalogue, request: Request, watcher: Watcher) -> Training[Run]:
    """The same as what there is to do before and after each step; who drives it does the steps."""
    for line in catalogue.slow:
        watcher.say(line)
    device = pick_device(request.device)
    data = build.dataset(recipe, catalogue)
    if data.missing():
        raise UserError(f"data '{recipe.data.name}' is not at hand: {data.missing()}")
    processes = parallel.start(device)
    for plan in recipe.stages:
        processes.share(plan.batch)  # a batch smaller than the number of processes is told before anything is made
    if processes.main:
        data.prepare(watcher.progress)
    processes.wait()
    built = build.build(recipe, catalogue, data)
    build.room(built, on_cpu=device.type == "cpu")
    # a run to start from that is not there is told before anything is made
    fresh = not (request.run_dir and checkpoint.steps(request.run_dir / "checkpoints"))
    first = [start_of(recipe)] if recipe.init and fresh else []
    lacking = [*build.missing(built), *build.demands(built), *(compiled.lacking(device) if recipe.train.compile else ())]
    lacking += [*fits.starts(built), *(captured.lacking(device) if recipe.train.graphs else ())]
    if lacking:
        raise UserError(lacking)
    for name, metric in built.metrics().items():
        for need in metric.needs():
            watcher.say(f"metric {name}: will be skipped in part: {need}")
        for reason in getattr(metric, "fits", lambda data: ())(data):
            watcher.say(f"metric {name}: will be skipped: {reason}")
    if built.spec.kind != "image" and not evaluate.drawer(built.metrics()):
        watcher.say("no pictures of samples: such data is drawn by a metric that can, as [metrics.density2d] points of the plane")
    for line in told_of(built):
        watcher.say(line)
    set_precision(recipe.train)
    if recipe.train.precision == "auto":
        watcher.say(f"train.precision auto: {arithmetic(recipe.train.precision, device)} on this device")
    run_dir = _run_dir(recipe, request, processes, watcher)
    with run_dir.locked() if processes.main else contextlib.nullcontext():
        try:
            return (yield from _train_and_measure(built, run_dir, first, device, processes, request, watcher))
        except Exception as error:
            if not isinstance(error, SivError):
                run_dir.log("".join(traceback.format_exception(error)).rstrip())
            raise


def _train_and_measure(
    built: Built,
    run_dir: RunDir,
    first: list[Checkpoint],  # to start from; taken out once it was used, for its tensors would stay for the whole training
    device: torch.device,
    processes: parallel.Parallel,
    request: Request,
    watcher: Watcher,
) -> Training[Run]:
    prepare = getattr(built.reconstruction, "prepare", None)
    if prepare:
        prepare()
    newest = record.newest(run_dir, watcher.say)
    if newest:
        record.check_same(run_dir, built, newest)
    if newest and record.complete(run_dir, built, newest):
        watcher.say(f"{run_dir.path} is finished; a longer length goes on with it (--set train.length, or the last stage's)")
        return Run(run_dir.path, "finished")
    processes.wait()  # each has read by now what the main one is about to write anew
    if first and built.recipe.init and not newest:
        first[0].load(built.modules, built.recipe.init.weights)
    first.clear()
    trainer = Trainer.of(built, run_dir, device, processes, watcher)
    if newest:
        trainer.resume(newest)
        watcher.say(f"going on from {newest.path}")
    if processes.main:
        record.write_head(run_dir, trainer, watcher.say, newest.state["offsets"] if newest else {})
    del newest  # its tensors
    counters = trainer.counters
    try:
        with watcher.training(trainer, request.max_seconds):
            state = yield from _train(trainer, request, watcher)
        if state == "finished" and processes.main:
            finish(trainer, watcher)
    except (Stopped, KeyboardInterrupt) as stop:
        what = str(stop) or "interrupted"
        _close(run_dir, processes, "stopped", counters, watcher, f"{what}; `siv run --resume {run_dir.path}` goes on")
        if isinstance(stop, Stopped) and getattr(watcher, "interrupted", False):
            raise KeyboardInterrupt from stop  # as whoever pressed Ctrl+C in Python expects it
        raise
    except Diverged as error:
        _close(run_dir, processes, "diverged", counters, watcher, f"diverged at step {counters.step}")
        raise trainer.diverged(error) from error
    except BaseException as error:
        with contextlib.suppress(UserError):  # where the disk is full or gone this cannot be noted either
            _close(run_dir, processes, "failed", counters, watcher, "failed")
        if isinstance(error, UserError) and checkpoint.steps(run_dir.checkpoints):
            raise UserError([*error.problems, f"once that is mended `siv run --resume {run_dir.path}` goes on"]) from error
        raise
    _close(run_dir, processes, state, counters, watcher, f"{state} at step {counters.step}, {counters.images_seen} images seen")
    if getattr(watcher, "interrupted", False):
        raise KeyboardInterrupt  # in the last step: the run is whole, whoever started it wanted to end
    return Run(run_dir.path, state)


def _train(trainer: Trainer, request: Request, watcher: Watcher) -> Training[str]:
    """The loop, with the pictures and the metrics that are due in it; neither changes a bit of it."""
    built, run_dir = trainer.built, trainer.rundir
    metrics = built.metrics()

    def preview(name: str) -> None:
        if not trainer.parallel.main:
            return
        picture = evaluate.preview(trainer.model(), built.dataset, metrics, built.recipe.train.seed, run_dir.log)
        if picture is not None:
            pictures.save_png(run_dir.images / f"{name}.png", picture)
            watcher.wrote(run_dir.images / f"{name}.png")

    def measure(names: list[str]) -> None:
        trainer.stats.check()  # every process asks: none measures what is no longer finite
        if trainer.parallel.main:
            begun, step = time.monotonic(), trainer.counters.step
            model = trainer.model("auto")
            at_stage, about = built.metrics(model.spec), record.measured_as(built, model, "training", step)
            record.append_metrics(
                built, {name: at_stage[name] for name in names}, model, run_dir, about, Patient(watcher), f"_{step:08d}"
            )
            seconds = time.monotonic() - begun
            watcher.say(f"step {step:,}: {', '.join(names)} measured in {seconds:.1f} s, see {run_dir.path / 'metrics.jsonl'}")
        trainer.parallel.wait()  # not in the sum of the next step, which gives up sooner

    return (yield from trainer.loop(request.max_seconds, preview, measure))


def finish(trainer: Trainer, watcher: Watcher) -> None:
    """Curves, pictures and the recipe's metrics of the state at the end of training, whose checkpoint is saved."""
    built, run_dir, model = trainer.built, trainer.rundir, trainer.model("auto")
    metrics = built.metrics(model.spec)
    pictures.curves(run_dir.images / "curves.png", run_dir.read("stats"), trainer.schedule.images())
    watcher.wrote(run_dir.images / "curves.png")
    seed, about = built.recipe.train.seed, record.measured_as(built, model, "run", trainer.counters.step)
    for picture in evaluate.final_pictures(model, built.dataset, metrics, run_dir.images, seed, run_dir.log):
        watcher.wrote(picture)
    record.append_metrics(built, metrics, model, run_dir, about, watcher, "")


def told_of(built: Built) -> list[str]:
    """What a person should know of how the data are read and shown, and of stages that follow each other badly."""
    notes: list[str] = getattr(built.dataset, "notes", list)()
    shown = pictures.shown_as(built.spec.shape[0]) if built.spec.kind == "image" else ""
    return [*notes, *([shown] if shown else []), *fits.scales(built)]


# -- small things ----------------------------------------------------------------------------------------------------------------


def _run_dir(recipe: recipes.Recipe, request: Request, processes: parallel.Parallel, watcher: Watcher) -> RunDir:
    """The directory of this run; every process gets the same one."""
    resolved = recipe.resolved()
    if request.run_dir:
        run_dir = RunDir.at(request.run_dir)
        if (run_dir.path / "resolved.json").exists():
            run_dir.to_go_on()
            differing = recipes.differences(run_dir.resolved(), resolved)
            if differing:
                told = f"{run_dir.path}: holds another run; these differ (--set KEY=VALUE with the run's value goes on with it):"
                raise UserError([told, *differing])
        return run_dir
    for path in rundir.unfinished(request.root, resolved):
        watcher.say(f"{path} is an unfinished run of the same recipe: `siv run --resume {path}` goes on with it")
    if processes.world > 1:
        raise UserError("several processes need a directory they all know: give --run-dir")
    return RunDir.create(request.root, recipe.name)


def _close(run_dir: RunDir, processes: parallel.Parallel, state: str, counters: Any, watcher: Watcher, line: str) -> None:
    if processes.main:
        run_dir.status(state, step=counters.step, images_seen=counters.images_seen)
        run_dir.log(line)
        watcher.say(line)
