"""Files are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from siv_core.errors import UserError, near_miss
from siv_core.store import files, weights


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replacing_takes_the_place_in_one_step(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with files.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with files.replacing(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "b.json", {"x": float("nan")})
    assert names(tmp_path) == ["a.bin"]


def test_bytes_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (order.append(name), real(*a))[1])
    files.write_bytes(tmp_path / "a", b"x")
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_json(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"ä": [1, 2.5, None]})
    assert files.read_json(path) == {"ä": [1, 2.5, None]}
    assert path.read_bytes().endswith(b"}\n")
    path.write_text('{"a": 1')
    with pytest.raises(UserError, match=r"a.json: damaged, not JSON"):
        files.read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="damaged"):
        files.read_json(path)
    with pytest.raises(UserError, match=r"b.json: cannot be read \(No such file"):
        files.read_json(tmp_path / "b.json")


def test_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    assert files.read_jsonl(path) == []
    for i in range(3):
        files.append_json(path, {"i": i, "x": [float("inf"), -float("inf"), float("nan"), 1.5]})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert lines == files.read_jsonl(path) == [{"i": i, "x": ["inf", "-inf", "nan", 1.5]} for i in range(3)]


@pytest.mark.parametrize("torn", ["{", '{"i": 3', '{"i": 3, "x": "ä', '{"i": 3}', "\x00\x00"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    for i in range(3):
        files.append_json(path, {"i": i})
    with path.open("ab") as file:
        file.write(torn.encode()[:-1] if "ä" in torn else torn.encode())
    assert files.read_jsonl(path) == [{"i": i} for i in range(3)]


@pytest.mark.parametrize("line", ["5", "[1]", '"x"', "{", "\x00", "[" * 100_000])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"format": 1}\n' + line + '\n{"i": 2}\n')
    with pytest.raises(UserError, match=r"a.jsonl: line 2 is damaged, it is no JSON object; take it out, the others are good"):
        files.read_jsonl(path)


def test_what_follows_a_torn_line_starts_a_line_of_its_own(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"i": 0}\n{"i": 1')
    files.append_json(path, {"i": 2}, {"i": 3})
    assert files.read_jsonl(path) == [{"i": 0}, {"i": 2}, {"i": 3}]


def test_formats():
    def told(value: object) -> list[str]:
        return files.format_problem(value, Path("a.json"), 2)

    assert told({"format": 2}) == []
    assert told({"format": 3}) == ["a.json: format 3 is of a newer siv, this one reads 2: update it (pip install --upgrade siv)"]
    assert told({"format": 1}) == ["a.json: format 1 is of an older siv, this one reads 2: use the one that manifest.json names"]
    for value in ({}, [], None, {"format": "2"}, {"format": True}, {"format": 2.0}):
        assert told(value) == ["a.json: damaged, it does not give its format"]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a.json: is no file"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a.json: is no file; get it from there"):
        weights.read(tmp_path / "a.json", "", "get it from there")


def test_no_home_folder(monkeypatch):
    for name in ("SIV_DATA", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    with pytest.raises(UserError, match="no home folder is known: set SIV_DATA to a folder for data and weights"):
        files.data_root()


def test_digest(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 100_000)
    assert files.digest(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert files.digest(path, "md5") == hashlib.md5(b"abc" * 100_000).hexdigest()


def test_leftovers(tmp_path):
    (tmp_path / ".siv-tmp-1-a").write_text("")
    (tmp_path / ".siv-tmp-2-b").mkdir()
    (tmp_path / ".siv-tmp-2-b" / "c").write_text("")
    (tmp_path / "kept").write_text("")
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["kept"]


def test_make_folder(tmp_path):
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    for taken in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="this folder cannot be made"):
            files.make_folder(taken)


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("SIV_DATA", "~/some")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.data_root() == tmp_path / "some"
    monkeypatch.delenv("SIV_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    assert files.data_root() == tmp_path / "share" / "siv"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert files.data_root() == tmp_path / ".local" / "share" / "siv"


def test_near_miss():
    assert near_miss("beta_nge", ["beta_neg", "alpha"]) == "; did you mean 'beta_neg'?"
    assert near_miss("x", ["b", "a"]) == "; known: a, b"
    assert near_miss("x", []) == ""
