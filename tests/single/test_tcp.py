"""The TCP transport's own promises: who may connect, what it refuses, what it says when a link dies."""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringps.config import Config, Exchange
from ringps.errors import FrameError, PeerLostError, SetupError
from ringps.ring.topology import Generation, Member
from ringps.testing import MemoryRing
from ringps.transport import tcp, tcp_greeting
from ringps.transport import tcp_handshake as handshake
from ringps.transport.keys import JobKey
from ringps.transport.tcp import TcpListener, TcpTransport
from ringps.transport.tcp_handshake import Hello
from ringps.transport.tcp_probe import least_sufficient
from ringps.wire.header import HEADER_BYTES, ChunkHeader, encode
from tests.rings import tcp_ring, views

CONFIG = Config()
TOKEN = JobKey.generate()
SO_MAX_PACING_RATE = 47


def anywhere(peer: int, header: ChunkHeader) -> memoryview:
    return memoryview(bytearray(header.payload_bytes))


def turn_until(condition: Callable[[], object], *transports: TcpTransport) -> None:
    for _ in range(2000):
        if condition():
            return
        for transport in transports:
            transport.wait(0.005, receiving=transport.receives_from, sending=())
    pytest.fail(f"did not happen: {[one.statistics() for one in transports]}")


def port_of(transport: TcpTransport) -> tuple[str, int]:
    assert transport._listening is not None
    host, port = transport._listening.getsockname()
    return host, port


@pytest.fixture
def pair() -> Iterator[list[TcpTransport]]:
    """Two transports whose links have not formed yet."""
    ring = tcp_ring(2, CONFIG, token=TOKEN)
    yield ring
    for transport in ring:
        transport.close()


class FakePeer:
    """Rank 0's sending end, made by hand: connects to rank 1 with the handshake and sends raw bytes."""

    def __init__(self, target: TcpTransport, secret: bytes = TOKEN.secret, **changes: object) -> None:
        hello = Hello(1, 0, 1, False, 0, 1, bytes(16))._replace(**changes)  # type: ignore[arg-type]
        self.raw = handshake.encode_hello(hello)
        self.secret = secret
        self.socket = socket.create_connection(port_of(target))
        self.socket.settimeout(20)

    def meet(self, target: TcpTransport) -> None:
        self.socket.sendall(self.raw)
        turn_until(lambda: self.readable(handshake.CHALLENGE_BYTES), target)
        challenge = self.socket.recv(handshake.CHALLENGE_BYTES)
        self.socket.sendall(handshake.answer(self.secret, self.raw, challenge))
        turn_until(lambda: self.readable(1), target)
        assert self.socket.recv(1) == handshake.WELCOME

    def readable(self, size: int) -> bool:
        self.socket.setblocking(False)
        try:
            return len(self.socket.recv(size, socket.MSG_PEEK)) == size
        except BlockingIOError:
            return False
        finally:
            self.socket.settimeout(20)


@pytest.fixture
def lone() -> Iterator[TcpTransport]:
    """Rank 1 of two; nobody plays rank 0, but its address answers."""
    listeners = [TcpListener("127.0.0.1", TOKEN, CONFIG.exchange) for _ in range(2)]
    transport = listeners[1].connect(views(listeners)[1])
    yield transport
    transport.close()
    listeners[0].close()


# Who may connect.


def test_strangers_harm_nobody_and_are_counted(pair: list[TcpTransport]) -> None:
    address = port_of(pair[1])
    silent = [socket.create_connection(address) for _ in range(20)]
    garbage = [socket.create_connection(address) for _ in range(20)]
    for number, one in enumerate(garbage):
        one.sendall(bytes([number]) * 5000)
    guesses = [FakePeer(pair[1], JobKey.generate().secret) for _ in range(3)]
    for guess in guesses:
        guess.socket.sendall(guess.raw + bytes(handshake.PROOF_BYTES))
    turn_until(lambda: pair[1].statistics().refused.get("connection without the token") == 3, pair[1])
    refused = pair[1].statistics().refused
    assert refused == {"connection that does not say hello": 20, "connection without the token": 3}
    with MemoryRing(2, CONFIG, transports=pair) as ring:
        tensors = [torch.ones(3), torch.ones(3)]
        handles = [c.all_reduce(t, async_op=True) for c, t in zip(ring.communicators, tensors, strict=True)]
        for handle, tensor in zip(handles, tensors, strict=True):
            handle.wait(20)
            assert torch.equal(tensor, torch.full((3,), 2.0))
        assert pair[1].statistics().refused["connection without a proof in time"] == 20
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
    for one in [*silent, *garbage, *(guess.socket for guess in guesses)]:
        one.close()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"generation": 2}, "connection for another generation"),
        ({"receiver": 0}, "connection for another link"),
        ({"sender": 1}, "connection for another link"),
        ({"sender": 7}, "connection for another link"),
        ({"total": 65}, "connection of a link with too many"),
        ({"position": 3}, "connection that does not say hello"),
    ],
)
def test_a_connection_that_nobody_waits_for_is_refused(
    lone: TcpTransport, changes: dict[str, int], reason: str
) -> None:
    peer = FakePeer(lone, **changes)
    with closing(peer.socket):
        peer.socket.sendall(peer.raw)
        turn_until(lambda: lone.statistics().refused.get(reason) == 1, lone)


def test_a_link_comes_about_once(lone: TcpTransport) -> None:
    first, second = FakePeer(lone, total=2), FakePeer(lone, total=2)
    with closing(first.socket), closing(second.socket):
        first.meet(lone)
        second.socket.sendall(second.raw)
        turn_until(lambda: lone.statistics().refused.get("second connection of its kind") == 1, lone)


def test_a_connection_left_half_open_is_given_up(lone: TcpTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "_HANDSHAKE_S", 0.05)
    peer = FakePeer(lone)
    with closing(peer.socket):
        peer.socket.sendall(peer.raw)
        reason = "connection without a proof in time"
        turn_until(lambda: lone.statistics().refused.get(reason) == 1, lone)
        assert len(peer.socket.recv(100)) == handshake.CHALLENGE_BYTES
        assert peer.socket.recv(100) == b""
    again = FakePeer(lone)
    with closing(again.socket):
        again.meet(lone)


def test_a_connection_that_ends_before_the_proof_is_tried_again() -> None:
    listeners = [TcpListener("127.0.0.1", TOKEN, CONFIG.exchange) for _ in range(2)]
    ring = [one.connect(view) for one, view in zip(listeners, views(listeners), strict=True)]
    assert ring[1]._listening is not None
    ring[1]._listening.setblocking(True)
    ring[1]._listening.accept()[0].close()
    ring[1]._listening.setblocking(False)
    turn_until(lambda: ring[0]._out and ring[1]._in, *ring)
    for transport in ring:
        transport.close()


def test_whoever_took_over_a_neighbours_port_is_found_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        transport = towards(impostor.getsockname()[1])
        caller = impostor.accept()[0]
        with closing(transport), closing(caller):
            transport.wait(5, receiving={1}, sending={1})
            assert len(caller.recv(handshake.HELLO_BYTES)) == handshake.HELLO_BYTES
            caller.sendall(bytes(handshake.CHALLENGE_BYTES))
            with pytest.raises(PeerLostError, match=r"does not know .* token"):
                turn_until(lambda: False, transport)


def test_an_address_where_nobody_listens_is_a_lost_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    transport = towards(port)
    with closing(transport), pytest.raises(PeerLostError, match=r"rank 1 \(worker 1 on there\).*refused"):
        turn_until(lambda: False, transport)


def towards(port: int) -> TcpTransport:
    """Rank 0 of two; rank 1 is said to listen at a port."""
    listener = TcpListener("127.0.0.1", TOKEN, CONFIG.exchange)
    members = (
        Member(worker_id=0, host="here", address=listener.address),
        Member(worker_id=1, host="there", address=f"tcp://127.0.0.1:{port}"),
    )
    return listener.connect(Generation(number=1, members=members, rank=0))


# What a neighbour may send.

FRAME = ChunkHeader(1, 1, 7, 0, 0, 0, 1000)


@pytest.mark.parametrize("sent", [0, 20, HEADER_BYTES, 500])
def test_a_peer_that_dies_in_the_middle_of_a_frame_is_lost(lone: TcpTransport, sent: int) -> None:
    peer = FakePeer(lone)
    peer.meet(lone)
    peer.socket.sendall(
        (encode(FRAME) + bytes(1000) + encode(FRAME) + bytes(1000))[: HEADER_BYTES + 1000 + sent]
    )
    peer.socket.close()
    turn_until(lambda: lone.receive(0, anywhere), lone)
    with pytest.raises(PeerLostError, match=r"rank 0 .* data connection closed"):
        turn_until(lambda: lone.receive(0, anywhere), lone)


def test_a_header_that_cannot_be_read_ends_the_link_and_reaches_nobody(lone: TcpTransport) -> None:
    peer = FakePeer(lone)
    with closing(peer.socket):
        peer.meet(lone)
        spoilt = bytearray(encode(FRAME))
        spoilt[20] ^= 1
        peer.socket.sendall(spoilt + bytes(1000))
        with pytest.raises(PeerLostError, match=r"rank 0 .* sent what is no frame \(header checksum\)"):
            turn_until(lambda: lone.receive(0, lambda *_: pytest.fail("was admitted")), lone)
    assert lone.statistics().refused == {"header checksum": 1}


def test_a_frame_above_the_limit_ends_the_link(lone: TcpTransport) -> None:
    peer = FakePeer(lone)
    with closing(peer.socket):
        peer.meet(lone)
        peer.socket.sendall(encode(FRAME._replace(payload_bytes=2**32 - 1)))
        with pytest.raises(PeerLostError, match="above the limit"):
            turn_until(lambda: lone.receive(0, lambda *_: pytest.fail("was admitted")), lone)


# Links that die.


def test_a_closed_link_is_a_lost_peer_that_is_named() -> None:
    ring = tcp_ring(3, CONFIG)
    with MemoryRing(3, CONFIG, transports=ring) as memory:
        warm = [comm.all_reduce(torch.ones(3), async_op=True) for comm in memory.communicators]
        for handle in warm:
            handle.wait(20)
        handle = memory.communicators[0].all_reduce(torch.ones(30_000), async_op=True)
        memory._backends[1].close()
        with pytest.raises(PeerLostError, match=r"rank 1 \(worker 1 on here\) lost: .* connection closed"):
            handle.wait(20)


@pytest.mark.parametrize("only", ["sends", "waits", "holds a frame back"])
def test_a_neighbour_that_closes_is_noticed_whatever_one_does(pair: list[TcpTransport], only: str) -> None:
    turn_until(lambda: all(one._out and one._in for one in pair), *pair)
    if only == "holds a frame back":
        assert pair[1].send(0, encode(FRAME._replace(sender=1, payload_bytes=0)), memoryview(b"")) is not None
        held: list[int] = []
        turn_until(lambda: pair[0].receive(1, lambda peer, _: held.append(peer)) or held, pair[0])
    pair[1].close()

    def work() -> None:
        if only == "sends":
            pair[0].send(1, encode(FRAME), memoryview(bytes(1000)))
        pair[0].wait(0.01, receiving=(), sending=())

    with pytest.raises(PeerLostError, match=r"rank 1 .* closed"):
        turn_until(work)


# Addresses and sockets.


def test_an_address_of_another_machine_is_a_setup_error() -> None:
    with pytest.raises(SetupError, match=r"cannot listen on 203\.0\.113\.1"):
        TcpListener("203.0.113.1", TOKEN, CONFIG.exchange)


def test_ipv6_loopback() -> None:
    ring = tcp_ring(2, CONFIG, ip="::1")
    turn_until(lambda: all(one._out and one._in for one in ring), *ring)
    for transport in ring:
        transport.close()


def test_establish_returns_when_all_links_are_there(pair: list[TcpTransport]) -> None:
    with pytest.raises(PeerLostError, match="no data connection with it within"):
        pair[0].establish(0.05)
    threads = [threading.Thread(target=one.establish, args=(20,)) for one in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one._out and one._in for one in pair)


def test_a_link_that_is_limited_by_flow_gets_several_sockets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in clouds; here each socket is paced to 10 MB/s."""

    def paced(connection: socket.socket, buffer_bytes: int, silent_link_s: int) -> None:
        prepare(connection, buffer_bytes, silent_link_s)
        connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 10_000_000)

    prepare = tcp_greeting.prepare
    monkeypatch.setattr(tcp_greeting, "prepare", paced)
    monkeypatch.setattr(tcp, "_is_here", lambda *_: False)
    caplog.set_level(logging.INFO, "ringps")
    ring = tcp_ring(2, CONFIG)
    with MemoryRing(2, CONFIG, transports=ring) as memory:
        tensors = [torch.arange(500_000.0), torch.arange(500_000.0)]
        handles = [c.all_reduce(t, async_op=True) for c, t in zip(memory.communicators, tensors, strict=True)]
        for handle, tensor in zip(handles, tensors, strict=True):
            handle.wait(20)
            assert torch.equal(tensor, 2 * torch.arange(500_000.0))
        notes = [one.statistics().sockets[1 - rank] for rank, one in enumerate(ring)]
        assert all(note.startswith(("4 (measured", "8 (measured")) for note in notes), notes
    assert "sockets: " in caplog.text


def test_the_number_of_sockets_is_as_configured() -> None:
    config = Config(exchange=Exchange(sockets_per_link=5, socket_buffer_bytes=1 << 16))
    ring = tcp_ring(2, config)
    turn_until(lambda: all(one._out and one._in for one in ring), *ring)
    assert ring[0].statistics().sockets == {1: "5 (as configured)"}
    for connection in ring[0]._out[1].sockets:
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 << 16  # Linux doubles it
    for transport in ring:
        transport.close()


def test_more_sockets_are_taken_only_where_they_are_a_fifth_faster() -> None:
    assert least_sufficient({1: 100.0, 2: 101.0, 4: 119.0, 8: 90.0})[0] == 1
    assert least_sufficient({1: 50.0, 2: 96.0, 4: 100.0, 8: 100.0})[0] == 2
    assert least_sufficient({1: 50.0, 2: 55.0, 4: 100.0, 8: 110.0})[0] == 4
    assert least_sufficient({1: 1e8, 2: 2e8, 4: 4e8, 8: 8e8}) == (
        8,
        "measured in Gbit/s by number of sockets: 1: 0.8, 2: 1.6, 4: 3.2, 8: 6.4",
    )
    assert least_sufficient({1: 0.0, 2: 0.0})[0] == 1


# The handshake's messages.


@given(st.integers(0, 8 * (handshake.HELLO_BYTES + handshake.CHALLENGE_BYTES) - 1))
def test_any_flipped_bit_of_hello_or_challenge_is_noticed(bit: int) -> None:
    hello = handshake.encode_hello(Hello(1, 0, 1, False, 0, 1, b"n" * 16))
    challenge = handshake.challenge(TOKEN.secret, hello, b"m" * 16)
    flipped = bytearray(hello + challenge)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError, match="does not know"):
        handshake.answer(TOKEN.secret, bytes(flipped[: len(hello)]), bytes(flipped[len(hello) :]))


@given(st.integers(0, 8 * handshake.PROOF_BYTES - 1))
def test_any_flipped_bit_of_a_proof_is_noticed(bit: int) -> None:
    hello = handshake.encode_hello(Hello(1, 0, 1, False, 0, 1, b"n" * 16))
    proof = handshake.answer(TOKEN.secret, hello, handshake.challenge(TOKEN.secret, hello, b"m" * 16))
    assert handshake.proves(TOKEN.secret, hello, b"m" * 16, proof)
    assert not handshake.proves(TOKEN.secret, hello, b"o" * 16, proof)
    flipped = bytearray(proof)
    flipped[bit // 8] ^= 1 << bit % 8
    assert not handshake.proves(TOKEN.secret, hello, b"m" * 16, bytes(flipped))


def test_an_answer_cannot_be_reflected() -> None:
    hello = handshake.encode_hello(Hello(1, 0, 1, False, 0, 1, b"n" * 16))
    challenge = handshake.challenge(TOKEN.secret, hello, b"m" * 16)
    assert not handshake.proves(TOKEN.secret, hello, b"m" * 16, challenge[handshake.NONCE_BYTES :])


def test_hellos_go_there_and_back_and_are_as_described() -> None:
    hello = Hello(3, 5, 6, True, 2, 8, bytes(range(16)))
    raw = handshake.encode_hello(hello)
    assert handshake.decode_hello(raw) == hello
    assert raw == b"rp1\n" + struct.pack("<IIIBBH", 3, 5, 6, 1, 2, 8) + bytes(range(16))
