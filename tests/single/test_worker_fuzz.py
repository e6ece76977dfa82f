"""A million frames that follow no rule, thrown at a worker that is training all the while.

The thrower knows the generation's token, so every frame gets as far as a frame can.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch
import zmq

from ringps.config import Config
from ringps.testing import MemoryRing
from ringps.transport.base import Ticket, Transport
from ringps.transport.keys import JobKey
from ringps.wire.header import HEADER_BYTES, decode, encode
from tests.rings import small_chunks, tcp_ring, zmq_ring

FRAMES = 1_000_000
CONFIG: Config = small_chunks(4096)
SEED = 20260


def mutate(rng: random.Random, frames: list[tuple[bytes, bytes]]) -> list[bytes]:
    """One bad message: a recorded frame that has had its time, or something made from one."""
    header, payload = rng.choice(frames)
    fields = decode(header)
    kind = rng.randrange(11)
    if kind == 0:
        return [rng.randbytes(rng.randrange(2 * HEADER_BYTES)), rng.randbytes(rng.randrange(64))]
    if kind == 1:
        return [header[: rng.randrange(HEADER_BYTES)], payload]
    if kind == 2:
        flipped = bytearray(header)
        flipped[rng.randrange(HEADER_BYTES)] ^= 1 << rng.randrange(8)
        return [bytes(flipped), payload]
    if kind == 3:
        return [header, payload[: rng.randrange(len(payload))]]
    if kind == 4:
        return [header, payload + rng.randbytes(rng.randrange(1, 64))]
    if kind == 5:
        return [header, payload]
    if kind == 6:
        return [encode(fields._replace(generation=rng.choice([0, 2, rng.getrandbits(32)]) or 7)), payload]
    if kind == 7:
        return [encode(fields._replace(sender=rng.randrange(1, 2**32))), payload]
    if kind == 8:
        return [header]
    if kind == 9:
        return [header, payload, *[rng.randbytes(8)] * rng.randrange(1, 5)]
    return [encode(fields._replace(sequence=rng.getrandbits(64) | 1 << 63)), payload]


def throw(address: str, token: bytes, frames: list[tuple[bytes, bytes]], done: Connection) -> None:
    """The thrower's process."""
    rng = random.Random(SEED)
    prepared = [mutate(rng, frames) for _ in range(20_000)]
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.plain_username, socket.plain_password = b"ringps", token
        socket.connect(address)
        for i in range(FRAMES):
            socket.send_multipart(prepared[i % len(prepared)])
        done.send("thrown")
        done.recv()


class Recorder:
    """A transport that remembers what it sent."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.sent: list[tuple[bytes, bytes]] = []

    def send(self, peer: int, header: bytes, payload: memoryview) -> Ticket | None:
        if len(self.sent) < 200:
            self.sent.append((header, bytes(payload)))
        return self.inner.send(peer, header, payload)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


@pytest.mark.timeout(300)
def test_a_million_bad_frames_over_zmq_are_counted_and_change_nothing() -> None:
    config = CONFIG
    token = JobKey.generate()
    links = zmq_ring(2, config, token=token)
    target = links[1]
    recorder = Recorder(links[0])

    with MemoryRing(2, config, transports=[recorder, target]) as ring:  # type: ignore[list-item]
        for _ in range(5):
            reduce_once(ring)
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        address = target._pull.last_endpoint.decode()
        thrower = multiprocessing.get_context(
            "spawn"
        ).Process(
            daemon=True,  # ends with this process, should the test fail
            target=throw,
            args=(address, token.secret, recorder.sent[:50], theirs),
        )
        rss_before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        thrower.start()
        rounds = 0
        while not ours.poll() or sum(refused(ring).values()) < FRAMES:
            reduce_once(ring, meanwhile=lambda: time.sleep(0.02))
            rounds += 1
        ours.send("seen")
        thrower.join(30)
        assert thrower.exitcode == 0
        reduce_once(ring)

        counted = refused(ring)
        assert sum(counted.values()) == FRAMES, counted
        assert len(counted) >= 9, counted
        assert rounds > 10, "the ring starved"
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss_before_kib
        assert grown_kib < 100 * 1024
        print(f"{FRAMES} bad frames refused during {rounds} collectives: {counted}")


def refused(ring: MemoryRing) -> dict[str, int]:
    statistics = ring.communicators[1].statistics()
    assert statistics.transport is not None
    return {**statistics.refused, **statistics.transport.refused}


def reduce_once(ring: MemoryRing, meanwhile: Callable[[], object] = lambda: None) -> None:
    """An all_reduce for which rank 1 waits, and so reads, while `meanwhile` runs."""
    tensors = [torch.full((3000,), rank + 1.0) for rank in range(2)]
    second = ring.communicators[1].all_reduce(tensors[1], async_op=True)
    meanwhile()
    ring.communicators[0].all_reduce(tensors[0])
    second.wait(60)
    for tensor in tensors:
        assert torch.equal(tensor, torch.full((3000,), 3.0))


def mutate_readable(rng: random.Random, header: bytes, payload: bytes) -> bytes:
    """A bad frame with a right checksum and its own payload's length, as it travels on a TCP connection."""
    fields = decode(header)
    kind = rng.randrange(6)
    if kind == 0:
        return header + payload
    if kind == 1:
        return encode(fields._replace(generation=rng.choice([0, 2, rng.getrandbits(32)]) or 7)) + payload
    if kind == 2:
        return encode(fields._replace(sender=rng.randrange(1, 2**32))) + payload
    if kind == 3:
        return encode(fields._replace(sequence=rng.getrandbits(64) | 1 << 63)) + payload
    changed = rng.randbytes(rng.randrange(4096))
    changed_fields = fields._replace(payload_bytes=len(changed))
    if kind == 4:
        return encode(changed_fields._replace(step=rng.getrandbits(32))) + changed
    return encode(changed_fields._replace(chunk=rng.getrandbits(32))) + changed


class Spoiler(Recorder):
    """Sends bad frames among the right ones, from the moment it is told to."""

    def __init__(self, inner: Transport, frames_each_time: int) -> None:
        super().__init__(inner)
        self.spoils = False
        self.spoilt = 0
        self._owed = False
        self._frames_each_time = frames_each_time
        self._rng = random.Random(SEED)
        self._blobs: list[memoryview] = []

    def send(self, peer: int, header: bytes, payload: memoryview) -> Ticket | None:
        if self.spoils and self.spoilt < FRAMES and not self._owed:
            if not self._blobs:
                self._blobs = [self._blob() for _ in range(10)]
            blob = self._rng.choice(self._blobs)
            if self.inner.send(peer, bytes(blob[:HEADER_BYTES]), blob[HEADER_BYTES:]) is None:
                return None
            self.spoilt += self._frames_each_time
            self._owed = True
        ticket = super().send(peer, header, payload)
        self._owed = self._owed and ticket is None
        return ticket

    def _blob(self) -> memoryview:
        # Of collectives that have ended: nothing else makes every one of them bad.
        frames = [self._rng.choice(self.sent) for _ in range(self._frames_each_time)]
        return memoryview(b"".join(mutate_readable(self._rng, *frame) for frame in frames))


@pytest.mark.timeout(300)
def test_a_million_bad_frames_over_tcp_are_counted_and_change_nothing() -> None:
    links = tcp_ring(2, CONFIG)
    spoiler = Spoiler(links[0], 2000)
    with MemoryRing(2, CONFIG, transports=[spoiler, links[1]]) as ring:  # type: ignore[list-item]
        for _ in range(5):
            reduce_once(ring)
        rss_before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        spoiler.spoils = True
        rounds = 0
        while spoiler.spoilt < FRAMES or sum(refused(ring).values()) < FRAMES:
            reduce_once(ring)
            rounds += 1
        counted = refused(ring)
        assert sum(counted.values()) == FRAMES, counted
        assert counted.keys() == {
            "collective that has ended",
            "other generation",
            "other sender",
            "too far ahead",
        }, counted
        assert rounds > 10, "the ring starved"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss_before_kib < 100 * 1024
        print(f"{FRAMES} bad frames refused during {rounds} collectives: {counted}")
