"""PURE: an operation is committed by all ranks or by none.

An operation is what all ranks must do together: the reduction of all buckets of a step, or one collective of
the user's script. Ranks number them alike. Each ends with a vote: a rank says that it holds the whole
result, and the result's hash. Who has all ranks' votes, and sees that they agree, commits.

So, after a failure:

- Nobody has committed an operation for which some rank did not vote. If a survivor does not hold the result,
  the operation is done again by the survivors, from inputs that are kept until the commit.
- If all survivors hold the result, and their votes agreed, a rank that is gone may have committed it. All
  survivors commit it too (they roll forward). It is complete: whoever is gone had given its part.
- Ranks differ by one operation at most, since the next one needs all of them.

This is two-phase commit (Gray, 1978) whose outcome is never in doubt: any survivor's memory of its own vote
is enough, since all members of the next generation tell each other theirs before they go on.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

MOST_JOINERS = 8
"""Joining workers that a vote can name; more of them wait for their turn."""
HASH_BYTES = 16
NOTHING = bytes(HASH_BYTES)
"""Stands for the hash of something that is not compared."""

_NOBODY = 0xFFFF
_VOTE = struct.Struct(f"<QIIQ16s16sIBB2x{MOST_JOINERS}H")
_STATUS = struct.Struct("<QI???x16s16s")
VOTE_BYTES = _VOTE.size
STATUS_BYTES = _STATUS.size


class Ballot(NamedTuple):
    """What a rank says beside the result's hash when it votes."""

    step: int = 0
    """Optimizer step that the operation belongs to."""

    parameters: bytes = NOTHING
    """Hash of the model's parameters, if they are to be compared now; on all ranks or on none."""

    busy_us: int = 0
    """Time that this rank needed for its own part."""

    boundary: bool = False
    """After this operation, members may come and go between two steps."""


class Vote(NamedTuple):
    """What a rank says when it holds an operation's result."""

    operation: int
    """Number of the operation."""

    generation: int
    step: int
    """Optimizer step that it belongs to."""

    result: bytes
    """Hash of the result; `NOTHING` where ranks' results differ by design."""

    parameters: bytes = NOTHING
    """Hash of the model's parameters, or `NOTHING` if they are not compared now."""

    busy_us: int = 0
    """Time that this rank needed for its own part since the last commit."""

    leaving: bool = False
    """It wants to leave after this step."""

    joiners: tuple[int, ...] = ()
    """Worker ids that it knows to be ready to join, ascending."""

    marks: int = 0
    """8 bits of whoever saves checkpoints; they mean nothing here."""

    def pack(self) -> bytes:
        """`VOTE_BYTES` bytes."""
        joiners = [*self.joiners, *[_NOBODY] * MOST_JOINERS][:MOST_JOINERS]
        return _VOTE.pack(
            self.operation,
            self.generation,
            0,
            self.step,
            self.result,
            self.parameters,
            min(self.busy_us, 0xFFFFFFFF),
            self.leaving,
            self.marks,
            *joiners,
        )

    @classmethod
    def unpack(cls, raw: bytes) -> Vote:
        """The vote that `pack` packed."""
        operation, generation, _, step, result, parameters, busy_us, leaving, marks, *joiners = _VOTE.unpack(
            raw
        )
        known = tuple(one for one in joiners if one != _NOBODY)
        return cls(operation, generation, step, result, parameters, busy_us, bool(leaving), known, marks)


class Finding(Enum):
    """What a set of votes amounts to."""

    COMMIT = auto()
    REPEAT = auto()
    """The results differ: do it again, the inputs are unharmed."""
    HEAL = auto()
    """The parameters differ: the ranks in `wrong` need those of another."""
    CONFUSED = auto()
    """Ranks voted on different operations: a defect, or scripts that differ."""


class Verdict(NamedTuple):
    """The outcome of a vote, the same on all ranks."""

    finding: Finding
    reason: str
    wrong: tuple[int, ...] = ()
    """Ranks that hold other bits than most; empty where there is no majority."""


def judge(votes: Sequence[Vote]) -> Verdict:
    """What all ranks' votes amount to; `votes[rank]`."""
    subjects = {(vote.operation, vote.generation, vote.step) for vote in votes}
    if len(subjects) > 1:
        table = "; ".join(
            f"rank {rank}: operation {vote.operation} of step {vote.step} in generation {vote.generation}"
            for rank, vote in enumerate(votes)
        )
        return Verdict(Finding.CONFUSED, f"the ranks voted on different operations ({table})")
    if len({vote.parameters for vote in votes}) > 1:
        wrong = minority([vote.parameters for vote in votes])
        return Verdict(Finding.HEAL, f"the ranks' parameters differ: {_blame(wrong)}", wrong)
    if len({vote.result for vote in votes}) > 1:
        wrong = minority([vote.result for vote in votes])
        return Verdict(Finding.REPEAT, f"the ranks' reduced bits differ: {_blame(wrong)}", wrong)
    return Verdict(Finding.COMMIT, "all ranks hold the same result")


def minority(hashes: Sequence[bytes]) -> tuple[int, ...]:
    """The ranks whose hash is not that of more than half of them; empty if there is no such hash."""
    common, count = Counter(hashes).most_common(1)[0]
    if 2 * count <= len(hashes):
        return ()
    return tuple(rank for rank, one in enumerate(hashes) if one != common)


class Status(NamedTuple):
    """How far a rank is, when a new generation begins."""

    committed: int
    """Operations that it has committed."""

    generation: int
    """In which it holds a result; 0 if it holds none."""

    holds: bool
    """Whether it holds the whole result of the next operation: it may have voted for it."""

    between: bool
    """Whether it is between two steps, where it has no batch under way."""

    joining: bool
    """It is new: it has committed nothing, and is to go on from where the others are."""

    result: bytes
    """That result's hash."""

    parameters: bytes
    """Hash of the parameters to which it is to be applied; `NOTHING` if they are not compared now."""

    def pack(self) -> bytes:
        """`STATUS_BYTES` bytes."""
        return _STATUS.pack(*self)

    @classmethod
    def unpack(cls, raw: bytes) -> Status:
        """The status that `pack` packed."""
        return cls(*_STATUS.unpack(raw))


class Step(Enum):
    """What a rank does about the operation that it was in."""

    FORWARD = auto()
    """Commit what it holds."""
    AGAIN = auto()
    """Drop what it holds, if anything, and do it again."""


def resume(statuses: Sequence[Status], rank: int) -> tuple[Step, str]:
    """What `rank` does at the beginning of a generation; `statuses[rank]`.

    Raises:
        ValueError: no run of the protocol leads there; says what was found.
    """
    own = statuses[rank]
    if own.joining:
        return Step.AGAIN, "this rank is new"
    statuses = [status for status in statuses if not status.joining]
    furthest = committed_by(statuses)
    if own.committed < furthest:
        if own.committed + 1 != furthest or not own.holds:
            raise ValueError(
                f"rank {rank} has committed {own.committed} operations and others {furthest}, "
                f"but it does {'' if own.holds else 'not '}hold the next result"
            )
        return Step.FORWARD, "another member has committed it"
    behind = [status for status in statuses if status.committed < furthest]
    if behind:
        return Step.AGAIN, "other members have yet to commit the one before"
    if all(status.between for status in statuses):
        return Step.AGAIN, "all members are between two steps"
    if not all(status.holds for status in statuses):
        return Step.AGAIN, "a member lacks the result, so nobody can have committed it"
    if len({(status.generation, status.result) for status in statuses}) > 1:
        return Step.AGAIN, "the members hold different results, so nobody can have committed one"
    if len({status.parameters for status in statuses}) > 1:
        return Step.AGAIN, "the members have different parameters, so nobody can have committed the result"
    return Step.FORWARD, "all members hold the result, and one that is gone may have committed it"


def committed_by(statuses: Sequence[Status]) -> int:
    """Operations that have been committed in the ring; a rank that joins goes on from there."""
    return max(status.committed for status in statuses)


def common_joiners(votes: Sequence[Vote]) -> tuple[int, ...]:
    """The joining workers that all voters know of."""
    known = set(votes[0].joiners)
    for vote in votes[1:]:
        known &= set(vote.joiners)
    return tuple(sorted(known))


def leavers(votes: Sequence[Vote]) -> tuple[int, ...]:
    """The ranks that leave after this step."""
    return tuple(rank for rank, vote in enumerate(votes) if vote.leaving)


def _blame(wrong: tuple[int, ...]) -> str:
    if not wrong:
        return "no bits are those of a majority"
    if len(wrong) == 1:
        return f"rank {wrong[0]} has others than the majority"
    return f"ranks {', '.join(map(str, wrong))} have others than the majority"
