"""PURE: of all failures of a job, which one caused the others?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class Failure:
    """A worker that failed."""

    worker_id: int
    reason: str
    code: int | None
    """What its process exited with; None while that is not known."""
    blames: int | None
    """The worker whose failure this one says it follows from."""
    since_s: float


class RootCause:
    """Decides once which failure was the root of all.

    The first failure is it, unless its worker blames another: then that one's failure is, if it
    comes within `patience_s`. The decision also waits that long for an exit code that is due.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._failures: dict[int, Failure] = {}
        self._first: Failure | None = None
        self._decided = False

    @property
    def decided(self) -> bool:
        """Whether `decide` has given its answer."""
        return self._decided

    @property
    def failed(self) -> bool:
        """Whether any worker failed, though it may not be decided yet which one was the cause."""
        return self._first is not None

    def note(
        self, worker_id: int, reason: str, now_s: float, *, code: int | None, blames: int | None = None
    ) -> None:
        """A worker failed, or more became known about its failure."""
        failure = self._failures.get(worker_id)
        if failure is None:
            failure = Failure(worker_id, reason, code, blames, now_s)
            self._failures[worker_id] = failure
            self._first = self._first or failure
        elif failure.code is None and code is not None:
            failure.code = code
            failure.reason = reason

    def decide(self, now_s: float) -> Failure | None:
        """The root cause, the first time that it is certain; else None."""
        if self._decided or self._first is None:
            return None
        root = self._trace(self._first)
        unheard = root.blames is not None and self._blamed_by(root) is None
        patient = now_s < root.since_s + self._patience_s
        if patient and (unheard or root.code is None):
            return None
        self._decided = True
        return root

    def _trace(self, failure: Failure) -> Failure:
        """The end of the chain of blame; of a circle, who failed first."""
        path = [failure]
        while blamed := self._blamed_by(path[-1]):
            if blamed in path:
                circle = path[path.index(blamed) :]
                return next(entry for entry in self._failures.values() if entry in circle)
            path.append(blamed)
        return path[-1]

    def _blamed_by(self, failure: Failure) -> Failure | None:
        return None if failure.blames is None else self._failures.get(failure.blames)
