"""Looking into a checkpoint directory from outside of any training: the front of this package for commands.

Nothing here changes the directory, which a job may be using meanwhile. Importing it does not load torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from ringps.checkpoint.directory import Contents, Directory, Found
from ringps.checkpoint.export import Exported, Target, export_to, none_in
from ringps.checkpoint.lineage import Lineage
from ringps.checkpoint.manifest import MANIFEST, FileEntry, Manifest, aside_name, entry_name
from ringps.checkpoint.store import Store, open_store
from ringps.errors import CheckpointError

FORMATS = ("torch", "dcp")
"""What `export` can write."""

_BLOCK_BYTES = 4 * 1024 * 1024


class Damage(NamedTuple):
    """What is wrong with a file of a checkpoint."""

    checkpoint: str
    """The name of its directory."""

    file: str
    reason: str


class Leftover(NamedTuple):
    """What was not finished, or is being written."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A checkpoint, and whether it is of any use."""

    name: str
    """Its directory."""

    step: int
    run: int
    manifest: Manifest | None
    """None if it cannot be read."""

    damage: tuple[Damage, ...]
    """What was found to be wrong."""

    left_out: str
    """Why it does not belong to the history of the training; empty if it does."""

    extra_files: tuple[str, ...]
    """Files in its directory of which the manifest does not speak. They do no harm."""

    @property
    def restorable(self) -> bool:
        """Whether training may go on from it, as far as was looked."""
        return not self.damage and not self.left_out


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What is in a checkpoint directory."""

    where: str
    """The path or URL, for people."""

    checkpoints: tuple[Listed, ...]
    """By run and step, the newest first; without those that were deleted meanwhile."""

    leftovers: tuple[Leftover, ...]
    complete: bool
    """Whether all checkpoints were looked at."""

    @property
    def restored(self) -> Listed | None:
        """The checkpoint that a restore takes, as far as was looked; None if there is none, or if not all
        were looked at."""
        candidates = self.checkpoints if self.complete else ()
        return next((listed for listed in candidates if listed.restorable), None)

    @property
    def damage(self) -> tuple[Damage, ...]:
        """What is wrong with any of them."""
        return tuple(damage for listed in self.checkpoints for damage in listed.damage)


def ls(where: str | os.PathLike[str]) -> Listing:
    """List the checkpoints in a directory. Of their files only the sizes are looked at.

    Args:
        where: the checkpoint directory, a path or URL; see `store.open_store`.

    Raises:
        CheckpointError: there is no checkpoint, or the directory cannot be opened.
        ValueError: no such URL is possible.
        OSError: the directory cannot be read.
    """
    return _list(where, None, _size_damage)


def verify(where: str | os.PathLike[str], step: int | None = None) -> Listing:
    """Read every byte of the checkpoints in a directory, and check every hash.

    Args:
        where: the checkpoint directory, a path or URL; see `store.open_store`.
        step: only look at the checkpoints of this step. All others are missing in the result then.

    Raises:
        CheckpointError: there is no checkpoint (of this step), or the directory cannot be opened.
        ValueError: no such URL is possible.
        OSError: the directory cannot be read.
    """
    return _list(where, step, _content_damage)


def export(
    where: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    step: int | None = None,
    format: str = "torch",
    force: bool = False,
) -> Exported:
    """Write a checkpoint's training state in a format that needs no ringps.

    The state is a dict: "model" and "optimizer" (their `state_dict()`), "step", and what else the script's
    `TrainState` had. What is a rank's own, such as random number generators, is not in it. Numpy arrays
    become tensors, and numpy's numbers Python's.

    Args:
        where: the checkpoint directory, a path or URL; see `store.open_store`.
        out: a path that must not exist. It appears when all is written.
        step: which one; None for the newest one of the history that is whole.
        format: "torch": one file for `torch.load(out, weights_only=True)`; "dcp": a directory for
            `torch.distributed.checkpoint.load`.
        force: replace what is at `out`: a file, or a directory that was exported.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged, or cannot be written so.
        ValueError: no such URL or format is possible.
        OSError: something cannot be read or written; FileExistsError: there is something at `out`.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    return export_to(Target(out, force=force), format, Directory(open_store(where)), step)


def _list(
    where: str | os.PathLike[str], step: int | None, look: Callable[[Store, str, FileEntry], str]
) -> Listing:
    directory = Directory(open_store(where))
    contents = directory.contents()
    lineage = directory.lineage(contents)
    chosen = [found for found in reversed(contents.checkpoints) if step is None or found.step == step]
    if not chosen:
        raise CheckpointError(none_in(directory.where, contents, step))
    listed = (_examine(directory, found, lineage, look) for found in chosen)
    return Listing(
        where=directory.where,
        # A job may delete meanwhile what it needs no longer.
        checkpoints=tuple(one for one in listed if not one.damage or MANIFEST in directory.files(one.name)),
        leftovers=_leftovers(contents),
        complete=step is None,
    )


def _leftovers(contents: Contents) -> tuple[Leftover, ...]:
    asides = (
        Leftover(aside_name(*aside), f"run {aside.run} is writing it, or has left it unfinished")
        for aside in contents.asides
    )
    torn = (
        Leftover(entry_name(*entry), f"it has no {MANIFEST}: half written or half deleted")
        for entry in contents.torn
    )
    return (*asides, *torn)


def _examine(
    directory: Directory, found: Found, lineage: Lineage, look: Callable[[Store, str, FileEntry], str]
) -> Listed:
    damage: list[Damage] = []
    extra: tuple[str, ...] = ()
    try:
        manifest, reason = directory.read_manifest(found.name)
    except OSError as error:
        manifest, reason = None, f"cannot be read: {error}"
    if manifest is None:
        damage.append(Damage(found.name, MANIFEST, reason))
    else:
        for entry in manifest.files:
            try:
                reason = look(directory.store, found.name, entry)
            except FileNotFoundError:
                reason = "is missing"
            except OSError as error:
                reason = f"cannot be read: {error}"
            if reason:
                damage.append(Damage(found.name, entry.name, reason))
        known = {MANIFEST, *(entry.name for entry in manifest.files)}
        extra = tuple(name for name in directory.files(found.name) if name not in known)
    left_out = lineage.left_out.get(found.point)
    return Listed(
        name=found.name,
        step=found.step,
        run=found.run,
        manifest=manifest,
        damage=tuple(damage),
        left_out=left_out.reason if left_out else "",
        extra_files=extra,
    )


def _size_damage(store: Store, checkpoint: str, entry: FileEntry) -> str:
    with store.read(f"{checkpoint}/{entry.name}") as file:
        return _wrong_size(file.size_bytes, entry)


def _content_damage(store: Store, checkpoint: str, entry: FileEntry) -> str:
    hasher, size_bytes = xxhash.xxh3_128(), 0
    block = memoryview(bytearray(_BLOCK_BYTES))
    with store.read(f"{checkpoint}/{entry.name}") as file:
        while count := file.readinto(block):
            hasher.update(block[:count])
            size_bytes += count
    reason = _wrong_size(size_bytes, entry)
    if not reason and hasher.hexdigest() != entry.digest:
        reason = "its bytes do not have the hash that the manifest says"
    return reason


def _wrong_size(found_bytes: int, entry: FileEntry) -> str:
    by = found_bytes - entry.size_bytes
    if by > 0:
        return f"it has {by} bytes too many"
    return f"{-by} of its {entry.size_bytes} bytes are missing" if by else ""
