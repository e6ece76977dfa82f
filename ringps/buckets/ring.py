"""What buckets need of a ring; `ringps.collectives.Communicator` is one."""

from __future__ import annotations

from typing import Protocol

import torch


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

    def all_reduce_into(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum", *, label: str = ""
    ) -> PendingReduction:
        """Start to combine `input` over all ranks into `output`; `input` is only read."""

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> object:
        """Copy rank `src`'s tensor to all ranks, in place."""

    def empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Flat memory that the ring reduces from at its best."""

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order."""
