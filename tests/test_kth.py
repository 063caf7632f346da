"""`kth` on avi files, zips and frames written here as the published ones are, a few frames of 160 × 120 each."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from siv_plugins import kth as plugin

from siv_core import UserError
from siv_core.data import video, video_child
from siv_core.errors import Stopped
from siv_core.testing import check_dataset

HEAD = """\
                     Action database, sequence list

      Training:    person11, 12, 13, 14, 15, 16, 17, 18
      Validation:  person19, 20, 21, 23, 24, 25, 01, 04
      Test:        person22, 02, 03, 05, 06, 07, 08, 09, 10

"""
FRAMES = 10
LORD: dict[str, Any] = {"actions": ("handwaving",), "scenarios": (4,)}
NAMES = [f"person{p:02}_handwaving_d4" for p in range(1, 26)]


def level(person: int, frame: int) -> int:
    """The grey of a whole frame, which tells whose it is; frames are counted from 1."""
    return 20 + 8 * person + 3 * (frame % 2)


def write_avi(path: Path, levels: Sequence[int], size: tuple[int, int] = (160, 120)) -> None:
    """MPEG-4 in avi, as the published files are; each frame of one grey, black 0 and white 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 2_000_000
        for number, grey in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def sequences(ranges: str = "1-4, 5-10", names: Sequence[str] = NAMES) -> str:
    return HEAD + "".join(f"{name}\t\tframes\t{ranges}\n" for name in names)


@pytest.fixture(scope="module")
def avis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder handwaving/ with the 25 videos of scenario d4; not to be changed."""
    folder = tmp_path_factory.mktemp("kth")
    for person, name in enumerate(NAMES, 1):
        write_avi(folder / "handwaving" / f"{name}_uncomp.avi", [level(person, frame) for frame in range(1, FRAMES + 1)])
    (folder / plugin.SEQUENCES).write_text(sequences())
    return folder


@pytest.fixture
def own(avis: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    folder = tmp_path / "own"
    (folder / "handwaving").mkdir(parents=True)
    for path in avis.rglob("*.*"):
        (folder / path.relative_to(avis)).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIV_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def ready(data_root: Path, avis: Path, shared_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the videos, decoded in a data root that tests share."""
    monkeypatch.setenv("SIV_DATA", str(shared_root))
    return avis


def quiet(what: str, done: int, total: int) -> None:
    pass


def build(source: Path, **options: Any) -> plugin.KTH:
    return plugin.KTH(plugin.KTHConfig(**{"size": 8, "source": str(source), **LORD, **options}))


def prepared(source: Path, **options: Any) -> plugin.KTH:
    data = build(source, **options)
    assert data.missing() is None
    data.prepare(quiet)
    return data


def table(data: plugin.KTH) -> tuple[np.ndarray, np.ndarray]:
    """Images and factors of the whole file."""
    rows = data.rows("train")
    assert rows.factors is not None
    return rows.x.numpy(), rows.factors.numpy()


def naive_area(image: np.ndarray, size: int) -> np.ndarray:
    """Every pixel cut into size × size equal ones, then plain means."""
    fine = image.astype(np.float64).repeat(size, axis=0).repeat(size, axis=1)
    return fine.reshape(size, image.shape[0], size, image.shape[1]).mean(axis=(1, 3))


# ------------------------------------------------------------------------------------------------------------------------------
# What is read.


def as_zips(source: Path) -> None:
    with zipfile.ZipFile(source / "handwaving.zip", "w") as archive:
        for path in sorted((source / "handwaving").iterdir()):
            archive.write(path, f"some/../{path.name}")  # where a member says it lies is nobody's business
            path.unlink()


def as_flat_folder(source: Path) -> None:
    for path in (source / "handwaving").iterdir():
        path.rename(source / path.name)


def as_they_are(source: Path) -> None:
    pass


@pytest.mark.parametrize("form", [as_they_are, as_zips, as_flat_folder])
def test_frames_labels_and_factors(form: Callable[[Path], None], own: Path) -> None:
    form(own)
    data = prepared(own)
    images, factors = table(data)
    assert images.shape == (25 * FRAMES, 1, 8, 8)
    assert images.dtype == np.uint8
    assert list(data.spec.factors) == ["person", "action", "scenario", "frame"]
    expected = [(person, 2, 3, frame) for person in range(25) for frame in range(FRAMES)]
    assert factors.tolist() == [list(row) for row in expected]
    rows = data.rows("train")
    assert rows.labels is not None
    assert rows.labels.tolist() == factors[:, 0].tolist()
    greys = np.array([level(person + 1, frame + 1) for person, _, _, frame in expected])
    assert np.abs(images.mean(axis=(1, 2, 3)) - greys).max() < 2.5  # what MPEG-4 loses
    check_dataset(data)


def test_black_is_black_and_white_is_white(tmp_path: Path) -> None:
    """Whatever part of 0 … 255 the video is coded in."""
    path = tmp_path / "a.avi"
    write_avi(path, [0, 255] * 3)
    ((_, frames),) = video.decoded([video.Video("a", path)], 8, "stretch", 1)
    assert isinstance(frames, video.Frames)
    assert frames.total == 6
    assert np.abs(frames.images.mean(axis=(1, 2)) - np.array([0.0, 255.0] * 3)).max() < 3


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_extracted_frames(ending: str, own: Path) -> None:
    """In the order of their numbers, 10 after 9, of whatever size; equal channels are grey."""
    rng = np.random.Generator(np.random.PCG64(0))
    folder, kept = own / "handwaving" / NAMES[0], []
    (own / "handwaving" / f"{NAMES[0]}_uncomp.avi").unlink()
    folder.mkdir()
    for number in range(1, FRAMES + 1):
        grey = rng.integers(0, 256, (48, 64), dtype=np.uint8)
        kept.append(grey)
        picture = Image.fromarray(np.stack([grey] * 3, axis=2) if number % 2 else grey)
        picture.save(folder / f"image-{number}_64x48{ending}", **({"quality": 100} if ending == ".jpg" else {}))
    images, _ = table(prepared(own))
    expected = np.stack([naive_area(image, 8) for image in kept])
    assert np.abs(images[:FRAMES, 0] - expected).max() <= (0.5001 if ending == ".png" else 1.5)


@pytest.mark.parametrize(("fit", "columns"), [("stretch", slice(None)), ("crop", slice(20, 140))])
@pytest.mark.parametrize("size", [8, 64, 120])
def test_sizes_are_area_means(fit: str, columns: slice, size: int) -> None:
    """Along each axis, by running sums, which are linear inside a pixel."""
    image = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (120, 160), dtype=np.uint8)

    def means(line: np.ndarray) -> np.ndarray:
        sums = np.append(0, line.cumsum())
        return np.diff(np.interp(np.arange(size + 1) * len(line) / size, np.arange(len(sums)), sums)) * size / len(line)

    expected = np.apply_along_axis(means, 0, np.apply_along_axis(means, 1, image[:, columns].astype(np.float64)))
    assert np.abs(video_child.fitted(image, size, fit) - expected).max() <= 0.5001


def test_sequences_say_which_frames(own: Path) -> None:
    (own / plugin.SEQUENCES).write_text(sequences("6-9, 2-3"))
    images, factors = table(prepared(own))
    assert (factors[factors[:, 0] == 3][:, 3] + 1).tolist() == [2, 3, 6, 7, 8, 9]
    assert np.abs(images.mean(axis=(1, 2, 3)) - [level(person + 1, frame + 1) for person, _, _, frame in factors]).max() < 2.5
    assert build(own).path != build(own, every=3).path != build(own, ranges=False).path


@pytest.mark.parametrize(
    ("ranges", "every", "expected"),
    [
        (((6, 9), (2, 7)), 1, [2, 3, 4, 5, 6, 7, 8, 9]),  # overlapping ones give a frame once
        (((2, 7), (6, 9)), 3, [2, 5, 6, 9]),  # of each the first is taken, then every so many-th
        (None, 1, list(range(1, 11))),
        (None, 4, [1, 5, 9]),
        (((9, 30),), 1, [9, 10]),
    ],
)
def test_which_frames_are_taken(ranges: Any, every: int, expected: list[int], avis: Path) -> None:
    one = video.Video(NAMES[0], avis / "handwaving" / f"{NAMES[0]}_uncomp.avi", ranges=ranges)
    ((_, answer),) = video.decoded([one], 8, "stretch", every)
    assert isinstance(answer, video.Frames)
    assert (answer.total, answer.numbers.tolist()) == (FRAMES, expected)
    assert np.abs(answer.images.mean(axis=(1, 2)) - [level(1, frame) for frame in expected]).max() < 2.5


def test_the_published_list(tmp_path: Path) -> None:
    path = tmp_path / plugin.SEQUENCES
    lines = "person01_boxing_d1\t\tframes\t1-95, 96-185, 186-245, 246-360\r\nperson13_handclapping_d3\t*missing*\r\n"
    path.write_bytes((HEAD.replace("\n", "\r\n") + lines).encode())
    assert plugin.sequences(path) == {
        "person01_boxing_d1": ((1, 95), (96, 185), (186, 245), (246, 360)),
        "person13_handclapping_d3": (),
    }


@pytest.mark.parametrize(
    "line",
    ["frames 1-", "frames 5-2", "frames 0-4", "frames", "1-95", "frames 1-4\nperson01_boxing_d1 frames 5-9", "frames -, -"],
)
def test_a_list_that_is_damaged(line: str, tmp_path: Path) -> None:
    path = tmp_path / plugin.SEQUENCES
    path.write_text(f"{HEAD}person01_boxing_d1 {line}\n")
    with pytest.raises(UserError, match=rf"{plugin.SEQUENCES}:(7|8): person01_boxing_d1"):
        plugin.sequences(path)
    path.write_text(HEAD)
    with pytest.raises(UserError, match="names no videos"):
        plugin.sequences(path)


# ------------------------------------------------------------------------------------------------------------------------------
# Splits.


@pytest.mark.parametrize(
    ("split", "train", "held_out"),
    [
        ("classic", range(11, 19), [22, 2, 3, 5, 6, 7, 8, 9, 10]),
        ("classic_validation", range(11, 19), [19, 20, 21, 23, 24, 25, 1, 4]),
        ("video_prediction", range(1, 21), range(21, 26)),
    ],
)
def test_persons_are_held_out(split: str, train: Sequence[int], held_out: Sequence[int], ready: Path) -> None:
    data = prepared(ready, split=split)
    for name, persons in (("train", train), ("held_out", held_out)):
        rows = data.rows(name)
        assert rows.labels is not None
        assert rows.index is not None
        assert set((rows.labels[rows.index] + 1).tolist()) == set(persons)
        assert len(rows) == FRAMES * len(persons)
    assert data.about()["held_out_persons"] == sorted(held_out)
    assert any("in neither split" in note for note in data.notes()) == split.startswith("classic")


def test_images_or_whole_videos_are_held_out(ready: Path) -> None:
    data = prepared(ready)
    train, held_out = (data.rows(name).index for name in ("train", "held_out"))
    assert train is not None
    assert held_out is not None
    assert (len(train), len(held_out)) == (225, 25)
    assert not set(train.tolist()) & set(held_out.tolist())
    assert any("neighbours" in note for note in data.notes())
    other = prepared(ready, split_seed=1).rows("held_out").index
    assert other is not None
    assert other.tolist() != held_out.tolist()
    data = prepared(ready, split="videos", held_out=0.2)
    chosen = {name: {int(n) // FRAMES for n in data.rows(name).index} for name in ("train", "held_out")}
    assert len(chosen["held_out"]) == 5
    assert not chosen["train"] & chosen["held_out"]
    assert data.about()["held_out_videos"] == sorted(NAMES[n] for n in chosen["held_out"])
    assert not any("neighbours" in note for note in data.notes())


# ------------------------------------------------------------------------------------------------------------------------------
# What is missing or damaged.


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_noise(path: Path) -> None:
    path.write_bytes(np.random.Generator(np.random.PCG64(0)).bytes(5000))


def lose_frames(path: Path) -> None:
    """Whole as a file, but its header announces more frames than there are."""
    data = path.read_bytes()
    assert data.count(FRAMES.to_bytes(4, "little")) >= 2  # in avih and strh
    path.write_bytes(data.replace(FRAMES.to_bytes(4, "little"), (40).to_bytes(4, "little")))


DAMAGES = [
    (cut_in_half, "is truncated"),
    (write_noise, "is no avi file"),
    (lose_frames, "breaks off after 10 of 40 frames"),
    (Path.unlink, "is not in"),
    (lambda path: write_avi(path, [100] * 4), "has 4 frames, 00sequences.txt names some up to 10"),
]


@pytest.mark.parametrize(("damage", "why"), DAMAGES)
def test_a_damaged_video_is_told_or_left_out(damage: Callable[[Path], None], why: str, own: Path) -> None:
    damage(own / "handwaving" / f"{NAMES[6]}_uncomp.avi")
    with pytest.raises(UserError, match=rf"{NAMES[6]} {why}.*damaged = \"skip\""):
        build(own).prepare(quiet)
    assert not build(own).path.exists()
    data = prepared(own, damaged="skip")
    left_out: Any = data.about()["left_out"]
    assert list(left_out) == [NAMES[6]]
    assert why in left_out[NAMES[6]]
    assert any(f"{NAMES[6]} is left out: it {why}" in note for note in data.notes())
    images, factors = table(data)
    assert len(images) == 24 * FRAMES
    assert 6 not in factors[:, 0]
    with pytest.raises(UserError, match=f"{NAMES[6]} {why}.*it was left out of"):
        build(own).prepare(quiet)  # made while it was allowed to be left out


def test_what_is_known_of_the_published_files_stops_nobody(tmp_path: Path) -> None:
    names = [f"person{p:02}_boxing_d4" for p in range(1, 26)] + [f"person{p:02}_handclapping_d3" for p in range(1, 26) if p != 13]
    for name in names:
        write_avi(tmp_path / name.split("_")[1] / f"{name}_uncomp.avi", [100] * FRAMES)
    lose_frames(tmp_path / "boxing" / "person01_boxing_d4_uncomp.avi")
    (tmp_path / plugin.SEQUENCES).write_text(sequences("1-2", names) + "person13_handclapping_d3\t*missing*\n")
    data = prepared(tmp_path, actions=("boxing",))
    assert data.about()["left_out"] == {"person01_boxing_d4": "breaks off after 10 of 40 frames"}
    data = prepared(tmp_path, actions=("handclapping",), scenarios=(3,))
    assert data.about()["left_out"] == {"person13_handclapping_d3": "does not exist"}
    assert any("person13_handclapping_d3 is left out: it does not exist (as published)" in note for note in data.notes())


def test_frames_beyond_the_end_are_told(own: Path) -> None:
    (own / plugin.SEQUENCES).write_text(sequences("1-4, 5-12"))
    data = prepared(own)
    assert len(table(data)[0]) == 25 * FRAMES
    assert data.about()["frames_beyond_the_end"] == dict.fromkeys(NAMES, 2)
    assert f"KTH: {NAMES[0]} ends 2 frames before {plugin.SEQUENCES} says so" in data.notes()


def test_a_video_that_is_not_in_the_list(own: Path) -> None:
    (own / plugin.SEQUENCES).write_text(sequences(names=NAMES[1:]))
    with pytest.raises(UserError, match=f"{NAMES[0]} has no frames in {plugin.SEQUENCES}"):
        build(own).prepare(quiet)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda folder: (folder / "image-3.png").write_bytes(b"nothing"), "image-3.png cannot be read"),
        (lambda folder: Image.new("L", (64, 40)).save(folder / "image-5.png"), "image-5.png is of another size"),
        (lambda folder: Image.new("I;16", (64, 48)).save(folder / "image-2.png"), "image-2.png has pixels of the kind I;16"),
        (lambda folder: [Image.new("L", (6, 7)).save(path) for path in folder.iterdir()], "too few for size = 8"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "has no frames"),
    ],
)
def test_damaged_frames(change: Callable[[Path], Any], why: str, tmp_path: Path) -> None:
    folder = tmp_path / "handwaving" / NAMES[0]
    folder.mkdir(parents=True)
    for number in range(1, 7):
        Image.new("L", (64, 48)).save(folder / f"image-{number}.png")
    change(folder)
    ((_, answer),) = video.decoded([video.Video(NAMES[0], folder)], 8, "stretch", 1)
    assert isinstance(answer, str)
    assert why in answer


def test_a_zip_that_is_damaged(own: Path) -> None:
    as_zips(own)
    path = own / "handwaving.zip"
    data = bytearray(path.read_bytes())
    data[len(data) // 40] ^= 255  # inside the first video: its check sum is wrong
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{NAMES[0]} cannot be read .*CRC"):
        build(own).prepare(quiet)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"handwaving\.zip: cannot be read as a zip file"):
        build(own).missing()


def test_a_decoder_that_finds_no_end_is_ended(avis: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each child dies of its first video; the others go to the next child, and all are told of."""
    monkeypatch.setattr(video, "SECONDS", 1e-4)
    found, _ = plugin.videos_in(avis)
    answers = {one.name: answer for one, answer in video.decoded(list(found.values())[:4], 8, "stretch", 1)}
    assert sorted(answers) == NAMES[:4]
    assert all(isinstance(answer, str) and "without an end" in answer for answer in answers.values())


def test_what_is_not_at_hand(tmp_path: Path, avis: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = build(tmp_path / "nowhere").missing()
    assert sentence is not None
    assert "https://www.csc.kth.se/cvap/actions/" in sentence
    assert "get handwaving.zip and 00sequences.txt" in sentence
    sentence = build(avis, actions=()).missing()
    assert sentence is not None
    assert "videos of boxing, handclapping, jogging, running, walking are not at hand" in sentence
    (own / plugin.SEQUENCES).unlink()
    sentence = build(own).missing()
    assert sentence is not None
    assert "data.ranges = false" in sentence
    assert build(own, ranges=False).missing() is None
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda name: None)
    sentence = build(avis).missing()
    assert sentence is not None
    assert "pip install 'siv[video]'" in sentence


# ------------------------------------------------------------------------------------------------------------------------------
# Preparing.


def test_it_goes_on_where_it_stopped_and_gives_the_same(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepared(own)
    images, fingerprint = table(whole)[0].copy(), whole.fingerprint()
    whole.path.unlink()

    def stop(what: str, done: int, total: int) -> None:
        if what == "decoding videos" and done == 9:
            raise Stopped(2)

    data, asked = build(own), []
    with pytest.raises(Stopped):
        data.prepare(stop)
    decoded = video.decoded
    monkeypatch.setattr(video, "decoded", lambda videos, *how: asked.extend(videos) or decoded(videos, *how))
    seen: list[tuple[str, int, int]] = []
    data.prepare(lambda *told: seen.append(told))
    assert len(asked) == 25 - 9
    assert seen[0] == ("decoding videos", 9, 25)
    assert np.array_equal(table(data)[0], images)
    assert data.fingerprint() == fingerprint
    assert sorted(path.name for path in data.folder.iterdir()) == [data.path.name, f"{data.path.name}.videos.json"]
    data.prepare(quiet)  # nothing is left to do
    assert len(asked) == 25 - 9


def test_the_data_file_goes_on_without_the_videos(own: Path) -> None:
    data = prepared(own)
    for path in own.rglob("*.*"):
        path.unlink()
    again = prepared(own)
    assert again.fingerprint() == data.fingerprint()
    assert len(again.rows("train")) == 225
    assert len(again.notes()) == len(data.notes())


def test_one_kept_twice_is_told(own: Path) -> None:
    (own / "handwaving" / NAMES[0]).mkdir()
    assert any("1 videos are in" in note and "more than once" in note for note in prepared(own).notes())


def test_data_check_reads_every_frame(siv: Callable[..., Any], own: Path) -> None:
    cut_in_half(own / "handwaving" / f"{NAMES[2]}_uncomp.avi")
    done = siv("data", "check", str(own), "--json")
    assert done.returncode == 2
    report = json.loads(done.stdout)
    assert (report["kind"], report["videos"], report["frames"], report[plugin.SEQUENCES]) == ("KTH", 25, 240, 25)
    assert len(report["missing"]) == 75  # of this action
    assert [f"{NAMES[2]} is truncated" in problem for problem in report["problems"]] == [True]


RECIPE = """
format = 1
[data]
name = "kth"
size = 8
actions = ["handwaving"]
scenarios = [4]
damaged = "skip"
source = "SOURCE"
[network]
name = "mlp"
hidden = [16]
z_dim = 4
[objective]
name = "vae"
[train]
batch = 8
length = "4 steps"
[metrics.latent_probes]
class_factor = "person"
"""


def test_a_run_tells_what_it_was_made_of(siv: Callable[..., Any], own: Path, tmp_path: Path) -> None:
    cut_in_half(own / "handwaving" / f"{NAMES[2]}_uncomp.avi")
    recipe = tmp_path / "small.toml"
    recipe.write_text(RECIPE.replace("SOURCE", str(own)))
    done = siv("run", str(recipe), "--run-dir", str(tmp_path / "run"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert list(manifest["data"]["left_out"]) == [NAMES[2]]
    assert any("left out" in note for note in manifest["data"]["notes"])


def test_the_recipe_is_checked_without_data(siv: Callable[..., Any]) -> None:
    done = siv("check", str(Path(__file__).parent.parent / "recipes" / "kth_translation.toml"), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert any("the videos of KTH are not at hand" in line for line in report["not_at_hand"])
    assert report["data"]["shape"] == [1, 64, 64]
    assert report["groups"] == {"class": 256, "content": 128}
