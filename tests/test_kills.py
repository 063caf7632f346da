"""Killed again and again, at any moment and in whatever it does, siv comes to the very bytes of one that was never disturbed.

SIV_CAMPAIGN_KILLS is the number of kills in all; they are spread over training, saving, evaluating, rendering and converting.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crash
import h5py
import numpy as np
import pytest
from attrs import frozen
from test_resume import RECIPE, contents

from siv_core.store import checkpoint

KILLS = int(os.environ.get("SIV_CAMPAIGN_KILLS", "10"))
SEED = int(os.environ.get("SIV_CAMPAIGN_SEED", "0"))
IN_A_ROW = 6  # at most so many kills before the work may end


@frozen
class Work:
    """What is killed: `begin` sets a folder up, `call` works on it, `result` is what must not differ, `check` looks after every
    kill."""

    call: Callable[[Path], tuple[Any, ...]]
    result: Callable[[Path], Any]
    check: Callable[[Path], None]
    begin: Callable[[Path], None] = lambda folder: None
    at_flushes: bool = False


def checkpoints_are_whole(run: Path) -> None:
    for path in run.glob("checkpoints/step_*"):
        assert checkpoint.problems(path) == [], "a checkpoint under its name is not whole"


def data_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def campaign(work: Work, folder: Path, kills: int, seed: int) -> str:
    """Kill `work` so many times, a few in a row, and compare what it comes to at last."""
    chance, began = random.Random(seed), time.monotonic()

    def start(at: Path, **kill: Any) -> tuple[int, int]:
        function, *arguments = work.call(at)
        return crash.in_child(function, *arguments, **kill)

    undisturbed = folder / "undisturbed"
    work.begin(undisturbed)
    crash.in_child(crash.nothing)  # the first child starts the server
    before = time.monotonic()
    code, flushes = start(undisturbed)
    assert code == 0
    seconds, expected = time.monotonic() - before, work.result(undisturbed)
    killed = chains = 0
    while killed < kills:
        chains += 1
        place = folder / f"killed{chains}"
        work.begin(place)
        code = -signal.SIGKILL
        for _ in range(chance.randint(1, min(IN_A_ROW, kills - killed))):
            kill = {"kill_at": chance.randint(1, flushes)} if work.at_flushes else {"kill_after": chance.uniform(0, seconds)}
            code, _ = start(place, **kill)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            killed += 1
            work.check(place)
        if code:
            code, _ = start(place)
        assert code == 0
        assert work.result(place) == expected, f"seed {seed}, chain {chains}"
        assert not list(place.rglob(".siv-tmp-*"))
        shutil.rmtree(place)
    return f"{killed} kills, {chains} times to the end, {time.monotonic() - began:.0f} s"


def share(number: int) -> int:
    """This kind's part of the kills: a fifth."""
    return KILLS // 5 + (number < KILLS % 5)


def training(tmp_path: Path, *, at_flushes: bool) -> Work:
    recipe = tmp_path / "crash.toml"
    recipe.write_text(RECIPE)
    return Work(
        call=lambda run: (crash.train_quickly, str(recipe), str(run)),
        result=contents,
        check=checkpoints_are_whole,
        at_flushes=at_flushes,
    )


@pytest.mark.timeout(0)
@pytest.mark.parametrize("at_flushes", [False, True], ids=["training", "saving"])
def test_training_is_killed(tmp_path, at_flushes, capsys):
    told = campaign(training(tmp_path, at_flushes=at_flushes), tmp_path, share(int(at_flushes)), SEED + at_flushes)
    with capsys.disabled():
        print(f"\n{'saving' if at_flushes else 'training'}: {told}")


@pytest.mark.timeout(0)
def test_evaluation_is_killed(tmp_path, capsys):
    finished = tmp_path / "finished"
    (tmp_path / "crash.toml").write_text(RECIPE)
    assert crash.in_child(crash.train_quickly, str(tmp_path / "crash.toml"), str(finished))[0] == 0
    own = contents(finished)

    def result(run: Path) -> Any:
        """What was there before, and one evaluation; one that ended before its kill came stands there once more."""
        found = contents(run)
        lines = found["metrics"]
        before, after = lines[: len(own["metrics"])], lines[len(own["metrics"]) :]
        each = len(before) - 1  # the first line gives the format
        times = [after[i : i + each] for i in range(0, len(after), each)]
        assert len(after) >= each
        assert all(one == times[0] for one in times)
        assert {**found, "metrics": before} == own
        return times[0]

    def check(run: Path) -> None:
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        assert all(json.loads(line) for line in lines if line.endswith(b"\n"))
        checkpoints_are_whole(run)

    work = Work(
        call=lambda run: (crash.evaluate, str(run)),
        result=result,
        check=check,
        begin=lambda run: shutil.copytree(finished, run) and None,
    )
    told = campaign(work, tmp_path, share(2), SEED + 2)
    with capsys.disabled():
        print(f"\nevaluating: {told}")


@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", ["rendering", "converting"])
def test_preparation_is_killed(tmp_path, kind, capsys):
    source = tmp_path / "source.h5"
    images = np.random.default_rng(0).integers(0, 256, (1500, 8, 8, 3), dtype=np.uint8)
    with h5py.File(source, "w") as file:
        file.create_dataset("images", data=images, compression="gzip")
    calls = {
        "rendering": lambda data: (crash.render, str(data)),
        "converting": lambda data: (crash.convert, str(data), str(source)),
    }
    whole: dict[str, bytes] = {}

    def result(data: Path) -> dict[str, bytes]:
        found = data_of(data)
        for name in [name for name in found if name.endswith(".lock")]:
            assert found.pop(name) == b""  # of a process killed as it took its lock file away: the next one takes it over
        for name in [name for name in found if name.endswith(".from.json")]:
            assert json.loads(found.pop(name))["source"] == str(source)
        assert len(found) == 1  # neither a part nor a journal
        whole.update(found)
        return found

    def check(data: Path) -> None:
        for path in data.rglob("[!.]*.h5"):
            assert path.read_bytes() == whole[path.name], "half-written under its own name"

    told = campaign(Work(calls[kind], result, check), tmp_path, share(3 + (kind == "converting")), SEED + 3)
    with capsys.disabled():
        print(f"\n{kind}: {told}")
