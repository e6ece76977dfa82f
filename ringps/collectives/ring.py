"""A collective on real tensors: carries out what `ring.machine` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ringps.collectives.call import Call
from ringps.collectives.handle import Handle
from ringps.errors import FrameError
from ringps.kernels import cpu
from ringps.ring.machine import RingMachine, SendChunk
from ringps.ring.schedule import Action, Content
from ringps.wire.header import ChunkHeader


class Outgoing(NamedTuple):
    """A chunk to be sent."""

    step: int
    chunk: int
    payload: memoryview
    borrowed: bool
    """The payload is the caller's memory, so the caller must not have it back before it is sent."""


class RingOperation:
    """One call on one rank: its machine, its tensors and its handle.

    Tensors are flat and contiguous. `source` is this rank's input to a reduction and is only read,
    unless the caller made it the same memory as `output`. Partial results live in the memory that
    they were received into.
    """

    def __init__(
        self,
        call: Call,
        machine: RingMachine,
        *,
        source: torch.Tensor,
        output: torch.Tensor,
        op: cpu.ReduceOp = "sum",
        world_size: int,
        output_start: int = 0,
        finish: Callable[[], object] | None = None,
    ) -> None:
        """
        Args:
            call: what the user called.
            machine: says what to do; sizes in elements of `source`.
            source: this rank's input.
            output: where results go.
            op: how to combine.
            world_size: divisor of a mean.
            output_start: index, in the machine's elements, of the output's first element.
            finish: called once when the output is complete, on the thread that completed it.
        """
        self.call = call
        self.machine = machine
        self.handle = Handle(str(call))
        self._source = source
        self._output = output
        self._op = op
        self._world_size = world_size
        self._output_start = output_start
        self._finish = finish
        self._partial_dtype = cpu.accumulation_dtype(source.dtype, op)
        self._source_bytes = as_bytes(source)
        self._output_bytes = as_bytes(output)

    def first_sends(self) -> Iterator[Outgoing]:
        """What this rank sends before it has received anything."""
        for send in self.machine.start():
            size = self._source.itemsize
            payload = self._source_bytes[send.start * size : send.stop * size]
            yield Outgoing(send.step, send.chunk, payload, borrowed=True)

    def take(self, header: ChunkHeader, payload: memoryview) -> Outgoing | None:
        """Do what is to be done with a chunk that came; `payload` is ours to overwrite.

        Returns:
            What to send in consequence, or None.

        Raises:
            FrameError: the chunk is not one that this rank waits for; nothing was changed.
        """
        take = self.machine.expect(header.step, header.chunk)
        partial = take.content is Content.PARTIAL
        dtype = self._partial_dtype if partial else self._source.dtype
        numel = take.stop - take.start
        if payload.nbytes != header.payload_bytes or payload.nbytes != numel * dtype.itemsize:
            raise FrameError("payload length")
        self.machine.took(header.step, header.chunk)
        if numel == 0:
            return _outgoing(take.forward, payload, borrowed=False)

        received = torch.frombuffer(payload, dtype=dtype)
        if take.action is Action.COMBINE:
            own = self._source[take.start : take.stop]
            combined = cpu.combine(self._op, received, own)
            payload = payload if combined is received else as_bytes(combined)
            return _outgoing(take.forward, payload, borrowed=False)

        start, stop = take.start - self._output_start, take.stop - self._output_start
        out = self._output[start:stop]
        if take.action is Action.STORE:
            out.copy_(received)
            return _outgoing(take.forward, payload, borrowed=False)
        own = self._source[take.start : take.stop]
        cpu.complete(self._op, received, own, out, self._world_size)
        size = self._output.itemsize
        return _outgoing(take.forward, self._output_bytes[start * size : stop * size], borrowed=True)

    def finish(self) -> None:
        """Everything has come and gone: put the output where the caller wants it."""
        if self._finish is not None:
            self._finish()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    return tensor.view(torch.uint8).numpy().data


def _outgoing(send: SendChunk | None, payload: memoryview, *, borrowed: bool) -> Outgoing | None:
    return None if send is None else Outgoing(send.step, send.chunk, payload, borrowed)
