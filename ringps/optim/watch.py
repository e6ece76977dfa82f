"""What is looked at whenever a step commits: whether parameters still agree, and who is slow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch

from ringps.collectives import Communicator, ElasticCommunicator, Outcome
from ringps.kernels.digest import EMPTY, digest
from ringps.optim.replicate import replicate
from ringps.optim.stragglers import Straggler, StragglerWatch

_log = logging.getLogger("ringps")


class CommitWatch:
    """A `buckets.CommitListener` for one optimizer. Only an elastic ring asks it."""

    def __init__(self, ring: Communicator, optimizer: torch.optim.Optimizer) -> None:
        self._ring = ring if isinstance(ring, ElasticCommunicator) else None
        self._optimizer = optimizer
        self._calls: list[Callable[[], None]] = []
        self._watch: StragglerWatch | None = None
        if self._ring is not None:
            recovery = self._ring.recovery
            self._watch = StragglerWatch(recovery.straggler_factor, recovery.straggler_steps)

    @property
    def stragglers(self) -> tuple[Straggler, ...]:
        """Workers that are persistently slower than the others, the slowest first."""
        return () if self._watch is None else self._watch.current

    def at_next_commit(self, call: Callable[[], None]) -> None:
        """Have `call` called once, when the next pass has committed."""
        self._calls.append(call)

    def parameters(self, step: int) -> bytes:
        """A hash of the parameters at every `check_parameters_every`-th step, else `EMPTY`."""
        assert self._ring is not None
        every = self._ring.recovery.check_parameters_every
        if not every or step % every:
            return EMPTY
        return digest(*parameters_of(self._optimizer))

    @torch.no_grad()
    def heal(self, right: int, wrong: tuple[int, ...]) -> None:
        """Give the ranks in `wrong` rank `right`'s parameters and optimizer's tensors. Collective."""
        assert self._ring is not None
        tensors: list[torch.Tensor] = list(parameters_of(self._optimizer))
        for parameter in parameters_of(self._optimizer):
            state = self._optimizer.state.get(parameter, {})
            tensors += [value for _, value in sorted(state.items()) if isinstance(value, torch.Tensor)]
        replicate(self._ring.raw, tensors, right)

    def committed(self, step: int, outcome: Outcome) -> None:
        """Call who waits for it; and say so if a rank has become persistently slower than the others."""
        while self._calls:
            self._calls.pop()()
        if outcome.votes is None or self._watch is None or self._ring is None:
            return
        members = self._ring.generation.members
        worker_ids = [member.worker_id for member in members]
        for one, reason in self._watch.observe(worker_ids, [vote.busy_us for vote in outcome.votes]):
            if self._ring.rank:
                continue
            rank = worker_ids.index(one.worker_id)
            named = self._ring.generation.describe(rank)
            _log.warning("%s is %.1f times slower than the others: %s", named, one.factor, reason)
            self._ring.note(
                "straggler",
                slow_worker_id=one.worker_id,
                slow_rank=rank,
                host=members[rank].host,
                factor=round(one.factor, 2),
                step=step,
                reason=reason,
            )


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.nn.Parameter]:
    """All of its parameters, in the order of its groups."""
    for group in optimizer.param_groups:
        yield from group["params"]
