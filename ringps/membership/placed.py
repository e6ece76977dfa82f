"""PURE: the plan of a job whose launchers come with their worker ids: pods of a cluster.

A pod may be replaced at any time, by one with the same worker ids that knows nothing of it. So a
launcher is taken in the place of another whenever no living process has its ids. The job starts
once all have come, or with as many as it needs at least when nobody has come for a while. Two
launchers that are alive with the same ids (one on a machine that was cut off) must not take turns, so
one that had to go waits for the end of the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ringps.membership.plan import JobPlan, Offer
from ringps.wire.control import Assignment, LauncherHello

_OUSTED = 8
"""How many launchers that had to go are remembered of each place..."""

OUSTED_S = 60.0
"""...and for how long: by then the other one's worker has come, if that launcher is alive."""


class PlacedPlan(JobPlan):
    """`JobPlan` for launchers that say which worker ids they have."""

    def __init__(self, world_size: int, least: int, patience_s: float) -> None:
        """
        Args:
            world_size: workers of the whole job.
            least: with how many it starts...
            patience_s: ...when no further launcher has come for so long.
        """
        super().__init__(world_size, patience_s)
        self._least = least
        self._ousted: dict[int, deque[tuple[str, float]]] = {}
        """By place: the hosts that had to leave it to another, and when."""

    @property
    def expected(self) -> frozenset[int]:
        """Worker ids that a launcher has."""
        return frozenset(
            offer.first_worker_id + at for offer in self._offers for at in range(offer.hello.slots)
        )

    def busy(self, hello: LauncherHello, holder: Callable[[int], str | None], now_s: float) -> str | None:
        """Why this launcher must wait until it can be taken in; None if it need not.

        Args:
            hello: what it offers.
            holder: the host of the process that has a worker id, as far as is known.
            now_s: the current time.
        """
        place = hello.place or 0
        for worker_id in range(place, place + hello.slots):
            host = holder(worker_id)
            if host is not None and host != hello.host:
                return f"worker {worker_id} on {host} has this place still; waiting for its end"
        ousted = self._ousted.get(place, ())
        if any(host == hello.host and now_s < at_s + OUSTED_S for host, at_s in ousted):
            for offer in self._overlapping(hello):
                return f"{offer.hello.host} has come in the place of {hello.host}; waiting for its end"
        return None

    def offer(self, hello: LauncherHello, now_s: float, abandoned: object = ()) -> str | None:
        place, world_size = hello.place, self._world_size
        assert world_size is not None
        if place is None:
            return "the workers of this job have fixed places; start its launchers with --worker-id"
        if place + hello.slots > world_size:
            last = place + hello.slots - 1
            return f"this launcher has worker ids {place}..{last}, and the job has {world_size} workers"
        if self._is_back(hello):
            self._complete = self._restored = True
        for offer in self._overlapping(hello):
            self._offers.remove(offer)
            if offer.session != hello.session:
                self._evicted.append(offer.session)
            if offer.hello.host != hello.host:
                ousted = self._ousted.setdefault(offer.first_worker_id, deque(maxlen=_OUSTED))
                ousted.append((offer.hello.host, now_s))
        self._offers.append(Offer(hello.session, hello, place))
        self._offers.sort(key=lambda offer: offer.first_worker_id)
        self._last_offer_s = now_s
        return None

    def vacate(self, session: str) -> None:
        """A launcher is gone that has started nothing."""
        self._offers = [offer for offer in self._offers if offer.session != session]

    def ready(self, now_s: float) -> bool:
        """Whether all are there, or enough are and no other has come for a while. A coordinator that was
        restarted deals ids out at once, but whoever it had may be slow to come back."""
        slots = self._slots()
        waited = now_s - self._last_offer_s >= self._settle_s
        return slots == self._world_size or (slots >= self._least and waited)

    def settle(self, now_s: float) -> bool:
        if self._complete or not self.ready(now_s):
            return False
        self._complete = True
        return True

    def assignment(self, session: str) -> Assignment:
        assert self._world_size is not None
        offer = next(offer for offer in self._offers if offer.session == session)
        master = self._offers[0].hello
        return Assignment(
            first_worker_id=offer.first_worker_id,
            world_size=self._world_size,
            host_index=offer.first_worker_id // offer.hello.slots,
            host_count=max(1, self._world_size // offer.hello.slots),
            master_address=master.address,
            master_port=master.master_port,
            hosts=self.hosts,
        )

    def waiting_for(self) -> str:
        missing = sorted(set(range(self._world_size or 0)) - self.expected)
        shown = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        return f"{self._slots()} of {self._world_size} workers' pods have come (missing: worker {shown})"

    def _overlapping(self, hello: LauncherHello) -> list[Offer]:
        """Those that have some of these ids."""
        place = hello.place or 0
        return [
            offer
            for offer in self._offers
            if offer.first_worker_id < place + hello.slots
            and place < offer.first_worker_id + offer.hello.slots
        ]

    def _is_back(self, hello: LauncherHello) -> bool:
        """Whether an earlier coordinator gave it these ids, and its workers have them still."""
        return hello.first_worker_id is not None and hello.first_worker_id == hello.place
