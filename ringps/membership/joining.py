"""PURE: how workers that wait to join get the state of a ring that runs.

Members that pause after a step offer their state. When all have offered that of the same step, the workers
that wait are told to fetch it (`Feed`), and are members of the next generation. Its first step commits when
they hold the state: until then the others go on serving it, and do not change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringps.membership.roster import Worker
from ringps.wire.control import Offer


@dataclass(frozen=True)
class Join:
    """These workers are to fetch the state of `step` from `servers`, and become members."""

    step: int
    servers: tuple[str, ...]
    joiners: tuple[Worker, ...]
    reason: str


@dataclass(frozen=True)
class GiveUp:
    """Nobody joins; the members must go on."""

    reason: str


class Joining:
    """The offers of one generation."""

    def __init__(self) -> None:
        self._offers: dict[int, Offer] = {}

    def offer(self, worker_id: int, offer: Offer) -> None:
        """A member pauses and offers its state. A later offer takes the place of an earlier one."""
        self._offers[worker_id] = offer

    def pauses(self, worker_id: int) -> bool:
        """Whether this member has offered, and was not told to go on since."""
        return worker_id in self._offers

    def void(self) -> None:
        """The offers do not stand any more."""
        self._offers.clear()

    def decide(self, members: Sequence[Worker], ready: Sequence[Worker]) -> Join | GiveUp | None:
        """What follows from the offers.

        Args:
            members: in rank order, without those that left or are gone.
            ready: the workers in phase READY.
        """
        offers = [self._offers.get(worker.worker_id) for worker in members]
        given = [offer for offer in offers if offer is not None]
        if not given or len(given) < len(members) or len({offer.step for offer in given}) > 1:
            return None
        offered = frozenset.intersection(*(frozenset(offer.joiners) for offer in given))
        joiners = tuple(worker for worker in ready if worker.worker_id in offered)
        if not joiners:
            return GiveUp("none of the workers that waited to join is there any more")
        ids = ", ".join(str(worker.worker_id) for worker in joiners)
        subject = f"worker {ids} joins" if len(joiners) == 1 else f"workers {ids} join"
        step = given[0].step
        reason = f"{subject} after step {step}"
        return Join(step, tuple(offer.address for offer in given), joiners, reason)
