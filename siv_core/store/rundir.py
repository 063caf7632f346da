"""The run directory: everything a run did, readable without siv. docs/run_directories.md lists the files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import frozen

from siv_core.errors import UserError
from siv_core.store import files

# Of manifest.json, status.json and the JSONL files; resolved.json has the recipe's. 1 is siv 0.1's: its terms had other names.
FORMAT = 2
JSONL = ("stats", "metrics")
REMEDIES = {
    "resolved": "bring it back from a copy, or start the run over from its recipe.toml in another folder",
    "manifest": "bring it back from a copy, or start the run over from its recipe.toml in another folder",
    "status": "take it away, nothing depends on it",
}
KEYS: dict[str, dict[str, type]] = {
    "manifest": {
        "recipe": str,
        "automatic_profile": bool,
        "profiles": list,
        "sets": list,
        "history": list,
        "data": dict,
        "libraries": dict,
    },
    "status": {"state": str},
}  # what is taken from these files


@frozen
class RunDir:
    path: Path

    @classmethod
    def create(cls, root: Path, name: str) -> RunDir:
        """A new numbered directory `root/00012-name`; never one that exists."""
        files.make_folder(root)
        while True:
            taken = [int(match[1]) for path in root.iterdir() if (match := re.match(r"(\d{5})-", path.name))]
            path = root / f"{max(taken, default=-1) + 1:05d}-{name}"
            try:
                with files.writing(path):
                    path.mkdir()
            except UserError:
                if path.exists():  # another process was faster
                    continue
                raise
            return cls(path)._furnish()

    @classmethod
    def at(cls, path: Path) -> RunDir:
        """The directory the user named: made when it is not there, else it must be empty or a run."""
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is no folder")
        foreign = [entry.name for entry in path.iterdir() if not _own(entry.name)] if path.exists() else []
        if foreign and not (path / "resolved.json").exists():
            raise UserError(f"{path}: holds files that are no siv run; name an empty or a new folder")
        files.make_folder(path)
        return cls(path)._furnish()

    @classmethod
    def existing(cls, path: Path) -> RunDir:
        """A directory with a run in it."""
        if not (path / "resolved.json").is_file():
            raise UserError(f"{path}: no run here (it has no resolved.json)")
        run = cls(path)
        run.resolved(), run.manifest()
        return run

    def _furnish(self) -> RunDir:
        files.make_folder(self.images)
        files.make_folder(self.checkpoints)
        return self

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def images(self) -> Path:
        return self.path / "images"

    def resolved(self) -> dict[str, Any]:
        return self._json("resolved")

    def manifest(self) -> dict[str, Any]:
        return self._json("manifest")

    def to_go_on(self) -> None:
        """A `UserError` where a run of an earlier format, or what was imported, can be used but not gone on with."""
        manifest = self.manifest()
        if "imported" in manifest:
            raise UserError(
                f'{self.path}: was imported, there is no training to go on with: start a new run from it ([init] run = "…")'
            )
        if manifest["format"] < FORMAT:
            version = manifest["libraries"].get("siv", "an earlier version")
            raise UserError(
                f"{self.path}: a run of siv {version} (format {manifest['format']}; this one goes on with format {FORMAT}): go on"
                f' with that version (pip install "siv=={version}"), or start a new run from its weights ([init] run = "…")'
            )

    def _json(self, name: str) -> dict[str, Any]:
        """One of the run's JSON files, if it has all that is taken from it."""
        path = self.path / f"{name}.json"
        try:
            value = files.read_json(path)
        except UserError as error:
            raise UserError([f"{line}; {REMEDIES[name]}" for line in error.problems]) from error
        wrong = files.format_problem(value, path, 1 if name == "resolved" else FORMAT, oldest=1)
        if wrong:
            raise UserError(wrong)
        for key, kind in KEYS.get(name, {}).items():
            given = value.get(key)
            texts = key not in ("profiles", "sets") or (isinstance(given, list) and all(isinstance(text, str) for text in given))
            if not isinstance(given, kind) or not texts:
                raise UserError(f"{path}: damaged, '{key}' is missing or not what siv writes; {REMEDIES[name]}")
        return dict(value)

    def write(self, name: str, value: dict[str, Any]) -> None:
        files.write_json(self.path / f"{name}.json", {"format": FORMAT, **value})

    def status(self, state: str, **more: Any) -> None:
        """`state`: running, stopped, finished, diverged, failed or imported."""
        self.write("status", {"state": state, "time": _now(), **more})

    def state(self) -> str:
        return str(self._json("status")["state"]) if (self.path / "status.json").exists() else "new"

    def log(self, line: str) -> None:
        path = self.path / "log.txt"
        with files.writing(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{_now()} {line}\n")

    def append(self, name: str, *values: dict[str, Any]) -> None:
        """Lines of stats.jsonl or metrics.jsonl, all or none; the first line of each file gives its format."""
        path = self.path / f"{name}.jsonl"
        head = [] if path.exists() and path.stat().st_size else [{"format": FORMAT}]
        files.append_json(path, *head, *values)

    def read(self, name: str) -> list[dict[str, Any]]:
        return [line for line in files.read_jsonl(self.path / f"{name}.jsonl") if "format" not in line]

    def offsets(self) -> dict[str, int]:
        """Bytes of the JSONL files, for a checkpoint."""
        paths = {name: self.path / f"{name}.jsonl" for name in JSONL}
        return {name: path.stat().st_size if path.exists() else 0 for name, path in paths.items()}

    def cut(self, offsets: dict[str, int]) -> None:
        """Take back the JSONL lines that the run wrote after a checkpoint, and whatever a killed process left half-written.

        What `siv evaluate` wrote stays: it measured a checkpoint, which is as good as before.
        """
        for name in JSONL:
            path = self.path / f"{name}.jsonl"
            files.read_jsonl(path)  # a line that cannot be read is told now, not when the run is over
            if path.exists():
                whole = path.read_bytes()
                kept = _without_later_lines(whole, min(offsets.get(name, 0), len(whole)))
                if kept and kept != whole:
                    files.write_bytes(path, kept)
                elif not kept:
                    path.unlink()
        for folder in (self.path, self.images, self.checkpoints):
            files.remove_leftovers(folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out; the lock goes with the process, however it ends."""
        path = self.path / "lock"
        with files.writing(path):
            file = path.open("a+")
        with file:
            try:
                with files.writing(path):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except UserError as error:
                if not isinstance(error.__cause__, BlockingIOError):
                    raise
                raise UserError(f"{self.path}: another process is working on this run; wait for its end, or stop it") from error
            yield


def _own(name: str) -> bool:
    """Whether a killed process may have left this before the directory was a run."""
    early = ("images", "checkpoints", "lock", "log.txt", "recipe.toml", "manifest.json")
    return name in early or name.startswith(files.TEMPORARY)


def _without_later_lines(whole: bytes, offset: int) -> bytes:
    """The lines of a JSONL file up to `offset`, and those after it that are marked as written by `siv evaluate`."""
    evaluated = b"".join(line for line in whole[offset:].splitlines(keepends=True) if _by_evaluate(line))
    head = whole[: whole.find(b"\n") + 1] if not offset and evaluated else b""
    return whole[:offset] + head + evaluated


def _by_evaluate(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line).get("by") == "evaluate"
    except ValueError:  # what a killed process left of a line
        return False


def unfinished(root: Path, resolved: dict[str, Any]) -> list[Path]:
    """Runs under `root` of the same resolved recipe that did not come to their end."""
    found = []
    for path in sorted(root.glob("*/resolved.json")) if root.is_dir() else []:
        run = RunDir(path.parent)
        with contextlib.suppress(UserError, KeyError):
            if run.resolved() == resolved and run.state() not in ("finished",):
                found.append(path.parent)
    return found


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def busy(run: RunDir) -> bool:
    """Whether a process is working on this run."""
    if not (run.path / "lock").exists():
        return False
    with contextlib.suppress(UserError), run.locked():
        return False
    return True
