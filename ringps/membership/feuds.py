"""PURE: members that cannot reach each other, though neither is known to be lost.

A first complaint leads to another generation with the same members: whatever broke may have been
the connection alone. If the same two complain again soon, one of them must go. It is the one that
quarrels with more of the others, for then the fault is likely at its end.

If two that were to form that generation did not even meet, the fault is taken to lie between their
machines, and all members of one of these go: it would be the same with each of them.

Who complains has given up all of its connections. So a complaint about somebody who complains about
somebody else is a consequence, and not held against either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MEMORY_S = 15.0
"""For how long a complaint counts against those whom it was about."""


@dataclass(frozen=True)
class Suspicion:
    """A member says that it cannot reach another one."""

    accuser: int
    accused: int
    reason: str
    since_s: float
    forming: bool = False
    """They never met, though the generation was to form."""

    @property
    def pair(self) -> frozenset[int]:
        """The two, whoever of them complained."""
        return frozenset({self.accuser, self.accused})


@dataclass(frozen=True)
class Ruling:
    """What follows from the complaints: another generation, without those that are `excluded`."""

    first: Suspicion
    excluded: tuple[int, ...]
    reason: str


class Feuds:
    """All suspicions of a job. Those of one generation are judged together."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._open: dict[tuple[int, int], Suspicion] = {}
        self._past: dict[frozenset[int], float] = {}

    def suspect(self, suspicion: Suspicion) -> None:
        """A member complains. The same complaint again changes nothing."""
        self._open.setdefault((suspicion.accuser, suspicion.accused), suspicion)

    def settle(self) -> None:
        """Another generation begins: complaints about the one before it are void."""
        self._open.clear()

    def forget(self, worker_id: int) -> None:
        """This worker is gone; nothing of it is held against the others, or against its successor."""
        self._past = {pair: at_s for pair, at_s in self._past.items() if worker_id not in pair}
        self._open = {pair: entry for pair, entry in self._open.items() if worker_id not in pair}

    def judge(self, now_s: float, hosts: Mapping[int, str]) -> Ruling | None:
        """What follows, once a complaint is old enough that certain news would have come; else None.

        Args:
            now_s: the current time.
            hosts: the machine of each member.
        """
        first = next(iter(self._open.values()), None)
        if first is None or now_s < first.since_s + self._patience_s:
            return None
        self._past = {pair: at_s for pair, at_s in self._past.items() if now_s - at_s <= MEMORY_S}
        causes = self._causes()
        apart = next((entry for entry in causes if self._are_apart(entry, hosts)), None)
        again = next((entry for entry in causes if entry.pair in self._past), None)
        self._past.update((entry.pair, now_s) for entry in causes)
        self._open.clear()
        if apart is not None:
            here, there = sorted(
                (_on(hosts[one], hosts) for one in apart.pair), key=lambda ids: (-len(ids), ids)
            )
            why = f"nothing passes between {hosts[here[0]]} and {hosts[there[0]]}; "
            return Ruling(apart, there, why + "the latter has fewer members, or the higher worker ids")
        if again is None:
            return Ruling(first, (), "nobody is known to be lost")
        one, other = sorted(again.pair)
        feuds_of_one, feuds_of_other = self._opponents(one), self._opponents(other)
        if feuds_of_one != feuds_of_other:
            excluded = one if feuds_of_one > feuds_of_other else other
            why = "it has failed with more of the members than the other one's"
        else:
            excluded, why = other, "either end may be at fault, and its worker id is the higher one"
        return Ruling(again, (excluded,), f"the connection between them failed again; {why}")

    def _causes(self) -> list[Suspicion]:
        """The open complaints that are no consequences of others."""
        complaining = {accuser for accuser, _ in self._open}
        return [
            entry
            for (accuser, accused), entry in self._open.items()
            if accused not in complaining or (accused, accuser) in self._open
        ]

    def _are_apart(self, entry: Suspicion, hosts: Mapping[int, str]) -> bool:
        """Whether these two have not met, and members of their two machines have failed before."""
        ends = frozenset(hosts.get(one) for one in entry.pair)
        if not entry.forming or len(ends) < 2 or None in ends:
            return False
        return any(frozenset(hosts.get(one) for one in pair) == ends for pair in self._past)

    def _opponents(self, worker_id: int) -> int:
        return sum(worker_id in pair for pair in self._past)


def _on(host: str, hosts: Mapping[int, str]) -> tuple[int, ...]:
    """The members on a machine."""
    return tuple(sorted(worker_id for worker_id, other in hosts.items() if other == host))
