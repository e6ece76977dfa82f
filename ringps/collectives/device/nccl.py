"""Collectives by NCCL, for members that have a GPU each.

NCCL neither compares what ranks call nor notices that one has died: its kernels spin for ever. So each
collective is announced by a barrier of the host's backend, beside it and without waiting for it: ranks that
call different things, come late, or are lost fail there, as ever, and whoever closes the backend aborts the
communicator, which ends the kernels. The next generation connects anew, in the same process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import torch

from ringps.collectives.backend import REDUCTIONS, Backend, Work, call_of
from ringps.collectives.device.way import DeviceHandle, Pending, Way, conclude, look_at, name_of
from ringps.collectives.handle import Handle
from ringps.device import Accelerator, NcclRing, Stream
from ringps.errors import ClosedError, CollectiveError, CollectiveTimeoutError, RingpsError

_EXPLANATION_S = 3.0
"""How long after an error of NCCL's the loss that caused it may take to be noticed, which says more."""
_CLOSE_S = 5.0
"""How long aborted kernels may take to end."""


class NcclWay:
    """A `way.Way` over an NCCL communicator, which belongs to it."""

    def __init__(
        self, host: Backend, device: Accelerator, ring: NcclRing, otherwise: Way, *, op_timeout_s: float
    ) -> None:
        """
        Args:
            host: announces each collective.
            device: whose tensors they are on.
            ring: connected.
            otherwise: for reductions that NCCL has not.
            op_timeout_s: how long NCCL may take for one.
        """
        self._host = host
        self._device = device
        self._ring = ring
        self._otherwise = otherwise
        self._limit_s = op_timeout_s
        self._stream = device.stream("reduce")
        self._library = device.nccl()
        self._pending = Pending()
        self._closing = threading.Lock()

    def start(self, work: Work) -> Handle:
        dtype = torch.uint8 if work.source.dtype is torch.bool else work.source.dtype
        if work.kind in REDUCTIONS and not self._library.supports(dtype, work.op):
            return self._otherwise.start(work)
        # What comes over the wire is compared; the dtype there is what the user's is called.
        meeting = self._host.start(_announcement(work))
        name = name_of(work)
        overseer = _Overseer(name, self._stream, self._ring.error, self._limit_s)
        handle = DeviceHandle(name, [meeting], overseer.look)
        self._pending.add(handle)
        stream = self._stream
        stream.after(self._device.here().mark())
        try:
            self._launch(work, dtype, stream)
        except RuntimeError as failure:
            error = self._pending.error or CollectiveError(f"{name}: {failure}")
            self.interrupt(error)
            raise error from failure
        conclude(work, stream, partial(self._pending.settle, handle))
        return handle

    def interrupt(self, error: RingpsError) -> None:
        self._pending.fail(error)
        with self._closing:
            self._ring.abort()
        self._otherwise.interrupt(error)

    def close(self) -> None:
        self.interrupt(ClosedError("the ring was shut down by this process"))
        # What was aborted must have left the stream before its tensors are used again.
        passed = threading.Event()
        self._stream.notify(passed.set)
        passed.wait(_CLOSE_S)
        self._otherwise.close()

    def _launch(self, work: Work, dtype: torch.dtype, stream: Stream) -> None:
        source, output = work.source.view(dtype), work.output.view(dtype)
        ring = self._ring
        if work.kind == "all_reduce":
            stream.run(lambda: ring.all_reduce(source, output, work.op, stream.key))
        elif work.kind == "reduce_scatter":
            stream.run(lambda: ring.reduce_scatter(source, output, work.op, stream.key))
        elif work.kind == "all_gather":
            stream.run(lambda: ring.all_gather(source, output, stream.key))
        else:
            assert work.kind == "broadcast"
            stream.run(lambda: ring.broadcast(output, work.src, stream.key))


class _Overseer:
    """Looks after one collective of NCCL's; see `way.DeviceHandle`."""

    def __init__(self, name: str, stream: Stream, error: Callable[[], str | None], limit_s: float) -> None:
        self._name = name
        self._stream = stream
        self._error = error
        self._limit_s = limit_s
        self._begun_s = time.monotonic()
        self._failed_s: float | None = None

    def look(self) -> None:
        """
        Raises:
            CollectiveError: it will not end.
        """
        look_at(self._stream)
        now_s, found = time.monotonic(), self._error()
        if found is None:
            self._failed_s = None
        else:
            self._failed_s = self._failed_s or now_s
            if now_s - self._failed_s > _EXPLANATION_S:
                raise CollectiveError(f"{self._name}: NCCL reports: {found}")
        if now_s - self._begun_s > self._limit_s:
            raise CollectiveTimeoutError(f"{self._name}: NCCL has not ended it for {self._limit_s:g} s")


def _announcement(work: Work) -> Work:
    empty = torch.empty(0, dtype=torch.uint8)
    return Work(
        kind="barrier",
        source=empty,
        output=empty,
        op="sum",
        src=0,
        label=f"for {call_of(work)} by NCCL",
        shape=(),
        dtype=work.dtype,
        finish=None,
    )
