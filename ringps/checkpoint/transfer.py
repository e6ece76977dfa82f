"""The pieces of a state on their way from several servers into new memory."""

from __future__ import annotations

import threading
from collections import deque

from ringps import probe
from ringps.checkpoint.crew import Crew
from ringps.checkpoint.peer_wire import Kind, Request
from ringps.checkpoint.pieces import ALIGNMENT, Layout, Pieces, digest
from ringps.checkpoint.shares import Shares
from ringps.checkpoint.source import Source, SourceLost
from ringps.errors import FrameError, SetupError

_AHEAD = 2
"""Pieces that a server is asked for at a time, so that it need not wait for the next request."""


class Transfer:
    """Brings the pieces that are missing, with a thread for each source."""

    def __init__(
        self, crew: Crew, layout: Layout, hashes: list[bytes], known: set[int], *, step: int
    ) -> None:
        self.target = Pieces.allocate(layout)
        self.refetched = 0
        self._crew = crew
        self._hashes = hashes
        self._known = known
        self._step = step
        self._sources = list(crew.sources)
        self._shares = Shares((p for p in range(len(hashes)) if p not in known), len(crew.sources))
        self._changed = threading.Condition()
        self._stopped = False

    def run(self, mine: Pieces | None) -> None:
        """Bring all pieces, from the servers or from the caller's own.

        Raises:
            SetupError: they do not come.
        """

        def copy() -> None:
            for piece in sorted(self._known):
                assert mine is not None
                self.target.copy_from(mine, piece)
                self._crew.glance()

        self._crew.each(self._work, meanwhile=copy, stop=self._stop)

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _work(self, source: Source) -> None:
        server = self._sources.index(source)
        coming: deque[int] = deque()
        try:
            while True:
                while len(coming) < _AHEAD:
                    piece = self._take(server, wait=not coming)
                    if piece is None:
                        break
                    if probe.listener is not None:
                        probe.reached("fetch", step=self._step, piece=piece)
                    source.ask(Request(Kind.PIECE, piece))
                    coming.append(piece)
                if not coming:
                    return
                self._receive(source, coming.popleft())
        except (SourceLost, FrameError):
            with self._changed:
                self._shares.lost(server)
                self._changed.notify_all()
            raise

    def _take(self, server: int, *, wait: bool) -> int | None:
        with self._changed:
            while not self._stopped:
                piece = self._shares.take(server)
                if piece is not None or not wait or self._shares.finished:
                    return piece
                self._changed.wait()
        return None

    def _receive(self, source: Source, piece: int) -> None:
        padding = memoryview(bytearray(ALIGNMENT))
        views = self.target.views(piece, padding)
        source.receive(deque(views))
        right = digest(views) == self._hashes[piece]
        with self._changed:
            if right:
                self._shares.came(piece)
                if self._shares.finished:
                    self._changed.notify_all()
                return
            again, reason = self._shares.came_wrong(piece)
            self._changed.notify_all()
            self.refetched += again
        if not again:
            raise SetupError(
                f"cannot get {self.target.layout.describe(piece)}: {reason}, at last from {source.address}; "
                "either the way there alters bytes, or the state changes while it is served"
            )
