"""`siv ood` and the metric `ood`: a small trained model, sets of known kinds, simple scores with closed forms."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import toys
from PIL import Image
from safetensors.torch import load_file
from sklearn.decomposition import PCA

from siv_core.errors import UserError
from siv_core.protocols import Spec
from siv_core.recipe import build, recipe
from siv_core.use import baselines, ood_report, other_sets, outliers, scores

RECIPE = """
format = 1
[data]
name = "digits"
[network]
name = "mlp"
z_dim = 8
hidden = [64]
output = "sigmoid"
[objective]
name = "vae"
beta_kl = 0.2
[optim]
lr = 2e-3
[train]
batch = 64
length = "250 steps"
"""
MODEL = Spec((1, 8, 8))


def images(path: Path, shape: tuple[int, ...], seed: int = 0) -> Path:
    """An HDF5 file of random pictures."""
    with h5py.File(path, "w") as file:
        file["images"] = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, siv_in):
    """A VAE of the digits, with files of noise of its shape and of another one beside it."""
    folder = tmp_path_factory.mktemp("ood")
    (folder / "recipe.toml").write_text(RECIPE)
    images(folder / "noise.h5", (200, 8, 8))
    images(folder / "colour.h5", (40, 12, 10, 3))
    done = siv_in(folder, "run", "recipe.toml", "--run-dir", "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return folder


def test_noise_is_more_of_an_outlier_than_a_digit(trained, siv_in, tmp_path):
    """By every score but the KL, which knows nothing of a bad reconstruction; the chance check is at chance."""
    against = ("--against", "hdf5,path=noise.h5,held_out=0.5,as=noise", "--against", "flip_horizontal", "--against", "digits")
    every = [word for name in outliers.SCORES for word in ("--score", name)]
    done = siv_in(trained, "ood", "run", *against, *every, "-n", "120", "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    values = report["values"]
    for name in outliers.SCORES:
        if name != "kl":
            assert values[f"noise.{name}.auroc"] > 0.9, name
            assert values[f"noise.{name}.aupr"] > 0.9, name
            assert values[f"noise.{name}.fpr95"] < 0.5, name
        check, error = (values[f"held_out_vs_train.{name}.{value}"] for value in ("auroc", "auroc_se"))
        assert abs(check - 0.5) < 4 * error, name
        assert f"held_out_vs_train.{name}.aupr" not in values
        assert values[f"digits.{name}.auroc"] == 0.5  # the same choice of the same images
    assert values["flip_horizontal.nearest.auroc"] > 0.8
    protocol = report["protocol"]
    assert protocol["sign"] == "a larger score is more of an outlier"
    assert protocol["positive"].startswith("outliers")
    assert protocol["images"] == {"train": 120, "held_out": 120, "noise": 100, "flip_horizontal": 120, "digits": 120}
    assert protocol["betas"] == {"of": "the objective", "beta_rec": 1.0, "beta_kl": {"z": 0.2}}
    assert protocol["sets"]["noise"]["path"] == str(trained / "noise.h5")
    assert protocol["sets"]["noise"]["fingerprint"]
    assert [Path(path).name for path in report["files"]] == ["ood.json", "ood.safetensors", "ood.png"]
    arrays = load_file(tmp_path / "ood.safetensors")
    assert arrays["noise.elbo"].shape == (100,)
    assert arrays["noise.elbo"].dtype == torch.float64
    assert len(arrays) == 5 * len(outliers.SCORES)
    assert json.loads((tmp_path / "ood.json").read_text())["values"] == values
    with Image.open(tmp_path / "ood.png") as picture:
        assert min(picture.size) > 300


def test_the_table_says_sign_counts_and_positive_class(trained, siv_in, tmp_path):
    arguments = ("ood", "run", "--against", "flip_vertical", "--score", "elbo", "--score", "png", "--out", tmp_path, "-n", "50")
    for number in ("", "-2"):
        done = siv_in(trained, *arguments)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"ood{number}.json").exists()  # nothing is overwritten
    text = done.stdout
    assert "a larger score is more of an outlier; outliers are the positive class" in text
    assert "inliers: held-out images of data 'digits', those of the run" in text
    for words in ("50 held_out", "50 train", "50 flip_vertical", "(0.50)"):
        assert words in text, words


def test_another_shape_is_converted_on_request_alone(trained, siv_in, tmp_path):
    arguments = ("ood", "run", "--against", "hdf5,path=colour.h5,held_out=0.5", "--score", "reconstruction", "--out", tmp_path)
    refused = siv_in(trained, *arguments)
    assert refused.returncode == 2
    assert "its images are [3, 12, 10], the model's [1, 8, 8]; --convert" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    done = siv_in(trained, *arguments, "--convert", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    changed = ["10 × 12, its centre of 10 × 10 resized to 8 × 8 by area means", "colours made grey (BT.601 luma)"]
    assert report["notes"] == [f"hdf5: {'; '.join(changed)}"]
    assert report["protocol"]["sets"]["hdf5"]["converted"] == changed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "Missing option '--against'"),
        (("--against", "dgits"), "no dataset is called 'dgits'; did you mean 'digits'?"),
        (("--against", "digits,held=3"), "digits.held: unknown key"),
        (
            ("--against", "digits", "--against", "digits"),
            "digits: two sets are called so; give one of them another name by as=NAME",
        ),
        (("--against", "digits,as=train"), "cannot stand in names of values"),
        (("--against", "flip_vertical,size=3"), "takes no options"),
        (("--against", "hdf5,path=gone.h5"), "not at hand: there is no file"),
        (("--against", "toy2d"), "its samples are arrays [2], the model's images [1, 8, 8]"),
        (("--against", "digits", "--score", "elbow"), "score elbow: there is none; did you mean 'elbo'?"),
    ],
)
def test_what_is_refused(trained, siv_in, arguments, told):
    done = siv_in(trained, "ood", "run", *arguments)
    assert done.returncode == 2
    assert told in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (trained / "run/outputs").exists()


# -- the metric ------------------------------------------------------------------------------------------------------------------


def test_the_metric_writes_what_the_command_does(trained, siv_in, tmp_path):
    """And from any folder: its sets are written out with their places."""
    sets = '[{name="hdf5", path="noise.h5", held_out=0.5, as="noise"}, "flip_vertical", {name="hdf5", path="gone.h5"}]'
    text = (
        f'{RECIPE.replace("250 steps", "20 steps")}\n[metrics.ood]\nagainst = {sets}\ncount = 60\nscores = ["elbo", "nearest"]\n'
    )
    (trained / "metric.toml").write_text(text)
    done = siv_in(trained, "run", "metric.toml", "--run-dir", tmp_path / "run", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert "hdf5: data 'hdf5': there is no file" in done.stderr
    lines = {line["name"]: line for line in json.loads(done.stdout)["metrics"]}
    assert "there is no file" in lines["hdf5"]["skipped"]
    assert lines["noise.elbo.auroc"]["protocol"]["sets"]["noise"]["path"] == str(trained / "noise.h5")
    assert (tmp_path / "run/images/ood_densities.png").exists()
    against = ("--against", "hdf5,path=noise.h5,held_out=0.5,as=noise", "--against", "flip_vertical")
    more = ("--score", "elbo", "--score", "nearest", "-n", "60", "--out", tmp_path / "out", "--json")
    values = json.loads(siv_in(trained, "ood", tmp_path / "run", *against, *more).stdout)["values"]
    assert {name: line["value"] for name, line in lines.items() if "value" in line} == pytest.approx(values)
    again = siv_in(tmp_path, "evaluate", "run", "--json")
    assert again.returncode == 0, again.stderr
    found = {line["name"]: line.get("value") for line in json.loads(again.stdout)["metrics"]}
    assert found == {name: line.get("value") for name, line in lines.items()}


def metric(catalogue: Any, **table: Any) -> Any:
    read = recipe.parse(toys.tree(metrics={"ood": table}), Path("toy.toml"), b"", catalogue, (), (), False)
    return build.build(read, catalogue, build.dataset(read, catalogue)).metrics()["ood"]


def test_what_the_metric_refuses(catalogue, tmp_path, data_root):
    with pytest.raises(UserError, match=r"metrics.ood: against: dgits.name: no dataset is called 'dgits'"):
        metric(catalogue, against=["dgits"])
    with pytest.raises(UserError, match=r"metrics.ood.against: missing"):
        metric(catalogue)
    with pytest.raises(UserError, match="names no set"):
        metric(catalogue, against=[])
    colour = {"name": "hdf5", "path": str(images(tmp_path / "colour.h5", (20, 8, 8, 3)))}
    wrong = list(metric(catalogue, against=[colour, "flip_vertical"]).fits(None))
    assert len(wrong) == 1
    assert "convert = true in the metric's table" in wrong[0]
    assert list(metric(catalogue, against=[colour], convert=True).fits(None)) == []


def test_scores_that_a_model_cannot_have_are_lines(catalogue, tmp_path):
    """Points of the plane have no PNG, and a loss of other weights for each group no likelihood."""
    t = toys.trainer(
        catalogue,
        tmp_path,
        toys.tree(
            data={"name": "toy2d"}, network={"name": "mlp", "z_dim": 2, "hidden": [8]}, objective={"name": "vae", "beta_kl": 0.0}
        ),
    )
    own = t.built.dataset
    sets = other_sets.others([{"name": "toy2d", "as": "itself"}, "flip_vertical"])
    options = outliers.Options(count=30)
    scored = outliers.score_sets(t.model(), own, sets, options, lambda what, done, total: None)
    values = outliers.values(scored)
    assert values["png"] == "png: of images alone, these are arrays"
    assert "there is no likelihood" in str(values["iwae"])
    assert "turns images round" in str(values["flip_vertical"])
    assert values["itself.elbo.auroc"] == 0.5
    assert {name.split(".")[1] for name in values if "." in name} == {"elbo", "kl", "reconstruction", "ppca", "nearest"}
    assert ood_report.densities(scored, values).ndim == 3


def test_a_conditional_model_needs_no_labels_of_the_other_set(catalogue, tmp_path):
    images(tmp_path / "noise.h5", (30, 8, 8))
    t = toys.trainer(
        catalogue,
        tmp_path / "run",
        toys.tree(train={"batch": 64, "length": "4 steps", "conditional": True, "preview": "9 steps"}),
    )
    sets = other_sets.others([{"name": "hdf5", "path": str(tmp_path / "noise.h5"), "held_out": 0.5}])
    options = outliers.Options(("elbo", "iwae", "likelihood_regret"), count=12, settings=scores.Settings(steps=3))
    found = outliers.score_sets(t.model(), t.built.dataset, sets, options, lambda what, done, total: None)
    assert all(value.isfinite().all() for value in found.scores["hdf5"].values())
    assert found.protocol["labels"].startswith("of each image the one with its lowest")


def test_scores_do_not_depend_on_the_batch(catalogue, tmp_path):
    model = toys.trainer(catalogue, tmp_path, toys.tree()).model()
    data = build.component(catalogue, recipe.dataset_choice(catalogue, "digits", ()))
    small = scores.Settings(steps=5)
    kept = [
        outliers.score_sets(
            model, data, (), outliers.Options(outliers.SCORES, 20, batch=batch, settings=small), lambda what, done, total: None
        )
        for batch in (3, 128)
    ]
    for name, value in kept[0].scores["held_out"].items():
        torch.testing.assert_close(value, kept[1].scores["held_out"][name], rtol=1e-4, atol=1e-4)


def test_numbers_that_are_none_are_said():
    lost = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    sets = {"train": {"elbo": torch.zeros(2).double()}, "held_out": {"elbo": torch.zeros(2).double()}, "x": {"elbo": lost}}
    scored = outliers.Scored(sets, {}, {}, [], {"images": dict.fromkeys(sets, 2)})
    values = outliers.values(scored)
    assert values["x.elbo.auroc"] == "1 of 4 scores are no numbers"
    assert values["held_out_vs_train.elbo.auroc"] == 0.5
    assert ("elbo", "2 x", "2 held_out", "1 of 4 scores are no numbers", "", "") in outliers.rows(scored, values)


# -- other sets ------------------------------------------------------------------------------------------------------------------


def test_a_set_on_the_command_line():
    assert other_sets.table_of("svhn") == {"name": "svhn"}
    told = other_sets.table_of("hdf5,path=a,b.h5,value_range=[0, 4095],held_out=0.5,as=mine")
    assert told == {"name": "hdf5", "path": "a,b.h5", "value_range": [0, 4095], "held_out": 0.5, "as": "mine"}


def test_a_set_is_written_out_once_and_for_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = other_sets.resolved({"name": "hdf5", "path": "x.h5", "as": "mine"})
    assert written["path"] == str(tmp_path / "x.h5")
    assert (written["as"], written["held_out"], written["fit"]) == ("mine", 0.1, "crop")
    assert other_sets.resolved(json.loads(json.dumps(written))) == written


def test_conversion_by_hand():
    x = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    its, own = Spec((3, 4, 4)), Spec((1, 2, 2), value_range=(-1.0, 1.0))
    small = x.reshape(3, 3, 2, 2, 2, 2).mean(dim=(3, 5))
    grey = 0.299 * small[:, 0] + 0.587 * small[:, 1] + 0.114 * small[:, 2]
    torch.testing.assert_close(other_sets.converted(x, its, own), 2 * grey[:, None] - 1)
    assert other_sets.changes(its, own)[-1] == "values [0, 1] brought to [-1, 1]"
    back = other_sets.converted(x[:, :1], Spec((1, 4, 4)), Spec((3, 4, 4)))
    assert torch.equal(back, x[:, :1].repeat(1, 3, 1, 1))
    assert other_sets.changes(its, its) == []


# -- simple scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size", "k"), [(200, 6, 2), (200, 6, 5), (12, 30, 4)])
def test_ppca_is_the_gaussian_it_says(n, size, k):
    """Against the dense covariance and, where it divides by as many, scikit-learn's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, size, generator=generator, dtype=torch.float64) @ torch.randn(size, size, generator=generator).double()
    fitted = baselines.Fitted.on(x, torch.arange(n), k)
    covariance = fitted.directions @ torch.diag(fitted.variances - fitted.rest) @ fitted.directions.T
    dense = torch.distributions.MultivariateNormal(fitted.mean, covariance + fitted.rest * torch.eye(size).double())
    points = 3 * torch.randn(20, size, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(fitted.ppca(points), -dense.log_prob(points), rtol=1e-8, atol=1e-8)
    if n > size:
        shrink = ((n - 1) / n) ** 0.5  # its variances divide by n − 1
        other = PCA(k).fit((x - fitted.mean).numpy() * shrink)
        assert fitted.ppca(points).numpy() == pytest.approx(-other.score_samples((points - fitted.mean).numpy()), rel=1e-8)


def test_nearest_by_a_plain_loop():
    x = torch.rand(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fitted = baselines.Fitted.on(x, torch.tensor([0, 2, 3, 4, 5, 6, 7, 8, 11]), 2)
    points = torch.rand(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = [min(float((p - one).square().sum()) for one in x) for p in points]
    assert fitted.nearest(points).tolist() == pytest.approx(expected)
    own = fitted.nearest(x[:2], torch.tensor([0, 2]))
    others = [min(float((x[i] - x[j]).square().sum()) for j in range(9) if j != i) for i in (0, 1)]
    assert own.tolist() == pytest.approx(others)
    assert fitted.nearest(x[:2]).tolist() == pytest.approx([0, 0], abs=1e-12)


def test_a_png_of_noise_is_longer_than_one_of_nothing():
    x = torch.stack([torch.zeros(3, 16, 16), torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))])
    flat, noise = baselines.png(x, Spec((3, 16, 16))).tolist()
    assert noise > 700 > 200 > flat
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "png", compress_level=9)
    assert flat == len(buffer.getvalue())
    wide = baselines.png(x * 2 - 1, Spec((3, 16, 16), value_range=(-1.0, 1.0)))
    assert wide.tolist() == [flat, noise]
    assert baselines.png(x[:, :2], Spec((2, 16, 16)))[1] > 500


# -- the picture -----------------------------------------------------------------------------------------------------------------


def test_bars_hold_every_set():
    near, far = np.random.default_rng(0).normal(10, 1, (2, 500)) * np.array([[1.0], [100.0]])
    edges, logarithmic = ood_report.bins([near, far])
    assert logarithmic
    assert len(edges) == ood_report.BINS + 1
    for scores_ in (near, far):
        counts = np.histogram(scores_, edges)[0]
        assert counts.sum() >= 0.98 * len(scores_)
        assert (counts > 0).sum() > 5  # no set is a single bar
    edges, logarithmic = ood_report.bins([near - 10, near - 9])
    assert not logarithmic
    edges, _ = ood_report.bins([np.array([100.0, 101, 101, 103]), np.array([120.0])])
    assert ((edges % 1) == 0.5).all()
    assert np.isfinite(ood_report.bins([np.zeros(3)])[0]).all()
    assert np.isfinite(ood_report.bins([np.zeros(0)])[0]).all()
