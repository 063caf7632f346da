"""What the folders of a set of pictures mean: a train and a held-out split, and a class each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core.errors import UserError, one_line

TRAIN, HELD_OUT = "train", ("test", "val", "valid", "validation")  # folders of these names, in any case


@frozen(eq=False)
class Arranged:
    """Which of the names are of use, by number, and what their folders say of them."""

    index: NDArray[np.int64]  # [N]
    labels: NDArray[np.int64] | None = None  # [N], numbers of `classes`
    classes: tuple[str, ...] = ()
    split: NDArray[np.uint8] | None = None  # [N]: 0 train, 1 held out
    notes: tuple[str, ...] = ()


def arrange(names: Sequence[str], where: str, labels: str = "auto", test_folder: str = "") -> Arranged:
    """Read the names of pictures, with slashes, as splits and classes; a `UserError` where they cannot be told.

    Folders with nothing beside them are passed through. Where the next ones are train and one of `HELD_OUT` (or `test_folder`),
    they are the splits; below that the first folder is the class: `labels` "auto" where there are several, "folders" demands it,
    "" goes on without. Classes are numbered by their sorted names.
    """
    paths, above = _within([name.split("/") for name in names])
    notes = [f"pictures are those in {one_line('/'.join(above))}/"] if above else []
    sides = _splits(paths, where, test_folder)
    split: NDArray[np.uint8] | None = None
    index = np.arange(len(paths))
    if sides:
        held = sides[1]
        index = np.flatnonzero([path[0] in sides for path in paths])
        split = np.array([paths[i][0] == held for i in index], np.uint8)
        unused = Counter(path[0] for path in paths if path[0] not in sides)
        notes += [f"{one_line(held)}/ is held out"]
        notes += [f"{one_line(name)}/ ({count:,} pictures) is not used" for name, count in sorted(unused.items())]
    rest = [paths[i][1 if sides else 0 :] for i in index]
    names_of = [path[0] if len(path) > 1 else None for path in rest]
    if not labels:
        return Arranged(index, None, (), split, tuple(notes))
    classes = _classes(names_of, split, where, demanded=labels == "folders")
    if not classes:
        return Arranged(index, None, (), split, tuple(notes))
    number = {name: i for i, name in enumerate(classes)}
    numbers = np.array([number[name] for name in names_of if name is not None], np.int64)
    shown = ", ".join(map(one_line, classes[:10])) + (", …" if len(classes) > 10 else "")
    notes.append(f"{len(classes):,} classes by folder: {shown}")
    if split is not None:
        lacking = [name for i, name in enumerate(classes) if not ((numbers == i) & (split == 1)).any()]
        notes += [f"no picture is held out of the {_classes_of(lacking)}"] if lacking else []
    return Arranged(index, numbers, classes, split, tuple(notes))


def _classes_of(names: Sequence[str]) -> str:
    shown = ", ".join(map(one_line, names[:10])) + (", …" if len(names) > 10 else "")
    return f"class {shown}" if len(names) == 1 else f"{len(names):,} classes {shown}"


def _within(paths: list[list[str]]) -> tuple[list[list[str]], list[str]]:
    """The paths from the first folder on that has something beside it, and the folders above."""
    above: list[str] = []
    while len({path[0] for path in paths}) == 1 and all(len(path) > 1 for path in paths):
        above.append(paths[0][0])
        paths = [path[1:] for path in paths]
    return paths, above


def _splits(paths: list[list[str]], where: str, test_folder: str) -> tuple[str, str] | None:
    """The names of the folders that train and are held out, if there are such."""
    folders = sorted({path[0] for path in paths if len(path) > 1})
    train = [name for name in folders if name.lower() == TRAIN]
    known = [name for word in HELD_OUT for name in folders if name.lower() == word]
    _differ_by_more_than_case([*train, *known], where)
    if test_folder and (test_folder not in folders or not train or test_folder == train[0]):
        has = ", ".join(map(one_line, folders[:20])) or "none"
        raise UserError(f"{where}: data.test_folder = '{one_line(test_folder)}' is to lie beside a folder train; it has {has}")
    held = [test_folder] if test_folder else known
    if not train and not known:
        return None
    if not train:
        reason = f"has a folder {one_line(known[0])} and none called train: which split is which cannot be told"
        raise UserError(f"{where}: {reason}; give the path of one folder alone, or call them train and test")
    beside = Counter(f"{path[0]}/" if len(path) > 1 else "loose pictures" for path in paths)
    strange = [name for name in beside if name.removesuffix("/") not in [*train, *held, *known]]
    if strange:
        shown = ", ".join(f"{one_line(name)} ({beside[name]:,})" for name in sorted(strange)[:10])
        raise UserError(f"{where}: which split the pictures beside {one_line(train[0])}/ are of cannot be told: {shown}")
    return train[0], held[0]


def _classes(names: Sequence[str | None], split: NDArray[np.uint8] | None, where: str, *, demanded: bool) -> tuple[str, ...]:
    """The sorted names of the classes; none where there are no class folders."""
    found, loose = Counter(name for name in names if name is not None), sum(name is None for name in names)
    without = 'data.labels = "" goes on without labels'
    if loose and found:
        shown = ", ".join(map(one_line, sorted(found)[:10]))
        raise UserError(f"{where}: {loose:,} pictures lie loose beside the class folders {shown}: they have no class; {without}")
    if len(found) < 2:
        if demanded:
            reason = "no class folders are in it" if not found else "one folder alone is no classes"
            raise UserError(f'{where}: data.labels = "folders", and {reason}; {without}')
        return ()
    _differ_by_more_than_case(found, where)
    if split is not None:
        of_train = {name for name, side in zip(names, split, strict=True) if side == 0}
        only = sorted(name for name in found if name not in of_train)
        if only:
            raise UserError(f"{where}: the {_classes_of(only)} is held out and has no picture in train; {without}")
    return tuple(sorted(found))


def _differ_by_more_than_case(names: Iterable[str], where: str) -> None:
    same = defaultdict(list)
    for name in sorted(set(names)):
        same[name.casefold()].append(one_line(name))
    twice = [found for found in same.values() if len(found) > 1]
    if twice:
        raise UserError(
            f"{where}: the folders {' and '.join(found)} differ in case alone; rename one, or put them together"
            for found in twice
        )
