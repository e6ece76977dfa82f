"""PURE: exits that were reported before the worker's own last words came.

A worker says that it leaves over its own connection, and its launcher reports the exit over another,
so either may come first. A worker that leaves because the job stops at a checkpoint exits with a code
that would otherwise be a failure: such an exit is not judged before its words have had time to come.
"""

from __future__ import annotations

from ringps.membership.roster import Worker
from ringps.wire.control import WorkerExited

PATIENCE_S = 1.0
"""For how long after the report of its exit a worker's last words may still come."""


class EarlyExits:
    """Holds exits until they can be judged."""

    def __init__(self) -> None:
        self._held: dict[Worker, tuple[WorkerExited, float]] = {}

    def __contains__(self, worker: Worker) -> bool:
        return worker in self._held

    def hold(self, worker: Worker, exited: WorkerExited, now_s: float) -> None:
        """Judge this one later."""
        self._held[worker] = (exited, now_s + PATIENCE_S)

    def take(self, worker: Worker) -> WorkerExited | None:
        """This worker's last words have come: its exit, if it is held. It is held no more."""
        held = self._held.pop(worker, None)
        return None if held is None else held[0]

    def take_due(self, now_s: float) -> list[tuple[Worker, WorkerExited]]:
        """Those whose words have not come in time; they are held no more."""
        due = [(worker, exited) for worker, (exited, until_s) in self._held.items() if now_s >= until_s]
        for worker, _ in due:
            del self._held[worker]
        return due
