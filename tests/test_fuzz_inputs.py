"""Right and wrong inputs by the thousand: arrays as other people write them, and what is given to a model from Python.

Each comes from a seed and ends in a result that is right, or in sentences; `SIV_CAMPAIGN_SEED` moves the seeds.
SIV_CAMPAIGN_ARRAYS and SIV_CAMPAIGN_CALLS set how many there are.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from siv_plugins import hdf5 as plugin
from test_foreign import attributes_of
from test_inputs import CODES, CONDITIONAL, MODEL, X

from siv_core.data import feed, foreign
from siv_core.errors import UserError
from siv_core.model import Model

ARRAYS = int(os.environ.get("SIV_CAMPAIGN_ARRAYS", "6"))
CALLS = int(os.environ.get("SIV_CAMPAIGN_CALLS", "300"))
SEED = int(os.environ.get("SIV_CAMPAIGN_SEED", "0"))
TYPES = ("u1", "u2", ">u2", "i4", "i8", "f2", "f4", ">f8", "?")
REMEDIES = ("data.", "give more images", "get the file again", "mend them")


def quiet(what: str, done: int, total: int) -> None:
    pass


# -- arrays of others ------------------------------------------------------------------------------------------------------------


def made_up(rng: np.random.Generator, path: Path) -> tuple[np.ndarray | None, dict[str, Any]]:
    """A file at `path`; its images [N, C, H, W] as bytes, None where the range they are in is not theirs, and options for it."""
    n, channels, height, width = (int(rng.choice(sizes)) for sizes in ([1, 2, 5, 9], [1, 2, 3, 4, 7], [4, 5, 8], [4, 6, 8]))
    images = rng.integers(0, 256, (n, channels, height, width), dtype=np.uint8)
    images[0, 0, 0, :2] = 0, 255
    order = "".join(rng.permutation(list("NCHW"))) if rng.random() < 0.5 else "NCHW"
    stored, dtype = images.transpose(["NCHW".index(axis) for axis in order]), np.dtype(str(rng.choice(TYPES)))
    options: dict[str, Any] = {}
    if rng.random() < 0.6:
        options["layout"] = order if rng.random() < 0.8 else "".join(rng.permutation(list("NCHW")))
    expected: np.ndarray | None = images
    if dtype.kind == "f":
        stored = (stored / 255).astype(dtype)
        expected = images
    elif dtype.kind == "b":
        stored, expected = stored > 127, np.where(images > 127, 255, 0)
    elif dtype.itemsize > 1:
        stored = stored.astype(dtype)
        if rng.random() < 0.6:
            options["value_range"] = (0.0, 255.0)
        else:
            expected = None
    else:
        stored = stored.astype(dtype)
    if dtype.kind == "f" and rng.random() < 0.2:
        stored = stored.copy()
        stored.flat[rng.integers(stored.size)] = rng.choice([-0.5, 3.0, np.nan, np.inf])
        expected = None
    with h5py.File(path, "w") as file:
        file["images"] = stored
        if "layout" not in options and rng.random() < 0.7:
            file["images"].attrs.update(attributes_of(order)[int(rng.integers(2))])
        elif options.get("layout", foreign.order_of(stored.shape, None)) != order:
            expected = None  # read otherwise than it was written
        for name in ("labels", "factors"):
            if rng.random() < 0.4:
                rows = n if rng.random() < 0.8 else n + 1
                values = rng.integers(0, 4, (rows, 2) if name == "factors" else rows)
                file[name] = values if rng.random() < 0.8 else values / 2
    for key, value in (
        ("size", int(rng.choice([2, 4, 16]))),
        ("fit", "stretch"),
        ("held_out", 0.5),
        ("labels", ""),
        ("factors", ""),
    ):
        if rng.random() < 0.25:
            options[key] = value
    return expected, options


def use(path: Path, options: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """What a run does with the data, and its images as floats."""
    data = plugin.build(plugin.HDF5Config(path=str(path), **options))
    assert data.missing() is None
    before = data.spec, data.counts(), data.notes()
    data.prepare(quiet)
    assert (data.spec, data.counts()) == before[:2]
    assert all(line.isprintable() for line in before[2])
    parts = {split: data.rows(split) for split, count in before[1].items() if count}
    assert {split: len(rows) for split, rows in parts.items()} == {split: n for split, n in before[1].items() if n}
    x = feed.to_float(next(iter(parts.values())).x, data.spec)
    assert x.shape[1:] == data.spec.shape
    assert 0 <= x.min() <= x.max() <= 1
    return data, np.asarray(next(iter(parts.values())).x)


def one_array(seed: int, folder: Path) -> str:
    rng = np.random.default_rng([SEED, seed, 17])
    expected, options = made_up(rng, folder / "own.h5")
    try:
        data, images = use(folder / "own.h5", options)
    except UserError as error:
        for line in error.problems:
            assert line.isprintable()
            assert any(remedy in line for remedy in REMEDIES), line
        return "told"
    if expected is not None:
        assert (images == expected).all()
    mark = data.fingerprint()
    (folder / "moved").mkdir()
    shutil.copy(folder / "own.h5", folder / "moved/other name.h5")
    assert use(folder / "moved/other name.h5", options)[0].fingerprint() == mark  # the same data at another place
    with h5py.File(folder / "own.h5", "r+") as file:
        names = [name for name in file if name == "images" or options.get(name, name)]
        name = str(rng.choice(names))
        array = file[name][()]
        at = tuple(int(rng.integers(size)) for size in array.shape)
        array[at] = (not array[at]) if array.dtype.kind == "b" else 0 if array[at] else 1
        del file[name]
        attributes = dict(file[name].attrs) if name in file else {}
        file[name] = array
        file[name].attrs.update(attributes)
    os.utime(folder / "own.h5", ns=(seed, seed))
    try:
        changed = use(folder / "own.h5", {**options, "layout": options.get("layout", "auto")})[0].fingerprint()
    except UserError:  # its order was told by an attribute that is gone
        return "good"
    assert changed != mark, f"one number of {name} changed"
    return "good"


@pytest.mark.timeout(120 + 10 * ARRAYS)
def test_arrays_are_read_right_or_told(tmp_path, monkeypatch, capsys):
    counts = Counter[str]()
    for seed in range(ARRAYS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        monkeypatch.setenv("SIV_DATA", str(folder / "data"))
        try:
            counts[one_array(seed, folder)] += 1
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        assert not list(folder.rglob("*.partial*"))
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\narrays of others: {dict(counts)}")
    assert min(counts["good"], counts["told"]) > 0


# -- what is given to a model ----------------------------------------------------------------------------------------------------


def odd_images(rng: np.random.Generator) -> Any:
    x = X if rng.random() < 0.5 else torch.rand(int(rng.integers(0, 4)), 3, 4, 6, generator=torch.Generator().manual_seed(1))
    changes = [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: x.double(),
        lambda x: (x * 255).to(torch.uint8),
        lambda x: x * float(rng.choice([1, 2, 255, 1e30])),
        lambda x: x - float(rng.choice([0, 0.5, 100])),
        lambda x: x[0] if len(x) else x,
        lambda x: x[:, : int(rng.integers(0, 4))],
        lambda x: x.permute(*rng.permutation(4).tolist()),
        lambda x: torch.where(x > 0.5, float(rng.choice([np.nan, np.inf, -np.inf, 0.5])), x),
        lambda x: x.flatten(int(rng.integers(0, 4))),
        lambda x: None,
        lambda x: x.to(torch.bfloat16),
        lambda x: x > 0.5,
        lambda x: torch.complex(x, x),
        lambda x: x.to_sparse(),
    ]
    return changes[int(rng.integers(len(changes)) if rng.random() < 0.7 else 0)](x)


def odd_codes(rng: np.random.Generator) -> Any:
    codes: dict[str, Any] = dict(CODES)
    changes = [
        lambda: codes,
        lambda: {**codes, "a": codes["a"][:1]},
        lambda: {group: z.numpy() for group, z in codes.items()},
        lambda: {group: z.T for group, z in codes.items()},
        lambda: list(codes.values()),
        lambda: {"a": codes["a"]},
        lambda: {**codes, "c": codes["a"]},
        lambda: MODEL.encode(X),
        lambda: {group: z.int() for group, z in codes.items()},
        lambda: {group: z[:0] for group, z in codes.items()},
        dict,
        lambda: None,
    ]
    return changes[int(rng.integers(len(changes)) if rng.random() < 0.7 else 0)]()


def odd_labels(rng: np.random.Generator, n: int) -> Any:
    return [
        None,
        torch.arange(n) % 5,
        torch.full((n,), int(rng.choice([-1, 4, 5, 2**40]))),
        torch.zeros(n),
        torch.zeros(n, 1).long(),
        torch.zeros(n + 1).long(),
        list(range(n)),
        "cat",
    ][int(rng.integers(8))]


def one_call(seed: int) -> str:
    rng = np.random.default_rng([SEED, seed, 19])
    model: Model = CONDITIONAL if rng.random() < 0.4 else MODEL
    x, y, codes = odd_images(rng), odd_images(rng), odd_codes(rng)
    n = len(x) if isinstance(x, torch.Tensor) and x.ndim else 2
    labels = odd_labels(rng, n) if rng.random() < 0.6 else (torch.arange(n) % 5 if model is CONDITIONAL else None)
    number = [1, 2, 3, 0, -1, 2.0, "2", None][int(rng.integers(8)) if rng.random() < 0.5 else 1]
    calls = {
        "encode": lambda: [q.mu for q in model.encode(x, labels).values()],
        "decode": lambda: [model.decode(codes, labels)],
        "reconstruct": lambda: [model.reconstruct(x, labels)],
        "energy": lambda: list(model.energy(x, labels)),
        "kl": lambda: list(model.kl(codes if rng.random() < 0.5 else MODEL.encode(X)).values()),
        "log_weights": lambda: [model.log_weights(x, number, labels=labels)],
        "interpolate": lambda: list(model.interpolate(x, y, number, labels)),
        "blend": lambda: list(model.blend([x, X, y, X], number, None if labels is None else [labels] * 4)),
        "combine": lambda: [model.combine({"a": x, "b": y}, None if labels is None else {"a": labels, "b": labels})],
        "sample": lambda: [model.sample(number, labels=labels if rng.random() < 0.5 else None)],
        "samples": lambda: list(model.samples(3, batch=number, labels=None)),
        "sample_classes": lambda: list(model.sample_classes(number, classes=[number, 2])),
    }
    name = str(rng.choice(list(calls)))
    try:
        made = calls[name]()
    except UserError as error:
        for line in error.problems:
            assert line.isprintable()
            assert len(line) < 400, line
        return "told"
    assert all(part.isfinite().all() for part in made), name
    if isinstance(x, torch.Tensor) and name in ("encode", "reconstruct", "energy", "log_weights", "combine"):
        assert {len(part) for part in made} == {len(x)}, "nothing is dropped or repeated"
    return "good"


def test_calls_give_a_result_or_a_sentence(capsys):
    counts = Counter[str]()
    for seed in range(CALLS):
        try:
            counts[one_call(seed)] += 1
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    with capsys.disabled():
        print(f"\ncalls of a model: {dict(counts)}")
    assert min(counts["good"], counts["told"]) > CALLS / 10
