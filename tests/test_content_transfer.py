"""`content_transfer` with networks that know the answer, or that copy: every number is known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from siv_plugins import content_transfer as plugin
from torch import Tensor, nn

from siv_core import Model, Rows, Spec, UserError
from siv_core.errors import Stopped
from siv_core.nets import Priors
from siv_core.use import image_distances

FACTORS = {"model": 6, "elevation": 2, "azimuth": 3}
HELD_OUT = 4  # of the models
NAMES = ("class", "content")


class Grid:
    """Every model in every view once; smooth random pictures. The rows of one table are shuffled, the splits index them."""

    def __init__(self, size: int = 16, channels: int = 3, value_range: tuple[float, float] = (0.0, 1.0)) -> None:
        generator = torch.Generator().manual_seed(0)
        self.spec = Spec((channels, size, size), value_range=value_range, factors=FACTORS)
        cells = torch.cartesian_prod(*(torch.arange(n) for n in FACTORS.values()))
        self.factors = cells[torch.randperm(len(cells), generator=generator)]
        small = torch.rand(len(cells), channels, 4, 4, generator=generator)
        self.unit = nn.functional.interpolate(small, size=(size, size), mode="bilinear")
        self.x = self.unit * (value_range[1] - value_range[0]) + value_range[0]

    def rows(self, split: str) -> Rows:
        held = self.factors[:, 0] >= FACTORS["model"] - HELD_OUT
        index = torch.where(held if split == "held_out" else ~held)[0]
        return Rows(self.x, factors=self.factors, index=index)

    def missing(self) -> None:
        return None

    def prepare(self, progress: Any) -> None:
        pass

    def fingerprint(self) -> str:
        return "grid"


class LookUp(nn.Module):
    """The codes of an image of the table: the number of its model, and of its view."""

    def __init__(self, data: Grid) -> None:
        super().__init__()
        self.x, self.codes = data.x, torch.stack([data.factors[:, 0], data.factors[:, 1] * 3 + data.factors[:, 2]], 1).float()

    def forward(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        found = self.codes[torch.cdist(x.flatten(1), self.x.flatten(1)).argmin(dim=1)]
        return {name: (found[:, [i]], torch.full((len(x), 1), 9.0)) for i, name in enumerate(NAMES)}  # a sample would be far off


class Perfect(nn.Module):
    def __init__(self, data: Grid) -> None:
        super().__init__()
        self.x, self.codes = data.x, LookUp(data).codes

    def forward(self, codes: dict[str, Tensor]) -> Tensor:
        return self.x[torch.cdist(torch.cat([codes[name] for name in NAMES], 1), self.codes).argmin(dim=1)]


class Pixels(nn.Module):
    """Both codes are the whole image."""

    def forward(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return dict.fromkeys(NAMES, (x.flatten(1), torch.zeros_like(x.flatten(1))))


class Copy(nn.Module):
    def __init__(self, group: str, spec: Spec, plus: float = 0.0) -> None:
        super().__init__()
        self.group, self.shape, self.plus = group, spec.shape, plus

    def forward(self, codes: dict[str, Tensor]) -> Tensor:
        return codes[self.group].unflatten(1, self.shape) + self.plus


def model_of(data: Grid, encoder: nn.Module, decoder: nn.Module) -> Model:
    groups = {name: gaussian[0].shape[1] for name, gaussian in encoder(data.x[:1]).items()}
    return Model(encoder, decoder, Priors({}), data.spec, groups, NAMES, torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make operations this small a thousand times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def perfect(data: Grid) -> Model:
    return model_of(data, LookUp(data), Perfect(data))


def build(spec: Spec, **options: Any) -> Any:
    config = plugin.ContentTransferConfig(**{"lpips": (), "pairs": 3, **options})
    return plugin.build(config, spec, dict.fromkeys(NAMES, 1), NAMES)


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def values_of(data: Grid, model: Model, **options: Any) -> dict[str, Any]:
    return build(data.spec, **options).measure(model, data, quiet).values


def test_a_perfect_translator() -> None:
    data = Grid()
    found = values_of(data, perfect(data))
    assert found["mse"] == 0
    assert found["mse.ratio"] == 0
    assert found["psnr"] == pytest.approx(100)
    assert found["ssim"] == pytest.approx(1, abs=1e-6)
    assert all(found[f"mse.{baseline}"] > 0.001 for baseline in plugin.BASELINES)


@pytest.mark.parametrize(("group", "baseline"), [("class", "copy_class"), ("content", "copy_content")])
def test_a_network_that_copies_is_as_good_as_copying(group: str, baseline: str) -> None:
    data = Grid()
    found = values_of(data, model_of(data, Pixels(), Copy(group, data.spec)))
    for name in ("mse", "psnr", "ssim"):
        assert found[name] == pytest.approx(found[f"{name}.{baseline}"], rel=1e-6)
    assert found["mse.ratio"] >= 1 - 1e-6


def test_baselines_against_a_plain_loop() -> None:
    data = Grid()
    rows = data.rows("held_out")
    factors = data.factors[rows.index].tolist()
    x, train = data.x[rows.index].double(), data.x[data.rows("train").index].double()
    found = values_of(data, perfect(data), pairs=300, batch=2048)
    by_class, by_content = [], []
    for a, target in zip(factors, x, strict=True):
        errors = [(target - other).square().mean().item() for other in x]
        by_class.append(np.mean([e for e, b in zip(errors, factors, strict=True) if b[0] == a[0] and b[1:] != a[1:]]))
        by_content.append(np.mean([e for e, b in zip(errors, factors, strict=True) if b[0] != a[0] and b[1:] == a[1:]]))
    assert found["mse.copy_class"] == pytest.approx(np.mean(by_class), rel=0.02)
    assert found["mse.copy_content"] == pytest.approx(np.mean(by_content), rel=0.02)
    assert found["mse.mean_image"] == pytest.approx((x - train.mean(dim=0)).square().mean().item(), rel=1e-5)


def test_what_labels_and_strangers_give_against_a_plain_loop() -> None:
    data = Grid()
    held_out, train = data.rows("held_out"), data.rows("train")
    factors, known = data.factors[held_out.index].tolist(), data.factors[train.index].tolist()
    x, own = data.x[held_out.index].double(), data.x[train.index].double()
    found = values_of(data, perfect(data), pairs=300, batch=2048)

    def error(image: Tensor, target: Tensor) -> float:
        return (image - target).square().mean().item()

    def of(view: list[int]) -> Tensor:
        return torch.stack([image for image, b in zip(own, known, strict=True) if b[1:] == view])

    view_mean = [error(of(a[1:]).mean(dim=0), target) for a, target in zip(factors, x, strict=True)]
    assert found["mse.view_mean"] == pytest.approx(np.mean(view_mean), rel=1e-4)
    assert found["mse.over_view_mean"] == 0
    class_mean, nearest = [], []
    for i, (a, target) in enumerate(zip(factors, x, strict=True)):
        others = [j for j, b in enumerate(factors) if b[0] == a[0] and j != i]
        class_mean.append(error(x[others].mean(dim=0), target))
        for j in others:
            at_source = [b[0] for b in known if b[1:] == factors[j][1:]]
            chosen = at_source[int((of(factors[j][1:]) - x[j]).square().flatten(1).sum(dim=1).argmin())]
            [shown] = [image for image, b in zip(own, known, strict=True) if b == [chosen, *a[1:]]]
            nearest.append(error(shown, target))
    assert found["mse.class_mean"] == pytest.approx(np.mean(class_mean), rel=1e-4)
    assert found["mse.nearest_train"] == pytest.approx(np.mean(nearest), rel=0.02)
    # a perfect translator shows the stranger that it is given
    assert found["mse.random_class"] == pytest.approx(found["mse.copy_content"], rel=0.03)
    assert found["mse.random_content"] == pytest.approx(found["mse.copy_class"], rel=0.03)


@pytest.mark.parametrize("group", NAMES)
def test_a_code_that_is_not_used_changes_nothing(group: str) -> None:
    data = Grid()
    found = values_of(data, model_of(data, Pixels(), Copy(group, data.spec)), pairs=40)
    unused = "random_content" if group == "class" else "random_class"
    other = "random_class" if group == "class" else "random_content"
    assert found[f"mse.{unused}"] == pytest.approx(found["mse"], rel=1e-6)
    assert found[f"mse.{other}"] != pytest.approx(found["mse"], rel=1e-3)


def test_what_the_training_images_cannot_show_is_told() -> None:
    data = Grid()
    full = data.rows

    def rows(split: str) -> Rows:
        found = full(split)
        return evolve(found, index=found.index[1:]) if split == "train" else found

    data.rows = rows  # type: ignore[method-assign]
    found = values_of(data, perfect(data))
    assert found["mse.nearest_train"] == "the training images have not every class with every content"
    assert isinstance(found["mse.view_mean"], float)


def test_psnr_is_the_mean_of_each_images_own() -> None:
    data = Grid()
    data.unit *= 0.5
    data.x = data.unit
    shifted = perfect(data)
    shifted.decoder.register_forward_hook(lambda module, args, x: x + 0.1)
    found = values_of(data, shifted)
    assert found["mse"] == pytest.approx(0.01, rel=1e-4)
    assert found["psnr"] == pytest.approx(20, rel=1e-4)


def test_images_are_compared_in_0_1_however_they_are_stored() -> None:
    plain, wide, bytes_ = Grid(), Grid(value_range=(-1.0, 1.0)), Grid(value_range=(-1.0, 1.0))
    bytes_.x = (bytes_.unit * 255).round().to(torch.uint8)
    expected = values_of(plain, model_of(plain, Pixels(), Copy("class", plain.spec)))
    for data, tolerance in ((wide, 1e-4), (bytes_, 0.01)):
        found = values_of(data, model_of(data, Pixels(), Copy("class", data.spec)))
        assert found == pytest.approx(expected, rel=tolerance)


def test_what_a_decoder_makes_outside_the_range_is_clamped() -> None:
    data = Grid()
    data.x = data.x.round()
    model = perfect(data)
    model.decoder.register_forward_hook(lambda module, args, x: 3 * x - 1)
    assert values_of(data, model)["mse"] == 0


def test_the_batch_changes_nothing() -> None:
    data = Grid()
    model = model_of(data, Pixels(), Copy("class", data.spec))
    expected = values_of(data, model, batch=1000)
    for batch in (1, 7):
        assert values_of(data, model, batch=batch) == pytest.approx(expected, rel=1e-5)


def test_images_that_are_not_finite() -> None:
    data = Grid()
    found = values_of(data, model_of(data, Pixels(), Copy("class", data.spec, plus=math.nan)))
    assert {found[name] for name in ("mse", "psnr", "ssim", "mse.ratio")} == {"the decoder's images are not finite"}
    assert found["mse.copy_class"] > 0


def test_progress_and_stopping() -> None:
    data, told = Grid(), []

    def stop(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        if what == plugin.WHAT and done > 30:
            raise Stopped(2)

    with pytest.raises(Stopped):
        build(data.spec, batch=8).measure(perfect(data), data, stop)
    assert {what for what, _, _ in told} == {"content transfer", "content transfer: encoding", "content transfer: baselines"}
    assert told[-1] == (plugin.WHAT, 32, 24 * 3)


def test_the_protocol_is_json_and_complete() -> None:
    data = Grid()
    protocol = build(data.spec, seed=4).measure(perfect(data), data, quiet).protocol
    assert json.loads(json.dumps(protocol)) == protocol
    assert protocol["pairs"] == {"targets": 24, "each": 3, "seed": 4, "batch": 128}
    assert protocol["class"] == {"factors": ["model"], "group": "class", "source": "same class, other content"}
    assert protocol["content"]["factors"] == ["azimuth", "elevation"]
    assert protocol["mean_image"] == {"split": "train", "images": 12}


# Pairs.

CLASSES, CONTENTS = (cells.numpy() for cells in torch.cartesian_prod(torch.arange(5), torch.arange(4)).T)
CELLS = [f"cell {i}" for i in range(len(CLASSES))]


def test_sources_share_what_they_should_and_nothing_else() -> None:
    of_class, of_content = plugin.draw_sources(CLASSES, CONTENTS, 50, 0, CELLS)
    assert of_class.shape == of_content.shape == (20, 50)
    assert (CLASSES[of_class] == CLASSES[:, None]).all()
    assert (CONTENTS[of_class] != CONTENTS[:, None]).all()
    assert (CONTENTS[of_content] == CONTENTS[:, None]).all()
    assert (CLASSES[of_content] != CLASSES[:, None]).all()


def test_sources_are_uniform_and_independent() -> None:
    of_class, of_content = plugin.draw_sources(CLASSES, CONTENTS, 24_000, 0, CELLS)
    together = np.unique(np.stack([of_class[7], of_content[7]]), axis=1, return_counts=True)[1]
    assert len(together) == 3 * 4
    assert together.min() > 1800  # 2000 ± 43
    assert together.max() < 2200


def test_the_seed_alone_decides() -> None:
    first, again, other = (plugin.draw_sources(CLASSES, CONTENTS, 5, seed, CELLS) for seed in (1, 1, 2))
    assert (np.stack(first) == np.stack(again)).all()
    assert (np.stack(first) != np.stack(other)).any()


def test_holes_in_the_grid() -> None:
    kept = np.flatnonzero((CLASSES + CONTENTS) % 3 != 0)
    of_class, of_content = plugin.draw_sources(CLASSES[kept], CONTENTS[kept], 20, 0, CELLS)
    assert (CLASSES[kept][of_class] == CLASSES[kept][:, None]).all()
    assert (CONTENTS[kept][of_content] != CONTENTS[kept][of_class]).all()


@pytest.mark.parametrize(("dropped", "why"), [(CLASSES == 2, "its class and other"), (CONTENTS == 1, "its content and another")])
def test_a_target_without_a_source_is_named(dropped: Any, why: str) -> None:
    lonely = 9  # class 2, content 1
    kept = np.flatnonzero(~dropped | (np.arange(20) == lonely))
    names = [CELLS[i] for i in kept]
    with pytest.raises(UserError, match=rf"held-out image \d+ \(cell 9\): no other one in the split has {why}"):
        plugin.draw_sources(CLASSES[kept], CONTENTS[kept], 2, 0, names)


def test_a_single_held_out_class_is_named_by_its_factors() -> None:
    data = Grid()
    data.factors[:, 0] = torch.where(data.factors[:, 0] == 5, 5, 0)
    with pytest.raises(UserError, match=r"\(model 5, elevation \d, azimuth \d\): no other one in the split has its content"):
        values_of(data, perfect(data))


def test_small_images_have_no_ssim_and_no_lpips() -> None:
    data = Grid(size=10)
    found = values_of(data, perfect(data), lpips=("alex", "vgg"))
    assert found["ssim"] == "images of 10 pixels are smaller than its window of 11"
    assert found["lpips_alex"] == "takes grey or RGB images of at least 31 pixels, not 3 channels of 10"
    assert found["lpips_vgg"] == "takes grey or RGB images of at least 16 pixels, not 3 channels of 10"
    assert found["mse"] == 0
    assert "ssim.copy_class" not in found


# LPIPS.


def test_lpips_as_a_value(backbone: str) -> None:
    data = Grid(size=32, channels=1)
    metric = build(data.spec, lpips=(backbone,), pairs=1)
    assert list(metric.needs()) == []
    found = metric.measure(perfect(data), data, quiet)
    name = f"lpips_{backbone}"
    assert found.values[name] == 0
    assert all(found.values[f"{name}.{baseline}"] > 0 for baseline in plugin.BASELINES)
    assert found.protocol["lpips"][name]["trunk_sha256"].startswith(image_distances.BACKBONES[backbone].trunk[-12:-4])


def test_a_damaged_trunk(
    saved_trunk: tuple[str, Path, image_distances.Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIV_DATA", str(tmp_path))
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / image_distances.BACKBONES[saved_trunk[0]].trunk
    path.write_bytes((saved_trunk[1] / "weights" / saved_trunk[2].trunk).read_bytes()[:-1])
    data = Grid(size=32)
    metric = build(data.spec, lpips=(saved_trunk[0],))
    (need,) = metric.needs()
    reason = metric.measure(perfect(data), data, quiet).values[f"lpips_{saved_trunk[0]}"]
    assert need == f"lpips_{saved_trunk[0]}: {reason}"
    assert reason.startswith(f"{path}: damaged, its sha256 ")


def test_without_weights_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIV_DATA", str(tmp_path))
    data = Grid(size=32)
    metric = build(data.spec, lpips=("alex", "vgg"))
    needs = list(metric.needs())
    found = metric.measure(perfect(data), data, quiet).values
    for need, (backbone, entry) in zip(needs, image_distances.BACKBONES.items(), strict=True):
        reason = found[f"lpips_{backbone}"]
        assert need == f"lpips_{backbone}: {reason}"
        assert str(tmp_path / "weights" / entry.trunk) in reason
        assert f"download https://download.pytorch.org/models/{entry.trunk} into {tmp_path / 'weights'}" in reason
    assert found["mse"] == 0


# What it refuses.


@pytest.mark.parametrize(
    ("spec", "translate", "told"),
    [
        (Spec((3, 16, 16), factors=FACTORS), None, "needs a network with a class and a content group"),
        (Spec((4,), kind="array", factors=FACTORS), NAMES, "needs images made of codes alone"),
        (Spec((3, 16, 16), factors=FACTORS, conditional=True, classes=6), NAMES, "no train.conditional"),
        (Spec((3, 16, 16)), NAMES, "needs 'model' and one more; factors: none"),
        (Spec((3, 16, 16), factors={"shape": 3, "scale": 2}), NAMES, "needs 'model' and one more; factors: shape, scale"),
        (Spec((3, 16, 16), factors={"model": 3}), NAMES, "needs 'model' and one more; factors: model"),
    ],
)
def test_what_it_cannot_measure_is_refused(spec: Spec, translate: tuple[str, str] | None, told: str) -> None:
    with pytest.raises(UserError, match=f"metric content_transfer: .*{told}"):
        plugin.build(plugin.ContentTransferConfig(), spec, {"class": 1, "content": 1}, translate)


def test_a_split_without_factors() -> None:
    data = Grid()
    rows = data.rows("held_out")
    data.rows = lambda split: evolve(rows, factors=None)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="empty or without factors"):
        values_of(data, perfect(data))
