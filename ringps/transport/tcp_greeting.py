"""One TCP connection on its way to being authenticated, from either side; never blocks."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable

from ringps.errors import FrameError
from ringps.transport import tcp_handshake as handshake
from ringps.transport.tcp_handshake import Hello

_READ = select.POLLIN | select.POLLRDHUP
_AGAIN = (errno.EINPROGRESS, errno.EAGAIN, errno.EINTR)


class Refused(Exception):
    """This connection will not come about; the message says why."""


class Interrupted(Exception):
    """The connection ended before anybody had proved anything: it may be tried again."""


def prepare(connection: socket.socket, buffer_bytes: int, silent_link_s: int) -> None:
    """Set a socket's options, before it connects or listens.

    Keep-alive probes, of which a machine that is there answers each even if the process is busy, break a
    connection over which nothing comes. (TCP_USER_TIMEOUT would also break one whose reader is slow.)
    """
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, silent_link_s - 1))
    if buffer_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)


class _Reader:
    """Reads messages of known size, and not a byte more."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._raw = b""

    def read(self, size_bytes: int) -> bytes | None:
        """The next message, or None if it has not come yet.

        Raises:
            Interrupted: the connection is over.
        """
        try:
            more = self._socket.recv(size_bytes - len(self._raw))
        except BlockingIOError:
            return None
        except OSError as error:
            raise Interrupted(error.strerror) from error
        if not more:
            raise Interrupted("it closed the connection")
        self._raw += more
        if len(self._raw) < size_bytes:
            return None
        raw, self._raw = self._raw, b""
        return raw


class Dial:
    """The connecting side."""

    def __init__(
        self,
        address: tuple[str, int],
        hello: Hello,
        secret: bytes,
        buffer_bytes: int,
        silent_link_s: int,
    ) -> None:
        self.hello = hello
        self.interest = select.POLLOUT
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        prepare(self.socket, buffer_bytes, silent_link_s)
        self._secret = secret
        self._reader = _Reader(self.socket)
        self._raw_hello = handshake.encode_hello(hello)
        self._step: Callable[[], bool] = self._connected
        self._error = self.socket.connect_ex(address)

    def go_on(self) -> bool:
        """Something happened on the socket. True when both sides are authenticated.

        Raises:
            Refused: nobody listens there, or somebody without the token.
            Interrupted: try again with a new one.
        """
        return self._step()

    def _connected(self) -> bool:
        code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if self._error not in (0, *_AGAIN):
            code = self._error
        if code:
            raise Refused(f"cannot connect to it ({os.strerror(code)})")
        self._send(self._raw_hello)
        self.interest = _READ
        self._step = self._challenged
        return False

    def _challenged(self) -> bool:
        raw = self._reader.read(handshake.CHALLENGE_BYTES)
        if raw is None:
            return False
        try:
            self._send(handshake.answer(self._secret, self._raw_hello, raw))
        except FrameError as error:
            raise Refused(error.reason) from error
        self._step = self._welcomed
        return False

    def _welcomed(self) -> bool:
        raw = self._reader.read(len(handshake.WELCOME))
        if raw is None:
            return False
        if raw != handshake.WELCOME:
            raise Refused("it does not accept this generation's token")
        return True

    def _send(self, raw: bytes) -> None:
        try:
            # The first bytes on a connection: there is room for them.
            self.socket.send(raw)
        except OSError as error:
            raise Interrupted(error.strerror) from error


class Guest:
    """The accepting side."""

    def __init__(
        self,
        connection: socket.socket,
        secret: bytes,
        expected: Callable[[Hello], str | None],
        deadline_s: float,
    ) -> None:
        """
        Args:
            connection: as it was accepted.
            secret: the token's.
            expected: says why a hello is not welcome, or None if it is.
            deadline_s: when to lose patience.
        """
        self.socket = connection
        self.deadline_s = deadline_s
        self.hello: Hello | None = None
        self._secret = secret
        self._expected = expected
        self._reader = _Reader(connection)
        self._raw_hello = b""
        self._nonce = os.urandom(handshake.NONCE_BYTES)

    def go_on(self) -> bool:
        """Something happened on the socket. True when both sides are authenticated.

        Raises:
            Refused: it is not one of those that are expected.
            Interrupted: it went away.
        """
        if self.hello is None:
            raw = self._reader.read(handshake.HELLO_BYTES)
            if raw is None:
                return False
            try:
                hello = handshake.decode_hello(raw)
            except FrameError as error:
                raise Refused(error.reason) from error
            self._refuse(self._expected(hello))
            self.hello, self._raw_hello = hello, raw
            self._send(handshake.challenge(self._secret, raw, self._nonce))
        proof = self._reader.read(handshake.PROOF_BYTES)
        if proof is None:
            return False
        if not handshake.proves(self._secret, self._raw_hello, self._nonce, proof):
            raise Refused("connection without the token")
        self._refuse(self._expected(self.hello))  # another may have come meanwhile
        self._send(handshake.WELCOME)
        return True

    def _refuse(self, reason: str | None) -> None:
        if reason is not None:
            raise Refused(reason)

    def _send(self, raw: bytes) -> None:
        try:
            self.socket.send(raw)
        except OSError as error:
            raise Interrupted(error.strerror) from error
