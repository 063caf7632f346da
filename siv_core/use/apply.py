"""A trained model put to use: each function writes a picture and arrays, and says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import save
from torch import Tensor

from siv_core.errors import UserError, near_miss
from siv_core.model import Model
from siv_core.protocols import Batch, Dataset, Metric
from siv_core.store import files
from siv_core.use import evaluate, own_pictures, pictures
from siv_core.use.pictures import Picture


def sample(
    model: Model,
    folder: Path,
    count: int,
    seed: int,
    metrics: Mapping[str, Metric] = MappingProxyType({}),
    data: Dataset | None = None,
    note: str | None = None,
) -> dict[str, Any]:
    """`count` images of the prior. Of data that is no image the picture is what one of `metrics` draws, over `data`, which is
    prepared; a `note` says why there is none."""
    x = model.sample(count, seed)
    notes: list[str] = []
    if model.spec.kind == "image":
        columns = max(1, round(count**0.5))
        return _write(folder, "samples", model, {"samples": x}, lambda: _grid(model, x, columns), notes)
    if not evaluate.drawer(metrics):
        notes.append("no picture: such data is drawn by a metric that can, as [metrics.density2d] points of the plane")
    elif note:
        notes.append(note)
    return _write(folder, "samples", model, {"samples": x}, lambda: evaluate.draw({"": model}, metrics, data, seed, count), notes)


def reconstruct(model: Model, data: Dataset, folder: Path, paths: Sequence[Path], seed: int, about: str) -> dict[str, Any]:
    """Reconstructions of the user's pictures or, without any, of held-out images of `data`, which `about` tells of."""
    labels = None
    if paths:
        x, notes = own_pictures.own_images(paths, model)
    else:
        x, labels = evaluate.held_out(data, model, 4 * evaluate.SHOWN, seed)
        notes = [f"held-out {'images' if model.spec.kind == 'image' else 'samples'} of {about}"]
    arrays = {"x": x, "y": model.reconstruct(x, labels)}
    draw = (lambda: evaluate.reconstructions(model, x, labels)) if model.spec.kind == "image" else None
    return _write(folder, "reconstructions", model, arrays, draw, notes)


def taken(take: Sequence[str], model: Model) -> dict[str, tuple[Tensor, list[str]]]:
    """{group: pictures and what was done to them} from `GROUP=FILE,FILE` of the command line."""
    groups, given = evaluate.translated_groups(model), dict[str, list[Path]]()
    for text in take:
        group, sign, listed = text.partition("=")
        if not sign or not listed:
            raise UserError(f"--take {text}: expected GROUP=FILES, such as class=a.png,b.png")
        if group not in groups:
            raise UserError(f"--take {group}: no such group{near_miss(group, groups)}")
        given.setdefault(group, []).extend(own_pictures.listed(listed))
    return {group: own_pictures.own_images(paths, model) for group, paths in given.items()}


def translate(
    model: Model,
    data: Dataset,
    folder: Path,
    given: Mapping[str, tuple[Tensor, list[str]]],
    count: int,
    seed: int,
    about: str,
) -> dict[str, Any]:
    """The matrix of class and content images; held-out ones of `data`, which `about` tells of, stand in for what is not given."""
    groups = evaluate.translated_groups(model)
    sides: list[Batch] = []
    notes: list[str] = []
    held_out = evaluate.held_out_pairs(data, model, count, seed) if len(given) < 2 else ()
    for i, group in enumerate(groups):
        if group in given:
            x, changed = given[group]
            notes += changed
            sides.append(Batch(x))
        else:
            sides.append(held_out[i])
            notes.append(f"{group}: {len(sides[-1].x)} held-out images of {about}")
    made = evaluate.translation(model, *sides)
    arrays = {"classes": made.classes, "contents": made.contents, "cells": made.cells.unflatten(0, (len(sides[0].x), -1))}
    return _write(folder, "translation", model, arrays, lambda: made.picture(model.spec.value_range), notes)


def _grid(model: Model, x: Tensor, columns: int) -> Picture:
    return pictures.grid(pictures.to_uint8(x, model.spec.value_range), columns)


def _write(folder: Path, name: str, model: Model, arrays: Mapping[str, Tensor], draw: Any, notes: list[str]) -> dict[str, Any]:
    """NAME.safetensors with the arrays and, for images, NAME.png; a name that is taken gets a number, nothing is overwritten."""
    files.make_folder(folder)
    stem, number = name, 1
    while any((folder / f"{stem}{suffix}").exists() for suffix in (".safetensors", ".png")):
        number += 1
        stem = f"{name}-{number}"
    written = [folder / f"{stem}.safetensors"]
    files.write_bytes(written[0], save({key: value.detach().cpu().contiguous() for key, value in arrays.items()}))
    picture = draw() if draw else None
    if picture is not None:
        written.append(folder / f"{stem}.png")
        pictures.save_png(written[1], picture)
    return {"files": [str(path) for path in written], "notes": notes, "model": model.name}
