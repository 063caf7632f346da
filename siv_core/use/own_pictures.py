"""A user's own pictures: read whatever they are, fitted to a model, and told what was done to them or why they cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from siv_core.data import feed
from siv_core.data.picture import SUFFIXES, load, pixels
from siv_core.errors import UserError, one_line
from siv_core.model import Model
from siv_core.protocols import Spec
from siv_core.store import files

if TYPE_CHECKING:
    from PIL import Image


def expand(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Files as they are, folders as the pictures in them by name; and a line for each folder of which something was not taken."""
    found: list[Path] = []
    notes: list[str] = []
    for path in map(files.expanded, paths):
        if path.is_dir():
            try:
                # names with a leading dot are macOS's shadows of the pictures
                entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
            except OSError as error:
                raise UserError(f"{one_line(path)}: this folder cannot be read ({error.strerror})") from error
            inside = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and not entry.is_dir()]
            left = _left_out([entry for entry in entries if entry not in inside])
            if not inside:
                has = f"; it has {left}" if left else ""
                raise UserError(f"{one_line(path)}: no pictures in this folder ({', '.join(SUFFIXES)}){has}")
            found += inside
            notes += [f"{one_line(path)}: {len(inside)} pictures of it taken, not {left}"] if left else []
        else:
            found.append(path)
    return found, notes


def _left_out(entries: Sequence[Path]) -> str:
    """Counts and names of what lies in a folder and is no picture; "" of nothing."""
    folders = [entry.name for entry in entries if entry.is_dir()]
    others = [entry.name for entry in entries if not entry.is_dir()]
    told = [
        f"{len(names)} {what if len(names) > 1 else one} ({', '.join(map(one_line, names[:3]))}{', …' if len(names) > 3 else ''})"
        for one, what, names in (
            ("folder in it", "folders in it", folders),
            ("file of another ending", "files of other endings", others),
        )
        if names
    ]
    return " and ".join(told)


def listed(text: str) -> list[Path]:
    """Paths with commas between them; a file that has commas in its name is meant as it is."""
    whole = os.path.lexists(files.expanded(text))
    return [Path(text)] if whole else [Path(part) for part in text.split(",") if part]


def own_images(paths: Sequence[Path], model: Model) -> tuple[Tensor, list[str]]:
    """A user's pictures, and those in folders, fitted to the model: [N, *spec.shape], and a line for each that had to be changed
    and for what was not taken."""
    _takes_pictures(model)
    taken, notes = expand(paths)
    images = []
    for path, x, changes in fitted(taken, model):
        if changes:
            notes.append(f"{one_line(path)}: {', '.join(changes)}")
        images.append(x)
    return torch.stack(images), notes


def fitted(paths: Iterable[Path], model: Model) -> Iterator[tuple[Path, Tensor, list[str]]]:
    """One picture after the other: its file, what the model takes [*spec.shape], and what was changed for that. After the last
    one a `UserError` of all that could not be read."""
    _takes_pictures(model)
    problems = list[str]()
    for path in paths:
        try:
            picture, told = load(path)
            x, changes = fit(picture, model.spec)
        except UserError as error:
            problems += error.problems
            continue
        yield path, x, [*told, *changes]
    if problems:
        raise UserError(problems)


def _takes_pictures(model: Model) -> None:
    if model.spec.kind != "image":
        raise UserError(f"this model is of arrays {list(model.spec.shape)}: pictures cannot be put into it; leave the files out")


def fit(picture: Image.Image, spec: Spec) -> tuple[Tensor, list[str]]:
    """Floats [C, H, W] of the model's images, and what was done to the picture: as `feed.to_float` does it to stored images, so
    that an image goes in in one way. A picture that is too small is enlarged first."""
    from PIL import Image

    channels, height, width = spec.shape
    picture, changes = pixels(picture, channels)
    told = feed.fitting(picture.height, picture.width, height, width, spec.fit)
    changes += [told] if told else []
    top, left, rows, columns = feed.window(picture.height, picture.width, height, width, spec.fit)
    if rows < height or columns < width:
        box = (left, top, left + columns, top + rows)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
    array = np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1).copy()
    return feed.to_float(torch.from_numpy(array)[None], spec)[0], changes
