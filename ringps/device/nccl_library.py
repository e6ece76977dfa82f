"""NCCL's C library by ctypes: a communicator whose every call returns soon, and that any thread can abort.

torch's own binding waits inside C until all members have come, and cannot be told that one never will. Here
communicators are made with `blocking=0`: a call that cannot go on at once answers `ncclInProgress`, and is
asked about every millisecond.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from ringps.device import nccl_symbols as symbols
from ringps.device.nccl_symbols import (
    DTYPES,
    IN_PROGRESS,
    OPS,
    SUCCESS,
    UNIQUE_ID_BYTES,
    CommConfig,
    UniqueId,
)
from ringps.errors import SetupError

_log = logging.getLogger("ringps")

_OLDEST = (2, 18)
_POLL_S = 0.001
_CLOSE_LIMIT_S = 10.0
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class NcclError(RuntimeError):
    """A call of NCCL's failed, or came after the communicator's end (`code` is None then)."""

    def __init__(self, function: str, code: int | None, text: str) -> None:
        super().__init__(f"{function}: {text}")
        self.function = function
        self.code = code


class Nccl:
    """The loaded library. Thread-safe. See `load`."""

    def __init__(self, library: Any, device: torch.device | None = None) -> None:
        """
        Args:
            library: has NCCL's functions as attributes.
            device: the GPU that communicators are for; None: the current one of the thread that connects.

        Raises:
            SetupError: it is older than 2.18, or does not tell its version.
        """
        self._library = library
        self._device = device
        code = ctypes.c_int()
        if library.ncclGetVersion(ctypes.pointer(code)) != SUCCESS:
            raise SetupError("NCCL does not tell its version; reinstall it (pip install nvidia-nccl-cu13)")
        # Up to 2.8 the minor version counted hundreds and the major one thousands.
        major = code.value // (10000 if code.value >= 10000 else 1000)
        self._version = major, code.value // 100 % (100 if code.value >= 10000 else 10), code.value % 100
        if self._version < _OLDEST:
            raise SetupError(
                f"NCCL {'.'.join(map(str, self._version))} is too old: ringps needs 2.18 or newer"
            )

    @classmethod
    def load(cls, path: str | None = None, device: torch.device | None = None) -> Nccl:
        """Find and load it: the file at `path`, else the one that torch has loaded, else the wheel's, else
        the system's.

        Raises:
            SetupError: there is none, or it lacks a function; names what is missing.
        """
        return cls(symbols.load(path), device)

    @property
    def version(self) -> tuple[int, int, int]:
        """Major, minor, patch."""
        return self._version

    def supports(self, dtype: torch.dtype, op: str) -> bool:
        """Whether NCCL reduces so, with ringps' meaning: no int16, bool by min and max only, and no mean of
        whole numbers, which NCCL would round."""
        if dtype is torch.bool:
            return op in ("min", "max")
        return dtype in DTYPES and op in OPS and (op != "mean" or dtype in _FLOATS)

    def unique_id(self) -> bytes:
        """128 bytes that name a communicator to be: one member makes them, and all `connect` with them. This
        process listens at the address in them until then.

        Raises:
            NcclError: NCCL finds no network interface or no driver.
        """
        made = UniqueId()
        self.require("ncclGetUniqueId", self._library.ncclGetUniqueId(ctypes.pointer(made)))
        return bytes(made.internal)

    def connect(
        self, unique_id: bytes, size: int, rank: int, check: Callable[[], None], limit_s: float
    ) -> NcclCommunicator:
        """Meet the other members.

        Args:
            unique_id: what one member's `unique_id` gave.
            size: number of members.
            rank: this one's, from 0 to size - 1.
            check: called about every millisecond while this waits, and later while a collective waits to be
                taken on; what it raises aborts the communicator, and is raised from here or there.
            limit_s: how long the members may take to come.

        Raises:
            ValueError: a unique id of another length, or a rank outside of the ring.
            NcclError: NCCL failed, or the limit has passed. The communicator has been aborted.
        """
        if len(unique_id) != UNIQUE_ID_BYTES:
            raise ValueError(f"a unique id of NCCL has {UNIQUE_ID_BYTES} bytes, not {len(unique_id)}")
        if not 0 <= rank < size:
            raise ValueError(f"no rank {rank} in a ring of {size}")
        config = CommConfig.non_blocking()
        handle = ctypes.c_void_p()
        end_s = time.monotonic() + limit_s
        value = UniqueId.from_buffer_copy(unique_id)
        with nullcontext() if self._device is None else torch.cuda.device(self._device):
            code = self._library.ncclCommInitRankConfig(
                ctypes.pointer(handle), size, value, rank, ctypes.pointer(config)
            )
        if not handle.value:
            self.require("ncclCommInitRankConfig", code)
            raise NcclError("ncclCommInitRankConfig", code, "it gave no communicator")
        communicator = NcclCommunicator(self, self._library, handle, size, check)
        try:
            communicator.settle("ncclCommInitRankConfig", code, end_s)
        except BaseException:
            communicator.abort()
            raise
        return communicator

    def require(self, function: str, code: int) -> None:
        """Raise `NcclError` unless `code` says that `function` succeeded, or goes on."""
        if code not in (SUCCESS, IN_PROGRESS):
            raise NcclError(function, code, self.describe(code))

    def describe(self, code: int) -> str:
        """A code in words, with what NCCL says about the last error in the process."""
        words = (self._library.ncclGetErrorString(code) or b"").decode(errors="replace")
        last = (self._library.ncclGetLastError(None) or b"").decode(errors="replace").strip()
        return f"{words or 'unknown error'} (code {code})" + (f": {last}" if last else "")


class NcclCommunicator:
    """This member's end of a ring of NCCL's; `Nccl.connect` makes it.

    Collectives put work into a CUDA stream and return; tensors must stay until the stream has got there.
    They are flat, contiguous, on the communicator's GPU. One collective is put in at a time, so threads may
    share it, but all members must call in the same order. `error` and `abort` may be called at any time.
    """

    def __init__(
        self,
        nccl: Nccl,
        library: Any,
        handle: ctypes.c_void_p,
        size: int,
        check: Callable[[], None],
        *,
        abort_grace_s: float = 2.0,
    ) -> None:
        """
        Args:
            nccl: explains codes.
            library: has NCCL's functions as attributes.
            handle: an ncclComm_t with blocking=0; belongs to this object from here on.
            size: number of members.
            check: as of `Nccl.connect`.
            abort_grace_s: how long `abort` lets a thread that is in a call of NCCL's come out.
        """
        self._nccl = nccl
        self._library = library
        self._handle = handle
        self._size = size
        self._check = check
        self._grace_s = abort_grace_s
        self._turn = threading.Lock()
        """Held while a collective is put in."""
        self._left = threading.Condition()
        self._inside = 0
        """Threads in a call with the handle."""
        self._ended = ""
        """Why there is no handle any more."""

    def all_reduce(self, send: torch.Tensor, recv: torch.Tensor, op: str, stream_key: int) -> None:
        """Reduce all members' `send` into each one's `recv`; they may be the same tensor.

        Args:
            send: shape [n].
            recv: shape [n], of the same dtype.
            op: sum, mean, min, max or prod; see `Nccl.supports`.
            stream_key: CUDA's handle of the stream.

        Raises:
            ValueError: NCCL has no such dtype or reduction, or the tensors do not match.
            NcclError: NCCL refused it, or the communicator was aborted or closed.
        """
        dtype, operation = self._reduction(send, recv, op, 1, 1)
        self._enqueue(
            "ncclAllReduce",
            send.data_ptr(),
            recv.data_ptr(),
            send.numel(),
            dtype,
            operation,
            stream=stream_key,
        )

    def reduce_scatter(self, send: torch.Tensor, recv: torch.Tensor, op: str, stream_key: int) -> None:
        """Reduce all members' `send`, shape [size * n], and leave part `rank` of it in `recv`, shape [n].

        Otherwise as `all_reduce`; `recv` may be that part of `send`.
        """
        dtype, operation = self._reduction(send, recv, op, 1, self._size)
        self._enqueue(
            "ncclReduceScatter",
            send.data_ptr(),
            recv.data_ptr(),
            recv.numel(),
            dtype,
            operation,
            stream=stream_key,
        )

    def all_gather(self, send: torch.Tensor, recv: torch.Tensor, stream_key: int) -> None:
        """Put all members' `send`, shape [n], behind each other into `recv`, shape [size * n].

        Otherwise as `all_reduce`; `send` may be part `rank` of `recv`.
        """
        dtype = self._matching(send, recv, self._size, 1)
        self._enqueue(
            "ncclAllGather", send.data_ptr(), recv.data_ptr(), send.numel(), dtype, stream=stream_key
        )

    def broadcast(self, tensor: torch.Tensor, src: int, stream_key: int) -> None:
        """Make `tensor`, of any shape, what it is at member `src`. Otherwise as `all_reduce`."""
        if not 0 <= src < self._size:
            raise ValueError(f"no rank {src} in a ring of {self._size}")
        dtype = self._matching(tensor, tensor, 1, 1)
        place = tensor.data_ptr()
        self._enqueue("ncclBroadcast", place, place, tensor.numel(), dtype, src, stream=stream_key)

    def error(self) -> str | None:
        """What went wrong since it was connected, in words; None while nothing did, or work goes on. After
        `abort` or `close` it says so."""
        state = ctypes.c_int()
        try:
            code = self._use("ncclCommGetAsyncError", self._handle, ctypes.pointer(state))
        except NcclError as error:
            return str(error)
        code = code or state.value
        return None if code in (SUCCESS, IN_PROGRESS) else self._nccl.describe(code)

    def abort(self) -> None:
        """End what is under way here, also kernels that wait for members that are gone, and free everything.

        Idempotent, from any thread, while others are in a call: they get `NcclError`, as do all later calls.
        Returns at once where another thread is at it.
        """
        if not self._end("it was aborted"):
            return
        with self._left:
            # Freed memory must not be in use. Calls return soon, but one may wait in CUDA for room in a
            # stream that stands still, and only the abort frees it.
            self._left.wait_for(lambda: not self._inside, self._grace_s)
        code = self._library.ncclCommAbort(self._handle)
        if code not in (SUCCESS, IN_PROGRESS):
            _log.warning("ncclCommAbort: %s; its memory stays in use", self._nccl.describe(code))

    def close(self) -> None:
        """Wait until the GPU has done what was put in, and free everything; all members must call it.

        Idempotent. If that takes more than 10 s or fails, it is aborted instead, with a warning; so it is if
        `check` raises, and that is raised.
        """
        try:
            with self._turn:
                code = self._use("ncclCommFinalize", self._handle)
                self.settle("ncclCommFinalize", code, time.monotonic() + _CLOSE_LIMIT_S)
        except NcclError as error:
            if not self._ended:
                _log.warning("%s; NCCL's communicator is aborted instead of closed", error)
                self.abort()
            return
        except BaseException:
            self.abort()
            raise
        if self._end("it was closed"):
            with self._left:
                self._left.wait_for(lambda: not self._inside, self._grace_s)
            self._nccl.require("ncclCommDestroy", self._library.ncclCommDestroy(self._handle))

    def settle(self, function: str, code: int, end_s: float | None = None) -> None:
        """Wait until what `function` began is no longer in progress.

        Raises:
            NcclError: it failed, or `end_s` (of the monotonic clock) has passed.
        """
        self._nccl.require(function, code)
        state = ctypes.c_int(code)
        while state.value == IN_PROGRESS:
            self._check()
            if end_s is not None and time.monotonic() >= end_s:
                raise NcclError(function, IN_PROGRESS, "the other members did not come in time")
            time.sleep(_POLL_S)
            asked = self._use("ncclCommGetAsyncError", self._handle, ctypes.pointer(state))
            self._nccl.require("ncclCommGetAsyncError", asked)
        self._nccl.require(function, state.value)

    def _reduction(
        self, send: torch.Tensor, recv: torch.Tensor, op: str, grows: int, shrinks: int
    ) -> tuple[int, int]:
        if not self._nccl.supports(send.dtype, op):
            name = str(send.dtype).removeprefix("torch.")
            raise ValueError(f"NCCL has no {op} of {name}" if send.dtype in DTYPES else f"NCCL has no {name}")
        return self._matching(send, recv, grows, shrinks), OPS[op]

    def _matching(self, send: torch.Tensor, recv: torch.Tensor, grows: int, shrinks: int) -> int:
        """NCCL's number of the dtype."""
        if send.dtype not in DTYPES:
            raise ValueError(f"NCCL has no {str(send.dtype).removeprefix('torch.')}")
        if send.dtype is not recv.dtype:
            raise ValueError(f"cannot send {send.dtype} and receive {recv.dtype}")
        if send.numel() * grows != recv.numel() * shrinks:
            raise ValueError(
                f"{send.numel()} elements do not go into {recv.numel()} in a ring of {self._size} members"
            )
        if not (send.is_contiguous() and recv.is_contiguous()):
            raise ValueError("NCCL takes contiguous tensors only")
        return DTYPES[send.dtype]

    def _enqueue(self, function: str, *arguments: int, stream: int) -> None:
        with self._turn:
            code = self._use(function, *arguments, self._handle, stream)
            try:
                self.settle(function, code)
            except NcclError:
                raise
            except BaseException:
                # It is in progress, so nothing else may be done with it.
                self.abort()
                raise

    def _use(self, function: str, *arguments: Any) -> int:
        """Call NCCL, which `abort` waits for."""
        with self._left:
            self._refuse(function)
            self._inside += 1
        try:
            code: int = getattr(self._library, function)(*arguments)
        finally:
            with self._left:
                self._inside -= 1
                self._left.notify_all()
        self._refuse(function)
        return code

    def _refuse(self, function: str) -> None:
        if self._ended:
            raise NcclError(function, None, f"there is no communicator: {self._ended}")

    def _end(self, reason: str) -> bool:
        """Whether it is the caller who ends it."""
        with self._left:
            if self._ended:
                return False
            self._ended = reason
            return True
