"""PURE: whether the whole ring is started again after a failure that it did not survive, and when.

A ring that fails again soon after it was started most likely does so for the same reason, so each
time it waits longer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RingRestart:
    """The whole ring is to be started again."""

    delay_s: float
    """From the end of all workers to the start of new ones."""

    restarts_left: int | None
    """After this one; None where something else is counted."""


class RingRestarts:
    """The budget of one job. It lives as long as the job, over all starts of its ring."""

    def __init__(
        self,
        max_restarts: int | None,
        *,
        first_delay_s: float = 0.2,
        longest_delay_s: float = 10.0,
        settled_s: float = 60.0,
    ) -> None:
        """
        Args:
            max_restarts: how often the ring may be started again; None where something else is counted.
            first_delay_s: from the end of a ring to the next start; doubles each time that the ring
                fails soon.
            longest_delay_s: where the doubling ends.
            settled_s: a ring that ran this long did not fail soon.
        """
        self._max_restarts = max_restarts
        self._first_delay_s = first_delay_s
        self._longest_delay_s = longest_delay_s
        self._settled_s = settled_s
        self._planned = 0
        self._quick_failures = 0
        self._began_s: float | None = None

    @property
    def planned(self) -> int:
        """How often the ring has been started again, or is about to be."""
        return self._planned

    def began(self, now_s: float) -> None:
        """The workers of the ring are being started, for the first time or again."""
        self._began_s = now_s

    def plan(self, now_s: float, *, spent: int = 0) -> tuple[RingRestart | None, str]:
        """The ring failed, and there is a checkpoint to go on from: plan its next start if the budget allows.

        Args:
            now_s: the time of the failure, on the clock of `began`.
            spent: restarts of the same budget that went into something else.

        Returns:
            The plan, which counts as carried out; None if there is to be none. And the reason in words.
        """
        most = self._max_restarts
        left = 1 if most is None else most - self._planned - spent
        if left <= 0:
            return None, f"the restarts are used up (--max-restarts {most})"
        # Without a start that was seen, the ring was taken over from an earlier coordinator.
        if self._began_s is None or now_s - self._began_s >= self._settled_s:
            self._quick_failures = 0
        # Bounded, because a float is: the longest delay is reached long before.
        doublings = min(self._quick_failures, 100)
        delay_s = min(self._longest_delay_s, self._first_delay_s * 2.0**doublings)
        self._quick_failures += 1
        self._planned += 1
        self._began_s = None
        planned = RingRestart(delay_s=delay_s, restarts_left=None if most is None else left - 1)
        return planned, starting_again(planned.restarts_left, most)


def starting_again(restarts_left: int | None, max_restarts: int | None) -> str:
    """What the user is told of a restart of the ring."""
    again = "starting the whole ring again from the latest checkpoint"
    if restarts_left is None:
        return again
    return f"{again} ({restarts_left} of {max_restarts} restarts left)"
