"""PURE: which samples of an epoch have been trained, which are owed, and what each step trains next.

An epoch's samples are known by their positions in its order. Step k of the full global batches is
`batch_positions(k)`, whatever happens. After them comes the make-up: first the epoch's tail, then what
is owed (positions of a committed step that no rank covered), in the order in which it came up, cut into
global batches. What make-up steps leave uncovered is queued again, and the epoch ends when the queue is
empty. So every position is trained exactly once, and only the last make-up batch is small.

Ranks draw batches before the steps ahead of them have committed. What one of them may have drawn must
not change any more, or two ranks would train different batches in one step. So every row of an account
says where its rank's drawing has come to, and what is owed goes behind the furthest of these marks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Position = tuple[int, int]
"""(epoch, step): a global batch."""

NEW_ITERATOR = (
    "iterate with ringps.TrainState.steps, or make a new iterator over the loader when ringps.generation() "
    "changes or sampler.stale is true"
)


class Piece(NamedTuple):
    """Adjacent positions of an epoch's order."""

    epoch: int
    start: int
    stop: int


class Row(NamedTuple):
    """One rank's entry in the account of a step: six int64, so that `Row(*numbers)` reads it back."""

    epoch: int
    step: int
    start: int
    """The rank trained samples `start` to `stop` - 1 of the global batch, counted from its beginning;
    nothing if they are equal."""
    stop: int
    until_epoch: int
    """The first global batch that the rank has not drawn, or will draw anew; its epoch..."""
    until_step: int
    """...and its step."""


NO_SHARE = Row(-1, -1, 0, 0, -1, -1)
"""The entry of a rank that had no batch."""


class Ledger:
    """The position in the data, and what of the past is still owed. The same on every rank."""

    def __init__(self, dataset_len: int, global_batch_size: int, *, drop_last: bool) -> None:
        self._size = global_batch_size
        self._full = dataset_len // global_batch_size
        self._samples = self._full * global_batch_size if drop_last else dataset_len
        self.epoch = 0
        self.step = 0
        self.trained_samples = 0
        """In this epoch."""
        self._make_up: deque[list[Piece]] = deque()
        """The global batches after the full ones: the tail's, and of what is owed."""
        self._carried: list[Piece] = []
        """Owed to the next epoch's make-up."""
        self._begin(0, (), (0, 0))

    @property
    def planned_steps(self) -> int:
        """Global batches in an epoch of which no sample is lost."""
        return self._full + (self._tail_samples > 0)

    @property
    def position(self) -> Position:
        """The next global batch to be trained."""
        return self.epoch, self.step

    @property
    def owed_samples(self) -> int:
        """Samples of committed steps that are still to be trained."""
        queued = sum(map(count, self._make_up)) + count(self._carried)
        return queued - (self._tail_samples if self.step <= self._full else 0)

    def batch(self, epoch: int, step: int) -> tuple[Piece, ...]:
        """What makes up a global batch that has not been trained; empty beyond the end of the epoch.

        Another epoch than the current one is seen as if nothing were ever lost.
        """
        if step < self._full:
            return (Piece(epoch, step * self._size, (step + 1) * self._size),)
        queue, first = self._make_up, max(self.step, self._full)
        if epoch != self.epoch:
            queue, first = self._tail(epoch), self._full
        return tuple(queue[step - first]) if first <= step < first + len(queue) else ()

    def commit(self, rows: Sequence[Row]) -> None:
        """Book a committed step by what the ranks say about it; costs O(world size) if all is covered.

        Raises:
            ValueError: the rows do not speak of one step, or of samples outside of it.
            RuntimeError: samples would be trained twice, or left out. Nothing was booked.
        """
        by_step: dict[Position, list[int]] = {}
        for rank, row in enumerate(rows):
            if row.epoch >= 0:
                by_step.setdefault((row.epoch, row.step), []).append(rank)
        if not by_step:
            return
        if len(by_step) > 1:
            what = "; ".join(f"epoch {e} step {s} by ranks {ranks}" for (e, s), ranks in by_step.items())
            raise ValueError(
                f"ranks trained different global batches in one step: {what}; every rank must have one "
                "backward for each batch, and call sampler.take() for one that all skip"
            )
        (position,) = by_step
        if position != self.position:
            found, expected = (f"step {step} of epoch {epoch}" for epoch, step in (position, self.position))
            told = "was trained already" if position < self.position else "came too early"
            raise RuntimeError(f"{found} {told}: {expected} is next; {NEW_ITERATOR}")
        batch = self.batch(*position)
        gaps = _gaps(rows, count(batch))
        owed = [piece for start, stop in gaps for piece in cut(batch, start, stop)]
        self._advance(owed, max((row.until_epoch, row.until_step) for row in rows))

    def trained(self, epoch: int, step: int) -> None:
        """Book a step of which nothing was lost; if it is not the next one, the position jumps there."""
        if (epoch, step) == self.position:
            self._advance([], (epoch, step + 1))
        else:
            self._jump(epoch, step + 1)

    def move(self, epoch: int) -> None:
        """Go to the beginning of an epoch. What is owed goes along if all planned steps are trained."""
        owed: list[Piece] = []
        if self.step >= self.planned_steps:
            owed = [piece for batch in self._make_up for piece in batch] + self._carried
        self._carried = []
        self._begin(epoch, owed, (epoch, 0))

    def state(self) -> dict[str, Any]:
        """The position and what is owed, as plain values."""
        make_up = [[list(piece) for piece in batch] for batch in self._make_up]
        if make_up and self._tail_ahead:
            # The tail goes without saying.
            del make_up[0][0]
            if make_up == [[]]:
                make_up = []
        return {
            "epoch": self.epoch,
            "step": self.step,
            "trained_samples": self.trained_samples,
            "owed": make_up,
            "carried": [list(piece) for piece in self._carried],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; a state of a position alone owes nothing.

        Raises:
            ValueError: there is no such position, or what is owed makes no sense.
        """
        epoch, step = state["epoch"], state["step"]
        if epoch < 0 or step < 0:
            raise ValueError(f"no step {step} in epoch {epoch}")
        owed = [[Piece(*piece) for piece in batch] for batch in state.get("owed", ())]
        carried = [Piece(*piece) for piece in state.get("carried", ())]
        if step <= self._full:
            for tail in self._tail(epoch):
                owed = [tail + owed[0], *owed[1:]] if owed else [tail]
        for piece in (piece for batch in [*owed, carried] for piece in batch):
            if piece.epoch < 0 or not 0 <= piece.start < piece.stop <= self._samples:
                raise ValueError(f"no positions {piece.start} to {piece.stop} among {self._samples} samples")
        if any(not 0 < count(batch) <= self._size for batch in owed):
            raise ValueError(f"the samples owed are not cut into global batches of {self._size}")
        end = max(step, self._full) + len(owed)
        if step >= end:
            raise ValueError(f"no step {step} in epoch {epoch} of {end} steps")
        self.epoch, self.step = epoch, step
        self.trained_samples = state.get("trained_samples", min(step * self._size, self._samples))
        self._make_up, self._carried = deque(owed), carried

    @property
    def _tail_samples(self) -> int:
        return self._samples - self._full * self._size

    @property
    def _tail_ahead(self) -> bool:
        return self._tail_samples > 0 and self.step <= self._full

    def _tail(self, epoch: int) -> deque[list[Piece]]:
        start = self._full * self._size
        return deque([[Piece(epoch, start, self._samples)]] if start < self._samples else [])

    def _begin(self, epoch: int, owed: Iterable[Piece], until: Position) -> None:
        self.epoch, self.step, self.trained_samples = epoch, 0, 0
        self._make_up = self._tail(epoch)
        self._queue(owed, until)

    def _jump(self, epoch: int, step: int) -> None:
        if step >= self.planned_steps:
            epoch, step = epoch + 1, 0
        self._carried = []
        self._begin(epoch, (), (epoch, 0))
        self.step, self.trained_samples = step, step * self._size

    def _advance(self, owed: list[Piece], until: Position) -> None:
        self.trained_samples += count(self.batch(*self.position)) - count(owed)
        if self.step >= self._full:
            self._make_up.popleft()
        self.step += 1
        self._queue(owed, until)
        if self.step >= self._full and not self._make_up:
            carried, self._carried = self._carried, []
            self._begin(self.epoch + 1, carried, until)

    def _queue(self, owed: Iterable[Piece], until: Position) -> None:
        """Put what is owed behind all that a rank may have drawn."""
        if until[0] > self.epoch:
            # A rank has begun the next epoch, in whose make-up this comes then.
            self._carried += owed
            return
        last = max(self.step, self._full) + len(self._make_up) - 1
        room = 0
        if self._make_up and (self.epoch, last) >= until:
            room = self._size - count(self._make_up[-1])
        for epoch, begin, stop in owed:
            start = begin
            while start < stop:
                if not room:
                    self._make_up.append([])
                    room = self._size
                taken = min(room, stop - start)
                self._make_up[-1].append(Piece(epoch, start, start + taken))
                start, room = start + taken, room - taken


def count(pieces: Iterable[Piece]) -> int:
    """Number of samples."""
    return sum(piece.stop - piece.start for piece in pieces)


def cut(pieces: Iterable[Piece], start: int, stop: int) -> list[Piece]:
    """Samples `start` to `stop` - 1 of a batch."""
    found, before = [], 0
    for epoch, first, end in pieces:
        low, high = max(first, first + start - before), min(end, first + stop - before)
        if low < high:
            found.append(Piece(epoch, low, high))
        before += end - first
    return found


def _gaps(rows: Sequence[Row], total: int) -> list[tuple[int, int]]:
    """The parts of a batch that no row covers."""
    gaps, covered, last = [], 0, -1
    order = sorted((row.start, row.stop, rank) for rank, row in enumerate(rows) if row.stop != row.start)
    for start, stop, rank in order:
        if not 0 <= start < stop <= total:
            raise ValueError(f"rank {rank} accounts for samples {start} to {stop} of a batch of {total}")
        if start < covered:
            raise RuntimeError(
                f"ranks {last} and {rank} both trained samples {start} to {min(covered, stop)} of step "
                f"{rows[rank].step} of epoch {rows[rank].epoch}: they divided the batch among different "
                f"numbers of ranks; {NEW_ITERATOR}"
            )
        if start > covered:
            gaps.append((covered, start))
        covered, last = stop, rank
    if covered < total:
        gaps.append((covered, total))
    return gaps
