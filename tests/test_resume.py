"""Killed at any moment and resumed, a run equals one that was never disturbed, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import crash
import forked
import numpy as np
import pytest
import toys

from siv_core.data import datafile
from siv_core.errors import UserError
from siv_core.store import checkpoint

RECIPE = (
    toys.SOFT
    + """
[shadow]
half_life = "200 images"
[train]
batch = 48
tick = "3 steps"
checkpoint = "4 steps"
preview = "7 steps"
keep_every = 2
[[stages]]
length = "5 steps"
objective = { name = "vae" }
[[stages]]
length = "9 steps"
train = { batch = 33 }
reset_optimisers = true
[metrics.latent_probes]
class_factor = "digit"
"""
)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "crash.toml"
    path.write_text(RECIPE)
    return path


def contents(run: Path) -> dict[str, object]:
    """All that must not differ: every tensor file by its digest, statistics without wall time, metrics, pictures."""
    found: dict[str, object] = {}
    for path in sorted(run.glob("checkpoints/*/state.json")):
        state = json.loads(path.read_text())
        found[path.parent.name] = {name: entry["sha256"] for name, entry in state["files"].items()}
    for name in ("stats", "metrics"):
        path = run / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found[name] = [{key: value for key, value in line.items() if key != "wall"} for line in lines]
    found["images"] = {path.name: path.read_bytes() for path in sorted(run.glob("images/*.png"))}
    found["status"] = json.loads((run / "status.json").read_text())["state"]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The contents of a run that nothing happened to, and in how many places it can be killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "crash.toml").write_text(RECIPE)
    code, moments = crash.in_child(crash.train, str(folder / "crash.toml"), str(folder / "run"))
    assert code == 0
    found = contents(folder / "run")
    ticks = [line["step"] for line in found["stats"][1:]]  # the first line is the format's
    assert ticks == [3, 5, 6, 9, 12, 14]  # every third step, and the last of each stage
    assert found["status"] == "finished"
    return found, moments


def moments_to_try(count: int, moments: int) -> list[int]:
    chosen = random.Random(1).sample(range(1, moments + 1), min(count, moments))
    return sorted({1, moments, *chosen})


def kill_and_resume(recipe: Path, run: Path, kill_at: int, train=crash.train) -> dict[str, object]:
    code, _ = crash.in_child(train, str(recipe), str(run), kill_at=kill_at)
    assert code == -signal.SIGKILL
    for path in run.glob("checkpoints/step_*"):
        assert checkpoint.problems(path) == [], f"killed at {kill_at}: a checkpoint under its name is not whole"
    code, _ = crash.in_child(train, str(recipe), str(run))
    assert code == 0
    assert not list(run.rglob(".siv-tmp-*")), f"killed at {kill_at}: leftovers"
    return contents(run)


def test_killed_in_the_middle_and_resumed(recipe, tmp_path, undisturbed):
    expected, moments = undisturbed
    assert kill_and_resume(recipe, tmp_path / "run", moments // 2) == expected


@pytest.mark.slow
def test_killed_at_many_moments(recipe, tmp_path, undisturbed):
    """With a blank picture for the curves, whose lines are compared themselves; the test above draws them."""
    code, moments = crash.in_child(crash.train_quickly, str(recipe), str(tmp_path / "whole"))
    assert (code, moments) == (0, undisturbed[1])
    expected = contents(tmp_path / "whole")
    count = int(os.environ.get("SIV_KILLS", "24"))
    for kill_at in moments_to_try(count, moments):
        found = kill_and_resume(recipe, tmp_path / f"run{kill_at}", kill_at, crash.train_quickly)
        assert found == expected, f"killed at {kill_at} of {moments}"


def test_killed_twice_in_a_row(recipe, tmp_path, undisturbed):
    expected, moments = undisturbed
    run = tmp_path / "run"
    for kill_at in (moments // 3, moments // 3):
        assert crash.in_child(crash.train, str(recipe), str(run), kill_at=kill_at)[0] == -signal.SIGKILL
    assert crash.in_child(crash.train, str(recipe), str(run))[0] == 0
    assert contents(run) == expected


def test_a_longer_length_continues_a_finished_run(tmp_path):
    text = RECIPE.replace("[[stages]]", "[stages_]").split("[stages_]")[0] + '[metrics.latent_probes]\nclass_factor = "digit"\n'
    short, long = tmp_path / "short.toml", tmp_path / "long.toml"
    short.write_text(text.replace("[train]", '[train]\nlength = "8 steps"'))
    long.write_text(text.replace("[train]", '[train]\nlength = "12 steps"').replace("7 steps", "99 steps"))
    for run, recipes in (("continued", (short, long)), ("at_once", (long,))):
        for recipe in recipes:
            assert crash.in_child(crash.train, str(recipe), str(tmp_path / run))[0] == 0
    ours, theirs = contents(tmp_path / "continued"), contents(tmp_path / "at_once")
    assert ours["step_00000012"] == theirs["step_00000012"]
    # the shorter run's last tick came early, so only the metrics and weights are the same
    assert ours["metrics"] == theirs["metrics"]


CHANNELS_LAST = """
format = 1
[data]
name = "hdf5"
path = "PATH"
[network]
name = "adain"
dims = { class = 3, content = 3 }
encoder_channels = [4, 6]
stem_kernel = 3
encoder_hidden = [8]
decoder_channels = [6, 4]
output_channels = 3
[objective]
name = "soft_intro_vae"
[shadow]
half_life = "20 images"
[train]
batch = 8
length = "6 steps"
tick = "2 steps"
checkpoint = "2 steps"
channels_last = true
"""


def test_channels_last_weights_and_moments_resume_as_they_were(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    factors = {"model": 5, "view": 12}
    datafile.write(
        tmp_path / "own.h5",
        shape=images.shape,
        block=60,
        produce=lambda numbers: ((number, images) for number in numbers),
        progress=lambda what, done, total: None,
        source="a test",
        factors=np.stack(np.unravel_index(np.arange(60), (5, 12)), axis=1),
        factor_sizes=factors,
    )
    recipe = tmp_path / "layout.toml"
    recipe.write_text(CHANNELS_LAST.replace("PATH", str(tmp_path / "own.h5")))
    code, moments = crash.in_child(crash.train, str(recipe), str(tmp_path / "whole"))
    assert code == 0
    assert kill_and_resume(recipe, tmp_path / "run", moments // 2) == contents(tmp_path / "whole")


def test_another_recipe_is_refused(recipe, tmp_path, siv):
    run = tmp_path / "run"
    assert crash.in_child(crash.train, str(recipe), str(run))[0] == 0
    done = siv("run", recipe, "--run-dir", run, "--set", "train.seed=5")
    assert done.returncode == 2
    assert "train.seed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(recipe, tmp_path, undisturbed, siv):
    expected, moments = undisturbed
    run = tmp_path / "run"
    assert crash.in_child(crash.train, str(recipe), str(run), kill_at=moments - 2)[0] == -signal.SIGKILL
    newest = checkpoint.path_of(run / "checkpoints", "last")
    weights = newest / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    done = siv("run", "--resume", run, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "damaged" in done.stdout
    assert "trying the checkpoint before it" in done.stdout
    assert contents(run) == expected


def test_weights_of_another_network_are_named(tmp_path):
    import torch

    with pytest.raises(UserError) as error:
        checkpoint.restore_module(torch.nn.Linear(2, 3), {"weight": torch.zeros(2, 2), "extra": torch.zeros(1)}, "here")
    text = str(error.value)
    assert "'bias' is missing" in text
    assert "'extra' is not part" in text
    assert "[2, 2], the network needs [3, 2]" in text


# -- signals -----------------------------------------------------------------------------------------------------

LONG = RECIPE.replace('"5 steps"', '"2000 steps"').replace('"9 steps"', '"400000 steps"').replace('"4 steps"', '"5000 steps"')
SECONDS = 5.0


def start(
    recipe: Path, run: Path, *more: str, env: dict[str, str] | None = None, fresh: bool = False
) -> forked.Siv | subprocess.Popen[str]:
    """`siv run` at work: a fork, or with `fresh` a new interpreter."""
    arguments = ["run", str(recipe), "--run-dir", str(run), "--device", "cpu", *more]
    if not fresh:
        return forked.Siv(run.parent, *arguments, env=env)
    command = [sys.executable, "-m", "siv_core.cli.main", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not come to it"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_training_leaves_a_checkpoint(tmp_path, signum):
    recipe, run = tmp_path / "long.toml", tmp_path / "run"
    recipe.write_text(LONG)
    process = start(recipe, run, fresh=signum == signal.SIGINT)
    wait_for(lambda: (run / "stats.jsonl").exists())
    sent = time.monotonic()
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signum, err
    assert time.monotonic() - sent < SECONDS
    assert "Traceback" not in err
    assert "--resume" in out
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    saved = checkpoint.path_of(run / "checkpoints", "last")
    assert checkpoint.problems(saved) == []
    assert json.loads((saved / "state.json").read_text())["step"] == json.loads((run / "status.json").read_text())["step"]


@pytest.mark.slow
def test_a_signal_while_data_is_prepared_keeps_what_is_done(tmp_path):
    recipe, run, data = tmp_path / "cars.toml", tmp_path / "run", tmp_path / "data"
    recipe.write_text(LONG.replace('name = "digits"', 'name = "rendered_cars"\nsize = 8').replace('"digit"', '"model"'))
    process = start(recipe, run, env={"SIV_DATA": str(data)})
    wait_for(lambda: list(data.rglob("*.partial")))
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert time.monotonic() - sent < SECONDS
    assert not list(data.rglob("*.h5"))
    [journal] = data.rglob("*.partial.json")
    assert len(json.loads(journal.read_text())["done"]) > 0


CARS = f"""
format = 1
[data]
name = "rendered_cars"
size = 32
{toys.ADAIN}[objective]
name = "soft_intro_vae"
[train]
batch = 16
length = "2 steps"
[metrics.content_transfer]
pairs = 500
"""


@pytest.mark.slow
def test_a_signal_while_metrics_are_taken(tmp_path, siv):
    recipe, run = tmp_path / "cars.toml", tmp_path / "run"
    recipe.write_text(CARS)
    process = start(recipe, run)
    wait_for(lambda: (run / "images/translation.png").exists(), seconds=120)
    time.sleep(1)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert time.monotonic() - sent < SECONDS
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert not (run / "metrics.jsonl").exists()
    done = siv("run", "--resume", run, "--set", "metrics.content_transfer.pairs=1", seconds=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert (run / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path):
    recipe, run = tmp_path / "long.toml", tmp_path / "run"
    recipe.write_text(LONG)
    process = start(recipe, run)
    wait_for(lambda: (run / "stats.jsonl").exists())
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


@pytest.mark.slow
def test_random_kills_in_wall_time(recipe, tmp_path, undisturbed):
    """As above, but wherever the process happens to be, in Python or in C; the first two times in new interpreters."""
    expected, _ = undisturbed
    for i in range(int(os.environ.get("SIV_RANDOM_KILLS", "4"))):
        run = tmp_path / f"run{i}"
        for attempt in range(6):
            fresh = i == 0 and attempt < 2
            process = start(recipe, run, fresh=fresh)
            try:
                process.communicate(timeout=(1.5 if fresh else 0.1) + (3 if fresh else 1) * random.Random(i).random())
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate(timeout=60)
                if not (run / "resolved.json").exists():
                    break
        done = start(recipe, run)
        _, err = done.communicate(timeout=60)
        assert done.returncode == 0, err
        assert contents(run) == expected


# -- preparation -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_preparation_killed_at_many_moments(tmp_path):
    """Four small views of 60 cars: their blocks are noted and flushed as large ones are, and there is time for more kills."""
    recipe = tmp_path / "cars.toml"
    recipe.write_text(RECIPE.replace('name = "digits"', 'name = "rendered_cars"\nsize = 8').replace('"digit"', '"model"'))

    def prepare(folder: Path, kill_at: int = 0) -> tuple[int, int, list[Path]]:
        code, moments = crash.in_child(prepare_in, str(folder), str(recipe), kill_at=kill_at)
        return code, moments, sorted(folder.rglob("*.h5"))

    code, moments, [whole] = prepare(tmp_path / "whole")
    assert code == 0
    for kill_at in moments_to_try(12, moments):
        folder = tmp_path / f"killed{kill_at}"
        code, _, _ = prepare(folder, kill_at)
        assert code == -signal.SIGKILL
        code, _, [path] = prepare(folder)
        assert code == 0
        assert path.read_bytes() == whole.read_bytes()


def prepare_in(folder: str, recipe: str) -> None:
    from siv_plugins import rendered_cars as plugin

    os.environ["SIV_DATA"], plugin.MODELS, plugin.STORED, plugin.AZIMUTHS, plugin.VIEWS = folder, 60, 8, 1, 4
    crash.prepare(recipe)
