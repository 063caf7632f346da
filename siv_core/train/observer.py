"""Who watches a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Observer(Protocol):
    """Who watches a run: shows progress and says when to stop. Nothing it does changes what is computed."""

    def say(self, line: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def stepped(self, step: int, steps: int, images_seen: int) -> None: ...
    def ticked(self, line: dict[str, Any]) -> None: ...
    def wrote(self, path: Path) -> None: ...
    def asked_to_stop(self) -> int:
        """A signal number, or 0."""
