"""PURE: the plan of the whole job: which launcher starts which workers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ringps.wire.control import Assignment, LauncherHello
from ringps.wire.rules import MAX_WORKERS


@dataclass(frozen=True)
class Offer:
    """A launcher and what it was dealt."""

    session: str
    hello: LauncherHello
    first_worker_id: int = 0


class JobPlan:
    """Collects launchers' offers until they make up the job.

    With a `world_size` the plan is complete when the slots offered make it up; without, when no
    launcher has come for `settle_s`. Launchers of one host get neighbouring worker ids, hosts come
    in the order of their first launcher.

    A launcher that was given worker ids by an earlier coordinator has them still: the first such one
    shows that the plan was complete, and nothing is dealt out any more. Later, a launcher may take the
    place of one whose machine is gone.
    """

    def __init__(self, world_size: int | None, settle_s: float) -> None:
        self._world_size = world_size
        self._settle_s = settle_s
        self._offers: list[Offer] = []
        self._last_offer_s = 0.0
        self._complete = False
        self._restored = False
        self._evicted: list[str] = []

    @property
    def world_size(self) -> int | None:
        """Workers of the whole job; None while unknown."""
        return self._world_size

    @property
    def complete(self) -> bool:
        """Whether the worker ids are dealt out."""
        return self._complete

    def ready(self, now_s: float) -> bool:
        """Whether the job is as large as it will be for now."""
        return self._complete

    @property
    def restored(self) -> bool:
        """Whether an earlier coordinator dealt them out."""
        return self._restored

    @property
    def launchers(self) -> tuple[str, ...]:
        """Sessions of all launchers; by host once complete."""
        return tuple(offer.session for offer in self._offers)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host names of all launchers, in the same order."""
        return tuple(offer.hello.host for offer in self._offers)

    @property
    def offers(self) -> tuple[Offer, ...]:
        """All launchers and what they were dealt."""
        return tuple(self._offers)

    @property
    def expected(self) -> Collection[int]:
        """The workers that the ring is made of when it forms for the first time."""
        return range(self._world_size or 0)

    @property
    def encrypt_data(self) -> bool:
        """Whether a launcher asked for encrypted data connections."""
        return any(offer.hello.encrypt_data for offer in self._offers)

    def offer(self, hello: LauncherHello, now_s: float, abandoned: Collection[int] = ()) -> str | None:
        """Take a launcher in; the answer is None, or the reason for refusing it.

        Args:
            hello: what it offers.
            now_s: the current time.
            abandoned: worker ids that no process has, and whose launcher is gone as far as can be known.
        """
        if hello.first_worker_id is not None:
            return self._put_back(hello, hello.first_worker_id)
        if self._complete:
            return self._take_over(hello, abandoned)
        taken = self._slots()
        room = (self._world_size or MAX_WORKERS) - taken
        if hello.slots > room:
            return f"the job has room for {room} more workers, and this launcher offers {hello.slots}"
        self._offers.append(Offer(hello.session, hello))
        self._last_offer_s = now_s
        return None

    def take_evicted(self) -> list[str]:
        """Sessions of launchers that have no part in the plan any more, each once."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def withdraw(self, session: str) -> None:
        """A launcher goes away; its offer is void unless it was dealt worker ids already."""
        if not self._complete:
            self._offers = [offer for offer in self._offers if offer.session != session]

    def settle(self, now_s: float) -> bool:
        """Complete the plan if it is time; whether that has just happened."""
        slots = self._slots()
        if self._complete or not slots:
            return False
        if self._world_size is None:
            if now_s - self._last_offer_s < self._settle_s:
                return False
        elif slots < self._world_size:
            return False
        self._complete = True
        self._world_size = slots
        self._deal()
        return True

    def assignment(self, session: str) -> Assignment:
        """A launcher's part, once the plan is complete."""
        assert self._complete and self._world_size is not None
        index = self.launchers.index(session)
        master = self._offers[0].hello
        return Assignment(
            first_worker_id=self._offers[index].first_worker_id,
            world_size=self._world_size,
            host_index=index,
            host_count=len(self._offers),
            master_address=master.address,
            master_port=master.master_port,
            hosts=self.hosts,
        )

    def owns(self, session: str, worker_id: int) -> bool:
        """Whether this launcher was told to start this worker."""
        offer = self._offer_of(worker_id)
        return offer is not None and offer.session == session

    def owner_of(self, worker_id: int) -> str | None:
        """The session of the launcher that was told to start this worker."""
        offer = self._offer_of(worker_id)
        return None if offer is None else offer.session

    def host_of(self, worker_id: int) -> str | None:
        """The machine where a launcher was told to start this worker."""
        offer = self._offer_of(worker_id)
        return None if offer is None else offer.hello.host

    def waiting_for(self) -> str:
        """What is missing for the plan, in words."""
        slots, hosts = self._slots(), ", ".join(self.hosts) or "none"
        if self._world_size is None:
            return f"launchers to settle: none may come for {self._settle_s:g} s (so far: {hosts})"
        return f"launchers: {slots} of {self._world_size} worker slots have come (from: {hosts})"

    def _put_back(self, hello: LauncherHello, first: int) -> str | None:
        mine = f"worker ids {first}..{first + hello.slots - 1}"
        world_size = self._world_size or hello.world_size
        if hello.world_size is None or hello.world_size != world_size:
            return f"this job has {world_size} workers, and this launcher's had {hello.world_size}"
        if first + hello.slots > world_size:
            return f"this launcher was given {mine}, and this job has {world_size} workers"
        if self._complete and any(
            first < offer.first_worker_id + offer.hello.slots and offer.first_worker_id < first + hello.slots
            for offer in self._offers
        ):
            return f"this launcher was given {mine}, and another one has some of them"
        if not self._complete:
            self._evicted = [offer.session for offer in self._offers]
            self._offers = []
        self._complete = self._restored = True
        self._world_size = world_size
        self._offers.append(Offer(hello.session, hello, first))
        self._offers.sort(key=lambda offer: offer.first_worker_id)
        return None

    def _take_over(self, hello: LauncherHello, abandoned: Collection[int]) -> str | None:
        for index, offer in enumerate(self._offers):
            first, slots = offer.first_worker_id, offer.hello.slots
            if hello.slots <= slots and all(first + at in abandoned for at in range(slots)):
                self._evicted.append(offer.session)
                parts = [Offer(hello.session, hello, first)]
                if hello.slots < slots:
                    rest = replace(offer.hello, slots=slots - hello.slots)
                    parts.append(Offer(offer.session, rest, first + hello.slots))
                self._offers[index : index + 1] = parts
                return None
        return (
            "the job's launchers are complete; another one is taken only in the place of a machine all of "
            f"whose workers are gone, and whose slots were at least as many as its own ({hello.slots})"
        )

    def _slots(self) -> int:
        return sum(offer.hello.slots for offer in self._offers)

    def _offer_of(self, worker_id: int) -> Offer | None:
        if self._complete:
            for offer in self._offers:
                if 0 <= worker_id - offer.first_worker_id < offer.hello.slots:
                    return offer
        return None

    def _deal(self) -> None:
        """Order the launchers by host, and give each its worker ids."""
        arrival = {offer.hello.host: place for place, offer in reversed(list(enumerate(self._offers)))}
        ordered = sorted(self._offers, key=lambda offer: arrival[offer.hello.host])
        self._offers = []
        first = 0
        for offer in ordered:
            self._offers.append(replace(offer, first_worker_id=first))
            first += offer.hello.slots
