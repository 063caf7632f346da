"""`cars3d` against archives of the original layout with fewer, synthetic cars: real tar.gz, real MAT 5, real HTTP."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import re
import resource
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from siv_plugins import cars3d

from siv_core import UserError
from siv_core.cli import data as cli_data
from siv_core.data import datafile, mat5
from siv_core.errors import Stopped
from siv_core.testing import check_dataset

STEMS = ["car_b", "car_d", "car_a", "car_c"]  # the order of list.txt, which is not that of the names
Members = list[tuple[str, bytes]]
Place = Callable[[bytes], Path]


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def im_of(model: int) -> np.ndarray:
    """[H, W, C, azimuth, elevation]: red tells the row, green the column, blue model and view."""
    side = np.arange(128, dtype=np.uint8)
    im = np.zeros((128, 128, 3, 24, 4), np.uint8)
    im[:, :, 0] = side[:, None, None, None]
    im[:, :, 1] = side[None, :, None, None] * 2
    view = np.arange(24)[:, None] + 24 * np.arange(4)
    im[:, :, 2] = view + 40 * model
    im[30:50, 20:90, 2] = 255  # an edge, so that antialiasing shows
    return im


def mat_of(**variables: np.ndarray) -> bytes:
    file = io.BytesIO()
    savemat(file, variables, do_compression=True)
    return file.getvalue()


@pytest.fixture(scope="module")
def mats() -> dict[str, bytes]:
    mask = np.zeros((128, 128, 24, 4), np.uint8)
    return {stem: mat_of(im=im_of(model), mask=mask) for model, stem in enumerate(STEMS)}


@pytest.fixture(scope="module")
def members(mats: dict[str, bytes]) -> Members:
    """As in the original: other data around the cars, list.txt after the MAT files, macOS's shadow files."""
    cars = [(f"data/cars/{stem}.mat", mats[stem]) for stem in sorted(STEMS)]
    return [
        ("data/sprites/car_x.mat", b"no car"),
        ("data/cars/._car_a.mat", b"shadow"),
        *cars,
        ("data/cars/list.txt", "\n".join(STEMS).encode() + b"\n"),
        ("data/shapes48.mat", b"no car"),
    ]


def tar_gz(members: Members, *extra: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info)
    return file.getvalue()


@pytest.fixture(scope="module")
def archive(members: Members) -> bytes:
    return tar_gz(members)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: bytes) -> Path:
    """The folder cars3d of a data folder of its own, for four models and the digest of their archive."""
    monkeypatch.setenv("SIV_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(cars3d, "MODELS", len(STEMS))
    monkeypatch.setattr(cars3d, "MD5", hashlib.md5(archive).hexdigest())
    folder = tmp_path / "data" / "cars3d"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def place(root: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Put an archive in its place and let its digest be the right one."""

    def put(data: bytes) -> Path:
        monkeypatch.setattr(cars3d, "MD5", hashlib.md5(data).hexdigest())
        (root / cars3d.ARCHIVE).write_bytes(data)
        return root / cars3d.ARCHIVE

    return put


@pytest.fixture
def placed(place: Place, archive: bytes) -> Path:
    return place(archive)


def dataset(size: int = 8, held_out_models: int = 1, split_seed: int = 0, archive: str | Path = "") -> cars3d.Cars3D:
    config = cars3d.Cars3DConfig(size=size, held_out_models=held_out_models, split_seed=split_seed, archive=str(archive))
    return cars3d.build(config)


def prepared(**options: Any) -> cars3d.Cars3D:
    made = dataset(**options)
    made.prepare(quiet)
    return made


def unpack(mats: dict[str, bytes], folder: Path, *, listed: bool = True) -> Path:
    folder.mkdir(parents=True)
    for stem, data in mats.items():
        (folder / f"{stem}.mat").write_bytes(data)
    if listed:
        (folder / "list.txt").write_text("\n".join(STEMS))
    return folder


# ------------------------------------------------------------------------------------------------------------------------------
# What comes out.


def test_spec_of_the_real_set_needs_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cars3d, "MODELS", 183)
    spec = dataset(size=64).spec
    assert (spec.shape, spec.kind, spec.value_range, spec.classes) == ((3, 64, 64), "image", (0.0, 1.0), 183)
    assert list(spec.factors.items()) == [("model", 183), ("elevation", 4), ("azimuth", 24)]


def test_full_size_holds_every_pixel_where_it_belongs(placed: Path) -> None:
    data = prepared(size=128)
    rows = data.rows("train")
    assert rows.x.shape == (4 * 96, 3, 128, 128)
    assert rows.x.dtype == torch.uint8
    assert rows.labels is not None
    assert rows.factors is not None
    images = [im_of(model) for model in range(4)]
    for row, (model, elevation, azimuth) in enumerate(rows.factors.tolist()):
        assert row == (model * 4 + elevation) * 24 + azimuth
        assert rows.labels[row] == model
        for channel in range(3):
            expected = images[model][:, :, channel, azimuth, elevation]
            assert np.array_equal(rows.x[row, channel].numpy(), expected)


def test_smaller_images_are_those_of_pillows_thumbnail(placed: Path) -> None:
    data = prepared(size=64)
    x = data.rows("train").x
    for model, elevation, azimuth in [(0, 0, 0), (1, 3, 23), (3, 2, 5)]:
        picture = Image.fromarray(np.ascontiguousarray(im_of(model)[:, :, :, azimuth, elevation]))
        picture.thumbnail((64, 64), Image.Resampling.LANCZOS)
        assert np.array_equal(x[model * 96 + elevation * 24 + azimuth].permute(1, 2, 0).numpy(), np.asarray(picture))


def test_file_says_where_it_comes_from(placed: Path) -> None:
    data = dataset()
    seen: list[str] = []
    data.prepare(lambda what, done, total: seen.append(what))
    assert any("MD5" in what for what in seen)
    told = datafile.check(data.path)
    assert cars3d.MD5 in told["source"]
    assert "list.txt" in told["source"]
    assert told["factors"] == {"model": 4, "elevation": 4, "azimuth": 24}
    assert data.fingerprint() == told["sha256"] == hashlib.sha256(data.rows("train").x.numpy().tobytes()).hexdigest()


def test_rows_stay_memory_mapped_and_the_prepared_file_is_enough(placed: Path) -> None:
    prepared()
    placed.unlink()
    assert dataset().missing() is None
    data = prepared()
    before = data.path.read_bytes()
    data.rows("train").x[0] = 77  # copy-on-write: never in the file
    assert data.path.read_bytes() == before


# ------------------------------------------------------------------------------------------------------------------------------
# Held-out models.


def test_whole_models_are_held_out_alike_in_every_size(placed: Path) -> None:
    kept = []
    for size in (8, 16):
        data = prepared(size=size, held_out_models=2, split_seed=3)
        train, held_out = data.rows("train"), data.rows("held_out")
        assert len(train) == len(held_out) == 2 * 96
        assert train.labels is not None
        positions = torch.arange(2 * 96)
        both = torch.cat([train.at(positions), held_out.at(positions)])
        assert torch.equal(both.sort().values, torch.arange(4 * 96))
        models = [set(train.labels[split.at(positions)].tolist()) for split in (train, held_out)]
        assert not models[0] & models[1]
        kept.append(models)
    assert kept[0] == kept[1]


def test_choice_is_the_generators_own(placed: Path) -> None:
    prepared()
    for seed in range(5):
        rows = dataset(held_out_models=2, split_seed=seed).rows("held_out")
        assert rows.labels is not None
        expected = np.random.Generator(np.random.PCG64(seed)).choice(4, 2, replace=False)
        assert rows.labels[rows.index].unique().tolist() == sorted(expected.tolist())


def test_data_set_keeps_its_contract(placed: Path) -> None:
    check_dataset(dataset(size=16))


def test_no_split_without_models(placed: Path) -> None:
    prepared()
    with pytest.raises(UserError, match="4 of 4 groups"):
        dataset(held_out_models=4).rows("train")
    with pytest.raises(KeyError):
        dataset().rows("test")


# ------------------------------------------------------------------------------------------------------------------------------
# Where the cars come from.


def test_missing_names_every_remedy(root: Path, tmp_path: Path) -> None:
    sentence = dataset().missing()
    assert sentence is not None
    for part in ("siv data fetch cars3d", cars3d.ARCHIVE, str(root), "--profile rendered", "rendered_cars", cars3d.MD5):
        assert part in sentence
    elsewhere = dataset(archive=tmp_path / "nowhere").missing()
    assert elsewhere is not None
    assert "nowhere" in elsewhere
    with pytest.raises(UserError, match="not at hand"):
        dataset().prepare(quiet)


@pytest.mark.parametrize("inside", [".", "cars", "data/cars"])
def test_unpacked_folders_give_the_archives_images(
    inside: str, mats: dict[str, bytes], archive: bytes, root: Path, tmp_path: Path, place: Place
) -> None:
    unpack(mats, tmp_path / "mine" / inside)
    data = dataset(archive=tmp_path / "mine")
    assert data.missing() is None
    data.prepare(quiet)
    digest = data.fingerprint()
    assert "unknown digest" in datafile.read(data.path).source
    data.path.unlink()
    place(archive)
    dataset().prepare(quiet)
    assert dataset().fingerprint() == digest


def test_without_list_names_are_sorted_and_the_source_warns(mats: dict[str, bytes], root: Path) -> None:
    unpack(mats, root / "cars", listed=False)
    data = prepared()
    assert "WARNING: no list.txt" in datafile.read(data.path).source
    x = data.rows("train").x
    blue = [int(x[model * 96, 2, 0, 0]) for model in range(4)]
    assert blue == [40 * STEMS.index(stem) for stem in sorted(STEMS)]


def test_archive_of_another_digest_is_refused(root: Path, archive: bytes) -> None:
    (root / cars3d.ARCHIVE).write_bytes(archive + b"\0")
    with pytest.raises(UserError) as caught:
        dataset().prepare(quiet)
    assert cars3d.MD5 in str(caught.value)
    assert hashlib.md5(archive + b"\0").hexdigest() in str(caught.value)
    assert not dataset().path.exists()


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    "info",
    [
        link("data/cars/car_e.mat", tarfile.SYMTYPE),
        link("data/cars/car_e.mat", tarfile.LNKTYPE),
        link("data/cars/car_e.mat", tarfile.CHRTYPE),
        link("data/cars/car_e.mat", tarfile.FIFOTYPE),
        tarfile.TarInfo("data/../../cars/car_e.mat"),
        tarfile.TarInfo("/data/cars/car_e.mat"),
    ],
)
def test_archive_with_odd_members_is_refused(info: tarfile.TarInfo, place: Place, members: Members) -> None:
    place(tar_gz(members, info))
    with pytest.raises(UserError, match="no regular file inside the archive"):
        dataset().prepare(quiet)


def test_damaged_archives_are_refused(place: Place, archive: bytes, members: Members) -> None:
    place(b"not an archive at all")
    with pytest.raises(UserError, match=r"cannot be read as a tar\.gz"):
        dataset().prepare(quiet)
    place(archive[: len(archive) // 2])  # tarfile takes a stream that breaks off between members for a whole one
    with pytest.raises(UserError, match=r"cannot be read|different models in \d entries, there are 4"):
        dataset().prepare(quiet)
    place(tar_gz([*members, *members]))
    with pytest.raises(UserError, match=r"car_a\.mat is in it more than once"):
        dataset().prepare(quiet)


def test_size_limits(
    place: Place, archive: bytes, mats: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(archive)
    folder = unpack(mats, tmp_path / "cars")
    largest = max(len(mat) for mat in mats.values())
    monkeypatch.setattr(cars3d, "MOST_IN_ALL_FILES", 2 * largest)
    with pytest.raises(UserError, match="unpacked"):
        dataset().prepare(quiet)
    monkeypatch.setattr(cars3d, "MOST_IN_A_FILE", largest - 1)
    for source in ("", folder):
        with pytest.raises(UserError, match=r"car_.\.mat: has"):
            dataset(archive=source).prepare(quiet)


def test_missing_and_surplus_cars_are_told_together(mats: dict[str, bytes], root: Path) -> None:
    folder = unpack(mats, root / "cars")
    (folder / "car_a.mat").unlink()
    (folder / "car_c.mat").unlink()
    with pytest.raises(UserError) as caught:
        dataset().prepare(quiet)
    assert [problem.split(": ")[1] for problem in caught.value.problems] == ["car_a.mat is missing", "car_c.mat is missing"]
    (folder / "list.txt").write_text("car_b\ncar_b\ncar_d\n")
    with pytest.raises(UserError, match="2 different models in 3 entries, there are 4"):
        dataset().prepare(quiet)


def test_cars_of_another_form_are_told_together(mats: dict[str, bytes], root: Path) -> None:
    folder = unpack(mats, root / "cars")
    (folder / "car_a.mat").write_bytes(mat_of(im=np.zeros((128, 128, 3, 4, 24), np.uint8)))
    (folder / "car_b.mat").write_bytes(b"\0" * 200)
    (folder / "car_c.mat").write_bytes(mat_of(picture=np.zeros(3)))
    with pytest.raises(UserError) as caught:
        dataset().prepare(quiet)
    told = sorted(caught.value.problems)
    assert len(told) == 3
    assert "car_a.mat: 'im' is uint8 [128, 128, 3, 4, 24]" in told[0]
    assert "car_b.mat: cannot be read as a MAT 5" in told[1]
    assert "car_c.mat: cannot be read as a MAT 5 file with a variable 'im'" in told[2]
    assert not dataset().path.exists()
    for stem in ("car_a", "car_b", "car_c"):
        (folder / f"{stem}.mat").write_bytes(mats[stem])
    starts: list[int] = []
    dataset().prepare(lambda what, done, total: starts.append(done) if what.startswith("preparing") else None)
    assert starts[0] == 1  # the good one was kept


def test_wrong_type_is_told() -> None:
    with pytest.raises(UserError, match=r"'im' is of another type \[128, 128, 3, 24, 4\], it should be uint8"):
        cars3d.views_of(mat_of(im=np.zeros((128, 128, 3, 24, 4), np.int8)), 64)


def test_interrupted_preparation_goes_on(placed: Path) -> None:
    data = prepared(size=16)
    whole = data.path.read_bytes()
    data.path.unlink()

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("preparing") and done == 2:
            raise Stopped(15)

    with pytest.raises(Stopped):
        data.prepare(stop)
    assert not data.path.exists()
    done_before: list[int] = []
    data.prepare(lambda what, done, total: done_before.append(done) if what.startswith("preparing") else None)
    assert done_before == [2, 3, 4]
    assert data.path.read_bytes() == whole


def test_prepared_file_of_another_shape_is_refused(root: Path) -> None:
    with h5py.File(root / "cars3d_8.h5", "w") as file:
        file.create_dataset("images", data=np.zeros((5, 3, 8, 8), np.uint8))
        file.attrs.update({"format": 1, "source": "x", "sha256": "x", "value_range": (0.0, 1.0), "complete": True})
    with pytest.raises(UserError, match="is not Cars3D"):
        dataset().rows("train")


# ------------------------------------------------------------------------------------------------------------------------------
# Download.


class Site:
    """A real server on this machine; `body` is what it gives, in place of as many bytes as it had at first."""

    def __init__(self, body: bytes) -> None:
        self.body, self.status, self.asked = body, 200, 0
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked += 1
                self.send_response(site.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(site.body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def site(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(archive)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(cars3d, "URL", f"http://127.0.0.1:{site.server.server_port}/{cars3d.ARCHIVE}")
    yield site
    site.close()


def test_fetch_brings_what_prepare_needs_and_only_once(site: Site, root: Path, archive: bytes) -> None:
    (root / cars3d.ARCHIVE).write_bytes(archive[:100])  # a damaged one is replaced
    data, told = dataset(), []
    data.fetch(lambda what, done, total: told.append((done, total)))
    assert (root / cars3d.ARCHIVE).read_bytes() == archive
    assert [path.name for path in root.iterdir()] == [cars3d.ARCHIVE]
    assert told[-1] == (len(archive) // 1024, len(archive) // 1024)
    data.fetch(quiet)
    assert site.asked == 1
    assert data.missing() is None
    data.prepare(quiet)


def test_fetch_keeps_nothing_of_a_wrong_digest(site: Site, root: Path) -> None:
    site.body = site.body[:-1] + b"\1"
    with pytest.raises(UserError) as caught:
        dataset().fetch(quiet)
    assert cars3d.MD5 in str(caught.value)
    assert hashlib.md5(site.body).hexdigest() in str(caught.value)
    assert list(root.iterdir()) == []


def test_fetch_keeps_nothing_of_a_broken_or_refused_download(site: Site, root: Path) -> None:
    site.body = site.body[: len(site.body) // 2]
    with pytest.raises(UserError, match=r"has the MD5|cannot be fetched"):
        dataset().fetch(quiet)
    site.status = 404
    with pytest.raises(UserError, match="cannot be fetched"):
        dataset().fetch(quiet)
    assert list(root.iterdir()) == []


def test_fetch_ends_when_stopped_or_too_large(site: Site, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise Stopped(2)

    with pytest.raises(Stopped):
        dataset().fetch(stop)
    monkeypatch.setattr(cars3d, "MOST_DOWNLOADED", 1000)
    with pytest.raises(UserError, match="offers more"):
        dataset().fetch(quiet)
    assert list(root.iterdir()) == []


def test_fetch_without_a_server_is_told(site: Site, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cars3d, "URL", "http://127.0.0.1:9/nothing")
    with pytest.raises(UserError, match="elsewhere and put it"):
        dataset().fetch(quiet)


def test_listing_plugins_needs_neither_torch_nor_scipy() -> None:
    heavy = ("torch", "scipy", "PIL")
    code = f"import sys; from siv_plugins import cars3d; cars3d.siv_components(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------------------------
# What `siv data check` tells, and files that are out to do harm.


def test_check_of_the_original_finds_nothing(placed: Path) -> None:
    report = cli_data.checked(placed, quiet)
    told = {"kind": "Cars3D, archive", "list.txt": True, "cars": 4, "readable": 4, "expected": 4, "problems": []}
    assert report.items() >= told.items()
    assert list(placed.parent.iterdir()) == [placed]


def test_check_tells_everything_at_once(place: Place, members: Members, mats: dict[str, bytes], root: Path) -> None:
    damaged = [(name, b"\0" * 300 if name.endswith("car_d.mat") else data) for name, data in members if "car_a" not in name]
    path = place(tar_gz(damaged))
    path.write_bytes(path.read_bytes() + b"\0")
    report = cli_data.checked(path, quiet)
    told = [problem.removeprefix(f"{path}: ") for problem in report["problems"]]
    assert (report["cars"], report["readable"], report["expected"]) == (3, 2, 4)
    assert told[0].startswith("its MD5 is ")
    assert told[1].startswith("car_d.mat: cannot be read as a MAT 5 file")
    assert told[2:] == ["car_a.mat is missing"]
    folder = unpack({stem: mats[stem] for stem in STEMS[:2]}, root / "mine" / "cars", listed=False)
    report = cli_data.checked(folder.parent, quiet)
    assert (report["kind"], report["readable"]) == ("Cars3D, unpacked", 2)
    assert report["problems"] == [f"{folder}: has MAT files of 2 different models in 2 entries, there are 4"]


def test_check_of_a_damaged_archive(tmp_path: Path, archive: bytes) -> None:
    path = tmp_path / "some.tar.gz"
    for data, words in (
        (b"no archive", "cannot be read as a tar.gz archive"),
        (archive[: len(archive) // 2], "cannot be read as a tar.gz archive|different models in"),
        (gzip.compress(bytes(200 << 20), 1), "cannot be read as a tar.gz archive|there are 4"),
    ):
        path.write_bytes(data)
        problems = "\n".join(cli_data.checked(path, quiet)["problems"])
        assert re.search(words, problems)


def bomb(kind: bytes, size: int) -> bytes:
    """A header of this kind that announces `size` bytes, and some of them."""
    info = tarfile.TarInfo("data/cars/car_a.mat")
    info.type = kind
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size % (1 << 88)).to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return gzip.compress(bytes(head) + bytes(1 << 20))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("size", [1 << 40, 1 << 31, -512])
def test_sizes_that_do_not_fit_memory_are_told_before_it_is_taken(tmp_path: Path, kind: bytes, size: int) -> None:
    (tmp_path / "some.tar.gz").write_bytes(bomb(kind, size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = "\n".join(cli_data.checked(tmp_path / "some.tar.gz", quiet)["problems"])
    assert re.search("cannot be read as a tar.gz archive|different models in . entries, there are 4", problems)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


def test_cars_that_are_no_files_are_told_of(mats: dict[str, bytes], root: Path) -> None:
    folder = unpack({stem: mats[stem] for stem in STEMS[2:]}, root / "cars")
    (folder / "car_b.mat").mkdir()
    os.mkfifo(folder / "car_d.mat")
    with pytest.raises(UserError, match=r"car_b.mat: is no regular file"):
        dataset().prepare(quiet)
    report = cli_data.checked(root, quiet)
    assert report["readable"] < 4
    assert any("is no regular file" in problem for problem in report["problems"])
    (folder / "list.txt").unlink()
    (folder / "list.txt").mkdir()
    with pytest.raises(UserError, match=r"list.txt: is no regular file"):
        dataset().prepare(quiet)


def test_a_car_of_a_huge_form_is_refused_before_memory_is_taken() -> None:
    mat = bytearray(mat_of(im=np.zeros((128, 128), np.uint8)))
    plain = io.BytesIO()
    savemat(plain, {"im": np.zeros((128, 128), np.uint8)})
    data = plain.getvalue().replace((128).to_bytes(4, "little") * 2, (1 << 30).to_bytes(4, "little") * 2)
    assert data != plain.getvalue()
    with pytest.raises(UserError, match=r"'im' is of another type \[1073741824, 1073741824\], it should be"):
        cars3d.views_of(data, 64)
    with pytest.raises(UserError, match=r"cannot be read as a MAT 5"):
        cars3d.views_of(bytes(mat[: len(mat) // 2]), 64)


def test_mat_files_are_read_as_scipy_reads_them() -> None:
    rng = np.random.default_rng(0)
    for compressed in (False, True):
        for shape in ((5, 7), (1, 1), (2, 3, 4, 5, 6)):
            im, file = rng.integers(0, 256, shape, dtype=np.uint8), io.BytesIO()
            savemat(file, {"a": np.arange(3.0), "some words": "x", "im": im, "z": im[:1]}, do_compression=compressed)
            got_shape, got = mat5.read_uint8(file.getvalue(), "im", 1 << 20)
            assert got_shape == shape
            assert (got == im).all()
            for cut in range(0, len(file.getvalue()) - 1, 97):
                with contextlib.suppress(ValueError):
                    mat5.read_uint8(file.getvalue()[:cut], "im", 1 << 20)


def test_a_bomb_in_a_mat_file_is_not_inflated() -> None:
    bomb = zlib.compress(bytes(100 << 20), 1)
    mat = b" " * 124 + b"\x00\x01IM" + struct.pack("<II", 15, len(bomb)) + bomb
    with pytest.raises(UserError, match="a variable has more than 64 MiB"):
        cars3d.views_of(mat, 64)
