"""The fetching side of a connection to one `StateServer`; blocks, and belongs to one thread at a time."""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from itertools import islice

from ringps.checkpoint import peer_wire as wire
from ringps.checkpoint.peer_wire import Greeting, Request
from ringps.checkpoint.pieces import advance
from ringps.config import Timeouts
from ringps.errors import FrameError

_MOST_VIEWS = 512
"""In one system call; Linux takes 1024."""
_GREETINGS = {
    Greeting.NOTHING_OFFERED: "it does not offer its state now",
    Greeting.FULL: "it serves as many others as it can",
}


class SourceLost(Exception):
    """Nothing more will come from this server; the message says why."""


def split(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, or of `[HOST]:PORT` for an IPv6 address.

    Raises:
        ValueError: it is neither.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host, int(port)


class Source:
    """One server, and the connection to it."""

    def __init__(self, address: str, place: tuple[str, int], timeouts: Timeouts) -> None:
        """
        Args:
            address: what to call it in errors.
            place: host and port, as `split` gives them.
            timeouts: `connect_timeout_s` and `silent_link_s` are used.
        """
        self.address = address
        self._place = place
        self._timeouts = timeouts
        family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)

    def meet(self, secret: bytes) -> None:
        """Connect, and prove to each other that both sides know the token.

        Raises:
            SourceLost: nobody is there, or somebody without the token or without a state.
        """
        nonce = os.urandom(wire.NONCE_BYTES)
        try:
            self._socket.settimeout(self._timeouts.connect_timeout_s)
            self._socket.connect(self._place)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = wire.hello(nonce)
            self._socket.sendall(hello)
            self._socket.sendall(wire.answer(secret, hello, self._read(wire.CHALLENGE_BYTES)))
            greeting = self._read(1)[0]
            # Waits in the kernel from here on, not in poll: a piece is one system call if all goes well.
            self._socket.settimeout(None)
            silence = struct.pack("@ll", self._timeouts.silent_link_s, 0)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._socket.setsockopt(socket.SOL_SOCKET, option, silence)
        except FrameError as error:
            raise SourceLost(error.reason) from error
        except TimeoutError as error:
            raise SourceLost(f"it did not answer within {self._timeouts.connect_timeout_s} s") from error
        except OSError as error:
            raise SourceLost(f"cannot connect to it ({error.strerror or error})") from error
        if greeting != Greeting.WELCOME:
            raise SourceLost(_GREETINGS.get(greeting, "it does not follow the protocol"))  # type: ignore[call-overload]

    def ask(self, request: Request) -> None:
        """Send a request.

        Raises:
            SourceLost: the connection is over.
        """
        try:
            self._socket.sendall(wire.encode_request(request))
        except OSError as error:
            raise self._over(error) from error

    def receive(self, into: deque[memoryview]) -> None:
        """Fill memory with what comes next; `into` is empty then.

        Raises:
            SourceLost: the connection is over, or silent for `silent_link_s`.
        """
        while into:
            try:
                came, _, _, _ = self._socket.recvmsg_into(
                    list(islice(into, _MOST_VIEWS)), 0, socket.MSG_WAITALL
                )
            except OSError as error:
                raise self._over(error) from error
            if not came:
                raise SourceLost("it closed the connection")
            advance(into, came)

    def receive_bytes(self, size_bytes: int) -> bytearray:
        """So many bytes that come next.

        Raises:
            SourceLost: as for `receive`.
        """
        raw = bytearray(size_bytes)
        self.receive(deque([memoryview(raw)] if raw else []))
        return raw

    def end(self) -> None:
        """Have the thread that waits for this server raise `SourceLost`. Any thread may call this, and
        again: before it connects, nothing happens."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is not connected

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _read(self, size_bytes: int) -> bytes:
        raw = b""
        while len(raw) < size_bytes:
            more = self._socket.recv(size_bytes - len(raw))
            if not more:
                raise ConnectionResetError("it closed the connection")
            raw += more
        return raw

    def _over(self, error: OSError) -> SourceLost:
        if isinstance(error, BlockingIOError):
            return SourceLost(f"it was silent for {self._timeouts.silent_link_s} s")
        return SourceLost(f"its connection broke ({error.strerror or error})")
