"""The batch sampler of a `DataLoader`: yields this rank's share of each global batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ringps.data.assignment import Permutation, batch_positions, share, steps_per_epoch


class BatchShare(NamedTuple):
    """What the sampler yielded: this rank's part of a global batch."""

    epoch: int
    step: int
    """Number of the global batch in its epoch, from 0."""
    local_samples: int
    total_samples: int


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
        self._length = steps_per_epoch(dataset_len, global_batch_size, drop_last=drop_last)
        self._epoch = 0
        self._next = 0
        self._tracked = False
        self._pending: deque[BatchShare] = deque()
        if self._length == 0:
            raise ValueError(
                f"{dataset_len} samples do not fill one global batch of {global_batch_size}; "
                "lower global_batch_size or do not set drop_last"
            )
        self._check(place()[1])

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._epoch

    @property
    def step(self) -> int:
        """The number of the next batch in its epoch, from 0."""
        return self._next

    def __len__(self) -> int:
        """Global batches in an epoch."""
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        self._pending = deque()
        return self._batches(self._epoch, self._next, self._pending)

    def set_epoch(self, epoch: int) -> None:
        """Start at the beginning of `epoch` next; keeps the position if `epoch` is current already."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, not {epoch}")
        if epoch != self._epoch:
            self._epoch, self._next = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """The position, and what gives it a meaning; the same on every rank and for any world size."""
        return {"epoch": self._epoch, "step": self._next, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; takes effect when the next iteration begins.

        Raises:
            ValueError: the state is of another dataset length, batch size, seed or order.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(
                    f"the sampler's state was saved with {name}={state[name]!r}, but it is {value!r} now; "
                    "construct the sampler with the saved value, or start the epoch anew with set_epoch()"
                )
        if not 0 <= state["step"] < self._length or state["epoch"] < 0:
            raise ValueError(f"no step {state['step']} in epoch {state['epoch']} of {self._length} steps")
        self._epoch, self._next = state["epoch"], state["step"]

    def track(self) -> None:
        """Keep what is yielded until `take` fetches it; the position is that of `take` from now on."""
        self._tracked = True

    def take(self) -> BatchShare | None:
        """The oldest share that has not been taken yet, or None; its batch counts as trained."""
        if not self._pending:
            return None
        taken = self._pending.popleft()
        self._trained(taken.epoch, taken.step)
        return taken

    def _batches(self, epoch: int, first: int, pending: deque[BatchShare]) -> Iterator[list[int]]:
        order: Sequence[int] | Permutation = range(self.dataset_len)
        if self.shuffle:
            order = Permutation(self.seed, epoch, self.dataset_len)
        for step in range(first, self._length):
            rank, world_size = self._place()
            self._check(world_size)
            batch = batch_positions(step, self.dataset_len, self.global_batch_size)
            own = share(batch, rank, world_size)
            if self._tracked:
                pending.append(BatchShare(epoch, step, len(own), len(batch)))
            elif pending is self._pending:
                self._trained(epoch, step)
            yield [order[position] for position in own]

    def _trained(self, epoch: int, step: int) -> None:
        self._epoch, self._next = (epoch, step + 1) if step + 1 < self._length else (epoch + 1, 0)

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
