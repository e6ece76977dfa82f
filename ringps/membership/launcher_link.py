"""A launcher's link to the coordinator."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ringps.config import Timeouts
from ringps.errors import ClosedError, CoordinatorUnreachableError
from ringps.membership.channel import ControlChannel
from ringps.membership.client import LAST_WORDS_S
from ringps.membership.rendezvous import Rendezvous, new_session
from ringps.transport.keys import JobKey
from ringps.wire.control import (
    TO_LAUNCHER,
    Assignment,
    Evict,
    Expel,
    JobDone,
    JobEvent,
    JobFailed,
    LauncherHello,
    LauncherLeaving,
    Refused,
    Replaceable,
    Waiting,
    WorkerExited,
    clip,
    clip_line,
)

_log = logging.getLogger("ringps")


@dataclass(frozen=True)
class CoordinatorLost:
    """The coordinator does not answer any more. Training goes on without it."""

    reason: str


@dataclass(frozen=True)
class CoordinatorBack:
    """The coordinator, or one started in its place, answers again after `CoordinatorLost`."""


class JobEnded(Exception):
    """The job ended before this launcher could take part in it."""

    def __init__(self, verdict: JobFailed | JobDone) -> None:
        super().__init__("the job has ended")
        self.verdict = verdict


LauncherMessage = (
    JobEvent | JobFailed | JobDone | Replaceable | Expel | Evict | CoordinatorLost | CoordinatorBack
)


class LauncherLink:
    """Offers this machine's slots to the job, reports exits, and hears how the job goes.

    The coordinator may be restarted: every connection after the first begins with what one that
    knows nothing has to know of this machine, which is our assignment, and the workers that ended.
    """

    def __init__(
        self,
        coordinator: str,
        key: JobKey | None,
        timeouts: Timeouts,
        on_message: Callable[[LauncherMessage], None],
        *,
        place: int | None = None,
    ) -> None:
        """
        Args:
            coordinator: `HOST:PORT` of its control socket.
            key: the job key; None for a job on loopback without one.
            timeouts: limits on waiting.
            on_message: called on the link's own thread; must return at once.
            place: the first of this launcher's worker ids, if something else than the coordinator deals them
                out. Then a coordinator that does not take this launcher back has it start anew.
        """
        self._place = place
        self._on_message = on_message
        self._channel = ControlChannel(coordinator, key, timeouts, TO_LAUNCHER, self)
        self._rendezvous = Rendezvous(self._channel, timeouts)
        self._hello: LauncherHello | None = None
        self._assignment: Assignment | None = None
        self._ended: dict[int, WorkerExited] = {}
        self._lock = threading.Lock()
        self._lost = False
        self._misplaced = False
        self._over = False

    def register(
        self, host: str, address: str, slots: int, master_port: int, encrypt_data: bool
    ) -> Assignment:
        """Offer `slots` workers; blocks until the plan of the whole job is known.

        Args:
            host: the name by which messages call this machine.
            address: IP address at which other machines reach this one.
            slots: workers to start here.
            master_port: a free port here, for the job's MASTER_PORT should this launcher be its first.
            encrypt_data: whether the job's data connections must be encrypted.

        Raises:
            CoordinatorUnreachableError: nobody answers at the coordinator's address.
            AuthenticationError: the coordinator holds another key.
            RefusedError: the job has no room for this launcher, and why.
            SetupError: other launchers did not come within `rendezvous_timeout_s`.
            JobEnded: the job is over.
            ClosedError: `close` was called meanwhile.
        """
        self._hello = LauncherHello(
            host=clip_line(host),
            address=address,
            slots=slots,
            master_port=master_port,
            encrypt_data=encrypt_data,
            first_worker_id=None,
            world_size=None,
            place=self._place,
            session=new_session(),
        )
        self._rendezvous.greet(self._hello, Waiting)
        return self._rendezvous.wait_for(Assignment, "the job's launchers did not come together")

    def worker_started(self, worker_id: int) -> None:
        """A process runs for this worker: how one before it ended is not reported again."""
        with self._lock:
            if self._ended.pop(worker_id, None) is not None:
                self._greet_with_what_is_known()

    def worker_exited(
        self, worker_id: int, pid: int, code: int, reason: str, *, stopping: bool = False
    ) -> None:
        """Report that a worker's process ended. While the coordinator is away, the report waits.

        Args:
            worker_id: one of those that this launcher was assigned.
            pid: the process; 0 if it could not be started.
            code: its exit code as a shell would give it: 128 + the signal for a killed process.
            reason: how it ended, in words.
            stopping: whether this launcher had been told to stop.
        """
        exited = WorkerExited(worker_id=worker_id, pid=pid, code=code, reason=clip(reason), stopping=stopping)
        with self._lock:
            self._ended[worker_id] = exited
            self._greet_with_what_is_known()
        self._channel.send(exited)

    def close(self) -> None:
        """End the link; a `register` that still waits raises. Safe to call again."""
        self._over = True
        self._channel.send(LauncherLeaving())
        self._rendezvous.fail(ClosedError("the link to the coordinator was closed"))
        self._channel.close(LAST_WORDS_S)

    # Called by the channel, on its thread.

    def on_message(self, message: Any) -> None:
        match message:
            case Waiting() | Refused() | Assignment():
                self._on_answer(message)
                return
            case _ if self._misplaced:
                return  # it speaks of other workers than ours
        self._hear_again()
        match message:
            case JobEvent() | Replaceable() | Expel() | Evict():
                self._on_message(message)
            case JobFailed() | JobDone() if self._assignment is None and self._place is not None:
                self._rendezvous.fail(JobEnded(message))
            case JobFailed() | JobDone():
                self._end(message)

    def _on_answer(self, answer: Waiting | Refused | Assignment) -> None:
        """To our hello: the first one, or one with which we came back."""
        if self._assignment is None:
            if isinstance(answer, Assignment):
                with self._lock:
                    self._assignment = answer
                    self._greet_with_what_is_known()
            self._rendezvous.deliver(answer)
        elif isinstance(answer, Refused) and self._place is not None:
            assert self._hello is not None
            self._end(
                JobFailed(
                    worker_id=self._place,
                    rank=self._place,
                    host=self._hello.host,
                    code=1,
                    reason=clip(f"the coordinator does not take us back: {answer.reason}"),
                    restarts=True,
                )
            )
        elif isinstance(answer, Refused):
            coordinator = self._channel.coordinator
            self._lose(f"the coordinator at {coordinator} does not take us back: {answer.reason}")
        elif isinstance(answer, Assignment):
            self._compare(self._assignment, answer)

    def on_gone(self, error: CoordinatorUnreachableError) -> None:
        self._rendezvous.fail(error)
        if self._assignment is not None:
            self._lose(str(error))

    def _end(self, verdict: JobFailed | JobDone) -> None:
        first, self._over = not self._over, True
        if first:
            self._on_message(verdict)

    def _lose(self, reason: str) -> None:
        if not self._lost and not self._over:
            self._lost = True
            _log.warning("%s; the workers go on without it", reason)
            self._on_message(CoordinatorLost(reason))

    def _hear_again(self) -> None:
        if self._lost:
            self._lost = False
            self._on_message(CoordinatorBack())

    def _compare(self, ours: Assignment, again: Assignment) -> None:
        """A coordinator that was restarted must give us the place that our workers have."""
        place, given = (ours.first_worker_id, ours.world_size), (again.first_worker_id, again.world_size)
        self._misplaced = given != place
        if self._misplaced:
            self._lose(
                f"the coordinator at {self._channel.coordinator} knows our first worker as worker {given[0]} "
                f"of {given[1]}, while it is worker {place[0]} of {place[1]}"
            )
        else:
            self._hear_again()

    def _greet_with_what_is_known(self) -> None:
        """Under the lock."""
        hello, ours = self._hello, self._assignment
        if hello is None or ours is None:
            return
        hello = replace(hello, first_worker_id=ours.first_worker_id, world_size=ours.world_size)
        self._channel.greet_with(hello, *self._ended.values())
