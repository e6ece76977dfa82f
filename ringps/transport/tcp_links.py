"""One direction of a link between two ranks: frames over one TCP connection, or over several in turn.

Frame number i of a link travels on connection i mod k, so the order is known without being sent. A frame is
its header and its payload, one behind the other. Sending and receiving never block.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Callable, Sequence

from ringps.errors import FrameError
from ringps.transport.base import Admit, Frame
from ringps.wire.header import HEADER_BYTES, ChunkHeader, decode

READ = select.POLLIN | select.POLLRDHUP
WATCH = select.POLLRDHUP
WRITE = select.POLLOUT | select.POLLRDHUP
_WAKE_BYTES = 1 << 19
"""Of a large frame, how much must have come before it is worth a thread's waking up."""
_GARBAGE_PER_CALL = 256
"""Refused frames after which `receive` gives the caller a turn to send."""


class LinkError(Exception):
    """The link cannot go on; the message says what its other end did."""


class Parcel:
    """A frame on its way out, and the ticket for it."""

    __slots__ = ("done", "header", "payload")

    def __init__(self, header: memoryview, payload: memoryview) -> None:
        self.header = header
        self.payload = payload
        self.done = False

    def wait(self, timeout_s: float) -> None:
        """It leaves in `Transport.wait`."""


class _Sent:
    done = True

    def wait(self, timeout_s: float) -> None:
        """It has left."""


_SENT = _Sent()


class OutLink:
    """The sending end."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self.sockets = sockets
        self._parcels: list[Parcel | None] = [None] * len(sockets)
        self._turn = 0

    def send(self, header: bytes, payload: memoryview) -> Parcel | _Sent | None:
        """Send a frame, or begin to; None if its connection has not sent the one before.

        Raises:
            LinkError: the other end is gone.
        """
        turn = self._turn
        if self._parcels[turn] is not None:
            return None
        try:
            sent = self.sockets[turn].sendmsg((header, payload))
        except BlockingIOError:
            return None
        except OSError as error:
            raise LinkError(_broken(error)) from error
        self._turn = (turn + 1) % len(self.sockets)
        left = HEADER_BYTES + payload.nbytes - sent
        if left == 0:
            return _SENT
        parcel = Parcel(memoryview(header)[sent:], payload[max(0, sent - HEADER_BYTES) :])
        self._parcels[turn] = parcel
        return parcel

    def go_on(self, index: int) -> None:
        """Connection `index` has room again, or broke.

        Raises:
            LinkError: the other end is gone.
        """
        parcel = self._parcels[index]
        if parcel is None:
            return
        try:
            while parcel.header.nbytes or parcel.payload.nbytes:
                sent = self.sockets[index].sendmsg((parcel.header, parcel.payload))
                of_header = min(sent, parcel.header.nbytes)
                parcel.header = parcel.header[of_header:]
                parcel.payload = parcel.payload[sent - of_header :]
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkError(_broken(error)) from error
        parcel.done = True
        self._parcels[index] = None

    def interest(self, index: int) -> int:
        """What to poll connection `index` for."""
        return WATCH if self._parcels[index] is None else WRITE

    @property
    def room(self) -> bool:
        """Whether `send` may take a frame."""
        return self._parcels[self._turn] is None


class _Arrival:
    """A frame of which the header has come."""

    __slots__ = ("header", "left", "place", "refused")

    def __init__(self, header: ChunkHeader, place: memoryview | None) -> None:
        self.header = header
        self.place = place
        self.left = header.payload_bytes
        self.refused = place is None


class _Stream:
    """One connection of the receiving end."""

    __slots__ = ("_least", "arrival", "got", "raw", "readable", "socket", "view")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.raw = bytearray(HEADER_BYTES)
        self.view = memoryview(self.raw)
        self.got = 0
        """Bytes of the header of the next frame."""
        self.arrival: _Arrival | None = None
        self.readable = True
        self._least = 1

    def wake_at(self, size_bytes: int) -> None:
        """Have poll report this connection when so many bytes are there, or its end."""
        if size_bytes != self._least:
            self._least = size_bytes
            try:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)
            except OSError:
                pass  # it is closed, which `read` finds out

    def read(self, into: memoryview) -> int:
        """Bytes that came; 0 if there are none now.

        Raises:
            LinkError: the other end is gone.
        """
        if not self.readable:
            return 0
        try:
            got = self.socket.recv_into(into)
        except BlockingIOError:
            self.readable = False
            return 0
        except OSError as error:
            raise LinkError(_broken(error)) from error
        if got == 0:
            raise LinkError("its data connection closed")
        if got < len(into):
            self.readable = False  # most likely; poll says so if not
        return got


class InLink:
    """The receiving end."""

    def __init__(
        self, sockets: Sequence[socket.socket], limit_bytes: int, refuse: Callable[[str], None]
    ) -> None:
        """
        Args:
            sockets: the link's connections, in order.
            limit_bytes: largest payload.
            refuse: counts why a frame was turned away.
        """
        self.streams = [_Stream(one) for one in sockets]
        self._limit_bytes = limit_bytes
        self._refuse = refuse
        self._turn = 0
        self._arriving: deque[_Stream] = deque()
        """Streams with a frame under way, in the order of the frames."""
        self._scrap: memoryview | None = None
        self._failure: LinkError | None = None
        self.held = False

    def receive(self, peer: int, admit: Admit) -> Frame | None:
        """The next frame that `admit` takes, if all of it is here.

        Raises:
            LinkError: the other end is gone, or what it sends cannot be read.
        """
        for _ in range(_GARBAGE_PER_CALL):
            if self._failure is None:
                try:
                    self._open(peer, admit)
                    for stream in self._arriving:
                        if stream.readable:
                            self._fill(stream)
                except LinkError as error:
                    self._failure = error  # what came whole before it counts
            arrival = self._arriving[0].arrival if self._arriving else None
            if arrival is None or arrival.left:
                if self._failure is not None:
                    raise self._failure
                return None
            stream = self._arriving[0]
            self._arriving.popleft()
            stream.arrival = None
            if not arrival.refused:
                assert arrival.place is not None
                return Frame(arrival.header, arrival.place)
        return None

    def _open(self, peer: int, admit: Admit) -> None:
        """Read headers and have their frames admitted, on one connection after the other."""
        while True:
            stream = self.streams[self._turn]
            if stream.arrival is not None:
                return
            if stream.got < HEADER_BYTES:
                stream.got += stream.read(stream.view[stream.got :])
                if stream.got < HEADER_BYTES:
                    return
            try:
                header = decode(bytes(stream.raw))
            except FrameError as error:
                # Where the next frame begins is not known any more.
                self._refuse(error.reason)
                raise LinkError(f"it sent what is no frame ({error.reason})") from error
            if header.payload_bytes > self._limit_bytes:
                self._refuse("payload above the limit")
                raise LinkError(f"it sent a frame of {header.payload_bytes} bytes, which is above the limit")
            try:
                place = admit(peer, header)
            except FrameError:
                place, self.held = None, False
            else:
                self.held = place is None
                if self.held:
                    return
            stream.got = 0
            stream.arrival = _Arrival(header, place)
            self._arriving.append(stream)
            self._turn = (self._turn + 1) % len(self.streams)

    def _fill(self, stream: _Stream) -> None:
        arrival = stream.arrival
        assert arrival is not None
        while arrival.left and stream.readable:
            place = arrival.place
            if place is None:
                if self._scrap is None:
                    self._scrap = memoryview(bytearray(1 << 16))
                into = self._scrap[: arrival.left]
            else:
                into = place[len(place) - arrival.left :]
            arrival.left -= stream.read(into)

    def interest(self, index: int) -> int:
        """What to poll connection `index` for."""
        stream = self.streams[index]
        if stream.arrival is not None:
            left = stream.arrival.left
            stream.wake_at(min(left, _WAKE_BYTES) or 1)
            return READ if left else WATCH
        stream.wake_at(1)
        waits = index != self._turn or stream.got == HEADER_BYTES
        return WATCH if waits else READ

    @property
    def readable(self) -> bool:
        """Whether `receive` may get on without waiting."""
        if self._arriving and any(s.readable and s.arrival and s.arrival.left for s in self._arriving):
            return True
        stream = self.streams[self._turn]
        return stream.readable and stream.arrival is None and not self.held


def _broken(error: OSError) -> str:
    return f"its data connection broke ({error.strerror or error})"
