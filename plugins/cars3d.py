"""Data set `cars3d`: 183 car models, each rendered from 4 elevations and 24 azimuths, as colour images of up to 128 × 128.

Origin: the analogy data of Reed et al., Deep Visual Analogy-Making (NIPS 2015); the car models are those of Fidler et al. (2012).
In it `cars/list.txt` numbers the models, and `cars/STEM.mat` (MAT 5) holds `im` uint8 [H, W, C, azimuth, elevation].
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core import Component, Progress, Rows, Spec, UserError, hookimpl, option
from siv_core.data import archives, datafile, download, mat5
from siv_core.errors import one_line
from siv_core.store import files

ARCHIVE = "nips2015-analogy-data.tar.gz"
URL = "http://www.scottreed.info/files/nips2015-analogy-data.tar.gz"  # the host offers no https: the digest is what protects
MD5 = "4e866a7919c1beedf53964e6f7a23686"

MODELS, ELEVATIONS, AZIMUTHS, SIDE = 183, 4, 24, 128
VIEWS = ELEVATIONS * AZIMUTHS
LAYOUT = (SIDE, SIDE, 3, AZIMUTHS, ELEVATIONS)  # of `im`

MOST_DOWNLOADED = 1 << 30
MOST_IN_A_FILE = 64 << 20
MOST_IN_ALL_FILES = 4 << 30


@frozen
class Cars3DConfig:
    size: int = option(64, doc="side of the images in pixels; below 128 they are shrunk with antialiasing", ge=8, le=128)
    held_out_models: int = option(20, doc="car models kept from training, by a seeded choice", ge=1, le=182)
    split_seed: int = option(0, doc="of that choice", ge=0)
    archive: str = option(
        "", doc="the original .tar.gz or its unpacked folder cars; empty: looked for in the data folder", place=True
    )


class Folder:
    """A `cars/` that the user unpacked. `origin` is for the data file's `source`."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.origin = path, one_line(path), "an unpacked folder of unknown digest"

    def listing(self) -> tuple[str | None, list[str]]:
        """The text of list.txt, if it is there, and the stems of the MAT files."""
        lines = self.path / "list.txt"
        text = read_file(lines).decode("utf-8", "replace") if lines.exists() else None
        return text, [path.stem for path in mat_files(self.path)]

    def read(self, stems: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """(stem, bytes) of these MAT files, in any order."""
        for stem in stems:
            yield stem, read_file(self.path / f"{stem}.mat")


def read_file(path: Path) -> bytes:
    return archives.read(path, MOST_IN_A_FILE, "a car")


class Archive:
    """The original archive, read as a stream: nothing of it is unpacked to disk."""

    def __init__(self, path: Path, file: BinaryIO, progress: Progress) -> None:
        self.file, self.progress, self.name, self.origin = file, progress, one_line(path), f"{ARCHIVE} (MD5 {MD5})"

    def listing(self) -> tuple[str | None, list[str]]:
        found = []
        for number, entry in enumerate(self._walk({"list.txt"})):
            self.progress(f"listing {self.name}", min(number, MODELS), MODELS)
            found.append(entry)
        repeated = [name for name, times in Counter(name for name, _ in found).items() if times > 1]
        if repeated:
            raise UserError(f"{self.name}: {name} is in it more than once" for name in repeated)
        texts = [data.decode("utf-8", "replace") for name, data in found if name == "list.txt"]
        return (texts[0] if texts else None), [Path(name).stem for name, _ in found if name != "list.txt"]

    def read(self, stems: Collection[str]) -> Iterator[tuple[str, bytes]]:
        wanted = {f"{stem}.mat" for stem in stems}
        found = ((Path(name).stem, data) for name, data in self._walk(wanted) if name in wanted)
        return islice(found, len(wanted))  # stops without inflating what comes after the last one

    def _walk(self, take: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """(file name, bytes) of the cars' files; only those in `take` are read, of others the bytes are empty."""
        of_cars = 0
        for name, size, data in archives.tar_gz(self.file, self.name, is_of_cars, MOST_IN_A_FILE, lambda path: path.name in take):
            of_cars += size
            if of_cars > MOST_IN_ALL_FILES:
                raise UserError(f"{self.name}: its cars take more than {MOST_IN_ALL_FILES >> 20} MiB unpacked")
            yield name, data


def is_of_cars(path: PurePosixPath) -> bool:
    return path.parent.name == "cars" and is_car_file(path.name)


def is_car_file(name: str) -> bool:
    """Hidden names are left out: macOS's tar puts a `._NAME` beside each file."""
    return name == "list.txt" or (name.endswith(".mat") and not name.startswith("."))


def mat_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.mat") if is_car_file(path.name))  # of a folder that is not there: none


@contextlib.contextmanager
def open_cars(path: Path, progress: Progress) -> Iterator[Folder | Archive]:
    """A folder as it is; an archive only with the right digest, taken through the very handle it is then read from."""
    if path.is_dir():
        yield Folder(path)
        return
    with path.open("rb") as file:
        progress(f"checking the MD5 of {path.name}", 0, 1)
        actual = hashlib.file_digest(file, "md5").hexdigest()
        progress(f"checking the MD5 of {path.name}", 1, 1)
        if actual != MD5:
            raise UserError(f"{path}: its MD5 is {actual}, the original archive has {MD5}; remove it and get it again from {URL}")
        yield Archive(path, file, progress)


def model_order(cars: Folder | Archive) -> tuple[list[str], str]:
    """Stems in the order that numbers the models, and a note on where it comes from."""
    text, stems = cars.listing()
    order = numbered(text, stems)
    problems = order_problems(cars.name, text, stems, order)
    if problems:
        raise UserError(problems)
    return order, "WARNING: no list.txt, models numbered by sorted names" if text is None else "models numbered by list.txt"


def numbered(text: str | None, stems: list[str]) -> list[str]:
    if text is None:
        return sorted(stems)
    return [line.strip().removesuffix(".mat") for line in text.splitlines() if line.strip()]


def order_problems(name: str, text: str | None, stems: list[str], order: list[str]) -> list[str]:
    """What is missing of the models that there should be."""
    problems = [f"{name}: {one_line(stem)}.mat is missing" for stem in sorted(set(order) - set(stems))]
    if len(problems) > MODELS:
        problems = [f"{name}: list.txt names {len(problems)} files that are not there; is it the original one?"]
    if len(order) != MODELS or len(set(order)) != len(order):
        what = "has MAT files of" if text is None else "list.txt names"
        problems.append(f"{name}: {what} {len(set(order))} different models in {len(order)} entries, there are {MODELS}")
    return problems


def views_of(mat: bytes, size: int) -> NDArray[np.uint8]:
    """The images of a MAT file, [96, 3, size, size], elevation by elevation."""
    try:
        shape, im = mat5.read_uint8(mat, "im", MOST_IN_A_FILE)
    except ValueError as error:
        raise UserError(f"cannot be read as a MAT 5 file with a variable 'im' ({one_line(error)})") from error
    if im is None or shape != LAYOUT:
        kind = "of another type" if im is None else "uint8"
        raise UserError(f"'im' is {kind} {list(shape)}, it should be uint8 {list(LAYOUT)}")
    views = im.transpose(4, 3, 0, 1, 2).reshape(VIEWS, SIDE, SIDE, 3)
    if size != SIDE:
        views = np.stack([shrink(view, size) for view in views])
    return np.ascontiguousarray(views.transpose(0, 3, 1, 2))


def shrink(view: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Antialiased, [128, 128, 3] -> [size, size, 3]; at 64 the pixels of disentanglement_lib's `thumbnail`."""
    from PIL import Image

    return np.asarray(Image.fromarray(view).resize((size, size), Image.Resampling.LANCZOS))


def blocks(cars: Folder | Archive, order: list[str], size: int, numbers: list[int]) -> Iterator[datafile.Block]:
    """(model number, its rows); the models that cannot be read are told of together, after the others."""
    number_of = {order[number]: number for number in numbers}
    problems = []
    for stem, mat in cars.read(number_of):
        try:
            rows = views_of(mat, size)
        except UserError as error:
            problems.append(f"{cars.name}: {one_line(stem)}.mat: {error}")
            continue
        yield number_of[stem], rows
    if problems:
        raise UserError(problems)


def survey(cars: Folder | Archive, problems: list[str], progress: Progress) -> dict[str, object]:
    """Every car read: how many are good, what is wrong with the others and what is missing, beside the `problems` so far."""
    text, stems, good = None, list[str](), 0
    try:
        text, stems = cars.listing()
        for done, (stem, mat) in enumerate(cars.read(stems)):
            progress(f"reading {cars.name}", done, len(stems))
            try:
                views_of(mat, SIDE)
                good += 1
            except UserError as error:
                problems.append(f"{cars.name}: {one_line(stem)}.mat: {error}")
    except UserError as error:
        problems += error.problems
    problems += order_problems(cars.name, text, stems, numbered(text, stems))
    progress(f"reading {cars.name}", len(stems), max(1, len(stems)))
    return {"list.txt": text is not None, "cars": len(stems), "readable": good, "expected": MODELS, "problems": problems}


class Cars3D:
    def __init__(self, size: int, held_out_models: int, split_seed: int, archive: str) -> None:
        self.size, self.held_out_models, self.split_seed, self.archive = size, held_out_models, split_seed, archive
        factors = {"model": MODELS, "elevation": ELEVATIONS, "azimuth": AZIMUTHS}
        self.spec = Spec(shape=(3, size, size), classes=MODELS, factors=factors)

    @property
    def folder(self) -> Path:
        return files.data_root() / "cars3d"

    @property
    def path(self) -> Path:
        return self.folder / f"cars3d_{self.size}.h5"

    def _source(self) -> Path | None:
        """The archive or the folder with the MAT files."""
        roots = [Path(self.archive)] if self.archive else [self.folder / ARCHIVE, self.folder]
        for root in roots:
            if root.is_file():
                return root
            for folder in (root, root / "cars", root / "data" / "cars"):
                if mat_files(folder):
                    return folder
        return None

    def missing(self) -> str | None:
        if self.path.exists() or self._source() is not None:
            return None
        at = f"archive = {self.archive!r} is neither the archive nor a folder with its MAT files: " if self.archive else ""
        return (
            f"{at}the Cars3D images are not at hand: run `siv data fetch cars3d`, or put {ARCHIVE} (MD5 {MD5}, from {URL}) or "
            f"its unpacked folder cars into {self.folder}; without them `--profile rendered` (data set rendered_cars) stands in"
        )

    def fetch(self, progress: Progress) -> None:
        """Download the archive, unless it is there; what has not the right digest is not kept."""
        download.fetch(URL, self.folder / ARCHIVE, MD5, MOST_DOWNLOADED, progress)

    def prepare(self, progress: Progress) -> None:
        if self.path.exists():
            return
        source = self._source()
        if source is None:
            raise UserError(self.missing() or f"{self.folder}: the Cars3D images are gone")
        with open_cars(source, progress) as cars:
            order, note = model_order(cars)
            numbering = hashlib.sha256("\n".join(order).encode()).hexdigest()[:12]
            factors = np.indices((MODELS, ELEVATIONS, AZIMUTHS), dtype=np.int64).reshape(3, -1).T.copy()
            datafile.write(
                self.path,
                shape=(MODELS * VIEWS, 3, self.size, self.size),
                block=VIEWS,
                produce=partial(blocks, cars, order, self.size),
                progress=progress,
                source=f"Cars3D from {cars.origin}; {note} ({numbering})",
                labels=factors[:, 0].copy(),
                factors=factors,
                factor_sizes=dict(self.spec.factors),
            )

    def check(self, path: Path, progress: Progress) -> dict[str, object] | None:
        """What an archive or a folder of cars holds and lacks, after reading every car; None of a path that is neither."""
        folder = next((inside for inside in (path, path / "cars", path / "data" / "cars") if mat_files(inside)), None)
        if folder is None and not (path.is_file() and path.name.endswith((".tar.gz", ".tgz"))):
            return None
        report: dict[str, object] = {"path": str(path), "kind": "Cars3D, archive" if folder is None else "Cars3D, unpacked"}
        problems: list[str] = []
        try:
            if folder is not None:
                return report | survey(Folder(folder), problems, progress)
            report["md5"] = actual = files.digest(path, "md5")
            if actual != MD5:
                problems.append(f"{one_line(path)}: its MD5 is {actual}, the original archive has {MD5}; get it again from {URL}")
            with path.open("rb") as file:
                return report | survey(Archive(path, file, progress), problems, progress)
        except OSError as error:
            raise UserError(f"{one_line(path)}: cannot be read ({error.strerror})") from error

    def rows(self, split: str) -> Rows:
        table = datafile.read(self.path)
        if table.images.shape != (MODELS * VIEWS, *self.spec.shape) or table.labels is None:
            raise UserError(f"{self.path}: is not Cars3D in this size; remove it, so that it is prepared again")
        return datafile.rows_by_group(table, table.labels, self.held_out_models, self.split_seed, split)

    def about(self) -> dict[str, object]:
        """For the run's manifest: which models were held out, numbered as in list.txt."""
        models = np.arange(MODELS)
        return {"held_out_models": datafile.held_out_groups(models, self.held_out_models, self.split_seed)}

    def fingerprint(self) -> str:
        return datafile.read(self.path).sha256


def build(config: Cars3DConfig) -> Cars3D:
    return Cars3D(config.size, config.held_out_models, config.split_seed, config.archive)


@hookimpl
def siv_components() -> list[Component]:
    summary = "183 car models × 4 elevations × 24 azimuths; whole models are held out"
    return [Component("dataset", "cars3d", Cars3DConfig, build, summary, "Reed et al., NIPS 2015")]
