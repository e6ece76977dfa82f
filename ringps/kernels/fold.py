"""Reducing blocks of several inputs at once, in a fixed order, with the bits of a ring.

In a ring the value of an element starts at one rank and every further rank adds its own on the right:
`((a + b) + c) + d`. `Fold` does the same to blocks that all lie in this process's reach. NumPy calls cost
a third of torch's, which counts for blocks that are to stay in cache; the 16-bit floats, which
NumPy reduces slowly or not at all, go through torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ringps.kernels.cpu import ReduceOp, accumulation_dtype

Block = Any
"""Elements in a row: a NumPy array, or a flat torch tensor where the dtype is a 16-bit float."""

_NUMPY: dict[torch.dtype, type[np.generic]] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}
_UFUNCS: dict[ReduceOp, np.ufunc] = {
    "sum": np.add,
    "mean": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "prod": np.multiply,
}
_OPERATORS: dict[ReduceOp, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
    "prod": torch.mul,
}


class Fold:
    """How inputs of one dtype are combined. Get one by `fold_of`."""

    def __init__(self, dtype: torch.dtype, op: ReduceOp) -> None:
        self.dtype = dtype
        """Of inputs and results."""
        self.partial_dtype = accumulation_dtype(dtype, op)
        """Of what is combined of some of the ranks only."""
        self.itemsize = dtype.itemsize
        self._native = dtype in _NUMPY
        self._mean = op == "mean"
        self._combine: Callable[..., Any] = _UFUNCS[op] if self._native else _OPERATORS[op]

    def block(self, memory: Any, offset_bytes: int, numel: int) -> Block:
        """Elements of a buffer, without a copy."""
        if self._native:
            return np.frombuffer(memory, _NUMPY[self.dtype], numel, offset_bytes)
        if numel == 0:
            return torch.empty(0, dtype=self.dtype)
        return torch.frombuffer(memory, dtype=self.dtype, count=numel, offset=offset_bytes)

    def of(self, tensor: torch.Tensor) -> Block:
        """A flat tensor's elements, without a copy."""
        return tensor.numpy() if self._native else tensor

    def partial_of(self, tensor: torch.Tensor) -> Block:
        """As `of`, for a tensor of the partial dtype."""
        return tensor.numpy() if self._native else tensor

    def scratch(self, numel: int) -> torch.Tensor:
        """Uninitialised memory for partial values."""
        return torch.empty(numel, dtype=self.partial_dtype)

    def partial(self, first: Block, second: Block, out: Block) -> None:
        """`out = first op second`, in the partial dtype; `first` may be `out`."""
        if self._native or self.partial_dtype is self.dtype:
            self._combine(first, second, out=out)
        elif first is out:
            self._combine(out, second, out=out)
        else:
            out.copy_(first)
            self._combine(out, second, out=out)

    def pairwise(self, inputs: Sequence[Block], out: Block) -> None:
        """Combine whole inputs as recursive doubling does: neighbours, then neighbouring pairs, and so on.

        Args:
            inputs: of all ranks, in rank order; only read.
            out: in the partial dtype, no input's memory.
        """
        count = len(inputs)
        if count == 1:
            out[:] = inputs[0]
            return
        pairs = count - (1 << count.bit_length() - 1)
        level = list(inputs)
        folded = 2 * (pairs or count // 2)
        while len(level) > 1:
            combined = [level[at : at + 2] for at in range(0, folded, 2)]
            rest = level[folded:]
            level = []
            for first, second in combined:
                target = out if len(combined) == 1 and not rest else self._spare(out)
                self.partial(first, second, target)
                level.append(target)
            level += rest
            folded = len(level)

    def _spare(self, like: Block) -> Block:
        return np.empty_like(like) if self._native else torch.empty_like(like)

    def finish(self, partial: Block, result: Block, world_size: int) -> None:
        """Turn what all ranks' inputs gave into the result; they may be the same memory."""
        if self._native:
            if self._mean:
                np.divide(partial, world_size, out=result)
            elif result is not partial:
                result[:] = partial
            return
        if self._mean:
            partial.div_(world_size)
        if result is not partial:
            result.copy_(partial)


@lru_cache(maxsize=64)
def fold_of(dtype: torch.dtype, op: ReduceOp) -> Fold:
    """The one for inputs of `dtype` and `op`, which `check_reducible` has accepted."""
    return Fold(dtype, op)
