"""PURE: what to do when a worker exits, the coordinator speaks, a signal comes or time passes.

A failed worker is not replaced: the others get a moment to raise their own errors and are then
stopped, and the launcher ends with the exit code of the worker that caused it all.

::

    RUNNING ──a worker failed──> DRAINING ──drain_s──> STOPPING ──grace_s──> KILLING
       └───────────SIGINT, SIGTERM, broken output──────────^                   ^
                                                        └──── second Ctrl-C ───┘
    any, once no worker is left ──> WAITING (for the coordinator's verdict) ──> ENDED
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping
from dataclasses import dataclass

DRAIN_S = 2.0
"""How long the other workers may go on after one failed, to raise their own errors."""

PATIENCE_S = 1.0
"""How long all workers here may be done before we say what we are still waiting for."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A worker that failed."""

    worker_id: int
    rank: int
    host: str
    code: int
    """As a shell gives it: 128 + number for a signal."""
    reason: str


# Events


@dataclass(frozen=True, kw_only=True)
class WorkerExited:
    """A worker of this machine is gone; `code` as a shell gives it, 0 for success."""

    worker_id: int
    code: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class JobFailed:
    """The coordinator decided which worker of the whole job failed first."""

    failure: Failure


@dataclass(frozen=True, kw_only=True)
class JobDone:
    """The coordinator says that every worker of the whole job exited with 0."""


@dataclass(frozen=True, kw_only=True)
class CoordinatorLost:
    """Nothing more will be heard from the coordinator."""


@dataclass(frozen=True, kw_only=True)
class StopAsked:
    """Somebody wants the job to end: a signal, or our output is no longer read."""

    number: int
    """The signal, which sets the exit code."""


@dataclass(frozen=True, kw_only=True)
class TimePassed:
    """`Supervision.deadline_s` may have come."""


Event = WorkerExited | JobFailed | JobDone | CoordinatorLost | StopAsked | TimePassed


# Actions


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tell the coordinator that a worker exited."""

    worker_id: int
    code: int
    reason: str


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


Action = Report | Terminate | Kill | Say


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the launcher ends, and why."""

    code: int
    failure: Failure | None = None
    signal: int | None = None


class Phase(enum.Enum):
    RUNNING = enum.auto()
    DRAINING = enum.auto()
    STOPPING = enum.auto()
    KILLING = enum.auto()
    WAITING = enum.auto()
    ENDED = enum.auto()


class Supervision:
    """Decides for the workers of one machine. Feed it events; carry out what it returns."""

    def __init__(self, ranks: Mapping[int, int], *, host: str, grace_s: float, verdict_s: float) -> None:
        """
        Args:
            ranks: rank of each worker id of this machine.
            host: this machine's name.
            grace_s: from SIGTERM to SIGKILL.
            verdict_s: how long to wait, once no worker is left here, to hear from the coordinator
                which worker of the job failed first.
        """
        self._ranks = dict(ranks)
        self._running = list(ranks)
        self._host = host
        self._grace_s = grace_s
        self._verdict_s = verdict_s
        self._phase = Phase.RUNNING
        self._deadline_s: float | None = None
        self._first_failure: Failure | None = None
        self._verdict: Failure | None = None
        self._stop: int | None = None
        self._job_done = False
        self._coordinator_lost = False

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def deadline_s(self) -> float | None:
        """When to feed the next `TimePassed`, on the clock of `handle`'s `now_s`."""
        return self._deadline_s

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, or None while it has not."""
        if self._phase is not Phase.ENDED:
            return None
        failure = self._verdict or self._first_failure
        if self._stop is not None:
            return Outcome(code=128 + self._stop, signal=self._stop)
        if failure is None:
            return Outcome(code=0)
        # A worker that left early with 0 can be the cause; the job failed all the same.
        local = self._first_failure.code if self._first_failure else 1
        return Outcome(code=failure.code or local, failure=failure)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take one event in; what is to be done, in order."""
        match event:
            case WorkerExited():
                return self._worker_exited(event, now_s)
            case JobFailed():
                self._verdict = self._verdict or event.failure
                return self._drain(now_s)
            case JobDone():
                self._job_done = True
                return self._settle(now_s)
            case CoordinatorLost():
                self._coordinator_lost = True
                return self._settle(now_s)
            case StopAsked():
                return self._stop_asked(event, now_s)
            case TimePassed():
                return self._time_passed(now_s)

    def _worker_exited(self, event: WorkerExited, now_s: float) -> list[Action]:
        self._running.remove(event.worker_id)
        reason = event.reason
        if self._stop is not None:
            reason += f" (its launcher was told to stop: {_cause(self._stop)})"
        report = Report(worker_id=event.worker_id, code=event.code, reason=reason)
        if event.code and self._first_failure is None:
            self._first_failure = Failure(
                worker_id=event.worker_id,
                rank=self._ranks[event.worker_id],
                host=self._host,
                code=event.code,
                reason=reason,
            )
        if event.code:
            return [report, *self._drain(now_s)]
        return [report, *self._settle(now_s)]

    def _drain(self, now_s: float) -> list[Action]:
        if self._phase is Phase.RUNNING:
            self._enter(Phase.DRAINING, now_s + DRAIN_S)
        return self._settle(now_s)

    def _stop_asked(self, event: StopAsked, now_s: float) -> list[Action]:
        if self._phase in (Phase.RUNNING, Phase.WAITING) and self._first_failure is self._verdict is None:
            self._stop = event.number
        if self._phase is Phase.WAITING:
            return self._end()
        if self._phase in (Phase.RUNNING, Phase.DRAINING):
            return [Say(text=self._stopping_text(event.number)), *self._terminate(now_s)]
        # `timeout` and others send SIGTERM twice; only a person at a keyboard is that impatient.
        if self._phase is Phase.STOPPING and event.number == signal.SIGINT:
            return self._kill("asked again")
        return []

    def _time_passed(self, now_s: float) -> list[Action]:
        if self._deadline_s is None or now_s < self._deadline_s:
            return []
        if self._phase is Phase.DRAINING:
            return self._terminate(now_s)
        if self._phase is Phase.STOPPING:
            return self._kill(f"not gone {self._grace_s:g} s after SIGTERM")
        if self._phase is Phase.WAITING and self._first_failure is None:
            self._deadline_s = None
            return [Say(text="all workers here are done; waiting for those of the other machines")]
        return self._end() if self._phase is Phase.WAITING else []

    def _terminate(self, now_s: float) -> list[Action]:
        self._enter(Phase.STOPPING, now_s + self._grace_s)
        return [Terminate(worker_ids=tuple(self._running))]

    def _kill(self, reason: str) -> list[Action]:
        self._enter(Phase.KILLING, None)
        ranks = ", ".join(str(self._ranks[worker_id]) for worker_id in self._running)
        return [
            Say(text=f"killing rank {ranks}: {reason}"),
            Kill(worker_ids=tuple(self._running)),
        ]

    def _settle(self, now_s: float) -> list[Action]:
        """Once no worker is left here, end as soon as it is known how the whole job went."""
        if self._running or self._phase is Phase.ENDED:
            return []
        known = self._verdict or self._job_done or self._coordinator_lost
        if known or self._stop is not None:
            return self._end()
        if self._phase is not Phase.WAITING:
            self._enter(Phase.WAITING, now_s + (self._verdict_s if self._first_failure else PATIENCE_S))
        return []

    def _end(self) -> list[Action]:
        self._enter(Phase.ENDED, None)
        return []

    def _enter(self, phase: Phase, deadline_s: float | None) -> None:
        self._phase = phase
        self._deadline_s = deadline_s

    def _stopping_text(self, number: int) -> str:
        hint = "; Ctrl-C again kills them at once" if number == signal.SIGINT else ""
        workers = f"{len(self._running)} worker" + ("s" if len(self._running) != 1 else "")
        return f"{_cause(number)}: stopping {workers}{hint}"


def exit_code(status: int) -> int:
    """A `Popen.returncode` as a shell would give it."""
    return status if status >= 0 else 128 - status


def describe_exit(status: int) -> str:
    """Why a process with this `Popen.returncode` is gone."""
    if status >= 0:
        return f"process exited with code {status}"
    try:
        return f"process killed by signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"process killed by signal {-status}"


def last_line(outcome: Outcome, *, log: str | None, local: bool) -> str | None:
    """What the launcher says last, or None after success.

    Args:
        log: the failed worker's log file, if there is one.
        local: whether the failed worker ran on this machine.
    """
    if outcome.failure is None:
        return None if outcome.signal is None else f"stopped: {_cause(outcome.signal)}"
    failure = outcome.failure
    if not local:
        where = f"its output is at the launcher on {failure.host}"
    elif log is not None:
        where = f"its log is {log}"
    else:
        where = "its output is above; --log-dir DIR keeps it in a file"
    return (
        f"rank {failure.rank} (worker {failure.worker_id} on {failure.host}) failed: "
        f"{failure.reason}; {where}"
    )


def _cause(number: int) -> str:
    if number == signal.SIGPIPE:
        return "nobody reads our output any more"
    return f"got {signal.Signals(number).name}"
