"""What buckets need of a ring; `ringps.collectives.Communicator` is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ringps.kernels.digest import Digest


class PendingReduction(Protocol):
    """A reduction under way."""

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until the output is complete; raises if it never will be."""


class ReductionRing(Protocol):
    """Collectives that all ranks call in the same order. After a failure they raise for good."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def elastic(self) -> bool:
        """Whether members may come and go."""

    @property
    def joining(self) -> bool:
        """Whether this worker has yet to get the state of the ring that it joins."""

    @property
    def fresh(self) -> bool:
        """Whether what is under way may have been interrupted in an earlier generation."""

    @property
    def raw(self) -> ReductionRing:
        """Collectives that are not done again when a member is lost, for use in `transact`."""

    def transact(
        self,
        attempt: Callable[[int], bytes],
        ballot: Callable[[], Any] = ...,
        heal: Callable[[int, tuple[int, ...]], None] | None = None,
    ) -> Any:
        """Carry out an operation on all ranks or on none; see `collectives.ElasticCommunicator.transact`."""

    def all_reduce_into(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        op: str = "sum",
        *,
        label: str = "",
        then: Callable[[], object] | None = None,
        digest: Digest | None = None,
    ) -> PendingReduction:
        """Start to combine `input` over all ranks into `output`; `input` is only read. `then` is called
        when that is done, before the reduction counts as ended, on any thread. `digest` is fed with the
        output where that costs little."""

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, async_op: bool = False) -> Any:
        """Concatenate every rank's `input`; a `PendingReduction` if `async_op`."""

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> object:
        """Copy rank `src`'s tensor to all ranks, in place."""

    def empty_beside(self, near: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Flat memory that the ring reduces from at its best, on the device that `near` lies on."""

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order."""
