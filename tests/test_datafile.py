"""Data files of format 1: written whole or not at all, gone on with, and read only when they are what they say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from siv_core.data import datafile, hdf5, hdf5_child
from siv_core.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 5), dtype=np.uint8)
BLOCK = 3


def quiet(what: str, done: int, total: int) -> None:
    pass


class Maker:
    """Produces blocks of IMAGES, notes which were asked for, and stops after some."""

    def __init__(self, stop_after: int = 99) -> None:
        self.asked: list[int] = []
        self.stop_after = stop_after

    def __call__(self, numbers: list[int]) -> Any:
        self.asked = numbers
        for i, number in enumerate(reversed(numbers)):  # in any order
            if i == self.stop_after:
                raise KeyboardInterrupt
            yield number, IMAGES[number * BLOCK : (number + 1) * BLOCK]


def write(path: Path, produce: Any = None, progress: Any = quiet, source: str = "made up", **more: Any) -> None:
    datafile.write(path, shape=IMAGES.shape, block=BLOCK, produce=produce or Maker(), progress=progress, source=source, **more)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a" / "b" / "own.h5"
    labels, split = np.arange(10) % 3, (np.arange(10) > 7).astype(np.uint8)
    factors = np.stack([labels, np.arange(10) % 2], axis=1)
    write(path, labels=labels, factors=factors, factor_sizes={"one": 3, "two": 2}, split=split)
    table = datafile.read(path)
    assert isinstance(table.images, np.memmap)
    assert (table.images == IMAGES).all()
    assert table.sha256 == hashlib.sha256(IMAGES.tobytes()).hexdigest()
    assert (table.source, table.value_range, table.factor_sizes) == ("made up", (0.0, 1.0), {"one": 3, "two": 2})
    for got, given in ((table.labels, labels), (table.factors, factors), (table.split, split)):
        assert (got == given).all()
    assert [entry.name for entry in path.parent.iterdir()] == ["own.h5"]
    report = datafile.check(path)
    assert report["images"] == [10, 3, 4, 5]
    assert (report["classes"], report["held_out"], report["lowest"], report["highest"]) == (3, 2, IMAGES.min(), IMAGES.max())
    json.dumps(report)


def test_the_file_is_plain_hdf5(tmp_path):
    write(tmp_path / "own.h5")
    with h5py.File(tmp_path / "own.h5") as file:
        assert list(file) == ["images"]
        assert (file["images"].dtype, file["images"].chunks, file["images"].compression) == (np.uint8, None, None)
        assert file.attrs.keys() == {"format", "source", "sha256", "value_range", "complete"}
        assert (file.attrs["format"], file.attrs["complete"]) == (1, True)
        assert (file["images"][()] == IMAGES).all()


def test_the_mapping_does_not_write_to_the_file(tmp_path):
    write(tmp_path / "own.h5")
    before = (tmp_path / "own.h5").read_bytes()
    torch.from_numpy(datafile.read(tmp_path / "own.h5").images)[0] = 7
    assert (tmp_path / "own.h5").read_bytes() == before


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_an_interrupted_writer_goes_on_where_it_stopped(tmp_path, stop_after):
    path, first, second = tmp_path / "own.h5", Maker(stop_after), Maker()
    with pytest.raises(KeyboardInterrupt):
        write(path, first)
    assert not path.exists()
    seen: list[tuple[int, int]] = []
    write(path, second, lambda what, done, total: seen.append((done, total)))
    assert first.asked == [0, 1, 2, 3]
    assert second.asked == [0, 1, 2, 3][: 4 - stop_after]
    assert seen == [(done, 4) for done in range(stop_after, 5)]
    assert (datafile.read(path).images == IMAGES).all()
    assert datafile.check(path)["sha256"] == hashlib.sha256(IMAGES.tobytes()).hexdigest()
    assert [entry.name for entry in tmp_path.iterdir()] == ["own.h5"]


@pytest.mark.parametrize("how", ["another source", "no journal", "a damaged journal", "a short partial file"])
def test_what_cannot_be_gone_on_with_starts_over(tmp_path, how):
    path, again = tmp_path / "own.h5", Maker()
    with pytest.raises(KeyboardInterrupt):
        write(path, Maker(2))
    partial, journal = tmp_path / "own.h5.partial", tmp_path / "own.h5.partial.json"
    partial.write_bytes(b"\1" * partial.stat().st_size)
    if how == "no journal":
        journal.unlink()
    elif how == "a damaged journal":
        journal.write_text('{"done": [0')
    elif how == "a short partial file":
        partial.write_bytes(b"\1" * 17)
    write(path, again, source="another" if how == "another source" else "made up")
    assert again.asked == [0, 1, 2, 3]
    assert (datafile.read(path).images == IMAGES).all()


TWO = """
import sys, time
from pathlib import Path
import numpy as np
from siv_core.data import datafile, hdf5, hdf5_child

def produce(numbers):
    for number in numbers:
        print("made", number, flush=True)
        time.sleep(0.2)
        yield number, np.full((3, 1, 2, 2), number, np.uint8)

def progress(what, done, total):
    print(what, flush=True)

print("up", flush=True)
sys.stdin.readline()
datafile.write(Path(sys.argv[1]), shape=(12, 1, 2, 2), block=3, produce=produce, progress=progress, source="two")
"""


def start_two(path: Path) -> list[subprocess.Popen[str]]:
    """Two processes that are about to prepare the same file."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    two = [subprocess.Popen([sys.executable, "-c", TWO, str(path)], **pipes) for _ in range(2)]
    for process in two:
        assert process.stdout.readline() == "up\n"
    return two


def test_of_two_processes_one_makes_the_file_and_the_other_waits(tmp_path):
    path = tmp_path / "own.h5"
    two = start_two(path)
    for process in two:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60)[0].splitlines() for process in two]
    assert [process.returncode for process in two] == [0, 0]
    assert sorted(line for lines in told for line in lines if line.startswith("made")) == [f"made {i}" for i in range(4)]
    waited = [lines for lines in told if "waiting for another process that prepares own.h5" in lines]
    assert len(waited) == 1
    assert "preparing own.h5" not in waited[0]
    assert datafile.read(path).images[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["own.h5"]


def test_when_the_first_process_is_killed_the_second_goes_on(tmp_path):
    path = tmp_path / "own.h5"
    first, second = start_two(path)
    first.stdin.write("go\n")
    first.stdin.flush()
    while "made 0" not in first.stdout.readline():
        pass
    second.stdin.write("go\n")
    second.stdin.flush()
    assert second.stdout.readline() == "waiting for another process that prepares own.h5\n"
    first.kill()
    first.communicate()
    out, _ = second.communicate(timeout=60)
    assert "made 3" in out
    assert (datafile.read(path).images[-1] == 3).all()
    assert [entry.name for entry in tmp_path.iterdir()] == ["own.h5"]


def test_a_block_that_is_not_produced_is_a_bug(tmp_path):
    with pytest.raises(RuntimeError, match="1 of 4 blocks were not produced"):
        write(tmp_path / "own.h5", lambda numbers: Maker()(numbers[:-1]))
    assert not (tmp_path / "own.h5").exists()


def test_a_flipped_byte_is_found(tmp_path):
    path = tmp_path / "own.h5"
    write(path)
    with h5py.File(path) as file:
        offset = file["images"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset + 100] ^= 1
    path.write_bytes(data)
    [problem] = datafile.check(path)["problems"]
    assert "damaged or changed, the images' sha256 is" in problem


def make(path: Path, **changes: Any) -> None:
    """A file of format 1 by hand, with something changed."""
    images = changes.pop("images", IMAGES)
    with h5py.File(path, "w") as file:
        attributes = {"format": 1, "source": "x", "sha256": "y", "value_range": (0.0, 1.0), "complete": True}
        file.attrs.update({**attributes, **{k: v for k, v in changes.items() if k in attributes}})
        if callable(images):
            images(file)
        else:
            file.create_dataset("images", data=images)
        for name in ("labels", "split", "factors"):
            if name in changes:
                file[name] = changes[name]
        if "factors" in changes:
            file["factors"].attrs.update(changes["attributes"])


def elsewhere(file: h5py.File) -> None:
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        other["images"] = IMAGES


def external_link(file: h5py.File) -> None:
    elsewhere(file)
    file["images"] = h5py.ExternalLink("other.h5", "/images")


def soft_link(file: h5py.File) -> None:
    file["real"] = IMAGES
    file["images"] = h5py.SoftLink("/real")


def external_storage(file: h5py.File) -> None:
    Path(file.filename).with_name("raw.bin").write_bytes(IMAGES.tobytes())
    file.create_dataset("images", IMAGES.shape, np.uint8, external=[(Path(file.filename).with_name("raw.bin"), 0, IMAGES.size)])


def virtual(file: h5py.File) -> None:
    elsewhere(file)
    layout = h5py.VirtualLayout(IMAGES.shape, np.uint8)
    layout[:] = h5py.VirtualSource("other.h5", "images", IMAGES.shape)
    file.create_virtual_dataset("images", layout)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"complete": False}, "is not complete; remove it, so that it is made again"),
        ({"value_range": 1.0}, "cannot be read as an HDF5 file"),
        ({"value_range": (1.0, 1.0)}, "value_range must be two finite numbers, the lower one first"),
        ({"value_range": (0.0, float("nan"))}, "value_range must be two finite numbers"),
        ({"split": np.full(10, 2)}, r"'split' must be 0 \(train\) or 1 \(held out\)"),
        ({"labels": np.full(10, 2**63, np.uint64)}, "'labels' must be .* below 1,000,000"),
        ({"factors": np.zeros((10, 1), int), "attributes": {"names": ["a"], "sizes": [2**40]}}, "or these beyond 1000000"),
        ({"value_range": (0.0, 1.0, 2.0)}, "cannot be read as an HDF5 file"),
        ({"images": IMAGES.astype(np.float32)}, r"images must be uint8 \[N, C, H, W\]"),
        ({"images": IMAGES[0]}, r"images must be uint8 \[N, C, H, W\]"),
        ({"images": IMAGES[:0]}, "not empty"),
        ({"images": lambda file: file.create_dataset("images", data=IMAGES, chunks=True)}, "contiguous"),
        ({"images": lambda file: file.create_dataset("images", data=IMAGES, compression="gzip")}, "contiguous"),
        ({"images": lambda file: file.create_dataset("images", IMAGES.shape, np.uint8)}, "nothing was ever written"),
        ({"images": lambda file: file.create_group("images")}, "'images' is no data set"),
        ({"images": lambda file: file.create_dataset("image", data=IMAGES)}, "has no data set 'images'; it has: image"),
        ({"images": external_link}, "'images' is a link; only data inside the file itself is read"),
        ({"images": soft_link}, "'images' is a link"),
        ({"images": external_storage}, "'images' lies in other files"),
        ({"images": virtual}, "'images' lies in other files"),
        ({"labels": np.arange(9)}, "'labels' must be 10 rows of whole numbers from 0 on"),
        ({"labels": np.arange(10) - 1}, "'labels' must be 10 rows of whole numbers from 0 on"),
        ({"labels": np.arange(10) / 2}, "'labels' must be 10 rows of whole numbers from 0 on"),
        ({"labels": 3}, "'labels' must be 10 rows of whole numbers from 0 on"),
        ({"labels": np.zeros((10, 2), int)}, "'labels' must be"),
        ({"split": np.zeros((10, 2), int)}, "'split' must be"),
        ({"factors": np.zeros(10, int), "attributes": {"names": ["a"], "sizes": [1]}}, "'factors'"),
        ({"factors": np.zeros((10, 2), int), "attributes": {"names": ["a"], "sizes": [1]}}, "do not fit its 2 columns"),
        ({"factors": np.zeros((10, 1), int), "attributes": {"names": ["a"], "sizes": [1, 2]}}, "do not fit its 1 columns"),
        ({"factors": np.zeros((10, 1), int), "attributes": {"names": ["a"]}}, "cannot be read as an HDF5 file"),
        ({"factors": np.full((10, 1), 3), "attributes": {"names": ["a"], "sizes": [3]}}, "beyond"),
    ],
)
def test_what_is_not_as_the_format_says(tmp_path, changes, words):
    path = tmp_path / "own.h5"
    make(path, **changes)
    with pytest.raises(UserError, match=words) as error:
        list(hdf5_child.look(path, "images", "labels", "factors"))  # what the child does, without starting one each time
    assert str(path) in str(error.value)


def test_a_sound_file_made_by_hand(tmp_path):
    make(tmp_path / "own.h5", labels=np.arange(10), value_range=(-1.0, 1.0))
    table = datafile.read(tmp_path / "own.h5")
    assert (table.images == IMAGES).all()
    assert table.value_range == (-1.0, 1.0)


@pytest.mark.parametrize("content", [b"", b"no hdf5 at all", None, "half"])
def test_what_is_no_hdf5(tmp_path, content):
    path = tmp_path / "own.h5"
    if content == "half":
        write(path)
        path.write_bytes(path.read_bytes()[:-100])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"own.h5: cannot be read \(No such file" if content is None else "cannot be read as an HDF5"
    ):
        datafile.read(path)


def test_another_files_format_is_told(tmp_path):
    make(tmp_path / "own.h5", format=2)
    with pytest.raises(UserError, match="no complete data file of format 1; `siv data check` says more"):
        datafile.read(tmp_path / "own.h5")


def test_whole_groups_are_held_out(tmp_path):
    table = datafile.Table(IMAGES, "x", "y", labels=np.arange(10) // 2)
    seen = {}
    for seed in range(5):
        train, held_out = (datafile.rows_by_group(table, table.labels, 2, seed, split) for split in ("train", "held_out"))
        groups = [set((rows.index // 2).tolist()) for rows in (train, held_out)]
        assert groups[0].isdisjoint(groups[1])
        assert (len(groups[0]), len(groups[1]), len(train), len(held_out)) == (3, 2, 6, 4)
        seen[seed] = groups[1]
    assert len({tuple(sorted(group)) for group in seen.values()}) > 1
    for wrong in (0, 5):
        with pytest.raises(UserError, match="of 5 groups cannot be held out"):
            datafile.rows_by_group(table, table.labels, wrong, 0, "train")


def test_all_problems_of_a_file_are_told_at_once(tmp_path):
    make(tmp_path / "own.h5", labels=np.arange(9), split=np.full(10, 3), value_range=(2.0, 1.0))
    with pytest.raises(UserError) as caught:
        datafile.read(tmp_path / "own.h5")
    assert [problem.split(": ")[1][:12] for problem in caught.value.problems] == ["'labels' mus", "'split' must", "the attribut"]


def test_a_file_is_looked_at_once_and_again_after_a_change(tmp_path, monkeypatch):
    path, asked = tmp_path / "own.h5", []
    real = hdf5.ask
    monkeypatch.setattr(hdf5, "ask", lambda *what, **more: asked.append(what) or real(*what, **more))
    write(path)
    first, second = datafile.read(path), datafile.read(path)
    assert len(asked) == 1
    first.images[0] = 7  # what one reader does to its mapping no other one sees
    assert (second.images == IMAGES).all()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read as an HDF5 file"):
        datafile.read(path)


@pytest.mark.parametrize("journal", ["[]", '{"done": 3}', "7", '"x"', '{"done": [0, "1"]}', '{"done": [-1]}', '{"done": [4]}'])
def test_a_journal_of_nonsense_starts_over(tmp_path, journal):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "own.h5", Maker(2))
    noted = tmp_path / "own.h5.partial.json"
    was, odd = json.loads(noted.read_text()), json.loads(journal)
    noted.write_text(json.dumps({**was, **odd} if isinstance(odd, dict) else odd))
    again = Maker()
    write(tmp_path / "own.h5", again)
    assert again.asked == [0, 1, 2, 3]
    assert (datafile.read(tmp_path / "own.h5").images == IMAGES).all()


def test_what_a_killed_writer_left_is_taken_away(tmp_path):
    for name in ("own.h5", "own.h5.partial.json"):
        (tmp_path / f".siv-tmp-123-{name}").write_bytes(b"half")
    (tmp_path / ".siv-tmp-123-other.h5").write_bytes(b"somebody else's")
    write(tmp_path / "own.h5")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".siv-tmp-123-other.h5", "own.h5"]


def test_a_disk_that_is_too_small_is_told_before_it_is_full(tmp_path):
    with pytest.raises(
        UserError, match=r"making it takes 2,048.0 GiB, its disk has [\d,.]+ GiB free; make room there, or set SIV_DATA"
    ):
        datafile.write(
            tmp_path / "own.h5", shape=(1 << 20, 1, 1 << 10, 1 << 10), block=1, produce=Maker(), progress=quiet, source="x"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_an_error_and_nothing_is_lost(tmp_path):
    """RLIMIT_FSIZE stands for the full disk: a mapped file would end the process by a signal there."""
    code = f"""
import resource, signal
from pathlib import Path
import numpy as np
from siv_core.data import datafile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
blocks = lambda numbers: ((i, np.zeros(({BLOCK}, *{IMAGES.shape[1:]}), np.uint8)) for i in numbers)
datafile.write(Path({str(tmp_path / "own.h5")!r}), shape={IMAGES.shape}, block={BLOCK}, produce=blocks,
               progress=lambda *told: None, source="made up")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "OSError: [Errno 27]" in done.stderr
    assert not (tmp_path / "own.h5").exists()
    write(tmp_path / "own.h5")
    assert (datafile.read(tmp_path / "own.h5").images == IMAGES).all()
