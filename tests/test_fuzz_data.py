"""Damaged data files by the thousand, each through the real reading path: a result or a sentence, nothing else.

Good HDF5 files, pictures and archives of cars are mutated, by a seed each. A worker process takes seed after seed and says which
it is at, so that a crash or a hang has a name: `python tests/test_fuzz_data.py SEED 1 FOLDER` does that one again.
SIV_CAMPAIGN_FILES sets how many files there are. None may take longer than SIV_CAMPAIGN_SECONDS.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import resource
import selectors
import shutil
import subprocess
import sys
import tarfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FILES = int(os.environ.get("SIV_CAMPAIGN_FILES", "30"))
HANGS = float(os.environ.get("SIV_CAMPAIGN_SECONDS", "20"))  # more on a machine that has other things to do
KINDS = ("hdf5", "picture", "archive")
MEMORY = 8 << 30  # bytes of address space of the worker, so that no file can take the machine's

Good = dict[str, bytes]


# -- good files ------------------------------------------------------------------------------------------------------------------


def good_hdf5(folder: Path) -> Good:
    import h5py

    from siv_core.data import datafile

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 1, 4, 4), dtype=np.uint8)
    own = {"labels": np.arange(12) % 3, "split": (np.arange(12) > 8).astype(np.uint8), "factors": np.arange(12)[:, None] % 4}
    blocks = {"shape": images.shape, "block": 12, "produce": lambda numbers: iter([(0, images)])}
    datafile.write(folder / "own", source="made up", progress=quiet, factor_sizes={"corner": 4}, **blocks, **own)
    ways: dict[str, dict[str, Any]] = {
        "gzip": {"chunks": (5, 1, 4, 4), "compression": "gzip", "shuffle": True},
        "lzf": {"chunks": (4, 1, 2, 4), "compression": "lzf", "fletcher32": True},
        "offset": {"chunks": (12, 1, 4, 4), "scaleoffset": True},
        "plain": {},
    }
    for name, options in ways.items():
        for version in ("earliest", "latest"):
            with h5py.File(folder / f"{name} {version}", "w", libver=version) as file:
                data = images if name != "plain" else images / np.float32(255)
                file.create_dataset("images", data=data, **options)
                file["labels"], file["group/more"] = own["labels"], "some text"
                file.attrs["note"] = ["words", "of", "some length"]
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def good_pictures() -> Good:
    from PIL import Image

    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (12, 17, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (12, 17), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "described"
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "rgb.png": (rgb, {"exif": exif}),
        "palette.png": (rgb.quantize(16), {"transparency": 3}),
        "alpha.png": (rgb.convert("RGBA"), {}),
        "deep.png": (deep, {}),
        "plain.jpg": (rgb, {"exif": exif, "progressive": True}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "plain.bmp": (rgb, {}),
        "lossy.webp": (rgb, {"exif": exif}),
        "lossless.webp": (rgb.convert("RGBA"), {"lossless": True}),
        "lzw.tif": (rgb, {"compression": "tiff_lzw"}),
        "jpeg.tif": (rgb, {"compression": "jpeg"}),
        "deflate.tif": (deep, {"compression": "tiff_adobe_deflate"}),
        "raw.tif": (rgb.convert("L"), {}),
        "moving.gif": (rgb.quantize(8), {"save_all": True, "append_images": [rgb.quantize(4)]}),
    }
    made = {}
    for name, (picture, options) in ways.items():
        file = io.BytesIO()
        picture.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name.split(".")[1]), **options)
        made[name] = file.getvalue()
    return made


def good_cars() -> Good:
    from scipy.io import savemat

    im = np.zeros((128, 128, 3, 24, 4), np.uint8)
    im[30:50, 20:90] = np.arange(24)[:, None]
    made = {"list.txt": b"b\na\n"}
    for name, compressed in (("a.mat", True), ("b.mat", False)):
        file = io.BytesIO()
        savemat(file, {"mask": im[:8, :8, 0], "im": im}, do_compression=compressed)
        made[name] = file.getvalue()
    return made


def tar_of(files: Good) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"data/cars/{name}")
            info.size, info.pax_headers = len(data), {"comment": "ä" * 40}
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


# -- mutations -------------------------------------------------------------------------------------------------------------------


def mutated(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """One to three kinds of damage; most of it in the first kilobytes, where the structure is."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if len(changed) > 16:
            MUTATIONS[rng.integers(len(MUTATIONS))](changed, rng, other)
    return bytes(changed)


def somewhere(data: bytearray, rng: np.random.Generator) -> int:
    return int(rng.integers(min(len(data), 4096) if rng.random() < 0.7 else len(data)))


def flip(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    for _ in range(rng.integers(1, 9)):
        data[somewhere(data, rng)] ^= 1 << int(rng.integers(8))


def overwrite(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    at, size = somewhere(data, rng), int(rng.integers(1, 64))
    data[at : at + size] = bytes([int(rng.choice([0, 255]))]) * len(data[at : at + size])


def truncate(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    del data[int(rng.integers(len(data))) :]


def splice(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    at, start, size = somewhere(data, rng), int(rng.integers(len(other))), int(rng.integers(1, 512))
    piece = other[start : start + size]
    data[at : at + (len(piece) if rng.random() < 0.5 else 0)] = piece


def remove(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    at = somewhere(data, rng)
    del data[at : at + int(rng.integers(1, 64))]


def enlarge(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """A small whole number, which may be a length or an address, becomes a large, a negative or another one."""
    width, order = int(rng.choice([2, 4, 8])), str(rng.choice(["little", "big"]))
    places = [i for i in range(min(len(data), 8192) - width) if 0 < int.from_bytes(data[i : i + width], order) < 1 << 14]
    if places:
        at = int(rng.choice(places))
        value = int.from_bytes(data[at : at + width], order)
        larger = [value + 1, value * 2, value << 8, value << 20, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, -1]
        data[at : at + width] = (larger[rng.integers(len(larger))] % (1 << 8 * width)).to_bytes(width, order)


MUTATIONS = (flip, flip, overwrite, truncate, splice, remove, enlarge, enlarge)


# -- the worker ------------------------------------------------------------------------------------------------------------------


def quiet(what: str, done: int, total: int) -> None:
    pass


def use(data: Any) -> None:
    """What a run does with a data set before it trains, and one look at every row."""
    if data.missing() is not None:
        return
    data.prepare(quiet)
    _ = data.spec, data.fingerprint()
    for split in ("train", "held_out"):
        rows = data.rows(split)
        rows.x[rows.index].float().sum().item()


def try_hdf5(good: Good, rng: np.random.Generator, folder: Path) -> None:
    from siv_plugins import hdf5

    from siv_core.data import datafile

    path, names = folder / "own.h5", sorted(good)
    path.write_bytes(mutated(good[str(rng.choice(names))], rng, good[str(rng.choice(names))]))
    if rng.random() < 0.3:
        datafile.check(path)
    use(hdf5.build(hdf5.HDF5Config(path=str(path))))


def try_picture(good: Good, rng: np.random.Generator, folder: Path) -> None:
    import attrs
    import torch
    from torch import nn

    from siv_core.data import picture_child
    from siv_core.data.picture import Fitting
    from siv_core.model import Model
    from siv_core.nets import Priors
    from siv_core.protocols import Spec
    from siv_core.use import own_pictures

    name = str(rng.choice(sorted(good)))
    path = folder / name
    path.write_bytes(mutated(good[name], rng, good[str(rng.choice(sorted(good)))]))
    about, rows = picture_child.block(str(folder), "folder", [[name, -1, 0]], attrs.asdict(Fitting(8)))
    assert len(rows.tobytes()) == 3 * 8 * 8
    assert (about["damaged"] == {}) == (about["modes"].total() == 1)
    for channels in (1, 3):
        model = Model(nn.Identity(), nn.Identity(), Priors({}), Spec((channels, 8, 8)), {"z": 1}, None, torch.device("cpu"))
        x, _ = own_pictures.own_images([path], model)
        assert x.shape == (1, channels, 8, 8)
        assert 0 <= x.min() <= x.max() <= 1


def try_archive(good: Good, rng: np.random.Generator, folder: Path) -> None:
    """Damage in the compressed bytes, in the tar beneath or in a car; as an archive and as a folder."""
    from siv_plugins import cars3d

    level, files = rng.choice(["gzip", "tar", "car", "folder"]), dict(good)
    if level in ("car", "folder"):
        name = str(rng.choice(sorted(files)))
        files[name] = mutated(files[name], rng, good["b.mat"][:4096])
    path = folder / "cars.tar.gz"
    if level == "folder":
        path = folder / "cars"
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
    else:
        tar = tar_of(files)
        packed = gzip.compress(mutated(tar, rng, tar) if level == "tar" else tar, 1)
        path.write_bytes(mutated(packed, rng, packed) if level == "gzip" else packed)
        # as if the damaged one were the original: the digest alone would keep all of this from being read
        cars3d.MD5 = hashlib.md5(path.read_bytes()).hexdigest()
    cars3d.MODELS = 2
    if rng.random() < 0.3:
        cars3d.build(cars3d.Cars3DConfig()).check(path, quiet)
    use(cars3d.build(cars3d.Cars3DConfig(size=8, held_out_models=1, archive=str(path))))


def stay_inside(folder: Path) -> None:
    """From now on whatever opens a file for writing, makes or removes one elsewhere ends the worker."""
    allowed, writing = (str(folder) + os.sep, "/dev/null", "/dev/tty"), os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.remove", "os.rmdir") and arguments[1] not in (-1, None):
            return  # shutil.rmtree, which goes down by the folders' descriptors
        places = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.truncate": 1}
        paths = list(arguments[: places.get(event, 0)])
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & writing:
            paths = [arguments[0]]
        for path in paths:
            if not isinstance(path, int) and not os.path.abspath(os.fsdecode(path)).startswith(allowed):
                print(f"bad wrote {path!r} ({event})", flush=True)
                os._exit(1)

    sys.addaudithook(hook)


def work(first: int, count: int, folder: Path) -> None:
    """Lines `at SEED`, and after each `good`, `told` or `bad` with the reason."""
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import torch

    from siv_core.errors import SivError

    torch.set_num_threads(1)
    tries: dict[str, Callable[[Good, np.random.Generator, Path], None]]
    tries = {"hdf5": try_hdf5, "picture": try_picture, "archive": try_archive}
    makers = {"hdf5": lambda: good_hdf5(folder / "good"), "picture": good_pictures, "archive": good_cars}
    (folder / "good").mkdir(parents=True)
    good = {kind: make() for kind, make in makers.items()}
    stay_inside(folder)
    for seed in range(first, first + count):
        kind, inside = KINDS[seed % len(KINDS)], folder / str(seed)
        os.environ["SIV_DATA"] = str(inside / "data")
        (inside / "in").mkdir(parents=True)
        print(f"at {seed}", flush=True)
        try:
            tries[kind](good[kind], np.random.default_rng([seed, 3]), inside / "in")
            print("good", flush=True)
        except SivError as error:
            lines = getattr(error, "problems", ["no UserError"])
            odd = [line for line in lines if not line.isprintable() or len(line) > 1000]
            print(f"bad a sentence {odd[0][:2000]!r}" if odd else "told", flush=True)
        except BaseException:
            print(f"bad {traceback.format_exc()!r}", flush=True)
        half = [path.name for path in (inside / "data").rglob("*.h5*") if ".partial" not in path.name]
        if half and any(Path(name).name.startswith(".siv-tmp-") for name in half):
            print(f"bad left {half}", flush=True)
        shutil.rmtree(inside)


# -- the campaign ----------------------------------------------------------------------------------------------------------------


def campaign(files: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """(how many of each kind were good or told, what went wrong) after all seeds; a worker that dies is started again."""
    counts, failures, seed = Counter[str](), [], 0
    while seed < files:
        last, died = watch(seed, files - seed, folder / f"from {seed}", counts, failures)
        if died:
            failures.append(f"seed {last}: {died}")
        seed = last + 1
    return counts, failures


def watch(first: int, count: int, folder: Path, counts: Counter[str], failures: list[str]) -> tuple[int, str]:
    """The last seed that a worker began, and how it ended if not well."""
    command, environment = [sys.executable, __file__, str(first), str(count), str(folder)], {**os.environ, "HOME": str(folder)}
    errors = folder.with_name(f"{folder.name} errors")
    seed = first - 1
    with (
        errors.open("wb") as told,
        subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=told, env=environment) as worker,
        selectors.DefaultSelector() as selector,
    ):
        assert worker.stdout is not None
        selector.register(worker.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(HANGS if seed >= first else 5 * HANGS):  # the first one waits for torch
                worker.kill()
                return max(seed, first), f"hangs for more than {HANGS:g} s"
            line = worker.stdout.readline().decode().strip()
            if line.startswith("at "):
                seed = int(line[3:])
            elif line in ("good", "told"):
                counts[f"{KINDS[seed % len(KINDS)]} {line}"] += 1
            elif line:
                failures.append(f"seed {seed}: {line}")
            else:
                code = worker.wait()
                return max(seed, first), f"the worker ended with {code}: {errors.read_text()[-2000:]}" if code else ""


@pytest.mark.timeout(300 + FILES * HANGS)
def test_damaged_files_give_a_result_or_a_sentence(tmp_path, capsys):
    counts, failures = campaign(FILES, tmp_path)
    with capsys.disabled():
        print(f"\ndamaged files: {dict(sorted(counts.items()))}")
    assert failures == []
    assert sum(counts.values()) == FILES
    for kind in KINDS:
        assert counts[f"{kind} told"] > 0


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
