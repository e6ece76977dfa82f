"""Checkpoints in anything that fsspec reaches: object stores mostly, where nothing can be renamed."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fsspec.core import url_to_fs
from fsspec.registry import known_implementations
from fsspec.spec import AbstractBufferedFile

from ringps import probe
from ringps.checkpoint.manifest import MANIFEST
from ringps.errors import CheckpointError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer
    from fsspec import AbstractFileSystem

_BLOCK_BYTES = 32 * 1024 * 1024
"""Sent or fetched at once. S3 takes 10 000 such parts, so that a file may have 300 GB."""

_WITHOUT_DIRECTORIES = frozenset(
    {"abfs", "abfss", "adl", "az", "gcs", "gs", "oci", "oss", "s3", "s3a", "tos", "tosfs"}
)
"""In object stores directories come and go with what is in them; to make one might make a bucket."""


def open_remote(url: str, scheme: str, shown: str) -> FsspecStore:
    """The store at a URL; see `store.open_store`.

    Args:
        url: with a scheme.
        scheme: the URL's.
        shown: the URL for messages, without a password.
    """
    known = known_implementations.get(scheme)
    if known is None:
        raise ValueError(
            f"{shown}: fsspec knows no scheme {scheme}://; it may need a package that is missing"
        )
    try:
        # Listings must show what others have written, and no other user of fsspec shares this object.
        file_system, root = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        package = str(known["class"]).partition(".")[0]
        raise CheckpointError(
            f"{shown} needs a package that is not installed: `pip install {package}` ({error})"
        ) from error
    except Exception as error:  # every library has its own
        raise CheckpointError(f"{shown} cannot be reached: {_describe(error, url, shown)}") from error
    if not root.strip("/"):
        raise ValueError(f"{shown} has no path")
    return FsspecStore(file_system, root, url, shown, directories=scheme not in _WITHOUT_DIRECTORIES)


class FsspecStore:
    """See `Store`."""

    renames = False

    def __init__(
        self, file_system: AbstractFileSystem, root: str, url: str, shown: str, *, directories: bool
    ) -> None:
        """
        Args:
            file_system: must not cache listings.
            root: the directory, as the file system calls it.
            url: may have a password in it; is not shown.
            shown: the URL for messages.
            directories: whether a directory must be made before something is written into it.
        """
        self._fs = file_system
        self._root = root.rstrip("/")
        self._url = url
        self._directories = directories
        self.where = shown

    def names(self, path: str = "") -> list[str]:
        """See `Store`."""
        directory = self._full(path)
        with self._errors(path):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(directory, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        whole = {name.strip("/") for name in found} - {directory.strip("/")}
        return sorted(posixpath.basename(name) for name in whole)

    def write(self, path: str, blocks: Iterable[ReadableBuffer]) -> None:
        """See `Store`. Holds about two blocks of `_BLOCK_BYTES` in memory."""
        written = 0
        with self._errors(path):
            if self._directories:
                self._fs.makedirs(posixpath.dirname(self._full(path)), exist_ok=True)
            file = self._fs.open(self._full(path), "wb", block_size=_BLOCK_BYTES)
        try:
            for block in blocks:
                if probe.listener is not None:
                    probe.reached("save_write", path=path, written=written)
                with self._errors(path):
                    written += file.write(block)
            with self._errors(path):
                file.close()
        except BaseException:
            _abandon(file)
            raise

    def read(self, path: str) -> FsspecReader:
        """See `Store`."""
        with self._errors(path):
            file = self._fs.open(self._full(path), "rb", block_size=_BLOCK_BYTES, cache_type="readahead")
            try:
                size = self._fs.size(self._full(path))
                if size is None:
                    raise OSError("it has no size")
            except BaseException:
                file.close()
                raise
        return FsspecReader(file, int(size), partial(self._errors, path))

    def create(self, path: str, raw: bytes) -> bool:
        """See `Store`. As exclusive as the library makes it: on S3 by a conditional request; where it can do
        no better, by looking first."""
        try:
            with self._errors(path):
                if self._directories:
                    self._fs.makedirs(posixpath.dirname(self._full(path)), exist_ok=True)
                self._fs.pipe_file(self._full(path), raw, mode="create")
        except OSError:
            # Not every service says clearly that it refused because the file exists.
            with self._errors(path):
                self._fs.invalidate_cache()
                if self._fs.exists(self._full(path)):
                    return False
            raise
        return True

    def publish(self, aside: str, entry: str, manifest: bytes) -> None:
        """See `Store`."""
        if probe.listener is not None:
            probe.reached("save_publish", path=entry, stage="manifest")
        path = f"{entry}/{MANIFEST}"
        # It may be ours: when an answer is lost, some libraries ask again.
        if not self.create(path, manifest) and self._cat(path) != manifest:
            raise FileExistsError(f"{self._shown(entry)}: a checkpoint of this name exists already")
        if probe.listener is not None:
            probe.reached("save_publish", path=entry, stage="done")

    def remove(self, path: str) -> None:
        """See `Store`."""
        with self._errors(path):
            self._fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._fs.rm_file(self._full(f"{path}/{MANIFEST}"))
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._full(path), recursive=True)
            self._fs.invalidate_cache()

    def _cat(self, path: str) -> bytes:
        with self._errors(path):
            found: bytes = self._fs.cat_file(self._full(path))
            return found

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _shown(self, path: str) -> str:
        return f"{self.where.rstrip('/')}/{path}" if path else self.where

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Turns errors of the libraries below into an `OSError` that says which file it was about."""
        try:
            yield
        except Exception as error:
            what = f"{self._shown(path)}: {_describe(error, self._url, self.where)}"
            if isinstance(error, OSError):
                raise _like(error, what) from error
            raise OSError(what) from error


class FsspecReader:
    """See `Reader`."""

    def __init__(
        self, file: Any, size_bytes: int, errors: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """
        Args:
            file: what fsspec opened. It is closed with this object.
            size_bytes: its size.
            errors: in this context errors become such as a `Store` may raise.
        """
        self._file = file
        self._errors = errors
        self.size_bytes = size_bytes

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """See `Reader`."""
        with self._errors():
            return int(self._file.readinto(buffer))

    def __enter__(self) -> FsspecReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


_KINDS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    TimeoutError,
    ConnectionError,
)


def _like(error: OSError, message: str) -> OSError:
    """The same kind of error, with another message. Libraries' own kinds take other arguments."""
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), OSError)
    alike = kind(message)
    alike.errno = error.errno
    return alike


def _describe(error: Exception, url: str, shown: str) -> str:
    """An error of any library in words, without the URL's password."""
    text = str(error).replace(url, shown)
    if password := urlsplit(url).password:
        text = text.replace(password, "***")
    kind = type(error).__name__
    return text if text and isinstance(error, OSError) else f"{kind}: {text}" if text else kind


def _abandon(file: Any) -> None:
    """Close a file that is being written without sending what is left of it."""
    with contextlib.suppress(Exception):  # another error is on its way, and says more
        if not isinstance(file, AbstractBufferedFile):
            file.close()
            return
        try:
            file.discard()
        finally:
            file.closed = True  # or it would be sent when the object is collected
