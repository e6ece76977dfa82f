"""Restoring: all ranks find the newest checkpoint that is whole, each reads a part of it, and all get all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import msgpack
import torch

from ringps import probe
from ringps.checkpoint import files
from ringps.checkpoint.contents import COMPRESSED_SUFFIX, Contents, assemble
from ringps.checkpoint.directory import Directory
from ringps.checkpoint.lanes import assign
from ringps.checkpoint.lineage import UNKNOWN, Base, Point, history
from ringps.checkpoint.manifest import FileEntry, Manifest, entry_name
from ringps.checkpoint.pieces import allocate
from ringps.checkpoint.store import in_words
from ringps.collectives import Communicator
from ringps.errors import CheckpointError
from ringps.kernels.digest import combine, digest

_NAMED = 5
"""So many reasons are listed in a message."""


class Restored(NamedTuple):
    """What all ranks go on from; the same on all of them."""

    run: int
    """The number of the run that begins."""
    manifest: Manifest | None
    """None: there is no checkpoint."""
    contents: Contents | None
    where: str
    """The checkpoint's directory."""
    skipped: tuple[str, ...]
    """Newer checkpoints that were not taken, and why."""
    seconds: float


def restore(ring: Communicator, directories: Sequence[Directory]) -> Restored:
    """Begin a run in the directories, and get the newest checkpoint that is whole. Collective.

    Args:
        ring: all ranks.
        directories: the fast one first. Ranks may see the same ones, or each machine its own.

    Raises:
        CheckpointError: there are checkpoints, and none is whole; or a directory cannot be used.
        RingpsError: what collectives raise.
    """
    found: list[Restored] = []

    def attempt(before: int) -> bytes:
        restoration = _Restoration(ring.raw, directories)
        found[:] = [restoration.run()]
        return restoration.digest()

    ring.transact(attempt)
    return found[0]


class _Candidate(NamedTuple):
    """A checkpoint as the ranks see it."""

    manifest: Manifest
    directory: int
    """Where its manifest was read: the first, or the durable one."""
    holders: tuple[frozenset[str], ...]
    """By rank: the files that it can try to read."""


class _Restoration:
    """One attempt, within one generation of the ring."""

    def __init__(self, ring: Communicator, directories: Sequence[Directory]) -> None:
        self._ring = ring
        self._directories = directories
        self._held: dict[str, torch.Tensor] = {}
        self._hashes: dict[str, bytes] = {}
        """Of what this rank has read itself."""

    def run(self) -> Restored:
        began_s = time.monotonic()
        run = self._claim()
        points, skipped = self._history()
        taken: _Candidate | None = None
        contents: Contents | None = None
        for point in points:
            entry = entry_name(point.step, point.run)
            if probe.listener is not None:
                probe.reached("restore", entry=entry)
            candidate, why = self._look(entry)
            if candidate is not None:
                why = self._read(entry, candidate)
                if not why:
                    contents, why = self._assemble()
                if contents is not None:
                    taken = candidate
                    break
            skipped.append(f"{entry}: {why}")
        if taken is None and points:
            listed = "; ".join(skipped[:_NAMED]) + ("; ..." if len(skipped) > _NAMED else "")
            raise CheckpointError(
                f"there are {len(points)} checkpoints in {self._where}, and none is whole: {listed}. "
                "Training does not begin anew by itself: move the directory away if it is to"
            )
        manifest = None if taken is None else taken.manifest
        self._complete(run, manifest)
        return Restored(
            run=run,
            manifest=manifest,
            contents=contents,
            where=self._where if taken is None else self._path_of(taken),
            skipped=tuple(skipped),
            seconds=time.monotonic() - began_s,
        )

    def digest(self) -> bytes:
        """A hash of what this rank has got."""
        held = sorted(self._held.items())
        return combine(self._hashes.get(name) or digest(tensor) for name, tensor in held)

    @property
    def _where(self) -> str:
        return " and ".join(directory.where for directory in self._directories)

    def _path_of(self, taken: _Candidate) -> str:
        manifest = taken.manifest
        return self._directories[taken.directory].path_of(entry_name(manifest.step, manifest.run))

    # The run.

    def _claim(self) -> int:
        """The number of this run, which no other has."""

        def newest() -> int:
            return max(directory.newest_run() for directory in self._directories)

        run: int = max(self._each(newest)) + 1

        def first() -> int:
            number = run
            if self._ring.rank == 0:
                while not self._directories[0].claim(number):
                    number += 1  # another job begins in the same moment
                for directory in self._directories[1:]:
                    directory.claim(number)
            return number

        run = int(self._each(first)[0])

        def others() -> int:
            for directory in self._directories:
                directory.claim(run)  # does nothing where rank 0 has done it, or a rank on this machine
            return run

        self._each(others)
        return run

    def _complete(self, run: int, taken: Manifest | None) -> None:
        """Write down what this run goes on from, before it saves anything."""
        base = None if taken is None else (taken.run, taken.step)

        def complete(rank_0: bool) -> None:
            for directory in self._directories:
                if (self._ring.rank == 0) is rank_0 and directory.claims().get(run, UNKNOWN) == UNKNOWN:
                    directory.complete_claim(run, base)

        self._each(lambda: complete(True))
        self._each(lambda: complete(False))

    # Which checkpoints there are.

    def _history(self) -> tuple[list[Point], list[str]]:
        def see() -> list[Any]:
            points: set[tuple[int, int]] = set()
            claims: dict[int, Any] = {}
            for directory in self._directories:
                points |= {(found.run, found.step) for found in directory.checkpoints()}
                for run, base in directory.claims().items():
                    if claims.get(run, UNKNOWN) == UNKNOWN:
                        claims[run] = base
            return [sorted(points), sorted(claims.items())]

        seen = self._each(see)
        points = {(run, step) for theirs, _ in seen for run, step in theirs}
        bases: dict[int, Base] = {}
        for _, claims in seen:
            for run, base in claims:
                if bases.get(run, UNKNOWN) == UNKNOWN:
                    bases[run] = Point(*base) if isinstance(base, list) else base
        lineage = history(points, bases)
        skipped = [
            f"{entry_name(point.step, point.run)}: {why.reason}"
            for point, why in sorted(lineage.left_out.items(), reverse=True)
        ]
        return lineage.history, skipped

    def _look(self, entry: str) -> tuple[_Candidate | None, str]:
        """What the ranks see of a checkpoint; None and the reason if that is nothing whole."""

        def see() -> list[Any]:
            manifests, held, errors = [], set(), []
            for number, directory in enumerate(self._directories):
                try:
                    manifests.append([number, directory.manifest(entry).encode()])
                    held |= set(directory.files(entry))
                except (CheckpointError, OSError) as error:
                    errors.append(in_words(error))
            return [manifests, sorted(held), errors]

        seen = self._each(see)
        found = [tuple(manifest) for manifests, _, _ in seen for manifest in manifests]
        if not found:
            errors = dict.fromkeys(error for _, _, errors in seen for error in errors)
            return None, "; ".join(errors) or "it is gone"
        directory, raw = min(found)
        holders = tuple(frozenset(held) for _, held, _ in seen)
        return _Candidate(Manifest.decode(raw), directory, holders), ""

    # Its bytes.

    def _read(self, entry: str, candidate: _Candidate) -> str:
        """Get all of a checkpoint's files to all ranks. Why not, or nothing."""
        entries = {file.name: file for file in candidate.manifest.files}
        self._held, self._hashes = files.rooms(candidate.manifest.files), {}
        lengths: dict[str, int] = {}
        readers: dict[str, list[int]] = {}
        holders = list(candidate.holders)
        problems: dict[str, str] = {}
        while left := {name: file for name, file in entries.items() if name not in lengths}:
            chosen, why = assign({name: file.size_bytes for name, file in left.items()}, holders)
            if not chosen:
                # Why a file was wrong where it was found says more than that it is found nowhere else.
                return next((problems[name] for name in left if name in problems), "") or why
            mine = {name for name, rank in chosen.items() if rank == self._ring.rank}
            if self._shares_a_disk(candidate):
                mine = left.keys() & holders[self._ring.rank]  # as quick as getting it from another
            read = self._each(lambda mine=mine: self._read_mine(entry, [entries[name] for name in mine]))
            for rank, (done, failed) in enumerate(read):
                lengths.update(done)
                problems.update(failed)
                holders[rank] -= set(failed)
                for name in done:
                    readers.setdefault(name, []).append(rank)
        for name in entries:
            if name not in self._held:
                self._held[name] = allocate(lengths[name])
            if len(readers[name]) < self._ring.world_size:
                self._ring.broadcast(self._held[name], readers[name][0])
        return ""

    def _shares_a_disk(self, candidate: _Candidate) -> bool:
        """Whether all ranks are on one machine, and read from its file system."""
        hosts = {member.host for member in self._ring.generation.members}
        return len(hosts) == 1 and self._directories[candidate.directory].store.renames

    def _assemble(self) -> tuple[Contents | None, str]:
        """What the files hold, the same on all ranks; None and the reason if that is no training state."""
        try:
            return assemble(self._held), ""
        except CheckpointError as error:
            return None, str(error)

    def _read_mine(self, entry: str, mine: Sequence[FileEntry]) -> list[Any]:
        """Read these files. How long each is, decompressed, and what is wrong."""
        done: dict[str, int] = {}
        failed: dict[str, str] = {}

        def read(file: FileEntry) -> None:
            errors = []
            for directory in self._directories:
                try:
                    got = files.read(directory.store, entry, file, self._held.get(file.name))
                except (CheckpointError, OSError) as error:
                    errors.append(in_words(error))
                    continue
                self._held[file.name] = got
                if not file.name.endswith(COMPRESSED_SUFFIX):
                    self._hashes[file.name] = bytes.fromhex(file.digest)  # it has just been found so
                done[file.name] = got.numel()
                return
            failed[file.name] = errors[0]

        with ThreadPoolExecutor(torch.get_num_threads(), "ringps-restore") as pool:
            list(pool.map(read, mine))
        return [done, failed]

    def _each(self, do: Any) -> list[Any]:
        """What `do` returns on each rank; an error on one is one on all.

        Raises:
            CheckpointError: it failed somewhere.
        """
        try:
            said = {"result": do()}
        except (CheckpointError, OSError) as error:
            said = {"error": in_words(error)}
        everyone = [msgpack.unpackb(raw, strict_map_key=False) for raw in self._gather(msgpack.packb(said))]
        for rank, one in enumerate(everyone):
            if "error" in one:
                raise CheckpointError(f"rank {rank} cannot use {self._where}: {one['error']}")
        return [one["result"] for one in everyone]

    def _gather(self, payload: bytes) -> list[bytes]:
        return self._ring.gather_bytes(payload)
