"""Rings for tests: the same members over every transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ringps.config import Config, Exchange
from ringps.ring.topology import Generation, Member
from ringps.transport.base import Transport
from ringps.transport.keys import JobKey
from ringps.transport.loopback import loopback_ring
from ringps.transport.tcp import TcpListener, TcpTransport
from ringps.transport.zmq_tcp import ZmqTcpListener, ZmqTcpTransport


def tcp_ring(
    world_size: int, config: Config, *, token: JobKey | None = None, ip: str = "127.0.0.1"
) -> list[TcpTransport]:
    """TCP transports inside this process, in rank order; their links form when they are used."""
    token = token or JobKey.generate()
    listeners = [TcpListener(ip, token, config.exchange) for _ in range(world_size)]
    return [one.connect(view) for one, view in zip(listeners, views(listeners), strict=True)]


def zmq_ring(
    world_size: int, config: Config, *, encrypt: bool = False, token: JobKey | None = None
) -> list[ZmqTcpTransport]:
    """Connected ZeroMQ transports inside this process, in rank order."""
    token = token or JobKey.generate()
    listeners = [
        ZmqTcpListener("127.0.0.1", token, config.exchange, encrypt=encrypt) for _ in range(world_size)
    ]
    return [one.connect(view) for one, view in zip(listeners, views(listeners), strict=True)]


def views(listeners: Sequence[TcpListener] | Sequence[ZmqTcpListener]) -> list[Generation]:
    """The generation of those who listen, as each one sees it."""
    members = tuple(
        Member(worker_id=rank, host="here", address=listener.address)
        for rank, listener in enumerate(listeners)
    )
    return [Generation(number=1, members=members, rank=rank) for rank in range(len(members))]


def memory_ring(world_size: int, config: Config) -> list[Transport]:
    """Connected in-memory transports, in rank order."""
    return list(loopback_ring(world_size, capacity_frames=config.exchange.send_queue_chunks))


def several_sockets_ring(world_size: int, config: Config) -> list[TcpTransport]:
    """As `tcp_ring`, with three connections to the right neighbour."""
    exchange = replace(config.exchange, sockets_per_link=3)
    return tcp_ring(world_size, replace(config, exchange=exchange))


def encrypted_ring(world_size: int, config: Config) -> list[ZmqTcpTransport]:
    """As `zmq_ring`, with CURVE."""
    return zmq_ring(world_size, config, encrypt=True)


RINGS: dict[str, Callable[[int, Config], Sequence[Transport]]] = {
    "loopback": memory_ring,
    "tcp": tcp_ring,
    "tcp-3-sockets": several_sockets_ring,
    "zmq": zmq_ring,
    "zmq-encrypted": encrypted_ring,
}


def small_chunks(chunk_bytes: int, queue: int = 8) -> Config:
    """Settings that cut even small tensors into many chunks."""
    return Config(exchange=Exchange(chunk_bytes=chunk_bytes, send_queue_chunks=queue))
