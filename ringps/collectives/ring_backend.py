"""Collectives over a transport: what is sent, received and combined for each kind of call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ringps.collectives.backend import REDUCTIONS, EngineStatistics, Work, call_of
from ringps.collectives.disputes import EXPLANATION_S, Docket, Referee
from ringps.collectives.engine import Engine
from ringps.collectives.handle import Handle
from ringps.collectives.ring import Pool, RingOperation
from ringps.config import Exchange, Timeouts
from ringps.errors import ClosedError, RingpsError
from ringps.kernels.cpu import accumulation_dtype
from ringps.ring import schedule
from ringps.ring.machine import RingMachine
from ringps.ring.partition import Slice, chunk_numel, partition
from ringps.ring.topology import Generation
from ringps.transport.base import Transport


class RingBackend:
    """A `collectives.backend.Backend` over a transport. Thread-safe."""

    def __init__(
        self,
        generation: Generation,
        transport: Transport | None,
        exchange: Exchange,
        timeouts: Timeouts,
        referee: Referee | None,
        *,
        explanation_s: float = EXPLANATION_S,
        allocate: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        """
        Args:
            generation: who is in the ring.
            transport: a connected transport, which belongs to the backend then; None for a ring of one.
            exchange: how tensors are cut; the same on all ranks.
            timeouts: limits on waiting.
            referee: asked when ranks disagree; None: errors name this rank's call only.
            explanation_s: how long to wait for the reason of a closed connection.
            allocate: gives memory (uint8) for tensors; None: ordinary memory.
        """
        self._rank = generation.rank
        self._world_size = generation.world_size
        self._exchange = exchange
        self._docket = Docket(generation, timeouts, referee, explanation_s=explanation_s)
        self._allocate = allocate
        self._pool = Pool()
        self._engine: Engine | None = None
        self._error: RingpsError | None = None
        self._may_double = False
        if generation.world_size == 1:
            return
        assert transport is not None
        self._engine = Engine(
            generation, transport, self._docket, self._pool, checked_bytes=exchange.checked_bytes
        )
        partners = schedule.recursive_doubling(generation.rank, generation.world_size).peers
        self._may_double = partners <= transport.sends_to & transport.receives_from

    def run(self, work: Work) -> None:
        """Return when `work` is done; the calling thread does it."""
        if self._engine is None:
            self._alone(work)
        else:
            self._engine.run(self._operation(work))

    def start(self, work: Work) -> Handle:
        """Carry `work` out in the background."""
        if self._engine is None:
            handle = Handle(str(call_of(work)))
            self._alone(work)
            handle._settle()
            return handle
        return self._engine.submit(self._operation(work))

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Ordinary memory, which peers cannot reach, unless another kind was asked for."""
        if self._allocate is not None:
            return self._allocate(size_bytes)
        return torch.empty(size_bytes, dtype=torch.uint8)

    def fail(self, error: RingpsError) -> None:
        """End every collective, now and later, with `error`. The first error stays."""
        if self._engine is not None:
            self._engine.fail(error)
        elif self._error is None:
            self._error = error

    def peer_left(self, rank: int, completed: int) -> None:
        """Rank `rank` called shutdown() after `completed` collectives."""
        if self._engine is not None:
            self._engine.peer_left(rank, completed)

    def verdict(self, sequence: int, calls: tuple[str, ...]) -> None:
        """What each rank called as number `sequence`, in rank order."""
        if self._engine is not None:
            self._engine.verdict(sequence, calls)

    def describe(self, sequence: int) -> str:
        """This rank's answer to an inquiry about number `sequence`."""
        return self._docket.describe(sequence)

    def drain(self) -> None:
        """Wait for every collective that was called; raises if the ring broke, now or before."""
        if self._engine is not None:
            self._engine.drain()
        elif self._error is not None:
            raise self._error

    @property
    def completed(self) -> int:
        """Collectives that ended well on this rank."""
        return self._engine.completed if self._engine is not None else self._docket.last

    def close(self) -> None:
        """End what is under way with ClosedError and free the transport. Idempotent."""
        if self._engine is not None:
            self._engine.close()
        elif self._error is None:
            self._error = ClosedError("the ring was shut down by this process")

    def statistics(self) -> EngineStatistics:
        """Counters of the engine and its transport."""
        if self._engine is not None:
            return self._engine.statistics()
        return EngineStatistics(self._docket.last, {}, None)

    def _alone(self, work: Work) -> None:
        """A ring of one has its result already; it only has to be brought to the output."""
        if self._error is not None:
            raise self._error
        sequence = self._docket.open(call_of(work))
        if work.output is not work.source:
            work.output.copy_(work.source)
        if work.finish is not None:
            work.finish()
        self._docket.close(sequence)

    def _operation(self, work: Work) -> RingOperation:
        reduces = work.kind in REDUCTIONS
        doubles = self._doubles(work)
        plan, slices = self._plan(work, doubles)
        begin = None
        if work.kind == "all_gather":
            own = work.output[slice(*slices[self._rank])]
            begin = partial(own.copy_, work.source)
        widest = accumulation_dtype(work.source.dtype, work.op) if reduces else work.output.dtype
        piece = chunk_numel(slices, widest.itemsize, self._exchange.chunk_bytes)
        return RingOperation(
            call_of(work, piece, doubles=doubles),
            RingMachine(plan, slices, piece),
            self._pool,
            source=work.source if reduces else work.output,
            output=work.output,
            op=work.op,
            rank=self._rank,
            world_size=self._world_size,
            finish=work.finish,
            begin=begin,
            gate=work.gate,
        )

    def _doubles(self, work: Work) -> bool:
        """Whether few steps count for more than few bytes."""
        if not self._may_double or work.kind not in ("all_reduce", "barrier"):
            return False
        return work.source.numel() * work.source.itemsize <= self._exchange.doubling_bytes

    def _plan(self, work: Work, doubles: bool) -> tuple[schedule.Schedule, tuple[Slice, ...]]:
        rank, world_size, numel = self._rank, self._world_size, work.source.numel()
        if doubles:
            return schedule.recursive_doubling(rank, world_size), (Slice(0, numel),)
        if work.kind == "all_reduce":
            return schedule.all_reduce(rank, world_size), partition(numel, world_size)
        if work.kind == "reduce_scatter":
            return schedule.reduce_scatter(rank, world_size), partition(numel, world_size)
        if work.kind == "broadcast":
            return schedule.broadcast(rank, world_size, work.src), (Slice(0, numel),)
        assert work.kind in ("all_gather", "barrier")
        return schedule.all_gather(rank, world_size), partition(work.output.numel(), world_size)
