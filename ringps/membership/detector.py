"""PURE: who has been silent for too long.

Only time during which the coordinator itself was running counts. After it was stopped, swapped out
or starved, all beats of that time wait in its sockets unread, and judging by the clock on the wall
would declare everybody lost at once.
"""

from __future__ import annotations


class SilenceDetector:
    """Watches workers by their heartbeats.

    `heard` and `silent` take the current time of one monotonic clock; a gap between two calls that
    is longer than a third of `timeout_s` counts as our own absence, except that third.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._longest_gap_s = timeout_s / 3
        self._last_call_s: float | None = None
        self._absent_s = 0.0
        self._heard_s: dict[int, float] = {}
        self._never_beat: set[int] = set()
        self._patience_s: dict[int, float] = {}

    def watch(self, worker_id: int, now_s: float, *, patience_s: float | None = None) -> None:
        """Expect beats of this worker from now on.

        Args:
            worker_id: the worker.
            now_s: the current time.
            patience_s: how long it may be silent, until `hurry`; None: `timeout_s`.
        """
        self._heard_s[worker_id] = self._clock(now_s)
        self._never_beat.add(worker_id)
        self._patience_s.pop(worker_id, None)
        if patience_s is not None:
            self._patience_s[worker_id] = patience_s

    def hurry(self, worker_id: int) -> None:
        """From now on this worker may be silent for `timeout_s` only."""
        self._patience_s.pop(worker_id, None)

    def heard(self, worker_id: int, now_s: float) -> None:
        """A beat of a watched worker came."""
        self._heard_s[worker_id] = self._clock(now_s)
        self._never_beat.discard(worker_id)

    def forget(self, worker_id: int) -> None:
        """Expect nothing of this worker any more."""
        self._heard_s.pop(worker_id, None)
        self._patience_s.pop(worker_id, None)
        self._never_beat.discard(worker_id)

    def silent(self, now_s: float) -> list[tuple[int, str]]:
        """`(worker id, reason)` of everybody who is overdue, the longest silent first."""
        current_s = self._clock(now_s)
        overdue = sorted(
            (at_s, worker_id)
            for worker_id, at_s in self._heard_s.items()
            if at_s < current_s - self._limit_s(worker_id)
        )
        return [(worker_id, self._reason(worker_id)) for _, worker_id in overdue]

    def _limit_s(self, worker_id: int) -> float:
        return self._patience_s.get(worker_id, self._timeout_s)

    def _reason(self, worker_id: int) -> str:
        limit_s = self._limit_s(worker_id)
        if worker_id in self._never_beat:
            return (
                f"no heartbeat has ever come, {limit_s:.1f} s after it joined "
                "(process frozen, or a firewall blocks the coordinator's heartbeat port)"
            )
        return f"no heartbeat for {limit_s:.1f} s (process frozen or machine unreachable)"

    def _clock(self, now_s: float) -> float:
        if self._last_call_s is not None:
            gap_s = now_s - self._last_call_s
            self._absent_s += max(0.0, gap_s - self._longest_gap_s)
        self._last_call_s = now_s
        return now_s - self._absent_s
