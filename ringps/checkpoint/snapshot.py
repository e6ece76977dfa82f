"""Copies of a state for those who write it while training goes on: the only time that a save costs a step."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import memmove
from typing import NamedTuple

import torch

from ringps.checkpoint.contents import Source
from ringps.checkpoint.host_copies import accelerator_among, start_copying
from ringps.checkpoint.pieces import allocate
from ringps.device import Accelerator, accelerator_of

_PAGE_BYTES = 4096
_SMALL_BYTES = 64 * 1024
"""What is no longer than this is not worth another thread."""

_JOB_BYTES = 8 * 1024 * 1024

_Job = tuple[int, int, int]
"""What is to be copied: the address of the place for it, its own address, and its bytes."""


class Image(NamedTuple):
    """A file that is to be written, as it was at one moment."""

    name: str
    kind: str
    """As of `contents.Source`."""
    memory: memoryview
    """Its bytes. They cannot be used any more after `Arena.release`."""


class Arena:
    """Memory for snapshots, used over and over. It grows to the size of the largest, and stays so."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._unpin: Callable[[], object] | None = None
        """What the device that the memory is pinned for must be told before it is given back."""
        self._images: list[Image] = []
        self._lock = threading.Lock()

    @property
    def in_use(self) -> bool:
        """Whether images of a snapshot lie in it that have not been released."""
        return bool(self._images)

    @property
    def size_bytes(self) -> int:
        """Bytes of memory that it holds."""
        return self._memory.numel()

    def reserve(self, size_bytes: int, accelerator: Accelerator | None = None) -> None:
        """Make room for a snapshot of this many bytes, so that taking it does not have to.

        May run in another thread; whoever takes a snapshot meanwhile waits for it.

        Args:
            size_bytes: of `room_for` the sources.
            accelerator: pinned for this device, so that it can write there by itself.
        """
        with self._lock:
            self._grow(size_bytes, accelerator)

    def release(self) -> None:
        """The images have been written, or are given up, and nobody works on them any more: the next snapshot
        may take their place. Who still tries to begin with one gets a ValueError."""
        with self._lock:
            for image in self._images:
                image.memory.release()
            self._images = []

    def _grow(self, size_bytes: int, accelerator: Accelerator | None) -> torch.Tensor:
        if self._memory.numel() < size_bytes:
            assert not self._images, "the arena holds a snapshot that has not been released"
            if self._unpin is not None:
                self._unpin()
                self._unpin = None
            self._memory = torch.empty(0, dtype=torch.uint8)  # not both at once
            self._memory = _touched(size_bytes)
        if accelerator is not None and self._unpin is None and self._memory.numel():
            # torch's own pinned memory is as long as the next power of two, and never goes back.
            self._unpin = weakref.finalize(self, accelerator.pin(self._memory))
        return self._memory


def room_for(sources: Iterable[Source]) -> int:
    """Bytes that a snapshot of these takes."""
    return sum(_aligned(source.size_bytes) for source in sources)


def take(arena: Arena, sources: Sequence[Source]) -> list[Image]:
    """Copy what is to be written, as it is now.

    Args:
        arena: not in use. The images lie in it, until it is released.
        sources: their tensors may lie on a GPU. What this thread has given it to do before is done first;
            and the copies are there when this returns, so that all may be changed then. Nothing waits for
            what others have given it to do.

    Raises:
        ValueError: one lies on a device that ringps does not know, or on another GPU than this process uses.
    """
    with arena._lock:
        assert not arena._images, "the arena holds a snapshot that has not been released"
        sizes = [source.size_bytes for source in sources]
        accelerator = accelerator_among(tensor for source in sources for tensor in source.tensors)
        memory = arena._grow(sum(map(_aligned, sizes)), accelerator)
        images, at = [], 0
        waiting: deque[_Job] = deque()
        away: list[tuple[torch.Tensor, torch.Tensor]] = []
        for source, size_bytes in zip(sources, sizes, strict=True):
            room = memory[at : at + size_bytes]
            waiting += _copy(room, source.tensors, away)
            images.append(Image(source.name, source.kind, room.numpy().data))
            at += _aligned(size_bytes)
        copied = None if accelerator is None else start_copying(accelerator, away)
        _do(waiting)
        if copied is not None:
            copied.wait()
        arena._images = images
        return list(images)


def _copy(
    room: torch.Tensor, tensors: list[torch.Tensor], away: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[_Job]:
    """Copy small tensors, add to `away` those on a GPU and their places, and give back what is left to do."""
    left = []
    begin, at = room.data_ptr(), 0
    for tensor in tensors:
        size_bytes = tensor.nbytes
        assert at + size_bytes <= room.numel() and tensor.is_contiguous()
        if accelerator_of(tensor) is not None:
            away.append((room[at : at + size_bytes], tensor))
        elif size_bytes <= _SMALL_BYTES:
            memmove(begin + at, tensor.data_ptr(), size_bytes)
        else:
            source = tensor.data_ptr()
            for done in range(0, size_bytes, _JOB_BYTES):
                left.append((begin + at + done, source + done, min(_JOB_BYTES, size_bytes - done)))
        at += size_bytes
    return left


def _do(waiting: deque[_Job]) -> None:
    """Copy with as many threads as torch uses.

    torch's own way to share a copy among threads has them all wait for each other at every tensor, which
    takes many times as long where one of them does not get a core at once.
    """

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                memmove(*waiting.popleft())  # leaves the interpreter to the others

    helpers = min(torch.get_num_threads(), len(waiting)) - 1
    with ThreadPoolExecutor(max(helpers, 1), "ringps-snapshot") as pool:
        helping = [pool.submit(work) for _ in range(helpers)]
        work()
        for helper in helping:
            helper.result()


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES


def _touched(size_bytes: int) -> torch.Tensor:
    """Memory that the system has given already, and not at the first writing."""
    memory = allocate(size_bytes + _PAGE_BYTES)
    skip = -memory.data_ptr() % _PAGE_BYTES  # files that begin with a page can be written past the cache
    memory = memory[skip : skip + size_bytes]
    memory.numpy()[::_PAGE_BYTES] = 0
    return memory
