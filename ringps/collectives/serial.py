"""Carrying collectives out one after the other, each by straight-line code that blocks.

A caller who waits for the result does the work itself, on its own thread: nothing is handed over, so a small
collective takes microseconds. What is called asynchronously is carried out in the background, in the
order of the calls; calls that come meanwhile queue up behind it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ringps.collectives.backend import EngineStatistics, Work, call_of
from ringps.collectives.call import Call
from ringps.collectives.disputes import Docket
from ringps.collectives.handle import Handle
from ringps.collectives.shm.group import Disagreement
from ringps.collectives.shm.signals import Peer, Signals
from ringps.errors import ClosedError, CollectiveError, PeerLostError, RingpsError
from ringps.ring.topology import Generation

_IDLE_S = 60.0


class Executor(Protocol):
    """What does the work. All but `allocate` and `interrupt` is called by one thread at a time."""

    @property
    def signals(self) -> Signals:
        """What it waits with."""

    def perform(self, sequence: int, call: Call, work: Work, *, spin: bool) -> None:
        """Carry `work` out; `spin` if somebody waits for just that."""

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Memory (uint8) that peers can read without a copy."""

    def interrupt(self, error: RingpsError) -> None:
        """End a wait that `signals` knows nothing of."""

    def close(self) -> None:
        """Free everything but memory in use."""


class _Queued(NamedTuple):
    sequence: int
    call: Call
    work: Work
    handle: Handle


class SerialBackend:
    """A `collectives.backend.Backend` over an `Executor`. Thread-safe."""

    def __init__(
        self,
        generation: Generation,
        executor: Executor,
        docket: Docket,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            generation: who is in the ring.
            executor: does the work; belongs to the backend then.
            docket: keeps who called what.
            clock: monotonic seconds, `time.monotonic`'s.
        """
        self._generation = generation
        self._executor = executor
        self._docket = docket
        self._clock = clock
        executor.signals.attend = self._attend

        self._changed = threading.Condition()
        self._queue: deque[_Queued] = deque()
        self._busy = False
        self._current = 0
        self._error: RingpsError | None = None
        self._completed = 0
        self._thread: threading.Thread | None = None
        self._released = False
        self._suspected_s: float | None = None
        self._progress_s = 0.0

    # Called by any thread.

    def run(self, work: Work) -> None:
        """Carry `work` out after all those before it; returns when it is done."""
        call = call_of(work)
        with self._changed:
            self._check()
            sequence = self._docket.open(call)
            if self._busy or self._queue or not work.ready:
                handle = self._enqueue(sequence, call, work)
            else:
                self._busy, handle = True, None
        if handle is not None:
            handle.wait()
            return
        try:
            self._perform(sequence, call, work, spin=True)
        finally:
            self._rest()

    def start(self, work: Work) -> Handle:
        """Carry `work` out in the background, after all those before it."""
        call = call_of(work)
        with self._changed:
            self._check()
            return self._enqueue(self._docket.open(call), call, work)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Memory that peers on this host can read without a copy."""
        return self._executor.allocate(size_bytes)

    def fail(self, error: RingpsError) -> None:
        """End every collective, now and later, with `error`. The first error stays."""
        with self._changed:
            if self._error is None:
                self._error = error
            self._abandon_queue()
            self._changed.notify_all()
            if self._busy:
                self._executor.signals.wake()
        self._executor.interrupt(error)

    def peer_left(self, rank: int, completed: int) -> None:
        """Rank `rank` called shutdown() after `completed` collectives."""
        self._docket.departed(rank, completed)
        with self._changed:
            if self._busy:
                self._executor.signals.wake()

    def verdict(self, sequence: int, calls: tuple[str, ...]) -> None:
        """What each rank called as number `sequence`, in rank order."""
        error = self._docket.rule(sequence, calls, self._progress_s)
        if error is not None:
            self.fail(error)
        with self._changed:
            self._changed.notify_all()

    def describe(self, sequence: int) -> str:
        """This rank's answer to an inquiry about number `sequence`."""
        return self._docket.describe(sequence)

    def drain(self) -> None:
        """Wait for every collective that was called.

        Raises:
            RingpsError: the ring broke, now or before.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not (self._busy or self._queue))
            if self._error is not None:
                raise self._error

    @property
    def completed(self) -> int:
        """Collectives that ended well on this rank."""
        return self._completed

    def close(self) -> None:
        """End what is under way with ClosedError and free everything. Idempotent."""
        self.fail(ClosedError("the ring was shut down by this process"))
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            released, self._released = self._released, True
            self._changed.notify_all()
        if not released:
            self._executor.close()

    def statistics(self) -> EngineStatistics:
        """Counters so far."""
        return EngineStatistics(self._completed, {}, None)

    # With the lock held.

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _enqueue(self, sequence: int, call: Call, work: Work) -> Handle:
        handle = Handle(str(call))
        self._queue.append(_Queued(sequence, call, work, handle))
        if not work.ready:
            assert work.gate is not None
            # On another thread, or here: the lock is one that may be taken twice.
            work.gate.on_open(self._look)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work_off, name="ringps-comm", daemon=True)
            self._thread.start()
        self._changed.notify_all()
        return handle

    def _look(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _abandon_queue(self) -> None:
        while self._queue:
            self._queue.popleft().handle._settle(self._error)

    # Doing the work.

    def _rest(self) -> None:
        with self._changed:
            self._busy = False
            if self._error is not None:
                self._abandon_queue()
            self._changed.notify_all()

    def _may_begin(self) -> bool:
        """Whether the next in the queue can be carried out now; with the lock held."""
        return bool(self._queue) and not self._busy and self._queue[0].work.ready

    def _work_off(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._released or self._may_begin())
                if self._released:
                    return
                job = self._queue.popleft()
                self._busy = True
            error = None
            try:
                self._perform(job.sequence, job.call, job.work, spin=False)
            except RingpsError as failure:
                error = failure
            self._rest()
            job.handle._settle(error)

    def _perform(self, sequence: int, call: Call, work: Work, *, spin: bool) -> None:
        self._current = sequence
        try:
            if self._error is not None:
                raise self._error
            try:
                # Overflows are the user's, as in torch.
                with np.errstate(all="ignore"):
                    self._executor.perform(sequence, call, work, spin=spin)
            except Disagreement:
                self._await_verdict(sequence)
            if work.finish is not None:
                work.finish()
        except RingpsError as error:
            raise self._break(error) from error.__cause__
        except MemoryError as full:
            raise self._break(CollectiveError(f"{call}: {full}")) from full
        except Exception as defect:  # of ours; it must not leave other calls waiting
            broken = CollectiveError(f"ringps failed inside: {defect!r}; please report it")
            raise self._break(broken) from defect
        except BaseException:  # Ctrl-C: the peers are in the middle of it, and this rank will not go on
            self._break(ClosedError("a collective was interrupted in this process"))
            raise
        self._docket.close(sequence)
        self._completed = sequence

    # When something is wrong; on the thread that does the work.

    def _break(self, error: RingpsError) -> RingpsError:
        """End the ring with `error`, unless something else has; returns what has."""
        with self._changed:
            self._error = self._error or error
            return self._error

    def _attend(self, peer: Peer, since_s: float) -> float:
        if self._error is not None:
            raise self._error
        departure = self._docket.departure()
        if departure is not None:
            raise departure
        now_s = self._clock()
        gone = self._executor.signals.gone
        if gone:
            if self._suspected_s is None:
                self._suspected_s = now_s
            left_s = self._suspected_s + self._docket.explanation_s - now_s
            if left_s <= 0:
                raise self._lost(gone[0], "its connection on this host closed")
            return left_s
        self._progress_s = since_s
        left_s, error = self._docket.patience_s(self._current, since_s)
        if error is not None:
            raise error
        return min(left_s, _IDLE_S)

    def _await_verdict(self, sequence: int) -> None:
        """Ranks disagree: raise what the coordinator's inquiry finds."""
        self._docket.ask(sequence)
        with self._changed:
            while self._error is None and self._docket.disputed:
                left_s, error = self._docket.patience_s(sequence, self._clock())
                if error is not None:
                    raise error
                self._changed.wait(left_s)
            raise self._error or CollectiveError(
                f"collective number {sequence}: the ranks met with different calls, and none stands by it"
            )

    def _lost(self, peer: Peer, reason: str) -> PeerLostError:
        member = self._generation.members[peer.rank]
        return PeerLostError(rank=peer.rank, worker_id=member.worker_id, host=member.host, reason=reason)
