"""The result of a collective."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from ringps.errors import RingpsError

_settling = threading.Lock()
"""Of all handles: it is held for a few instructions, and most handles are waited for by nobody."""


class Handle:
    """A collective that is under way. Its tensors must not be touched until `wait` returns."""

    def __init__(self, name: str, parts: Sequence[Handle] = ()) -> None:
        """
        Args:
            name: for messages.
            parts: collectives that it is made of: it fails as soon as one of them does.
        """
        self._name = name
        self._parts = parts
        self._done = False
        self._finished: threading.Event | None = None
        self._error: RingpsError | None = None

    def done(self) -> bool:
        """It has ended, well or not."""
        return self.failed or (self._done and all(part.done() for part in self._parts))

    @property
    def settled(self) -> bool:
        """Whether `_settle` was called."""
        return self._done

    @property
    def failed(self) -> bool:
        """It has ended with an error."""
        return self._error is not None or any(part.failed for part in self._parts)

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until the result is in the output tensor.

        Args:
            timeout_s: give up after so many seconds; the collective itself goes on. None waits for
                as long as it takes: the ring has limits of its own (`ringps.Timeouts`).

        Raises:
            TimeoutError: it has not ended within `timeout_s`.
            RingBrokenError: a member is gone. The output tensor's contents are undefined.
            CollectiveError: ranks disagreed, or nothing moved for `op_timeout_s`; likewise.
            ClosedError: this process shut the ring down.
        """
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        for part in self._parts:
            part.wait(_left_s(end_s))
        if not self._done:
            with _settling:
                if self._finished is None:
                    self._finished = threading.Event()
                finished = self._finished
            # If it has been settled in between, then before the event was there to be set.
            if not self.settled and not finished.wait(_left_s(end_s)):
                raise TimeoutError(f"{self._name} has not ended within {timeout_s} s")
        if self._error is not None:
            raise self._error

    def _settle(self, error: RingpsError | None = None) -> None:
        with _settling:
            self._error = error
            self._done = True
            if self._finished is not None:
                self._finished.set()

    def __repr__(self) -> str:
        state = "under way" if not self.done() else "failed" if self._error else "done"
        return f"<Handle of {self._name}: {state}>"


def _left_s(end_s: float | None) -> float | None:
    return None if end_s is None else max(0.0, end_s - time.monotonic())
