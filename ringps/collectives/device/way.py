"""What the ways to carry out collectives on a GPU have in common."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from ringps.collectives.backend import Work, call_of
from ringps.collectives.handle import Handle
from ringps.device import Accelerator, Stream
from ringps.errors import CollectiveError, RingpsError
from ringps.kernels.cuda.digest import digest_into

_LOOK_S = 0.5


class Way(Protocol):
    """Carries out collectives on tensors of one accelerator, in the order in which they are started."""

    def start(self, work: Work) -> Handle:
        """Put `work` in; the calling thread's stream holds what fills its source. By one thread at a time.

        Raises:
            RingpsError: the ring is broken.
        """

    def interrupt(self, error: RingpsError) -> None:
        """End what is under way, and all that is started later, with `error`. Any thread."""

    def close(self) -> None:
        """Free everything; nothing is started any more. Idempotent."""


def name_of(work: Work) -> str:
    """What people read of a collective on a GPU."""
    return f"{call_of(work)} on the GPU"


def conclude(work: Work, stream: Stream, settle: Callable[[], None]) -> None:
    """Put behind the result in `stream`: its hash, its way to the user's tensor, and that it is there."""
    assert work.device is not None
    back, digest, finish = work.back, work.digest, work.finish
    hashed = fetch_hash(work.output, stream) if digest is not None else None
    if back is not None:
        stream.run(back)

    def end() -> None:
        if digest is not None and hashed is not None:
            digest.give(hashed())
        if finish is not None:
            finish()
        settle()

    stream.notify(end)


def fetch_hash(tensor: torch.Tensor, stream: Stream) -> Callable[[], bytes]:
    """Hash a tensor on its device; the result can be read when the stream has got there."""
    place = torch.empty(2, dtype=torch.int64, pin_memory=tensor.is_cuda)

    def launch() -> None:
        found = torch.empty(2, dtype=torch.int64, device=tensor.device)
        digest_into(tensor, found)
        place.copy_(found, non_blocking=True)

    stream.run(launch)
    return lambda: place.numpy().tobytes()


class DeviceHandle(Handle):
    """A collective on a GPU. Who waits for it looks after the GPU too, which may have failed and tells
    nobody."""

    def __init__(self, name: str, parts: Sequence[Handle], look: Callable[[], None]) -> None:
        """
        Args:
            name: as for `Handle`.
            parts: likewise.
            look: called every half second; raises if this will never end.
        """
        super().__init__(name, parts)
        self._look = look

    def wait(self, timeout_s: float | None = None) -> None:
        end_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, end_s - time.monotonic())
            try:
                return super().wait(min(left_s, _LOOK_S))
            except TimeoutError:
                if left_s <= _LOOK_S:
                    raise TimeoutError(f"{self._name} has not ended within {timeout_s} s") from None
            self._look()


def look_at(*streams: Stream) -> None:
    """
    Raises:
        CollectiveError: what was put into one of them will never be done.
    """
    for stream in streams:
        if stream.failure is not None:
            raise CollectiveError(
                f"the GPU has failed, and this process can use it no more: {stream.failure}; "
                "start this worker again"
            ) from stream.failure


class Alone:
    """A ring of one has its result already."""

    def __init__(self, device: Accelerator) -> None:
        self._device = device
        self._error: RingpsError | None = None

    def start(self, work: Work) -> Handle:
        if self._error is not None:
            raise self._error
        stream = self._device.stream("reduce")
        handle = DeviceHandle(name_of(work), (), partial(look_at, stream))
        stream.after(self._device.here().mark())
        if work.output is not work.source:
            stream.run(lambda: work.output.copy_(work.source))
        conclude(work, stream, handle._settle)
        return handle

    def interrupt(self, error: RingpsError) -> None:
        self._error = self._error or error

    def close(self) -> None:
        """Holds nothing."""


class Pending:
    """Handles that nobody but us ends: all of them, when something has gone wrong. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handles: list[Handle] = []
        self._error: RingpsError | None = None

    @property
    def error(self) -> RingpsError | None:
        """What ended them."""
        return self._error

    def add(self, handle: Handle) -> None:
        """Have it ended, should something go wrong.

        Raises:
            RingpsError: something has.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            self._handles = [one for one in self._handles if not one.done()]
            self._handles.append(handle)

    def settle(self, handle: Handle) -> None:
        """It has its result, unless it was ended before."""
        with self._lock:
            if not handle.settled:
                handle._settle()

    def fail(self, error: RingpsError) -> None:
        """End those that have not ended, and all to come. The first error stays."""
        with self._lock:
            self._error = self._error or error
            for handle in self._handles:
                if not handle.settled:
                    handle._settle(self._error)
            self._handles = []
