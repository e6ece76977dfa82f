"""`Checkpointer`: saves a training run while it goes on, and has it go on from what was saved."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from ringps import worker_env
from ringps.checkpoint.contents import compose
from ringps.checkpoint.directory import Directory, Retention
from ringps.checkpoint.saver import Saver
from ringps.checkpoint.saving import Happening, Place, SaverStatistics, Saving
from ringps.checkpoint.store import open_store
from ringps.collectives import Communicator, ElasticCommunicator, current
from ringps.errors import CheckpointError, ClosedError, PeerLostError, RingChangedError
from ringps.optim.admission import current_admission
from ringps.optim.restoring import Restored, restore
from ringps.optim.state import TrainState

_log = logging.getLogger("ringps")

_LOOK_S = 1.0
"""At the end: between two looks whether all ranks' threads are done."""

_ASKED, _SAVE, _BUSY = 1, 2, 4
"""A rank's marks: it was asked to stop; it wants a save; its thread is at work, a bit for each directory."""


class Checkpointer:
    """Saves a `TrainState` while it is trained, and restores it.

    ::

        with ringps.Checkpointer("ckpt", state, every_steps=100) as ckpt:
            for step, (inputs, targets) in ckpt.steps(loader, until=10_000):
                ...

    *On entering* the state becomes that of the newest checkpoint that is whole; every byte's hash is checked,
    and a damaged checkpoint is named and the next older one taken. A worker that joins a running ring gets
    the state from its peers instead. Without any checkpoint nothing happens.

    *Saving* happens between two steps, on all ranks between the same two. Each rank copies its share of the
    state into memory that it keeps for this (the only time that training waits), and writes it beside
    training; when all have, the checkpoint becomes visible. At most one is being written: if the next is due
    before that, it is taken as soon as that is done. If the ring changes meanwhile, the save is given up, and
    done anew.

    *The same number of ranks* goes on with the same bits, of random numbers too: Python's, NumPy's and
    torch's global generators, also that of its GPU, and the loader's own are each rank's own, and saved. With
    another number of ranks the samples are the same.

    *SIGTERM* to all workers, as `ringps run` sends it when it gets one, ends the job after the step that is
    under way, or soon after: all ranks save that step, and exit with code 75. The same command then goes on.
    SIGTERM to some workers only has those leave, if `--min-workers` others remain.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        state: TrainState,
        *,
        every_steps: int | None = None,
        every_s: float | None = None,
        durable: str | os.PathLike[str] | None = None,
        retention: Retention | None = None,
        saving: Saving | None = None,
    ) -> None:
        """
        Args:
            directory: path, or URL of a file system that fsspec knows (s3://bucket/run-1), where checkpoints
                go; None for that of `ringps run --checkpoint-dir`. Ranks may share it, or each machine has
                its own.
            state: what is saved.
            every_steps: save after every so many steps.
            every_s: save when so many seconds have passed since the last save began.
            durable: path or URL of another directory, to which each checkpoint is copied once it is whole in
                the first. It may be slow: a checkpoint that is still waiting when a newer one is whole is
                not copied.
            retention: what is kept; `Retention()` by default.
            saving: how; `Saving()` by default.

        Raises:
            ValueError: no directory, or a value out of range.
            CheckpointError: a package for such a URL or for compression is missing.
        """
        directory = directory if directory is not None else worker_env.checkpoint_dir()
        if directory is None:
            raise ValueError("name a directory for checkpoints, or start with `ringps run --checkpoint-dir`")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, not {every_steps}")
        if every_s is not None and not every_s > 0:
            raise ValueError(f"every_s must be greater than 0, not {every_s}")
        places = [directory, *([] if durable is None else [durable])]
        self._directories = [Directory(open_store(place)) for place in places]
        self._state = state
        self._every_steps = every_steps
        self._every_s = every_s
        self._retention = retention or Retention()
        self._saving = saving or Saving()
        self._saver: Saver | None = None
        self._loader: object = None
        self._restored: Restored | None = None
        self._random_pending = False
        self._roomy = False
        self._requested = False
        self._begun_s = time.monotonic()
        self._asked_s: float | None = None

    def __enter__(self) -> Self:
        """Restore. Collective, but for a worker that joins a running ring.

        Raises:
            CheckpointError: there are checkpoints, and none is whole; the newest one is not of this model; or
                a directory cannot be used.
            RingpsError: what collectives raise.
        """
        ring = current()
        run, step = 0, 0
        if not ring.joining:
            restored = restore(ring, self._directories)
            run, step = restored.run, self._go_on(ring, restored)
        self._saver = Saver(run, self._directories, self._saving, self._retention, step)
        ring.marks = self._marks
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until what was saved is whole; after an exception, give it up."""
        saver = self._saver
        if saver is None:
            return
        try:
            if kind is None:
                self._flush(final=False)
        finally:
            self._saver = None
            saver.close()

    @property
    def restored_step(self) -> int | None:
        """The step of the checkpoint from which this run went on; None if there was none."""
        if self._restored is None or self._restored.manifest is None:
            return None
        return self._restored.manifest.step

    def steps(self, loader: Iterable[Any], until: int) -> Iterator[tuple[int, Any]]:
        """`TrainState.steps`, with saves between them. The last step is saved too.

        Raises:
            CheckpointError: too many saves have failed; the last step, or that after which the job was to
                stop, could not be saved; or a later run has begun in the same directory.
            SystemExit: the job was asked to stop, and is saved (code 75).
            RingpsError, ValueError: as `TrainState.steps`.
        """
        self._open()
        return self._state.run(loader, until, self)

    def save(self) -> None:
        """Have a checkpoint saved after the step that is under way. On all ranks or on any."""
        self._requested = True

    def statistics(self) -> SaverStatistics:
        """Counters of this rank."""
        return self._open().statistics()

    # optim.state.Keeper

    def begin(self, loader: object) -> None:
        self._loader = loader
        if self._random_pending:
            self._random_pending = False
            assert self._restored is not None and self._restored.contents is not None
            own = self._restored.contents.ranks
            self._state.go_on_alone(own.get(current().rank), loader, own[0])
            self._restored = self._restored._replace(contents=None)

    def ask_to_stop(self) -> None:
        if self._asked_s is None:
            self._asked_s = time.monotonic()

    def stops(self, marks: Sequence[int]) -> bool:
        staying = sum(not mark & _ASKED for mark in marks)
        # A ring that cannot do without those that were asked ends with them.
        return staying < len(marks) and staying < current().least

    def stop(self) -> None:
        ring, saver = current(), self._open()
        try:
            self._bring_to_rest(ring, ring.raw.gather_bytes, final=True)
        except (PeerLostError, RingChangedError):
            return
        admission = current_admission()
        if admission is not None:
            admission.suspend()
        if ring.rank == 0:
            where = self._directories[0].where
            print(f"ringps: stopped after step {saver.last}, which is saved in {where}", file=sys.stderr)
        raise SystemExit(worker_env.SUSPENDED_CODE)

    def between(self, marks: Sequence[int], *, begin: bool = True) -> bool:
        ring, saver = current(), self._open()
        busy = [any(mark & _BUSY << lane for mark in marks) for lane in range(len(self._directories))]
        try:
            if saver.must_meet(busy, ring.generation.number):
                self._meet(ring, ring.raw.gather_bytes)
            if not begin:
                return True
            if not self._due(saver, marks):
                self._make_room(saver)
            elif saver.free(busy):
                self._begin(ring, saver)
            else:
                self._tell(ring, saver.late(self._state.step))
        except (PeerLostError, RingChangedError):
            if not ring.elastic:
                raise
            return False  # the next operation finds out what has become of the ring
        return True

    def knows(self) -> dict[str, Any]:
        return self._open().knows()

    def learn(self, known: dict[str, Any]) -> None:
        self._open().learn(known)

    def finish(self) -> None:
        # With gradients that wait to be applied it would be saved without them.
        self._flush(final=self._saving.final and self._state.between_steps)

    # Saving.

    def _marks(self) -> int:
        saver, marks = self._saver, 0
        if saver is None:
            return 0
        now_s = time.monotonic()
        if self._asked_s is not None:
            marks |= _ASKED
            admission = current_admission()
            if admission is not None and now_s - self._asked_s >= self._saving.stop_window_s:
                admission.ask_to_leave()
        if self._requested or (self._every_s is not None and now_s - self._begun_s >= self._every_s):
            marks |= _SAVE
        for lane, busy in enumerate(saver.busy):
            marks |= busy * (_BUSY << lane)
        return marks

    def _due(self, saver: Saver, marks: Sequence[int]) -> bool:
        if any(mark & _SAVE for mark in marks):
            return True
        every = self._every_steps
        return every is not None and self._state.step // every > saver.attempted // every

    def _begin(self, ring: Communicator, saver: Saver) -> None:
        began_s = time.perf_counter()
        shared = self._state.shared(ring.raw)
        place = _place(ring)
        composed = compose(shared, self._state.own(self._loader), place.rank, place.world_size)
        saver.begin(composed, self._state.step, place, began_s)
        self._requested, self._begun_s = False, time.monotonic()

    def _make_room(self, saver: Saver) -> None:
        """After the first step, when the optimizer has its state."""
        if self._roomy:
            return
        self._roomy = True
        ring = current()
        sources = compose(
            self._state.state_dict(), self._state.own(self._loader), ring.rank, ring.world_size
        ).sources
        saver.make_room(sources)

    def _meet(self, ring: Communicator, gather: Callable[[bytes], list[bytes]]) -> None:
        saver = self._open()
        reports = gather(saver.report())
        try:
            happenings = saver.absorb(reports, _place(ring))
        except CheckpointError as error:
            if ring.rank == 0:  # before this process ends: the ring is not to be started again
                self._note("checkpoints_given_up", reason=str(error), step=self._state.step)
            raise
        self._tell(ring, happenings)

    def _bring_to_rest(
        self, ring: Communicator, gather: Callable[[bytes], list[bytes]], *, final: bool
    ) -> None:
        """Wait until nothing is under way on any rank; with `final`, save the current step too.

        Raises:
            CheckpointError: that failed.
        """
        saver = self._open()
        tried = False
        while True:
            # Not for ever: others wait in the exchange, and would take this rank for lost.
            saver.wait(_LOOK_S)
            self._meet(ring, gather)
            if not saver.at_rest:
                continue
            if not final or saver.last >= self._state.step:
                return
            if tried and saver.attempted >= self._state.step:
                raise CheckpointError(
                    f"step {self._state.step} could not be saved in {self._directories[0].where}; the newest "
                    f"checkpoint is that of step {saver.last}"
                )
            self._begin(ring, saver)
            tried = True

    def _flush(self, *, final: bool) -> None:
        """`_bring_to_rest` where all ranks' scripts have come to the same point, and members may be lost."""
        ring = current()
        while True:
            try:
                self._bring_to_rest(ring, ring.gather_bytes, final=final)
                return
            except (PeerLostError, RingChangedError) as error:
                if not isinstance(ring, ElasticCommunicator):
                    raise
                ring.reform(error)
                ring.settle()

    def _tell(self, ring: Communicator, happenings: Sequence[Happening]) -> None:
        if ring.rank != 0:
            return
        for happening in happenings:
            details = happening.details
            self._note(happening.event, **details)
            if happening.event == "checkpoint_failed":
                _log.warning(
                    "step %d could not be saved in %s: %s",
                    details["step"],
                    details["directory"],
                    details["reason"],
                )
            elif happening.event == "checkpoint_late":
                _log.warning(
                    "the save that is due at step %d has to wait: %s", details["step"], details["reason"]
                )

    # Restoring.

    def _go_on(self, ring: Communicator, restored: Restored) -> int:
        """Load what was restored; returns its step."""
        first = ring.rank == 0
        for skipped in restored.skipped:
            if first:
                _log.warning("skipped %s", skipped)
                self._note("checkpoint_skipped", reason=skipped, directory=restored.where)
        self._restored = restored
        if restored.manifest is None or restored.contents is None:
            if first:
                print(f"ringps: no checkpoint in {restored.where}; starting anew", file=sys.stderr)
            return 0
        manifest = restored.manifest
        self._state.go_on(restored.contents.state, restored.where)
        # What was loaded on to a GPU need not stay in the CPU's memory until training begins.
        self._restored = restored._replace(contents=restored.contents._replace(state={}))
        self._random_pending = True
        if first:
            print(
                f"ringps: going on after step {manifest.step}, from {restored.where} "
                f"({manifest.size_bytes / 1e6:.1f} MB in {restored.seconds:.2f} s)",
                file=sys.stderr,
            )
            if manifest.world_size != ring.world_size:
                print(
                    f"ringps: {manifest.world_size} ranks saved it, and there are {ring.world_size} now: the "
                    "samples are the same, rounding and random numbers are not",
                    file=sys.stderr,
                )
            self._note(
                "restored",
                step=manifest.step,
                run=restored.run,
                directory=restored.where,
                bytes=manifest.size_bytes,
                seconds=round(restored.seconds, 4),
            )
        return manifest.step

    def _note(self, event: str, **details: object) -> None:
        admission = current_admission()
        if admission is not None:
            admission.note(event, **details)

    def _open(self) -> Saver:
        if self._saver is None:
            raise ClosedError("a Checkpointer works inside its `with` block only")
        return self._saver


def _place(ring: Communicator) -> Place:
    return Place(ring.rank, ring.world_size, ring.generation.number)
