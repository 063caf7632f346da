"""`train.precision = "auto"`: bf16 where the device has instructions for it, said, kept and told where it changes."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TINY

from siv_core.runs import session, watchers
from siv_core.train.stage import arithmetic, autocast_of

CPU = torch.device("cpu")


class Listener(watchers.Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def processor(monkeypatch):
    """One of these capabilities."""

    def take(**known):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)

    return take


@pytest.mark.parametrize(
    ("known", "decided"),
    [
        ({"avx2": True}, "fp32"),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"neon": True, "bf16": True}, "bf16"),
    ],
)
def test_auto_is_what_the_processor_has_instructions_for(processor, monkeypatch, known, decided):
    processor(**known)
    assert arithmetic("auto", CPU) == decided
    assert [arithmetic(name, CPU) for name in ("fp32", "tf32", "bf16")] == ["fp32", "tf32", "bf16"]  # what was asked for
    with autocast_of("auto", CPU)():
        assert torch.is_autocast_enabled("cpu") == (decided == "bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert arithmetic("auto", CPU) == "fp32"  # without its library torch has plain loops for bf16


def test_a_torch_that_does_not_tell_is_taken_for_one_without(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert arithmetic("auto", CPU) == "fp32"


def test_a_run_says_what_it_took_and_is_that_run(processor, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)

    def run(name, precision):
        listener = Listener()
        session.run(
            tmp_path / "tiny.toml",
            run_dir=tmp_path / name,
            sets=(f"train.precision={precision}",),
            device="cpu",
            watcher=listener,
        )
        [newest] = sorted((tmp_path / name / "checkpoints").iterdir())[-1:]
        files = json.loads((newest / "state.json").read_text())["files"]
        return files, json.loads((tmp_path / name / "manifest.json").read_text())["precision"], listener.lines

    processor(avx512_bf16=True)
    auto, said, lines = run("auto", "auto")
    assert (said, auto) == ("bf16", run("bf16", "bf16")[0])
    assert "train.precision auto: bf16 on this device" in lines
    processor()
    plain, said, lines = run("auto_again", "auto")
    explicit, _, others = run("fp32", "fp32")
    assert (said, plain) == ("fp32", explicit)
    assert plain != auto
    assert "train.precision auto: fp32 on this device" in lines
    assert not any("precision" in line for line in others)


def test_going_on_where_it_is_decided_otherwise_is_told(processor, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    processor(avx512_bf16=True)
    session.run(tmp_path / "tiny.toml", run_dir=tmp_path / "run", sets=("train.precision=auto",), device="cpu")
    processor()
    listener = Listener()
    session.resume(tmp_path / "run", sets=("train.length=14 steps",), device="cpu", watcher=listener)
    assert any(line.startswith("precision bf16 before, fp32 now:") for line in listener.lines)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["precision"], manifest["history"][0]["precision"]) == ("fp32", "bf16")
