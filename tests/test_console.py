"""What a person sees: bars that come and go on a terminal, a cursor that is always given back, signals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import sysconfig
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from conftest import TINY
from rich.console import Console

from siv_core.cli import main as cli
from siv_core.cli.common import screen as screen_of_a_command
from siv_core.cli.console import Screen
from siv_core.errors import Stopped

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
SIV = [sys.executable, str(Path(sysconfig.get_path("scripts")) / "siv")]


@pytest.fixture
def screen():
    """A screen on a terminal that is a text."""
    made = Screen()
    made.console = Console(force_terminal=True, file=StringIO(), width=200)
    yield made
    made.end()


def written(screen: Screen) -> str:
    return screen.console.file.getvalue()


def cursor_shown(text: str) -> bool:
    return text.rfind(SHOW) >= text.rfind(HIDE)


def test_a_bar_ends_with_its_work(screen):
    before = sys.stdout
    screen.progress("preparing", 1, 2)
    assert not cursor_shown(written(screen))
    screen.progress("preparing", 2, 2)
    assert cursor_shown(written(screen))
    assert "preparing" in written(screen)
    assert (screen.live, screen.tasks, sys.stdout) == (None, {}, before)


def test_a_bar_ends_although_another_one_goes_on(screen):
    screen.progress("waiting", 0, 1)
    screen.progress("preparing", 1, 2)
    screen.progress("preparing", 2, 2)
    assert list(screen.tasks) == ["waiting"]
    assert [task.description for task in screen.live.tasks] == ["waiting"]
    screen.progress("waiting", 1, 1)
    assert screen.live is None
    assert cursor_shown(written(screen))


def test_training_ends_what_is_left(screen):
    trainer = SimpleNamespace(schedule=SimpleNamespace(total=10), counters=SimpleNamespace(step=0), device="cpu")
    with screen.training(trainer, None):
        screen.stepped(1, 10, 64)
        screen.progress("a metric", 1, 3)
        assert len(screen.tasks) == 2
    assert screen.live is None
    assert cursor_shown(written(screen))


def test_a_table_stands_below_no_bar(screen):
    screen.progress("a metric that forgets its end", 1, 3)
    screen.table("Metrics", ("name",), [("mse",)])
    assert screen.live is None


def test_a_narrow_table_does_not_break_its_title(screen):
    screen.console = Console(file=StringIO(), width=30)
    path = "/a path/of some length/with spaces in it/own.h5"
    screen.table(path, ("", ""), [("a", "b")])
    assert path in written(screen).splitlines()


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
def test_a_command_ends_its_screen_whatever_happens(monkeypatch, failure):
    made = []

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    @click.command()
    def command() -> None:
        made.append(screen_of_a_command())
        made[0].console = Console(force_terminal=True, file=StringIO())
        made[0].progress("a metric", 1, 3)
        raise failure

    with pytest.raises((ZeroDivisionError, click.Abort)):
        command.main([], standalone_mode=False)
    assert made[0].live is None
    assert cursor_shown(written(made[0]))


def test_json_has_standard_output_for_itself(capsys):
    made = Screen(stderr=True)
    made.console = Console(force_terminal=True, stderr=True)
    made.progress("a metric", 1, 3)
    print("{}")
    made.end()
    assert capsys.readouterr().out == "{}\n"


def test_a_wish_to_stop_ends_counted_work(screen):
    screen.progress("preparing", 1, 3)
    screen.signum = signal.SIGINT
    with pytest.raises(Stopped):
        screen.progress("preparing", 2, 3)
    assert cursor_shown(written(screen))


def test_numbers_that_came_back_as_text(screen):
    lines = [{"metric": "m", "name": name, "value": value} for name, value in (("a", "inf"), ("b", "nan"), ("c", 0.25))]
    cli.show_metrics(screen, lines)
    for word in ("inf", "nan", "0.25"):
        assert word in written(screen)


# -- real processes on a terminal ------------------------------------------------------------------------------------------------


class Terminal:
    """A process whose standard output and standard error are a terminal."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"}
        self.process = subprocess.Popen(command, cwd=folder, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self.text = ""

    def read(self, until: str = "") -> bool:
        """Everything up to the end, or until a word is there."""
        while not until or until not in self.text:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # how Linux says that nobody has the other side any more
                data = b""
            if not data:
                break
            self.text += data.decode(errors="replace")
        return until in self.text

    def end(self) -> int:
        self.read()
        os.close(self.master)
        return self.process.wait(60)


def test_a_run_on_a_terminal(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    terminal = Terminal([*SIV, "run", "tiny.toml", "--device", "cpu"], tmp_path)
    assert terminal.end() == 0, terminal.text
    assert "12/12" in terminal.text
    assert "finished at step 12" in terminal.text
    assert "Metrics" in terminal.text
    assert cursor_shown(terminal.text)


@pytest.mark.parametrize(("signals", "code"), [(1, 130), (2, 130)])
def test_a_run_on_a_terminal_is_stopped(tmp_path, signals, code):
    (tmp_path / "tiny.toml").write_text(TINY.replace('"12 steps"', '"1000000 steps"'))
    terminal = Terminal([*SIV, "run", "tiny.toml", "--device", "cpu"], tmp_path)
    assert terminal.read(HIDE), terminal.text
    for _ in range(signals):
        terminal.process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    assert terminal.end() == code, terminal.text
    assert cursor_shown(terminal.text)
    assert "Traceback" not in terminal.text


SLEEPER = """
import time, click
from siv_core.cli.common import screen

@click.command()
def command():
    watcher = screen(at_once=True)
    watcher.progress("loading", 1, 3)
    try:
        time.sleep(30)
    except BaseException:
        time.sleep(30)

command()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_has_nothing_to_save_ends_at_the_first_signal(tmp_path, number, code):
    """Even where somebody's import swallows every exception, as torch's and numpy's do."""
    terminal = Terminal([sys.executable, "-c", SLEEPER], tmp_path)
    assert terminal.read(HIDE), terminal.text
    terminal.process.send_signal(number)
    started = time.monotonic()
    assert terminal.end() == code, terminal.text
    assert time.monotonic() - started < 10
    assert cursor_shown(terminal.text)
