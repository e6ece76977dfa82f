"""PURE: whether a lost worker is replaced, and when.

All workers of a launcher share one budget of restarts, over all starts of the ring. A worker that fails
again soon after it was replaced most likely does so for the same reason, so each time its next
replacement waits longer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A replacement that is to start."""

    worker_id: int
    restart: int
    """Its number among the replacements of this worker, from 1."""
    delay_s: float
    due_s: float
    restarts_left: int | None
    """Of all workers of this launcher, after this one; None where the coordinator counts."""


@dataclass
class _Record:
    """What became of one worker's replacements."""

    restarts: int = 0
    quick_failures: int = 0
    """Replacements in a row that did not run for long; one more sets the delay of the next."""
    started_s: float | None = None


class Replacements:
    """The budget of one launcher, and the replacements that wait for their time, in one start of the ring."""

    def __init__(
        self,
        max_restarts: int | None,
        *,
        spent: int = 0,
        first_delay_s: float = 0.2,
        longest_delay_s: float = 10.0,
        settled_s: float = 60.0,
    ) -> None:
        """
        Args:
            max_restarts: replacements of all workers together; None where the coordinator counts them.
            spent: how many of them went into earlier starts of the ring.
            first_delay_s: from a loss to the start of the replacement; doubles with each
                replacement of the same worker that fails quickly.
            longest_delay_s: where the doubling ends.
            settled_s: a replacement that ran this long did not fail quickly.
        """
        self._max_restarts = max_restarts
        self._first_delay_s = first_delay_s
        self._longest_delay_s = longest_delay_s
        self._settled_s = settled_s
        self._planned = spent
        self._started = 0
        self._records: dict[int, _Record] = {}
        self._waiting: dict[int, Planned] = {}

    @property
    def started(self) -> int:
        """How many replacements have been started."""
        return self._started

    @property
    def spent(self) -> int:
        """How much of the budget is used up, that of earlier starts included."""
        return self._planned

    @property
    def left(self) -> int:
        """How much of the budget is left."""
        return 1 if self._max_restarts is None else max(0, self._max_restarts - self._planned)

    @property
    def waiting(self) -> frozenset[int]:
        """The workers whose replacement waits for its time."""
        return frozenset(self._waiting)

    @property
    def due_s(self) -> float | None:
        """When the next replacement is to start; None if none waits."""
        return min((planned.due_s for planned in self._waiting.values()), default=None)

    def plan(self, worker_id: int, now_s: float) -> tuple[Planned | None, str]:
        """A worker is lost and its process reaped: plan its replacement if the budget allows.

        Returns:
            The plan, or None if there is to be no replacement; and the reason in words.
        """
        most = self._max_restarts
        if most is not None and self._planned >= most:
            return None, f"the restarts are used up (--max-restarts {most}), the others go on"
        self._planned += 1
        record = self._records.setdefault(worker_id, _Record())
        # Bounded, because a float is: the longest delay is reached long before.
        doublings = min(record.quick_failures, 100)
        delay_s = min(self._longest_delay_s, self._first_delay_s * 2.0**doublings)
        record.restarts += 1
        record.quick_failures += 1
        left = None if most is None else most - self._planned
        planned = Planned(
            worker_id=worker_id,
            restart=record.restarts,
            delay_s=delay_s,
            due_s=now_s + delay_s,
            restarts_left=left,
        )
        self._waiting[worker_id] = planned
        words = "" if left is None else f" ({left} of {most} restarts left)"
        return planned, f"a new one starts in {delay_s:g} s{words}"

    def take_due(self, now_s: float) -> list[Planned]:
        """The replacements whose time has come. They count as started."""
        due = [planned for planned in self._waiting.values() if planned.due_s <= now_s]
        for planned in due:
            del self._waiting[planned.worker_id]
            self._records[planned.worker_id].started_s = now_s
            self._started += 1
        return due

    def ended(self, worker_id: int, now_s: float) -> None:
        """A worker's process ended, be it the first or a replacement."""
        record = self._records.get(worker_id)
        if record is None or record.started_s is None:
            return
        if now_s - record.started_s >= self._settled_s:
            record.quick_failures = 0
        record.started_s = None

    def cancel(self) -> None:
        """The ring ends: nothing that waits is started, or counts."""
        self._planned -= len(self._waiting)
        self._waiting.clear()
