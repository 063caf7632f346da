"""`fid` through torch-fidelity's Inception-v3 with weights that the test draws: the real network, not its published weights.

Most tests take its 192 features after the second pooling, of images resized to 75 × 75, which is fast; one, slow, leaves all as
it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from siv_plugins import fid as plugin
from siv_plugins import standard_normal
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from siv_core import Gaussian, Model, Rows, Spec, UserError
from siv_core.nets import Priors
from siv_core.seeding import Seeded
from siv_core.use import inception

COLOUR = Spec((3, 16, 16), value_range=(-1.0, 1.0), classes=3)
GREY = Spec((1, 16, 16))
NAMES = ["fid", "kid", "kid.se", "precision", "recall"]


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


class Bare(FeatureExtractorInceptionV3):
    """As it is initialised: loads nothing."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any: ...


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A data root with a file as torch-fidelity publishes it, and its sha256. He's initialisation keeps features of a size."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    generator = torch.Generator().manual_seed(0)
    with Seeded(0):
        net = Bare("bare", ["2048"], feature_extractor_weights_path=nothing)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * math.prod(module.kernel_size)
            module.weight.normal_(0, math.sqrt(2 / fan_in), generator=generator)
    root = tmp_path_factory.mktemp("root")
    path = root / "weights" / inception.FILE
    path.parent.mkdir()
    torch.save(net.state_dict(), path)
    return root, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def weights(drawn: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The drawn weights are the published ones, and small images are what the network sees. There is no network to others."""
    monkeypatch.setenv("SIV_DATA", str(drawn[0]))
    monkeypatch.setattr(inception, "SHA256", drawn[1])
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    monkeypatch.setattr(inception, "LAYER", "192")
    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("a connection"))
    return drawn[0] / "weights" / inception.FILE


class Pictures:
    """Smooth random pictures; both splits are of one law."""

    def __init__(self, spec: Spec, n: int = 40) -> None:
        self.spec = spec
        small = torch.rand(2 * n, spec.shape[0], 4, 4, generator=torch.Generator().manual_seed(0))
        x = nn.functional.interpolate(small, size=spec.shape[1:], mode="bilinear")
        self.x, self.labels = (255 * x).round().to(torch.uint8), torch.arange(2 * n) % 3
        self.index = {"train": torch.arange(n), "held_out": torch.arange(n, 2 * n)}

    def rows(self, split: str) -> Rows:
        return Rows(self.x, self.labels if self.spec.classes else None, index=self.index[split])

    def floats(self, split: str) -> Tensor:
        low, high = self.spec.value_range
        return self.x[self.index[split]] / 255 * (high - low) + low


class Shows(nn.Module):
    """A decoder that shows these images in turn, and notes what it was asked for."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.at = x, 0
        self.asked: list[tuple[int, bool, Any]] = []

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
        n = len(codes["z"])
        self.asked.append((n, self.training, labels))
        x = self.x[(self.at + torch.arange(n)) % len(self.x)]
        self.at += n
        return x


def model_of(spec: Spec, x: Tensor) -> Model:
    priors = Priors({"z": standard_normal.StandardNormal()})
    return Model(nn.Identity(), Shows(x), priors, spec, {"z": 2}, None, torch.device("cpu"))


def build(spec: Spec, **options: Any) -> Any:
    return plugin.build(plugin.FidConfig(**{"count": 40, **options}), spec, {"z": 2}, None)


def extractor(path: Path) -> Callable[[Tensor], Tensor]:
    with Seeded(0):
        net = FeatureExtractorInceptionV3("theirs", [inception.LAYER], feature_extractor_weights_path=str(path))
    return lambda x: net(x)[0]


# -- the whole path --------------------------------------------------------------------------------------------------------------


def test_values_are_those_of_torch_fidelity(weights: Path) -> None:
    data = Pictures(COLOUR)
    found = build(COLOUR, reference="train").measure(model_of(COLOUR, data.floats("held_out")), data, quiet)
    assert list(found.values) == [*NAMES, "clipped"]
    net = extractor(weights)
    samples, reference = (net(data.x[data.index[split]]).double() for split in ("held_out", "train"))
    theirs = fid_statistics_to_metric(fid_features_to_statistics(samples), fid_features_to_statistics(reference), False)
    assert found.values["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert found.values["clipped"] == 0
    about = found.protocol
    json.dumps(about)
    assert about["features"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert about["reference"] == {"split": "train", "images": 40, "of": 40, "augmentation": "none"}
    assert about["versions"]["torch-fidelity"].startswith("0.")
    assert "fewer samples than 192 dimensions" in about["distances"]["fid"]["note"]


@pytest.mark.slow
def test_values_at_full_size_do_not_depend_on_the_batch(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 299)
    monkeypatch.setattr(inception, "LAYER", "2048")
    data = Pictures(GREY, n=24)
    first, second = (
        build(GREY, count=24, batch=batch).measure(model_of(GREY, data.floats("held_out")), data, quiet) for batch in (5, 24)
    )
    assert first.values == pytest.approx(second.values, rel=1e-3, abs=1e-4)
    assert first.values["fid"] > 0
    assert first.protocol["distances"]["dimensions"] == 2048


def test_the_reference_itself_is_at_no_distance_in_grey_too(weights: Path) -> None:
    data = Pictures(GREY)
    state = torch.get_rng_state()
    model = model_of(GREY, data.floats("train"))
    model.decoder.train()
    found = build(GREY, batch=16).measure(model, data, quiet)
    again = build(GREY, batch=40).measure(model_of(GREY, data.floats("train")), data, quiet)
    assert torch.equal(state, torch.get_rng_state())
    assert model.decoder.training
    assert found.values["fid"] == pytest.approx(0, abs=1e-4)
    assert found.values["precision"] == found.values["recall"] == 1
    assert found.values["kid"] <= 0.01
    assert again.values == pytest.approx(found.values, rel=1e-3, abs=1e-4)
    colours = data.x[:4].repeat(1, 3, 1, 1)
    assert torch.equal(inception.load(weights, torch.device("cpu"))(data.x[:4]), extractor(weights)(colours))


class Numbers(nn.Module):
    """An encoder whose mean is the number of an image among these."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Gaussian]:
        number = torch.cdist(x.flatten(1), self.x.flatten(1)).argmin(dim=1).float()
        return {"z": Gaussian(torch.stack([number, number], dim=1), torch.zeros(len(x), 2))}


class Looks(nn.Module):
    """A decoder that shows the image of a number, `blur` of it replaced by grey."""

    def __init__(self, x: Tensor, blur: float) -> None:
        super().__init__()
        self.x, self.blur = x, blur

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
        return self.x[codes["z"][:, 0].round().long().clamp(0, len(self.x) - 1)] * (1 - self.blur)


def test_reconstructions_are_compared_with_their_originals(weights: Path) -> None:
    data = Pictures(COLOUR)
    x = data.floats("held_out")
    found = {}
    for blur in (0.0, 0.5):
        model = evolve(model_of(COLOUR, x), encoder=Numbers(x), decoder=Looks(x, blur))
        found[blur] = build(COLOUR, reconstructions=True).measure(model, data, quiet)
    exact, blurred = (found[blur].values for blur in (0.0, 0.5))
    assert list(exact) == [*NAMES, "clipped", *(f"reconstruction.{name}" for name in [*NAMES, "clipped"])]
    assert exact["reconstruction.fid"] == pytest.approx(0, abs=1e-4)
    assert exact["reconstruction.recall"] == 1
    assert blurred["reconstruction.fid"] > 10 * abs(float(exact["reconstruction.fid"])) + 1e-3
    assert found[0.0].protocol["reconstructions"]["reference"] == {"split": "held_out", "images": 40, "of": 40}
    with pytest.raises(UserError, match="of samples alone"):
        build(COLOUR, reconstructions=True, mode=plugin.OFFICIAL)


def test_a_conditional_model_is_asked_for_the_labels_of_the_reference(weights: Path) -> None:
    data = Pictures(COLOUR)
    data.labels = torch.zeros_like(data.labels)
    spec = evolve(COLOUR, conditional=True)
    model = model_of(spec, data.floats("train"))
    build(spec, count=24, batch=24).measure(model, data, quiet)
    [(n, _, labels)] = model.decoder.asked  # type: ignore[union-attr, misc]
    assert (n, labels.tolist()) == (24, [0] * 24)


def test_the_published_mode_has_names_of_its_own(weights: Path) -> None:
    """Batches of 32, whose statistics both networks take: the value depends on them, and is no standard one."""
    data = Pictures(GREY, n=70)
    model, trained = model_of(GREY, data.floats("held_out")), []
    model.decoder.register_forward_hook(lambda module, args, x: trained.append((len(x), module.training)))
    found = build(GREY, count=70, mode="official-train-mode").measure(model, data, quiet)
    assert trained == [(32, True)] * 2
    assert list(found.values) == [f"official_train_mode.{name}" for name in [*NAMES, "clipped"]]
    assert not model.decoder.asked  # a copy was
    assert found.protocol["batch"] == 32
    assert found.protocol["samples"]["count"] == found.protocol["reference"]["images"] == 64
    standard = build(GREY, count=64).measure(model_of(GREY, data.floats("held_out")), data, quiet)
    assert found.values["official_train_mode.fid"] != pytest.approx(standard.values["fid"], rel=0.01)
    net = inception.load(weights, torch.device("cpu")).train()
    at = plugin.feature_sets.chosen(data.rows("train"), 64, 0)
    samples = torch.cat([net(data.x[data.index["held_out"]][i : i + 32]) for i in (0, 32)]).double()
    reference = torch.cat([net(data.x[data.index["train"]][at[i : i + 32]]) for i in (0, 32)]).double()
    theirs = fid_statistics_to_metric(fid_features_to_statistics(samples), fid_features_to_statistics(reference), False)
    assert found.values["official_train_mode.fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    too_few = build(GREY, mode="official-train-mode", reference="train").fits(Pictures(GREY, n=31))
    assert list(too_few) == ["the split train has 31 images, too few for a covariance"]


# -- what is not at hand, or not right -------------------------------------------------------------------------------------------


def test_without_weights_everything_is_skipped_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIV_DATA", str(tmp_path))
    data = Pictures(GREY)
    metric = build(GREY)
    [reason] = metric.needs()
    assert inception.URL in reason
    assert str(tmp_path / "weights" / inception.FILE) in reason
    model = model_of(GREY, data.floats("train"))
    assert metric.measure(model, data, quiet).values == dict.fromkeys(NAMES, reason)
    assert not model.decoder.asked
    official = build(GREY, mode="official-train-mode", weights_file=str(tmp_path / "mine.pth"))
    assert "mine.pth" in next(iter(official.needs()))
    assert {name.partition(".")[0] for name in official.measure(model, data, quiet).values} == {"official_train_mode"}
    with pytest.raises(UserError, match="not at hand"):
        inception.load(tmp_path / "mine.pth", torch.device("cpu"))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception.util, "find_spec", lambda name: None)
    assert list(build(GREY).needs()) == ["torch-fidelity is not installed: pip install 'siv[metrics]'"]


class Trap:
    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (setattr, (Trap, "sprung", True))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """A file of this state, whose digest is taken for the right one."""

    def write(state: Any) -> Path:
        path = tmp_path / "mine.pth"
        torch.save(state, path)
        monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    return write


def test_another_file_is_refused_before_it_is_opened(weights: Path, written: Callable[[Any], Path], tmp_path: Path) -> None:
    cpu, published = torch.device("cpu"), inception.SHA256
    other = tmp_path / "other.pth"
    other.write_bytes(b"no weights")
    with pytest.raises(UserError, match=f"damaged, its sha256 .* does not begin with {published}"):
        inception.load(other, cpu)
    with pytest.raises(UserError, match="cannot be read as weights"):
        inception.load(written({"fc.bias": Trap()}), cpu)
    assert not Trap.sprung
    with pytest.raises(UserError, match="is not a state of torch-fidelity's Inception-v3"):
        inception.load(written({"fc.bias": torch.zeros(3)}), cpu)


def test_images_of_another_range_are_refused(weights: Path) -> None:
    data = Pictures(GREY)
    with pytest.raises(
        UserError, match=r"fid: samples of the model: go from -\S+ to \S+, the value range of the data is \[0, 1\]"
    ):
        build(GREY, count=8).measure(model_of(GREY, 2 * data.floats("train") - 1), data, quiet)


@pytest.mark.parametrize("spec", [Spec((2,), kind="array"), Spec((4, 16, 16))])
def test_what_is_no_picture_is_refused(spec: Spec) -> None:
    with pytest.raises(UserError, match="needs images with 1 or 3 channels"):
        build(spec)


def test_the_published_digest_stands_in_the_files_name() -> None:
    assert inception.FILE.removesuffix(".pth").endswith(inception.SHA256[:8])
    assert len(inception.SHA256) == 64
