"""What every transport must do, run against each of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ringps.transport.base import Frame, Transport
from tests.rings import RINGS, small_chunks

CONFIG = small_chunks(1 << 20, queue=4)
MakeRing = Callable[[int], list[Transport]]


@pytest.fixture(params=RINGS)
def make_ring(request: pytest.FixtureRequest) -> Iterator[MakeRing]:
    opened: list[Transport] = []

    def make(world_size: int) -> list[Transport]:
        ring = RINGS[request.param](world_size, CONFIG)
        opened.extend(ring)
        return ring

    yield make
    for transport in opened:
        transport.close()


def send(transport: Transport, header: bytes, payload: bytes | bytearray) -> None:
    deadline_s = time.monotonic() + 20
    while (ticket := transport.send(header, memoryview(payload))) is None:
        assert time.monotonic() < deadline_s, "never had room"
        transport.wait(0.1, receiving=False, sending=True)
    while not ticket.done and len(payload) < 4096:
        ticket.wait(0.1)


def receive(transport: Transport) -> Frame:
    deadline_s = time.monotonic() + 20
    while (frame := transport.receive()) is None:
        assert time.monotonic() < deadline_s, "nothing came"
        transport.wait(0.1, receiving=True, sending=False)
    return frame


def test_frames_go_round_in_order_and_whole(make_ring: MakeRing) -> None:
    ring = make_ring(3)
    for rank, transport in enumerate(ring):
        for number, size in enumerate((0, 1, 70_000)):
            send(transport, b"%d-%d" % (rank, number), bytes([rank]) * size)
    for rank, transport in enumerate(ring):
        left = (rank - 1) % 3
        for number, size in enumerate((0, 1, 70_000)):
            frame = receive(transport)
            assert frame.header == b"%d-%d" % (left, number)
            assert bytes(frame.payload) == bytes([left]) * size


def test_a_received_payload_is_the_receivers_own(make_ring: MakeRing) -> None:
    ring = make_ring(2)
    original = bytearray(b"x" * 100_000)
    send(ring[0], b"h", original)
    frame = receive(ring[1])
    frame.payload[:3] = b"abc"
    assert original == b"x" * 100_000


def test_a_full_queue_says_so_and_recovers_without_loss(make_ring: MakeRing) -> None:
    ring = make_ring(2)
    payload = memoryview(bytes(1 << 20))
    sent = 0
    deadline_s = time.monotonic() + 20
    idle_since_s = time.monotonic()
    while time.monotonic() - idle_since_s < 0.3:
        assert time.monotonic() < deadline_s, "memory is not bounded"
        if ring[0].send(b"%d" % sent, payload) is not None:
            sent += 1
            idle_since_s = time.monotonic()
        else:
            ring[0].wait(0.05, receiving=False, sending=True)
    assert 0 < sent < 64
    for number in range(sent):
        assert receive(ring[1]).header == b"%d" % number
    send(ring[0], b"again", b"")
    assert receive(ring[1]).header == b"again"


def test_wake_ends_a_wait_from_another_thread_or_beforehand(make_ring: MakeRing) -> None:
    transport = make_ring(2)[0]
    transport.wake()
    started_s = time.monotonic()
    transport.wait(30, receiving=True, sending=False)
    thread = threading.Thread(target=transport.wake)
    thread.start()
    transport.wait(30, receiving=True, sending=False)
    thread.join()
    assert time.monotonic() - started_s < 25


def test_close_twice_and_wake_after_close_are_harmless(make_ring: MakeRing) -> None:
    ring = make_ring(2)
    ring[0].send(b"h", memoryview(b"lost"))
    for transport in ring:
        transport.close()
        transport.close()
        transport.wake()


def test_statistics_count_frames_and_payload_bytes(make_ring: MakeRing) -> None:
    ring = make_ring(2)
    send(ring[0], b"h", b"12345")
    receive(ring[1])
    assert (ring[0].statistics().frames_sent, ring[0].statistics().bytes_sent) == (1, 5)
    assert (ring[1].statistics().frames_received, ring[1].statistics().bytes_received) == (1, 5)
