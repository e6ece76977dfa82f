"""PURE: launchers that have come too early: for the next start of the ring, or for a place that is taken."""

from __future__ import annotations

from ringps.wire.control import LauncherHello, WorkerExited
from ringps.wire.rules import MAX_WORKERS

NEXT_START = "the whole ring is about to be started again; its workers are not all gone yet"
"""What those are told who wait for that."""


class WaitingRoom:
    """Keeps their hellos, which the coordinator acts upon when their time has come."""

    def __init__(self) -> None:
        self._hellos: dict[bytes, LauncherHello] = {}
        self._reasons: dict[bytes, str] = {}
        self._exits: dict[bytes, dict[int, WorkerExited]] = {}

    def __contains__(self, peer: bytes) -> bool:
        return peer in self._hellos

    def enter(self, peer: bytes, hello: LauncherHello, reason: str) -> str | None:
        """A launcher says hello, perhaps again on a new connection. None, or why it may not wait here.

        Args:
            peer: where it is reached.
            hello: what it said.
            reason: what it waits for, in words.
        """
        for known, said in list(self._hellos.items()):
            if said.session == hello.session:
                self.leave(known)
        if len(self._hellos) >= MAX_WORKERS:
            return "too many launchers wait for the next start"
        self._hellos[peer] = hello
        self._reasons[peer] = reason
        return None

    def reason_of(self, peer: bytes) -> str:
        """What it waits for, in words."""
        return self._reasons[peer]

    def keep(self, peer: bytes, exited: WorkerExited) -> str | None:
        """It reports an exit, which is kept until it can take part. None, or why that does not count."""
        hello = self._hellos[peer]
        first = hello.first_worker_id
        if first is None or not first <= exited.worker_id < first + hello.slots:
            return "launcher does not own this worker"
        self._exits.setdefault(peer, {})[exited.worker_id] = exited
        return None

    def leave(self, peer: bytes) -> list[WorkerExited]:
        """It goes away; what it has reported."""
        self._hellos.pop(peer, None)
        self._reasons.pop(peer, None)
        return list(self._exits.pop(peer, {}).values())

    def all(self) -> list[tuple[bytes, LauncherHello]]:
        """Everybody's hello and where it came from, in the order of arrival."""
        return list(self._hellos.items())
