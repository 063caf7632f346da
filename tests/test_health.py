"""A training that goes wrong says so once, with what to try; one that goes well says nothing."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch
import toys
from toys import SMALL

from siv_core.data import feed
from siv_core.errors import Diverged
from siv_core.recipe.convert import Length
from siv_core.recipe.options import Optim, Train
from siv_core.recipe.recipe import Choice, StagePlan
from siv_core.runs import session, watchers
from siv_core.store.rundir import RunDir
from siv_core.train import stage
from siv_core.train.health import EXPLODED_GRADIENT, PATIENCE_TICKS, Monitor, advice, judge
from siv_core.train.schedule import Schedule
from siv_core.train.trainer import Trainer

HEALTHY = {"kl_real": 20.0, "kl_prior": 22.0, "logvar_real": 4.0, "loss": 1.0, "gradient_norm": 0.1}


def ticks(*means, every=100, first=0, phase="encoder", **common):
    """Lines of stats.jsonl with these means, each on top of healthy ones."""
    return [{"step": first + every * (i + 1), "phases": {phase: {**HEALTHY, **common, **one}}} for i, one in enumerate(means)]


def kinds(lines, steps=4000, bound=20.0, first=0):
    return [(finding.kind, finding.term) for finding in judge(lines, first, steps, bound)]


# -- the judgement ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"kl_real": 0.05}, [("collapse", "kl_real")]),
        ({"kl_real.class": 0.05, "kl_real.content": 12.0}, [("collapse", "kl_real.class")]),
        ({"kl_real": 22.0}, [("no margin", "kl_real")]),
        ({"logvar_real": 15.0}, [("logvar", "logvar_real")]),
        ({"kl_real": 0.11}, []),
        ({"kl_real": 21.9, "logvar_real": 14.9}, []),
    ],
)
def test_what_lasts_is_found(wrong, expected):
    assert kinds(ticks(*[wrong] * 12)) == expected


def test_the_first_ticks_are_left_alone():
    wrong = {"kl_real": 0.0, "kl_prior": 0.0}
    lasting = [("collapse", "kl_real"), ("no margin", "kl_real")]
    assert [kinds(ticks(*[wrong] * n)) for n in (1, 9, 10)] == [[], [], lasting]
    assert [kinds(ticks(*[wrong] * n, every=10)) for n in (10, 49, 50)] == [[], [], lasting]  # 500 steps, however short the ticks
    assert [kinds(ticks(*[wrong] * n), steps=100_000) for n in (10, 49, 50)] == [[], [], lasting]  # a twentieth of a long stage
    assert [kinds(ticks(*[wrong] * n, first=7000), first=7000) for n in (9, 10)] == [[], lasting]
    assert [kinds(ticks(*[{"logvar_real": 19.0}] * n)) for n in (1, 2, 3)] == [[], [], [("logvar", "logvar_real")]]


def test_a_break_starts_the_count_anew():
    low, fine = {"kl_real": 0.01}, {}
    assert kinds(ticks(*[low] * 9, fine, *[low] * 9)) == []
    assert kinds(ticks(*[low] * 9, fine, *[low] * 10)) == [("collapse", "kl_real")]


def test_a_bound_that_is_reached_counts():
    assert kinds(ticks(*[{"logvar_real": 8.0}] * 3), bound=8.0) == [("logvar", "logvar_real")]
    assert kinds(ticks(*[{"logvar_real": 8.0}] * 3), bound=0.0) == []


def test_a_gradient_explodes_against_its_own_past():
    usual = [{"gradient_norm": norm} for norm in (0.5, 0.2, 0.1, 0.3, 0.1) * 2]
    edge = EXPLODED_GRADIENT * 0.2
    assert kinds(ticks(*usual, {"gradient_norm": 0.99 * edge})) == []
    assert kinds(ticks(*usual, {"gradient_norm": 1.01 * edge})) == [("gradient", "gradient_norm")]
    assert kinds(ticks(*usual[1:], {"gradient_norm": 1e9})) == []  # too little past


def test_an_objective_without_these_terms_is_judged_by_its_gradient_alone():
    lines = [{"step": 100 * i, "phases": {"own": {"energy": 0.0, "gradient_norm": 0.1}}} for i in range(1, 40)]
    assert kinds(lines) == []


# -- warnings --------------------------------------------------------------------------------------------------------------------


def plan(steps=100_000, **objective):
    from siv_core.objectives.soft_intro_vae import SoftIntroVAEConfig

    choice = Choice("objective", "soft_intro_vae", SoftIntroVAEConfig(**objective))
    return StagePlan(Length(steps, "steps"), choice, {"": Optim(lr=3e-4), "encoder": Optim(lr=1e-4)}, 64)


def monitor(*ends):
    return Monitor(Schedule((plan(),) * len(ends), tuple(ends)), Train(), {"z": 10})


def test_a_warning_is_told_once_and_again_when_it_came_back():
    low, fine = {"kl_real": 0.01}, {}
    lines = ticks(*[low] * 40, *[fine] * 2, *[low] * 40, *[fine] * PATIENCE_TICKS, *[low] * 40)
    watch = monitor(20_000)
    told = [line["step"] for line in lines if watch.see(line)]
    assert told == [1000, 4200 + 1000, 9200 + 1000]
    assert [warning["step"] for warning in watch.told] == told


def test_a_gradient_that_jumps_again_and_again_is_told_once():
    usual, jump = [{}] * 12, {"gradient_norm": 1e6}
    watch = monitor(20_000)
    lines = ticks(*usual, *[jump, {}] * 5, *[{}] * PATIENCE_TICKS, jump)
    assert [line["step"] for line in lines if watch.see(line)] == [1300, 3300]


def test_a_warning_names_step_phase_term_and_what_to_try():
    watch = monitor(4000)
    [text] = [text for line in ticks(*[{"kl_real": 25.0}] * 12) for text in watch.see(line)]
    assert text.splitlines() == [
        "warning: step 1000, phase 'encoder', kl_real: 25 nats, not below kl_prior (22) for 1,000 steps: the encoder does not"
        " tell data from generated samples",
        "what to try: a warm-up stage of the objective 'vae' before this one, a smaller objective.beta_kl (now 1), a lower"
        " learning rate (now optim.lr 0.0003, optim.encoder.lr 0.0001)",
        "and another objective.beta_neg (now 256): users of the published Soft-IntroVAE code were helped by a larger one (issue"
        " 10 there), by going from 256 down to 128 (on MNIST, issue 11), and by starting near the number of latent dimensions"
        " (issue 4; here z 10)",
    ]
    [told] = watch.told
    assert {key: told[key] for key in ("step", "stage", "phase", "term", "kind")} == {
        "step": 1000,
        "stage": 0,
        "phase": "encoder",
        "term": "kl_real",
        "kind": "no margin",
    }


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("collapse", ["a smaller objective.beta_kl (now a 1, b 2)", "a larger objective.beta_rec (now 0.5)", "warm-up stage"]),
        ("logvar", ["optim.lr 0.0003", "train.logvar_bound, now 20", "train.clip_gradient, now 0, which is none"]),
        ("gradient", ["optim.lr 0.0003", "train.clip_gradient", "precision fp32 (now bf16)"]),
        ("not finite", ["optim.lr 0.0003", "precision fp32 (now bf16)", "train.logvar_bound", "train.clip_gradient"]),
    ],
)
def test_advice_shows_the_users_own_values(kind, words):
    own = plan(beta_kl={"a": 1.0, "b": 2.0}, beta_rec=0.5, beta_neg={"a": 4.0, "b": 8.0})
    text = advice(kind, own, Train(precision="bf16"), {"a": 3, "b": 2})
    for word in (*words, "objective.beta_neg (now a 4, b 8)", "here a 3, b 2"):
        assert word in text
    assert "precision" not in advice(kind, own, Train(), {"a": 3, "b": 2})


def test_the_stage_of_a_step():
    assert [Schedule((), (10, 25)).made(step) for step in (0, 1, 10, 11, 25)] == [0, 0, 0, 1, 1]


# -- real runs -------------------------------------------------------------------------------------------------------------------

COLLAPSING = (
    SMALL
    + """
[objective]
name = "vae"
beta_kl = 300.0
[optim]
lr = 3e-3
[train]
batch = 16
length = "140 steps"
tick = "5 steps"
checkpoint = "60 steps"
"""
)


class Told(watchers.Silent):
    """Keeps what a run says."""

    def __init__(self, stop_at=0):
        self.lines, self.stop_at, self.step = [], stop_at, 0

    def say(self, line):
        self.lines.append(line)

    def stepped(self, step, steps, images_seen):
        self.step = step

    def asked_to_stop(self):
        return 15 if self.step == self.stop_at else 0


def test_a_run_that_collapses_says_so_everywhere_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("siv_core.train.health.PATIENCE_STEPS", 100)  # a shorter run than people's
    (tmp_path / "recipe.toml").write_text(COLLAPSING)
    told = Told()
    done = session.run(tmp_path / "recipe.toml", watcher=told, run_dir=tmp_path / "run", device="cpu")
    assert done.state == "finished"
    [warning] = [line for line in told.lines if line.startswith("warning")]
    head = warning.splitlines()[0]
    assert re.fullmatch(
        r"warning: step \d+, phase 'vae', kl_real: \S+ nats, below 0.1 for \d+ steps: the code tells nothing about an image"
        r" \(posterior collapse\)",
        head,
    )
    assert "objective.beta_kl (now 300)" in warning
    assert (tmp_path / "run" / "log.txt").read_text().count(head) == 1
    [kept] = RunDir(tmp_path / "run").manifest()["warnings"]
    assert kept["text"] == warning

    # stopped after the warning and continued: told once, kept once, and the same statistics to the bit
    with pytest.raises(Exception, match="signal 15"):
        session.run(tmp_path / "recipe.toml", watcher=Told(stop_at=130), run_dir=tmp_path / "again", device="cpu")
    continued = Told()
    session.resume(tmp_path / "again", watcher=continued, device="cpu")
    assert not [line for line in continued.lines if line.startswith("warning")]
    assert RunDir(tmp_path / "again").manifest()["warnings"] == [kept]
    lines = [[{**line, "wall": 0} for line in RunDir(tmp_path / name).read("stats")] for name in ("run", "again")]
    assert lines[0] == lines[1]


def test_a_slow_disk_is_said_once_and_stands_in_the_run(tmp_path, monkeypatch):
    """Of a set that is read while it is used, from a disk that takes twice the time of a step."""
    fetch, step = feed.Feed._fetched, Trainer.step

    def slow_fetch(self, positions, shape):
        time.sleep(0.04)
        return fetch(self, positions, shape)

    def slow_step(self, active):
        step(self, active)
        time.sleep(0.02)

    monkeypatch.setattr(feed.Feed, "_fetched", slow_fetch)
    monkeypatch.setattr(Trainer, "step", slow_step)
    text = SMALL + '[objective]\nname = "vae"\n[train]\nlength = "40 steps"\ntick = "10 steps"\nresidency = "host"\n'
    (tmp_path / "slow.toml").write_text(text)
    told = Told()
    session.run(tmp_path / "slow.toml", watcher=told, run_dir=tmp_path / "run", device="cpu")
    shares = [line["wall"]["waiting_for_data"] for line in RunDir(tmp_path / "run").read("stats")]
    assert all(0.2 < share < 0.9 for share in shares[1:])
    [warning] = [line for line in told.lines if line.startswith("warning")]
    assert re.match(r"warning: step 20: \d\d% of the time goes by waiting for the data", warning)
    [kept] = RunDir(tmp_path / "run").manifest()["warnings"]
    assert kept["text"] == warning


def test_what_is_not_finite_names_step_phase_term_values_and_what_to_try(tmp_path):
    text = COLLAPSING.replace(
        "lr = 3e-3", "lr = 3e-3\n[[stages]]\nlength = '20 steps'\n[[stages]]\nlength = '20 steps'\noptim = {lr = 1e20}"
    )
    (tmp_path / "recipe.toml").write_text(
        text.replace('length = "140 steps"\n', "logvar_bound = 0.0\n").replace("60 steps", "5 steps")
    )
    run = tmp_path / "run"
    with pytest.raises(Diverged) as raised:
        session.run(tmp_path / "recipe.toml", run_dir=run, device="cpu")
    lines = str(raised.value).splitlines()
    assert re.match(
        r"no longer finite since step 2\d: rec_real of phase 'vae' \(this step's means: rec_real \S+, .*kl_real ", lines[0]
    )
    good = RunDir(run).checkpoints
    assert lines[1] == f"nothing of it was saved; the checkpoint of step 20 in {good} is good"
    assert "now optim.lr 1e+20" in lines[2]  # of the stage in which it happened
    assert "train.logvar_bound, now 0, which is none" in lines[2]
    assert str(raised.value) in (run / "log.txt").read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "diverged"
    [kept] = RunDir(run).manifest()["warnings"]
    assert (kept["kind"], kept["step"] // 10) == ("not finite", 2)


def test_the_values_of_the_first_bad_step_are_told(catalogue, tmp_path):
    t = toys.trainer(catalogue, tmp_path, toys.tree())
    active = stage.enter(t, 0)
    t.step(active)
    with torch.no_grad():
        next(t.players["decoder"].module.parameters()).fill_(torch.nan)
    t.counters.step += 1
    t.step(active)
    with pytest.raises(
        Diverged, match=r"since step 1: rec_real of phase 'encoder' \(this step's means: rec_real nan, kl_real \d"
    ):
        t.stats.check()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_shipped_digits_recipe_gives_no_warning(digits):
    done, run = digits
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout
    assert RunDir(run).manifest()["warnings"] == []
