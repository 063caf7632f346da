"""What people give a model from Python, looked at before anything is computed with it: one sentence for each thing that is wrong.

Nothing is dropped, repeated, reshaped or converted here: a `UserError` says what was given, what is expected, and what makes the
one of the other where that is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from siv_core.errors import UserError, near_miss
from siv_core.protocols import Spec

FAR = 16  # times the width of the value range beyond it: no decoder gives that, 0 … 255 is as far
ROUNDING = 1e-3  # times that width: what images may lie beyond it


def images(x: Any, spec: Spec, dtype: torch.dtype | None, what: str = "x") -> None:
    """Samples [N, *spec.shape], floats of the value range in the type of the model's weights."""
    _tensor(x, what)
    _shape(x, spec, what)
    low, high = spec.value_range
    if not x.is_floating_point():
        to_range = f"{what}.float() / 255" if low == 0 and high == 1 else f"{what}.float() / 255 * {high - low:g} + {low:g}"
        scaled = f"; 0 … 255 become those by {to_range}" if x.dtype == torch.uint8 and spec.kind == "image" else ""
        raise UserError(f"{what}: is {_type(x.dtype)}, expected floats in [{low:g}, {high:g}]{scaled}")
    _same_type(x, dtype, what)
    if not x.numel():
        return
    lowest, highest = (float(value) for value in x.detach().aminmax())
    if not (abs(lowest) < float("inf") and abs(highest) < float("inf")):
        raise UserError(f"{what}: has values that are not finite")
    far = FAR * (high - low)
    if spec.kind == "image" and (highest > high + far or lowest < low - far):
        raise UserError(f"{what}: goes from {lowest:g} to {highest:g}, images of this model are floats in [{low:g}, {high:g}]")


def in_range(x: Tensor, value_range: tuple[float, float], what: str) -> None:
    """Images that are to be compared lie within their value range; rounding apart."""
    low, high = value_range
    lowest, highest = (float(value) for value in x.aminmax()) if x.numel() else value_range
    slack = ROUNDING * (high - low)
    if not (lowest >= low - slack and highest <= high + slack):  # what is no number is not within it
        raise UserError(
            f"{what}: go from {lowest:g} to {highest:g}, their value range is said to be [{low:g}, {high:g}]: give the data"
            " set its own range, or scale them"
        )


def _shape(x: Tensor, spec: Spec, what: str) -> None:
    wanted, given = list(spec.shape), list(x.shape)
    if x.ndim == len(wanted) + 1 and given[1:] == wanted:
        return
    hint = ""
    if given == wanted:
        hint = f"; of one alone give {what}[None]"
    elif len(wanted) == 3 and x.ndim == 4 and [given[3], *given[1:3]] == wanted:
        hint = f"; its channels stand last: give {what}.permute(0, 3, 1, 2)"
    elif len(wanted) == 3 and wanted[0] == 1 and given[1:] == wanted[1:]:
        hint = f"; the axis of its one channel is missing: give {what}[:, None]"
    elif x.ndim == len(wanted) + 1 and len(wanted) == 3:
        hint = "; other sizes and channels are not fitted here, `siv reconstruct` does that with picture files"
    expected = ", ".join(["N", *map(str, wanted)])
    raise UserError(f"{what}: has the shape {given}, expected [{expected}]{hint}")


def labels(given: Any, n: int, spec: Spec, what: str = "labels") -> None:
    """Labels [N] of a conditional model, and none of another."""
    if not spec.conditional:
        if given is not None:
            raise UserError(f"{what}: this model takes none: it was trained without train.conditional")
        return
    if given is None:
        raise UserError(
            f"{what}: this model was trained with train.conditional: it takes a label for each image, and was given none"
        )
    _tensor(given, what)
    if given.dtype != torch.int64:
        raise UserError(f"{what}: is {_type(given.dtype)}, expected int64: class numbers, one for each image")
    if list(given.shape) != [n]:
        raise UserError(f"{what}: has the shape {list(given.shape)}, expected [{n}]: one for each image")
    classes = spec.classes or 0
    if n and (int(given.min()) < 0 or int(given.max()) >= classes):
        raise UserError(f"{what}: goes from {int(given.min())} to {int(given.max())}, the classes are 0 … {classes - 1}")


def codes(given: Any, groups: Mapping[str, int], dtype: torch.dtype | None, what: str = "codes") -> None:
    """{group: [N, d]} of all groups, with the same N."""
    _groups(given, groups, what, "{group: tensor [N, d]}")
    for group, z in given.items():
        place = f"{what}['{group}']"
        if isinstance(z, tuple):
            raise UserError(f"{place}: is a posterior (mu, logvar), expected a code: give its mu, or a sample (siv_core.latents)")
        _tensor(z, place)
        _codes_like(z, groups[group], place, dtype)
    _same_n({f"{what}['{group}']": z for group, z in given.items()})


def posterior(given: Any, groups: Mapping[str, int], what: str = "q") -> None:
    """{group: (mu [N, d], logvar [N, d])} of all groups, with the same N, as `encode` gives it."""
    _groups(given, groups, what, "{group: (mu, logvar)}, as encode gives it")
    for group, pair in given.items():
        place = f"{what}['{group}']"
        if isinstance(pair, Tensor) or not (isinstance(pair, Sequence) and len(pair) == 2):
            told = "a code" if isinstance(pair, Tensor) else f"a {type(pair).__name__}"
            raise UserError(f"{place}: is {told}, expected a posterior (mu, logvar), as encode gives it")
        for name, part in zip(("mu", "logvar"), pair, strict=True):
            _tensor(part, f"{place}.{name}")
            _codes_like(part, groups[group], f"{place}.{name}", None)
    _same_n(
        {
            f"{what}['{group}'].{name}": part
            for group, pair in given.items()
            for name, part in zip(("mu", "logvar"), pair, strict=True)
        }
    )


def images_by_group(given: Any, labels: Any, groups: Mapping[str, int], spec: Spec, dtype: torch.dtype | None) -> None:
    """{group: images} of all groups, with the same N; of a conditional model {group: labels} too."""
    _groups(given, groups, "images", "{group: images}")
    if labels is not None:
        _groups(labels, groups, "labels", "{group: labels [N]}")
    for group, x in given.items():
        images(x, spec, dtype, f"images['{group}']")
    _same_n({f"images['{group}']": x for group, x in given.items()})


def pair(x: Tensor, y: Tensor) -> None:
    """As many of the one as of the other."""
    _same_n({"x": x, "y": y})


def count(value: Any, what: str, least: int) -> None:
    """A whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise UserError(f"{what}: is {value!r}, expected a whole number of at least {least}")


def share(value: Any, what: str) -> None:
    """A number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f"{what}: is {value!r}, expected a number from 0 to 1")


def choice(value: Any, what: str, of: Iterable[str]) -> None:
    """One of these names."""
    names = list(of)
    if value not in names:
        hint = near_miss(value, names) if isinstance(value, str) else ""
        raise UserError(f"{what}: is {value!r}, expected one of {', '.join(names)}{hint}")


def _tensor(x: Any, what: str) -> None:
    if isinstance(x, Tensor):
        if x.layout != torch.strided:
            raise UserError(f"{what}: is {_type(x.layout)}, expected a dense tensor: give {what}.to_dense()")
        return
    kind = f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}".removeprefix("builtins.")
    hint = f": give torch.from_numpy({what})" if kind == "numpy.ndarray" else ""
    raise UserError(f"{what}: is a {kind}, expected a torch.Tensor{hint}")


def _groups(given: Any, groups: Mapping[str, int], what: str, form: str) -> None:
    names = ", ".join(groups)
    if not isinstance(given, Mapping):
        raise UserError(f"{what}: is a {type(given).__name__}, expected {form} of the groups {names}")
    unknown = [str(group) for group in given if group not in groups]
    lacking = [group for group in groups if group not in given]
    problems = [f"{what}: there is no group '{group}'{near_miss(group, groups)}" for group in unknown]
    if lacking:
        problems.append(f"{what}: lacks {', '.join(lacking)}; expected {form} of the groups {names}")
    if problems:
        raise UserError(problems)


def _codes_like(z: Tensor, dim: int, what: str, dtype: torch.dtype | None) -> None:
    if z.ndim != 2 or z.shape[1] != dim:
        hint = f"; of one alone give {what}[None]" if list(z.shape) == [dim] else ""
        raise UserError(f"{what}: has the shape {list(z.shape)}, expected [N, {dim}]{hint}")
    if not z.is_floating_point():
        raise UserError(f"{what}: is {_type(z.dtype)}, expected floats")
    _same_type(z, dtype, what)


def _same_n(given: Mapping[str, Tensor]) -> None:
    if len({len(x) for x in given.values()}) > 1:
        raise UserError("; ".join(f"{what} has {len(x)} rows" for what, x in given.items()) + ": all must have as many")


def _same_type(x: Tensor, dtype: torch.dtype | None, what: str) -> None:
    if dtype is not None and x.dtype != dtype:
        raise UserError(
            f"{what}: is {_type(x.dtype)}, the model's weights are {_type(dtype)}: give {what}.to(torch.{_type(dtype)})"
        )


def _type(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
