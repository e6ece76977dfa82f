"""The files of a checkpoint on their way into a store and back, hashed while they pass.

A file is moved in blocks that fit into a core's cache, so that the hash costs next to nothing. Files that
only ringps reads may be stored compressed (https://facebook.github.io/zstd); the hash is then that of the
compressed bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import xxhash

from ringps.checkpoint.contents import COMPRESSED_SUFFIX
from ringps.checkpoint.manifest import COMPRESSIONS, FileEntry
from ringps.checkpoint.pieces import allocate
from ringps.checkpoint.snapshot import Image
from ringps.errors import CheckpointError

BLOCK_BYTES = 4 * 1024 * 1024

_COMPRESSED_KINDS = ("state", "rank")
_LEVEL = 1
"""Of zstd's. Higher ones cost several times the time, and gain little with floating-point numbers."""

_MOST_TIMES = 2**15
"""How many bytes can come of one compressed: a block of 128 KiB takes at least 4."""


class Stream(Protocol):
    """A file that is being read."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill `buffer`, or a part of it. How many bytes; 0 at the end."""
        ...


class Files(Protocol):
    """What is needed of a `store.Store` here."""

    def write(self, path: str, blocks: Iterable[bytes | memoryview]) -> None:
        """Make a file of blocks, each of which must be used before the next is asked for."""
        ...

    def read(self, path: str) -> AbstractContextManager[Stream]:
        """Open a file; FileNotFoundError if there is none."""
        ...


def check_compression(compression: str) -> None:
    """See to it that files can be stored so.

    Raises:
        ValueError: there is no such compression.
        CheckpointError: a package is missing; the message says which.
    """
    if compression not in COMPRESSIONS:
        known = " or ".join(f'"{name}"' for name in COMPRESSIONS)
        raise ValueError(f"compression must be {known}, not {compression!r}")
    if compression:
        _zstandard()


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise CheckpointError(
            "compressed checkpoints need the package zstandard: pip install 'ringps[zstd]'"
        ) from None
    return zstandard


class _Tally:
    """Counts and hashes what passes."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_128()
        self.size_bytes = 0

    def add(self, block: bytes | memoryview) -> None:
        self._hasher.update(block)
        self.size_bytes += len(block)

    def digest(self) -> str:
        found: str = self._hasher.hexdigest()
        return found


def write(store: Files, directory: str, image: Image, compression: str = "") -> FileEntry:
    """Write one file of a snapshot. Runs in one thread, and leaves the interpreter to others meanwhile.

    Args:
        store: where to.
        directory: the path of the file's directory in the store.
        image: the file.
        compression: "" or "zstd". Files of kinds other than "state" and "rank" are never compressed, so that
            every tool can read them. Those that are end in `COMPRESSED_SUFFIX`.

    Returns:
        What the manifest is to say about it.

    Raises:
        OSError: what the store raises; the file may be there in part.
        CheckpointError: a package for the compression is missing.
    """
    check_compression(compression)
    name, blocks = image.name, _blocks(image.memory)
    if compression and image.kind in _COMPRESSED_KINDS:
        name += COMPRESSED_SUFFIX
        blocks = _compressed(image.memory)
    tally = _Tally()

    def passing() -> Iterator[bytes | memoryview]:
        for block in blocks:
            tally.add(block)
            yield block

    store.write(f"{directory}/{name}", passing())
    return FileEntry(name=name, size_bytes=tally.size_bytes, digest=tally.digest(), kind=image.kind)


def _blocks(memory: memoryview) -> Iterator[bytes | memoryview]:
    for at in range(0, len(memory), BLOCK_BYTES):
        yield memory[at : at + BLOCK_BYTES]


def _compressed(memory: memoryview) -> Iterator[bytes | memoryview]:
    chunker = _zstandard().ZstdCompressor(level=_LEVEL).chunker(size=len(memory), chunk_size=BLOCK_BYTES)
    for block in _blocks(memory):
        yield from chunker.compress(block)
    yield from chunker.finish()


def read(store: Files, directory: str, entry: FileEntry, into: torch.Tensor | None = None) -> torch.Tensor:
    """The bytes of a file, decompressed, after they have been found to be those that were written.

    Args:
        store: where from.
        directory: the path of the file's directory in the store.
        entry: what the manifest says about it.
        into: uint8, of one dimension, contiguous, in the CPU's memory, and as long as the file, which is not
            compressed: filled and returned. Without it new memory is used. After an error it holds anything.

    Raises:
        CheckpointError: the file is missing, or not as the manifest says; the message names it and says why.
        OSError: what else the store raises.
    """
    try:
        with store.read(f"{directory}/{entry.name}") as stream:
            return _verified(_Source(stream, entry), into)
    except FileNotFoundError:
        raise CheckpointError(f"{entry.name}: is missing") from None


def _verified(source: _Source, into: torch.Tensor | None) -> torch.Tensor:
    if source.name.endswith(COMPRESSED_SUFFIX):
        assert into is None
        return _decompressed(source)
    raw = allocate(source.stored_bytes) if into is None else into
    assert raw.numel() == source.stored_bytes
    source.fill(raw.numpy().data)
    source.finish()
    return raw


def rooms(entries: Sequence[FileEntry]) -> dict[str, torch.Tensor]:
    """New memory for those of the files that are not compressed, by name.

    Slices of the state lie one behind the other, so that `contents.assemble` need not put them together.
    """
    plain = [file for file in entries if not file.name.endswith(COMPRESSED_SUFFIX)]
    found = {file.name: allocate(file.size_bytes) for file in plain if file.kind != "state"}
    slices = sorted((file for file in plain if file.kind == "state"), key=lambda file: file.name)
    room, at = allocate(sum(file.size_bytes for file in slices)), 0
    for file in slices:
        found[file.name] = room[at : at + file.size_bytes]
        at += file.size_bytes
    return found


def read_all(store: Files, directory: str, entries: Sequence[FileEntry]) -> dict[str, torch.Tensor]:
    """The bytes of files by name, as `read` gives them, several at a time, in memory as of `rooms`.

    Raises:
        CheckpointError: as `read`; the first of `entries` that is damaged.
        OSError: what else the store raises.
    """
    into = rooms(entries)
    with ThreadPoolExecutor(torch.get_num_threads(), "ringps-restore") as readers:
        reads = [readers.submit(read, store, directory, file, into.get(file.name)) for file in entries]
        return {file.name: reading.result() for file, reading in zip(entries, reads, strict=True)}


class _Source:
    """A stream whose bytes are counted and hashed on the way."""

    def __init__(self, stream: Stream, entry: FileEntry) -> None:
        self._stream = stream
        self._entry = entry
        self._tally = _Tally()

    @property
    def name(self) -> str:
        return self._entry.name

    @property
    def stored_bytes(self) -> int:
        return self._entry.size_bytes

    def fill(self, memory: memoryview) -> int:
        """Read until `memory` is full or the file ends. How many bytes."""
        at = 0
        while at < len(memory):
            got = self._stream.readinto(memory[at : at + BLOCK_BYTES])
            if not got:
                break
            self._tally.add(memory[at : at + got])
            at += got
        return at

    def read(self, size_bytes: int) -> bytes:
        """Up to `size_bytes` bytes of what the file should have; fewer at its end only."""
        left = self.stored_bytes - self._tally.size_bytes
        block = bytearray(min(size_bytes, left))
        return bytes(memoryview(block)[: self.fill(memoryview(block))])

    def finish(self) -> None:
        """
        Raises:
            CheckpointError: the bytes are not those that the manifest speaks of.
        """
        while self.read(BLOCK_BYTES):
            pass
        missing = self.stored_bytes - self._tally.size_bytes
        if missing:
            are = "byte is" if missing == 1 else "bytes are"
            raise CheckpointError(f"{self.name}: {missing} {are} missing")
        if self._stream.readinto(memoryview(bytearray(1))):
            raise CheckpointError(
                f"{self.name}: is longer than the {self.stored_bytes} bytes that the manifest says"
            )
        if self._tally.digest() != self._entry.digest:
            raise CheckpointError(f"{self.name}: its bytes do not have the hash that the manifest says")


class _Resumed:
    """A source of which the first bytes have been read already."""

    def __init__(self, first: bytes, source: _Source) -> None:
        self._first = first
        self._source = source

    def read(self, size_bytes: int) -> bytes:
        first, self._first = self._first, b""
        return first or self._source.read(size_bytes)


def _decompressed(source: _Source) -> torch.Tensor:
    zstandard = _zstandard()
    first = source.read(BLOCK_BYTES)
    try:
        size_bytes = zstandard.get_frame_parameters(first).content_size
        if (
            size_bytes == zstandard.CONTENTSIZE_UNKNOWN
            or not 0 < size_bytes <= source.stored_bytes * _MOST_TIMES
        ):
            raise zstandard.ZstdError("no size that it can have when decompressed")
        raw = allocate(size_bytes)
        memory, at = raw.numpy().data, 0
        with zstandard.ZstdDecompressor().stream_reader(
            _Resumed(first, source), read_size=BLOCK_BYTES, closefd=False
        ) as reader:
            while at < size_bytes and (got := reader.readinto(memory[at : at + BLOCK_BYTES])):
                at += got
            if at < size_bytes or reader.read(1):
                raise zstandard.ZstdError("not as long as it says")
    except zstandard.ZstdError as problem:
        source.finish()  # tells what is wrong with the file, if anything is
        raise CheckpointError(f"{source.name}: cannot be decompressed: {problem}") from None
    source.finish()
    return raw
