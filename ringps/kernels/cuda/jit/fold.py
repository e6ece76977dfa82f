"""Combining up to eight tensors element by element."""

# Triton reads the source: a branch must stay a branch.
# ruff: noqa: RET505, SIM108, SIM300
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

INPUTS = 8

# What a dtype is computed in; min and max of 16-bit floats lose nothing by it.
TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
    torch.uint8: tl.uint8,
}


@triton.jit
def _read(
    source, start, numel, ACC: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    source += start
    lanes = tl.arange(0, BLOCK)
    if ALIGNED:
        source = tl.multiple_of(source, 16)
    if WHOLE:
        values = tl.load(source + lanes)
    else:
        values = tl.load(source + lanes, mask=start + lanes < numel)
    return values.to(ACC)


@triton.jit
def _combine(first, second, OP: tl.constexpr):
    # Integers wrap around.
    if OP == "sum":
        return tl.add(first, second, sanitize_overflow=False)
    elif OP == "prod":
        return tl.mul(first, second, sanitize_overflow=False)
    elif OP == "min":
        # A NaN on either side is what comes out.
        return tl.where((first < second) | (first != first), first, second)
    else:
        return tl.where((first > second) | (first != first), first, second)


@triton.jit
def _fold_block(
    in0,
    in1,
    in2,
    in3,
    in4,
    in5,
    in6,
    in7,
    out,
    start,
    numel,
    divisor,
    COUNT: tl.constexpr,
    OP: tl.constexpr,
    ACC: tl.constexpr,
    DIVIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = _read(in0, start, numel, ACC, ALIGNED, WHOLE, BLOCK)
    if COUNT > 1:
        total = _combine(total, _read(in1, start, numel, ACC, ALIGNED, WHOLE, BLOCK), OP)
    if COUNT > 2:
        total = _combine(total, _read(in2, start, numel, ACC, ALIGNED, WHOLE, BLOCK), OP)
    if COUNT > 3:
        total = _combine(total, _read(in3, start, numel, ACC, ALIGNED, WHOLE, BLOCK), OP)
    if COUNT > 4:
        total = _combine(total, _read(in4, start, numel, ACC, ALIGNED, WHOLE, BLOCK), OP)
    if COUNT > 5:
        total = _combine(total, _read(in5, start, numel, ACC, ALIGNED, WHOLE, BLOCK), OP)
    if COUNT > 6:
        total = _combine(total, _read(in6, start, numel, ACC, ALIGNED, WHOLE, BLOCK), OP)
    if COUNT > 7:
        total = _combine(total, _read(in7, start, numel, ACC, ALIGNED, WHOLE, BLOCK), OP)
    if DIVIDE:
        # Triton's `/` of float32 is off by up to two units in the last place; float64's is exact.
        if ACC == tl.float64:
            total = total / divisor.to(ACC)
        else:
            total = tl.div_rn(total, divisor.to(ACC))
    total = total.to(out.dtype.element_ty)
    out += start
    lanes = tl.arange(0, BLOCK)
    if ALIGNED:
        out = tl.multiple_of(out, 16)
    if WHOLE:
        tl.store(out + lanes, total)
    else:
        tl.store(out + lanes, total, mask=start + lanes < numel)


@triton.jit(
    do_not_specialize=["numel", "divisor"],
    do_not_specialize_on_alignment=["in0", "in1", "in2", "in3", "in4", "in5", "in6", "in7", "out"],
)
def fold(
    in0,
    in1,
    in2,
    in3,
    in4,
    in5,
    in6,
    in7,
    out,
    numel: tl.int64,
    divisor: tl.int64,
    COUNT: tl.constexpr,
    OP: tl.constexpr,
    ACC: tl.constexpr,
    DIVIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block. Of the inputs the first COUNT count; ALIGNED: all tensors begin at multiples of 16 bytes."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= numel:
        _fold_block(
            in0, in1, in2, in3, in4, in5, in6, in7, out, start, numel, divisor,
            COUNT, OP, ACC, DIVIDE, ALIGNED, True, BLOCK,
        )  # fmt: skip
    else:
        _fold_block(
            in0, in1, in2, in3, in4, in5, in6, in7, out, start, numel, divisor,
            COUNT, OP, ACC, DIVIDE, ALIGNED, False, BLOCK,
        )  # fmt: skip
