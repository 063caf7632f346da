"""`siv tune`: which settings are tried, what is said of them, and that what is said is what was timed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from toys import SMALL, read

from siv_core.recipe import build
from siv_core.runs import timing, tune
from siv_core.train.stage import arithmetic

STAGED = f"""{SMALL}
[objective]
name = "soft_intro_vae"
[train]
batch = 64
[[stages]]
length = "10 steps"
objective = {{ name = "vae" }}
[[stages]]
length = "30 steps"
[[stages]]
length = "60 steps"
optim = {{ lr = 1e-4 }}
"""
CNN = STAGED.replace('name = "mlp"\nz_dim = 3\nhidden = [16]', 'name = "residual_cnn"\nz_dim = 3\nchannels = [8]')
SECONDS = {0: 0.1, 1: 0.4}  # a step, by the first stage of a kind


def tuned(known, text, tried=tune.TRIED):
    return tune.tune(read(known, text), known, torch.device("cpu"), lambda what, done, total: None, tried)


@pytest.fixture
def made_up(monkeypatch):
    """Times are products of factors: what is compared with what, and what is told of it, is what is tried."""
    factors = {"precision": 0.5, "channels_last": 1.2, "keep_graphs": 0.9, "compile": 0.8, "micro_batch": 1.5}
    asked = []

    def row(base, built, known, change, device, kinds):
        asked.append(change)
        return tune.Row(change, dict.fromkeys(kinds, math.prod(factors[key] for key in change)), 1 << 20)

    monkeypatch.setattr(timing, "seconds_per_step", lambda trainer, active: SECONDS[active.stage.number])
    monkeypatch.setattr(tune, "_row", row)
    return asked, factors


def test_all_combinations_are_tried_and_compiled_phases_on_the_best(catalogue, made_up):
    asked, _ = made_up
    found = tuned(catalogue, CNN)
    assert len(asked) == 1 + 7 + 1 + 2
    assert asked[0] == {}
    assert asked[-3] == {"micro_batch": 32}
    assert asked[-2:] == [
        {"compile": True},
        {"precision": "bf16", "compile": True},
    ]  # not with kept graphs, nor with what is slower
    assert found["lines"] == {"compile": True}
    assert found["lines_of_other_numbers"] == {"precision": "bf16", "compile": True}
    shares = [one["share"] for one in found["rows"]]
    assert shares == sorted(shares)
    assert {one["numbers"] for one in found["rows"] if "precision" in one["change"]} == {"others"}


def test_what_is_asked_for_is_tried_or_left_out_with_the_reason(catalogue, made_up):
    """A recipe that keeps graphs has no row without them to compile."""
    asked, _ = made_up
    found = tuned(catalogue, CNN.replace("batch = 64", "batch = 64\nkeep_graphs = true"), ["compile"])
    assert asked == [{}, {"keep_graphs": False, "compile": True}]
    assert found["lines"] == asked[1]


def test_what_auto_stands_for_is_not_tried_again(catalogue, made_up):
    asked, _ = made_up
    tuned(catalogue, STAGED.replace("batch = 64", 'batch = 64\nprecision = "auto"'), ["precision"])
    now = arithmetic("auto", torch.device("cpu"))
    assert asked == [{}, {"precision": "bf16" if now == "fp32" else "fp32"}]


def test_stages_of_one_kind_are_timed_once_and_weigh_by_their_steps(catalogue, made_up, monkeypatch):
    monkeypatch.setattr(
        tune, "_row", lambda base, built, known, change, device, kinds: tune.Row(change, {0: 1.0, 1: 0.5 if change else 1.0})
    )
    found = tuned(catalogue, STAGED, ["keep_graphs"])
    assert [(one["stage"], one["steps"], one["seconds"]) for one in found["stages"]] == [(1, 10, 0.1), (2, 90, 0.4)]
    assert [one["change"] for one in found["rows"]] == [{"keep_graphs": True}, {}]  # no convolution: its layout is not asked
    assert found["rows"][0]["share"] == pytest.approx((10 * 0.1 + 90 * 0.2) / (10 * 0.1 + 90 * 0.4))


def test_nothing_is_advised_where_nothing_saves_time(catalogue, made_up):
    _, factors = made_up
    factors.update(dict.fromkeys(factors, 0.98))
    factors.update(precision=1.0)
    found = tuned(catalogue, STAGED, ["precision", "keep_graphs"])
    assert (found["lines"], found["lines_of_other_numbers"]) == ({}, {})


@pytest.mark.parametrize(("text", "tried"), [(CNN, ["channels_last", "keep_graphs"]), (STAGED, ["precision", "micro_batch"])])
def test_a_share_is_the_time_with_a_change_over_that_without_it(catalogue, monkeypatch, text, tried):
    """A clock that only counts steps: seconds a step are 2 with the recipe's own settings, 3 with any other."""
    own = read(catalogue, text).train
    done = []

    def timed(trainer, active, steps):
        trainer.advance(active)
        done.append(trainer.built.recipe.train)
        return steps * (2.0 if trainer.built.recipe.train == own else 3.0)

    monkeypatch.setattr(timing, "timed", timed)
    found = tuned(catalogue, text, tried)
    for one in found["rows"]:
        assert one["share"] == pytest.approx(1.5 if one["change"] else 1.0)
        assert set(one["shares"]) == {"0", "1"}
        for key, value in one["change"].items():
            assert value != getattr(own, key)
            assert any(getattr(train, key) == value for train in done)


def test_what_cannot_be_is_left_out_with_the_reason(catalogue, monkeypatch):
    batch_norm = CNN.replace("channels = [8]", 'channels = [8]\nnorm = "batch"')
    monkeypatch.setattr(timing, "MEASURED_SECONDS", 0.01)
    found = tuned(catalogue, batch_norm, ["micro_batch"])
    [out] = found["left_out"]
    assert out["change"] == {"micro_batch": 32}
    assert "takes statistics of the whole batch" in out["reason"]
    monkeypatch.setattr(tune.compiled, "lacking", lambda device: ["no compiler"])
    assert [one["reason"] for one in tuned(catalogue, STAGED, ["compile"])["left_out"]] == ["no compiler"]
    [out] = tuned(catalogue, STAGED, ["graphs"])["left_out"]
    assert "CUDA graphs need a CUDA device" in out["reason"]
    monkeypatch.setattr(build, "build", None)
    with pytest.raises(TypeError):  # a bug is not left out
        tuned(catalogue, STAGED, ["micro_batch"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the memory of a while")
def test_memory_is_what_was_taken_meanwhile():
    before = timing.Memory.of(torch.device("cpu"))
    x = torch.ones(64 << 20, dtype=torch.uint8)
    assert 60 << 20 < before.taken() < 90 << 20
    del x
    assert 60 << 20 < before.taken() < 90 << 20  # a peak
    after = timing.Memory.of(torch.device("cpu"))
    assert after.taken() < 20 << 20


def test_the_command_shows_a_table_and_the_lines(siv, tmp_path):
    (tmp_path / "r.toml").write_text(STAGED)
    done = siv("tune", "r.toml", "--setting", "keep_graphs", "--device", "cpu", seconds=120)
    assert done.returncode == 0, done.stderr
    assert "the recipe's own" in done.stdout
    assert "keep_graphs = true" in done.stdout
    told = json.loads(siv("tune", "r.toml", "--setting", "keep_graphs", "--device", "cpu", "--json", seconds=120).stdout)
    assert [one["change"] for one in told["rows"]].count({"keep_graphs": True}) == 1
    assert all(one["share"] > 0 for one in told["rows"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.toml"]
    refused = siv("tune", "r.toml", "--setting", "colour")
    assert refused.returncode == 2
    assert "--setting colour: expected one of channels_last, keep_graphs" in refused.stderr
