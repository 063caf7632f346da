"""`latent_probes` on codes that are made by hand: the encoder passes on the numbers of an array data set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from siv_plugins import latent_probes as plugin
from torch import Tensor, nn

from siv_core import Model, Rows, Spec, UserError
from siv_core.nets import Priors

FACTORS = {"model": 4, "elevation": 2, "azimuth": 3}
CELLS = torch.cartesian_prod(*(torch.arange(n) for n in FACTORS.values()))
TWO = ("class", "content")


class Table:
    """Codes of all groups side by side, behind training rows: those that are given, or some that must not be looked at."""

    def __init__(
        self,
        codes: Mapping[str, Tensor],
        factors: Tensor = CELLS,
        names: Mapping[str, int] = FACTORS,
        train: tuple[Mapping[str, Tensor], Tensor] | None = None,
    ) -> None:
        both = torch.cat([code.float() for code in codes.values()], dim=1)
        self.groups = {group: code.shape[1] for group, code in codes.items()}
        self.spec = Spec((both.shape[1],), kind="array", factors=names)
        before = both.new_full((3, both.shape[1]), torch.nan), factors.new_zeros(3, factors.shape[1])
        if train:
            before = torch.cat([code.float() for code in train[0].values()], dim=1), train[1]
        self.x = torch.cat([before[0], both])
        self.factors: Tensor | None = torch.cat([before[1], factors])
        self.labels: Tensor | None = None
        self.first = len(before[0])

    def rows(self, split: str) -> Rows:
        index = torch.arange(self.first, len(self.x)) if split == "held_out" else torch.arange(self.first)
        return Rows(self.x, self.labels, self.factors, index)

    def missing(self) -> None:
        return None

    def prepare(self, progress: Any) -> None:
        pass

    def fingerprint(self) -> str:
        return "table"


class Slices(nn.Module):
    def __init__(self, groups: dict[str, int]) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        if labels is not None:
            x = x + labels[:, None]
        parts = zip(self.groups, (10 * x).split(list(self.groups.values()), dim=1), strict=True)
        return {group: (mu, torch.full_like(mu, 9.0)) for group, mu in parts}


def measure(data: Table, translate: tuple[str, str] | None = None, **options: Any) -> Any:
    options.setdefault("trained", ())
    metric = plugin.build(plugin.LatentProbesConfig(**options), data.spec, data.groups, translate)
    assert list(metric.needs()) == []
    told: list[tuple[int, int]] = []
    encoder, decoder = Slices(data.groups), nn.Identity()
    model = Model(encoder, decoder, Priors({}), data.spec, data.groups, translate, torch.device("cpu"))
    found = metric.measure(model, data, lambda what, done, total: told.append((done, total)))
    assert told
    assert all(0 <= done <= total for done, total in told)
    return found


def one_hot(*columns: int) -> Tensor:
    """Codes that hold these factors and nothing else."""
    sizes = list(FACTORS.values())
    return torch.cat([nn.functional.one_hot(CELLS[:, column], sizes[column]) for column in columns], dim=1)


def naive(codes: list[list[float]], values: list[int], kin: list[int], k: int) -> float:
    right = 0
    for i, code in enumerate(codes):
        others = [j for j in range(len(codes)) if j != i and kin[j] != kin[i]]
        others.sort(key=lambda j: (sum((p - q) ** 2 for p, q in zip(code, codes[j], strict=True)), j))
        near = [values[j] for j in others[:k]]
        most = max(Counter(near).values())
        right += next(value for value in near if near.count(value) == most) == values[i]
    return right / len(codes)


def test_a_code_that_is_the_factor() -> None:
    found = measure(Table({"class": one_hot(0), "content": one_hot(1, 2)}), TWO, k=3).values
    own = ("class.model", "content.pose", "content.elevation", "content.azimuth")
    assert [found[f"knn.{name}"] for name in own] == [1, 1, 1, 1]
    assert found["chance.model"] == 1 / 4
    assert found["chance.elevation"] == 1 / 2
    assert found["chance.pose"] == pytest.approx(1 / 6)
    # a code without the factor is at chance, not below it
    assert found["knn.content.model"] == 1 / 4
    assert found["knn.class.pose"] == pytest.approx(1 / 6)


def test_a_code_that_holds_everything_is_seen_to() -> None:
    """Each model has one image of a pose: neighbours of the same model could never share it."""
    found = measure(Table({"class": one_hot(0, 1, 2), "content": one_hot(1, 2)}), TWO, k=3).values
    assert {found[f"knn.class.{name}"] for name in (*FACTORS, "pose")} == {1}


# What is held out below: 20 other models of 4 elevations and 6 azimuths; the training images are of 40 models.
SIZES = {"model": 60, "elevation": 4, "azimuth": 6}
ALL = torch.cartesian_prod(*(torch.arange(n) for n in SIZES.values()))
TRAIN, HELD_OUT = ALL[ALL[:, 0] < 40], ALL[ALL[:, 0] >= 40]


def made(cells: Tensor, holds: tuple[int, ...], seed: int, noise: float = 0.05) -> Tensor:
    """Codes of images that hold these factors (0: model) in a rotated way, and noise."""
    generator = torch.Generator().manual_seed(0)  # of the directions, the same in both splits
    directions = [torch.randn(size, 24, generator=generator) for size in SIZES.values()]
    code = noise * torch.randn(len(cells), 24, generator=torch.Generator().manual_seed(seed))
    return code + sum((directions[i][cells[:, i]] for i in holds), torch.zeros(len(cells), 24))


def table(**holds: tuple[int, ...]) -> Table:
    held_out = {group: made(HELD_OUT, which, 1) for group, which in holds.items()}
    train = {group: made(TRAIN, which, 2) for group, which in holds.items()}
    return Table(held_out, HELD_OUT, SIZES, (train, TRAIN))


PROBES = ("knn", "linear", "mlp")


def test_what_a_code_holds_every_probe_reads() -> None:
    found = measure(table(z=(0, 1, 2)), trained=("linear", "mlp")).values
    for probe in PROBES:
        for name in (*SIZES, "pose"):
            assert found[f"{probe}.z.{name}"] > 0.9, (probe, name, found)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_code_does_not_hold_no_probe_reads(seed: int) -> None:
    """At chance within three standard errors: of a share p of n images, √(p (1 − p) / n)."""
    found = measure(table(z=()), trained=("linear", "mlp"), seed=seed).values
    for probe in PROBES:
        for name in (*SIZES, "pose"):
            level = found[f"chance.{name}"]
            n = len(HELD_OUT) / (2 if name == "model" and probe != "knn" else 1)
            assert abs(found[f"{probe}.z.{name}"] - level) < 3 * (level * (1 - level) / n) ** 0.5, (probe, name, found)


def test_each_code_is_told_from_the_other() -> None:
    found = measure(table(**{"class": (0,), "content": (1, 2)}), TWO, trained=("linear", "mlp")).values
    for probe in PROBES:
        for name in (*SIZES, "pose"):
            own, other = ("class", "content") if name == "model" else ("content", "class")
            level = found[f"chance.{name}"]
            assert found[f"{probe}.{own}.{name}"] > 0.9
            assert found[f"{probe}.{other}.{name}"] < level + 0.1
            ratio = found[f"above_chance_ratio.{probe}.{name}"]
            assert ratio == "the other code is at chance" or ratio > 5


def test_a_network_reads_what_neighbours_and_lines_do_not() -> None:
    """The parity of two signs, under much noise in other directions."""

    def codes(cells: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        signs = 2.0 * torch.randint(0, 2, (len(cells), 2), generator=generator) - 1
        signs[:, 1] = signs[:, 0] * (2.0 * (cells[:, 1] % 2) - 1)
        return torch.cat([signs, 3 * torch.randn(len(cells), 8, generator=generator)], dim=1)

    data = Table(
        {"z": codes(HELD_OUT, 1)},
        HELD_OUT % torch.tensor([60, 2, 6]),
        {**SIZES, "elevation": 2},
        ({"z": codes(TRAIN, 2)}, TRAIN % torch.tensor([60, 2, 6])),
    )
    found = measure(data, trained=("linear", "mlp")).values
    assert found["mlp.z.elevation"] > 0.8
    assert found["linear.z.elevation"] < 0.65
    assert found["knn.z.elevation"] < 0.65


def test_a_constant_code_is_near_chance() -> None:
    found = measure(Table({"z": torch.ones(len(CELLS), 2)}), k=1).values
    # everyone's neighbour is the first image that differs in what is not asked
    for name in FACTORS:
        assert abs(found[f"knn.z.{name}"] - found[f"chance.{name}"]) <= 1 / len(CELLS)


def test_duplicated_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(len(CELLS), 3, generator=generator)
    found = measure(Table({"z": codes.repeat(2, 1)}, CELLS.repeat(2, 1)), k=1).values
    assert found["knn.z.model"] < 1  # the copy has the same pose


def test_a_tiny_case_by_hand() -> None:
    codes = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    data = Table({"z": codes}, torch.tensor([[0], [0], [1], [1], [1]]), {"shape": 2})
    # neighbours of 0: 1 2; of 1: 0 2 (equally far, in order); of 2: 1 0; of 10: 11 2; of 11: 10 2. One vote each: the nearest
    assert measure(data, k=2).values == {"chance.shape": 3 / 5, "knn.z.shape": 4 / 5}


@pytest.mark.parametrize("k", [1, 2, 4, 5])
@pytest.mark.parametrize("batch", [1, 7, 100])
def test_against_a_plain_loop_with_many_ties(k: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(k)
    groups = {name: torch.randint(0, 3, (len(CELLS), 3), generator=generator) for name in ("a", "b", "c")}
    found = measure(Table(groups), k=k, batch=batch).values
    pose, model = (CELLS[:, 1] * 3 + CELLS[:, 2]).tolist(), CELLS[:, 0].tolist()
    for group, codes in groups.items():
        for name, values in {**dict(zip(FACTORS, CELLS.T.tolist(), strict=True)), "pose": pose}.items():
            kin = pose if name == "model" else model
            assert found[f"knn.{group}.{name}"] == naive(codes.tolist(), values, kin, k)
    assert len(found) == 4 + 3 * 4
    assert not [name for name in found if name.startswith("above_chance_ratio")]


def test_small_distances_between_large_codes() -> None:
    codes = 1000 + 0.001 * CELLS[:, :1]
    assert measure(Table({"z": codes}), k=3).values["knn.z.model"] == 1


def test_above_chance_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.6 * torch.randn(len(CELLS), 9, generator=generator)
    data = Table({"class": one_hot(0), "content": one_hot(0, 1, 2) + noise})
    found = measure(data, TWO, k=3).values
    for name, own, other in (("model", "class", "content"), ("azimuth", "content", "class")):
        above, leak = (found[f"knn.{group}.{name}"] - found[f"chance.{name}"] for group in (own, other))
        expected = above / leak if leak > 0 else "the other code is at chance"
        assert found[f"above_chance_ratio.knn.{name}"] == expected
    assert found["above_chance_ratio.knn.model"] > 1
    assert found["above_chance_ratio.knn.pose"] == "the other code is at chance"
    swapped = measure(data, ("content", "class"), k=3).values
    assert swapped["above_chance_ratio.knn.model"] == pytest.approx(1 / found["above_chance_ratio.knn.model"])


def test_chance_of_uneven_values() -> None:
    data = Table({"z": torch.arange(10)[:, None]}, torch.tensor([[0]] * 7 + [[1]] * 3), {"shape": 2})
    assert measure(data).values["chance.shape"] == 0.7


def test_no_pose_without_two_factors_beside_the_class_factor() -> None:
    assert "knn.z.pose" not in measure(Table({"z": CELLS[:, :2]}, CELLS[:, :2], {"model": 4, "azimuth": 2})).values
    assert "knn.z.pose" not in measure(Table({"z": CELLS}), class_factor="identity").values
    assert "knn.z.pose" in measure(Table({"z": CELLS}), class_factor="azimuth").values


def test_codes_that_are_not_finite() -> None:
    codes = one_hot(0).float()
    codes[5] = 3e38  # finite, as data are; what the encoder makes of it is not
    found = measure(Table({"class": codes, "content": one_hot(1, 2)}), TWO, k=3).values
    assert found["knn.class.model"] == found["above_chance_ratio.knn.model"] == "the codes are not finite"
    assert found["knn.content.pose"] == 1


def test_labels_reach_a_conditional_encoder() -> None:
    data = Table({"z": torch.zeros(len(CELLS), 1)})
    data.spec = Spec((1,), kind="array", factors=FACTORS, classes=4, conditional=True)
    data.labels = torch.cat([torch.zeros(3, dtype=torch.int64), CELLS[:, 0]])
    assert measure(data, k=3).values["knn.z.model"] == 1


def test_the_protocol_is_json_and_says_what_chance_is() -> None:
    protocol = measure(Table({"class": one_hot(0), "content": one_hot(1, 2)}), TWO, k=3).protocol
    assert json.loads(json.dumps(protocol)) == protocol
    assert protocol["chance"] == "share of the most frequent value in the split"
    assert protocol["own_code"] == {"model": "class", "all others": "content"}
    assert (protocol["images"], protocol["k"], protocol["factors"]) == (24, 3, [*FACTORS, "pose"])


def test_what_it_refuses() -> None:
    config = plugin.LatentProbesConfig()
    with pytest.raises(UserError, match="needs data with factors"):
        plugin.build(config, Spec((2,), kind="array"), {"z": 2}, None)
    with pytest.raises(UserError, match="no factor 'model'; factors: shape, scale"):
        plugin.build(config, Spec((2,), kind="array", factors={"shape": 3, "scale": 2}), {"class": 1, "content": 1}, TWO)
    with pytest.raises(UserError, match="no more than k = 24 images"):
        measure(Table({"z": CELLS}), k=24)
    without = Table({"z": CELLS})
    without.factors = None
    with pytest.raises(UserError, match="no factors"):
        measure(without)


def test_a_factor_of_the_datas_own_may_be_called_pose() -> None:
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(6))
    found = {}
    for name in ("pose", "view"):
        names = {"model": 4, name: 6}
        codes = torch.cat([nn.functional.one_hot(cells[:, 0], 4), nn.functional.one_hot(cells[:, 1], 6)], dim=1)
        values = measure(Table({"z": codes}, cells, names), k=3).values
        found[name] = values["knn.z.model"], values[f"knn.z.{name}"]
    assert found["pose"] == found["view"] == (1, 1)
