"""Copying the files of a checkpoint from one store to another."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from ringps.checkpoint.files import BLOCK_BYTES, Files
from ringps.checkpoint.manifest import FileEntry
from ringps.errors import CheckpointError


def copy(source: Files, directory: str, target: Files, into: str, file: FileEntry) -> None:
    """Copy a file as it is stored, unless it turns out to be damaged.

    Args:
        source: where it is, in `directory`.
        target: where it is to be, in `into`.
        file: what the manifest says about it.

    Raises:
        CheckpointError: its bytes are not those that the manifest speaks of; the copy may be there in part.
        OSError: what a store raises.
    """

    def blocks() -> Iterator[memoryview]:
        hasher, left = xxhash.xxh3_128(), file.size_bytes
        buffer = memoryview(bytearray(min(BLOCK_BYTES, max(1, left))))
        with source.read(f"{directory}/{file.name}") as stream:
            while got := stream.readinto(buffer):
                left -= got
                hasher.update(buffer[:got])
                yield buffer[:got]
        if left or hasher.hexdigest() != file.digest:
            raise CheckpointError(f"{file.name}: is damaged, and was not copied")

    target.write(f"{into}/{file.name}", blocks())
