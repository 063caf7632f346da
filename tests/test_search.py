"""`[search]`: what a search file may say, the study that it becomes, and the command to its end and on from there."""

from __future__ import annotations

import json
import sys

import pytest
from toys import SMALL

from siv_core.errors import UserError
from siv_core.recipe import catalogue as catalogues
from siv_core.store.rundir import RunDir
from siv_core.sweep import proposals, search, sweep
from siv_core.sweep.search import Range, Search, SearchOptions

RECIPE = f"""{SMALL}
[objective]
name = "vae"
[train]
batch = 64
length = "6 steps"
tick = "3 steps"
[metrics.latent_probes]
class_factor = "digit"
trained = []
[profiles.cpu.train]
batch = 32
"""
FIND = """
format = 1
recipe = "tiny.toml"
[search]
metric = "latent_probes.knn.z.digit"
direction = "maximize"
trials = 3
startup = 1
[search.ranges]
"optim.lr" = { low = 1e-5, high = 1e-1, log = true }
network.z_dim = { low = 2, high = 8 }
"train.precision" = { choices = ["fp32", "bf16"] }
"""
RANGES = {"a": Range(low=0.0, high=1.0), "n": Range(low=2, high=6, step=2, whole=True), "c": Range(choices=("x", [1, 2]))}


def read(tmp_path, text):
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "find.toml").write_text(text)
    return sweep.load(tmp_path / "find.toml")


def test_a_search_file(tmp_path):
    options, ranges = read(tmp_path, FIND).search
    assert (options.metric, options.direction, options.trials) == ("latent_probes.knn.z.digit", "maximize", 3)
    assert ranges["optim.lr"] == Range(low=1e-5, high=1e-1, log=True)
    assert ranges["network.z_dim"] == Range(low=2, high=8, whole=True)
    assert ranges["train.precision"].choices == ("fp32", "bf16")
    made = read(tmp_path, FIND)
    assert [trial.varied["network.z_dim"] for trial in made.trials] == [2, 2, 8, 2, 8]  # the ends, which recipes have to take
    assert proposals.ranges(made) == {"optim.lr": "1e-05 … 0.1, log", "network.z_dim": "2 … 8", "train.precision": "fp32 | bf16"}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("trials = 3", "trials = 0", "search.trials"),
        ('"maximize"', '"up"', "search.direction"),
        ("startup = 1", "startups = 1", "search.startups: unknown key"),
        ("low = 2, high = 8", "low = 8, high = 2", "search.ranges.network.z_dim: low has to be below high"),
        ("low = 1e-5,", "low = 0.0,", "search.ranges.optim.lr: log takes a low above 0"),
        ("low = 1e-5, ", "", "search.ranges.optim.lr.low: missing"),
        ('choices = ["fp32", "bf16"]', 'choices = ["fp32"]', "expected two choices at least"),
        ('{ choices = ["fp32", "bf16"] }', '"fp32"', "search.ranges.train.precision: expected { low"),
        ("[search]", "seeds = [0, 1]\n[search]", "search: goes without seeds"),
        ("low = 2, high = 8", "low = -2, high = 8", "network.z_dim"),
        ('{ choices = ["fp32", "bf16"] }', '{ choices = ["fp32", "fp8"] }', "train.precision"),
        ("network.z_dim", "network.zdim", "network.zdim: unknown key; did you mean 'z_dim'?"),
        ("latent_probes.knn", "latent_probe.knn", "search.metric: the recipe has no metric 'latent_probe'; did you mean"),
        (
            "startup = 1",
            'pruner = "median"',
            "search.pruner: judges what is measured in training: set metrics.latent_probes.every",
        ),
    ],
)
def test_what_is_wrong_is_told_before_the_first_trial(tmp_path, catalogue, old, new, told):
    assert old in FIND

    def checked():
        made = read(tmp_path, FIND.replace(old, new))
        proposals.check(made, sweep.resolve(made, catalogue, cpu_only=False))

    with pytest.raises(UserError) as raised:
        checked()
    assert told in str(raised.value)


def test_no_ranges(tmp_path):
    with pytest.raises(UserError, match="nothing to search"):
        read(tmp_path, FIND.partition("[search.ranges]")[0])


# -- the study -------------------------------------------------------------------------------------------------------------------


def study(root, **options):
    root.mkdir(exist_ok=True)
    return Search(SearchOptions(**{"metric": "m.x", "direction": "minimize", "trials": 50, **options}), RANGES, root, "s")


def told(one, worth):
    """Ask and tell to the end; the values of all."""
    while name := one.ask():
        one.tell(name, "finished", worth(one.values(one.begun()[name])))
    return [one.values(trial) for trial in one.begun().values()]


def test_values_lie_in_their_ranges_and_better_ones_are_found(tmp_path):
    seen = told(study(tmp_path), lambda values: (values["a"] - 0.3) ** 2 + (values["n"] != 4))
    assert len(seen) == 50
    assert all(0 <= values["a"] <= 1 and values["n"] in (2, 4, 6) and values["c"] in ("x", [1, 2]) for values in seen)
    near = [abs(values["a"] - 0.3) < 0.2 and values["n"] == 4 for values in seen]
    assert sum(near[25:]) >= 8 > 25 * 0.4 / 3 * 2  # twice what chance would give


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_seed_repeats_a_search_and_one_that_goes_on_proposes_others(tmp_path, sampler):
    first, second = (
        told(study(tmp_path / name, trials=5, sampler=sampler, seed=3), lambda values: values["a"]) for name in ("one", "two")
    )
    assert first == second
    more = told(study(tmp_path / "one", trials=8, sampler=sampler, seed=3), lambda values: values["a"])
    assert more[:5] == first
    assert not {values["a"] for values in more[5:]} & {values["a"] for values in first}
    assert study(tmp_path / "one", trials=8).ask() is None


def test_how_a_run_ended_is_what_the_study_is_told(tmp_path):
    one = study(tmp_path, trials=6)
    names = [one.ask() for _ in range(6)]
    ends = [("finished", 1.0), ("finished", None), ("diverged", None), ("failed", None), ("pruned", None), ("stopped", None)]
    for name, end in zip(names, ends, strict=True):
        one.tell(name, *end)
    states = [trial.state.name for trial in one.begun().values()]
    assert states == ["COMPLETE", "FAIL", "FAIL", "FAIL", "PRUNED", "RUNNING"]
    assert one.open() == [names[5]]  # goes on another time
    one.tell(names[0], "finished", 2.0)  # told already
    assert one.study.best_value == 1.0


def test_the_pruner_judges_what_is_measured_in_training(tmp_path):
    one = study(tmp_path, trials=4, pruner="median", startup=1)

    def measured(name, values):
        run = RunDir(tmp_path / name)
        run.path.mkdir(exist_ok=True)
        for step, value in values.items():
            run.append("metrics", {"by": "training", "metric": "m", "name": "x", "value": value, "step": step})

    good, poor, late = one.ask(), one.ask(), one.ask()
    measured(good, {1: 1.0, 2: 0.5})
    assert not one.give_up(good)
    one.tell(good, "finished", 0.5)
    assert not one.give_up(poor)  # nothing is known yet
    measured(poor, {1: 0.9})
    assert not one.give_up(poor)
    measured(poor, {2: 3.0})
    assert one.give_up(poor)
    assert not one.give_up(poor)  # nothing new
    assert not study(tmp_path, trials=4, pruner="none").give_up(late)
    again = study(tmp_path, trials=4, pruner="median", startup=1)  # another process: values are not told twice
    measured(late, {1: 0.1, 2: 0.1})
    assert not again.give_up(late)
    assert again.begun()[late].intermediate_values == {1: 0.1, 2: 0.1}


def test_no_pruner_judges_before_so_many_trials_have_ended(tmp_path):
    """Ever worse ones: halving by itself gives up the third."""
    given_up = {}
    for startup in (1, 4):
        one = study(tmp_path / str(startup), trials=7, pruner="halving", startup=startup)
        for number in range(7):
            name = one.ask()
            run = RunDir(one.root / name)
            run.path.mkdir()
            for step in range(1, 9):
                run.append("metrics", {"by": "training", "metric": "m", "name": "x", "value": float(number), "step": step})
            over = one.give_up(name)
            given_up.setdefault(startup, []).append(over)
            one.tell(name, "pruned" if over else "finished", float(number))
    assert given_up[4] == [False] * 4 + [True] * 3
    assert given_up[1] == [False] * 2 + [True] * 5


def test_a_database_takes_the_place_of_the_journal(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    one, two = (study(tmp_path / name, trials=4, storage=url) for name in ("here", "there"))
    names = [one.ask(), two.ask(), one.ask(), two.ask()]
    assert len(set(names)) == 4
    assert one.ask() is None
    with pytest.raises(UserError, match=r"search\.storage: nowhere://x: cannot be used"):
        study(tmp_path, storage="nowhere://x")


def test_a_machine_goes_on_with_its_own_and_with_what_another_has_left(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    monkeypatch.setattr(search.platform, "node", lambda: "there")
    there = study(tmp_path, trials=4, storage=url)
    begun, left, at_work = there.ask(), there.ask(), there.ask()
    monkeypatch.setattr(search.platform, "node", lambda: "here")
    here = study(tmp_path, trials=4, storage=url)
    own = here.ask()
    for name in (left, at_work):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text("{}")
    with RunDir(tmp_path / at_work).locked():
        assert here.mine() == [left, own]  # not what the other one is about to begin, nor what it works on
        assert here.open() == [begun, left, at_work, own]


def test_other_choices_are_another_study(tmp_path, monkeypatch):
    one = study(tmp_path, trials=9)
    one.ask()
    monkeypatch.setitem(RANGES, "c", Range(choices=([1, 2], "y")))
    with pytest.raises(UserError, match=r"search\.ranges\.c: is not what the study was begun with"):
        study(tmp_path, trials=9).ask()
    states = [one.state.name for one in study(tmp_path, trials=9).study.trials]
    assert states == ["RUNNING", "FAIL"]  # none is left running that nobody would go on with


def test_without_optuna_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"takes Optuna .*: pip install 'siv\[search\]'"):
        study(tmp_path)


def test_the_end_of_a_process_that_told_nothing_is_taken_in(tmp_path):
    made = read(tmp_path, FIND)
    known = catalogues.load()
    recipes = sweep.resolve(made, known, cpu_only=False)
    board = Board()
    (tmp_path / "root").mkdir()
    source = proposals.Proposals.of(made, recipes, known, tmp_path / "root", "cpu", board, cpu_only=False)
    name = source.search.ask()
    assert source.search.open() == [name]
    source.over(name, "failed")
    assert source.search.open() == []
    assert source.steps() == 2 * 6
    assert source.best() == ""


class Board:
    at_end = None

    def say(self, line): ...
    def progress(self, what, done, total): ...


# -- the command -----------------------------------------------------------------------------------------------------------------


def test_a_search_whose_trials_fail_says_so(siv, tmp_path):
    read(tmp_path, FIND.replace("trials = 3", "trials = 2"))
    (tmp_path / "tiny.toml").write_text(RECIPE + '[init]\nrun = "nowhere"\n')
    done = siv("sweep", "find.toml", "--device", "cpu", "--jobs", "2", seconds=200)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "of 2 trials 2 failed" in done.stderr


def test_a_search_may_propose_values_twice(siv, tmp_path):
    """Three trials of two choices."""
    text = FIND.partition("[search.ranges]")[0] + '[search.ranges]\n"optim.lr" = { choices = [1e-3, 1e-2] }\n'
    read(tmp_path, text)
    done = siv("sweep", "find.toml", "--device", "cpu", "--jobs", "2", seconds=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [RunDir(tmp_path / f"runs/find/trial-{i:04d}").state() for i in range(3)] == ["finished"] * 3
    assert (tmp_path / "runs/find/table.md").exists()


def test_a_key_that_changes_nothing_is_told(tmp_path, catalogue):
    stages = 'batch = 64\n[[stages]]\nlength = "6 steps"\noptim = { lr = 1e-3 }\n'
    made = read(tmp_path, FIND)
    (tmp_path / "tiny.toml").write_text(
        RECIPE.replace('batch = 64\nlength = "6 steps"\n', "")
        .replace("[train]\n", "[train]\n" + stages, 1)
        .replace('tick = "3 steps"\n', "")
    )
    with pytest.raises(UserError) as raised:
        proposals.check(made, sweep.resolve(made, catalogue, cpu_only=False))
    assert [line.partition("are one and the same: ")[2] for line in raised.value.problems] == [
        "optim.lr changes nothing, as where each of the stages has its own"
    ]


def test_a_search_runs_to_its_end_and_goes_on_with_more_trials(siv, tmp_path):
    made = read(tmp_path, FIND)
    done = siv("sweep", "find.toml", "--device", "cpu", "--jobs", "2", seconds=200)
    assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "runs/find"
    names = [f"trial-{i:04d}" for i in range(3)]
    assert [RunDir(root / name).state() for name in names] == ["finished"] * 3
    rows = json.loads((root / "table.json").read_text())["rows"]
    values = [row["cells"]["latent_probes.knn.z.digit"]["mean"] for row in rows]
    best = max(range(3), key=values.__getitem__)
    assert f"best: {names[best]}, latent_probes.knn.z.digit {values[best]:.6g}" in done.stdout
    for row, name in zip(rows, names, strict=True):
        resolved = RunDir(root / name).resolved()
        assert resolved["network"]["z_dim"] == row["key"]["network.z_dim"]
        assert resolved["stages"][0]["optim"]["all"]["lr"] == row["key"]["optim.lr"]
        assert resolved["train"]["batch"] == 32  # the profile of machines like this one, which is not given
    assert (root / "history.png").stat().st_size > 5000
    again = siv("sweep", "find.toml", "--device", "cpu", seconds=100)
    assert "0 of them to go" in again.stdout
    (tmp_path / "find.toml").write_text(FIND.replace("trials = 3", "trials = 4"))
    more = siv("sweep", "find.toml", "--device", "cpu", seconds=100)
    assert "1 of them to go" in more.stdout
    assert "finished trial-0003" in more.stdout
    for wrong in (("--stack", "2"), ("--only", "x")):
        refused = siv("sweep", "find.toml", *wrong)
        assert refused.returncode == 2
        assert "go with trials that are known beforehand" in refused.stderr
    (tmp_path / "wild.toml").write_text(
        FIND.replace("low = 1e-5, high = 1e-1", "low = 1e29, high = 1e30").replace("trials = 3", "trials = 1")
    )
    none = siv("sweep", "wild.toml", "--device", "cpu", seconds=100)
    assert none.returncode == 3, none.stdout
    assert "no trial is finished yet" in none.stdout
    refused = siv("sweep", "wild.toml", "--root", "runs/find", "--device", "cpu")
    assert (refused.returncode, "holds the trials of another sweep (trial-0000" in refused.stderr) == (2, True), refused.stderr
    for change, told in (
        (["train.seed=1"], "runs/find holds other runs, name another folder with --root: train.seed: the run has 0"),
        (["train.length='9 steps'"], "what trial-0000 was worth is of other stages than the recipe has now; name another folder"),
        (["metrics.latent_probes.k=3"], "what trial-0000 was worth is of other metrics.latent_probes than the recipe has now"),
    ):
        refused = siv("sweep", "find.toml", "--set", *change, "--device", "cpu")
        assert (refused.returncode, told in refused.stderr) == (2, True), refused.stderr
    with RunDir(root).locked():
        refused = siv("sweep", "find.toml", "--device", "cpu")
        assert refused.returncode == 2, refused.stdout
    states = [trial.state.name for trial in search.open_study(made.search[0], root, "find").trials]
    assert states == ["COMPLETE"] * 4
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "important.txt").write_text("mine")
    refused = siv("sweep", "find.toml", "--root", "foreign", "--device", "cpu")
    assert (refused.returncode, "holds files that are no siv sweep" in refused.stderr) == (2, True), refused.stderr
    assert [path.name for path in foreign.iterdir()] == ["important.txt"]
    listed = siv("sweep", "find.toml", "--dry-run")
    assert "network.z_dim: 2 … 8" in listed.stdout
