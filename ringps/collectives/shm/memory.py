"""Memory that processes of one host share: a rank's segment, and the heap in it.

A segment is an anonymous file (memfd), so it has no name that anybody could guess or leave behind:
the kernel frees it with the last process that has it. Where memfds are not allowed it is an unnamed
file of mode 0600 on /dev/shm. It is sparse: address space costs nothing, pages cost when they are used.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
import weakref
from bisect import bisect_left, insort

import numpy as np
import torch

from ringps.errors import SetupError

PAGE_BYTES = mmap.PAGESIZE
_GRAIN_BYTES = 64 * 1024
"""Blocks of the heap start and end on multiples of it."""

_SEALS = fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Segment:
    """One rank's shared memory, mapped into this process."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        """Map an open file. Owns `descriptor`."""
        self.descriptor = descriptor
        self.size_bytes = size_bytes
        self.memory = mmap.mmap(descriptor, size_bytes)
        self.memory.madvise(mmap.MADV_DONTDUMP)
        self.bytes = np.frombuffer(self.memory, dtype=np.uint8)
        self.address: int = self.bytes.ctypes.data

    @classmethod
    def create(cls, size_bytes: int, directory: str = "/dev/shm") -> Segment:
        """A new one, of zeros.

        Args:
            size_bytes: address space; nothing is reserved yet.
            directory: a memory file system, used only where memfds are forbidden.

        Raises:
            SetupError: the system gives no shared memory.
        """
        try:
            descriptor = os.memfd_create("ringps", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, size_bytes)
            # A peer that shrank it would end this process by SIGBUS.
            fcntl.fcntl(descriptor, *_SEALS)
        except OSError:
            try:
                descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | os.O_EXCL, 0o600)
                os.ftruncate(descriptor, size_bytes)
            except OSError as error:
                raise SetupError(
                    f"no shared memory on this host: memfd_create is not allowed and a file in {directory} "
                    f"cannot be made ({error.strerror}); mount a tmpfs on {directory}, or use --transport tcp"
                ) from error
        return cls(descriptor, size_bytes)

    def reserve(self, start: int, size_bytes: int) -> None:
        """Get the pages now, so that running out is an error here and not a SIGBUS later.

        Raises:
            MemoryError: there is no room; says how much is missing and where.
        """
        try:
            os.posix_fallocate(self.descriptor, start, size_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            raise MemoryError(self._no_room(size_bytes)) from error

    def release(self, start: int, size_bytes: int) -> None:
        """Give the pages back to the system; they read as zeros from then on."""
        self.memory.madvise(mmap.MADV_REMOVE, start, size_bytes)

    def close(self) -> None:
        """Close the file. Mappings live on for as long as a tensor or array needs them."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _no_room(self, size_bytes: int) -> str:
        mib = -(-size_bytes // (1 << 20))
        system = os.fstatvfs(self.descriptor)
        total = system.f_frsize * system.f_blocks
        if total == 0:  # a memfd belongs to no mounted file system
            return (
                f"no room for {mib} MiB of shared memory: the memory limit of this container or machine is "
                "reached; raise it, or use --transport tcp"
            )
        free = system.f_frsize * system.f_bavail
        return (
            f"/dev/shm is too small: {mib} MiB more are needed and {free >> 20} of its {total >> 20} MiB are "
            f"free; mount a larger one (mount -o remount,size={(total + size_bytes >> 20) + 1}m /dev/shm; "
            "docker run --shm-size; on Kubernetes an emptyDir with medium: Memory), or use --transport tcp"
        )


class Area:
    """This process's part of the shared memory: a segment, and the heap behind its first `start` bytes.

    It outlives generations, so that tensors in it can be reduced from without a copy in the next one too.
    """

    def __init__(self, size_bytes: int, start: int) -> None:
        """
        Args:
            size_bytes: address space.
            start: what comes before the heap; its pages are reserved.

        Raises:
            SetupError: the system gives no shared memory.
            MemoryError: there is no room for the first pages.
        """
        self.segment = Segment.create(size_bytes)
        try:
            self.segment.reserve(0, start)
        except BaseException:
            self.segment.close()
            raise
        self.heap = Heap(self.segment, start)
        self._closer = weakref.finalize(self, self.segment.close)

    def close(self) -> None:
        """Close the file, as also happens when nobody refers to it any more. Memory in use stays."""
        self._closer()


class Heap:
    """Hands out parts of a segment as tensors; one that nobody refers to any more is free. Thread-safe."""

    def __init__(self, segment: Segment, start: int) -> None:
        """
        Args:
            segment: where from.
            start: first byte of it that is the heap's.
        """
        self._segment = segment
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a tensor may die, and give its block back, amid `allocate`
        self._free: list[tuple[int, int]] = [(start, segment.size_bytes - start)]

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor in shared memory, aligned to 64 KiB, uninitialised.

        Raises:
            MemoryError: no room; says what to do.
        """
        rounded = max(1, -(-size_bytes // _GRAIN_BYTES)) * _GRAIN_BYTES
        with self._lock:
            place = next((i for i, (_, room) in enumerate(self._free) if room >= rounded), None)
            if place is None:
                raise MemoryError(
                    f"the shared heap of {self._segment.size_bytes >> 20} MiB has no {rounded >> 20} MiB "
                    "in a row"
                )
            start, room = self._free.pop(place)
            if room > rounded:
                self._free.insert(place, (start + rounded, room - rounded))
        try:
            self._segment.reserve(start, rounded)
        except MemoryError:
            self._give_back(start, rounded)
            raise
        block = np.frombuffer(self._segment.memory, dtype=np.uint8, count=size_bytes, offset=start)
        weakref.finalize(block, self._give_back, start, rounded).atexit = False
        return torch.from_numpy(block)

    def _give_back(self, start: int, size_bytes: int) -> None:
        if os.getpid() != self._pid:
            return  # a forked child's copy of the tensor has died, and its pages are ours
        self._segment.release(start, size_bytes)
        with self._lock:
            place = bisect_left(self._free, (start, 0))
            if place < len(self._free) and start + size_bytes == self._free[place][0]:
                size_bytes += self._free.pop(place)[1]
            if place > 0 and sum(self._free[place - 1]) == start:
                before, room = self._free.pop(place - 1)
                start, size_bytes = before, room + size_bytes
            insort(self._free, (start, size_bytes))
