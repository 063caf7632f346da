"""Other people's arrays: every order of axes and every type of pixels, as writers give them; and the conversions they leave."""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import tomllib
from pathlib import Path

import h5py
import numpy as np
import pytest
from attrs import frozen
from conftest import Done
from siv_plugins import content_transfer
from siv_plugins import hdf5 as plugin

from siv_core.data import cache, datafile, foreign, hdf5_file
from siv_core.errors import UserError
from siv_core.store import files

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 3, 5, 6), dtype=np.uint8)  # [N, C, H, W], all lengths different
IMAGES[0, 0, 0, :2] = 0, 255
ORDERS = ["".join(letters) for letters in itertools.permutations("NCHW")]


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SIV_DATA", str(tmp_path / "data"))


def converted(path: Path, **options) -> tuple[np.ndarray, plugin.HDF5Images]:
    data = plugin.build(plugin.HDF5Config(path=str(path), **options))
    told = data.spec.shape, data.counts()  # known before
    data.prepare(quiet)
    images = datafile.read(data.path).images
    assert (data.spec.shape, data.counts()) == told
    assert images.shape == (sum(told[1].values()), *told[0])
    return images, data


def reordered(order: str) -> np.ndarray:
    return IMAGES.transpose(["NCHW".index(axis) for axis in order])


def write(path: Path, array: np.ndarray, **attributes) -> Path:
    with h5py.File(path, "w") as file:
        file["images"] = array
        file["images"].attrs.update(attributes)
    return path


# -- which axis is which ---------------------------------------------------------------------------------------------------------


def test_every_order_is_put_right():
    data = plugin.build(plugin.HDF5Config(path="none"))
    for order in ORDERS:
        assert (data._converted(reordered(order), order, (0.0, 255.0)) == IMAGES).all()


@pytest.mark.parametrize("order", ["NHWC", "CWHN", "HNWC"])
def test_an_order_that_is_named(tmp_path, order):
    images, data = converted(write(tmp_path / "a.h5", reordered(order)), layout=order)
    assert (images == IMAGES).all()
    assert data.notes() == []


WORDS = {"N": "sample", "C": "channels", "H": "y", "W": "X"}
KEYS = {"N": "t", "C": "c", "H": "y", "W": "x"}


def attributes_of(order: str) -> list[dict[str, object]]:
    tags = json.dumps({"axes": [{"key": KEYS[axis], "typeFlags": 1} for axis in order]})
    return [{"DIMENSION_LABELS": [WORDS[axis] for axis in order]}, {"axistags": tags}]


def test_every_order_that_an_attribute_tells(tmp_path):
    for order in ORDERS:
        for attributes in attributes_of(order):
            with h5py.File(write(tmp_path / "a.h5", reordered(order), **attributes)) as file:
                assert hdf5_file.axes_of(file["images"]) == order


@pytest.mark.parametrize("order", ["NCHW", "WHCN"])
def test_an_order_that_an_attribute_tells(tmp_path, order):
    path = write(tmp_path / "a.h5", reordered(order), **attributes_of(order)[0])
    images, data = converted(path)
    assert (images == IMAGES).all()
    told = f"{path}: its axes {list(reordered(order).shape)} are {order} (as its attributes say)"
    assert data.notes() == ([] if order == "NCHW" else [told])


@pytest.mark.parametrize("written", ["HWCN", "NHWC", "NCHW"])
def test_matlab_writes_the_axes_in_reverse(tmp_path, written):
    """A file of MATLAB 7.3: a block of its own before the HDF5, and of an array the last axis first."""
    path = tmp_path / "a.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["images"] = reordered(written[::-1])
        file["images"].attrs["MATLAB_class"] = np.bytes_("uint8")
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64")
    images, data = converted(path)
    assert (images == IMAGES).all()
    assert data.notes() == [f"{path}: its axes {list(reordered(written[::-1]).shape)} are {written[::-1]} (as MATLAB writes)"]
    assert "(as MATLAB writes)" in datafile.read(data.path).source


@pytest.mark.parametrize(
    ("shape", "axes", "order"),
    [
        ((9, 3, 8, 8), None, "NCHW"),
        ((9, 1, 8, 8), None, "NCHW"),
        ((9, 4, 8, 8), None, "NCHW"),
        ((9, 8, 8, 3), None, "NHWC"),
        ((9, 8, 8, 2), None, "NHWC"),
        ((9, 4, 8, 3), None, "NHWC"),  # three channels are likelier than four
        ((9, 3, 8, 3), None, "NCHW"),
        ((9, 8, 8, 8), None, None),
        ((9, 8, 8), None, "NHW"),
        ((9, 8, 7), foreign.REVERSED, None),
        ((9, 8, 8), foreign.REVERSED, "NWH"),
        ((8, 8, 9), foreign.REVERSED, "WHN"),
        ((8, 8, 8), foreign.REVERSED, None),
        ((9, 3, 8, 7), foreign.REVERSED, "NCWH"),
        ((9, 8, 7, 5), foreign.REVERSED, None),
        ((9, 8, 8, 8), "NWHC", "NWHC"),
    ],
)
def test_the_order_by_the_lengths(shape, axes, order):
    assert foreign.order_of(shape, axes) == order


@pytest.mark.parametrize(
    "attribute", [{"DIMENSION_LABELS": ["a", "b", "c", "d"]}, {"axistags": "no JSON"}, {"DIMENSION_LABELS": 7}]
)
def test_attributes_of_another_meaning_are_no_order(tmp_path, attribute):
    with h5py.File(write(tmp_path / "a.h5", IMAGES, **attribute)) as file:
        assert hdf5_file.axes_of(file["images"]) is None


# -- which values are black and white --------------------------------------------------------------------------------------------


@frozen
class Pixels:
    """The same images in another type; `value_range` where it has to be named."""

    array: np.ndarray
    value_range: tuple[float, ...] = ()


UNIT = IMAGES / 255
TYPES = {
    "uint8": Pixels(IMAGES),
    "uint8, 0 and 1": Pixels((IMAGES > 127).astype(np.uint8), (0, 1)),
    "bool": Pixels(IMAGES > 127),
    "float16": Pixels(UNIT.astype(np.float16)),
    "float32": Pixels(UNIT.astype(np.float32)),
    "float64, big-endian": Pixels(UNIT.astype(">f8")),
    "float32, -1 … 1": Pixels((2 * UNIT - 1).astype(np.float32), (-1, 1)),
    "float32, 0 … 255": Pixels(IMAGES.astype(np.float32), (0, 255)),
    "uint16": Pixels(IMAGES.astype(np.uint16) * 257, (0, 65535)),
    "uint16, 12 bits": Pixels(np.rint(UNIT * 4095).astype(np.uint16), (0, 4095)),
    "int16, big-endian": Pixels(IMAGES.astype(">i2") - 128, (-128, 127)),
    "int32": Pixels(IMAGES.astype(np.int32), (0, 255)),
    "uint32": Pixels(IMAGES.astype(np.uint32) << 24, (0, 255 << 24)),
    "int64": Pixels(IMAGES.astype(np.int64), (0, 255)),
}
AGREED = ("uint8", "bool", "float16", "float32", "float64, big-endian")


@pytest.mark.parametrize("name", TYPES)
def test_every_type_of_pixels(tmp_path, name):
    pixels = TYPES[name]
    path = write(tmp_path / "a.h5", pixels.array)
    expected = (IMAGES > 127) * 255 if name in ("bool", "uint8, 0 and 1") else IMAGES
    images, data = converted(path, value_range=tuple(map(float, pixels.value_range)))
    assert abs(images.astype(int) - expected).max() == 0
    rounded = [line for line in data.notes() if "rounded to 8 bits" in line]
    assert bool(rounded) == (not name.startswith(("uint8", "bool")))


@pytest.mark.parametrize("name", [name for name in TYPES if name not in AGREED and not name.startswith("uint8")])
def test_what_has_no_agreed_range_is_refused_with_the_range_it_has(tmp_path, name):
    """By what is told first, and the file then goes in as the sentence says."""
    array = TYPES[name].array
    path = write(tmp_path / "a.h5", array)
    data = plugin.build(plugin.HDF5Config(path=str(path)))
    with pytest.raises(UserError) as refused:
        data.prepare(quiet)
    [told] = refused.value.problems
    low, high = array.min().item(), array.max().item()
    assert f"its values go from {low:g} to {high:g}" in told
    assert f"data.value_range = [{low!r}, {high!r}]" in told
    assert not list((tmp_path / "data").rglob("*.h5*"))
    low, high = json.loads(told.partition("data.value_range = ")[2])
    assert converted(path, value_range=(float(low), float(high)))[0].max() == 255


def test_the_range_that_is_told_takes_the_file(tmp_path):
    array = UNIT.astype(np.float32)
    array.flat[:2] = 1.0000001, -0.00012345678
    path = write(tmp_path / "a.h5", array)
    with pytest.raises(UserError) as refused:
        converted(path)
    low, high = json.loads(str(refused.value).partition("data.value_range = ")[2])
    assert converted(path, value_range=(low, high))[0].max() == 255


def test_no_and_yes_of_matlab_are_black_and_white(tmp_path):
    path = write(tmp_path / "a.h5", (IMAGES > 127).astype(np.uint8), MATLAB_class=np.bytes_("logical"))
    images, _ = converted(path, layout="NCHW")
    assert (images == np.where(IMAGES > 127, 255, 0)).all()


@pytest.mark.parametrize("value_range", [(1.0,), (1.0, 1.0), (2.0, 1.0), (0.0, 1.0, 2.0)])
def test_a_range_is_two_numbers(tmp_path, value_range):
    with pytest.raises(UserError, match=r"data.value_range: expected two numbers, the lower one first"):
        plugin.build(plugin.HDF5Config(path="x", value_range=value_range))


# -- labels and factors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [np.arange(7) % 2, np.arange(7) % 2 == 0, (np.arange(7) % 2).astype(np.uint8)[:, None]])
def test_labels_of_whole_numbers(tmp_path, labels):
    path = write(tmp_path / "a.h5", reordered("CHWN"))
    with h5py.File(path, "r+") as file:
        file["labels"] = labels
    _, data = converted(path, layout="CHWN")
    assert data.spec.classes == 2
    assert data.rows("train").labels.tolist() == labels.astype(int).ravel().tolist()


BAD_COLUMNS = {
    "text": ("labels", np.array([b"a"] * 7)),
    "one-hot": ("labels", np.eye(7, dtype=np.uint8)),
    "floats": ("labels", np.arange(7.0)),
    "too few": ("labels", np.arange(6)),
    "factors in one column": ("factors", np.arange(7)),
    "factors that are floats": ("factors", np.zeros((7, 2))),
    "negative factors": ("factors", np.full((7, 2), -1)),
    "factors of too many images": ("factors", np.zeros((8, 2), int)),
}


@pytest.mark.parametrize("how", BAD_COLUMNS)
def test_labels_and_factors_that_are_none_can_be_left_out(tmp_path, how):
    name, values = BAD_COLUMNS[how]
    path = write(tmp_path / "a.h5", IMAGES)
    with h5py.File(path, "r+") as file:
        file[name] = values
    with pytest.raises(UserError) as refused:
        _ = plugin.build(plugin.HDF5Config(path=str(path))).spec
    assert f'data.{name} = ""' in str(refused.value)
    assert (converted(path, **{name: ""})[0] == IMAGES).all()


@pytest.mark.parametrize("names", [["shape", "tilt"], None, ["one"], 5])
def test_factors_of_ones_own(tmp_path, names):
    path, factors = write(tmp_path / "a.h5", IMAGES), np.stack([np.arange(7) % 3, np.arange(7) % 2], axis=1)
    with h5py.File(path, "r+") as file:
        file["factors"] = factors
        if names:
            file["factors"].attrs["names"] = names
    _, data = converted(path)
    known = names if names == ["shape", "tilt"] else ["factor_0", "factor_1"]
    assert dict(data.spec.factors) == dict(zip(known, (3, 2), strict=True))
    assert data.rows("train").factors.tolist() == factors.tolist()


def with_factors(path: Path, factors: np.ndarray, names: list[str]) -> Path:
    with h5py.File(path, "w") as file:
        file["images"] = RNG.integers(0, 256, (len(factors), 3, 4, 4), dtype=np.uint8)
        file["factors"], file["labels"] = factors, factors[:, 0]
        file["factors"].attrs["names"] = names
    return path


def test_whole_values_of_a_factor_can_be_held_out(tmp_path):
    cells = np.stack([part.ravel() for part in np.indices((10, 4, 3))], axis=1)
    path = with_factors(tmp_path / "a.h5", cells, ["shape", "tilt", "turn"])
    for by, share, kept_out in (("shape", 0.2, 2), ("labels", 0.3, 3), ("turn", 0.01, 1), ("turn", 0.99, 2)):
        _, data = converted(path, held_out=share, held_out_by=by)
        column = 2 if by == "turn" else 0
        held_out, train = (set(cells[data.rows(split).index.numpy(), column].tolist()) for split in ("held_out", "train"))
        assert len(held_out) == kept_out
        assert held_out.isdisjoint(train)
        assert held_out | train == set(range(cells[:, column].max() + 1))
        assert data.about() == {"held_out": {by: sorted(held_out)}}
    with pytest.raises(UserError, match=r"data.held_out_by: .* has no factor 'shapes'; did you mean 'shape'\?"):
        plugin.build(plugin.HDF5Config(path=str(path), held_out_by="shapes")).counts()


def test_transfer_can_be_measured_where_whole_classes_are_held_out(tmp_path):
    """Of single images left out each would need a partner; that there is none is told before training."""
    cells = np.stack([part.ravel() for part in np.indices((10, 10, 10))], axis=1)
    path = with_factors(tmp_path / "a.h5", cells, ["shape", "tilt", "turn"])
    spec = converted(path)[1].spec
    metric = content_transfer.build(
        content_transfer.ContentTransferConfig(class_factor="shape"), spec, {"class": 1, "content": 1}, ("class", "content")
    )
    [told] = metric.fits(converted(path)[1])
    assert told.endswith("hold out whole classes (of hdf5: data.held_out_by)")
    assert list(metric.fits(converted(path, held_out_by="shape", held_out=0.2)[1])) == []


def test_the_fingerprint_changes_with_labels_and_factors(tmp_path):
    digests = []
    for more in ({}, {"labels": np.zeros(7, int)}, {"labels": np.ones(7, int)}, {"factors": np.zeros((7, 1), int)}):
        path = write(tmp_path / "a.h5", IMAGES)
        with h5py.File(path, "r+") as file:
            for name, values in more.items():
                file[name] = values
        digests.append(converted(path)[1].fingerprint())
    assert len(set(digests)) == 4
    assert len({digest.partition("+")[0] for digest in digests}) == 1


# -- files of siv's own format ---------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.h5"
    datafile.write(
        path, shape=IMAGES.shape, block=7, produce=lambda numbers: iter([(0, IMAGES)]), progress=quiet, source="x",
        labels=np.arange(7) % 2, factors=np.arange(7)[:, None] % 3, factor_sizes={"turn": 3},
    )  # fmt: skip
    return path


@pytest.mark.parametrize(
    "options", [{"layout": "NHWC"}, {"value_range": (0.0, 1.0)}, {"labels": "digit"}, {"factors": "f"}, {"images": "x"}]
)
def test_options_that_would_do_nothing_are_refused(own, options):
    [name] = options
    with pytest.raises(UserError, match=f"data.{name}: .* is of siv's own format, which says it itself; leave it out"):
        _ = plugin.build(plugin.HDF5Config(path=str(own), **options)).spec


def test_what_it_has_can_be_left_out(own):
    whole, bare = converted(own)[1], converted(own, labels="", factors="")[1]
    assert (whole.spec.classes, dict(whole.spec.factors)) == (2, {"turn": 3})
    assert (bare.spec.classes, dict(bare.spec.factors)) == (None, {})
    assert bare.rows("train").labels is bare.rows("train").factors is None
    assert bare.fingerprint() == whole.fingerprint().partition("+")[0]


def test_one_that_was_changed_in_place_is_refused(own):
    converted(own)
    with h5py.File(own, "r+") as file:
        file["images"][3, 0, 0, 0] ^= 1
    with pytest.raises(UserError, match=r"own.h5: damaged or changed, the images' sha256 is \w{64}, the file was written with"):
        converted(own)


# -- proportions -----------------------------------------------------------------------------------------------------------------


def test_what_is_done_to_proportions_is_said(tmp_path):
    path = write(tmp_path / "a.h5", IMAGES)

    def notes(**options):
        return plugin.build(plugin.HDF5Config(path=str(path), **options)).notes()

    assert notes(size=4) == [f"{path}: images of 6 × 5, its centre of 5 × 5 resized to 4 × 4"]
    assert notes(size=4, fit="stretch") == [f"{path}: images of 6 × 5 stretched to 4 × 4"]
    assert notes() == []


# -- a file that is in use -------------------------------------------------------------------------------------------------------


def test_a_file_that_is_open_elsewhere_is_told(tmp_path):
    path = write(tmp_path / "a.h5", IMAGES)
    with h5py.File(path, "r+"), pytest.raises(UserError, match=r"another program has it open for writing; close it there"):
        _ = plugin.build(plugin.HDF5Config(path=str(path))).spec


# -- what `siv data check` tells -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_check_gives_options_that_read_the_file(tmp_path, name):
    array = TYPES[name].array.copy()
    if name == "float32":
        array.flat[0] = 1.0000001
    path = write(tmp_path / "a.h5", array)
    report = datafile.check(path)
    assert report["problems"] == []
    [told] = report["options"]
    options = tomllib.loads("\n".join(re.split(r", (?=[a-z_]+ = )", told)))
    options["value_range"] = tuple(map(float, options.get("value_range", ())))
    brightest = converted(Path(options.pop("path")), **options)[0].max()
    assert brightest == (1 if name == "uint8, 0 and 1" else 255)  # which bytes 0 and 1 are is not for a check to say


# -- caches end ------------------------------------------------------------------------------------------------------------------


def touched(path: Path, moment: int) -> Path:
    os.utime(path, ns=(moment, moment))
    return path


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "data/hdf5").iterdir())


def test_a_conversion_of_an_earlier_state_goes(tmp_path):
    path = touched(write(tmp_path / "a.h5", IMAGES), 1)
    other, _ = converted(write(tmp_path / "b.h5", IMAGES))
    first = converted(path)[1].path
    again = converted(path, layout="NCHW")[1].path  # read in another way: both are of use
    assert first.exists()
    assert again.exists()
    new, data = converted(touched(write(path, 255 - IMAGES), 2))
    assert (new == 255 - IMAGES).all()
    assert not first.exists()
    assert not again.exists()
    assert [line.partition(" (")[0] for line in data.notes()] == sorted(f"removed {old}" for old in (first, again))
    assert all(line.endswith(": of an earlier state of the same file") for line in data.notes())
    assert len(kept(tmp_path)) == 4  # of two files, each with the note of its source
    assert (other == IMAGES).all()


def test_a_refused_conversion_leaves_nothing(tmp_path):
    array = np.full((600, 1, 4, 4), 0.5, np.float32)
    array[-1] = 1.5  # met when two blocks are written
    for moment in range(3):
        with pytest.raises(UserError, match=r"its values go from 0.5 to 1.5"):
            converted(touched(write(tmp_path / "a.h5", array), moment))
        assert kept(tmp_path) == []


def siv_data(siv, *arguments) -> Done:
    done = siv("data", *arguments)
    assert done.returncode == 0, done.stderr
    return done


def test_clean_takes_what_will_not_be_read_again(tmp_path, siv, monkeypatch):
    good = converted(write(tmp_path / "good.h5", IMAGES))[1].path
    changed = converted(touched(write(tmp_path / "changed.h5", IMAGES), 1))[1].path
    gone = converted(write(tmp_path / "gone.h5", IMAGES))[1].path
    old = converted(write(tmp_path / "old.h5", IMAGES))[1].path
    touched(tmp_path / "changed.h5", 2)
    (tmp_path / "gone.h5").unlink()
    old.with_name(f"{old.name}.from.json").unlink()
    cut = plugin.build(plugin.HDF5Config(path=str(write(tmp_path / "cut.h5", np.tile(IMAGES, (40, 1, 1, 1))))))

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.prepare(interrupt)
    (tmp_path / "data/weights").mkdir()
    (tmp_path / "data/weights/vgg.pth").write_bytes(bytes(2_000_000))
    rows = json.loads(siv_data(siv, "ls", "--json").stdout)
    sizes = {row["name"]: row["bytes"] for row in rows["datasets"]}
    assert sizes["weights"] == 2_000_000
    assert sizes["hdf5"] > 4 * IMAGES.size
    assert 0 < rows["leftover_bytes"] < sizes["hdf5"]
    assert "`siv data clean` takes that away" in siv_data(siv, "ls").stdout
    before = kept(tmp_path)
    dry = siv_data(siv, "clean", "--dry-run").stdout
    assert kept(tmp_path) == before
    told = siv_data(siv, "clean").stdout
    assert told == dry.replace("would remove", "removed")
    for path, reason in (
        (changed, "has changed"),
        (gone, "is gone"),
        (old, "a conversion by an earlier siv"),
        (cut.path.with_name(f"{cut.path.name}.partial"), "a preparation that did not come to its end"),
    ):
        [line] = [line for line in told.splitlines() if str(path) in line]
        assert reason in line
    assert kept(tmp_path) == [good.name, f"{good.name}.from.json"]
    assert "nothing to remove" in siv_data(siv, "clean").stdout
    assert json.loads(siv_data(siv, "clean", "--json").stdout)["leftovers"] == []


def test_what_an_early_kill_leaves_is_cleaned(tmp_path):
    """Killed before the first blocks were noted, or before anything but the note of the source was written."""
    path = write(tmp_path / "a.h5", IMAGES)
    for n, begun in enumerate((True, False)):
        made = cache.conversion(path, f"{n:08x}")
        cache.note(made, path)
        if begun:
            datafile.unfinished(made)[0].touch()
    assert len(kept(tmp_path)) == 3
    for left in list(cache.leftovers(tmp_path / "data")):
        left.remove()
    assert kept(tmp_path) == []


def test_clean_leaves_what_a_process_is_at_work_on(tmp_path):
    made = converted(write(tmp_path / "a.h5", IMAGES))[1].path
    (tmp_path / "a.h5").unlink()
    with files.alone(made, lambda: None):
        assert list(cache.leftovers(tmp_path / "data")) == []
    assert [one.paths[0] for one in cache.leftovers(tmp_path / "data")] == [made]


def test_a_superseded_conversion_that_is_being_made_stays(tmp_path):
    path = touched(write(tmp_path / "a.h5", IMAGES), 1)
    first = converted(path)[1].path
    touched(path, 2)
    with files.alone(first, lambda: None):
        assert converted(path)[1].removed == []
        assert first.exists()
    touched(path, 3)
    third = converted(path)[1]
    assert len(third.removed) == 2
    assert [name for name in kept(tmp_path) if name.endswith(".h5")] == [third.path.name]


@pytest.mark.parametrize("text", ["{", '{"source": 3}', '{"state": [1, 2]}', "[]"])
def test_clean_leaves_a_conversion_whose_source_cannot_be_told(tmp_path, text):
    made = converted(write(tmp_path / "a.h5", IMAGES))[1].path
    made.with_name(f"{made.name}.from.json").write_text(text)
    (tmp_path / "a.h5").unlink()
    assert list(cache.leftovers(tmp_path / "data")) == []


def test_nothing_of_somebody_else_is_taken_away(tmp_path):
    """Whatever lies in the folder of conversions, and whatever a source is called."""
    folder = tmp_path / "data/hdf5"
    folder.mkdir(parents=True)
    own = {
        "data.h5": b"precious",
        "mine-0123456789abcdef.h5": b"named as conversions were",
        "mine-01234567-89abcdef-01234567.h5": b"named as they are",
        "download.partial": b"of a browser",
        "x.h5.partial": b"without a journal",
        f"{files.TEMPORARY}1-x-01234567-89abcdef-01234567.h5": b"being written",
    }
    for name, data in own.items():
        (folder / name).write_bytes(data)
    write(folder / "real.h5", IMAGES)
    write(folder / "real-0123456789abcdef.h5", IMAGES)
    kept_names = kept(tmp_path)
    for moment in (1, 2):  # the second supersedes the first
        for name in ("data.h5.old.h5", "x.h5.bak.hdf5"):
            converted(touched(write(tmp_path / name, IMAGES if moment == 1 else 255 - IMAGES), moment))
    assert len(kept(tmp_path)) == len(kept_names) + 4
    assert list(cache.leftovers(tmp_path / "data")) == []
    assert {name: (folder / name).read_bytes() for name in own} == own
    assert set(kept_names) <= set(kept(tmp_path))


def test_a_link_and_what_it_leads_to_leave_each_other_alone(tmp_path):
    path = write(tmp_path / "real.h5", IMAGES)
    (tmp_path / "link.h5").symlink_to(path)
    first, second = (converted(tmp_path / name)[1] for name in ("real.h5", "link.h5"))
    assert first.path.exists()
    assert second.path.exists()
    assert first.removed == second.removed == []
    assert first.fingerprint() == second.fingerprint()


def test_threads_that_convert_the_same_file_all_come_to_it(tmp_path):
    path, failed = write(tmp_path / "a.h5", IMAGES), []

    def work() -> None:
        try:
            plugin.build(plugin.HDF5Config(path=str(path))).prepare(quiet)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert (converted(path)[0] == IMAGES).all()


def test_the_fingerprint_changes_with_the_value_range_and_the_factors(tmp_path):
    digests = []
    for sizes, value_range in (({"a": 3}, None), ({"b": 3}, None), ({"a": 4}, None), ({"a": 3}, [-1.0, 1.0])):
        path = tmp_path / f"{len(digests)}.h5"
        datafile.write(
            path, shape=IMAGES.shape, block=7, produce=lambda numbers: iter([(0, IMAGES)]), progress=quiet, source="x",
            factors=np.arange(7)[:, None] % 3, factor_sizes=sizes,
        )  # fmt: skip
        if value_range:
            with h5py.File(path, "r+") as file:
                file.attrs["value_range"] = value_range
        digests.append(converted(path)[1].fingerprint())
    assert len(set(digests)) == 4
