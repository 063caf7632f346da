"""The shipped recipes at work: what README promises, at the size that a test can bear."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from siv_core.data import feed
from siv_core.runs import opened

BATCH = int(os.environ.get("SIV_CAMPAIGN_BATCH", "4"))
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def nearest_label(x, train, labels):
    return labels[torch.cdist(x.flatten(1), train).argmin(dim=1)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_digits_recipe_reconstructs_and_samples_digits(digits):
    """A 1-NN on the real training digits judges: 90 % of held-out reconstructions keep their label, samples show all ten."""
    done, run = digits
    assert done.returncode == 0, done.stderr
    one = opened.open_run(run, "last", "raw", "cpu")
    built, model = one.built, one.model
    splits = {}
    for split in ("train", "held_out"):
        rows = built.dataset.rows(split)
        positions = torch.arange(len(rows))
        splits[split] = feed.images(rows, positions, model.spec), rows.labels[rows.at(positions)]
    (x, y), (x_held_out, y_held_out) = splits["train"], splits["held_out"]
    kept = nearest_label(model.reconstruct(x_held_out), x.flatten(1), y) == y_held_out
    assert kept.float().mean() >= 0.90
    shown = nearest_label(model.sample(500), x.flatten(1), y)
    assert set(shown.tolist()) == set(range(10))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_full_translation_recipe_makes_a_step(tmp_path, siv):
    """Paper's sizes, VGG-16 loss; the VGG is randomly initialised and the run says so. Ends after the step in hand.

    Every day 4 images in two parts make the step, in `just campaign` the recipe's own 64.
    """
    sets = [
        "reconstruction.weights=random",
        f"train.batch={BATCH}",
        f"train.micro_batch={min(BATCH // 2, 8)}",
        "train.tick=1 steps",
    ]
    options = [part for setting in sets for part in ("--set", setting)]
    command = ["run", RECIPES / "cars3d_translation.toml", "--profile", "none", "--profile", "rendered", *options]
    done = siv(*command, "--run-dir", tmp_path / "run", "--device", "cpu", "--max-time", "1s", seconds=1100)
    assert done.returncode == 0, done.stderr
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["step"], status["images_seen"]) == ("stopped", 1, BATCH)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["reconstruction"]["weights"] == "random"
    assert manifest["parameters"] == {"encoder": 4_009_088 + 3_943_296, "decoder": 8_095_491, "prior": 0}
    assert (tmp_path / "run/checkpoints/step_00000001/state.json").exists()


def test_check_reports_the_papers_sizes(siv):
    done = siv("check", RECIPES / "cars3d_translation.toml", "--profile", "none", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["parameters"]["encoder"] == {"all": 7_952_384, "class": 4_009_088, "content": 3_943_296}
    assert report["parameters"]["decoder"]["all"] == 8_095_491
    assert report["parameters"]["decoder"]["modulation"] == 526_336
    assert report["stages"][0]["flops_per_step"] > 1e12
    text = " ".join(report["not_at_hand"])
    for part in ("cars3d", "vgg16-397923af.pth", "alexnet-owt-7be5be79.pth"):
        assert part in text


def test_recipes_that_come_with_siv(siv, tmp_path):
    listed = json.loads(siv("recipes", "ls", "--json").stdout)
    assert set(listed) == {str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.toml")}
    assert siv("recipes", "show", "digits").stdout == (RECIPES / "digits.toml").read_text()
    assert siv("recipes", "copy", "digits", tmp_path / "mine.toml").returncode == 0
    assert (tmp_path / "mine.toml").read_text() == (RECIPES / "digits.toml").read_text()
    again = siv("recipes", "copy", "digits", tmp_path / "mine.toml")
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert "did you mean 'digits'?" in siv("recipes", "show", "digit").stderr
    copied = siv("recipes", "copy", "sweeps/margin")
    assert "`siv recipes copy toy2d_8gaussians toy2d_8gaussians.toml` brings that" in copied.stdout
    assert (tmp_path / "sweeps/margin.toml").read_text() == (RECIPES / "sweeps/margin.toml").read_text()
    nowhere = siv("recipes", "copy", "digits", tmp_path / "no" / "folder.toml")
    assert nowhere.returncode == 2
    assert "folder.toml: cannot be written (No such file or directory); give another destination" in nowhere.stderr


def test_recipes_of_other_distributions(siv, tmp_path):
    site = tmp_path / "site"
    for name, package in (("siv-good", "good_recipes"), ("siv-bad", "not_there")):
        about = site / f"{name.replace('-', '_')}-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[siv.recipes]\nsome = {package}\n")
    (site / "good_recipes").mkdir()
    (site / "good_recipes" / "__init__.py").write_text("")
    (site / "good_recipes" / "digits.toml").write_bytes(b"# fast \x1b[31m\nformat = 1\n")
    env = {"PYTHONPATH": str(site)}
    done = siv("recipes", "ls", env=env)
    assert done.returncode == 0
    assert r"siv-good/digits          fast \x1b[31m" in done.stdout
    assert "recipes 'some' of siv-bad are not usable: ModuleNotFoundError: No module named 'not_there'" in done.stderr
    assert siv("recipes", "show", "siv-good/digits", env=env).stdout.endswith("format = 1\n")
    assert siv("recipes", "copy", "siv-good/digits", env=env).stdout == "wrote digits.toml\n"
    assert (tmp_path / "digits.toml").read_bytes() == (site / "good_recipes" / "digits.toml").read_bytes()
