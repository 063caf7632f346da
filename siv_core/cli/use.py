"""A run put to use: `siv evaluate`, `sample`, `reconstruct`, `interpolate`, `translate`, `encode`."""

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
FOLDER = options(click.option("--out", type=PATH, help="Folder for the results; default: RUN/outputs."), json_option)
OUT = options(
    click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of what is drawn or chosen."), FOLDER
)
NOISE = click.option("--noise/--no-noise", default=True, help="Of decoders that have some of their own; default: yes.")
OWN_LABELS = click.option(
    "--labels", metavar="3|0,1,…", help="Of a conditional model: the class of your pictures, one for all or one for each."
)


@click.command()
@MODEL
@json_option
def evaluate(as_json: bool, **which: Any) -> None:
    """Measure RUN with the metrics of its recipe and of --set metrics.NAME.KEY=VALUE, into its metrics.jsonl."""
    watcher = screen(as_json)
    from siv_core.runs import opened, record

    one = opened.open_run(**which)
    watcher.say(f"measured with {opened.need_data(one, watcher.progress)}: {one.model.name}")
    with one.run_dir.locked():
        about = record.measured_as(one.built, one.model, "evaluate", one.step)
        metrics = one.built.metrics(one.model.spec)
        lines = record.append_metrics(one.built, metrics, one.model, one.run_dir, about, watcher, None)
    if as_json:
        print_json({"run": str(which["run"]), "metrics": lines})
    else:
        show_metrics(watcher, lines)


@click.command()
@MODEL
@click.option(
    "-n",
    "--number",
    "count",
    type=click.IntRange(1),
    help="How many; default: 64, with --labels each 8 a class, with --mix 8 along the top.",
)
@click.option(
    "--labels",
    metavar="0,1,…|each",
    help="Of a conditional model: classes, in turn; each: a row for every class, of the same noise. Default: all in turn.",
)
@click.option(
    "--truncation",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    metavar="PSI",
    help="Codes, or a decoder's styles, at this share of their way from their mean.",
)
@click.option(
    "--mix",
    multiple=True,
    metavar="LAYERS",
    help="Of a decoder with styles: images with the styles of others in coarse, middle or fine layers, or in 0-3.",
)
@click.option("--take", multiple=True, metavar="top=FILES|left=FILES", help="With --mix: pictures of yours; a folder works.")
@NOISE
@click.option("--arrays/--no-arrays", default=True, help="Beside the picture the samples as safetensors; default: yes.")
@OUT
def sample(count: int | None, seed: int, out: Path | None, as_json: bool, **given: Any) -> None:
    """Draw samples from the prior of RUN: a picture and an array."""
    how = {name: given.pop(name) for name in ("labels", "truncation", "arrays")}
    mix, take = given.pop("mix"), given.pop("take")
    if take and not mix:
        raise click.UsageError("--take goes with --mix")
    if mix and (how["labels"] is not None or how["truncation"] != 1 or not how["arrays"]):
        raise click.UsageError("--mix draws a matrix of its own: leave out --labels, --truncation and --no-arrays")
    if count is not None and any(side.startswith("top=") for side in take):
        raise click.UsageError("-n is of samples along the top, where --take has pictures: leave one of them out")
    watcher = screen(as_json, at_once=True)
    from siv_core.runs import opened
    from siv_core.use import apply, mixing

    one = opened.open_run(**given)
    if mix:
        own = apply.taken(take, one.model, ("top", "left"))
        told(watcher, mixing.mix(one.model, out or one.run_dir.path / "outputs", mix, own, count or 8, seed), as_json)
        return
    data, note = (None, None) if one.model.spec.kind == "image" else opened.data_to_draw(one)
    folder = out or one.run_dir.path / "outputs"
    told(watcher, apply.sample(one.model, folder, count, seed, one.built.metrics(), data, note, **how), as_json)


@click.command()
@MODEL
@click.argument("images", type=PATH, nargs=-1)
@OWN_LABELS
@click.option("--collage", is_flag=True, help="A picture of pairs at several sizes.")
@NOISE
@OUT
def reconstruct(
    images: tuple[Path, ...],
    labels: str | None,
    collage: bool,
    seed: int,
    out: Path | None,
    as_json: bool,
    **which: Any,
) -> None:
    """Reconstruct IMAGES (held-out ones without arguments) with RUN: a picture and arrays."""
    watcher = screen(as_json, at_once=True)
    from siv_core.runs import opened
    from siv_core.use import apply

    one = opened.open_run(**which)
    about = "" if images else opened.need_data(one, watcher.progress)
    folder = out or one.run_dir.path / "outputs"
    told(watcher, apply.reconstruct(one.model, one.built.dataset, folder, images, seed, about, labels, collage=collage), as_json)


@click.command()
@MODEL
@click.argument("images", type=PATH, nargs=-1)
@click.option(
    "--steps", default=7, show_default=True, type=click.IntRange(2), help="Images from one end to the other, with both."
)
@click.option(
    "--path",
    type=click.Choice(["linear", "spherical", "styles"]),
    default="linear",
    show_default=True,
    help="Straight lines between the codes, great circles, or straight lines between a decoder's styles.",
)
@click.option("--corners", is_flag=True, help="Four held-out images as the corners of a square.")
@click.option("-n", "--number", "count", type=click.IntRange(1), help="Held-out pairs; default: 4.")
@OWN_LABELS
@NOISE
@OUT
def interpolate(
    images: tuple[Path, ...], corners: bool, count: int | None, seed: int, out: Path | None, as_json: bool, **given: Any
) -> None:
    """What RUN sees between two IMAGES, or between four as the corners of a square: top left, top right, bottom left, bottom
    right. Without arguments between pairs of held-out images."""
    if corners and count is not None:
        raise click.UsageError("-n counts pairs: leave it out with --corners")
    if images and (corners or count is not None):
        raise click.UsageError("-n and --corners choose held-out images: leave them out with pictures of yours")
    watcher = screen(as_json, at_once=True)
    from siv_core.runs import opened
    from siv_core.use import apply

    how = {name: given.pop(name) for name in ("steps", "path", "labels")}
    one = opened.open_run(**given)
    how |= {"corners": corners, "count": count or 4, "seed": seed}
    about = "" if images else opened.need_data(one, watcher.progress)
    folder = out or one.run_dir.path / "outputs"
    told(watcher, apply.interpolate(one.model, one.built.dataset, folder, images, about=about, **how), as_json)


@click.command()
@MODEL
@click.argument("images", type=PATH, nargs=-1, metavar="[FILES]...")
@click.option("--split", type=click.Choice(["train", "held_out", "all"]), help="Of the run's data; default, without FILES: all.")
@OWN_LABELS
@FOLDER
def encode(
    images: tuple[Path, ...], split: str | None, labels: str | None, out: Path | None, as_json: bool, **which: Any
) -> None:
    """The latents of RUN's data, or of pictures and folders of yours: means and log-variances of every group as safetensors, and
    the names of the rows, their mean and standard deviation as JSON."""
    if images and split:
        raise click.UsageError("--split is of the run's data: leave it out with pictures of yours")
    if labels is not None and not images:
        raise click.UsageError("--labels are of pictures of yours: the run's data bring their own")
    watcher = screen(as_json, at_once=True)
    from siv_core.runs import opened
    from siv_core.use import apply

    one = opened.open_run(**which)
    folder = out or one.run_dir.path / "outputs"
    if images:
        made = apply.encode_own(one.model, folder, images, labels, watcher.progress)
    else:
        about = opened.need_data(one, watcher.progress)
        made = apply.encode(one.model, one.built.dataset, folder, split or "all", about, watcher.progress)
    told(watcher, made, as_json)


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
    from siv_core.use import evaluate as evaluation

    one = opened.open_run(**which)
    given = apply.taken(take, one.model, evaluation.translated_groups(one.model))
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
        held = ", ".join(f"{name} {array['shape']} {array['type']}" for name, array in result.get("arrays", {}).items())
        for path in result["files"]:
            watcher.say(f"wrote {one_line(path)}" + (f": {held}" if held and path.endswith(".safetensors") else ""))


def show_metrics(watcher: Screen, lines: list[dict[str, Any]]) -> None:
    rows: list[tuple[str, ...]] = [
        (line["metric"], line["name"], f"{float(line['value']):.6g}" if "value" in line else f"skipped: {line['skipped']}")
        for line in lines
    ]
    watcher.table("Metrics", ("metric", "name", "value"), rows)
