"""The protocols between the collectives and a device that works on its own.

A device carries out what is put into its *streams*, each in order, streams beside each other. Nothing here
ever waits for the whole device. `CudaAccelerator` and `ringps.testing.pretend.PretendAccelerator` implement
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch


class Mark(Protocol):
    """A point in a stream's work, reached when all that was put in before is done."""

    def done(self) -> bool:
        """Whether it has been reached."""

    def wait(self) -> None:
        """Block this thread until it is reached; sleeps, and lets other threads run."""


class Stream(Protocol):
    """Work that a device carries out in order."""

    @property
    def key(self) -> int:
        """Equal for two objects that stand for the same stream; CUDA's handle of it."""

    @property
    def failure(self) -> BaseException | None:
        """Why nothing that was put in, or will be, is ever done; None while all is well."""

    def run(self, work: Callable[[], object]) -> None:
        """Put in what `work` launches. `work` may be called at once or later, on another thread; what it
        touches must stay as it is until the stream has got there."""

    def after(self, mark: Mark) -> None:
        """Let all that is put in from here on wait for `mark` of another stream, on the device."""

    def mark(self) -> Mark:
        """The point after all that has been put in."""

    def notify(self, call: Callable[[], None]) -> None:
        """Have `call` called once, on another thread, when all that has been put in is done. The calls of a
        stream come in order. `call` must not raise, and not wait for the stream."""

    def keep(self, tensor: torch.Tensor) -> None:
        """The stream reads `tensor`, whose memory belongs to another one: it must not be given to somebody
        else before what has been put in is done."""


class Accelerator(Protocol):
    """One device, as this process sees it."""

    @property
    def identity(self) -> str:
        """Names the device among all devices of all machines; processes that share it have the same."""

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the device's memory."""

    def here(self) -> Stream:
        """The stream that the calling thread puts its work in."""

    def stream(self, name: str) -> Stream:
        """A stream of our own, made when it is first asked for, and kept as long as the process runs.

        Args:
            name: "reduce", "down" or "up".
        """

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        """Let the device copy from and to a CPU tensor without a detour; returns what undoes it, which must
        be called before the memory is given back. Does nothing, but costs time, where the system does not
        allow it."""

    def capturing(self) -> bool:
        """Whether the calling thread's stream records a graph instead of working."""

    @property
    def peer_memory(self) -> PeerMemory | None:
        """None where processes cannot open each other's device memory."""

    def nccl(self) -> NcclLibrary:
        """NCCL, for this device.

        Raises:
            SetupError: it cannot be loaded; says why.
        """


class NcclLibrary(Protocol):
    """What `ringps.device.nccl_library.Nccl` offers."""

    @property
    def version(self) -> tuple[int, int, int]:
        """Of the library that was loaded."""

    def unique_id(self) -> bytes:
        """128 bytes that name a communicator to be; one member makes it, and all `connect` with it."""

    def supports(self, dtype: torch.dtype, op: str) -> bool:
        """Whether it can reduce so."""

    def connect(
        self, unique_id: bytes, size: int, rank: int, check: Callable[[], None], limit_s: float
    ) -> NcclRing:
        """Meet the others. Raises what `check` raises, and `RuntimeError` after `limit_s`."""


class NcclRing(Protocol):
    """A communicator of NCCL. Tensors are flat and contiguous; calls return when they are in the stream."""

    def all_reduce(self, send: torch.Tensor, recv: torch.Tensor, op: str, stream_key: int) -> None: ...

    def reduce_scatter(self, send: torch.Tensor, recv: torch.Tensor, op: str, stream_key: int) -> None: ...

    def all_gather(self, send: torch.Tensor, recv: torch.Tensor, stream_key: int) -> None: ...

    def broadcast(self, tensor: torch.Tensor, src: int, stream_key: int) -> None: ...

    def error(self) -> str | None:
        """What went wrong meanwhile, if anything did."""

    def abort(self) -> None:
        """End what is under way, also when members are gone. Idempotent, from any thread; later calls raise
        `RuntimeError`."""


class Exported(NamedTuple):
    """Where a tensor lies in memory that peers can open."""

    handle: bytes
    """Names the allocation, for `PeerMemory.open`: at most 64 bytes."""

    offset_bytes: int
    """Where in it the tensor begins."""


class PeerMemory(Protocol):
    """Device memory that other processes of this host can read. Thread-safe."""

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Flat uint8 memory, of any contents; it goes back when the last tensor on it is gone.

        Raises:
            MemoryError: the device has no room for it; says how much was asked for.
        """

    def find(self, tensor: torch.Tensor) -> Exported | None:
        """Where a contiguous tensor lies, if in memory that this process's `allocate` gave."""

    def open(self, handle: bytes, size_bytes: int) -> torch.Tensor:
        """Another process's allocation: flat uint8, its first `size_bytes`; kept open for later calls.

        Raises:
            RuntimeError: it cannot be opened (another device, a process that is gone).
        """

    def forget(self) -> None:
        """Close all that `open` opened. No work that reads it is under way."""
