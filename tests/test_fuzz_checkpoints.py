"""Mutated checkpoints: a good model or a `UserError`; never another exception, a crash, a hang, or a file written.

SIV_CAMPAIGN_CHECKPOINTS is how many.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crash
import pytest
import toys

import siv_core
from siv_core.errors import UserError
from siv_core.runs import session

COUNT = int(os.environ.get("SIV_CAMPAIGN_CHECKPOINTS", "12"))
SEED = int(os.environ.get("SIV_CAMPAIGN_SEED", "0"))
SECONDS = 20  # more is a hang
RECIPE = (
    toys.SOFT
    + '[shadow]\nhalf_life = "200 images"\n[train]\nbatch = 32\nlength = "4 steps"\ntick = "2 steps"\ncheckpoint = "2 steps"\n'
)


# -- what is done to a checkpoint ------------------------------------------------------------------------------------------------

JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**63,
    10**400,
    1.5,
    float("nan"),
    "",
    "x",
    "²",
    [],
    {},
    [[]],
    {"": {}},
    "../../x",
    "a\0b",
]


def some(folder: Path, chance: random.Random, pattern: str = "*") -> Path:
    """A regular file, which alone can be read to its end."""
    return chance.choice([path for path in sorted(folder.glob(pattern)) if path.is_file()])


def flip_bits(folder: Path, chance: random.Random) -> None:
    path = some(folder, chance, "*.safetensors")
    data = bytearray(path.read_bytes())
    head = 8 + int.from_bytes(data[:8], "little")
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(chance.choice((8, head, len(data))))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut_short(folder: Path, chance: random.Random) -> None:
    path = some(folder, chance)
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def add_bytes(folder: Path, chance: random.Random) -> None:
    path = some(folder, chance)
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randint(1, 100)))


def change_header(folder: Path, chance: random.Random) -> None:
    """Shapes, types and offsets that are not those of the bytes, and sizes that no machine has."""
    path = some(folder, chance, "*.safetensors")
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if header:
        entry = header[chance.choice(sorted(header))]
        key = chance.choice(["dtype", "shape", "data_offsets", "more"])
        entry[key] = chance.choice(
            [*JUNK[:9], "F64", "BOOL", "F8_E4M3", [2**62, 2**62], [-1], [2**40], [0, 2**50], [[0]], [1] * 5000, [0, 0]]
        )
    text = json.dumps(header).encode()
    length = chance.choice([len(text), len(text), 0, 2**40, 2**64 - 1, len(text) + 1])
    path.write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])


def change_state(folder: Path, chance: random.Random) -> None:
    """Some value, at any depth, becomes something else or goes."""
    path = folder / "state.json"
    state = json.loads(path.read_text())
    at: Any = state
    while True:
        keys = sorted(at) if isinstance(at, dict) else range(len(at))
        key = chance.choice(list(keys))
        if not isinstance(at[key], (dict, list)) or not at[key] or chance.random() < 0.4:
            break
        at = at[key]
    if chance.random() < 0.3:
        del at[key]
    else:
        at[key] = chance.choice(JUNK)
    path.write_text(json.dumps(state))


def replace_state(folder: Path, chance: random.Random) -> None:
    texts = ["", "{}", "[]", "null", "[" * 100_000, '{"format": 1}', "\ufeff{}", '{"format": ' + "9" * 5000 + "}", "\x00" * 100]
    (folder / "state.json").write_text(chance.choice(texts))


def take_away(folder: Path, chance: random.Random) -> None:
    some(folder, chance).unlink()


def rename(folder: Path, chance: random.Random) -> None:
    path = some(folder, chance)
    path.rename(path.with_name(chance.choice(["x", "x.safetensors", "é.safetensors", "encoder.pth"])))


def exchange(folder: Path, chance: random.Random) -> None:
    """Two files change their places, and perhaps the listing with them."""
    first, second = (some(folder, chance, "*.safetensors") for _ in range(2))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two), second.write_bytes(one)


def link(folder: Path, chance: random.Random) -> None:
    path = some(folder, chance)
    path.unlink()
    path.symlink_to(chance.choice([path.name, "/dev/zero", "/dev/null", "/", "..", "/nonexistent", "encoder.safetensors"]))


def other_kind(folder: Path, chance: random.Random) -> None:
    path = some(folder, chance)
    path.unlink()
    path.mkdir() if chance.random() < 0.5 else os.mkfifo(path)


def whole_folder(folder: Path, chance: random.Random) -> None:
    """The folder itself: another step's name, a link, a file."""
    kind = chance.randrange(4)
    if kind == 0:
        folder.rename(folder.with_name(chance.choice(["step_00000099", "step_99", "step_²", "step_000000000000000000099"])))
    elif kind == 1:
        moved = folder.rename(folder.parent.parent / "elsewhere")
        folder.symlink_to(moved)
    elif kind == 2:
        shutil.rmtree(folder)
        folder.write_text("a file")
    else:
        shutil.rmtree(folder)
        folder.symlink_to(folder.name)


def sign_again(folder: Path) -> None:
    """As somebody does who wants the change to pass: sizes and digests are made anew."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text())
        for name in state["files"]:
            file = folder / name
            state["files"][name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        path.write_text(json.dumps(state))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return


MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    flip_bits, cut_short, add_bytes, change_header, change_header, change_state, change_state, replace_state, take_away, rename,
    exchange, link, other_kind, whole_folder,
]  # fmt: skip


def mutate(run: Path, seed: int) -> str:
    """Do something to the newest checkpoint of a run; what it was."""
    chance = random.Random(seed)
    folder = run / "checkpoints" / "step_00000004"
    names = []
    for mutation in chance.choices(MUTATIONS, k=chance.choice([1, 1, 1, 2])):
        try:
            mutation(folder, chance)
        except (OSError, ValueError, IndexError, KeyError, RecursionError, TypeError):  # after another one
            continue
        names.append(mutation.__name__)
    if chance.random() < 0.6 and folder.is_dir() and all(p.is_file() for p in folder.iterdir()):
        sign_again(folder)
        names.append("signed")
    return ", ".join(names)


# -- what must hold --------------------------------------------------------------------------------------------------------------


def snapshot(run: Path) -> dict[str, Any]:
    """Every file with its bytes; a link by where it leads to."""
    found = {}
    for path in sorted(run.rglob("*")):
        if path.name != "lock":
            found[str(path)] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def try_all(whole: str, folder: str, seeds: list[int], report: str) -> None:
    """In one child for many checkpoints: load each, resume each. A line before each, so that a crash has a name."""
    crash.draw_quickly()
    with open(report, "a", encoding="utf-8", errors="backslashreplace") as file:
        for seed in seeds:
            run = Path(folder) / f"run{seed}"
            shutil.copytree(whole, run)
            what = mutate(run, seed)
            file.write(f"{seed} {what}\n")
            file.flush()
            before = snapshot(run)
            outcomes = []
            for call in (load_and_sample, resume):
                try:
                    call(run)
                    outcomes.append("good")
                except UserError as error:
                    outcomes.append("told" if all(error.problems) else "without a word")
                assert outcomes[-1] in ("good", "told")
                if outcomes[-1] == "told" or call is load_and_sample:
                    changed = {path for path, _ in snapshot(run).items() ^ before.items()}
                    assert not changed, f"{seed} ({what}): {call.__name__} wrote {changed}"
            file.write(f"{seed} {' '.join(outcomes)}\n")
            file.flush()
            shutil.rmtree(run)


def load_and_sample(run: Path) -> None:
    assert siv_core.load(run, device="cpu").sample(2).isfinite().all()


def resume(run: Path) -> None:
    """One step more, so that moments, statistics and counters are used."""
    (run / "status.json").unlink()
    try:
        session.resume(run, sets=('train.length="5 steps"',), device="cpu")
    except UserError:
        (run / "status.json").write_text(STATUS)
        raise


STATUS = '{"format": 1, "state": "stopped"}'


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.toml").write_text(RECIPE)
    assert crash.in_child(crash.train_quickly, str(folder / "small.toml"), str(folder / "run"))[0] == 0
    (folder / "run" / "status.json").write_text(STATUS)
    return folder / "run"


@pytest.mark.timeout(0)
def test_mutated_checkpoints_are_good_or_told(whole, tmp_path, capsys):
    outcomes: dict[str, int] = {}
    for first in range(0, COUNT, 20):
        report = tmp_path / f"report{first}"
        seeds = list(range(SEED + first, SEED + min(first + 20, COUNT)))
        code, _ = crash.in_child(try_all, str(whole), str(tmp_path), seeds, str(report), seconds=SECONDS * len(seeds))
        lines = report.read_text().splitlines()
        assert code == 0, f"exit code {code} after: {lines[-1]}"
        for line in lines[1::2]:
            outcomes[line.partition(" ")[2]] = outcomes.get(line.partition(" ")[2], 0) + 1
    assert sum(outcomes.values()) == COUNT
    with capsys.disabled():
        print(f"\ncheckpoints (load, resume): {outcomes}")
