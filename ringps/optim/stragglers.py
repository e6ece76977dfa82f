"""PURE: which rank is persistently slower than the others.

A rank's own part of a step is what it does between two commits without waiting for others: loading, forward,
backward, update. All ranks learn all ranks' times from the votes, so all come to the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_WARM_UP_STEPS = 5
_LEAST_US = 5_000_000
"""It must have been slow for so long a time of its own: where steps are short, the system's scheduling alone
makes one process slower than another for some dozens of them."""


@dataclass(frozen=True)
class Straggler:
    """A rank that is persistently slower."""

    worker_id: int
    factor: float
    """Its time by the median of the others'."""


class StragglerWatch:
    """Smooths the times of every worker, and says when one becomes a straggler, or is none any more."""

    def __init__(self, factor: float, steps: int) -> None:
        """
        Args:
            factor: slower than the others by so much is a straggler.
            steps: time constant, in steps, and for how many steps in a row its smoothed time must have been
                too long, and for five seconds. Its first ones do not count: they load code and touch new
                memory.
        """
        self._factor = factor
        self._steps = steps
        self._mean_us: dict[int, float] = {}
        self._seen: dict[int, int] = {}
        self._slow_for: dict[int, tuple[int, int]] = {}
        """In a row: steps, and microseconds of its own."""
        self._current: dict[int, Straggler] = {}

    @property
    def current(self) -> tuple[Straggler, ...]:
        """The stragglers as of now, the slowest first."""
        return tuple(sorted(self._current.values(), key=lambda one: -one.factor))

    def observe(self, worker_ids: Sequence[int], busy_us: Sequence[int]) -> list[tuple[Straggler, str]]:
        """Take in a step's times; returns those who have just become stragglers, and why they are."""
        for gone in self._seen.keys() - set(worker_ids):
            self._forget(gone)
        for worker_id, time_us in zip(worker_ids, busy_us, strict=True):
            seen = self._seen[worker_id] = self._seen.get(worker_id, -_WARM_UP_STEPS) + 1
            if seen <= 0:
                continue
            before_us = self._mean_us.get(worker_id, float(time_us))
            self._mean_us[worker_id] = before_us + (time_us - before_us) / min(seen, self._steps)
        found = []
        for worker_id, time_us in zip(worker_ids, busy_us, strict=True):
            others_us = [
                self._mean_us[other] for other in worker_ids if other != worker_id and other in self._mean_us
            ]
            if not others_us or worker_id not in self._mean_us:
                continue
            usual_us = max(1.0, median(others_us))
            factor = self._mean_us[worker_id] / usual_us
            # It must become clearly faster before it can be named again.
            threshold = (1 + self._factor) / 2 if worker_id in self._current else self._factor
            if factor < threshold:
                self._current.pop(worker_id, None)
                self._slow_for[worker_id] = 0, 0
                continue
            steps, slow_us = self._slow_for.get(worker_id, (0, 0))
            self._slow_for[worker_id] = steps, slow_us = steps + 1, slow_us + time_us
            if steps < self._steps or slow_us < _LEAST_US:
                continue
            one = Straggler(worker_id, factor)
            if worker_id not in self._current:
                own_ms, usual_ms = self._mean_us[worker_id] / 1e3, usual_us / 1e3
                reason = (
                    f"{own_ms:.1f} ms for its own part of a step, {usual_ms:.1f} ms the median of the others "
                    f"(over about {self._steps} steps)"
                )
                found.append((one, reason))
            self._current[worker_id] = one
        return found

    def _forget(self, worker_id: int) -> None:
        for known in (self._mean_us, self._seen, self._slow_for, self._current):
            known.pop(worker_id, None)
