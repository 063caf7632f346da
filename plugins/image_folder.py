"""Data set `image_folder`: any folder or zip of pictures, prepared once; class folders and train/, test/ are understood."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from siv_core import Component, UserError, hookimpl, option
from siv_core.data import picture_list
from siv_core.data.picture import FILTERS, Fitting
from siv_core.data.picture_classes import arrange
from siv_core.data.picture_set import Chosen, PictureSet
from siv_core.errors import one_line


@frozen
class ImageFolderConfig:
    path: str = option(doc="of the folder or the zip file", place=True)
    size: int = option(64, doc="pixels a side", ge=1, le=4096)
    channels: int = option(3, doc="3: colour, 1: grey", choices=(1, 3))
    box: tuple[int, ...] = option(
        (), doc="left, top, width and height, in pixels, of what is taken of each picture; empty: all", ge=0
    )
    crop: str = option("centre", doc="of that, the centre square, or none: all, stretched", choices=("centre", "none"))
    resampling: str = option("area", doc="filter of the resizing, always antialiased", choices=tuple(FILTERS))
    labels: str = option(
        "auto", doc="classes by the first folder: auto, where there are several; folders demands them; empty: without",
        choices=("auto", "folders", ""),
    )  # fmt: skip
    test_folder: str = option("", doc="folder beside train that is held out; empty: test, or val, valid, validation")
    held_out: float = option(0.1, doc="share kept from training by a seeded choice, where no folder is held out", gt=0, lt=1)
    split_seed: int = option(0, doc="of that choice", ge=0)
    damaged: str = option("error", doc="pictures that cannot be read: all told, or left out and told", choices=("error", "skip"))


def choose(config: ImageFolderConfig) -> Chosen:
    """All pictures that are there, by name."""
    place = Path(config.path)
    found = picture_list.listed(place)
    arranged = arrange([entry.name for entry in found.entries], one_line(place), config.labels, config.test_folder)
    left = picture_list.left_out(found.others)
    return Chosen(
        place,
        found.kind,
        found.state,
        [found.entries[i] for i in arranged.index],
        arranged.labels,
        len(arranged.classes) or None,
        arranged.classes,
        arranged.split,
        [*arranged.notes, *([f"not taken: {left}"] if left else [])],
    )


def build(config: ImageFolderConfig) -> PictureSet:
    if config.box and (len(config.box) != 4 or not all(config.box[2:])):
        raise UserError(f"data.box: expected left, top, width and height, got {list(config.box)}")
    place = Path(config.path)

    def missing() -> str | None:
        there = place.exists()
        return (
            None
            if there
            else f"there is no folder or zip {one_line(place)}; set data.path (a relative one is from the working folder)"
        )

    return PictureSet(
        "image_folder",
        lambda: choose(config),
        missing,
        Fitting(config.size, config.channels, config.crop, config.box, config.resampling),
        config.damaged,
        config.held_out,
        config.split_seed,
    )


@hookimpl
def siv_components() -> list[Component]:
    return [Component("dataset", "image_folder", ImageFolderConfig, build, "pictures in a folder or a zip file of your own")]
