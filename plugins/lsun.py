"""Data set `lsun_bedroom`: photographs of bedrooms from the LMDB of LSUN (Yu et al., 2015), 3,033,042 in its training part.

Its values are encoded pictures, whatever their keys say. PGGAN and StyleGAN cut them to the centre square and leave out those
that cannot be read, which are the defaults here. Needs the extra `lsun`.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

from attrs import frozen

from siv_core import Component, hookimpl, option
from siv_core.data import picture_list, picture_pool
from siv_core.data.picture import FILTERS, Fitting
from siv_core.data.picture_list import LMDB, Entry
from siv_core.data.picture_set import Chosen, PictureSet
from siv_core.errors import UserError, one_line
from siv_core.store import files

PUBLISHED = 3_033_042
FOLDER = "bedroom_train_lmdb"


@frozen
class LSUNConfig:
    path: str = option("", doc=f"of the folder with {LMDB}; empty: {FOLDER} in the data folder", place=True)
    size: int = option(128, doc="pixels a side", ge=1, le=1024)
    count: int = option(0, doc="only so many pictures, the first by their keys; 0: all", ge=0)
    resampling: str = option("lanczos", doc="filter of the resizing, always antialiased", choices=tuple(FILTERS))
    held_out: float = option(0.01, doc="share kept from training by a seeded choice", gt=0, lt=1)
    split_seed: int = option(0, doc="of that choice", ge=0)
    damaged: str = option("skip", doc="pictures that cannot be read: all told, or left out and told", choices=("error", "skip"))


def place_of(config: LSUNConfig) -> Path:
    return Path(config.path) if config.path else files.data_root() / "lsun_bedroom" / FOLDER


def missing(config: LSUNConfig) -> str | None:
    place = place_of(config)
    if not (place / LMDB).is_file():
        return f"there is no {one_line(place / LMDB)}: put LSUN's {FOLDER} there, or set data.path"
    return None if find_spec("lmdb") else "reading an LMDB needs the package lmdb: pip install 'siv[lsun]'"


def choose(config: LSUNConfig) -> Chosen:
    """The keys, in their order."""
    place = place_of(config)
    state = picture_list.state(place)
    entries = [Entry(key) for key in picture_pool.keys(place, config.count)]
    if not entries:
        raise UserError(f"{one_line(place)}: no pictures in this LMDB")
    notes = [f"{len(entries):,} pictures, {PUBLISHED:,} are published"] if len(entries) != PUBLISHED else []
    return Chosen(place, "lmdb", state, entries, notes=notes)


def build(config: LSUNConfig) -> PictureSet:
    return PictureSet(
        "lsun_bedroom",
        partial(choose, config),
        partial(missing, config),
        Fitting(config.size, 3, "centre", (), config.resampling),
        config.damaged,
        config.held_out,
        config.split_seed,
    )


@hookimpl
def siv_components() -> list[Component]:
    return [
        Component("dataset", "lsun_bedroom", LSUNConfig, build, "photographs of bedrooms, from LSUN's LMDB", "Yu et al., 2015")
    ]
