"""`train.compile`: phases through torch.compile, equal to rounding, resumed like any other run; and what cannot be compiled."""

from __future__ import annotations

import pytest
import torch
import toys
from attrs import evolve
from toys import SMALL

from siv_core.errors import UserError
from siv_core.protocols import Phase
from siv_core.runs import opened
from siv_core.train import stage

COMPILED = f"""{SMALL}
[objective]
name = "vae"
[train]
batch = 16
length = "8 steps"
compile = true
checkpoint = "4 steps"
tick = "4 steps"
"""


def test_a_compiled_phase_leaves_no_graph(catalogue, tmp_path):
    both = {"batch": 4, "length": "1 steps", "compile": True, "keep_graphs": True}
    with pytest.raises(UserError, match=r"train\.compile: a compiled phase leaves no graph .*: set train\.keep_graphs to false"):
        toys.trainer(catalogue, tmp_path, toys.tree(train=both)).run()


def test_without_a_compiler_nothing_is_made(siv, tmp_path):
    (tmp_path / "c.toml").write_text(COMPILED)
    ended = siv("run", "c.toml", "--run-dir", "run", "--device", "cpu", env={"CXX": "/nonexistent/g++"})
    assert ended.returncode == 2
    assert "train.compile: takes a C++ compiler on a CPU and finds none: install g++" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_one_program_is_told_by_phase(catalogue, tmp_path):
    t = toys.trainer(catalogue, tmp_path, toys.tree(train={"batch": 4, "length": "1 steps", "compile": True}))

    def loss(nets, batch, noise, coeffs, carry):
        value = nets.encoder(batch.x)["z"].mu.square().sum(dim=1)
        if value.sum().item() > 0:  # reads a number back
            value = 2 * value
        return value.mean(), {"value": value}, carry

    active = stage.enter(t, 0)
    t.active = evolve(active, objective=evolve(active.objective, phases=(Phase("reading", ("encoder",), loss),)))
    with pytest.raises(UserError, match=r"train\.compile: phase 'reading' cannot be compiled \(.*\): leave train\.compile out"):
        t.advance(t.active)


@pytest.mark.slow  # three programs are compiled
def test_a_compiled_run_equals_the_run_as_it_is_and_goes_on_where_it_stopped(siv, tmp_path):
    (tmp_path / "c.toml").write_text(COMPILED)
    for name, more in (("whole", ()), ("parts", ("train.length='4 steps'",)), ("eager", ("train.compile=false",)), ("parts", ())):
        sets = [part for one in more for part in ("--set", one)]
        # a new interpreter: a forked one races with itself for torch's pool of threads once programs are compiled
        ended = siv("run", "c.toml", "--run-dir", name, "--device", "cpu", *sets, seconds=300, fresh=True)
        assert ended.returncode == 0, ended.stderr
    assert "waits for the compiler" in ended.stdout
    models = [opened.load(tmp_path / name, device="cpu") for name in ("whole", "parts", "eager")]
    whole, parts, eager = ([*model.encoder.parameters(), *model.decoder.parameters()] for model in models)
    assert all(map(torch.equal, parts, whole))
    torch.testing.assert_close(whole, eager, rtol=1e-4, atol=1e-5)
