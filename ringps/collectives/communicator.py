"""The collectives as users call them: checks the arguments, lays out memory, submits to the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch

from ringps.collectives.call import Call
from ringps.collectives.engine import Engine, EngineStatistics
from ringps.collectives.handle import Handle
from ringps.collectives.ring import RingOperation
from ringps.config import Exchange
from ringps.kernels.cpu import accumulation_dtype, check_reducible
from ringps.ring import schedule
from ringps.ring.machine import RingMachine
from ringps.ring.partition import Slice, chunk_numel, partition
from ringps.ring.topology import Generation


class Communicator:
    """Collectives among the members of a generation.

    All ranks must call the same collectives, with the same shapes, dtypes and options, in the same
    order; ranks that do not get `CollectiveMismatchError`. Tensors are on the CPU, of any strides;
    a contiguous tensor takes part without a copy. Calls may come from any thread, but then it is
    up to the caller that the order is the same on every rank.

    With `async_op=True` a call returns a `Handle` at once and its tensors belong to the collective
    until `Handle.wait` returns; otherwise it returns None when the result is there. All raise what
    `Handle.wait` raises; a ring that is broken stays broken.
    """

    def __init__(
        self,
        generation: Generation,
        engine: Engine,
        exchange: Exchange,
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self._generation = generation
        self._engine = engine
        self._exchange = exchange
        self._on_step = on_step

    @property
    def generation(self) -> Generation:
        """Who is in the ring."""
        return self._generation

    @property
    def rank(self) -> int:
        """This worker's position in the ring, 0 to world_size - 1."""
        return self._generation.rank

    @property
    def world_size(self) -> int:
        """Number of members."""
        return self._generation.world_size

    @overload
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", async_op: Literal[False] = False) -> None: ...
    @overload
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", *, async_op: Literal[True]) -> Handle: ...
    @overload
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", async_op: bool = False) -> Handle | None: ...
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", async_op: bool = False) -> Handle | None:
        """Combine `tensor` over all ranks, in place; every rank gets the same bits.

        Ring all-reduce (Patarasuk and Yuan, 2009): each rank sends and receives
        2 (n - 1) / n times the tensor's bytes. float16 and bfloat16 are summed in float32.

        Args:
            tensor: any shape, also zero-dimensional or empty. After an error its contents are
                undefined.
            op: "sum", "mean" (floating dtypes only), "min", "max" or "prod"; bool tensors: "min"
                and "max".
            async_op: return a handle instead of waiting.

        Raises:
            ValueError: dtype, device or op that cannot be reduced.
        """
        flat, back = _flatten_in_place(tensor)
        return self._finish(self._all_reduce(tensor, flat, flat, op, "", back), async_op)

    def all_reduce_into(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum", *, label: str = ""
    ) -> Handle:
        """As `all_reduce`, out of place and asynchronous; `input` is only read.

        Args:
            output: contiguous, same shape and dtype as `input`, other memory; undefined on error.
            input: contiguous; unharmed whatever happens.
            op: as for `all_reduce`.
            label: a name for error messages; the same on all ranks.

        Raises:
            ValueError: tensors that differ or are not contiguous, or as `all_reduce`.
        """
        _check(input, output)
        if output.shape != input.shape or output.dtype != input.dtype:
            raise ValueError(
                f"output {output.dtype}{list(output.shape)} and input "
                f"{input.dtype}{list(input.shape)} must have the same shape and dtype"
            )
        if not (output.is_contiguous() and input.is_contiguous()):
            raise ValueError("all_reduce_into needs contiguous tensors")
        return self._all_reduce(input, input.detach().view(-1), output.detach().view(-1), op, label, None)

    def reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum", async_op: bool = False
    ) -> Handle | None:
        """Combine `input` over all ranks; rank i gets slice i of the result.

        Args:
            output: as many elements as `input` has divided by world_size, same dtype.
            input: its flattened elements are cut into world_size equal slices; only read.
            op: as for `all_reduce`.
            async_op: return a handle instead of waiting.

        Raises:
            ValueError: sizes or dtypes that do not fit, or as `all_reduce`.
        """
        _check(input, output)
        checked = check_reducible(input.dtype, op)
        if input.numel() != output.numel() * self.world_size or input.dtype != output.dtype:
            raise ValueError(
                f"reduce_scatter among {self.world_size} ranks needs an input of {self.world_size} "
                f"times the output's elements and its dtype; input is {input.dtype}"
                f"{list(input.shape)}, output {output.dtype}{list(output.shape)}"
            )
        source = input.detach().reshape(-1)
        target, back = _flatten_in_place(output)
        slices = partition(source.numel(), self.world_size)
        piece = self._chunk_numel(slices, accumulation_dtype(input.dtype, checked))
        operation = RingOperation(
            self._call("reduce_scatter", input, piece, op=op),
            RingMachine(schedule.reduce_scatter(self.rank, self.world_size), slices, piece),
            source=source,
            output=target,
            op=checked,
            world_size=self.world_size,
            output_start=slices[self.rank].start,
            finish=self._alone(lambda: target.copy_(source), back),
        )
        return self._finish(self._engine.submit(operation), async_op)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, async_op: bool = False) -> Handle | None:
        """Concatenate every rank's `input`, in rank order, at every rank.

        Args:
            output: world_size times as many elements as `input`, same dtype; any dtype.
            input: same shape on every rank; only read.
            async_op: return a handle instead of waiting.

        Raises:
            ValueError: sizes, dtypes or devices that do not fit.
        """
        _check(input, output)
        if output.numel() != input.numel() * self.world_size or input.dtype != output.dtype:
            raise ValueError(
                f"all_gather among {self.world_size} ranks needs an output of {self.world_size} times "
                f"the input's elements and its dtype; input is {input.dtype}{list(input.shape)}, "
                f"output {output.dtype}{list(output.shape)}"
            )
        target, back = _flatten_in_place(output)
        raw = target.view(torch.uint8)
        slices = partition(raw.numel(), self.world_size)
        own = slices[self.rank]
        raw[own.start : own.stop].copy_(input.detach().reshape(-1).view(torch.uint8))
        machine = schedule.all_gather(self.rank, self.world_size)
        return self._finish(self._move("all_gather", input, machine, slices, raw, back), async_op)

    def broadcast(self, tensor: torch.Tensor, src: int = 0, async_op: bool = False) -> Handle | None:
        """Copy rank `src`'s tensor to all ranks, in place, by a pipelined chain.

        Args:
            tensor: same shape and dtype on every rank; any dtype.
            src: rank whose values all get.
            async_op: return a handle instead of waiting.

        Raises:
            ValueError: `src` is not a rank, or the tensor is not on the CPU.
        """
        if not 0 <= src < self.world_size:
            raise ValueError(f"src must be a rank, 0 to {self.world_size - 1}, not {src}")
        flat, back = _flatten_in_place(tensor)
        raw = flat.view(torch.uint8)
        plan = schedule.broadcast(self.rank, self.world_size, src)
        slices = (Slice(0, raw.numel()),)
        return self._finish(self._move("broadcast", tensor, plan, slices, raw, back, src=src), async_op)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        empty = torch.empty(0, dtype=torch.uint8)
        plan = schedule.all_gather(self.rank, self.world_size)
        slices = partition(0, self.world_size)
        self._move("barrier", empty, plan, slices, empty, None).wait()

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's byte string (any length), in rank order, at every rank."""
        lengths = torch.zeros(self.world_size, dtype=torch.int64)
        self.all_gather(lengths, torch.tensor([len(payload)]))
        longest = int(lengths.max())
        padded = torch.zeros(longest, dtype=torch.uint8)
        if payload:
            padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        gathered = torch.empty(self.world_size, longest, dtype=torch.uint8)
        self.all_gather(gathered, padded)
        return [
            row[:length].numpy().tobytes() for row, length in zip(gathered, lengths.tolist(), strict=True)
        ]

    def record_step(self, step: int) -> None:
        """Note that this rank has applied optimizer step `step`, for events and status."""
        if self._on_step is not None:
            self._on_step(step)

    def statistics(self) -> EngineStatistics:
        """Counters of the engine and its transport."""
        return self._engine.statistics()

    def _all_reduce(
        self,
        tensor: torch.Tensor,
        source: torch.Tensor,
        output: torch.Tensor,
        op: str,
        label: str,
        back: Callable[[], object] | None,
    ) -> Handle:
        checked = check_reducible(tensor.dtype, op)
        slices = partition(source.numel(), self.world_size)
        piece = self._chunk_numel(slices, accumulation_dtype(tensor.dtype, checked))
        operation = RingOperation(
            self._call("all_reduce", tensor, piece, op=op, label=label),
            RingMachine(schedule.all_reduce(self.rank, self.world_size), slices, piece),
            source=source,
            output=output,
            op=checked,
            world_size=self.world_size,
            finish=self._alone(lambda: output.copy_(source) if output is not source else None, back),
        )
        return self._engine.submit(operation)

    def _move(
        self,
        kind: str,
        tensor: torch.Tensor,
        plan: schedule.Schedule,
        slices: tuple[Slice, ...],
        raw: torch.Tensor,
        back: Callable[[], object] | None,
        *,
        src: int | None = None,
    ) -> Handle:
        """A collective that moves bytes and combines nothing, in place in `raw` (uint8)."""
        piece = self._chunk_numel(slices, torch.uint8)
        operation = RingOperation(
            self._call(kind, tensor, piece, src=src),
            RingMachine(plan, slices, piece),
            source=raw,
            output=raw,
            world_size=self.world_size,
            finish=back,
        )
        return self._engine.submit(operation)

    def _call(
        self,
        kind: str,
        tensor: torch.Tensor,
        chunk_numel: int,
        *,
        op: str = "",
        src: int | None = None,
        label: str = "",
    ) -> Call:
        return Call(
            kind=kind,
            op=op,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            src=src,
            label=label,
            chunk_numel=chunk_numel,
        )

    def _chunk_numel(self, slices: tuple[Slice, ...], widest: torch.dtype) -> int:
        return chunk_numel(slices, widest.itemsize, self._exchange.chunk_bytes)

    def _alone(
        self, copy: Callable[[], object], back: Callable[[], object] | None
    ) -> Callable[[], object] | None:
        """What is left to do at the end: a ring of one has to bring its input to the output too."""
        if self.world_size > 1:
            return back
        return lambda: (copy(), back() if back is not None else None)

    def _finish(self, handle: Handle, async_op: bool) -> Handle | None:
        if async_op:
            return handle
        handle.wait()
        return None


def _check(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(f"this version handles tensors on the CPU; this one is on {tensor.device}")
        if tensor.layout is not torch.strided:
            raise ValueError(f"this version handles dense tensors, not {tensor.layout}")


def _flatten_in_place(tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object] | None]:
    """The tensor's elements as a flat contiguous tensor, and what brings changes of it back."""
    _check(tensor)
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1), None
    flat = tensor.contiguous().view(-1)
    return flat, lambda: tensor.copy_(flat.view(tensor.shape))
