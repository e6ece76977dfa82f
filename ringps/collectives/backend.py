"""What lies between the collectives as users call them and the ways to carry them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch

from ringps.collectives.call import Call
from ringps.collectives.gate import Gate
from ringps.collectives.handle import Handle
from ringps.device import Accelerator
from ringps.errors import RingpsError
from ringps.kernels.cpu import ReduceOp
from ringps.kernels.digest import Digest
from ringps.transport.base import TransportStatistics

REDUCTIONS = ("all_reduce", "reduce_scatter")


class Work(NamedTuple):
    """One collective on this rank. Tensors are flat and contiguous, on the CPU or all on `device`."""

    kind: str
    """`all_reduce`, `reduce_scatter`, `all_gather`, `broadcast` or `barrier`."""

    source: torch.Tensor
    """This rank's input. Only read, unless it is `output`, as in an all_reduce in place and in a broadcast.
    all_gather and broadcast get uint8 views."""

    output: torch.Tensor
    """Where the result goes."""

    op: ReduceOp
    src: int
    """Rank that a broadcast starts from."""

    label: str
    """A name for messages, such as `bucket 3`."""

    shape: tuple[int, ...]
    """What the user passed."""

    dtype: str
    """Likewise."""

    finish: Callable[[], object] | None
    """Called once when the output is complete, on the thread that completed it."""

    digest: Digest | None = None
    """Where the output's parts go while they are in cache, in an order that is the same on all ranks. A
    backend that would have to read them again leaves it alone."""

    device: Accelerator | None = None
    """What the tensors lie on; None: in the CPU's memory."""

    back: Callable[[], object] | None = None
    """With a device: put into its stream behind the result, before `finish`; brings it to the user's
    tensor."""

    gate: Gate | None = None
    """The source is not to be read before this is open."""

    @property
    def ready(self) -> bool:
        """Whether it may begin, as far as this rank is concerned."""
        return self.gate is None or self.gate.is_open


def call_of(work: Work, chunk_numel: int = 0, *, doubles: bool = False) -> Call:
    """What ranks compare of `work`."""
    op = work.op if work.kind in REDUCTIONS else ""
    src = work.src if work.kind == "broadcast" else None
    return _call(work.kind, op, work.dtype, work.shape, src, work.label, chunk_numel, doubles)


@lru_cache(maxsize=256)
def _call(
    kind: str,
    op: str,
    dtype: str,
    shape: tuple[int, ...],
    src: int | None,
    label: str,
    chunk_numel: int,
    doubles: bool,
) -> Call:
    return Call(
        kind=kind,
        op=op,
        dtype=dtype,
        shape=shape,
        src=src,
        label=label,
        chunk_numel=chunk_numel,
        doubles=doubles,
    )


@dataclass(frozen=True)
class EngineStatistics:
    """Counters since the ring was formed."""

    collectives: int
    """Collectives that ended well."""

    refused: Mapping[str, int]
    """Frames turned away, by reason."""

    transport: TransportStatistics | None
    """None where ranks share memory, and in a ring of one."""


class Backend(Protocol):
    """Carries collectives out, in the order in which they are called. Thread-safe.

    After an error that ends the ring, every call raises it.
    """

    def run(self, work: Work) -> None:
        """Return when `work` is done. The calling thread may do it itself."""

    def start(self, work: Work) -> Handle:
        """Carry `work` out in the background."""

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Flat uint8 memory, the best there is for collectives."""

    def fail(self, error: RingpsError) -> None:
        """End every collective, now and later, with `error`. The first error stays."""

    def peer_left(self, rank: int, completed: int) -> None:
        """Rank `rank` called shutdown() after `completed` collectives."""

    def verdict(self, sequence: int, calls: tuple[str, ...]) -> None:
        """What each rank called as number `sequence`, in rank order."""

    def describe(self, sequence: int) -> str:
        """This rank's answer to an inquiry about number `sequence`."""

    def drain(self) -> None:
        """Wait for every collective that was called; raises if the ring broke, now or before."""

    @property
    def completed(self) -> int:
        """Collectives that ended well on this rank."""

    def close(self) -> None:
        """End what is under way with ClosedError and free everything. Idempotent."""

    def statistics(self) -> EngineStatistics:
        """Counters so far."""
