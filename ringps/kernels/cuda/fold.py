"""Reducing several tensors that this GPU can read, in a fixed order, with the bits of a ring."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringps.kernels.cpu import ReduceOp, accumulation_dtype, check_reducible
from ringps.kernels.cuda.launch import aligned, by_kernel, check_flat, kernels_of, launch
from ringps.kernels.fold import fold_of

# Up to eight inputs are in registers at once: each thread of 4 warps holds 2 loads of 16 bytes of each.
_BLOCK_BYTES = 4096


@torch.no_grad()
def fold(
    inputs: Sequence[torch.Tensor], out: torch.Tensor, op: ReduceOp, world_size: int | None = None
) -> None:
    """`out = ((inputs[0] op inputs[1]) op inputs[2]) ...`, element by element.

    16-bit floats are added and multiplied in float32, and rounded once, at the end. The bits are those of
    `ringps.kernels.fold.Fold`, except those of NaNs, and except which of two zeros of opposite signs min and
    max take. Integers wrap around.

    Args:
        inputs: at least one; contiguous, of one size, on one device and of one dtype that `check_reducible`
            accepts. The first may have the accumulation dtype instead: a partial result that the others
            are added to.
        out: as the inputs; may be one of them. In the accumulation dtype it gets the result unrounded.
        op: how to combine.
        world_size: what a mean is divided by, correctly rounded. None: it is not, for `out` is partial.

    Raises:
        ValueError: tensors that do not fit together, or a dtype that cannot be reduced by `op`.
        SetupError: they are on a GPU, and Triton is not installed.
    """
    dtype = _check(inputs, out, op)
    accumulation = accumulation_dtype(dtype, op)
    if not by_kernel(out):
        _on_cpu(inputs, out, dtype, op, world_size)
        return
    if dtype is torch.bool:
        inputs, out = [tensor.view(torch.uint8) for tensor in inputs], out.view(torch.uint8)
        accumulation = torch.uint8
    width = kernels_of("fold").INPUTS
    if len(inputs) <= width:
        _launch(inputs, out, op, world_size)
        return
    # A partial result takes the first place in the next launch. It cannot lie in `out`, which may be an
    # input.
    partial = torch.empty(out.shape, dtype=accumulation, device=out.device)
    _launch(inputs[:width], partial, op, None)
    rest = inputs[width:]
    while len(rest) > width - 1:
        _launch([partial, *rest[: width - 1]], partial, op, None)
        rest = rest[width - 1 :]
    _launch([partial, *rest], out, op, world_size)


def _launch(inputs: Sequence[torch.Tensor], out: torch.Tensor, op: ReduceOp, world_size: int | None) -> None:
    jit = kernels_of("fold")
    block = _BLOCK_BYTES // out.dtype.itemsize
    launch(
        jit.fold,
        -(-out.numel() // block),
        out.device,
        *inputs,
        *[inputs[0]] * (jit.INPUTS - len(inputs)),
        out,
        out.numel(),
        world_size or 1,
        COUNT=len(inputs),
        OP="sum" if op == "mean" else op,
        ACC=jit.TYPES[inputs[0].dtype],
        DIVIDE=op == "mean" and world_size is not None,
        ALIGNED=aligned(*inputs, out),
        BLOCK=block,
    )


def _check(inputs: Sequence[torch.Tensor], out: torch.Tensor, op: ReduceOp) -> torch.dtype:
    """The dtype of the inputs."""
    if not inputs:
        raise ValueError("there is nothing to fold")
    dtype = inputs[-1].dtype
    check_reducible(dtype, op)
    accumulation = accumulation_dtype(dtype, op)
    for position, tensor in enumerate(inputs):
        if tensor.dtype is not dtype and (position or tensor.dtype is not accumulation):
            raise ValueError(f"input {position} is {tensor.dtype}, and the last one {dtype}")
        if tensor.numel() != out.numel():
            raise ValueError(f"input {position} has {tensor.numel()} elements, and the output {out.numel()}")
        check_flat(f"input {position}", tensor, out)
    check_flat("the output", out, out)
    if out.dtype not in (dtype, accumulation):
        raise ValueError(f"the output is {out.dtype}; {op} of {dtype} gives {dtype} or {accumulation}")
    return dtype


def _on_cpu(
    inputs: Sequence[torch.Tensor],
    out: torch.Tensor,
    dtype: torch.dtype,
    op: ReduceOp,
    world_size: int | None,
) -> None:
    folding = fold_of(dtype, op)
    flat, target = [tensor.view(-1) for tensor in inputs], out.view(-1)
    read_later = any(tensor.data_ptr() == out.data_ptr() for tensor in inputs[1:])
    own = out.dtype is folding.partial_dtype and not read_later
    partial = target if own else folding.scratch(out.numel())
    if len(flat) == 1:
        partial.copy_(flat[0])
    result, first = folding.partial_of(partial), folding.of(flat[0])
    for tensor in flat[1:]:
        folding.partial(first, folding.of(tensor), result)
        first = result
    if op == "mean" and world_size is not None:
        folding.finish(result, result, world_size)
    if partial is not target:
        target.copy_(partial)
