"""Rings formed as in production, with ranks as threads of this process: hosts are names."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

from ringps.collectives import Communicator
from ringps.collectives.backend import Backend
from ringps.collectives.device import DeviceBackend
from ringps.collectives.formation import Doors
from ringps.config import Config
from ringps.errors import PeerLostError
from ringps.ring.topology import Generation, Member
from ringps.transport.keys import JobKey
from ringps.worker_env import WorkerEnv

T = TypeVar("T")
_numbers = itertools.count(1)


def on_threads(world_size: int, fn: Callable[[int], T]) -> list[T]:
    """`fn(rank)` of every rank at once; raises what the first rank to fail raised."""
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = fn(rank)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(world_size)]


def worker(rank: int, host: str) -> WorkerEnv:
    """What a launcher on `host` would tell worker `rank`."""
    return WorkerEnv(
        coordinator="",
        key_file=None,
        worker_id=rank,
        host=host,
        address="127.0.0.1",
        local_rank=0,
        local_world_size=1,
    )


class FormedRing:
    """A ring whose rank i is on the host named `hosts[i]`."""

    def __init__(self, hosts: Sequence[str], config: Config | None = None, *, encrypt: bool = False) -> None:
        config = config or Config()
        token = JobKey.generate()
        world_size = len(hosts)
        doors = [Doors(worker(rank, host), token, config, encrypt=encrypt) for rank, host in enumerate(hosts)]
        members = tuple(
            Member(worker_id=rank, host=host, address=door.address)
            for rank, (host, door) in enumerate(zip(hosts, doors, strict=True))
        )
        number = next(_numbers)
        views = [Generation(number=number, members=members, rank=rank) for rank in range(world_size)]
        try:
            formed = on_threads(world_size, lambda rank: doors[rank].form(views[rank], self))
        finally:
            for door in doors:
                door.close()
        self.summary = formed[0].summary
        self.backends: list[Backend] = [one.backend for one in formed]
        self.communicators = [
            Communicator(view, backend) for view, backend in zip(views, self.backends, strict=True)
        ]

    def dispute(self, sequence: int) -> None:
        """Answer a rank's inquiry to all ranks, as the coordinator would."""
        calls = tuple(backend.describe(sequence) for backend in self.backends)
        for backend in self.backends:
            backend.verdict(sequence, calls)

    def lose(self, rank: int) -> None:
        """Let every other rank know that `rank` is lost."""
        error = PeerLostError(rank=rank, worker_id=rank, host="there", reason="for a test")
        for other, backend in enumerate(self.backends):
            if other != rank:
                backend.fail(error)

    def host_backend(self, rank: int) -> Backend:
        """What carries a rank's collectives on tensors in the CPU's memory."""
        backend = self.backends[rank]
        assert isinstance(backend, DeviceBackend)
        return backend.host

    def run(self, fn: Callable[[Communicator], T]) -> list[T]:
        """`fn(communicator)` of every rank at once."""
        return on_threads(len(self.communicators), lambda rank: fn(self.communicators[rank]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for backend in self.backends:
            backend.close()
