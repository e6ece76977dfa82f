"""PURE: launchers that have come for the next start of the ring, while the last one still ends."""

from __future__ import annotations

from ringps.wire.control import LauncherHello
from ringps.wire.rules import MAX_WORKERS

REASON = "the whole ring is about to be started again; its workers are not all gone yet"
"""What those who wait are told."""


class WaitingRoom:
    """Keeps their hellos, which the coordinator acts upon once it serves the next start."""

    def __init__(self) -> None:
        self._hellos: dict[bytes, LauncherHello] = {}

    def __contains__(self, peer: bytes) -> bool:
        return peer in self._hellos

    def enter(self, peer: bytes, hello: LauncherHello) -> str | None:
        """A launcher says hello, perhaps again on a new connection. None, or why it may not wait here."""
        for known, said in list(self._hellos.items()):
            if said.session == hello.session:
                del self._hellos[known]
        if len(self._hellos) >= MAX_WORKERS:
            return "too many launchers wait for the next start"
        self._hellos[peer] = hello
        return None

    def leave(self, peer: bytes) -> None:
        """It goes away."""
        self._hellos.pop(peer, None)

    def all(self) -> list[tuple[bytes, LauncherHello]]:
        """Everybody's hello and where it came from, in the order of arrival."""
        return list(self._hellos.items())
