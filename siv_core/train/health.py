"""The health of a training: a pure judgement over the statistics of ticks, and what to try, with the user's own values beside.

What is judged are terms by their names: `kl_real` (or `kl_real.GROUP`), `kl_prior`, `logvar_real` and every `gradient_norm`. An
objective that gives none of them is not judged by it. docs/run_directories.md says where warnings are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from statistics import median
from typing import Any

from attrs import Factory, define, field, frozen

from siv_core.recipe.options import Train
from siv_core.recipe.recipe import StagePlan
from siv_core.train.schedule import Schedule

# In the shipped recipes KL real >= KL generated holds for at most 3 ticks, 300 steps, on end: when an introspective stage begins.
PATIENCE_TICKS = 10  # a tick is a mean over its steps: ten on end are no noise
PATIENCE_STEPS = 500  # however short the ticks are
PATIENCE_SHARE = 0.05  # of the stage: a long training may take longer to begin
# The mutual information of image and code is at most the mean KL: below 0.1 nats the code hardly tells two images apart (ln 2).
COLLAPSED_KL = 0.1
# A standard deviation of 1,800, or 1/1,800, of the prior's. `train.logvar_bound` (20 by default) holds them there,
# and one that stays at a smaller bound counts as well.
EXPLODED_LOGVAR = 15.0
LOGVAR_TICKS = 3  # on end: less may be the first steps of an unlucky initialisation
EXPLODED_GRADIENT = 100.0  # times the median of the stage's earlier ticks; in the shipped recipes ticks stay within 8 times
WAITING_SHARE = 0.1  # of a tick, for data
REMEMBERED = 1000  # ticks that are looked at

Tick = Mapping[str, Any]  # a line of stats.jsonl
Means = Mapping[str, float]  # term -> mean of a tick
Series = Sequence[tuple[int, Means]]  # (step, means) of one phase, tick by tick


@frozen
class Finding:
    """What is wrong at a tick."""

    kind: str  # "collapse", "no margin", "logvar" or "gradient"
    phase: str
    term: str
    words: str  # the measured values

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.phase, self.term


def judge(ticks: Sequence[Tick], first: int, steps: int, logvar_bound: float) -> list[Finding]:
    """What is wrong at the last of these ticks, all of one stage that has `steps` steps and began after step `first`."""
    patience = max(PATIENCE_STEPS, PATIENCE_SHARE * steps)
    limit = min(EXPLODED_LOGVAR, 0.99 * logvar_bound) if logvar_bound else EXPLODED_LOGVAR
    found = []
    for phase in ticks[-1]["phases"]:
        series = [(tick["step"], tick["phases"][phase]) for tick in ticks]
        found += [Finding(kind, phase, term, words) for kind, term, words in _judge(series, first, patience, limit)]
    return found


def _judge(series: Series, first: int, patience: float, logvar_limit: float) -> Iterator[tuple[str, str, str]]:
    """(kind, term, measured values) of what is wrong in one phase."""

    def lasts(wrong: Callable[[Means], bool]) -> str:
        count, steps = spell(series, first, wrong)
        return f" for {steps:,} steps" if count >= PATIENCE_TICKS and steps >= patience else ""

    now = series[-1][1]
    groups = [term for term in now if term.startswith("kl_real.")]
    for term in groups or now.keys() & {"kl_real"}:
        long = lasts(lambda means, term=term: means[term] < COLLAPSED_KL)  # type: ignore[misc]
        if long:
            yield "collapse", term, f"{now[term]:.3g} nats, below {COLLAPSED_KL:g}{long}"
    if {"kl_real", "kl_prior"} <= now.keys():
        long = lasts(lambda means: means["kl_real"] >= means["kl_prior"])
        if long:
            yield "no margin", "kl_real", f"{now['kl_real']:.4g} nats, not below kl_prior ({now['kl_prior']:.4g}){long}"
    if spell(series, first, lambda means: means.get("logvar_real", 0.0) >= logvar_limit)[0] >= LOGVAR_TICKS:
        yield "logvar", "logvar_real", f"{now['logvar_real']:.3g}, at or beyond {logvar_limit:.3g}"
    earlier = [means["gradient_norm"] for _, means in series[:-1]]
    if len(earlier) >= PATIENCE_TICKS and now["gradient_norm"] > EXPLODED_GRADIENT * median(earlier):
        words = f"{now['gradient_norm']:.3g}, the median of this stage's earlier ticks is {median(earlier):.3g}"
        yield "gradient", "gradient_norm", words


def spell(series: Series, first: int, wrong: Callable[[Means], bool]) -> tuple[int, int]:
    """How many of the last ticks on end are `wrong`, and how many steps they stand for."""
    count = sum(1 for _ in takewhile(lambda tick: wrong(tick[1]), reversed(series)))
    began = series[-count - 1][0] if count < len(series) else first
    return count, series[-1][0] - began


MEANING = {
    "collapse": "the code tells nothing about an image (posterior collapse)",
    "no margin": "the encoder does not tell data from generated samples",
    "logvar": "the log-variances of the posterior explode",
    "gradient": "the gradient explodes",
}


@define
class Monitor:
    """Follows a run tick by tick. The same lines give the same warnings: a resumed run shows it the earlier ones again."""

    schedule: Schedule
    train: Train
    groups: Mapping[str, int]
    ticks: deque[Tick] = field(factory=lambda: deque(maxlen=REMEMBERED))  # of this stage
    stage: int = -1
    lately: dict[tuple[str, str, str], int] = Factory(dict)  # what is or was wrong -> ticks since it was
    told: list[dict[str, Any]] = Factory(list)  # every warning so far, as JSON
    waiting: int = 0  # ticks on end that waited for data

    def see(self, tick: Tick) -> list[str]:
        """The warnings of this tick: once for each thing, and again when it came back after it was gone for a while."""
        stage = self.schedule.made(tick["step"])
        if stage != self.stage:
            self.stage, self.lately = stage, {}
            self.ticks.clear()
        self.ticks.append(tick)
        bounds = self.schedule.first(stage), self.schedule.steps(stage)
        found = judge(list(self.ticks), *bounds, self.train.logvar_bound)
        new = [finding for finding in found if finding.key not in self.lately]
        gone = {key: ticks + 1 for key, ticks in self.lately.items() if ticks + 1 < PATIENCE_TICKS}
        self.lately = {**gone, **{finding.key: 0 for finding in found}}
        texts = []
        for finding in new:
            about = {"step": tick["step"], "stage": stage, "phase": finding.phase, "term": finding.term, "kind": finding.kind}
            where = f"step {tick['step']}, phase '{finding.phase}', {finding.term}: {finding.words}: {MEANING[finding.kind]}"
            texts.append(f"warning: {where}\n{advice(finding.kind, self.schedule.plans[stage], self.train, self.groups)}")
            self.told.append({**about, "text": texts[-1]})
        return [*texts, *self._waits(tick)]

    def _waits(self, tick: Tick) -> list[str]:
        """Said once, where two ticks on end waited for data."""
        share = tick.get("wall", {}).get("waiting_for_data", 0.0)
        self.waiting = self.waiting + 1 if share > WAITING_SHARE else 0
        if self.waiting != 2 or any(one["kind"] == "waiting" for one in self.told):
            return []
        text = (
            f"warning: step {tick['step']}: {share:.0%} of the time goes by waiting for the data, which are read while they are"
            ' used: a faster disk, more memory (they are kept there where they fit), or train.residency "device"'
        )
        self.told.append({"step": tick["step"], "stage": self.stage, "kind": "waiting", "text": text})
        return [text]

    def not_finite(self, step: int, reason: str) -> str:
        """What to try when a value is no longer finite; counted among the warnings."""
        stage = self.schedule.made(step)
        tries = advice("not finite", self.schedule.plans[stage], self.train, self.groups)
        self.told.append({"step": step, "stage": stage, "kind": "not finite", "text": f"{reason}\n{tries}"})
        return tries


def advice(kind: str, plan: StagePlan, train: Train, groups: Mapping[str, int]) -> str:
    """What has been reported to help, beside what the recipe has now. `kind`: that of a `Finding`, or "not finite"."""
    rates = [f"{'.'.join(filter(None, ('optim', player, 'lr')))} {optim.lr:g}" for player, optim in plan.optim.items()]
    slower = f"a lower learning rate (now {', '.join(rates)})"
    narrower = f"a narrower bound on the log-variances (train.logvar_bound, now {_or_none(train.logvar_bound)})"
    clip = f"gradient clipping (train.clip_gradient, now {_or_none(train.clip_gradient)})"
    fp32 = [f"precision fp32 (now {train.precision})"] if train.precision != "fp32" else []
    objective = plan.objective.tree()
    now = {name: f"objective.{name} (now {_shown(objective[name])})" for name in objective}
    weights = [f"{word} {now[name]}" for word, name in (("a smaller", "beta_kl"), ("a larger", "beta_rec")) if name in now]
    warm_up = ["a warm-up stage of the objective 'vae' before this one"] if "beta_neg" in now else []
    tries = {
        "collapse": [*weights, *warm_up],
        "no margin": [*warm_up, *weights[:1], slower],
        "logvar": [slower, narrower, clip],
        "gradient": [slower, clip, *fp32],
        "not finite": [slower, *fp32, narrower, clip],
    }[kind]
    lines = [f"what to try: {', '.join(tries) or 'other weights of the objective'}"]
    if "beta_neg" in now:
        lines.append(
            f"and another {now['beta_neg']}:"
            " users of the published Soft-IntroVAE code were helped by a larger one (issue 10 there), by going from 256 down to"
            " 128 (on MNIST, issue 11), and by starting near the number of latent dimensions (issue 4;"
            f" here {_shown(dict(groups))})"
        )
    return "\n".join(lines)


def _or_none(number: float) -> str:
    return f"{number:g}" if number else "0, which is none"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
