"""Folders and zips of pictures: what is in them is taken as it is meant, whatever is wrong is told, and no work is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from conftest import Done
from PIL import Image
from siv_plugins import image_folder as plugin
from test_own_pictures import KINDS, LEVEL, PLAIN, chunk, png

from siv_core.cli import data as cli_data
from siv_core.data import cache, datafile, picture_files, picture_list, picture_pool
from siv_core.data.picture import FILTERS, ORIENTATION, Fitting, fitted, load
from siv_core.data.picture_classes import arrange
from siv_core.data.picture_set import PictureSet
from siv_core.errors import Stopped, UserError
from siv_core.testing import check_dataset

RANDOM = np.random.default_rng(0)


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(autouse=True)
def own_root(tmp_path, monkeypatch):
    monkeypatch.setenv("SIV_DATA", str(tmp_path / "data"))


def save(path: Path, array: Any = None, **more: Any) -> np.ndarray:
    """A picture, of noise unless it is given; its pixels [H, W, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8) if array is None else array
    Image.fromarray(array).save(path, **more)
    return array


def tree(root: Path, *names: str) -> dict[str, np.ndarray]:
    return {name: save(root / name) for name in names}


def zipped(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for entry in sorted(folder.rglob("*")):
            file.write(entry, prefix + str(entry.relative_to(folder)))
    return path


def data_of(path: Path, **options: Any) -> PictureSet:
    return plugin.build(plugin.ImageFolderConfig(path=str(path), **{"size": 8, **options}))


def prepared(path: Path, progress: Any = quiet, **options: Any) -> PictureSet:
    data = data_of(path, **options)
    data.prepare(progress)
    return data


def images(data: PictureSet) -> np.ndarray:
    """All rows, [N, H, W, C]."""
    return data.rows("train").x.numpy().transpose(0, 2, 3, 1)


CLASSES = ("cat/1.png", "cat/2.png", "cat/more/3.png", "dog/1.png", "dog/2.png", "emu/9.png")


# -- what folders mean -----------------------------------------------------------------------------------------------------------


def meant(*names: str, **options: Any) -> tuple[list[int] | None, list[int] | None, tuple[str, ...]]:
    found = arrange(names, "here", **options)
    return *(None if column is None else column.tolist() for column in (found.labels, found.split)), found.classes


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (("a.png", "b.png"), {}, (None, None, ())),
        (("x/a.png", "x/b.png"), {}, (None, None, ())),  # one folder around all is passed through
        (("x/y/a.png", "x/z/b.png"), {}, ([0, 1], None, ("y", "z"))),
        (CLASSES, {}, ([0, 0, 0, 1, 1, 2], None, ("cat", "dog", "emu"))),
        (CLASSES, {"labels": ""}, (None, None, ())),
        (("train/a.png", "test/b.png"), {}, (None, [0, 1], ())),
        (("s/test/cat/1.png", "s/train/cat/1.png", "s/train/dog/1.png"), {}, ([0, 0, 1], [1, 0, 0], ("cat", "dog"))),
        (("Train/a.png", "Valid/b.png"), {}, (None, [0, 1], ())),
        (("test/a.png", "train/b.png", "val/c.png"), {}, (None, [1, 0], ())),  # val is not used
        (("test/a.png", "train/b.png", "val/c.png"), {"test_folder": "val"}, (None, [0, 1], ())),
        (("kept/a.png", "train/b.png"), {"test_folder": "kept"}, (None, [1, 0], ())),
        (("train/x/b.png", "train/y/b.png"), {}, ([0, 1], None, ("x", "y"))),  # train alone: all of it
    ],
)
def test_folders_are_splits_and_classes(names, options, expected):
    assert meant(*names, **options) == expected


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (("a.png", "cat/b.png"), {}, 'here: 1 pictures lie loose beside the class folders cat.*data.labels = "" goes on without'),
        (("train/x/a.png", "train/y/a.png", "test/a.png"), {}, "1 pictures lie loose beside the class folders x, y"),
        (("a.png", "b.png"), {"labels": "folders"}, "no class folders are in it"),
        (("x/a.png", "x/b.png"), {"labels": "folders"}, "no class folders are in it"),
        (("Cat/a.png", "cat/b.png", "dog/c.png"), {}, "the folders Cat and cat differ in case alone"),
        (("Train/a.png", "train/b.png", "test/b.png"), {}, "the folders Train and train differ in case alone"),
        (("test/a.png", "cat/a.png"), {}, "has a folder test and none called train"),
        (("train/a.png", "test/b.png", "more/c.png", "d.png"), {}, r"cannot be told: loose pictures \(1\), more/ \(1\)"),
        (("train/x/a.png", "train/y/b.png", "test/z/c.png"), {}, "the class z is held out and has no picture in train"),
        (("train/a.png", "test/b.png"), {"test_folder": "val"}, "data.test_folder = 'val' is to lie beside a folder train"),
        (CLASSES, {"test_folder": "cat"}, "is to lie beside a folder train; it has cat, dog, emu"),
    ],
)
def test_folders_that_cannot_be_told(names, options, words):
    with pytest.raises(UserError, match=words):
        arrange(names, "here", **options)


def test_what_folders_were_taken_for_is_said():
    names = ("s/train/a/1.png", "s/train/b/1.png", "s/test/a/1.png", "s/val/a/1.png")
    assert arrange(names, "here").notes == (
        "pictures are those in s/",
        "test/ is held out",
        "val/ (1 pictures) is not used",
        "2 classes by folder: a, b",
        "no picture is held out of the class b",
    )
    assert arrange(("a.png", "b.png"), "here").notes == ()


# -- what lies there -------------------------------------------------------------------------------------------------------------


def test_all_of_a_folder_is_listed_and_the_rest_named(tmp_path):
    root = tmp_path / "own"
    tree(root, "b.png", "a/2.JPG", "a/10.png", ".hidden/c.png", "__MACOSX/d.png", "a/._2.png")
    (root / "a/notes.txt").touch()
    (root / "empty/below").mkdir(parents=True)
    (root / "linked").symlink_to(tmp_path / "else")
    tree(tmp_path / "else", "e.png")
    found = picture_list.listed(root)
    assert [entry.name for entry in found.entries] == ["a/10.png", "a/2.JPG", "b.png", "linked/e.png"]
    assert picture_list.left_out(found.others) == "1 folder without pictures (empty/) and 1 file of another ending (a/notes.txt)"
    (root / "a/round").symlink_to(root)
    with pytest.raises(UserError, match="is a link to a folder that it lies in"):
        picture_list.listed(root)


@pytest.mark.parametrize("what", ["folder", "zip"])
def test_a_place_without_pictures(tmp_path, what):
    (tmp_path / "own/deep").mkdir(parents=True)
    (tmp_path / "own/notes.txt").touch()
    place = tmp_path / "own" if what == "folder" else zipped(tmp_path / "own", tmp_path / "own.zip")
    with pytest.raises(
        UserError, match=rf"no pictures in this {what} \(.png, .*; it has .*1 file of another ending \(notes.txt\)"
    ):
        _ = data_of(place).spec


def test_a_place_that_is_none(tmp_path):
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(UserError, match="is neither a folder nor a zip file"):
        _ = data_of(tmp_path / "text.zip").spec
    assert "there is no folder or zip" in data_of(tmp_path / "nowhere").missing()
    tree(tmp_path / "own", "a.png")
    good = zipped(tmp_path / "own", tmp_path / "own.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(good[:10] + good[40:])
    with pytest.raises(UserError, match=r"cut\.zip: "):
        prepared(tmp_path / "cut.zip")


def hostile(path: Path, how: str) -> None:
    good = png(4, 4)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", good)
        if how == "link":
            info = zipfile.ZipInfo("b.png")
            info.external_attr = 0o120777 << 16
            file.writestr(info, "/etc/passwd")
        elif how == "a member too large":
            with file.open("b.png", "w", force_zip64=True) as member:
                for _ in range(257):
                    member.write(bytes(1 << 20))
        elif how == "all too large":
            for i in range(10):
                file.writestr(f"{i}.png", bytes(8 << 20))
        elif how == "twice":
            with pytest.warns(UserWarning, match="Duplicate"):
                file.writestr("a.png", good)
        else:
            file.writestr("ENCRYPTED.png" if how == "encrypted" else how, good)
    if how == "encrypted":
        data = bytearray(path.read_bytes())
        for signature, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
            data[data.rindex(signature) + at] |= 1
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("../b.png", r"\.\./b.png is no plain path inside the zip"),
        ("x/../../b.png", "is no plain path inside the zip"),
        ("/etc/b.png", "/etc/b.png is no plain path inside the zip"),
        ("C:/b.png", "is no plain path inside the zip"),
        ("..\\b.png", "is no plain path inside the zip"),
        ("../notes.txt", "is no plain path inside the zip"),
        ("link", "b.png is a link"),
        ("encrypted", "ENCRYPTED.png is encrypted; unpack it"),
        ("twice", "a.png is in it 2 times"),
        ("a member too large", "b.png unpacks to 257 MiB; no picture takes that"),
        ("all too large", "unpacks to 83,886,.*, far more than pictures do"),
    ],
)
def test_zips_that_are_out_to_do_harm(tmp_path, how, words):
    hostile(tmp_path / "bad.zip", how)
    with pytest.raises(UserError, match=words):
        prepared(tmp_path / "bad.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.zip"]


# -- from picture to image -------------------------------------------------------------------------------------------------------


def fit(picture: Image.Image, **options: Any) -> np.ndarray:
    return fitted(picture, Fitting(**options), "here")[0].transpose(1, 2, 0)


def test_area_is_the_mean_of_the_pixels_of_the_centre():
    array = RANDOM.integers(0, 256, (24, 16, 3), dtype=np.uint8)
    naive = array[4:20].reshape(4, 4, 4, 4, 3).mean(axis=(1, 3))
    assert np.abs(fit(Image.fromarray(array), size=4) - naive).max() <= 0.5 + 1e-6
    naive = array.reshape(4, 6, 4, 4, 3).mean(axis=(1, 3))
    assert np.abs(fit(Image.fromarray(array), size=4, crop="none") - naive).max() <= 0.5 + 1e-6


def test_a_box_is_cut_out():
    array = RANDOM.integers(0, 256, (24, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(array)
    assert (fit(picture, size=6, box=(3, 5, 6, 6)) == array[5:11, 3:9]).all()
    assert (fit(picture, size=6, box=(3, 5, 6, 10)) == array[7:13, 3:9]).all()  # its centre
    with pytest.raises(UserError, match="has 16 × 24 pixels, which do not hold the box of 6 × 6 at 11, 5"):
        fit(picture, size=6, box=(11, 5, 6, 6))


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_is_antialiased(name):
    """A fine checkerboard is grey from afar; without antialiasing it would be black, white or stripes."""
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    small = fit(Image.fromarray(board.astype(np.uint8)), size=8, channels=1, resampling=name)
    assert np.abs(small[1:-1, 1:-1] - 127.5).max() < 3


@pytest.mark.parametrize("name", FILTERS)
def test_what_is_too_small_is_enlarged_smoothly_and_said(name):
    ramp = np.repeat(np.arange(4, dtype=np.uint8)[None, :, None] * 60, 4, axis=0)[..., 0]
    array, changes = fitted(Image.fromarray(ramp), Fitting(16, 1, resampling=name), "here")
    assert changes == ["enlarged"]
    assert len(np.unique(array[0, 8])) > 6  # no steps


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_picture_becomes_an_image(tmp_path, channels):
    """Palette, 16 bits, CMYK, transparency and others: the same grey."""
    names = sorted(set(KINDS) - {"one.png"})
    (tmp_path / "own").mkdir()
    for name in names:
        KINDS[name][0].save(tmp_path / "own" / name)
    data = prepared(tmp_path / "own", channels=channels)
    assert images(data).shape == (len(names), 8, 8, channels)
    assert np.abs(images(data).astype(int) - LEVEL).max() <= 5
    told = "\n".join(data.notes())
    assert "pictures of 1 × 1 to 500 × 1 pixels" in told
    assert f"{len(names)} pictures enlarged" in told
    assert "1 pictures 16 bits reduced to 8" in told
    assert f"2 pictures CMYK converted to {'RGB' if channels == 3 else 'L'}" in told


def test_transparency_and_orientation(tmp_path):
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 8, 4))
    (tmp_path / "own").mkdir()
    picture.save(tmp_path / "own/a.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # a quarter to the right
    picture.convert("L").point(lambda value: 0).save(tmp_path / "own/b.png")
    half = Image.new("L", (8, 8), 255)
    half.paste(0, (0, 0, 8, 4))
    half.save(tmp_path / "own/c.png", exif=exif)
    data = prepared(tmp_path / "own", channels=1)
    a, _, c = images(data)[..., 0]
    assert (a[:4] == 0).all()
    assert (a[4:] == 255).all()
    assert (c[:, 4:] == 0).all()
    assert (c[:, :4] == 255).all()
    assert {"1 pictures put on white", "1 pictures turned upright"} <= {line.partition(": ")[2] for line in data.notes()}


# -- the data set ----------------------------------------------------------------------------------------------------------------


def test_a_folder_with_classes(tmp_path):
    arrays = tree(tmp_path / "own", *CLASSES)
    data = data_of(tmp_path / "own", held_out=0.34)
    assert data.spec.classes == 3
    assert data.counts() == {"train": 4, "held_out": 2}
    check_dataset(data)
    assert (images(data) == np.stack([arrays[name] for name in CLASSES])).all()
    assert data.rows("train").labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert data.counts() == {"train": 4, "held_out": 2}
    expected = np.random.Generator(np.random.PCG64(0)).permutation(6)[:2]
    assert data.rows("held_out").index.tolist() == sorted(expected.tolist())
    assert data.about() == {"images": 6, "classes": ["cat", "dog", "emu"], "damaged": {"count": 0, "names": []}}


def test_a_folder_with_splits(tmp_path):
    arrays = tree(tmp_path / "own", "test/x/1.png", "train/x/1.png", "train/y/1.png")
    data = prepared(tmp_path / "own")
    check_dataset(data)
    assert data.rows("held_out").index.tolist() == [0]
    assert (images(data) == np.stack(list(arrays.values()))).all()
    assert data.rows("train").labels.tolist() == [0, 0, 1]
    assert any("no picture is held out of the class y" in line for line in data.notes())


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_as_the_folder_in_it(tmp_path, compression):
    tree(tmp_path / "own", *CLASSES)
    (tmp_path / "own/notes.txt").write_text("about")
    with zipfile.ZipFile(tmp_path / "own.zip", "w", compression) as file:
        for path in sorted((tmp_path / "own").rglob("*"), reverse=True):
            file.write(path, f"own/{path.relative_to(tmp_path / 'own')}")
    folder, whole = prepared(tmp_path / "own"), prepared(tmp_path / "own.zip")
    assert whole.fingerprint() == folder.fingerprint()
    assert any(line.endswith("not taken: 1 file of another ending (own/notes.txt)") for line in whole.notes())


def test_the_fingerprint_is_of_pixels_labels_and_split(tmp_path):
    def of(name: str, change: Any = lambda root: None, **options: Any) -> str:
        root = tmp_path / name / "own"
        for path, value in zip(CLASSES, range(6), strict=True):
            save(root / path, np.full((8, 8, 3), 40 * value, np.uint8))
        change(root)
        return prepared(root, **options).fingerprint()

    plain = of("a")
    assert of("b") == plain  # wherever and whenever
    assert of("c", lambda root: (root / "cat").rename(root / "bat")) == plain  # numbers, not names
    assert of("d", lambda root: save(root / CLASSES[0], np.full((8, 8, 3), 1, np.uint8))) != plain
    assert of("e", lambda root: (root / "dog/1.png").rename(root / "cat/z.png")) != plain
    assert of("f", split_seed=1) != plain
    assert of("g", labels="") != plain
    assert len({of("h", size=4), of("i", channels=1), plain}) == 3


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_both_splits_have_images(tmp_path, share):
    tree(tmp_path / "own", "a.png", "b.png", "c.png")
    counts = data_of(tmp_path / "own", held_out=share).counts()
    assert sum(counts.values()) == 3
    assert min(counts.values()) >= 1


def test_a_run_says_what_it_was_trained_on(tmp_path, siv):
    tree(tmp_path / "own", *(f"train/{name}/{i}.png" for name in "xy" for i in range(4)), "test/x/1.png", "test/y/1.png")
    (tmp_path / "own/train/x/broken.jpg").write_bytes(b"\xff\xd8\xff")
    recipe = tmp_path / "own.toml"
    recipe.write_text(
        'format = 1\n[data]\nname = "image_folder"\npath = "own"\nsize = 8\ndamaged = "skip"\n[network]\nname = "mlp"\n'
        '[reconstruction]\nname = "mse"\n[objective]\nname = "vae"\n[prior]\nname = "standard_normal"\n'
        '[train]\nbatch = 4\nlength = "2 steps"\n'
    )
    assert any("2 classes by folder: x, y" in line for line in data_of(tmp_path / "own").notes())  # before anything is prepared
    done = siv("run", recipe, "--run-dir", "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "1 damaged pictures left out: train/x/broken.jpg" in done.stdout
    about = json.loads((tmp_path / "run/manifest.json").read_text())["data"]
    assert about["damaged"] == {"count": 1, "names": ["train/x/broken.jpg"]}
    assert about["classes"] == ["x", "y"]
    assert any("left out: train/x/broken.jpg" in line for line in about["notes"])


# -- damaged pictures ------------------------------------------------------------------------------------------------------------


def damage(root: Path) -> list[str]:
    """Three kinds of damage among good pictures."""
    (root / "b empty.png").write_bytes(b"")
    whole = root / "d cut.jpg"
    save(whole, RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole.write_bytes(whole.read_bytes()[:700])
    (root / "f bomb.png").write_bytes(png(60000, 60000))
    return ["b empty.png", "d cut.jpg", "f bomb.png"]


@pytest.fixture
def few_in_a_block(monkeypatch):
    monkeypatch.setattr(picture_files, "MOST_IN_BLOCK", 2)


@pytest.mark.usefixtures("few_in_a_block")
@pytest.mark.parametrize("zip_it", [False, True])
def test_damaged_pictures_are_told_all_at_once_or_left_out(tmp_path, zip_it):
    root = tmp_path / "own"
    good = tree(root, "a.png", "c.png", "e.png", "g.png", "h.png")
    bad = damage(root)
    place = zipped(root, tmp_path / "own.zip") if zip_it else root
    with pytest.raises(UserError) as caught:
        prepared(place)
    assert len(caught.value.problems) == 4
    for name, line, words in zip(bad, caught.value.problems, ("none of PNG", "truncated", "million pixels"), strict=False):
        assert name in line
        assert words in line
    assert caught.value.problems[3].startswith("3 pictures cannot be used: ")
    assert 'data.damaged = "skip" goes on without' in caught.value.problems[3]
    seen: list[tuple[int, int]] = []
    data = prepared(place, lambda what, done, total: seen.append((done, total)), damaged="skip")
    assert seen[0] == (1, 4)  # the block without damage is not decoded again
    check_dataset(data)
    assert (images(data) == np.stack(list(good.values()))).all()
    assert data.about()["damaged"] == {"count": 3, "names": bad}
    assert any(line.endswith(f"3 damaged pictures left out: {', '.join(bad)}") for line in data.notes())
    again = data_of(place, damaged="skip")
    again.prepare(quiet)
    assert again.about()["damaged"]["count"] == 3
    with pytest.raises(UserError, match="3 pictures cannot be used"):
        prepared(place)
    for name in bad:
        (root / name).unlink()
    assert prepared(root).fingerprint() == data.fingerprint()


def test_a_damaged_member_of_a_zip(tmp_path):
    arrays = tree(tmp_path / "own", "a.png", "b.png", "c.png")
    place = zipped(tmp_path / "own", tmp_path / "own.zip")
    data = bytearray(place.read_bytes())
    data[data.index(b"b.png") + 60] ^= 255  # stored, so that only the check sum tells
    place.write_bytes(data)
    found = prepared(place, damaged="skip")
    assert list(found.about()["damaged"]["names"]) == ["b.png"]
    assert (images(found) == np.stack([arrays["a.png"], arrays["c.png"]])).all()


def test_nothing_but_damage(tmp_path):
    (tmp_path / "own").mkdir()
    for name in "abc":
        (tmp_path / f"own/{name}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of its 3 pictures can be read"):
        prepared(tmp_path / "own", damaged="skip")


@pytest.mark.parametrize("odd", [b"two\nlines.png", b"\xff\xfe.png", b"-x.png", b"\x1b[31m.png", "漢 字.png".encode()])
def test_odd_names(tmp_path, odd):
    tree(tmp_path / "own", "a.png", "b.png")
    path = Path(os.fsdecode(os.fsencode(tmp_path / "own") + b"/" + odd))
    array = save(path)
    assert any((image == array).all() for image in images(prepared(tmp_path / "own")))
    path.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        prepared(tmp_path / "own")
    data = prepared(tmp_path / "own", damaged="skip")
    for line in (*caught.value.problems, *data.notes()):
        assert line.isprintable()
        line.encode()
    json.dumps(data.about())


def test_a_link_that_leads_nowhere_and_a_pipe_are_damaged(tmp_path):
    tree(tmp_path / "own", "a.png", "b.png")
    (tmp_path / "own/c.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "own/d.png")
    with pytest.raises(
        UserError, match=r"c.png: no picture that can be read \(No such file[^\n]*\n.*d.png.*it is no regular file"
    ):
        prepared(tmp_path / "own")


# -- changes meanwhile and before ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", ["error", "skip"])
@pytest.mark.parametrize("how", ["taken away", "changed", "added"])
def test_pictures_that_change_in_the_middle(tmp_path, how, damaged):
    root = tmp_path / "own"
    tree(root, "a.png", "b.png", "c.png")
    name = "c.png" if how == "changed" else "d.png"

    def meanwhile(what: str, done: int, total: int) -> None:
        if done == 0:
            (root / "c.png").unlink(missing_ok=True) if how == "taken away" else save(root / name)

    words = "was changed while its pictures were read" if how == "added" else "c.png was changed or taken away while pictures"
    with pytest.raises(UserError, match=words):
        prepared(root, meanwhile, damaged=damaged)
    assert list((tmp_path / "data").rglob("*.h5")) == []
    assert len(images(prepared(root))) == {"taken away": 2, "changed": 3, "added": 4}[how]


def test_a_changed_folder_is_prepared_anew(tmp_path):
    tree(tmp_path / "own", "a.png", "b.png")
    first = prepared(tmp_path / "own")
    other = prepared(tmp_path / "own", size=4)
    before = first.path.stat().st_mtime_ns
    assert prepared(tmp_path / "own").path.stat().st_mtime_ns == before
    tree(tmp_path / "own", "c.png")
    new = prepared(tmp_path / "own")
    assert len(images(new)) == 3
    removed = [line.partition(" (")[0] for line in new.notes() if line.startswith("removed")]
    assert removed == sorted(f"removed {one.path}" for one in (first, other))
    assert all("of an earlier state of the same pictures" in line for line in new.notes() if line.startswith("removed"))
    assert [path.name for path in (tmp_path / "data/image_folder").glob("*.h5")] == [new.path.name]


def succeeded(done: Done) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_data_root_is_kept_in_order(tmp_path, siv):
    tree(tmp_path / "kept", "a.png", "b.png")
    tree(tmp_path / "gone", "a.png", "b.png")
    tree(tmp_path / "own", "a.png", "b.png")
    packed = zipped(tmp_path / "own", tmp_path / "own.zip")
    made = {name: prepared(tmp_path / name).path for name in ("kept", "gone", "own.zip")}
    shutil.rmtree(tmp_path / "gone")
    own = made["kept"].with_name("mine-01234567-89abcdef-01234567.h5")
    own.write_bytes(b"somebody's")
    rows = {row["name"]: row["bytes"] for row in json.loads(succeeded(siv("data", "ls", "--json")))["datasets"]}
    assert rows["image_folder"] >= sum(path.stat().st_size for path in made.values())
    told = succeeded(siv("data", "clean"))
    assert str(made["gone"]) in told
    assert "is gone" in told
    assert {name for name, path in made.items() if path.exists()} == {"kept", "own.zip"}
    packed.write_bytes(packed.read_bytes() + b"\0")
    assert "has changed" in succeeded(siv("data", "clean"))
    assert not made["own.zip"].exists()
    assert own.exists()
    assert "nothing to remove" in succeeded(siv("data", "clean"))


# -- siv data check --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zip_it", [False, True])
def test_data_check_reads_all_of_a_folder_or_a_zip(tmp_path, siv, zip_it):
    root = tmp_path / "own"
    tree(root, "train/x/1.png", "train/y/1.png", "test/x/1.png")
    (root / "train/x/2.png").write_bytes(b"")
    (root / "train/notes.txt").touch()
    place = zipped(root, tmp_path / "own.zip") if zip_it else root
    done = siv("data", "check", place, "--json")
    assert done.returncode == 2
    report = json.loads(done.stdout)
    assert (report["pictures"], report["readable"], report["sizes"]) == (4, 3, {"8 × 8": 3})
    assert report["folders"] == ["test/ is held out", "2 classes by folder: x, y", "no picture is held out of the class y"]
    assert report["not_taken"] == ["1 file of another ending (train/notes.txt)"]
    [problem] = report["problems"]
    assert "train/x/2.png" in problem
    assert "train/x/2.png" in done.stderr


def test_data_check_says_what_cannot_be_told_of_folders(tmp_path):
    tree(tmp_path / "own", "x/1.png", "2.png")
    report = cli_data.checked(tmp_path / "own", quiet)
    assert report["problems"] == []
    assert "lie loose beside the class folders x" in report["folders"][0]


# -- options ---------------------------------------------------------------------------------------------------------------------


def test_a_box_has_four_numbers():
    with pytest.raises(UserError, match=r"data.box: expected left, top, width and height, got \[1, 2\]"):
        data_of(Path("x"), box=(1, 2))
    with pytest.raises(UserError, match=r"got \[0, 0, 0, 5\]"):
        data_of(Path("x"), box=(0, 0, 0, 5))


def test_pictures_that_do_not_hold_the_box_are_told(tmp_path):
    tree(tmp_path / "own", "a.png", "b.png")
    save(tmp_path / "own/c.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"c\.png: has 4 × 4 pixels, which do not hold the box of 4 × 4 at 2, 2"):
        prepared(tmp_path / "own", box=(2, 2, 4, 4))
    assert len(images(prepared(tmp_path / "own", box=(2, 2, 4, 4), damaged="skip", size=4))) == 2


# -- work goes on ----------------------------------------------------------------------------------------------------------------

MANY = 60


@pytest.fixture
def many(tmp_path) -> Path:
    """Pictures that take a block each: one large file under many names."""
    root = tmp_path / "many"
    save(root / "00.bmp", RANDOM.integers(0, 256, (1200, 1200, 3), dtype=np.uint8))
    for i in range(1, MANY):
        os.link(root / "00.bmp", root / f"{i:02}.bmp")
    return root


def prepare(folder: Path, fresh: bool) -> Any:
    """The command at work; in a new interpreter, or as a fork of one that has torch."""
    arguments = ["data", "prepare", "image_folder", "--set", f"path={folder}", "--set", "size=8"]
    if not fresh:
        return forked.Siv(folder, *arguments)
    command = [sys.executable, str(forked.COMMAND), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc, which Linux alone has")
@pytest.mark.parametrize("how", ["killed", "interrupted", "a child killed"])
def test_a_preparation_that_ends_early_goes_on_where_it_stopped(tmp_path, many, how):
    process = prepare(many, fresh=how == "killed")
    journal, deadline = None, time.monotonic() + 60
    while not journal and process.poll() is None and time.monotonic() < deadline:
        journal = next((tmp_path / "data").glob("image_folder/many-*.h5.partial.json"), None)
        time.sleep(0.002)
    assert journal, process.communicate()
    helpers = children_of(getattr(process, "process", process).pid)
    assert helpers
    if how == "a child killed":
        os.kill(helpers[0], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == {"killed": -signal.SIGKILL, "interrupted": 130, "a child killed": 2}[how], err
    if how == "a child killed":
        assert "the process that decodes pictures ended (signal SIGKILL)" in err
        assert "the same command goes on where it stopped" in err
    while any(map(alive, helpers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, helpers))
    done = len(json.loads(journal.read_text())["done"])
    assert 0 < done < MANY
    seen: list[int] = []
    data = prepared(many, lambda what, done, total: seen.append(done))
    assert seen[0] == done
    assert (images(data) == images(data)[:1]).all()
    assert datafile.check(data.path)["problems"] == []
    assert sorted(path.name for path in data.path.parent.iterdir()) == [data.path.name, f"{data.path.name}.from.json"]


def test_what_was_told_of_pictures_outlives_an_interruption(tmp_path, monkeypatch):
    """Damage and changes of blocks that were done before are in the notes afterwards."""
    monkeypatch.setattr(picture_files, "MOST_IN_BLOCK", 1)
    monkeypatch.setattr(picture_pool, "children", lambda pictures, blocks: 1)
    root = tmp_path / "own"
    tree(root, "c.png", "d.png")
    (root / "a.png").write_bytes(b"")
    PLAIN.convert("L").save(root / "b.png")

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        prepared(root, stop, damaged="skip")
    data = prepared(root, damaged="skip")
    told = "\n".join(data.notes())
    assert "1 damaged pictures left out: a.png" in told
    assert "1 pictures L converted to RGB" in told
    assert "pictures of 4 × 4 to 8 × 8 pixels" in told


def test_children_are_as_many_as_there_is_work_and_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert [picture_pool.children(*work) for work in ((10, 5), (100, 1), (100, 3), (1000, 50))] == [1, 1, 3, 4]


def test_blocks_are_shared_out_and_come_whole(tmp_path, monkeypatch):
    """Two children, blocks in any order, every row in its place."""
    monkeypatch.setattr(picture_files, "MOST_IN_BLOCK", 3)
    monkeypatch.setattr(picture_pool, "FEW", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    started = []
    real = picture_pool.Child
    monkeypatch.setattr(picture_pool, "Child", lambda: started.append(real()) or started[-1])
    arrays = tree(tmp_path / "own", *(f"{i:03}.png" for i in range(50)))
    data = prepared(tmp_path / "own")
    assert len(started) == 2
    assert all(child.process.returncode is not None for child in started)
    assert (images(data) == np.stack(list(arrays.values()))).all()


def test_a_script_without_a_guard_and_with_threads(tmp_path):
    """No process of the pool runs the script again, and none is forked beside torch's threads."""
    tree(tmp_path / "own", *(f"{i}.png" for i in range(70)))
    (tmp_path / "PIL.py").write_text("raise SystemExit('somebody else’s')")
    script = tmp_path / "folder/script.py"
    script.parent.mkdir()
    script.write_text(
        "import torch\nfrom siv_plugins import image_folder\nprint('once')\ntorch.ones(9, 9) @ torch.ones(9, 9)\n"
        f"data = image_folder.build(image_folder.ImageFolderConfig(path={str(tmp_path / 'own')!r}, size=8))\n"
        "data.prepare(lambda what, done, total: None)\nprint(len(data.rows('train')))\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "once\n63\n", done.stderr


def test_the_child_loads_no_torch(tmp_path):
    heavy = "[name for name in ('torch', 'h5py', 'matplotlib') if name in sys.modules]"
    code = f"import sys, siv_core.data.picture_child; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_a_bug_in_the_child_is_no_damaged_picture(tmp_path):
    tree(tmp_path / "own", "a.png")
    entries = picture_list.listed(tmp_path / "own").entries
    with pytest.raises(RuntimeError, match=r"KeyError: 'no such filter'"):
        list(
            picture_pool.decoded(
                tmp_path / "own", "folder", lambda n: entries, [0], Fitting(4, resampling="no such filter"), lambda: None
            )
        )


def test_a_text_bomb_and_a_wrong_length_are_damaged(tmp_path):
    import zlib

    tree(tmp_path / "own", "a.png")
    (tmp_path / "own/b.png").write_bytes(png(4, 4, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26)))))
    (tmp_path / "own/c.png").write_bytes(png(4, 4).replace(b"\0\0\0\rIHDR", b"\0\0\0\x0eIHDR"))
    with pytest.raises(UserError, match=r"b.png: [^\n]*Decompressed data too large[^\n]*\n.*c.png: no picture"):
        prepared(tmp_path / "own")


def test_pictures_go_in_as_own_pictures_do(tmp_path):
    """By area means, whole multiples: an image of the data and one that a user gives afterwards agree to the rounding."""
    from siv_core.data import feed
    from siv_core.protocols import Spec

    array = save(tmp_path / "own/a.png", RANDOM.integers(0, 256, (24, 16, 3), dtype=np.uint8))
    picture, _ = load(tmp_path / "own/a.png")
    stored = torch.from_numpy(fitted(picture, Fitting(4), "")[0]).float() / 255
    direct = feed.to_float(torch.from_numpy(array.transpose(2, 0, 1).copy())[None], Spec((3, 4, 4)))[0]
    assert (stored - direct).abs().max() <= 0.5 / 255 + 1e-6


def test_the_note_of_a_conversion_may_be_gone(tmp_path):
    tree(tmp_path / "own", "a.png", "b.png")
    data = prepared(tmp_path / "own")
    data.path.with_name(f"{data.path.name}.from.json").unlink()
    again = prepared(tmp_path / "own")
    assert again.fingerprint() == data.fingerprint()
    assert list(cache.leftovers(tmp_path / "data")) == []
