"""What a transport does: frames to the right neighbour, frames from the left one, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Frame(NamedTuple):
    """A frame as it came: nothing in it has been checked yet."""

    header: bytes
    payload: memoryview
    """Writable memory that belongs to the receiver alone."""


class Ticket(Protocol):
    """Proof of one send."""

    @property
    def done(self) -> bool:
        """The payload's memory is no longer needed by the transport."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Block until done, but no longer than `timeout_s`."""
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

    def statistics(self, refused: Mapping[str, int]) -> TransportStatistics:
        """The counters as they are now."""
        return TransportStatistics(
            frames_sent=self.frames_sent,
            frames_received=self.frames_received,
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            refused=refused,
        )


class Transport(Protocol):
    """A link to the right neighbour and one from the left.

    All methods but `wake` are called from one thread. Frames that are sent arrive whole, in order
    and at most once, or not at all; a link that is broken stays broken.
    """

    def send(self, header: bytes, payload: memoryview) -> Ticket | None:
        """Queue a frame for the right neighbour without copying `payload`, and without blocking.

        Returns:
            A ticket; `payload` must not be changed before it is done. None if the queue is full:
            nothing was sent, try again after `wait(sending=True)`.
        """
        ...

    def receive(self) -> Frame | None:
        """The next frame from the left neighbour, or None if there is none now."""
        ...

    def wait(self, timeout_s: float, *, receiving: bool, sending: bool) -> None:
        """Sleep until a frame is there (if `receiving`), the queue has room (if `sending`),
        `wake` was called, or `timeout_s` is over.

        Raises:
            PeerLostError: the link to the right neighbour broke; once, and frames may be lost.
        """
        ...

    def wake(self) -> None:
        """End the current or the next `wait`. May be called from any thread, also after close."""
        ...

    def close(self) -> None:
        """Drop what is queued and free everything. Idempotent."""
        ...

    def statistics(self) -> TransportStatistics:
        """Counters so far."""
        ...
