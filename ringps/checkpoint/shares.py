"""PURE: which server is asked for which piece next.

Each begins with its share: piece i is server i mod n's. A server that is through with its own takes from the
end of the longest share that is left. What a lost server owes, and what came wrong, is asked from another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

MOST_TRIES = 4
"""How often a piece may come wrong before it is given up."""


class Shares:
    """Pieces that are still to be fetched."""

    def __init__(self, pieces: Iterable[int], servers: int) -> None:
        self._waiting: list[deque[int]] = [deque() for _ in range(servers)]
        for piece in pieces:
            self._waiting[piece % servers].append(piece)
        self._again: list[int] = []
        self._asked: dict[int, int] = {}
        self._wrong: dict[int, list[int]] = {}
        self._alive = set(range(servers))

    @property
    def finished(self) -> bool:
        """Whether every piece has come."""
        return not self._asked and not self._again and not any(self._waiting)

    def take(self, server: int) -> int | None:
        """A piece to ask `server` for; None if there is none for it now. That may change until `finished`."""
        piece = self._next(server)
        if piece is not None:
            self._asked[piece] = server
        return piece

    def _next(self, server: int) -> int | None:
        for piece in self._again:
            # From one that has not sent it wrong, if there is such a one.
            if server not in self._wrong.get(piece, ()) or self._alive.issubset(self._wrong[piece]):
                self._again.remove(piece)
                return piece
        if self._waiting[server]:
            return self._waiting[server].popleft()
        longest = max(self._waiting, key=len)
        return longest.pop() if longest else None

    def came(self, piece: int) -> None:
        """The piece is here, and right."""
        del self._asked[piece]

    def came_wrong(self, piece: int) -> tuple[bool, str]:
        """The piece came with another hash. Whether to ask for it again, and why."""
        server = self._asked.pop(piece)
        tries = self._wrong.setdefault(piece, [])
        tries.append(server)
        self._again.append(piece)
        if len(tries) >= MOST_TRIES:
            return False, f"it came with a wrong hash {len(tries)} times"
        return True, f"it came with a wrong hash ({len(tries)} of at most {MOST_TRIES} times)"

    def lost(self, server: int) -> None:
        """The server is gone; what it owes is for the others."""
        self._alive.discard(server)
        for piece in [piece for piece, asked in self._asked.items() if asked == server]:
            del self._asked[piece]
            self._again.append(piece)
