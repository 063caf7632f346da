"""The fork that most tests start `siv` in is what the installed command is: the same words, exit codes and surroundings."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import crash
import forked
import pytest
from conftest import TINY


@pytest.mark.parametrize("arguments", [["recipes", "show", "digits"], ["rnu"], ["run", "nowhere.toml"]], ids=" ".join)
def test_it_says_and_ends_as_the_installed_command(siv, arguments):
    ours, theirs = siv(*arguments), siv(*arguments, fresh=True)
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)


def test_it_has_this_process_environment_as_it_is_now(siv, tmp_path, monkeypatch):
    monkeypatch.setenv("SIV_DATA", str(tmp_path / "elsewhere"))
    assert str(tmp_path / "elsewhere") in siv("data", "ls").stdout
    monkeypatch.setenv("SIV_DISABLE", "mlp")
    assert "left out by SIV_DISABLE" in siv("list-plugins").stdout


def test_it_ends_by_a_signal_or_when_its_time_is_over(tmp_path):
    (tmp_path / "long.toml").write_text(TINY.replace('"12 steps"', '"1000000 steps"'))
    process = forked.Siv(tmp_path, "run", "long.toml", "--run-dir", "run", "--device", "cpu")
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(0.1)
    process.kill()
    process.communicate(60)
    assert process.returncode == -signal.SIGKILL
    before = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run(tmp_path, "run", "long.toml", "--run-dir", "run", "--device", "cpu", seconds=1)
    assert time.monotonic() - before < 30


def note_path(file: str) -> None:
    Path(file).write_text(repr(os.environ.get("PYTHONPATH")))


def test_the_path_that_the_server_was_started_with_is_not_for_its_children(tmp_path):
    assert crash.in_child(note_path, str(tmp_path / "path"))[0] == 0
    assert (tmp_path / "path").read_text() == repr(os.environ.get("PYTHONPATH"))
