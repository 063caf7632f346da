"""Run directories: numbers, strangers, locks, and lines that are taken back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from siv_core.errors import UserError
from siv_core.store.rundir import RunDir, unfinished


def test_numbers_go_up_and_nothing_is_used_twice(tmp_path):
    root = tmp_path / "a" / "runs"
    assert [RunDir.create(root, name).path.name for name in ("x", "y", "x")] == ["00000-x", "00001-y", "00002-x"]
    (root / "00041-by hand").mkdir()
    (root / "notes").mkdir()
    (root / "00099").write_text("no run: it has no name")
    assert RunDir.create(root, "z").path.name == "00042-z"
    assert sorted(path.name for path in (root / "00042-z").iterdir()) == ["checkpoints", "images"]


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="runs: this folder cannot be made"):
        RunDir.create(tmp_path / "runs", "x")


def test_a_named_directory_is_empty_or_a_run(tmp_path):
    assert RunDir.at(tmp_path / "new" / "er").path.is_dir()
    RunDir.at(tmp_path / "new" / "er")  # what an early kill leaves is no stranger
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="mine: holds files that are no siv run"):
        RunDir.at(tmp_path / "mine")
    with pytest.raises(UserError, match=r"thesis.tex: is no folder"):
        RunDir.at(tmp_path / "mine" / "thesis.tex")
    (tmp_path / "mine" / "resolved.json").write_text('{"format": 1}')
    assert RunDir.at(tmp_path / "mine").resolved() == {"format": 1}


def test_only_runs_of_this_format_are_read(tmp_path):
    with pytest.raises(UserError, match=r"no run here \(it has no resolved.json\)"):
        RunDir.existing(tmp_path)
    (tmp_path / "resolved.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match=r"resolved.json: format 2 is of a newer siv, this one reads 1: update it"):
        RunDir.existing(tmp_path)
    (tmp_path / "resolved.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match=r"format 0 is of an older siv, this one reads 1: use the one that manifest.json names"):
        RunDir.existing(tmp_path)
    (tmp_path / "resolved.json").write_text('{"form')
    with pytest.raises(UserError, match=r"resolved.json: damaged, not JSON"):
        RunDir.existing(tmp_path)


def test_lines_after_a_checkpoint_are_taken_back(tmp_path):
    run = RunDir.at(tmp_path / "run")
    assert run.offsets() == {"stats": 0, "metrics": 0}
    run.append("stats", {"step": 1, "loss": float("nan")})
    offsets = run.offsets()
    run.append("stats", {"step": 2})
    run.append("metrics", {"metric": "m"})
    (run.images / ".siv-tmp-17-x.png").write_text("half")
    (run.checkpoints / ".siv-tmp-17-step_00000002").mkdir()
    run.cut(offsets)
    assert run.read("stats") == [{"step": 1, "loss": "nan"}]
    assert (run.path / "stats.jsonl").read_text().splitlines()[0] == '{"format": 2}'
    assert not (run.path / "metrics.jsonl").exists()
    assert not list(run.path.rglob(".siv-tmp-*"))
    run.cut({"stats": 10_000, "metrics": 0})
    assert len(run.read("stats")) == 1


def test_lines_of_evaluate_stay(tmp_path):
    run = RunDir.at(tmp_path / "run")
    run.append("metrics", {"by": "run", "value": 1})
    run.append("metrics", {"by": "evaluate", "value": 2})
    run.append("metrics", {"by": "run", "value": 3})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"by": "evaluate", "val')  # killed here
    for _ in range(2):
        run.cut({"metrics": 0})
        assert run.read("metrics") == [{"by": "evaluate", "value": 2}]
        assert (run.path / "metrics.jsonl").read_text().splitlines()[0] == '{"format": 2}'
    offsets = run.offsets()
    run.append("metrics", {"by": "run", "value": 4})
    run.append("metrics", {"by": "evaluate", "value": 5})
    run.cut(offsets)
    assert [line["value"] for line in run.read("metrics")] == [2, 5]


LOCKER = """
import sys
from pathlib import Path
from siv_core.store.rundir import RunDir
with RunDir(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_lock_goes_with_its_process(tmp_path):
    command = [sys.executable, "-c", LOCKER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another process is working on this run"), RunDir(tmp_path).locked():
            pass
        process.kill()
        process.wait(30)
    with RunDir(tmp_path).locked():
        pass


def test_unfinished_runs_of_a_recipe(tmp_path):
    recipe, other = {"format": 1, "a": 1}, {"format": 1, "a": 2}
    expected = []
    for resolved, state in ((recipe, "stopped"), (recipe, "finished"), (other, "stopped"), (recipe, "failed"), (recipe, None)):
        run = RunDir.create(tmp_path, "r")
        (run.path / "resolved.json").write_text(json.dumps(resolved))
        if state:
            run.status(state)
        if resolved == recipe and state != "finished":
            expected.append(run.path)
    (tmp_path / "00000-r" / "status.json").write_text("{")  # a damaged one stops nothing
    assert unfinished(tmp_path, recipe) == expected[1:]
    assert unfinished(tmp_path / "nowhere", recipe) == []
