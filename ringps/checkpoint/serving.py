"""The loop of the thread that serves training state: connections, requests and answers; nothing blocks."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from ringps.checkpoint import peer_wire as wire
from ringps.checkpoint.peer_wire import Greeting, Kind, Request
from ringps.checkpoint.pieces import Pieces, advance, digest
from ringps.errors import FrameError

MOST_CLIENTS = 16
"""Joining workers that are served at a time; another is told so."""
BACKLOG = 64
"""Connections that have proved nothing yet; for another, the oldest is dismissed."""
_PATIENCE_S = 5.0
"""How long a connection may take to prove that it belongs here."""
_HASHES_PER_TURN = 4
"""Pieces that are hashed before others get a turn: a few milliseconds' worth at most."""
_MOST_VIEWS = 512
"""In one system call; Linux takes 1024."""
_REST_S = 0.05
"""Pause after the system refused another connection, for want of file descriptors for instance."""


class Offered(NamedTuple):
    """A state that is served, and its description as bytes."""

    skeleton: bytes
    layout: bytes
    summary: bytes
    pieces: Pieces

    @classmethod
    def of(cls, skeleton: bytes, tensors: Sequence[torch.Tensor], step: int) -> Offered:
        """What `StateServer.offer` was given."""
        pieces = Pieces(tensors)
        layout = pieces.layout.encode()
        whole = digest([memoryview(skeleton), memoryview(layout)])
        summary = wire.Summary(step, len(skeleton), len(layout), whole)
        return cls(skeleton, layout, wire.encode_summary(summary), pieces)


class _Connection:
    """A connection from a stranger, who may become a client."""

    def __init__(self, connection: socket.socket, deadline_s: float) -> None:
        self.socket = connection
        self.deadline_s = deadline_s
        self.hello = b""
        self.client = False
        self.nonce = os.urandom(wire.NONCE_BYTES)
        self._raw = b""
        self.busy = False
        """It gets an answer; what it asks meanwhile waits in the system."""
        self.answer: Iterator[Iterable[memoryview]] = iter(())
        self.sending: deque[memoryview] = deque()

    def read(self, size_bytes: int) -> bytes | None:
        """The next message of known size, or None if it has not come yet.

        Raises:
            OSError: the connection is over.
        """
        try:
            more = self.socket.recv(size_bytes - len(self._raw))
        except BlockingIOError:
            return None
        if not more:
            raise ConnectionResetError
        self._raw += more
        if len(self._raw) < size_bytes:
            return None
        raw, self._raw = self._raw, b""
        return raw


class ServingLoop:
    """What the thread does in its turns."""

    def __init__(self, listening: socket.socket, secret: bytes) -> None:
        self.offered: Offered | None = None
        self.bytes_sent = 0
        self.pieces_sent = 0
        self.refused: Counter[str] = Counter()
        self._listening = listening
        self._secret = secret
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, _Connection] = {}
        self._hashes: dict[int, bytes] = {}
        self._deaf_until_s = 0.0

    def watch(self, wake: int) -> None:
        """Have `turn` return when something is written to `wake`."""
        self._wake = wake
        self._selector.register(wake, selectors.EVENT_READ)
        self._selector.register(self._listening, selectors.EVENT_READ)

    def serve(self, offered: Offered | None) -> None:
        """Forget the state that was offered before, and all who wanted it."""
        for connection in list(self._connections.values()):
            if connection.client:
                self._dismiss(connection)
        self._hashes = {}
        self.offered = offered

    def close(self) -> None:
        """Close every socket."""
        for connection in list(self._connections.values()):
            self._dismiss(connection)
        self.offered = None
        self._selector.close()
        self._listening.close()

    def turn(self, interrupted: Callable[[], bool]) -> None:
        """Wait for something to do, and do it; return early when `interrupted()`."""
        for key, _ in self._selector.select(self._timeout_s()):
            if interrupted():
                return
            if key.fd == self._wake:
                os.eventfd_read(self._wake)
            elif key.fileobj is self._listening:
                self._accept()
            elif (connection := self._connections.get(key.fd)) is not None:
                try:
                    self._go_on(connection)
                except FrameError as error:
                    self._dismiss(connection, error.reason)
                except OSError:
                    self._dismiss(connection)
        self._tire()

    def _timeout_s(self) -> float | None:
        now_s = time.monotonic()
        until_s = [c.deadline_s for c in self._connections.values() if not c.client]
        if self._deaf_until_s:
            until_s.append(self._deaf_until_s)
        return max(0.0, min(until_s) - now_s) if until_s else None

    def _tire(self) -> None:
        now_s = time.monotonic()
        for connection in list(self._connections.values()):
            if not connection.client and connection.deadline_s <= now_s:
                self._dismiss(connection, "connection that took too long to prove itself")
        if self._deaf_until_s and self._deaf_until_s <= now_s:
            self._deaf_until_s = 0.0
            self._selector.register(self._listening, selectors.EVENT_READ)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            self._selector.unregister(self._listening)
            self._deaf_until_s = time.monotonic() + _REST_S
            return
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        guests = [c for c in self._connections.values() if not c.client]
        if len(guests) >= BACKLOG:
            self._dismiss(guests[0], "more connections than can be waited for")
        self._connections[accepted.fileno()] = _Connection(accepted, time.monotonic() + _PATIENCE_S)
        self._selector.register(accepted, selectors.EVENT_READ)

    def _dismiss(self, connection: _Connection, reason: str = "") -> None:
        if reason:
            self.refused[reason] += 1
        del self._connections[connection.socket.fileno()]
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _go_on(self, connection: _Connection) -> None:
        """Something came on a connection, or it has room again.

        Raises:
            FrameError: what came does not follow the protocol.
            OSError: the connection is over.
        """
        if not connection.client:
            self._greet(connection)
        elif connection.busy:
            self._send(connection)
        else:
            raw = connection.read(wire.REQUEST_BYTES)
            if raw is not None:
                assert self.offered is not None
                request = wire.decode_request(raw, self.offered.pieces.layout.piece_count)
                connection.answer, connection.busy = self._answer(request, self.offered), True
                self._selector.modify(connection.socket, selectors.EVENT_WRITE)
                self._send(connection)

    def _greet(self, connection: _Connection) -> None:
        if not connection.hello:
            raw = connection.read(wire.HELLO_BYTES)
            if raw is None:
                return
            wire.check_hello(raw)
            connection.hello = raw
            # The first bytes on a connection: there is room for them.
            connection.socket.send(wire.challenge(self._secret, raw, connection.nonce))
        proof = connection.read(wire.PROOF_BYTES)
        if proof is None:
            return
        if not wire.proves(self._secret, connection.hello, connection.nonce, proof):
            raise FrameError("connection without the token")
        greeting = self._greeting()
        connection.socket.send(bytes([greeting]))
        if greeting is Greeting.WELCOME:
            connection.client = True
        else:
            self._dismiss(connection)

    def _greeting(self) -> Greeting:
        if self.offered is None:
            return Greeting.NOTHING_OFFERED
        clients = sum(connection.client for connection in self._connections.values())
        return Greeting.WELCOME if clients < MOST_CLIENTS else Greeting.FULL

    def _answer(self, request: Request, offered: Offered) -> Iterator[Iterable[memoryview]]:
        if request.kind is Kind.SUMMARY:
            yield [memoryview(offered.summary)]
        elif request.kind is Kind.SKELETON:
            yield [memoryview(offered.skeleton), memoryview(offered.layout)]
        elif request.kind is Kind.HASHES:
            wanted = iter(range(request.first, offered.pieces.layout.piece_count, request.stride))
            while some := list(islice(wanted, _HASHES_PER_TURN)):
                yield [memoryview(b"".join(self._hash(offered, piece) for piece in some))]
        else:
            self.pieces_sent += 1
            yield offered.pieces.views(request.first)

    def _hash(self, offered: Offered, piece: int) -> bytes:
        if piece not in self._hashes:
            self._hashes[piece] = offered.pieces.digest(piece)
        return self._hashes[piece]

    def _send(self, connection: _Connection) -> None:
        """Send what there is room for of the answer, and see what to wait for."""
        if not connection.sending:
            more = next(connection.answer, None)
            if more is None:
                connection.busy = False
                self._selector.modify(connection.socket, selectors.EVENT_READ)
                return
            connection.sending.extend(more)
        try:
            sent = connection.socket.sendmsg(list(islice(connection.sending, _MOST_VIEWS)))
        except BlockingIOError:
            return
        self.bytes_sent += sent
        advance(connection.sending, sent)
