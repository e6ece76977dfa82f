"""PURE: the samples of a global batch, and each rank's share of them.

The samples of step k are a function of (seed, epoch, k) alone. The epoch's order is a keyed
permutation that is evaluated index by index, so it takes no memory and any step can be looked at
without the ones before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import TypeVar

S = TypeVar("S", bound=Sequence[int])

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_LOW_BITS = 16
"""The lowest bits of a product depend on few bits of its factors."""
_DOUBLE_ROUNDS = 4


class Permutation:
    """A permutation of range(length), drawn by (seed, epoch).

    A Feistel network on pairs (left, right) below (rows, columns), the smallest near-square
    rectangle with room for `length`, and cycle walking for the pairs beyond it (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002). Keys come from splitmix64 (Steele, Lea and Flood,
    2014), whose multipliers the rounds use too. It is meant to shuffle, not to keep secrets.
    """

    def __init__(self, seed: int, epoch: int, length: int) -> None:
        self._length = length
        self._columns = max(2, isqrt(length))
        self._rows = -(-length // self._columns)
        state = _mix((seed & _MASK) + _GOLDEN) ^ _mix(_mix(epoch & _MASK) + _GOLDEN)
        keys = [_mix(state + index * _GOLDEN) for index in range(1, 2 * _DOUBLE_ROUNDS + 1)]
        self._keys = tuple(zip(keys[::2], keys[1::2], strict=True))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> int:
        """The index that stands at `position`, 0 to length - 1."""
        if not 0 <= position < self._length:
            raise IndexError(f"position {position} of a permutation of {self._length}")
        rows, columns = self._rows, self._columns
        index = position
        while True:
            left, right = divmod(index, columns)
            for even, odd in self._keys:
                # Written out twice, for this is what drawing a sample costs.
                mixed = (right + even) * _FIRST & _MASK
                left = (left + (((mixed ^ mixed >> 32) * _SECOND & _MASK) >> _LOW_BITS)) % rows
                mixed = (left + odd) * _FIRST & _MASK
                right = (right + (((mixed ^ mixed >> 32) * _SECOND & _MASK) >> _LOW_BITS)) % columns
            index = left * columns + right
            if index < self._length:
                return index


def steps_per_epoch(dataset_len: int, global_batch_size: int, *, drop_last: bool) -> int:
    """Number of global batches in an epoch; the last may be smaller unless it is dropped."""
    full, tail = divmod(dataset_len, global_batch_size)
    return full + bool(tail and not drop_last)


def batch_positions(step: int, dataset_len: int, global_batch_size: int) -> range:
    """Where global batch `step` (from 0) lies in the epoch's order."""
    start = step * global_batch_size
    if not 0 <= start < dataset_len:
        raise IndexError(f"no global batch {step} in {dataset_len} samples by {global_batch_size}")
    return range(start, min(start + global_batch_size, dataset_len))


def global_batch(
    seed: int, epoch: int, step: int, dataset_len: int, global_batch_size: int, *, shuffle: bool = True
) -> list[int]:
    """The samples of global batch `step` (from 0) of `epoch`, whoever trains them.

    Within an epoch no sample comes twice, and none is left out but for a dropped tail.
    """
    positions = batch_positions(step, dataset_len, global_batch_size)
    if not shuffle:
        return list(positions)
    order = Permutation(seed, epoch, dataset_len)
    return [order[position] for position in positions]


def share(batch: S, rank: int, world_size: int) -> S:
    """Rank `rank`'s contiguous part of a batch; parts differ in length by at most one."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not among {world_size}")
    start, stop = (len(batch) * edge // world_size for edge in (rank, rank + 1))
    return batch[start:stop]  # type: ignore[return-value]


def _mix(value: int) -> int:
    """The finalizer of splitmix64: every input bit reaches every output bit."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)
