"""Checkpoints: whole or not there, damage is named, and the old ones go."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from siv_core.errors import UserError
from siv_core.store import checkpoint
from siv_core.store.checkpoint import Checkpoint
from siv_core.train.players import Player

STATE = {
    "images_seen": 640,
    "number": 1,
    "tick_images": 600,
    "stage": {"number": 0, "fade": 1.0},
    "stats": {"names": {"encoder": ["loss"]}, "samples": {"encoder": 40}},
    "offsets": {"stats": 90, "metrics": 0},
}


def tensors() -> checkpoint.Tensors:
    """Every type and shape a module may have."""
    generator = torch.Generator().manual_seed(0)
    return {
        "encoder": {
            "weight": torch.randn(3, 4, generator=generator),
            "transposed": torch.randn(3, 4, generator=generator).t(),
            "scalar": torch.tensor(3.5, dtype=torch.float64),
            "counter": torch.tensor([2**40], dtype=torch.int64),
            "half": torch.randn(5, generator=generator).to(torch.bfloat16),
            "learned": nn.Parameter(torch.randn(2, generator=generator)),
            "empty": torch.zeros(0, 3),
            "not a number": torch.tensor([float("nan"), float("inf")]),
        },
        "decoder@ema": {"weight": torch.ones(2)},
        "prior": {},
    }


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(tmp_path / "checkpoints", 10, tensors(), STATE)


def test_what_is_saved_is_loaded(saved):
    assert saved.name == "step_00000010"
    opened = Checkpoint.open(saved)
    loaded, state = opened.tensors, opened.state
    expected = tensors()
    assert {name: file.keys() for name, file in loaded.items()} == {name: file.keys() for name, file in expected.items()}
    for name, file in expected.items():
        for key, value in file.items():
            assert loaded[name][key].dtype == value.dtype
            assert torch.equal(loaded[name][key].nan_to_num(7), value.detach().nan_to_num(7)), (name, key)
    assert {key: state[key] for key in STATE} == STATE
    assert (state["format"], state["step"]) == (1, 10)


def test_a_checkpoint_is_plain_files(saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        "decoder@ema.safetensors", "encoder.safetensors", "prior.safetensors", "state.json"
    ]  # fmt: skip
    assert torch.equal(load_file(saved / "decoder@ema.safetensors")["weight"], torch.ones(2))
    assert [path.name for path in saved.parent.iterdir()] == ["step_00000010"]


def test_saved_again_it_stays_as_it_is(saved):
    before = (saved / "state.json").stat().st_mtime_ns
    assert checkpoint.save(saved.parent, 10, {}, STATE) == saved
    assert (saved / "state.json").stat().st_mtime_ns == before


def test_a_damaged_one_is_written_anew(saved):
    (saved / "encoder.safetensors").write_bytes(b"junk")
    checkpoint.save(saved.parent, 10, tensors(), STATE)
    assert checkpoint.problems(saved) == []
    assert [path.name for path in saved.parent.iterdir()] == ["step_00000010"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda p: flip(p / "encoder.safetensors"), "encoder.safetensors: damaged, its size or sha256"),
        (lambda p: (p / "encoder.safetensors").write_bytes(b""), "encoder.safetensors: damaged"),
        (lambda p: (p / "prior.safetensors").unlink(), "prior.safetensors: missing"),
        (lambda p: (p / "state.json").unlink(), "state.json: cannot be read"),
        (lambda p: (p / "state.json").write_text('{"format": 1'), "state.json: damaged, not JSON"),
        (lambda p: (p / "state.json").write_text('{"format": 2}'), "format 2 is of a newer siv, this one reads 1: update it"),
        (lambda p: (p / "state.json").write_text('{"format": 0}'), "format 0 is of an older siv, this one reads 1: use the one"),
        (lambda p: (p / "state.json").write_text("[1]"), "state.json: damaged, it does not give its format"),
        (lambda p: (p / "state.json").write_text("[" * 100_000), "state.json: damaged, not JSON"),
        (lambda p: ((p / "state.json").unlink(), os.mkfifo(p / "state.json")), "state.json: is no file"),
        (lambda p: (p / "state.json").write_text('{"format": 1}'), "state.json: damaged"),
        (lambda p: shutil.rmtree(p), "state.json: cannot be read"),
    ],
)
def test_damage_is_named(saved, harm, words):
    assert checkpoint.problems(saved) == []
    harm(saved)
    assert any(words in line for line in checkpoint.problems(saved))
    with pytest.raises(UserError, match=words):
        Checkpoint.open(saved)


def test_a_state_cannot_point_outside(saved, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    state = json.loads((saved / "state.json").read_text())
    state["files"]["../../outside.safetensors"] = {"bytes": 1, "sha256": "0"}
    (saved / "state.json").write_text(json.dumps(state))
    assert checkpoint.problems(saved) == [f"{saved / 'state.json'}: damaged, it names a file '../../outside.safetensors'"]


# -- which one -------------------------------------------------------------------------------------------------------------------


def make(folder, steps):
    for number, step in enumerate(steps, 1):
        checkpoint.save(folder, step, {"encoder": {"x": torch.zeros(1)}}, {**STATE, "number": number})


def test_paths(tmp_path):
    with pytest.raises(UserError, match="no checkpoint here yet"):
        checkpoint.path_of(tmp_path, "last")
    make(tmp_path, [5, 10, 100_000_000])
    for stranger in ("step_old", "step_²", "step_7", "step_000000007"):
        (tmp_path / stranger).mkdir()
    (tmp_path / ".siv-tmp-1-step_00000020").mkdir()
    assert checkpoint.steps(tmp_path) == [5, 10, 100_000_000]
    assert checkpoint.path_of(tmp_path, "last").name == "step_100000000"
    assert checkpoint.path_of(tmp_path, "10") == checkpoint.path_of(tmp_path, "00010") == tmp_path / "step_00000010"
    for wrong in ("11", "-5", "ten", "../x", "", "²", "9" * 5000):
        with pytest.raises(UserError, match="there are: 5, 10, 100000000 and last"):
            checkpoint.path_of(tmp_path, wrong)


@pytest.mark.parametrize(
    ("keep_every", "kept"),
    [(0, [60, 70]), (1, [10, 20, 30, 40, 50, 60, 70]), (2, [20, 40, 60, 70]), (3, [30, 60, 70]), (9, [60, 70])],
)
def test_the_two_newest_and_every_nth_stay(tmp_path, keep_every, kept):
    """Whether they are pruned at the end or after each."""
    at_once, each = tmp_path / "a", tmp_path / "b"
    make(at_once, range(10, 80, 10))
    checkpoint.prune(at_once, keep_every, 70)
    for number, step in enumerate(range(10, 80, 10), 1):
        checkpoint.save(each, step, {"encoder": {"x": torch.zeros(1)}}, {**STATE, "number": number})
        checkpoint.prune(each, keep_every, step)
    assert checkpoint.steps(at_once) == checkpoint.steps(each) == kept
    assert sorted(path.name for path in at_once.iterdir()) == [f"step_{step:08d}" for step in kept]


# -- weights and moments ---------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_weights_that_do_not_fit_are_named():
    module = network()
    wrong = dict(module.state_dict())
    wrong["3.bias"] = wrong.pop("2.bias")
    wrong["0.weight"] = torch.zeros(4, 5)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(UserError) as error:
        checkpoint.restore_module(module, wrong, "here")
    assert error.value.problems == (
        "here: tensor '0.weight' has shape [4, 5], the network needs [4, 3]",
        "here: tensor '2.bias' is missing",
        "here: tensor '3.bias' is not part of this network",
    )
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.full((4, 3), float("nan")), "here: tensor '0.weight' has values that are not finite"),
        (torch.zeros(4, 3, dtype=torch.float16), "here: tensor '0.weight' is torch.float16, the network needs torch.float32"),
    ],
)
def test_values_that_cannot_be_weights_are_named(value, words):
    module = network()
    with pytest.raises(UserError) as error:
        checkpoint.restore_module(module, {**module.state_dict(), "0.weight": value}, "here")
    assert error.value.problems == (words,)


def test_moments_of_another_network_are_named():
    """Torch would take them, and fused Adam walk beyond their end."""
    first = trained(1)
    own = checkpoint.optimiser_tensors(first.module, first.optimiser)
    moved = {key.replace("0.", "2.").replace("1.", "0."): value for key, value in own.items()}
    with pytest.raises(UserError, match=r"tensor '0.weight/exp_avg' has shape \[4\], the network needs \[4, 3\]"):
        checkpoint.restore_optimiser(first.module, first.optimiser, moved, "here")
    strange = {**own, "9.weight/exp_avg": torch.zeros(2)}
    with pytest.raises(UserError, match=r"tensor '9.weight/exp_avg' is not part of this network"):
        checkpoint.restore_optimiser(first.module, first.optimiser, strange, "here")
    del own["0.weight/step"]
    with pytest.raises(UserError, match=r"tensor '0.weight/step' is missing"):
        checkpoint.restore_optimiser(first.module, first.optimiser, own, "here")


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was run')",)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_under_our_names_is_not_read(saved, protocol):
    data = pickle.dumps(Bomb(), protocol)
    (saved / "encoder.safetensors").write_bytes(data)
    state = json.loads((saved / "state.json").read_text())
    state["files"]["encoder.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"encoder.safetensors: damaged, not safetensors"):
        Checkpoint.open(saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 11}, "step_00000010: holds the checkpoint of step 11; give the folder its own name back"),
        ({"images_seen": -1}, "state.json: damaged, 'images_seen' is missing or not what siv writes"),
        ({"tick_images": 2.5}, "state.json: damaged, 'tick_images' is missing"),
        ({"number": None}, "state.json: damaged, 'number' is missing"),
        ({"offsets": {"stats": "x"}}, "state.json: damaged, 'offsets' is missing"),
        ({"stage": {"number": 0, "fade": 1.5}}, "state.json: damaged, 'stage' is missing"),
        ({"stats": {"names": {"a": ["b"]}, "samples": {}}}, "state.json: damaged, 'stats' is missing"),
        ({"stats": {"names": {}, "samples": None}}, "state.json: damaged, 'stats' is missing"),
        ({"stage": 1}, "state.json: damaged, 'stage' is missing"),
        ({"stage": {"number": 0, "fade": float("nan")}}, "state.json: damaged, 'stage' is missing"),
        ({"files": []}, "state.json: damaged, 'files' is missing"),
        ({"files": {"encoder.safetensors": None}}, "encoder.safetensors: damaged, its size or sha256"),
        ({"files": {"a\0.safetensors": None}}, r"state.json: damaged, it names a file 'a\\x00.safetensors'"),
    ],
)
def test_a_state_that_siv_does_not_write_is_named(saved, change, words):
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, **change}))
    with pytest.raises(UserError, match=words):
        Checkpoint.open(saved)


def test_the_one_before_a_damaged_one_is_offered(tmp_path):
    make(tmp_path, [5, 10, 15])
    flip(tmp_path / "step_00000015" / "encoder.safetensors")
    flip(tmp_path / "step_00000010" / "encoder.safetensors")
    words = (
        "the checkpoint of step 5 before it is whole: --checkpoint 5 takes it, and a resume does so once step_00000015 is moved"
    )
    with pytest.raises(UserError, match=words):
        Checkpoint.open(tmp_path / "step_00000015")
    flip(tmp_path / "step_00000005" / "encoder.safetensors")
    assert checkpoint.offer(tmp_path / "step_00000015") == []


def test_what_is_damaged_beyond_the_newest_costs_no_good_one(tmp_path):
    make(tmp_path, [5, 10])
    for step in (90, 95):
        (tmp_path / f"step_{step:08d}").mkdir()
    checkpoint.prune(tmp_path, 0, 10)
    assert checkpoint.steps(tmp_path) == [5, 10, 90, 95]


def test_a_link_is_taken_away_and_not_what_it_leads_to(tmp_path):
    make(tmp_path / "mine", [5])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000005").symlink_to(tmp_path / "mine" / "step_00000005")
    make(tmp_path / "checkpoints", [10, 15])
    checkpoint.prune(tmp_path / "checkpoints", 0, 15)
    assert checkpoint.steps(tmp_path / "checkpoints") == [10, 15]
    assert checkpoint.problems(tmp_path / "mine" / "step_00000005") == []


def trained(steps: int) -> Player:
    player = Player.of("encoder", network())
    player.configure(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    go_on(player, 0, steps)
    return player


def go_on(player: Player, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = player.module(x).square().sum()
        player.step(list(torch.autograd.grad(loss, player.parameters)))


def test_weights_and_moments_come_back(tmp_path):
    whole = trained(6)
    first = trained(3)
    path = checkpoint.save(
        tmp_path, 3, {"m": first.module.state_dict(), "o": checkpoint.optimiser_tensors(first.module, first.optimiser)}, STATE
    )
    loaded = Checkpoint.open(path).tensors
    second = trained(1)  # something else in its place
    checkpoint.restore_module(second.module, loaded["m"], "here")
    checkpoint.restore_optimiser(second.module, second.optimiser, loaded["o"], "here")
    go_on(second, 3, 3)
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[key]), key
    assert loaded["o"].keys() == {
        f"{name}/{m}" for name, _ in network().named_parameters() for m in ("exp_avg", "exp_avg_sq", "step")
    }


def test_weights_and_moments_come_back_in_the_layout_of_the_network(tmp_path):
    """Fused Adam walks parameter, gradient and moments side by side in memory."""

    def player():
        return Player.of("net", nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last))

    first, second = player(), player()
    first.step([torch.randn_like(parameter) for parameter in first.parameters])
    moments = checkpoint.optimiser_tensors(first.module, first.optimiser)
    path = checkpoint.save(tmp_path, 1, {"m": first.module.state_dict(), "o": moments}, STATE)
    loaded = Checkpoint.open(path).tensors
    checkpoint.restore_module(second.module, loaded["m"], "here")
    checkpoint.restore_optimiser(second.module, second.optimiser, loaded["o"], "here")
    expected = {**first.module.state_dict(), **moments}
    found = {**second.module.state_dict(), **checkpoint.optimiser_tensors(second.module, second.optimiser)}
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
        assert found[key].stride() == value.stride(), key
    assert found["weight/exp_avg"].is_contiguous(memory_format=torch.channels_last)


def test_a_player_without_parameters_has_no_moments():
    fixed = Player.of("prior", nn.Identity())
    assert checkpoint.optimiser_tensors(fixed.module, fixed.optimiser) == {}
    checkpoint.restore_optimiser(fixed.module, fixed.optimiser, {}, "here")
