"""How much a rank's gradient counts: by its samples, batch after batch."""

from __future__ import annotations

from collections.abc import Iterator

from ringps.data import ElasticBatchSampler


class SampleWeights:
    """This rank's part of the global batch that a backward pass belongs to."""

    def __init__(self, sampler: ElasticBatchSampler) -> None:
        sampler.track()
        self._sampler = sampler
        self._recorded: list[float] | None = None
        self._replay: Iterator[float] = iter(())

    def next(self) -> float:
        """The weight for the backward that begins.

        Raises:
            RuntimeError: the sampler has yielded no batch that it could belong to.
        """
        for weight in self._replay:
            return weight
        taken = self._sampler.take()
        if taken is None:
            raise RuntimeError(
                "backward() was called more often than the sampler yielded batches; with sampler= each "
                "batch has one backward (sum the losses), and every batch must come from that sampler"
            )
        weight = taken.local_samples / taken.total_samples
        if self._recorded is not None:
            self._recorded.append(weight)
        return weight

    def skip(self) -> None:
        """The current batch had no backward."""
        self._sampler.take()

    def start_evaluation(self) -> None:
        """A closure is about to be called: again, it evaluates the batches of the first time."""
        self._recorded = [] if self._recorded is None else self._recorded
        self._replay = iter(tuple(self._recorded))

    def end_evaluations(self) -> None:
        """The step that called the closure has ended."""
        self._recorded, self._replay = None, iter(())
