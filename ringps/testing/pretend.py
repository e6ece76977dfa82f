"""A GPU that there is not: memory of the CPU that counts as a device's, with streams that are threads.

Streams work beside each other and beside the script, as a GPU's do, so what a test runs on it meets the same
races: a buffer that is read before it is there, or overwritten while it is read. It does not show what
kernels do, nor how fast anything is.
"""

from __future__ import annotations

import bisect
import mmap
import os
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
import torch

from ringps.device.base import Exported, Mark, NcclLibrary, PeerMemory, Stream
from ringps.errors import SetupError

_LONGEST_DELAY_S = 0.002


class PretendAccelerator:
    """An `Accelerator` in memory files, which other processes of this user can open.

    Args:
        identity: names it; two with the same name are one GPU that workers share.
        seed: not None: streams pause at random, by this seed.
        nccl: what stands for NCCL; without it there is none.
        shares: whether other processes can open its memory.
    """

    def __init__(
        self,
        identity: str = "pretended",
        *,
        seed: int | None = None,
        nccl: NcclLibrary | None = None,
        shares: bool = True,
    ) -> None:
        self._identity = identity
        self._seed = seed
        self._nccl = nccl
        self._memory = PretendMemory()
        self._shares = shares
        self._streams: dict[str, PretendStream] = {}
        self._lock = threading.Lock()
        self.recording = False
        """What `capturing` says."""

    @property
    def identity(self) -> str:
        return self._identity

    def owns(self, tensor: torch.Tensor) -> bool:
        return self._memory.holds(tensor)

    def here(self) -> Stream:
        return _Here()

    def stream(self, name: str) -> Stream:
        with self._lock:
            if name not in self._streams:
                seed = None if self._seed is None else hash((self._seed, name))
                self._streams[name] = PretendStream(name, seed)
            return self._streams[name]

    def capturing(self) -> bool:
        return self.recording

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        return lambda: None

    @property
    def peer_memory(self) -> PeerMemory | None:
        return self._memory if self._shares else None

    def nccl(self) -> NcclLibrary:
        if self._nccl is None:
            raise SetupError("the pretended GPU has no NCCL")
        return self._nccl

    def failures(self) -> list[BaseException]:
        """What has gone wrong in its streams."""
        return [one.failure for one in self._streams.values() if one.failure is not None]

    def close(self) -> None:
        """End its streams, once they have done what was put in."""
        for stream in self._streams.values():
            stream.close()

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in the pretended GPU's memory."""
        room = self._memory.allocate(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return room.copy_(tensor.detach())

    def adopt(self, model: torch.nn.Module) -> None:
        """Move a model's parameters and buffers there, as `model.cuda()` would."""
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.numel():
                tensor.data = self.copy(tensor)


class PretendMemory:
    """A `PeerMemory`: a file in memory for each allocation, opened through /proc."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._blocks: dict[int, tuple[int, int]] = {}
        """By address: file descriptor and size."""
        self._opened: dict[bytes, torch.Tensor] = {}

    def allocate(self, size_bytes: int) -> torch.Tensor:
        room_bytes = -(-max(size_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor = os.memfd_create("ringps-pretended", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, room_bytes)
        array = np.frombuffer(mmap.mmap(descriptor, room_bytes), np.uint8)
        address = array.ctypes.data
        with self._lock:
            bisect.insort(self._starts, address)
            self._blocks[address] = descriptor, room_bytes
        weakref.finalize(array, self._free, address).atexit = False
        return torch.from_numpy(array)[:size_bytes]

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in memory of this process's `allocate`."""
        return tensor.is_cpu and self._block(tensor.data_ptr()) is not None

    def find(self, tensor: torch.Tensor) -> Exported | None:
        start = self._block(tensor.data_ptr())
        if start is None:
            return None
        descriptor, _ = self._blocks[start]
        # Descriptors are used again, and addresses, but seldom both together.
        handle = f"{os.getpid()} {descriptor} {os.fstat(descriptor).st_ino}".encode()
        return Exported(handle, tensor.data_ptr() - start)

    def open(self, handle: bytes, size_bytes: int) -> torch.Tensor:
        found = self._opened.get(handle)
        if found is not None and found.numel() >= size_bytes:
            return found[:size_bytes]
        process, descriptor, _ = handle.decode().split()
        try:
            with open(f"/proc/{process}/fd/{descriptor}", "r+b") as file:
                memory = mmap.mmap(file.fileno(), size_bytes)
        except (OSError, ValueError) as error:
            raise RuntimeError(f"cannot open the memory of process {process}: {error}") from error
        self._opened[handle] = torch.from_numpy(np.frombuffer(memory, np.uint8))
        return self._opened[handle]

    def forget(self) -> None:
        self._opened.clear()

    def _block(self, address: int) -> int | None:
        with self._lock:
            at = bisect.bisect_right(self._starts, address) - 1
            if at < 0:
                return None
            start = self._starts[at]
            return start if address < start + self._blocks[start][1] else None

    def _free(self, address: int) -> None:
        with self._lock:
            self._starts.remove(address)
            descriptor, _ = self._blocks.pop(address)
        os.close(descriptor)


class PretendMark:
    """A `Mark`."""

    def __init__(self) -> None:
        self._reached = threading.Event()

    def reach(self) -> None:
        """Here it is."""
        self._reached.set()

    def done(self) -> bool:
        return self._reached.is_set()

    def wait(self) -> None:
        self._reached.wait()


class PretendStream:
    """A `Stream` whose work a thread does. What goes wrong in it is raised by `run` from then on."""

    def __init__(self, name: str, seed: int | None = None) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._random = None if seed is None else random.Random(seed)
        self.failure: BaseException | None = None
        threading.Thread(target=self._work, name=f"pretended-{name}", daemon=True).start()

    @property
    def key(self) -> int:
        return id(self)

    def run(self, work: Callable[[], object]) -> None:
        if self.failure is not None:
            raise self.failure
        self._queue.put(work)

    def after(self, mark: Mark) -> None:
        self._queue.put(mark.wait)

    def mark(self) -> Mark:
        mark = PretendMark()
        self._queue.put(mark.reach)
        return mark

    def notify(self, call: Callable[[], None]) -> None:
        self._queue.put(call)

    def keep(self, tensor: torch.Tensor) -> None:
        """Memory here is nobody's but the tensor's."""

    def close(self) -> None:
        """End its thread when all that was put in is done."""
        self._queue.put(None)

    @torch.no_grad()
    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            if self._random is not None:
                time.sleep(self._random.random() * _LONGEST_DELAY_S)
            try:
                work()
            except BaseException as failure:
                self.failure = self.failure or failure
                raise
            del work


class _Here:
    """The script's own stream: it does everything at once."""

    failure = None

    @property
    def key(self) -> int:
        return 0

    def run(self, work: Callable[[], object]) -> None:
        work()

    def after(self, mark: Mark) -> None:
        mark.wait()

    def mark(self) -> Mark:
        mark = PretendMark()
        mark.reach()
        return mark

    def notify(self, call: Callable[[], None]) -> None:
        call()

    def keep(self, tensor: torch.Tensor) -> None:
        """As above."""
