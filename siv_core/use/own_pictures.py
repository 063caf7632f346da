"""A user's own pictures: read whatever they are, fitted to a model, and told what was done to them or why they cannot be read."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from siv_core.data import feed
from siv_core.errors import UserError, one_line
from siv_core.model import Model
from siv_core.protocols import Progress, Spec
from siv_core.store import files

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")  # Pillow knows more, of which some start other programs
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's, by the channels of a model's images
ORIENTATION = 0x0112  # of EXIF; 1 is upright


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


def load(path: Path) -> tuple[Image.Image, list[str]]:
    """The picture, decoded and upright, and what was done to it; a `UserError` for whatever is none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    told = []
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{one_line(path)}: no picture that can be read (it is no regular file)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged notes beside the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                sixteen = ";16" in str(opened.tile)
                opened.load()
                if opened.mode == "F":
                    raise UserError(
                        f"{one_line(path)}: its pixels are floats, which have no agreed range; save it with 8 or 16 bits"
                    )
                if opened.mode == "I" and opened.format != "PNG":
                    reason = "its pixels are whole numbers of 32 bits, which have no agreed range; save it with 8 or 16"
                    raise UserError(f"{one_line(path)}: {reason}")
                if sixteen and not opened.mode.startswith("I"):
                    told.append("16 bits reduced to 8")
                if getattr(opened, "n_frames", 1) > 1:
                    told.append(f"the first of its {getattr(opened, 'n_frames', 1)} frames")
                if opened.getexif().get(ORIENTATION, 1) != 1:
                    told.append("turned upright")
                upright = ImageOps.exif_transpose(opened)
                if upright.mode in ("LAB", "YCbCr", "HSV"):  # from which Pillow knows no way to grey
                    told.append(f"{upright.mode} converted to RGB")
                    upright = upright.convert("RGB")
                return upright, told
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        most = f"more than the {(Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels that are read; make it smaller first"
        raise UserError(f"{one_line(path)}: no picture that can be read (it has {most})") from error
    except UnidentifiedImageError as error:
        reason = f"it is none of {', '.join(FORMATS)}, or damaged at its start"
        raise UserError(f"{one_line(path)}: no picture that can be read ({reason})") from error
    except Exception as error:  # whatever a damaged picture makes the decoders run into
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{one_line(path)}: no picture that can be read ({one_line(reason)[:300]})") from error


def pixels(picture: Image.Image, channels: int) -> tuple[Image.Image, list[str]]:
    """8 bits in each of so many channels, and what was done for it."""
    from PIL import Image

    changes = []
    if channels not in MODES:
        raise UserError(f"pictures have 1 to 4 channels and this model's images {channels}: give it arrays, in Python")
    if picture.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion cuts off at 255
        values = np.asarray(picture).clip(0, 65535)
        changes.append(f"16 bits reduced to 8: 65,535 is white, its highest value {int(values.max()):,}")
        picture = Image.fromarray((values // 256).astype(np.uint8))
    if picture.has_transparency_data and channels in (1, 3):
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        changes.append("put on white")
    mode = MODES[channels]
    if picture.mode not in (mode, "RGBA"):
        changes.append(f"{picture.mode} converted to {mode}")
    return picture.convert(mode), changes


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


def check(path: Path, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """What the picture or the folder of pictures `path` holds, after decoding each; what cannot be read is in `problems`."""
    (paths, left_out), problems = expand([path]), list[str]()
    modes, sizes, notes = Counter[str](), Counter[str](), Counter[str]()
    for number, one in enumerate(paths):
        progress(f"reading {one_line(path.name)}", number, len(paths))
        try:
            picture, told = load(one)
            _, changes = pixels(picture, 3)  # what is in the way of any use shows here
        except UserError as error:
            problems += error.problems
            continue
        modes[picture.mode] += 1
        sizes[f"{picture.width} × {picture.height}"] += 1
        notes.update([*told, *changes])
    progress(f"reading {one_line(path.name)}", len(paths), len(paths))
    tables = {name: dict(counts.most_common()) for name, counts in (("modes", modes), ("sizes", sizes), ("changes", notes))}
    return {
        "path": str(path),
        "kind": "pictures",
        "pictures": len(paths),
        "readable": modes.total(),
        **tables,
        "not_taken": left_out,
        "problems": problems,
    }
