"""A run stays what it was trained as: whatever its recipe, a plugin's defaults and the places of its data have become since."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import attrs
import h5py
import numpy as np
import pytest
import torch
import toys
from safetensors.numpy import load_file
from siv_plugins.adain import AdaINConfig

import siv_core
from siv_core import UserError, option
from siv_core.recipe import catalogue as catalogues
from siv_core.runs import opened, session
from siv_core.runs.watchers import Silent

RECIPE = f"""
format = 1
[data]
name = "hdf5"
path = "data/own.h5"
held_out = 0.25
{toys.ADAIN}[objective]
name = "soft_intro_vae"
[train]
batch = 8
length = "3 steps"
[metrics.latent_probes]
class_factor = "factor_0"
k = 2
"""
COMMANDS = ("sample", "reconstruct", "interpolate", "translate", "encode", "evaluate")
WITH_DATA = ("reconstruct", "interpolate", "translate", "encode", "evaluate")


def write_data(path: Path, seed: int = 0, n: int = 40, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["images"] = np.random.default_rng(seed).integers(0, 256, (n, 3, 16, 16), dtype=np.uint8)
        file["factors"] = np.stack([np.arange(n) % 4, np.arange(n) // 4], axis=1)
        for name, values in more.items():
            file[name] = values
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `data/own.h5`, `r.toml` and `run`; the data's path in the recipe is a relative one."""
    folder = tmp_path_factory.mktemp("stays")
    write_data(folder / "data/own.h5")
    (folder / "r.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        session.run("r.toml", run_dir="run", device="cpu", watcher=Silent())
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run alone, in another folder than it was made in; its data are where they were."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def arrays(folder: Path) -> dict[str, np.ndarray]:
    [path] = folder.glob("*.safetensors")
    return load_file(path)


def own_metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in ("name", "value", "skipped") if key in line} for line in lines if line.get("by") == "evaluate"
    ]


def outcome(siv, run: Path, command: str, name: str, *more) -> object:
    """What a command made of the run."""
    out = () if command == "evaluate" else ("--out", run.parent / name)
    done = siv(command, run, *out, *more)
    assert done.returncode == 0, done.stderr
    return own_metrics(run)[-4:] if command == "evaluate" else arrays(run.parent / name)


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
    return bool(a) and a == b


# -- its model -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_an_edited_recipe_changes_no_model(siv, run, command):
    before = outcome(siv, run, command, "before")
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("stem_kernel = 0", "stem_kernel = 0\nslope = 0.9") + "\n[nonsense]\n")
    assert same(before, outcome(siv, run, command, "after"))


@attrs.frozen
class Upgraded(AdaINConfig):
    slope: float = option(0.9, doc="another default than before")


def upgraded(config: type) -> catalogues.Catalogue:
    """All plugins, of which one has another config."""
    known = catalogues.load()
    component, owner = known.components["network", "adain"]
    new = (attrs.evolve(component, config=config), owner)
    return attrs.evolve(known, components={**known.components, ("network", "adain"): new})


def test_a_default_that_changes_in_an_upgrade_changes_no_model(run, monkeypatch):
    before = siv_core.load(run, device="cpu").sample(4)
    new = upgraded(Upgraded)
    monkeypatch.setattr(catalogues, "load", lambda: new)
    model = siv_core.load(run, device="cpu")
    assert torch.equal(model.sample(4), before)
    with pytest.raises(UserError, match=r"network.slope: the run has 0.01, the recipe 0.9") as refused:
        siv_core.resume(run, device="cpu", watcher=Silent(), sets=["train.length='5 steps'"])
    assert "--set KEY=VALUE with the run's value goes on with it" in str(refused.value)
    done = siv_core.resume(run, device="cpu", watcher=Silent(), sets=["train.length='5 steps'", "network.slope=0.01"])
    assert done.state == "finished"


def test_an_option_that_an_upgrade_took_away_is_told_with_who_made_the_run(run):
    resolved = json.loads((run / "resolved.json").read_text())
    resolved["network"]["taken_away"] = 3
    (run / "resolved.json").write_text(json.dumps(resolved))
    with pytest.raises(UserError, match=r"resolved.json: network.taken_away: unknown key") as refused:
        siv_core.load(run, device="cpu")
    assert refused.value.problems[-1].endswith("those versions read it")
    assert "the run was made with plugin 'adain' of siv " in refused.value.problems[-1]


def test_a_run_of_siv_0_1_is_built_from_what_it_resolved_to(run):
    """Its samples of the prior were called "fake", and some options of today were not there; a resume is refused elsewhere."""
    before = siv_core.load(run, device="cpu")
    resolved, manifest = (json.loads((run / f"{name}.json").read_text()) for name in ("resolved", "manifest"))
    del resolved["places"], resolved["stages"][0]["fade_shape"], resolved["train"]["horizontal_flips"]
    resolved["stages"][0]["objective"]["fakes"] = ["rec", "fake"]
    del manifest["spec"]["fit"], manifest["data"]["notes"]
    (run / "resolved.json").write_text(json.dumps(resolved))
    (run / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    for path in (run / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        del state["resolved"]
        path.write_text(json.dumps(state))
    one = opened.open_run(run, "last", "auto", "cpu", [f"data.path={resolved['data']['path']}"])
    assert one.built.recipe.stages[0].objective.config.fakes == ("rec", "prior")
    assert torch.equal(one.model.sample(3), before.sample(3))


def every_damage(tree, path=()):
    """Each value of a tree in turn taken away, or put in the place of another kind."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*path, key), None
        yield (*path, key), 7
        yield (*path, key), ["x"]
        yield from every_damage(tree[key], (*path, key))


def test_a_damaged_resolved_recipe_is_told(run):
    whole = json.loads((run / "resolved.json").read_text())
    whole.pop("train")  # its many numbers are like those of the others
    for path, value in list(every_damage(whole))[::5]:
        at = damaged = json.loads(json.dumps(whole))
        for key in path[:-1]:
            at = at[key]
        if value is None:
            del at[path[-1]]
        else:
            at[path[-1]] = value
        (run / "resolved.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError):
            siv_core.load(run, device="cpu")


def test_the_data_of_today_do_not_shape_a_model(trained, run, tmp_path):
    """Images of another size at the place of the run's: only what needs data is refused."""
    resolved = json.loads((run / "resolved.json").read_text())
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["images"] = np.zeros((40, 3, 8, 8), np.uint8)
    resolved["data"]["path"] = str(other)
    (run / "resolved.json").write_text(json.dumps(resolved))
    for state in (run / "checkpoints").glob("*/state.json"):
        assert json.loads(state.read_text())["resolved"]["data"]["path"] != str(other)
    assert siv_core.load(run, device="cpu").spec.shape == (3, 16, 16)


# -- where its data lie ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", WITH_DATA)
def test_a_relative_path_is_that_of_the_folder_where_the_run_began(siv, run, trained, command):
    write_data(run.parent / "data/own.h5", seed=9)  # what the relative path would mean here
    done = siv(command, run)
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    assert f"at {trained / 'data/own.h5'}, those of the run: fingerprint " in told
    assert json.loads((run / "resolved.json").read_text())["data"]["path"] == str(trained / "data/own.h5")


@pytest.fixture
def moved(run, trained):
    """The run, after its data were moved; they are brought back at the end."""
    new = run.parent / "elsewhere.h5"
    shutil.move(trained / "data/own.h5", new)
    yield run, new
    shutil.move(new, trained / "data/own.h5")


@pytest.mark.parametrize("command", [*WITH_DATA, "run"])
def test_moved_data_are_told_of_and_can_be_named(siv, moved, command, tmp_path):
    run, new = moved
    call = ("run", "--resume", run, "--set", "train.length='5 steps'") if command == "run" else (command, run)
    done = siv(*call)
    assert done.returncode == 2
    assert "not at hand: there is no file" in done.stderr
    assert "data.path" in done.stderr
    done = siv(*call, "--set", f"data.path={os.path.relpath(new, tmp_path)}")
    assert done.returncode == 0, done.stderr
    if command == "run":
        assert json.loads((run / "resolved.json").read_text())["data"]["path"] == str(new)
        done = siv("evaluate", run)  # the new place is the run's now
        assert done.returncode == 0, done.stderr
        done = siv("run", "--resume", run, "--set", "train.length='6 steps'")
        assert done.returncode == 0, done.stderr
        sets = json.loads((run / "manifest.json").read_text())["sets"]
        assert [text for text in sets if text.startswith("data.path")] == [f"data.path={new}"]


def test_a_moved_run_of_the_same_recipe_goes_on_in_its_folder(siv, moved, trained):
    run, new = moved
    shutil.copy(trained / "r.toml", run.parent)
    done = siv("run", "r.toml", "--run-dir", run, "--set", f"data.path={new}", "--set", "train.length='4 steps'")
    assert done.returncode == 0, done.stderr
    assert "finished at step 4" in done.stdout


OTHERS = {
    "images": {"seed": 1},
    "more images": {"n": 80},
    "labels": {"labels": np.arange(40) % 2},
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("command", [*WITH_DATA, "run"])
def test_other_data_are_not_taken_for_the_runs(siv, run, command, other):
    new = write_data(run.parent / "other.h5", **OTHERS[other])
    call = ("run", "--resume", run, "--set", "train.length='5 steps'") if command == "run" else (command, run)
    before = sorted(run.rglob("*"))
    done = siv(*call, "--set", f"data.path={new}")
    assert done.returncode == 2
    fingerprint = json.loads((run / "manifest.json").read_text())["data"]["fingerprint"]
    assert f"trained on other data: fingerprint {fingerprint} then, " in done.stderr
    assert "bring the earlier data back" in done.stderr
    assert sorted(run.rglob("*")) == before


def test_a_file_changed_in_place_is_not_taken_for_what_it_was(siv, run, trained):
    path = trained / "data/own.h5"
    whole = path.read_bytes()
    try:
        with h5py.File(path, "r+") as file:
            file["images"][0] = 255 - file["images"][0]
        for command in WITH_DATA:
            done = siv(command, run)
            assert done.returncode == 2, command
            assert "trained on other data" in done.stderr
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("key", ["network.slope=0.9", "data.held_out=0.5", "train.seed=3"])
def test_nothing_else_of_a_run_can_be_set(siv, run, command, key):
    done = siv(command, run, "--set", key)
    assert done.returncode == 2
    assert f"--set {key}: a run stays what it is; here can be set: data.path" in done.stderr


def test_a_run_can_be_measured_with_what_its_recipe_did_not_ask(siv, run):
    done = siv("evaluate", run, "--set", "metrics.latent_probes.k=3", "--json")
    assert done.returncode == 0, done.stderr
    assert {line["protocol"]["k"] for line in json.loads(done.stdout)["metrics"]} == {3}


def test_digests_of_images_alone_are_those_of_earlier_versions(run):
    """Versions before 0.2 took no labels or factors into the fingerprint."""
    manifest = json.loads((run / "manifest.json").read_text())
    images, plus, _ = manifest["data"]["fingerprint"].partition("+")
    assert plus
    (run / "manifest.json").write_text(json.dumps({**manifest, "data": {**manifest["data"], "fingerprint": images}}))
    assert "those of the run" in opened.need_data(opened.open_run(run, "last", "auto", "cpu"), Silent().progress)
