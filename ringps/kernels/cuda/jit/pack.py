"""Gathering tensors into a flat one, and scattering them again."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

# Addresses that no tensor has. Python numbers for the wrapper, constexprs for the kernels.
SKIP = 0
ZEROS = 1
_SKIP = tl.constexpr(SKIP)
_ZEROS = tl.constexpr(ZEROS)


@triton.jit
def _cast(values, TARGET: tl.constexpr):
    # torch rounds a float64 to 16 bits by way of float32.
    if TARGET.primitive_bitwidth == 16 and values.dtype != TARGET:
        values = values.to(tl.float32)
    return values.to(TARGET)


@triton.jit
def _weighted(values, weight):
    # torch multiplies 16-bit floats in float32, and rounds the product.
    if values.dtype == tl.float64:
        return values * weight
    return (values.to(tl.float32) * weight.to(tl.float32)).to(values.dtype)


@triton.jit
def _move(
    source, target, offset, size, weight, SCALED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    # Triton reads and writes 16 bytes at once only where it knows the addresses to allow it, and has no mask.
    source += offset
    target += offset
    lanes = tl.arange(0, BLOCK)
    if WIDE:
        source = tl.multiple_of(source, 16)
        target = tl.multiple_of(target, 16)
        values = tl.load(source + lanes)
    else:
        values = tl.load(source + lanes, mask=offset + lanes < size)
    if SCALED:
        values = _weighted(values, weight)
    values = _cast(values, target.dtype.element_ty)
    if WIDE:
        tl.store(target + lanes, values)
    else:
        tl.store(target + lanes, values, mask=offset + lanes < size)


@triton.jit
def _slot(slots, slot_of_block, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_of_block + block)
    start = tl.load(slots + 3 * slot)
    size = tl.load(slots + 3 * slot + 1)
    first_block = tl.load(slots + 3 * slot + 2)
    return slot, start, size, (block - first_block) * BLOCK


@triton.jit(
    do_not_specialize=["weight_bits"],
    do_not_specialize_on_alignment=["addresses", "slots", "slot_of_block", "flat"],
)
def pack(
    addresses,
    slots,
    slot_of_block,
    flat,
    weight_bits: tl.int64,
    SOURCE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one slot.

    addresses: int64[slots]; SKIP: another launch sees to the slot, ZEROS: it has no source.
    slots: int64[slots, 3]: where a slot starts in `flat`, its size, and the number of its first block.
    slot_of_block: int64[blocks].
    weight_bits: those of a float64; Triton would pass a Python number as float32.
    """
    slot, start, size, offset = _slot(slots, slot_of_block, BLOCK)
    address = tl.load(addresses + slot)
    target = flat + start
    weight = weight_bits.to(tl.int64).to(tl.float64, bitcast=True)
    if address == _ZEROS:
        lanes = tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], flat.dtype.element_ty)
        tl.store(target + offset + lanes, zeros, mask=offset + lanes < size)
    elif address != _SKIP:
        source = address.to(tl.pointer_type(SOURCE))
        if ((address | target.to(tl.int64)) & 15) == 0 and offset + BLOCK <= size:
            _move(source, target, offset, size, weight, SCALED, True, BLOCK)
        else:
            _move(source, target, offset, size, weight, SCALED, False, BLOCK)


@triton.jit(do_not_specialize_on_alignment=["addresses", "slots", "slot_of_block", "flat"])
def unpack(addresses, slots, slot_of_block, flat, TARGET: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one slot, as `pack`; SKIP: nobody wants it."""
    slot, start, size, offset = _slot(slots, slot_of_block, BLOCK)
    address = tl.load(addresses + slot)
    source = flat + start
    if address != _SKIP:
        target = address.to(tl.pointer_type(TARGET))
        if ((address | source.to(tl.int64)) & 15) == 0 and offset + BLOCK <= size:
            _move(source, target, offset, size, 0.0, False, True, BLOCK)
        else:
            _move(source, target, offset, size, 0.0, False, False, BLOCK)
