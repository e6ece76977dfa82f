"""Chunks over ZeroMQ and TCP: a PULL socket that the left neighbour connects to, and a PUSH socket
connected to the right one.

PUSH and PULL keep order, never drop while connected and block at their high-water mark, which is
what bounds memory. Payloads are sent from the caller's memory and received into libzmq's, without
a copy on our side. Who connects must know the generation's token: as the password of ZMTP's PLAIN
mechanism, or, where data is to be encrypted, as the key pair of CURVE.
"""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from ringps.config import Exchange
from ringps.errors import FrameError, PeerLostError, SetupError
from ringps.ring.topology import Generation
from ringps.transport.base import Admit, Frame, Ticket, TransportCounters, TransportStatistics
from ringps.transport.keys import JobKey
from ringps.transport.zap import ZapResponder
from ringps.wire.header import HEADER_BYTES, ChunkHeader, decode

_DOMAIN = b"ringps-data"
_CURVE_OVERHEAD_BYTES = 64
"""More than encryption adds to a message: libzmq's size limit holds for what it receives."""

_LINK_EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
_REASONS: dict[int, str] = {
    zmq.EVENT_DISCONNECTED: "its data connection closed",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it does not accept this generation's token",
}

_LARGEST_ADAPTIVE_BLOCK_BYTES = 31 << 20
"""Just below the size up to which glibc learns to keep freed memory."""

_GARBAGE_PER_CALL = 256
"""Refused messages after which `receive` gives the caller a turn to send."""


_preparing = threading.Lock()


def _prepare_pyzmq() -> None:
    """Have pyzmq make the one socket by which libzmq tells this process that it has let go of a buffer.

    pyzmq makes it when the first buffer is sent without copying, and takes no lock. Of two ranks that are
    threads and send at once, one would wait for news by a socket that nobody keeps.
    """
    with _preparing:
        zmq.Frame(b"\0", copy=False)


class ZmqTcpListener:
    """A bound data socket that nobody is connected to yet.

    Its address goes to the coordinator; once that has formed the generation, `connect` makes it a
    transport.
    """

    def __init__(
        self, ip: str, token: JobKey, exchange: Exchange, *, encrypt: bool, silent_link_s: int = 3
    ) -> None:
        """Bind to a free port of `ip`.

        Raises:
            SetupError: this machine has no address `ip`.
        """
        _prepare_pyzmq()
        self._token = token
        self._exchange = exchange
        self._encrypt = encrypt
        # glibc gives each freed chunk back to the system, and every page of the next one faults, until
        # it has seen a larger block come and go (M_MMAP_THRESHOLD in mallopt(3)).
        np.empty(_LARGEST_ADAPTIVE_BLOCK_BYTES, dtype=np.uint8)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=exchange.io_threads)
        self._zap = ZapResponder(self._context, token)
        self._pull = self._context.socket(zmq.PULL)
        self._silent_link_s = silent_link_s
        self._keep_alive(self._pull)
        self._pull.linger = 0
        self._pull.rcvhwm = exchange.send_queue_chunks
        self._pull.maxmsgsize = max(exchange.chunk_bytes, HEADER_BYTES) + _CURVE_OVERHEAD_BYTES
        self._pull.zap_domain = _DOMAIN
        self._pull.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody may come in where nobody answers
        if encrypt:
            token.secure_server(self._pull)
        else:
            self._pull.plain_server = True
        literal = f"[{ip}]" if ":" in ip else ip
        self._pull.ipv6 = ":" in ip
        try:
            port = self._pull.bind_to_random_port(f"tcp://{literal}")
        except zmq.ZMQError as error:
            self.close()
            raise SetupError(f"cannot listen on {ip}: {error.strerror}; is it this machine's?") from error
        self.address = f"tcp://{literal}:{port}"

    def connect(self, generation: Generation) -> ZmqTcpTransport:
        """Connect to the right neighbour of `generation`. The listener belongs to the transport then."""
        push = self._context.socket(zmq.PUSH)
        self._keep_alive(push)
        push.linger = 0
        push.sndhwm = self._exchange.send_queue_chunks
        push.immediate = True
        push.reconnect_ivl = 10
        push.reconnect_ivl_max = 1000
        address = generation.members[generation.right].address
        push.ipv6 = "[" in address
        if self._encrypt:
            self._token.secure_client(push)
        else:
            push.plain_username = b"ringps"
            push.plain_password = self._token.secret
        transport = ZmqTcpTransport(self._context, self._zap, self._pull, push, generation)
        push.connect(address)
        return transport

    def _keep_alive(self, one: zmq.Socket[bytes]) -> None:
        """As `tcp_greeting.prepare`."""
        one.tcp_keepalive = one.tcp_keepalive_idle = one.tcp_keepalive_intvl = 1
        one.tcp_keepalive_cnt = max(1, self._silent_link_s - 1)

    def close(self) -> None:
        """Give the port back without having connected."""
        self._pull.close(linger=0)
        self._zap.close()
        self._context.term()


class _ZmqTicket:
    """pyzmq's proof that libzmq has let go of a buffer."""

    __slots__ = ("_tracker",)

    def __init__(self, tracker: zmq.MessageTracker) -> None:
        self._tracker = tracker

    @property
    def done(self) -> bool:
        return self._tracker.done

    def wait(self, timeout_s: float) -> None:
        with suppress(zmq.NotDone):
            self._tracker.wait(timeout_s)


class ZmqTcpTransport:
    """A connected pair of data sockets; see `transport.base.Transport`."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        zap: ZapResponder,
        pull: zmq.Socket[bytes],
        push: zmq.Socket[bytes],
        generation: Generation,
    ) -> None:
        self._context = context
        self._zap = zap
        self._pull = pull
        self._push = push
        self._generation = generation
        self._monitor = push.get_monitor_socket(_LINK_EVENTS)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        self._wake_lock = threading.Lock()
        self._counters = TransportCounters()
        self._refused: Counter[str] = Counter()
        self._held: tuple[ChunkHeader, memoryview] | None = None

    @property
    def sends_to(self) -> frozenset[int]:
        return frozenset({self._generation.right})

    @property
    def receives_from(self) -> frozenset[int]:
        return frozenset({self._generation.left})

    def send(self, peer: int, header: bytes, payload: memoryview) -> Ticket | None:
        try:
            self._push.send(header, zmq.SNDMORE | zmq.NOBLOCK)
        except zmq.Again:
            return None
        # A message is queued as a whole: its second part never meets a full queue.
        tracker = self._push.send(payload, copy=False, track=True)
        self._counters.sent(payload.nbytes)
        assert tracker is not None
        return _ZmqTicket(tracker)

    def receive(self, peer: int, admit: Admit) -> Frame | None:
        for _ in range(_GARBAGE_PER_CALL):
            try:
                header, payload = self._held or self._next()
                self._held = None
            except zmq.Again:
                return None
            except FrameError as error:
                self._refused[error.reason] += 1
                continue
            try:
                if admit(peer, header) is None:
                    self._held = header, payload
                    return None
            except FrameError:
                continue
            self._counters.received(payload.nbytes)
            return Frame(header, payload)
        return None

    def _next(self) -> tuple[ChunkHeader, memoryview]:
        """The next message, in libzmq's memory.

        Raises:
            zmq.Again: there is none now.
            FrameError: it is no frame.
        """
        first = self._pull.recv(zmq.NOBLOCK, copy=False)
        if not first.more:
            raise FrameError("message without payload")
        second = self._pull.recv(copy=False)
        if second.more:
            while self._pull.recv(copy=False).more:
                pass
            raise FrameError("message of more than two parts")
        header = decode(first.bytes)
        if header.payload_bytes != len(second):
            raise FrameError("payload length")
        return header, second.buffer

    def wait(self, timeout_s: float, *, receiving: Collection[int], sending: Collection[int]) -> None:
        poller: list[tuple[Any, int]]
        poller = [(self._wake_fd, zmq.POLLIN), (self._monitor, zmq.POLLIN)]
        if receiving and self._held is None:
            poller.append((self._pull, zmq.POLLIN))
        if sending:
            poller.append((self._push, zmq.POLLOUT))
        ready = [source for source, _ in zmq.zmq_poll(poller, math.ceil(timeout_s * 1000))]
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        if self._monitor in ready:
            self._report(recv_monitor_message(self._monitor)["event"])

    def _report(self, event: int) -> NoReturn:
        rank = self._generation.right
        member = self._generation.members[rank]
        reason = _REASONS.get(event, "its data connection was refused")
        raise PeerLostError(rank=rank, worker_id=member.worker_id, host=member.host, reason=reason)

    def wake(self) -> None:
        with self._wake_lock:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        with self._wake_lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._wake_fd)
        self._push.disable_monitor()
        self._monitor.close(linger=0)
        self._push.close(linger=0)
        self._pull.close(linger=0)
        self._zap.close()
        self._context.term()

    def statistics(self) -> TransportStatistics:
        refused = dict(self._refused)
        if self._zap.refused:
            refused["connection without the token"] = self._zap.refused
        return self._counters.statistics(refused)
