"""Joining the processes of one host: every two of them exchange file descriptors over a Unix socket.

Each worker listens under an abstract name, which is no file and vanishes with the process. Of two
members the one that comes later in the ring connects to the other. Both check that the other end
belongs to the same user and that its greeting carries the generation's token, and then hand over
their segment and the eventfd by which they want to be told.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from hmac import compare_digest
from typing import TypeVar

from ringps.collectives.shm.memory import Segment
from ringps.collectives.shm.signals import Peer
from ringps.errors import PeerLostError, SetupError
from ringps.ring.topology import Generation
from ringps.transport.keys import JobKey

T = TypeVar("T")

_GREETING = struct.Struct("<4sIII16s")
"""Magic, generation, rank of the sender, zero, authentication code."""
_MAGIC = b"rps1"
_CREDENTIALS = struct.Struct("iII")
_LOOK_S = 0.05
"""How long to wait for a member at a time, before looking whether it is still there."""


class NotHere(SetupError):
    """A member that claims to be on this host cannot be reached here."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class LocalListener:
    """This worker's Unix socket, before it is known who else is on this host."""

    def __init__(self, token: JobKey, worker_id: int) -> None:
        """Listen.

        Raises:
            SetupError: the system does not allow it.
        """
        self._token = token
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind(_name(token, worker_id))
            self._socket.listen(128)
        except OSError as error:
            self._socket.close()
            raise SetupError(
                f"cannot listen on a Unix socket: {error.strerror}; use --transport tcp"
            ) from error

    def connect(
        self,
        generation: Generation,
        ranks: Sequence[int],
        segment: Segment,
        timeout_s: float,
        check: Callable[[], None],
    ) -> list[Peer]:
        """Meet the other members of this host. Closes the listener.

        Args:
            generation: who is in the ring.
            ranks: all ranks of this host, in ring order.
            segment: this rank's, which its peers get.
            timeout_s: how long it may take.
            check: called now and then; raises if a member is known to be lost.

        Raises:
            RingpsError: what `check` raised.
            PeerLostError: one of them is gone, or did not answer.
            NotHere: one that claims to be on this host cannot be reached here.
        """
        peers: dict[int, Peer] = {}
        me = generation.rank
        deadline_s = time.monotonic() + timeout_s
        with ExitStack() as undo:
            undo.callback(self._socket.close)
            pending: dict[int, tuple[socket.socket, int]] = {}
            for rank in ranks:
                if rank >= me:
                    break
                connection = self._call(generation, rank, deadline_s, check)
                undo.callback(connection.close)
                pending[rank] = connection, self._greet(connection, generation, segment)
            expected = {rank for rank in ranks if rank > me}
            while expected:
                try:
                    connection = _patiently(self._socket, lambda: self._socket.accept()[0], deadline_s, check)
                except TimeoutError:
                    raise _lost(
                        generation, min(expected), "did not connect to its neighbours on this host"
                    ) from None
                answer = self._read(connection, generation, deadline_s, check)
                if answer is None or answer[0] not in expected:
                    connection.close()
                    continue
                undo.callback(connection.close)
                rank, theirs, outgoing = answer
                expected.discard(rank)
                incoming = self._greet(connection, generation, segment)
                peers[rank] = _peer(ranks, rank, theirs, connection, incoming, outgoing)
            for rank, (connection, incoming) in pending.items():
                answer = self._read(connection, generation, deadline_s, check)
                if answer is None or answer[0] != rank:
                    raise _lost(generation, rank, "closed its connection while the ring formed")
                peers[rank] = _peer(ranks, rank, answer[1], connection, incoming, answer[2])
            undo.pop_all()
            self._socket.close()
        return [peers[rank] for rank in sorted(peers)]

    def close(self) -> None:
        """Give up without having connected. Idempotent."""
        self._socket.close()

    def _call(
        self, generation: Generation, rank: int, deadline_s: float, check: Callable[[], None]
    ) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        name = _name(self._token, generation.members[rank].worker_id)
        try:
            _patiently(connection, lambda: connection.connect(name), deadline_s, check)
        except OSError as error:
            connection.close()
            raise NotHere(
                f"{generation.describe(rank)} has the same host name as this worker but cannot be reached "
                f"through a Unix socket ({error.strerror}); give machines and network namespaces "
                "different names (--host), or use --transport tcp",
                rank,
            ) from error
        return connection

    def _greet(self, connection: socket.socket, generation: Generation, segment: Segment) -> int:
        """Introduce ourselves; returns the eventfd that the other one got."""
        bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        code = self._code(generation.number, generation.rank)
        greeting = _GREETING.pack(_MAGIC, generation.number, generation.rank, 0, code)
        try:
            socket.send_fds(connection, [greeting], [segment.descriptor, bell])
        except OSError:
            pass  # reading its answer says that it is gone
        return bell

    def _read(
        self,
        connection: socket.socket,
        generation: Generation,
        deadline_s: float,
        check: Callable[[], None],
    ) -> tuple[int, Segment, int] | None:
        """(rank, its segment, the eventfd to post to) of a member; None for anybody else."""
        _, user, _ = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if user != os.geteuid():
            return None  # whoever it is, nobody waits for what it says
        try:
            greeting, descriptors, _, _ = _patiently(
                connection, lambda: socket.recv_fds(connection, _GREETING.size + 1, 2), deadline_s, check
            )
        except OSError:
            return None
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        if len(greeting) == _GREETING.size and len(descriptors) == 2:
            magic, number, rank, _, code = _GREETING.unpack(greeting)
            known = compare_digest(code, self._code(number, rank))
            if magic == _MAGIC and number == generation.number and known:
                size_bytes = os.fstat(descriptors[0]).st_size
                return rank, Segment(descriptors[0], size_bytes), descriptors[1]
        for descriptor in descriptors:
            os.close(descriptor)
        return None

    def _code(self, number: int, rank: int) -> bytes:
        text = b"%d %d" % (number, rank)
        return blake2b(text, key=self._token.secret, person=b"ringps-local", digest_size=16).digest()


def _patiently(
    one: socket.socket, operation: Callable[[], T], deadline_s: float, check: Callable[[], None]
) -> T:
    """`operation`, which blocks on `one`, with looks at `check` in between.

    Raises:
        TimeoutError: it did not end before `deadline_s`.
    """
    one.settimeout(_LOOK_S)
    while True:
        try:
            return operation()
        except TimeoutError:
            check()
            if time.monotonic() >= deadline_s:
                raise


def _name(token: JobKey, worker_id: int) -> bytes:
    text = b"%d" % worker_id
    return (
        b"\0ringps-"
        + blake2b(text, key=token.secret, person=b"ringps-name", digest_size=16).hexdigest().encode()
    )


def _peer(
    ranks: Sequence[int], rank: int, segment: Segment, connection: socket.socket, incoming: int, outgoing: int
) -> Peer:
    connection.setblocking(False)
    return Peer(ranks.index(rank), rank, segment, connection, incoming, outgoing)


def _lost(generation: Generation, rank: int, reason: str) -> PeerLostError:
    member = generation.members[rank]
    return PeerLostError(rank=rank, worker_id=member.worker_id, host=member.host, reason=reason)
