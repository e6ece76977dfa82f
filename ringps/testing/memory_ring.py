"""Ranks as threads of one process, joined by an in-memory ring: the real machine, engine and
communicator over `transport.loopback`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

from ringps.collectives import Communicator
from ringps.collectives.ring_backend import RingBackend
from ringps.config import Config
from ringps.errors import PeerLostError
from ringps.ring.topology import Generation, Member
from ringps.transport.base import Transport
from ringps.transport.loopback import loopback_ring

T = TypeVar("T")


class MemoryRing:
    """Communicators of a ring inside this process, one per rank.

    ::

        with MemoryRing(4) as ring:
            ring.communicators[2].all_reduce(...)
    """

    def __init__(
        self,
        world_size: int,
        config: Config | None = None,
        *,
        transports: Sequence[Transport] | None = None,
    ) -> None:
        """
        Args:
            world_size: number of ranks.
            config: settings of all ranks.
            transports: connected transports in rank order, instead of in-memory ones; they belong
                to the ring then.
        """
        config = config or Config()
        queue = config.exchange.send_queue_chunks
        links = transports or loopback_ring(world_size, capacity_frames=queue)
        members = tuple(
            Member(worker_id=rank, host="memory", address=f"memory:{rank}") for rank in range(world_size)
        )
        self._backends: list[RingBackend] = []
        self.communicators: list[Communicator] = []
        for rank in range(world_size):
            generation = Generation(number=1, members=members, rank=rank)
            link = links[rank] if world_size > 1 else None
            backend = RingBackend(generation, link, config.exchange, config.timeouts, self)
            self._backends.append(backend)
            self.communicators.append(Communicator(generation, backend))

    def dispute(self, sequence: int) -> None:
        """Answer a rank's inquiry to all ranks, as the coordinator would."""
        calls = tuple(backend.describe(sequence) for backend in self._backends)
        for backend in self._backends:
            backend.verdict(sequence, calls)

    def lose(self, rank: int, reason: str) -> None:
        """Let every other rank know that `rank` is lost."""
        error = PeerLostError(rank=rank, worker_id=rank, host="memory", reason=reason)
        for other, backend in enumerate(self._backends):
            if other != rank:
                backend.fail(error)

    def leave(self, rank: int) -> None:
        """Let every other rank know that `rank` has shut down."""
        completed = self._backends[rank].completed
        for other, backend in enumerate(self._backends):
            if other != rank:
                backend.peer_left(rank, completed)

    def close(self) -> None:
        """End all communication threads. Idempotent."""
        for backend in self._backends:
            backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def run_ring(
    world_size: int,
    fn: Callable[[Communicator], T],
    config: Config | None = None,
    *,
    transports: Sequence[Transport] | None = None,
) -> list[T]:
    """Run `fn(communicator)` on one thread per rank.

    A rank whose `fn` raises is lost to the others, as a process that died would be.

    Args:
        world_size: number of ranks.
        fn: the script of every rank.
        config: settings of all ranks.
        transports: as for `MemoryRing`.

    Returns:
        What each rank returned, in rank order.

    Raises:
        BaseException: what the first rank to fail raised.
    """
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    with MemoryRing(world_size, config, transports=transports) as ring:

        def work(rank: int) -> None:
            try:
                results[rank] = fn(ring.communicators[rank])
            except BaseException as error:
                failures.append(error)
                ring.lose(rank, f"raised {error!r}")

        threads = [
            threading.Thread(target=work, args=(rank,), name=f"rank-{rank}") for rank in range(world_size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(world_size)]
