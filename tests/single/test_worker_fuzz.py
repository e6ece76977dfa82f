"""A million frames that follow no rule, thrown at a worker that is training all the while.

The thrower knows the generation's token, so every frame gets as far as a frame can.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
from multiprocessing.connection import Connection

import pytest
import torch
import zmq

from ringps.config import Config
from ringps.testing import MemoryRing
from ringps.transport.base import Frame, Ticket, Transport
from ringps.transport.keys import JobKey
from ringps.transport.zmq_tcp import ZmqTcpTransport
from ringps.wire.header import HEADER_BYTES, decode, encode
from tests.rings import small_chunks, tcp_ring

FRAMES = 1_000_000
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

    def send(self, header: bytes, payload: memoryview) -> Ticket | None:
        if len(self.sent) < 200:
            self.sent.append((header, bytes(payload)))
        return self.inner.send(header, payload)

    def receive(self) -> Frame | None:
        return self.inner.receive()

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


@pytest.mark.timeout(300)
def test_a_million_bad_frames_are_counted_and_change_nothing() -> None:
    config: Config = small_chunks(4096)
    token = JobKey.generate()
    links = tcp_ring(2, config, token=token)
    target = links[1]
    assert isinstance(target, ZmqTcpTransport)
    recorder = Recorder(links[0])
    expected = torch.full((3000,), 3.0)

    with MemoryRing(2, config, transports=[recorder, target]) as ring:  # type: ignore[list-item]

        def train() -> None:
            tensors = [torch.full((3000,), rank + 1.0) for rank in range(2)]
            handles = [
                comm.all_reduce(tensor, async_op=True)
                for comm, tensor in zip(ring.communicators, tensors, strict=True)
            ]
            for handle, tensor in zip(handles, tensors, strict=True):
                handle.wait(60)
                assert torch.equal(tensor, expected)

        for _ in range(5):
            train()
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
        while not ours.poll(0.02):
            train()
            rounds += 1
        while sum(refused(ring).values()) < FRAMES:
            train()
        ours.send("seen")
        thrower.join(30)
        assert thrower.exitcode == 0
        train()

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
