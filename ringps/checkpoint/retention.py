"""PURE: which checkpoints are deleted after one was saved.

Whoever deletes goes by what it has saved itself: only what is older may go. So a worker that was taken for
lost, and does not know it, deletes nothing that the others have saved since.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ringps.checkpoint.lineage import Lineage, Point
from ringps.checkpoint.manifest import Aside, Entry, aside_name, entry_name


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints are kept."""

    keep: int = 3
    """How many of the newest. Were it 1, damage to that one would leave none."""

    keep_every: int | None = None
    """Those of every so many steps are kept for ever; None: of none."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, not {self.keep}")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"keep_every must be at least 1, not {self.keep_every}")


class Deletion(NamedTuple):
    """What is to go, and why."""

    name: str
    """In the checkpoint directory."""

    reason: str


def to_delete(
    lineage: Lineage,
    unfinished: Iterable[Aside | Entry],
    retention: Retention,
    own: tuple[int, int],
    busy: Collection[str] = (),
) -> list[Deletion]:
    """Choose what goes. Checkpoints that are not in the history because a later run began from nothing stay:
    nothing has taken their place.

    Args:
        lineage: the checkpoints that there are.
        unfinished: those that were or are being written, and entries without a manifest.
        retention: what stays, of those in the history that are not newer than `own`.
        own: (run, step) of the checkpoint that was just saved.
        busy: names of what is being read or written; it stays.

    Returns:
        The oldest first, so that what is interrupted leaves the newest.
    """
    run = own[0]
    doomed: list[tuple[Point, Deletion]] = []
    for point in [point for point in lineage.history if point <= own][retention.keep :]:
        if retention.keep_every is None or point.step % retention.keep_every:
            reason = f"{retention.keep} newer ones are kept"
            doomed.append((point, Deletion(entry_name(point.step, point.run), reason)))
    for point, why in lineage.left_out.items():
        if point.run < run and why.superseded:
            reason = f"it is not in the history: {why.reason}"
            doomed.append((point, Deletion(entry_name(point.step, point.run), reason)))
    for one in unfinished:
        point = Point(one.run, one.step)
        if point < own:
            reason = "this run has given it up" if one.run == run else f"run {one.run} did not finish it"
            name = aside_name(*one) if isinstance(one, Aside) else entry_name(*one)
            doomed.append((point, Deletion(name, reason)))
    return [deletion for _, deletion in sorted(doomed) if deletion.name not in busy]
