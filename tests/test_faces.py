"""CelebA, CelebA-HQ, FFHQ and LSUN as people have them: the published crops and splits, and what differs is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from PIL import Image
from siv_plugins import faces, lsun
from test_image_folder import images, quiet, save, zipped

from siv_core.data import picture_child
from siv_core.errors import UserError
from siv_core.testing import check_dataset

PARTITION = "000001.jpg 0\n000002.jpg 0\n000003.jpg 1\n000004.jpg 2\n000005.jpg 2\n"


@pytest.fixture(autouse=True)
def own_root(tmp_path, monkeypatch):
    monkeypatch.setenv("SIV_DATA", str(tmp_path / "data"))


def coordinates() -> np.ndarray:
    """178 × 218 pixels that say where they are: red is the column, green the row."""
    rows, columns = np.indices((218, 178), dtype=np.uint8)
    return np.stack([columns, rows, np.zeros_like(rows)], axis=-1)


@pytest.fixture
def celeba(tmp_path) -> Path:
    """Five pictures and their lists, laid out as the authors' folders are."""
    for i in range(1, 6):
        path = tmp_path / f"data/celeba/Img/img_align_celeba/{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coordinates()).save(path, "PNG")  # whose pixels come back as they are
    for folder, name, text in (
        ("Eval", "list_eval_partition.txt", PARTITION),
        ("Anno", "identity_CelebA.txt", "".join(f"{i:06}.jpg {number}\n" for i, number in enumerate((2880, 7, 9, 2880, 7), 1))),
    ):
        (tmp_path / "data/celeba" / folder).mkdir()
        (tmp_path / "data/celeba" / folder / name).write_text(text)
    return tmp_path / "data/celeba"


def of_celeba(**options: Any) -> Any:
    data = faces.build_celeba(faces.CelebAConfig(**options))
    assert data.missing() is None
    data.prepare(quiet)
    return data


@pytest.mark.parametrize(
    ("crop", "corner"),
    [("pggan", (89 - 64, 121 - 64)), ("alae", (25, 45 + 15)), ("lord", (25, 45))],
)
@pytest.mark.usefixtures("celeba")
def test_the_published_crops(crop, corner):
    image = images(of_celeba(crop=crop, size=128))[0]
    left, top = corner
    assert (image == coordinates()[top : top + 128, left : left + 128]).all()


@pytest.mark.usefixtures("celeba")
def test_the_other_crops():
    centre = images(of_celeba(crop="centre", size=178))[0]
    assert (centre == coordinates()[20:198]).all()
    squeezed = images(of_celeba(crop="none", size=109))[0]  # the published code's: all of it
    assert squeezed[0, 0, 0] <= 1
    assert squeezed[-1, -1, 1] >= 216


@pytest.mark.usefixtures("celeba")
def test_celebas_parts():
    data = of_celeba(size=8)
    check_dataset(data)
    assert data.counts() == {"train": 2, "held_out": 2}
    assert data.spec.classes is None
    told = [line.partition("img_align_celeba: ")[2] for line in data.notes()]
    assert told[:3] == [
        "part train: 2 pictures (162,770 are published), trained on",
        "part validation: 1 pictures (19,867 are published), not used",
        "part test: 2 pictures (19,962 are published), held out",
    ]
    other = of_celeba(size=8, held_out="validation")
    assert other.counts() == {"train": 2, "held_out": 1}
    assert any("part test: 2 pictures (19,962 are published), not used" in line for line in other.notes())
    assert data.path.exists()
    assert other.fingerprint() != data.fingerprint()


@pytest.mark.usefixtures("celeba")
def test_celebas_identities():
    data = of_celeba(size=8, labels="identity")
    assert data.rows("train").labels.tolist() == [1, 0, 1, 0]  # 2880, 7, 2880, 7
    assert data.spec.classes == 2
    assert any(line.endswith("2 identities, numbered from 0 in their order") for line in data.notes())


def test_a_zip_of_celeba_with_a_list_as_kaggle_has_it(tmp_path, celeba):
    place = tmp_path / "elsewhere/img_align_celeba.zip"
    place.parent.mkdir()
    zipped(celeba / "Img", place)
    lines = PARTITION.replace(" ", ",").splitlines()
    (tmp_path / "elsewhere/list_eval_partition.csv").write_text("\n".join(["image_id,partition", *lines]) + "\n")
    expected = of_celeba(size=8).fingerprint()
    assert of_celeba(path=str(place), size=8).fingerprint() == expected
    assert of_celeba(path=str(place.parent), size=8).fingerprint() == expected


def test_celeba_as_it_is_not(tmp_path, celeba):
    save(celeba / "Img/img_align_celeba/more.png")
    data = of_celeba(size=8)
    assert any("1 pictures are in no part, and not used" in line for line in data.notes())
    config = faces.CelebAConfig(labels="identity")
    (celeba / "Anno/identity_CelebA.txt").write_text("000001.jpg 5\n")
    with pytest.raises(UserError, match=r"3 pictures have no identity, such as 000002\.jpg"):
        faces.choose_celeba(config)
    (celeba / "Anno/identity_CelebA.txt").unlink()
    assert "identity_CelebA.txt is not beside" in faces.celeba_missing(config)
    lists = celeba / "Eval/list_eval_partition.txt"
    for text, words in (
        (PARTITION + "000006.jpg\n", "line 6 is no file name with a number: 000006.jpg"),
        (PARTITION + "000006.jpg 7\n", r"has parts \[7\]; there are 0 \(train\), 1 \(validation\) and 2 \(test\)"),
        ("x.jpg 0\n", "none of its pictures is in a part that is used of"),
    ):
        lists.write_text(text)
        with pytest.raises(UserError, match=words):
            faces.choose_celeba(faces.CelebAConfig())
    lists.unlink()
    assert "list_eval_partition.txt is not beside" in faces.celeba_missing(faces.CelebAConfig())
    assert "data.partition = '/nowhere.txt' is no file" in faces.celeba_missing(faces.CelebAConfig(partition="/nowhere.txt"))
    assert "put img_align_celeba (folder or zip)" in faces.celeba_missing(faces.CelebAConfig(path=str(tmp_path / "nowhere")))
    lists.write_text(PARTITION)
    save(celeba / "Img/img_align_celeba/deep/000001.jpg")
    with pytest.raises(UserError, match=r"000001\.jpg is in more than one of its folders"):
        faces.choose_celeba(faces.CelebAConfig())


# -- numbered pictures -----------------------------------------------------------------------------------------------------------


def numbered(name: str, place: Path, **options: Any) -> Any:
    config = {"celeba_hq": faces.CelebAHQConfig, "ffhq": faces.FFHQConfig}[name]
    data = faces.build_numbered(name, config(path=str(place), size=4, **options))
    data.prepare(quiet)
    return data


def grey(path: Path, value: int) -> None:
    save(path, np.full((8, 8, 3), value, np.uint8))


def test_celeba_hq_is_split_by_number(tmp_path):
    for number in (9, 10, 2, 111, 30):  # by name 10.png stands before 2.png
        grey(tmp_path / f"own/{number}.png", number)
    data = numbered("celeba_hq", tmp_path / "own", held_out=2)
    check_dataset(data)
    assert images(data)[:, 0, 0, 0].tolist() == [2, 9, 10, 30, 111]
    assert data.rows("held_out").index.tolist() == [3, 4]
    told = "\n".join(data.notes())
    assert "5 pictures, 30,000 are published" in told
    assert "the last 2 by number are held out, from 30 on" in told
    with pytest.raises(UserError, match=r"has 5 pictures, data.held_out = 1,000 of them leaves none"):
        numbered("celeba_hq", tmp_path / "own")
    grey(tmp_path / "own/img000009.jpg", 0)
    with pytest.raises(UserError, match="more than one picture has the number 9"):
        numbered("celeba_hq", tmp_path / "own", held_out=2)
    (tmp_path / "own/img000009.jpg").rename(tmp_path / "own/cover.jpg")
    with pytest.raises(UserError, match=r"cover\.jpg has no number"):
        numbered("celeba_hq", tmp_path / "own", held_out=2)


def test_ffhq_is_in_folders(tmp_path):
    for number in (0, 999, 1000, 1001):
        grey(tmp_path / f"data/ffhq/images1024x1024/{number // 1000 * 1000:05}/{number:05}.png", number % 200)
    (tmp_path / "data/ffhq/images1024x1024/LICENSE.txt").touch()
    data = faces.build_numbered("ffhq", faces.FFHQConfig(size=4, held_out=1))
    assert data.missing() is None
    data.prepare(quiet)
    assert images(data)[:, 0, 0, 0].tolist() == [0, 199, 0, 1]
    assert data.rows("held_out").index.tolist() == [3]
    assert any(line.endswith("not taken: 1 file of another ending (LICENSE.txt)") for line in data.notes())
    assert "4 pictures, 70,000 are published" in "\n".join(data.notes())
    assert data.spec.classes is None  # the folders are no classes


def test_what_is_not_at_hand_is_said(catalogue):
    for name, words in (("celeba_hq", "celeba_hq/images"), ("ffhq", "images1024x1024"), ("lsun_bedroom", "data.mdb")):
        component = catalogue.get("dataset", name)
        assert words in component.build(component.config()).missing()


# -- LSUN ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bedrooms(tmp_path) -> Path:
    """An LMDB as LSUN's, with one entry that is no picture."""
    place = tmp_path / "bedroom_train_lmdb"
    with lmdb.open(str(place), map_size=1 << 24) as opened, opened.begin(write=True) as transaction:
        for i in (3, 0, 2, 1, 4):
            save(tmp_path / "one.webp", np.full((8, 12, 3), 40 * i, np.uint8), lossless=True)
            data = (tmp_path / "one.webp").read_bytes()
            transaction.put(f"{i:040x}".encode(), data if i != 2 else data[:20])
    return place


def of_lsun(place: Path, **options: Any) -> Any:
    data = lsun.build(lsun.LSUNConfig(path=str(place), **{"size": 4, "held_out": 0.3, **options}))
    assert data.missing() is None
    data.prepare(quiet)
    return data


def test_lsun_is_read_by_its_keys_and_broken_entries_are_left_out(bedrooms, monkeypatch):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in bedrooms.iterdir())
    data = of_lsun(bedrooms)
    check_dataset(data)
    assert images(data)[:, 0, 0, 0].tolist() == [0, 40, 120, 160]
    assert data.about()["damaged"] == {"count": 1, "names": [f"{2:040x}"]}
    assert "5 pictures, 3,033,042 are published" in "\n".join(data.notes())
    assert images(of_lsun(bedrooms, count=2))[:, 0, 0, 0].tolist() == [0, 40]
    with pytest.raises(UserError, match="1 pictures cannot be used"):
        of_lsun(bedrooms, damaged="error")
    assert sorted((path.name, path.stat().st_mtime_ns) for path in bedrooms.iterdir()) == before


def test_keys_come_in_pages(bedrooms, monkeypatch):
    monkeypatch.setattr(picture_child, "KEYS_AT_ONCE", 2)
    found = picture_child._keys(str(bedrooms), "lmdb", "", 99)[0]["keys"]
    found += picture_child._keys(str(bedrooms), "lmdb", found[-1], 99)[0]["keys"]
    assert [int(key, 16) for key in found] == [0, 1, 2, 3]


@pytest.mark.parametrize("left", [8192, 8192 + 2048])
def test_a_cut_lmdb_is_a_sentence(bedrooms, left):
    """Its library may crash on it, in the child."""
    data = (bedrooms / "data.mdb").read_bytes()
    (bedrooms / "data.mdb").write_bytes(data[:left])
    with pytest.raises(UserError, match=str(bedrooms)):
        of_lsun(bedrooms)


def test_an_lmdb_that_is_none(tmp_path, bedrooms, monkeypatch):
    (bedrooms / "data.mdb").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match=r"its data.mdb cannot be read as an LMDB \(.*MDB_INVALID"):
        of_lsun(bedrooms)
    with lmdb.open(str(tmp_path / "empty"), map_size=1 << 20):
        pass
    with pytest.raises(UserError, match="no pictures in this LMDB"):
        of_lsun(tmp_path / "empty")
    monkeypatch.setattr(lsun, "find_spec", lambda name: None)
    assert "pip install 'siv[lsun]'" in lsun.build(lsun.LSUNConfig(path=str(bedrooms))).missing()
