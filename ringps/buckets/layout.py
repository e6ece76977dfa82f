"""PURE: which parameter lies in which bucket, and where.

A bucket is a flat tensor of one dtype. Behind its gradients it has one flag per parameter, which
says whether a rank has a gradient for it, and one more for the rank itself; so what a rank lacks is
learned by the same reduction.

::

    | gradient | pad | gradient | pad | ... | flag flag ... | rank's flag |
      ^ every gradient starts on 64 bytes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """What the planner knows of a parameter."""

    numel: int
    dtype: str
    itemsize_bytes: int


class Slot(NamedTuple):
    """Elements start..stop of a bucket hold the gradient of parameter `parameter`."""

    parameter: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A plan for one flat tensor."""

    dtype: str
    slots: tuple[Slot, ...]
    """In the order in which the gradients are expected."""

    numel: int
    """Elements in all: gradients, padding and flags."""

    closed_by: Literal["cap", "end"]
    """Why no further parameter is in it: it would not fit, or there was none left of this dtype."""

    @property
    def flags_start(self) -> int:
        """Index of the first parameter's flag; the rank's flag is the last element."""
        return self.numel - len(self.slots) - 1


def plan(
    parameters: Sequence[ParameterSpec], order: Sequence[int], *, cap_bytes: int, first_cap_bytes: int
) -> tuple[Bucket, ...]:
    """Lay `parameters` out in buckets.

    One bucket per dtype is open at a time. A bucket is closed when the next parameter would lift its
    gradients over the cap; a parameter larger than the cap has a bucket of its own.

    Args:
        parameters: by index.
        order: the indices, in the order in which gradients are expected.
        cap_bytes: most bytes of gradients and padding in a bucket.
        first_cap_bytes: the same for the bucket that the first gradient goes to. A small one gets
            the ring to work early.

    Returns:
        Buckets in the order in which they become complete, which is the order to launch them in.
    """
    if sorted(order) != list(range(len(parameters))):
        raise ValueError(f"order must name each of {len(parameters)} parameters once")
    open_: dict[str, _Draft] = {}
    closed: list[tuple[int, Bucket]] = []
    for rank, index in enumerate(order):
        spec = parameters[index]
        draft = open_.get(spec.dtype)
        if draft is not None and not draft.fits(spec):
            closed.append((draft.last_rank, draft.close("cap")))
            draft = None
        if draft is None:
            cap = first_cap_bytes if rank == 0 else cap_bytes
            draft = open_[spec.dtype] = _Draft(spec.dtype, cap, spec.itemsize_bytes)
        draft.add(index, spec, rank)
    closed += [(draft.last_rank, draft.close("end")) for draft in open_.values()]
    return tuple(bucket for _, bucket in sorted(closed, key=lambda pair: pair[0]))


class _Draft:
    def __init__(self, dtype: str, cap_bytes: int, itemsize_bytes: int) -> None:
        self._dtype = dtype
        self._cap_numel = cap_bytes // itemsize_bytes
        self._slots: list[Slot] = []
        self._end = 0
        self.last_rank = 0

    def fits(self, spec: ParameterSpec) -> bool:
        return self._end + spec.numel <= self._cap_numel

    def add(self, index: int, spec: ParameterSpec, rank: int) -> None:
        self._slots.append(Slot(index, self._end, self._end + spec.numel))
        step = max(1, ALIGNMENT_BYTES // spec.itemsize_bytes)
        self._end = -(-self._slots[-1].stop // step) * step
        self.last_rank = rank

    def close(self, reason: Literal["cap", "end"]) -> Bucket:
        numel = self._end + len(self._slots) + 1
        return Bucket(dtype=self._dtype, slots=tuple(self._slots), numel=numel, closed_by=reason)
