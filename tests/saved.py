"""Checkpoints as a job saves them, without a job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from ringps.checkpoint.directory import Directory
from ringps.checkpoint.manifest import FileEntry, Manifest
from ringps.checkpoint.store import open_store

KINDS = {
    "model-00001-of-00002.safetensors": "weights",
    "model-00002-of-00002.safetensors": "weights",
    "model.safetensors.index.json": "index",
    "state.bin": "state",
    "rank-00000-of-00002.bin": "rank",
    "rank-00001-of-00002.bin": "rank",
}
"""The files of `save_bytes`: all kinds that there are."""


def begin(where: str | Path, run: int = 1, base: tuple[int, int] | None = None) -> Directory:
    """Claim a run in a checkpoint directory."""
    directory = Directory(open_store(where))
    assert directory.claim(run)
    directory.complete_claim(run, base)
    return directory


def save_bytes(directory: Directory, step: int, run: int = 1) -> Path:
    """Save arbitrary bytes under the names of a checkpoint's files; its path, if it has one."""
    place = directory.place(step, run, 1)
    entries = []
    for name, kind in KINDS.items():
        raw = f"{name} of step {step}".encode() * 1000
        directory.store.write(f"{place}/{name}", [raw])
        digest = xxhash.xxh3_128_hexdigest(raw)
        entries.append(FileEntry(name=name, size_bytes=len(raw), digest=digest, kind=kind))
    return _publish(directory, step, run, entries, place, world_size=2)


def save_state(
    directory: Directory, state: Mapping[str, Any], run: int = 1, world_size: int = 2, compression: str = ""
) -> Path:
    """Save a training state as all ranks together do; its path, if it has one."""
    from ringps.checkpoint import contents, files, snapshot

    place = directory.place(state["step"], run, 1)
    entries = []
    for rank in range(world_size):
        images = snapshot.take(
            snapshot.Arena(), contents.compose(dict(state), {"rank": rank}, rank, world_size).sources
        )
        entries += [files.write(directory.store, place, image, compression) for image in images]
    return _publish(directory, state["step"], run, entries, place, world_size, compression)


def _publish(
    directory: Directory,
    step: int,
    run: int,
    entries: list[FileEntry],
    place: str,
    world_size: int,
    compression: str = "",
) -> Path:
    manifest = Manifest(
        step=step,
        run=run,
        generation=1,
        world_size=world_size,
        torch="2.6.0",
        ringps="0.1.0",
        saved_at="2025-01-31T12:00:00Z",
        compression=compression,
        files=tuple(entries),
    )
    directory.publish(manifest, place)
    return Path(directory.where) / f"step-{step:08}.{run}"
