"""One collective on one rank as a state machine: arrivals in, instructions out.

The machine knows a schedule and the sizes, and nothing of tensors or sockets. Whoever drives it
carries out what it says, in the order in which it says it. Chunks of one slice are independent of
each other, so sending, receiving and combining overlap: chunk 3 may travel its second hop while
chunk 7 still waits for its first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ringps.errors import FrameError
from ringps.ring.partition import Slice, chunk, chunk_count
from ringps.ring.schedule import Action, Content, Schedule


class SendChunk(NamedTuple):
    """Send elements start..stop to rank `peer` as chunk `chunk` of step `step`."""

    step: int
    chunk: int
    start: int
    stop: int
    content: Content
    peer: int


class TakeChunk(NamedTuple):
    """Do `action` with the chunk that came from rank `peer` for elements start..stop; then send `forward`."""

    action: Action
    start: int
    stop: int
    content: Content
    peer: int
    forward: SendChunk | None


class RingMachine:
    """State of one collective on one rank."""

    def __init__(self, schedule: Schedule, slices: Sequence[Slice], chunk_numel: int) -> None:
        if chunk_numel < 1:
            raise ValueError(f"chunk_numel must be at least 1, not {chunk_numel}")
        self._schedule = schedule
        self._slices = slices
        self._chunk_numel = chunk_numel
        self._receives = {receive.step: receive for receive in schedule.receives}
        self._arrived: dict[int, set[int]] = {step: set() for step in self._receives}
        self._claimed: dict[int, set[int]] = {step: set() for step in self._receives}
        self._to_receive = sum(self._chunks(receive.slice) for receive in schedule.receives)
        self._to_forward = sum(
            self._chunks(receive.slice) for receive in schedule.receives if receive.forward is not None
        )

    @property
    def accumulates(self) -> bool:
        """Each step builds upon the one before."""
        return self._schedule.accumulates

    @property
    def done(self) -> bool:
        """Every chunk has come and every instruction has been given."""
        return self._to_receive == 0

    @property
    def sends_given(self) -> bool:
        """No further send will be instructed, so the next collective may start to send."""
        return self._to_forward == 0

    def start(self) -> Iterator[SendChunk]:
        """The sends that wait for nothing."""
        for send in self._schedule.first:
            for index in range(self._chunks(send.slice)):
                part = chunk(self._slices[send.slice], index, self._chunk_numel)
                yield SendChunk(send.step, index, *part, send.content, send.peer)

    def expect(self, step: int, index: int) -> TakeChunk:
        """What to do with chunk `index` of step `step`; changes nothing.

        Raises:
            FrameError: this rank receives no such chunk, or has it already, or it has been claimed.
        """
        receive = self._receives.get(step)
        if receive is None or not 0 <= index < self._chunks(receive.slice):
            raise FrameError("no such chunk")
        if index in self._claimed[step]:
            raise FrameError("duplicate chunk")
        part = chunk(self._slices[receive.slice], index, self._chunk_numel)
        forward = None
        if receive.forward is not None:
            ahead = receive.forward
            forward = SendChunk(ahead.step, index, *part, ahead.content, ahead.peer)
        return TakeChunk(receive.action, *part, receive.content, receive.peer, forward)

    def ready(self, step: int, index: int) -> bool:
        """Whether what chunk `index` of step `step` builds upon has come; if not, it has to wait."""
        if not self._schedule.accumulates:
            return True
        return all(index in arrived for earlier, arrived in self._arrived.items() if earlier < step)

    def claim(self, step: int, index: int) -> None:
        """The chunk is on its way and must not come again."""
        self._claimed[step].add(index)

    def awaits(self, peer: int) -> bool:
        """Whether a chunk is to come from rank `peer` that has not been claimed."""
        return any(
            receive.peer == peer and len(self._claimed[step]) < self._chunks(receive.slice)
            for step, receive in self._receives.items()
        )

    def took(self, step: int, index: int) -> None:
        """The chunk has come and `expect`'s instruction has been carried out."""
        self._claimed[step].add(index)
        self._arrived[step].add(index)
        self._to_receive -= 1
        if self._receives[step].forward is not None:
            self._to_forward -= 1

    def missing(self) -> str:
        """Where this collective stands, for messages: the first step that is not complete."""
        for step, receive in self._receives.items():
            count = self._chunks(receive.slice)
            if len(self._arrived[step]) < count:
                index = next(i for i in range(count) if i not in self._arrived[step])
                return f"waits for chunk {index} of {count} in step {step} of {len(self._receives)}"
        return "has received everything"

    def _chunks(self, index: int) -> int:
        return chunk_count(self._slices[index], self._chunk_numel)
