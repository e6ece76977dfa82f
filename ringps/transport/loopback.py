"""A ring inside one process: what `ringps.testing` and the tests of the layers above run on."""

from __future__ import annotations

import threading
from collections import deque

from ringps.transport.base import Frame, Ticket, TransportCounters, TransportStatistics


class _Sent:
    """Loopback copies at once, so every send is done when it returns."""

    done = True

    def wait(self, timeout_s: float) -> None:
        """Nothing to wait for."""


_SENT = _Sent()


class _Link:
    """A bounded queue of frames from one transport to the next."""

    def __init__(self, capacity_frames: int) -> None:
        self.frames: deque[Frame] = deque()
        self.capacity_frames = capacity_frames


class LoopbackTransport:
    """One rank's end of an in-memory ring; make all of them with `loopback_ring`."""

    def __init__(self, condition: threading.Condition, incoming: _Link, outgoing: _Link) -> None:
        self._condition = condition
        self._incoming = incoming
        self._outgoing = outgoing
        self._woken = False
        self._closed = False
        self._counters = TransportCounters()

    def send(self, header: bytes, payload: memoryview) -> Ticket | None:
        with self._condition:
            if len(self._outgoing.frames) >= self._outgoing.capacity_frames:
                return None
            self._outgoing.frames.append(Frame(bytes(header), memoryview(bytearray(payload))))
            self._counters.sent(payload.nbytes)
            self._condition.notify_all()
        return _SENT

    def receive(self) -> Frame | None:
        with self._condition:
            if self._closed or not self._incoming.frames:
                return None
            frame = self._incoming.frames.popleft()
            self._counters.received(frame.payload.nbytes)
            self._condition.notify_all()
        return frame

    def wait(self, timeout_s: float, *, receiving: bool, sending: bool) -> None:
        def ready() -> bool:
            room = len(self._outgoing.frames) < self._outgoing.capacity_frames
            return self._woken or (receiving and bool(self._incoming.frames)) or (sending and room)

        with self._condition:
            self._condition.wait_for(ready, timeout_s)
            self._woken = False

    def wake(self) -> None:
        with self._condition:
            self._woken = True
            self._condition.notify_all()

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._incoming.frames.clear()

    def statistics(self) -> TransportStatistics:
        return self._counters.statistics({})


def loopback_ring(world_size: int, capacity_frames: int = 8) -> list[LoopbackTransport]:
    """Transports of an in-memory ring, in rank order.

    Args:
        world_size: number of ranks.
        capacity_frames: frames that may wait on each link before `send` returns None.
    """
    condition = threading.Condition()
    links = [_Link(capacity_frames) for _ in range(world_size)]
    return [
        LoopbackTransport(condition, incoming=links[rank], outgoing=links[(rank + 1) % world_size])
        for rank in range(world_size)
    ]
