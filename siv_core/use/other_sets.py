"""Sets of images other than a run's own: by name and options, and made into what the run's model takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from siv_core.data import feed
from siv_core.errors import UserError
from siv_core.protocols import Dataset, Spec
from siv_core.recipe import build, catalogue, convert
from siv_core.recipe import recipe as recipes
from siv_core.recipe.overrides import merge, setting

FLIPS = {"flip_horizontal": 3, "flip_vertical": 2}  # of the run's own held-out images: the axis that is turned round
LABEL = re.compile(r"[A-Za-z0-9_-]+")
TAKEN = ("train", "held_out", "held_out_vs_train")  # labels of the run's own images
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601), as Pillow makes grey of colours


@frozen(eq=False)
class Other:
    """A set to tell from the run's own data."""

    label: str
    table: dict[str, Any]  # its name and options
    dataset: Dataset | None  # None: the run's own held-out images, turned round


def table_of(text: str) -> dict[str, Any]:
    """{"name": "hdf5", "path": "x.h5"} from "hdf5,path=x.h5", as the command line has it."""
    name, *given = re.split(r",(?=[\w.]+=)", text)
    table: dict[str, Any] = {"name": name}
    for one in given:
        table = merge(table, setting(one))
    return table


def resolved(given: Any) -> dict[str, Any]:
    """A set by its name, or by a table with `name`, options and `as`, with every option written out and places absolute; a
    `UserError` says what is wrong."""
    table = {"name": given} if isinstance(given, str) else dict(given)
    name, label = table.get("name"), table.pop("as", table.get("name"))
    if not isinstance(label, str) or not LABEL.fullmatch(label) or label in TAKEN:
        raise UserError(f"as: {convert.shown(label)} cannot stand in names of values; take letters, digits, - and _, not train")
    if name in FLIPS:
        if len(table) > 1:
            raise UserError(f"{name}: turns the run's own held-out images round and takes no options")
        return {"name": name, "as": label}
    written = recipes.dataset_of(catalogue.load(), table, label).tree()
    return {**{key: value for key, value in written.items() if value is not None}, "as": label}


def others(tables: Sequence[Any]) -> list[Other]:
    """The sets, built; they need not be at hand."""
    known, found = catalogue.load(), list[Other]()
    for table in map(resolved, tables):
        rest = {key: value for key, value in table.items() if key != "as"}
        dataset = None if table["name"] in FLIPS else build.component(known, recipes.dataset_of(known, rest, table["as"]))
        found.append(Other(table["as"], rest, dataset))
    labels = [one.label for one in found]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(f"{label}: two sets are called so; give one of them another name by as=NAME" for label in twice)
    return found


def unusable(other: Other, own: Spec, converts: bool) -> str | None:
    """Why this set cannot be scored, with the remedy, or None. Touches no file but to see whether it is there."""
    if other.dataset is None:
        return None if own.kind == "image" else f"{other.label}: turns images round, and this model is of arrays"
    lacking = other.dataset.missing()
    if lacking:
        return f"{other.label}: data '{other.table['name']}' is not at hand: {lacking}"
    its = other.dataset.spec
    if its.kind != own.kind or (its.kind != "image" and its.shape != own.shape):
        return f"{other.label}: its samples are {its.kind}s {list(its.shape)}, the model's {own.kind}s {list(own.shape)}"
    if its.shape != own.shape and {its.shape[0], own.shape[0]} - {1, 3} and its.shape[0] != own.shape[0]:
        return (
            f"{other.label}: its images have {its.shape[0]} channels and the model's {own.shape[0]}: only 1 and 3 are converted"
        )
    if its.shape != own.shape and not converts:
        return (
            f"{other.label}: its images are {list(its.shape)}, the model's {list(own.shape)}; --convert, or convert = true in the"
            f" metric's table, makes them so ({'; '.join(changes(its, own))})"
        )
    return None


def changes(its: Spec, own: Spec) -> list[str]:
    """What is done to images of another set, in words."""
    if its.kind != "image":
        return []
    told = feed.fitting(its.shape[1], its.shape[2], own.shape[1], own.shape[2], own.fit)
    lines = [f"{told} by area means"] if told else []
    if its.shape[0] != own.shape[0]:
        lines.append("grey repeated as red, green and blue" if its.shape[0] == 1 else "colours made grey (BT.601 luma)")
    if its.value_range != own.value_range:
        low, high, to_low, to_high = *its.value_range, *own.value_range
        lines.append(f"values [{low:g}, {high:g}] brought to [{to_low:g}, {to_high:g}]")
    return lines


def converted(x: Tensor, its: Spec, own: Spec) -> Tensor:
    """Images [N, *its.shape] in the range of `its` as [N, *own.shape] in that of `own`; arrays as they are."""
    if its.kind != "image":
        return x
    (low, high), (to_low, to_high) = its.value_range, own.value_range
    if (low, high) != (to_low, to_high):
        x = (x - low) * ((to_high - to_low) / (high - low)) + to_low
    x = feed.to_float(x, own)
    if x.shape[1] == 3 and own.shape[0] == 1:
        return (x * torch.tensor(LUMA, dtype=x.dtype, device=x.device)[:, None, None]).sum(dim=1, keepdim=True)
    return x.expand(-1, own.shape[0], -1, -1) if x.shape[1] != own.shape[0] else x
