"""Data sets `celeba`, `celeba_hq` and `ffhq`: photographs of faces, from the folders and zips that people have of them.

CelebA: Liu et al., Deep Learning Face Attributes in the Wild (ICCV 2015), aligned and cropped: 202,599 pictures of 178 × 218, in
parts of 162,770 (train), 19,867 (validation) and 19,962 (test). CelebA-HQ: Karras et al. (ICLR 2018), 30,000 numbered pictures,
of which Soft-IntroVAE's code trains on 29,000. FFHQ: Karras et al. (CVPR 2019), 70,000 numbered pictures in folders of 1,000,
the first 60,000 for training.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core import Component, UserError, hookimpl, option
from siv_core.data import picture_list
from siv_core.data.picture import FILTERS, Fitting
from siv_core.data.picture_set import Chosen, PictureSet
from siv_core.errors import one_line
from siv_core.store import files

PICTURES = "img_align_celeba"
PARTS = {"train": 0, "validation": 1, "test": 2}
PUBLISHED = {"train": 162_770, "validation": 19_867, "test": 19_962}
PARTITION, IDENTITY = ("list_eval_partition.txt", "list_eval_partition.csv"), ("identity_CelebA.txt",)
CROPS: Mapping[str, tuple[str, tuple[int, ...]]] = {  # (what is then done with the box, the box)
    "pggan": ("centre", (25, 57, 128, 128)),  # around (89, 121)
    "alae": ("centre", (25, 60, 128, 128)),  # the centre, 15 pixels lower
    "lord": ("centre", (25, 45, 128, 128)),  # the centre
    "centre": ("centre", ()),
    "none": ("none", ()),
}
MOST_OF_A_LIST = 64 << 20  # bytes

resampling = partial(option, doc="filter of the resizing, always antialiased", choices=tuple(FILTERS))
damaged = partial(option, "error", doc="pictures that cannot be read: all told, or left out and told", choices=("error", "skip"))


@frozen
class CelebAConfig:
    path: str = option("", doc="img_align_celeba, folder or zip, or the folder it is in; empty: in the data folder", place=True)
    size: int = option(128, doc="pixels a side", ge=1, le=1024)
    crop: str = option(
        "pggan", doc="part of it: 128 × 128 as pggan, alae or lord have it, the centre square, or none: all, stretched",
        choices=tuple(CROPS),
    )  # fmt: skip
    resampling: str = resampling("area")
    held_out: str = option("test", doc="the part that is held out; the third one is not used", choices=("test", "validation"))
    labels: str = option("", doc="identity: who it is (identity_CelebA.txt); empty: none", choices=("", "identity"))
    partition: str = option("", doc="list_eval_partition.txt or .csv; empty: beside the pictures, or in Eval", place=True)
    identity: str = option("", doc="identity_CelebA.txt; empty: beside the pictures, or in Anno", place=True)
    damaged: str = damaged()


def celeba_place(config: CelebAConfig) -> Path:
    """The folder or zip of pictures, wherever below `path` it is."""
    root = Path(config.path) if config.path else files.data_root() / "celeba"
    inside = [root / part / name for part in ("", "Img") for name in (PICTURES, f"{PICTURES}.zip")]
    return next((place for place in inside if place.exists()), root)


def beside(place: Path, given: str, names: Sequence[str]) -> Path | None:
    """A list that goes with the pictures."""
    if given:
        return Path(given) if Path(given).is_file() else None
    folders = [place, place.parent, place.parent.parent] if place.is_dir() else [place.parent, place.parent.parent]
    near = [folder / part / name for folder in folders for part in ("", "Eval", "Anno") for name in names]
    return next((path for path in near if path.is_file()), None)


def celeba_missing(config: CelebAConfig) -> str | None:
    place = celeba_place(config)
    if not place.exists():
        where = files.data_root() / "celeba"
        return f"there is no {one_line(place)}: put {PICTURES} (folder or zip) and {PARTITION[0]} into {where}, or set data.path"
    wanted: list[tuple[str, Sequence[str], str]] = [("partition", PARTITION, config.partition)]
    wanted += [("identity", IDENTITY, config.identity)] if config.labels == "identity" else []
    for key, names, given in wanted:
        if beside(place, given, names) is None:
            at = f"data.{key} = '{one_line(given)}' is no file" if given else f"{names[0]} is not beside {one_line(place)}"
            return f"{at}; set data.{key}"
    return None


def numbers_of(path: Path | None) -> dict[str, int]:
    """{file name: number} of a list of CelebA: two words a line, with a comma or a space between them."""
    assert path
    if path.stat().st_size > MOST_OF_A_LIST:
        raise UserError(f"{one_line(path)}: has {path.stat().st_size >> 20} MiB; a list of CelebA takes 5")
    found: dict[str, int] = {}
    for line_number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        words = re.split(r"[,\s]+", line.strip())
        if len(words) == 2 and words[1].isascii() and words[1].isdecimal() and len(words[1]) < 10:
            found[words[0]] = int(words[1])
        elif line.strip() and line_number > 1:  # a .csv has a head
            raise UserError(f"{one_line(path)}: line {line_number} is no file name with a number: {one_line(line)[:80]}")
    return found


def choose_celeba(config: CelebAConfig) -> Chosen:
    """The pictures of the training part and of the one that is held out."""
    place = celeba_place(config)
    found = picture_list.listed(place)
    names, partition = base_names(found), beside(place, config.partition, PARTITION)
    part_of = numbers_of(partition)
    wrong = sorted(set(part_of.values()) - set(PARTS.values()))
    if wrong:
        raise UserError(f"{one_line(partition)}: has parts {wrong[:5]}; there are 0 (train), 1 (validation) and 2 (test)")
    used = (PARTS["train"], PARTS[config.held_out])
    index = [i for i, name in enumerate(names) if part_of.get(name) in used]
    if not index:
        raise UserError(f"{one_line(place)}: none of its pictures is in a part that is used of {one_line(partition)}")
    split = np.array([part_of[names[i]] != PARTS["train"] for i in index], np.uint8)
    labels = identities([names[i] for i in index], beside(place, config.identity, IDENTITY)) if config.labels else None
    classes = None if labels is None else int(labels.max()) + 1
    notes = [*parts_notes(Counter(part_of.get(name) for name in names), config.held_out)]
    notes += [f"{classes:,} identities, numbered from 0 in their order"] if classes else []
    entries = [found.entries[i] for i in index]
    return Chosen(place, found.kind, found.state, entries, labels, classes, (), split, notes)


def parts_notes(counts: Mapping[int | None, int], held_out: str) -> Iterator[str]:
    """What becomes of each part, and where it has other pictures than were published."""
    for part, number in PARTS.items():
        use = {"train": "trained on", held_out: "held out"}.get(part, "not used")
        count = counts.get(number, 0)
        differs = f" ({PUBLISHED[part]:,} are published)" if count != PUBLISHED[part] else ""
        yield f"part {part}: {count:,} pictures{differs}, {use}"
    if counts.get(None):
        yield f"{counts[None]:,} pictures are in no part, and not used"


def identities(names: Sequence[str], listed: Path | None) -> NDArray[np.int64]:
    """Who is on each picture, as numbers from 0."""
    known = numbers_of(listed)
    without = [name for name in names if name not in known]
    if without:
        lacking = f"{len(without):,} pictures have no identity, such as {one_line(without[0])}"
        raise UserError(f'{one_line(listed)}: {lacking}; data.labels = "" goes on without')
    return np.unique([known[name] for name in names], return_inverse=True)[1].astype(np.int64)


def base_names(found: picture_list.Listing) -> list[str]:
    """The pictures' names without their folders, each of which is there once."""
    names = [PurePosixPath(entry.name).name for entry in found.entries]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{one_line(found.place)}: {one_line(twice[0])} is in more than one of its folders; give the path of one")
    return names


def build_celeba(config: CelebAConfig) -> PictureSet:
    crop, box = CROPS[config.crop]
    fitting = Fitting(config.size, 3, crop, box, config.resampling)
    return PictureSet("celeba", partial(choose_celeba, config), partial(celeba_missing, config), fitting, config.damaged)


@frozen
class CelebAHQConfig:
    path: str = option("", doc="of the folder or zip of numbered pictures; empty: images in the data folder", place=True)
    size: int = option(256, doc="pixels a side", ge=1, le=1024)
    resampling: str = resampling("area")
    held_out: int = option(1000, doc="so many pictures are held out: those of the highest numbers", ge=1)
    damaged: str = damaged()


@frozen
class FFHQConfig(CelebAHQConfig):
    path: str = option("", doc="of images1024x1024, thumbnails128x128 or a zip; empty: looked for in the data folder", place=True)
    held_out: int = option(10_000, doc="so many pictures are held out: those of the highest numbers", ge=1)


FOLDERS = {"celeba_hq": ("images", "images.zip"), "ffhq": ("images1024x1024", "thumbnails128x128", "images", "images.zip")}
COUNTS = {"celeba_hq": 30_000, "ffhq": 70_000}


def numbered_place(name: str, config: CelebAHQConfig) -> Path:
    if config.path:
        return Path(config.path)
    places = [files.data_root() / name / folder for folder in FOLDERS[name]]
    return next((place for place in places if place.exists()), places[0])


def numbered_missing(name: str, config: CelebAHQConfig) -> str | None:
    place = numbered_place(name, config)
    return None if place.exists() else f"there is no {one_line(place)}: put the numbered pictures there, or set data.path"


def choose_numbered(name: str, config: CelebAHQConfig) -> Chosen:
    """Pictures in the order of their numbers, the last ones held out."""
    place = numbered_place(name, config)
    found = picture_list.listed(place)
    numbers = [picture_number(entry.name, place) for entry in found.entries]
    twice = [number for number, times in Counter(numbers).items() if times > 1]
    if twice:
        raise UserError(f"{one_line(place)}: more than one picture has the number {twice[0]}; give the path of one folder")
    order, published = np.argsort(numbers, kind="stable"), COUNTS[name]
    if config.held_out >= len(order):
        raise UserError(
            f"{one_line(place)}: has {len(order):,} pictures, data.held_out = {config.held_out:,} of them leaves none; set fewer"
        )
    split = np.zeros(len(order), np.uint8)
    split[-config.held_out :] = 1
    notes = [f"{len(order):,} pictures, {published:,} are published"] if len(order) != published else []
    notes.append(f"the last {config.held_out:,} by number are held out, from {sorted(numbers)[-config.held_out]:,} on")
    left = picture_list.left_out(found.others)
    notes += [f"not taken: {left}"] if left else []
    return Chosen(place, found.kind, found.state, [found.entries[i] for i in order], None, None, (), split, notes)


def picture_number(name: str, place: Path) -> int:
    """The digits at the end of a name without its ending."""
    digits = re.search(r"[0-9]{1,15}$", PurePosixPath(name).stem)
    if not digits:
        raise UserError(
            f"{one_line(place)}: {one_line(name)} has no number; pictures are numbered here (data set image_folder takes any)"
        )
    return int(digits[0])


def build_numbered(name: str, config: CelebAHQConfig) -> PictureSet:
    fitting = Fitting(config.size, 3, "centre", (), config.resampling)
    return PictureSet(
        name, partial(choose_numbered, name, config), partial(numbered_missing, name, config), fitting, config.damaged
    )


@hookimpl
def siv_components() -> list[Component]:
    return [
        Component(
            "dataset",
            "celeba",
            CelebAConfig,
            build_celeba,
            "faces of celebrities, aligned, in the published parts",
            "Liu et al., ICCV 2015",
        ),
        Component(
            "dataset",
            "celeba_hq",
            CelebAHQConfig,
            partial(build_numbered, "celeba_hq"),
            "30,000 faces in high quality, the last 1,000 held out",
            "Karras et al., ICLR 2018",
        ),
        Component(
            "dataset",
            "ffhq",
            FFHQConfig,
            partial(build_numbered, "ffhq"),
            "70,000 faces from Flickr, the last 10,000 held out",
            "Karras et al., CVPR 2019",
        ),
    ]
