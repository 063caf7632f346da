"""One picture: decoded whatever it is, brought to 8 bits in so many channels, cut and resized; or told why it cannot be read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core.data import feed
from siv_core.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")  # Pillow knows more, of which some start other programs
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's, by the channels of a model's images
ORIENTATION = 0x0112  # of EXIF; 1 is upright
FILTERS = {"area": "BOX", "bilinear": "BILINEAR", "bicubic": "BICUBIC", "lanczos": "LANCZOS"}  # Pillow's, by our names


@frozen
class Fitting:
    """How pictures become images [channels, size, size]: `box` (left, top, width, height in pixels; empty: all) is taken, of that
    its centre in these proportions (`crop` "centre") or all of it ("none": stretched), then resized by one of `FILTERS`."""

    size: int
    channels: int = 3
    crop: str = "centre"
    box: tuple[int, ...] = ()
    resampling: str = "area"


def load(path: Path) -> tuple[Image.Image, list[str]]:
    """The picture, decoded and upright, and what was done to it; a `UserError` for whatever is none."""
    return decoded(path, one_line(path))


def decoded(source: Path | BinaryIO, where: str) -> tuple[Image.Image, list[str]]:
    """`load` of a file or of what is open for reading; `where` stands before what is told."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    told = []
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise UserError(f"{where}: no picture that can be read (it is no regular file)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged notes beside the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=FORMATS) as opened:
                sixteen = ";16" in str(opened.tile)
                opened.load()
                if opened.mode == "F":
                    raise UserError(f"{where}: its pixels are floats, which have no agreed range; save it with 8 or 16 bits")
                if opened.mode == "I" and opened.format != "PNG":
                    reason = "its pixels are whole numbers of 32 bits, which have no agreed range; save it with 8 or 16"
                    raise UserError(f"{where}: {reason}")
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
        raise UserError(f"{where}: no picture that can be read (it has {most})") from error
    except UnidentifiedImageError as error:
        reason = f"it is none of {', '.join(FORMATS)}, or damaged at its start"
        raise UserError(f"{where}: no picture that can be read ({reason})") from error
    except Exception as error:  # whatever a damaged picture makes the decoders run into
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{where}: no picture that can be read ({one_line(reason)[:300]})") from error


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


def fitted(picture: Image.Image, fitting: Fitting, where: str) -> tuple[NDArray[np.uint8], list[str]]:
    """uint8 [C, S, S] of a decoded picture, and what was done to its pixels; a `UserError` where it does not hold the box.

    Pillow's filters are as wide as the pixels they make, which is antialiasing. "area" is the mean of the pixels that a new one
    covers; where the part that is taken is smaller than the image, its enlargement is bicubic.
    """
    from PIL import Image

    size, (left, top, width, height) = fitting.size, fitting.box or (0, 0, *picture.size)
    if left + width > picture.width or top + height > picture.height:
        has = f"has {picture.width} × {picture.height} pixels"
        raise UserError(f"{where}: {has}, which do not hold the box of {width} × {height} at {left}, {top}")
    picture, changes = pixels(picture, fitting.channels)
    inner = feed.window(height, width, size, size, "stretch" if fitting.crop == "none" else "crop")
    left, top, height, width = left + inner[1], top + inner[0], inner[2], inner[3]
    small = width < size or height < size
    if small:
        changes.append("enlarged")
    name = "BICUBIC" if small and fitting.resampling == "area" else FILTERS[fitting.resampling]
    box = (left, top, left + width, top + height)
    if (width, height) == (size, size):
        picture = picture.crop(box)
    elif name == "BOX" and width % size == height % size == 0:
        picture = picture.reduce((width // size, height // size), box)  # rounded once; `resize` does it along each axis
    else:
        picture = picture.resize((size, size), Image.Resampling[name], box=box)
    return np.ascontiguousarray(np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1)), changes
