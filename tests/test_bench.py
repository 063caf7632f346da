"""What `just bench` keeps: a line a run in the file of this hardware, compared with the one before of the same kind."""

from __future__ import annotations

import json

import bench_step


def test_a_run_is_compared_with_the_one_before_of_its_kind(tmp_path):
    folder, about = tmp_path / "bench", {"recipe": "digits", "profiles": [], "sets": [], "threads": 1}
    first = bench_step.keep(folder, about, {"siv_ms": 12.0, "siv / naive": 1.1})
    assert first.endswith(": the first of its kind")
    assert bench_step.keep(folder, {**about, "threads": 2}, {"siv_ms": 7.0}).endswith(": the first of its kind")
    again = bench_step.keep(folder, about, {"siv_ms": 10.0, "siv / naive": 1.0})
    assert ": siv_ms 12 -> 10, siv / naive 1.1 -> 1" in again
    [path] = folder.iterdir()
    assert path.suffix == ".jsonl"
    assert path.stem.endswith("cores")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["siv_ms"] for line in lines] == [12.0, 7.0, 10.0]
    assert all(line["torch"] and line["python"] and len(line["date"]) == 10 for line in lines)
