"""What the machine may do to a run: a full disk, folders that cannot be written or are gone, closed terminals, other locales."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import crash
import pytest
import torch
from conftest import TINY
from test_resume import contents

from siv_core.cli.console import Screen
from siv_core.errors import Stopped, UserError
from siv_core.runs import session, watchers
from siv_core.store import checkpoint
from siv_core.store.rundir import RunDir

RUN = ["run", "tiny.toml", "--run-dir", "run", "--device", "cpu"]
RESUME = ["run", "--resume", "run", "--device", "cpu"]


class Done:
    """What `crash.siv` left."""

    def __init__(self, folder: Path) -> None:
        self.codes = [int(code) for code in Path(f"{folder}.codes").read_text().split()]
        self.err = Path(f"{folder}.err").read_text()
        self.out = Path(f"{folder}.out").read_text() if Path(f"{folder}.out").exists() else ""
        assert "Traceback" not in self.err + self.out, self.err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "tiny.toml").write_text(TINY)
    return tmp_path / "work"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.toml").write_text(TINY)
    session.run(folder / "tiny.toml", run_dir=folder / "run", device="cpu")
    return folder / "run"


def siv(folder: Path, *commands: list[str], **more: Any) -> Done:
    code, _ = crash.in_child(crash.siv, str(folder), *commands, **more)
    if code == crash.NOT_PERMITTED:
        pytest.skip("this machine does not let us mount a file system of our own")
    assert code == 0
    return Done(folder)


# -- the disk --------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_nothing_that_was_written(folder, undisturbed):
    """A real one: a file system of 160 kB, and later of 4 MB."""
    shutil.copytree(folder, f"{folder}.first")
    done = siv(folder, RUN, ["space", "4m"], RESUME, tmpfs="160k")
    assert done.codes == [2, 0]
    assert "cannot be written (No space left on device); free some space there" in done.err
    assert "checkpoints/step_000000" in done.err  # the file that was being written
    assert "once that is mended `siv run --resume run` goes on" in done.err
    assert contents(Path(f"{folder}.copy") / "run") == contents(undisturbed)


def test_a_limit_on_file_sizes_is_told_and_costs_nothing(folder):
    wide = ("network.hidden=[400]",)
    done = siv(folder, [*RUN, "--set", *wide], limit=60_000)
    assert done.codes == [2], done.err
    assert "run/checkpoints/step_00000004: cannot be written (File too large); lift the limit on the size of files" in done.err
    assert list((folder / "run/checkpoints").iterdir()) == []
    assert json.loads((folder / "run/status.json").read_text())["state"] == "failed"
    session.resume(folder / "run", device="cpu")
    session.run(folder / "tiny.toml", run_dir=folder / "other", sets=wide, device="cpu")
    assert contents(folder / "run") == contents(folder / "other")


def test_a_run_that_cannot_be_written(folder, undisturbed):
    shutil.copytree(folder, f"{folder}.first")
    shutil.copytree(undisturbed, Path(f"{folder}.first") / "run")
    commands = [["sample", "run"], ["evaluate", "run"], RESUME, ["run", "tiny.toml"], ["recipes", "copy", "2d_ring"]]
    done = siv(folder, ["read-only"], *commands, tmpfs="4m")
    assert set(done.codes) == {2}
    assert "run/outputs: this folder cannot be made (Read-only file system)" in done.err
    assert "run/lock: cannot be written (Read-only file system); make it writable, or name another folder" in done.err
    assert "runs: this folder cannot be made (Read-only file system)" in done.err


class Vandal(watchers.Silent):
    """Takes a folder away at the first tick."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ticked(self, line: dict[str, Any]) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def test_a_data_root_that_vanishes(tmp_path, monkeypatch, folder):
    """What is mapped stays readable to the end of the run; the next start makes it again."""
    monkeypatch.setenv("SIV_DATA", str(tmp_path / "data"))
    crash.render(str(tmp_path / "data"))  # a few small cars in place of the 183
    text = TINY.replace('name = "digits"', 'name = "rendered_cars"\nsize = 8\nheld_out_models = 2').split("[metrics")[0]
    (folder / "cars.toml").write_text(text)
    done = session.run(folder / "cars.toml", run_dir=folder / "run", device="cpu", watcher=Vandal(tmp_path / "data"))
    assert done.state == "finished"
    assert not (tmp_path / "data").exists()


def test_a_run_directory_that_vanishes(folder):
    with pytest.raises(UserError, match=r"cannot be written \(No such file or directory\); the folder is gone: bring it back"):
        session.run(folder / "tiny.toml", run_dir=folder / "run", device="cpu", watcher=Vandal(folder / "run"))


# -- who reads what we print -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stdout", "reason"), [(os.devnull, "Broken pipe"), ("/dev/full", "No space left on device")])
def test_a_run_goes_on_when_nobody_reads_it(folder, stdout, reason, undisturbed):
    done = siv(folder, RUN, stdout=stdout)
    assert done.codes == [0]
    assert f"standard output is lost ({reason}): going on without it; the run's log.txt tells how it ends" in done.err
    assert contents(folder / "run") == contents(undisturbed)
    assert "finished at step 12" in (folder / "run/log.txt").read_text()


@pytest.mark.parametrize("command", [["list-plugins"], ["list-plugins", "--json"], ["recipes", "ls"]])
def test_a_list_that_nobody_reads_ends(folder, command):
    """As other programs do: by SIGPIPE, without a word, where the reader has seen enough."""
    code, _ = crash.in_child(crash.siv, str(folder), command, stdout=os.devnull)
    assert code == -signal.SIGPIPE
    assert Path(f"{folder}.err").read_text() == ""
    done = siv(folder, command, stdout="/dev/full")
    assert done.codes == [2]
    assert done.err == "error: standard output: cannot be written (No space left on device); free some space there\n"


@pytest.fixture
def handlers():
    """Gives back what handles signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_is_a_wish_to_stop_as_the_other_signals_are(number):
    screen = Screen()
    screen.listen()
    os.kill(os.getpid(), number)
    assert screen.asked_to_stop() == number
    assert Stopped(number).exit_code == 128 + number


@pytest.mark.usefixtures("handlers")
def test_nohup_stays_in_force():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    screen = Screen()
    screen.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert screen.asked_to_stop() == 0


# -- surroundings ----------------------------------------------------------------------------------------------------------------


def test_a_locale_without_our_letters(folder):
    done = siv(folder, RUN, ["list-plugins"], ["describe", "network", "adain"], env={"PYTHONIOENCODING": "ascii"})
    assert done.codes == [0, 0, 0]
    assert done.out.isascii()


def test_names_that_are_no_text(folder):
    name = os.fsdecode(b"caf\xe9.toml")
    shutil.copy(folder / "tiny.toml", folder / name)
    done = siv(folder, ["run", name, "--run-dir", os.fsdecode(b"r\xe9"), "--device", "cpu"], ["check", os.fsdecode(b"\xe8.toml")])
    assert done.codes == [0, 2], done.err
    assert r"caf\udce9.toml" in next(folder.glob("r*/log.txt")).read_text()
    assert r"error: \udce8.toml: cannot be read (No such file or directory)" in done.err


def test_no_room_for_temporary_files_and_no_home(folder, undisturbed):
    done = siv(folder, RUN, env={"TMPDIR": "/nonexistent", "TMP": "/nonexistent", "HOME": "/nonexistent", "XDG_DATA_HOME": ""})
    assert done.codes == [0]
    assert contents(folder / "run") == contents(undisturbed)


def test_a_clock_set_back(folder, undisturbed):
    """Neither the times of files nor those noted in them decide anything."""
    run = folder / "run"
    with pytest.raises(UserError):
        session.run(folder / "tiny.toml", run_dir=run, device="cpu", watcher=Breaker(6))
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "time": "2999-01-01T00:00:00+0000"}))
    for path in run.rglob("*"):
        os.utime(path, (4e9, 4e9))
    session.resume(run, device="cpu")
    assert contents(run) == contents(undisturbed)


class Breaker(watchers.Silent):
    """Ends a run after a tick, and keeps what it is told."""

    def __init__(self, step: int = 10**9) -> None:
        self.step, self.lines = step, []

    def ticked(self, line: dict[str, Any]) -> None:
        if line["step"] >= self.step:
            raise UserError("stop here")

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_another_machine_is_told(folder):
    run = folder / "run"
    with pytest.raises(UserError, match="stop here"):
        session.run(folder / "tiny.toml", run_dir=run, device="cpu", watcher=Breaker(9))
    manifest = json.loads((run / "manifest.json").read_text())
    libraries = {**manifest["libraries"], "torch": "1.0"}
    others = {"threads": 99, "device": "an abacus", "precision": "bf16"}
    (run / "manifest.json").write_text(json.dumps({**manifest, **others, "libraries": libraries}))
    listener = Breaker()
    session.resume(run, device="cpu", watcher=listener)
    told = [line for line in listener.lines if "the last bits may differ" in line]
    assert [line.split(":")[0] for line in told] == [
        f"threads 99 before, {torch.get_num_threads()} now",
        f"device an abacus before, {manifest['device']} now",
        "precision bf16 before, fp32 now",
        f"torch 1.0 before, {manifest['libraries']['torch']} now",
    ]
    assert all(line.endswith("the last bits may differ from a run that was not interrupted") for line in told)
    assert checkpoint.steps(RunDir(run).checkpoints)[-1] == 12
