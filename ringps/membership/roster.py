"""PURE: the workers of a job, and how far each of them is."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ringps.wire.control import Beat, Failing, Feed, Hello, WorkerExited
from ringps.wire.rules import MAX_WORKERS, Seat

MAX_REPLACED = MAX_WORKERS
"""How many processes are remembered whose worker id another process has taken."""


class Phase(enum.Enum):
    """How far a worker is. It goes down this list, but for members, which begin again at PREPARED with every
    generation."""

    AWAITED = enum.auto()
    """It has not said hello."""
    WAITING = enum.auto()
    """It has, before the first generation; others have not."""
    JOINING = enum.auto()
    """It has said hello to a ring that runs already."""
    READY = enum.auto()
    """It waits for the ring's state."""
    PREPARED = enum.auto()
    """It was told to listen for data connections."""
    BOUND = enum.auto()
    """It does."""
    MEMBER = enum.auto()
    """The ring has formed."""
    LEFT = enum.auto()
    """It called shutdown(), or was asked to leave."""
    GONE = enum.auto()
    """Exited or lost."""


JOINERS = frozenset({Phase.JOINING, Phase.READY})
SEATED = frozenset({Phase.PREPARED, Phase.BOUND, Phase.MEMBER})
IN_RENDEZVOUS = frozenset({Phase.WAITING, Phase.PREPARED, Phase.BOUND})
TAKING_PART = IN_RENDEZVOUS | SEATED
ACTIVE = TAKING_PART | JOINERS
BEATING = ACTIVE | {Phase.LEFT}


@dataclass(eq=False)
class Worker:
    """All that is known of one worker's process."""

    worker_id: int
    phase: Phase = Phase.AWAITED
    session: str = ""
    """Of the process that said hello; "" before."""
    host: str = ""
    pid: int = 0
    program: str | None = None
    """As in its `Hello`; None before."""
    ready: bool = False
    """Whether it said, before the ring came back to a restarted coordinator, that it is ready to join."""
    rank: int | None = None
    """In the last generation that it was a member of."""
    adopted: bool = False
    """Whether it was a member before the coordinator was restarted."""
    address: str = ""
    completed: int = 0
    beat: Beat | None = None
    """The last one."""
    failing: Failing | None = None
    exited: WorkerExited | None = None
    departed: bool = False
    """Whether it left because it was asked to, and not because its script was done."""
    suspended: bool = False
    """Whether it left because the job stops at a checkpoint."""
    end: str = ""
    """Why it is gone, or has departed."""
    shortfall: str = ""
    """How many workers remained of how many needed, if its end was the end of the job."""
    expelled: bool = False
    """Whether it was taken for lost while its process may still run."""
    expelled_told_s: float = float("-inf")
    """When it was last told so."""
    charged: bool = False
    """Whether its failure was counted against the job's budget of restarts."""
    reassigned: bool = False
    """Another launcher than its own is to start its successor."""
    feed: Feed | None = None
    """Where it gets the state of the ring that it joins."""

    @property
    def vacant(self) -> bool:
        """Whether another process may take this one's place."""
        return self.phase is Phase.GONE or self.departed

    @property
    def unheard(self) -> bool:
        """Whether it is a member of a ring that was taken over, and has not come back."""
        return self.adopted and not self.session and self.phase in SEATED

    @property
    def name(self) -> str:
        """`rank 1 (worker 3 on node-a)`, of a member."""
        return f"rank {self.rank} (worker {self.worker_id} on {self.host})"

    def absence(self) -> str | None:
        """Why this member need not be asked what it called; None if it must be."""
        if self.departed:
            return "left the ring when it was asked to"
        if self.phase is Phase.LEFT:
            return f"called shutdown() after {self.completed} collectives"
        return "lost" if self.phase is Phase.GONE else None


class Roster:
    """Workers by id and by session. Only ids below the world size are ever asked for.

    The worker of an id is the process that took it last; those before it are known by their
    sessions, the last `MAX_REPLACED` of them.
    """

    def __init__(self) -> None:
        self._workers: dict[int, Worker] = {}
        self._sessions: dict[str, Worker] = {}
        self._replaced: list[Worker] = []

    def __getitem__(self, worker_id: int) -> Worker:
        return self._workers.setdefault(worker_id, Worker(worker_id))

    def __contains__(self, worker_id: int) -> bool:
        return worker_id in self._workers

    def get(self, worker_id: int) -> Worker | None:
        """The worker of this id, if anything is known of it."""
        return self._workers.get(worker_id)

    def of_session(self, session: str | None) -> Worker | None:
        """The worker that said hello with this session."""
        return None if session is None else self._sessions.get(session)

    def of_process(self, worker_id: int, pid: int) -> Worker | None:
        """The process that a launcher means; None if it never said hello, though others of its id did."""
        newest = self[worker_id]
        replaced = [worker for worker in reversed(self._replaced) if worker.worker_id == worker_id]
        for worker in (newest, *replaced):
            if worker.pid == pid and (worker.session or worker.phase is not Phase.AWAITED):
                return worker
        # The first process may call itself otherwise than its launcher does, in a namespace of its own.
        first = not replaced and newest.exited is None and not (newest.adopted or newest.phase in JOINERS)
        return newest if first or newest.phase is Phase.AWAITED else None

    def greeted(self) -> Iterable[Worker]:
        """Everybody who said hello, in the order of arrival."""
        return self._sessions.values()

    def everybody(self) -> Iterable[Worker]:
        """The worker of every id of which anything is known."""
        return self._workers.values()

    def replaced(self) -> Iterable[Worker]:
        """Processes whose id another process has taken."""
        return self._replaced

    def inside(self, phases: Iterable[Phase]) -> list[Worker]:
        """The workers in one of these phases, by id."""
        wanted = frozenset(phases)
        found = (worker for worker in self._workers.values() if worker.phase in wanted)
        return sorted(found, key=lambda worker: worker.worker_id)

    def admit(self, hello: Hello, phase: Phase = Phase.WAITING) -> Worker:
        """A worker said hello."""
        if self[hello.worker_id].phase is not Phase.AWAITED:
            self._replaced.append(self._workers.pop(hello.worker_id))
        worker = self[hello.worker_id]
        worker.phase = phase
        self.attach(worker, hello)
        return worker

    def attach(self, worker: Worker, hello: Hello) -> None:
        """This worker is the process that said this hello."""
        worker.session, worker.program = hello.session, hello.program
        worker.host, worker.pid = hello.host, hello.pid
        self._sessions[hello.session] = worker

    def restore(self, seat: Seat) -> Worker:
        """A member of a ring that an earlier coordinator formed."""
        worker = Worker(seat.worker_id, Phase.MEMBER, host=seat.host, pid=seat.pid, adopted=True)
        self._workers[seat.worker_id] = worker
        return worker

    def drop(self, worker: Worker) -> None:
        """Forget a worker that said hello and must not take part after all."""
        self._sessions.pop(worker.session, None)
        if self._workers.get(worker.worker_id) is worker:
            del self._workers[worker.worker_id]

    def prune(self) -> list[str]:
        """Forget the oldest of those that were replaced, if there are too many; their sessions."""
        surplus = max(0, len(self._replaced) - MAX_REPLACED)
        forgotten = [worker.session for worker in self._replaced[:surplus]]
        del self._replaced[:surplus]
        for session in forgotten:
            self._sessions.pop(session, None)
        return forgotten

    def taken(self, worker_id: int, *, replaceable: bool = False) -> str | None:
        """Who has this worker id already, or None.

        Args:
            worker_id: which one.
            replaceable: whether one that is gone has it no more.
        """
        worker = self._workers.get(worker_id)
        if worker is None or worker.phase is Phase.AWAITED or (replaceable and worker.vacant):
            return None
        known = worker.session or worker.pid
        return f"process {worker.pid} on {worker.host}" if known else "a process that has exited"

    def count(self, *phases: Phase) -> int:
        """How many workers are in one of these phases."""
        return sum(worker.phase in phases for worker in self._workers.values())

    def gone(self) -> Worker | None:
        """Somebody who is gone."""
        return next((worker for worker in self._workers.values() if worker.phase is Phase.GONE), None)

    def in_ring_order(
        self,
        workers: Iterable[Worker],
        hosts: Iterable[str],
        place_of: Callable[[str], tuple[str, ...]] = lambda host: (),
    ) -> list[Worker]:
        """These workers: by where their hosts are, so that the ring crosses each boundary once each way;
        then by host in order of arrival (those in `hosts` first), then by worker id."""
        chosen = list(workers)
        arrival: dict[str, int] = {}
        for host in [*hosts, *(worker.host for worker in (*self.greeted(), *chosen))]:
            arrival.setdefault(host, len(arrival))
        places = {worker.host: place_of(worker.host) for worker in chosen}
        if any(places.values()):  # every host is a pod, and arrives anew when it is replaced
            return sorted(chosen, key=lambda worker: (places[worker.host], worker.worker_id))
        return sorted(chosen, key=lambda worker: (arrival[worker.host], worker.worker_id))

    def waiting_for(self, world_size: int, members: Sequence[Worker] = ()) -> str:
        """Who keeps the ring from forming, in words. `members` are those of a generation that forms."""
        missing = [
            worker_id
            for worker_id in range(world_size)
            if worker_id not in self or self[worker_id].phase is Phase.AWAITED
        ]
        if missing and not members:
            return f"{len(missing)} of {world_size} workers have not come: {names(missing)}"
        unbound = [worker.worker_id for worker in members if worker.phase is Phase.PREPARED]
        return f"all workers have come, but some do not listen for data yet: {names(unbound)}"


def names(worker_ids: Sequence[int]) -> str:
    """`worker 0, 2, 3`."""
    return "worker " + ", ".join(map(str, worker_ids[:20])) + (", ..." if len(worker_ids) > 20 else "")
