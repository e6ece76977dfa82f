"""PURE: the workers of this machine that failed, and what the coordinator knows of each."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from ringps_launcher.outcome import Failure, Loss


@dataclass
class _Open:
    """A failure that has not led to a replacement, or to the end of the job, yet."""

    failure: Failure
    due_s: float | None
    """Until when the coordinator's word is awaited; None if it is not, because it has come or cannot."""
    noted: bool
    """Whether the coordinator knows of the loss, so that no word means that the others go on."""
    said: bool = False
    """Whether the user was told that they do."""


class Losses:
    """Remembers every loss, from the failure to what came of it."""

    def __init__(self) -> None:
        self._open: dict[int, _Open] = {}
        self._noted: set[int] = set()
        self._left: set[int] = set()
        self._survived: list[Loss] = []

    @property
    def survived(self) -> tuple[Loss, ...]:
        """Those without which the job went on, in order."""
        return tuple(self._survived)

    @property
    def unjudged(self) -> list[Failure]:
        """The failures of which the coordinator may know nothing, in order."""
        return [entry.failure for entry in self._open.values() if not entry.noted]

    @property
    def word_due_s(self) -> float | None:
        """When the coordinator's word on a failure is overdue; None while none is awaited."""
        dues_s = (entry.due_s for entry in self._open.values())
        return min((due_s for due_s in dues_s if due_s is not None), default=None)

    def left(self, worker_id: int) -> bool:
        """Whether this worker's end was in order: it had been asked to leave."""
        return worker_id in self._left

    def started(self, worker_id: int) -> None:
        """A new process runs: what was noted was about the one before it."""
        self._noted.discard(worker_id)
        self._left.discard(worker_id)

    def failed(self, failure: Failure, due_s: float) -> None:
        """A worker failed; the coordinator's word is awaited until then, unless it knows already."""
        noted = failure.worker_id in self._noted
        self._open[failure.worker_id] = _Open(failure, None if noted else due_s, noted)

    def note(self, worker_id: int, *, left: bool) -> bool:
        """The coordinator knows that this worker is gone. True if its word on that was awaited."""
        self._noted.add(worker_id)
        if left:
            self._left.add(worker_id)
        entry = self._open.get(worker_id)
        if entry is None:
            return False
        entry.due_s, entry.noted = None, True
        return True

    def formed(self, members: Set[int]) -> list[Failure]:
        """A generation has formed: the failures that it goes on without, if they were not told of before."""
        # What was noted of a member was about the process before it.
        self._noted -= members
        self._left -= members
        return self._to_tell(
            [entry for worker_id, entry in self._open.items() if entry.noted and worker_id not in members]
        )

    def await_no_word(self) -> list[Failure]:
        """The coordinator is away: the failures on which no word can come now, likewise."""
        awaited = [entry for entry in self._open.values() if entry.due_s is not None]
        for entry in awaited:
            entry.due_s = None
        return self._to_tell(awaited)

    def survive(self, worker_id: int, reason: str) -> str:
        """The job goes on without this worker.

        Args:
            reason: the coordinator's words. How the process ended says more, but not if it was asked to.

        Returns:
            The reason that counts.
        """
        entry = self._open.pop(worker_id, None)
        if entry is not None and worker_id not in self._left:
            reason = entry.failure.reason
        self._survived.append(Loss(worker_id=worker_id, reason=reason))
        return reason

    def survive_all(self) -> None:
        """The job came to a good end without all of these workers."""
        for worker_id, entry in list(self._open.items()):
            self.survive(worker_id, entry.failure.reason)

    def _to_tell(self, entries: list[_Open]) -> list[Failure]:
        new = [entry for entry in entries if not entry.said]
        for entry in new:
            entry.said = True
        return [entry.failure for entry in new]
