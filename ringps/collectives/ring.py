"""A collective on real tensors: carries out what `ring.machine` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ringps.collectives.call import Call
from ringps.collectives.gate import Gate
from ringps.collectives.handle import Handle
from ringps.errors import FrameError
from ringps.kernels.cpu import ReduceOp
from ringps.kernels.fold import Block, fold_of
from ringps.ring.machine import RingMachine, SendChunk, TakeChunk
from ringps.ring.schedule import Action, Content
from ringps.wire.header import ChunkHeader


class Outgoing(NamedTuple):
    """A chunk to be sent."""

    peer: int
    step: int
    chunk: int
    payload: memoryview
    scratch: bytearray | None = None
    """What the payload lies in, to be given back to the pool when it is sent."""


class Pool:
    """Memory for chunks on their way: reused, so that it stays in cache and is mapped once."""

    _KEPT = 8

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self, size_bytes: int) -> bytearray:
        """At least so many bytes, with any contents."""
        while self._free:
            buffer = self._free.pop()
            if len(buffer) >= size_bytes:
                return buffer
        return bytearray(size_bytes)

    def give(self, buffer: bytearray) -> None:
        """Nobody needs its contents any more."""
        if len(self._free) < self._KEPT:
            self._free.append(buffer)


class _Arriving(NamedTuple):
    take: TakeChunk
    place: memoryview
    scratch: bytearray | None


class RingOperation:
    """One call on one rank: its machine, its tensors and its handle.

    Tensors are flat and contiguous. `source` is this rank's input to a reduction and is only read,
    unless the caller made it the same memory as `output`. Partial results lie in the output where there is
    room: whoever gets the result of a slice has sent its partial sum before, or has none.
    """

    def __init__(
        self,
        call: Call,
        machine: RingMachine,
        pool: Pool,
        *,
        source: torch.Tensor,
        output: torch.Tensor,
        op: ReduceOp = "sum",
        rank: int,
        world_size: int,
        finish: Callable[[], object] | None = None,
        begin: Callable[[], object] | None = None,
        gate: Gate | None = None,
    ) -> None:
        """
        Args:
            call: what the user called.
            machine: says what to do; sizes in elements of `source`.
            pool: where memory for chunks comes from.
            source: this rank's input.
            output: where results go: of all slices, or of slice `rank` alone if it is smaller than `source`.
            op: how to combine.
            rank: this rank.
            world_size: divisor of a mean.
            finish: called once when the output is complete, on the thread that completed it.
            begin: called once before anything is read.
            gate: it begins when this is open.
        """
        self.call = call
        self.gate = gate
        self.machine = machine
        self.handle = Handle(str(call))
        self.unsent = 0
        """Chunks given out that have not left; kept by who sends them."""
        self._pool = pool
        self._fold = fold_of(source.dtype, op)
        self._own: Block = self._fold.of(source)
        self._out: Block = self._fold.of(output)
        self._whole = source.numel() == output.numel()
        self._output_start = 0 if self._whole else rank * output.numel()
        self._itemsize = source.dtype.itemsize
        self._partial_itemsize = self._fold.partial_dtype.itemsize
        self._source_bytes = as_bytes(source)
        self._output_bytes = self._source_bytes if output is source else as_bytes(output)
        self._rank = rank
        self._world_size = world_size
        self._begin = begin
        self._finish = finish
        self._arriving: dict[tuple[int, int], _Arriving] = {}
        self._combined: dict[int, Block] = {}

    def first_sends(self) -> Iterator[Outgoing]:
        """What this rank sends before it has received anything."""
        if self._begin is not None:
            self._begin()
        for send in self.machine.start():
            payload = self._source_bytes[send.start * self._itemsize : send.stop * self._itemsize]
            if self.machine.accumulates:
                # The result may be there, and overwrite an input that is the output, before this has left.
                payload = memoryview(bytearray(payload))
            yield Outgoing(send.peer, send.step, send.chunk, payload)

    def place(self, peer: int, header: ChunkHeader) -> memoryview | None:
        """Where the payload of a chunk from rank `peer` goes; None: it must wait for others.

        Raises:
            FrameError: the chunk is not one that this rank waits for; nothing was changed.
        """
        take = self.machine.expect(header.step, header.chunk)
        if take.peer != peer:
            raise FrameError("chunk of another rank")
        size = self._partial_itemsize if take.content is Content.PARTIAL else self._itemsize
        if header.payload_bytes != (take.stop - take.start) * size:
            raise FrameError("payload length")
        if not self.machine.ready(header.step, header.chunk):
            return None
        self.machine.claim(header.step, header.chunk)
        scratch = None
        if take.action is Action.STORE:
            place = self._output_part(take)
        else:
            scratch = self._pool.take(header.payload_bytes)
            place = memoryview(scratch)[: header.payload_bytes]
        self._arriving[header.step, header.chunk] = _Arriving(take, place, scratch)
        return place

    def take(self, header: ChunkHeader, payload: memoryview) -> Outgoing | None:
        """Do what is to be done with a chunk that was placed and has come.

        Args:
            header: as for `place`.
            payload: what `place` returned, or other memory, which is ours to overwrite then.

        Returns:
            What to send in consequence, or None.
        """
        take, place, scratch = self._arriving.pop((header.step, header.chunk))
        self.machine.took(header.step, header.chunk)
        if take.start == take.stop:
            return _outgoing(take.forward, memoryview(b""))
        if take.action is Action.STORE:
            if payload is not place:
                place[:] = payload
            return _outgoing(take.forward, place)

        received = self._received(take, payload)
        if take.action is Action.COMPLETE:
            self._complete(take, header.chunk, received)
            if scratch is not None:
                self._pool.give(scratch)
            return _outgoing(take.forward, self._output_part(take))
        return self._combine(take, header.chunk, received, payload, scratch)

    def _combine(
        self, take: TakeChunk, chunk: int, received: Block, payload: memoryview, scratch: bytearray | None
    ) -> Outgoing | None:
        fold = self._fold
        first, second = self._operands(take, chunk, received)
        if self.machine.accumulates:
            combined = _numpy_like(fold.scratch(take.stop - take.start), self._own)
            fold.partial(first, second, combined)
            self._combined[chunk] = combined
            if scratch is not None:
                self._pool.give(scratch)
            return _outgoing(take.forward, _memory(combined))
        if self._whole and fold.partial_dtype is fold.dtype:
            fold.partial(first, second, self._out[take.start : take.stop])
            if scratch is not None:
                self._pool.give(scratch)
            return _outgoing(take.forward, self._output_part(take))
        if take.content is Content.PARTIAL or fold.partial_dtype is fold.dtype:
            fold.partial(first, second, received)
            return _outgoing(take.forward, payload, scratch)
        size_bytes = (take.stop - take.start) * self._partial_itemsize
        wide = self._pool.take(size_bytes)
        widened = memoryview(wide)[:size_bytes]
        fold.partial(first, second, torch.frombuffer(widened, dtype=fold.partial_dtype))
        if scratch is not None:
            self._pool.give(scratch)
        return _outgoing(take.forward, widened, wide)

    def _complete(self, take: TakeChunk, chunk: int, received: Block) -> None:
        fold = self._fold
        start, stop = take.start - self._output_start, take.stop - self._output_start
        out = self._out[start:stop]
        first, second = self._operands(take, chunk, received)
        if fold.partial_dtype is fold.dtype:
            partial = out
        elif take.content is Content.PARTIAL and first is received:
            partial = received
        else:
            partial = fold.scratch(stop - start)
        fold.partial(first, second, partial)
        fold.finish(partial, out, self._world_size)

    def _operands(self, take: TakeChunk, chunk: int, received: Block) -> tuple[Block, Block]:
        """In the order of ranks where each side combines for itself: NaNs would show another order."""
        if not self.machine.accumulates:
            return received, self._own[take.start : take.stop]
        own = self._combined.pop(chunk, None)
        if own is None:
            own = self._own[take.start : take.stop]
        return (own, received) if self._rank < take.peer else (received, own)

    def _received(self, take: TakeChunk, payload: memoryview) -> Block:
        if take.content is Content.PARTIAL and self._fold.partial_dtype is not self._fold.dtype:
            return torch.frombuffer(payload, dtype=self._fold.partial_dtype)
        return self._fold.block(payload, 0, take.stop - take.start)

    def _output_part(self, take: TakeChunk) -> memoryview:
        start, stop = take.start - self._output_start, take.stop - self._output_start
        return self._output_bytes[start * self._itemsize : stop * self._itemsize]

    def finish(self) -> None:
        """Everything has come and gone: put the output where the caller wants it."""
        if self._finish is not None:
            self._finish()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    return tensor.view(torch.uint8).numpy().data


def _outgoing(
    send: SendChunk | None, payload: memoryview, scratch: bytearray | None = None
) -> Outgoing | None:
    if send is None:
        assert scratch is None
        return None
    return Outgoing(send.peer, send.step, send.chunk, payload, scratch)


def _numpy_like(tensor: torch.Tensor, like: Block) -> Block:
    return tensor if isinstance(like, torch.Tensor) else tensor.numpy()


def _memory(block: Block) -> memoryview:
    return as_bytes(block) if isinstance(block, torch.Tensor) else memoryview(block).cast("B")
