"""`siv data`: what there is, fetching, preparing, checking."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siv_core.cli.common import PATH, json_option, print_json, screen
from siv_core.errors import UserError, one_line

if TYPE_CHECKING:
    from siv_core.cli.console import Screen
    from siv_core.protocols import Progress


@click.group()
def data() -> None:
    """Data sets: what there is, fetching, preparing, checking."""


@data.command("ls")
@json_option
def data_ls(as_json: bool) -> None:
    """List the data sets, whether they are at hand, and what the data root holds."""
    from siv_core.cli.console import Screen
    from siv_core.data import cache
    from siv_core.recipe import catalogue as catalogues
    from siv_core.store import files

    catalogue, root = catalogues.load(), files.data_root()
    taken = cache.sizes(root)
    rows: list[dict[str, Any]] = []
    for name in catalogue.names("dataset"):
        component: Any = catalogue.get("dataset", name)
        try:
            lacking = component.build(component.config()).missing()
        except TypeError:  # a set with options that have no default is somebody's own file
            lacking = "needs options; see `siv describe dataset " + name + "`"
        state = lacking or "at hand, or made when it is needed"
        rows.append({"name": name, "summary": component.summary, "state": state, "bytes": taken.pop(name, 0)})
    rows += [{"name": name, "summary": "a folder of the data root", "state": "", "bytes": size} for name, size in taken.items()]
    left = sum(one.size for one in cache.leftovers(root))
    if as_json:
        print_json({"root": str(root), "datasets": rows, "leftover_bytes": left})
        return
    out = Screen()
    out.say(f"data root: {root} (SIV_DATA sets another)")
    shown: list[tuple[str, ...]] = [(row["name"], row["summary"], row["state"], cache.megabytes(row["bytes"])) for row in rows]
    out.table("Data sets", ("name", "summary", "state", "size"), shown)
    if left:
        out.say(f"{cache.megabytes(left)} will not be read again: `siv data clean` takes that away")


@data.command("clean")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and stop.")
@json_option
def data_clean(dry_run: bool, as_json: bool) -> None:
    """Remove from the data root what will not be read again: conversions of files that have changed or are gone, and preparations
    that did not come to their end. All of it can be made again."""
    from siv_core.cli.console import Screen
    from siv_core.data import cache
    from siv_core.store import files

    root = files.data_root()
    found = list(cache.leftovers(root))
    report = [{"path": str(one.paths[0]), "bytes": one.size, "reason": one.reason} for one in found]
    out = Screen(stderr=as_json)
    for one in found:
        out.say(f"would remove {one_line(one.paths[0])} ({cache.megabytes(one.size)}): {one.reason}" if dry_run else one.remove())
    if as_json:
        print_json({"root": str(root), "removed": not dry_run, "leftovers": report})
    elif not found:
        out.say(f"{root}: nothing to remove")


@data.command("fetch")
@click.argument("name")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="An option of the data set.")
def data_fetch(name: str, sets: tuple[str, ...]) -> None:
    """Download the data set NAME from its source, where it has one."""
    watcher = screen()
    from siv_core.runs import opened

    fetch = getattr(opened.dataset_by_name(name, sets), "fetch", None)
    if fetch is None:
        raise UserError(f"data '{name}' is not downloaded: it comes with a package or is made by `siv data prepare {name}`")
    fetch(watcher.progress)
    watcher.say(f"data {name} is at hand")


@data.command("prepare")
@click.argument("name")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="An option of the data set, such as size=32.")
def data_prepare(name: str, sets: tuple[str, ...]) -> None:
    """Make the files the data set NAME is read from."""
    watcher = screen()
    from siv_core.runs import opened

    dataset: Any = opened.dataset_by_name(name, sets)
    lacking = dataset.missing()
    if lacking:
        raise UserError(f"data '{name}' is not at hand: {lacking}")
    dataset.prepare(watcher.progress)
    watcher.say(f"data {name} is ready: fingerprint {dataset.fingerprint()}")


@data.command("check")
@click.argument("path", type=PATH)
@json_option
def data_check(path: Path, as_json: bool) -> None:
    """Read every byte of PATH, a data file, an archive, a picture, a folder or a zip of pictures, and say what is in it.

    What makes it unusable is told all at once, with exit code 2.
    """
    watcher = screen(as_json, at_once=True)
    report = checked(path, watcher.progress)
    watcher.end()
    if as_json:
        print_json(report)
    else:
        show_report(watcher, path, report)
    if report["problems"]:
        raise UserError(report["problems"])


def show_report(watcher: Screen, path: Path, report: dict[str, Any]) -> None:
    """What there is, as tables; what is wrong follows as errors."""

    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key}: {shown(number)}" for key, number in value.items()) or "none"
        texts = value if isinstance(value, list) and value and isinstance(value[0], str) else [value]
        return "; ".join(one_line(f"{text:.6g}" if isinstance(text, float) else text) for text in texts)

    apart = ("path", "problems", "datasets")
    rows: list[tuple[str, ...]] = [(key, shown(value)) for key, value in report.items() if key not in apart and value is not None]
    watcher.table(one_line(path), ("", ""), rows)
    columns = ("name", "shape", "dtype", "storage", "lowest", "highest", "not_finite")
    if report.get("datasets"):
        watcher.table("Data sets", columns, [tuple(shown(e.get(key, "")) for key in columns) for e in report["datasets"]])


def checked(path: Path, progress: Progress) -> dict[str, Any]:
    """The report of whoever knows files such as PATH: a picture, then the data sets with a `check` of their own, then HDF5."""
    from siv_core.data import datafile, picture, picture_files
    from siv_core.recipe import catalogue as catalogues

    if not path.exists():
        raise UserError(f"{one_line(path)}: there is no such file or folder")
    if path.suffix.lower() in picture.SUFFIXES and not path.is_dir():
        return picture_files.check(path, progress)
    if path.suffix.lower() not in (".h5", ".hdf5"):
        catalogue = catalogues.load()
        # whose name is in the file's own is asked first: others may take any archive for theirs
        for name in sorted(catalogue.names("dataset"), key=lambda name: letters(name) not in letters(path.name)):
            component: Any = catalogue.get("dataset", name)
            try:
                check = getattr(component.build(component.config()), "check", None)
            except TypeError:  # options that have no default: somebody's own file
                continue
            report: dict[str, Any] | None = check(path, progress) if check else None
            if report is not None:
                return report
    pictures = path.is_dir() or path.suffix.lower() == ".zip"
    return picture_files.check(path, progress) if pictures else datafile.check(path, progress)


def letters(name: str) -> str:
    """Without what people put between them: cifar10 is in cifar-10-python.tar.gz."""
    return "".join(c for c in name.lower() if c.isalnum())
