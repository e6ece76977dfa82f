"""PURE: what a coordinator is told of the cluster that its job runs in; it lives as long as the job.

Without a cluster nothing is ever told, and nothing here matters.
"""

from __future__ import annotations

from typing import TypeVar

from ringps.wire.rules import MAX_WORKERS

_MOST = 4 * MAX_WORKERS

T = TypeVar("T")


class Budget:
    """How many failures of workers the job may have, over all starts of its ring and all coordinators."""

    def __init__(self, most: int, used: int = 0) -> None:
        """
        Args:
            most: failures that are made good.
            used: how many there were under earlier coordinators.
        """
        self.most = most
        self.used = used

    @property
    def exhausted(self) -> bool:
        """Whether no further failure is made good."""
        return self.used > self.most

    def charge(self) -> str:
        """A worker failed by itself; what is left, in words."""
        self.used = min(self.used, self.most) + 1
        return self.words

    @property
    def words(self) -> str:
        """What is left."""
        if self.exhausted:
            return f"the restarts are used up (--max-restarts {self.most})"
        return f"{self.most - self.used} of {self.most} restarts left"


class Surroundings:
    """Facts about machines, by the name of the launcher's host, and who else may rule."""

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget
        """None where each launcher has one of its own."""
        self.fenced = True
        """Whether no other coordinator can rule this job. While that is not certain, another one may be in
        touch with other members; only one of the two can have a majority of them."""
        self.recorded = False
        """Whether the verdict is written down."""
        self.forsaken: dict[int, str] = {}
        """Worker ids whose last process failed when the budget was used up, and why: nobody takes its
        place."""
        self._places: dict[str, tuple[str, ...]] = {}
        self._ends: dict[str, str] = {}
        self._warned: dict[str, str] = {}

    def put(self, host: str, place: tuple[str, ...]) -> None:
        """This host is there, from the largest failure domain to the smallest."""
        _bounded(self._places, host, place)

    def place_of(self, host: str) -> tuple[str, ...]:
        """Where this host is; empty if nobody knows."""
        return self._places.get(host, ())

    def bury(self, host: str, reason: str) -> None:
        """This host is gone for certain."""
        _bounded(self._ends, host, reason)

    def end_of(self, host: str) -> str | None:
        """Why this host is gone; None if it is not, as far as is known."""
        return self._ends.get(host)

    def warn(self, host: str, reason: str) -> bool:
        """This host is about to be taken away; whether that is news."""
        news = host not in self._warned
        _bounded(self._warned, host, reason)
        return news

    def warning_of(self, host: str) -> str | None:
        """Why this host is about to be taken away; None if it is not."""
        return self._warned.get(host)


def _bounded(known: dict[str, T], host: str, value: T) -> None:
    known.pop(host, None)
    known[host] = value
    if len(known) > _MOST:  # the one that was told of longest ago
        del known[next(iter(known))]
