"""Who called what: this rank's calls by number, and what follows when ranks disagree about one."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ringps.collectives.call import Call, disagreement
from ringps.config import Timeouts
from ringps.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    PeerLeftError,
    RingpsError,
)
from ringps.ring.topology import Generation

_CALLS_REMEMBERED = 256
EXPLANATION_S = 0.5
"""How long to wait for the reason of a closed connection in a fixed ring, where it ends the job: whoever sees
the process end can say why."""


class Referee(Protocol):
    """Whom a rank asks when ranks seem to disagree."""

    def dispute(self, sequence: int) -> None:
        """Ask every rank what it called as number `sequence`; answer by `Backend.verdict`."""


@dataclass(frozen=True)
class _Dispute:
    sequence: int
    timed_out: bool
    progress_s: float
    """When something had moved last, as it was opened."""
    deadline_s: float
    other: int | None


class Docket:
    """The calls of one rank, and the dispute that it has opened, if any. Thread-safe."""

    def __init__(
        self,
        generation: Generation,
        timeouts: Timeouts,
        referee: Referee | None,
        *,
        explanation_s: float = EXPLANATION_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            generation: who is in the ring.
            timeouts: limits on waiting.
            referee: asked when ranks disagree; None: errors name this rank's call only.
            explanation_s: how long to wait for the reason of a closed connection.
            clock: monotonic seconds.
        """
        self._generation = generation
        self.explanation_s = explanation_s
        self._timeouts = timeouts
        self._referee = referee
        self._clock = clock
        self._lock = threading.Lock()
        self._calls: OrderedDict[int, Call] = OrderedDict()
        self._open: dict[int, Callable[[], str]] = {}
        self._last = 0
        self._left: dict[int, int] = {}
        self._dispute: _Dispute | None = None

    @property
    def last(self) -> int:
        """Number of the last call."""
        return self._last

    def open(self, call: Call, missing: Callable[[], str] = lambda: "under way") -> int:
        """Take down a call; returns its number.

        Args:
            call: what was called.
            missing: where it stands, in words; called by any thread.
        """
        with self._lock:
            self._last += 1
            self._calls[self._last] = call
            self._open[self._last] = missing
            if len(self._calls) > _CALLS_REMEMBERED:
                self._calls.popitem(last=False)
            return self._last

    def close(self, sequence: int) -> None:
        """This call has ended well."""
        with self._lock:
            del self._open[sequence]

    def describe(self, sequence: int) -> str:
        """This rank's answer to an inquiry about number `sequence`."""
        with self._lock:
            call, last = self._calls.get(sequence), self._last
            missing = self._open.get(sequence)
            previous = self._calls[last] if last else None
        if call is not None:
            return f"{call.text} | {missing() if missing else 'done'}"
        if sequence <= last:
            return "no record any more"
        return f"no call yet, after number {last}, {previous}" if last else "no collective called yet"

    def departed(self, rank: int, completed: int) -> None:
        """Rank `rank` called shutdown() after `completed` collectives."""
        with self._lock:
            self._left[rank] = completed

    def departure(self) -> PeerLeftError | None:
        """The error of a call here that a departed rank never made, and so cannot end."""
        with self._lock:
            for rank, completed in self._left.items():
                if self._last > completed and rank != self._generation.rank:
                    return PeerLeftError(
                        f"{self._generation.describe(rank)} shut down after {completed} collectives, "
                        f"this rank called one more: {self._calls.get(completed + 1)}",
                        rank=rank,
                        worker_id=self._generation.members[rank].worker_id,
                    )
        return None

    @property
    def disputed(self) -> bool:
        """An answer is awaited."""
        return self._dispute is not None

    def ask(
        self, sequence: int, *, timed_out: bool = False, progress_s: float = 0.0, other: int | None = None
    ) -> None:
        """Open a dispute about `sequence`.

        Args:
            sequence: number of the call.
            timed_out: nothing moved; otherwise somebody called something else.
            progress_s: when something moved last.
            other: rank that called something else, where it is known.
        """
        deadline_s = self._clock()
        if self._referee is not None:
            # The referee gives up by itself; twice its limit is for one that is gone.
            deadline_s += 2 * self._timeouts.inquiry_timeout_s
        with self._lock:
            self._dispute = _Dispute(sequence, timed_out, progress_s, deadline_s, other)
        if self._referee is not None:
            self._referee.dispute(sequence)

    def patience_s(self, sequence: int, progress_s: float) -> tuple[float, RingpsError | None]:
        """How long to wait on, and the error that is due if it is too late.

        Args:
            sequence: number of the call that is waited for.
            progress_s: when something moved last; `op_timeout_s` later a dispute is opened.
        """
        with self._lock:
            dispute = self._dispute
        now_s = self._clock()
        if dispute is None:
            left_s = progress_s + self._timeouts.op_timeout_s - now_s
            if left_s > 0:
                return left_s, None
            self.ask(sequence, timed_out=True, progress_s=progress_s)
            return 0.0, None
        if now_s < dispute.deadline_s:
            return dispute.deadline_s - now_s, None
        return 0.0, self.rule(dispute.sequence, (), progress_s)

    def rule(self, sequence: int, calls: tuple[str, ...], progress_s: float) -> RingpsError | None:
        """What follows from who called what; a dispute about `sequence` is over.

        Args:
            sequence: number of the call.
            calls: every rank's answer, or nothing if nobody could tell.
            progress_s: when something moved last here.
        """
        with self._lock:
            dispute = self._dispute
            if dispute is not None and dispute.sequence == sequence:
                self._dispute = None
            else:
                dispute = None
        if disagreement(calls):
            return CollectiveMismatchError(
                f"the ranks disagree on collective number {sequence}; every rank must call the "
                f"same collectives in the same order:\n{self._table(calls)}"
            )
        if dispute is None:
            return None  # another rank's question, and no answer to it concerns us
        if dispute.timed_out:
            if progress_s > dispute.progress_s:
                return None
            return CollectiveTimeoutError(
                f"collective number {sequence} made no progress for "
                f"{self._timeouts.op_timeout_s} s (op_timeout_s):\n"
                + (self._table(calls) or f"  this rank: {self.describe(sequence)}"),
                late=tuple(rank for rank, call in enumerate(calls) if call.startswith("no ")),
            )
        if calls:
            return None  # nobody stands by what differed
        other = "another rank" if dispute.other is None else self._generation.describe(dispute.other)
        return CollectiveMismatchError(
            f"collective number {sequence}: this rank called {self._calls.get(sequence)}, "
            f"{other} something else; nobody answered who called what"
        )

    def _table(self, calls: tuple[str, ...]) -> str:
        return "\n".join(f"  {self._generation.describe(rank)}: {call}" for rank, call in enumerate(calls))
