"""Data set `kth`: 25 persons in six actions and four scenarios, grey frames of 160 × 120 from 599 videos.

Origin: Schuldt, Laptev & Caputo, Recognizing Human Actions: A Local SVM Approach (ICPR 2004). Six zip files, one an action, hold
`personPP_ACTION_dS_uncomp.avi`, and `00sequences.txt` names the frames in which the person is seen. Scenarios: d1 outdoors, d2
outdoors with a change of scale, d3 outdoors in other clothes, d4 indoors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core import Component, Progress, Rows, Spec, UserError, hookimpl, option
from siv_core.data import datafile, feed, video, video_store
from siv_core.errors import one_line
from siv_core.store import files

URL = "https://www.csc.kth.se/cvap/actions/"
SEQUENCES = "00sequences.txt"
ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
PERSONS, SCENARIOS, HEIGHT, WIDTH = 25, 4, 120, 160
KNOWN = {  # of the published files
    "person13_handclapping_d3": "does not exist",
    "person01_boxing_d4": "breaks off in its fourth sequence, or was taken away for that",
}
CLASSIC = {  # persons, as 00sequences.txt has them
    "train": (11, 12, 13, 14, 15, 16, 17, 18),
    "validation": (19, 20, 21, 23, 24, 25, 1, 4),
    "test": (22, 2, 3, 5, 6, 7, 8, 9, 10),
}
HELD_OUT_PERSONS = {
    "classic": CLASSIC["test"],
    "classic_validation": CLASSIC["validation"],
    "video_prediction": tuple(range(21, 26)),  # of Denton & Birodkar, DrNet (2017)
}
NAME = re.compile(rf"person(0[1-9]|1\d|2[0-5])_({'|'.join(ACTIONS)})_d([1-4])")
LINE = re.compile(rf"({NAME.pattern})\s+(?:frames\s+(?P<ranges>[\d\s,-]+)|\*missing\*)")
MOST_IN_LIST = 1 << 20  # bytes of 00sequences.txt: it has 30,000


@frozen
class KTHConfig:
    size: int = option(64, doc="pixels a side, by area means", ge=8, le=HEIGHT)
    fit: str = option(
        "stretch", doc="stretch: all of a frame, as LORD and DrNet have it; crop: its centre", choices=("stretch", "crop")
    )
    actions: tuple[str, ...] = option((), doc="only these; empty: all six. LORD has handwaving alone", choices=ACTIONS)
    scenarios: tuple[int, ...] = option((), doc="only these; empty: all four. LORD has 4 alone", choices=(1, 2, 3, 4))
    ranges: bool = option(True, doc=f"only frames in which the person is seen, by {SEQUENCES}; false: all, many of them empty")
    every: int = option(1, doc="of each sequence the first frame, then every so many-th", ge=1, le=1000)
    split: str = option(
        "images",
        doc="what is held out: images, or whole videos, by a seeded choice; persons: classic (22, 2, 3, 5 … 10), "
        "classic_validation (19, 20, 21, 23, 24, 25, 1, 4; both train on 11 … 18), video_prediction (21 … 25)",
        choices=("images", "videos", *HELD_OUT_PERSONS),
    )
    held_out: float = option(0.1, doc="share of the images or videos, where these are split", gt=0, lt=1)
    split_seed: int = option(0, doc="of that choice", ge=0)
    damaged: str = option("error", doc="what a damaged or missing video is; skip: left out and told", choices=("error", "skip"))
    source: str = option(
        "", doc=f"folder with the zips, videos or frames, and {SEQUENCES}; empty: kth in the data folder", place=True
    )


def videos_in(folder: Path) -> tuple[dict[str, video.Video], int]:
    """{name: where it is} of the videos that lie in a folder or in one of an action in it, in their order; and how many are there
    more than once, of which an avi file is taken before one in a zip file, and that before a folder with its frames."""
    found: dict[str, video.Video] = {}
    more = set()
    for one in [*_avi_files(folder), *_in_zips(folder), *_frame_folders(folder)]:
        if one.name in found:
            more.add(one.name)
        found.setdefault(one.name, one)
    return dict(sorted(found.items())), len(more)


def _entries(folder: Path) -> Iterator[Path]:
    for one in (folder, *(folder / action for action in ACTIONS)):
        if one.is_dir():
            yield from sorted(one.iterdir())


def _name_of(text: str, ending: str) -> str | None:
    """`person01_boxing_d1` of the name of its file or folder."""
    match = re.fullmatch(rf"({NAME.pattern})(_uncomp)?{re.escape(ending)}", text)
    return match[1] if match else None


def _avi_files(folder: Path) -> Iterator[video.Video]:
    for path in _entries(folder):
        name = _name_of(path.name, ".avi")
        if name and path.is_file():
            yield video.Video(name, path)


def _frame_folders(folder: Path) -> Iterator[video.Video]:
    for path in _entries(folder):
        name = _name_of(path.name, "")
        if name and path.is_dir():
            yield video.Video(name, path)


def _in_zips(folder: Path) -> Iterator[video.Video]:
    for path in (folder / f"{action}.zip" for action in ACTIONS):
        if path.is_file():
            try:
                with zipfile.ZipFile(path) as archive:
                    members = sorted(archive.namelist())
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                raise UserError(
                    f"{one_line(path)}: cannot be read as a zip file ({one_line(error)}); get it again from {URL}"
                ) from error
            for member in members:  # by the last part of its name; nothing is unpacked to a place that a name tells
                name = _name_of(member.rsplit("/", 1)[-1], ".avi")
                if name:
                    yield video.Video(name, path, member)


def sequences(path: Path) -> dict[str, tuple[tuple[int, int], ...]]:
    """{video: (first, last) frame of each of its sequences, counted from 1}; none of a video that it marks as missing."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_IN_LIST:
            raise UserError(f"{one_line(path)}: is no list of sequences; get it from {URL}{SEQUENCES}")
        text = path.read_text(encoding="latin-1")
    except OSError as error:
        raise UserError(f"{one_line(path)}: cannot be read ({error.strerror})") from error
    found: dict[str, tuple[tuple[int, int], ...]] = {}
    problems = []
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not re.match(r"person\d\d_", line):
            continue  # the head, which tells of the split
        match = LINE.fullmatch(line)
        pairs = re.findall(r"(\d+)\s*-\s*(\d+)", match["ranges"] or "") if match else []
        ranges = tuple((int(first), int(last)) for first, last in pairs)
        if match is None or match[1] in found or (match["ranges"] and not ranges) or any(not 1 <= a <= b for a, b in ranges):
            problems.append(f"{one_line(path)}:{number}: {one_line(line)[:80]}: no video with its frames, such as '1-95, 96-185'")
        else:
            found[match[1]] = ranges
    if problems or not found:
        raise UserError(problems[:20] or f"{one_line(path)}: names no videos; get it from {URL}{SEQUENCES}")
    return found


def factors_of(name: str) -> tuple[int, int, int]:
    """Person, action and scenario of a video, counted from 0."""
    match = NAME.fullmatch(name)
    assert match
    return int(match[1]) - 1, ACTIONS.index(match[2]), int(match[3]) - 1


def shortage(ranges: tuple[tuple[int, int], ...], total: int) -> tuple[str, int]:
    """Why a video of `total` frames is not that of its sequences, "" where it is; and how many of their frames it has not."""
    last = max((last for _, last in ranges), default=0)
    if any(first > total for first, _ in ranges):
        return (
            f"has {total} frames, {SEQUENCES} names some up to {last} (of frames already chosen take all: data.ranges = false)",
            0,
        )
    return "", max(0, last - total)


class KTH:
    """Decoded once into the data root; rows go video by video in the order of their names, then frame by frame."""

    def __init__(self, config: KTHConfig) -> None:
        self.config = config
        factors = {"person": PERSONS, "action": len(ACTIONS), "scenario": SCENARIOS, "frame": video.MOST_FRAMES}
        self.spec = Spec(shape=(1, config.size, config.size), classes=PERSONS, factors=factors, fit=config.fit)
        self.source = Path(config.source) if config.source else self.folder

    @property
    def folder(self) -> Path:
        return files.data_root() / "kth"

    @property
    def path(self) -> Path:
        config = self.config
        how = (sorted(set(config.actions)), sorted(set(config.scenarios)), config.ranges, config.every)
        return self.folder / f"kth_{config.size}_{config.fit}_{hashlib.sha256(repr(how).encode()).hexdigest()[:8]}.h5"

    @property
    def _beside(self) -> Path:
        """What is told of the videos that the data file was made from."""
        return self.path.with_name(f"{self.path.name}.videos.json")

    def _wanted(self) -> list[str]:
        actions, scenarios = self.config.actions or ACTIONS, self.config.scenarios or range(1, SCENARIOS + 1)
        names = (
            f"person{p:02}_{a}_d{s}"
            for p in range(1, PERSONS + 1)
            for a in ACTIONS
            if a in actions
            for s in sorted(set(scenarios))
        )
        return sorted(names)

    @cached_property
    def _found(self) -> tuple[dict[str, video.Video], int]:
        found, more = videos_in(self.source)
        return {name: found[name] for name in self._wanted() if name in found}, more

    def missing(self) -> str | None:
        if self.path.exists():
            return None
        found, _ = self._found
        lacking = sorted(
            {ACTIONS[factors_of(name)[1]] for name in self._wanted()} - {ACTIONS[factors_of(name)[1]] for name in found}
        )
        if lacking:
            of = "the videos of KTH are" if not found else f"videos of {', '.join(lacking)} are"
            zips, where = ", ".join(f"{action}.zip" for action in lacking), one_line(self.source)
            return (
                f"{of} not at hand: get {zips} and {SEQUENCES} from {URL} and put them into {where} as they are, or their avi "
                "files, or their frames as ACTION/personPP_ACTION_dS/*.png; data.actions takes some actions alone"
            )
        if self.config.ranges and not (self.source / SEQUENCES).is_file():
            where = one_line(self.source)
            return f"get {URL}{SEQUENCES} and put it into {where}, or take all frames, empty ones too: data.ranges = false"
        if importlib.util.find_spec("av") is None and not all(one.path.is_dir() for one in found.values()):
            return "the videos of KTH are decoded by PyAV, which is not installed: pip install 'siv[video]'"
        return None

    def _videos(self) -> tuple[list[video.Video], dict[str, str]]:
        """Those at hand with the frames wanted of each, and {name: why not} of the others."""
        found, _ = self._found
        known = sequences(self.source / SEQUENCES) if self.config.ranges else {}
        reasons = {name: KNOWN.get(name, f"is not in {one_line(self.source)}") for name in self._wanted() if name not in found}
        taken = []
        for name, one in found.items():
            if self.config.ranges and not known.get(name):
                reasons[name] = f"has no frames in {SEQUENCES}"
            else:
                taken.append(video.Video(name, one.path, one.member, known.get(name)))
        return taken, reasons

    def prepare(self, progress: Progress) -> None:
        files.make_folder(self.folder)
        store = self.path.with_name(f"{self.path.name}.frames")  # by video, so that what was interrupted goes on
        wait = f"waiting for another process that decodes for {self.path.name}"
        with files.alone(store, lambda: progress(wait, 0, 1)):
            if not self.path.exists():
                taken, told = self._decode(store, progress)
                files.write_json(self._beside, told)
                video_store.write(self.path, taken, factors_of, self.spec.factors, progress)
            if store.exists():
                files.remove(store)
        self._refuse(
            files.read_json(self._beside)["left_out"] if self._beside.exists() else {}, f"; it was left out of {self.path}"
        )

    def _refuse(self, reasons: Mapping[str, str], more: str = "") -> None:
        """A `UserError` where videos are left out that nobody said may be."""
        unknown = [] if self.config.damaged == "skip" else [name for name in reasons if name not in KNOWN]
        if unknown:
            shown = [f"{one_line(self.source)}: {name} {reasons[name]}" for name in unknown[:20]]
            rest = f" (and {len(unknown) - 20} more)" if len(unknown) > 20 else ""
            raise UserError([*shown[:-1], f'{shown[-1]}{rest}{more}; get it again, or data.damaged = "skip" leaves such out'])

    def _decode(self, store: Path, progress: Progress) -> tuple[dict[str, video_store.Kept], dict[str, Any]]:
        """{video: its frames}, and what is told of the others."""
        wanted, left_out = self._videos()
        self._refuse(left_out)
        config = self.config
        kept, problems = video_store.kept(store, wanted, config.size, config.fit, config.every, progress)
        left_out |= problems
        cut: dict[str, int] = {}
        for one in wanted:
            if one.name in kept:
                reason, short = shortage(one.ranges or (), kept[one.name].total)
                left_out |= {one.name: reason} if reason else {}
                cut |= {one.name: short} if short else {}
        self._refuse(left_out)
        taken = {name: one for name, one in kept.items() if name not in left_out}
        if not taken:
            raise UserError(f"{one_line(self.source)}: none of {len(wanted)} videos can be used")
        return taken, {"videos": len(taken), "left_out": dict(sorted(left_out.items())), "frames_beyond_the_end": cut}

    @cached_property
    def _table(self) -> datafile.Table:
        table = datafile.read(self.path)
        if table.images.shape[1:] != self.spec.shape or table.labels is None or table.factor_sizes != dict(self.spec.factors):
            raise UserError(f"{self.path}: holds other images than KTH's in this size; remove it, so that it is made again")
        return table

    def rows(self, split: str) -> Rows:
        import torch

        table, inside = self._table, self._inside(split)
        assert table.labels is not None
        assert table.factors is not None
        if not inside.any():
            raise UserError(f"{self.path}: no image is in the split '{split}' of data.split = '{self.config.split}'")
        labels, factors = torch.from_numpy(table.labels), torch.from_numpy(table.factors)
        return Rows(torch.from_numpy(table.images), labels, factors, torch.from_numpy(np.flatnonzero(inside)))

    def _inside(self, split: str) -> NDArray[np.bool_]:
        """Which images are in a split."""
        factors, config = self._table.factors, self.config
        assert factors is not None
        if config.split in HELD_OUT_PERSONS:
            held_out = np.isin(factors[:, 0] + 1, HELD_OUT_PERSONS[config.split])
            train = np.isin(factors[:, 0] + 1, CLASSIC["train"]) if config.split.startswith("classic") else ~held_out
            return {"train": train, "held_out": held_out}[split]
        units = np.arange(len(factors))
        if config.split == "videos":
            units = np.ravel_multi_index(tuple(factors[:, :3].T), (PERSONS, len(ACTIONS), SCENARIOS))
        count = len(np.unique(units))
        chosen = datafile.held_out_groups(units, min(max(1, round(config.held_out * count)), count - 1), config.split_seed)
        held_out = np.isin(units, chosen)
        return {"train": ~held_out, "held_out": held_out}[split]

    def about(self) -> dict[str, object]:
        """For the run's manifest: what became of each video that is not in it as a whole, and what is held out."""
        told = dict(files.read_json(self._beside)) if self._beside.exists() else {}
        if self.config.split in HELD_OUT_PERSONS:
            return {**told, "held_out_persons": sorted(HELD_OUT_PERSONS[self.config.split])}
        if self.config.split == "videos":
            assert self._table.factors is not None
            kinds = np.unique(self._table.factors[self._inside("held_out"), :3], axis=0) + 1
            return {**told, "held_out_videos": [f"person{p:02}_{ACTIONS[a - 1]}_d{s}" for p, a, s in kinds.tolist()]}
        return told

    def notes(self) -> list[str]:
        """What is left out or cut, as far as it is known by now, and what the split is worth."""
        notes = [f"KTH: frames of {feed.fitting(HEIGHT, WIDTH, self.config.size, self.config.size, self.config.fit)}"]
        if self._beside.exists():
            told = files.read_json(self._beside)
            left_out, cut = told["left_out"], told["frames_beyond_the_end"]
        else:
            (_, left_out), cut = self._videos(), {}
        notes += [f"KTH: {name} is left out: it {why}{' (as published)' * (name in KNOWN)}" for name, why in left_out.items()]
        notes += [f"KTH: {name} ends {count} frames before {SEQUENCES} says so" for name, count in cut.items()]
        if self._found[1]:
            where = one_line(self.source)
            notes.append(f"KTH: {self._found[1]} videos are in {where} more than once; avi files, then zip files were taken")
        if self.config.split == "images":
            notes.append(
                "KTH: held-out images have trained-on neighbours in their video, as in the paper; split = 'videos' has not"
            )
        if self.config.split.startswith("classic"):
            other = {"classic": "validation", "classic_validation": "test"}[self.config.split]
            notes.append(f"KTH: the {other} persons {', '.join(map(str, CLASSIC[other]))} are in neither split")
        return notes

    def check(self, path: Path, progress: Progress) -> dict[str, Any] | None:
        """The report of `siv data check` on a folder of videos or frames of KTH: every frame decoded."""
        found, more = videos_in(path) if path.is_dir() else ({}, 0)
        if not found:
            return None
        total, problems = 0, []
        for done, (one, answer) in enumerate(video.decoded(list(found.values()), 8, "stretch", video.MOST_FRAMES)):
            progress(f"decoding {one_line(path.name)}", done, len(found))
            if isinstance(answer, str):
                problems.append(f"{one_line(path)}: {one.name} {answer}")
            else:
                total += answer.total
        actions = {factors_of(name)[1] for name in found}
        lacking = [name for name in self._wanted() if factors_of(name)[1] in actions and name not in found]
        about = {"path": str(path), "kind": "KTH", "videos": len(found), "frames": total, "more_than_once": more}
        listed = (path / SEQUENCES).is_file()
        try:
            about[SEQUENCES] = len(sequences(path / SEQUENCES)) if listed else None
        except UserError as error:
            problems += error.problems
        return {**about, "missing": lacking, "problems": sorted(problems)}

    def fingerprint(self) -> str:
        return self._table.sha256


@hookimpl
def siv_components() -> list[Component]:
    summary = "KTH actions: 25 persons, 6 actions, 4 scenarios, grey frames of 599 videos; needs the published files"
    return [Component("dataset", "kth", KTHConfig, KTH, summary, "Schuldt et al., ICPR 2004")]
