"""A checkpoint directory: which checkpoints are in it, which runs have claimed it, and what may go.

What other programs have put there is left alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from ringps.checkpoint.lineage import (
    MAX_CLAIM_BYTES,
    UNKNOWN,
    Base,
    Lineage,
    Point,
    decode_claim,
    encode_claim,
    history,
)
from ringps.checkpoint.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    RUNS,
    Aside,
    Entry,
    Manifest,
    aside_name,
    claim_name,
    entry_name,
    parse_aside,
    parse_claim,
    parse_entry,
)
from ringps.checkpoint.retention import Retention as Retention
from ringps.checkpoint.retention import to_delete
from ringps.checkpoint.store import Store, place
from ringps.errors import CheckpointError


class Found(NamedTuple):
    """A checkpoint that is there, as far as its name and that it has a manifest tell."""

    step: int
    run: int

    @property
    def name(self) -> str:
        """Its directory."""
        return entry_name(self.step, self.run)

    @property
    def point(self) -> Point:
        """Its place in the history."""
        return Point(self.run, self.step)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What lies in a checkpoint directory."""

    checkpoints: list[Found]
    """By run and step."""

    asides: list[Aside]
    """Being written, or left behind; in local directories."""

    torn: list[Entry]
    """Entries without a manifest: half removed or, where nothing is renamed, not finished."""


class Directory:
    """A checkpoint directory in a store. Remembers nothing: every method looks anew.

    Every method may raise what the store raises: an `OSError`.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def where(self) -> str:
        """The directory as a path or URL, for people."""
        return self.store.where

    def contents(self) -> Contents:
        """All that is there and has to do with checkpoints."""
        checkpoints, asides, torn = [], [], []
        for name in self.store.names():
            if (aside := parse_aside(name)) is not None:
                asides.append(aside)
            elif (entry := parse_entry(name)) is not None:
                if MANIFEST in self.store.names(name):
                    checkpoints.append(Found(*entry))
                else:
                    torn.append(entry)
        checkpoints.sort(key=lambda found: found.point)
        return Contents(checkpoints=checkpoints, asides=sorted(asides), torn=sorted(torn))

    def checkpoints(self) -> list[Found]:
        """The checkpoints that have a manifest, by run and step; whether they are whole is not looked at."""
        return self.contents().checkpoints

    def claims(self) -> dict[int, Base]:
        """The runs that have claimed their number, and the base of each. A claim that cannot be read counts
        as one that was never completed."""
        found: dict[int, Base] = {}
        for name in self.store.names(RUNS):
            run = parse_claim(name)
            if run is not None:
                try:
                    found[run] = decode_claim(self._read_small(f"{RUNS}/{name}", MAX_CLAIM_BYTES), run)
                except (ValueError, FileNotFoundError):
                    found[run] = UNKNOWN
        return found

    def newest_run(self) -> int:
        """The largest number of a run that has claimed one or saved something; 0 without any."""
        claimed = [parse_claim(name) for name in self.store.names(RUNS)]
        names = self.store.names()
        saved = [found.run for name in names if (found := parse_entry(name) or parse_aside(name))]
        return max([*saved, *(run for run in claimed if run is not None)], default=0)

    def lineage(self, contents: Contents) -> Lineage:
        """Of the checkpoints in `contents`: those that belong to the history, and why the others do not."""
        # The claims are read now, after the checkpoints: who sees a run's checkpoint must see its claim.
        return history((found.point for found in contents.checkpoints), self.claims())

    def manifest(self, entry: str) -> Manifest:
        """What an entry says that it consists of.

        Raises:
            CheckpointError: the manifest is missing or wrong; the message says what is wrong.
        """
        manifest, reason = self.read_manifest(entry)
        if manifest is None:
            raise CheckpointError(f"{self.path_of(entry)}/{MANIFEST}: {reason}")
        return manifest

    def read_manifest(self, entry: str) -> tuple[Manifest | None, str]:
        """What an entry says that it consists of, or None and what is wrong with its manifest."""
        try:
            manifest = Manifest.decode(self._read_small(f"{entry}/{MANIFEST}", MAX_MANIFEST_BYTES))
        except FileNotFoundError:
            return None, "is missing"
        except ValueError as error:
            return None, str(error)
        if entry_name(manifest.step, manifest.run) != entry:
            return None, f"it is that of step {manifest.step} of run {manifest.run}"
        return manifest, ""

    def claim(self, run: int) -> bool:
        """Claim the number of a run. False if another start of the ring has it."""
        return self.store.create(f"{RUNS}/{claim_name(run)}", encode_claim(run))

    def complete_claim(self, run: int, base: tuple[int, int] | None) -> None:
        """Record from which checkpoint (run, step) a run goes on; None if it begins from nothing."""
        self.store.write(f"{RUNS}/{claim_name(run)}", [encode_claim(run, base)])

    def place(self, step: int, run: int, generation: int) -> str:
        """The directory, in the store, into which the files of a checkpoint are written."""
        return place(self.store, aside_name(step, run, generation), entry_name(step, run))

    def files(self, name: str) -> list[str]:
        """The names of what lies in an entry, or in what `place` gave; none if it does not exist."""
        return self.store.names(name)

    def path_of(self, name: str) -> str:
        """A name in this directory as a path or URL, for people."""
        return f"{self.where.rstrip('/')}/{name}"

    def publish(self, manifest: Manifest, aside: str) -> None:
        """Make a checkpoint visible whose files are all written.

        Args:
            manifest: says what it consists of.
            aside: what `place` gave for it.

        Raises:
            FileExistsError: there is a checkpoint of this step and run.
        """
        self.store.publish(aside, entry_name(manifest.step, manifest.run), manifest.encode())

    def prune(self, retention: Retention, own: tuple[int, int], busy: Collection[str] = ()) -> list[str]:
        """Delete what is no longer needed after a checkpoint was saved; see `to_delete`.

        A run that a newer one has superseded deletes nothing: the newer one may be reading any of them.

        Args:
            retention: what is kept.
            own: (run, step) of the checkpoint that was just saved.
            busy: names in this directory that stay whatever happens.

        Returns:
            What could not be deleted, and why. The next time, it is tried again.
        """
        contents = self.contents()
        lineage = self.lineage(contents)
        doomed = to_delete(lineage, [*contents.asides, *contents.torn], retention, own, busy)
        newest = self.newest_run() if doomed else 0
        if newest > own[0]:
            return [
                f"{self.where}: nothing was deleted, for run {newest} has begun, and this is run {own[0]}"
            ]
        problems = []
        for deletion in doomed:
            try:
                self.store.remove(deletion.name)
            except OSError as error:
                problems.append(
                    f"{self.path_of(deletion.name)} could not be deleted ({deletion.reason}): {error}"
                )
        return problems

    def _read_small(self, path: str, most_bytes: int) -> bytes:
        """A whole file, cut off behind `most_bytes` + 1."""
        with self.store.read(path) as file:
            raw = bytearray(min(file.size_bytes, most_bytes) + 1)
            view, end = memoryview(raw), 0
            while end < len(raw) and (count := file.readinto(view[end:])):
                end += count
        return bytes(view[:end])
