"""What every transport must do, run against each of them.

Rings of `tcp` form while they are used, so whoever waits for one end gives the other one its turn too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from ringps.errors import FrameError
from ringps.transport.base import Admit, Frame, Ticket, Transport
from ringps.wire.header import ChunkHeader, encode
from tests.rings import RINGS, small_chunks

CONFIG = small_chunks(1 << 20, queue=4)
MakeRing = Callable[[int], Sequence[Transport]]


@pytest.fixture(params=RINGS)
def make_ring(request: pytest.FixtureRequest) -> Iterator[MakeRing]:
    opened: list[Transport] = []

    def make(world_size: int) -> Sequence[Transport]:
        ring = RINGS[request.param](world_size, CONFIG)
        opened.extend(ring)
        return ring

    yield make
    for transport in opened:
        transport.close()


def header(sender: int, number: int, size: int) -> ChunkHeader:
    return ChunkHeader(1, number, 7, sender, 0, 0, size)


def give_turns(ring: Sequence[Transport]) -> None:
    for transport in ring:
        transport.wait(0.005, receiving=transport.receives_from, sending=())


def send(ring: Sequence[Transport], rank: int, peer: int, number: int, payload: bytes | bytearray) -> Ticket:
    raw = encode(header(rank, number, len(payload)))
    deadline_s = time.monotonic() + 20
    while (ticket := ring[rank].send(peer, raw, memoryview(payload))) is None:
        assert time.monotonic() < deadline_s, "never had room"
        give_turns(ring)
    return ticket


def anywhere(peer: int, header: ChunkHeader) -> memoryview:
    return memoryview(bytearray(header.payload_bytes))


def receive(ring: Sequence[Transport], rank: int, peer: int, admit: Admit = anywhere) -> Frame:
    deadline_s = time.monotonic() + 20
    while (frame := ring[rank].receive(peer, admit)) is None:
        assert time.monotonic() < deadline_s, "nothing came"
        give_turns(ring)
    return frame


def test_frames_go_round_in_order_and_whole(make_ring: MakeRing) -> None:
    ring = make_ring(3)
    sizes = (0, 1, 70_000, 0, 300)
    for rank in range(3):
        for number, size in enumerate(sizes[:4]):
            send(ring, rank, (rank + 1) % 3, number, bytes([rank]) * size)
    for rank in range(3):
        left = (rank - 1) % 3
        for number, size in enumerate(sizes[:4]):
            frame = receive(ring, rank, left)
            assert frame.header == header(left, number, size)
            assert bytes(frame.payload) == bytes([left]) * size


def test_every_pair_that_is_linked_exchanges_frames(make_ring: MakeRing) -> None:
    ring = make_ring(5)
    for rank, transport in enumerate(ring):
        assert {(rank + 1) % 5} <= transport.sends_to
        assert all(rank in ring[peer].receives_from for peer in transport.sends_to)
        for peer in transport.sends_to:
            send(ring, rank, peer, 10 * rank + peer, b"between two")
    for rank, transport in enumerate(ring):
        for peer in transport.receives_from:
            assert receive(ring, rank, peer).header.sequence == 10 * peer + rank


def test_a_received_payload_is_the_receivers_own(make_ring: MakeRing) -> None:
    ring = make_ring(2)
    original = bytearray(b"x" * 100_000)
    send(ring, 0, 1, 1, original)
    frame = receive(ring, 1, 0)
    frame.payload[:3] = b"abc"
    assert original == b"x" * 100_000


def test_a_ticket_is_done_when_the_payload_may_change(make_ring: MakeRing) -> None:
    ring = make_ring(2)
    original = bytearray(b"x" * 1_000_000)
    ticket = send(ring, 0, 1, 1, original)
    frame = None
    deadline_s = time.monotonic() + 20
    while not ticket.done:
        assert time.monotonic() < deadline_s
        ticket.wait(0.01)
        give_turns(ring)
        frame = frame or ring[1].receive(0, anywhere)
    original[:] = b"y" * len(original)
    frame = frame or receive(ring, 1, 0)
    assert bytes(frame.payload) == b"x" * 1_000_000


def test_a_frame_that_is_not_admitted_now_waits_with_those_behind_it(make_ring: MakeRing) -> None:
    ring = make_ring(2)
    for number in range(4):
        send(ring, 0, 1, number, b"%d" % number)
    asked: list[int] = []

    def later(peer: int, header: ChunkHeader) -> memoryview | None:
        asked.append(header.sequence)
        return None

    deadline_s = time.monotonic() + 20
    while len(asked) < 3:
        assert time.monotonic() < deadline_s
        assert ring[1].receive(0, later) is None
        give_turns(ring)
    assert set(asked) == {0}
    started_s = time.monotonic()
    ring[1].wait(0.3, receiving={0}, sending=())
    assert time.monotonic() - started_s > 0.2, "a frame that is held back must not wake the receiver"
    assert [bytes(receive(ring, 1, 0).payload) for _ in range(4)] == [b"%d" % n for n in range(4)]


def test_a_frame_that_is_turned_away_is_dropped_and_the_next_one_comes(make_ring: MakeRing) -> None:
    """Also if it was held back before."""
    ring = make_ring(2)
    asked: list[int] = []

    def later(peer: int, header: ChunkHeader) -> memoryview | None:
        asked.append(header.sequence)
        return None

    for number in range(4):
        send(ring, 0, 1, number, bytes([number]) * (number * 10_000))

    deadline_s = time.monotonic() + 20
    while not asked:
        assert time.monotonic() < deadline_s
        assert ring[1].receive(0, later) is None
        give_turns(ring)

    def odd(peer: int, header: ChunkHeader) -> memoryview:
        if header.sequence % 2 == 0:
            raise FrameError("even")
        return anywhere(peer, header)

    for number in (1, 3):
        frame = receive(ring, 1, 0, odd)
        assert bytes(frame.payload) == bytes([number]) * (number * 10_000)


def test_a_full_queue_says_so_and_recovers_without_loss(make_ring: MakeRing) -> None:
    ring = make_ring(2)
    send(ring, 0, 1, 0, b"")
    receive(ring, 1, 0)
    payload = memoryview(bytes(1 << 20))
    sent = 0
    deadline_s = time.monotonic() + 20
    idle_since_s = time.monotonic()
    while time.monotonic() - idle_since_s < 0.3:
        assert time.monotonic() < deadline_s, "memory is not bounded"
        if ring[0].send(1, encode(header(0, sent, 1 << 20)), payload) is not None:
            sent += 1
            idle_since_s = time.monotonic()
        else:
            ring[0].wait(0.05, receiving=(), sending={1})
    assert 0 < sent < 64
    for number in range(sent):
        assert receive(ring, 1, 0).header.sequence == number
    send(ring, 0, 1, 1000, b"")
    assert receive(ring, 1, 0).header.sequence == 1000


def test_wake_ends_a_wait_from_another_thread_or_beforehand(make_ring: MakeRing) -> None:
    ring = make_ring(2)
    send(ring, 0, 1, 0, b"")
    receive(ring, 1, 0)
    send(ring, 1, 0, 0, b"")
    receive(ring, 0, 1)
    started_s = time.monotonic()
    ring[0].wake()
    ring[0].wait(30, receiving={1}, sending=())
    thread = threading.Thread(target=ring[0].wake)
    thread.start()
    ring[0].wait(30, receiving={1}, sending=())
    thread.join()
    assert time.monotonic() - started_s < 25


def test_close_twice_and_wake_after_close_are_harmless(make_ring: MakeRing) -> None:
    ring = make_ring(2)
    send(ring, 0, 1, 0, b"lost")
    for transport in ring:
        transport.close()
        transport.close()
        transport.wake()


def test_statistics_count_frames_and_payload_bytes(make_ring: MakeRing) -> None:
    ring = make_ring(2)
    send(ring, 0, 1, 0, b"12345")
    receive(ring, 1, 0)
    assert (ring[0].statistics().frames_sent, ring[0].statistics().bytes_sent) == (1, 5)
    assert (ring[1].statistics().frames_received, ring[1].statistics().bytes_received) == (1, 5)
