"""Rings for tests: the same members over every transport."""

from __future__ import annotations

from collections.abc import Callable

from ringps.config import Config, Exchange
from ringps.ring.topology import Generation, Member
from ringps.transport.base import Transport
from ringps.transport.keys import JobKey
from ringps.transport.loopback import loopback_ring
from ringps.transport.zmq_tcp import ZmqTcpListener


def tcp_ring(
    world_size: int, config: Config, *, encrypt: bool = False, token: JobKey | None = None
) -> list[Transport]:
    """Connected TCP transports inside this process, in rank order."""
    token = token or JobKey.generate()
    listeners = [
        ZmqTcpListener("127.0.0.1", token, config.exchange, encrypt=encrypt) for _ in range(world_size)
    ]
    members = tuple(
        Member(worker_id=rank, host="here", address=listener.address)
        for rank, listener in enumerate(listeners)
    )
    return [
        listener.connect(Generation(number=1, members=members, rank=rank))
        for rank, listener in enumerate(listeners)
    ]


def memory_ring(world_size: int, config: Config) -> list[Transport]:
    """Connected in-memory transports, in rank order."""
    return list(loopback_ring(world_size, capacity_frames=config.exchange.send_queue_chunks))


def encrypted_tcp_ring(world_size: int, config: Config) -> list[Transport]:
    """As `tcp_ring`, with CURVE."""
    return tcp_ring(world_size, config, encrypt=True)


RINGS: dict[str, Callable[[int, Config], list[Transport]]] = {
    "loopback": memory_ring,
    "tcp": tcp_ring,
    "tcp-encrypted": encrypted_tcp_ring,
}


def small_chunks(chunk_bytes: int, queue: int = 8) -> Config:
    """Settings that cut even small tensors into many chunks."""
    return Config(exchange=Exchange(chunk_bytes=chunk_bytes, send_queue_chunks=queue))
