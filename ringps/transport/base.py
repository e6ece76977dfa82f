"""What a transport does: frames to and from the ranks that it links, in order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ringps.wire.header import ChunkHeader

Admit = Callable[[int, ChunkHeader], memoryview | None]
"""Asked once for each frame, with the peer that it comes from and its header: where the payload shall go.

Returns writable memory of `payload_bytes` bytes, or None for "not now": the frame stays where it is, and
those behind it too. Raises FrameError to turn the frame away; the transport drops it then.
"""


class Frame(NamedTuple):
    """A frame that was admitted."""

    header: ChunkHeader
    payload: memoryview
    """Where it was to go; a transport that owns what it receives may give that memory instead,
    writable and the receiver's alone."""


class Ticket(Protocol):
    """Proof of one send."""

    @property
    def done(self) -> bool:
        """The payload's memory is no longer needed by the transport."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Block until done, but no longer than `timeout_s`; may return at once."""
        ...


@dataclass(frozen=True)
class TransportStatistics:
    """Counters since the transport was opened."""

    frames_sent: int
    frames_received: int
    bytes_sent: int
    """Payload bytes."""

    bytes_received: int
    """Payload bytes."""

    refused: Mapping[str, int]
    """Frames and connections that the transport itself turned away, by reason."""

    sockets: Mapping[int, str] = field(default_factory=dict)
    """By the rank that they lead to: how many sockets a link has, and why."""


@dataclass
class TransportCounters:
    """Where a transport counts."""

    frames_sent: int = 0
    frames_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0

    def sent(self, payload_bytes: int) -> None:
        """A frame was queued."""
        self.frames_sent += 1
        self.bytes_sent += payload_bytes

    def received(self, payload_bytes: int) -> None:
        """A frame was handed to the caller."""
        self.frames_received += 1
        self.bytes_received += payload_bytes

    def statistics(
        self, refused: Mapping[str, int], sockets: Mapping[int, str] | None = None
    ) -> TransportStatistics:
        """The counters as they are now."""
        return TransportStatistics(
            frames_sent=self.frames_sent,
            frames_received=self.frames_received,
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            refused=refused,
            sockets=sockets or {},
        )


class Transport(Protocol):
    """Links to and from some of the ranks, the neighbours on the ring among them.

    `send`, `receive` and `wait` are called by one thread at a time. Frames that are sent arrive whole, in
    order and at most once, or not at all; a link that is broken stays broken.
    """

    @property
    def sends_to(self) -> frozenset[int]:
        """Ranks that frames can be sent to."""
        ...

    @property
    def receives_from(self) -> frozenset[int]:
        """Ranks that frames come from."""
        ...

    def send(self, peer: int, header: bytes, payload: memoryview) -> Ticket | None:
        """Queue a frame for rank `peer` without copying `payload`, and without blocking.

        Returns:
            A ticket; `payload` must not be changed before it is done. None if there is no room:
            nothing was sent, try again after `wait`.
        """
        ...

    def receive(self, peer: int, admit: Admit) -> Frame | None:
        """The next frame from rank `peer` that `admit` takes, or None if there is none now."""
        ...

    def wait(self, timeout_s: float, *, receiving: Collection[int], sending: Collection[int]) -> None:
        """Sleep until something came from a rank in `receiving` (that is not held back by `admit`), there
        is room towards one in `sending`, `wake` was called, or `timeout_s` is over. May return early.

        Raises:
            PeerLostError: a link broke; once for each rank, and frames may be lost.
        """
        ...

    def wake(self) -> None:
        """End the current or the next `wait`. May be called from any thread, also after close."""
        ...

    def close(self) -> None:
        """Drop what is queued and free everything. Idempotent; not during another thread's `wait`."""
        ...

    def statistics(self) -> TransportStatistics:
        """Counters so far."""
        ...
