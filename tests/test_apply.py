"""Uses of a trained model from the command line: labels, truncation, what lies between pictures, latents of a whole set."""

from __future__ import annotations

import json
import math
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys
from attrs import evolve
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from siv_plugins.standard_normal import StandardNormal
from torch import nn

import siv_core
from siv_core import testing
from siv_core.data import feed
from siv_core.errors import UserError
from siv_core.latents import Gaussian
from siv_core.model import BATCH, Model
from siv_core.nets import Priors
from siv_core.protocols import Rows, Spec
from siv_core.runs import opened
from siv_core.use import apply, evaluate, pictures

RECIPE = toys.SOFT + '[train]\nbatch = 64\nlength = "4 steps"\nconditional = {}\n'


def quiet(what, done, total):
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two small runs, `plain` and `labelled`; not to be changed but for new files."""
    folder = tmp_path_factory.mktemp("uses")
    for name, conditional in (("plain", "false"), ("labelled", "true")):
        (folder / f"{name}.toml").write_text(RECIPE.format(conditional))
        siv_core.run(folder / f"{name}.toml", run_dir=folder / name, device="cpu", watcher=siv_core.Silent())
    return SimpleNamespace(folder=folder, plain=folder / "plain", labelled=folder / "labelled")


@pytest.fixture
def made(runs, siv_in, tmp_path):
    """`made("sample", run, …)`: what the command says as JSON, its arrays and its picture; results lie in a new folder each."""

    def run(*arguments):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        done = siv_in(tmp_path, *arguments, "--out", out, "--device", "cpu", "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        arrays = {key: x for path in report["files"] if path.endswith(".safetensors") for key, x in load_file(path).items()}
        held = {key: {"shape": list(x.shape), "type": str(x.dtype).removeprefix("torch.")} for key, x in arrays.items()}
        assert report["arrays"] == held
        drawn = [np.asarray(Image.open(path)) for path in report["files"] if path.endswith(".png")]
        return SimpleNamespace(arrays=arrays, picture=drawn[0] if drawn else None, notes=report["notes"], report=report)

    return run


@pytest.fixture
def refused(siv_in, tmp_path):
    def run(*arguments):
        done = siv_in(tmp_path, *arguments, "--out", tmp_path / "refused")
        assert done.returncode == 2, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.glob("refused/*"))
        return done.stderr

    return run


def cell(sheet, row, column, left=0, size=64):
    """The image at a place of a picture, in its own pixels (digits are shown 8 times as large)."""
    top, left = 2 + row * (size + 2), left + 2 + column * (size + 2)
    return sheet[top : top + size : 8, left : left + size : 8, 0]


def shown(x):
    return pictures.to_uint8(x[None], (0, 1))[0, :, :, 0]


# -- samples ---------------------------------------------------------------------------------------------------------------------


def test_labels_in_turn(runs, made):
    done = made("sample", runs.labelled, "-n", "7", "--labels", "3, 1,3", "--seed", "2")
    model = siv_core.load(runs.labelled, device="cpu")
    labels = torch.tensor([3, 1, 3, 3, 1, 3, 3])
    assert torch.equal(done.arrays["labels"], labels)
    assert torch.equal(done.arrays["samples"], model.sample(7, seed=2, labels=labels))
    order = [1, 4, 0, 2, 3, 5, 6]  # rising labels; those of one label as they come
    assert (cell(done.picture, 0, 1, pictures.MARGIN) == shown(done.arrays["samples"][4])).all()
    for i, sample in enumerate(order[2:]):
        assert (cell(done.picture, 1, i, pictures.MARGIN) == shown(done.arrays["samples"][sample])).all()


def test_without_labels_samples_are_those_of_before(runs, made):
    done = made("sample", runs.labelled, "-n", "12", "--seed", "5")
    model = siv_core.load(runs.labelled, device="cpu")
    assert torch.equal(done.arrays["samples"], model.sample(12, seed=5, labels=torch.arange(12) % 10))
    assert torch.equal(done.arrays["labels"], torch.arange(12) % 10)
    with safe_open(done.report["files"][0], "pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about == {
        "model": "step_00000004, raw weights",
        "value_range": [0, 1],
        "noise": True,
        "seed": 5,
        "truncation": 1,
        "notes": [],
    }


def test_each_class_in_a_row_of_the_same_noise(runs, made):
    done = made("sample", runs.labelled, "--labels", "each", "-n", "3", "--seed", "1")
    model = siv_core.load(runs.labelled, device="cpu")
    classes = model.sample_classes(3, seed=1)
    assert classes.shape == (10, 3, 1, 8, 8)
    assert torch.equal(done.arrays["samples"], classes.flatten(0, 1))
    assert done.arrays["labels"].tolist() == [label for label in range(10) for _ in range(3)]
    for label in range(10):
        assert torch.equal(classes[label], model.sample(3, seed=1, labels=torch.full((3,), label)))
        for column in range(3):
            assert (cell(done.picture, label, column, pictures.MARGIN) == shown(classes[label, column])).all()
        number = done.picture[2 + 66 * label : 66 * (label + 1), : pictures.MARGIN]
        assert (number < 100).any(), "each row has its number"
    assert model.sample_classes(2, classes=[7]).shape == (1, 2, 1, 8, 8)


def test_final_pictures_show_class_by_class(runs):
    model = siv_core.load(runs.labelled, device="cpu")
    sheet = np.asarray(Image.open(runs.labelled / "images/samples.png"))
    assert sheet.shape == (10 * 66 + 2, pictures.MARGIN + 8 * 66 + 2, 3)
    expected = model.sample_classes(8, seed=0)
    assert all(
        (cell(sheet, row, column, pictures.MARGIN) == shown(expected[row, column])).all()
        for row in range(10)
        for column in range(8)
    )
    data = opened.open_run(runs.labelled, "last", "auto", "cpu").built.dataset
    preview = evaluate.preview(model, data, {})
    assert preview.shape == (12 * 66 + 4, *sheet.shape[1:])
    assert (preview[2 * 66 + 2 :] == evaluate.samples(model, 2, 0)).all()


def test_of_many_classes_some_are_shown():
    model = evolve(labelled_toy(), spec=Spec((1, 2, 2), classes=100, conditional=True))
    sheet = evaluate.samples(model, 2, 0)
    assert sheet.shape[0] == 16 * 66 + 2


def test_no_arrays(runs, made):
    done = made("sample", runs.plain, "-n", "4", "--no-arrays")
    assert [Path(path).name for path in done.report["files"]] == ["samples.png"]
    assert (cell(done.picture, 1, 1) == shown(siv_core.load(runs.plain, device="cpu").sample(4)[3])).all()


def test_samples_that_are_no_images_are_drawn_as_a_metric_draws_them(tmp_path):
    model = Model(
        nn.Identity(),
        Codes(),
        Priors({"z": testing._ToyPrior()}),
        Spec((2,), kind="array"),
        {"z": 2},
        None,
        torch.device("cpu"),
    )
    done = apply.sample(model, tmp_path, 5, 0, {"drawer": Drawer()})
    assert [Path(path).suffix for path in done["files"]] == [".safetensors", ".png"]
    done = apply.sample(model, tmp_path, 5, 0, {"drawer": Drawer()}, truncation=1.0, arrays=False)
    assert [Path(path).name for path in done["files"]] == ["samples-2.png"]
    for metrics, words in (({}, "such data is drawn by a metric"), ({"drawer": Drawer()}, "a metric draws samples of its own")):
        with pytest.raises(UserError) as caught:
            apply.sample(
                evolve(model, priors=Priors({"z": StandardNormal()})), tmp_path, 5, 0, metrics, truncation=0.5, arrays=False
            )
        assert "nothing to write; leave it out" in caught.value.problems[0]
        assert words in caught.value.problems[1]


class Codes(nn.Module):
    def forward(self, codes, labels=None, noise=None):
        return codes["z"]


class Drawer:
    def draw(self, models, data, seed, count):
        return np.full((4, 4, 3), count, np.uint8)


@pytest.mark.parametrize(
    ("run", "more", "words"),
    [
        ("plain", ["--labels", "3"], "--labels 3: this model takes none: it was trained without train.conditional; leave it out"),
        ("plain", ["--labels", "each"], "--labels each: this model takes none"),
        ("labelled", ["--labels", "3,10,-1,x"], "'10', '-1', 'x': expected class numbers from 0 to 9 with commas between them"),
        ("labelled", ["--labels", ""], "'': expected class numbers"),
        ("labelled", ["--labels", "²"], "'²': expected class numbers"),
        ("labelled", ["--truncation", "1.5"], "--truncation"),
    ],
)
def test_samples_that_cannot_be(runs, refused, run, more, words):
    assert words in refused("sample", getattr(runs, run), *more)


def test_truncated_samples(runs, made):
    model = siv_core.load(runs.plain, device="cpu")
    whole = made("sample", runs.plain, "-n", "5", "--truncation", "1").arrays["samples"]
    assert torch.equal(whole, model.sample(5))
    half = made("sample", runs.plain, "-n", "5", "--truncation", "0.5").arrays["samples"]
    z, _ = model.sample_codes(5)
    assert torch.equal(half, model.decode({"z": 0.5 * z["z"]}))
    assert torch.equal(torch.cat(list(model.samples(5, 2, truncation=0.5))), half)
    none = model.sample(3, truncation=0)
    assert torch.equal(none, model.decode({"z": torch.zeros(3, 3)}))


def test_a_prior_that_offers_no_truncation_says_so(catalogue, tmp_path):
    model = toys.trainer(catalogue, tmp_path, toys.tree(prior={"name": "vamp"})).model()
    assert torch.equal(model.sample(3), model.sample(3, truncation=1))
    with pytest.raises(UserError, match="truncation: the prior of z offers none; leave it at 1"):
        model.sample(3, truncation=0.5)


class Truncated(toys.Mixture):
    """A mixture goes to the mean of the component that was drawn: scaling its noise would choose others."""

    def truncated(self, noise, psi, labels=None):
        mu = self.parts.mu[(noise[:, 0] * len(self.parts.mu)).long()]
        return torch.lerp(mu, self.sample(noise), psi)


class Scaled(toys.Mixture):
    def truncated(self, noise, psi, labels=None):
        return self.sample(psi * noise)


@pytest.mark.parametrize(("kind", "good"), [(Truncated, True), (Scaled, False)])
def test_the_conformance_kit_knows_truncation(monkeypatch, kind, good):
    prior = toys.Vamp(4, 3, (3, 8, 8))
    monkeypatch.setattr(toys, "Mixture", kind)
    spec = Spec((3, 8, 8))
    if good:
        testing.check_prior(prior, 3, spec)
    else:
        with pytest.raises(AssertionError, match="half-way between a mean and sample"):
            testing.check_prior(prior, 3, spec)


# -- between pictures ------------------------------------------------------------------------------------------------------------


def test_held_out_pairs(runs, made):
    done = made("interpolate", runs.plain, "-n", "3", "--steps", "5", "--path", "spherical")
    ends, images = done.arrays["ends"], done.arrays["images"]
    assert ends.shape == (3, 2, 1, 8, 8)
    model = siv_core.load(runs.plain, device="cpu")
    assert torch.equal(images.transpose(0, 1), model.interpolate(ends[:, 0], ends[:, 1], 5, path="spherical"))
    assert done.notes[0].startswith("3 pairs of held-out images, of data 'digits', those of the run")
    data = opened.open_run(runs.plain, "last", "auto", "cpu").built.dataset
    held_out = list(feed.images(data.rows("held_out"), torch.arange(397), data.spec))
    places = [[i for i, x in enumerate(held_out) if torch.equal(x, end)] for end in ends.flatten(0, 1)]
    assert all(places), "the ends are held-out images"
    for row in range(3):
        assert (cell(done.picture, row, 0) == shown(ends[row, 0])).all()
        assert (cell(done.picture, row, 6, 2 * pictures.APART) == shown(ends[row, 1])).all()
        for step in range(5):
            assert (cell(done.picture, row, step + 1, pictures.APART) == shown(images[row, step])).all()
    again = made("interpolate", runs.plain, "-n", "3", "--seed", "1").arrays["ends"]
    assert not torch.equal(again, ends)


def test_held_out_corners(runs, made):
    done = made("interpolate", runs.labelled, "--corners")
    corners, images, labels = (done.arrays[key] for key in ("corners", "images", "labels"))
    assert (corners.shape, images.shape) == ((4, 1, 8, 8), (7, 7, 1, 8, 8))
    assert len(set(labels.tolist())) == 1, "of one class, so that every corner is a reconstruction"
    expected = siv_core.load(runs.labelled, device="cpu").reconstruct(corners, labels)
    assert torch.allclose(images[[0, 0, -1, -1], [0, -1, 0, -1]], expected, atol=1e-6)
    for number, (row, column) in enumerate([(0, 0), (0, 8), (6, 0), (6, 8)]):
        assert (cell(done.picture, row, column, column // 4 * pictures.APART) == shown(corners[number])).all()
    assert (cell(done.picture, 3, 0) == 255).all()


def write_digits(folder: Path, count: int) -> list[Path]:
    """Pictures of 8 × 8 that fit as they are."""
    folder.mkdir(exist_ok=True)
    values = np.random.default_rng(3).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    paths = [folder / f"{i:03}.png" for i in range(count)]
    for path, value in zip(paths, values, strict=True):
        Image.fromarray(value).save(path)
    return paths


def test_own_pictures(runs, made, refused, tmp_path):
    paths = write_digits(tmp_path / "mine", 4)
    model = siv_core.load(runs.plain, device="cpu")
    x = apply.own_pictures.own_images(paths, model)[0]
    pair = made("interpolate", runs.plain, *paths[:2], "--steps", "3").arrays
    assert torch.equal(pair["ends"][0], x[:2])
    assert torch.equal(pair["images"][0], model.interpolate(x[:1], x[1:2], 3)[:, 0])
    square = made("interpolate", runs.plain, tmp_path / "mine", "--steps", "4").arrays
    assert torch.equal(square["corners"], x)
    assert torch.equal(square["images"], model.blend(x.split(1), 4)[:, :, 0])
    told = refused("interpolate", runs.plain, *paths[:3])
    assert "these are 3 pictures: expected 2, for what lies between them, or 4 as the corners of a square" in told
    assert "leave them out with pictures of yours" in refused("interpolate", runs.plain, *paths[:2], "-n", "3")
    assert "leave it out with --corners" in refused("interpolate", runs.plain, "--corners", "-n", "3")


def test_own_pictures_of_a_conditional_model(runs, made, refused, tmp_path):
    paths = write_digits(tmp_path / "mine", 3)
    model = siv_core.load(runs.labelled, device="cpu")
    x = apply.own_pictures.own_images(paths, model)[0]
    done = made("interpolate", runs.labelled, *paths[:2], "--labels", "4,7", "--steps", "3")
    four, seven = torch.tensor([4]), torch.tensor([7])
    expected = model.interpolate(x[:1], x[1:2], 3, four, y_labels=seven)
    assert torch.equal(done.arrays["images"][0], expected[:, 0])
    assert torch.equal(expected[-1], model.decode({"z": model.encode(x[1:2], seven)["z"].mu}, four))
    assert "the first picture's" in done.notes[-1]
    same = made("interpolate", runs.labelled, *paths[:2], "--labels", "4", "--steps", "3")
    assert same.notes == []
    assert torch.equal(same.arrays["images"][0, -1], model.reconstruct(x[1:2], four)[0])
    rec = made("reconstruct", runs.labelled, *paths, "--labels", "1,2,3").arrays
    assert torch.equal(rec["y"], model.reconstruct(x, torch.tensor([1, 2, 3])))
    for command in ("reconstruct", "interpolate", "encode"):
        assert "(0 … 9) each picture is by --labels" in refused(command, runs.labelled, *paths[:2])
        assert "--labels 1,2,3: 3 for 2 pictures" in refused(command, runs.labelled, *paths[:2], "--labels", "1,2,3")
        assert "the run's data bring the" in refused(command, runs.labelled, "--labels", "1")
        assert "--labels 1: this model takes none" in refused(command, runs.plain, *paths[:2], "--labels", "1")


def labelled_toy(group: str = "z") -> Model:
    """The code of an image is its first pixel; the decoder shows the code plus 10 times the label."""

    class E(nn.Module):
        def forward(self, x, labels=None):
            return {group: Gaussian(x[:, 0, 0, :1], torch.zeros(len(x), 1))}

    class D(nn.Module):
        def forward(self, codes, labels=None, noise=None):
            return (codes[group] + 10 * labels[:, None])[:, :, None, None].expand(-1, 1, 2, 2)

    spec = Spec((1, 2, 2), classes=3, conditional=True)
    prior = testing._ToyPrior()
    return Model(E(), D(), Priors({group: prior}), spec, {group: 1}, None, torch.device("cpu"))


class Table:
    """A data set of rows that are given."""

    def __init__(self, **splits: Rows) -> None:
        self.splits = splits
        self.spec = Spec((1, 2, 2), factors={"shade": 3}, classes=3)

    def rows(self, split):
        return self.splits[split]


def test_pairs_are_of_one_class_and_fewer_than_asked_for_are_told(tmp_path):
    x = torch.arange(7.0).view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 7
    data = Table(held_out=Rows(x, labels=torch.tensor([0, 1, 0, 1, 2, 1, 1])))
    done = apply.interpolate(labelled_toy(), data, tmp_path, (), steps=2, path="linear", seed=0, about="it", count=9)
    assert done["notes"] == ["3 pairs of held-out images, each of one class, of it; 9 were asked for, there are no more"]
    arrays = load_file(done["files"][0])
    assert torch.equal(arrays["labels"][:, 0], arrays["labels"][:, 1])
    assert torch.equal(arrays["images"][:, :, 0, 0, 0], arrays["ends"][:, :, 0, 0, 0] + 10.0 * arrays["labels"])
    few = Table(held_out=Rows(x[:3], labels=torch.tensor([0, 1, 2])))
    with pytest.raises(UserError, match="this takes 2 held-out samples of one class, and there are 3 in all; hold out more"):
        apply.interpolate(labelled_toy(), few, tmp_path, (), steps=2, path="linear", seed=0, about="it")


# -- latents of a set ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "labelled"])
def test_latents_of_the_runs_data(runs, made, name):
    run = getattr(runs, name)
    done = made("encode", run)
    one = opened.open_run(run, "last", "auto", "cpu")
    data, parts, names, digits = one.built.dataset, [], [], []
    for split in ("train", "held_out"):
        rows = data.rows(split)
        at = torch.arange(len(rows))
        labels = rows.labels[rows.at(at)]
        parts.append(one.model.encode(feed.images(rows, at, data.spec), labels if name == "labelled" else None)["z"])
        names += [f"{split}/{i}" for i in range(len(rows))]
        digits.append(labels)
    assert torch.allclose(done.arrays["mu.z"], torch.cat([q.mu for q in parts]), atol=1e-6)
    assert torch.allclose(done.arrays["logvar.z"], torch.cat([q.logvar for q in parts]), atol=1e-6)
    assert torch.equal(done.arrays["labels"], torch.cat(digits))
    assert torch.equal(done.arrays["factors"][:, 0], torch.cat(digits))
    beside = json.loads(Path(done.report["files"][1]).read_text())
    assert beside["rows"] == names
    assert beside["tensors"] == Path(done.report["files"][0]).name == "latents.safetensors"
    assert beside["factors"] == ["digit"]
    mu, variance = done.arrays["mu.z"].double().numpy(), done.arrays["logvar.z"].double().exp().numpy()
    z = beside["groups"]["z"]
    assert np.allclose(z["mean"], mu.mean(0), atol=1e-9)
    assert np.allclose(z["sd"], mu.std(0), atol=1e-9)
    assert np.allclose(z["sd_of_z"], np.sqrt(mu.var(0) + variance.mean(0)), atol=1e-9)
    drawn = mu + np.sqrt(variance) * np.random.default_rng(0).standard_normal((400, *mu.shape))
    assert np.allclose(z["sd_of_z"], drawn.std((0, 1)), rtol=0.01)
    held_out = made("encode", run, "--split", "held_out")
    assert torch.allclose(held_out.arrays["mu.z"], done.arrays["mu.z"][-397:], atol=1e-6)


def test_latents_of_own_pictures(runs, made, refused, siv_in, tmp_path):
    write_digits(tmp_path / "mine", BATCH + 5)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "odd name.png")
    given = (tmp_path / "mine", tmp_path / "odd name.png")
    done = made("encode", runs.plain, *given)
    model = siv_core.load(runs.plain, device="cpu")
    x, _ = apply.own_pictures.own_images(given, model)
    assert torch.allclose(done.arrays["mu.z"], model.encode(x)["z"].mu, atol=1e-6)
    beside = json.loads(Path(done.report["files"][1]).read_text())
    assert beside["rows"] == [*(str(tmp_path / f"mine/{i:03}.png") for i in range(BATCH + 5)), str(tmp_path / "odd name.png")]
    assert beside["changes"] == {str(tmp_path / "odd name.png"): ["RGB converted to L"]}
    assert done.notes == ["1 of 262 pictures were changed to fit the model; latents.json says how"]
    labelled = made("encode", runs.labelled, *given, "--labels", "2").arrays
    assert labelled["labels"].tolist() == [2] * (BATCH + 6)
    assert torch.allclose(labelled["mu.z"], siv_core.load(runs.labelled).encode(x, labelled["labels"])["z"].mu, atol=1e-6)
    # nothing is overwritten, and of pictures that cannot be read nothing is written
    out = Path(done.report["files"][0]).parent
    again = siv_in(tmp_path, "encode", runs.plain, given[1], "--out", out)
    assert f"wrote {out / 'latents-2.safetensors'}: mu.z [1, 3] float32, logvar.z [1, 3] float32" in again.stdout
    (tmp_path / "mine/000.png").write_text("no picture")
    told = refused("encode", runs.plain, *given, tmp_path / "nowhere.png")
    assert "000.png: no picture" in told
    assert "nowhere.png: no picture" in told
    assert "leave it out with pictures of yours" in refused("encode", runs.plain, given[1], "--split", "train")


def test_images_of_a_large_set_are_never_there_at_once(tmp_path, monkeypatch):
    alive, most, told = [0], [0], []

    def counted(rows, positions, spec, device="cpu"):
        x = feed.to_float(rows.x[positions], spec)
        alive[0] += len(x)
        most.append(alive[0])
        weakref.finalize(x, lambda n: alive.__setitem__(0, alive[0] - n), len(x))
        return x

    monkeypatch.setattr(apply.feed, "images", counted)
    table = torch.zeros(10 * BATCH + 1, 1, 2, 2)
    data = Table(train=Rows(table, labels=torch.zeros(len(table)).long(), draw=lambda n, generator: None))
    done = apply.encode(labelled_toy(), data, tmp_path, "train", "it", lambda what, at, total: told.append((at, total)))
    assert done["notes"] == [f"{len(table)} train rows of it", "train is drawn anew in training: these are its table"]
    assert max(most) <= 2 * BATCH
    assert told[-1] == (len(table), len(table))
    assert len(told) == 12


def test_a_group_with_a_name_of_its_own_and_one_row(tmp_path):
    data = Table(train=Rows(torch.full((1, 1, 2, 2), 0.25), labels=torch.tensor([1])))
    done = apply.encode(labelled_toy("content"), data, tmp_path, "train", "it", quiet)
    assert load_file(done["files"][0])["mu.content"].tolist() == [[0.25]]
    groups = json.loads(Path(done["files"][1]).read_text())["groups"]
    assert groups == {"content": {"dims": 1, "mean": [0.25], "sd": [0.0], "sd_of_z": [1.0]}}
    assert math.isclose(groups["content"]["sd_of_z"][0], 1)


# -- the page --------------------------------------------------------------------------------------------------------------------


def test_what_the_page_says_in_python_runs(runs, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(runs.plain)
    (tmp_path / "runs/labelled").symlink_to(runs.labelled)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/using_models.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert torch.equal(names["again"], names["y"])
    assert torch.equal(names["threes"], names["grid"][3])
    assert names["rows"].shape == (7, 4, 1, 8, 8)
    assert names["square"].shape == (7, 7, 1, 1, 8, 8)


def test_the_page_names_the_arrays_of_every_command(runs, made, tmp_path):
    page = (Path(__file__).parent.parent / "docs/using_models.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `siv ")]
    for command, more in (("sample", ()), ("reconstruct", ()), ("interpolate", ()), ("interpolate", ("--corners",))):
        line = next(line for line in rows if f"siv {command}`" in line and ("four" in line) == bool(more))
        assert set(re.findall(r"`(\w+)`", line.split("|")[-2])) == made(command, runs.labelled, *more).arrays.keys()
