"""`reconstruction` with networks that know the answer, or that show what anybody could: every number is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
import trunks
from siv_plugins import reconstruction_metric as plugin
from torch import Tensor, nn

from siv_core import Gaussian, Model, Rows, Spec, UserError
from siv_core.errors import Stopped
from siv_core.nets import Priors
from siv_core.use import image_distances

N, M = 13, 20  # held-out and training images


class Pictures:
    """Smooth random pictures; the splits index one table."""

    def __init__(self, size: int = 12, channels: int = 3, value_range: tuple[float, float] = (0.0, 1.0), **spec: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.spec = Spec((channels, size, size), value_range=value_range, **spec)
        small = torch.rand(N + M, channels, 4, 4, generator=generator)
        self.unit = nn.functional.interpolate(small, size=(size, size), mode="bilinear")
        self.x = self.unit * (value_range[1] - value_range[0]) + value_range[0]
        self.labels = torch.arange(N + M) % spec["classes"] if "classes" in spec else None
        order = torch.randperm(N + M, generator=generator)
        self.index = {"held_out": order[:N], "train": order[N:]}

    def rows(self, split: str) -> Rows:
        return Rows(self.x, self.labels, index=self.index[split])

    def images(self, split: str) -> Tensor:
        return self.unit[self.index[split]]


class Pixels(nn.Module):
    """The posterior mean is the image; a sample of the posterior would be far off."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Gaussian]:
        return {"z": Gaussian(x.flatten(1), torch.full_like(x.flatten(1), 9.0))}


class Show(nn.Module):
    def __init__(self, shown: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shown, self.shape = shown, shape

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
        x = codes["z"].unflatten(1, self.shape)
        return self.shown(x) if labels is None else self.shown(x, labels)


def model_of(data: Pictures, shown: Any = lambda x: x, spec: Spec | None = None) -> Model:
    spec = spec or data.spec
    return Model(Pixels(), Show(shown, spec.shape), Priors({}), spec, {"z": spec.dims}, None, torch.device("cpu"))


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done < total


def measure(data: Pictures, model: Model, **options: Any) -> Any:
    config = plugin.ReconstructionConfig(**{"lpips": (), **options})
    return plugin.build(config, data.spec, {"z": 1}, None).measure(model, data, quiet)


def test_what_holds_everything_scores_full() -> None:
    data = Pictures()
    found = measure(data, model_of(data)).values
    assert found["mse"] == found["mse.se"] == found["mse.ratio"] == 0
    assert found["psnr"] == pytest.approx(100)
    assert found["ssim"] == pytest.approx(1, abs=1e-5)
    for name in ("mse.mean_image", "mse.nearest_train", "mse.mean_image.se", "mse.nearest_train.se"):
        assert found[name] > 0.001


def test_what_holds_nothing_scores_as_the_mean_image() -> None:
    data = Pictures()
    mean = data.images("train").double().mean(dim=0).float()
    found = measure(data, model_of(data, lambda x: mean.expand_as(x))).values
    for name in ("mse", "psnr", "ssim"):
        assert found[name] == pytest.approx(found[f"{name}.mean_image"], rel=1e-5)
        assert found[f"{name}.se"] == pytest.approx(found[f"{name}.mean_image.se"], rel=1e-4)
    assert found["mse.ratio"] >= 1 - 1e-6


def test_every_value_against_a_plain_loop() -> None:
    data = Pictures()
    x, train = (data.images(split).double().numpy() for split in ("held_out", "train"))
    found = measure(data, model_of(data, lambda x: x + 0.1)).values
    errors = {"": [], ".mean_image": [], ".nearest_train": []}
    for one in x:
        errors[""].append(((np.clip(one + 0.1, 0, 1) - one) ** 2).mean())
        errors[".mean_image"].append(((train.mean(axis=0) - one) ** 2).mean())
        errors[".nearest_train"].append(min(((other - one) ** 2).mean() for other in train))
    for variant, each in errors.items():
        assert found[f"mse{variant}"] == pytest.approx(np.mean(each), rel=1e-4)
        assert found[f"mse{variant}.se"] == pytest.approx(np.std(each, ddof=1) / math.sqrt(N), rel=1e-3)
        assert found[f"psnr{variant}"] == pytest.approx(np.mean([-10 * math.log10(e) for e in each]), rel=1e-4)
    best = min(np.mean(errors[name]) for name in (".mean_image", ".nearest_train"))
    assert found["mse.ratio"] == pytest.approx(np.mean(errors[""]) / best, rel=1e-4)


def test_images_are_compared_in_0_1_however_they_are_stored() -> None:
    plain, wide, levels = Pictures(), Pictures(value_range=(-1.0, 1.0)), Pictures(value_range=(-1.0, 1.0))
    levels.x = (levels.unit * 255).round().to(torch.uint8)
    expected = measure(plain, model_of(plain, lambda x: 0.5 * x)).values
    for data, tolerance in ((wide, 1e-4), (levels, 0.03)):
        found = measure(data, model_of(data, lambda x: 0.5 * (x + 1) - 1)).values
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("scaled", [lambda x: x * 255, lambda x: 2 * x - 1, lambda x: x * math.nan])
def test_images_of_another_range_are_refused(scaled: Any) -> None:
    data = Pictures()
    data.x = scaled(data.x)
    with pytest.raises(UserError, match=r"images of train: go from .* value range is said to be \[0, 1\]"):
        measure(data, model_of(data))


def test_what_a_decoder_makes_outside_the_range_is_clamped() -> None:
    data = Pictures()
    data.unit = data.x = data.x.round()
    assert measure(data, model_of(data, lambda x: 3 * x - 1)).values["mse"] == 0


def test_the_batch_changes_nothing_and_the_seed_chooses() -> None:
    data = Pictures()
    model = model_of(data, lambda x: 0.5 * x)
    expected = measure(data, model, batch=1000).values
    for batch in (1, 5):  # an SSIM is a float32, and so is what it differs by from image to image
        assert measure(data, model, batch=batch).values == pytest.approx(expected, rel=1e-4)
    some, again, other = (measure(data, model, count=6, seed=seed) for seed in (0, 0, 1))
    assert some == again
    assert some.values["mse"] != other.values["mse"]
    assert (some.protocol["images"], some.protocol["of"]) == (6, N)


def test_the_baselines_are_made_of_as_many_training_images_as_are_asked_for() -> None:
    data = Pictures()
    found = [measure(data, model_of(data), train_images=count) for count in (1, 7, 0)]
    assert [one.protocol["train_images"] for one in found] == [1, 7, M]
    near = [one.values["mse.nearest_train"] for one in found]
    assert near[0] > near[1] >= near[2]
    assert found[0].values["mse.mean_image"] == pytest.approx(near[0], rel=1e-5)  # of one image, the mean is the nearest


def test_a_conditional_model_gets_its_labels() -> None:
    data = Pictures(classes=3, conditional=True)
    expected = data.labels[data.index["held_out"]]
    seen: list[Tensor] = []

    def shown(x: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return x

    measure(data, model_of(data, shown), batch=4)
    assert torch.equal(torch.cat(seen), expected)


def test_a_model_of_a_smaller_stage_is_measured_at_its_size() -> None:
    data = Pictures(size=24)
    spec = Spec((3, 12, 12))
    found = measure(data, model_of(data, spec=spec))
    assert found.values["mse"] == 0
    assert found.protocol["shape"] == [3, 12, 12]


def test_images_that_are_not_finite() -> None:
    data = Pictures()
    found = measure(data, model_of(data, lambda x: x * math.nan)).values
    assert {found[name] for name in ("mse", "mse.se", "psnr", "ssim", "mse.ratio")} == {"the decoder's images are not finite"}
    assert found["mse.mean_image"] > 0


def test_one_image_has_no_standard_error_and_a_perfect_baseline_no_ratio() -> None:
    data = Pictures()
    found = measure(data, model_of(data), count=1).values
    assert found["mse.se"] == "of one there is none"
    data.index["train"] = data.index["held_out"]
    assert measure(data, model_of(data)).values["mse.ratio"] == "a baseline is already perfect"


def test_small_images_have_no_ssim_and_no_lpips() -> None:
    data = Pictures(size=10)
    found = measure(data, model_of(data), lpips=("alex", "vgg")).values
    assert found["ssim"] == "images of 10 pixels are smaller than its window of 11"
    assert found["lpips_alex"] == "takes grey or RGB images of at least 31 pixels, not 3 channels of 10"
    assert found["lpips_vgg"] == "takes grey or RGB images of at least 16 pixels, not 3 channels of 10"
    assert found["mse"] == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_where_its_weights_are_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    monkeypatch.setenv("SIV_DATA", str(tmp_path))
    data = Pictures(size=32, channels=channels)
    metric = plugin.build(plugin.ReconstructionConfig(lpips=("alex",)), data.spec, {"z": 1}, None)
    [need] = metric.needs()
    assert need == f"lpips_alex: {metric.measure(model_of(data), data, quiet).values['lpips_alex']}"
    assert "download https://download.pytorch.org/models/alexnet" in need
    monkeypatch.setitem(image_distances.BACKBONES, "alex", trunks.save("alex", tmp_path))
    assert list(metric.needs()) == []
    found = metric.measure(model_of(data), data, quiet)
    assert found.values["lpips_alex"] == 0
    assert found.values["lpips_alex.mean_image"] > 0
    assert found.values["lpips_alex.nearest_train.se"] > 0
    assert len(found.protocol["lpips"]["lpips_alex"]["trunk_sha256"]) == 64


def test_progress_and_stopping() -> None:
    data, told = Pictures(), set()

    def stop(what: str, done: int, total: int) -> None:
        told.add(what)
        if what == plugin.WHAT and done > 3:
            raise Stopped(2)

    with pytest.raises(Stopped):
        plugin.build(plugin.ReconstructionConfig(lpips=(), batch=4), data.spec, {"z": 1}, None).measure(
            model_of(data), data, stop
        )
    assert told == {"reconstruction", "reconstruction: mean image", "reconstruction: nearest training images"}


def test_what_it_cannot_measure() -> None:
    with pytest.raises(UserError, match="metric reconstruction: needs images, this data is array"):
        plugin.build(plugin.ReconstructionConfig(), Spec((2,), kind="array"), {"z": 1}, None)
    data = Pictures()
    data.index["held_out"] = torch.empty(0, dtype=torch.int64)
    with pytest.raises(UserError, match="the split 'held_out' is empty"):
        measure(data, model_of(data))


def test_the_protocol_is_json() -> None:
    data = Pictures()
    protocol = measure(data, model_of(data), seed=4).protocol
    assert json.loads(json.dumps(protocol)) == protocol
    assert protocol["baselines"].keys() == plugin.BASELINES.keys()
    assert (protocol["seed"], protocol["images"], protocol["train_images"]) == (4, N, M)


def test_in_the_middle_of_a_training_and_after_it(siv, tmp_path: Path) -> None:
    text = toys.SOFT + '[train]\nbatch = 64\nlength = "4 steps"\ntick = "2 steps"\nconditional = true\n'
    (tmp_path / "some.toml").write_text(text + '[metrics.reconstruction]\ncount = 50\nevery = "2 steps"\n')
    done = siv("run", tmp_path / "some.toml", "--run-dir", tmp_path / "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line.get("metric") == "reconstruction"]
    values = [line["value"] for line in found if line["name"] == "mse"]
    assert len(values) >= 2
    assert len(set(values)) > 1
    assert {line["name"] for line in found if "skipped" in line} == {"ssim", "lpips_alex", "lpips_vgg"}
