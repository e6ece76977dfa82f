"""A job of `elastic_job`'s workers: started, watched, harmed, and ended with all its processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

GRACE_S = 25.0
_POLL_S = 0.05
_SHOWN_CHARACTERS = 3000


class JobError(RuntimeError):
    """The job did not do what was to be measured; says what it printed last."""


@dataclass(frozen=True)
class Note:
    """What a worker noted."""

    worker_id: int
    pid: int
    t_s: float
    what: str
    details: Mapping[str, Any]


class WatchedJob:
    """Commands that make up a job; what they started is gone after `__exit__`."""

    def __init__(self, directory: Path, settings: Mapping[str, object] | None = None) -> None:
        """
        Args:
            directory: an empty one, where the workers write their notes.
            settings: environment variables beside this process's own.
        """
        self.directory = directory
        self._environ = {**os.environ, **{name: str(value) for name, value in (settings or {}).items()}}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._log = directory / "output.log"
        self._notes: list[Note] = []
        self._by_what: dict[str, list[Note]] = {}
        self._read: dict[Path, int] = {}

    def __enter__(self) -> WatchedJob:
        return self

    def start(self, command: Sequence[str]) -> None:
        """Start a part of the job; the end of the one that was started last is the end of the job."""
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,
            )
        self._processes.append(process)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in reversed(self._processes):
            process.terminate()
        end_s = time.monotonic() + GRACE_S
        for process in reversed(self._processes):
            try:
                process.wait(timeout=max(0.0, end_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        # A launcher that was killed cannot have ended its workers; each noted its own pid.
        for pid in self.pids_ever():
            if self._is_ours(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    # What is known.

    def notes(self) -> list[Note]:
        """Everything noted so far; of each worker in order."""
        for path in self.directory.glob("*-*.jsonl"):
            worker_id, pid = map(int, path.stem.split("-"))
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                whole, _, _ = file.read().rpartition(b"\n")
            if not whole:
                continue
            self._read[path] = self._read.get(path, 0) + len(whole) + 1
            for line in whole.splitlines():
                found = json.loads(line)
                note = Note(worker_id, pid, found.pop("t_s"), found.pop("what"), found)
                self._notes.append(note)
                self._by_what.setdefault(note.what, []).append(note)
        return self._notes

    def of(self, what: str, since_s: float = 0.0) -> list[Note]:
        """All notes of that, since then, by time."""
        self.notes()
        chosen = (note for note in self._by_what.get(what, ()) if note.t_s > since_s)
        return sorted(chosen, key=lambda note: note.t_s)

    def events(self) -> list[dict[str, Any]]:
        """The lines of the events file."""
        path = self.directory / "events.jsonl"
        if not path.exists():
            return []
        whole, _, _ = path.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def pids_ever(self) -> set[int]:
        """Of all workers that noted anything."""
        return {note.pid for note in self.notes()}

    def members(self) -> dict[int, int]:
        """Pid by worker id, of those that committed the newest generation's newest step."""
        committed = self.of("committed")
        if not committed:
            return {}
        newest = max(note.details["generation"] for note in committed)
        return {
            note.worker_id: note.pid
            for note in committed
            if note.details["generation"] == newest and runs(note.pid)
        }

    def log(self) -> str:
        """What was printed last."""
        return self._log.read_text(errors="replace")[-_SHOWN_CHARACTERS:]

    @property
    def over(self) -> bool:
        """Whether the job has ended by itself."""
        return bool(self._processes) and self._processes[-1].poll() is not None

    # What to wait for.

    def wait(self, condition: Callable[[], bool], limit_s: float, wanted: str) -> None:
        """
        Raises:
            JobError: it did not become true within `limit_s`, or the job ended before.
        """
        end_s = time.monotonic() + limit_s
        while not condition():
            if self.over:
                raise JobError(f"the job ended while waiting for {wanted}:\n{self.log()}")
            if time.monotonic() > end_s:
                raise JobError(f"{wanted}: not within {limit_s:g} s:\n{self.log()}")
            time.sleep(_POLL_S)

    def steady(self, n: int, steps: int, *, after: int = 0, limit_s: float = 120.0) -> float:
        """Wait until `n` members have committed `after` and then `steps` steps; the latters' median, in s."""
        found: list[float] = []

        def done() -> bool:
            committed = self.of("committed")
            newest = max((note.details["generation"] for note in committed), default=0)
            times: dict[int, list[float]] = {}
            for note in committed:
                if note.details["generation"] == newest and note.details["n"] == n:
                    times.setdefault(note.pid, []).append(note.t_s)
            found[:] = [
                late - early
                for one in times.values()
                for early, late in zip(one[-steps - 1 :], one[-steps:], strict=False)
            ]
            return len(times) == n and all(len(one) > after + steps for one in times.values())

        self.wait(done, limit_s, f"{steps} steps of {n} members")
        return statistics.median(found)

    def _is_ours(self, pid: int) -> bool:
        """Whether that pid is still one of the job's workers: their command line has the directory."""
        try:
            return os.fsencode(self.directory) in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False


def run_command(
    script: str,
    directory: Path,
    arguments: Sequence[str],
    *,
    workers: int,
    options: Sequence[str] = (),
    events: bool = True,
) -> list[str]:
    """`ringps run`, of a script that is handed the directory first. `events`: whether it writes the file."""
    command = [sys.executable, "-m", "ringps_launcher", "run", "-n", str(workers), *options]
    command += ["--events", str(directory / "events.jsonl")] if events else []
    command += [script]
    return [*command, "--work", str(directory), *arguments]


def load() -> float:
    """The machine's load, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def runs(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
