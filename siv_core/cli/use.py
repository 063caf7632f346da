"""A run put to use: `siv evaluate`, `sample`, `reconstruct`, `translate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siv_core.cli.common import PATH, device_option, json_option, options, print_json, screen
from siv_core.errors import one_line

if TYPE_CHECKING:
    from siv_core.cli.console import Screen

MODEL = options(
    click.argument("run", type=PATH),
    click.option("--checkpoint", default="last", show_default=True, metavar="STEP|last", help="Which checkpoint."),
    click.option(
        "--weights",
        type=click.Choice(["auto", "raw", "ema"]),
        default="auto",
        show_default=True,
        help="Which of its weights; auto: the averaged ones where the run kept them.",
    ),
    click.option(
        "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Where the run's data lie now, such as data.path=/new/d.h5."
    ),
    device_option,
)
OUT = options(
    click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of what is drawn or chosen."),
    click.option("--out", type=PATH, help="Folder for the results; default: RUN/outputs."),
    json_option,
)


@click.command()
@MODEL
@json_option
def evaluate(as_json: bool, **which: Any) -> None:
    """Measure RUN with the metrics of its recipe and of --set metrics.NAME.KEY=VALUE, into its metrics.jsonl."""
    watcher = screen(as_json)
    from siv_core.runs import opened, record

    one = opened.open_run(**which)
    watcher.say(f"measured with {opened.need_data(one, watcher.progress)}")
    with one.run_dir.locked():
        about = record.measured_as(one.built, one.model, "evaluate", one.step)
        lines = record.append_metrics(one.built, one.built.metrics(), one.model, one.run_dir, about, watcher, None)
    if as_json:
        print_json({"run": str(which["run"]), "metrics": lines})
    else:
        show_metrics(watcher, lines)


@click.command()
@MODEL
@click.option("-n", "--number", "count", default=64, show_default=True, type=click.IntRange(1), help="How many.")
@OUT
def sample(count: int, seed: int, out: Path | None, as_json: bool, **which: Any) -> None:
    """Draw samples from the prior of RUN: a picture and an array."""
    watcher = screen(as_json, at_once=True)
    from siv_core.runs import opened
    from siv_core.use import apply

    one = opened.open_run(**which)
    data, note = (None, None) if one.model.spec.kind == "image" else opened.data_to_draw(one)
    made = apply.sample(one.model, out or one.run_dir.path / "outputs", count, seed, one.built.metrics(), data, note)
    told(watcher, made, as_json)


@click.command()
@MODEL
@click.argument("images", type=PATH, nargs=-1)
@OUT
def reconstruct(images: tuple[Path, ...], seed: int, out: Path | None, as_json: bool, **which: Any) -> None:
    """Reconstruct IMAGES (held-out ones without arguments) with RUN: a picture and arrays."""
    watcher = screen(as_json, at_once=True)
    from siv_core.runs import opened
    from siv_core.use import apply

    one = opened.open_run(**which)
    about = "" if images else opened.need_data(one, watcher.progress)
    told(
        watcher,
        apply.reconstruct(one.model, one.built.dataset, out or one.run_dir.path / "outputs", images, seed, about),
        as_json,
    )


@click.command()
@MODEL
@click.option(
    "--take", multiple=True, metavar="GROUP=FILES", help="Pictures for a group, such as class='a.png,b.png'; a folder works."
)
@click.option("-n", "--number", "count", default=8, show_default=True, type=click.IntRange(1), help="Held-out images a side.")
@OUT
def translate(take: tuple[str, ...], count: int, seed: int, out: Path | None, as_json: bool, **which: Any) -> None:
    """Class images down the left, content images along the top, and every class with every content between them."""
    watcher = screen(as_json, at_once=True)
    from siv_core.runs import opened
    from siv_core.use import apply

    one = opened.open_run(**which)
    given = apply.taken(take, one.model)
    about = "" if len(given) == 2 else opened.need_data(one, watcher.progress)
    folder = out or one.run_dir.path / "outputs"
    told(watcher, apply.translate(one.model, one.built.dataset, folder, given, count, seed, about), as_json)


def told(watcher: Screen, result: dict[str, Any], as_json: bool) -> None:
    """What an applied model wrote."""
    for note in result["notes"]:
        watcher.say(note)
    if as_json:
        print_json(result)
    else:
        for path in result["files"]:
            watcher.say(f"wrote {one_line(path)}")


def show_metrics(watcher: Screen, lines: list[dict[str, Any]]) -> None:
    rows: list[tuple[str, ...]] = [
        (line["metric"], line["name"], f"{float(line['value']):.6g}" if "value" in line else f"skipped: {line['skipped']}")
        for line in lines
    ]
    watcher.table("Metrics", ("metric", "name", "value"), rows)
