"""Hashing memory into two 64-bit sums."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from ringps.kernels.cuda.digest import FIRST, PLACE, SECOND, SEED, TURN, WORD

_SEED = tl.constexpr(SEED)
_PLACE = tl.constexpr(PLACE)
_WORD = tl.constexpr(WORD)
_FIRST = tl.constexpr(FIRST)
_SECOND = tl.constexpr(SECOND)
_TURN = tl.constexpr(TURN)


@triton.jit
def _mixed(words, places):
    """What words at `places` (uint64: _SEED + number * _PLACE) add to both sums."""
    mixed = words ^ places
    mixed = (mixed ^ (mixed >> 32)) * _WORD
    mixed = mixed ^ (mixed >> 29)
    first = mixed * _FIRST
    second = (mixed ^ _TURN) * _SECOND
    return first ^ (first >> 32), second ^ (second >> 31)


@triton.jit
def _place(number):
    return number.to(tl.uint64) * _PLACE + _SEED


@triton.jit
def _words(data, numbers, count, WIDE: tl.constexpr):
    """Words `numbers` of memory, little-endian; 0 from `count` on."""
    if WIDE:
        words = tl.load(data.to(tl.pointer_type(tl.uint64)) + numbers, mask=numbers < count, other=0)
    else:
        # The memory does not begin where 8 bytes can be read at once.
        ours = numbers[:, None] * 8 + tl.arange(0, 8)[None, :]
        octets = tl.load(data + ours, mask=(numbers < count)[:, None], other=0).to(tl.uint64)
        words = tl.sum(octets << (8 * tl.arange(0, 8))[None, :].to(tl.uint64), axis=1)
    return words


@triton.jit(do_not_specialize=["size_bytes"], do_not_specialize_on_alignment=["data", "out"])
def digest(data, size_bytes: tl.int64, out, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Every so-manieth block, and in the first instance what is left over. Adds to `out`, which is int64[2].

    WIDE: `data`, which is uint8, begins at a multiple of 8 bytes.
    """
    size = size_bytes.to(tl.int64)
    count = size // 8
    program = tl.program_id(0).to(tl.int64)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    numbers = program * BLOCK + tl.arange(0, BLOCK)
    places = _place(numbers + 2)
    step = _place(stride) - _SEED
    firsts = tl.zeros([BLOCK], tl.uint64)
    seconds = tl.zeros([BLOCK], tl.uint64)
    start = program * BLOCK
    while start < count:
        first, second = _mixed(_words(data, numbers, count, WIDE), places)
        here = numbers < count
        firsts += tl.where(here, first, 0)
        seconds += tl.where(here, second, 0)
        numbers += stride
        places += step
        start += stride
    first_sum = tl.sum(firsts)
    second_sum = tl.sum(seconds)
    if program == 0:
        # Word 0 is the size, word 1 the bytes behind the last whole word.
        octets = tl.arange(0, 8)
        left = tl.load(data + count * 8 + octets, mask=count * 8 + octets < size, other=0).to(tl.uint64)
        tail = tl.sum(left << (8 * octets).to(tl.uint64))
        zero = count * 0
        first, second = _mixed(size.to(tl.uint64), _place(zero))
        first_sum += first
        second_sum += second
        first, second = _mixed(tail, _place(zero + 1))
        first_sum += first
        second_sum += second
    tl.atomic_add(out, first_sum.to(tl.int64, bitcast=True))
    tl.atomic_add(out + 1, second_sum.to(tl.int64, bitcast=True))
