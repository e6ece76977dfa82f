"""What each rank sends and receives in each step of a collective, and to and from whom.

For large tensors the algorithm is the bandwidth-optimal ring of Patarasuk and Yuan, "Bandwidth
optimal all-reduce algorithms for clusters of workstations" (2009): n - 1 steps of reduce-scatter,
in which partial sums travel once around the ring, and n - 1 steps of all-gather, in which the
results follow. Rank r sends to r + 1 and receives from r - 1.

For small tensors, whose time is that of the steps, it is recursive doubling (Thakur, Rabenseifner and
Gropp, "Optimization of collective communication operations in MPICH", 2005): about log2(n) steps, in
each of which two ranks exchange all they have.

In every schedule below, what a rank receives in step s it passes on, if at all, in a later step. So
a schedule is a list of first sends, which wait for nothing, and a list of receives, each of which
says whether it is forwarded.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NamedTuple


class Content(Enum):
    """What the bytes of a step are."""

    INPUT = "input"
    """One rank's own values."""

    PARTIAL = "partial"
    """Values of two or more ranks, combined; travels in the accumulation dtype."""

    RESULT = "result"
    """Final values."""


class Action(Enum):
    """What a rank does with a chunk that it receives."""

    COMBINE = "combine"
    """Combine it with what this rank has: its input, or what it has combined if the schedule accumulates."""

    COMPLETE = "complete"
    """Likewise; that makes the result."""

    STORE = "store"
    """It is the result."""


class Send(NamedTuple):
    """A slice to be sent in a step."""

    step: int
    slice: int
    content: Content
    peer: int
    """Rank that it is for."""


class Receive(NamedTuple):
    """A slice to be received in a step."""

    step: int
    slice: int
    content: Content
    peer: int
    """Rank that it comes from."""

    action: Action
    forward: Send | None
    """What follows from it: the same slice in a later step, or nothing."""


@dataclass(frozen=True)
class Schedule:
    """One rank's part of a collective."""

    first: tuple[Send, ...]
    """Sends that wait for nothing."""

    receives: tuple[Receive, ...]
    """One for each step in which this rank receives, in order of steps."""

    accumulates: bool = False
    """Each receive builds upon the one before, so they must be carried out in the order of steps."""

    @property
    def peers(self) -> frozenset[int]:
        """Ranks that are sent to or received from."""
        sources = {receive.peer for receive in self.receives}
        later = {receive.forward.peer for receive in self.receives if receive.forward is not None}
        return frozenset(sources | later | {send.peer for send in self.first})


def reduce_scatter(rank: int, world_size: int) -> Schedule:
    """Rank i ends up with slice i of the combined inputs."""
    return _build(rank, world_size, reduces=True, gathers=False)


def all_gather(rank: int, world_size: int) -> Schedule:
    """Every rank ends up with all slices; at the start rank i holds slice i."""
    return _build(rank, world_size, reduces=False, gathers=True)


def all_reduce(rank: int, world_size: int) -> Schedule:
    """Every rank ends up with all slices of the combined inputs."""
    return _build(rank, world_size, reduces=True, gathers=True)


def broadcast(rank: int, world_size: int, src: int) -> Schedule:
    """Every rank ends up with slice 0, the only one, of rank `src`: a pipelined chain."""
    distance = (rank - src) % world_size
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    if world_size == 1:
        return Schedule((), ())
    if distance == 0:
        return Schedule((Send(0, 0, Content.RESULT, right),), ())
    last = distance == world_size - 1
    forward = None if last else Send(distance, 0, Content.RESULT, right)
    return Schedule((), (Receive(distance - 1, 0, Content.RESULT, left, Action.STORE, forward),))


@lru_cache(maxsize=64)
def recursive_doubling(rank: int, world_size: int) -> Schedule:
    """Every rank ends up with slice 0, the only one, of the combined inputs.

    With 2**k + r ranks, the first r pairs of neighbours combine first, then one of each pair and all the
    others exchange in k steps, and then the other of each pair is told. Whoever combines two parts
    must take the part of the lower ranks first: then all ranks compute the same bits.
    """
    _check(rank, world_size)
    if world_size == 1:
        return Schedule((), ())
    doublings = world_size.bit_length() - 1
    pairs = world_size - (1 << doublings)
    folded = rank < 2 * pairs
    first_exchange, last_step = (1, doublings + 1) if pairs else (0, doublings)
    if folded and rank % 2 == 0:
        send = Send(0, 0, Content.INPUT, rank + 1)
        result = Receive(last_step, 0, Content.RESULT, rank + 1, Action.STORE, None)
        return Schedule((send,), (result,), accumulates=True)

    def rank_of(position: int) -> int:
        """Rank at a position among those that exchange."""
        return 2 * position + 1 if position < pairs else position + pairs

    def content_of(exchanging: int, exchange: int) -> Content:
        return Content.INPUT if exchange == 0 and exchanging >= 2 * pairs else Content.PARTIAL

    position = rank // 2 if folded else rank - pairs
    partners = [rank_of(position ^ (1 << exchange)) for exchange in range(doublings)]
    sends = [
        Send(first_exchange + exchange, 0, content_of(rank, exchange), partner)
        for exchange, partner in enumerate(partners)
    ]
    receives: list[Receive] = []
    if folded:
        receives.append(Receive(0, 0, Content.INPUT, rank - 1, Action.COMBINE, sends[0]))
    for exchange, partner in enumerate(partners):
        last = exchange == doublings - 1
        told = Send(last_step, 0, Content.RESULT, rank - 1) if folded else None
        receives.append(
            Receive(
                first_exchange + exchange,
                0,
                content_of(partner, exchange),
                partner,
                Action.COMPLETE if last else Action.COMBINE,
                told if last else sends[exchange + 1],
            )
        )
    return Schedule(() if folded else (sends[0],), tuple(receives), accumulates=True)


@lru_cache(maxsize=64)
def _build(rank: int, world_size: int, *, reduces: bool, gathers: bool) -> Schedule:
    _check(rank, world_size)
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    hops = world_size - 1
    steps: list[tuple[int, Content, Action]] = []
    if reduces:
        for hop in range(hops):
            content = Content.INPUT if hop == 0 else Content.PARTIAL
            action = Action.COMPLETE if hop == hops - 1 else Action.COMBINE
            steps.append(((rank - 2 - hop) % world_size, content, action))
    if gathers:
        for hop in range(hops):
            steps.append(((rank - 1 - hop) % world_size, Content.RESULT, Action.STORE))
    if not steps:
        return Schedule((), ())

    receives: list[Receive] = []
    for step, (index, content, action) in enumerate(steps):
        forward = None
        if step + 1 < len(steps):
            forward = Send(step + 1, index, steps[step + 1][1], right)
        receives.append(Receive(step, index, content, left, action, forward))
    own = (rank - 1) % world_size if reduces else rank
    return Schedule((Send(0, own, steps[0][1], right),), tuple(receives))


def _check(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
