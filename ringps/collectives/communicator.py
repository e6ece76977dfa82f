"""The collectives as users call them: checks the arguments, lays out memory, hands on to a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, NamedTuple, overload

import torch

from ringps.collectives.backend import Backend, EngineStatistics, Work
from ringps.collectives.handle import Handle
from ringps.device import Accelerator, accelerator_of
from ringps.kernels.cpu import ReduceOp, check_reducible
from ringps.kernels.digest import Digest
from ringps.ring.commit import Ballot, Vote
from ringps.ring.lanes import hosts
from ringps.ring.topology import Generation


class Outcome(NamedTuple):
    """How an operation was committed."""

    attempts: int = 1
    """How often this rank tried."""

    votes: tuple[Vote, ...] | None = None
    """Every rank's; None where there was no vote, or not all votes have come here (it was rolled forward)."""


class Communicator:
    """Collectives among the members of a generation.

    All ranks must call the same collectives, with the same shapes, dtypes and options, in the same
    order; ranks that do not get `CollectiveMismatchError`. Tensors are on the CPU or on this worker's GPU,
    on all ranks alike, of any strides; a contiguous tensor takes part without a copy. Calls may come from
    any thread, but then it is up to the caller that the order is the same on every rank.

    A collective on a GPU begins when the calling thread's stream has got to where it was called, and has its
    result, for all streams, when the call or `Handle.wait` returns. NCCL sums float16 and bfloat16 in their
    own precision, and multiplies by 1 / world_size before it adds up a mean.

    With `async_op=True` a call returns a `Handle` at once and its tensors belong to the collective
    until `Handle.wait` returns; otherwise it returns None when the result is there. All raise what
    `Handle.wait` raises; a ring that is broken stays broken.
    """

    def __init__(
        self,
        generation: Generation,
        backend: Backend,
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            generation: who is in the ring.
            backend: carries the collectives out.
            on_step: called with the number of each step that was applied.
        """
        self._generation = generation
        self._backend = backend
        self._on_step = on_step
        self._last_step = 0
        self.marks: Callable[[], int] = lambda: 0
        """8 bits that every rank is told of this one between two steps; set by who saves checkpoints."""

    @property
    def elastic(self) -> bool:
        """Whether members may come and go."""
        return False

    @property
    def least(self) -> int:
        """With how many members the ring still goes on."""
        return self.world_size

    @property
    def joining(self) -> bool:
        """Whether this worker has yet to get the state of the ring that it joins."""
        return False

    @property
    def fresh(self) -> bool:
        """Whether what is under way may have been interrupted in an earlier generation."""
        return False

    @property
    def raw(self) -> Communicator:
        """The collectives of the current generation alone: one that is interrupted is not done again."""
        return self

    def transact(
        self,
        attempt: Callable[[int], bytes],
        ballot: Callable[[], Ballot] = Ballot,
        heal: Callable[[int, tuple[int, ...]], None] | None = None,
    ) -> Outcome:
        """Carry out an operation; see `ElasticCommunicator.transact`. In a fixed ring: once, without a vote.

        Args:
            attempt: does it, with the collectives of `raw`.
            ballot: not asked for here.
            heal: likewise.
        """
        attempt(0)
        return Outcome()

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
        2 (n - 1) / n times the tensor's bytes. Small tensors go by recursive doubling (Thakur,
        Rabenseifner and Gropp, 2005), and inside a host through shared memory. float16 and bfloat16
        are summed in float32.

        Args:
            tensor: any shape, also zero-dimensional or empty. After an error its contents are
                undefined.
            op: "sum", "mean" (floating dtypes only), "min", "max" or "prod"; bool tensors: "min"
                and "max".
            async_op: return a handle instead of waiting.

        Raises:
            ValueError: dtype, device or op that cannot be reduced.
        """
        device = _device_of(tensor)
        flat, back = _flatten_in_place(tensor)
        checked = check_reducible(tensor.dtype, op)
        return self._carry_out(
            _work("all_reduce", tensor, flat, flat, back, op=checked, device=device), async_op
        )

    def all_reduce_into(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        op: str = "sum",
        *,
        label: str = "",
        then: Callable[[], object] | None = None,
        digest: Digest | None = None,
    ) -> Handle:
        """As `all_reduce`, out of place and asynchronous; `input` is only read.

        Args:
            output: contiguous, same shape and dtype as `input`, other memory; undefined on error.
            input: contiguous; unharmed whatever happens.
            op: as for `all_reduce`.
            label: a name for error messages; the same on all ranks.
            then: called when the output is complete, before the handle is done, on any thread.
            digest: is fed with the output where that costs little; see `backend.Work`.

        Raises:
            ValueError: tensors that differ or are not contiguous, or as `all_reduce`.
        """
        device = _device_of(input, output)
        if output.shape != input.shape or output.dtype != input.dtype:
            raise ValueError(
                f"output {output.dtype}{list(output.shape)} and input "
                f"{input.dtype}{list(input.shape)} must have the same shape and dtype"
            )
        if not (output.is_contiguous() and input.is_contiguous()):
            raise ValueError("all_reduce_into needs contiguous tensors")
        source, target = input.detach().view(-1), output.detach().view(-1)
        checked = check_reducible(input.dtype, op)
        work = _work("all_reduce", input, source, target, None, op=checked, label=label, device=device)
        return self._backend.start(work._replace(finish=then, digest=digest))

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
        device = _device_of(input, output)
        checked = check_reducible(input.dtype, op)
        if input.numel() != output.numel() * self.world_size or input.dtype != output.dtype:
            raise ValueError(
                f"reduce_scatter among {self.world_size} ranks needs an input of {self.world_size} "
                f"times the output's elements and its dtype; input is {input.dtype}"
                f"{list(input.shape)}, output {output.dtype}{list(output.shape)}"
            )
        source = input.detach().reshape(-1)
        target, back = _flatten_in_place(output)
        work = _work("reduce_scatter", input, source, target, back, op=checked, device=device)
        return self._carry_out(work, async_op)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, async_op: bool = False) -> Handle | None:
        """Concatenate every rank's `input`, in rank order, at every rank.

        Args:
            output: world_size times as many elements as `input`, same dtype; any dtype.
            input: same shape on every rank; only read.
            async_op: return a handle instead of waiting.

        Raises:
            ValueError: sizes, dtypes or devices that do not fit.
        """
        device = _device_of(input, output)
        if output.numel() != input.numel() * self.world_size or input.dtype != output.dtype:
            raise ValueError(
                f"all_gather among {self.world_size} ranks needs an output of {self.world_size} times "
                f"the input's elements and its dtype; input is {input.dtype}{list(input.shape)}, "
                f"output {output.dtype}{list(output.shape)}"
            )
        source = input.detach().reshape(-1).view(torch.uint8)
        target, back = _flatten_in_place(output)
        work = _work("all_gather", input, source, target.view(torch.uint8), back, device=device)
        return self._carry_out(work, async_op)

    def broadcast(self, tensor: torch.Tensor, src: int = 0, async_op: bool = False) -> Handle | None:
        """Copy rank `src`'s tensor to all ranks, in place, by a pipelined chain.

        Args:
            tensor: same shape and dtype on every rank; any dtype.
            src: rank whose values all get.
            async_op: return a handle instead of waiting.

        Raises:
            ValueError: `src` is not a rank, or the tensor is on another device.
        """
        if not 0 <= src < self.world_size:
            raise ValueError(f"src must be a rank, 0 to {self.world_size - 1}, not {src}")
        device = _device_of(tensor)
        flat, back = _flatten_in_place(tensor)
        raw = flat.view(torch.uint8)
        return self._carry_out(_work("broadcast", tensor, raw, raw, back, src=src, device=device), async_op)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        empty = torch.empty(0, dtype=torch.uint8)
        self._backend.run(_work("barrier", empty, empty, empty, None))

    def empty(
        self,
        size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """An uninitialised tensor that peers on this host reduce from without a copy.

        Where ranks share no memory it is an ordinary tensor. A process that this one forks shares the
        memory: what it writes to the tensor is seen here.

        Args:
            size: its shape, or the number of elements.
            dtype: torch's default dtype if None.
            device: this worker's GPU, or the CPU if None.

        Raises:
            MemoryError: there is no room for it; says what to do.
            ValueError: a device that ringps cannot exchange data with.
        """
        near = torch.empty(1, device=device or "cpu")
        return self.empty_beside(near, size, dtype)

    def empty_beside(
        self, near: torch.Tensor, size: int | Sequence[int], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """As `empty`, on the device that `near`, which is not empty, lies on."""
        shape = (size,) if isinstance(size, int) else tuple(size)
        dtype = dtype or torch.get_default_dtype()
        size_bytes = math.prod(shape) * dtype.itemsize
        device = accelerator_of(near)
        if device is None:
            memory = self._backend.allocate(size_bytes)
        elif device.peer_memory is not None and len(hosts(self._generation)) == 1:
            memory = device.peer_memory.allocate(size_bytes)
        else:
            memory = torch.empty(size_bytes, dtype=torch.uint8, device=near.device)
        return memory.view(dtype).view(shape)

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
        self._last_step = step
        if self._on_step is not None:
            self._on_step(step)

    def statistics(self) -> EngineStatistics:
        """Counters of the engine and its transport."""
        return self._backend.statistics()

    def _carry_out(self, work: Work, async_op: bool) -> Handle | None:
        if async_op:
            return self._backend.start(work)
        self._backend.run(work)
        return None


def _work(
    kind: str,
    tensor: torch.Tensor,
    source: torch.Tensor,
    output: torch.Tensor,
    back: Callable[[], object] | None,
    *,
    op: ReduceOp = "sum",
    src: int = 0,
    label: str = "",
    device: Accelerator | None = None,
) -> Work:
    """A collective on `tensor`, on flat memory; `back` brings its result to the user's."""
    return Work(
        kind=kind,
        source=source,
        output=output,
        op=op,
        src=src,
        label=label,
        shape=tensor.shape,
        dtype=_name(tensor.dtype),
        finish=back if device is None else None,
        device=device,
        back=None if device is None else back,
    )


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device_of(first: torch.Tensor, *others: torch.Tensor) -> Accelerator | None:
    """What the tensors of a collective lie on."""
    for tensor in (first, *others):
        if tensor.layout is not torch.strided:
            raise ValueError(f"this version handles dense tensors, not {tensor.layout}")
    device = accelerator_of(first)
    for tensor in others:
        if accelerator_of(tensor) is not device:
            raise ValueError(
                f"input and output must be on one device; they are on {first.device} and {tensor.device}"
            )
    return device


def _flatten_in_place(tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object] | None]:
    """The tensor's elements as a flat contiguous tensor, and what brings changes of it back."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1), None
    flat = tensor.contiguous().view(-1)
    return flat, lambda: tensor.copy_(flat.view(tensor.shape))
