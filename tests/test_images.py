"""The image recipes at work: what residual networks draw of real digits, judged by a classifier that siv has no part in.

In `just campaign` the recipes run as they are, with bounds near what they reach; every day two of them, a fifth of their steps.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import siv_core

WHOLE = "SIV_CAMPAIGN_DIGITS" in os.environ
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PROFILES: list[tuple[str, ...]] = [("--profile", "conditional"), *([()] if WHOLE else [])]
SURE, FOUND, AGREE, AUROC = (0.85, 0.25, 0.90, 0.99) if WHOLE else (0.5, 0.35, 0.8, 0.99)


def stages(recipe: Path) -> list[str]:
    """`--set stages=…` with a fifth of the steps, or nothing."""
    if WHOLE:
        return []
    tables = tomllib.loads(recipe.read_text())["stages"]
    for table in tables:
        steps, unit = table["length"].split()
        table["length"] = f"{int(steps) // 5} {unit}"
    return ["--set", f"stages={toml(tables)}"]


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(one)}" for key, one in value.items()) + "}"
    return f"[{', '.join(map(toml, value))}]" if isinstance(value, list) else json.dumps(value)


def trained(siv_in: Any, folder: Path, name: str, *options: Any) -> tuple[siv_core.Model, dict[str, Any]]:
    """The model of a shipped recipe and its metrics."""
    recipe = RECIPES / f"{name}.toml"
    done = siv_in(folder, "run", recipe, *options, *stages(recipe), "--run-dir", "run", "--device", "cpu", seconds=1700)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return siv_core.load(folder / "run"), {f"{line['metric']}.{line['name']}": line.get("value") for line in lines[1:]}


@pytest.fixture(scope="module")
def judge() -> Any:
    """Probabilities [n, 10] of images, by scikit-learn's network on the real training digits of the recipe."""
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    digits = load_digits()
    x, y = digits.images.reshape(-1, 64) / 16, digits.target
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(x))
    held_out, train = order[:397], order[397:]
    network = MLPClassifier((256,), max_iter=400, random_state=0).fit(x[train], y[train])
    assert network.score(x[held_out], y[held_out]) >= 0.97
    return lambda images: network.predict_proba(images.reshape(len(images), -1).cpu().numpy())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("options", PROFILES, ids=lambda options: options[-1] if options else "plain")
def test_samples_are_digits_of_all_ten_classes(siv_in, tmp_path, judge, options):
    model, metrics = trained(siv_in, tmp_path, "digits_cnn", *options)
    said = judge(model.sample(1000, seed=1))
    sure = said.max(axis=1) > 0.9
    assert sure.mean() >= SURE
    shares = np.bincount(said[sure].argmax(axis=1), minlength=10) / sure.sum()
    assert shares.min() > 0
    assert shares.max() <= FOUND
    assert metrics["fd_classifier.classes_found"] == 10
    assert abs(metrics["fd_classifier.sure"] - sure.mean()) < 0.2  # siv's own classifier is of the same mind
    if not options:
        return
    labels = torch.arange(1000) % 10  # what a conditional model draws in turn
    assert (said.argmax(axis=1) == labels.numpy()).mean() >= AGREE
    assert metrics["fd_classifier.label_agreement"] >= AGREE
    wrong = judge(model.sample(1000, seed=1, labels=labels.roll(1))).argmax(axis=1)
    assert (wrong == labels.numpy()).mean() < 0.1  # the label, and nothing else, decides


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_photographs_are_told_from_digits(siv_in, tmp_path):
    _, metrics = trained(siv_in, tmp_path, "digits_ood")
    assert metrics["ood.photo_patches.elbo.auroc"] >= AUROC
    assert abs(metrics["ood.held_out_vs_train.elbo.auroc"] - 0.5) < 0.25  # it has seen the one and not the other
    assert metrics["ood.photo_patches.png.auroc"] < metrics["ood.photo_patches.elbo.auroc"]
