"""A trained model put to use: each function writes a picture and arrays, and says which."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from siv_core.data import feed
from siv_core.errors import UserError, near_miss
from siv_core.model import BATCH, Model
from siv_core.protocols import Batch, Dataset, Metric, Progress
from siv_core.seeding import Streams
from siv_core.use import evaluate, outputs, own_pictures, pictures
from siv_core.use.pictures import Picture

SAMPLES = 64  # unless a number is given
EACH = "each"  # --labels of a grid with every class


def sample(
    model: Model,
    folder: Path,
    count: int | None,
    seed: int,
    metrics: Mapping[str, Metric] = MappingProxyType({}),
    data: Dataset | None = None,
    note: str | None = None,
    *,
    labels: str | None = None,
    truncation: float = 1.0,
    arrays: bool = True,
) -> dict[str, Any]:
    """`count` images of the prior. Of data that is no image the picture is what one of `metrics` draws, over `data`, which is
    prepared; a `note` says why there is none.

    `labels` of a conditional model: class numbers with commas, taken in turn, or "each": `count` images of every class, of the
    same noise. Without them its classes in turn. Without `arrays` there is the picture alone.
    """
    x, of, columns = _drawn(model, count, seed, labels, truncation)
    draw, notes = _picture_of_samples(model, x, of, columns), list[str]()
    if draw is None and not evaluate.drawer(metrics):
        notes.append("no picture: such data is drawn by a metric that can, as [metrics.density2d] points of the plane")
    elif draw is None and (labels is not None or truncation != 1):
        notes.append("no picture: a metric draws samples of its own, without --labels and --truncation")
    elif draw is None:
        draw = partial(evaluate.draw, {"": model}, metrics, data, seed, len(x))
        notes += [note] if note else []
    if not arrays and draw is None:
        raise UserError(["--no-arrays: there would be nothing to write; leave it out", *notes])
    made = {"samples": x} if of is None else {"samples": x, "labels": of}
    return outputs.write(folder, "samples", model, made if arrays else {}, draw, notes, {"seed": seed, "truncation": truncation})


def _drawn(model: Model, count: int | None, seed: int, labels: str | None, psi: float) -> tuple[Tensor, Tensor | None, int]:
    """Samples, their labels where the model takes some, and how many are to stand in a row, 0 where nothing asks for a number."""
    classes = _classes(labels, model)
    if labels == EACH:
        n = evaluate.SHOWN if count is None else count
        return model.sample_classes(n, seed, classes, psi).flatten(0, 1), torch.tensor(classes).repeat_interleave(n), n
    n = SAMPLES if count is None else count
    of = torch.tensor(classes)[torch.arange(n) % len(classes)] if classes else None
    return model.sample(n, seed, of, psi), of, 0


def _picture_of_samples(model: Model, x: Tensor, labels: Tensor | None, columns: int) -> outputs.Draw | None:
    """All samples: as a square, or class by class where there are several; None of data that is no image."""
    if model.spec.kind != "image":
        return None
    side, given = max(1, round(len(x) ** 0.5)), [] if labels is None else labels.tolist()
    if len(set(given)) < 2:
        return lambda: pictures.grid(pictures.to_uint8(x, model.spec.value_range), columns or side)
    most = max(Counter(given).values())
    wide = columns or min(most, max(evaluate.SHOWN, side))
    return lambda: pictures.by_class(pictures.to_uint8(x, model.spec.value_range), given, wide)


def _classes(text: str | None, model: Model) -> list[int]:
    """The classes that samples are of, in turn; none of a model that takes no labels."""
    if not model.spec.conditional:
        if text is not None:
            raise UserError(f"--labels {text}: this model takes none: it was trained without train.conditional; leave it out")
        return []
    known = range(model.spec.classes or 0)
    if text in (None, EACH):
        return list(known)
    return _numbers(text or "", len(known))


def _numbers(text: str, classes: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    bad = [part for part in parts if not (part.isascii() and part.isdigit() and int(part) < classes)]
    if bad:
        told = ", ".join(repr(part) for part in bad[:5])
        raise UserError(f"--labels {text}: {told}: expected class numbers from 0 to {classes - 1} with commas between them")
    return [int(part) for part in parts]


def own(paths: Sequence[Path], model: Model, labels: str | None) -> tuple[Tensor, Tensor | None, list[str]]:
    """The user's pictures as the model takes them, the labels that they were given, and what was done to them."""
    x, notes = own_pictures.own_images(paths, model)
    return x, own_labels(labels, len(x), model), notes


def own_labels(text: str | None, n: int, model: Model) -> Tensor | None:
    """Labels [n] of the user's pictures, None of a model that takes none: a class number for each, or one for all."""
    if not model.spec.conditional:
        _classes(text, model)
        return None
    classes = model.spec.classes or 0
    if text is None:
        told = f"say of which class (0 … {classes - 1}) each picture is by --labels, such as --labels 3 for all of them"
        raise UserError(f"this model was trained with train.conditional and encodes a picture with its label: {told}")
    given = _numbers(text, classes)
    if len(given) not in (1, n):
        raise UserError(f"--labels {text}: {len(given)} for {n} pictures: expected one for each in their order, or one for all")
    return torch.tensor(given * (n // len(given)))


def reconstruct(
    model: Model,
    data: Dataset,
    folder: Path,
    paths: Sequence[Path],
    seed: int,
    about: str,
    labels: str | None = None,
    *,
    collage: bool = False,
) -> dict[str, Any]:
    """Reconstructions of the user's pictures, which `labels` are of, or, without any, of held-out images of `data`, which `about`
    tells of; as a `collage` of several sizes."""
    if paths:
        x, of, notes = own(paths, model, labels)
    else:
        _only_with_files(labels)
        x, of = evaluate.held_out(data, model, 4 * evaluate.SHOWN, seed)
        notes = [f"held-out {'images' if model.spec.kind == 'image' else 'samples'} of {about}"]
    y = model.reconstruct(x, of)
    arrays = {"x": x, "y": y} | ({} if of is None else {"labels": of})
    shown = partial(_collage, model, x, y) if collage else partial(evaluate.reconstructions, model, x, of)
    draw = shown if model.spec.kind == "image" else None
    return outputs.write(folder, "reconstructions", model, arrays, draw, notes, {} if paths else {"seed": seed})


def _collage(model: Model, x: Tensor, y: Tensor) -> Picture:
    above, below = (pictures.to_uint8(side, model.spec.value_range) for side in (x, y))
    return pictures.collage(above, below)


def _only_with_files(labels: str | None) -> None:
    if labels is not None:
        raise UserError(f"--labels {labels}: of your own pictures; the run's data bring theirs: leave it out, or give files")


def interpolate(
    model: Model,
    data: Dataset,
    folder: Path,
    paths: Sequence[Path],
    *,
    steps: int,
    path: str,
    seed: int,
    about: str,
    labels: str | None = None,
    corners: bool = False,
    count: int = 4,
) -> dict[str, Any]:
    """What lies between two pictures of the user's, or four as the corners of a square; without any between `count` pairs of
    held-out images of `data`, which `about` tells of, or four as `corners`."""
    if paths:
        x, of, notes = own(paths, model, labels)
        if len(x) not in (2, 4):
            told = (
                "2, for what lies between them, or 4 as the corners of a square: top left, top right, bottom left, bottom right"
            )
            raise UserError(f"these are {len(x)} pictures: expected {told}")
        size = len(x)
    else:
        _only_with_files(labels)
        size = 4 if corners else 2
        x, of, notes = _held_out_sets(data, model, 1 if corners else count, size, seed, about)
    ends, of = x.unflatten(0, (-1, size)), None if of is None else of.view(-1, size)
    if of is not None and (of != of[:, :1]).any():
        notes.append(
            f"labels: all are decoded with {int(of[0, 0])}, the first picture's, and so are ends that are of other classes"
        )
    sides, labels_of = ends.unbind(1), None if of is None else of.unbind(1)
    if size == 4:
        images = model.blend(sides, steps, labels_of, path)[:, :, 0]
    else:
        first, second = labels_of or (None, None)
        images = model.interpolate(sides[0], sides[1], steps, first, path, second).transpose(0, 1)
    arrays = {"corners": ends[0]} if size == 4 else {"ends": ends}
    arrays |= {"images": images} | ({} if of is None else {"labels": of[0] if size == 4 else of})
    draw = (lambda: _between(model, x, images, size)) if model.spec.kind == "image" else None
    return outputs.write(folder, "interpolations", model, arrays, draw, notes, {"steps": steps, "path": path, "seed": seed})


def _between(model: Model, ends: Tensor, images: Tensor, size: int) -> Picture:
    shown, cells = (pictures.to_uint8(x, model.spec.value_range) for x in (ends, images.flatten(0, 1)))
    return pictures.cornered(shown, cells) if size == 4 else pictures.strips(shown[::2], cells, shown[1::2])


def _held_out_sets(
    data: Dataset, model: Model, count: int, size: int, seed: int, about: str
) -> tuple[Tensor, Tensor | None, list[str]]:
    """`count` times `size` held-out images, one set after the other; each of one class where the model takes labels, so that all
    its ends are reconstructions."""
    rows = data.rows("held_out")
    order = torch.randperm(len(rows), generator=Streams(seed, 0)("interpolate"))
    labels = evaluate.labels_of(rows, order, model)
    sets, waiting = list[list[int]](), defaultdict[int, list[int]](list)
    for position, label in zip(order.tolist(), [0] * len(order) if labels is None else labels.tolist(), strict=True):
        waiting[label].append(position)
        if len(waiting[label]) == size:
            sets.append(waiting.pop(label))
        if len(sets) == count:
            break
    if not sets:
        one = " of one class" if labels is not None else ""
        raise UserError(
            f"this takes {size} held-out samples{one}, and there are {len(rows)} in all; hold out more (data.held_out)"
        )
    chosen = torch.tensor(sets).flatten()
    what = f"{len(sets)} {'pairs' if size == 2 else 'set'} of held-out {'images' if model.spec.kind == 'image' else 'samples'}"
    of_one = "" if labels is None else ", each of one class"
    fewer = "" if len(sets) == count else f"; {count} were asked for, there are no more"
    notes = [f"{what}{of_one}, of {about}{fewer}"]
    return feed.images(rows, chosen, model.spec), evaluate.labels_of(rows, chosen, model), notes


def taken(take: Sequence[str], model: Model, groups: Sequence[str]) -> dict[str, tuple[Tensor, list[str]]]:
    """{group: pictures and what was done to them} from `GROUP=FILE,FILE` of the command line."""
    given = dict[str, list[Path]]()
    for text in take:
        group, sign, listed = text.partition("=")
        if not sign or not listed:
            raise UserError(f"--take {text}: expected GROUP=FILES, such as {groups[0]}=a.png,b.png")
        if group not in groups:
            raise UserError(f"--take {group}: expected {' or '.join(groups)}{near_miss(group, groups)}")
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
    return outputs.write(
        folder, "translation", model, arrays, lambda: made.picture(model.spec.value_range), notes, {"seed": seed}
    )


# -- latents of a whole set ------------------------------------------------------------------------------------------------------

Piece = tuple[Tensor, Tensor | None, dict[str, Tensor], list[str]]  # images, labels for the model, what is kept, names of rows


def encode(model: Model, data: Dataset, folder: Path, split: str, about: str, progress: Progress) -> dict[str, Any]:
    """The posteriors of a split of `data`, which `about` tells of, or of "all": both, the training split first."""
    tables = {name: data.rows(name) for name in (("train", "held_out") if split == "all" else (split,))}
    kept = [key for key in ("labels", "factors") if all(getattr(rows, key) is not None for rows in tables.values())]

    def pieces() -> Iterator[Piece]:
        for name, rows in tables.items():
            for positions in torch.arange(len(rows)).split(BATCH):
                x, labels = feed.images(rows, positions, model.spec), evaluate.labels_of(rows, positions, model)
                more = {key: getattr(rows, key)[rows.at(positions)] for key in kept}
                yield x, labels, more, [f"{name}/{position}" for position in positions.tolist()]

    notes = [f"{' and '.join(f'{len(rows)} {name}' for name, rows in tables.items())} rows of {about}"]
    notes += [f"{name} is drawn anew in training: these are its table" for name, rows in tables.items() if rows.draw]
    total = sum(map(len, tables.values()))
    return _encoded(
        model, folder, pieces(), total, progress, notes, {"factors": list(data.spec.factors)} if "factors" in kept else {}
    )


def encode_own(model: Model, folder: Path, paths: Sequence[Path], labels: str | None, progress: Progress) -> dict[str, Any]:
    """The posteriors of the user's pictures, which `labels` are of, in the order of `paths`; in folders by name."""
    taken, notes = own_pictures.expand(paths)
    of, changed = own_labels(labels, len(taken), model), dict[str, list[str]]()

    def pieces() -> Iterator[Piece]:
        found, start = own_pictures.fitted(taken, model), 0
        while piece := list(islice(found, BATCH)):
            names = [str(path) for path, _, _ in piece]
            changed.update({name: what for name, (_, _, what) in zip(names, piece, strict=True) if what})
            some = None if of is None else of[start : start + len(piece)]
            start += len(piece)
            yield torch.stack([x for _, x, _ in piece]), some, {} if some is None else {"labels": some}, names

    made = _encoded(model, folder, pieces(), len(taken), progress, notes, {"changes": changed})
    told = f"{len(changed)} of {len(taken)} pictures were changed to fit the model; {Path(made['files'][1]).name} says how"
    return {**made, "notes": [*notes, *([told] if changed else [])]}


def _encoded(
    model: Model, folder: Path, pieces: Iterator[Piece], total: int, progress: Progress, notes: list[str], about: dict[str, Any]
) -> dict[str, Any]:
    """NAME.safetensors with mu.GROUP and logvar.GROUP [N, d] float32, and NAME.json with the names of the N rows and, of each
    group, mean and standard deviation [d] over the set: of mu, and of z ~ q(z ∣ x), whose variance is that of mu and the mean
    of exp(logvar). Both divide by N. Only a piece of the images is in memory at once."""
    parts, names = defaultdict[str, list[Tensor]](list), list[str]()
    for x, labels, kept, piece in pieces:
        progress("encoding", len(names), total)
        for group, (mu, logvar) in model.encode(x, labels).items():
            parts[f"mu.{group}"].append(mu.float().cpu())
            parts[f"logvar.{group}"].append(logvar.float().cpu())
        for key, value in kept.items():
            parts[key].append(value)
        names += piece
    progress("encoding", total, total)
    arrays = {key: torch.cat(values) for key, values in parts.items()}
    groups = {}
    for group, dim in model.groups.items():
        mu, variance = arrays[f"mu.{group}"].double(), arrays[f"logvar.{group}"].double().exp().mean(dim=0)
        spread = mu.var(dim=0, correction=0)
        statistics = {"mean": mu.mean(dim=0), "sd": spread.sqrt(), "sd_of_z": (spread + variance).sqrt()}
        groups[group] = {"dims": dim, **{key: value.tolist() for key, value in statistics.items()}}
    beside = {"format": 1, "model": model.name, "groups": groups, **about, "notes": notes, "rows": names}
    return outputs.write(folder, "latents", model, arrays, None, notes, {"rows": total}, beside)
