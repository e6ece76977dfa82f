"""`ringps run`: start this machine's workers, watch them, and end with the job's exit code.

Each start of the ring is an `attempt.Attempt`. After a failure that the ring does not survive, the
whole ring may be started again, from the latest checkpoint. Of a job on this machine alone this
launcher decides on that, otherwise the coordinator does. In a pod of a cluster the launcher also waits
for the next start when the job stopped because others had to go. Nothing is left behind on any way out: if
this process is killed itself, its guard kills the workers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from ringps import worker_env
from ringps.membership import (
    Coordinator,
    CoordinatorSettings,
    JobDone,
    JobEnded,
    JobFailed,
    JobKey,
    RingRestarts,
)
from ringps_launcher import outcome as ends
from ringps_launcher import rendezvous
from ringps_launcher.attempt import Attempt, Meeting
from ringps_launcher.job import Job
from ringps_launcher.options import Options
from ringps_launcher.outcome import Failure, Outcome
from ringps_launcher.rendezvous import Site
from ringps_launcher.replacement import Replacements
from ringps_launcher.tools import Tools


def run(job: Job, options: Options, environ: Mapping[str, str]) -> int:
    """Run the job's part on this machine; returns the exit code.

    Raises:
        RingpsError: it could not start; nothing of it runs any more.
        ValueError: a `RINGPS_*` setting in `environ` is malformed.
    """
    with ExitStack() as stack:
        return Launcher(job, options, environ, stack).run()


@dataclass
class _Standing:
    """What a start of the ring must know of those before it."""

    starts: int = 0
    replaced: int = 0
    """Workers that this launcher has replaced."""
    first_generation: int = 1


class Launcher:
    """All that one `ringps run` holds. `stack` undoes it, on whatever way out."""

    def __init__(self, job: Job, options: Options, environ: Mapping[str, str], stack: ExitStack) -> None:
        self._job = job
        self._options = options
        self._environ = environ
        self._timeouts = worker_env.configure(environ).timeouts
        self._tools = Tools(options, environ, stack)
        self._alone = options.join is None
        self._own_key: tuple[JobKey, str] | None = None
        self._ring_restarts = RingRestarts(job.max_restarts)
        self._standing = _Standing()

    def run(self) -> int:
        while True:
            delay_s = 0.0
            with ExitStack() as stack:
                meeting, coordinator = self._meet(stack)
                attempt = Attempt(self._job, self._options, self._environ, self._tools, meeting, stack)
                replacements = self._replacements()
                try:
                    outcome = attempt.run(replacements, self._standing.starts + self._standing.replaced)
                except JobEnded as ended:
                    outcome = _of_verdict(ended.verdict)
                again, outlook = self._plan_another(attempt, outcome, replacements)
                if again is None:
                    return self._finish(outcome, attempt.last_line(outcome, outlook))
                delay_s = again
            self._standing.starts += 1
            if coordinator is not None:
                self._standing.first_generation = coordinator.next_generation
            self._tools.pause(delay_s)
            if self._tools.stops:
                number = self._tools.stops.popleft()
                stopped = Outcome(code=128 + number, signal=number)
                return self._finish(stopped, ends.last_line(stopped, log=None, local=False))

    def _meet(self, stack: ExitStack) -> tuple[Meeting, Coordinator | None]:
        """How to meet the others, and the coordinator if it is our own."""
        options, standing = self._options, self._standing
        if options.join is not None:
            assert options.key_file is not None
            site, key = rendezvous.join(options.join, options.key_file, options.host, options.address)
            patience_s = self._timeouts.rendezvous_timeout_s if standing.starts else 0.0
            if options.place is not None:
                patience_s = float("inf")
            meeting = Meeting(site=site, key=key, alone=False, patience_s=patience_s, place=options.place)
            return meeting, None
        self._own_key = self._own_key or rendezvous.make_key(self._tools.guard)
        key, key_file = self._own_key
        settings = CoordinatorSettings(
            world_size=self._job.workers,
            min_workers=self._job.min_workers,
            encrypt_data=self._job.encrypt_data,
            timeouts=self._timeouts,
            first_generation=standing.first_generation,
        )
        coordinator = Coordinator(settings, key)
        stack.callback(coordinator.close)
        coordinator.start()
        site = Site(
            host=options.host,
            address=settings.host,
            coordinator=coordinator.address,
            key_file=key_file,
        )
        return Meeting(site=site, key=key, alone=True, patience_s=0.0), coordinator

    def _replacements(self) -> Replacements:
        if self._options.place is not None:
            return Replacements(None)
        spent = self._standing.replaced + (self._standing.starts if self._alone else 0)
        return Replacements(self._job.max_restarts, spent=spent)

    def _plan_another(
        self, attempt: Attempt, outcome: Outcome, replacements: Replacements
    ) -> tuple[float | None, str]:
        """How long to wait until another start of the ring, or None if there is none; and the outlook in
        words, which the user has been told of in the first case."""
        self._standing.replaced += replacements.started
        failure = outcome.failure
        if self._options.place is not None and outcome.suspended and outcome.signal is None:
            self._tools.console.say(f"{ends.stopped_at(outcome.saved)}; waiting for the others")
            return 0.0, ""
        if failure is None or not outcome.restarts:
            return None, ""
        if not self._alone:
            outlook = "the coordinator starts the whole ring again from the latest checkpoint"
            self._tools.console.say(f"{ends.failed(failure)}; {outlook}")
            return 0.0, outlook
        assert attempt.started_s is not None
        self._ring_restarts.began(attempt.started_s)
        planned, outlook = self._ring_restarts.plan(time.monotonic(), spent=self._standing.replaced)
        if planned is None:
            return None, outlook
        self._tools.console.say(f"{ends.failed(failure)}; {outlook}")
        self._tools.journal.write(
            {
                "event": "ring_restarting",
                "reason": ends.failed(failure),
                "restarts_left": planned.restarts_left,
                "delay_s": planned.delay_s,
            }
        )
        return planned.delay_s, outlook

    def _finish(self, outcome: Outcome, line: str | None) -> int:
        console = self._tools.console
        if lost := console.lost():
            console.say(f"part of the output above is missing: {lost}")
        if line is not None:
            console.say(line)
        limit_s = None if outcome.signal is None else self._job.grace_s
        console.finish(limit_s, give_up=lambda: bool(self._tools.stops))
        if self._options.place is not None and outcome.failure is not None:
            return worker_env.FAILED_CODE
        return outcome.code


def _of_verdict(verdict: JobFailed | JobDone) -> Outcome:
    """How a job ended that this launcher came too late for."""
    if isinstance(verdict, JobDone):
        return Outcome(code=0, suspended=verdict.suspended)
    failure = Failure(
        worker_id=verdict.worker_id,
        rank=verdict.rank,
        host=verdict.host,
        code=verdict.code,
        reason=verdict.reason,
    )
    return Outcome(code=failure.code, failure=failure, restarts=verdict.restarts)
