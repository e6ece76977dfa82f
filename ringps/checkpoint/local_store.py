"""Checkpoints in a directory of a file system of this machine, also one that several machines share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ringps import probe
from ringps.checkpoint.manifest import MANIFEST

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_GONE = ".gone-"
"""Begins the name of a directory that is being deleted."""

_WRITE_BYTES = 1024 * 1024
"""Shorter blocks are put together."""

_DIRECT_BYTES = 4096
"""What must divide the address and the length of a block, and its place in the file, to go past the cache."""


class LocalStore:
    """See `Store`."""

    renames = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(os.path.abspath(root))  # the script may change its working directory

    @property
    def where(self) -> str:
        """The directory's absolute path."""
        return str(self._root)

    def names(self, path: str = "") -> list[str]:
        """See `Store`."""
        try:
            return sorted(os.listdir(self._root / path))
        except FileNotFoundError:
            return []

    def write(self, path: str, blocks: Iterable[ReadableBuffer]) -> None:
        """See `Store`. Until all is written the file is called `path`.part."""
        _make_directory((self._root / path).parent)
        self._put(path, blocks)

    def _put(self, path: str, blocks: Iterable[ReadableBuffer]) -> None:
        final = self._root / path
        part = final.with_name(f"{final.name}.part")
        try:
            with open(part, "wb", buffering=_WRITE_BYTES) as file:
                _write(file, path, blocks)
            os.rename(part, final)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        _sync_directory(final.parent)

    def read(self, path: str) -> LocalReader:
        """See `Store`."""
        return LocalReader(self._root / path)

    def create(self, path: str, raw: bytes) -> bool:
        """See `Store`."""
        final = self._root / path
        _make_directory(final.parent)
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(open(final, "xb"))
            except FileExistsError:
                return False
            _write(file, path, [raw])
        _sync_directory(final.parent)
        return True

    def publish(self, aside: str, entry: str, manifest: bytes) -> None:
        """See `Store`."""
        if probe.listener is not None:
            probe.reached("save_publish", path=entry, stage="manifest")
        # If somebody has cleared the directory away, it must not be made anew, with nothing but a manifest.
        self._put(f"{aside}/{MANIFEST}", [manifest])
        if probe.listener is not None:
            probe.reached("save_publish", path=entry, stage="rename")
        try:
            os.rename(self._root / aside, self._root / entry)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise FileExistsError(
                errno.EEXIST, "a checkpoint of this name exists already", str(self._root / entry)
            ) from None
        _sync_directory(self._root)
        if probe.listener is not None:
            probe.reached("save_publish", path=entry, stage="done")

    def remove(self, path: str) -> None:
        """See `Store`. A directory is renamed first: nobody sees half of it, or publishes what is left."""
        doomed = self._root / path
        gone = doomed.with_name(f"{_GONE}{secrets.token_hex(8)}")
        try:
            os.unlink(doomed)
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError):  # the latter is what POSIX says of a directory
            try:
                os.rename(doomed, gone)
            except FileNotFoundError:
                return
            _sync_directory(doomed.parent)
            # Also what was left when this was interrupted before.
            for left in doomed.parent.glob(f"{_GONE}*"):
                shutil.rmtree(left, onerror=_unless_gone)


class LocalReader(io.FileIO):
    """See `Reader`."""

    @property
    def size_bytes(self) -> int:
        """Bytes in the file as it is now."""
        return os.fstat(self.fileno()).st_size

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """See `Reader`."""
        return super().readinto(buffer) or 0


def _write(file: BinaryIO, path: str, blocks: Iterable[ReadableBuffer]) -> None:
    """Write blocks to an open file so that they are there after a crash.

    Long blocks that lie well in memory go past the page cache: they take a fraction of the CPU time then,
    which training wants, and leave the cache to the data. Not every file system can do that.
    """
    written, direct = 0, True
    for block in blocks:
        if probe.listener is not None:
            probe.reached("save_write", path=path, written=written)
        view = memoryview(block).cast("B")
        direct = direct and _suits_direct(view) and _write_direct(file, view)
        if not direct:
            file.write(view)
        written += len(view)
    file.flush()
    os.fsync(file.fileno())


def _suits_direct(view: memoryview) -> bool:
    if len(view) < _WRITE_BYTES or len(view) % _DIRECT_BYTES:
        return False
    return int(np.frombuffer(view, np.uint8).ctypes.data) % _DIRECT_BYTES == 0


def _write_direct(file: BinaryIO, view: memoryview) -> bool:
    """Write past the page cache; False, and nothing written, if that cannot be done here."""
    descriptor = file.fileno()
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        try:
            done = os.write(descriptor, view)
        finally:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return False
        raise
    if done < len(view):  # as at the end of a disk: the rest tells why
        file.write(view[done:])
    return True


def _make_directory(path: Path) -> None:
    """Make a directory and those above it that are missing, durably."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    with contextlib.suppress(FileExistsError):  # another rank makes it too
        path.mkdir()
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Make durable which names are in a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems (of FUSE, mostly) do not have it: there, names are as durable as they get.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _unless_gone(function: object, path: str, error: tuple[type, BaseException, object]) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]
