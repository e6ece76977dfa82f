"""Many tensors into one flat tensor and back, in one launch.

A bucket has hundreds of small gradients, and a copy of each is a launch that takes longer than its bytes. So
one kernel copies all: each of its instances takes a block of one tensor, found in tables that are made
once (Shoeybi et al.'s and Apex's multi-tensor apply work so).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from ringps.kernels.cuda.launch import (
    by_kernel,
    check_flat,
    kernels_of,
    launch,
    stream_key,
    upload,
)

FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})

# Each thread of 4 warps has 8 loads of 16 bytes under way: enough to hide memory's latency, in few
# registers, while a tensor's last block, which goes element by element, stays a small part of it. Trying out
# sizes at run time would compile every kernel several times.
_BLOCK_BYTES = 16384


class PackPlan:
    """Where tensors lie in a flat one. Not thread-safe: use it from one thread at a time.

    The tables on the GPU are kept per stream; those with addresses are made anew when an address has changed.
    """

    def __init__(
        self, sizes: Sequence[int], starts: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """
        Args:
            sizes: elements of each tensor, in order.
            starts: where each begins in the flat tensor, in elements. Slots of which starts and addresses are
                multiples of 16 bytes are copied fastest.
            dtype: of the flat tensor: float64, float32, float16 or bfloat16.
            device: where all tensors are.

        Raises:
            ValueError: slots that overlap or are negative, or another dtype.
        """
        if len(sizes) != len(starts):
            raise ValueError(f"{len(sizes)} sizes and {len(starts)} starts")
        if dtype not in FLOATS:
            raise ValueError(f"cannot pack into {dtype}; only into float64, float32, float16 and bfloat16")
        slots = sorted((start, size) for start, size in zip(starts, sizes, strict=True) if size)
        if any(start < 0 or size < 0 for start, size in slots):
            raise ValueError("sizes and starts must not be negative")
        for (start, size), (following, _) in pairwise(slots):
            if start + size > following:
                raise ValueError(
                    f"the slot at {start} has {size} elements, and the next begins at {following}"
                )
        self._sizes, self._starts = tuple(sizes), tuple(starts)
        self._dtype, self._device = dtype, torch.device(device)
        self._extent = sum(slots[-1]) if slots else 0
        self._block = _BLOCK_BYTES // dtype.itemsize
        blocks = [-(-size // self._block) for size in self._sizes]
        first_blocks = [sum(blocks[:position]) for position in range(len(blocks))]
        self._programs = sum(blocks)
        self._slots = torch.tensor(
            list(zip(self._starts, self._sizes, first_blocks, strict=True)), dtype=torch.int64
        )
        self._slot_of_block = torch.arange(len(blocks)).repeat_interleave(
            torch.tensor(blocks, dtype=torch.int64)
        )
        self._uploaded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sources, self._targets = _Addresses(), _Addresses()

    @torch.no_grad()
    def pack(
        self, sources: Sequence[torch.Tensor | None], flat: torch.Tensor, weight: float | None = None
    ) -> None:
        """Copy every source, times `weight`, to its slot. What lies between slots is not written.

        On a GPU, the sources must stay as they are until the current stream has got past it.

        Args:
            sources: as planned: contiguous, of the planned numel and of any shape; of any of the four float
                dtypes, each of its own. None: the slot becomes zeros.
            flat: one-dimensional, contiguous, of the plan's dtype.
            weight: what to multiply by, as `torch.mul(source, weight)` does: the product is rounded to the
                source's dtype, then cast to `flat`'s. None: a copy, to the bit where dtypes are equal.

        Raises:
            ValueError: tensors that the plan is not for.
            SetupError: they are on a GPU, and Triton is not installed.
        """
        self._check(sources, flat, "source")
        if not self._programs:
            return
        if not by_kernel(flat):
            for slot, source in zip(self._slots_of(flat), sources, strict=True):
                if source is None:
                    slot.zero_()
                elif weight is None:
                    slot.copy_(source.view(-1))
                elif source.dtype is slot.dtype:
                    torch.mul(source.view(-1), weight, out=slot)
                else:
                    slot.copy_(torch.mul(source.view(-1), weight))
            return
        jit = kernels_of("pack")
        bits = 0 if weight is None else struct.unpack("<q", struct.pack("<d", weight))[0]
        slots, slot_of_block = self._tables(flat.device)
        for dtype, addresses in self._sources.rows(sources, flat, absent=jit.ZEROS, skip=jit.SKIP):
            launch(
                jit.pack,
                self._programs,
                flat.device,
                addresses,
                slots,
                slot_of_block,
                flat,
                bits,
                SOURCE=jit.TYPES[dtype],
                SCALED=weight is not None,
                BLOCK=self._block,
            )

    @torch.no_grad()
    def unpack(self, flat: torch.Tensor, targets: Sequence[torch.Tensor | None]) -> None:
        """Copy every slot to its target, cast to the target's dtype. A target that is None is left out.

        Args:
            flat: as in `pack`.
            targets: as `pack`'s sources; written. No two may overlap.

        Raises:
            ValueError: tensors that the plan is not for.
            SetupError: they are on a GPU, and Triton is not installed.
        """
        self._check(targets, flat, "target")
        if not self._programs or all(target is None for target in targets):
            return
        if not by_kernel(flat):
            for slot, target in zip(self._slots_of(flat), targets, strict=True):
                if target is not None:
                    target.view(-1).copy_(slot)
            return
        jit = kernels_of("pack")
        slots, slot_of_block = self._tables(flat.device)
        for dtype, addresses in self._targets.rows(targets, flat, absent=jit.SKIP, skip=jit.SKIP):
            launch(
                jit.unpack,
                self._programs,
                flat.device,
                addresses,
                slots,
                slot_of_block,
                flat,
                TARGET=jit.TYPES[dtype],
                BLOCK=self._block,
            )

    def _slots_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        slots = zip(self._starts, self._sizes, strict=True)
        return [flat[start : start + size] for start, size in slots]

    def _check(self, tensors: Sequence[torch.Tensor | None], flat: torch.Tensor, name: str) -> None:
        if flat.dtype is not self._dtype or flat.dim() != 1 or flat.numel() < self._extent:
            raise ValueError(
                f"the flat tensor is {flat.dtype} of shape {tuple(flat.shape)}; the plan is for "
                f"{self._dtype} of one dimension and at least {self._extent} elements"
            )
        if flat.device.type != self._device.type or self._device.index not in (None, flat.device.index):
            raise ValueError(f"the flat tensor is on {flat.device}, and the plan is for {self._device}")
        check_flat("the flat tensor", flat, flat)
        if len(tensors) != len(self._sizes):
            raise ValueError(f"{len(tensors)} {name}s for a plan of {len(self._sizes)}")
        for position, (tensor, size) in enumerate(zip(tensors, self._sizes, strict=True)):
            if tensor is None:
                continue
            if tensor.numel() != size or tensor.dtype not in FLOATS:
                raise ValueError(
                    f"{name} {position} has {tensor.numel()} elements of {tensor.dtype}; the plan is for "
                    f"{size}, of float64, float32, float16 or bfloat16"
                )
            check_flat(f"{name} {position}", tensor, flat)

    def _tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        # A stream that made its own copy has them in order, and may free them, without an event.
        stream = stream_key(device)
        if stream not in self._uploaded:
            self._uploaded[stream] = upload(self._slots, device), upload(self._slot_of_block, device)
        return self._uploaded[stream]


class _Addresses:
    """Where the tensors of the last call begin, on the device."""

    def __init__(self) -> None:
        self._key: Any = None
        self._rows: list[tuple[torch.dtype, torch.Tensor]] = []

    def rows(
        self, tensors: Sequence[torch.Tensor | None], flat: torch.Tensor, *, absent: int, skip: int
    ) -> list[tuple[torch.dtype, torch.Tensor]]:
        """For each dtype among the tensors an int64 tensor with their addresses.

        Args:
            tensors: of all slots.
            flat: what they are copied from or to.
            absent: stands in the first row for None.
            skip: stands for a tensor that another row has.
        """
        entries = [None if tensor is None else (tensor.data_ptr(), tensor.dtype) for tensor in tensors]
        key = (stream_key(flat.device), entries)
        if key != self._key:
            dtypes = list(dict.fromkeys(entry[1] for entry in entries if entry)) or [flat.dtype]
            table = upload(
                [
                    [
                        (skip if row else absent)
                        if entry is None
                        else entry[0]
                        if entry[1] is dtype
                        else skip
                        for entry in entries
                    ]
                    for row, dtype in enumerate(dtypes)
                ],
                flat.device,
            )
            self._rows = list(zip(dtypes, table, strict=True))
            self._key = key
        return self._rows
