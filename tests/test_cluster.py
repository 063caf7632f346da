"""`siv sweep --on`: what is looked at before the first trial, and a sweep over two workers, of which one is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time

import pytest
from test_sweep import HEAD, wait_for
from toys import SMALL

from siv_core.errors import UserError
from siv_core.store import checkpoint
from siv_core.store.rundir import RunDir
from siv_core.sweep import cluster, jobs


class Workers:
    """A client whose two workers answer as told."""

    def __init__(self, *answers):
        self.answers = answers

    def run(self, function, *arguments, on_error="raise"):
        own = function(*arguments)
        return {f"tcp://{i}": answer(own) for i, answer in enumerate(self.answers)}


TRIALS = int(os.environ.get("SIV_CAMPAIGN_TRIALS", "4"))
SHORT_TRIALS = int(os.environ.get("SIV_CAMPAIGN_SHORT_TRIALS", "80"))


def as_here(own):
    return own


def test_workers_like_us_are_taken(tmp_path):
    cluster.check(Workers(as_here, as_here), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_with_other_versions_is_refused(tmp_path):
    other = Workers(as_here, lambda own: {**own, "torch": "1.0"}, lambda own: ModuleNotFoundError("No module named 'siv_core'"))
    with pytest.raises(UserError) as raised:
        cluster.check(other, tmp_path)
    versions, missing = raised.value.problems
    assert versions.startswith("worker tcp://1: is refused, it has torch 1.0 (here ")
    assert missing == "worker tcp://2: has no siv that answers (ModuleNotFoundError: No module named 'siv_core')"


def test_a_folder_that_a_worker_does_not_see_is_told(tmp_path):
    elsewhere = Workers(lambda own: own if isinstance(own, dict) else "[Errno 2] No such file or directory")
    with pytest.raises(UserError, match=rf"worker tcp://0: does not see {tmp_path}: the sweep's folder has to be on a disk"):
        cluster.check(elsewhere, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_the_command_was_given_in_has_to_be_there(tmp_path):
    without = Workers(lambda own: False if own is True else own)
    with pytest.raises(UserError) as raised:
        cluster.check(without, tmp_path)
    assert raised.value.problems == (
        f"worker tcp://0: has no folder {os.getcwd()}, in which this command was given and its own would be",
    )


def test_a_profile_named_cpu_applies_where_no_worker_has_a_device():
    assert cluster.on_cpus(Workers(lambda own: False, lambda own: OSError("no siv")))
    assert not cluster.on_cpus(Workers(lambda own: False, lambda own: True))


def test_a_command_waits_for_the_process_of_a_lost_worker(tmp_path):
    log, stop, run = tmp_path / "log.txt", tmp_path / "log.stop", RunDir(tmp_path / "run")
    run.path.mkdir()
    arguments = (("--version",), str(tmp_path), {}, str(log), str(stop), (str(run.path),))
    codes = []
    with run.locked():
        waiting = threading.Thread(target=lambda: codes.append(cluster.command(*arguments)))
        waiting.start()
        time.sleep(1.0)
        assert waiting.is_alive()
        assert not log.exists()
    waiting.join(60)
    assert codes == [0]
    assert log.read_text().startswith("siv, version")
    with run.locked():
        stop.touch()
        assert cluster.command(*arguments) == 128 + signal.SIGTERM


def test_a_scheduler_that_is_not_there(monkeypatch):
    monkeypatch.setattr(cluster, "SECONDS", 1)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9: no Dask scheduler answers there .*`dask scheduler` starts one"):
        cluster.connect("tcp://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"--on takes Dask .*: pip install 'siv\[cluster\]'"):
        cluster.connect("tcp://127.0.0.1:9")


def test_a_command_ends_where_it_is_asked_to(tmp_path):
    log, stop = tmp_path / "log.txt", tmp_path / "log.stop"
    assert cluster.command(("--version",), str(tmp_path), {}, str(log), str(stop)) == 0
    assert log.read_text().startswith("siv, version")
    assert cluster.command(("nothing",), str(tmp_path), {}, str(log), str(stop)) == 2
    stop.touch()
    (tmp_path / "r.toml").write_text(SMALL + '[objective]\nname = "vae"\n[train]\nlength = "90000 steps"\n')
    begun = time.monotonic()
    arguments = ("run", "r.toml", "--run-dir", "run", "--device", "cpu")
    assert cluster.command(arguments, str(tmp_path), {}, str(log), str(stop)) in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        ("error", OSError("[Errno 28] No space left"), "OSError: [Errno 28] No space left"),
        ("lost", None, "the scheduler calls it lost"),
    ],
)
def test_why_a_command_came_to_no_end_stands_in_its_log(tmp_path, status, error, told):
    class Future:
        def done(self):
            return True

        def exception(self):
            return error

    future = Future()
    future.status = status
    remote = cluster.Remote(future, tmp_path / "log.txt", tmp_path / "log.stop")
    assert (remote.poll(), remote.wait()) == (1, 1)
    assert (tmp_path / "log.txt").read_text() == f"the cluster did not bring it to its end ({told})\n"


def in_mid_trial(workers, folder):
    """The workers whose trial has a checkpoint to go on from and many steps before it."""
    import psutil

    for worker in workers:
        for process in psutil.Process(worker).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                words = process.cmdline()
                run = RunDir(folder / words[words.index("--run-dir") + 1]) if "--run-dir" in words else None
                saved = checkpoint.steps(run.checkpoints) if run else []
                if saved and saved[-1] < 1000:
                    yield worker


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_s_trial_goes_on_elsewhere(tmp_path, siv, monkeypatch):
    from distributed import Client, LocalCluster

    for name in jobs.THREADS:
        monkeypatch.setenv(name, "1")
    (tmp_path / "tiny.toml").write_text(
        SMALL + '[objective]\nname = "vae"\n[train]\nlength = "1500 steps"\ncheckpoint = "100 steps"\npreview = "5000 steps"\n'
    )
    (tmp_path / "some.toml").write_text(HEAD + f"seeds = {list(range(TRIALS))}\n")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as here, Client(here) as client:
        import threading

        workers = list(client.run(os.getpid).values())

        def kill():
            found = []
            wait_for(lambda: found.extend(in_mid_trial(workers, tmp_path)) or found, seconds=300)
            os.kill(found[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        done = siv("sweep", "some.toml", "--on", here.scheduler_address, "--root", "far", "--device", "cpu", seconds=600)
        killer.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 at a time" in done.stdout
    logs = [path.read_text() for path in (tmp_path / "far/logs").glob("*.txt")]
    assert sum("going on from" in log for log in logs) >= 1
    near = siv("sweep", "some.toml", "--root", "near", "--device", "cpu", seconds=600)
    assert near.returncode == 0, near.stderr
    assert (tmp_path / "far/table.csv").read_bytes() == (tmp_path / "near/table.csv").read_bytes()
    for seed in range(TRIALS):
        far, near = (RunDir(tmp_path / root / f"seed={seed}") for root in ("far", "near"))
        assert far.state() == "finished"
        for ours in sorted((far.checkpoints / "step_00001500").glob("*.safetensors")):
            assert ours.read_bytes() == (near.checkpoints / "step_00001500" / ours.name).read_bytes()
        lines = [[{**line, "wall": None} for line in run.read("stats")] for run in (far, near)]
        assert lines[0] == lines[1]


def short(arguments, folder, environment, log, stop, runs):
    """In place of a command on a worker: a run that is finished as soon as it is begun."""
    run = os.path.join(folder, arguments[arguments.index("--run-dir") + 1])
    shutil.copytree(os.path.join(folder, "one"), run)
    return 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cluster_takes_less_than_a_second_of_a_trial(tmp_path, siv):
    """What siv, the scheduler and the waiting for one another take: 8 workers whose trials take no time."""
    import cloudpickle
    from distributed import Client, LocalCluster

    (tmp_path / "tiny.toml").write_text(SMALL + '[objective]\nname = "vae"\n[train]\nlength = "1 steps"\n')
    (tmp_path / "some.toml").write_text(HEAD + f"seeds = {list(range(SHORT_TRIALS))}\n")
    assert siv("run", "tiny.toml", "--run-dir", "one", "--device", "cpu").returncode == 0
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def patch():
        cluster.command = short

    with LocalCluster(n_workers=8, threads_per_worker=1, dashboard_address=None) as here, Client(here) as client:
        client.run(patch)
        begun = time.monotonic()
        done = siv("sweep", "some.toml", "--on", here.scheduler_address, "--root", "far", "--device", "cpu", seconds=800)
        seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert len(list((tmp_path / "far").glob("*/status.json"))) == SHORT_TRIALS
    print(f"{SHORT_TRIALS} trials: {seconds:.1f} s")
    assert seconds < 8 + SHORT_TRIALS  # with the start of the command, and the workers' look at their versions
