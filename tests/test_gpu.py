"""What only a CUDA device can show; skipped with a count where there is none."""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def losses(run):
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()][1:]
    return [values["loss"] for line in lines for values in line["phases"].values()]


def recipe(tmp_path, **train):
    path = tmp_path / "gpu.toml"
    options = {"batch": 64, "length": "20 steps", "tick": "1 steps", "checkpoint": "10 steps", "deterministic": True, **train}
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in options.items())
    path.write_text(
        'format = 1\n[data]\nname = "digits"\n[network]\nname = "mlp"\nz_dim = 3\nhidden = [32]\n'
        f'[objective]\nname = "soft_intro_vae"\nbeta_neg = 4.0\n[train]\n{lines}\n'
    )
    return path


def test_two_runs_give_the_same_bits(tmp_path, siv):
    for name in ("a", "b"):
        done = siv("run", recipe(tmp_path), "--run-dir", tmp_path / name, "--device", "cuda")
        assert done.returncode == 0, done.stderr
    states = [json.loads((tmp_path / name / "checkpoints/step_00000020/state.json").read_text())["files"] for name in ("a", "b")]
    assert states[0] == states[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_phases_give_the_same_bits(tmp_path, siv, precision):
    for name, more in (("plain", {}), ("graphs", {"graphs": True})):
        done = siv("run", recipe(tmp_path, precision=precision, **more), "--run-dir", tmp_path / name, "--device", "cuda")
        assert done.returncode == 0, done.stderr
    states = [tmp_path / name / "checkpoints/step_00000020" for name in ("plain", "graphs")]
    for ours in states[1].glob("*.safetensors"):
        assert ours.read_bytes() == (states[0] / ours.name).read_bytes(), ours.name


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precisions_stay_close_to_fp32(tmp_path, siv, precision):
    for name in ("fp32", precision):
        done = siv("run", recipe(tmp_path, precision=name), "--run-dir", tmp_path / name, "--device", "cuda")
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / precision) == pytest.approx(losses(tmp_path / "fp32"), rel=0.05)


@pytest.mark.parametrize("affine", [True, False])
def test_shared_norm_is_that_of_the_cpu(monkeypatch, affine):
    from siv_core.train import parallel

    monkeypatch.setattr(parallel.dist, "all_reduce", lambda x: None)
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(4, affine=affine))
    parallel.share_statistics(norm)
    torch.manual_seed(0)
    x, weight = torch.randn(8, 4, 5, 5), torch.randn(8, 4, 5, 5)
    found = []
    for device in ("cpu", "cuda"):
        mine = x.to(device).requires_grad_()
        y = norm.to(device)(mine)
        found.append([y, *torch.autograd.grad(y, [mine, *norm.parameters()], weight.to(device))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4)
