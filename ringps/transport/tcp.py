"""Chunks over plain TCP connections, without a thread, a queue or a copy of its own.

A link from one rank to another is a connection, or several, that the sending rank opens; the other way
round it is another link. Payloads leave from the caller's memory and arrive where the caller wants them. What
bounds memory is the sockets' buffers. Both ends prove that they know the generation's token before a
byte of data is sent or looked at (`transport.tcp_handshake`); what follows is not encrypted.

Connections come about while `wait` is called: neither end has to be there first. When all have come, the
listening socket closes, so nobody else can connect while data is exchanged.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from functools import partial

from ringps import probe as moments
from ringps.config import Exchange
from ringps.errors import PeerLostError, SetupError
from ringps.ring import schedule
from ringps.ring.topology import Generation
from ringps.transport.base import Admit, Frame, Ticket, TransportCounters, TransportStatistics
from ringps.transport.keys import JobKey
from ringps.transport.tcp_greeting import Dial, Guest, Interrupted, Refused, prepare
from ringps.transport.tcp_handshake import NONCE_BYTES, Hello
from ringps.transport.tcp_links import InLink, LinkError, OutLink
from ringps.transport.tcp_probe import COUNTS, Probe, drop

_log = logging.getLogger("ringps")

_HANDSHAKE_S = 10.0
"""How long a connection may take to prove that it belongs here."""
_RETRY_S = 0.05
_MOST_GUESTS = 256
_MOST_SOCKETS = 64
_CLOSED = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL


class TcpListener:
    """A bound data socket that nobody is connected to yet.

    Its address goes to the coordinator; once that has formed the generation, `connect` makes it a
    transport.
    """

    def __init__(self, ip: str, token: JobKey, exchange: Exchange, *, silent_link_s: int = 3) -> None:
        """Bind to a free port of `ip`.

        Args:
            ip: an address of this machine.
            token: the generation's.
            exchange: settings.
            silent_link_s: after so many seconds without any sign of the other machine a connection breaks.

        Raises:
            SetupError: this machine has no address `ip`.
        """
        self._token = token
        self._exchange = exchange
        self._ip = ip
        self._silent_link_s = silent_link_s
        self._socket = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM)
        try:
            prepare(self._socket, exchange.socket_buffer_bytes, silent_link_s)
            self._socket.bind((ip, 0))
            self._socket.listen(_MOST_GUESTS)
        except OSError as error:
            self._socket.close()
            raise SetupError(f"cannot listen on {ip}: {error.strerror}; is it this machine's?") from error
        literal = f"[{ip}]" if ":" in ip else ip
        self.address = f"tcp://{literal}:{self._socket.getsockname()[1]}"

    def connect(self, generation: Generation) -> TcpTransport:
        """Connect to those that this rank exchanges data with, beginning now. Does not wait for them.

        The listener belongs to the transport then.
        """
        return TcpTransport(
            self._socket, self._ip, generation, self._token, self._exchange, silent_link_s=self._silent_link_s
        )

    def close(self) -> None:
        """Give the port back without having connected. Idempotent."""
        self._socket.close()


class TcpTransport:
    """Links to the neighbours on the ring, and to the partners of recursive doubling; see
    `transport.base.Transport`."""

    def __init__(
        self,
        listening: socket.socket,
        ip: str,
        generation: Generation,
        token: JobKey,
        exchange: Exchange,
        *,
        silent_link_s: int,
    ) -> None:
        self._generation = generation
        self._silent_link_s = silent_link_s
        self._ip = ip
        self._secret = token.secret
        self._exchange = exchange
        partners = schedule.recursive_doubling(generation.rank, generation.world_size).peers
        self._sends_to = partners | {generation.right}
        self._receives_from = partners | {generation.left}

        self._closed = False
        self._close_lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._counters = TransportCounters()
        self._refused: Counter[str] = Counter()
        self._notes: dict[int, str] = {}

        self._poll = select.poll()
        self._masks: dict[int, int] = {}
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._out: dict[int, OutLink] = {}
        self._in: dict[int, InLink] = {}
        self._broken_out: set[int] = set()
        self._broken_in: set[int] = set()
        self._reported: set[int] = set()
        self._losses: deque[PeerLostError] = deque()

        self._listening: socket.socket | None = listening
        self._guests: dict[int, Guest] = {}
        self._arrived: dict[int, dict[int, socket.socket]] = {}
        self._drains: dict[int, socket.socket] = {}
        self._dials: dict[int, Dial] = {}
        self._retries: list[tuple[float, Hello]] = []
        self._dialled: dict[tuple[int, bool], dict[int, socket.socket]] = {}
        self._probes: dict[int, Probe] = {}
        self._scrap = bytearray(1 << 18)

        self._watch(self._wake_fd, select.POLLIN, self._on_wake)
        self._watch(listening.fileno(), select.POLLIN, self._on_guest)
        for peer in sorted(self._sends_to):
            count, why = self._count(peer)
            if count:
                self._open_link(peer, count, why)
            else:
                self._dial_all(peer, COUNTS[-1], probe=True)

    @property
    def sends_to(self) -> frozenset[int]:
        return self._sends_to

    @property
    def receives_from(self) -> frozenset[int]:
        return self._receives_from

    def send(self, peer: int, header: bytes, payload: memoryview) -> Ticket | None:
        link = self._out.get(peer)
        if link is None or peer in self._broken_out:
            return None
        if moments.listener is not None and link.room:
            incoming = self._in.get(peer)
            passed = moments.reached(
                "chunk",
                header=header,
                payload=payload,
                peer=peer,
                outgoing=list(link.sockets),
                incoming=[stream.socket for stream in incoming.streams] if incoming else [],
            )
            header, payload = passed["header"], passed["payload"]
        try:
            ticket = link.send(header, payload)
        except LinkError as error:
            self._break_out(peer, str(error))
            return None
        if ticket is not None:
            self._counters.sent(payload.nbytes)
        return ticket

    def receive(self, peer: int, admit: Admit) -> Frame | None:
        link = self._in.get(peer)
        if link is None or peer in self._broken_in:
            return None
        try:
            frame = link.receive(peer, admit)
        except LinkError as error:
            self._break_in(peer, str(error))
            return None
        if frame is not None:
            self._counters.received(frame.payload.nbytes)
        return frame

    def wait(self, timeout_s: float, *, receiving: Collection[int], sending: Collection[int]) -> None:
        if self._losses:
            raise self._losses.popleft()
        if self._ready(receiving, sending):
            timeout_s = 0.0
        elif not self._formed:
            timeout_s = min(timeout_s, self._next_timer_s())
        self._refresh()
        for fd, events in self._poll.poll(math.ceil(timeout_s * 1000)):
            handler = self._handlers.get(fd)
            if handler is not None:  # else an earlier event of this round took it away
                handler(events)
        if not self._formed:
            self._go_on_forming()
        if self._losses:
            raise self._losses.popleft()

    def establish(self, timeout_s: float, check: Callable[[], None] = lambda: None) -> None:
        """Wait until all links are there. Every rank has to call it, or use its links, meanwhile.

        Args:
            timeout_s: how long, at most.
            check: called now and then; raises if a member is known to be lost.

        Raises:
            PeerLostError: one is not after `timeout_s`, or will never be.
            RingpsError: what `check` raised.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self._formed:
            check()
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                missing = (self._sends_to - self._out.keys()) | (self._receives_from - self._in.keys())
                raise self._loss(min(missing), f"no data connection with it within {timeout_s} s")
            self.wait(min(left_s, _RETRY_S), receiving=(), sending=())

    def wake(self) -> None:
        with self._close_lock:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._wake_fd)
        if self._listening is not None:
            self._listening.close()
        for connection in self._sockets():
            connection.close()
        self._broken_out |= self._sends_to
        self._broken_in |= self._receives_from
        self._handlers.clear()

    def statistics(self) -> TransportStatistics:
        return self._counters.statistics(dict(self._refused), dict(self._notes))

    # Links that are there.

    def _ready(self, receiving: Collection[int], sending: Collection[int]) -> bool:
        for peer in receiving:
            link = self._in.get(peer)
            if link is not None and link.readable and peer not in self._broken_in:
                return True
        for peer in sending:
            out = self._out.get(peer)
            if out is not None and out.room and peer not in self._broken_out:
                return True
        return False

    def _refresh(self) -> None:
        """Poll each connection for what its link waits for."""
        for peer, out in self._out.items():
            if peer not in self._broken_out:
                for index, connection in enumerate(out.sockets):
                    self._ask(connection.fileno(), out.interest(index))
        for peer, link in self._in.items():
            if peer not in self._broken_in:
                for index, stream in enumerate(link.streams):
                    self._ask(stream.socket.fileno(), link.interest(index))
        for peer, probe in self._probes.items():
            for index, connection in self._dialled[peer, True].items():
                self._ask(connection.fileno(), probe.interest(index))

    def _on_out(self, peer: int, index: int, events: int) -> None:
        if events & select.POLLOUT:
            try:
                self._out[peer].go_on(index)
            except LinkError as error:
                self._break_out(peer, str(error))
                return
        if events & _CLOSED:
            self._break_out(peer, "its data connection closed")

    def _on_in(self, peer: int, index: int, events: int) -> None:
        link = self._in[peer]
        stream = link.streams[index]
        if events & select.POLLIN:
            stream.readable = True
        if events & _CLOSED:
            if link.interest(index) & select.POLLIN:
                stream.readable = True  # there may be more to read before its end
            else:
                self._lose(peer, "its data connection closed")
                self._forget(stream.socket.fileno())

    def _break_out(self, peer: int, reason: str) -> None:
        self._broken_out.add(peer)
        for connection in self._out[peer].sockets:
            self._forget(connection.fileno())
        self._lose(peer, reason)

    def _break_in(self, peer: int, reason: str) -> None:
        self._broken_in.add(peer)
        for stream in self._in[peer].streams:
            self._forget(stream.socket.fileno())
        self._lose(peer, reason)

    def _lose(self, peer: int, reason: str) -> None:
        if peer not in self._reported:
            self._reported.add(peer)
            self._losses.append(self._loss(peer, reason))

    def _loss(self, peer: int, reason: str) -> PeerLostError:
        member = self._generation.members[peer]
        return PeerLostError(rank=peer, worker_id=member.worker_id, host=member.host, reason=reason)

    # Forming.

    @property
    def _formed(self) -> bool:
        return self._listening is None and not self._dials and not self._retries and not self._probes

    def _next_timer_s(self) -> float:
        deadlines = [
            *(deadline_s for deadline_s, _ in self._retries),
            *(guest.deadline_s for guest in self._guests.values()),
            *(probe.deadline_s for probe in self._probes.values()),
        ]
        return max(0.0, min(deadlines, default=math.inf) - time.monotonic())

    def _go_on_forming(self) -> None:
        now_s = time.monotonic()
        due = [hello for deadline_s, hello in self._retries if deadline_s <= now_s]
        self._retries = [entry for entry in self._retries if entry[0] > now_s]
        for hello in due:
            self._dial(hello)
        for fd, guest in list(self._guests.items()):
            if guest.deadline_s <= now_s:
                self._dismiss(fd, "connection without a proof in time")
        for peer, probe in list(self._probes.items()):
            decided = probe.go_on(now_s)
            if decided is not None:
                del self._probes[peer]
                for connection in self._dialled.pop((peer, True)).values():
                    self._forget(connection.fileno())
                    drop(connection)
                self._open_link(peer, *decided)
        if self._listening is not None and self._receives_from == self._in.keys():
            self._forget(self._listening.fileno())
            self._listening.close()
            self._listening = None
            for fd in list(self._guests):
                self._dismiss(fd, "connection without a proof in time")

    # Connecting.

    def _address(self, peer: int) -> tuple[str, int]:
        host, _, port = self._generation.members[peer].address.removeprefix("tcp://").rpartition(":")
        return host.strip("[]"), int(port)

    def _count(self, peer: int) -> tuple[int, str]:
        """How many sockets a link gets, and why; 0: to be measured."""
        if peer != self._generation.right:
            return 1, "for small tensors"
        if self._exchange.sockets_per_link:
            return self._exchange.sockets_per_link, "as configured"
        host, _ = self._address(peer)
        return (1, "on this machine") if _is_here(host, self._ip) else (0, "")

    def _open_link(self, peer: int, count: int, why: str) -> None:
        self._notes[peer] = f"{count} ({why})"
        _log.info("link to %s: sockets: %s", self._generation.describe(peer), self._notes[peer])
        self._dial_all(peer, count, probe=False)

    def _dial_all(self, peer: int, count: int, *, probe: bool) -> None:
        self._dialled[peer, probe] = {}
        for index in range(count):
            nonce = os.urandom(NONCE_BYTES)
            view = self._generation
            self._dial(Hello(view.number, view.rank, peer, probe, index, count, nonce))

    def _dial(self, hello: Hello) -> None:
        peer = hello.receiver
        buffer_bytes = self._exchange.socket_buffer_bytes
        dial = Dial(self._address(peer), hello, self._secret, buffer_bytes, self._silent_link_s)
        fd = dial.socket.fileno()
        self._dials[fd] = dial
        self._watch(fd, dial.interest, partial(self._on_dial, fd))

    def _on_dial(self, fd: int, events: int) -> None:
        dial = self._dials[fd]
        hello = dial.hello
        peer = hello.receiver
        try:
            if not dial.go_on():
                self._ask(fd, dial.interest)
                return
        except (Refused, Interrupted) as error:
            self._forget(fd)
            del self._dials[fd]
            dial.socket.close()
            if isinstance(error, Interrupted):
                self._retries.append((time.monotonic() + _RETRY_S, hello))
            else:
                self._lose(peer, str(error))
            return
        del self._dials[fd]
        ours = self._dialled[peer, hello.probe]
        ours[hello.position] = dial.socket
        if hello.probe:
            self._watch(fd, 0, partial(self._on_probe, peer, hello.position))
            if len(ours) == hello.total:
                ordered = [ours[index] for index in range(hello.total)]
                self._probes[peer] = Probe(ordered, time.monotonic())
            return
        self._watch(fd, select.POLLRDHUP, partial(self._on_out, peer, hello.position))
        if len(ours) == hello.total:
            self._out[peer] = OutLink([ours[index] for index in range(hello.total)])

    def _on_probe(self, peer: int, index: int, events: int) -> None:
        if events & select.POLLOUT and peer in self._probes:
            self._probes[peer].push(index)
        if events & _CLOSED:
            self._forget(self._dialled[peer, True][index].fileno())
            self._lose(peer, "its data connection closed")

    # Accepting.

    def _on_guest(self, events: int) -> None:
        assert self._listening is not None
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return  # it went away again
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self._guests) >= _MOST_GUESTS:
            self._dismiss(next(iter(self._guests)), "more connections than can be waited for")
        fd = connection.fileno()
        deadline_s = time.monotonic() + _HANDSHAKE_S
        self._guests[fd] = Guest(connection, self._secret, self._unexpected, deadline_s)
        self._watch(fd, select.POLLIN, partial(self._on_greeting, fd))

    def _unexpected(self, hello: Hello) -> str | None:
        """Why a connection is not welcome."""
        if hello.generation != self._generation.number:
            return "connection for another generation"
        if hello.receiver != self._generation.rank or hello.sender not in self._receives_from:
            return "connection for another link"
        if hello.total > _MOST_SOCKETS:
            return "connection of a link with too many"
        if hello.probe:
            return "more probes than a link has" if len(self._drains) >= 4 * COUNTS[-1] else None
        arrived = self._arrived.get(hello.sender, {})
        if hello.sender in self._in or hello.position in arrived:
            return "second connection of its kind"
        return None

    def _on_greeting(self, fd: int, events: int) -> None:
        guest = self._guests[fd]
        try:
            if not guest.go_on():
                return
        except Refused as error:
            self._dismiss(fd, str(error))
            return
        except Interrupted:
            self._dismiss(fd, "connection closed before its proof")
            return
        del self._guests[fd]
        hello = guest.hello
        assert hello is not None
        peer = hello.sender
        if hello.probe:
            self._drains[fd] = guest.socket
            self._watch(fd, select.POLLIN, partial(self._on_drain, fd))
            return
        arrived = self._arrived.setdefault(peer, {})
        arrived[hello.position] = guest.socket
        self._watch(fd, select.POLLRDHUP, partial(self._on_early, peer, fd))
        if len(arrived) == hello.total:
            ordered = [arrived[index] for index in range(hello.total)]
            limit_bytes = self._exchange.chunk_bytes
            self._in[peer] = InLink(ordered, limit_bytes, self._count_refused)
            for index, connection in enumerate(ordered):
                self._watch(connection.fileno(), select.POLLIN, partial(self._on_in, peer, index))

    def _on_early(self, peer: int, fd: int, events: int) -> None:
        """A connection closed while others of its link are still to come."""
        self._forget(fd)
        self._lose(peer, "its data connection closed")

    def _on_drain(self, fd: int, events: int) -> None:
        try:
            more = self._drains[fd].recv_into(self._scrap)
        except BlockingIOError:
            return
        except OSError:
            more = 0
        if not more:
            self._forget(fd)
            self._drains.pop(fd).close()

    def _dismiss(self, fd: int, reason: str) -> None:
        self._refused[reason] += 1
        self._forget(fd)
        self._guests.pop(fd).socket.close()

    def _count_refused(self, reason: str) -> None:
        self._refused[reason] += 1

    # Polling.

    def _on_wake(self, events: int) -> None:
        os.eventfd_read(self._wake_fd)

    def _watch(self, fd: int, mask: int, handler: Callable[[int], None]) -> None:
        self._handlers[fd] = handler
        self._masks[fd] = mask
        self._poll.register(fd, mask)

    def _ask(self, fd: int, mask: int) -> None:
        if self._masks.get(fd, mask) != mask:
            self._masks[fd] = mask
            self._poll.modify(fd, mask)

    def _forget(self, fd: int) -> None:
        if self._masks.pop(fd, None) is not None:
            del self._handlers[fd]
            self._poll.unregister(fd)

    def _sockets(self) -> Iterable[socket.socket]:
        for dial in self._dials.values():
            yield dial.socket
        for guest in self._guests.values():
            yield guest.socket
        yield from self._drains.values()
        for group in (*self._dialled.values(), *self._arrived.values()):
            yield from group.values()


def _is_here(host: str, own_ip: str) -> bool:
    """Whether an address is this machine's."""
    return host == own_ip or ipaddress.ip_address(host).is_loopback
