"""Hashes of tensors, by which ranks find out whether they hold the same bits.

XXH3 with 128 bits (Collet, 2019): faster than memory can be read. It notices accidents, not forgery.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import xxhash

EMPTY = bytes(16)
"""Stands for the hash of what is not compared."""


def digest(*tensors: torch.Tensor) -> bytes:
    """16 bytes over the tensors' elements, one tensor after the other; of any dtype, on the CPU."""
    hasher = xxhash.xxh3_128()
    for tensor in tensors:
        if tensor.numel():
            hasher.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    found: bytes = hasher.digest()
    return found


class Digest:
    """The hash of a tensor that is being written, fed part by part while the parts are in cache."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_128()
        self.fed = False
        """Whether it was given anything."""

    def add(self, block: torch.Tensor | np.ndarray[Any, Any]) -> None:
        """A contiguous part is as it will stay. All ranks must add the same parts in the same order."""
        self.fed = True
        if isinstance(block, torch.Tensor):
            block = block.view(torch.uint8).numpy()
        self._hasher.update(block.data)

    def value(self) -> bytes:
        """16 bytes over all that was added."""
        found: bytes = self._hasher.digest()
        return found


def checksum(payload: memoryview) -> int:
    """32 bits over a frame's payload, never 0."""
    return int(xxhash.xxh3_64_intdigest(payload)) & 0xFFFFFFFF or 1


def combine(parts: Iterable[bytes]) -> bytes:
    """16 bytes over byte strings, in this order."""
    found: bytes = xxhash.xxh3_128_digest(b"".join(parts))
    return found
