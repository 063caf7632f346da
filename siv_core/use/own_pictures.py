"""A user's own pictures: read whatever they are, fitted to a model, and told what was done to them or why they cannot be read."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siv_core.data import feed
from siv_core.errors import UserError, one_line
from siv_core.model import Model
from siv_core.protocols import Progress

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")  # Pillow knows more, of which some start other programs
ORIENTATION = 0x0112  # of EXIF; 1 is upright


def expand(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the pictures in them by name."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            try:
                # names with a leading dot are macOS's shadows of the pictures
                inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
            except OSError as error:
                raise UserError(f"{one_line(path)}: this folder cannot be read ({error.strerror})") from error
            if not inside:
                raise UserError(f"{one_line(path)}: no pictures in this folder ({', '.join(SUFFIXES)})")
            found += inside
        else:
            found.append(path)
    return found


def listed(text: str) -> list[Path]:
    """Paths with commas between them; a file that has commas in its name is meant as it is."""
    return [Path(text)] if os.path.lexists(text) else [Path(part) for part in text.split(",") if part]


def own_images(paths: Sequence[Path], model: Model) -> tuple[Tensor, list[str]]:
    """A user's pictures fitted to the model, [N, *spec.shape], and a line for each that had to be changed."""
    if model.spec.kind != "image":
        raise UserError(f"this model is of arrays {list(model.spec.shape)}: pictures cannot be put into it; leave the files out")
    fitted, notes = [], []
    problems: list[str] = []
    for path in paths:
        try:
            picture, told = load(path)
            array, changes = fit(picture, *model.spec.shape)
        except UserError as error:
            problems += error.problems
            continue
        if told or changes:
            notes.append(f"{one_line(path)}: {', '.join([*told, *changes])}")
        fitted.append(feed.to_float(torch.from_numpy(array)[None], model.spec)[0])
    if problems:
        raise UserError(problems)
    return torch.stack(fitted), notes


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
                opened.load()
                if opened.mode == "F":
                    raise UserError(
                        f"{one_line(path)}: its pixels are floats, which have no agreed range; save it with 8 or 16 bits"
                    )
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


def fit(picture: Image.Image, channels: int, height: int, width: int) -> tuple[NDArray[np.uint8], list[str]]:
    """uint8 [C, H, W] of a picture, and what was done to it: put on white, cut to its centre, resized.

    Smaller sizes are area means, as `feed.to_float` makes them of data stored larger than asked for.
    """
    from PIL import Image, ImageOps

    changes = []
    if picture.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion cuts off at 255
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8))
        changes.append("16 bits reduced to 8")
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        changes.append("put on white")
    mode = "L" if channels == 1 else "RGB"
    if picture.mode not in (mode, "RGBA"):
        changes.append(f"{picture.mode} converted to {mode}")
    picture = picture.convert(mode)
    if picture.size != (width, height):
        changes.append(f"{picture.width} × {picture.height}, centre resized to {width} × {height}")
        smaller = picture.width >= width and picture.height >= height
        method = Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC
        picture = ImageOps.fit(picture, (width, height), method)
    return np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1).copy(), changes


def check(path: Path, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """What the picture or the folder of pictures `path` holds, after decoding each; what cannot be read is in `problems`."""
    paths, problems = expand([path]), list[str]()
    modes, sizes, notes = Counter[str](), Counter[str](), Counter[str]()
    for number, one in enumerate(paths):
        progress(f"reading {one_line(path.name)}", number, len(paths))
        try:
            picture, told = load(one)
            _, changes = fit(picture, 3, picture.height, picture.width)  # what is in the way of any use shows here
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
        "problems": problems,
    }
