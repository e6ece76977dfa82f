"""The public functions on this process's ring: `ringps.rank()`, `ringps.all_reduce()` and so on.

All of them raise `ClosedError` before `ringps.init()` and after `ringps.shutdown()`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringps import worker_env
from ringps.collectives.current import current
from ringps.collectives.handle import Handle


def rank() -> int:
    """This worker's position in the ring, 0 to world_size - 1; may change with the generation."""
    return current().rank


def world_size() -> int:
    """Number of workers in the ring."""
    return current().world_size


def local_rank() -> int:
    """This worker's position among those of its machine, and before it is a member (`joining()`), the place
    that its launcher gave it: so also a worker that takes another's place has that one's GPU to itself."""
    env = worker_env.read() if current().joining else None
    if env is not None:
        return env.local_rank
    view = current().generation
    return view.local_ranks.index(view.rank)


def generation() -> int:
    """Number of the current membership; grows with every change, 1 is the first."""
    return current().generation.number


def worker_id() -> int:
    """This worker's number, which it keeps for the whole job."""
    view = current().generation
    return view.members[view.rank].worker_id


def joining() -> bool:
    """Whether this worker started while a ring runs, and has yet to get its state.

    True from `ringps.init()` to the first step of `ringps.TrainState.steps`. `rank()` and `world_size()` are
    what they will be if nothing changes meanwhile.
    """
    return current().joining


def all_reduce(tensor: torch.Tensor, op: str = "sum", async_op: bool = False) -> Handle | None:
    """Combine a tensor over all ranks in place; see `Communicator.all_reduce`.

    Args:
        tensor: any shape and strides, on the CPU or this worker's GPU; float, integer, or (min and max) bool.
        op: "sum", "mean", "min", "max" or "prod".
        async_op: return a `Handle` at once; the tensor is the ring's until `Handle.wait` returns.

    Raises:
        ValueError: a tensor or op that cannot be reduced.
        RingBrokenError, CollectiveError, ClosedError: no result; the contents are undefined.
    """
    return current().all_reduce(tensor, op, async_op)


def reduce_scatter(
    output: torch.Tensor, input: torch.Tensor, op: str = "sum", async_op: bool = False
) -> Handle | None:
    """Combine `input` over all ranks; rank i gets the i-th of world_size equal slices in `output`.

    Arguments and errors as for `all_reduce`; `input` is only read.
    """
    return current().reduce_scatter(output, input, op, async_op)


def all_gather(output: torch.Tensor, input: torch.Tensor, async_op: bool = False) -> Handle | None:
    """Concatenate all ranks' `input`, any dtype, in rank order in `output`, which is world_size
    times as large. Errors as for `all_reduce`."""
    return current().all_gather(output, input, async_op)


def broadcast(tensor: torch.Tensor, src: int = 0, async_op: bool = False) -> Handle | None:
    """Give every rank the values of rank `src`, any dtype, in place. Errors as for `all_reduce`."""
    return current().broadcast(tensor, src, async_op)


def empty(
    size: int | Sequence[int], dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """An uninitialised tensor that peers on this host reduce from without a copy.

    Where ranks share no memory it is an ordinary tensor. A process forked from this one (a `DataLoader`
    worker) shares it: what it writes there is seen here.

    Args:
        size: shape, or number of elements.
        dtype: torch's default dtype if None.
        device: this worker's GPU, such as "cuda"; the CPU if None.

    Raises:
        MemoryError: there is no room for it; says what to do.
        ClosedError: no ring.
    """
    return current().empty(size, dtype, device)


def barrier() -> None:
    """Return when every rank has called it. Errors as for `all_reduce`."""
    current().barrier()
