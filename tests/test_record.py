"""What a run keeps about itself, and what a resume will not do."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import toys
from attrs import evolve

from siv_core.errors import UserError
from siv_core.runs import opened, record, session, watchers
from siv_core.store import checkpoint
from siv_core.store.rundir import RunDir
from siv_core.use import apply

RECIPE = (
    toys.SMALL
    + """
[objective]
name = "vae"
[shadow]
half_life = "200 images"
[train]
batch = 48
tick = "2 steps"
checkpoint = "3 steps"
[[stages]]
length = "4 steps"
[[stages]]
length = "4 steps"
train = { batch = 33 }
[metrics.latent_probes]
class_factor = "digit"
"""
)


class Listener(watchers.Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "r.toml").write_text(RECIPE)
    session.run(folder / "r.toml", run_dir=folder / "run", device="cpu")
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def lines(run: Path, name: str) -> list[dict]:
    return RunDir(run).read(name)


def evaluate(run: Path) -> None:
    one = opened.open_run(run, "last", "auto", "cpu")
    about = record.measured_as(one.built, one.model, "evaluate", one.step)
    record.append_metrics(one.built, one.built.metrics(), one.model, one.run_dir, about, watchers.Silent(), None)


def test_a_metric_that_a_stage_cannot_have_is_told_when_it_is_to_measure(run):
    one = opened.open_run(run, "last", "auto", "cpu")
    metrics = one.built.metrics(evolve(one.model.spec, factors={}))
    about = record.measured_as(one.built, one.model, "evaluate", one.step)
    [line] = record.append_metrics(one.built, metrics, one.model, one.run_dir, about, watchers.Silent(), None)
    assert (line["metric"], line["name"]) == ("latent_probes", "all")
    assert "needs data with factors" in line["skipped"]


def test_a_finished_run_says_so_and_is_left_alone(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    listener = Listener()
    done = session.resume(run, watcher=listener, device="cpu")
    assert done.state == "finished"
    assert any("is finished; a longer length goes on" in line for line in listener.lines)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "lock"}


def test_what_evaluate_measured_outlasts_a_resume(run):
    own = lines(run, "metrics")
    assert {line["by"] for line in own} == {"run"}
    assert {line["weights"] for line in own} == {"ema"}  # the recipe keeps averages
    evaluate(run)
    evaluated = lines(run, "metrics")[len(own) :]
    assert {line["by"] for line in evaluated} == {"evaluate"}
    session.resume(run, sets=('stages=[{length="4 steps"},{length="6 steps",train={batch=33}}]',), device="cpu")
    after = lines(run, "metrics")
    assert after[: len(evaluated)] == evaluated
    assert {line["checkpoint"] for line in after[len(evaluated) :]} == {"step_00000010"}
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) == {"format": 2}


def test_earlier_starts_are_remembered(run):
    first = json.loads((run / "manifest.json").read_text())
    session.resume(run, sets=("metrics.latent_probes.k=3",), device="cpu")
    second = json.loads((run / "manifest.json").read_text())
    assert first["history"] == []
    [kept] = second["history"]
    assert kept == {key: first[key] for key in ("time", "command", "libraries", "device", "precision", "threads", "processes")}
    assert {line["protocol"]["k"] for line in lines(run, "metrics")} == {3}


def stages(*lengths: str) -> tuple[str]:
    return (f'stages=[{{length="{lengths[0]}"}},{{length="{lengths[1]}",train={{batch=33}}}}]',)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (("5 steps", "4 steps"), r"stages\[0\].length: this stage was over at step 4: leave its length at '4 steps'"),
        (("4 steps", "2 steps"), r"stages\[1\].length: the run is at step 8 already, and '2 steps' ends at 6"),
    ],
)
def test_the_past_cannot_be_given_another_length(run, lengths, words):
    with pytest.raises(UserError, match=words):
        session.resume(run, sets=stages(*lengths), device="cpu")


def test_a_fade_that_has_begun_keeps_its_length(tmp_path):
    style = 'name = "style"\nstart_channels = 4\nmax_channels = 4\nencoder_mapping = 2\ndecoder_mapping = 2\nz_dim = 3'
    text = RECIPE.replace('name = "mlp"\nz_dim = 3\nhidden = [16]', style)
    growing = [f"stages=[{{length='4 steps',data={{size=4}}}},{{length='{steps} steps',fade=0.5}}]" for steps in (4, 40)]
    (tmp_path / "r.toml").write_text(text)
    session.run(tmp_path / "r.toml", run_dir=tmp_path / "run", sets=growing[:1], device="cpu")
    with pytest.raises(UserError, match=r"stages\[1\].length: this stage has begun to fade in"):
        session.resume(tmp_path / "run", sets=growing[1:], device="cpu")


def test_the_same_length_in_other_words_is_the_same(run):
    assert session.resume(run, sets=stages("192 images", "4 steps"), device="cpu").state == "finished"


def test_other_data_is_refused(run):
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["data"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="trained on other data: fingerprint 0000"):
        session.resume(run, device="cpu")


def test_without_a_whole_checkpoint_nothing_is_cut(run):
    for path in (run / "checkpoints").glob("*/encoder.safetensors"):
        path.write_bytes(b"junk")
    before = (run / "stats.jsonl").read_bytes()
    with pytest.raises(UserError, match="none of its 2 checkpoints is whole; move this folder away"):
        session.resume(run, device="cpu")
    assert (run / "stats.jsonl").read_bytes() == before


def test_averages_are_used_where_there_are_some(run):
    auto, ema, raw = (opened.load(run, weights=weights, device="cpu") for weights in ("auto", "ema", "raw"))
    assert [model.name for model in (auto, ema, raw)] == [f"step_00000008, {name} weights" for name in ("ema", "ema", "raw")]
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(auto.reconstruct(x), ema.reconstruct(x))
    assert not torch.equal(auto.reconstruct(x), raw.reconstruct(x))
    with pytest.raises(UserError, match="weights 'mean': expected raw, ema or auto"):
        opened.load(run, weights="mean", device="cpu")


def test_raw_weights_where_there_are_no_averages(tiny, tmp_path):
    session.run(tiny, run_dir=tmp_path / "run", device="cpu")
    assert opened.load(tmp_path / "run", device="cpu").name.endswith("raw weights")
    with pytest.raises(UserError, match=r"no averaged weights; a recipe keeps them with a \[shadow\] table"):
        opened.load(tmp_path / "run", weights="ema", device="cpu")


def test_a_model_is_loaded_without_its_data(tmp_path, monkeypatch):
    monkeypatch.setenv("SIV_DATA", str(tmp_path / "data"))
    images = np.random.default_rng(0).integers(0, 256, (80, 1, 8, 8), dtype=np.uint8)
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["images"] = images
    text = RECIPE.split("[metrics", maxsplit=1)[0].replace(
        'name = "digits"', f'name = "hdf5"\npath = "{tmp_path}/own.h5"\nsize = 4'
    )
    (tmp_path / "r.toml").write_text(text)
    session.run(tmp_path / "r.toml", run_dir=tmp_path / "run", device="cpu")
    before = opened.load(tmp_path / "run", device="cpu").sample(3)
    (tmp_path / "own.h5").unlink()
    model = opened.load(tmp_path / "run", device="cpu")
    assert model.spec.shape == (1, 4, 4)
    assert torch.equal(model.sample(3), before)
    one = opened.open_run(tmp_path / "run", "last", "auto", "cpu")
    with pytest.raises(UserError, match=r"not at hand: there is no file .*own\.h5"):
        opened.need_data(one, watchers.Silent().progress)


def test_the_automatic_profile_is_told_once(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "nvidia_present", lambda: False)
    (tmp_path / "r.toml").write_text(RECIPE + "[profiles.cpu.train]\nseed = 3\n")
    listener = Listener()
    session.run(tmp_path / "r.toml", run_dir=tmp_path / "run", device="cpu", watcher=listener)
    assert any("profile 'cpu' applies" in line for line in listener.lines)
    listener = Listener()
    session.resume(tmp_path / "run", device="cpu", watcher=listener)
    assert not any("profile 'cpu' applies" in line for line in listener.lines)


def test_a_conditional_run_shows_its_classes(tmp_path):
    text = RECIPE.replace("[train]", '[train]\nconditional = true\npreview = "4 steps"')
    (tmp_path / "r.toml").write_text(text)
    done = session.run(tmp_path / "r.toml", run_dir=tmp_path / "run", device="cpu")
    shown = {path.name for path in (tmp_path / "run/images").glob("*.png")}
    assert {"preview_00000004.png", "preview_00000008.png", "samples.png", "reconstructions.png"} <= shown
    model = done.model(device="cpu")
    assert torch.equal(model.sample(12), model.sample(12, labels=torch.arange(12) % 10))
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(UserError, match="takes a label for each image"):
        model.reconstruct(x)
    data = opened.open_run(tmp_path / "run", "last", "auto", "cpu").built.dataset
    written = apply.reconstruct(model, data, tmp_path / "outputs", (), 0, "it")["files"]
    assert [Path(path).name for path in written] == ["reconstructions.safetensors", "reconstructions.png"]
    assert model.interpolate(x, x, 3, labels=torch.tensor([1, 2])).shape == (3, 2, 1, 8, 8)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "manifest",
            None,
            r"manifest.json: cannot be read \(No such file or directory\); bring it back from a copy, or start the run",
        ),
        ("manifest", "{", r"manifest.json: damaged, not JSON .*; bring it back from a copy"),
        (
            "manifest",
            '{"format": 1, "recipe": "r"}',
            r"manifest.json: damaged, 'automatic_profile' is missing or not what siv writes",
        ),
        ("manifest", '{"format": 9}', r"manifest.json: format 9 is of a newer siv, this one reads 2: update it"),
        ("resolved", "[]", r"resolved.json: damaged, it does not give its format"),
        ("resolved", '{"format": 0}', r"resolved.json: format 0 is of an older siv, this one reads 1: use the one that manifest"),
        ("resolved", '{"format": 1}', r"holds another run; these differ"),
        ("status", "{", r"status.json: damaged, not JSON .*; take it away, nothing depends on it"),
        ("status", '{"format": 1}', r"status.json: damaged, 'state' is missing or not what siv writes; take it away"),
    ],
)
def test_a_damaged_file_of_a_run_is_named_with_what_to_do(run, name, text, words):
    (run / f"{name}.json").unlink() if text is None else (run / f"{name}.json").write_text(text)
    with pytest.raises(UserError, match=words):
        session.resume(run, device="cpu")


def test_a_length_that_siv_does_not_write(run):
    path = run / "resolved.json"
    path.write_text(path.read_text().replace('"4 steps"', "5"))
    with pytest.raises(UserError, match=r"resolved.json: damaged, a stage's length is not what siv writes"):
        session.resume(run, device="cpu")


def test_a_checkpoint_of_another_recipe_is_refused(run, tmp_path):
    """Although every tensor fits."""
    (tmp_path / "other.toml").write_text(RECIPE.replace("batch = 48", "batch = 48\nseed = 7"))
    session.run(tmp_path / "other.toml", run_dir=tmp_path / "other", device="cpu")
    newest = run / "checkpoints" / "step_00000008"
    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step_00000008", newest)
    words = r"step_00000008: saved by another recipe; these differ:\ntrain.seed: .*\nthe checkpoint of step 6 before it is whole"
    with pytest.raises(UserError, match=words):
        opened.load(run, device="cpu")
    (run / "status.json").unlink()
    with pytest.raises(UserError, match=words):
        session.resume(run, device="cpu")


def test_a_damaged_newest_checkpoint_is_not_replaced_in_silence(run):
    (run / "checkpoints" / "step_00000008" / "prior.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"prior.safetensors: missing\nthe checkpoint of step 6 before it is whole: --checkpoint 6"
    ):
        opened.load(run, device="cpu")
    assert opened.load(run, checkpoint="6", device="cpu").name == "step_00000006, ema weights"


def test_a_stage_that_the_recipe_does_not_have(run):
    path = run / "checkpoints" / "step_00000008" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stage": {"number": 2, "fade": 1}}))
    words = r"step_00000008: saved in stage 2, which this recipe does not have\nthe checkpoint of step 6 before it is whole"
    with pytest.raises(UserError, match=words):
        opened.load(run, device="cpu")


def test_what_a_killed_process_had_yet_to_prune_goes_at_the_next_start(run):
    folder = run / "checkpoints"
    shutil.copytree(folder / "step_00000006", folder / "step_00000003")
    path = folder / "step_00000003" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 3, "number": 1}))
    (run / "status.json").unlink()
    session.resume(run, device="cpu")
    assert checkpoint.steps(folder) == [6, 8]


def as_of_0_1(run: Path) -> None:
    """The same run as siv 0.1 left it: format 1, and its names for the terms of x_prior."""
    for name in ("manifest", "status"):
        path = run / f"{name}.json"
        tree = json.loads(path.read_text())
        if name == "manifest":
            tree["libraries"]["siv"] = "0.1.0"
        path.write_text(json.dumps({**tree, "format": 1}))
    for name in ("stats", "metrics"):
        path = run / f"{name}.jsonl"
        path.write_text(path.read_text().replace('{"format": 2}', '{"format": 1}').replace("_prior", "_fake"))
    for path in run.glob("checkpoints/*/state.json"):
        path.write_text(path.read_text().replace("_prior", "_fake"))
    resolved = run / "resolved.json"
    tree = json.loads(resolved.read_text())
    for stage in tree["stages"]:
        del stage["fade_shape"]
    resolved.write_text(json.dumps(tree))
    for path in run.glob("checkpoints/*/state.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "resolved": tree}))


def test_a_run_of_an_earlier_version_is_used_but_not_gone_on_with(run):
    expected = opened.load(run, device="cpu").sample(3)
    as_of_0_1(run)
    assert torch.equal(opened.load(run, device="cpu").sample(3), expected)
    before = len(lines(run, "metrics"))
    evaluate(run)
    assert len(lines(run, "metrics")) > before
    told = r"siv 0\.1\.0 \(format 1; this one goes on with format 2\): go on with that version \(pip install .siv==0\.1\.0"
    with pytest.raises(UserError, match=told):
        session.resume(run, device="cpu")
    with pytest.raises(UserError, match=told):
        session.run(run / "recipe.toml", run_dir=run, device="cpu")


def test_each_file_of_a_checkpoint_is_read_once(run):
    """Before the first step of a resume, and by a load."""
    newest = RunDir(run).checkpoints / "step_00000008"
    opened_files: list[str] = []
    watching = [True]

    def hook(event, arguments):
        if watching[0] and event == "open" and str(arguments[0]).startswith(str(newest)) and "r" in str(arguments[1]):
            opened_files.append(Path(str(arguments[0])).name)

    sys.addaudithook(hook)
    try:
        opened.load(run, device="cpu")
        by_load, opened_files[:] = sorted(opened_files), []
        longer = ('stages=[{length="4 steps"},{length="6 steps",train={batch=33}}]',)
        session.resume(run, sets=longer, device="cpu", max_seconds=1e-9)
    finally:
        watching[0] = False
    files = sorted([*json.loads((newest / "state.json").read_text())["files"], "state.json"])
    assert by_load == files
    assert sorted(opened_files) == files
