"""A user's own pictures: every kind is fitted, everything else gets a sentence."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image
from torch import nn

from siv_core.cli import data as cli_data
from siv_core.data import feed
from siv_core.data.picture import ORIENTATION
from siv_core.errors import UserError
from siv_core.model import Model
from siv_core.nets import Priors
from siv_core.protocols import Spec
from siv_core.use import own_pictures


def model(channels: int = 3, size: int = 4) -> Model:
    return Model(nn.Identity(), nn.Identity(), Priors({}), Spec((channels, size, size)), {"z": 4}, None, torch.device("cpu"))


def fitted(path: Path, channels: int = 3) -> tuple[torch.Tensor, list[str]]:
    x, notes = own_pictures.own_images([path], model(channels))
    assert x.shape == (1, channels, 4, 4)
    return x[0], [note.removeprefix(f"{path}: ") for note in notes]


def quiet(what: str, done: int, total: int) -> None:
    pass


LEVEL = 102  # 0.4 of 255
PLAIN = Image.new("RGB", (4, 4), (LEVEL,) * 3)
DEEP = "16 bits reduced to 8: 65,535 is white, its highest value 26,214"
KINDS = {
    "rgb.png": (PLAIN, ""),
    "grey.png": (PLAIN.convert("L"), "L converted to RGB"),
    "palette.png": (PLAIN.convert("P"), "P converted to RGB"),
    "cmyk.tif": (PLAIN.convert("CMYK"), "CMYK converted to RGB"),
    "cmyk.jpg": (PLAIN.convert("CMYK"), "CMYK converted to RGB"),
    "16 bit.png": (
        Image.fromarray(np.full((4, 4), LEVEL * 257, np.uint16)),
        f"{DEEP}, L converted to RGB",
    ),
    "lab.tif": (Image.new("LAB", (4, 4), (110, 128, 128)), "LAB converted to RGB"),
    "one.png": (Image.new("1", (4, 4), 0), "1 converted to RGB"),
    "thin.png": (Image.new("RGB", (1, 500), (LEVEL,) * 3), "1 × 500, its centre of 1 × 1 resized to 4 × 4"),
    "wide.webp": (Image.new("RGB", (500, 1), (LEVEL,) * 3), "500 × 1, its centre of 1 × 1 resized to 4 × 4"),
    "dot.bmp": (Image.new("RGB", (1, 1), (LEVEL,) * 3), "1 × 1 resized to 4 × 4"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_keeps_its_grey(tmp_path, name):
    picture, change = KINDS[name]
    picture.save(tmp_path / name)
    x, notes = fitted(tmp_path / name)
    assert notes == ([change] if change else [])
    assert (x - (0 if name == "one.png" else 0.4)).abs().max() < 0.02
    grey, _ = fitted(tmp_path / name, channels=1)
    assert (grey - x.mean(0, keepdim=True)).abs().max() < 0.02


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_can_be_seen_through_stands_on_white(tmp_path, mode):
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 2))
    picture.convert(mode).save(tmp_path / "a.png", **({"transparency": 1} if mode == "P" else {}))
    x, notes = fitted(tmp_path / "a.png")
    if mode != "P":
        assert x[:, :2].max() == 0
        assert x[:, 2:].min() == 1
    assert notes[0].startswith("put on white")


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (3, 3)), (6, (0, 3)), (8, (3, 0))])
def test_exif_turns_a_picture_upright(tmp_path, orientation, corner):
    picture = Image.new("RGB", (4, 4))
    picture.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    x, notes = fitted(tmp_path / "a.png")
    assert x[0, corner[0], corner[1]] == 1
    assert notes == (["turned upright"] if orientation != 1 else [])


def test_of_several_frames_the_first_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), (LEVEL + i,) * 3) for i in (0, 80)]
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    x, notes = fitted(tmp_path / "a.tiff")
    assert notes == ["the first of its 2 frames"]
    assert (x - 0.4).abs().max() < 0.02


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def bad(folder: Path, how: str) -> Path:
    path = folder / "a.png"
    if how == "a bomb of text":
        path.write_bytes(png(4, 4, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26)))))
    elif how == "a folder":
        folder = folder / "b.png" / "c.png"
        folder.mkdir(parents=True)
        return folder.parent
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "postscript":  # for which Pillow would start Ghostscript
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    elif how == "floats":
        path = folder / "a.tif"
        Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(path)
    elif how == "whole numbers of 32 bits":
        path = folder / "a.tif"
        Image.fromarray(np.full((4, 4), LEVEL * 257, np.int32)).save(path)
    elif how == "truncated":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif how == "a wrong length":
        path.write_bytes(png(4, 4).replace(b"\0\0\0\rIHDR", b"\0\0\0\x0eIHDR"))
    elif how != "missing":
        path.write_bytes(
            {"empty": b"", "text": b"no picture", "a bomb": png(60000, 60000), "nearly a bomb": png(10000, 9500)}[how]
        )
    return path


BAD = {
    "missing": r"No such file",
    "empty": "it is none of PNG, JPEG, BMP, WEBP, TIFF, GIF, or damaged at its start",
    "text": "it is none of PNG",
    "postscript": "it is none of PNG",
    "a wrong length": "it is none of PNG",
    "truncated": "truncated",
    "a bomb": "it has more than the 89 million pixels that are read; make it smaller first",
    "nearly a bomb": "it has more than the 89 million pixels that are read; make it smaller first",
    "a bomb of text": r"Decompressed data too large",
    "a folder": r"no pictures in this folder \(.*\); it has 1 folder in it \(c.png\)",
    "a pipe": "it is no regular file",
    "whole numbers of 32 bits": "its pixels are whole numbers of 32 bits, which have no agreed range; save it with 8 or 16",
    "floats": "its pixels are floats, which have no agreed range; save it with 8 or 16 bits",
}


@pytest.mark.parametrize("how", BAD)
def test_what_is_no_picture_gets_a_sentence(tmp_path, how):
    path = bad(tmp_path, how)
    with pytest.raises(UserError, match=BAD[how]) as caught:
        own_pictures.own_images([path], model())
    [problem] = caught.value.problems
    assert problem.startswith(str(path))


def test_all_pictures_that_cannot_be_read_are_told_at_once(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    PLAIN.save(tmp_path / "c.png")
    with pytest.raises(UserError) as caught:
        own_pictures.own_images([tmp_path], model())
    assert [Path(problem.split(":")[0]).name for problem in caught.value.problems] == ["a.png", "b.png"]


ODD = [b"two\nlines.png", b"\xff\xfe.png", b"-x.png", b"a,b.png", b"\x1b[31m.png", "漢 字.png".encode()]


@pytest.mark.parametrize("name", ODD)
def test_odd_names(tmp_path, name):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    PLAIN.convert("L").save(path)
    assert own_pictures.listed(str(path)) == [path]
    _, [note] = own_pictures.own_images([tmp_path], model())
    path.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        own_pictures.own_images([path], model())
    for line in (note, *caught.value.problems):
        assert line.isprintable()
        line.encode()


def test_lists_of_paths():
    assert own_pictures.listed("a.png,b/,c.png") == [Path("a.png"), Path("b"), Path("c.png")]


def test_what_is_left_out_of_a_folder_is_told(tmp_path):
    for name in ("b.JPG", "a.png", "._a.png", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    assert own_pictures.expand([tmp_path / "a.png"]) == ([tmp_path / "a.png"], [])
    taken, [note] = own_pictures.expand([tmp_path])
    assert [path.name for path in taken] == ["a.png", "b.JPG"]
    assert note == f"{tmp_path}: 2 pictures of it taken, not 1 file of another ending (notes.txt)"
    for name in ("deep.png", "d2", "d3", "d4"):
        (tmp_path / name).mkdir()
    (tmp_path / "movie.mp4").touch()
    _, [note] = own_pictures.expand([tmp_path])
    assert note.endswith("not 4 folders in it (d2, d3, d4, …) and 2 files of other endings (movie.mp4, notes.txt)")


def test_data_check_tells_what_it_left_out(tmp_path):
    PLAIN.save(tmp_path / "a.png")
    (tmp_path / "more").mkdir()
    report = cli_data.checked(tmp_path, quiet)
    assert report["not_taken"] == ["1 folder without pictures (more/)"]


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize("stored", [(8, 8), (8, 16), (12, 6), (7, 9), (4, 4)])
def test_an_image_goes_in_as_the_data_does(tmp_path, fit, stored):
    """The same pixels, from a picture file and from the rows of a data set."""
    image = np.random.default_rng(0).integers(0, 256, (3, *stored), dtype=np.uint8)
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "a.png")
    spec = Spec((3, 4, 4), fit=fit)
    x, _ = own_pictures.own_images([tmp_path / "a.png"], evolve(model(), spec=spec))
    assert torch.equal(x, feed.to_float(torch.from_numpy(image)[None], spec))


@pytest.mark.parametrize(("channels", "mode"), [(2, "LA"), (4, "RGBA")])
def test_models_of_other_channels_take_pictures_that_have_them(tmp_path, channels, mode):
    picture = Image.new("RGBA", (4, 4), (LEVEL, LEVEL, LEVEL, 51)).convert(mode)
    picture.save(tmp_path / "a.png")
    x, notes = fitted(tmp_path / "a.png", channels)
    assert notes == []
    assert (x[:-1] - 0.4).abs().max() < 1e-6
    assert (x[-1] - 0.2).abs().max() < 1e-6
    with pytest.raises(UserError, match="pictures have 1 to 4 channels and this model's images 5"):
        fitted(tmp_path / "a.png", 5)


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.png", "b.png"):
        PLAIN.save(tmp_path / name)
    assert own_pictures.expand(own_pictures.listed("~/a.png,~/b.png"))[0] == [tmp_path / "a.png", tmp_path / "b.png"]
    assert own_pictures.expand([Path("~")])[0] == [tmp_path / "a.png", tmp_path / "b.png"]


def test_check_counts_modes_sizes_and_what_cannot_be_read(tmp_path):
    for name, (picture, _) in KINDS.items():
        picture.save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"")
    report = cli_data.checked(tmp_path, quiet)
    assert (report["kind"], report["pictures"], report["readable"]) == ("pictures", len(KINDS) + 1, len(KINDS))
    assert report["modes"] == {"RGB": 5, "CMYK": 2, "L": 1, "P": 1, "I;16": 1, "1": 1}
    assert report["sizes"] == {"4 × 4": 8, "1 × 500": 1, "500 × 1": 1, "1 × 1": 1}
    assert report["changes"][f"{DEEP}"] == 1
    [problem] = report["problems"]
    assert problem.startswith(f"{tmp_path / 'broken.png'}: no picture that can be read")
    assert cli_data.checked(tmp_path / "rgb.png", quiet)["problems"] == []
