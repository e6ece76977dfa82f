"""Collectives that outlive members: each is committed by all ranks or by none (see `ring.commit`).

An `ElasticCommunicator` is the `Communicator` of whichever generation is current. What it carries out goes
through `transact`: it keeps what it needs to do it again, has all ranks vote at the end, and goes on to the
next generation when a member is lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, overload

import torch

from ringps import probe
from ringps.collectives.backend import Backend
from ringps.collectives.communicator import Communicator, Outcome
from ringps.collectives.handle import Handle
from ringps.config import Recovery
from ringps.errors import (
    CollectiveError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    DivergedError,
    PeerLostError,
    RingChangedError,
    RingpsError,
)
from ringps.kernels.digest import combine, digest
from ringps.ring.commit import (
    NOTHING,
    STATUS_BYTES,
    VOTE_BYTES,
    Ballot,
    Finding,
    Status,
    Step,
    Vote,
    committed_by,
    common_joiners,
    judge,
    leavers,
    resume,
)
from ringps.ring.topology import Generation

_MOST_REPEATS = 3
"""Times that an operation is done again because ranks' results differed, before that is an error."""

_log = logging.getLogger("ringps")


class Membership(Protocol):
    """Where the next generation comes from."""

    def reform(self, error: RingpsError) -> tuple[Generation, Backend]:
        """Give up the current generation, and block until this worker is in the next one.

        Args:
            error: why: a member was lost, or the coordinator wants another generation.

        Raises:
            PeerLostError: too few members are left.
            ExpelledError: the others went on without this worker.
            SetupError: nothing has come of it for as long as `rendezvous_timeout_s` and `op_timeout_s` allow.
            ClosedError: the ring was shut down by this process.
        """

    def joiners(self) -> tuple[int, ...]:
        """Workers that are ready to join, as far as this member knows."""

    def leaving(self) -> bool:
        """Whether this worker was asked to leave."""

    def note(self, event: str, **details: object) -> None:
        """Have a line written to the events file."""


class _Held(NamedTuple):
    """A result, as this rank votes for it."""

    generation: int
    result: bytes
    """Its hash."""
    parameters: bytes
    """As `Status.parameters`."""


class Change(NamedTuple):
    """What all members agreed on for the next moment between two steps."""

    generation: int
    joiners: tuple[int, ...]
    """Worker ids to admit."""
    leavers: tuple[int, ...]
    """Ranks that go."""
    marks: tuple[int, ...]
    """What each rank gave as `ElasticCommunicator.marks`."""


@dataclass(frozen=True)
class ElasticStatistics:
    """Counters since this process joined."""

    operations: int
    """Operations that were committed."""

    generations: int
    """Times that this process went on to another generation."""

    repeated: int
    """Attempts that had to be done again because a member was lost."""

    rolled_forward: int
    """Operations that were committed because all survivors held the result of one that was interrupted."""

    diverged: int
    """Times that ranks held different bits; healed each time."""

    recovering_s: float
    """Time from noticing a loss to being able to go on, in all."""


class ElasticCommunicator(Communicator):
    """A communicator whose members may change while it is used, by one thread at a time.

    `all_reduce`, `broadcast` and `barrier` go on with whoever is left. The sizes of `reduce_scatter` and
    `all_gather` depend on the number of ranks: they raise `PeerLostError` where members were lost amid one,
    and can be called again. With `async_op` the handle that is returned is done already.
    """

    def __init__(
        self,
        generation: Generation,
        backend: Backend,
        membership: Membership,
        recovery: Recovery,
        *,
        on_step: Callable[[int], None] | None = None,
        joining: bool = False,
        least: int = 1,
    ) -> None:
        """
        Args:
            generation: the current one; of a joining worker, one that might be.
            backend: carries its collectives out.
            membership: where the next generation comes from.
            recovery: settings.
            on_step: called with the number of each step that was applied.
            joining: this worker has yet to get the ring's state, and `enter` it.
            least: with how many members the ring still goes on.
        """
        super().__init__(generation, backend, on_step=on_step)
        self._joining = joining
        self._least = least
        self._raw = Communicator(generation, backend)
        self._membership = membership
        self._recovery = recovery
        self._lock = threading.RLock()
        self._committed = 0
        self._held: _Held | None = None
        """The result that this rank holds and has not committed."""
        self._unsettled = False
        """The generation is new, and its members have not told each other how far they are."""
        self._together = False
        self._fresh = False
        self._change: Change | None = None
        self._generations = self._repeated = self._rolled_forward = self._diverged = 0
        self._recovering_s = 0.0
        self._broken_s: float | None = None

    @property
    def elastic(self) -> bool:
        """Whether members may come and go."""
        return True

    @property
    def least(self) -> int:
        """With how many members the ring still goes on."""
        return self._least

    @property
    def raw(self) -> Communicator:
        """The collectives of the current generation alone: one that is interrupted is not done again."""
        return self._raw

    @property
    def joining(self) -> bool:
        """Whether this worker has yet to get the state of the ring that it joins."""
        return self._joining

    @property
    def fresh(self) -> bool:
        """Whether no vote has committed anything since the generation began: what is under way may have been
        interrupted in an earlier one, where each rank got to another point of it. The same on all ranks."""
        return self._fresh

    @property
    def committed(self) -> int:
        """Operations that were committed; the same on all ranks between two operations."""
        return self._committed

    @property
    def recovery(self) -> Recovery:
        """Settings."""
        return self._recovery

    def enter(self, generation: Generation, backend: Backend) -> None:
        """Begin as a new member of a running ring; go on from where the others are. Collective.

        Raises:
            RingpsError: what `Membership.reform` raises.
        """
        self._adopt(generation, backend)
        self.settle()
        self._joining = False

    def elastic_statistics(self) -> ElasticStatistics:
        """Counters so far."""
        return ElasticStatistics(
            operations=self._committed,
            generations=self._generations,
            repeated=self._repeated,
            rolled_forward=self._rolled_forward,
            diverged=self._diverged,
            recovering_s=self._recovering_s,
        )

    # Operations.

    def transact(
        self,
        attempt: Callable[[int], bytes],
        ballot: Callable[[], Ballot] = Ballot,
        heal: Callable[[int, tuple[int, ...]], None] | None = None,
    ) -> Outcome:
        """Carry out an operation on all ranks or on none. Collective.

        Args:
            attempt: does it with the collectives of `raw`, and returns a hash of the result (`NOTHING` where
                that differs by rank). Called again, with the number of attempts before, when a member was
                lost or results differed; its inputs must be unharmed then.
            ballot: what else to say in this rank's vote; called after each attempt.
            heal: repairs parameters that differ: called with the rank whose bits are right and the ranks
                whose are not, on all ranks; then the operation is done again.

        Raises:
            RingpsError: what `attempt` or `Membership.reform` raised; nothing was committed.
            DivergedError: ranks hold different bits, and that could not be healed or was not to be.
        """
        if self._joining:
            raise CollectiveError(
                "this worker joins a running job, whose members have long since called the collectives that "
                "come before the first step; call those only `if not ringps.joining()`, and let what they "
                "give be part of ringps.TrainState"
            )
        with self._lock:
            return self._transact(attempt, ballot, heal)

    def _transact(
        self,
        attempt: Callable[[int], bytes],
        ballot: Callable[[], Ballot],
        heal: Callable[[int, tuple[int, ...]], None] | None,
    ) -> Outcome:
        attempts = repeats = 0
        doubted: Sequence[Vote] = ()
        while True:
            try:
                if self._unsettled:
                    if self._settle(between=False):
                        self._rolled_forward += 1
                        return self._commit(attempts, None)
                    self._repeated += attempts > 0
                attempts += 1
                result = attempt(attempts - 1)
                said = ballot()
                self._held = _Held(self._generation.number, result, said.parameters)
                if probe.listener is not None:
                    probe.reached("vote", step=said.step, attempt=attempts - 1)
                votes = self._vote(result, said)
                verdict = judge(votes)
                if verdict.finding is Finding.COMMIT:
                    if probe.listener is not None:
                        probe.reached("voted", step=said.step)
                    if doubted:
                        self._report_divergence(doubted, votes, said.step)
                    return self._commit(attempts, votes)
                self._held = None
                if verdict.finding is Finding.CONFUSED:
                    raise CollectiveMismatchError(
                        f"{verdict.reason}; every rank must call the same collectives in the same order"
                    )
                repeats += 1
                self._diverged += 1
                self._check_divergence(verdict.finding, verdict.reason, verdict.wrong, repeats)
                if verdict.finding is Finding.HEAL:
                    assert heal is not None
                    right = next(rank for rank in range(self.world_size) if rank not in verdict.wrong)
                    heal(right, verdict.wrong)
                    self._name_healed(right, verdict.wrong, said.step)
                else:
                    doubted = votes
            except (PeerLostError, RingChangedError) as error:
                self.reform(error)
            except CollectiveTimeoutError as hung:
                if not hung.late or self.rank in hung.late:
                    raise
                self.reform(self._hung(hung.late[0]))

    def reform(self, error: RingpsError) -> None:
        """Go on to the next generation; its members tell each other how far they are before anything else.

        Raises:
            RingpsError: what `Membership.reform` raises.
        """
        if self._broken_s is None:
            self._broken_s = time.monotonic()
        self._adopt(*self._membership.reform(error))

    def settle(self) -> bool:
        """Between two steps: meet the members of a generation that is new. Collective.

        Returns:
            Whether all members are between the same two steps.

        Raises:
            RingpsError: what `Membership.reform` raises.
        """
        with self._lock:
            while self._unsettled:
                try:
                    forward = self._settle(between=True)
                    assert not forward, "nothing is held between two operations"
                except (PeerLostError, RingChangedError) as error:
                    self.reform(error)
            return self._together

    def take_change(self) -> Change | None:
        """What the last vote agreed on for now, if it was in this generation; at most once."""
        change, self._change = self._change, None
        if change is None or change.generation != self._generation.number:
            return None
        return change

    def note(self, event: str, **details: object) -> None:
        """Have a line written to the events file; call it on one rank."""
        self._membership.note(event, **details)

    def _hung(self, rank: int) -> PeerLostError:
        member = self._generation.members[rank]
        reason = "it has not come to a collective that the others are in for op_timeout_s"
        return PeerLostError(rank=rank, worker_id=member.worker_id, host=member.host, reason=reason)

    def _adopt(self, generation: Generation, backend: Backend) -> None:
        self._generation, self._backend = generation, backend
        self._raw = Communicator(generation, backend)
        self._unsettled, self._together = True, False
        self._generations += 1
        self._change = None

    def _settle(self, *, between: bool) -> bool:
        """Tell each other how far we are; whether this rank is to commit what it holds."""
        if probe.listener is not None:
            probe.reached("handshake", generation=self._generation.number)
        held = self._held or _Held(0, NOTHING, NOTHING)
        own = Status(
            committed=self._committed,
            generation=held.generation,
            holds=self._held is not None,
            between=between,
            joining=self._joining,
            result=held.result,
            parameters=held.parameters,
        )
        statuses = [Status.unpack(raw) for raw in self._gather(own.pack(), STATUS_BYTES)]
        step, reason = resume(statuses, self.rank)
        self._unsettled, self._fresh = False, True
        if self._joining:
            self._committed = committed_by(statuses)
        self._together = all(status.between for status in statuses)
        if step is Step.AGAIN:
            self._held = None
        gap_s = 0.0
        if self._broken_s is not None:
            gap_s = time.monotonic() - self._broken_s
            self._recovering_s += gap_s
            self._broken_s = None
        _log.debug("generation %d: %s: %s", self._generation.number, step.name.lower(), reason)
        if self.rank == next(rank for rank, status in enumerate(statuses) if not status.joining):
            self.note("recovered", decision=step.name.lower(), reason=reason, gap_s=round(gap_s, 4))
        return step is Step.FORWARD

    def _vote(self, result: bytes, said: Ballot) -> list[Vote]:
        vote = Vote(
            operation=self._committed + 1,
            generation=self._generation.number,
            step=said.step,
            result=result,
            parameters=said.parameters,
            busy_us=said.busy_us,
            leaving=said.boundary and self._membership.leaving(),
            joiners=self._membership.joiners() if said.boundary else (),
            marks=self.marks() if said.boundary else 0,
        )
        votes = [Vote.unpack(raw) for raw in self._gather(vote.pack(), VOTE_BYTES)]
        if said.boundary:
            marks = tuple(vote.marks for vote in votes)
            self._change = Change(self._generation.number, common_joiners(votes), leavers(votes), marks)
        return votes

    def _commit(self, attempts: int, votes: Sequence[Vote] | None) -> Outcome:
        self._committed += 1
        self._held = None
        self._fresh = self._fresh and votes is None
        return Outcome(attempts, None if votes is None else tuple(votes))

    def _gather(self, payload: bytes, size_bytes: int) -> list[bytes]:
        own = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        everyones = torch.empty(self.world_size * size_bytes, dtype=torch.uint8)
        self._raw.all_gather(everyones, own)
        raw = everyones.numpy().tobytes()
        return [raw[start : start + size_bytes] for start in range(0, len(raw), size_bytes)]

    # Divergence.

    def _check_divergence(self, finding: Finding, reason: str, wrong: tuple[int, ...], repeats: int) -> None:
        named = ", ".join(self._generation.describe(rank) for rank in wrong)
        ids = tuple(self._generation.members[rank].worker_id for rank in wrong)
        if finding is Finding.HEAL and not wrong:
            raise DivergedError(
                f"{reason}: nobody can tell which rank is right. Restart from a checkpoint; check the "
                "machines' memory, and that every rank applies the same updates",
                worker_ids=(),
            )
        if repeats > _MOST_REPEATS:
            raise DivergedError(
                f"{reason} ({named or 'no majority'}), also after {_MOST_REPEATS} attempts; "
                "check these machines' memory",
                worker_ids=ids,
            )
        if finding is Finding.HEAL and self._recovery.on_divergence == "stop":
            raise DivergedError(f"{reason}: {named} (on_divergence=stop)", worker_ids=ids)

    def _report_divergence(self, doubted: Sequence[Vote], votes: Sequence[Vote], step: int) -> None:
        """An operation was done again because results differed: now it is known whose were wrong.

        Raises:
            DivergedError: if that is to stop the job.
        """
        if len(doubted) != len(votes):
            return  # members were lost meanwhile, and ranks are others'
        wrong = tuple(rank for rank, vote in enumerate(doubted) if vote.result != votes[0].result)
        named = ", ".join(self._generation.describe(rank) for rank in wrong)
        ids = tuple(self._generation.members[rank].worker_id for rank in wrong)
        text = f"step {step}: reduced bits of {named} were wrong"
        if self._recovery.on_divergence == "stop":
            raise DivergedError(f"{text} (on_divergence=stop)", worker_ids=ids)
        if self.rank == 0:
            _log.warning("%s; they were reduced again, and nothing wrong was applied", text)
            self.note("diverged", step=step, what="reduced bits", worker_ids=list(ids))

    def _name_healed(self, right: int, wrong: tuple[int, ...], step: int) -> None:
        if self.rank == right:
            named = ", ".join(self._generation.describe(rank) for rank in wrong)
            ids = [self._generation.members[rank].worker_id for rank in wrong]
            _log.warning(
                "step %d: parameters of %s were wrong, and were copied from rank %d", step, named, right
            )
            self.note("diverged", step=step, what="parameters", worker_ids=ids)

    # Collectives of the user's script.

    @overload
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", async_op: Literal[False] = False) -> None: ...
    @overload
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", *, async_op: Literal[True]) -> Handle: ...
    @overload
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", async_op: bool = False) -> Handle | None: ...
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", async_op: bool = False) -> Handle | None:
        """As `Communicator.all_reduce`, among those that are left. Keeps a copy of `tensor` meanwhile."""
        kept = tensor.detach().clone()

        def attempt(before: int) -> bytes:
            if before:
                tensor.detach().copy_(kept)
            self._raw.all_reduce(tensor, op)
            return digest(tensor)

        return self._done("all_reduce", attempt, async_op)

    def reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum", async_op: bool = False
    ) -> Handle | None:
        """As `Communicator.reduce_scatter`; raises PeerLostError if the number of ranks changed meanwhile."""

        def attempt() -> bytes:
            self._raw.reduce_scatter(output, input, op)
            return NOTHING

        return self._done("reduce_scatter", self._sized("reduce_scatter", attempt), async_op)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, async_op: bool = False) -> Handle | None:
        """As `Communicator.all_gather`; raises PeerLostError if the number of ranks changed meanwhile."""

        def attempt() -> bytes:
            self._raw.all_gather(output, input)
            return digest(output)

        return self._done("all_gather", self._sized("all_gather", attempt), async_op)

    def broadcast(self, tensor: torch.Tensor, src: int = 0, async_op: bool = False) -> Handle | None:
        """As `Communicator.broadcast`. If members are lost meanwhile, it starts from the same worker,
        whatever its rank is then. If that one is lost, from what rank `src` of those that are left had in its
        tensor; raises PeerLostError if there are too few for that."""
        kept, began = tensor.detach().clone(), self._generation

        def attempt(before: int) -> bytes:
            if before:
                tensor.detach().copy_(kept)
            self._raw.broadcast(tensor, self._source(began, src))
            return digest(tensor)

        return self._done("broadcast", attempt, async_op)

    def barrier(self) -> None:
        """Return when every rank has called it; the vote is one. At once in a worker that has yet to join."""
        if not self._joining:
            self.transact(lambda before: NOTHING, self._plain_ballot)

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """As `Communicator.gather_bytes`, of those that are left."""
        found: list[bytes] = []

        def attempt(before: int) -> bytes:
            found[:] = self._raw.gather_bytes(payload)
            return combine(found)

        self.transact(attempt, self._plain_ballot)
        return found

    def _source(self, began: Generation, src: int) -> int:
        """The rank now of what was rank `src` when a broadcast began."""
        if self._generation is began or not 0 <= src < began.world_size:
            return src
        member = began.members[src]
        ids = [one.worker_id for one in self._generation.members]
        if member.worker_id in ids:
            return ids.index(member.worker_id)
        if src < self.world_size:
            return src
        reason = (
            f"amid a broadcast that started from it; there are {self.world_size} ranks now: "
            "call it again with src as one of them"
        )
        raise _Resized(began, src, reason)

    def _sized(self, kind: str, attempt: Callable[[], bytes]) -> Callable[[int], bytes]:
        began = self._generation

        def checked(before: int) -> bytes:
            if self._generation is not began and self.world_size != began.world_size:
                here = {member.worker_id for member in self._generation.members}
                lost = next(
                    (rank for rank, member in enumerate(began.members) if member.worker_id not in here), 0
                )
                reason = (
                    f"amid {kind}, whose sizes were for {began.world_size} ranks; there are "
                    f"{self.world_size} now: call it again with tensors for that many"
                )
                raise _Resized(began, lost, reason)
            return attempt()

        return checked

    def _done(self, kind: str, attempt: Callable[[int], bytes], async_op: bool) -> Handle | None:
        try:
            self.transact(attempt, self._plain_ballot)
        except _Resized as resized:
            raise resized.error from None
        if not async_op:
            return None
        handle = Handle(kind)
        handle._settle()
        return handle

    def _plain_ballot(self) -> Ballot:
        return Ballot(step=self._last_step)


class _Resized(RingpsError):
    """Inside: a collective cannot be done again among the members that are left. Not a PeerLostError itself,
    for it is not to be answered with another generation."""

    def __init__(self, began: Generation, lost: int, reason: str) -> None:
        super().__init__(reason)
        member = began.members[lost]
        self.error = PeerLostError(rank=lost, worker_id=member.worker_id, host=member.host, reason=reason)
