"""Sweeps: what a file means and what is wrong with it, names, the table against naive arithmetic, pictures, real processes."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import string
import subprocess
import sys
import time
import tomllib
from itertools import pairwise
from pathlib import Path

import forked
import numpy as np
import pytest
from attrs import evolve
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toys import SMALL

from siv_core.errors import UserError
from siv_core.recipe import recipe
from siv_core.store.rundir import RunDir, busy
from siv_core.sweep import jobs as sweep_jobs
from siv_core.sweep import names as sweep_names
from siv_core.sweep import pictures as sweep_pictures
from siv_core.sweep import sweep
from siv_core.sweep import table as sweep_table
from siv_core.sweep.table import Outcome

STAGED = '[objective]\nname = "vae"\n[[stages]]\nlength = "2 steps"\noptim = { lr = 1e-3 }\n'
SHIPPED = sorted((Path(__file__).resolve().parent.parent / "recipes/sweeps").glob("*.toml"))
HEAD = 'format = 1\nrecipe = "tiny.toml"\n'
PRODUCT = (
    HEAD
    + """
seeds = [3, 4]
sets = ["train.batch=32"]
[grid]
objective.beta_neg = [1.0, 2.0]
"network.hidden" = [[8], [8, 8]]
[[trials]]
label = "soft"
optim.lr = 0.1
[[trials]]
label = "β-VAE"
objective = { name = "vae", beta_kl = 0.5 }
[trials.grid]
network.z_dim = [2]
"""
).replace("objective.beta_neg", "train.clip_gradient")


@pytest.fixture
def read(tmp_path):
    """`read(text)`: a sweep beside the tiny recipe."""
    (tmp_path / "tiny.toml").write_text(TINY)

    def load(text: str, sets=()) -> sweep.Sweep:
        path = tmp_path / "swept.toml"
        path.write_text(text)
        return sweep.load(path, sets)

    return load


def problems(call) -> list[str]:
    with pytest.raises(UserError) as error:
        call()
    return list(error.value.problems)


# -- what a file means -----------------------------------------------------------------------------------------------------------


def test_trials_are_a_product_in_order(read):
    names = [trial.name for trial in read(PRODUCT).trials]
    rest = [
        f"clip_gradient={c}_hidden={h}{z}_seed={s}"
        for z in ("", "_z_dim=2")
        for c in ("1.0", "2.0")
        for h in ("8", "8-8")
        for s in (3, 4)
    ]
    assert names == [f"soft_{one}" for one in rest[:8]] + [f"-VAE_{one}".lstrip("-") for one in rest[8:]]


def test_a_trial_is_the_recipe_with_its_overrides(read, catalogue):
    """The same as a run that is told all of it by hand; a table whose name changes is replaced whole."""
    swept = read(PRODUCT, sets=("train.tick=5 steps",))
    found = sweep.resolve(swept, catalogue, cpu_only=False)
    trial = swept.trials[-1]
    by_hand = ("train.batch=32", 'objective={name="vae", beta_kl=0.5}', "train.clip_gradient=2.0", "network.hidden=[8, 8]",
               "network.z_dim=2", "train.seed=4", "train.tick=5 steps")  # fmt: skip
    expected = recipe.load(trial.recipe, catalogue, (), by_hand)
    assert found[trial.name].resolved() == expected.resolved()
    assert found[trial.name].stages[0].objective.name == "vae"
    assert found[swept.trials[0].name].stages[0].optim[""].lr == 0.1


def test_a_trial_may_have_its_own_recipe_and_profiles(read, catalogue, tmp_path):
    (tmp_path / "other.toml").write_text(TINY + "[profiles.p.train]\nbatch = 16\n[profiles.q.train]\nbatch = 8\n")
    text = 'format = 1\nrecipe = "other.toml"\nprofiles = ["p"]\n'
    text += '[[trials]]\nlabel = "a"\n[[trials]]\nlabel = "b"\nprofiles = ["q"]\n'
    text += '[[trials]]\nlabel = "c"\nrecipe = "tiny.toml"\nprofiles = []\n'
    found = sweep.resolve(read(text), catalogue, cpu_only=False)
    assert {name: (one.name, one.train.batch) for name, one in found.items()} == {
        "a": ("other", 16),
        "b": ("other", 8),
        "c": ("tiny", 64),
    }


TIED = (
    HEAD
    + """
seeds = [0]
[[trials]]
label = "soft"
stages = [{ length = "1 steps", objective = { name = "vae", beta_kl = { same = "objective.beta_kl" } } }, { length = "2 steps" }]
train.micro_batch = { same = "train.batch" }
train.batch = 8
[trials.grid]
"objective.beta_kl" = [0.1, 0.3]
"objective.beta_neg" = { times = "objective.beta_kl", values = [1, 3] }
"""
)


def test_values_may_follow_others(read, catalogue):
    """`same` anywhere in a trial's tables, `times` in a grid: the same as a file that writes every value out."""
    made = read(TIED)
    assert [trial.name for trial in made.trials] == [
        "soft_beta_kl=0.1_beta_neg=0.1_seed=0",
        "soft_beta_kl=0.1_beta_neg=0.3_seed=0",  # 3 × 0.1 is 0.30000000000000004 to a computer
        "soft_beta_kl=0.3_beta_neg=0.3_seed=0",
        "soft_beta_kl=0.3_beta_neg=0.9_seed=0",
    ]
    found = sweep.resolve(made, catalogue, cpu_only=False)
    for trial in made.trials:
        beta_kl, beta_neg = trial.value("objective.beta_kl"), trial.value("objective.beta_neg")
        first = f'{{ length = "1 steps", objective = {{ name = "vae", beta_kl = {beta_kl} }} }}'
        by_hand = (f'stages=[{first}, {{ length = "2 steps" }}]', "train={micro_batch = 8, batch = 8}",
                   f"objective.beta_kl={beta_kl}", f"objective.beta_neg={beta_neg}", "train.seed=0")  # fmt: skip
        assert found[trial.name].resolved() == recipe.load(trial.recipe, catalogue, (), by_hand).resolved()
        assert trial.value("train.micro_batch") == 8


def test_seeds_alone_and_a_grid_alone(read):
    assert [(one.name, one.seed, one.sets) for one in read(HEAD + "seeds = [7]").trials] == [("seed=7", 7, ("train.seed=7",))]
    [first, _] = read(HEAD + "[grid]\ntrain.batch = [1, 2]").trials
    assert (first.name, first.seed, first.value("train.batch"), first.title()) == ("batch=1", None, 1, "batch 1")


def test_rows_are_labels_and_grid_keys_unless_told(read):
    assert read(PRODUCT).group_by == ("label", "train.clip_gradient", "network.hidden", "network.z_dim")
    assert read(HEAD + "seeds = [0]").group_by == ()
    assert read(PRODUCT + '[table]\ngroup_by = ["recipe", "optim.lr"]').group_by == ("recipe", "optim.lr")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_are_read_and_their_trials_are_recipes(path, catalogue):
    numbers = {
        "table2": 12 * 5,
        "table2_search": 81 + 210 + 1260,
        "margin": (7 + 1) * 5,
        "collapse": 2,
        "variants": 15,
        "introvae": 20,
        "introvae_search": 2 * 4 + 3 * 4 + 3 + 3 + 1,
        "schedule": 6 + 3 * 2,
        "mnist": 12,
        "table7": 24,
        "learned_priors_2d": 4 * 5 * 2,
        "learned_priors_images": 3 * 5 * 3,
        "prior_regularisers": 2 * (1 + 2 + 4) * 3,
    }
    made = sweep.load(path)
    found = sweep.resolve(made, catalogue, cpu_only=False)
    assert len(found) == len(made.trials) == numbers[path.stem]
    for read in found.values():
        betas = {(plan.objective.config.beta_rec, str(plan.objective.config.beta_kl)) for plan in read.stages}
        assert len(betas) == 1, "stages have the same betas"


TABLE_5 = {  # beta_rec, beta_kl of the VAE; beta_rec, beta_kl, beta_neg, m of IntroVAE
    "8gaussians": ((0.8, 0.05), (0.3, 0.5, 0.5, 2.5)),  # Table 5 has beta_neg = m = 1, which misses the cell
    "spiral": ((1.0, 0.05), (0.2, 0.5, 0.5, 4.0)),  # m = 2 misses it in JSD
    "checkerboard": ((0.8, 0.1), (0.4, 0.2, 0.2, 8.0)),
    "rings": ((0.8, 0.05), (0.8, 0.5, 0.5, 5.0)),
}


def test_table_2_has_the_values_of_table_5_but_for_two_cells(catalogue):
    [path] = [path for path in SHIPPED if path.stem == "table2"]
    found = sweep.resolve(sweep.load(path), catalogue, cpu_only=False)
    seen = []
    for read in found.values():
        vae, intro = TABLE_5[read.data.config.set]
        plan = read.stages[-1]
        config = plan.objective.config
        if plan.objective.name == "vae":
            assert (config.beta_rec, config.beta_kl) == vae
        elif plan.objective.name == "intro_vae":
            assert (config.beta_rec, config.beta_kl, config.beta_neg, config.margin) == intro
            assert (config.preset, config.hinge, config.fakes, config.scale) == ("table2", "", (), 1.0)
            assert config.decoder_weight == ("beta_kl" if read.data.config.set == "8gaussians" else "")
        assert [plan.optim[""].lr for plan in read.stages][-3:] == [2e-4, 2e-5, 2e-6]
        seen.append((read.data.config.set, plan.objective.name, read.train.seed))
    assert len(set(seen)) == 4 * 3 * 5


# -- what is wrong with a file ---------------------------------------------------------------------------------------------------

WRONG = {
    "[grid": ["not TOML"],
    "recipe = 1": ["format: this siv reads sweeps with `format = 1`, got None"],
    HEAD: ["nothing varies: give seeds, a [grid] or [[trials]]"],
    "format = 1\nseeds = [1]": ["recipe: missing"],
    HEAD + "seed = [1]\n[grid]\ntrain.batch = 3": ["seed: unknown key; did you mean 'seeds'?", "grid.train.batch: expected"],
    HEAD + "seeds = [1, 1]": ["seeds: one is there twice"],
    HEAD + "seeds = [true]": ["seeds[0]: expected a whole number, got true"],
    HEAD + "trials = 3\npictures = [3]": ["trials: expected a list of tables, got 3", "pictures: expected a list of tab"],
    HEAD + 'seeds = [1]\nsets = ["batch"]': ["sets: 'batch': expected KEY=VALUE"],
    HEAD + "[grid]\ntrain.batch = []": ["grid.train.batch: expected a list of values, got []"],
    HEAD + "[grid]\ntrain.batch = [1, 1]": ["grid.train.batch: a value is there twice"],
    HEAD + '[grid]\ntrain.batch = {times = "optim.lr", values = [1]}': [
        "grid.train.batch: multiples of 'optim.lr', of which the trial sets no numbers"
    ],
    HEAD + '[grid]\noptim.lr = [1.0]\ntrain.batch = {times = "optim.l", values = [1]}': ["did you mean 'optim.lr'?"],
    HEAD + '[grid]\ntrain.batch = {times = "optim.lr", values = [0]}': ["grid.train.batch: expected { times = "],
    HEAD + '[grid]\noptim.lr = [1.0]\ntrain.batch = {times = "optim.lr", values = [2, 2]}': ["batch: a value is there twice"],
    HEAD + '[[trials]]\nlabel = "a"\ntrain.batch = 8\ntrain.micro_batch = {same = "train.bach"}': [
        "trials[0].train.micro_batch: the same as 'train.bach', which the trial does not set; did you mean 'train.batch'?"
    ],
    HEAD + "[grid]\noptim.lr = [inf]": ["grid.optim.lr: holds a value that no recipe takes"],
    HEAD + "seeds = [1]\n[grid]\ntrain.seed = [1]": ["train.seed is varied and set: say it in one place"],
    HEAD + "[[trials]]\noptim.lr = 1.0": ['trials[0].label: missing, such as label = "IntroVAE"'],
    HEAD + '[[trials]]\nlabel = "a"\n[[trials]]\nlabel = "a"': ["trials: 'a' is the label of two"],
    HEAD + '[[trials]]\nlabel = "a b"\n[[trials]]\nlabel = "A,B"': ["trials 'a b' and 'A,B' would share the folder A-B"],
    HEAD + '[grid]\ndata.name = ["a b", "a,b"]': ["trials 'name a b' and 'name a,b' would share the folder name=a-b"],
    HEAD + '[[trials]]\nlabel = "Logs"': ["trial 'Logs': Logs in a sweep's folder is siv's own: rename it"],
    HEAD + '[grid]\nobjective = [{name = "vae"}]\n[[trials]]\nlabel = "a"\nobjective.beta_kl = 1.0': [
        "trials[0]: objective is varied and set"
    ],
    HEAD + '[[trials]]\nlabel = "a"\nrecipe = 3\nprofiles = "x"': ["trials[0].recipe: expected", "trials[0].profiles: expected"],
    HEAD + '[[trials]]\nlabel = "a"\ntrain.seed = 1979-05-27': ["trials[0].train.seed: datetime.date(1979, 5, 27) is no value"],
    HEAD + '[[trials]]\nlabel = "a"\ntrain.batch = 1\ngrid = {"train.batch" = [1]}': ["trials[0]: train.batch is varied and set"],
    HEAD + 'seeds = [1]\n[[trials]]\nlabel = "a"\ntrain.seed = 1': ["trials[0]: train.seed is set although the sweep has seeds"],
    HEAD + "seeds = [1]\n[table]\nmetric = []": ["table.metric: unknown key; did you mean 'metrics'?"],
    HEAD + '[grid]\ntrain.batch = [1]\n[table]\ngroup_by = ["train.bach"]': [
        "table.group_by: no trial sets 'train.bach'; did you mean 'train.batch'?"
    ],
    HEAD + 'seeds = [1]\n[[pictures]]\nkind = "lines"': ["pictures[0].kind: must be one of", "pictures[0].name: missing"],
    HEAD + 'seeds = [1]\n[[pictures]]\nkind = "line"\nname = "../x"\ncolumns = 2': [
        "pictures[0].x: missing, a picture of kind 'line' needs it",
        "pictures[0].y: missing",
        "pictures[0].columns: a picture of kind 'line' does not take it",
        "pictures[0].name: '../x' is no file name",
    ],
    HEAD + 'seeds = [1]\n[[pictures]]\nkind = "samples"\nname = "x"\ntrials = ["b"]\n[[pictures]]\nkind = "samples"\nname = "x"\n'
    + '[[trials]]\nlabel = "a"': ["pictures[1].name: another picture is called 'x'"],
    HEAD + 'seeds = [1]\n[[pictures]]\nkind = "samples"\nname = "x"\ntrials = ["a"]\n[[trials]]\nlabel = "ab"': [
        "pictures[0].trials: no trial has the label 'a'; did you mean 'ab'?"
    ],
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_told_at_once(read, text):
    found = problems(lambda: read(text))
    assert len(found) == len(WRONG[text]), found
    for words in WRONG[text]:
        assert any(words in line for line in found), (words, found)


def test_a_setting_from_outside_may_not_undo_what_varies(read):
    for text, key in (
        ("train.seed=7", "train.seed"),
        ("train = {clip_gradient = 3.0}", "train.seed"),
        ("network={name='mlp'}", "network.hidden"),
        ("optim.lr=1", "optim.lr"),
    ):
        found = problems(lambda text=text: read(PRODUCT, (text,)))
        assert any(f"--set {text}: the sweep itself sets {key}, and" in line for line in found), found
    assert read(PRODUCT, ("train.length='3 steps'",)).trials[0].sets[-1] == "train.length='3 steps'"


def test_rows_may_be_seeds(read):
    made = read(HEAD + 'seeds = [4, 5]\n[table]\ngroup_by = ["train.seed"]')
    assert [one.value("train.seed") for one in made.trials] == [4, 5]


def test_some_trials_alone(read):
    made = read(HEAD + "seeds = [0, 1]\n[grid]\ntrain.batch = [1, 2]")
    assert sweep.chosen(made, []) == {trial.name for trial in made.trials}
    assert sweep.chosen(made, ["*_seed=1", "batch=1_seed=0"]) == {"batch=1_seed=0", "batch=1_seed=1", "batch=2_seed=1"}
    with pytest.raises(UserError, match=r"--only batch=1_seed=2: no trial has such a name; did you mean 'batch=1_.*--dry-run"):
        sweep.chosen(made, ["batch=1_seed=2"])


def test_a_recipe_is_no_sweep(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    assert "is a recipe, no sweep: `siv run" in problems(lambda: sweep.load(tmp_path / "tiny.toml"))[0]
    assert "cannot be read" in problems(lambda: sweep.load(tmp_path / "none.toml"))[0]


def test_every_trial_is_checked_and_each_problem_told_once(read, catalogue):
    text = HEAD + "seeds = [0, 1]\n[grid]\nobjective.beta_kll = [1.0]\n"
    text += '[[trials]]\nlabel = "a"\noptim.lr = -1.0\n[[trials]]\nlabel = "b"\n'
    found = problems(lambda: sweep.resolve(read(text), catalogue, cpu_only=False))
    assert len(found) == 2
    assert "--set objective.beta_kll=1.0: objective.beta_kll: unknown key; did you mean 'beta_kl'? (in all 4 trials)" in found[0]
    assert "optim.lr: must be > 0, got -1.0 (in a_beta_kll=1.0_seed=0, a_beta_kll=1.0_seed=1)" in found[1]


def test_metrics_that_no_trial_has(read, catalogue):
    text = HEAD + 'seeds = [0]\n[table]\nmetrics = ["latent_probe.z"]\nbest = "e.f"\n'
    text += '[[pictures]]\nkind = "line"\nname = "x"\nx = "label"\ny = ["b.c"]\n'
    found = problems(lambda: sweep.resolve(read(text), catalogue, cpu_only=False))
    assert "table.metrics: 'latent_probe.z': no trial has a metric 'latent_probe'; did you mean 'latent_probes'?" in found[0]
    assert "table.best: 'e.f': no trial has a metric 'e'" in found[1]
    assert "pictures[0].y: 'b.c': no trial has a metric 'b'" in found[2]


def test_what_only_shows_when_it_is_built_is_told_before_the_first_trial(read, catalogue):
    swept = read(HEAD + 'seeds = [0, 1]\n[[trials]]\nlabel = "a"\nobjective.beta_neg = { zz = 1.0 }\n[[trials]]\nlabel = "b"\n')
    recipes = sweep.resolve(swept, catalogue, cpu_only=False)
    [line] = problems(lambda: sweep_jobs.prepare(swept, recipes, catalogue, Silent()))
    assert "the groups are z, got zz (in a_seed=0, a_seed=1)" in line


def test_steps_of_trials(read, catalogue):
    swept = read(HEAD + 'seeds = [0, 1]\n[[trials]]\nlabel = "a"\n[[trials]]\nlabel = "b"\ntrain.length = "3 epochs"\n')
    found = sweep_jobs.prepare(swept, sweep.resolve(swept, catalogue, cpu_only=False), catalogue, Silent())
    steps = {name: made.steps for name, made in found.items()}
    assert steps == {"a_seed=0": 12, "a_seed=1": 12, "b_seed=0": 66, "b_seed=1": 66}  # 3 × 1,400 / 64, rounded up


def test_steps_of_all_trials_are_theirs_and_the_last_waits_for_the_end(tmp_path):
    """A trial that is at its last step still has metrics and pictures to make."""
    seen = []

    class Watched(Silent):
        def progress(self, what: str, done: int, total: int) -> None:
            seen.append((done, total))

    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    (run.path / "stats.jsonl").write_text('{"step": 12}\n')
    job = sweep_jobs.Job("one", ("--help",), run, tmp_path / "log.txt", steps=12)
    assert sweep_jobs.Crew(Watched(), limit=1).work([sweep_jobs.Bundle((job,))], until=None)
    assert set(seen[:-1]) == {(11, 12)}
    assert seen[-1] == (12, 12)


class Silent:
    """A board nobody looks at."""

    at_end = None

    def say(self, line: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def beside(self, what: str, done: int, total: int) -> None: ...
    def over(self, what: str) -> None: ...


# -- names and values ------------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_values_come_back_from_the_command_line(value):
    assert tomllib.loads(f"value = {sweep_names.toml(value)}") == {"value": value}


@given(st.text(max_size=300))
def test_folder_names_are_safe(text):
    name = sweep_names.folder_name(text)
    assert 0 < len(name) <= sweep_names.LONGEST_NAME
    assert set(name) <= set(string.ascii_letters + string.digits + "._=+-")
    assert name[0] not in ".-"


def test_long_names_stay_apart():
    assert sweep_names.folder_name("x" * 200 + "a") != sweep_names.folder_name("x" * 200 + "b")


def test_keys_are_short_where_that_is_clear():
    assert sweep_names.short_names(["a.lr", "b.beta"]) == {"a.lr": "lr", "b.beta": "beta"}
    assert sweep_names.short_names(["a.lr", "b.lr"]) == {"a.lr": "a.lr", "b.lr": "b.lr"}


# -- the table -------------------------------------------------------------------------------------------------------------------

TABLE = (
    HEAD
    + """
seeds = [0, 1, 2]
[[trials]]
label = "a"
[[trials]]
label = "b"
grid = { "objective.beta_neg" = [3.0, 1.0] }
[[pictures]]
kind = "line"
name = "line"
title = "m against beta_neg"
x = "objective.beta_neg"
y = ["latent_probes.m"]
constant = ["a"]
[[pictures]]
kind = "samples"
name = "side_by_side"
columns = 2
[[pictures]]
kind = "curves"
name = "kl"
y = ["kl_real"]
"""
)


def write_run(run: RunDir, resolved, state="finished", values=(), weights="raw", **more) -> None:
    RunDir.at(run.path)
    about = {"recipe": "tiny", "automatic_profile": False, "profiles": [], "sets": [], "history": [], "data": {}, "libraries": {}}
    run.write("manifest", about)
    run.write("resolved", resolved)
    run.status(state, step=12)
    for i, value in enumerate(values):
        result = {"skipped": value} if isinstance(value, str) else {"value": value}
        line = {"metric": "latent_probes", "name": "mn"[i], **result, "protocol": {"k": 5}, "by": "run"}
        run.append("metrics", {**line, "checkpoint": "step_00000012", "weights": weights, **more})


def test_a_grid_over_what_every_stage_sets_is_refused(siv, tmp_path):
    (tmp_path / "tiny.toml").write_text(SMALL + STAGED)
    (tmp_path / "grid.toml").write_text(HEAD + '[grid]\n"optim.lr" = [1e-3, 1e-2]\n')
    refused = siv("sweep", "grid.toml", "--dry-run")
    assert refused.returncode == 2, refused.stdout
    assert "are one and the same: optim.lr changes nothing, as where each of the stages has its own" in refused.stderr


@pytest.mark.parametrize("cpu_only", [False, True])
def test_a_trial_is_read_as_here_wherever_it_runs(read, catalogue, tmp_path, cpu_only):
    """A profile named cpu comes and goes with the device, which may be another where a trial is worked on."""
    made = read(TABLE)
    (tmp_path / "tiny.toml").write_text((tmp_path / "tiny.toml").read_text() + "[profiles.cpu.train]\nbatch = 24\n")
    found = sweep.resolve(made, catalogue, cpu_only=cpu_only)
    trial = made.trials[0]
    command = sweep_jobs.command(trial, found[trial.name], tmp_path / "run", "cpu")
    assert command[2:4] == ("--profile", "cpu" if cpu_only else "none")
    profiles = tuple(value for option, value in pairwise(command) if option == "--profile")
    for there in (False, True):
        again = recipe.load(trial.recipe, catalogue, profiles, trial.sets, cpu_only=there)
        assert again.resolved() == found[trial.name].resolved()
        assert again.train.batch == (24 if cpu_only else found[trial.name].train.batch)


@pytest.fixture
def swept(read, catalogue, tmp_path):
    """A sweep, its recipes, and where its runs are to be."""
    made = read(TABLE)
    return made, sweep.resolve(made, catalogue, cpu_only=False), tmp_path / "root"


def test_the_table_is_naive_arithmetic(swept):
    made, recipes, root = swept
    rng = np.random.default_rng(0)
    values = {trial.name: rng.normal(size=2).tolist() for trial in made.trials}
    for trial in made.trials:
        write_run(RunDir(root / trial.name), recipes[trial.name].resolved(), values=values[trial.name])
    result = sweep_table.table(made, sweep_table.outcomes(made, recipes, root))
    assert [row["key"] for row in result["rows"]] == [
        {"label": "a", "objective.beta_neg": None},
        {"label": "b", "objective.beta_neg": 3.0},
        {"label": "b", "objective.beta_neg": 1.0},
    ]
    assert result["metrics"] == ["latent_probes.m", "latent_probes.n"]
    for row, prefix in zip(result["rows"], ("a_", "b_beta_neg=3.0_", "b_beta_neg=1.0_"), strict=True):
        expected = np.array([values[f"{prefix}seed={seed}"] for seed in (0, 1, 2)])
        for i, cell in enumerate(row["cells"].values()):
            assert (cell["mean"], cell["sd"]) == pytest.approx((expected[:, i].mean(), expected[:, i].std(ddof=1)))
            assert (cell["n"], [one["value"] for one in cell["values"]]) == (3, expected[:, i].tolist())
            assert [(one["seed"], one["run"]) for one in cell["values"]] == [
                (seed, str(root / f"{prefix}seed={seed}")) for seed in (0, 1, 2)
            ]
            assert all(one["protocol"] == {"k": 5} for one in cell["values"])
    lines = list(csv.DictReader(io.StringIO(sweep_table.csv_text(result))))
    assert len(lines) == 6
    assert float(lines[5]["mean"]) == result["rows"][2]["cells"]["latent_probes.n"]["mean"]
    assert sweep_table.markdown(result).count("\n| ") == 3 + 1
    for path in sweep_table.write(result, root):
        assert path.exists()
    assert json.loads((root / "table.json").read_text()) == result


@pytest.mark.parametrize(("direction", "best"), [("minimize", ["a", "b 3.0"]), ("maximize", ["a", "b 1.0"])])
def test_the_best_row_of_each_label(swept, direction, best):
    """Of rows that are finished, by the mean over seeds; the words say that it has been chosen."""
    made, recipes, root = swept
    made = evolve(made, table=evolve(made.table, best="latent_probes.n", direction=direction))
    values = {"a_": [4.0, 5.0, 6.0], "b_beta_neg=3.0_": [1.0, 1.0, 4.0], "b_beta_neg=1.0_": [0.0, 9.0, 3.0]}
    for name, of in values.items():
        for seed, value in enumerate(of):
            write_run(RunDir(root / f"{name}seed={seed}"), recipes[f"{name}seed={seed}"].resolved(), values=[-value, value])
    result = sweep_table.table(made, sweep_table.outcomes(made, recipes, root))
    assert [" ".join(str(one) for one in found["key"].values() if one is not None) for found in result["best"]] == best
    assert [found["mean"] for found in result["best"]] == [5.0, 2.0 if direction == "minimize" else 4.0]
    assert [(found["among"], found["of"], found["n"]) for found in result["best"]] == [(1, 1, 3), (2, 2, 3)]
    text = sweep_table.markdown(result)
    assert (
        f"- b: of 2 rows the best latent_probes.n is {result['best'][1]['mean']:.4g}, with beta_neg {best[1][2:]}; chosen on this"
        in text
    )
    write_run(RunDir(root / "b_beta_neg=3.0_seed=1"), recipes["b_beta_neg=3.0_seed=1"].resolved(), state="failed")
    result = sweep_table.table(made, sweep_table.outcomes(made, recipes, root))
    assert result["best"][1]["key"] == {"label": "b", "objective.beta_neg": 1.0}
    assert "b: of 1 finished rows of 2 the best" in sweep_table.markdown(result)


def test_a_recipe_edited_while_the_sweep_ran_does_not_enter_the_mean(swept):
    made, recipes, root = swept
    for i in range(3):
        resolved = recipes[f"a_seed={i}"].resolved()
        if i == 1:
            resolved["network"] = {**resolved["network"], "z_dim": 33}
        write_run(RunDir(root / f"a_seed={i}"), resolved, values=[float(i), 0.0])
    row = sweep_table.table(made, sweep_table.outcomes(made, recipes, root))["rows"][0]
    assert (row["note"], row["cells"]["latent_probes.m"]["mean"]) == ("seed 1 changed", 1.0)
    assert [one["value"] for one in row["cells"]["latent_probes.m"]["values"]] == [0.0, 2.0]


def test_rows_say_what_is_lacking(swept):
    """Missing, failed, stopped, killed, diverged, longer than it was, skipped and not finite: only finished values count."""
    made, recipes, root = swept
    resolved = {name: one.resolved() for name, one in recipes.items()}
    shorter = {**resolved["b_beta_neg=3.0_seed=1"]}
    shorter["stages"] = [{**shorter["stages"][0], "length": "2 steps"}]
    write_run(RunDir(root / "a_seed=0"), resolved["a_seed=0"], values=[2.0, "no weights"])
    write_run(RunDir(root / "a_seed=1"), resolved["a_seed=1"], state="failed", values=[9.0])
    write_run(RunDir(root / "b_beta_neg=3.0_seed=0"), resolved["b_beta_neg=3.0_seed=0"], state="diverged")
    write_run(RunDir(root / "b_beta_neg=3.0_seed=1"), shorter, values=[9.0])
    write_run(RunDir(root / "b_beta_neg=3.0_seed=2"), resolved["b_beta_neg=3.0_seed=2"], state="running")
    write_run(RunDir(root / "b_beta_neg=1.0_seed=0"), resolved["b_beta_neg=1.0_seed=0"], values=[float("nan")])
    write_run(RunDir(root / "b_beta_neg=1.0_seed=1"), resolved["b_beta_neg=1.0_seed=1"], values=[1.0])
    write_run(RunDir(root / "b_beta_neg=1.0_seed=2"), resolved["b_beta_neg=1.0_seed=2"], values=[3.0])
    result = sweep_table.table(made, sweep_table.outcomes(made, recipes, root))
    _, lines = sweep_table.text_rows(result)
    assert lines == [
        ("a", "–", "2", "skipped", "1 of 3", "seed 1 failed; seed 2 missing"),
        ("b", "3.0", "–", "–", "0 of 3", "seed 0 diverged; seed 1 changed; seed 2 stopped"),
        ("b", "1.0", "nan ± nan", "–", "3 of 3", ""),
    ]
    list(sweep_table.write(result, root))
    assert json.loads((root / "table.json").read_text())["rows"][2]["cells"]["latent_probes.m"]["mean"] == "nan"
    with RunDir(root / "b_beta_neg=3.0_seed=2").locked():
        assert [one.state for one in sweep_table.outcomes(made, recipes, root)].count("running") == 1


def test_later_evaluations_count_where_they_measured_the_same(swept):
    made, recipes, root = swept
    run, resolved = RunDir(root / "a_seed=0"), recipes["a_seed=0"].resolved()
    write_run(run, resolved, values=[2.0, "no weights"])
    line = {"metric": "latent_probes", "protocol": {}, "by": "evaluate", "checkpoint": "step_00000012", "weights": "raw"}
    run.append("metrics", {**line, "name": "n", "value": 5.0})
    run.append("metrics", {**line, "name": "m", "value": 9.0, "checkpoint": "step_00000004"})
    run.append("metrics", {**line, "name": "m", "value": 8.0, "weights": "ema"})
    [first, *_] = sweep_table.outcomes(made, recipes, root)
    assert {name: one["value"] for name, one in first.values.items()} == {"latent_probes.m": 2.0, "latent_probes.n": 5.0}


@pytest.mark.parametrize(
    ("mean", "sd", "n", "text"),
    [
        (1.2512, 0.1123, 5, "1.25 ± 0.11"),
        (20.268, 1.23, 5, "20.3 ± 1.2"),
        (1234.5, 123.4, 5, "1234 ± 123"),
        (0.97123, None, 5, "0.9712"),
        (3e-9, 1e-10, 5, "3e-09 ± 1e-10"),
        (2.0, 0.0, 5, "2 ± 0"),
        (1.2512, 0.1123, 3, "1.25 ± 0.11 (n=3)"),
    ],
)
def test_numbers_show_as_many_digits_as_mean_something(mean, sd, n, text):
    assert sweep_table.number({"mean": mean, "sd": sd, "n": n, "values": []}, 5) == text


def test_the_clock_begins_anew_at_each_start():
    lines = [{"wall": {"seconds": seconds}} for seconds in (1.0, 2.0, 0.5, 4.0, 0.25)]
    assert sweep_table.wall_seconds(lines) == 2.0 + 4.0 + 0.25
    assert sweep_table.wall_seconds([]) == 0.0


def test_a_folder_with_something_else_is_refused(swept, tmp_path):
    made, recipes, root = swept
    assert sweep_table.check_folder(made, recipes, root) == []
    assert "holds files that are no siv sweep" in problems(lambda: sweep_table.check_folder(made, recipes, tmp_path))[0]
    write_run(RunDir(root / "z_seed=0"), recipes["a_seed=0"].resolved())
    (root / "sweep.toml").write_text("")
    assert "holds the trials of another sweep (z_seed=0)" in problems(lambda: sweep_table.check_folder(made, recipes, root))[0]
    write_run(RunDir(root / "a_seed=0"), recipes["a_seed=0"].resolved())
    assert "1 runs in" in sweep_table.check_folder(made, recipes, root)[0]
    for name in ("a_seed=1", "a_seed=2"):
        write_run(RunDir(root / name), {**recipes[name].resolved(), "data": {"name": "other"}})
    line, *_ = problems(lambda: sweep_table.check_folder(made, recipes, root))
    assert "holds other runs, name another folder with --root: data.name: the run has 'other'" in line
    assert "(in a_seed=1, a_seed=2)" in line


# -- pictures --------------------------------------------------------------------------------------------------------------------


def outcome(trial: sweep.Trial, root: Path, value: float | None) -> Outcome:
    values = {} if value is None else {"latent_probes.m": {"value": value, "protocol": {}}}
    return Outcome(trial, RunDir(root / trial.name), "finished" if values else "missing", 0, values, 0.0)


def test_points_of_a_line_are_sorted_and_keep_their_seeds(swept):
    made, _, root = swept
    found = [outcome(trial, root, float(i)) for i, trial in enumerate(made.trials)]
    lines, levels = sweep_pictures.series(made.pictures[0], found)
    assert lines == {"b": {1.0: {"latent_probes.m": [6.0, 7.0, 8.0]}, 3.0: {"latent_probes.m": [3.0, 4.0, 5.0]}}}
    assert list(lines["b"]) == [1.0, 3.0]
    assert levels == {"a": {"latent_probes.m": [0.0, 1.0, 2.0]}}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def words_of(figure) -> list[str]:
    """All that is written into the panels and their legends."""
    from matplotlib.text import Text

    return [one.get_text() for one in figure.findobj(Text)]


def test_a_point_of_fewer_seeds_and_a_level_without_values_say_so(swept):
    made, _, root = swept
    lost = ("b_beta_neg=3.0_seed=1", "b_beta_neg=3.0_seed=2")
    found = [outcome(trial, root, None if trial.label == "a" or trial.name in lost else 1.0) for trial in made.trials]
    figure = sweep_pictures.line(made.pictures[0], found)
    written = words_of(figure)
    assert "1 of 3" in written
    assert not [text for text in written if text.endswith(" of 3") and text != "1 of 3"]
    assert "a (no value yet)" in written
    figure.draw_without_rendering()
    for axes in figure.axes:
        notes = [one.get_window_extent() for one in axes.texts]
        assert notes
        assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in notes)


def test_pictures_are_drawn_or_told(swept):
    made, _, root = swept
    found = [outcome(trial, root, float(i)) for i, trial in enumerate(made.trials)]
    root.mkdir()
    told = {path.stem: reason for path, reason in sweep_pictures.draw(made, [outcome(t, root, None) for t in made.trials], root)}
    assert told["line"] == "no finished trial has both objective.beta_neg and a value of latent_probes.m"
    assert told["side_by_side"] == "no finished trial yet"
    assert told["kl"] == "no run has the term 'kl_real'; there are: none yet"
    for one in found:
        RunDir.at(one.run.path)
        Image.fromarray(np.full((40, 60, 3), 100, np.uint8)).save(one.run.images / "samples.png")
        for step in (1, 2):
            one.run.append("stats", {"step": step, "phases": {"encoder": {"kl_real": step / 2}, "decoder": {"kl_rec": 3.0}}})
    drawn = dict(sweep_pictures.draw(made, found, root))
    assert set(drawn.values()) == {""}
    for path in drawn:
        assert np.asarray(Image.open(path).convert("L")).std() > 5, path
    stats = found[0].run.read("stats")
    assert sweep_pictures.term_of(stats, "kl_real") == sweep_pictures.term_of(stats, "encoder.kl_real") == ([1, 2], [0.5, 1.0])
    assert sweep_pictures.term_of(stats, "decoder.kl_real") == ([], [])
    whole = pixels(root / "side_by_side.png").shape
    for state in ("missing", "diverged"):  # a place is kept, and says why it is empty
        some = [evolve(one, state=state, values={}) if one.trial.label == "a" else one for one in found]
        assert set(dict(sweep_pictures.draw(made, some, root)).values()) == {""}
        assert pixels(root / "side_by_side.png").shape == whole
    [side_by_side] = [one for one in made.pictures if one.name == "side_by_side"]
    column = evolve(side_by_side, columns=1)  # a row of trials none of which has been run is left out, and that is told
    for state, left_out in (("missing", "left out: 1 that have not been run"), ("diverged", "")):
        some = [evolve(one, state=state, values={}) if one.trial.label == "a" else one for one in found]
        figure = sweep_pictures.samples(column, some)
        assert len(figure.axes) == len(sweep_pictures.samples(column, found).axes) - bool(left_out)
        assert figure.get_supxlabel() == left_out
    (found[0].run.images / "samples.png").unlink()
    assert "samples.png: is not there" in dict(sweep_pictures.draw(made, found, root))[root / "side_by_side.png"]


# -- real processes --------------------------------------------------------------------------------------------------------------

REAL = HEAD + 'seeds = [0]\n[[pictures]]\nkind = "samples"\nname = "samples"\n'
FOUR = HEAD + 'seeds = [0, 1]\n[[trials]]\nlabel = "VAE"\nobjective = { name = "vae" }\n[[trials]]\nlabel = "soft"\n'


def test_a_sweep_from_the_command_line(tmp_path, tiny, siv):
    """A trial is an ordinary run, and the table has what it measured; a trial that was not asked for is missing in it."""
    (tmp_path / "real.toml").write_text(REAL.replace("[0]", "[0, 1]"))
    done = siv("sweep", "real.toml", "--only", "*=0", "--device", "cpu", "--json", seconds=200, fresh=True)
    assert done.returncode == 0, done.stderr
    result, run = json.loads(done.stdout), RunDir(tmp_path / "runs/real/seed=0")
    assert run.state() == "finished"
    assert run.manifest()["threads"] == 1
    assert not (tmp_path / "runs/real/seed=1").exists()
    assert result["rows"][0]["note"] == "seed 1 missing"
    lines = {f"{line['metric']}.{line['name']}": line["value"] for line in run.read("metrics")}
    assert {name: cell["mean"] for name, cell in result["rows"][0]["cells"].items()} == lines
    for name in ("table.md", "table.csv", "table.json", "samples.png", "sweep.toml", "logs/seed=0.txt"):
        assert (tmp_path / "runs/real" / name).exists(), name


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`siv sweep` in a process group of its own."""
    command = [sys.executable, "-m", "siv_core.cli.main", "sweep", *arguments, "--device", "cpu"]
    return subprocess.Popen(
        command,
        cwd=folder,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # tests under `nohup` ignore it
    )


def fork(folder: Path, *arguments: str) -> forked.Siv:
    """The same as a fork, and so are its trials."""
    return forked.Siv(folder, "sweep", *arguments, "--device", "cpu")


def wait_for(condition, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not come to it"
        time.sleep(0.05)


def state_of(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stopped_sweep_goes_on(tmp_path, siv):
    """Stopped in training by two kinds of signals; the same command resumes, and ends with what a sweep left alone has."""
    (tmp_path / "tiny.toml").write_text(TINY.replace('"12 steps"', '"600 steps"').replace('"4 steps"', '"200 steps"'))
    (tmp_path / "four.toml").write_text(FOUR + 'train.length = "12 steps"\n')
    root = tmp_path / "runs/four"
    for signum, begin in ((signal.SIGINT, start), (signal.SIGHUP, fork)):
        process = begin(tmp_path, "four.toml", "--jobs", "2")
        wait_for(lambda: all((root / f"VAE_seed={seed}/status.json").exists() for seed in (0, 1)))
        wait_for(lambda: [state_of(root / f"VAE_seed={seed}") for seed in (0, 1)] == ["running", "running"])
        process.send_signal(signum)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 128 + signum, err
        assert "the same command goes on" in out
        assert [state_of(root / f"VAE_seed={seed}") for seed in (0, 1)] == ["stopped", "stopped"]
        assert not (root / "soft_seed=0").exists()
    table = siv("sweep", "four.toml", "--table", seconds=200)
    assert "seeds 0, 1 stopped" in table.stdout
    assert "seeds 0, 1 missing" in table.stdout
    done = siv("sweep", "four.toml", "--device", "cpu", seconds=900)
    assert done.returncode == 0, done.stderr
    assert "going on with VAE_seed=0 at step" in done.stdout
    sets = ("--set", 'objective={name = "vae"}', "--set", "train.seed=1")
    undisturbed = siv("run", "tiny.toml", *sets, "--run-dir", "whole", "--device", "cpu", seconds=400)
    assert undisturbed.returncode == 0, undisturbed.stderr
    ours, whole = (RunDir(run).read("metrics") for run in (root / "VAE_seed=1", tmp_path / "whole"))
    assert [{**line, "wall": None} for line in ours] == [{**line, "wall": None} for line in whole]
    again = siv("sweep", "four.toml", "--device", "cpu", seconds=200)
    assert "4 trials (4 finished)" in again.stdout
    assert "starting" not in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_sweep_goes_on(tmp_path, siv):
    """What it left may be at work still: that is waited for, and not started twice."""
    (tmp_path / "tiny.toml").write_text(TINY.replace('"12 steps"', '"150 steps"'))
    (tmp_path / "two.toml").write_text(HEAD + "seeds = [0, 1]\n")
    process = start(tmp_path, "two.toml", "--jobs", "1")
    root = tmp_path / "runs/two"
    wait_for(lambda: (root / "seed=0/stats.jsonl").exists())
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    done = siv("sweep", "two.toml", "--jobs", "1", "--device", "cpu", seconds=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [state_of(root / f"seed={seed}") for seed in (0, 1)] == ["finished", "finished"]
    assert [RunDir(root / f"seed={seed}").read("stats")[-1]["step"] for seed in (0, 1)] == [150, 150]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trial_that_another_process_works_on_is_waited_for(tmp_path, tiny):
    (tmp_path / "one.toml").write_text(HEAD + "seeds = [0]\n")
    run = RunDir.at(tmp_path / "runs/one/seed=0")
    (tmp_path / "runs/one/sweep.toml").write_text("")
    with run.locked():
        process = start(tmp_path, "one.toml")
        assert any("seed=0: another process is working on it, waiting for that one" in line for line in process.stdout)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "finished seed=0" in out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_time_for_the_whole(tmp_path, siv):
    (tmp_path / "tiny.toml").write_text(TINY.replace('"12 steps"', '"400000 steps"'))
    (tmp_path / "two.toml").write_text(HEAD + "seeds = [0, 1]\n")
    done = siv("sweep", "two.toml", "--device", "cpu", "--jobs", "1", "--max-time", "6s", seconds=300)
    assert done.returncode == 0, done.stderr
    assert "stopped after 6 s as asked; the same command goes on" in done.stdout
    assert "lacking" in (tmp_path / "runs/two/table.md").read_text()
    assert not busy(RunDir(tmp_path / "runs/two/seed=0"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_failed_and_diverged_trials_do_not_stop_the_others(tmp_path, tiny, siv):
    text = FOUR.replace("seeds = [0, 1]", "seeds = [0]") + '[[trials]]\nlabel = "wild"\noptim.lr = 1e30\n'
    (tmp_path / "some.toml").write_text(text + '[[trials]]\nlabel = "orphan"\ninit = { run = "nowhere" }\n')
    done = siv("sweep", "some.toml", "--device", "cpu", "--jobs", "1", seconds=500)
    assert done.returncode == 1, done.stdout
    assert done.stderr == "error: of 4 trials 1 failed and 1 diverged\n"
    for words in ("finished VAE_", "finished soft_", "diverged wild_seed=0 (exit 3)", "failed orphan_seed=0 (exit 2)"):
        assert words in done.stdout
    assert f"init.run: {tmp_path / 'nowhere'}: no run here" in done.stdout
    root = tmp_path / "runs/some"
    states = {row["key"]["label"]: row["note"] for row in json.loads((root / "table.json").read_text())["rows"]}
    assert states == {"VAE": "", "soft": "", "wild": "diverged", "orphan": "missing"}
    (tmp_path / "some.toml").write_text(text)
    again = siv("sweep", "some.toml", "--device", "cpu", seconds=200)
    assert again.returncode == 3, again.stdout
    assert "wild_seed=0 diverged before and would again" in again.stdout
    assert "error: of 3 trials 1 diverged" in again.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_second_signal_takes_the_trials_along(tmp_path, siv):
    (tmp_path / "tiny.toml").write_text(TINY.replace('"12 steps"', '"400000 steps"'))
    (tmp_path / "one.toml").write_text(HEAD + "seeds = [0]\n")
    process = start(tmp_path, "one.toml")
    run = tmp_path / "runs/one/seed=0"
    wait_for(lambda: (run / "stats.jsonl").exists())
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    wait_for(lambda: not busy(RunDir(run)), seconds=10)
