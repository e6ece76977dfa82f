"""PURE: the workers of a job, and how far each of them is."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from ringps.wire.control import Beat, Failing, Hello, WorkerExited


class Phase(enum.Enum):
    """How far a worker is. It goes down this list, never up."""

    AWAITED = enum.auto()
    """It has not said hello."""
    WAITING = enum.auto()
    """It has; others have not."""
    PREPARED = enum.auto()
    """It was told to listen for data connections."""
    BOUND = enum.auto()
    """It does."""
    MEMBER = enum.auto()
    """The ring has formed."""
    LEFT = enum.auto()
    """It called shutdown()."""
    GONE = enum.auto()
    """Exited or lost."""


IN_RENDEZVOUS = frozenset({Phase.WAITING, Phase.PREPARED, Phase.BOUND})
ACTIVE = IN_RENDEZVOUS | {Phase.MEMBER}
BEATING = ACTIVE | {Phase.LEFT}


@dataclass(eq=False)
class Worker:
    """All that is known of one worker."""

    worker_id: int
    phase: Phase = Phase.AWAITED
    session: str = ""
    """Of the process that said hello; "" before."""
    host: str = ""
    pid: int = 0
    rank: int | None = None
    address: str = ""
    completed: int = 0
    beat: Beat | None = None
    """The last one."""
    failing: Failing | None = None
    exited: WorkerExited | None = None

    def absence(self) -> str | None:
        """Why this member need not be asked what it called; None if it must be."""
        if self.phase is Phase.LEFT:
            return f"called shutdown() after {self.completed} collectives"
        return "lost" if self.phase is Phase.GONE else None


class Roster:
    """Workers by id and by session. Only ids below the world size are ever asked for."""

    def __init__(self) -> None:
        self._workers: dict[int, Worker] = {}
        self._sessions: dict[str, Worker] = {}

    def __getitem__(self, worker_id: int) -> Worker:
        return self._workers.setdefault(worker_id, Worker(worker_id))

    def __contains__(self, worker_id: int) -> bool:
        return worker_id in self._workers

    def of_session(self, session: str | None) -> Worker | None:
        """The worker that said hello with this session."""
        return None if session is None else self._sessions.get(session)

    def greeted(self) -> Iterable[Worker]:
        """Everybody who said hello, in the order of arrival."""
        return self._sessions.values()

    def admit(self, hello: Hello) -> Worker:
        """A worker said hello."""
        worker = self[hello.worker_id]
        worker.phase, worker.session = Phase.WAITING, hello.session
        worker.host, worker.pid = hello.host, hello.pid
        self._sessions[hello.session] = worker
        return worker

    def taken(self, worker_id: int) -> str | None:
        """Who has this worker id already, or None."""
        worker = self._workers.get(worker_id)
        if worker is None or worker.phase is Phase.AWAITED:
            return None
        return f"process {worker.pid} on {worker.host}" if worker.session else "a process that has exited"

    def count(self, *phases: Phase) -> int:
        """How many workers are in one of these phases."""
        return sum(worker.phase in phases for worker in self._workers.values())

    def exited(self) -> int:
        """How many workers' processes are known to have ended."""
        return sum(worker.exited is not None for worker in self._workers.values())

    def gone(self) -> Worker | None:
        """Somebody who is gone."""
        return next((worker for worker in self._workers.values() if worker.phase is Phase.GONE), None)

    def in_ring_order(self, hosts: Iterable[str]) -> list[Worker]:
        """All workers: by host in order of arrival (those in `hosts` first), then by worker id."""
        arrival: dict[str, int] = {}
        for host in [*hosts, *(worker.host for worker in self.greeted())]:
            arrival.setdefault(host, len(arrival))
        return sorted(self._workers.values(), key=lambda worker: (arrival[worker.host], worker.worker_id))

    def waiting_for(self, world_size: int) -> str:
        """Who keeps the ring from forming, in words."""
        missing = [
            worker_id
            for worker_id in range(world_size)
            if worker_id not in self or self[worker_id].phase is Phase.AWAITED
        ]
        if missing:
            return f"{len(missing)} of {world_size} workers have not come: {_names(missing)}"
        unbound = [worker.worker_id for worker in self.greeted() if worker.phase is Phase.PREPARED]
        return f"all workers have come, but some do not listen for data yet: {_names(unbound)}"


def _names(worker_ids: list[int]) -> str:
    return "worker " + ", ".join(map(str, worker_ids[:20])) + (", ..." if len(worker_ids) > 20 else "")
