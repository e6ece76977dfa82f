"""PURE: how far all ranks are with a save, and what follows.

A *lane* leads a checkpoint into one directory, in stages: all ranks write their files; when all have, the
checkpoint is published. (Where files are copied from another directory, all look first what they can read.)
All ranks begin a stage between the same two steps, and tell each other later how it went: so each knows the
same, and decides the same. What began in another generation is given up, for some of those who were at it
may be gone, and what they had written with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, IntEnum, auto
from typing import NamedTuple


class Stage(IntEnum):
    """What is under way in a lane."""

    LOOK = 0
    WRITE = 1
    PUBLISH = 2


class Task(NamedTuple):
    """A stage of the save of a step."""

    stage: Stage
    step: int
    generation: int
    """In which it began."""


class Said(NamedTuple):
    """What a rank says of a lane."""

    task: Task | None
    busy: bool
    """Whether its thread is at work, be it at this task or at one that was given up."""
    error: str
    """Why it failed at the task; empty while it has not."""


class Next(Enum):
    """What all ranks do about a lane."""

    BEGIN = auto()
    """Nothing is under way anywhere: something else may begin."""
    WAIT = auto()
    DROP = auto()
    FAIL = auto()
    ADVANCE = auto()


def decide(said: Sequence[Said], generation: int) -> tuple[Next, str]:
    """What follows from what all ranks say, and why; `said[rank]`."""
    tasks = {one.task for one in said}
    busy = [rank for rank, one in enumerate(said) if one.busy]
    if len(tasks) > 1:
        return Next.DROP, "the ranks are not at the same save: some came later"
    (task,) = tasks
    if task is not None and task.generation != generation:
        return Next.DROP, f"it began in generation {task.generation}, and this is {generation}"
    if busy:
        return Next.WAIT, f"rank {busy[0]} is still at work"
    if task is None:
        return Next.BEGIN, "nothing is under way"
    errors = [f"rank {rank}: {one.error}" for rank, one in enumerate(said) if one.error]
    if errors:
        return Next.FAIL, "; ".join(dict.fromkeys(errors))
    return Next.ADVANCE, "all ranks are done"


def assign(needed: Mapping[str, int], holders: Sequence[frozenset[str]]) -> tuple[dict[str, int], str]:
    """Who copies which file of a checkpoint.

    Args:
        needed: size of each file.
        holders: by rank, the files that it can read.

    Returns:
        The rank by file, so that each has about as many bytes (nothing if a file is nowhere to be found);
        and why.
    """
    load = [0] * len(holders)
    chosen: dict[str, int] = {}
    for name, size in sorted(needed.items(), key=lambda item: (-item[1], item[0])):
        able = [rank for rank, held in enumerate(holders) if name in held]
        if not able:
            return {}, f"no rank can read {name} any more"
        rank = min(able, key=lambda rank: (load[rank], rank))
        load[rank] += size
        chosen[name] = rank
    return chosen, "each file goes to the one with least to do among those that can read it"
