"""Rows fetched by a thread while the step before is computed, and how long they were waited for all the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """One thing is fetched ahead, by its key; what was fetched and is not asked for is thrown away."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "siv-rows")
        self._next: tuple[Hashable, Future[T]] | None = None
        self.waited = 0.0  # seconds, over all calls of `get`

    def get(self, key: Hashable, fetch: Callable[[], T]) -> T:
        """What `fetch` gives, or gave already for this key."""
        begun = time.monotonic()
        if self._next is None or self._next[0] != key:
            self.start(key, fetch)
        assert self._next
        future, self._next = self._next[1], None
        found = future.result()
        self.waited += time.monotonic() - begun
        return found

    def start(self, key: Hashable, fetch: Callable[[], T]) -> None:
        """Fetch it meanwhile."""
        self._next = key, self._pool.submit(fetch)
