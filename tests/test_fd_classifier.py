"""`fd_classifier` with models that know the answer: real images, one image, noise; and the classifier on real digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from siv_plugins import digits, standard_normal
from siv_plugins import fd_classifier as plugin
from torch import Tensor, nn

from siv_core import Model, Rows, Spec, UserError
from siv_core.errors import Stopped
from siv_core.nets import Priors
from siv_core.store import files
from siv_core.use import classifier, distances, feature_sets

CPU = torch.device("cpu")


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A data root whose classifiers the tests of this file share: training one is what takes time."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("root")
        patch.setenv("SIV_DATA", str(folder))
        yield folder


@pytest.fixture
def data(root: Path) -> digits.Digits:
    return digits.Digits(397, 0)


class Shows(nn.Module):
    """A decoder that shows these images in turn, whatever the codes are; of a conditional model one of the label asked for."""

    def __init__(self, x: Tensor, labels: Tensor | None = None) -> None:
        super().__init__()
        self.x, self.labels, self.at = x, labels, 0

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
        n = len(codes["z"])
        if labels is None:
            at = (self.at + torch.arange(n)) % len(self.x)
        else:
            assert self.labels is not None
            own = [torch.where(self.labels == label)[0] for label in range(10)]
            at = torch.stack([own[int(label)][(self.at + i) % len(own[int(label)])] for i, label in enumerate(labels)])
        self.at += n
        return self.x[at]


def model_of(x: Tensor, labels: Tensor | None = None, spec: Spec = digits.Digits.spec) -> Model:
    spec = evolve(spec, conditional=labels is not None)
    priors = Priors({"z": standard_normal.StandardNormal()})
    return Model(nn.Identity(), Shows(x, labels), priors, spec, {"z": 2}, None, CPU)


def images(data: Any, split: str) -> tuple[Tensor, Tensor]:
    rows = data.rows(split)
    return rows.x[rows.index].float() / 255, rows.labels[rows.index]


def measure(data: Any, model: Model, **options: Any) -> Any:
    config = plugin.FdClassifierConfig(**{"count": 397, "epochs": 25, **options})
    metric = plugin.build(config, model.spec, model.groups, None)
    assert list(metric.needs()) == []
    assert list(metric.fits(data)) == []
    return metric.measure(model, data, quiet)


# -- factors in place of labels --------------------------------------------------------------------------------------------------


class WithFactors:
    """Digits whose labels are a factor, beside one of two values; without labels of their own."""

    spec = evolve(digits.Digits.spec, classes=None, factors={"half": 2, "digit": 10})

    def __init__(self, data: Any) -> None:
        self.data = data

    def rows(self, split: str) -> Rows:
        rows = self.data.rows(split)
        return evolve(rows, labels=None, factors=torch.stack([rows.labels // 5, rows.labels], dim=1))

    def fingerprint(self) -> str:
        return str(self.data.fingerprint())


def test_a_factor_is_judged_as_labels_are(data):
    other = WithFactors(data)
    assert list(plugin.build(plugin.FdClassifierConfig(), other.spec, {}, None).fits(other)) != []
    metric = plugin.build(plugin.FdClassifierConfig(factor="digit"), other.spec, {}, None)
    assert list(metric.fits(other)) == []
    by_digit, spec = classifier.labelled(other, other.spec, "digit")
    settings = classifier.Settings(epochs=1)
    assert spec.classes == 10
    assert classifier._key(by_digit, evolve(spec, factors={}), settings) == classifier._key(data, data.spec, settings)
    by_half, spec = classifier.labelled(other, other.spec, "half")
    assert spec.classes == 2
    assert torch.equal(by_half.rows("train").labels, data.rows("train").labels // 5)
    assert classifier._key(by_half, spec, settings) != classifier._key(data, data.spec, settings)
    assert classifier.labelled(data, data.spec, "") == (data, data.spec)


def test_a_factor_that_there_is_not():
    with pytest.raises(UserError, match="factor: 'digits' is no factor of these data; did you mean 'digit'"):
        plugin.build(plugin.FdClassifierConfig(factor="digits"), WithFactors.spec, {}, None)
    with pytest.raises(UserError, match="'azimuth' is no factor of these data; known: digit"):
        plugin.build(plugin.FdClassifierConfig(factor="azimuth"), digits.Digits.spec, {}, None)


# -- the classifier --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_reads_digits_it_has_not_seen(root: Path, seed: int) -> None:
    for split in (0, 1):
        data = digits.Digits(397, split)
        about = classifier.trained(data, data.spec, classifier.Settings(seed=seed), CPU, quiet).about
        assert about["held_out_accuracy"] >= 0.97
        assert (about["held_out_images"], about["trained_on"]["images"]) == (397, 1400)


def test_it_is_trained_once_and_kept_whole(data: digits.Digits, root: Path) -> None:
    settings = classifier.Settings(epochs=1, batch=256)
    told: list[str] = []
    state = torch.get_rng_state()
    with torch.no_grad():
        first = classifier.trained(data, data.spec, settings, CPU, lambda what, done, total: told.append(what))
    assert torch.equal(state, torch.get_rng_state())
    assert "classifier: training" in told
    again = classifier.trained(data, data.spec, settings, CPU, lambda what, done, total: pytest.fail(what))
    assert again.about == first.about
    x = data.rows("held_out").x[:5]
    for mine, theirs in zip(first(x), again(x), strict=True):
        assert torch.equal(mine, theirs)
    names = {path.name.partition(".")[0] for path in (root / "classifiers").iterdir()}
    others = [
        (data, classifier.Settings(epochs=1, batch=256, seed=1)),
        (digits.Digits(397, 1), settings),  # its fingerprint is the same, its split is not
    ]
    for other, how in others:
        classifier.trained(other, other.spec, how, CPU, quiet)
    assert len({path.name.partition(".")[0] for path in (root / "classifiers").iterdir()} - names) == len(others)
    assert all(path.suffix in (".json", ".safetensors") for path in (root / "classifiers").iterdir())


def test_the_held_out_accuracy_is_that_of_the_network(data: digits.Digits) -> None:
    judge = classifier.trained(data, data.spec, classifier.Settings(epochs=1), CPU, quiet)
    rows = data.rows("held_out")
    features, probabilities = judge(rows.x[rows.index])
    assert features.shape == (397, 176)
    assert probabilities.sum(dim=1).tolist() == pytest.approx([1] * 397, abs=1e-5)
    right = (probabilities.argmax(dim=1) == rows.labels[rows.index]).double().mean()
    assert judge.about["held_out_accuracy"] == pytest.approx(float(right), abs=1e-9)


def test_an_interrupt_leaves_nothing(data: digits.Digits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SIV_DATA", str(tmp_path))

    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise Stopped(15)

    with pytest.raises(Stopped):
        classifier.trained(data, data.spec, classifier.Settings(epochs=1), CPU, stop)
    assert list((tmp_path / "classifiers").iterdir()) == []


@pytest.mark.parametrize("damage", ["weights", "text", "gone", "format"])
def test_a_damaged_one_is_told(data: digits.Digits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    monkeypatch.setenv("SIV_DATA", str(tmp_path))
    settings = classifier.Settings(epochs=1, batch=512)
    classifier.trained(data, data.spec, settings, CPU, quiet)
    [about] = (tmp_path / "classifiers").glob("*.json")
    weights = about.with_suffix(".safetensors")
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
    elif damage == "gone":
        weights.unlink()
    elif damage == "format":
        files.write_json(about, {**json.loads(about.read_text()), "format": 2})
    else:
        about.write_text("{")
    with pytest.raises(UserError, match=r"cannot be read|is not the one|damaged|newer siv"):
        classifier.trained(data, data.spec, settings, CPU, quiet)


class Labelled:
    """Rectangles whose size is their label, in any shape."""

    def __init__(self, spec: Spec, n: int = 40) -> None:
        self.spec = spec
        self.labels = torch.arange(n) % (spec.classes or 1)
        self.x = torch.zeros(n, *spec.shape, dtype=torch.uint8)
        for image, label in zip(self.x, self.labels.tolist(), strict=True):
            image[:, : image.shape[1] // 4 * (1 + label), : image.shape[2] // 4 * (1 + label)] = 200

    def rows(self, split: str) -> Rows:
        return Rows(self.x, self.labels if self.spec.classes else None)

    def fingerprint(self) -> str:
        return f"{self.spec.shape}"


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 20), (1, 28, 28), (3, 64, 64), (2, 4, 5)])
def test_any_shape(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SIV_DATA", str(tmp_path))
    data = Labelled(Spec(shape, classes=2, value_range=(-1.0, 1.0)))
    about = classifier.trained(data, data.spec, classifier.Settings(epochs=12, batch=20), CPU, quiet).about  # type: ignore[arg-type]
    assert about["held_out_accuracy"] == 1


# -- the metric ------------------------------------------------------------------------------------------------------------------


def test_real_images_are_at_the_floor(data: digits.Digits) -> None:
    x, _ = images(data, "held_out")
    found = measure(data, model_of(x))
    values, about = found.values, found.protocol
    json.dumps(about)
    assert values["fd"] == pytest.approx(values["floor.fd"], rel=1e-6)
    assert values["kid"] == pytest.approx(values["floor.kid"], abs=3 * values["floor.kid.se"])
    assert min(values[name] for name in ("precision", "recall", "floor.precision", "floor.recall")) > 0.8
    accuracy = about["classifier"]["held_out_accuracy"]
    assert values["sure"] == values["floor.sure"] == pytest.approx(accuracy, abs=0.08)
    assert values["classes_found"] == 10
    assert 0.05 < values["smallest_class"] <= 0.1 <= values["largest_class"] < 0.15
    assert values["clipped"] == 0
    assert "label_agreement" not in values
    assert about["reference"] == {"split": "train", "images": 397, "of": 1400}
    assert len(about["classifier"]["sha256"]) == 64
    assert about["distances"]["fd"]["samples"] == about["distances"]["fd"]["reference"] == 397


def test_the_split_itself_is_at_no_distance(data: digits.Digits) -> None:
    x, _ = images(data, "held_out")
    values = measure(data, model_of(x), reference="held_out").values
    assert values["fd"] < 1e-6 < values["floor.fd"]
    assert values["precision"] == values["recall"] == 1


def test_one_image_over_and_over_is_precise_and_recalls_nothing(data: digits.Digits) -> None:
    rows = data.rows("train")
    one = feature_sets.chosen(rows, 1, 0)  # of the reference
    values = measure(data, model_of(rows.x[rows.at(one)].float() / 255)).values
    assert values["precision"] == 1
    assert values["recall"] <= 0.01
    assert values["fd"] > 20 * values["floor.fd"]
    assert values["sure"] == values["classes_found"] == values["largest_class"] == 1
    assert values["smallest_class"] == 0


def test_noise_is_not_precise(data: digits.Digits) -> None:
    noise = torch.rand(397, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    values = measure(data, model_of(noise)).values
    assert values["precision"] < 0.1
    assert values["fd"] > 20 * values["floor.fd"]
    assert values["kid"] > 10 * values["kid.se"]
    assert values["sure"] < 0.8 < values["floor.sure"]


def test_the_last_layer_alone_takes_noise_for_digits(data: digits.Digits) -> None:
    """Why the features are of all layers."""
    judge = classifier.trained(data, data.spec, classifier.Settings(epochs=25), CPU, quiet)
    rows = data.rows("train")
    noise = torch.randint(256, (397, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    real, fake = (judge(x)[0] for x in (rows.x[rows.at(feature_sets.chosen(rows, 397, 0))], noise))
    assert distances.precision_recall(fake, real, 3)[0] < 0.05
    assert distances.precision_recall(fake[:, -64:], real[:, -64:], 3)[0] > 0.2


def test_a_conditional_model_shows_what_it_was_asked_for(data: digits.Digits) -> None:
    x, labels = images(data, "held_out")
    found = measure(data, model_of(x, labels))
    accuracy = found.protocol["classifier"]["held_out_accuracy"]
    assert found.values["label_agreement"] == pytest.approx(accuracy, abs=0.03)
    wrong = measure(data, model_of(x, (labels + 1) % 10)).values
    assert wrong["label_agreement"] < 0.1
    assert wrong["fd"] < 3 * wrong["floor.fd"]  # the images are real ones all the same


def test_values_follow_the_seed_and_leave_the_model_alone(data: digits.Digits) -> None:
    x, _ = images(data, "train")
    model = model_of(x)
    model.decoder.train()
    state = torch.get_rng_state()
    first = measure(data, model, count=200)
    assert torch.equal(state, torch.get_rng_state())
    assert model.decoder.training
    for batch in (64, 200):
        again = measure(data, model_of(x), count=200, batch=batch)
        assert again.values == pytest.approx(first.values, rel=1e-4, abs=1e-6)
        assert again.protocol == first.protocol
    assert measure(data, model_of(x), count=200, seed=0, k=5).protocol != first.protocol


def test_what_it_cannot_be_taken_of_is_said(data: digits.Digits) -> None:
    x, _ = images(data, "held_out")
    with pytest.raises(UserError, match=r"samples of the model: go from -1 to 1, the value range of the data is \[0, 1\]"):
        measure(data, model_of(2 * x - 1))
    with pytest.raises(UserError, match="needs images, this data is array"):
        plugin.build(plugin.FdClassifierConfig(), Spec((2,), kind="array"), {"z": 2}, None)
    bare = Labelled(Spec((1, 8, 8)))
    metric = plugin.build(plugin.FdClassifierConfig(), bare.spec, {"z": 2}, None)
    assert list(metric.fits(bare)) == ["the data have no labels, which a classifier is trained on"]  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no labels"):
        metric.measure(model_of(x), bare, quiet)  # type: ignore[arg-type]
    few = Labelled(Spec((1, 8, 8), classes=2), n=3)
    assert "the split train has 3 images, no more than k = 3" in plugin.build(
        plugin.FdClassifierConfig(), few.spec, {"z": 2}, None
    ).fits(few)  # type: ignore[arg-type]


def test_nothing_sure_has_no_shares() -> None:
    seen = plugin.Seen(torch.zeros(4, 2), torch.full((4, 10), 0.1))
    told = plugin._told(seen, None)
    assert told == {"sure": 0, "classes_found": 0, "largest_class": plugin.NOBODY, "smallest_class": plugin.NOBODY}
