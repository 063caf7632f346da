"""Sets of known files: real IDX, pickle, binary, MAT 5 and archive files of a few images, as people have them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from scipy.io import savemat
from siv_plugins import torchvision_sets as sets

from siv_core import UserError
from siv_core.cli import data as cli_data
from siv_core.data import archives, datafile, feed, idx, mat5, plain_pickle, published
from siv_core.errors import Stopped
from siv_core.testing import check_dataset

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (14, 28, 28), dtype=np.uint8)  # ten to train with, four held out
COLOUR = RNG.integers(0, 256, (14, 3, 32, 32), dtype=np.uint8)
LABELS = np.arange(14, dtype=np.uint8) % 10
KNOWN = {known.name: known for known in sets.SETS}


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIV_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def dataset(name: str, **options: Any) -> sets.PublishedSet:
    if name == "emnist":
        return sets.build_emnist(sets.EmnistConfig(**options))
    return sets.PublishedSet(KNOWN[name], sets.SetConfig(**options))


def prepared(name: str, **options: Any) -> sets.PublishedSet:
    data = dataset(name, **options)
    assert data.missing() is None
    data.prepare(quiet)
    return data


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def idx_of(array: np.ndarray, code: int = 8) -> bytes:
    return bytes((0, 0, code, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist_files(pattern: str = "{part}-{what}-idx{axes}-ubyte", parts: tuple[str, str] = ("train", "t10k")) -> dict[str, bytes]:
    cut = {parts[0]: slice(0, 10), parts[1]: slice(10, 14)}
    arrays = {"images": GREY, "labels": LABELS}
    return {
        pattern.format(part=part, what=what, axes=array.ndim): idx_of(array[rows])
        for part, rows in cut.items()
        for what, array in arrays.items()
    }


def gz(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(data, 1, mtime=1) for name, data in files.items()}


def python2(value: Any) -> bytes:
    """How Python 2's cPickle wrote CIFAR: strings are bytes, arrays are `numpy.core.multiarray._reconstruct`."""
    if isinstance(value, bytes):
        return b"U" + bytes((len(value),)) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"K" + bytes((value,)) if value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(part) for pair in value.items() for part in pair) + b"u"
    assert isinstance(value, np.ndarray)
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    shape = b"".join(map(python2, value.shape)) + b"\x86"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return made + b"(K\x01" + shape + dtype + b"\x89" + python2(value.tobytes()) + b"tb"


def batch(rows: slice, keys: dict[bytes, np.ndarray]) -> dict[bytes, Any]:
    lists = {key: values[rows].tolist() for key, values in keys.items()}
    names = [b"a_%d.png" % i for i in range(rows.stop - rows.start)]
    return {b"batch_label": b"a batch", **lists, b"data": COLOUR[rows].reshape(-1, 3072), b"filenames": names}


def pickled(value: Any, how: str) -> bytes:
    return b"\x80\x02" + python2(value) + b"." if how == "python2" else pickle.dumps(value, int(how))


CIFAR_BATCHES = {f"data_batch_{i + 1}": slice(2 * i, 2 * i + 2) for i in range(5)} | {"test_batch": slice(10, 14)}
SUPERCLASSES = LABELS % 7


def cifar10_files(how: str = "python2") -> dict[str, bytes]:
    return {name: pickled(batch(rows, {b"labels": LABELS}), how) for name, rows in CIFAR_BATCHES.items()}


def cifar10_binary() -> dict[str, bytes]:
    records = np.concatenate([LABELS[:, None], COLOUR.reshape(14, -1)], axis=1)
    return {f"{name}.bin": records[rows].tobytes() for name, rows in CIFAR_BATCHES.items()}


def tar_gz(path: Path, inside: str, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{inside}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def mat_of(**variables: np.ndarray) -> bytes:
    file = io.BytesIO()
    savemat(file, variables, do_compression=True)
    return file.getvalue()


def svhn_files() -> dict[str, bytes]:
    y = np.where(LABELS == 0, 10, LABELS)[:, None].astype(np.uint8)
    cut = {"train_32x32.mat": slice(0, 10), "test_32x32.mat": slice(10, 14)}
    return {name: mat_of(X=COLOUR[rows].transpose(2, 3, 1, 0), y=y[rows]) for name, rows in cut.items()}


def check_split(data: sets.PublishedSet, images: np.ndarray, labels: np.ndarray = LABELS) -> None:
    """Ten of the images to train with, four held out, in order, with their labels."""
    check_dataset(data)
    train, held_out = data.rows("train"), data.rows("held_out")
    assert train.index.tolist() == list(range(10))
    assert held_out.index.tolist() == list(range(10, 14))
    assert np.array_equal(train.x.numpy(), images)
    assert train.labels.tolist() == train.factors[:, 0].tolist() == labels.tolist()


# -- each set under the names that people have it in -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder", "pattern", "packed"),
    [
        ("mnist", "mnist", "{part}-{what}-idx{axes}-ubyte", False),
        ("mnist", "mnist", "{part}-{what}-idx{axes}-ubyte", True),
        ("mnist", "MNIST/raw", "{part}-{what}-idx{axes}-ubyte", False),
        ("mnist", "mnist", "{part}-{what}.idx{axes}-ubyte", False),
        ("fashion_mnist", "FashionMNIST/raw", "{part}-{what}-idx{axes}-ubyte", True),
        ("kmnist", "kmnist", "{part}-{what}-idx{axes}-ubyte", False),
    ],
)
def test_mnist_and_its_like(root: Path, name: str, folder: str, pattern: str, packed: bool) -> None:
    files = mnist_files(pattern)
    write(root / folder, gz(files) if packed else files)
    data = prepared(name)
    assert data.path == root / name / f"{name}.h5"
    check_split(data, GREY[:, None])
    assert data.spec.shape == (1, 28, 28)
    assert dict(data.spec.factors) == ({"digit": 10} if name == "mnist" else {"label": 10})
    told = "\n".join(data.notes())
    assert "its part train has 10 images, the published one 60,000" in told
    assert "its part held_out has 4 images, the published one 10,000" in told
    assert str(data.about()["source"]).count("; ") == len(data.notes()) == 6


def test_one_file_of_each_spelling_and_a_gz_that_is_none(root: Path) -> None:
    """What a file is tells its content: browsers unpack and do not rename."""
    files = mnist_files()
    first, *rest = files
    write(root / "mnist", {f"{first}.gz": files[first], **{name: files[name] for name in rest}})
    check_split(prepared("mnist"), GREY[:, None])


@pytest.mark.parametrize("variant", ["letters", "balanced"])
@pytest.mark.parametrize("zipped", [False, True])
def test_emnist_stands_upright(root: Path, variant: str, zipped: bool) -> None:
    first = 1 if variant == "letters" else 0
    parts = {"train": slice(0, 10), "test": slice(10, 14)}
    files = {}
    for part, rows in parts.items():
        files[f"emnist-{variant}-{part}-images-idx3-ubyte"] = idx_of(GREY[rows].transpose(0, 2, 1))
        files[f"emnist-{variant}-{part}-labels-idx1-ubyte"] = idx_of(LABELS[rows] + np.uint8(first))
    if zipped:
        (root / "emnist").mkdir(parents=True)
        with zipfile.ZipFile(root / "emnist" / "gzip.zip", "w") as archive:
            for name, data in gz(files).items():
                archive.writestr(f"gzip/{name}", data)
            archive.writestr("gzip/emnist-other-train-images-idx3-ubyte.gz", b"not read")
    else:
        write(root / "EMNIST" / "raw", files)
    data = prepared("emnist", variant=variant)
    check_split(data, GREY[:, None])
    assert data.spec.classes == {"letters": 26, "balanced": 47}[variant]


@pytest.mark.parametrize("how", ["python2", "0", "2", "4"])
@pytest.mark.parametrize("place", ["folder", "below its name", "archive"])
def test_cifar10(root: Path, how: str, place: str) -> None:
    files = cifar10_files(how)
    if place == "archive":
        tar_gz(root / "cifar-10-python.tar.gz", "cifar-10-batches-py", {"readme.html": b"", **files})
    else:
        write(root / "cifar10" / "cifar-10-batches-py" if place == "below its name" else root / "cifar-10-batches-py", files)
    data = prepared("cifar10")
    check_split(data, COLOUR)
    assert any(note.startswith("CIFAR-10: data_batch_1 is not the published one") for note in data.notes())


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_in_its_binary_form(root: Path, packed: bool) -> None:
    if packed:
        tar_gz(root / "cifar10" / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", cifar10_binary())
    else:
        write(root / "cifar-10-batches-bin", cifar10_binary())
    check_split(prepared("cifar10"), COLOUR)


@pytest.mark.parametrize("binary", [False, True])
def test_cifar100_has_superclasses(root: Path, binary: bool) -> None:
    parts = {"train": slice(0, 10), "test": slice(10, 14)}
    if binary:
        table = np.concatenate([SUPERCLASSES[:, None], LABELS[:, None], COLOUR.reshape(14, -1)], axis=1)
        write(root / "cifar-100-binary", {f"{part}.bin": table[rows].tobytes() for part, rows in parts.items()})
    else:
        keys = {b"fine_labels": LABELS, b"coarse_labels": SUPERCLASSES}
        files = {part: pickled(batch(rows, keys), "python2") for part, rows in parts.items()}
        write(root / "cifar100" / "cifar-100-python", files)
    data = prepared("cifar100")
    check_split(data, COLOUR)
    assert data.rows("train").factors[:, 1].tolist() == SUPERCLASSES.tolist()
    assert (data.spec.classes, dict(data.spec.factors)) == (100, {"label": 100, "superclass": 20})


@pytest.mark.parametrize("folder", ["svhn", "SVHN", "."])
def test_svhn_tens_are_noughts(root: Path, folder: str) -> None:
    write(root / folder, svhn_files())
    check_split(prepared("svhn"), COLOUR)


def test_labels_that_matlab_holds_as_doubles_and_stores_as_bytes() -> None:
    file = io.BytesIO()
    savemat(file, {"y": np.arange(5, dtype=np.uint8)[:, None]})
    as_double = file.getvalue().replace(struct.pack("<IIII", 6, 8, 9, 0), struct.pack("<IIII", 6, 8, 6, 0))
    assert as_double != file.getvalue()
    shape, values = mat5.read_uint8(as_double, "y", 100)
    assert shape == (5, 1)
    assert values[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("packed", [False, True])
def test_stl10_stands_upright(root: Path, packed: bool) -> None:
    images = np.random.default_rng(1).integers(0, 256, (14, 3, 96, 96), dtype=np.uint8)
    files = {}
    for part, rows in {"train": slice(0, 10), "test": slice(10, 14)}.items():
        files[f"{part}_X.bin"] = images[rows].transpose(0, 1, 3, 2).tobytes()  # column by column
        files[f"{part}_y.bin"] = (LABELS[rows] + 1).tobytes()
    if packed:
        tar_gz(root / "stl10" / "stl10_binary.tar.gz", "stl10_binary", files)
    else:
        write(root / "stl10_binary", files)
    check_split(prepared("stl10"), images)


def test_a_folder_of_ones_own_has_a_file_of_its_own(root: Path, tmp_path: Path) -> None:
    write(root / "mnist", mnist_files())
    other = {name: data[:-1] + b"\7" if "labels" in name else data for name, data in mnist_files().items()}
    write(tmp_path / "mine", other)
    own, usual = prepared("mnist", folder=str(tmp_path / "mine")), prepared("mnist")
    assert own.path.parent == usual.path.parent
    assert own.path != usual.path
    assert own.fingerprint() != usual.fingerprint(), "labels are part of what the data are"
    assert own.rows("train").labels.tolist()[9] == 7


# -- options ---------------------------------------------------------------------------------------------------------------------


def test_sizes(root: Path) -> None:
    write(root / "mnist", mnist_files())
    write(root / "cifar-10-batches-bin", cifar10_binary())
    larger = prepared("mnist", size=33)
    assert larger.spec.shape == (1, 33, 33)
    assert larger.path.name == "mnist_33.h5"
    x = larger.rows("train").x.numpy()
    assert np.array_equal(x[:, :, 2:30, 2:30], GREY[:, None])
    assert x.sum() == GREY.sum(), "the border is black"
    smaller = prepared("mnist", size=14)
    assert smaller.path.name == "mnist.h5"
    shown = feed.images(smaller.rows("train"), torch.arange(10), smaller.spec)
    expected = GREY[:10].reshape(10, 1, 14, 2, 14, 2).mean(axis=(3, 5)) / 255
    assert torch.allclose(shown, torch.from_numpy(expected).float(), atol=1e-6)
    with pytest.raises(UserError, match=r"data.size: 64 is more than the 32 × 32 pixels of cifar10"):
        dataset("cifar10", size=64)


def test_part_of_the_training_images_held_out(root: Path) -> None:
    write(root / "mnist", mnist_files())
    data = prepared("mnist", validation=3, split_seed=5)
    check_dataset(data)
    train, held_out = set(data.rows("train").index.tolist()), set(data.rows("held_out").index.tolist())
    assert len(held_out) == 3
    assert train | held_out == set(range(10)), "the test part is used for nothing"
    other = prepared("mnist", validation=3, split_seed=6).rows("held_out").index.tolist()
    assert set(other) != held_out
    assert data.about()["held_out"] == "3 images of the training part (seed 5)"
    with pytest.raises(UserError, match=r"data.validation: 10 images of the 10"):
        prepared("mnist", validation=10).rows("train")


# -- what is published and what is not -------------------------------------------------------------------------------------------


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def as_published(files: dict[str, bytes], *, content: bool) -> sets.Known:
    """MNIST, as if these were the files that were published."""
    packed = [md5(data) for data in gz(files).values()]
    digests = (*packed, *map(md5, files.values())) if content else tuple(packed)
    return evolve(sets.idx_set("mnist", "MNIST", "http://127.0.0.1:9/", digests, "", factor="digit"), counts=(10, 4))


def notes(known: sets.Known) -> list[str]:
    data = sets.PublishedSet(known, sets.SetConfig())
    data.prepare(quiet)
    return data.notes()


def test_a_gz_made_anew_is_the_published_file(root: Path) -> None:
    files = mnist_files()
    write(root / "mnist", {f"{name}.gz": gzip.compress(data, 9) for name, data in files.items()})
    assert notes(as_published(files, content=True)) == []
    assert "as published" in str(dataset("mnist").about()["source"])


def test_digests_of_the_gz_alone(root: Path) -> None:
    files = mnist_files()
    write(root / "mnist", gz(files))
    assert notes(as_published(files, content=False)) == []
    (root / "mnist" / "mnist.h5").unlink()
    for path in (root / "mnist").iterdir():
        path.unlink()
    write(root / "mnist", files)
    told = notes(as_published(files, content=False))
    assert len(told) == 4
    assert "train-images-idx3-ubyte is the published one is not known" in told[0]


def test_a_file_in_the_place_of_another_is_told(root: Path) -> None:
    files = mnist_files()
    known = as_published(files, content=True)
    write(root / "mnist", {**files, "t10k-images-idx3-ubyte": idx_of(GREY[:4])})
    assert [note.split(" (")[0] for note in notes(known)] == ["MNIST: t10k-images-idx3-ubyte is not the published one"]


def test_an_archive_of_the_published_digest(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar_gz(root / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", cifar10_binary())
    binary = evolve(KNOWN["cifar10"].forms[1], md5=md5(path.read_bytes()))
    known = evolve(KNOWN["cifar10"], forms=(binary,), counts=(10, 4))
    assert notes(known) == []


def test_the_digests_of_mnist() -> None:
    """The MD5 of the unpacked files, as they are told in many places, each at its own file."""
    form = KNOWN["mnist"].forms[0]
    assert {file.name: file.md5[:8] for file in form.files} == {
        "train-images-idx3-ubyte": "6bbc9ace",
        "train-labels-idx1-ubyte": "a25bea73",
        "t10k-images-idx3-ubyte": "2646ac64",
        "t10k-labels-idx1-ubyte": "27ae3e4e",
    }


# -- what is missing, and bringing it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KNOWN, "emnist"])
def test_missing_names_files_places_and_the_remedy(root: Path, name: str) -> None:
    data = dataset(name)
    told = data.missing()
    assert told is not None
    form = data.known.forms[0]
    for part in (
        f"siv data fetch {name}",
        str(root),
        *(file.name for file in form.files),
        *filter(None, form.folders),
        form.archive,
    ):
        assert part in told
    with pytest.raises(UserError, match="not at hand"):
        data.prepare(quiet)


def test_missing_tells_what_is_there(root: Path) -> None:
    files = mnist_files()
    del files["t10k-labels-idx1-ubyte"]
    write(root / "MNIST" / "raw", files)
    assert f"{root}/MNIST/raw has not all of its files: t10k-labels-idx1-ubyte is missing" in dataset("mnist").missing()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """(the folder that a real server on this machine gives, its address)."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


def test_fetch_brings_the_files(site: tuple[Path, str], root: Path) -> None:
    folder, url = site
    files = mnist_files()
    known = as_published(files, content=True)
    known = evolve(known, forms=(evolve(known.forms[0], url=url),))
    write(folder, gz(files))
    data = sets.PublishedSet(known, sets.SetConfig())
    data.fetch(quiet)
    assert sorted(path.name for path in (root / "mnist").iterdir()) == sorted(gz(files))
    assert data.missing() is None
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"another")
    data.fetch(quiet)  # what is there is not asked for again
    (root / "mnist" / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"what came has the MD5 .* nothing was kept"):
        data.fetch(quiet)
    assert not (root / "mnist" / "train-images-idx3-ubyte.gz").exists()


def test_fetch_brings_an_archive(site: tuple[Path, str], root: Path) -> None:
    folder, url = site
    path = tar_gz(folder / "cifar-10-python.tar.gz", "cifar-10-batches-py", cifar10_files())
    form = evolve(KNOWN["cifar10"].forms[0], url=url, md5=md5(path.read_bytes()))
    data = sets.PublishedSet(evolve(KNOWN["cifar10"], forms=(form,)), sets.SetConfig())
    data.fetch(quiet)
    data.prepare(quiet)
    check_split(data, COLOUR)


def test_addresses_and_digests_are_of_the_right_form() -> None:
    for known in (*sets.SETS, *map(sets.emnist, sets.EMNIST)):
        first = known.forms[0]
        assert all(form.url.startswith("http") and form.url.endswith("/") for form in known.forms)
        digests = [first.md5] if first.archive else [file.packed or file.md5 for file in first.files]
        assert all(len(digest) == 32 and int(digest, 16) for digest in digests), known.name
        assert len(set(digests)) == len(digests)


# -- files that are not what they say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("train-images-idx3-ubyte", lambda data: data[:-5], r"breaks off: \[10, 28, 28\] values take 7,856 bytes, it has 7,851"),
        ("train-images-idx3-ubyte", lambda data: data[:9], "breaks off: 9 bytes, its header alone has 16"),
        ("train-images-idx3-ubyte", lambda data: data + b"\0", "does not end where it should"),
        ("train-images-idx3-ubyte", lambda data: b"", "an empty file"),
        (
            "train-images-idx3-ubyte",
            lambda data: b"\x89PNG" + data[4:],
            "begins with the bytes 89 50 4e 47, not with 00 00 08 03",
        ),
        ("train-images-idx3-ubyte", lambda data: b"\0\0\x0d\3" + data[4:], "begins with the bytes 00 00 0d 03"),
        ("train-images-idx3-ubyte", lambda data: gzip.compress(data)[:-12], "breaks off: unpacked it has|cannot be unpacked"),
        ("train-images-idx3-ubyte", lambda data: gzip.compress(data)[:20] + bytes(99), "cannot be unpacked|breaks off"),
        ("t10k-labels-idx1-ubyte", lambda data: idx_of(LABELS[:3]), "its part 'held_out' has 4 images and 3 of 'digit'"),
        ("t10k-labels-idx1-ubyte", lambda data: idx_of(LABELS[10:] + np.uint8(9)), "goes from 9 to 12, 0 … 9 are known"),
        ("train-images-idx3-ubyte", lambda data: idx_of(GREY[:10, :20, :20].copy()), r"are \[1, 20, 20\], those of MNIST"),
        ("t10k-images-idx3-ubyte", lambda data: idx_of(GREY[:0]), "there are no images in its part 'held_out'"),
    ],
)
def test_idx_files_that_are_not_what_they_say(root: Path, name: str, change: Any, words: str) -> None:
    files = mnist_files()
    write(root / "mnist", {**files, name: change(files[name])})
    data = dataset("mnist")
    with pytest.raises(UserError, match=words) as caught:
        data.prepare(quiet)
    assert str(root / "mnist") in str(caught.value)
    assert "siv data fetch mnist" in str(caught.value)
    assert not data.path.exists()


def test_all_that_is_wrong_is_told_at_once(root: Path) -> None:
    write(root / "mnist", {name: data[:-1] for name, data in mnist_files().items()})
    with pytest.raises(UserError) as caught:
        dataset("mnist").prepare(quiet)
    assert len(caught.value.problems) == 4


def test_what_gzip_makes_too_large_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(1 << 22), 9)
    with pytest.raises(ValueError, match="unpacks to more than 1 MiB"):
        archives.inflated(bomb, 1 << 20)
    assert archives.inflated(gzip.compress(b"a") + gzip.compress(b"b"), 2) == b"ab"


def test_an_idx_header_that_announces_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="breaks off"):
        idx.read(bytes((0, 0, 8, 3)) + b"\xff" * 12 + b"\0", 3)


class Harm:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_would_run_something_runs_nothing(root: Path, tmp_path: Path, protocol: int) -> None:
    value = {"data": Harm(tmp_path / "harm"), "labels": [1]}
    harmful = pickle.dumps(value, protocol)
    files = {**cifar10_files(), "data_batch_3": harmful}
    write(root / "cifar-10-batches-py", files)
    with pytest.raises(UserError, match=r"data_batch_3: cannot be read .* asks for posix\.mkdir.* nothing of it was run"):
        dataset("cifar10").prepare(quiet)
    assert not (tmp_path / "harm").exists()
    pickle.loads(harmful)  # the test is one: Python's own unpickler does it
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"cos\nsystem\n(S'echo'\ntR.", "asks for os.system"),
        (b"(S'echo'\nios\nsystem\n.", "asks for what plain data does not need: INST"),
        (b"(cos\nsystem\nS'echo'\no.", "asks for os.system"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "asks for what plain data does not need: NEWOBJ"),
        (b"\x80\x02\x82\x01.", "asks for what plain data does not need: EXT1"),
        (b"P1\n.", "asks for what plain data does not need: PERSID"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "calls numpy ndarray"),
        (b"\x80\x02cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.", "holds an array of 'O'"),
        (b"\x80\x02}q\x00cnumpy\nndarray\n}b.", "gives a state to something that is no array"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00rot_13\x86R.", "bytes are not written as Python"),
        (b"\x80\x02K\x01", "breaks off|pickle exhausted"),
        (b"\x80\x02e.", "do not fit each other"),
        (b"\x80\x02h\x07.", "do not fit each other"),
        (b"\x80\x02K\x01K\x02a.", "a int stands where a list is needed"),
        (b"", "breaks off|pickle exhausted"),
        (b"\xff\xff", "unknown|breaks off"),
    ],
)
def test_the_pickle_reader_follows_plain_data_alone(program: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plain_pickle.read(program)


def test_the_pickle_reader_reads_what_python_wrote() -> None:
    value = {b"a": [1, -5, 2**40, True, None, (1,), (1, 2), (1, 2, 3, 4), "ü", 0.5][:9], "b": {"c": []}, "e": b"\xff\0" * 300}
    value["array"] = np.asfortranarray(RNG.integers(0, 256, (3, 5), dtype=np.uint8))
    for protocol in range(5):
        got = plain_pickle.read(pickle.dumps(value, protocol))
        assert np.array_equal(got.pop("array"), value["array"])
        assert got == {"a": value[b"a"], "b": value["b"], "e": value["e"]}


def test_a_text_that_is_made_into_bytes_again_and_again_takes_no_memory() -> None:
    text = b"X" + struct.pack("<I", 1000) + b"a" * 1000 + b"q\x00"
    again = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    with pytest.raises(ValueError, match="bytes are not written as Python writes them"):
        plain_pickle.read(b"\x80\x02" + text + again * 100 + b".")


def test_damaged_pickles_are_value_errors() -> None:
    good = bytearray(pickled(batch(slice(0, 2), {b"labels": LABELS}), "2"))
    rng = np.random.default_rng(3)
    for cut in range(0, len(good), 211):
        with pytest.raises(ValueError):  # noqa: PT011
            plain_pickle.read(bytes(good[:cut]))
    refused = 0
    for _ in range(300):
        damaged = bytearray(good)
        damaged[int(rng.integers(min(300, len(good))))] = int(rng.integers(256))
        try:
            plain_pickle.read(bytes(damaged))
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({b"labels": [1]}, "its part 'train' has 10 images and 9 of 'label'"),
        ({b"labels": b"no"}, "holds no list of whole numbers 'labels'"),
        ({b"labels": [1, b"x"]}, "holds no list of whole numbers 'labels'"),
        ({b"data": b"bytes"}, "holds no dictionary with an array 'data'"),
        ({b"data": np.zeros((2, 3073), np.uint8)}, r"its images are \[2, 3073\]"),
        ({b"labels": [1, 99]}, "goes from 0 to 99|goes from 1 to 99"),
    ],
)
def test_cifar_batches_that_are_not_what_they_say(root: Path, change: dict[bytes, Any], words: str) -> None:
    wrong = pickled({**batch(slice(2, 4), {b"labels": LABELS}), **change}, "python2")
    write(root / "cifar-10-batches-py", {**cifar10_files(), "data_batch_2": wrong})
    with pytest.raises(UserError, match=words):
        dataset("cifar10").prepare(quiet)


def test_other_files_that_are_not_what_they_say(root: Path) -> None:
    write(root / "cifar-10-batches-bin", {**cifar10_binary(), "data_batch_1.bin": b"\1" * 3000})
    with pytest.raises(UserError, match="3,000 bytes, which is no number of whole records of 3,073"):
        dataset("cifar10").prepare(quiet)
    write(root / "svhn", {**svhn_files(), "test_32x32.mat": b"MATLAB 5.0"})
    with pytest.raises(UserError, match=r"test_32x32.mat: cannot be read as SVHN's test_32x32.mat: it has no header"):
        dataset("svhn").prepare(quiet)
    write(root / "svhn", {**svhn_files(), "test_32x32.mat": mat_of(X=np.zeros((3, 3)), y=np.zeros((3, 1), np.uint8))})
    with pytest.raises(UserError, match=r"its X is \[3, 3\]; X \[32, 32, 3, n\]"):
        dataset("svhn").prepare(quiet)


def test_archives_that_are_not_what_they_say(root: Path) -> None:
    path = tar_gz(root / "cifar-10-python.tar.gz", "cifar-10-batches-py", {"data_batch_1": b"x"})
    with pytest.raises(UserError, match="data_batch_1: cannot be read as CIFAR-10's"):
        dataset("cifar10").prepare(quiet)
    few = dict(list(cifar10_files().items())[:3])
    tar_gz(path, "cifar-10-batches-py", few)
    with pytest.raises(UserError, match="data_batch_4 is not in it"):
        dataset("cifar10").prepare(quiet)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"cannot be read as a tar\.gz archive"):
        dataset("cifar10").prepare(quiet)
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="no regular file inside the archive"):
        dataset("cifar10").prepare(quiet)
    write(root / "emnist", {"gzip.zip": b"PK no archive"})
    with pytest.raises(UserError, match="cannot be read as a zip archive"):
        dataset("emnist").prepare(quiet)


def test_a_prepared_file_of_something_else_is_refused(root: Path) -> None:
    write(root / "mnist", mnist_files())
    path = prepared("mnist").path
    path.unlink()
    columns = {"labels": np.zeros(4, np.int64), "split": np.array([0, 0, 1, 1], np.uint8)}
    produce = lambda numbers: ((n, np.zeros((4, 1, 5, 5), np.uint8)) for n in numbers)  # noqa: E731
    datafile.write(path, shape=(4, 1, 5, 5), block=4, produce=produce, progress=quiet, source="x", **columns)
    with pytest.raises(UserError, match=r"mnist\.h5: holds other images than MNIST; remove it"):
        dataset("mnist").rows("train")


def test_an_interrupted_preparation_leaves_nothing_under_its_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root / "mnist", mnist_files())
    monkeypatch.setattr(sets, "BLOCK_BYTES", 4 * 784)
    whole = prepared("mnist").path.read_bytes()
    (root / "mnist" / "mnist.h5").unlink()

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("preparing") and done == 2:
            raise Stopped(15)

    data = dataset("mnist")
    with pytest.raises(Stopped):
        data.prepare(stop)
    assert not data.path.exists()
    data.prepare(quiet)
    assert data.path.read_bytes() == whole
    check_split(data, GREY[:, None])


# -- the commands ----------------------------------------------------------------------------------------------------------------


def test_check_of_a_folder(root: Path) -> None:
    folder = write(root / "FashionMNIST" / "raw", gz(mnist_files()))
    for path in (folder, folder.parent):
        report = cli_data.checked(path, quiet)
        assert report["problems"] == []
        assert report["kind"] == "files of FashionMNIST"
        assert [(line["name"], line["shape"]) for line in report["datasets"]][:2] == [
            ("train-images-idx3-ubyte: images", [10, 1, 28, 28]),
            ("train-labels-idx1-ubyte: label", [10]),
        ]
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"\0\0\x08\x03")
    problems = cli_data.checked(folder, quiet)["problems"]
    assert len(problems) == 2
    assert "breaks off" in problems[0]
    assert problems[1] == f"{folder}: t10k-labels-idx1-ubyte is missing"


def test_check_tells_sets_of_the_same_names_apart_by_digest(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = mnist_files()
    monkeypatch.setattr(sets, "SETS", (evolve(as_published(files, content=True), title="Other"), KNOWN["kmnist"]))
    report = cli_data.checked(write(root / "anything", files), quiet)
    assert report["kind"] == "files of Other"
    assert {line["storage"] for line in report["datasets"]} == {"as published"}


def test_check_of_a_single_file_and_of_archives(root: Path, tmp_path: Path) -> None:
    files = write(tmp_path / "x", {**gz(mnist_files()), **cifar10_files(), **svhn_files()})
    for name, kind in (("train-labels-idx1-ubyte.gz", "MNIST or"), ("test_batch", "CIFAR-10"), ("test_32x32.mat", "SVHN")):
        report = cli_data.checked(files / name, quiet)
        assert report["problems"] == []
        assert kind in report["kind"]
    (files / "test_batch").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    assert "posix.mkdir" in cli_data.checked(files / "test_batch", quiet)["problems"][0]
    assert not (tmp_path / "harm").exists()
    for archive, inside in (
        ("cifar-10-python.tar.gz", "cifar-10-batches-py"),
        ("cifar-10-binary.tar.gz", "cifar-10-batches-bin"),
    ):
        path = tar_gz(root / archive, inside, cifar10_files() if "python" in archive else cifar10_binary())
        report = cli_data.checked(path, quiet)
        assert report["problems"] == []
        assert len(report["datasets"]) == 12
        path.write_bytes(path.read_bytes()[:-4000])
        problems = cli_data.checked(path, quiet)["problems"]
        assert any("tar.gz" in problem for problem in problems)


def test_a_folder_with_a_file_called_train_is_no_cifar(tmp_path: Path) -> None:
    write(tmp_path / "mine", {"train": b"my own"})
    assert published.check(sets.SETS, tmp_path / "mine", quiet) is None
    assert published.check(sets.SETS, tmp_path / "mine" / "train", quiet) is None


RECIPE = """
format = 1
[data]
name = "mnist"
[network]
name = "mlp"
hidden = [8]
[objective]
name = "soft_intro_vae"
[train]
batch = 4
length = "2 steps"
"""


def test_the_commands(siv: Any, root: Path, tmp_path: Path) -> None:
    missing = siv("data", "prepare", "mnist")
    assert missing.returncode == 2
    assert "siv data fetch mnist" in missing.stderr
    write(root / "MNIST" / "raw", gz(mnist_files()))
    listed = {row["name"]: row["state"] for row in json.loads(siv("data", "ls", "--json").stdout)["datasets"]}
    assert listed["mnist"] == "at hand, or made when it is needed"
    assert listed["kmnist"].startswith("the files of KMNIST are not at hand")
    checked = siv("data", "check", root / "MNIST" / "raw")
    assert (checked.returncode, "files of MNIST" in checked.stdout) == (0, True)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = siv("run", "recipe.toml", "--run-dir", "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "MNIST: its part train has 10 images, the published one 60,000" in done.stdout
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())["data"]
    assert len(manifest["notes"]) == 6
    assert manifest["held_out"] == "test part"
