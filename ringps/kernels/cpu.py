"""Combining chunks on the CPU, with torch's vectorised operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch

ReduceOp = Literal["sum", "mean", "min", "max", "prod"]
REDUCE_OPS: tuple[ReduceOp, ...] = get_args(ReduceOp)

_COMBINE: dict[ReduceOp, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
    "prod": torch.mul,
}
_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8})
_HALVES = frozenset({torch.float16, torch.bfloat16})


def check_reducible(dtype: torch.dtype, op: str) -> ReduceOp:
    """`op`, if tensors of `dtype` can be reduced by it.

    Raises:
        ValueError: unknown op, a dtype that torch cannot add on the CPU, the mean of integers, or
            anything but min and max of bool.
    """
    if op not in REDUCE_OPS:
        raise ValueError(f"op must be one of {', '.join(REDUCE_OPS)}, not {op!r}")
    if dtype is torch.bool:
        if op not in ("min", "max"):
            raise ValueError(f"bool tensors reduce by min (all) or max (any), not by {op}")
    elif dtype not in _FLOATS and dtype not in _INTEGERS:
        raise ValueError(f"cannot reduce {dtype}; torch has no CPU addition for it that ringps uses")
    elif op == "mean" and dtype not in _FLOATS:
        raise ValueError(f"mean needs a floating-point dtype, not {dtype}; use sum and divide")
    return op


def accumulation_dtype(dtype: torch.dtype, op: ReduceOp) -> torch.dtype:
    """Dtype of partial results: float32 for 16-bit floats, which min and max do not need."""
    return torch.float32 if dtype in _HALVES and op not in ("min", "max") else dtype


def combine(op: ReduceOp, received: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A partial result in the accumulation dtype.

    Args:
        op: how to combine.
        received: what came from the left, in the input's or the accumulation dtype. Overwritten
            with the result if it has the accumulation dtype already.
        own: this rank's input, same shape.

    Returns:
        `received` or a new tensor.
    """
    partial = received.to(accumulation_dtype(own.dtype, op))
    return _COMBINE[op](partial, own, out=partial)


def complete(
    op: ReduceOp, received: torch.Tensor, own: torch.Tensor, out: torch.Tensor, world_size: int
) -> None:
    """The result of all ranks, written to `out`, which may be `own`.

    A mean is divided before it is rounded to a 16-bit dtype.
    """
    if accumulation_dtype(own.dtype, op) is out.dtype:
        _COMBINE[op](received, own, out=out)
        if op == "mean":
            out.div_(world_size)
        return
    partial = combine(op, received, own)
    if op == "mean":
        partial.div_(world_size)
    out.copy_(partial)
