"""`siv sweep`: many runs of a recipe, a table and pictures of what they came to."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from siv_core.cli.common import PATH, device_option, json_option, options, print_json, screen, seconds, set_option
from siv_core.errors import Diverged, SivError, Stopped

if TYPE_CHECKING:
    from siv_core.cli.console import Screen
    from siv_core.recipe.recipe import Recipe
    from siv_core.sweep.jobs import Crew
    from siv_core.sweep.sweep import Sweep
    from siv_core.sweep.table import Outcome

LINE_SECONDS = 30.0  # between two lines about the whole: a sweep takes longer than a run


@frozen
class How:
    """Where the trials run, how many at a time, and for how long."""

    jobs: int | None
    stack: int | None
    on: str | None
    max_time: float | None
    device: str
    begun: float

    @property
    def until(self) -> float | None:
        """A moment of the monotonic clock."""
        return None if self.max_time is None else self.begun + self.max_time


@click.command()
@options(
    click.argument("sweep", type=PATH),
    click.option("--root", type=PATH, help="Folder of the sweep, with a run directory for each trial; default: runs/SWEEP."),
    click.option(
        "--only", multiple=True, metavar="TRIAL", help="Run this trial alone; its name as in --dry-run, also 'VAE_*'; repeatable."
    ),
    click.option("--jobs", type=click.IntRange(1), help="Trials at a time, one thread each; default: cores, on CUDA 1."),
    click.option(
        "--stack", type=click.IntRange(2), metavar="N", help="Train up to N trials as one, where they differ in numbers alone."
    ),
    click.option("--on", metavar="tcp://HOST:PORT", help="Run the trials on the workers of this Dask scheduler."),
    set_option,
    click.option("--max-time", callback=seconds, metavar="8m", help="Stop the whole sweep then, with checkpoints."),
    device_option,
    click.option("--table", "only_table", is_flag=True, help="Run nothing: table and pictures of what is there."),
    click.option("--dry-run", is_flag=True, help="Check and list the trials, and stop."),
    json_option,
)
def sweep(
    sweep: Path,
    root: Path | None,
    only: tuple[str, ...],
    jobs: int | None,
    stack: int | None,
    on: str | None,
    sets: tuple[str, ...],
    max_time: float | None,
    device: str,
    only_table: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run every trial of SWEEP that is not finished, then show the table; the same command goes on where it was stopped."""
    watcher = screen(as_json)
    from siv_core.recipe import catalogue as catalogues
    from siv_core.sweep import sweep as sweeps
    from siv_core.sweep import table as sweep_table

    plan, how = sweeps.load(sweep, sets), How(jobs, stack, on, max_time, device, time.monotonic())
    root = root or Path("runs") / plan.name
    if on:  # whoever works on it may be in another folder
        root = root.absolute()
    if plan.search:
        if only or stack:
            raise click.UsageError("--only and --stack go with trials that are known beforehand, not with [search]")
        search_trials(plan, root, watcher, how, only_table, dry_run, as_json)
        return
    chosen = sweeps.chosen(plan, only)
    catalogue = catalogues.load()
    recipes = sweeps.resolve(plan, catalogue, cpu_only=on_cpus(how))
    sweeps.check_distinct(plan, recipes)
    for line in sweep_table.check_folder(plan, recipes, root):
        watcher.say(line)
    if dry_run:
        listed = [one for one in sweep_table.outcomes(plan, recipes, root) if one.trial.name in chosen]
        show_trials(recipes, plan, listed, watcher, device, as_json)
        return
    ended: dict[str, str] = {}
    if not only_table:
        ended = run_trials(plan, recipes, chosen, root, watcher, how)
    outcomes = sweep_table.outcomes(plan, recipes, root)
    result = report(plan, outcomes, root, watcher)
    if as_json:
        print_json(result)
    asked = [one for one in outcomes if one.trial.name in chosen and not only_table]
    fail([ended.get(one.trial.name, "diverged" if one.state == "diverged" else "") for one in asked])


def run_trials(
    plan: Sweep,
    recipes: dict[str, Recipe],
    chosen: set[str],
    root: Path,
    watcher: Screen,
    how: How,
) -> dict[str, str]:
    """{trial: how it ended} of those that were run now; finished and diverged ones are left alone."""
    from siv_core.recipe import catalogue as catalogues
    from siv_core.store import files
    from siv_core.store.rundir import RunDir
    from siv_core.sweep import jobs as sweep_jobs
    from siv_core.sweep import table as sweep_table

    watcher.line_seconds = LINE_SECONDS
    made = sweep_jobs.prepare(plan, recipes, catalogues.load(), watcher)
    files.make_folder(root)
    with RunDir(root).locked():
        files.write_bytes(root / "sweep.toml", plan.source)
        states = {one.trial.name: one.state for one in sweep_table.outcomes(plan, recipes, root) if one.trial.name in chosen}
        todo = [name for name, state in states.items() if state not in ("finished", "diverged")]
        crew = crew_of(how, root, watcher)
        counts = {state: list(states.values()).count(state) for state in dict.fromkeys(states.values())}
        watcher.say(
            f"{root}: {len(states)} trials ({', '.join(f'{n} {state}' for state, n in counts.items())}), {crew.limit} at a time"
        )
        for name, state in states.items():
            if state == "diverged":
                watcher.say(f"{name} diverged before and would again: move {root / name} away to try it once more")
        jobs = sweep_jobs.jobs_of(plan, todo, made, root, how.device)
        bundles = [sweep_jobs.Bundle((job,)) for job in jobs]
        if how.stack:
            bundles = sweep_jobs.bundled(plan, jobs, made, root, how.device, how.stack, watcher)
        to_the_end(lambda: crew.work(bundles, how.until), how, watcher)
    return crew.ended


def to_the_end(work: Callable[[], bool], how: How, watcher: Screen) -> None:
    """All of it, or to a signal or the time that was asked for; it is said how to go on."""
    try:
        if not work():
            watcher.say(f"stopped after {how.max_time:.0f} s as asked; the same command goes on")
    except Stopped as stop:
        watcher.say(f"{stop}; the same command goes on")
        raise


def on_cpus(how: How) -> bool:
    """Whether trials are read with a profile named cpu, which applies by itself where they run without an NVIDIA device."""
    from siv_core.runs import device as devices
    from siv_core.sweep import cluster

    if not how.on:
        return not devices.nvidia_present()
    client = cluster.connect(how.on)
    try:
        return cluster.on_cpus(client)
    finally:
        client.close()


def crew_of(how: How, root: Path, watcher: Screen) -> Crew:
    """Who runs the trials: child processes here, or the workers of a cluster that have the same versions and see the folder."""
    from siv_core.runs import device as devices
    from siv_core.store import memory
    from siv_core.sweep import cluster
    from siv_core.sweep import jobs as sweep_jobs

    if how.on:
        client = cluster.connect(how.on)
        click.get_current_context().call_on_close(client.close)
        cluster.check(client, root)
        return sweep_jobs.Crew(watcher, how.jobs or cluster.slots(client), launch=cluster.Cluster(client).start)
    on_cpu = devices.pick_device(how.device).type == "cpu"
    limit = how.jobs or (memory.cores() if on_cpu and not how.stack else 1)
    # a trial alone has one thread, so that its numbers do not depend on how many there are at a time
    return sweep_jobs.Crew(watcher, limit, max(1, memory.cores() // limit) if how.stack else 1)


def search_trials(plan: Sweep, root: Path, watcher: Screen, how: How, only_table: bool, dry_run: bool, as_json: bool) -> None:
    """The trials of a `[search]`, then its table, its pictures and the best of them."""
    from siv_core.recipe import catalogue as catalogues
    from siv_core.store import files
    from siv_core.sweep import proposals
    from siv_core.sweep import sweep as sweeps
    from siv_core.sweep import table as sweep_table

    catalogue, watcher.line_seconds = catalogues.load(), LINE_SECONDS
    cpu_only = on_cpus(how)
    recipes = sweeps.resolve(plan, catalogue, cpu_only=cpu_only)
    proposals.check(plan, recipes)
    if dry_run:
        lines = [f"{key}: {shown}" for key, shown in proposals.ranges(plan).items()]
        print_json({"sweep": plan.name, "ranges": proposals.ranges(plan)}) if as_json else [*map(watcher.say, lines)]
        return
    sweep_table.check_owner(root)
    files.make_folder(root)
    if not (root / "sweep.toml").exists():
        files.write_bytes(root / "sweep.toml", plan.source)
    source = proposals.Proposals.of(plan, recipes, catalogue, root, how.device, watcher, cpu_only=cpu_only)
    for line in source.check():
        watcher.say(line)
    ended: dict[str, str] = {}
    if not only_table:
        with source.alone():
            files.write_bytes(root / "sweep.toml", plan.source)
            crew = crew_of(how, root, watcher)
            to_the_end(lambda: source.work(crew, how.until), how, watcher)
        ended = crew.ended
    plan, outcomes = source.outcomes()
    result = report(plan, outcomes, root, watcher)
    for path, reason in source.pictures():
        watcher.say(f"picture {path.name} was not drawn: {reason}" if reason else f"wrote {path}")
    best = source.best()
    watcher.say(f"best: {best}" if best else "no trial is finished yet")
    if as_json:
        print_json({**result, "best": best})
    states = ended if best else {one.trial.name: one.state for one in outcomes} | ended
    fail(["" if best and state == "diverged" else state for state in states.values()])  # a search may try what diverges


def report(plan: Sweep, outcomes: list[Outcome], root: Path, watcher: Screen) -> dict[str, Any]:
    """Table and pictures, on the screen and in the sweep's folder."""
    from siv_core.store import files
    from siv_core.sweep import pictures as sweep_pictures
    from siv_core.sweep import table as sweep_table

    files.make_folder(root)
    result, drawn = sweep_table.table(plan, outcomes), []
    for path, reason in sweep_pictures.draw(plan, outcomes, root):
        if reason:
            result["notes"].append(f"picture {path.name} was not drawn: {reason}")
        else:
            drawn.append(path)
    written = [*sweep_table.write(result, root), *drawn]
    head, lines = sweep_table.text_rows(result)
    watcher.table(plan.name, head, lines)
    for note in result["notes"]:
        watcher.say(note)
    for path in written:
        watcher.say(f"wrote {path}")
    return result


def show_trials(
    recipes: dict[str, Recipe], plan: Sweep, outcomes: list[Outcome], watcher: Screen, device: str, as_json: bool
) -> None:
    """What would be run, each as the command that it is."""
    from siv_core.sweep import jobs as sweep_jobs

    listed = [
        {
            "trial": one.trial.name,
            "state": one.state,
            "run": str(one.run.path),
            "command": shlex.join(["siv", *sweep_jobs.command(one.trial, recipes[one.trial.name], one.run.path, device)]),
        }
        for one in outcomes
    ]
    if as_json:
        print_json({"sweep": plan.name, "trials": listed})
        return
    for entry in listed:
        watcher.say(f"{entry['trial']} ({entry['state']})\n    {entry['command']}")


def fail(states: list[str]) -> None:
    """Exit 1 where trials failed, 3 where some diverged and the others are well."""
    failed, diverged = states.count("failed"), states.count("diverged")
    told = " and ".join(f"{n} {word}" for n, word in ((failed, "failed"), (diverged, "diverged")) if n)
    if failed:
        raise SivError(f"of {len(states)} trials {told}")
    if diverged:
        raise Diverged(f"of {len(states)} trials {told}")


@click.command("stack", hidden=True)
@options(click.argument("plan", type=PATH))
def run_stack(plan: Path) -> None:
    """Train the runs of PLAN as one; what `siv sweep --stack` starts."""
    watcher = screen()
    from siv_core.runs import together
    from siv_core.store import files

    members, device, ended = together.read(plan)
    codes = together.run(members, device, watcher)
    files.write_json(ended, codes)
    if set(codes.values()) != {0}:
        raise click.exceptions.Exit(max(codes.values()))
