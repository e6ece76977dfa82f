"""System calls that Python 3.11 has no name for. Imports little: the shim, which must start fast, uses it."""

from __future__ import annotations

import ctypes
import os

NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
NEW_NAMES = 0x04000000  # CLONE_NEWUTS
NEW_IPC = 0x08000000  # CLONE_NEWIPC
NEW_PIDS = 0x20000000  # CLONE_NEWPID
NEW_NETWORK = 0x40000000  # CLONE_NEWNET

READ_ONLY = 1
NO_SUID = 2
REMOUNT = 32
BIND = 4096
RECURSIVE = 16384
PRIVATE = 1 << 18
DETACH = 2

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SET_PDEATHSIG = 1
_CAPBSET_DROP = 24
_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Move this thread into new namespaces; a new pid namespace is for its children only."""
    _checked(_libc.unshare(flags), "unshare")


def setns(descriptor: int, kind: int) -> None:
    """Move this thread into a namespace of another."""
    _checked(_libc.setns(descriptor, kind), "setns")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    done = _libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode() or None)
    _checked(done, f"mount {source} at {target}")


def unmount(target: str) -> None:
    """Detach a mount; who still uses it keeps it."""
    _checked(_libc.umount2(target.encode(), DETACH), f"unmount {target}")


def pivot_root(new: str, old: str) -> None:
    number = _PIVOT_ROOT[os.uname().machine]
    _checked(_libc.syscall(ctypes.c_long(number), new.encode(), old.encode()), f"pivot_root {new}")


def die_with_parent() -> None:
    """Be killed once the thread that forked this process ends."""
    _checked(_libc.prctl(_SET_PDEATHSIG, ctypes.c_ulong(9), 0, 0, 0), "PR_SET_PDEATHSIG")


def drop_capabilities() -> None:
    """Have no capability after the next exec, root or not."""
    for capability in range(64):
        if _libc.prctl(_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) != 0:
            break  # the kernel knows no more


def no_new_privileges() -> None:
    _checked(_libc.prctl(_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0), "PR_SET_NO_NEW_PRIVS")


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
