"""Blocks of floats to int8 and a scale each, and back."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: adding it leaves a float32 no bits behind the point, rounded half to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _quantize_rows(
    x, values, scales, row, numel, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = row + tl.arange(0, ROWS)
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        given = tl.load(x + places).to(tl.float32)
    else:
        given = tl.load(x + places, mask=places < numel, other=0.0).to(tl.float32)
    # tl.max leaves out NaNs.
    spoilt = tl.max((given != given).to(tl.int32), axis=1)
    largest = tl.max(tl.abs(given), axis=1)
    largest = tl.where(spoilt > 0, float("nan"), largest)
    scale = tl.div_rn(largest, tl.full([ROWS], 127.0, tl.float32))
    usable = (scale > 0.0) & (scale < float("inf"))
    divisor = tl.where(usable, scale, 1.0)
    quotient = tl.div_rn(given, tl.broadcast_to(divisor[:, None], [ROWS, BLOCK]))
    quotient = tl.where(usable[:, None], quotient, 0.0)
    rounded = (quotient + _ROUNDER) - _ROUNDER
    rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
    encoded = rounded.to(tl.int32).to(tl.int8)
    if WHOLE:
        tl.store(values + places, encoded)
        tl.store(scales + rows, scale)
    else:
        tl.store(values + places, encoded, mask=places < numel)
        tl.store(scales + rows, scale, mask=rows * BLOCK < numel)


@triton.jit(do_not_specialize=["numel"])
def quantize(x, values, scales, numel: tl.int64, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS blocks."""
    row = tl.program_id(0).to(tl.int64) * ROWS
    if (row + ROWS) * BLOCK <= numel:
        _quantize_rows(x, values, scales, row, numel, True, ROWS, BLOCK)
    else:
        _quantize_rows(x, values, scales, row, numel, False, ROWS, BLOCK)


@triton.jit
def _dequantize_rows(
    values,
    scales,
    out,
    row,
    numel,
    ADD: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = row + tl.arange(0, ROWS)
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        scale = tl.load(scales + rows)
        decoded = tl.load(values + places).to(tl.float32) * scale[:, None]
        if ADD:
            decoded = tl.load(out + places).to(tl.float32) + decoded
        tl.store(out + places, decoded.to(out.dtype.element_ty))
    else:
        scale = tl.load(scales + rows, mask=rows * BLOCK < numel)
        decoded = tl.load(values + places, mask=places < numel).to(tl.float32) * scale[:, None]
        if ADD:
            decoded = tl.load(out + places, mask=places < numel).to(tl.float32) + decoded
        tl.store(out + places, decoded.to(out.dtype.element_ty), mask=places < numel)


@triton.jit(do_not_specialize=["numel"])
def dequantize(
    values, scales, out, numel: tl.int64, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """ROWS blocks. ADD: to what is in `out`."""
    row = tl.program_id(0).to(tl.int64) * ROWS
    if (row + ROWS) * BLOCK <= numel:
        _dequantize_rows(values, scales, out, row, numel, ADD, True, ROWS, BLOCK)
    else:
        _dequantize_rows(values, scales, out, row, numel, ADD, False, ROWS, BLOCK)
