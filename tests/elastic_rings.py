"""Elastic rings inside this process: real `ElasticCommunicator`s on threads, and a membership for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from ringps import probe
from ringps.collectives import ElasticCommunicator
from ringps.collectives.awaiting import AwaitingBackend
from ringps.collectives.backend import Backend, Work
from ringps.collectives.formation import Doors, SharedArea
from ringps.collectives.handle import Handle
from ringps.collectives.ring_backend import RingBackend
from ringps.config import Config, Recovery
from ringps.errors import PeerLostError, RingChangedError, RingpsError
from ringps.ring.topology import Generation, Member
from ringps.transport.keys import JobKey
from ringps.transport.loopback import LoopbackTransport, loopback_ring
from tests.formed import worker

T = TypeVar("T")

_LIMIT_S = 30.0


class Killed(BaseException):
    """A worker dies here: its thread ends, and the others lose it."""


class Network(Protocol):
    """How members of a generation are connected."""

    def host(self, worker_id: int) -> str:
        """The name of this worker's machine."""

    def address(self, worker_id: int) -> str:
        """Where this worker listens for the generation that is about to form."""

    def connect(self, view: Generation) -> Backend:
        """Its backend, once all members have given their addresses."""


class InMemory:
    """Over `transport.loopback`."""

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or Config()
        self._lock = threading.Lock()
        self._links: dict[int, Sequence[LoopbackTransport]] = {}

    def host(self, worker_id: int) -> str:
        return "here"

    def address(self, worker_id: int) -> str:
        return f"memory:{worker_id}"

    def connect(self, view: Generation) -> Backend:
        exchange, timeouts = self._config.exchange, self._config.timeouts
        with self._lock:
            if view.number not in self._links and view.world_size > 1:
                capacity = exchange.send_queue_chunks
                self._links[view.number] = loopback_ring(view.world_size, capacity_frames=capacity)
        link = self._links[view.number][view.rank] if view.world_size > 1 else None
        return RingBackend(view, link, exchange, timeouts, None)


class Connected:
    """As in production: through doors, over sockets or shared memory."""

    def __init__(self, config: Config, hosts: Sequence[str]) -> None:
        self._config = config
        self._hosts = hosts
        self._token = JobKey.generate()
        self._areas = [SharedArea() for _ in hosts]
        self._doors: dict[int, Doors] = {}

    def host(self, worker_id: int) -> str:
        return self._hosts[worker_id]

    def address(self, worker_id: int) -> str:
        self._doors[worker_id] = Doors(
            worker(worker_id, self._hosts[worker_id]),
            self._token,
            self._config,
            encrypt=False,
            area=self._areas[worker_id],
            elastic=True,
        )
        return self._doors[worker_id].address

    def connect(self, view: Generation) -> Backend:
        doors = self._doors[view.members[view.rank].worker_id]
        try:
            return doors.form(view, _Nobody()).backend
        finally:
            doors.close()

    def close(self) -> None:
        """Give up all shared memory."""
        for area in self._areas:
            area.close()


class _Nobody:
    def dispute(self, sequence: int) -> None:
        """Disputes are not what these tests are about."""


class Tampered:
    """A backend with something that happens before and after each collective."""

    def __init__(self, inner: Backend, tamper: Callable[[str, Work], None]) -> None:
        self._inner = inner
        self._tamper = tamper

    def run(self, work: Work) -> None:
        self._tamper("before", work)
        self._inner.run(work)
        self._tamper("after", work)

    def start(self, work: Work) -> Handle:
        finish = work.finish

        def end() -> None:
            self._tamper("reduced", work)
            if finish is not None:
                finish()

        return self._inner.start(work._replace(finish=end))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


Tamper = Callable[[int, str, Work], None]
"""Called with the worker's id, when it is, and the collective: `before` and `after` one that the script's
thread waits for; `reduced` when one in the background has its result."""


class ElasticRing:
    """Workers 0 to `size` - 1, and the coordinator that forms their generations.

    A generation forms when all who are alive have asked for it; who is in the script is waited for.
    """

    def __init__(
        self,
        size: int,
        recovery: Recovery | None = None,
        *,
        network: Network | None = None,
        tamper: Tamper | None = None,
        newcomers: int = 0,
    ) -> None:
        """
        Args:
            size: workers of the first generation.
            recovery: settings.
            network: in memory by default.
            tamper: see `Tamper`.
            newcomers: workers, with the next ids, that join when they are asked to `enter`.
        """
        self._network = network or InMemory()
        self._tamper = tamper
        self._changed = threading.Condition()
        self._alive = set(range(size))
        self._asking: dict[int, str] = {}
        self._done: set[int] = set()
        self._backends: dict[int, Backend] = {}
        self._members: tuple[Member, ...] = ()
        self._number = 0
        self.notes: list[dict[str, object]] = []
        """What members had written to the events file."""
        self.leaving: set[int] = set()
        self.joiners: tuple[int, ...] = ()
        first = self._all_at_once(range(size), self._next)
        recovery = recovery or Recovery()
        self.communicators = [
            ElasticCommunicator(view, backend, _Seat(self, worker_id), recovery)
            for worker_id, (view, backend) in enumerate(first)
        ]
        for worker_id in range(size, size + newcomers):
            member = Member(worker_id=worker_id, host="here", address="")
            view = Generation(number=1, members=(member,), rank=0)
            seat = _Seat(self, worker_id)
            self.communicators.append(
                ElasticCommunicator(view, AwaitingBackend(), seat, recovery, joining=True)
            )

    def run(self, script: Callable[[int, ElasticCommunicator], T]) -> dict[int, T]:
        """`script(worker_id, communicator)` on all workers at once; the results of those that lived.

        Raises:
            BaseException: what the first script to fail raised, if it was not `Killed`.
        """
        results: dict[int, T] = {}
        failures: list[BaseException] = []

        def work(worker_id: int) -> None:
            _here.worker_id = worker_id
            try:
                results[worker_id] = script(worker_id, self.communicators[worker_id])
                self._finish(worker_id)
            except Killed:
                results.pop(worker_id, None)
                self.lose(worker_id)
            except BaseException as error:
                failures.append(error)
                self.lose(worker_id)

        self._all_at_once(range(len(self.communicators)), work)
        for backend in self._backends.values():
            backend.close()
        if failures:
            raise failures[0]
        return results

    def lose(self, worker_id: int) -> None:
        """This worker is dead; the others hear of it."""
        with self._changed:
            self._alive.discard(worker_id)
            self._asking.pop(worker_id, None)
            for rank, member in enumerate(self._members):
                if member.worker_id == worker_id:
                    self._interrupt(
                        PeerLostError(rank=rank, worker_id=worker_id, host="here", reason="a test")
                    )
            self._changed.notify_all()

    def admit(self, worker_id: int) -> None:
        """The next generation has this worker."""
        with self._changed:
            self._alive.add(worker_id)
            self._changed.notify_all()

    def reform(self, worker_id: int, error: RingpsError) -> tuple[Generation, Backend]:
        self._backends[worker_id].fail(error)
        self._backends[worker_id].close()
        return self._next(worker_id)

    def enter(self, worker_id: int) -> tuple[Generation, Backend]:
        """As a newcomer: wait until it is admitted, and for the generation that has it."""
        with self._changed:
            if not self._changed.wait_for(lambda: worker_id in self._alive, _LIMIT_S):
                raise AssertionError(f"worker {worker_id} was not admitted")
        return self._next(worker_id)

    def _finish(self, worker_id: int) -> None:
        """As `ringps.shutdown`: wait for the others, and meet them again if they need it."""
        while True:
            with self._changed:
                self._done.add(worker_id)
                self._changed.notify_all()
                if not self._changed.wait_for(lambda: self._asking or self._done >= self._alive, _LIMIT_S):
                    raise AssertionError(f"of {self._alive} only {self._done} are done")
                if self._done >= self._alive:
                    return
                self._done.discard(worker_id)
            communicator = self.communicators[worker_id]
            communicator.reform(RingChangedError("another generation is to form"))
            communicator.settle()

    def _interrupt(self, error: RingpsError) -> None:
        for worker_id in self._alive - self._asking.keys():
            if worker_id in self._backends:
                self._backends[worker_id].fail(error)

    def _next(self, worker_id: int) -> tuple[Generation, Backend]:
        address = self._network.address(worker_id)
        with self._changed:
            number = self._number
            self._asking[worker_id] = address
            self._interrupt(RingChangedError("another generation is to form"))
            self._changed.notify_all()
            while self._number == number:
                if self._asking.keys() >= self._alive:
                    ids = sorted(self._asking)
                    self._members = tuple(
                        Member(worker_id=one, host=self._network.host(one), address=self._asking[one])
                        for one in ids
                    )
                    self._asking.clear()
                    self._number += 1
                    self._changed.notify_all()
                elif not self._changed.wait(_LIMIT_S):
                    raise AssertionError(f"of {self._alive} only {self._asking} ask for a new generation")
            ids = [member.worker_id for member in self._members]
            view = Generation(number=self._number, members=self._members, rank=ids.index(worker_id))
        backend = self._network.connect(view)
        if self._tamper is not None:
            tamper = self._tamper
            backend = Tampered(backend, lambda when, work: tamper(worker_id, when, work))
        with self._changed:
            self._backends[worker_id] = backend
            gone = [rank for rank, one in enumerate(ids) if one not in self._alive]
            if gone:
                lost = PeerLostError(rank=gone[0], worker_id=ids[gone[0]], host="here", reason="a test")
                backend.fail(lost)
            elif self._asking:
                backend.fail(RingChangedError("another generation is to form"))
        return view, backend

    def _all_at_once(self, ids: Sequence[int] | range, fn: Callable[[int], T]) -> list[T]:
        results: dict[int, T] = {}
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                results[number] = fn(number)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,), name=f"worker-{number}") for number in ids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return [results[number] for number in ids]


class _Seat:
    """A worker's `collectives.elastic.Membership`."""

    def __init__(self, ring: ElasticRing, worker_id: int) -> None:
        self._ring = ring
        self._worker_id = worker_id

    def reform(self, error: RingpsError) -> tuple[Generation, Backend]:
        return self._ring.reform(self._worker_id, error)

    def joiners(self) -> tuple[int, ...]:
        return self._ring.joiners

    def leaving(self) -> bool:
        return self._worker_id in self._ring.leaving

    def note(self, event: str, **details: object) -> None:
        self._ring.notes.append({"event": event, **details})


class _Here(threading.local):
    worker_id = -1


_here = _Here()


@contextmanager
def listening(listener: Callable[[int, str, dict[str, Any]], None]) -> Iterator[None]:
    """`listener(worker_id, point, passed)` hears what scripts reach on their own threads."""

    def hear(point: str, passed: dict[str, Any]) -> None:
        if _here.worker_id >= 0:
            listener(_here.worker_id, point, passed)

    before, probe.listener = probe.listener, hear
    try:
        yield
    finally:
        probe.listener = before


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Its bits."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
