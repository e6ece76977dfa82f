"""PURE: among how many ranks each global batch is divided, and which share is this rank's.

Ranks learn of a new membership at different times: one may have drawn the next batch before it does,
another after. If each divided by the members it knew, their shares would overlap. So a membership
takes effect by an account, which is the same on all ranks: the first step that it has committed
settles that batches which no rank has drawn yet are divided among the ranks of that step.
"""

from __future__ import annotations

from ringps.data.ledger import Position


class Division:
    """This rank's share of global batches, by their position.

    Args:
        rank: this rank; None if it has no share before an account names it.
        world_size: number of shares.
    """

    def __init__(self, rank: int | None, world_size: int) -> None:
        self._since: list[tuple[Position, int | None, int]] = [((0, 0), rank, world_size)]

    def at(self, position: Position) -> tuple[int | None, int]:
        """(rank, number of shares) for the batch at `position`; rank None: no share of it."""
        for since, rank, world_size in reversed(self._since):
            if since <= position:
                return rank, world_size
        return self._since[0][1:]

    def change(self, rank: int, world_size: int, *, since: Position, trained: Position) -> None:
        """Divide among `world_size` from `since` on; nothing before `trained` is asked for again."""
        while len(self._since) > 1 and self._since[-1][0] >= since:
            self._since.pop()
        while len(self._since) > 1 and self._since[1][0] <= trained:
            self._since.pop(0)
        if self._since[-1][1:] != (rank, world_size):
            self._since.append((since, rank, world_size))

    def settle(self) -> None:
        """All ranks go somewhere else together: what was to hold later holds at once."""
        self._since = [((0, 0), *self._since[-1][1:])]
