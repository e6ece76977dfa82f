"""Runs this rank's collectives, one after the other, over a transport.

There is no thread for it alone: whoever calls a collective and waits for its result drives the engine
until it is there. Only what is called asynchronously is driven by a thread in the background, which
sleeps when nothing is outstanding. One thread drives at a time; others leave notes for it and wake it.

Collectives get a sequence number in the order in which they are called, and send in that order:
the first chunk of number k + 1 leaves only after the last one of number k. So a link delivers all
chunks of k before any of k + 1, and a chunk of a collective that was not called here yet can wait
where it is: the transport stops reading that link until it has been called. That bounds memory, and it
lets the tail of one collective overlap with the head of the next.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ringps.collectives.backend import EngineStatistics
from ringps.collectives.disputes import Docket
from ringps.collectives.handle import Handle
from ringps.collectives.ring import Outgoing, Pool, RingOperation
from ringps.errors import ClosedError, CollectiveError, FrameError, PeerLostError, RingpsError
from ringps.kernels.digest import checksum
from ringps.ring.topology import Generation
from ringps.transport.base import Frame, Ticket, Transport
from ringps.wire.header import ChunkHeader, encode

_FRAMES_PER_TURN = 32
_FARTHEST_AHEAD = 1 << 20
"""More collectives than the frames of which fit into a link's queues."""
_IDLE_S = 60.0
_SETTLE_S = 0.001
"""Longest look away from the sockets while the last bytes of a collective leave."""


class _Letter(NamedTuple):
    """A frame that waits to be sent."""

    operation: RingOperation
    header: bytes
    outgoing: Outgoing


class _Contested(NamedTuple):
    """A frame whose sender called something else."""

    peer: int
    header: ChunkHeader


class Engine:
    """Drives collectives over the transport, which belongs to it. Thread-safe."""

    def __init__(
        self,
        generation: Generation,
        transport: Transport,
        docket: Docket,
        pool: Pool,
        *,
        checked_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            generation: who is in the ring.
            transport: a connected transport.
            docket: keeps who called what.
            pool: where operations take their memory from.
            checked_bytes: largest payload that is sent with a checksum.
            clock: monotonic seconds.
        """
        self._generation = generation
        self._transport = transport
        self._docket = docket
        self._pool = pool
        self._checked_bytes = checked_bytes
        self._clock = clock

        self._changed = threading.Condition()
        self._driven = False
        """Somebody drives, and nobody else may."""
        self._error: RingpsError | None = None
        self._waiting: dict[int, RingOperation] = {}
        self._submitted: deque[tuple[int, RingOperation]] = deque()
        self._notices: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._completed = 0
        self._refused: Counter[str] = Counter()

        # Only whoever drives touches these.
        self._running: dict[int, RingOperation] = {}
        self._newest_started = 0
        self._outboxes: dict[int, deque[_Letter]] = {peer: deque() for peer in transport.sends_to}
        self._leaving: deque[tuple[Ticket, _Letter]] = deque()
        self._sources = sorted(transport.receives_from)
        self._contested: _Contested | None = None
        self._forged: _Contested | None = None
        self._asked = False
        self._last_progress_s = clock()
        self._suspicion: tuple[PeerLostError, float] | None = None

    # Called by any thread.

    def run(self, operation: RingOperation) -> None:
        """Carry a collective out after all those submitted before; returns when it is done.

        Raises:
            RingpsError: the ring is broken or closed.
        """
        with self._changed:
            self._register(operation)
            mine = not self._driven
            self._driven = True
        if mine:
            self._drive(lambda: not operation.handle.done())
        else:
            self._transport.wake()
        operation.handle.wait()

    def submit(self, operation: RingOperation) -> Handle:
        """Carry a collective out in the background, after all those submitted before.

        Raises:
            RingpsError: the ring is broken or closed.
        """
        with self._changed:
            self._register(operation)
            if not self._driven:
                self._call_background()
        # Whoever drives now may be about to leave; a wake too many does no harm.
        self._transport.wake()
        return operation.handle

    def fail(self, error: RingpsError) -> None:
        """End every collective, now and later, with `error`. The first error stays."""
        self._notify(lambda: self._break(error))

    def peer_left(self, rank: int, completed: int) -> None:
        """Rank `rank` called shutdown() after `completed` collectives."""
        self._docket.departed(rank, completed)
        self._notify(self._check_departures)

    def verdict(self, sequence: int, calls: tuple[str, ...]) -> None:
        """What each rank called as number `sequence`, in rank order."""
        self._notify(lambda: self._judge(sequence, calls))

    def describe(self, sequence: int) -> str:
        """This rank's answer to an inquiry about number `sequence`."""
        return self._docket.describe(sequence)

    def drain(self) -> None:
        """Wait for every collective that was submitted.

        Raises:
            RingpsError: the ring broke, now or before.
        """
        with self._changed:
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
        self.fail(ClosedError("the ring was shut down by this process"))
        with self._changed:
            self._changed.wait_for(lambda: not self._driven)
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def statistics(self) -> EngineStatistics:
        """Counters so far."""
        return EngineStatistics(self._completed, dict(self._refused), self._transport.statistics())

    # Who drives.

    def _register(self, operation: RingOperation) -> None:
        """Take an operation in; with the lock held."""
        if self._error is not None:
            raise self._error
        sequence = self._docket.open(operation.call, operation.machine.missing)
        self._waiting[sequence] = operation
        self._submitted.append((sequence, operation))
        if operation.gate is not None and not operation.gate.is_open:
            operation.gate.on_open(self._transport.wake)

    def _notify(self, notice: Callable[[], None]) -> None:
        """Have `notice` called by whoever drives; that is this thread if nobody does."""
        with self._changed:
            self._notices.append(notice)
            mine = not self._driven
            self._driven = True
        if mine:
            self._drive(lambda: False)
        else:
            self._transport.wake()

    def _call_background(self) -> None:
        """With the lock held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_background, name="ringps-comm", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run_background(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: not self._driven and (self._waiting or self._error is not None)
                )
                if self._error is not None:
                    return
                self._driven = True
            self._drive(lambda: bool(self._waiting))

    def _drive(self, wanted: Callable[[], bool]) -> None:
        """Drive as long as `wanted`, and until no notice is left. The caller has set `_driven`."""
        try:
            # Overflows are the user's, as in torch.
            with np.errstate(all="ignore"):
                while True:
                    while self._error is None and wanted():
                        self._turn()
                    self._read_notices()
                    with self._changed:
                        if not self._notices or self._error is not None:
                            self._rest()
                            return
        except Exception as error:  # a defect of ours must not leave callers waiting
            failure = CollectiveError(f"ringps failed inside: {error!r}; please report it")
            failure.__cause__ = error
            self._abandon(failure)
        except BaseException:
            self._abandon(ClosedError("a collective was interrupted in this process"))
            raise

    def _abandon(self, error: RingpsError) -> None:
        self._break(error)
        with self._changed:
            self._rest()

    def _rest(self) -> None:
        """Stop driving; with the lock held."""
        self._driven = False
        if self._error is not None:
            self._notices.clear()
            self._changed.notify_all()
        elif self._waiting:
            self._call_background()

    # Driving.

    def _turn(self) -> None:
        self._read_notices()
        if self._error is not None:
            return
        self._start_operations()
        self._flush()
        progress = self._receive()
        if progress:
            self._last_progress_s = self._clock()
        if self._contested is not None and not self._asked:
            self._asked = True
            self._docket.ask(self._contested.header.sequence, other=self._contested.peer)
            return
        unsettled = self._complete()
        if progress or not (self._running or self._gated()):
            return
        if unsettled is None:
            self._sleep(_IDLE_S)
        else:
            unsettled.wait(_SETTLE_S)
            self._sleep(0.0 if unsettled.done else _SETTLE_S)

    def _gated(self) -> bool:
        """Whether this rank is not ready for what comes next."""
        gate = self._submitted[0][1].gate if self._submitted else None
        return gate is not None and not gate.is_open

    def _read_notices(self) -> None:
        while self._notices and self._error is None:
            self._notices.popleft()()

    def _start_operations(self) -> None:
        while self._submitted:
            gate = self._submitted[0][1].gate
            if gate is not None and not gate.is_open:
                return
            if self._running:
                newest = self._running[self._newest_started]
                if not newest.machine.sends_given:
                    return
            else:
                self._last_progress_s = self._clock()
                self._check_departures()
                if self._error is not None:
                    return
            sequence, operation = self._submitted.popleft()
            self._running[sequence] = operation
            self._newest_started = sequence
            for outgoing in operation.first_sends():
                self._post(sequence, operation, outgoing)

    def _post(self, sequence: int, operation: RingOperation, outgoing: Outgoing) -> None:
        payload = outgoing.payload
        checked = 0 < payload.nbytes <= self._checked_bytes
        header = ChunkHeader(
            generation=self._generation.number,
            sequence=sequence,
            signature=operation.call.signature,
            sender=self._generation.rank,
            step=outgoing.step,
            chunk=outgoing.chunk,
            payload_bytes=payload.nbytes,
            payload_check=checksum(payload) if checked else 0,
        )
        operation.unsent += 1
        self._outboxes[outgoing.peer].append(_Letter(operation, encode(header), outgoing))

    def _flush(self) -> None:
        while self._leaving and self._leaving[0][0].done:
            self._sent(self._leaving.popleft()[1])
        for peer, outbox in self._outboxes.items():
            while outbox:
                letter = outbox[0]
                ticket = self._transport.send(peer, letter.header, letter.outgoing.payload)
                if ticket is None:
                    break
                outbox.popleft()
                self._last_progress_s = self._clock()
                if ticket.done:
                    self._sent(letter)
                else:
                    # Whoever drives stays until it has left: nobody else may come for a long time.
                    self._leaving.append((ticket, letter))

    def _sent(self, letter: _Letter) -> None:
        letter.operation.unsent -= 1
        if letter.outgoing.scratch is not None:
            self._pool.give(letter.outgoing.scratch)

    def _receive(self) -> bool:
        progress = False
        for peer in self._sources:
            for _ in range(_FRAMES_PER_TURN):
                frame = self._transport.receive(peer, self._admit)
                if frame is None:
                    break
                progress = True
                if frame.header.payload_check not in (0, checksum(frame.payload)):
                    self._refused["payload checksum"] += 1
                    self._break(self._garbled(peer))
                    return True
                self._dispatch(frame)
        return progress

    def _dispatch(self, frame: Frame) -> None:
        sequence = frame.header.sequence
        operation = self._running[sequence]
        outgoing = operation.take(frame.header, frame.payload)
        if outgoing is not None:
            self._post(sequence, operation, outgoing)
            self._flush()

    def _admit(self, peer: int, header: ChunkHeader) -> memoryview | None:
        """See `transport.base.Admit`."""
        try:
            return self._place(peer, header)
        except FrameError as error:
            self._refused[error.reason] += 1
            raise

    def _place(self, peer: int, header: ChunkHeader) -> memoryview | None:
        if header.generation != self._generation.number:
            raise FrameError("other generation")
        if header.sender != peer:
            raise FrameError("other sender")
        operation = self._running.get(header.sequence)
        if operation is None:
            if header.sequence <= self._newest_started:
                raise FrameError("collective that has ended")
            if header.sequence > self._newest_started + _FARTHEST_AHEAD:
                raise FrameError("too far ahead")
            if any(one.machine.awaits(peer) for one in self._running.values()):
                raise FrameError("ahead of its turn")
            return None
        if header.signature != operation.call.signature:
            if self._forged == (peer, header):
                self._forged = None
                raise FrameError("signature")
            if self._contested is None:
                self._contested = _Contested(peer, header)
                self._asked = False
            return None
        return operation.place(peer, header)

    def _complete(self) -> Ticket | None:
        """End what is done. Returns a ticket that must settle before more can end, or None."""
        while self._running:
            sequence, operation = next(iter(self._running.items()))
            if not operation.machine.done:
                return None
            # Start the next one first: its sends keep the wire busy while this one's leave.
            self._start_operations()
            self._flush()
            if operation.unsent:
                return next(
                    (ticket for ticket, letter in self._leaving if letter.operation is operation), None
                )
            operation.finish()
            del self._running[sequence]
            with self._changed:
                del self._waiting[sequence]
            self._docket.close(sequence)
            self._completed = sequence
            operation.handle._settle()
        return None

    # When something is wrong.

    def _sleep(self, limit_s: float) -> None:
        patience_s = min(limit_s, self._patience_s())
        if self._error is not None:
            return
        sending = [peer for peer, outbox in self._outboxes.items() if outbox]
        try:
            self._transport.wait(patience_s, receiving=self._sources, sending=sending)
        except PeerLostError as error:
            if self._suspicion is None:
                self._suspicion = (error, self._clock() + self._docket.explanation_s)

    def _patience_s(self) -> float:
        """Seconds until something must happen by itself; opens a dispute when nothing moves."""
        if self._suspicion is not None:
            error, deadline_s = self._suspicion
            left_s = deadline_s - self._clock()
            if left_s <= 0:
                self._break(error)
            return max(0.0, left_s)
        if not self._running:
            return _IDLE_S
        current = next(iter(self._running))
        left_s, overdue = self._docket.patience_s(current, self._last_progress_s)
        if overdue is not None:
            self._break(overdue)
        return left_s

    def _judge(self, sequence: int, calls: tuple[str, ...]) -> None:
        """Act on who called what; `calls` is empty if nobody could tell."""
        error = self._docket.rule(sequence, calls, self._last_progress_s)
        if error is not None:
            self._break(error)
        elif self._contested is not None and self._contested.header.sequence == sequence and self._asked:
            self._forged, self._contested = self._contested, None  # nobody stands by it

    def _garbled(self, peer: int) -> PeerLostError:
        member = self._generation.members[peer]
        reason = "a frame of it came with a wrong checksum"
        return PeerLostError(rank=peer, worker_id=member.worker_id, host=member.host, reason=reason)

    def _check_departures(self) -> None:
        """A collective that a departed rank never called cannot end."""
        departure = self._docket.departure()
        if departure is not None:
            self._break(departure)

    def _break(self, error: RingpsError) -> None:
        """Stop for good. Buffers are free of the transport before anybody is told."""
        self._transport.close()
        with self._changed:
            if self._error is None:
                self._error = error
            waiting = list(self._waiting.values())
            self._waiting.clear()
            self._submitted.clear()
        self._running.clear()
        for operation in waiting:
            operation.handle._settle(self._error)
