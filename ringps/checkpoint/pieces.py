"""The bytes of a list of tensors as one long string, cut into pieces that are moved and compared alone.

In the string each tensor begins at a multiple of `ALIGNMENT`; between two there are zeros. It exists nowhere
as such: a piece is a list of views of the tensors' memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import msgpack
import numpy as np
import torch
import xxhash

from ringps.checkpoint import dtypes
from ringps.errors import FrameError

PIECE_BYTES = 4 * 1024 * 1024
"""Length of every piece but the last: it fits into a core's share of the cache, so that hashing what has
just come costs little, and is long enough that asking for it costs nothing."""

ALIGNMENT = 64
DIGEST_BYTES = 16
MAX_LAYOUT_BYTES = 64 * 1024 * 1024
MAX_TOTAL_BYTES = 2**46
_MAX_DIMENSIONS = 64
_ZEROS = memoryview(bytes(ALIGNMENT))


class TensorSpec(NamedTuple):
    """What must be known of a tensor to make room for it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


class Layout:
    """Where each tensor lies in the string, and each piece."""

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self.specs = tuple(specs)
        self.offsets: list[int] = []
        """Where each tensor begins."""
        end = 0
        for spec in self.specs:
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            self.offsets.append(begin)
            end = begin + spec.size_bytes
        self.total_bytes = end
        self.piece_count = -(-end // PIECE_BYTES)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.specs == other.specs

    __hash__ = None  # type: ignore[assignment]

    def size_of(self, piece: int) -> int:
        """Bytes of a piece."""
        return min(PIECE_BYTES, self.total_bytes - piece * PIECE_BYTES)

    def tensors_in(self, piece: int) -> range:
        """The tensors of which a piece has bytes."""
        begin = piece * PIECE_BYTES
        first = bisect_right(self.offsets, begin) - 1
        return range(first, bisect_right(self.offsets, begin + self.size_of(piece) - 1))

    def describe(self, piece: int) -> str:
        """A piece in words, for errors."""
        tensors = self.tensors_in(piece)
        which = f"tensor {tensors[0]}" if len(tensors) == 1 else f"tensors {tensors[0]} to {tensors[-1]}"
        return f"piece {piece} ({which})"

    def encode(self) -> bytes:
        """The layout for another process."""
        packer = msgpack.Packer(autoreset=False)
        packer.pack_array_header(len(self.specs))
        for spec in self.specs:  # one by one: a list for each would set off the garbage collector
            packer.pack((dtypes.NAMES[spec.dtype], *spec.shape))
        raw: bytes = packer.bytes()
        return raw

    @classmethod
    def decode(cls, raw: bytes) -> Layout:
        """The layout in `raw`, which may come from a stranger.

        Raises:
            FrameError: it is none.
        """
        if len(raw) > MAX_LAYOUT_BYTES:
            raise FrameError("layout: too long")
        try:
            entries = msgpack.unpackb(raw, strict_map_key=True)
        except (ValueError, RecursionError):
            raise FrameError("layout: not msgpack") from None
        if type(entries) is not list:
            raise FrameError("layout: not a list")
        layout = cls(map(_spec, entries))
        if layout.total_bytes > MAX_TOTAL_BYTES:
            raise FrameError("layout: too many bytes")
        return layout


def _spec(entry: object) -> TensorSpec:
    if type(entry) is not list or not 1 <= len(entry) <= 1 + _MAX_DIMENSIONS:
        raise FrameError("layout: not a tensor")
    name, *shape = entry
    if type(name) is not str or name not in dtypes.BY_NAME:
        raise FrameError("layout: dtype unknown here")
    # Torch multiplies the dimensions of an empty tensor too, leaving out the zeros.
    if not all(type(size) is int and size >= 0 for size in shape):
        raise FrameError("layout: not a shape")
    if prod(size for size in shape if size) > MAX_TOTAL_BYTES:
        raise FrameError("layout: too many bytes")
    return TensorSpec(dtypes.BY_NAME[name], tuple(shape))


class Pieces:
    """The pieces of tensors that exist. Keeps no copy: what is written to the tensors shows."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """
        Args:
            tensors: any dtypes and shapes, contiguous, in the CPU's memory.

        Raises:
            ValueError: one of them is not so.
        """
        for number, tensor in enumerate(tensors):
            if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.dtype not in dtypes.NAMES:
                raise ValueError(
                    f"tensor {number} ({tensor.dtype}, {tuple(tensor.shape)}, on {tensor.device}) is not a "
                    "contiguous one in the CPU's memory; pass those that `tree.flatten` gave"
                )
        self.tensors = list(tensors)
        self.layout = Layout(TensorSpec(tensor.dtype, tuple(tensor.shape)) for tensor in tensors)
        self._memory = [tensor.detach().reshape(-1).view(torch.uint8).numpy().data for tensor in tensors]

    @classmethod
    def allocate(cls, layout: Layout) -> Pieces:
        """New tensors, each in memory of its own, with arbitrary contents."""
        return cls([allocate(spec.size_bytes).view(spec.dtype).view(spec.shape) for spec in layout.specs])

    def views(self, piece: int, padding: memoryview = _ZEROS) -> list[memoryview]:
        """The memory of a piece, in order; bytes between tensors lie in `padding`.

        Args:
            piece: its number.
            padding: `ALIGNMENT` bytes: to read, the zeros that it is by default; to write, some place.
        """
        at = piece * PIECE_BYTES
        end = at + self.layout.size_of(piece)
        found = []
        for number in self.layout.tensors_in(piece):
            begin, memory = self.layout.offsets[number], self._memory[number]
            if at < begin:
                found.append(padding[: begin - at])
                at = begin
            if part := memory[at - begin : end - begin]:
                found.append(part)
                at += len(part)
        if at < end:  # the padding goes on in the next piece
            found.append(padding[: end - at])
        return found

    def digest(self, piece: int) -> bytes:
        """The hash of a piece (XXH3, 128 bits, https://xxhash.com): it notices accidents, not forgery."""
        return digest(self.views(piece))

    def copy_from(self, other: Pieces, piece: int) -> None:
        """Copy a piece from tensors of the same layout."""
        assert self.layout == other.layout
        scrap = memoryview(bytearray(ALIGNMENT))
        for into, out in zip(self.views(piece, scrap), other.views(piece), strict=True):
            np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(out, np.uint8))


def digest(views: Iterable[memoryview]) -> bytes:
    """The hash of views, one behind the other."""
    hasher = xxhash.xxh3_128()
    for view in views:
        hasher.update(view)
    return hasher.digest()


def advance(views: deque[memoryview], moved_bytes: int) -> None:
    """Take from `views` the bytes that were sent or received."""
    while moved_bytes:
        if len(views[0]) > moved_bytes:
            views[0] = views[0][moved_bytes:]
            return
        moved_bytes -= len(views.popleft())


def allocate(size_bytes: int) -> torch.Tensor:
    """New memory with arbitrary contents: flat, uint8, beginning at a multiple of `ALIGNMENT`."""
    # numpy asks the system for huge pages and torch does not: the first touch takes half the time.
    room = np.empty(size_bytes + ALIGNMENT, np.uint8)
    skip = -room.ctypes.data % ALIGNMENT
    return torch.from_numpy(room[skip : skip + size_bytes])
