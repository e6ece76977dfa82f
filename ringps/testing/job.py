"""A job on this machine whose workers are forks of a nursery, with a real coordinator and real faults.

It does what `ringps run` does for its workers, without the parts that are for people: it replaces the lost
ones, ends those that were taken for lost, and reports exits. It also watches that the job gets on.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringps import worker_env
from ringps.membership import (
    Coordinator,
    CoordinatorSettings,
    Expel,
    JobDone,
    JobFailed,
    LauncherLink,
    LauncherMessage,
    Replaceable,
)
from ringps.testing.nursery import Exit, Nursery
from ringps.testing.plan import FaultPlan
from ringps.worker_env import WorkerEnv

_HOST = "here"
_LOOK_S = 0.5
_FAREWELL_S = 20.0
_LOG_BYTES = 6000


class JobHung(AssertionError):
    """A job did not get on. The message holds what its workers printed last, and where their threads were."""


@dataclass(frozen=True, kw_only=True)
class FaultyJob:
    """What to run."""

    script: Path
    """Run by every worker as `__main__`."""

    workers: int

    plan: FaultPlan

    directory: Path
    """For `plan.json`, the record `fired.jsonl`, `events.jsonl`, a log per process, and whatever the script
    writes there. The job gets on as long as something in it grows."""

    arguments: tuple[str, ...] = ()
    """The script's."""

    environ: Mapping[str, str] = field(default_factory=dict)
    """`RINGPS_*` settings."""

    hosts: int = 1
    """By how many names the workers call this machine: with several, and the transport `auto`, they share
    memory under one name only, and use TCP between the names."""

    stall_s: float = 20.0
    """Without any progress for so long the job has hung."""

    @property
    def record(self) -> Path:
        """The record file."""
        return self.directory / "fired.jsonl"


@dataclass(frozen=True)
class Ended:
    """How a job went."""

    events: list[dict[str, Any]]
    """The coordinator's."""
    exits: list[tuple[int, int]]
    """Worker id and exit code (negative for a signal) of every process, in the order in which they ended."""
    failure: str | None
    """Why the job failed, if it did."""
    seconds: float


def run_job(job: FaultyJob, nursery: Nursery) -> Ended:
    """Run a job to its end.

    Raises:
        JobHung: it made no progress for `stall_s`; all of its processes were killed.
    """
    job.directory.mkdir(parents=True, exist_ok=True)
    (job.directory / "plan.json").write_text(job.plan.to_json())
    job.record.touch()
    return _Run(job, nursery).to_end()


class _Run:
    def __init__(self, job: FaultyJob, nursery: Nursery) -> None:
        self._job = job
        self._nursery = nursery
        self._inbox: queue.SimpleQueue[LauncherMessage | Exit] = queue.SimpleQueue()
        self._timeouts = worker_env.configure(job.environ).timeouts
        self._events: list[dict[str, Any]] = []
        self._exits: list[tuple[int, int]] = []
        self._running: dict[int, int] = {}
        """Worker ids by process id."""
        self._awaited: set[int] = set()
        """Worker ids to start anew, once their last process has ended."""
        self._started = 0
        self._over = False
        self._failure: str | None = None

    def to_end(self) -> Ended:
        begun_s = time.monotonic()
        settings = CoordinatorSettings(world_size=self._job.workers, min_workers=1, timeouts=self._timeouts)
        coordinator = Coordinator(settings, None, self._note)
        coordinator.start()
        self._coordinator = coordinator.address
        self._link = LauncherLink(coordinator.address, None, self._timeouts, self._inbox.put)
        self._nursery.on_exit = self._inbox.put
        try:
            self._link.register(_HOST, "127.0.0.1", self._job.workers, 1, False)
            for worker_id in range(self._job.workers):
                self._start(worker_id)
            self._watch()
        finally:
            self._kill_all()
            self._link.close()
            coordinator.close()
        return Ended(self._events, self._exits, self._failure, time.monotonic() - begun_s)

    def _note(self, event: dict[str, Any]) -> None:
        """On the coordinator's thread."""
        self._events.append(event)
        with open(self._job.directory / "events.jsonl", "a") as file:
            file.write(json.dumps(event) + "\n")

    def _watch(self) -> None:
        size, grown_s = -1, time.monotonic()
        while not self._over or self._running:
            try:
                self._on(self._inbox.get(timeout=_LOOK_S))
            except queue.Empty:
                pass
            now_s = time.monotonic()
            found = sum(path.stat().st_size for path in self._job.directory.iterdir())
            if found != size:
                size, grown_s = found, now_s
            elif now_s - grown_s > (_FAREWELL_S if self._over else self._job.stall_s):
                raise JobHung(self._describe(now_s - grown_s))

    def _on(self, message: LauncherMessage | Exit) -> None:
        match message:
            case Exit(pid=pid, code=code) if pid in self._running:
                worker_id = self._running.pop(pid)
                self._exits.append((worker_id, code))
                said = f"process killed by signal {-code}" if code < 0 else f"process exited with code {code}"
                self._link.worker_exited(worker_id, pid, 128 - code if code < 0 else code, said)
                if worker_id in self._awaited and not self._over:
                    self._start(worker_id)
            case Replaceable(worker_id=worker_id) if not self._over:
                self._awaited.add(worker_id)
                if worker_id not in self._running.values():
                    self._start(worker_id)
            case Expel(pid=pid) if pid in self._running:
                _signal(pid, signal.SIGKILL)
            case JobFailed():
                self._over, self._failure = True, f"worker {message.worker_id}: {message.reason}"
            case JobDone():
                self._over = True

    def _start(self, worker_id: int) -> None:
        job = self._job
        self._awaited.discard(worker_id)
        self._started += 1
        contract = WorkerEnv(
            coordinator=self._coordinator,
            key_file=None,
            worker_id=worker_id,
            host=f"{_HOST}-{worker_id * job.hosts // job.workers}" if job.hosts > 1 else _HOST,
            address="127.0.0.1",
            local_rank=worker_id,
            local_world_size=job.workers,
        )
        command = ["--plan", str(job.directory / "plan.json"), "--record", str(job.record), str(job.script)]
        log = job.directory / f"log-{worker_id}-{self._started}.txt"
        environ = {**contract.to_environ(), **job.environ}
        environ["RINGPS_TRANSPORT"] = job.environ.get("RINGPS_TRANSPORT", "auto")
        pid = self._nursery.start([*command, *job.arguments], environ, log)
        self._running[pid] = worker_id
        self._link.worker_started(worker_id)

    def _kill_all(self) -> None:
        for pid in self._running:
            _signal(pid, signal.SIGKILL)
        while self._running:
            ended = self._inbox.get(timeout=_FAREWELL_S)
            if isinstance(ended, Exit):
                self._running.pop(ended.pid, None)

    def _describe(self, silent_s: float) -> str:
        for pid in self._running:
            _signal(pid, signal.SIGUSR1)
        time.sleep(_LOOK_S)
        lines = [f"no progress for {silent_s:.0f} s; still running: {self._running}"]
        for event in self._events[-8:]:
            lines.append(f"  {event}")
        running = set(self._running.values())
        newest: dict[int, Path] = {}
        for path in sorted(self._job.directory.glob("log-*"), key=lambda path: path.stat().st_mtime):
            newest[int(path.name.split("-")[1])] = path
        for worker_id, path in sorted(newest.items()):
            state = "runs" if worker_id in running else "has ended"
            text = path.read_text(errors="replace")[-_LOG_BYTES:]
            lines.append(f"--- worker {worker_id} ({state}), {path.name}:\n{text}")
        return "\n".join(lines)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # its exit is about to be reported
        os.kill(pid, number)
