"""siv's step against a naive implementation of the same step, interleaved: `just bench [RECIPE] [--profile P] [--threads N]`.

The naive step is written as the published scripts are: requires_grad switched player by player, `backward`, plain Adam, losses
read back for a NaN test. Timings of a shared machine are noisy; the ratio of medians of interleaved steps is what counts.

Each run adds a line to `bench/HARDWARE.jsonl` (figures, versions, commit, date), compared with the last one of the same recipe,
settings and threads.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from siv_core.latents import kl_standard
from siv_core.recipe import build, catalogue, recipe
from siv_core.runs.watchers import Silent
from siv_core.store import memory
from siv_core.store.rundir import RunDir
from siv_core.train import stage
from siv_core.train.parallel import Parallel
from siv_core.train.trainer import Trainer

HERE = Path(__file__).resolve().parent.parent


def trainer(path: Path, profiles: list[str], sets: list[str]) -> Trainer:
    known = catalogue.load()
    read = recipe.load(path, known, profiles, sets)
    data = build.dataset(read, known)
    data.prepare(lambda what, done, total: None)
    built = build.build(read, known, data)
    return Trainer.of(built, RunDir.at(Path(tempfile.mkdtemp())), torch.device("cpu"), Parallel(), Silent())


def naive_step(networks, optimisers, x, noise, b, scale, r, bound):
    """Algorithm 2 in the order of the published code, with the bound on log-variances that ours has."""
    D = networks.decoder  # noqa: N806
    optimiser_e, optimiser_d = optimisers

    def E(x):  # noqa: N802
        q = networks.encoder(x)
        return {g: q[g]._replace(logvar=q[g].logvar.clamp(-bound, bound)) for g in q} if bound else q

    def kl(q):
        return {g: kl_standard(q[g]) for g in q}

    def total(values, betas):
        return sum(betas[g] * values[g] for g in values)

    def draw(q):
        return {g: q[g].mu + torch.randn_like(q[g].mu) * torch.exp(0.5 * q[g].logvar) for g in q}

    for p in networks.encoder.parameters():
        p.requires_grad_(True)
    for p in D.parameters():
        p.requires_grad_(False)
    q = E(x)
    z = draw(q)
    x_r, x_p = D(z), D(noise)
    loss_e = scale * (b["beta_rec"] * r(x, x_r) + total(kl(q), b["beta_kl"])).mean()
    for fake in (x_r, x_p):
        q_f = E(fake.detach())
        x_ff = D(draw(q_f))
        loss_e = loss_e + 0.25 * torch.exp(-2 * scale * (b["beta_rec"] * r(fake, x_ff) + total(kl(q_f), b["beta_neg"]))).mean()
    optimiser_e.zero_grad()
    loss_e.backward()
    optimiser_e.step()

    for p in networks.encoder.parameters():
        p.requires_grad_(False)
    for p in D.parameters():
        p.requires_grad_(True)
    x_r, x_p = D({g: z[g].detach() for g in z}), D(noise)
    loss_d = b["beta_rec"] * r(x, x_r).mean()
    for fake in (x_r, x_p):
        q_f = E(fake)
        x_ff = D({g: v.detach() for g, v in draw(q_f).items()})
        loss_d = loss_d + 0.5 * (total(kl(q_f), b["beta_kl"]) + b["gamma_r"] * b["beta_rec"] * r(fake.detach(), x_ff)).mean()
    loss_d = scale * loss_d
    optimiser_d.zero_grad()
    loss_d.backward()
    optimiser_d.step()
    if torch.isnan(loss_e) or torch.isnan(loss_d):
        raise SystemError


# -- kept by hardware ------------------------------------------------------------------------------------------------------------


def hardware() -> str:
    """The processor and its cores, as a file's name."""
    told = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", told.read_text(), re.M) if told.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{name} {memory.cores()} cores").strip("-")


def keep(folder: Path, about: dict[str, Any], figures: dict[str, float]) -> str:
    """Add the figures to the file of this hardware; what they were the time before, in a sentence."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    path = folder / f"{hardware()}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    before = [line for line in lines if all(line.get(key) == value for key, value in about.items())]
    line = {
        **about,
        **{key: round(value, 4) for key, value in figures.items()},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }
    folder.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    if not before:
        return f"{path}: the first of its kind"
    last = before[-1]
    changes = ", ".join(f"{key} {last[key]:.4g} -> {figures[key]:.4g}" for key in figures if key in last)
    return f"{path}: since {last['date']} ({last['commit']}): {changes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", type=Path, default=HERE / "recipes/digits.toml")
    parser.add_argument("--profile", action="append", default=[])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours = trainer(arguments.recipe, arguments.profile, arguments.set)
    theirs = trainer(arguments.recipe, arguments.profile, arguments.set)
    last = len(ours.built.recipe.stages) - 1
    active = stage.enter(ours, last)
    bound = theirs.built.recipe.train.logvar_bound
    numbers, shape = dict(active.objective.coeffs), active.stage.shape
    networks, lr = theirs.built.networks, active.plan.optim[""].lr
    optimisers = [torch.optim.Adam(module.parameters(), lr=lr) for module in (networks.encoder, networks.decoder)]
    times: dict[str, list[float]] = {"siv": [], "naive": []}
    for i in range(arguments.steps + 3):
        begun = time.perf_counter()
        ours.step(active)
        between = time.perf_counter()
        positions = theirs.order.take(i * active.plan.batch, active.plan.batch)
        x = theirs.feed.batch(positions, shape, theirs.layout).x
        noise = {g: torch.randn(len(x), dim) for g, dim in networks.groups.items()}
        naive_step(networks, optimisers, x, noise, numbers, numbers["scale"], theirs.built.reconstruction, bound)
        ended = time.perf_counter()
        ours.counters.step += 1
        ours.counters.images_seen += active.plan.batch
        if i >= 3:  # the first ones allocate
            times["siv"].append(between - begun)
            times["naive"].append(ended - between)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:6} {1e3 * value:9.2f} ms a step (median of {arguments.steps}, {torch.get_num_threads()} threads)")
    ratios = sorted(a / b for a, b in zip(times["siv"], times["naive"], strict=True))
    print(f"siv / naive: {medians['siv'] / medians['naive']:.3f} (quartiles of single pairs {ratios[len(ratios) // 4]:.3f}"
          f" … {ratios[3 * len(ratios) // 4]:.3f})")  # fmt: skip
    about = {
        "recipe": arguments.recipe.stem, "profiles": arguments.profile, "sets": arguments.set, "threads": torch.get_num_threads()
    }  # fmt: skip
    figures = {f"{name}_ms": 1e3 * value for name, value in medians.items()}
    print(keep(HERE / "bench", about, {**figures, "siv / naive": medians["siv"] / medians["naive"]}))


if __name__ == "__main__":
    main()
