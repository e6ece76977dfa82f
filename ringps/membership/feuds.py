"""PURE: members that cannot reach each other, though neither is known to be lost.

A first complaint leads to another generation with the same members: whatever broke may have been
the connection alone. If the same two complain again soon, one of them must go. It is the one that
quarrels with more of the others, for then the fault is likely at its end.

Who complains has given up all of its connections. So a complaint about somebody who complains about
somebody else is a consequence, and not held against either.
"""

from __future__ import annotations

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

    @property
    def pair(self) -> frozenset[int]:
        """The two, whoever of them complained."""
        return frozenset({self.accuser, self.accused})


@dataclass(frozen=True)
class Ruling:
    """What follows from the complaints: another generation, without `excluded` if there is one."""

    first: Suspicion
    excluded: int | None
    reason: str


class Feuds:
    """All suspicions of a job. Those of one generation are judged together."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._open: dict[tuple[int, int], Suspicion] = {}
        self._past: dict[frozenset[int], float] = {}

    def suspect(self, accuser: int, accused: int, reason: str, now_s: float) -> None:
        """A member complains. The same complaint again changes nothing."""
        self._open.setdefault((accuser, accused), Suspicion(accuser, accused, reason, now_s))

    def settle(self) -> None:
        """Another generation begins: complaints about the one before it are void."""
        self._open.clear()

    def forget(self, worker_id: int) -> None:
        """This worker is gone; nothing of it is held against the others, or against its successor."""
        self._past = {pair: at_s for pair, at_s in self._past.items() if worker_id not in pair}
        self._open = {pair: entry for pair, entry in self._open.items() if worker_id not in pair}

    def judge(self, now_s: float) -> Ruling | None:
        """What follows, once a complaint is old enough that certain news would have come; else None."""
        first = next(iter(self._open.values()), None)
        if first is None or now_s < first.since_s + self._patience_s:
            return None
        self._past = {pair: at_s for pair, at_s in self._past.items() if now_s - at_s <= MEMORY_S}
        causes = self._causes()
        again = next((entry for entry in causes if entry.pair in self._past), None)
        self._past.update((entry.pair, now_s) for entry in causes)
        self._open.clear()
        if again is None:
            return Ruling(first, None, "nobody is known to be lost")
        one, other = sorted(again.pair)
        feuds_of_one, feuds_of_other = self._opponents(one), self._opponents(other)
        if feuds_of_one != feuds_of_other:
            excluded = one if feuds_of_one > feuds_of_other else other
            why = "it has failed with more of the members than the other one's"
        else:
            excluded, why = other, "either end may be at fault, and its worker id is the higher one"
        return Ruling(again, excluded, f"the connection between them failed again; {why}")

    def _causes(self) -> list[Suspicion]:
        """The open complaints that are no consequences of others."""
        complaining = {accuser for accuser, _ in self._open}
        return [
            entry
            for (accuser, accused), entry in self._open.items()
            if accused not in complaining or (accused, accuser) in self._open
        ]

    def _opponents(self, worker_id: int) -> int:
        return sum(worker_id in pair for pair in self._past)
