"""A ring inside one process: what `ringps.testing` and the tests of the layers above run on."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Collection

from ringps.errors import FrameError
from ringps.transport.base import Admit, Frame, Ticket, TransportCounters, TransportStatistics
from ringps.wire.header import decode


class _Sent:
    """Loopback copies at once, so every send is done when it returns."""

    done = True

    def wait(self, timeout_s: float) -> None:
        """Nothing to wait for."""


_SENT = _Sent()


class _Link:
    """A bounded queue of frames from one transport to another."""

    def __init__(self, capacity_frames: int) -> None:
        self.frames: deque[tuple[bytes, memoryview]] = deque()
        self.capacity_frames = capacity_frames
        self.held = False


class LoopbackTransport:
    """One rank's end of an in-memory ring that links all ranks; make all of them with `loopback_ring`."""

    def __init__(
        self, condition: threading.Condition, incoming: dict[int, _Link], outgoing: dict[int, _Link]
    ) -> None:
        self._condition = condition
        self._incoming = incoming
        self._outgoing = outgoing
        self._woken = False
        self._closed = False
        self._counters = TransportCounters()
        self._refused: Counter[str] = Counter()

    @property
    def sends_to(self) -> frozenset[int]:
        return frozenset(self._outgoing)

    @property
    def receives_from(self) -> frozenset[int]:
        return frozenset(self._incoming)

    def send(self, peer: int, header: bytes, payload: memoryview) -> Ticket | None:
        link = self._outgoing[peer]
        with self._condition:
            if len(link.frames) >= link.capacity_frames:
                return None
            link.frames.append((bytes(header), memoryview(bytearray(payload))))
            self._counters.sent(payload.nbytes)
            self._condition.notify_all()
        return _SENT

    def receive(self, peer: int, admit: Admit) -> Frame | None:
        link = self._incoming[peer]
        while True:
            with self._condition:
                if self._closed or not link.frames:
                    return None
                raw, payload = link.frames[0]
            try:
                header = decode(raw)
                if header.payload_bytes != payload.nbytes:
                    raise FrameError("payload length")
            except FrameError as error:
                self._refused[error.reason] += 1
                self._drop(link)
                continue
            try:
                link.held = admit(peer, header) is None
            except FrameError:
                link.held = False
                self._drop(link)
                continue
            if link.held:
                return None
            self._drop(link)
            self._counters.received(payload.nbytes)
            return Frame(header, payload)

    def _drop(self, link: _Link) -> None:
        with self._condition:
            if link.frames:  # else it was closed meanwhile
                link.frames.popleft()
            self._condition.notify_all()

    def wait(self, timeout_s: float, *, receiving: Collection[int], sending: Collection[int]) -> None:
        def ready() -> bool:
            if self._woken:
                return True
            for peer in receiving:
                link = self._incoming[peer]
                if link.frames and not link.held:
                    return True
            links = (self._outgoing[peer] for peer in sending)
            return any(len(link.frames) < link.capacity_frames for link in links)

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
            for link in self._incoming.values():
                link.frames.clear()

    def statistics(self) -> TransportStatistics:
        return self._counters.statistics(dict(self._refused))


def loopback_ring(world_size: int, capacity_frames: int = 8) -> list[LoopbackTransport]:
    """Transports of an in-memory ring, in rank order.

    Args:
        world_size: number of ranks.
        capacity_frames: frames that may wait on each link before `send` returns None.
    """
    condition = threading.Condition()
    ranks = range(world_size)
    links = {(a, b): _Link(capacity_frames) for a in ranks for b in ranks if a != b}
    return [
        LoopbackTransport(
            condition,
            incoming={peer: links[peer, rank] for peer in ranks if peer != rank},
            outgoing={peer: links[rank, peer] for peer in ranks if peer != rank},
        )
        for rank in ranks
    ]
