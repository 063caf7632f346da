"""Data sets `mnist`, `fashion_mnist`, `kmnist`, `emnist`, `cifar10`, `cifar100`, `svhn` and `stl10`, read from their original
files.

These are looked for in the data root under the names and in the folders people have them in, torchvision's among them, and
prepared once into `<data root>/NAME/NAME.h5`. `held_out` is the set's own test part. A file that is not the published one, by its
MD5 or the number of its images, is read all the same; that is told and recorded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from siv_core import Component, Progress, Rows, Spec, UserError, hookimpl, option
from siv_core.data import datafile, idx, mat5, plain_pickle, published
from siv_core.data.published import Bytes, Content, File, Form, Known, Read
from siv_core.store import files

BLOCK_BYTES = 8 << 20

# -- what is in a file: bytes -> Content, a ValueError for what is wrong ---------------------------------------------------------


def idx_images(data: bytes, *, turned: bool = False) -> Content:
    """`turned`: EMNIST's are stored column by column; here they stand upright."""
    images = idx.read(data, 3)
    return {"images": (images.swapaxes(1, 2) if turned else images)[:, None]}


def idx_labels(data: bytes, factor: str, first: int = 0) -> Content:
    return {factor: idx.read(data, 1).astype(np.int64) - first}


def cifar_pickle(data: bytes, keys: Mapping[str, str]) -> Content:
    """`keys`: the factor that each list of labels is, by its name in the pickle."""
    held = plain_pickle.read(data)
    if not isinstance(held, dict) or not isinstance(held.get("data"), np.ndarray):
        raise ValueError("it holds no dictionary with an array 'data'")
    lacking = [key for key in keys if not isinstance(held.get(key), list) or not all(type(one) is int for one in held[key])]
    if lacking:
        raise ValueError(f"it holds no list of whole numbers {lacking[0]!r}")
    labels = {factor: np.array(held[key], np.int64) for key, factor in keys.items()}
    return {"images": rows_of(held["data"], (3, 32, 32)), **labels}


def records(data: bytes, shape: tuple[int, int, int], factors: Sequence[str] = (), *, turned: bool = False) -> Content:
    """Records of one size: a byte for each factor, then the image."""
    size = len(factors) + int(np.prod(shape))
    if not data or len(data) % size:
        raise ValueError(f"it has {len(data):,} bytes, which is no number of whole records of {size:,}")
    table = np.frombuffer(data, np.uint8).reshape(-1, size)
    images = rows_of(table[:, len(factors) :], shape)
    labels = {factor: table[:, column].astype(np.int64) for column, factor in enumerate(factors)}
    return {"images": images.swapaxes(2, 3) if turned else images, **labels}


def stl_labels(data: bytes) -> Content:
    return {"label": np.frombuffer(data, np.uint8).astype(np.int64) - 1}


def svhn(data: bytes) -> Content:
    """`X` [32, 32, 3, n] and `y` [n, 1], where 10 stands for the digit 0."""
    (shape, images), (_, labels) = (mat5.read_uint8(data, name, published.MOST_IN_A_FILE) for name in "Xy")
    if images is None or labels is None or len(shape) != 4:
        raise ValueError(f"its X is {list(shape)}; X [32, 32, 3, n] and y [n, 1] of bytes are needed")
    return {"images": images.transpose(3, 2, 0, 1), "digit": labels.reshape(-1).astype(np.int64) % 10}


def rows_of(table: Bytes, shape: tuple[int, int, int]) -> Bytes:
    if table.ndim != 2 or table.shape[1] != int(np.prod(shape)):
        raise ValueError(f"its images are {list(table.shape)}, of {list(shape)} they have {int(np.prod(shape)):,} numbers")
    return table.reshape(-1, *shape)


# -- what was published ----------------------------------------------------------------------------------------------------------


def idx_set(name: str, title: str, url: str, md5: Sequence[str], paper: str, *, factor: str = "label") -> Known:
    """MNIST and its like; `md5` of train images and labels, test images and labels: the .gz, then, if known, unpacked."""
    names = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    reads: tuple[Read, Read] = (idx_images, partial(idx_labels, factor=factor))
    content = md5[4:] or ("",) * 4
    parts = [File(names[i], reads[i % 2], content[i], md5[i]) for i in range(4)]
    folders = dict.fromkeys((name, name.replace("_", "-"), title, f"{title}/raw", f"{name}/raw", f"{name}/{title}/raw"))
    form = Form(tuple(folders), tuple(parts[:2]), tuple(parts[2:]), url)
    return Known(name, title, (1, 28, 28), {factor: 10}, (60_000, 10_000), (form,), paper)


EMNIST = {  # classes, images of train and test, the lowest label
    "balanced": (47, 112_800, 18_800, 0),
    "byclass": (62, 697_932, 116_323, 0),
    "bymerge": (47, 697_932, 116_323, 0),
    "digits": (10, 240_000, 40_000, 0),
    "letters": (26, 124_800, 20_800, 1),
    "mnist": (10, 60_000, 10_000, 0),
}


def emnist(variant: str) -> Known:
    classes, train, test, first = EMNIST[variant]
    reads = {"images-idx3": partial(idx_images, turned=True), "labels-idx1": partial(idx_labels, factor="label", first=first)}
    parts = [
        tuple(File(f"emnist-{variant}-{part}-{what}-ubyte", read) for what, read in reads.items()) for part in ("train", "test")
    ]
    folders = ("emnist", "EMNIST/raw", "EMNIST", "emnist/raw", "emnist/gzip", "emnist/EMNIST/raw", "gzip")
    url, md5 = "https://biometrics.nist.gov/cs_links/EMNIST/", "58c8d27c78d21e728a6bc7b3cc06412e"
    form = Form(folders, parts[0], parts[1], url, "gzip.zip", "gzip", md5)
    return Known("emnist", "EMNIST", (1, 28, 28), {"label": classes}, (train, test), (form,), "Cohen et al. 2017")


TORONTO = "https://www.cs.toronto.edu/~kriz/"


def cifar_form(name: str, kind: str, inside: str, md5: str, train: Sequence[File], test: File) -> Form:
    folders = (inside, f"{name}/{inside}", name)
    return Form(folders, tuple(train), (test,), TORONTO, f"{name.replace('cifar', 'cifar-')}-{kind}.tar.gz", inside, md5)


def cifar10() -> Known:
    pickled, binary = partial(cifar_pickle, keys={"labels": "label"}), partial(records, shape=(3, 32, 32), factors=("label",))
    digests = ["c99cafc152244af753f735de768cd75f", "d4bba439e000b95fd0a9bffe97cbabec", "54ebc095f3ab1f0389bbae665268c751"]
    digests += ["634d18415352ddfa80567beed471001a", "482c414d41f54cd18b22e5b47cb7c3cb"]
    batches = [File(f"data_batch_{number}", pickled, md5) for number, md5 in enumerate(digests, 1)]
    test = File("test_batch", pickled, "40351d587109b95175f43aff81a1287e")
    forms = (
        cifar_form("cifar10", "python", "cifar-10-batches-py", "c58f30108f718f92721af3b95e74349a", batches, test),
        cifar_form(
            "cifar10",
            "binary",
            "cifar-10-batches-bin",
            "c32a1d4ab5d03f1284b67883e8d87530",
            [File(f"{batch.name}.bin", binary) for batch in batches],
            File("test_batch.bin", binary),
        ),
    )
    return Known("cifar10", "CIFAR-10", (3, 32, 32), {"label": 10}, (50_000, 10_000), forms, "Krizhevsky 2009")


def cifar100() -> Known:
    pickled = partial(cifar_pickle, keys={"fine_labels": "label", "coarse_labels": "superclass"})
    binary = partial(records, shape=(3, 32, 32), factors=("superclass", "label"))
    python = [
        File("train", pickled, "16019d7e3df5f24257cddd939b257f8d"),
        File("test", pickled, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
    ]
    plain = [File("train.bin", binary), File("test.bin", binary)]
    forms = (
        cifar_form("cifar100", "python", "cifar-100-python", "eb9058c3a382ffc7106e4002c42a8d85", python[:1], python[1]),
        cifar_form("cifar100", "binary", "cifar-100-binary", "03b5dce01913d631647c71ecec9e9cb8", plain[:1], plain[1]),
    )
    factors = {"label": 100, "superclass": 20}
    return Known("cifar100", "CIFAR-100", (3, 32, 32), factors, (50_000, 10_000), forms, "Krizhevsky 2009")


def stl10() -> Known:
    read: dict[str, Read] = {"X": partial(records, shape=(3, 96, 96), turned=True), "y": stl_labels}
    digests = {"train_X.bin": "918c2871b30a85fa023e0c44e0bee87f", "train_y.bin": "5a34089d4802c674881badbb80307741"}
    digests |= {"test_X.bin": "7f263ba9f9e0b06b93213547f721ac82", "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e"}
    parts = [File(name, read[name[-5]], md5) for name, md5 in digests.items()]
    folders, url = ("stl10_binary", "stl10/stl10_binary", "stl10"), "http://ai.stanford.edu/~acoates/stl10/"
    md5 = "91f7769df0f17e558f3565bffb0c7dfb"
    form = Form(folders, tuple(parts[:2]), tuple(parts[2:]), url, "stl10_binary.tar.gz", "stl10_binary", md5)
    return Known("stl10", "STL-10", (3, 96, 96), {"label": 10}, (5_000, 8_000), (form,), "Coates et al. 2011")


def svhn_set() -> Known:
    digests = {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373", "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"}
    train, test = (File(name, svhn, md5) for name, md5 in digests.items())
    form = Form(("svhn", "SVHN", ""), (train,), (test,), "http://ufldl.stanford.edu/housenumbers/")
    return Known("svhn", "SVHN", (3, 32, 32), {"digit": 10}, (73_257, 26_032), (form,), "Netzer et al. 2011")


MNIST_MD5 = (  # of the four .gz, and of what is in them
    *("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432"),
    *("9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
    *("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624"),
    *("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
)
FASHION_MD5 = (
    *("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe"),
    *("bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
)
KMNIST_MD5 = (
    *("bdb82020997e1d708af4cf47b453dcf7", "e144d726b3acfaa3e44228e80efcd344"),
    *("5c965bf0a639b31b8f53240b1b52f4d7", "7320c461ea6c1c855c0b718fb2a4b134"),
)
# the first one is where torchvision gets MNIST: LeCun's own page no longer gives it
AWS, FASHION = "https://ossci-datasets.s3.amazonaws.com/mnist/", "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
KUZUSHIJI = "http://codh.rois.ac.jp/kmnist/dataset/kmnist/"
SETS = (
    idx_set("mnist", "MNIST", AWS, MNIST_MD5, "LeCun et al. 1998", factor="digit"),
    idx_set("fashion_mnist", "FashionMNIST", FASHION, FASHION_MD5, "Xiao et al. 2017"),
    idx_set("kmnist", "KMNIST", KUZUSHIJI, KMNIST_MD5, "Clanuwat et al. 2018"),
    cifar10(),
    cifar100(),
    svhn_set(),
    stl10(),
)

# -- the data set ----------------------------------------------------------------------------------------------------------------

NOTED = "; "  # before each note in the data file's `source`


@frozen
class SetConfig:
    size: int = option(
        0, doc="pixels a side: smaller by area averaging; grey digits larger by a black border; 0: as stored", ge=0, le=96
    )
    validation: int = option(
        0, doc="held out are so many images of the training part, by a seeded choice; 0: the set's test part", ge=0
    )
    split_seed: int = option(0, doc="of that choice", ge=0)
    folder: str = option("", doc="where the original files are; empty: in the data root", place=True)


@frozen
class EmnistConfig(SetConfig):
    variant: str = option("balanced", doc="which of the six sets of EMNIST", choices=tuple(EMNIST))


class PublishedSet:
    def __init__(self, known: Known, config: SetConfig, stem: str = "") -> None:
        self.known, self.config = known, config
        channels, side, _ = known.shape
        size = config.size or side
        if size > side and channels > 1:
            raise UserError(f"data.size: {size} is more than the {side} × {side} pixels of {known.name}")
        self.border = max(0, size - side)
        place = f"-{hashlib.sha256(config.folder.encode(errors='surrogateescape')).hexdigest()[:8]}" if config.folder else ""
        self.file = f"{stem or known.name}{f'_{size}' if self.border else ''}{place}.h5"
        label = next(iter(known.factors.values()))
        self.spec = Spec((channels, size, size), classes=label, factors=known.factors)

    @property
    def path(self) -> Path:
        return files.data_root() / self.known.name / self.file

    @property
    def _base(self) -> Path:
        return Path(self.config.folder) if self.config.folder else files.data_root()

    def _found(self) -> published.Found | None:
        return published.find(self.known, self._base, here=bool(self.config.folder))

    def missing(self) -> str | None:
        if self.path.exists() or self._found():
            return None
        return published.lacking(self.known, self._base, here=bool(self.config.folder))

    def fetch(self, progress: Progress) -> None:
        """Download the original files, unless they are there; what has not the right digest is not kept."""
        published.fetch(self.known, self._base if self.config.folder else self._base / self.known.name, progress)

    def prepare(self, progress: Progress) -> None:
        if self.path.exists():
            return
        found = self._found()
        if found is None:
            raise UserError(self.missing() or f"{self._base}: the files of {self.known.title} are gone")
        loaded = published.load(self.known, found, progress)
        channels, side, _ = self.known.shape
        size = side + self.border
        block = max(1, BLOCK_BYTES // (channels * size * size))
        low = self.border // 2
        margin = ((0, 0), (0, 0), *((low, self.border - low),) * 2)

        told = f"{self.known.title} from its original files{'' if loaded.notes else ', as published'} ({loaded.digest})"

        def produce(numbers: list[int]) -> Iterator[datafile.Block]:
            for number in numbers:
                rows = published.rows_between(loaded.images, number * block, (number + 1) * block)
                yield number, np.pad(rows, margin) if self.border else rows

        datafile.write(
            self.path,
            shape=(len(loaded.split), channels, size, size),
            block=block,
            produce=produce,
            progress=progress,
            source=NOTED.join([told, *loaded.notes]),
            labels=loaded.factors[:, 0].copy(),
            factors=loaded.factors,
            factor_sizes=dict(self.known.factors),
            split=loaded.split,
        )

    @cached_property
    def _table(self) -> datafile.Table:
        table = datafile.read(self.path)
        side = self.known.shape[1] + self.border
        as_made = table.images.shape[1:] == (self.known.shape[0], side, side) and table.factor_sizes == self.known.factors
        if not as_made or table.labels is None or table.factors is None or table.split is None:
            raise UserError(f"{self.path}: holds other images than {self.known.title}; remove it, so that it is made again")
        return table

    def notes(self) -> list[str]:
        """What tells the files that it was made from from the published ones, as far as they were read by now."""
        if not self.path.exists():
            return []
        return [f"{self.known.title}: {note}" for note in self._table.source.split(NOTED)[1:]]

    def _held_out(self) -> NDArray[np.bool_]:
        """Which rows are held out, of those that are used."""
        split, n = self._table.split, self.config.validation
        assert split is not None
        if not n:
            return split == 1
        train = np.flatnonzero(split == 0)
        if n >= len(train):
            raise UserError(
                f"data.validation: {n} images of the {len(train)} for training cannot be held out: one must stay at least"
            )
        chosen = np.random.Generator(np.random.PCG64(self.config.split_seed)).permutation(train)[:n]
        inside = np.zeros(len(split), bool)
        inside[chosen] = True
        return inside

    def rows(self, split: str) -> Rows:
        import torch

        table = self._table
        inside, of_train = self._held_out(), table.split == 0
        index = np.flatnonzero({"train": of_train & ~inside, "held_out": inside}[split])
        labels, factors = (torch.from_numpy(array) for array in (table.labels, table.factors) if array is not None)
        return Rows(torch.from_numpy(table.images), labels, factors, torch.from_numpy(index))

    def about(self) -> dict[str, object]:
        """For the run's manifest: what the images were read from and which part is held out."""
        n, seed = self.config.validation, self.config.split_seed
        held_out = f"{n} images of the training part (seed {seed})" if n else "test part"
        return {"source": self._table.source, "held_out": held_out}

    def fingerprint(self) -> str:
        """The images' digest; that of labels, factors and split follows a +."""
        table = self._table
        columns = [table.labels, table.factors, table.split]
        digest = hashlib.sha256(b"".join(column.tobytes() for column in columns if column is not None))
        return f"{table.sha256}+{digest.hexdigest()[:16]}"

    def check(self, path: Path, progress: Progress) -> dict[str, object] | None:
        """What files of any of these sets hold; None of a path without any."""
        return published.check((*SETS, *map(emnist, EMNIST)), path, progress)


def build_emnist(config: EmnistConfig) -> PublishedSet:
    return PublishedSet(emnist(config.variant), config, f"emnist_{config.variant}")


def summary(known: Known) -> str:
    channels, side, _ = known.shape
    images = f"{known.counts[0]:,} + {known.counts[1]:,} images of {side} × {side}, {'grey' if channels == 1 else 'colour'}"
    return f"{known.title}: {images}, {next(iter(known.factors.values()))} classes"


@hookimpl
def siv_components() -> list[Component]:
    sets = [
        Component("dataset", known.name, SetConfig, partial(PublishedSet, known), summary(known), known.paper) for known in SETS
    ]
    six = "EMNIST, letters and digits of 28 × 28, grey: `variant` is one of its six sets"
    return [*sets, Component("dataset", "emnist", EmnistConfig, build_emnist, six, "Cohen et al. 2017")]
