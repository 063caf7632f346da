"""The command line. Commands parse, call and print; torch is imported inside those that need it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import select
import signal
import sys
import traceback as traceback_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from siv_core.cli.common import PATH, device_option, json_option, options, print_json, screen, seconds, set_option
from siv_core.cli.data import data
from siv_core.cli.ood import ood
from siv_core.cli.plugins import describe, list_plugins
from siv_core.cli.recipes import recipes
from siv_core.cli.sweep import run_stack, sweep
from siv_core.cli.use import encode, evaluate, interpolate, reconstruct, sample, show_metrics, translate
from siv_core.errors import SivError, UserError
from siv_core.store.files import REMEDIES

if TYPE_CHECKING:
    from siv_core.cli.console import Screen

MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # what no code of ours can be the cause of


def main() -> None:
    """`siv`: told failures become lines and an exit code, bugs keep their traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without our letters, names that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        cli.main(prog_name="siv", standalone_mode=False)
    except click.ClickException as error:
        with contextlib.suppress(OSError):
            error.show()
        sys.exit(2)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except UserError as error:
        _end(error.exit_code, [f"error: {line}" for line in error.problems])
    except SivError as error:
        _end(error.exit_code, [f"error: {error}" if error.exit_code < 128 else str(error)])
    except OSError as error:
        if error.errno not in MACHINE:
            raise
        _print_nothing_more()
        _end(2, [f"error: {error.filename or 'standard output'}: cannot be written ({error.strerror}); {REMEDIES[error.errno]}"])


def _end(code: int, lines: list[str]) -> NoReturn:
    with contextlib.suppress(OSError):  # where the terminal is gone nobody reads them
        for line in lines:
            click.echo(line, err=True)
    sys.exit(code)


def _end_unread() -> None:
    """`siv … | head` ends by SIGPIPE as other programs do. Left to the signal alone, the death of a helper process would end us
    too, and without a word."""
    outputs = select.poll()
    for descriptor in (1, 2):
        outputs.register(descriptor, 0)
    if any(event & select.POLLERR for _, event in outputs.poll(0)):
        _print_nothing_more()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)


def _print_nothing_more() -> None:
    """Python would try again at its end to write what is buffered."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


override_options = (
    click.option(
        "--profile", "profiles", multiple=True, help="Apply a profile of the recipe; `none` turns the automatic one off."
    ),
    set_option,
)


class Commands(click.Group):
    """Tells whose code an exception came from, and shows its traceback when asked to."""

    def invoke(self, context: click.Context) -> None:
        try:
            super().invoke(context)
            if sys.stdout is not None:
                sys.stdout.flush()
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            _end_unread()
            raise
        except Exception as error:
            from siv_core.recipe import catalogue as catalogues

            blamed = None if isinstance(error, SivError) else catalogues.blame(error)
            if context.params["traceback"] and (blamed or isinstance(error, SivError)):
                traceback_module.print_exception(error)
            if blamed:
                raise blamed from error
            raise


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="siv")
@click.option("--traceback", is_flag=True, help="Show where an error comes from; a run keeps it in its log.txt.")
def cli(traceback: bool) -> None:
    """Train, measure and use introspective variational autoencoders."""


for command in (
    data,
    list_plugins,
    describe,
    recipes,
    sweep,
    run_stack,
    evaluate,
    sample,
    reconstruct,
    interpolate,
    translate,
    encode,
    ood,
):
    cli.add_command(command)


@cli.command()
@options(
    click.argument("recipe", type=PATH, required=False),
    *override_options,
    click.option("--run-dir", type=PATH, help="The run directory; one with this recipe's run in it is continued."),
    click.option("--resume", "resumed", type=PATH, metavar="RUN", help="Go on with this run where it stopped."),
    click.option("--max-time", callback=seconds, metavar="8m", help="Stop after the step in hand, with a checkpoint."),
    device_option,
    click.option("--dry-run", is_flag=True, help="Print the resolved recipe and stop."),
    json_option,
)
def run(
    recipe: Path | None,
    profiles: tuple[str, ...],
    sets: tuple[str, ...],
    run_dir: Path | None,
    resumed: Path | None,
    max_time: float | None,
    device: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train RECIPE, then measure and draw the result."""
    if (recipe is None) == (resumed is None):
        raise click.UsageError("give a RECIPE, or --resume RUN")
    if resumed and (profiles or run_dir or dry_run):
        raise click.UsageError("--resume takes recipe and profiles from the run; only --set, --max-time and --device go with it")
    watcher = screen(as_json)
    from siv_core.recipe import catalogue as catalogues
    from siv_core.recipe import recipe as recipes
    from siv_core.runs import device as devices
    from siv_core.runs import session

    if dry_run and recipe:
        loaded = recipes.load(recipe, catalogues.load(), profiles, sets, cpu_only=not devices.nvidia_present())
        print_json(loaded.resolved())
        return
    more: dict[str, Any] = {"sets": sets, "device": device, "max_seconds": max_time, "watcher": watcher}
    if resumed:
        done = session.resume(resumed, **more)
    elif recipe:
        done = session.run(recipe, profiles=profiles, run_dir=run_dir, **more)
    metrics = [line for line in done.metrics() if line["by"] != "training"] if done.state == "finished" else []
    if as_json:
        print_json({"run": str(done.path), "state": done.state, "metrics": metrics})
    elif metrics:
        show_metrics(watcher, metrics)


@cli.command("import")
@options(
    click.argument("name", metavar="FORMAT"),
    click.argument("file", type=PATH),
    click.argument("recipe", type=PATH),
    click.option("--sha256", metavar="DIGEST", help="Of FILE; without it the command tells the digest and stops."),
    click.option("--run-dir", type=PATH, required=True, help="The run directory to make."),
    *override_options,
    json_option,
)
def import_weights(
    name: str,
    file: Path,
    recipe: Path,
    sha256: str | None,
    run_dir: Path,
    profiles: tuple[str, ...],
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a run directory of another program's checkpoint FILE, for the network, data and metrics of RECIPE. FORMAT is one of
    `siv list-plugins --kind weights`."""
    watcher = screen(as_json, at_once=True)
    from siv_core.runs import imported

    made = imported.bring(name, file, recipe, run_dir, sha256, profiles=profiles, sets=sets, watcher=watcher)
    if as_json:
        print_json({"run": str(made.path)})


@cli.command()
@options(
    click.argument("recipe", type=PATH),
    *override_options,
    click.option("--measure", is_flag=True, help="Do some steps of each stage: time a step, time in all, peak memory."),
    click.option("--device", metavar="auto|cpu|cuda[:N]", help="Where to measure; default: auto."),
    json_option,
)
def check(
    recipe: Path, profiles: tuple[str, ...], sets: tuple[str, ...], measure: bool, device: str | None, as_json: bool
) -> None:
    """Say what RECIPE would do: parameters, operations a step, and what is not at hand. Keeps nothing of what it does."""
    if device and not measure:
        raise click.UsageError("--device goes with --measure; nothing else is computed here")
    watcher = screen(as_json, at_once=True)
    from siv_core.recipe import catalogue as catalogues
    from siv_core.recipe import recipe as recipes
    from siv_core.runs import check as checks
    from siv_core.runs import device as devices
    from siv_core.runs import tune as tuning

    catalogue = catalogues.load()
    loaded = recipes.load(recipe, catalogue, profiles, sets, cpu_only=not devices.nvidia_present())
    elsewhere = recipes.with_each_profile(recipe, catalogue, profiles)
    if elsewhere:
        raise UserError(elsewhere)
    measured = None
    if measure:
        where = devices.pick_device(device or "auto")
        measured = checks.measure(loaded, catalogue, where, watcher.progress)
        if "not_measured" not in measured:
            measured["settings"] = tuning.tune(loaded, catalogue, where, watcher.progress, tuning.QUICK)
    report = checks.check(loaded, catalogue)
    if as_json:
        print_json({**report, "measured": measured} if measure else report)
        return
    show_report(watcher, report)
    if measured:
        show_measured(watcher, measured)


def show_report(watcher: Screen, report: dict[str, Any]) -> None:
    watcher.say(f"data {report['data']}")
    for player, parts in report.get("parameters", {}).items():
        watcher.say(f"{player}: {parts['all']:,} parameters")
        for part, count in parts.items():
            if part != "all":
                watcher.say(f"  {part}: {count:,}")
    for stage in report.get("stages", []):
        views = "".join(f", {group} sees {' '.join(names)}" for group, names in stage["views"].items())
        cost = f"{stage['flops_per_step'] / 1e9:,.2f} GFLOP a step"
        size = "" if stage["shape"] == report["data"]["shape"] else f", {' × '.join(map(str, stage['shape'][1:]))} pixels"
        fading = f", fading in over {stage['fade']:.0%} of it" if stage["fade"] else ""
        watcher.say(f"{stage['objective']}: {stage['length']}{size}, batch {stage['batch']}, {cost}{fading}{views}")
    for line in report.get("notes", []):
        watcher.say(line)
    for line in report["not_at_hand"] or ["nothing: everything is at hand"]:
        watcher.say(f"not at hand here: {line}")


def show_measured(watcher: Screen, measured: dict[str, Any]) -> None:
    if "not_measured" in measured:
        watcher.say(f"not measured: {measured['not_measured']}")
        return
    watcher.say(f"measured on {measured['device']}, {measured['threads']} threads, with {measured['data']}:")
    for stage in measured["stages"]:
        steps = "a number of steps that the data will tell" if stage["steps"] is None else f"{stage['steps']:,} steps"
        watcher.say(f"  {stage['objective']}: {1000 * stage['seconds_per_step']:.3g} ms a step, {steps}")
    if measured["seconds"] is not None:
        minutes, seconds = divmod(round(measured["seconds"]), 60)
        watcher.say(f"  training takes about {minutes} min {seconds:02} s in all; pictures and metrics come on top")
    watcher.say(f"  peak memory {measured['peak_bytes'] / 2**30:.2f} GiB")
    if measured["device_peak_bytes"] is not None:
        watcher.say(f"  peak memory of the device {measured['device_peak_bytes'] / 2**30:.2f} GiB")
    show_tuned(watcher, measured["settings"])
    watcher.say("`siv tune` with the same arguments tries compiled phases and half batches too")


@cli.command()
@options(
    click.argument("recipe", type=PATH),
    *override_options,
    click.option("--setting", "settings", multiple=True, metavar="NAME", help="Try this setting of [train] alone."),
    device_option,
    json_option,
)
def tune(
    recipe: Path, profiles: tuple[str, ...], sets: tuple[str, ...], settings: tuple[str, ...], device: str, as_json: bool
) -> None:
    """Time real steps of RECIPE with other settings of [train], and say which are faster here. Changes nothing."""
    watcher = screen(as_json, at_once=True)
    from siv_core.recipe import catalogue as catalogues
    from siv_core.recipe import recipe as recipes
    from siv_core.runs import device as devices
    from siv_core.runs import tune as tuning

    unknown = [f"--setting {name}: expected one of {', '.join(tuning.TRIED)}" for name in settings if name not in tuning.TRIED]
    if unknown:
        raise UserError(unknown)
    catalogue = catalogues.load()
    loaded = recipes.load(recipe, catalogue, profiles, sets, cpu_only=not devices.nvidia_present())
    found = tuning.tune(loaded, catalogue, devices.pick_device(device), watcher.progress, settings or tuning.TRIED)
    if as_json:
        print_json(found)
    else:
        show_tuned(watcher, found)


def show_tuned(watcher: Screen, found: dict[str, Any]) -> None:
    if "not_measured" in found:
        watcher.say(f"not measured: {found['not_measured']}")
        return
    names = tuple(f"stage {stage['stage']}, {1000 * stage['seconds']:.3g} ms" for stage in found["stages"])
    rows = [
        (_as_lines(one["change"], "\n") or "the recipe's own", *(f"{share:.2f}" for share in one["shares"].values()),
         f"{one['share']:.2f}", "" if one["bytes"] is None else f"{one['bytes'] / 2**20:,.0f} MiB", one["numbers"])
        for one in found["rows"]
    ]  # fmt: skip
    title = f"time a step on {found['device']}, {found['threads']} threads, with {found['data']}, as shares of the recipe's own"
    watcher.table(title, ("setting", *names, "training", "memory", "numbers"), rows)
    for one in found["left_out"]:
        watcher.say(f"left out: {_as_lines(one['change'], ' ')}: {one['reason']}")
    for key, what in (("lines", "the same numbers to rounding"), ("lines_of_other_numbers", "other numbers, which a run tells")):
        if found[key]:
            watcher.say(f"fastest with {what}: put into [train]\n{_as_lines(found[key], chr(10))}")
    if not found["lines"]:
        watcher.say("nothing that leaves the numbers as they are saves time here")


def _as_lines(change: dict[str, Any], between: str) -> str:
    return between.join(f"{key} = {json.dumps(value)}" for key, value in change.items())


if __name__ == "__main__":
    main()
