"""A step on rows that are read while the one before is computed, against one on rows that lie on the device: `just bench-data`.

Random pictures in a file that was just written, so that the page cache has it; `train.residency` host against device, by turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import h5py
import numpy as np
import torch
from bench_step import HERE, keep

from siv_core.recipe import catalogue, recipe
from siv_core.runs import timing
from siv_core.train.trainer import Trainer

SETTINGS = {  # pixels a side -> pictures, channels and batch of a residual network
    32: (20_000, [64, 128, 256], 32),
    256: (500, [8, 16, 16, 16, 16, 16], 4),
}
ROUNDS = 9


def trainers(size: int, folder: Path) -> dict[str, Trainer]:
    """One for each residency, in an introspective stage, on the same file."""
    count, channels, batch = SETTINGS[size]
    with h5py.File(folder / "pictures.h5", "w") as file:
        pictures = file.create_dataset("images", (count, 3, size, size), dtype="uint8", chunks=(16, 3, size, size))
        for first in range(0, count, 1000):
            rng = np.random.default_rng(first)
            pictures[first : first + 1000] = rng.integers(0, 256, (min(1000, count - first), 3, size, size), dtype=np.uint8)
    path = folder / "bench.toml"
    path.write_text(
        f'format = 1\n[data]\nname = "hdf5"\npath = "{folder / "pictures.h5"}"\n[network]\nname = "residual_cnn"\n'
        f'channels = {channels}\nz_dim = 128\n[objective]\nname = "soft_intro_vae"\nbeta_neg = 256.0\n'
        f'[train]\nbatch = {batch}\nlength = "1000 steps"\nkeep_graphs = true\n'
    )
    known, found = catalogue.load(), {}
    for residency in ("device", "host"):
        read = recipe.load(path, known, (), (f"train.residency={residency}",))
        ready = timing.ready(read, known, lambda what, done, total: None)
        made = timing.trainer_of(ready.built, torch.device("cpu"))
        assert made.feed.residency == residency
        timing.timed(made, timing.enter(made, 0), timing.WARM_UP_STEPS)
        found[residency] = made
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", type=int, choices=sorted(SETTINGS))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SIV_DATA"] = folder
        made = trainers(arguments.size, Path(folder))
        steps = max(2, round(1.0 / timing.timed(made["device"], made["device"].active, 1)))
        seconds: dict[str, list[float]] = {name: [] for name in made}
        waited = made["host"].feed.waited
        for _ in range(ROUNDS):
            for name, one in made.items():
                seconds[name].append(timing.timed(one, one.active, steps) / steps)
        waited = made["host"].feed.waited - waited
        took = sum(seconds["host"]) * steps
    ratios = [device / host for device, host in zip(*seconds.values(), strict=True)]
    low, rate, high = statistics.quantiles(ratios, n=4)
    print(f"{arguments.size} px, {1e3 * statistics.median(seconds['device']):.1f} ms a step with all rows on the device")
    print(f"read ahead: {rate:.3f} ({low:.3f} … {high:.3f}) of that rate, {waited / took:.2%} of the time waited for rows")
    about = {
        "recipe": f"pictures of {arguments.size} px",
        "profiles": [],
        "beside": "rows on the device",
        "threads": arguments.threads,
    }
    print(keep(HERE / "bench", about, {"rate": rate, "low": low, "high": high, "waited": waited / took}))


if __name__ == "__main__":
    main()
