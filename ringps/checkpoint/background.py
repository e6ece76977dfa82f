"""Work that goes on beside training, one task at a time."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_NICENESS = 10
"""Computing goes first where cores are few."""


class Cancelled(Exception):
    """The task is not wanted any more."""


class Background(Generic[T]):
    """Runs a task on a thread of its own. Its methods are for one other thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._result: T | Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether a task is under way, also one that was cancelled and has not noticed yet."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def result(self) -> T | Exception | None:
        """What the last task returned or raised; None while it is under way, or if there was none."""
        return None if self.busy else self._result

    def start(self, task: Callable[[Callable[[], None]], T]) -> None:
        """Begin; nothing may be under way.

        Args:
            task: is given a function to call now and then, which raises `Cancelled` if it is to end.
        """
        assert not self.busy
        cancelled = self._cancelled = threading.Event()
        self._result = None

        def check() -> None:
            if cancelled.is_set():
                raise Cancelled(f"{self._name} was given up")

        def run() -> None:
            with contextlib.suppress(OSError):  # on Linux this is a thread's own
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
            try:
                self._result = task(check)
            except Exception as error:
                self._result = error

        self._thread = threading.Thread(target=run, name=f"ringps-{self._name}", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Have the task end soon, if there is one. Its result is void."""
        self._cancelled.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is under way; whether it is so."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.busy
