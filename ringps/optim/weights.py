"""How much a rank's gradient counts: by its samples, batch after batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ringps.data import NO_SHARE, BatchShare, ElasticBatchSampler


class SampleWeights:
    """This rank's part of the global batch that a backward pass belongs to; a `buckets.SampleBook`."""

    NO_ENTRY: tuple[int, ...] = (*NO_SHARE, 0)

    def __init__(self, sampler: ElasticBatchSampler, *, elastic: bool) -> None:
        """
        Args:
            sampler: yields the batches.
            elastic: ranks may be lost, so that it takes every step's account to know what was trained.
        """
        sampler.track(accounts=elastic)
        self._sampler = sampler
        self._current: list[BatchShare] = []
        """The batches of this pass."""
        self._recorded: list[BatchShare] | None = None
        self._replay: Iterator[BatchShare] = iter(())

    def next(self) -> float:
        """The weight for the backward that begins.

        Raises:
            RuntimeError: the sampler has yielded no batch that it could belong to.
        """
        taken = next(self._replay, None)
        if taken is None:
            taken = self._sampler.take()
            if taken is None:
                raise RuntimeError(
                    "backward() was called more often than the sampler yielded batches; with sampler= each "
                    "batch has one backward (sum the losses), and every batch must come from that sampler"
                )
            if self._recorded is not None:
                self._recorded.append(taken)
        self._current.append(taken)
        return taken.local_samples / taken.total_samples

    def skip(self) -> None:
        """The current batch had no backward."""
        taken = self._sampler.take()
        if taken is not None:
            self._current.append(taken)

    def entries(self, *, excluded: bool) -> list[tuple[int, ...]]:
        """See `buckets.SampleBook`. A batch that a closure evaluates again is in the account once."""
        trained = {(share.epoch, share.step): share.local_samples for share in self._current}
        found: list[tuple[int, ...]] = []
        for row in self._sampler.rows():  # also batches that were skipped
            samples = trained.pop((row.epoch, row.step), 0)
            found.append((*row._replace(stop=row.start), 0) if excluded else (*row, samples))
        found += [(*NO_SHARE, 0 if excluded else samples) for samples in trained.values()]
        return found

    def total_samples(self) -> int:
        """Samples of this pass, over all ranks."""
        return sum(share.total_samples for share in self._current)

    def book(self, entries: Sequence[Sequence[Sequence[int]]], rank: int) -> None:
        """See `buckets.SampleBook`."""
        for batch in zip(*entries, strict=True):
            self._sampler.committed([entry[:-1] for entry in batch], rank)
        self._current = []

    def start_evaluation(self) -> None:
        """A closure is about to be called: again, it evaluates the batches of the first time."""
        self._recorded = [] if self._recorded is None else self._recorded
        self._replay = iter(tuple(self._recorded))

    def end_evaluations(self) -> None:
        """The step that called the closure has ended."""
        self._recorded, self._replay = None, iter(())
