"""A nested state as one string of bytes that says itself how to read it.

A head (`_HEAD`: magic, version, three lengths), the skeleton that `tree.flatten` gives, the layout of the
tensors, zeros up to a multiple of `ALIGNMENT`, and the tensors as `pieces.Layout` puts them. Where the string
begins at an aligned address, so does each tensor, and can be used where it lies.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch

from ringps.checkpoint.pieces import ALIGNMENT, Layout, TensorSpec
from ringps.checkpoint.tree import State, unflatten
from ringps.errors import FrameError

MAGIC = b"ringps\r\n"
"""The line's end shows whether someone took the file for text on the way."""

VERSION = 1
_HEAD = struct.Struct("<8sIIQQ")  # magic, version, bytes of the skeleton, of the layout, and of all


class Packed:
    """The string of a state that exists. It is nowhere as such: its parts are views of the state's memory."""

    def __init__(self, state: State) -> None:
        """
        Args:
            state: what `tree.flatten` gave; its tensors may lie on other devices.
        """
        self._tensors = state.tensors
        self._layout = Layout(TensorSpec(tensor.dtype, tuple(tensor.shape)) for tensor in state.tensors)
        layout = self._layout.encode()
        head_bytes = _HEAD.size + len(state.skeleton) + len(layout)
        self._begin = -(-head_bytes // ALIGNMENT) * ALIGNMENT
        self.total_bytes = self._begin + self._layout.total_bytes
        """Bytes of the whole string."""
        head = _HEAD.pack(MAGIC, VERSION, len(state.skeleton), len(layout), self.total_bytes)
        self.head = as_tensor((head + state.skeleton + layout).ljust(self._begin, b"\0"))

    def sources(self, start: int, stop: int) -> list[torch.Tensor]:
        """The bytes from `start` to `stop`, as contiguous tensors of any dtypes, one behind the other.

        They are those of the state where all of one is wanted, and else share their memory: they are to be
        read. Nothing is copied.
        """
        assert 0 <= start <= stop <= self.total_bytes
        found = []
        begin = 0
        for part, size_bytes in self._parts():
            end = begin + size_bytes
            low, high = max(start, begin), min(stop, end)
            if low < high:
                found.append(part if high - low == size_bytes else flat(part)[low - begin : high - begin])
            begin = end
        return found

    def _parts(self) -> Iterator[tuple[torch.Tensor, int]]:
        yield self.head, self._begin
        end = 0
        for tensor, begin in zip(self._tensors, self._layout.offsets, strict=True):
            if begin > end:
                yield _zeros(begin - end), begin - end
            size_bytes = tensor.nbytes
            if size_bytes:
                yield tensor, size_bytes
            end = begin + size_bytes
        if end < self._layout.total_bytes:  # only empty tensors lie behind the padding
            yield _zeros(self._layout.total_bytes - end), self._layout.total_bytes - end


def unpack(raw: torch.Tensor) -> Any:
    """The state that was packed.

    Args:
        raw: uint8, of one dimension, in the CPU's memory; may come from a stranger. The result shares its
            memory, unless `raw` is a part of a longer tensor from a place on that is not aligned.

    Raises:
        FrameError: it is not a packed state, or not the whole of one.
    """
    assert raw.dtype is torch.uint8 and raw.dim() == 1 and raw.device.type == "cpu" and raw.is_contiguous()
    if raw.storage_offset() % ALIGNMENT:
        raw = raw.clone()
    memory = raw.numpy().data
    if len(memory) < _HEAD.size:
        raise FrameError("packed state: shorter than its head")
    magic, version, skeleton_bytes, layout_bytes, total_bytes = _HEAD.unpack_from(memory)
    if magic != MAGIC:
        raise FrameError("packed state: does not begin like one")
    if version != VERSION:
        raise FrameError(f"packed state: of version {version}, and this ringps reads version {VERSION}")
    if total_bytes != len(memory):
        raise FrameError(f"packed state: has {len(memory)} of its {total_bytes} bytes")
    layout_at = _HEAD.size + skeleton_bytes
    if layout_at + layout_bytes > total_bytes:
        raise FrameError("packed state: its parts are longer than the whole")
    layout = Layout.decode(bytes(memory[layout_at : layout_at + layout_bytes]))
    begin = -(-(layout_at + layout_bytes) // ALIGNMENT) * ALIGNMENT
    if begin + layout.total_bytes != total_bytes:
        raise FrameError("packed state: its tensors are not as long as it says")
    tensors = [
        raw[begin + offset : begin + offset + spec.size_bytes].view(spec.dtype).view(spec.shape)
        for spec, offset in zip(layout.specs, layout.offsets, strict=True)
    ]
    return unflatten(bytes(memory[_HEAD.size : layout_at]), tensors)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, sharing its memory."""
    return tensor.reshape(-1).view(torch.uint8)


def as_tensor(raw: bytes) -> torch.Tensor:
    """Bytes in a tensor, copied: torch has none that cannot be written to."""
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy())


@cache
def _zeros(size_bytes: int) -> torch.Tensor:
    return torch.zeros(size_bytes, dtype=torch.uint8)
