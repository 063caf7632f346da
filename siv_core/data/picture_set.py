"""A data set of pictures that are prepared once: what `image_folder` and the sets of faces and rooms have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core.data import cache, datafile, picture_files, picture_list
from siv_core.data.picture import Fitting
from siv_core.data.picture_list import Entry
from siv_core.errors import UserError, one_line
from siv_core.protocols import Progress, Rows, Spec

MOST_NAMED = 1000  # damaged pictures that a manifest names


@frozen(eq=False)
class Chosen:
    """The pictures of a data set, in the order of its rows, and what is known of each before any is read."""

    place: Path
    kind: str
    state: str
    entries: Sequence[Entry]
    labels: NDArray[np.int64] | None = None  # [N], below `classes`
    classes: int | None = None
    names: Sequence[str] = ()  # of the classes, where they have any
    split: NDArray[np.uint8] | None = None  # [N]: 0 train, 1 held out; None: a share, by a seeded choice
    notes: Sequence[str] = ()


@frozen(eq=False)
class PictureSet:
    """`choose()` tells which pictures there are and `missing()` why there are none. They lie in a conversion in the data root,
    made anew where the place, the choice or the fitting differs."""

    name: str
    choose: Callable[[], Chosen]
    missing: Callable[[], str | None]
    fitting: Fitting
    damaged: str = "error"  # or "skip": what becomes of pictures that cannot be read
    held_out: float = 0.1
    split_seed: int = 0
    removed: list[str] = attrs.field(factory=list)

    @cached_property
    def chosen(self) -> Chosen:
        reason = self.missing()
        if reason:
            raise UserError(reason)
        return self.choose()

    @cached_property
    def path(self) -> Path:
        """The data file, named after the pictures' place and state, and what is made of them."""
        chosen, digest = self.chosen, hashlib.sha256(repr(self.fitting).encode())
        for entry in chosen.entries:
            digest.update(f"{entry.name}\0".encode(errors="surrogateescape"))
        for column in (chosen.labels, chosen.split):
            digest.update(b"none" if column is None else column.tobytes())
        return cache.conversion(chosen.place, digest.hexdigest()[:8], self.name, chosen.state)

    def prepare(self, progress: Progress) -> None:
        chosen, path = self.chosen, self.path
        if path.exists():
            left = self._facts.get("damaged", {})
            if left and self.damaged == "error":
                raise UserError(picture_files.refused(list(left.values())))
        else:
            cache.note(path, chosen.place, chosen.state)
            picture_files.write(
                path,
                chosen.place,
                chosen.kind,
                chosen.entries,
                self.fitting,
                source=f"pictures of {one_line(chosen.place.name)}: {len(chosen.entries):,} of {chosen.kind}, {self.fitting}",
                progress=progress,
                damaged=self.damaged,
                labels=chosen.labels,
                split=chosen.split,
                before=self._note,
            )
        self.removed.extend(cache.remove_superseded(path))

    def _note(self, facts: picture_files.Facts) -> None:
        """What came of the pictures, beside the file; nothing where they are no longer those that were listed."""
        if picture_list.state(self.chosen.place) != self.chosen.state:
            raise UserError(f"{one_line(self.chosen.place)}: was changed while its pictures were read; run it again")
        cache.note(self.path, self.chosen.place, self.chosen.state, pictures=attrs.asdict(facts))

    @property
    def _facts(self) -> dict[str, Any]:
        facts = cache.noted(self.path).get("pictures", {})
        return facts if isinstance(facts, dict) else {}

    @cached_property
    def _table(self) -> datafile.Table:
        return datafile.read(self.path)

    @property
    def spec(self) -> Spec:
        fitting = self.fitting
        fit = "stretch" if fitting.crop == "none" else "crop"
        return Spec((fitting.channels, fitting.size, fitting.size), classes=self.chosen.classes, fit=fit)

    def counts(self) -> dict[str, int]:
        """How many images each split has; before they are prepared, how many pictures."""
        ready, chosen = self.path.exists(), self.chosen
        known = (self._table.split, len(self._table.images)) if ready else (chosen.split, len(chosen.entries))
        inside = self._held_out(*known)
        return {"train": int(len(inside) - inside.sum()), "held_out": int(inside.sum())}

    def _held_out(self, split: NDArray[np.uint8] | None, n: int) -> NDArray[np.bool_]:
        """Which of n rows are kept from training."""
        if split is not None:
            return split == 1
        inside = np.zeros(n, bool)
        order = np.random.Generator(np.random.PCG64(self.split_seed)).permutation(n)
        inside[order[: min(max(1, round(self.held_out * n)), n - 1)]] = True
        return inside

    def rows(self, split: str) -> Rows:
        import torch

        table = self._table
        inside = self._held_out(table.split, len(table.images))
        index = np.flatnonzero(inside if split == "held_out" else ~inside)
        if not len(index):
            raise UserError(f"{one_line(self.chosen.place)}: no image is in the split '{split}', of {len(inside):,} in all")
        labels = None if table.labels is None else torch.from_numpy(table.labels)
        return Rows(torch.from_numpy(table.images), labels, None, torch.from_numpy(index))

    def fingerprint(self) -> str:
        """The images' digest and, behind a +, that of labels and split."""
        table = self._table
        columns = b"" if table.labels is None else b"labels" + np.ascontiguousarray(table.labels).tobytes()
        digest = hashlib.sha256(columns + b"split" + self._held_out(table.split, len(table.images)).tobytes())
        return f"{table.sha256}+{digest.hexdigest()[:16]}"

    def about(self) -> dict[str, object]:
        """For the run's manifest: how many images, the names of classes, and the pictures that are left out."""
        facts, names = self._facts, list(self.chosen.names)
        damaged = facts.get("damaged", {})
        told = {"count": len(damaged), "names": list(damaged)[:MOST_NAMED]}
        return {"images": len(self._table.images), **({"classes": names} if names else {}), "damaged": told}

    def notes(self) -> list[str]:
        """What is taken, how it is made to fit and, once it is prepared, what was done to how many."""
        chosen, fitting, facts = self.chosen, self.fitting, self._facts
        told = [*chosen.notes]
        if facts.get("sizes"):
            told.append(f"pictures of {' to '.join(facts['sizes'])} pixels")
        box = "of {2} × {3} pixels at {0}, {1} ".format(*fitting.box) if fitting.box else ""
        cut = "all, stretched" if fitting.crop == "none" else "the centre"
        told.append(f"{cut} {box}to {fitting.size} × {fitting.size} ({fitting.resampling}, antialiased)")
        told += [f"{count:,} pictures {what}" for what, count in facts.get("changes", {}).items()]
        damaged = facts.get("damaged", {})
        if damaged:
            shown = ", ".join(map(one_line, list(damaged)[:5])) + (", …" if len(damaged) > 5 else "")
            told.append(f"{len(damaged):,} damaged pictures left out: {shown}")
        return [f"{one_line(chosen.place)}: {line}" for line in told] + self.removed
