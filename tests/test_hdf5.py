"""Data set `hdf5`: other people's files, converted once; never written to, never trusted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import crash
import h5py
import numpy as np
import pytest
import torch
from siv_plugins import hdf5 as plugin

from siv_core.data import datafile, feed
from siv_core.data import hdf5 as reader
from siv_core.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (300, 3, 4, 6), dtype=np.uint8)  # more than one block of a conversion


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def hdf5(catalogue, tmp_path, monkeypatch):
    """`hdf5(arrays, **options)`: the data set over a real file with these arrays, in a data folder of its own."""
    monkeypatch.setenv("SIV_DATA", str(tmp_path / "data"))
    component = catalogue.get("dataset", "hdf5")

    def make(arrays: dict[str, Any] | None = None, **options: Any) -> Any:
        path = tmp_path / "own.h5"
        if arrays is not None:
            with h5py.File(path, "w") as file:
                for name, array in arrays.items():
                    file[name] = array
        return component.build(component.config(**{"path": str(path), **options}))

    return make


def prepared(data: Any) -> Any:
    assert data.missing() is None
    data.prepare(quiet)
    return data


def stored(data: Any) -> np.ndarray:
    return data.rows("train").x.numpy()


@pytest.mark.parametrize(
    ("array", "layout", "expected"),
    [
        (IMAGES, "NCHW", IMAGES),
        (IMAGES.transpose(0, 2, 3, 1), "NHWC", IMAGES),
        (IMAGES[:, 0], "NHW", IMAGES[:, :1]),
        (IMAGES / np.float32(255), "NCHW", IMAGES),
        (IMAGES / np.float64(255), "NCHW", IMAGES),
        ((IMAGES / np.float64(255)).astype(np.float16), "NCHW", IMAGES),
    ],
)
def test_layouts_and_types(hdf5, array, layout, expected):
    data = prepared(hdf5({"images": array}, layout=layout))
    assert (stored(data) == expected).all()
    assert data.spec.shape == expected.shape[1:]
    assert data.spec.value_range == (0.0, 1.0)
    assert data.spec.classes is None


def test_names_of_the_data_sets(hdf5):
    data = prepared(hdf5({"x/train": IMAGES, "y": np.arange(300)[:, None] % 7}, images="x/train", labels="y"))
    assert (stored(data) == IMAGES).all()
    assert data.spec.classes == 7
    assert data.rows("train").labels.tolist() == [i % 7 for i in range(300)]


def test_a_conversion_is_made_once_and_again_after_a_change(hdf5, tmp_path):
    first = prepared(hdf5({"images": IMAGES}))
    path, made = first.path, first.path.stat().st_mtime_ns
    again = prepared(hdf5())
    assert again.path == path
    assert path.stat().st_mtime_ns == made
    assert prepared(hdf5(size=2)).path == path
    assert (stored(first) == IMAGES).all()
    with h5py.File(tmp_path / "own.h5", "r+") as file:
        file["images"][0] = 255 - IMAGES[0]
    os.utime(tmp_path / "own.h5", ns=(1, 1))
    changed = prepared(hdf5())
    assert changed.path != path
    assert changed.fingerprint() != first.fingerprint()
    assert (stored(changed)[0] == 255 - IMAGES[0]).all()


def test_the_file_itself_is_never_written_to(hdf5, tmp_path):
    data = hdf5({"images": IMAGES / np.float32(255)})
    before = (tmp_path / "own.h5").read_bytes()
    prepared(data).rows("train")
    assert (tmp_path / "own.h5").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "own.h5"]


def test_a_file_of_format_1_is_read_in_place(hdf5, tmp_path):
    datafile.write(
        tmp_path / "own.h5", shape=IMAGES.shape, block=100, source="x", progress=quiet,
        produce=lambda numbers: ((i, IMAGES[i * 100 : (i + 1) * 100]) for i in numbers),
        labels=np.arange(300) % 5, split=(np.arange(300) < 20).astype(np.uint8),
        factors=np.arange(300)[:, None] % 4, factor_sizes={"corner": 4},
    )  # fmt: skip
    data = prepared(hdf5())
    assert data.path == tmp_path / "own.h5"
    assert not (tmp_path / "data").exists()
    assert (data.spec.classes, dict(data.spec.factors)) == (5, {"corner": 4})
    assert data.rows("held_out").index.tolist() == list(range(20))
    assert data.rows("train").index.tolist() == list(range(20, 300))
    assert data.rows("train").factors[:, 0].tolist() == [i % 4 for i in range(300)]


@pytest.mark.parametrize(("share", "count"), [(0.1, 30), (0.001, 1), (0.999, 299), (0.5, 150)])
def test_held_out_share(hdf5, share, count):
    data = prepared(hdf5({"images": IMAGES}, held_out=share))
    train, held_out = data.rows("train").index.tolist(), data.rows("held_out").index.tolist()
    assert len(held_out) == count
    assert sorted(train + held_out) == list(range(300))
    other = prepared(hdf5(held_out=share, split_seed=1))
    assert other.rows("held_out").index.tolist() != held_out


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_both_splits_of_a_tiny_file_have_images(hdf5, share):
    data = prepared(hdf5({"images": IMAGES[:2]}, held_out=share))
    assert (len(data.rows("train")), len(data.rows("held_out"))) == (1, 1)


def test_a_single_image_cannot_be_split(hdf5):
    data = prepared(hdf5({"images": IMAGES[:1]}))
    with pytest.raises(UserError, match="no image is in the split 'held_out', of 1 in all"):
        data.rows("held_out")


def test_smaller_sizes_are_area_means(hdf5):
    square = RNG.integers(0, 256, (20, 1, 4, 4), dtype=np.uint8)
    data = prepared(hdf5({"images": square}, size=2))
    assert data.spec.shape == (1, 2, 2)
    x = feed.images(data.rows("train"), torch.arange(3), data.spec)
    chosen = square[data.rows("train").index[:3]]
    expected = chosen.reshape(3, 1, 2, 2, 2, 2).mean(axis=(3, 5)) / 255
    assert np.allclose(x.numpy(), expected, atol=1e-6)
    with pytest.raises(UserError, match=r"data.size: 8 is more than the 4 × 4 pixels"):
        _ = hdf5(size=8).spec


def test_the_spec_is_known_before_the_conversion(hdf5):
    data = hdf5({"images": IMAGES.transpose(0, 2, 3, 1), "labels": np.arange(300) % 3}, layout="NHWC")
    assert data.spec.shape == (3, 4, 6)
    before = data.spec
    data.prepare(quiet)
    assert data.spec == before
    assert data.spec.classes == 3


def test_an_interrupted_conversion_goes_on(hdf5):
    data = hdf5({"images": IMAGES})

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.prepare(interrupt)
    assert not data.path.exists()
    [journal] = data.path.parent.glob("*.partial.json")
    assert json.loads(journal.read_text())["done"] == [0]
    assert (stored(prepared(hdf5())) == IMAGES).all()


def bad(value: float) -> np.ndarray:
    array = np.full((300, 1, 2, 2), 0.5, np.float32)
    array[260, 0, 1, 1] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    [
        ({"images": IMAGES}, {"layout": "NHW"}, r"the shape \[300, 3, 4, 6\], and data.layout = 'NHW' does not fit it"),
        ({"images": IMAGES}, {"layout": "NCWW"}, "does not fit it; such as NCHW"),
        ({"images": np.zeros((9, 8, 8, 8), np.uint8)}, {}, "which axis is which cannot be told; set data.layout, such as NCHW"),
        ({"images": IMAGES[0, 0]}, {}, r"must be images \[N, C, H, W\]"),
        (
            {"images": IMAGES.astype(np.int32)},
            {},
            r"is int32, which has no agreed range: its values go from 0 to 255; .* data.value_range = \[0, 255\]",
        ),
        ({"images": IMAGES[:0]}, {}, "not empty"),
        (
            {"images": bad(1.5)},
            {},
            r"outside \[0, 1\] or no numbers: its values go from 0.5 to 1.5; .*value_range = \[0.5, 1.5\]",
        ),
        ({"images": bad(-0.1)}, {}, r"outside \[0, 1\]"),
        ({"images": bad(float("nan"))}, {}, "or no numbers"),
        ({"images": bad(float("inf"))}, {}, "or no numbers"),
        ({"pictures": IMAGES}, {}, "has no data set 'images'; it has: pictures"),
        (
            {"images": IMAGES, "labels": np.arange(299)},
            {},
            r"has 300 images, 'labels' 299 rows: as many are needed; data.labels = \"\" goes on without",
        ),
        (
            {"images": IMAGES, "labels": np.arange(300) - 1},
            {},
            r"'labels' must be whole numbers from 0 on and below 1,000,000, one for each image; it is .*data.labels = \"\"",
        ),
        ({"images": IMAGES, "labels": np.full(300, 2**62)}, {}, r"below 1,000,000"),
        (
            {"images": IMAGES, "labels": np.arange(300) / 2},
            {},
            r"'labels' must be whole numbers from 0 on and below 1,000,000, one for each image; it is .*data.labels = \"\"",
        ),
    ],
)
def test_what_cannot_be_converted(hdf5, arrays, options, words):
    data = hdf5(arrays, **options)
    with pytest.raises(UserError, match=words):
        data.prepare(quiet)
    assert not list((data.source.parent / "data").rglob("*.h5"))


def test_what_is_no_file(hdf5, tmp_path):
    data = hdf5()
    assert data.missing() == f"there is no file {tmp_path / 'own.h5'}; set data.path (a relative one is from the working folder)"
    with pytest.raises(UserError, match="there is no file"):
        _ = data.spec
    (tmp_path / "own.h5").write_text("no HDF5")
    with pytest.raises(UserError, match=r"own.h5: cannot be read as an HDF5 file \(.*file signature not found"):
        hdf5().prepare(quiet)


@pytest.mark.parametrize("how", ["data set", "group"])
def test_links_into_other_files_are_not_followed(hdf5, tmp_path, how):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["g/images"] = IMAGES
    data = hdf5({"filler": [0]}, images="g/images" if how == "group" else "images")
    with h5py.File(tmp_path / "own.h5", "r+") as file:
        if how == "group":
            file["g"] = h5py.ExternalLink("secret.h5", "/g")
        else:
            file["images"] = h5py.ExternalLink("secret.h5", "/g/images")
    with pytest.raises(UserError, match="is a link; only data inside the file itself is read"):
        data.prepare(quiet)


def convert(path: str, root: str) -> None:
    os.environ["SIV_DATA"] = root
    plugin.build(plugin.HDF5Config(path=path)).prepare(quiet)


def test_a_conversion_killed_at_any_moment_goes_on(tmp_path):
    """SIV_KILLS sets at how many of the moments before and after each flush and rename."""
    source, images = tmp_path / "own.h5", np.tile(IMAGES, (8, 1, 1, 1))  # ten blocks, so that the journal is written on the way
    with h5py.File(source, "w") as file:
        file.create_dataset("images", data=images, compression="gzip", chunks=(256, 3, 4, 6))
    code, moments = crash.in_child(convert, str(source), str(tmp_path / "whole"))
    assert code == 0
    [whole] = (tmp_path / "whole" / "hdf5").glob("*.h5")
    kills = min(moments, int(os.environ.get("SIV_KILLS", "3")))
    for kill_at in random.Random(0).sample(range(1, moments + 1), kills):
        root = tmp_path / f"root{kill_at}"
        assert crash.in_child(convert, str(source), str(root), kill_at=kill_at)[0] == -signal.SIGKILL
        if (root / "hdf5" / whole.name).exists():
            assert datafile.check(root / "hdf5" / whole.name)["problems"] == []
        assert crash.in_child(convert, str(source), str(root))[0] == 0
        left = {path.name for path in (root / "hdf5").iterdir()} - {whole.name}
        assert left <= {f"{whole.name}.{end}" for end in ("partial", "partial.json", "lock", "from.json")}, f"killed at {kill_at}"
        assert (root / "hdf5" / whole.name).read_bytes() == whole.read_bytes()


# -- files that are out to do harm -----------------------------------------------------------------------------------------------


def hostile(file: h5py.File, how: str) -> None:
    folder = Path(file.filename).parent
    if how == "soft link":
        file["images"] = h5py.SoftLink("/images")  # to itself
    elif how == "soft loop":
        file["a"], file["images"] = h5py.SoftLink("/images"), h5py.SoftLink("/a")
    elif how == "external link":
        file["images"] = h5py.ExternalLink("/etc/passwd", "/x")
    elif how == "hard loop":
        file.create_group("g")["g"] = file["/"]
    elif how == "external storage":
        file.create_dataset("images", (20, 1, 2, 2), np.uint8, external=[("/etc/passwd", 0, 80)])
    elif how == "virtual":
        os.mkfifo(folder / "pipe.h5")  # opening it would wait for ever
        layout = h5py.VirtualLayout((20, 1, 2, 2), np.uint8)
        layout[:] = h5py.VirtualSource(str(folder / "pipe.h5"), "images", (20, 1, 2, 2))
        file.create_virtual_dataset("images", layout)
    else:
        storage(file, how)


def storage(file: h5py.File, how: str) -> None:
    if how == "foreign filter":
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((20, 1, 2, 2))
        plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))  # zstd, which is not here
        space = h5py.h5s.create_simple((20, 1, 2, 2))
        h5py.h5d.create(file.id, b"images", h5py.h5t.NATIVE_UINT8, space, plist)
    elif how == "announced":
        file.create_dataset("images", (1 << 20, 3, 1 << 10, 1 << 10), np.uint8, chunks=(1, 3, 1 << 10, 1 << 10))
        file["images"][7] = 1
    elif how == "nothing written":
        file.create_dataset("images", (1 << 30, 3, 1 << 10, 1 << 10), np.uint8)
    elif how == "terabytes":
        side = (1 << 16) - 1
        images = file.create_dataset("images", (300, 1, side, side), np.uint8, chunks=(1, 1, side, side), compression="gzip")
        for i in range(300):
            images.id.write_direct_chunk((i, 0, 0, 0), zlib.compress(b""))
    elif how == "a huge chunk":
        side = 50_000
        images = file.create_dataset("images", (1, 1, side, side), np.uint8, chunks=(1, 1, side, side), compression="gzip")
        images.id.write_direct_chunk((0, 0, 0, 0), zlib.compress(b""))
    elif how == "a damaged chunk":
        images = file.create_dataset("images", data=IMAGES, chunks=(100, 3, 4, 6), compression="gzip")
        images.id.write_direct_chunk((100, 0, 0, 0), b"no deflate")
    elif how == "strings":
        file["images"] = ["a", "b"]
    elif how == "objects":
        file.create_dataset("images", data=np.zeros((5, 1, 2, 2), [("a", int), ("b", float)]))


HOSTILE = {
    "soft link": "'images' is a link",
    "soft loop": "'images' is a link",
    "external link": "'images' is a link",
    "hard loop": "has no data set 'images'; it has: g",
    "external storage": "'images' lies in other files; only data inside the file itself is read",
    "virtual": "'images' lies in other files",
    "foreign filter": "'images' needs the filter number 32015; only HDF5's own are used",
    "announced": "'images' is announced, but of its 1048576 chunks only 1 were ever written",
    "nothing written": "'images' is announced, but nothing was ever written to it",
    "terabytes": r"making it takes 2,3\d\d\.\d GiB, its disk has [\d.,]+ GiB free",
    "a huge chunk": "an image or a chunk of it takes more memory than there is for reading",
    "a damaged chunk": "cannot be read as an HDF5 file",
    "strings": "'images' must be images .* of numbers",
    "objects": "'images' must be images .* of numbers",
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_files_get_a_sentence(hdf5, tmp_path, monkeypatch, how):
    monkeypatch.setattr(reader, "MEMORY", 1 << 30)
    with h5py.File(tmp_path / "own.h5", "w") as file:
        hostile(file, how)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=HOSTILE[how]):
        hdf5().prepare(quiet)
    assert not list((tmp_path / "data").rglob("*.h5"))
    report = datafile.check(tmp_path / "own.h5")
    assert report["problems"] or how == "terabytes"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "data") == before


def test_a_loop_of_groups_is_told_of(tmp_path):
    with h5py.File(tmp_path / "own.h5", "w") as file:
        hostile(file, "hard loop")
    [problem] = datafile.check(tmp_path / "own.h5")["problems"]
    assert "'g/g' leads back to a group that was listed already" in problem


@pytest.fixture
def started(monkeypatch):
    """Children are started, as they are outside the tests."""
    monkeypatch.setattr(reader, "subprocess", subprocess)


def test_a_child_that_crashes_or_hangs_is_a_sentence(tmp_path, monkeypatch, started):
    path = tmp_path / "own.h5"
    os.mkfifo(path)
    monkeypatch.setattr(reader, "PATIENCE", 2)
    with pytest.raises(UserError, match="HDF5 had no answer in 2 s: is its disk at work"):
        list(reader.ask(path, "look", images="images", labels="labels", factors="factors"))
    crashing = tmp_path / "python"
    monkeypatch.setattr(reader.sys, "executable", str(crashing))
    for signal_name, words in (
        ("SEGV", r"HDF5 broke down while it read it \(signal SIGSEGV\)"),
        ("PROF", "reads in it for more than 10 s"),
    ):
        crashing.write_text(f"#!/bin/sh\nkill -{signal_name} $$\n")
        crashing.chmod(0o755)
        with pytest.raises(UserError, match=words):
            list(reader.ask(path, "look", images="images", labels="labels", factors="factors"))


def test_the_command_outlives_a_child_that_died_unasked(tmp_path):
    """What is written to a dead process is a broken pipe, which ends a command where its reader is gone; this one goes on."""
    (tmp_path / "own.h5").write_bytes(b"x")
    (tmp_path / "python").write_text("#!/bin/sh\nkill -SEGV $$\n")
    (tmp_path / "python").chmod(0o755)
    code = """
import subprocess, sys
from siv_core.cli import main as cli
from siv_core.data import hdf5
class Dead(subprocess.Popen):
    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.wait()
subprocess.Popen, sys.executable, sys.argv = Dead, "./python", ["siv", "data", "check", "own.h5"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "HDF5 broke down while it read it (signal SIGSEGV)" in done.stdout + done.stderr


def test_a_child_that_computes_without_an_end_is_ended():
    code = "from siv_core.data import hdf5_child\nhdf5_child._hurry(0.2, 60)\nwhile True: pass"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGPROF


def test_the_child_loads_no_torch_and_can_write_no_file(tmp_path, started):
    code = "import sys, siv_core.data.hdf5_child; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    (tmp_path / "h5py.py").write_text("print('somebody else')")  # in the folder one works in
    (tmp_path / "own.h5").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read as an HDF5 file"):
        list(reader.ask(tmp_path / "own.h5", "look", images="images", labels="labels", factors="factors"))


def test_a_started_child_and_a_fork_tell_the_same(hdf5, tmp_path, monkeypatch):
    made = {}
    for name in ("fork", "started"):
        if name == "started":
            monkeypatch.setattr(reader, "subprocess", subprocess)
        monkeypatch.setenv("SIV_DATA", str(tmp_path / name))
        data = prepared(hdf5({"images": IMAGES / np.float32(255), "labels": np.arange(300) % 3}))
        made[name] = data.path.read_bytes(), datafile.check(tmp_path / "own.h5")
    assert made["fork"] == made["started"]


def test_truncated_at_any_byte(tmp_path):
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file.create_dataset("images", data=IMAGES[:20], compression="gzip")
    whole, path = (tmp_path / "whole.h5").read_bytes(), tmp_path / "own.h5"
    for size in [*range(0, len(whole), max(1, len(whole) // 7)), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"own.h5: (cannot be read|'images' is truncated|HDF5 broke down)"):
            list(reader.ask(path, "look", images="images", labels="labels", factors="factors"))


# -- what `siv data check` tells -------------------------------------------------------------------------------------------------


def test_check_counts_everything_in_a_file(tmp_path):
    values = np.full((20, 2, 2, 3), 0.5, np.float32)
    values[3, 1, 1] = [np.nan, np.inf, 0.25]
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["x/train"] = IMAGES.transpose(0, 2, 3, 1)
        file["x/grey"] = IMAGES[:, 0]
        file.create_dataset("bad", data=values, compression="gzip", chunks=(5, 2, 2, 3))
        file["y"] = np.arange(300) - 5
        file["notes"] = "made in May"
    report = datafile.check(tmp_path / "own.h5")
    sets = {entry["name"]: entry for entry in report["datasets"]}
    assert sets["bad"] | {"problem": None} == sets["bad"]
    told = ("shape", "dtype", "storage", "lowest", "highest", "not_finite")
    assert [sets["bad"][key] for key in told] == [[20, 2, 2, 3], "float32", "chunks of [5, 2, 2, 3], gzip", 0.25, 0.5, 2]
    assert [sets["y"][key] for key in told] == [[300], "int64", "contiguous", -5, 294, 0]
    assert report["options"] == [
        f'path = "{tmp_path / "own.h5"}", images = "x/grey", layout = "NHW"',
        f'path = "{tmp_path / "own.h5"}", images = "x/train", layout = "NHWC"',
    ]
    assert report["problems"] == []
    json.dumps(report)


def test_check_says_why_nothing_can_be_images(tmp_path):
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["few"] = [1, 2]
        file["gap"] = np.full((20, 1, 2, 2), np.nan)
        file["text"] = np.full((2, 2, 2), b"a")
        file["away"] = h5py.ExternalLink("other.h5", "/x")
    problems = [problem.removeprefix(f"{tmp_path / 'own.h5'}: ") for problem in datafile.check(tmp_path / "own.h5")["problems"]]
    assert problems == [
        "'away' is a link to other.h5:/x; only data inside the file itself is read",
        "'few' cannot be images: they have 3 or 4 axes and are not empty, it is [2]",
        "'gap' cannot be images: 80 of its values are not finite",
        "'text' cannot be images: they are numbers, it is |S1",
    ]


def test_check_gives_the_options_that_a_file_takes(tmp_path, hdf5):
    arrays = {"images": np.full((20, 1, 2, 2), 7.5), "deep": np.arange(80, dtype=np.int32).reshape(20, 1, 2, 2)}
    data = hdf5(arrays)
    options = datafile.check(tmp_path / "own.h5")["options"]
    assert [line.partition('", ')[2] for line in options] == [
        'images = "deep", value_range = [0, 79], layout = "NCHW"',
        'images = "images", value_range = [7.5, 7.5], layout = "NCHW"',
    ]
    data = prepared(hdf5(images="deep", value_range=(0.0, 79.0), layout="NCHW"))
    assert (data.spec.shape, stored(data).min(), stored(data).max()) == ((1, 2, 2), 0, 255)


def test_check_tells_of_labels_that_are_too_few(tmp_path):
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["images"], file["labels"] = IMAGES, np.arange(299)
    [problem] = datafile.check(tmp_path / "own.h5")["problems"]
    assert "'images' has 300 images, 'labels' 299 rows" in problem


def test_check_tells_of_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.h5")
    assert datafile.check(tmp_path / "pipe.h5")["problems"] == [f"{tmp_path / 'pipe.h5'}: is no regular file"]
    assert datafile.check(tmp_path / "no.h5")["problems"] == [f"{tmp_path / 'no.h5'}: cannot be read (No such file or directory)"]
