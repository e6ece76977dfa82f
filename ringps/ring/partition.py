"""Which elements belong to which rank, and how a rank's slice is cut into chunks."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

_CHUNKS_PER_SLICE = 2
_LEAST_CHUNK_BYTES = 512 * 1024


class Slice(NamedTuple):
    """A half-open range of elements of a flat tensor."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


def partition(numel: int, world_size: int) -> tuple[Slice, ...]:
    """Cut `numel` elements into `world_size` contiguous slices whose sizes differ by at most one.

    Slice i is the part that rank i owns after reduce-scatter. Slices may be empty.
    """
    if numel < 0 or world_size < 1:
        raise ValueError(f"cannot cut {numel} elements into {world_size} slices")
    bounds = [numel * rank // world_size for rank in range(world_size + 1)]
    return tuple(Slice(*pair) for pair in pairwise(bounds))


def chunk_numel(slices: tuple[Slice, ...], itemsize_bytes: int, limit_bytes: int) -> int:
    """Elements per chunk: half a slice, so that a step overlaps with the next one, but at least
    512 KiB, below which the cost of a chunk outweighs that, and at most `limit_bytes`."""
    longest_bytes = max(part.numel for part in slices) * itemsize_bytes
    chunk_bytes = min(max(longest_bytes // _CHUNKS_PER_SLICE, _LEAST_CHUNK_BYTES), limit_bytes)
    return max(1, chunk_bytes // itemsize_bytes)


def chunk_count(part: Slice, chunk_numel: int) -> int:
    """Number of chunks of a slice; at least 1, so that an empty slice still sends its turn."""
    return max(1, -(-part.numel // chunk_numel))


def chunk(part: Slice, index: int, chunk_numel: int) -> Slice:
    """Elements of chunk `index` of a slice; only the last chunk may be shorter."""
    start = part.start + index * chunk_numel
    return Slice(start, min(start + chunk_numel, part.stop))
