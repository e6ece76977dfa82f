"""The members of a generation in ring order, and each one's neighbours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Member:
    """One worker of a generation."""

    worker_id: int
    """Stable for the job."""

    host: str
    """Name of its machine, for messages."""

    address: str
    """Where its data socket listens, as the transport understands it; "" until it is bound."""

    pid: int = 0
    """Process id on its machine; 0 where it has none of its own."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A fixed list of members in ring order. A member's rank is its position."""

    number: int
    """Grows with every change of membership; 1 is the first."""

    members: tuple[Member, ...]
    """In ring order: member i sends to member i + 1 and the last to the first."""

    rank: int
    """This worker's position in `members`."""

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a generation has at least one member")
        if not 0 <= self.rank < len(self.members):
            raise ValueError(f"rank {self.rank} is not in 0..{len(self.members) - 1}")
        if len({member.worker_id for member in self.members}) != len(self.members):
            raise ValueError("a worker id appears twice in a generation")

    @property
    def world_size(self) -> int:
        return len(self.members)

    @property
    def right(self) -> int:
        """Rank that this one sends to."""
        return (self.rank + 1) % self.world_size

    @property
    def left(self) -> int:
        """Rank that this one receives from."""
        return (self.rank - 1) % self.world_size

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """Ranks on this member's host, in ring order."""
        host = self.members[self.rank].host
        return tuple(rank for rank, member in enumerate(self.members) if member.host == host)

    def rank_of(self, worker_id: int) -> int | None:
        """Rank of a worker, or None if it is not a member."""
        for rank, member in enumerate(self.members):
            if member.worker_id == worker_id:
                return rank
        return None

    def describe(self, rank: int) -> str:
        """`rank 2 (worker 2 on node-b)`, the way every message names a member."""
        member = self.members[rank]
        return f"rank {rank} (worker {member.worker_id} on {member.host})"
