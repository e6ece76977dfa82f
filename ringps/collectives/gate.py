"""What a collective waits for on this rank before it begins."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Gate:
    """Closed until `count` things have happened, and open from then on. Thread-safe.

    A collective with a closed gate has its place in the order of calls; those behind it wait too.
    """

    def __init__(self, count: int = 1) -> None:
        self._lock = threading.Lock()
        self._missing = count
        self._calls: list[Callable[[], None]] = []

    @property
    def is_open(self) -> bool:
        """Whether the collective may begin."""
        return self._missing <= 0

    def step(self) -> None:
        """One of the things has happened."""
        with self._lock:
            self._missing -= 1
            calls, self._calls = (self._calls, []) if self._missing <= 0 else ([], self._calls)
        for call in calls:
            call()

    def on_open(self, call: Callable[[], None]) -> None:
        """Have `call` called when it opens, by who opens it; at once if it is open."""
        with self._lock:
            if self._missing > 0:
                self._calls.append(call)
                return
        call()
