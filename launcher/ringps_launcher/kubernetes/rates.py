"""PURE: how fast a job trains."""

from __future__ import annotations

from collections import deque

WINDOW_S = 10.0
"""Over how long the rate is measured, at least."""

_MOST = 64
_STALLED = 3.0


class StepRate:
    """Steps per second, from the newest step as it is told now and then."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque(maxlen=_MOST)

    def note(self, step: int, now_s: float) -> None:
        """This is the newest step. One before that (the job went back to a checkpoint) begins anew."""
        if self._points and (step < self._points[-1][1] or now_s <= self._points[-1][0]):
            self._points.clear()
        self._points.append((now_s, step))
        while len(self._points) > 2 and now_s - self._points[1][0] >= WINDOW_S:
            self._points.popleft()

    def reset(self) -> None:
        """Training has stopped."""
        self._points.clear()

    def per_s(self, now_s: float) -> float | None:
        """The rate; None while it is not known, or when no step has come for much longer than steps take."""
        if len(self._points) < 2:
            return None
        (first_s, first), (last_s, last) = self._points[0], self._points[-1]
        span_s = last_s - first_s
        usual_s = span_s / (len(self._points) - 1)
        if last == first or now_s - last_s > max(WINDOW_S, _STALLED * usual_s):
            return None
        return (last - first) / span_s
