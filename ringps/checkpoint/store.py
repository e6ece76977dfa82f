"""Where checkpoints lie: a protocol of files and directories, and the way from a path or URL to one.

Paths in a store are relative to it, with "/" between names; "" is the store itself. Everything that a store
raises is an `OSError`, whatever library it is made of.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://.*)?::.*://")
_PASSWORD = re.compile(r"(://)[^/@]*:[^/]*@")


class Reader(Protocol):
    """A file that is being read, from its beginning."""

    @property
    def size_bytes(self) -> int:
        """Bytes in the whole file."""
        ...

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill a buffer with what comes next, or its beginning, if less comes at once.

        After a failure the file cannot be read further.

        Returns:
            Bytes read; 0 at the end of the file only.
        """
        ...


class Store(Protocol):
    """Files and directories. Several threads and processes may use it at once."""

    @property
    def where(self) -> str:
        """The store in words, for messages: a path, or a URL without a password."""
        ...

    @property
    def renames(self) -> bool:
        """Whether a checkpoint becomes visible by a renaming. See `place`."""
        ...

    def names(self, path: str = "") -> list[str]:
        """The names of what lies in a directory, sorted; none if there is no such directory.

        After a failure it is unknown what lies there.
        """
        ...

    def write(self, path: str, blocks: Iterable[ReadableBuffer]) -> None:
        """Write a whole file, and the directories above it. It is durable when this returns.

        After a failure, also of `blocks`, what was there before is unharmed, or (in stores that do not
        rename) the file may be cut off.
        """
        ...

    def read(self, path: str) -> AbstractContextManager[Reader]:
        """Open a file.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def create(self, path: str, raw: bytes) -> bool:
        """Write a small file, unless it exists. Of several that do so at once, one succeeds.

        After a failure the file may exist, and may be cut off.

        Returns:
            False if it existed.
        """
        ...

    def publish(self, aside: str, entry: str, manifest: bytes) -> None:
        """Make a checkpoint visible whose files were written to `place(...)`, with its manifest.

        It is durable when this returns. After a failure it may be visible, and if so is whole.

        Raises:
            FileExistsError: there is a checkpoint of this name. It stays as it is.
        """
        ...

    def remove(self, path: str) -> None:
        """Delete a file, or a directory with all that is in it; it need not exist.

        A manifest goes first: after a failure, what is left of a checkpoint is none.
        """
        ...


def place(store: Store, aside: str, entry: str) -> str:
    """The directory into which the files of a checkpoint are written until it is published.

    Where directories cannot be renamed, this is the entry itself: it counts only when it has a manifest.
    """
    return aside if store.renames else entry


def open_store(where: str | os.PathLike[str]) -> Store:
    """The store at a path or URL. Nothing is created until something is written.

    Anything but a path and file:// goes through fsspec (https://filesystem-spec.readthedocs.io), which needs
    a package for most schemes. How to reach the storage, and with which keys, these packages find out in
    their own ways: for s3:// from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE...),
    ~/.aws and the machine's role; for gs:// from the application default credentials; and all of them from
    fsspec's configuration: ~/.config/fsspec/*.json, and variables such as FSSPEC_S3_ENDPOINT_URL.

    Raises:
        ValueError: the scheme is unknown, or the URL has no path.
        CheckpointError: the package for it is not installed, or does not start; the message says which.
    """
    text = os.fspath(where)
    if not text:
        raise ValueError("a checkpoint directory needs a path or URL, not an empty text")
    if _CHAIN.match(text):
        raise ValueError(
            f"{without_password(text)} is a chain of file systems; a checkpoint directory must be one of them"
        )
    match = _SCHEME.match(text)
    scheme = match.group(1).lower() if match else "file"
    if scheme not in ("file", "local"):
        from ringps.checkpoint.remote_store import open_remote  # loads fsspec

        return open_remote(text, scheme, without_password(text))
    from ringps.checkpoint.local_store import LocalStore

    path = text[match.end() :] if match else text
    if match and not path.startswith("/"):
        raise ValueError(f"{text} names a machine; write file:///PATH for a path on this one")
    return LocalStore(path)


def in_words(error: Exception) -> str:
    """What went wrong, for a message that says where."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error) or type(error).__name__


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    return _PASSWORD.sub(r"\1", url)
