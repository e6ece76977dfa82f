"""Something is done to a job that trains: how long it takes to notice, and to go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from watched_job import WatchedJob


@dataclass(frozen=True)
class Harm:
    """Something was done to a job."""

    job: WatchedJob
    at_s: float
    to_wall_s: float
    """From the monotonic clock to that of the events."""
    generation: int

    def noticed_s(self, event: str, worker_id: int) -> float:
        """From then to the event about that worker."""
        for one in self.events(event):
            if one.get("worker_id") == worker_id:
                return float(one["t"] - self.to_wall_s - self.at_s)
        raise LookupError(f"no event {event} of worker {worker_id}")

    def exited(self, worker_id: int) -> bool:
        """Whether the launcher has reaped that worker since then."""
        return any(one["worker_id"] == worker_id for one in self.events("worker_exited"))

    def events(self, event: str) -> list[dict[str, Any]]:
        """Of that kind, since then."""
        since_s = self.at_s + self.to_wall_s
        return [one for one in self.job.events() if one["event"] == event and one["t"] > since_s]

    def begun_by(self, what: str) -> Harm:
        """The same, but of the moment when a worker noted that it was done."""
        return replace(self, at_s=self.job.of(what, self.at_s)[0].t_s)

    def told_s(self) -> float:
        """From then to when the first member was told of the next generation."""
        told = [
            note for note in self.job.of("prepare", self.at_s) if note.details["generation"] > self.generation
        ]
        return told[0].t_s - self.at_s

    def next_step_s(self, limit_s: float = 60.0) -> float:
        """Wait until all members of the next generation have committed; from then to the last of these."""
        return max(self._first_commits(limit_s).values()) - self.at_s

    def pause_s(self) -> float:
        """The longest time between two commits of one process, across the change of generation."""
        firsts = self._first_commits(60.0)
        committed = self.job.of("committed")
        before = {note.pid: note.t_s for note in committed if note.details["generation"] <= self.generation}
        return max(first_s - before[pid] for pid, first_s in firsts.items() if pid in before)

    def members(self) -> int:
        """Of the next generation that committed a step."""
        return len(self._first_commits(60.0))

    def _first_commits(self, limit_s: float) -> dict[int, float]:
        found: dict[int, float] = {}

        def done() -> bool:
            committed = self.job.of("committed", self.at_s)
            later = [note for note in committed if note.details["generation"] > self.generation]
            found.clear()
            for note in later:
                if note.details["generation"] == later[0].details["generation"]:
                    found.setdefault(note.pid, note.t_s)
            return bool(later) and len(found) == later[0].details["n"]

        self.job.wait(done, limit_s, "the next step")
        return found


def harm(job: WatchedJob, do: Callable[[], object]) -> Harm:
    """Do it, and remember when."""
    generation = max(note.details["generation"] for note in job.of("committed"))
    at_s, wall_s = time.monotonic(), time.time()
    do()
    return Harm(job, at_s, wall_s - at_s, generation)
