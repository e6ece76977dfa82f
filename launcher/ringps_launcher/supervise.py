"""`ringps run`: start this machine's workers, watch them, and end with the job's exit code.

One loop on one thread sees every worker's exit, every line of output, every signal and every word
of the coordinator. `restart.Supervision` decides, also on replacements of lost workers; this file
carries out. Nothing is left behind on any way out: a worker's whole process group is killed when it
exits, and if this process is killed itself, its guard does the same. (A process that a worker moved
into a session of its own is the worker's to end.)
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ringps import worker_env
from ringps.errors import SetupError
from ringps.membership import (
    Assignment,
    CoordinatorBack,
    CoordinatorLost,
    CoordinatorSettings,
    Expel,
    JobDone,
    JobEvent,
    JobFailed,
    LauncherLink,
    LauncherMessage,
    Replaceable,
)
from ringps_launcher import plan, rendezvous, stimuli
from ringps_launcher.console import Console
from ringps_launcher.crew import Crew
from ringps_launcher.events import EventLog
from ringps_launcher.guard import Guard
from ringps_launcher.job import Job
from ringps_launcher.loop import Loop, stop_signals
from ringps_launcher.network import ReservedPort
from ringps_launcher.outcome import Failure, Outcome, describe_exit, exit_code, last_line
from ringps_launcher.rendezvous import Registration, Site
from ringps_launcher.replacement import Replacements
from ringps_launcher.restart import Supervision

_PATIENCE_S = 2.0
_CANNOT_START = 126
_VERDICT_MARGIN_S = 2.0  # the coordinator itself waits for heartbeat_timeout_s until it is certain


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `ringps run` was asked for, besides the job itself."""

    python: str
    """The interpreter that runs the workers."""

    host: str
    """Name of this machine."""

    join: str | None = None
    """`HOST:PORT` of the coordinator to join, or None to run on this machine alone."""

    key_file: str | None = None
    """The job key, needed to join."""

    address: str | None = None
    """IP address at which the other machines reach this one; None to find it out."""

    events: str | None = None
    """The events file."""

    log_dir: str | None = None
    """Directory for the ranks' raw output."""


def run(job: Job, options: Options, environ: Mapping[str, str]) -> int:
    """Run the job's part on this machine; returns the exit code.

    Raises:
        RingpsError: it could not start; nothing of it runs any more.
        ValueError: a `RINGPS_*` setting in `environ` is malformed.
    """
    with ExitStack() as stack:
        return Launcher(job, options, environ, stack).run()


class Launcher:
    """All that one `ringps run` holds. `stack` undoes it, on whatever way out."""

    def __init__(self, job: Job, options: Options, environ: Mapping[str, str], stack: ExitStack) -> None:
        self._job = job
        self._options = options
        self._environ = environ
        self._stack = stack
        self._stops: deque[int] = deque()
        self._inbox: deque[LauncherMessage] = deque()
        self._timeouts = worker_env.configure(environ).timeouts
        self._loop = Loop()
        stack.callback(self._loop.close)
        self._loop.catch_signals(stop_signals(), self._stops.append)
        self._console = Console(self._loop, coloured=_wants_colour(environ))
        stack.callback(self._console.say_what_is_logged())
        self._events = None if options.events is None else EventLog(options.events)
        if self._events is not None:
            stack.callback(self._events.close)
        if options.log_dir is not None:
            _make_log_dir(options.log_dir)
        self._seats: dict[int, plan.Seat] = {}
        self._command = job.command(options.python)
        self._guard = Guard()
        stack.callback(self._guard.close)
        self._loop.add_reader(self._guard.pidfd, self._guard_died)
        self._crew = Crew(self._loop, self._guard, self._console, self._worker_exited)
        stack.callback(self._crew.close)

    def run(self) -> int:
        site, key = self._meet()
        self._link = LauncherLink(site.coordinator, key, self._timeouts, self._receive)
        self._stack.callback(self._link.close)
        with ReservedPort() as port:
            assignment = self._register(site, port.number)
            if assignment is None:
                number = self._stops.popleft()
                return self._finish(Outcome(code=128 + number, signal=number))
            self._start(site, assignment)
            return self._finish(self._watch())

    def _meet(self) -> tuple[Site, Any]:
        options = self._options
        if options.join is None:
            settings = CoordinatorSettings(
                world_size=self._job.workers,
                min_workers=self._job.min_workers,
                encrypt_data=self._job.encrypt_data,
                timeouts=self._timeouts,
            )
            return rendezvous.serve_alone(settings, options.host, self._guard, self._stack)
        assert options.key_file is not None
        return rendezvous.join(options.join, options.key_file, options.host, options.address)

    def _register(self, site: Site, master_port: int) -> Assignment | None:
        """This launcher's part of the job, or None if a signal came first."""
        registration = Registration(
            self._link, site, self._job, master_port, lambda: self._loop.post(lambda: None)
        )
        said = False
        while (assignment := registration.result()) is None:
            if self._stops:
                self._link.close()
                break
            before_s = time.monotonic()
            self._turn(None if said else _PATIENCE_S)
            if not said and time.monotonic() - before_s >= _PATIENCE_S:
                self._console.say(f"waiting for the job's other machines at {site.coordinator}")
                said = True
        registration.join()
        return assignment

    def _start(self, site: Site, assignment: Assignment) -> None:
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
        seats = plan.seats(self._job, placement, environ=self._environ, cores=cores)
        self._seats = {seat.worker_id: seat for seat in seats}
        self._supervision = Supervision(
            {seat.worker_id: seat.rank for seat in seats},
            host=site.host,
            grace_s=self._job.grace_s,
            verdict_s=self._timeouts.heartbeat_timeout_s + _VERDICT_MARGIN_S,
            replacements=Replacements(self._job.max_restarts),
        )
        for seat in seats:
            self._start_worker(seat)

    def _start_worker(self, seat: plan.Seat) -> None:
        try:
            pid = self._crew.start(seat, self._command, self._options.log_dir)
        except (OSError, SetupError) as error:
            reason = f"could not be started: {error}"
            self._exited(seat.worker_id, _CANNOT_START, reason)
            return
        self._link.worker_started(seat.worker_id)
        restarts = {"restart": seat.restart} if seat.restart else {}
        self._record("worker_started", seat.worker_id, pid=pid, **restarts)
        self._decide(stimuli.WorkerStarted(worker_id=seat.worker_id, pid=pid))

    def _watch(self) -> Outcome:
        while True:
            while self._inbox:
                self._hear(self._inbox.popleft())
            while self._stops:
                self._decide(stimuli.StopAsked(number=self._stops.popleft()))
            self._decide(stimuli.TimePassed())
            outcome = self._supervision.outcome
            if outcome is not None:
                return outcome
            deadline_s = self._supervision.deadline_s
            self._turn(None if deadline_s is None else deadline_s - time.monotonic())

    def _turn(self, timeout_s: float | None) -> None:
        """Wait for something to happen, and let it."""
        broken = self._console.broken
        self._crew.watch()
        self._console.watch()
        self._loop.run_once(timeout_s)
        if self._console.broken and not broken:
            self._stops.append(signal.SIGPIPE)

    def _finish(self, outcome: Outcome) -> int:
        self._crew.finish()
        failure = outcome.failure
        line = last_line(
            outcome,
            log=None if failure is None else self._crew.log_of(failure.worker_id),
            local=failure is not None and failure.worker_id in self._seats,
        )
        if lost := self._console.lost():
            self._console.say(f"part of the output above is missing: {lost}")
        if line is not None:
            self._console.say(line)
        limit_s = None if outcome.signal is None else self._job.grace_s
        self._console.finish(limit_s, give_up=lambda: bool(self._stops))
        return outcome.code

    def _decide(self, event: stimuli.Event) -> None:
        for action in self._supervision.handle(event, time.monotonic()):
            match action:
                case stimuli.Report():
                    self._link.worker_exited(action.worker_id, action.pid, action.code, action.reason)
                case stimuli.Restarting():
                    self._record(
                        "worker_restarting",
                        action.worker_id,
                        delay_s=action.delay_s,
                        restarts_left=action.restarts_left,
                    )
                case stimuli.Start():
                    self._start_worker(plan.replacement(self._seats[action.worker_id], action.restart))
                case stimuli.Terminate():
                    self._crew.terminate(action.worker_ids)
                case stimuli.Kill():
                    self._crew.kill(action.worker_ids)
                case stimuli.Say():
                    self._console.say(action.text)

    def _worker_exited(self, seat: plan.Seat, status: int) -> None:
        self._exited(seat.worker_id, exit_code(status), describe_exit(status))

    def _exited(self, worker_id: int, code: int, reason: str) -> None:
        self._record("worker_exited", worker_id, code=code, reason=reason)
        self._decide(stimuli.WorkerExited(worker_id=worker_id, code=code, reason=reason))

    def _receive(self, message: LauncherMessage) -> None:
        """On the link's thread."""
        self._loop.post(lambda: self._inbox.append(message))

    def _hear(self, message: LauncherMessage) -> None:
        match message:
            case JobEvent():
                self._write_event(message.event)
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
                self._decide(stimuli.JobFailed(failure=failure))
            case JobDone():
                self._decide(stimuli.JobDone())
            case Replaceable(worker_id=worker_id, reason=reason):
                self._decide(stimuli.Replaceable(worker_id=worker_id, reason=reason))
            case Expel(worker_id=worker_id, pid=pid, reason=reason):
                self._decide(stimuli.Expel(worker_id=worker_id, pid=pid, reason=reason))
            case CoordinatorLost():
                self._decide(stimuli.CoordinatorLost())
            case CoordinatorBack():
                self._decide(stimuli.CoordinatorBack())

    def _guard_died(self) -> None:
        self._loop.remove(self._guard.pidfd)
        self._guard.replace()
        self._loop.add_reader(self._guard.pidfd, self._guard_died)
        self._console.say("the guard process was killed; started another")

    def _record(self, event: str, worker_id: int, **details: Any) -> None:
        self._write_event(
            {
                "event": event,
                "worker_id": worker_id,
                "rank": self._seats[worker_id].rank,
                "host": self._options.host,
                **details,
            }
        )

    def _write_event(self, event: dict[str, Any]) -> None:
        if self._events is None:
            return
        try:
            self._events.write(event)
        except OSError as error:
            self._events = None
            self._console.say(f"{self._options.events} is cut off here: {error.strerror}")


def _make_log_dir(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot make the log directory {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise SetupError(f"the log directory {path} is not writable; choose another --log-dir")


def _wants_colour(environ: Mapping[str, str]) -> bool:
    """See https://no-color.org."""
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
