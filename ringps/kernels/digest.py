"""Hashes of tensors, by which ranks find out whether they hold the same bits.

XXH3 with 128 bits (Collet, 2019): faster than memory can be read. It notices accidents, not forgery. A tensor
on a GPU is hashed there (`ringps.kernels.cuda.digest`), and that hash stands for it in XXH3's input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import xxhash

from ringps.kernels.cuda.digest import collect, launch_digest

EMPTY = bytes(16)
"""Stands for the hash of what is not compared."""


def digest(*tensors: torch.Tensor) -> bytes:
    """16 bytes over the tensors' elements, one tensor after the other; of any dtype, on the CPU or a GPU.

    Elements have another hash on a GPU than on the CPU. Waits, once, for a GPU's current stream to get here.

    Raises:
        SetupError: a tensor is on a GPU, and Triton is not installed.
    """
    hasher = xxhash.xxh3_128()
    found_there = iter(collect([launch_digest(tensor) for tensor in tensors if tensor.is_cuda]))
    for tensor in tensors:
        if tensor.is_cuda:
            hasher.update(next(found_there))
        elif tensor.numel():
            hasher.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    found: bytes = hasher.digest()
    return found


class Digest:
    """The hash of a tensor that is being written, fed part by part while the parts are in cache."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_128()
        self._launched: list[torch.Tensor] = []
        self._given: bytes | None = None
        self.fed = False
        """Whether it was given anything."""

    def add(self, block: torch.Tensor | np.ndarray[Any, Any]) -> None:
        """A contiguous part is as it will stay. All ranks must add the same parts in the same order.

        A part on a GPU is hashed in the current stream; nothing waits before `value`, or a part on the CPU.

        Raises:
            SetupError: it is on a GPU, and Triton is not installed.
        """
        assert self._given is None, "the hash was given as a whole"
        self.fed = True
        if isinstance(block, torch.Tensor):
            if block.is_cuda:
                self._launched.append(launch_digest(block))
                return
            block = block.view(torch.uint8).numpy()
        if self._launched:
            self._land()
        self._hasher.update(block.data)

    def give(self, value: bytes) -> None:
        """Take 16 bytes, hashed elsewhere, as the value, instead of parts."""
        assert not self.fed, "some parts were added already"
        assert len(value) == 16, f"a hash has 16 bytes, not {len(value)}"
        self.fed = True
        self._given = value

    def value(self) -> bytes:
        """16 bytes over all that was added.

        If parts are on a GPU, waits for the current stream to get here, which must be the one that they were
        added in.
        """
        if self._given is not None:
            return self._given
        self._land()
        found: bytes = self._hasher.digest()
        return found

    def _land(self) -> None:
        launched, self._launched = self._launched, []
        for found in collect(launched):
            self._hasher.update(found)


def checksum(payload: memoryview) -> int:
    """32 bits over a frame's payload, never 0."""
    return int(xxhash.xxh3_64_intdigest(payload)) & 0xFFFFFFFF or 1


def combine(parts: Iterable[bytes]) -> bytes:
    """16 bytes over byte strings, in this order."""
    found: bytes = xxhash.xxh3_128_digest(b"".join(parts))
    return found
