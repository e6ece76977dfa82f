"""Saving, on one rank: a snapshot between two steps, and the rest beside training.

All ranks go through the same stages (`lanes`), and between them tell each other how it went: one `Saver`'s
`report` goes to all ranks' `absorb`. Who carries reports from rank to rank is none of its business.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import msgpack
import torch

from ringps import probe
from ringps.checkpoint import files
from ringps.checkpoint.background import Background
from ringps.checkpoint.contents import Composed, Source
from ringps.checkpoint.copying import copy
from ringps.checkpoint.directory import Directory, Retention
from ringps.checkpoint.host_copies import accelerator_among
from ringps.checkpoint.lanes import Next, Said, Stage, Task, assign, decide
from ringps.checkpoint.manifest import FileEntry, Manifest, entry_name
from ringps.checkpoint.saving import Happening, Place, SaverStatistics, Saving
from ringps.checkpoint.snapshot import Arena, room_for, take
from ringps.checkpoint.store import Store, in_words
from ringps.errors import CheckpointError

_log = logging.getLogger("ringps")

_FAREWELL_S = 5.0

FAST, DURABLE = 0, 1
"""The lanes: into the first directory, and from there into the durable one."""


@dataclass
class _Lane:
    """What this rank knows of one lane."""

    directory: Directory
    background: Background[dict[str, Any]]
    task: Task | None = None
    failed: int = 0
    """Saves in a row."""
    began_s: float = 0.0

    def said(self) -> dict[str, Any]:
        busy = self.background.busy  # looked at first: it may end while this is put together
        result = None if busy or self.task is None else self.background.result
        error = in_words(result) if isinstance(result, Exception) else ""
        return {
            "task": None if self.task is None else list(self.task),
            "busy": busy,
            "error": error,
            "superseded": isinstance(result, _Superseded),
            "result": result if isinstance(result, dict) else {},
        }

    def start(self, task: Task, work: Callable[[Callable[[], None]], dict[str, Any]]) -> None:
        self.task = task
        self.background.start(work)

    def drop(self) -> None:
        self.background.cancel()
        self.task = None


class Saver:
    """This rank's part in saving. Its methods are for the script's thread."""

    def __init__(
        self, run: int, directories: Sequence[Directory], saving: Saving, retention: Retention, step: int
    ) -> None:
        """
        Args:
            run: the number of this start of the ring; 0 where it is not known yet.
            directories: the first one, and perhaps the durable one.
            saving: how.
            retention: what is kept.
            step: that of the checkpoint from which this run goes on, or 0.
        """
        self.run = run
        self._saving = saving
        self._retention = retention
        names = ("save", "upload")
        self._lanes = [
            _Lane(directory, Background(name)) for directory, name in zip(directories, names, strict=False)
        ]
        self._arena = Arena()
        self._faulting: Background[None] = Background("arena")
        self.last = step
        """The step of the newest checkpoint of this run, or that it went on from."""
        self.attempted = step
        """The step of the newest one that was begun."""
        self._wanted = 0
        """The step that is to become durable; 0: none."""
        self.at_rest = True
        """Whether nothing was under way on any rank when reports were last exchanged, nor has begun since."""
        self._met = 0
        """The generation in which reports were last exchanged."""
        self._manifest: Manifest | None = None
        """Of the save that is under way."""
        self._stall_s: list[float] = []
        self._begun: dict[str, Any] = {}
        self._saved = self._failed = self._dropped = self._bytes_written = 0
        self._late = False

    # What all ranks must know of each other.

    @property
    def busy(self) -> tuple[bool, ...]:
        """By lane: whether this rank's thread is at work."""
        return tuple(lane.background.busy for lane in self._lanes)

    def must_meet(self, busy: Sequence[bool], generation: int) -> bool:
        """Whether ranks must exchange reports now; the same on all ranks.

        Args:
            busy: by lane, whether any rank's thread is at work.
            generation: the current one.
        """
        if generation != self._met:
            return True
        waits = [lane.task is not None for lane in self._lanes]
        if len(waits) > DURABLE:
            waits[DURABLE] = waits[DURABLE] or bool(self._wanted)
        return any(waiting and not at_work for waiting, at_work in zip(waits, busy, strict=True))

    def free(self, busy: Sequence[bool]) -> bool:
        """Whether a save may begin; the same on all ranks."""
        return self._lanes[FAST].task is None and not busy[FAST]

    def knows(self) -> dict[str, Any]:
        """What is the same on all ranks since reports were last exchanged. One that joins must know it: those
        who do may be gone before the next exchange."""
        return {
            "run": self.run,
            "last": self.last,
            "attempted": self.attempted,
            "wanted": self._wanted,
            "failed": [lane.failed for lane in self._lanes],
        }

    def learn(self, known: dict[str, Any]) -> None:
        """What others know."""
        self.run, self.last, self.attempted = known["run"], known["last"], known["attempted"]
        self._wanted = known["wanted"]
        for lane, failed in zip(self._lanes, known["failed"], strict=True):
            lane.failed = failed

    def report(self) -> bytes:
        """How far this rank is, for `absorb` on all ranks."""
        said = {
            **self.knows(),
            "now": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "lanes": [lane.said() for lane in self._lanes],
        }
        raw: bytes = msgpack.packb(said)
        return raw

    def absorb(self, raw: Sequence[bytes], place: Place) -> list[Happening]:
        """Go on with what all ranks have reported; collective in effect: all ranks absorb the same.

        Raises:
            CheckpointError: too many saves have failed, or a later run has begun in the same directory.
        """
        reports = [msgpack.unpackb(one) for one in raw]
        self._met = place.generation
        self.run = max(report["run"] for report in reports)
        self.last = max(report["last"] for report in reports)
        self.attempted = max(report["attempted"] for report in reports)
        self._wanted = max(report["wanted"] for report in reports)
        happenings: list[Happening] = []
        for number, lane in enumerate(self._lanes):
            lane.failed = max(report["failed"][number] for report in reports)
            told = [report["lanes"][number] for report in reports]
            if superseded := [one["error"] for one in told if one["superseded"]]:
                raise CheckpointError(superseded[0])
            said = [_said(one) for one in told]
            following, why = decide(said, place.generation)
            if following is Next.DROP:
                self._drop(number, why)
            elif following is Next.FAIL:
                happenings.append(self._fail(number, why))
            elif following is Next.ADVANCE and lane.task is not None:
                if lane.task.stage is Stage.PUBLISH:
                    happenings.append(self._end(number, lane.task.step))
                elif lane.task.stage is Stage.LOOK:
                    happenings += self._copy(reports, place)
                elif number == FAST and (differ := _differ(reports)):
                    happenings.append(self._fail(number, differ))
                elif number == FAST:
                    self._publish(reports, place)
                else:
                    self._publish_copy(reports, place)
            elif following is Next.BEGIN and number == DURABLE and self._wanted:
                self._look(place)
        # A thread may be at work though its task was given up.
        idle = not any(lane["busy"] for report in reports for lane in report["lanes"])
        self.at_rest = idle and not self._wanted and all(lane.task is None for lane in self._lanes)
        return happenings

    def late(self, step: int) -> list[Happening]:
        """A save is due and another is under way: what there is to tell, once for each."""
        if self._late:
            return []
        self._late = True
        task = self._lanes[FAST].task
        return [
            Happening(
                "checkpoint_late",
                {
                    "step": step,
                    "directory": self._lanes[FAST].directory.where,
                    "reason": f"that of step {task.step if task else self.attempted} is still being written",
                },
            )
        ]

    # The first directory.

    def make_room(self, sources: Sequence[Source]) -> None:
        """Get the memory for a snapshot of these, in the background, before the first one is taken."""
        size_bytes = room_for(sources)
        accelerator = accelerator_among(tensor for source in sources for tensor in source.tensors)
        self._faulting.start(lambda check: self._arena.reserve(size_bytes, accelerator))

    def begin(self, composed: Composed, step: int, place: Place, began_s: float) -> None:
        """Take a snapshot of this rank's files, and write it in the background. On all ranks alike.

        Args:
            composed: of `contents.compose`.
            step: steps that have been applied.
            place: this rank.
            began_s: when training began to wait for this, on `time.perf_counter`.
        """
        lane = self._lanes[FAST]
        assert lane.task is None and not lane.background.busy
        self.at_rest = False
        if self._arena.in_use:
            self._arena.release()
        images = take(self._arena, composed.sources)
        self.attempted, self._late = step, False
        aside = lane.directory.place(step, self.run, place.generation)
        compression = self._saving.compression

        def write(check: Callable[[], None]) -> dict[str, Any]:
            store, entries = _Checked(lane.directory.store, check), []
            for image in images:
                entries.append(files.write(store, aside, image, compression))
            found = [[one.name, one.size_bytes, one.digest, one.kind] for one in entries]
            return {"files": found, "fingerprint": composed.fingerprint}

        lane.began_s = time.monotonic()
        lane.start(Task(Stage.WRITE, step, place.generation), write)
        stall_s = time.perf_counter() - began_s
        self._stall_s = [*self._stall_s[-99:], stall_s]
        self._bytes_written += sum(len(image.memory) for image in images)
        self._begun = {"stall_s": round(stall_s, 4)}

    def _publish(self, reports: list[dict[str, Any]], place: Place) -> None:
        """All files are written; their hashes are in the reports."""
        lane = self._lanes[FAST]
        assert lane.task is not None
        written = [report["lanes"][FAST]["result"]["files"] for report in reports]
        self._manifest = Manifest(
            step=lane.task.step,
            run=self.run,
            generation=place.generation,
            world_size=place.world_size,
            torch=str(torch.__version__),
            ringps=metadata.version("ringps"),
            saved_at=reports[0]["now"],
            compression=self._saving.compression,
            files=tuple(
                FileEntry(name=name, size_bytes=size_bytes, digest=digest, kind=kind)
                for entries in written
                for name, size_bytes, digest, kind in entries
            ),
        )
        # Where ranks share the directory, the first of them publishes for all.
        before = {name for entries in written[: place.rank] for name, *_ in entries}
        manifest = self._manifest
        self._start_publishing(lane, lambda: manifest, before, {name for name, *_ in written[place.rank]})

    def _publish_copy(self, reports: list[dict[str, Any]], place: Place) -> None:
        lane, source = self._lanes[DURABLE], self._lanes[FAST].directory
        assert lane.task is not None
        able = [rank for rank, report in enumerate(reports) if report["lanes"][DURABLE]["result"]["able"]]
        if place.rank != able[0]:
            lane.start(lane.task._replace(stage=Stage.PUBLISH), lambda check: {})
            return
        entry = entry_name(lane.task.step, self.run)
        self._start_publishing(lane, lambda: source.manifest(entry), set())

    def _start_publishing(
        self, lane: _Lane, get: Callable[[], Manifest], others: set[str], own: set[str] | None = None
    ) -> None:
        """
        Args:
            get: gives the manifest.
            others: if one of these files is in the directory, somebody else publishes there.
            own: these files have to be there; None: all that the manifest names.
        """
        assert lane.task is not None
        busy = [entry_name(self._wanted, self.run)] if self._wanted else []

        def publish(check: Callable[[], None]) -> dict[str, Any]:
            manifest, directory = get(), lane.directory
            entry = entry_name(manifest.step, manifest.run)
            aside = directory.place(manifest.step, manifest.run, manifest.generation)
            newest = directory.newest_run()
            if newest > manifest.run:
                raise _Superseded(
                    f"run {newest} has begun in {directory.where}, and this is run {manifest.run}: "
                    "another job uses the directory, or took this one for lost. This one ends here"
                )
            needed = own if own is not None else {file.name for file in manifest.files}
            held = {*directory.files(aside)}
            if not needed <= held:  # in this order: whoever publishes renames the one to the other
                held = {*directory.files(entry)}
            if gone := sorted(needed - held):
                raise CheckpointError(f"{gone[0]} has been written to {directory.where}, and is gone")
            if others & held:
                return {}
            with contextlib.suppress(FileExistsError):  # published, but a loss kept the ranks from hearing so
                directory.publish(manifest, aside)
            return {"left": directory.prune(self._retention, (manifest.run, manifest.step), busy)}

        lane.start(lane.task._replace(stage=Stage.PUBLISH), publish)

    def _end(self, number: int, step: int) -> Happening:
        lane = self._lanes[number]
        lane.task, lane.failed = None, 0
        details: dict[str, Any] = {
            "step": step,
            "run": self.run,
            "directory": lane.directory.path_of(entry_name(step, self.run)),
            "seconds": round(time.monotonic() - lane.began_s, 3),
        }
        if number == FAST:
            self.last, self._saved = step, self._saved + 1
            self._arena.release()
            if len(self._lanes) > DURABLE:
                self._wanted = step
            assert self._manifest is not None
            details |= {"bytes": self._manifest.size_bytes, **self._begun}
        elif self._wanted == step:
            self._wanted = 0
        result = lane.background.result
        for problem in result.get("left", []) if isinstance(result, dict) else []:
            _log.warning("%s", problem)
        if probe.listener is not None:
            probe.reached("saved", saved=step, lane=number)
        return Happening(
            "checkpoint_saved", {**details, "durable": number == DURABLE or len(self._lanes) == 1}
        )

    # The durable directory.

    def _look(self, place: Place) -> None:
        """See which files of the checkpoint that is to become durable this rank can read."""
        source, lane = self._lanes[FAST].directory, self._lanes[DURABLE]
        entry = entry_name(self._wanted, self.run)

        def look(check: Callable[[], None]) -> dict[str, Any]:
            try:
                manifest = source.manifest(entry)
            except CheckpointError:  # a rank that came later, on a machine of its own
                return {"needs": {}, "holds": []}
            return {
                "needs": {file.name: file.size_bytes for file in manifest.files},
                "holds": source.files(entry),
            }

        lane.began_s = time.monotonic()
        lane.start(Task(Stage.LOOK, self._wanted, place.generation), look)

    def _copy(self, reports: list[dict[str, Any]], place: Place) -> list[Happening]:
        """Copy a checkpoint of the first directory into the durable one: each rank a part."""
        source, lane = self._lanes[FAST].directory, self._lanes[DURABLE]
        assert lane.task is not None
        seen = [report["lanes"][DURABLE]["result"] for report in reports]
        needs: dict[str, int] = next((one["needs"] for one in seen if one["needs"]), {})
        chosen, why = assign(needs, [frozenset(one["holds"]) for one in seen])
        if not chosen:
            return [self._fail(DURABLE, why if needs else "no rank can read it any more")]
        entry = entry_name(lane.task.step, self.run)
        mine = {name for name, rank in chosen.items() if rank == place.rank}
        able = bool(seen[place.rank]["needs"])

        def upload(check: Callable[[], None]) -> dict[str, Any]:
            store = _Checked(lane.directory.store, check)
            if able:
                manifest = source.manifest(entry)
                into = lane.directory.place(manifest.step, manifest.run, manifest.generation)
                for file in manifest.files:
                    if file.name in mine:
                        copy(source.store, entry, store, into, file)
            return {"able": able}

        lane.start(lane.task._replace(stage=Stage.WRITE), upload)
        return []

    # What goes wrong.

    def _drop(self, number: int, why: str) -> None:
        lane = self._lanes[number]
        if lane.task is not None:
            self._dropped += 1
            _log.info("the save of step %d is given up: %s", lane.task.step, why)
        lane.drop()
        if number == FAST:
            self.attempted = self.last

    def _fail(self, number: int, why: str) -> Happening:
        """
        Raises:
            CheckpointError: it is one too many.
        """
        lane = self._lanes[number]
        task, lane.task = lane.task, None
        assert task is not None
        lane.failed += 1
        self._failed += 1
        if number == DURABLE:
            self._wanted = 0
        where = lane.directory.where
        if lane.failed > self._saving.max_failed:
            raise CheckpointError(
                f"step {task.step} could not be saved in {where}: {why}. Saves that failed in a row: "
                f"{lane.failed}; Saving(max_failed={self._saving.max_failed}) allows no more"
            )
        return Happening(
            "checkpoint_failed",
            {"step": task.step, "directory": where, "reason": why, "failed_in_a_row": lane.failed},
        )

    def wait(self, limit_s: float | None = None) -> None:
        """Wait until this rank's threads have nothing to do, or for about `limit_s`."""
        for lane in self._lanes:
            lane.background.wait(limit_s)

    def close(self) -> None:
        """Give up what is under way. Threads end, unless a disk holds them: a process that ends while one is
        at work in torch would be aborted."""
        for lane in self._lanes:
            lane.drop()
            lane.background.wait(_FAREWELL_S)
        self._faulting.wait(_FAREWELL_S)

    def statistics(self) -> SaverStatistics:
        """Counters so far."""
        return SaverStatistics(
            saved=self._saved,
            failed=self._failed,
            dropped=self._dropped,
            stall_s=tuple(self._stall_s),
            bytes_written=self._bytes_written,
        )


class _Superseded(CheckpointError):
    """A later run has begun in the same directory."""


class _Checked:
    """A store to which writing ends as soon as it is not wanted any more."""

    def __init__(self, store: Store, check: Callable[[], None]) -> None:
        self._store = store
        self._check = check

    def write(self, path: str, blocks: Iterable[bytes | memoryview]) -> None:
        def checked() -> Iterator[bytes | memoryview]:
            for block in blocks:
                self._check()
                yield block

        self._store.write(path, checked())

    def read(self, path: str) -> AbstractContextManager[files.Stream]:
        return self._store.read(path)


def _differ(reports: list[dict[str, Any]]) -> str:
    """Which ranks' files do not belong with those of rank 0; empty if all do."""
    prints = [report["lanes"][FAST]["result"]["fingerprint"] for report in reports]
    others = [str(rank) for rank, one in enumerate(prints) if one != prints[0]]
    if not others:
        return ""
    return (
        f"the state of rank {', '.join(others)} differs from that of rank 0 in its shapes or plain values; "
        "what is each rank's own does not belong into TrainState"
    )


def _said(told: dict[str, Any]) -> Said:
    task = told["task"]
    return Said(
        task=None if task is None else Task(Stage(task[0]), *task[1:]),
        busy=told["busy"],
        error=told["error"],
    )
