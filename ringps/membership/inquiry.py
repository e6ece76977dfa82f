"""PURE: what did every rank call as collective number k?

A dispute opens an inquiry, which ends when all ranks have answered or the time is up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

MAX_OPEN = 16
_REMEMBERED = 64


@dataclass
class _Inquiry:
    answers: list[str | None]
    deadline_s: float


class Inquiries:
    """All disputes of one generation. At most `MAX_OPEN` are open at a time."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._open: dict[int, _Inquiry] = {}
        self._settled: deque[int] = deque(maxlen=_REMEMBERED)

    def open(self, sequence: int, known: Sequence[str | None], now_s: float) -> tuple[bool, str]:
        """A rank disputes collective `sequence`; `known[rank]` is an answer that need not be asked for.

        Returns:
            Whether the ranks should be asked now, and why or why not.
        """
        if sequence in self._open:
            return False, "dispute already being looked into"
        if sequence in self._settled:
            return False, "dispute already settled"
        if len(self._open) >= MAX_OPEN:
            return False, "too many disputes at once"
        self._open[sequence] = _Inquiry(list(known), now_s + self._timeout_s)
        return True, "first dispute about this collective"

    def answer(self, sequence: int, rank: int, call: str) -> str | None:
        """Take a rank's answer; None, or the reason for not counting it."""
        inquiry = self._open.get(sequence)
        if inquiry is None:
            return "answer to no open inquiry"
        if inquiry.answers[rank] is not None:
            return "answered already"
        inquiry.answers[rank] = call
        return None

    def know(self, rank: int, call: str) -> None:
        """A rank will not answer any more, for this reason."""
        for inquiry in self._open.values():
            if inquiry.answers[rank] is None:
                inquiry.answers[rank] = call

    def settle(self, now_s: float) -> list[tuple[int, tuple[str, ...]]]:
        """`(sequence, calls)` of every inquiry that is complete or out of time."""
        verdicts = []
        for sequence, inquiry in list(self._open.items()):
            if now_s >= inquiry.deadline_s or None not in inquiry.answers:
                del self._open[sequence]
                self._settled.append(sequence)
                calls = tuple("no answer" if answer is None else answer for answer in inquiry.answers)
                verdicts.append((sequence, calls))
        return verdicts
