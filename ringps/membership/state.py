"""PURE: what the coordinator knows of its job, and how it speaks to those who take part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ringps.membership.detector import SilenceDetector
from ringps.membership.events import QuorumSettings
from ringps.membership.formation import Ring
from ringps.membership.inquiry import Inquiries
from ringps.membership.peers import Outbox, PeerBook
from ringps.membership.placed import PlacedPlan
from ringps.membership.plan import JobPlan
from ringps.membership.restarts import RingRestarts
from ringps.membership.returning import NUMBERS_SKIPPED
from ringps.membership.roster import Roster, Worker
from ringps.membership.surroundings import Surroundings
from ringps.wire.control import clip

STEP_EVENT_INTERVAL_S = 1.0


class JobState:
    """Shared by `quorum` and the parts that it decides with; each changes what it decides on.

    Args:
        settings: what the coordinator was told.
        new_token: gives a fresh CURVE key pair, public and secret half, for each generation.
        restarts: how often the whole ring may be started again; None if another counts that.
        surroundings: what is known of the cluster.
    """

    def __init__(
        self,
        settings: QuorumSettings,
        new_token: Callable[[], tuple[str, str]],
        restarts: RingRestarts | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        self.settings = settings
        self.restarts = restarts
        self.surroundings = surroundings or Surroundings()
        self.plan = _plan(settings)
        self.roster = Roster()
        self.launchers: set[str] = set()
        """Sessions of those that take part now."""
        self.peers = PeerBook()
        self.out = Outbox(self.peers)
        self.ring = Ring()
        # Of an earlier coordinator's generations the last ones may not have been written down.
        unknown = 1 + NUMBERS_SKIPPED if settings.follows else 0
        self.first_number = settings.first_generation + unknown
        """The lowest number that a generation may have."""
        self.ring.skip_to(self.first_number - 1)
        self.detector = SilenceDetector(settings.timeouts.heartbeat_timeout_s)
        self.inquiries = Inquiries(settings.timeouts.inquiry_timeout_s)
        self.ended = False
        """Whether the ring has come to its end and nobody is missing."""
        self.resumable = False
        """Whether a checkpoint was saved or restored, from which the ring can be started again."""
        self.given_up = False
        """Whether the members said that it must not be."""
        self.step = 0
        """The newest that a heartbeat told of."""
        self._new_token = new_token
        self._step_told = 0
        self._step_told_s = float("-inf")

    @property
    def elastic(self) -> bool:
        """Whether the ring can do with fewer members than it starts with."""
        least, most = self.settings.min_workers, self.plan.world_size
        return least is not None and most is not None and least < most

    @property
    def survives(self) -> bool:
        """Whether the loss of a member need not end the job: an elastic ring has formed, and none of
        its losses has been too many."""
        return self.elastic and self.ring.formed_once and self.ring.lost is None

    @property
    def running(self) -> bool:
        """Whether an elastic ring trains, or forms again to go on."""
        return self.survives and not self.ended

    def prepare(self, members: Iterable[Worker], reason: str) -> None:
        """The next generation begins, with these members."""
        hosts = [*self.plan.hosts, *(worker.host for worker in self.ring.members)]
        ordered = self.roster.in_ring_order(members, hosts, self.surroundings.place_of)
        encrypt = self.settings.encrypt_data or self.plan.encrypt_data
        self.inquiries = Inquiries(self.settings.timeouts.inquiry_timeout_s)
        self.out.tell_all(ordered, self.ring.prepare(ordered, self._new_token(), encrypt, reason))

    def form(self) -> None:
        """All its members listen: they connect."""
        ring = self.ring
        self.out.tell_all(ring.members, ring.form())
        self.emit("generation", generation=ring.number, members=ring.describe(), reason=ring.reason)

    def charge(self, worker: Worker, reason: str, *, by_machine: bool = False) -> str:
        """A worker, or its machine, failed by itself: it counts against the job's budget, if it has one. What
        that leaves, in words."""
        budget = self.surroundings.budget
        if budget is None or worker.charged:
            return ""
        worker.charged = True
        words = budget.charge()
        if budget.exhausted:
            self.surroundings.forsaken[worker.worker_id] = f"{reason}; {words}"
        self.emit(
            "restart_charged",
            worker_id=worker.worker_id,
            host=self.host(worker),
            reason=clip(reason),
            restarts_left=max(0, budget.most - budget.used),
            by_machine=by_machine,
        )
        return words

    @property
    def enough_may_come(self) -> bool:
        """Whether the ring can be as large as it must be, without the workers that nobody replaces."""
        most = self.plan.world_size or 0
        return most - len(self.surroundings.forsaken) >= (self.settings.min_workers or most)

    def rank(self, worker: Worker) -> int:
        """Its rank; before it has one, what that will most likely be."""
        # Before the ring forms there are no ranks; with launchers they will equal the worker ids.
        return worker.worker_id if worker.rank is None else worker.rank

    def host(self, worker: Worker) -> str:
        """Its machine, as far as is known."""
        return worker.host or self.plan.host_of(worker.worker_id) or "an unknown host"

    def emit(self, event: str, **details: Any) -> None:
        """A line for the events file."""
        self.out.emit(self.plan.launchers, event, **details)

    def emit_end(self, event: str, worker: Worker, reason: str, **details: Any) -> None:
        """A line for the events file about a worker that takes part no more."""
        self.emit(
            event,
            generation=self.ring.number,
            worker_id=worker.worker_id,
            rank=self.rank(worker),
            host=self.host(worker),
            reason=reason,
            **details,
        )

    def tell_step(self, now_s: float, *, at_once: bool = False) -> None:
        """Report the newest step, seldom more often than once in `STEP_EVENT_INTERVAL_S`."""
        due = at_once or now_s - self._step_told_s >= STEP_EVENT_INTERVAL_S
        if due and self.step > self._step_told:
            self._step_told, self._step_told_s = self.step, now_s
            self.emit("step_committed", step=self.step, generation=self.ring.number)


def _plan(settings: QuorumSettings) -> JobPlan:
    if not settings.pods:
        return JobPlan(settings.world_size, settings.settle_s)
    assert settings.world_size is not None
    return PlacedPlan(settings.world_size, settings.min_workers or settings.world_size, settings.settle_s)
