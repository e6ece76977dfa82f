"""One start of the ring, as far as this machine's workers go: from meeting the others to the last exit.

One loop on one thread sees every worker's exit, every line of output, every signal and every word
of the coordinator. `restart.Supervision` decides, also on replacements of lost workers; this file
carries out. A worker's whole process group is killed when it exits. (A process that a worker moved
into a session of its own is the worker's to end.)
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from ringps import worker_env
from ringps.errors import CoordinatorUnreachableError, SetupError
from ringps.membership import (
    Assignment,
    CoordinatorBack,
    CoordinatorLost,
    Evict,
    Expel,
    JobDone,
    JobEvent,
    JobFailed,
    JobKey,
    LauncherLink,
    LauncherMessage,
    Replaceable,
)
from ringps_launcher import plan, stimuli
from ringps_launcher.crew import Crew
from ringps_launcher.job import Job
from ringps_launcher.network import ReservedPort
from ringps_launcher.options import Options
from ringps_launcher.outcome import Failure, Outcome, describe_exit, exit_code, last_line
from ringps_launcher.rendezvous import Registration, Site
from ringps_launcher.replacement import Replacements
from ringps_launcher.restart import Supervision
from ringps_launcher.tools import Tools

_PATIENCE_S = 2.0
_CANNOT_START = 126
_EVER_S = 1e7
_VERDICT_MARGIN_S = 2.0  # the coordinator itself waits for heartbeat_timeout_s until it is certain


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """How this launcher meets the others for this start."""

    site: Site
    key: JobKey
    alone: bool
    """Whether this launcher is the whole job."""
    patience_s: float
    """How long a coordinator that is not there is waited for, beyond `connect_timeout_s`."""
    place: int | None = None
    """In a pod: the id of its worker."""


class Attempt:
    """`stack` ends it, on whatever way out."""

    def __init__(
        self,
        job: Job,
        options: Options,
        environ: Mapping[str, str],
        tools: Tools,
        meeting: Meeting,
        stack: ExitStack,
    ) -> None:
        self._job = job
        self._options = options
        self._environ = environ
        self._tools = tools
        self._timeouts = worker_env.configure(environ).timeouts
        if meeting.place is not None:  # its pod stays as long as the job, however long others are away
            self._timeouts = replace(self._timeouts, rendezvous_timeout_s=_EVER_S)
        self._meeting = meeting
        self._stack = stack
        self._inbox: deque[LauncherMessage] = deque()
        self._seats: dict[int, plan.Seat] = {}
        self._command = job.command(options.python)
        self._crew = Crew(tools.loop, tools.guard, tools.console, tools.logs, self._worker_exited)
        stack.callback(self._crew.close)
        self.started_s: float | None = None
        """When the workers were started, on the monotonic clock; None before."""

    def run(self, replacements: Replacements, restarts: int) -> Outcome:
        """Carry it out, to the exit of the last worker here.

        Args:
            replacements: whether and when lost workers are replaced.
            restarts: how many processes any worker of this launcher may have had before.

        Raises:
            RingpsError: the coordinator cannot be reached, or does not let this launcher take part.
        """
        with ReservedPort() as port:
            assignment = self._register(port.number)
            if assignment is None:
                number = self._tools.stops.popleft()
                return Outcome(code=128 + number, signal=number)
            self._start(assignment, replacements, restarts)
            outcome = self._watch()
        self._crew.finish()
        return outcome

    def last_line(self, outcome: Outcome, outlook: str) -> str | None:
        """What is said of this outcome if it is the last one; see `outcome.last_line`."""
        seat = None if outcome.failure is None else self._seats.get(outcome.failure.worker_id)
        log = None if seat is None else self._tools.logs.path_of(seat.rank)
        return last_line(outcome, log=log, local=seat is not None, outlook=outlook)

    # Meeting the others.

    def _register(self, master_port: int) -> Assignment | None:
        """This launcher's part of the job, or None if a signal came first."""
        end_s = time.monotonic() + self._meeting.patience_s
        tried = False
        while True:
            self._link = LauncherLink(
                self._meeting.site.coordinator,
                self._meeting.key,
                self._timeouts,
                self._receive,
                place=self._meeting.place,
            )
            self._stack.callback(self._link.close)
            try:
                return self._wait_for_assignment(master_port)
            except CoordinatorUnreachableError as error:
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    raise
                if not tried:
                    how_long = f" for {left_s:.0f} s" if left_s < _EVER_S / 2 else ""
                    self._tools.console.say(f"{error}; trying again{how_long}")
                tried = True
                self._link.close()
                if self._tools.stops:
                    return None

    def _wait_for_assignment(self, master_port: int) -> Assignment | None:
        tools, site = self._tools, self._meeting.site
        registration = Registration(
            self._link, site, self._job, master_port, lambda: tools.loop.post(lambda: None)
        )
        said = False
        while (assignment := registration.result()) is None:
            if tools.stops:
                self._link.close()
                break
            before_s = time.monotonic()
            self._turn(None if said else _PATIENCE_S)
            if not said and time.monotonic() - before_s >= _PATIENCE_S:
                tools.console.say(f"waiting for the job's other machines at {site.coordinator}")
                said = True
        registration.join()
        return assignment

    # Starting and watching.

    def _start(self, assignment: Assignment, replacements: Replacements, restarts: int) -> None:
        site = self._meeting.site
        placement = plan.Placement(
            host=site.host,
            address=site.address,
            host_index=assignment.host_index,
            host_count=assignment.host_count,
            first_worker_id=assignment.first_worker_id,
            world_size=assignment.world_size,
            master_address=assignment.master_address,
            master_port=assignment.master_port,
            coordinator=site.coordinator,
            key_file=site.key_file,
        )
        cores = len(os.sched_getaffinity(0))
        seats = plan.seats(self._job, placement, environ=self._environ, cores=cores, restart=restarts)
        self._seats = {seat.worker_id: seat for seat in seats}
        self._restarts = restarts
        self._supervision = Supervision(
            {seat.worker_id: seat.rank for seat in seats},
            host=site.host,
            grace_s=self._job.grace_s,
            verdict_s=self._timeouts.heartbeat_timeout_s + _VERDICT_MARGIN_S,
            replacements=replacements,
            alone=self._meeting.alone,
            stays=self._meeting.place is not None,
        )
        self.started_s = time.monotonic()
        for seat in seats:
            self._start_worker(seat)

    def _start_worker(self, seat: plan.Seat) -> None:
        try:
            pid = self._crew.start(seat, self._command)
        except (OSError, SetupError) as error:
            reason = f"could not be started: {error}"
            self._exited(seat.worker_id, _CANNOT_START, reason)
            return
        self._link.worker_started(seat.worker_id)
        restarts = {"restart": seat.restart} if seat.restart else {}
        self._record("worker_started", seat.worker_id, pid=pid, **restarts)
        self._decide(stimuli.WorkerStarted(worker_id=seat.worker_id, pid=pid))

    def _watch(self) -> Outcome:
        stops = self._tools.stops
        while True:
            while self._inbox:
                self._hear(self._inbox.popleft())
            while stops:
                self._decide(stimuli.StopAsked(number=stops.popleft()))
            self._decide(stimuli.TimePassed())
            outcome = self._supervision.outcome
            if outcome is not None:
                return outcome
            deadline_s = self._supervision.deadline_s
            self._turn(None if deadline_s is None else deadline_s - time.monotonic())

    def _turn(self, timeout_s: float | None) -> None:
        self._crew.watch()
        self._tools.turn(timeout_s)

    def _decide(self, event: stimuli.Event) -> None:
        for action in self._supervision.handle(event, time.monotonic()):
            match action:
                case stimuli.Report():
                    self._link.worker_exited(
                        action.worker_id, action.pid, action.code, action.reason, stopping=action.stopping
                    )
                case stimuli.Restarting():
                    self._record(
                        "worker_restarting",
                        action.worker_id,
                        delay_s=action.delay_s,
                        restarts_left=action.restarts_left,
                    )
                case stimuli.Start():
                    seat = self._seats[action.worker_id]
                    self._start_worker(plan.replacement(seat, self._restarts + action.restart))
                case stimuli.Terminate():
                    self._crew.terminate(action.worker_ids)
                case stimuli.Kill():
                    self._crew.kill(action.worker_ids)
                case stimuli.Say():
                    self._tools.console.say(action.text)

    def _worker_exited(self, seat: plan.Seat, status: int) -> None:
        self._exited(seat.worker_id, exit_code(status), describe_exit(status))

    def _exited(self, worker_id: int, code: int, reason: str) -> None:
        self._record("worker_exited", worker_id, code=code, reason=reason)
        self._decide(stimuli.WorkerExited(worker_id=worker_id, code=code, reason=reason))

    def _receive(self, message: LauncherMessage) -> None:
        """On the link's thread."""
        self._tools.loop.post(lambda: self._inbox.append(message))

    def _hear(self, message: LauncherMessage) -> None:
        match message:
            case JobEvent():
                self._tools.journal.write(message.event)
                if (meaning := stimuli.from_job_event(message.event)) is not None:
                    self._decide(meaning)
            case JobFailed():
                failure = Failure(
                    worker_id=message.worker_id,
                    rank=message.rank,
                    host=message.host,
                    code=message.code,
                    reason=message.reason,
                )
                self._decide(stimuli.JobFailed(failure=failure, restarts=message.restarts))
            case JobDone():
                self._decide(stimuli.JobDone(suspended=message.suspended))
            case Replaceable(worker_id=worker_id, reason=reason):
                self._decide(stimuli.Replaceable(worker_id=worker_id, reason=reason))
            case Expel(worker_id=worker_id, pid=pid, reason=reason):
                self._decide(stimuli.Expel(worker_id=worker_id, pid=pid, reason=reason))
            case Evict(reason=reason):
                self._tools.console.say(f"asked to leave: {reason}")
                self._tools.stops.append(signal.SIGTERM)
            case CoordinatorLost():
                self._decide(stimuli.CoordinatorLost())
            case CoordinatorBack():
                self._decide(stimuli.CoordinatorBack())

    def _record(self, event: str, worker_id: int, **details: Any) -> None:
        self._tools.journal.write(
            {
                "event": event,
                "worker_id": worker_id,
                "rank": self._seats[worker_id].rank,
                "host": self._options.host,
                **details,
            }
        )
