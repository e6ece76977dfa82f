"""PURE: what goes into `restart.Supervision` (events), and what comes out (actions)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ringps_launcher.outcome import Failure, Saved

# Events.


@dataclass(frozen=True, kw_only=True)
class WorkerStarted:
    """A worker of this machine runs."""

    worker_id: int
    pid: int


@dataclass(frozen=True, kw_only=True)
class WorkerExited:
    """A worker of this machine is gone and reaped, or could not be started."""

    worker_id: int
    code: int
    """As a shell gives it, 0 for success."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class JobFailed:
    """The coordinator decided that the job failed, and which worker of the whole job was the cause."""

    failure: Failure
    restarts: bool = False
    """Whether the whole ring is to be started again."""


@dataclass(frozen=True, kw_only=True)
class JobDone:
    """The coordinator says that the whole job is done, and well."""

    suspended: bool = False
    """Whether it stopped at a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class LossNoted:
    """The coordinator knows that a worker is lost or has left, and will say if the job fails of it."""

    worker_id: int
    left: bool = False
    """Whether it left in order, because it was asked to."""


@dataclass(frozen=True, kw_only=True)
class RingFormed:
    """The coordinator says that a generation has formed, and of whom."""

    worker_ids: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """The members say that a checkpoint is whole."""

    saved: Saved


@dataclass(frozen=True, kw_only=True)
class Replaceable:
    """The coordinator says that the ring goes on without this worker, and would take another process in
    its place."""

    worker_id: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Expel:
    """The coordinator says that the ring went on without this process, which may still run."""

    worker_id: int
    pid: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class CoordinatorLost:
    """The coordinator does not answer any more."""


@dataclass(frozen=True, kw_only=True)
class CoordinatorBack:
    """The coordinator answers again, after `CoordinatorLost`."""


@dataclass(frozen=True, kw_only=True)
class StopAsked:
    """Somebody wants the job to end: a signal, or our output is no longer read."""

    number: int
    """The signal, which sets the exit code."""


@dataclass(frozen=True, kw_only=True)
class TimePassed:
    """`Supervision.deadline_s` may have come."""


Event = (
    WorkerStarted
    | WorkerExited
    | JobFailed
    | JobDone
    | LossNoted
    | RingFormed
    | CheckpointSaved
    | Replaceable
    | Expel
    | CoordinatorLost
    | CoordinatorBack
    | StopAsked
    | TimePassed
)


_LEFT = "worker_left"
_LOSSES = frozenset({"worker_lost", "joiner_lost", _LEFT})


def from_job_event(event: Mapping[str, Any]) -> LossNoted | RingFormed | CheckpointSaved | None:
    """What a line of the coordinator's for the events file means for the workers here, if anything."""
    worker_id = event.get("worker_id")
    if event.get("event") in _LOSSES and isinstance(worker_id, int):
        return LossNoted(worker_id=worker_id, left=event["event"] == _LEFT)
    members = event.get("members")
    if event.get("event") == "generation" and isinstance(members, (list, tuple)):
        ids = [member.get("worker_id") for member in members if isinstance(member, Mapping)]
        return RingFormed(worker_ids=frozenset(i for i in ids if isinstance(i, int)))
    step, directory = event.get("step"), event.get("directory")
    if event.get("event") == "checkpoint_saved" and isinstance(step, int) and isinstance(directory, str):
        return CheckpointSaved(saved=Saved(step=step, directory=directory))
    return None


# Actions.


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tell the coordinator that a worker exited."""

    worker_id: int
    pid: int
    """0 if it could not be started."""
    code: int
    reason: str
    stopping: bool = False
    """Whether this launcher had been asked to stop."""


@dataclass(frozen=True, kw_only=True)
class Restarting:
    """Write into the events file that a lost worker will be replaced."""

    worker_id: int
    delay_s: float
    restarts_left: int | None


@dataclass(frozen=True, kw_only=True)
class Start:
    """Start a replacement now."""

    worker_id: int
    restart: int
    """Its number among the replacements of this worker, from 1."""


@dataclass(frozen=True, kw_only=True)
class Terminate:
    """Send SIGTERM to these workers."""

    worker_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Kill the process groups of these workers."""

    worker_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Say:
    """Tell the user."""

    text: str


Action = Report | Restarting | Start | Terminate | Kill | Say
