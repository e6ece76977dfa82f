"""The communication thread: runs this rank's collectives, one after the other, over a transport.

Collectives get a sequence number in the order in which they are called, and send in that order:
the first chunk of number k + 1 leaves only after the last one of number k. So a link delivers all
chunks of k before any of k + 1, and a chunk of a collective that was not called here yet can wait
where it is: the engine stops reading until it has been called. That bounds memory, and it lets the
tail of one collective overlap with the head of the next.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ringps.collectives.call import Call, disagreement
from ringps.collectives.handle import Handle
from ringps.collectives.ring import Outgoing, RingOperation
from ringps.config import Timeouts
from ringps.errors import (
    ClosedError,
    CollectiveError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    FrameError,
    PeerLeftError,
    PeerLostError,
    RingpsError,
)
from ringps.ring.topology import Generation
from ringps.transport.base import Frame, Ticket, Transport, TransportStatistics
from ringps.wire.header import ChunkHeader, decode, encode

_FRAMES_PER_TURN = 32
_FARTHEST_AHEAD = 1 << 20
"""More collectives than the frames of which fit into a link's queues."""
_CALLS_REMEMBERED = 256
_IDLE_S = 60.0
_EXPLANATION_S = 0.5
_SETTLE_S = 0.001
"""Longest look away from the sockets while the last bytes of a collective leave."""


class Referee(Protocol):
    """Whom the engine asks when ranks seem to disagree."""

    def dispute(self, sequence: int) -> None:
        """Ask every rank what it called as number `sequence`; answer by `Engine.verdict`."""
        ...


@dataclass(frozen=True)
class EngineStatistics:
    """Counters since the engine was made."""

    collectives: int
    """Collectives that ended well."""

    refused: Mapping[str, int]
    """Frames turned away, by reason."""

    transport: TransportStatistics | None


class Engine:
    """Owns the communication thread and the transport. Thread-safe."""

    def __init__(
        self,
        generation: Generation,
        transport: Transport | None,
        timeouts: Timeouts,
        referee: Referee | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            generation: who is in the ring.
            transport: a connected transport, which then belongs to the engine; None for a ring of one.
            timeouts: limits on waiting.
            referee: asked when ranks disagree; None: the error names only the neighbours.
            clock: monotonic seconds.
        """
        self._generation = generation
        self._transport = transport
        self._timeouts = timeouts
        self._referee = referee
        self._clock = clock

        self._lock = threading.Lock()
        self._error: RingpsError | None = None
        self._last_sequence = 0
        self._calls: OrderedDict[int, Call] = OrderedDict()
        self._waiting: dict[int, RingOperation] = {}
        self._notices: deque[Callable[[], None]] = deque()
        self._left: dict[int, int] = {}
        self._refused: Counter[str] = Counter()
        self._thread: threading.Thread | None = None

        # Only the communication thread touches these.
        self._to_start: deque[tuple[int, RingOperation]] = deque()
        self._running: deque[tuple[int, RingOperation]] = deque()
        self._newest_started = 0
        self._outbox: deque[_Letter] = deque()
        self._room = True
        self._tickets: dict[int, list[Ticket]] = {}
        self._held: tuple[ChunkHeader, Frame] | None = None
        self._completed = 0
        self._last_progress_s = clock()
        self._dispute: _Dispute | None = None
        self._suspicion: tuple[PeerLostError, float] | None = None

    # Called by any thread.

    def submit(self, operation: RingOperation) -> Handle:
        """Start a collective after all those submitted before.

        Raises:
            RingpsError: the ring is broken or closed.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            self._last_sequence += 1
            sequence = self._last_sequence
            if self._transport is None:
                operation.finish()
                self._completed = sequence
                operation.handle._settle()
                return operation.handle
            self._calls[sequence] = operation.call
            if len(self._calls) > _CALLS_REMEMBERED:
                self._calls.popitem(last=False)
            self._waiting[sequence] = operation
            self._notices.append(lambda: self._to_start.append((sequence, operation)))
            if self._thread is None:
                self._start_thread()
        self._transport.wake()
        return operation.handle

    def fail(self, error: RingpsError) -> None:
        """End every collective, now and later, with `error`. The first error stays."""
        self._notify(lambda: self._break(error))

    def peer_left(self, rank: int, completed: int) -> None:
        """Rank `rank` called shutdown() after `completed` collectives."""
        self._notify(lambda: self._left.update({rank: completed}))

    def verdict(self, sequence: int, calls: tuple[str, ...]) -> None:
        """What each rank called as number `sequence`, in rank order."""
        self._notify(lambda: self._judge(sequence, calls))

    def describe(self, sequence: int) -> str:
        """This rank's answer to an inquiry about number `sequence`."""
        with self._lock:
            call = self._calls.get(sequence)
            if call is not None:
                operation = self._waiting.get(sequence)
                return f"{call.text} | {operation.machine.missing() if operation else 'done'}"
            if sequence <= self._last_sequence:
                return "no record any more"
            if self._last_sequence == 0:
                return "no collective called yet"
            last = self._calls[self._last_sequence]
            return f"no call yet, after number {self._last_sequence}, {last}"

    def drain(self) -> None:
        """Wait for every collective that was submitted.

        Raises:
            RingpsError: the ring broke, now or before.
        """
        with self._lock:
            operations = list(self._waiting.values())
        for operation in operations:
            operation.handle.wait()
        if self._error is not None:
            raise self._error

    @property
    def completed(self) -> int:
        """Collectives that ended well on this rank."""
        return self._completed

    def close(self) -> None:
        """End what is under way with ClosedError and free the transport. Idempotent."""
        with self._lock:
            thread = self._thread
            if thread is None:
                self._error = self._error or ClosedError("the ring was shut down by this process")
        if thread is not None:
            self.fail(ClosedError("the ring was shut down by this process"))
            thread.join()
        elif self._transport is not None:
            self._transport.close()

    def statistics(self) -> EngineStatistics:
        """Counters so far."""
        with self._lock:
            refused = dict(self._refused)
        transport = self._transport.statistics() if self._transport is not None else None
        return EngineStatistics(self._completed, refused, transport)

    def _notify(self, notice: Callable[[], None]) -> None:
        with self._lock:
            self._notices.append(notice)
            if self._thread is None and self._transport is not None:
                self._start_thread()
        if self._transport is not None:
            self._transport.wake()

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._run, name="ringps-comm", daemon=True)
        self._thread.start()

    # The communication thread.

    def _run(self) -> None:
        try:
            while self._error is None:
                self._turn()
        except Exception as error:  # a defect of ours must not leave callers waiting
            failure = CollectiveError(f"ringps failed inside: {error!r}; please report it")
            failure.__cause__ = error
            self._break(failure)

    def _turn(self) -> None:
        assert self._transport is not None
        while self._notices:
            self._notices.popleft()()
        if self._error is not None:
            return
        self._room = True
        self._start_operations()
        self._flush()
        progress = self._receive()
        unsettled = self._complete()
        self._check_departures()
        if progress:
            self._last_progress_s = self._clock()
        elif unsettled is not None and self._patience_s() > 0:
            unsettled.wait(_SETTLE_S)
            self._sleep(0.0)
        elif self._error is None:
            self._sleep(_IDLE_S)

    def _sleep(self, limit_s: float) -> None:
        assert self._transport is not None
        patience_s = min(limit_s, self._patience_s())
        if self._error is not None:
            return
        try:
            receiving = self._held is None
            self._transport.wait(patience_s, receiving=receiving, sending=bool(self._outbox))
        except PeerLostError as error:
            # Whoever sees the process end can say why: let that explanation come first.
            self._suspicion = (error, self._clock() + _EXPLANATION_S)

    def _start_operations(self) -> None:
        while self._to_start:
            if self._running and not self._running[-1][1].machine.sends_given:
                return
            sequence, operation = self._to_start.popleft()
            if not self._running:
                self._last_progress_s = self._clock()
            self._running.append((sequence, operation))
            self._tickets[sequence] = []
            self._newest_started = sequence
            for outgoing in operation.first_sends():
                self._queue(sequence, operation, outgoing)

    def _queue(self, sequence: int, operation: RingOperation, outgoing: Outgoing) -> None:
        header = ChunkHeader(
            generation=self._generation.number,
            sequence=sequence,
            signature=operation.call.signature,
            sender=self._generation.rank,
            step=outgoing.step,
            chunk=outgoing.chunk,
            payload_bytes=outgoing.payload.nbytes,
        )
        self._outbox.append(_Letter(sequence, encode(header), outgoing.payload, outgoing.borrowed))

    def _flush(self) -> None:
        assert self._transport is not None
        while self._outbox and self._room:
            letter = self._outbox[0]
            ticket = self._transport.send(letter.header, letter.payload)
            if ticket is None:
                self._room = False
                return
            if letter.borrowed:
                self._tickets[letter.sequence].append(ticket)
            self._outbox.popleft()
            self._last_progress_s = self._clock()

    def _receive(self) -> bool:
        assert self._transport is not None
        progress = False
        for _ in range(_FRAMES_PER_TURN):
            if self._held is not None:
                if self._dispute is not None or self._may_be_next(self._held[0]):
                    return progress
                header, frame = self._held
                self._held = None
            else:
                received = self._transport.receive()
                if received is None:
                    return progress
                frame = received
                try:
                    header = self._check(frame)
                except FrameError as error:
                    self._refuse(error.reason)
                    continue
            progress = self._dispatch(header, frame) or progress
            self._flush()
        return progress

    def _check(self, frame: Frame) -> ChunkHeader:
        header = decode(frame.header)
        if header.generation != self._generation.number:
            raise FrameError("other generation")
        if header.sender != self._generation.left:
            raise FrameError("not from the left neighbour")
        if header.sequence > self._newest_started + _FARTHEST_AHEAD:
            raise FrameError("too far ahead")
        if header.payload_bytes != frame.payload.nbytes:
            raise FrameError("payload length")
        return header

    def _may_be_next(self, header: ChunkHeader) -> bool:
        """It belongs to a collective not called here yet, and everything before that has come."""
        return header.sequence > self._newest_started and (
            not self._running or self._running[-1][1].machine.done
        )

    def _dispatch(self, header: ChunkHeader, frame: Frame) -> bool:
        if self._may_be_next(header):
            self._held = (header, frame)
            return False
        if header.sequence > self._newest_started:
            self._refuse("ahead of its turn")
            return False
        operation = next((one for number, one in self._running if number == header.sequence), None)
        if operation is None:
            self._refuse("collective that has ended")
            return False
        if header.signature != operation.call.signature:
            self._held = (header, frame)
            self._open_dispute(header.sequence, timed_out=False)
            return False
        try:
            outgoing = operation.take(header, frame.payload)
        except FrameError as error:
            self._refuse(error.reason)
            return False
        if outgoing is not None:
            self._queue(header.sequence, operation, outgoing)
        return True

    def _complete(self) -> Ticket | None:
        """End what is done. Returns a ticket that must settle before more can end, or None."""
        while self._running and self._running[0][1].machine.done:
            sequence, operation = self._running[0]
            if self._outbox and self._outbox[0].sequence <= sequence:
                return None
            # Start the next one first: its sends keep the wire busy while these tickets settle.
            self._start_operations()
            self._flush()
            tickets = self._tickets[sequence]
            while tickets and tickets[-1].done:
                tickets.pop()
            if tickets:
                return tickets[-1]
            operation.finish()
            self._running.popleft()
            del self._tickets[sequence]
            with self._lock:
                del self._waiting[sequence]
                self._completed = sequence
            operation.handle._settle()
        return None

    def _refuse(self, reason: str) -> None:
        with self._lock:
            self._refused[reason] += 1

    # When something is wrong.

    def _patience_s(self) -> float:
        """Seconds until something must happen by itself; opens a dispute when nothing moves."""
        now_s = self._clock()
        if self._suspicion is not None:
            error, deadline_s = self._suspicion
            if now_s >= deadline_s:
                self._break(error)
            return max(0.0, deadline_s - now_s)
        if self._dispute is not None:
            if now_s >= self._dispute.deadline_s:
                self._judge(self._dispute.sequence, ())
                return 0.0
            return self._dispute.deadline_s - now_s
        if not self._running:
            return _IDLE_S
        left_s = self._last_progress_s + self._timeouts.op_timeout_s - now_s
        if left_s > 0:
            return left_s
        self._open_dispute(self._running[0][0], timed_out=True)
        return 0.0

    def _open_dispute(self, sequence: int, *, timed_out: bool) -> None:
        opened_s = deadline_s = self._clock()
        if self._referee is not None:
            self._referee.dispute(sequence)
            # The referee gives up by itself; twice its limit is for one that is gone.
            deadline_s += 2 * self._timeouts.inquiry_timeout_s
        self._dispute = _Dispute(sequence, timed_out, opened_s, deadline_s)

    def _judge(self, sequence: int, calls: tuple[str, ...]) -> None:
        """Act on who called what; `calls` is empty if nobody could tell."""
        dispute = self._dispute if self._dispute and self._dispute.sequence == sequence else None
        if disagreement(calls):
            self._break(
                CollectiveMismatchError(
                    f"the ranks disagree on collective number {sequence}; every rank must call the "
                    f"same collectives in the same order:\n{self._table(calls)}"
                )
            )
        elif dispute is None:
            return  # another rank's question, and no answer to it concerns us
        elif dispute.timed_out:
            self._dispute = None
            if self._last_progress_s <= dispute.opened_s:
                self._break(
                    CollectiveTimeoutError(
                        f"collective number {sequence} made no progress for "
                        f"{self._timeouts.op_timeout_s} s (op_timeout_s):\n"
                        + (self._table(calls) or f"  this rank: {self.describe(sequence)}")
                    )
                )
        elif calls:  # nobody stands by the chunk that differed
            self._refuse("signature")
            self._held = self._dispute = None
        else:
            left = self._generation.describe(self._generation.left)
            self._break(
                CollectiveMismatchError(
                    f"collective number {sequence}: this rank called {self._calls.get(sequence)}, "
                    f"{left} called another; nobody answered who called what"
                )
            )

    def _table(self, calls: tuple[str, ...]) -> str:
        return "\n".join(f"  {self._generation.describe(rank)}: {call}" for rank, call in enumerate(calls))

    def _check_departures(self) -> None:
        """A collective that a departed rank never called cannot end."""
        for rank, completed in self._left.items():
            if self._last_sequence > completed and rank != self._generation.rank:
                call = self._calls.get(completed + 1)
                self._break(
                    PeerLeftError(
                        f"{self._generation.describe(rank)} shut down after {completed} collectives, "
                        f"this rank called one more: {call}",
                        rank=rank,
                        worker_id=self._generation.members[rank].worker_id,
                    )
                )
                return

    def _break(self, error: RingpsError) -> None:
        """Stop for good. Buffers are free of the transport before anybody is told."""
        if self._transport is not None:
            self._transport.close()
        with self._lock:
            if self._error is None:
                self._error = error
            waiting = list(self._waiting.values())
            self._waiting.clear()
        for operation in waiting:
            operation.handle._settle(self._error)


class _Letter(NamedTuple):
    """A frame that waits to be sent."""

    sequence: int
    header: bytes
    payload: memoryview
    borrowed: bool


@dataclass(frozen=True)
class _Dispute:
    sequence: int
    timed_out: bool
    opened_s: float
    deadline_s: float
