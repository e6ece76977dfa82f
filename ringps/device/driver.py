"""The CUDA driver by ctypes: memory that another process can open, and pinned pages of the host.

torch's allocator cuts its memory into parts that cannot be told from each other outside, so what peers are to
open is allocated here, each piece by itself.

The driver works in the calling thread's *context*. torch sets one only where it has to, so a new thread may
have none. Each call here therefore puts the device's primary context, the one that torch uses, before what
the thread has, and takes it off again.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ringps.device.base import Exported
from ringps.errors import SetupError

GRAIN_BYTES = 2 * 1024 * 1024
"""Allocations are multiples of it: the driver shares no less, and a peer would see what lies beside."""

HANDLE_BYTES = 64
OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"

_SONAME = "libcuda.so.1"
_LAZY_PEER_ACCESS = 1
_PORTABLE = 1
_IPC_SUPPORTED = 125
_SPARE_PARTS = 4
"""A freed block is used again for one that is smaller by at most one of so many parts."""


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle; the driver takes it by value."""

    # Not c_char, whose value ends at the first zero.
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


_POINTER, _CONTEXT, _DEVICE = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (ctypes.POINTER(_DEVICE), ctypes.c_int),
    "cuDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, _DEVICE),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_CONTEXT), _DEVICE),
    "cuCtxPushCurrent_v2": (_CONTEXT,),
    "cuCtxPopCurrent_v2": (ctypes.POINTER(_CONTEXT),),
    "cuMemAlloc_v2": (ctypes.POINTER(_POINTER), ctypes.c_size_t),
    "cuMemFree_v2": (_POINTER,),
    "cuIpcGetMemHandle": (ctypes.POINTER(IpcHandle), _POINTER),
    "cuIpcOpenMemHandle_v2": (ctypes.POINTER(_POINTER), IpcHandle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_POINTER,),
    "cuMemHostRegister_v2": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
    "cuMemHostUnregister": (ctypes.c_void_p,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


class CudaError(RuntimeError):
    """A call of the driver's failed. `name` is the driver's, such as CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, function: str, name: str, text: str) -> None:
        super().__init__(f"{function}: {name}: {text}")
        self.name = name


class Driver:
    """The driver's calls on one device. Thread-safe; each call raises `CudaError` where the driver refuses.

    An error that a kernel caused earlier, which is of no call in particular, also comes out here.
    """

    def __init__(self, library: Any, ordinal: int) -> None:
        """
        Args:
            library: has the driver's functions as attributes.
            ordinal: which of the devices that this process sees; torch counts alike.
        """
        self._library = library
        self._call("cuInit", 0)
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.pointer(device), ordinal)
        self._device = device.value
        # Never released: what is allocated in it is in use until the process ends.
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.pointer(self._context), self._device)

    @classmethod
    def load(cls, ordinal: int) -> Driver:
        """Load the driver's library, and get hold of a device.

        Raises:
            SetupError: there is no driver, or one that lacks a function; names what is missing.
            CudaError: the driver has no such device, or cannot use it.
        """
        try:
            library = ctypes.CDLL(_SONAME)
        except OSError as error:
            raise SetupError(
                f"the CUDA driver cannot be loaded ({error}); install NVIDIA's driver"
            ) from error
        for name, arguments in _PROTOTYPES.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise SetupError(f"{_SONAME} has no {name}; install a newer driver of NVIDIA's") from None
            function.restype, function.argtypes = ctypes.c_int, arguments
        return cls(library, ordinal)

    def shares_memory(self) -> bool:
        """Whether processes can open each other's memory on this device."""
        answer = ctypes.c_int()
        try:
            self._call("cuDeviceGetAttribute", ctypes.pointer(answer), _IPC_SUPPORTED, self._device)
        except CudaError as error:
            if error.name != "CUDA_ERROR_INVALID_VALUE":
                raise
            return True  # drivers too old for the question share on every device
        return bool(answer.value)

    def allocate(self, size_bytes: int) -> int:
        """Address of new device memory."""
        address = ctypes.c_uint64()
        self._in_context("cuMemAlloc_v2", ctypes.pointer(address), size_bytes)
        return address.value

    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""
        self._in_context("cuMemFree_v2", address)

    def export(self, address: int) -> bytes:
        """64 bytes by which another process can `open` what `allocate` gave; never given for any other."""
        handle = IpcHandle()
        self._in_context("cuIpcGetMemHandle", ctypes.pointer(handle), address)
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        """Address of memory that another process has exported; not of this process's own."""
        address = ctypes.c_uint64()
        value = IpcHandle.from_buffer_copy(handle)
        self._in_context("cuIpcOpenMemHandle_v2", ctypes.pointer(address), value, _LAZY_PEER_ACCESS)
        return address.value

    def close(self, address: int) -> None:
        """Unmap what `open` mapped."""
        self._in_context("cuIpcCloseMemHandle", address)

    def register(self, address: int, size_bytes: int) -> None:
        """Pin pages of the host, for all contexts of the process."""
        self._in_context("cuMemHostRegister_v2", address, size_bytes, _PORTABLE)

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        self._in_context("cuMemHostUnregister", address)

    def _in_context(self, function: str, *arguments: Any) -> None:
        with self._entered():
            self._call(function, *arguments)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.pointer(ctypes.c_void_p()))

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            name, text = (self._words(words, code) for words in ("cuGetErrorName", "cuGetErrorString"))
            raise CudaError(function, name, text)

    def _words(self, function: str, code: int) -> str:
        words = ctypes.c_char_p()
        getattr(self._library, function)(code, ctypes.pointer(words))
        return (words.value or str(code).encode()).decode(errors="replace")


class _Block:
    """One allocation."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.handle: bytes | None = None
        """Not None: a peer may have it open."""


class CudaPeerMemory:
    """A `PeerMemory` in the driver's memory.

    Blocks that are given back are kept for reuse: opening is slow, and CUDA leaves undefined what a peer sees
    in a block that is freed while it has it open. Only when the device has no room are kept blocks freed,
    first those that no peer was shown. A peer reads what it was shown for the collective under way, never a
    block that nothing here uses, and no handle comes twice; so it does not read freed memory. But it still
    has it mapped, and until it forgets, the room may not come back.

    As with torch's own memory, a tensor that is dropped while work on it is under way may be given out again
    at once. That is harmless if the next one's work is put in the same stream, or waits for it.
    """

    def __init__(
        self,
        driver: Driver,
        tensor_at: Callable[[int, int, object], torch.Tensor],
        make_room: Callable[[], None],
    ) -> None:
        """
        Args:
            driver: of the device.
            tensor_at: given an address, a number of bytes and an owner, makes a flat uint8 tensor there that
                keeps the owner.
            make_room: gives back device memory that torch holds and does not use.
        """
        self._driver = driver
        self._tensor_at = tensor_at
        self._make_room = make_room
        self._lock = threading.Lock()
        self._addresses: list[int] = []
        self._blocks: dict[int, _Block] = {}
        """By address."""
        self._shown: dict[bytes, _Block] = {}
        self._free: list[tuple[int, int]] = []
        """Size and address, sorted."""
        self._dropped: deque[_Block] = deque()
        """Blocks whose last tensor has gone: that can happen anywhere, also where the lock is held."""
        self._opened: dict[bytes, int] = {}

    def allocate(self, size_bytes: int) -> torch.Tensor:
        size_bytes_there = -(-max(size_bytes, 1) // GRAIN_BYTES) * GRAIN_BYTES
        with self._lock:
            self._collect()
            block = self._reuse(size_bytes_there) or self._new(size_bytes_there, size_bytes)
        owner = _Owner()
        weakref.finalize(owner, self._dropped.append, block).atexit = False
        return self._tensor_at(block.address, block.size_bytes, owner)[:size_bytes]

    def find(self, tensor: torch.Tensor) -> Exported | None:
        assert tensor.is_contiguous()
        if not tensor.numel():
            return None  # it lies nowhere
        address = tensor.data_ptr()
        with self._lock:
            at = bisect_right(self._addresses, address) - 1
            if at < 0:
                return None
            block = self._blocks[self._addresses[at]]
            offset_bytes = address - block.address
            if offset_bytes + tensor.nbytes > block.size_bytes:
                return None
            if block.handle is None:
                block.handle = self._driver.export(block.address)
                self._shown[block.handle] = block
            return Exported(block.handle, offset_bytes)

    def open(self, handle: bytes, size_bytes: int) -> torch.Tensor:
        if len(handle) != HANDLE_BYTES:
            raise RuntimeError(f"a handle of CUDA memory has {HANDLE_BYTES} bytes, not {len(handle)}")
        with self._lock:
            # The driver does not open what is of the same process.
            own = self._shown.get(handle)
            if own is not None:
                return self._tensor_at(own.address, size_bytes, None)
            address = self._opened.get(handle)
            if address is None:
                try:
                    address = self._opened[handle] = self._driver.open(handle)
                except CudaError as error:
                    raise RuntimeError(
                        f"cannot open another process's GPU memory: {error}; the process may be gone, its "
                        "GPU may be hidden here (CUDA_VISIBLE_DEVICES), or it runs in another container"
                    ) from error
            found = self._tensor_at(address, size_bytes, None)
        if size_bytes and found.data_ptr() != address:
            raise RuntimeError("cannot open another process's GPU memory: it lies on another GPU")
        return found

    def forget(self) -> None:
        with self._lock:
            while self._opened:
                self._driver.close(self._opened.popitem()[1])

    def _collect(self) -> None:
        while self._dropped:
            block = self._dropped.popleft()
            insort(self._free, (block.size_bytes, block.address))

    def _reuse(self, size_bytes: int) -> _Block | None:
        at = bisect_left(self._free, (size_bytes, 0))
        if at == len(self._free) or self._free[at][0] > size_bytes + size_bytes // _SPARE_PARTS:
            return None
        return self._blocks[self._free.pop(at)[1]]

    def _new(self, size_bytes: int, asked_bytes: int) -> _Block:
        for make_room in (self._make_room, lambda: self._shrink(False), lambda: self._shrink(True), None):
            try:
                address = self._driver.allocate(size_bytes)
            except CudaError as error:
                if error.name != OUT_OF_MEMORY:
                    raise
                if make_room is None:
                    raise MemoryError(
                        f"the GPU has no room for {asked_bytes} bytes that peers can open; make the batch "
                        "or the model smaller"
                    ) from error
                make_room()
            else:
                break
        block = _Block(address, size_bytes)
        insort(self._addresses, address)
        self._blocks[address] = block
        return block

    def _shrink(self, shown: bool) -> None:
        """Free the kept blocks that peers were shown, or those they were not."""
        self._collect()
        for size_bytes, address in list(self._free):
            block = self._blocks[address]
            if (block.handle is not None) == shown:
                self._driver.free(address)
                self._free.remove((size_bytes, address))
                self._addresses.remove(address)
                del self._blocks[address]
                if block.handle is not None:
                    del self._shown[block.handle]


class _Owner:
    """Lives as long as a tensor on a block does."""


class _Array:
    """Device memory in the form that torch takes over without a copy."""

    def __init__(self, address: int, size_bytes: int, owner: object) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def tensor_on(device: torch.device) -> Callable[[int, int, object], torch.Tensor]:
    """What makes `CudaPeerMemory` its tensors on a GPU."""
    return lambda address, size_bytes, owner: torch.as_tensor(
        _Array(address, size_bytes, owner), device=device
    )
