"""Python is the command line's equal: what it prints, how it stops, what it takes. A seed gives the same weights anywhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import toys
from conftest import TINY
from test_record import RECIPE
from torch import nn

import siv_core
from siv_core import Silent, UserError
from siv_core.recipe import build
from siv_core.recipe.recipe import load
from siv_core.runs import session, watchers
from siv_core.seeding import Seeded

LONG = TINY.replace('"12 steps"', '"100000 steps"').replace('checkpoint = "4 steps"', 'checkpoint = "90000 steps"')


# -- what it says and how it stops -----------------------------------------------------------------------------------------------


def state(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


class Interrupting(Silent):
    """Ctrl+C at this step; again and again where `again`."""

    def __init__(self, step: int, *, again: bool = False) -> None:
        self.at, self.again = step, again

    def stepped(self, step: int, steps: int, images_seen: int) -> None:
        if step == self.at:
            for _ in range(1 + self.again):
                signal.raise_signal(signal.SIGINT)


def test_ctrl_c_saves_and_is_noted_as_stopped(tmp_path):
    (tmp_path / "r.toml").write_text(LONG)
    with pytest.raises(KeyboardInterrupt):
        siv_core.run(tmp_path / "r.toml", run_dir=tmp_path / "run", device="cpu", watcher=Interrupting(7))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert state(tmp_path / "run") | {"state": "stopped", "step": 7} == state(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000007"]
    sets = ['train.length="9 steps"', 'train.checkpoint="4 steps"']
    done = siv_core.resume(tmp_path / "run", device="cpu", watcher=Silent(), sets=sets)
    assert done.state == "finished"
    (tmp_path / "s.toml").write_text(LONG)
    whole = siv_core.run(tmp_path / "s.toml", run_dir=tmp_path / "whole", device="cpu", watcher=Silent(), sets=sets)
    names = [path.name for path in (whole.path / "checkpoints/step_00000009").glob("*.safetensors")]
    for name in names:
        made, expected = (run.path / "checkpoints/step_00000009" / name for run in (done, whole))
        assert made.read_bytes() == expected.read_bytes(), name


def test_who_watched_an_interrupted_run_can_watch_another(tmp_path):
    (tmp_path / "r.toml").write_text(LONG)
    watcher = Interrupting(5)
    with pytest.raises(KeyboardInterrupt):
        siv_core.run(tmp_path / "r.toml", run_dir=tmp_path / "run", device="cpu", watcher=watcher)
    done = siv_core.resume(tmp_path / "run", device="cpu", watcher=watcher, sets=['train.length="9 steps"'])
    assert done.state == "finished"


def test_ctrl_c_in_the_last_step_is_heard_too(tmp_path):
    (tmp_path / "r.toml").write_text(TINY)
    with pytest.raises(KeyboardInterrupt):
        siv_core.run(tmp_path / "r.toml", run_dir=tmp_path / "run", device="cpu", watcher=Interrupting(12))
    assert state(tmp_path / "run")["step"] == 12


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    (tmp_path / "r.toml").write_text(LONG)
    with pytest.raises(KeyboardInterrupt):
        siv_core.run(tmp_path / "r.toml", run_dir=tmp_path / "run", device="cpu", watcher=Interrupting(3, again=True))
    assert state(tmp_path / "run")["state"] == "stopped"
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_somebody_elses_handler_stays(tmp_path):
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        (tmp_path / "r.toml").write_text(TINY)
        done = siv_core.run(tmp_path / "r.toml", run_dir=tmp_path / "run", device="cpu", watcher=Interrupting(3))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (heard, done.state) == ([signal.SIGINT], "finished")


def test_it_shows_progress_by_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "nvidia_present", lambda: False)
    monkeypatch.setattr(watchers.Lines, "line_seconds", 0.0)
    (tmp_path / "r.toml").write_text(TINY + "[profiles.cpu.train]\nseed = 3\n")
    siv_core.run(tmp_path / "r.toml", run_dir=tmp_path / "run", device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no NVIDIA device here: profile 'cpu' applies (turn it off with --profile none)"
    assert "training: 12 of 12 steps to go on cpu" in lines
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.partition("  ")[0] for line in steps] == [f"step {n} of 12" for n in (3, 6, 9, 12)]
    assert all("images/" not in line and "/s  " in line and line.endswith(" left") for line in steps)
    assert f"wrote {tmp_path / 'run/images/samples.png'}" in lines
    assert lines[-1].startswith("finished at step 12")
    siv_core.resume(tmp_path / "run", device="cpu", sets=['train.length="15 steps"'], watcher=Silent())
    assert capsys.readouterr().out == ""


def test_work_that_is_counted_is_told_with_the_time_that_is_left(capsys, monkeypatch):
    lines, clock = watchers.Lines(), iter([0.0, 1.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    for done in range(5):
        lines.progress("preparing", done, 4)
    assert capsys.readouterr().out.splitlines() == ["preparing: 2 of 4, 6 s left", "preparing: 4 of 4, 0 s left"]


# -- what it takes ---------------------------------------------------------------------------------------------------------------


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/r.toml").write_text(TINY)
    done = siv_core.run("~/r.toml", run_dir="~/run", device="cpu", watcher=Silent())
    assert done.path == tmp_path / "home/run"
    assert siv_core.load("~/run", device="cpu").spec.shape == (1, 8, 8)
    assert siv_core.resume("~/run", device="cpu", sets=['train.length="13 steps"'], watcher=Silent()).path == done.path
    (tmp_path / "home/next.toml").write_text(TINY + '[init]\nrun = "~/run"\n')
    more = siv_core.run(Path("~/next.toml"), root="~/runs", device="cpu", watcher=Silent())
    assert more.path.parent == tmp_path / "home/runs"
    assert json.loads((more.path / "resolved.json").read_text())["init"]["run"] == str(done.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
    with pytest.raises(UserError, match=r"~nobody-of-that-name/r.toml: whose home folder that is, is not known"):
        siv_core.run("~nobody-of-that-name/r.toml")


@pytest.mark.parametrize("command", [("sample", "-n", "4"), ("reconstruct", "~/a.png"), ("evaluate",)])
def test_the_command_line_knows_the_home_folder_too(digits_run, siv, tmp_path, monkeypatch, command):
    monkeypatch.setenv("HOME", str(tmp_path))
    name, *more = command
    (tmp_path / "run").symlink_to(digits_run)
    from PIL import Image

    Image.new("L", (8, 8), 100).save(tmp_path / "a.png")
    out = () if name == "evaluate" else ("--out", "~/out")
    done = siv(name, "~/run", *more, *out)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "~").exists()
    assert (tmp_path / "out").is_dir() == (name != "evaluate")


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits_run")
    (folder / "r.toml").write_text(RECIPE)
    return siv_core.run(folder / "r.toml", run_dir=folder / "run", device="cpu", watcher=Silent()).path


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sets": "train.batch=8"}, r"sets: is one string, expected a list of them: give \['train.batch=8'\]"),
        ({"profiles": "none"}, r"profiles: is one string, expected a list of them: give \['none'\]"),
        ({"run_folder": "x"}, r"run_folder: no such argument"),
        ({"set": ["train.batch=8"]}, r"set: no such argument; did you mean 'sets'\?"),
    ],
)
def test_wrong_arguments_are_told(tmp_path, given, words):
    (tmp_path / "r.toml").write_text(TINY)
    with pytest.raises(UserError, match=words):
        siv_core.run(tmp_path / "r.toml", watcher=Silent(), **given)


@pytest.mark.parametrize("given", [{"profiles": ["x"]}, {"run_dir": "elsewhere"}])
def test_resume_takes_these_from_the_run(digits_run, given):
    with pytest.raises(UserError, match="resume takes recipe, profiles and folder from the run"):
        siv_core.resume(digits_run, **given)


# -- weights depend on the seed alone --------------------------------------------------------------------------------------------


def weights(recipe: Path, catalogue, seed: int) -> list[torch.Tensor]:
    read = load(recipe, catalogue, sets=[f"train.seed={seed}"])
    built = build.build(read, catalogue, build.dataset(read, catalogue))
    return [weight.detach() for module in built.modules.values() for weight in module.parameters()]


def test_threads_do_not_change_each_others_weights(tmp_path, catalogue):
    (tmp_path / "r.toml").write_text(TINY)
    recipe, stop = tmp_path / "r.toml", threading.Event()
    alone = [weights(recipe, catalogue, seed) for seed in range(4)]
    found: dict[tuple[int, int], list[torch.Tensor]] = {}

    def work(seed: int) -> None:
        for trial in range(5):
            found[seed, trial] = weights(recipe, catalogue, seed)

    def disturb() -> None:
        while not stop.is_set():
            torch.rand(100)

    before = torch.get_rng_state()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    other = threading.Thread(target=disturb)
    for thread in (other, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    other.join()
    assert len(found) == 20
    for (seed, _), made in found.items():
        assert all(torch.equal(*pair) for pair in zip(made, alone[seed], strict=True))
    torch.set_rng_state(before)
    assert not torch.equal(alone[0][0], alone[1][0])


def everything_that_draws() -> list[torch.Tensor]:
    layers = [nn.Linear(5, 7), nn.Conv2d(3, 4, 3), nn.Embedding(4, 5), nn.LSTM(3, 4), nn.Bilinear(2, 3, 4)]
    x = torch.empty(4, 4)
    nn.init.orthogonal_(x)
    drawn = [x, nn.init.trunc_normal_(torch.empty(30)), torch.rand(3), torch.randn(2, 3), torch.randint(5, (4,))]
    drawn += [torch.randint(2, 5, (4,)), torch.randperm(6), torch.rand_like(x), torch.randn_like(x), torch.normal(0.0, 1.0, (3,))]
    drawn += [torch.normal(x, 1.0), torch.bernoulli(torch.full((5,), 0.5)), torch.multinomial(torch.ones(4), 2)]
    drawn += [torch.empty(3).exponential_(), nn.functional.dropout(torch.ones(20), 0.5), torch.rand(3, dtype=torch.float64)]
    return drawn + [weight.detach() for layer in layers for weight in layer.parameters()]


def test_a_seeded_block_draws_what_the_global_generator_would():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = everything_that_draws()
        before = torch.get_rng_state()
        with Seeded(7):
            found = everything_that_draws()
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_seeded_block_does_not_bring_the_compiler_in():
    """Which takes two seconds to import, for every command that builds a model."""
    code = "import sys, torch; from siv_core.seeding import Seeded\nwith Seeded(0): torch.nn.Linear(2, 3)\n"
    code += "print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_generator_that_is_given_is_used():
    with Seeded(7):
        found = (
            torch.rand(3, generator=torch.Generator().manual_seed(3)),
            torch.empty(3).normal_(0, 1, generator=torch.Generator().manual_seed(3)),
        )
    assert torch.equal(found[0], torch.rand(3, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(found[1], torch.empty(3).normal_(0, 1, generator=torch.Generator().manual_seed(3)))


# -- demands of the data ---------------------------------------------------------------------------------------------------------


def own_data(folder: Path, n: int, channels: int, network: str = "", more: str = "") -> Path:
    with h5py.File(folder / "own.h5", "w") as file:
        file["images"] = np.random.default_rng(0).integers(0, 256, (n, channels, 16, 16), dtype=np.uint8)
    tables = network or '[network]\nname = "mlp"\nz_dim = 4\nhidden = [16]\n'
    objective = '[objective]\nname = "soft_intro_vae"\n[train]\nbatch = 4\nlength = "2 steps"\n'
    text = f'format = 1\n[data]\nname = "hdf5"\npath = "{folder / "own.h5"}"\n{more}{tables}{objective}'.replace("\\", "/")
    (folder / "r.toml").write_text(text)
    return folder / "r.toml"


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_any_number_of_channels_trains_and_is_drawn_as_is_said(siv, tmp_path, channels):
    recipe = own_data(tmp_path, 20, channels, more='layout = "NCHW"\n')
    told = {2: "the first as red, the second as green", 4: "the first three as red, green and blue", 5: "the first three"}
    for call in (("check", recipe), ("run", recipe, "--run-dir", "run")):
        done = siv(*call)
        assert done.returncode == 0, done.stderr
        assert ("pictures show" in done.stdout) == (channels not in (1, 3))
        assert told.get(channels, "") in done.stdout
    assert {"samples.png", "reconstructions.png"} <= {path.name for path in (tmp_path / "run/images").iterdir()}
    done = siv("reconstruct", "run", "--out", "out")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("n", "network", "words"),
    [
        (1, "", "no image of 'hdf5' is in the split 'held_out', of 1 in all"),
        (1, toys.ADAIN, "no image of 'hdf5' is in the split 'held_out', of 1 in all"),
        (12, toys.ADAIN, "one image alone is held out, and translations are shown between two: hold out more (data.held_out)"),
    ],
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_too_few_images_are_told_before_anything_is_made(siv, tmp_path, n, network, words, command):
    recipe = own_data(tmp_path, n, 3, network)
    done = siv(command, recipe, *(("--run-dir", "run") if command == "run" else ()))
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_with_one_held_out_image_is_told_at_its_translation(siv, tmp_path):
    recipe = own_data(tmp_path, 12, 3, toys.ADAIN, more="held_out = 0.2\n")
    assert siv("run", recipe, "--run-dir", "run").returncode == 0
    resolved = json.loads((tmp_path / "run/resolved.json").read_text())
    resolved["data"]["held_out"] = 0.1
    (tmp_path / "run/resolved.json").write_text(json.dumps(resolved))
    for state_file in (tmp_path / "run/checkpoints").glob("*/state.json"):
        saved = json.loads(state_file.read_text())
        saved["resolved"]["data"]["held_out"] = 0.1
        state_file.write_text(json.dumps(saved))
    done = siv("translate", "run")
    assert done.returncode == 2
    assert "a translation is shown between two held-out images, and there is 1; hold out more (data.held_out)" in done.stderr


def test_own_pictures_are_looked_at_before_data_are_prepared(siv, tmp_path):
    recipe = own_data(tmp_path, 12, 3, toys.ADAIN, more="held_out = 0.2\n")
    assert siv("run", recipe, "--run-dir", "run").returncode == 0
    (tmp_path / "a.png").write_text("no picture")
    os.remove(tmp_path / "own.h5")
    done = siv("translate", "run", "--take", "class=a.png")
    assert done.returncode == 2
    assert "a.png: no picture that can be read" in done.stderr


def test_what_takes_no_generator_is_told_and_not_drawn_from_the_global_one():
    before = torch.get_rng_state()
    with Seeded(7), pytest.raises(NotImplementedError, match=r"native_dropout.* takes no generator: what it draws"):
        torch.native_dropout(torch.ones(100), 0.5, True)
    assert torch.equal(before, torch.get_rng_state())
