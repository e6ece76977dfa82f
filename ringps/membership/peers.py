"""PURE: where to reach whom, and what to tell them.

A peer id is a return address: libzmq gives a new one to every connection. A session is the process
at the other end. It says hello again on every connection, with the session that it made up and
that nobody else knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ringps.membership.events import Action, Emit, Finish, Record, Refuse, Send, StartAgain
from ringps.membership.roster import Worker
from ringps.wire.control import ToLauncher, ToWorker


class PeerBook:
    """The current peer id of every session. Only sessions that were let in are written down."""

    def __init__(self) -> None:
        self._peer_of: dict[str, bytes] = {}
        self._session_of: dict[bytes, str] = {}

    def __contains__(self, session: str) -> bool:
        return session in self._peer_of

    def write_down(self, session: str, peer: bytes) -> None:
        """This session is reached at this peer id from now on."""
        self.cross_out(session)
        self._peer_of[session] = peer
        self._session_of[peer] = session

    def cross_out(self, session: str) -> None:
        """This session is reached no more."""
        peer = self._peer_of.pop(session, None)
        if peer is not None:
            del self._session_of[peer]

    def peer_of(self, session: str) -> bytes | None:
        """Where to reach a session."""
        return self._peer_of.get(session)

    def session_of(self, peer: bytes) -> str | None:
        """Who a peer id is."""
        return self._session_of.get(peer)


class Outbox:
    """The actions that a decision has come to so far."""

    def __init__(self, peers: PeerBook) -> None:
        self._peers = peers
        self._actions: list[Action] = []

    def take(self) -> list[Action]:
        """All actions since the last call, in order."""
        taken, self._actions = self._actions, []
        return taken

    def send(self, peer: bytes, message: ToWorker | ToLauncher) -> None:
        """To a peer that may be a stranger."""
        self._actions.append(Send(peer, message))

    def send_to(self, session: str, message: ToWorker | ToLauncher) -> None:
        """To a session, if it is reached anywhere."""
        peer = self._peers.peer_of(session)
        if peer is not None:
            self.send(peer, message)

    def record(self, verdict: str) -> None:
        """Have the verdict written down."""
        self._actions.append(Record(verdict))

    def send_all(self, sessions: Iterable[str], message: ToLauncher) -> None:
        """To several sessions."""
        for session in sessions:
            self.send_to(session, message)

    def tell(self, worker: Worker, message: ToWorker) -> None:
        """To a worker, unless its process has ended."""
        if worker.exited is None:
            self.send_to(worker.session, message)

    def tell_all(self, workers: Iterable[Worker], message: ToWorker, but: Worker | None = None) -> None:
        """To several workers."""
        for worker in workers:
            if worker is not but:
                self.tell(worker, message)

    def emit(self, launchers: Iterable[str], event: str, **details: Any) -> None:
        """A line for the events file, here and at these launchers."""
        peers = tuple(peer for session in launchers if (peer := self._peers.peer_of(session)) is not None)
        self._actions.append(Emit({"event": event, **details}, peers))

    def refuse(self, reason: str) -> None:
        """The event is not acted upon."""
        self._actions.append(Refuse(reason))

    def finish(self, reason: str, *, suspended: bool) -> None:
        """The job is over."""
        self._actions.append(Finish(reason, suspended))

    def start_again(self, delay_s: float) -> None:
        """The ring is over, and is started again."""
        self._actions.append(StartAgain(delay_s))
