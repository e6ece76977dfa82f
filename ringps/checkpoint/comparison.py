"""Which pieces of a state are the same on the servers, and in the memory of the process that fetches it."""

from __future__ import annotations

from ringps.checkpoint.crew import Crew
from ringps.checkpoint.peer_wire import Kind, Request
from ringps.checkpoint.pieces import DIGEST_BYTES, Layout, Pieces
from ringps.checkpoint.source import Source
from ringps.checkpoint.tree import State
from ringps.errors import DivergedError


class Comparison:
    """Which pieces are the same where."""

    def __init__(self, crew: Crew, layout: Layout, own: State | None) -> None:
        self.mine: Pieces | None = None
        """The caller's own, if it has the same layout."""
        self._crew = crew
        self._layout = layout
        self._digests: list[bytes] = []
        if own is not None:
            mine = Pieces(own.tensors)
            self.mine = mine if mine.layout == layout else None

    def agreed(self) -> list[bytes]:
        """The hash of every piece, from two servers where there are two.

        Raises:
            DivergedError: servers disagree about a piece, and still do when asked again.
        """
        differ = ""
        while True:
            before, (hashes, differ) = differ, self._gather(list(self._crew.sources))
            if hashes is not None and not differ:
                return hashes
            if before and differ:
                raise DivergedError(differ, worker_ids=())

    def _gather(self, asked: list[Source]) -> tuple[list[bytes] | None, str]:
        """The hashes, or None if a source was lost meanwhile; and in words the first one that differs."""
        answers = self._crew.each(lambda source: self._ask(source, asked), meanwhile=self._hash_mine)
        if self._crew.sources != asked:
            return None, ""
        hashes, differ = [], ""
        for piece in range(self._layout.piece_count):
            one, other = piece % len(asked), (piece - 1) % len(asked)
            place = piece // len(asked)
            hashes.append(answers[asked[one]][0][place])
            if not differ and hashes[-1] != answers[asked[other]][-1][place]:
                differ = self._describe(piece, asked[one], asked[other])
        return hashes, differ

    def _ask(self, source: Source, asked: list[Source]) -> list[list[bytes]]:
        """Hashes of the pieces in the source's own share, and in its right neighbour's."""
        count, at = len(asked), asked.index(source)
        shares = [range(first % count, self._layout.piece_count, count) for first in (at, at + 1)]
        if count == 1:
            shares.pop()
        for share in shares:
            source.ask(Request(Kind.HASHES, share.start, count))
        found = []
        for share in shares:
            raw = bytes(source.receive_bytes(DIGEST_BYTES * len(share)))
            found.append([raw[at : at + DIGEST_BYTES] for at in range(0, len(raw), DIGEST_BYTES)])
        return found

    def _hash_mine(self) -> None:
        if self.mine is not None:
            while len(self._digests) < self._layout.piece_count:
                self._digests.append(self.mine.digest(len(self._digests)))
                self._crew.glance()

    def known(self, hashes: list[bytes]) -> set[int]:
        """The pieces that the caller has already."""
        return {piece for piece, (a, b) in enumerate(zip(hashes, self._digests, strict=False)) if a == b}

    def _describe(self, piece: int, one: Source, other: Source) -> str:
        return (
            f"{one.address} and {other.address} serve different bits of the same state, in "
            f"{self._layout.describe(piece)}; at least one of the two must not go on with what it holds"
        )
