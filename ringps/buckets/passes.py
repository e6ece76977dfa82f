"""One reduction of all buckets, from the first gradient to its commit.

In an elastic ring it is committed by all ranks or by none. When a member is lost meanwhile, all buckets are
reduced again among those that are left: their inputs are kept until the next pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from ringps import probe
from ringps.buckets.flat import FlatBucket
from ringps.buckets.ring import PendingReduction, ReductionRing
from ringps.errors import PeerLostError, RingChangedError, RingpsError
from ringps.kernels.digest import EMPTY, Digest, combine
from ringps.ring.commit import Ballot


class SampleBook(Protocol):
    """Which samples of a global batch each rank trained; how much its gradients count follows from that."""

    NO_ENTRY: tuple[int, ...]
    """Stands for a batch that a rank does not have."""

    def next(self) -> float:
        """This rank's weight in the sum for the backward that begins; the ranks' weights add up to 1."""

    def entries(self, *, excluded: bool) -> list[tuple[int, ...]]:
        """For each batch since the last pass: what `book` needs of this rank, as many numbers as `NO_ENTRY`
        has. The last is the samples that this rank trained of the batch: none if it is `excluded`."""

    def total_samples(self) -> int:
        """Samples of these batches, over all ranks."""

    def book(self, entries: Sequence[Sequence[Sequence[int]]], rank: int) -> None:
        """The pass is committed: `entries[rank]` of all that took part; `rank` is this one."""


class CommitListener(Protocol):
    """What else belongs to the commit of a pass."""

    def parameters(self, step: int) -> bytes:
        """A hash of the parameters if they are to be compared in this step, else `EMPTY`."""

    def heal(self, right: int, wrong: tuple[int, ...]) -> None:
        """Give the ranks in `wrong` what rank `right` has. Collective."""

    def committed(self, step: int, outcome: Any) -> None:
        """A pass of this step is committed."""


class Terms(NamedTuple):
    """What holds for all buckets of a pass."""

    step: int
    label: str
    """Names the pass in messages; the same on all ranks."""

    weight: float | None
    """What gradients are multiplied by before they are added up; None: the ring takes the mean."""

    late: bool
    """This rank had no backward."""

    batches: int
    """Batches that a rank has in a pass, at least."""

    compares: bool
    """Whether parameters may be compared at its end."""


class Pass:
    """A reduction of all buckets.

    `close` hands over the next bucket, as soon as it has all its gradients; `commit` hands over the rest,
    waits for the results, and returns when all ranks have the same.
    """

    def __init__(
        self,
        ring: ReductionRing,
        buckets: Sequence[FlatBucket],
        terms: Terms,
        samples: SampleBook | None,
        listener: CommitListener | None,
    ) -> None:
        """
        Args:
            ring: the ranks.
            buckets: in the order in which all ranks hand them over; empty from here on.
            terms: see there.
            samples: which samples the ranks train. None: every rank has the same weight.
            listener: takes part in the commit.
        """
        self._ring = ring
        self._buckets = buckets
        self._terms = terms
        self._samples = samples
        self._listener = listener
        self.closed = 0
        """Buckets whose inputs are complete."""
        self.account: list[list[list[int]]] = []
        """What the ranks contributed, by rank and batch; empty where that need not be known."""
        self.account_rank = 0
        """This rank in `account`."""
        self._asked: tuple[PendingReduction, torch.Tensor, int] | None = None
        self._handed: list[PendingReduction] = []
        self._digests = [EMPTY] * len(buckets)
        self._broken: PeerLostError | RingChangedError | None = None
        """Why the rest of the buckets waits for another generation."""
        self._attempt = 0
        self._healed = self._blank = False
        """The parameters of some ranks were wrong, so that these contribute nothing; this rank is one."""
        for bucket in buckets:
            bucket.reset()
        self._tell()

    def close(self) -> None:
        """The next bucket has all its gradients, or gets zeros for those that are missing: hand it over."""
        self._buckets[self.closed].close(self._terms.weight, self._terms.late)
        self.closed += 1
        if self._broken is not None:
            return
        try:
            self._launch()
        except (PeerLostError, RingChangedError) as error:
            # The inputs are all that counts from here on, until the pass is done again.
            self._broken = error

    def commit(self, busy_us: int) -> Any:
        """Return when all buckets are reduced, the same on all ranks; what `transact` returns.

        Args:
            busy_us: time that this rank needed for its own part of the step.

        Raises:
            RingpsError: what collectives raise.
        """
        while self.closed < len(self._buckets):
            self.close()
        outcome = self._ring.transact(self._reduce, partial(self._ballot, busy_us), self._heal)
        self._rescale()
        if probe.listener is not None:
            probe.reached("committed", step=self._terms.step, account=self.account)
        return outcome

    def abandon(self) -> None:
        """Wait until nothing writes to the outputs any more: what was handed over ends or fails.

        Raises:
            RingpsError: in a fixed ring, what collectives raise.
        """
        while self._handed:
            try:
                self._handed.pop(0).wait()
            except RingpsError:
                if not self._ring.elastic:
                    raise

    def _launch(self) -> None:
        number, terms = len(self._handed), self._terms
        if probe.listener is not None:
            probe.reached("bucket", step=terms.step, bucket=number, attempt=self._attempt)
        op = "mean" if terms.weight is None else "sum"
        bucket, label = self._buckets[number], f"{terms.label}, bucket {number}"
        if not self._ring.elastic:
            self._handed.append(bucket.launch(op, label, None, None))
            return
        if number == 0:
            self._ask_for_account()
        hashed = Digest()
        # Whoever listens may change the result before it is hashed.
        fed = hashed if probe.listener is None else None
        self._handed.append(bucket.launch(op, label, partial(self._arrived, number, hashed), fed))

    def _arrived(self, number: int, hashed: Digest) -> None:
        """A bucket's result is there; on the thread that reduced it."""
        output = self._buckets[number].output
        if probe.listener is not None:
            step = self._terms.step
            probe.reached("reduced", step=step, bucket=number, tensor=output, attempt=self._attempt)
        if not hashed.fed:
            hashed.add(output)
        self._digests[number] = hashed.value()

    def _tell(self) -> None:
        if probe.listener is not None:
            parameters = [one for bucket in self._buckets for one in bucket.parameters]
            probe.reached("step", step=self._terms.step, attempt=self._attempt, parameters=parameters)

    def _reduce(self, before: int) -> bytes:
        """An attempt at the pass; returns a hash of its result."""
        if before:
            self._attempt, self._broken = before, None
            self._tell()
            self.abandon()
            while len(self._handed) < len(self._buckets):
                self._launch()
        if self._broken is not None:
            raise self._broken
        for handle in self._handed:
            handle.wait()
        if not self._ring.elastic:
            return EMPTY
        return combine([*self._digests, self._read_account()])

    def _ask_for_account(self) -> None:
        """Begin to learn what the ranks contribute to this attempt, before the buckets."""
        self._asked = None
        if self._samples is not None:
            known = self._samples.entries(excluded=self._blank)
            # A rank that had no backward knows of one batch only.
            missing = self._terms.batches - len(known)
            entries = torch.tensor([*known, *[self._samples.NO_ENTRY] * missing], dtype=torch.int64)
        elif self._healed or self._ring.fresh:
            # The latter as healing may have ended on some ranks only, when it was interrupted.
            entries = torch.tensor([[0 if self._blank else 1]])
        else:
            return
        everyones = torch.empty((self._ring.world_size, *entries.shape), dtype=torch.int64)
        pending = self._ring.raw.all_gather(everyones, entries, async_op=True)
        self._asked = pending, everyones, self._ring.rank

    def _read_account(self) -> bytes:
        """What the ranks contributed to this attempt, as bytes."""
        if self._asked is None:
            self.account = []
            return EMPTY
        pending, everyones, self.account_rank = self._asked
        pending.wait()
        self.account = everyones.tolist()
        return everyones.numpy().tobytes()

    def _rescale(self) -> None:
        """Where ranks did not contribute, let the sum be the mean over those that did."""
        if not self.account:
            return
        wanted = len(self.account) if self._samples is None else self._samples.total_samples()
        found = sum(entry[-1] for entries in self.account for entry in entries)
        if found not in (0, wanted):
            for bucket in self._buckets:
                bucket.output.mul_(wanted / found)

    def _ballot(self, busy_us: int) -> Ballot:
        parameters = EMPTY
        if self._listener is not None and self._terms.compares:
            parameters = self._listener.parameters(self._terms.step)
        return Ballot(step=self._terms.step, parameters=parameters, busy_us=busy_us, boundary=True)

    def _heal(self, right: int, wrong: tuple[int, ...]) -> None:
        """The parameters of `wrong` are not the others': repair them, and leave their gradients out."""
        assert self._listener is not None
        # First of all, for healing may be interrupted when the parameters are right already.
        self._healed = True
        if self._ring.rank in wrong:
            self._blank = True
            for bucket in self._buckets:
                bucket.blank()
        self._listener.heal(right, wrong)
