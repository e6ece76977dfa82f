"""Reading another process's memory: `process_vm_readv(2)`.

The kernel copies straight from the peer's pages to ours, so tensors that do not lie in shared memory need no
staging. It is allowed between processes of one user in one PID namespace; where the Yama security
module restricts tracing (`ptrace_scope` 1), only to those that the owner has named.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_readv = getattr(_libc, "process_vm_readv", None)
if _readv is not None:
    _readv.restype = ctypes.c_ssize_t
    _readv.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(_Iovec),
        ctypes.c_ulong,
        ctypes.POINTER(_Iovec),
        ctypes.c_ulong,
        ctypes.c_ulong,
    )


class RemoteMemory:
    """The memory of process `pid`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._here = _Iovec()
        self._there = _Iovec()

    def read(self, there: int, here: int, size_bytes: int) -> None:
        """Copy bytes from its address `there` to our address `here`.

        Raises:
            OSError: not allowed, it is gone, or the addresses are not mapped.
        """
        while size_bytes:
            self._here.base, self._here.length = here, size_bytes
            self._there.base, self._there.length = there, size_bytes
            if _readv is None:
                raise OSError(errno.ENOSYS, "this C library has no process_vm_readv")
            count = _readv(self._pid, self._here, 1, self._there, 1, 0)
            if count <= 0:
                code = ctypes.get_errno() if count < 0 else errno.EFAULT
                raise OSError(code, os.strerror(code))
            there, here, size_bytes = there + count, here + count, size_bytes - count


def allow_readers() -> None:
    """Where Yama asks for it, let processes of this user read our memory, as they may elsewhere."""
    if _YAMA.exists() and _YAMA.read_text().strip() == "1":
        _libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def forbid_readers() -> None:
    """Undo `allow_readers`."""
    if _YAMA.exists() and _YAMA.read_text().strip() == "1":
        _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(0), 0, 0, 0)
