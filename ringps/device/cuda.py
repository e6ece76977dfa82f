"""A GPU of NVIDIA's as an `Accelerator`, by torch.cuda."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

import torch

from ringps.device.base import Mark, NcclLibrary, PeerMemory, Stream
from ringps.device.driver import CudaError, CudaPeerMemory, Driver, tensor_on
from ringps.device.nccl_library import Nccl
from ringps.errors import SetupError

_log = logging.getLogger("ringps")

_URGENT = {"reduce"}
"""Streams whose kernels go before the model's, which soon waits for them."""


class CudaMark:
    """A `Mark`: an event, whose waiters sleep in the kernel and hold no lock of Python's."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self.event.synchronize()


class CudaStream:
    """A `Stream`.

    After an error in a kernel CUDA refuses everything in this process, so what the stream was to do is never
    done: calls that wait for it are dropped, `failure` says why, and `run` and `notify` raise it.
    """

    def __init__(self, stream: torch.cuda.Stream, name: str) -> None:
        self.failure: Exception | None = None
        """What CUDA reported while a call waited, or what a call raised."""
        self._stream = stream
        self._name = name
        self._handle: int = stream.cuda_stream
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[Mark, Callable[[], None]]] | None = None

    @property
    def key(self) -> int:
        return self._handle

    def run(self, work: Callable[[], object]) -> None:
        self._refuse()
        with torch.cuda.stream(self._stream):
            work()

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, CudaMark)
        self._stream.wait_event(mark.event)

    def mark(self) -> Mark:
        return CudaMark(self._stream)

    def notify(self, call: Callable[[], None]) -> None:
        self._refuse()
        with self._lock:
            if self._waiting is None:
                self._waiting = queue.SimpleQueue()
                name = f"ringps-cuda-{self._name}"
                threading.Thread(target=self._call, args=[self._waiting], name=name, daemon=True).start()
            # Under the lock, so that the queue has the marks in the stream's order.
            self._waiting.put((self.mark(), call))

    def keep(self, tensor: torch.Tensor) -> None:
        """Memory of torch's only; that of `CudaPeerMemory` is its user's to keep."""
        tensor.record_stream(self._stream)

    def _refuse(self) -> None:
        if self.failure is not None:
            raise RuntimeError(f"the GPU's work has failed: {self.failure}") from self.failure

    def _call(self, waiting: queue.SimpleQueue[tuple[Mark, Callable[[], None]]]) -> None:
        try:
            torch.cuda.set_device(self._stream.device)
            while True:
                mark, call = waiting.get()
                mark.wait()
                call()
                # What the call holds, tensors perhaps, must not live until the next one.
                del mark, call
        except Exception as failure:
            self.failure = failure
            _log.exception(
                "the GPU's work in stream %s has failed, and what waits for it will not end; start this "
                "worker again",
                self._name,
            )


class CudaAccelerator:
    """An `Accelerator`: one GPU that this process sees."""

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: the GPU, such as `tensor.device`.

        Raises:
            RuntimeError: torch cannot use it.
        """
        assert device.type == "cuda" and device.index is not None
        self._device = device
        self._identity = str(torch.cuda.get_device_properties(device).uuid)
        self._lock = threading.Lock()
        self._named: dict[str, CudaStream] = {}
        self._by_handle: dict[int, CudaStream] = {}
        self._nccl: Nccl | None = None
        self._warned = False
        self._driver: Driver | None = None
        self._memory: CudaPeerMemory | None = None
        try:
            self._driver = Driver.load(device.index)
            if self._driver.shares_memory():
                self._memory = CudaPeerMemory(self._driver, tensor_on(device), torch.cuda.empty_cache)
            else:
                _log.info("processes cannot open each other's memory on %s: its driver says so", device)
        except (SetupError, CudaError) as error:
            _log.warning("processes cannot open each other's memory on %s: %s", device, error)

    @property
    def identity(self) -> str:
        return self._identity

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self._device

    def here(self) -> Stream:
        stream = torch.cuda.current_stream(self._device)
        handle = stream.cuda_stream
        with self._lock:
            if handle not in self._by_handle:
                self._by_handle[handle] = CudaStream(stream, f"{handle:#x}")
            return self._by_handle[handle]

    def stream(self, name: str) -> Stream:
        with self._lock:
            if name not in self._named:
                priority = -1 if name in _URGENT else 0
                stream = torch.cuda.Stream(self._device, priority)  # type: ignore[no-untyped-call]
                made = CudaStream(stream, name)
                self._named[name] = self._by_handle[made.key] = made
            return self._named[name]

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        assert memory.is_cpu and memory.is_contiguous()
        if not memory.numel():
            return lambda: None
        address, driver = memory.data_ptr(), self._driver
        try:
            if driver is None:
                raise SetupError("the CUDA driver cannot be loaded")
            driver.register(address, memory.nbytes)
        except (SetupError, CudaError) as error:
            with self._lock:
                warned, self._warned = self._warned, True
            if not warned:
                _log.warning(
                    "cannot pin %d bytes of the host's memory (%s): copies to and from the GPU go through a "
                    "buffer of the driver's, are slower, and hold up the thread that starts them; raise the "
                    "limit of locked memory (ulimit -l)",
                    memory.nbytes,
                    error,
                )
            return lambda: None
        return _Pinned(driver, address).undo

    def capturing(self) -> bool:
        return bool(torch.cuda.is_current_stream_capturing())

    @property
    def peer_memory(self) -> PeerMemory | None:
        return self._memory

    def nccl(self) -> NcclLibrary:
        with self._lock:
            if self._nccl is None:
                self._nccl = Nccl.load(device=self._device)
            return self._nccl


class _Pinned:
    """A registered range of the host's memory."""

    def __init__(self, driver: Driver, address: int) -> None:
        self._driver = driver
        self._address = address
        self._lock = threading.Lock()
        self._undone = False

    def undo(self) -> None:
        with self._lock:
            undone, self._undone = self._undone, True
        if undone:
            return
        try:
            self._driver.unregister(self._address)
        except CudaError as error:
            # After an error in a kernel nothing can be undone, and the process is to end anyway.
            _log.warning("cannot unpin the host's memory: %s", error)
