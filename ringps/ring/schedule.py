"""What each rank sends and receives in each step of a ring collective.

The algorithm is the bandwidth-optimal ring of Patarasuk and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations" (2009): n - 1 steps of reduce-scatter, in which partial
sums travel once around the ring, and n - 1 steps of all-gather, in which the results follow.

In every schedule below, what a rank receives in step s it passes on, if at all, in step s + 1. So
a schedule is a list of first sends, which wait for nothing, and a list of receives, each of which
says whether it is forwarded. Rank r sends to r + 1 and receives from r - 1.
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
    """Combine it with the own input."""

    COMPLETE = "complete"
    """Combine it with the own input; that makes the result."""

    STORE = "store"
    """It is the result."""


class Send(NamedTuple):
    """A slice to be sent in a step."""

    step: int
    slice: int
    content: Content


class Receive(NamedTuple):
    """A slice to be received in a step."""

    step: int
    slice: int
    content: Content
    action: Action
    forward: Send | None
    """What follows from it: the same slice in the next step, or nothing."""


@dataclass(frozen=True)
class Schedule:
    """One rank's part of a collective."""

    first: tuple[Send, ...]
    """Sends that wait for nothing."""

    receives: tuple[Receive, ...]
    """One for each step in which this rank receives, in order of steps."""


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
    if world_size == 1:
        return Schedule((), ())
    if distance == 0:
        return Schedule((Send(0, 0, Content.RESULT),), ())
    last = distance == world_size - 1
    forward = None if last else Send(distance, 0, Content.RESULT)
    return Schedule((), (Receive(distance - 1, 0, Content.RESULT, Action.STORE, forward),))


@lru_cache(maxsize=64)
def _build(rank: int, world_size: int, *, reduces: bool, gathers: bool) -> Schedule:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
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
            forward = Send(step + 1, index, steps[step + 1][1])
        receives.append(Receive(step, index, content, action, forward))
    own = (rank - 1) % world_size if reduces else rank
    return Schedule((Send(0, own, steps[0][1]),), tuple(receives))
