"""The batch sampler of a `DataLoader`: yields this rank's share of each global batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ringps.data.assignment import Permutation, share
from ringps.data.division import Division
from ringps.data.ledger import NEW_ITERATOR, Ledger, Position, Row, count, cut


class BatchShare(NamedTuple):
    """What the sampler yielded: this rank's part of a global batch."""

    epoch: int
    step: int
    """Number of the global batch in its epoch, from 0."""
    start: int
    """Where the part begins in the global batch."""
    local_samples: int
    """0 for padding: the batch has one sample, which does not count, for there are fewer than ranks."""
    total_samples: int

    def row(self, until: Position) -> Row:
        """The share as an entry of an account; `until`: the first global batch not drawn for good."""
        return Row(self.epoch, self.step, self.start, self.start + self.local_samples, *until)


@dataclass(frozen=True, kw_only=True)
class SamplerStatistics:
    """Where the data is, and what of it came out of the ordinary."""

    epoch: int
    step: int
    """The next batch to be trained, from 0."""
    trained_samples: int
    """In this epoch, over all ranks; all before `step` if it was not entered at its beginning."""
    owed_samples: int
    """Of steps that went by without them, because a rank was lost; they are trained at the epoch's end."""
    padded_shares: int
    """Batches of this rank, since construction, of one sample that does not count."""


class ElasticBatchSampler:
    """Shares of global batches, for `DataLoader(dataset, batch_sampler=...)`.

    The samples of a global batch depend on (seed, epoch, step) only, never on the number of ranks;
    ranks take contiguous shares that differ by at most one sample. Iterating goes from the current
    position to the end of the epoch; then the next epoch is current. Loader workers and prefetching
    are fine: batches are drawn in the process that iterates over the loader.

    The position is that of the next batch to be *trained* once a `DistributedOptimizer` was given
    this sampler, however far a loader has read ahead; else that of the next batch to be yielded. So
    after a `break` the next iteration goes on with the batch that follows; `set_epoch` moves on.
    With an optimizer, each batch must have one backward pass; call `take()` for one that you skip.

    *In a ring that changes*, what a lost rank did not contribute to a committed step is owed. The
    epoch's tail and what is owed are put together at its end and cut into global batches (the last
    may be smaller), so that an epoch may have more than `len(sampler)` steps. What was lost after a
    loader had read ahead to the end of the epoch comes with the next iteration, so count epochs by
    `sampler.epoch`. A batch with fewer samples than ranks gives some ranks one sample that does not
    count, and so does every batch until a new rank is counted in. Batches that were drawn before the
    ring changed are trained as they were drawn; see `redraws`.
    """

    def __init__(
        self,
        dataset_len: int,
        global_batch_size: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        place: Callable[[], tuple[int, int]],
    ) -> None:
        """
        Args:
            dataset_len: number of samples in the dataset.
            global_batch_size: samples of a step, over all ranks.
            seed: any integer, the same on every rank.
            shuffle: draw the epoch's samples in a random order instead of in the dataset's.
            drop_last: leave out the samples at the end that do not fill a global batch.
            place: gives (rank, world_size); asked for every batch.

        Raises:
            ValueError: a batch would leave a rank without samples, or an epoch has no batches.
        """
        if dataset_len < 1 or global_batch_size < 1:
            raise ValueError(
                f"dataset_len ({dataset_len}) and global_batch_size ({global_batch_size}) must be at least 1"
            )
        self.dataset_len = dataset_len
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._place = place
        self.redraws = False
        """Whoever iterates makes a new iterator when `stale` is true after a step. Then a change of the
        ring concerns one step only, instead of all that were drawn ahead. Each rank's own choice."""
        self._ledger = Ledger(dataset_len, global_batch_size, drop_last=drop_last)
        self._tracked = False
        self._accounts = False
        self._division: Division | None = None
        self._padded = 0
        self._pending: deque[BatchShare] = deque()
        """Drawn and not taken."""
        self._taken: deque[BatchShare] = deque()
        """Taken and not committed, where accounts tell."""
        if len(self) == 0:
            raise ValueError(
                f"{dataset_len} samples do not fill one global batch of {global_batch_size}; "
                "lower global_batch_size or do not set drop_last"
            )
        self._check(place()[1])

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._ledger.epoch

    @property
    def step(self) -> int:
        """The number of the next batch in its epoch, from 0."""
        return self._ledger.step

    @property
    def stale(self) -> bool:
        """Whether batches that were drawn ahead are not what would be drawn now."""
        return any(ahead != self._share(ahead.epoch, ahead.step) for ahead in self._pending)

    def __len__(self) -> int:
        """Global batches in an epoch, unless samples are lost on the way."""
        return self._ledger.planned_steps

    def __iter__(self) -> Iterator[list[int]]:
        self._pending = deque()
        return self._batches(*self._first(), self._pending)

    def set_epoch(self, epoch: int) -> None:
        """Start at the beginning of `epoch` next; keeps the position if `epoch` is current already.

        What is owed when all `len(sampler)` steps have been trained is trained at the end of `epoch`;
        an epoch that is left before is given up as a whole.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, not {epoch}")
        if epoch != self.epoch:
            self._ledger.move(epoch)
            self._taken.clear()
            if self._division is not None:
                self._division.settle()

    def state_dict(self) -> dict[str, Any]:
        """The position, what is owed, and what gives them a meaning: numbers, booleans and lists.

        The same on every rank and for any world size.
        """
        return {**self._ledger.state(), **self._identity()}

    def load_state_dict(self, state: dict[str, Any], *, joining: bool = False) -> None:
        """Continue from a position; takes effect when the next iteration begins.

        Args:
            state: of `state_dict`, from this or any other rank.
            joining: other ranks have this position already and go on from it. This rank has no share
                of their batches until it was part of a committed step. Else all ranks load the state.

        Raises:
            ValueError: the state is of another dataset length, batch size, seed or order.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(
                    f"the sampler's state was saved with {name}={state[name]!r}, but it is {value!r} now; "
                    "construct the sampler with the saved value, or start the epoch anew with set_epoch()"
                )
        self._ledger.load(state)
        self._taken.clear()
        if joining:
            self._division = Division(None, 1)
        elif self._division is not None:
            self._division = Division(*self._place())

    def track(self, accounts: bool = False) -> None:
        """Keep what is yielded until `take` fetches it; the position is that of `take` from now on.

        Args:
            accounts: the position is that of `committed` instead, which must be told of every step on
                every rank. Batches are divided among the ranks of this moment until a committed step
                had others. Once set, it stays.
        """
        self._tracked = True
        if accounts and not self._accounts:
            self._accounts = True
            if self._division is None:
                self._division = Division(*self._place())

    @property
    def tracked(self) -> bool:
        """Whether somebody takes what is yielded, so that the position is that of what was trained."""
        return self._tracked

    def take(self) -> BatchShare | None:
        """The oldest share that has not been taken yet, or None; its batch counts as trained.

        With accounts it counts when the step has committed with it, also if it had no backward.

        Raises:
            RuntimeError: the share was drawn for other ranks, or before samples were lost, and others
                may train the same samples; says what to do.
        """
        if not self._pending:
            return None
        taken = self._pending[0]
        if self._accounts:
            now = self._share(taken.epoch, taken.step)
            if taken != now:
                raise RuntimeError(
                    f"the batch of step {taken.step} of epoch {taken.epoch} was drawn before the ring "
                    f"changed: it is {_words(taken)}, and would be {_words(now)} now; {NEW_ITERATOR}"
                )
            self._taken.append(taken)
        else:
            self._ledger.trained(taken.epoch, taken.step)
        self._pending.popleft()
        return taken

    def rows(self) -> list[Row]:
        """This rank's entries for the accounts of the steps that it has taken and not yet committed,
        oldest first: one for each `take`. Ask when the pass has ended, for they tell how far is drawn."""
        if not self._taken:
            return []
        last = self._taken[-1] if self.redraws or not self._pending else self._pending[-1]
        return [taken.row((last.epoch, last.step + 1)) for taken in self._taken]

    def committed(self, rows: Sequence[Sequence[int]], rank: int) -> None:
        """A step has committed: book what it has trained. The same on every rank; in the order of steps.

        Args:
            rows: every rank's `Row` for this step, in the order of the ranks that reduced it;
                `NO_SHARE` for one that had no batch.
            rank: which of them is this rank's.

        Raises:
            ValueError: the rows do not speak of one global batch.
            RuntimeError: samples would be trained twice, or left out; says what to do.
        """
        if self._division is None or not self._accounts:
            raise RuntimeError("the sampler keeps no accounts; call track(accounts=True) before iterating")
        account = [Row(*row) for row in rows]
        self._ledger.commit(account)
        own = account[rank]
        if self._taken and (own.epoch, own.step) == self._taken[0][:2]:
            self._taken.popleft()
        until = max((row.until_epoch, row.until_step) for row in account)
        if until[0] >= 0:
            self._division.change(rank, len(account), since=until, trained=self._ledger.position)

    def divide(self, rank: int, world_size: int) -> None:
        """All ranks are between the same two steps: divide the batches from the next one on among these.

        What was drawn ahead is void; make a new iterator. Does nothing without accounts.
        """
        if self._division is not None:
            self._division = Division(rank, world_size)

    def statistics(self) -> SamplerStatistics:
        """Where the data is; see `SamplerStatistics`."""
        return SamplerStatistics(
            epoch=self.epoch,
            step=self.step,
            trained_samples=self._ledger.trained_samples,
            owed_samples=self._ledger.owed_samples,
            padded_shares=self._padded,
        )

    def _batches(self, epoch: int, first: int, pending: deque[BatchShare]) -> Iterator[list[int]]:
        orders: dict[int, Sequence[int] | Permutation] = {}
        step = first
        while (own := self._share(epoch, step)) is not None:
            batch = self._ledger.batch(epoch, step)
            start, stop = own.start, own.start + own.local_samples
            if start == stop:
                self._padded += 1
                start = min(start, own.total_samples - 1)
                stop = start + 1
            samples = []
            for piece in cut(batch, start, stop):
                if piece.epoch not in orders:
                    orders[piece.epoch] = self._order(piece.epoch)
                samples += [orders[piece.epoch][position] for position in range(piece.start, piece.stop)]
            if self._tracked:
                pending.append(own)
            elif pending is self._pending:
                self._ledger.trained(epoch, step)
            yield samples
            step += 1

    def _order(self, epoch: int) -> Sequence[int] | Permutation:
        return Permutation(self.seed, epoch, self.dataset_len) if self.shuffle else range(self.dataset_len)

    def _share(self, epoch: int, step: int) -> BatchShare | None:
        """This rank's share of a batch as things are; None beyond the end of the epoch."""
        total = count(self._ledger.batch(epoch, step))
        if not total:
            return None
        rank, world_size = self._place() if self._division is None else self._division.at((epoch, step))
        own = range(0) if rank is None else share(range(total), rank, world_size)
        return BatchShare(epoch, step, own.start, len(own), total)

    def _first(self) -> Position:
        """The first batch that has not been taken."""
        if not self._taken:
            return self._ledger.position
        epoch, step = self._taken[-1].epoch, self._taken[-1].step + 1
        return (epoch, step) if self._ledger.batch(epoch, step) else (epoch + 1, 0)

    def _identity(self) -> dict[str, Any]:
        return {
            name: getattr(self, name)
            for name in ("dataset_len", "global_batch_size", "seed", "shuffle", "drop_last")
        }

    def _check(self, world_size: int) -> None:
        if self.global_batch_size < world_size:
            raise ValueError(
                f"a global batch of {self.global_batch_size} leaves some of {world_size} ranks without "
                "samples; raise global_batch_size or start fewer workers"
            )
        tail = 0 if self.drop_last else self.dataset_len % self.global_batch_size
        if 0 < tail < world_size:
            raise ValueError(
                f"the last of {self.dataset_len} samples make a global batch of {tail}, which leaves some of "
                f"{world_size} ranks without samples; set drop_last=True or change global_batch_size"
            )


def _words(share: BatchShare | None) -> str:
    if share is None:
        return "no batch"
    stop = share.start + share.local_samples
    return f"samples {share.start} to {stop} of {share.total_samples}"
