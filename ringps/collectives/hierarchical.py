"""Collectives of several hosts with several members each.

An all-reduce is a reduce-scatter inside each host, through shared memory; then an all-reduce of each
slice between the hosts, on a ring of its own that joins one member of each (a lane); then an
all-gather inside the host. So each byte crosses each link between hosts as often as if every host
were a single rank, and all lanes of a host share its link. The parts of a large tensor go through
the three stages one behind the other: while one is on the wire, the next is being reduced.

Where a host has more members than there are lanes, the rest take part inside the host only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch

from ringps.collectives.backend import Backend, Work
from ringps.collectives.call import Call
from ringps.collectives.disputes import Docket, Referee
from ringps.collectives.handle import Handle
from ringps.collectives.shm.group import LocalGroup
from ringps.collectives.shm.signals import Signals
from ringps.collectives.shm.sources import Part
from ringps.errors import PeerLostError, RingpsError
from ringps.kernels.cpu import ReduceOp
from ringps.kernels.fold import fold_of
from ringps.ring.lanes import hosts, lanes
from ringps.ring.partition import Slice, partition
from ringps.ring.topology import Generation

_PIECES_UNDER_WAY = 4
"""Pieces of a tensor that may be between the hosts at once."""


class Hierarchical:
    """A `collectives.serial.Executor` over shared memory and, for members with a lane, a ring of hosts."""

    def __init__(
        self,
        group: LocalGroup,
        open_lane: Callable[[Referee], Backend | None],
        generation: Generation,
        docket: Docket,
    ) -> None:
        """
        Args:
            group: this host's members; belongs to this object then.
            open_lane: makes the ring between hosts that this member is in, if any; hosts are its ranks.
            generation: all members.
            docket: where disputes about whole collectives are settled.
        """
        self._group = group
        self._generation = generation
        self._by_host = hosts(generation)
        self._lanes = lanes(self._by_host)
        self._rank = generation.rank
        self._here = next(number for number, ranks in enumerate(self._by_host) if self._rank in ranks)
        self._docket = docket
        self._sequence = 0
        self._lane = open_lane(self)

    def dispute(self, sequence: int) -> None:
        """A lane wants to know who called what: it is about the collective that it is a part of."""
        self._docket.ask(self._sequence, timed_out=True, progress_s=math.inf)

    @property
    def signals(self) -> Signals:
        return self._group.signals

    def perform(self, sequence: int, call: Call, work: Work, *, spin: bool) -> None:
        self._group.spin = spin
        self._sequence = sequence
        try:
            self._perform((sequence, call.signature), call, work)
        except PeerLostError as error:
            rank = self._generation.rank_of(error.blames)
            assert rank is not None  # a lane numbers its members by host
            raise PeerLostError(
                rank=rank, worker_id=error.blames, host=error.host, reason=error.reason
            ) from error

    def _perform(self, key: tuple[int, int], call: Call, work: Work) -> None:
        if work.kind == "all_reduce":
            self._all_reduce(key, call, work.source, work.output, work.op)
        elif work.kind == "reduce_scatter":
            whole = torch.empty_like(work.source)
            self._all_reduce(key, call, work.source, whole, work.op)
            numel = work.output.numel()
            work.output.copy_(whole[self._rank * numel : (self._rank + 1) * numel])
        elif work.kind == "all_gather":
            self._all_gather(key, call, work.source, work.output)
        elif work.kind == "broadcast":
            self._broadcast(key, call, work.output, work.src)
        else:
            assert work.kind == "barrier"
            self._barrier(key, call)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        return self._group.allocate(size_bytes)

    def interrupt(self, error: RingpsError) -> None:
        if self._lane is not None:
            self._lane.fail(error)

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()
        self._group.close()

    def _barrier(self, key: tuple[int, int], call: Call) -> None:
        empty = torch.empty(0, dtype=torch.uint8)
        self._group.barrier(key)
        if self._lane is not None:
            self._lane.run(_between(call, "barrier", empty))
        self._group.phase()

    def _all_reduce(
        self, key: tuple[int, int], call: Call, source: torch.Tensor, output: torch.Tensor, op: ReduceOp
    ) -> None:
        group, fold = self._group, fold_of(source.dtype, op)
        slices = self._slices(source.numel())
        own, out = fold.of(source), fold.of(output)
        pieces = group.pieces_of(fold, slices)
        sources = group.open(key, source, fold, pieces)
        staged = group.staged(sources)
        across: ReduceOp = "sum" if op == "mean" else op
        free = [fold.scratch(group.piece_numel(fold)) for _ in range(_PIECES_UNDER_WAY)] if self._lane else []
        under_way: deque[tuple[Sequence[Slice], torch.Tensor | None, Handle | None]] = deque()

        def settle() -> None:
            piece, partial, handle = under_way.popleft()
            mine, box = piece[group.local], group.next_box()
            if partial is not None and handle is not None:
                handle.wait()
                result = group.box(fold, box, mine.numel)
                fold.finish(fold.partial_of(partial[: mine.numel]), result, self._generation.world_size)
                out[mine.start : mine.stop] = result
                free.append(partial)
            group.phase()
            group.collect(fold, piece, box, out)

        for at, piece in enumerate(pieces):
            if len(under_way) == _PIECES_UNDER_WAY:
                settle()
            group.turn_to(sources, at, piece)
            mine = piece[group.local]
            partial = handle = None
            if self._lane is not None and mine.numel:
                partial = free.pop()
                group.reduce(fold, sources, mine, fold.partial_of(partial[: mine.numel]))
                handle = self._lane.start(_between(call, "all_reduce", partial[: mine.numel], across))
            group.stage(own, pieces, at + 1)
            if staged:
                group.phase()
            under_way.append((piece, partial, handle))
        while under_way:
            settle()

    def _all_gather(
        self, key: tuple[int, int], call: Call, source: torch.Tensor, output: torch.Tensor
    ) -> None:
        size = source.numel()
        slices = self._slices(size)
        mine = slices[self._group.local]
        out = output.numpy()
        out[self._rank * size : (self._rank + 1) * size] = source.numpy()
        neighbours = self._by_host[self._here]
        wanted = [
            Part(local, mine.start, mine.stop, rank * size + mine.start)
            for local, rank in enumerate(neighbours)
            if rank != self._rank
        ]
        self._group.copy(key, source, wanted, out)
        if self._lane is not None:
            handles = []
            for host, ranks in enumerate(self._by_host):
                for rank in ranks:
                    part = output[rank * size + mine.start : rank * size + mine.stop]
                    handles.append(self._lane.start(_between(call, "broadcast", part, src=host)))
            for handle in handles:
                handle.wait()
        elsewhere = [rank for ranks in self._by_host for rank in ranks if rank != self._rank]
        self._exchange(key, output, slices, [rank * size for rank in elsewhere])

    def _broadcast(self, key: tuple[int, int], call: Call, tensor: torch.Tensor, src: int) -> None:
        host = next(number for number, ranks in enumerate(self._by_host) if src in ranks)
        if host == self._here:
            self._group.broadcast(key, tensor, self._by_host[host].index(src))
        else:
            self._group.barrier(key)
        slices = self._slices(tensor.numel())
        mine = slices[self._group.local]
        if self._lane is not None:
            self._lane.run(_between(call, "broadcast", tensor[mine.start : mine.stop], src=host))
        if host != self._here:
            self._exchange(key, tensor, slices, [0])

    def _exchange(
        self, key: tuple[int, int], tensor: torch.Tensor, slices: Sequence[Slice], starts: Sequence[int]
    ) -> None:
        """Each member has its slice of the ranges that begin at `starts`; get the others'."""
        wanted = [
            Part(local, start + part.start, start + part.stop, start + part.start)
            for local, part in enumerate(slices)
            if local != self._group.local
            for start in starts
        ]
        self._group.copy(key, tensor, wanted, tensor.numpy())

    def _slices(self, numel: int) -> list[Slice]:
        """What each member of this host has on its lane."""
        idle, count = Slice(numel, numel), len(self._lanes)
        return [*partition(numel, count), *[idle] * (self._group.size - count)]


def _between(call: Call, kind: str, tensor: torch.Tensor, op: ReduceOp = "sum", src: int = 0) -> Work:
    """A part of `call` that goes between the hosts."""
    return Work(
        kind=kind,
        source=tensor,
        output=tensor,
        op=op,
        src=src,
        label=f"between hosts, of {call}",
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        finish=None,
    )
