"""A step of one process against that of two on one machine, a thread and the recipe's batch each: `just bench-scaling`.

Ideal is that two do twice the batch in the same time. Told with it: the share of a step that goes into summing the gradients, and
how much two processes that have nothing to do with each other slow each other down, which is the machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from attrs import evolve
from bench_step import HERE, keep

from siv_core.recipe import build, catalogue, recipe
from siv_core.runs import timing
from siv_core.runs.watchers import Silent
from siv_core.store.rundir import RunDir
from siv_core.train import parallel
from siv_core.train.parallel import Parallel
from siv_core.train.trainer import Trainer

ROUNDS = 3


def timed(path: Path, profiles: list[str], sets: list[str]) -> None:
    """By each of the processes: seconds a step of the first introspective stage, and of its sums; the main one prints them."""
    torch.set_num_threads(1)
    processes = parallel.start(torch.device("cpu"))
    known = catalogue.load()
    read = recipe.load(path, known, profiles, sets)
    stages = tuple(evolve(plan, batch=plan.batch * processes.world) for plan in read.stages)
    read = evolve(read, stages=stages, train=evolve(read.train, batch=read.train.batch * processes.world))
    data = build.dataset(read, known)
    data.prepare(lambda what, done, total: None)
    trainer = Trainer.of(build.build(read, known, data), RunDir(Path()), torch.device("cpu"), processes, Silent())
    active = timing.enter(trainer, next(i for i, plan in enumerate(stages) if plan.objective.name != "vae"))
    summing, own = [0.0], Parallel.sum_

    def summed(self: Parallel, tensors: list[torch.Tensor]) -> None:
        begun = time.perf_counter()
        own(self, tensors)
        summing[0] += time.perf_counter() - begun

    Parallel.sum_ = summed  # type: ignore[method-assign]
    timing.timed(trainer, active, timing.WARM_UP_STEPS)
    steps = max(5, round(6.0 / timing.timed(trainer, active, 1))) if processes.world == 1 else 0
    steps = processes.largest(steps) or int(os.environ["STEPS"])
    summing[0] = 0.0
    seconds = timing.timed(trainer, active, steps) / steps
    if processes.main:
        print(json.dumps({"steps": steps, "seconds": seconds, "summing": summing[0] / steps}))


def run(world: int, arguments: list[str], steps: int) -> dict[str, float]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    command = [sys.executable, *launcher, __file__, "--timed", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STEPS": str(steps)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def beside(arguments: list[str], steps: int) -> float:
    """Seconds a step of two processes of their own at once."""
    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(lambda _: run(1, arguments, steps), range(2)))
    return statistics.mean(one["seconds"] for one in told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", type=Path, default=HERE / "recipes/digits.toml")
    parser.add_argument("--profile", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], dest="sets", help="as of siv run")
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.timed:
        timed(arguments.recipe, arguments.profile, arguments.sets)
        return
    options = [("--profile", name) for name in arguments.profile] + [("--set", value) for value in arguments.sets]
    given = [str(arguments.recipe), *(part for option in options for part in option)]
    ones, twos, apart = [], [], []
    for _ in range(ROUNDS):  # by turns
        ones.append(run(1, given, 0))
        twos.append(run(2, given, int(ones[-1]["steps"])))
        apart.append(beside(given, 0))
    one, two = (statistics.median(told["seconds"] for told in of) for of in (ones, twos))
    machine = statistics.median(apart)
    share = statistics.median(told["summing"] / told["seconds"] for told in twos)
    print(f"one process {1e3 * one:.1f} ms a step, two with twice the batch {1e3 * two:.1f} ms: {one / two:.3f} of ideal")
    print(f"two that share nothing {1e3 * machine:.1f} ms: {one / machine:.3f} of ideal; two that sum {machine / two:.3f} of it")
    print(f"summing gradients, and waiting for the other: {share:.1%} of a step")
    about = {
        "recipe": arguments.recipe.stem,
        "profiles": arguments.profile,
        "sets": arguments.sets,
        "beside": "two processes",
        "threads": 1,
    }
    figures = {"of_ideal": one / two, "of_two_apart": machine / two, "summing": share, "one_ms": 1e3 * one, "two_ms": 1e3 * two}
    print(keep(HERE / "bench", about, figures))


if __name__ == "__main__":
    main()
