"""A launcher's link to the coordinator."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
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
    JobDone,
    JobEvent,
    JobFailed,
    LauncherHello,
    LauncherLeaving,
    Waiting,
    WorkerExited,
    clip,
    clip_line,
)

_log = logging.getLogger("ringps")


@dataclass(frozen=True)
class CoordinatorLost:
    """Nothing more will be heard from the coordinator. Training goes on without it."""

    reason: str


LauncherMessage = JobEvent | JobFailed | JobDone | CoordinatorLost


class LauncherLink:
    """Offers this machine's slots to the job, reports exits, and hears how the job goes."""

    def __init__(
        self,
        coordinator: str,
        key: JobKey | None,
        timeouts: Timeouts,
        on_message: Callable[[LauncherMessage], None],
    ) -> None:
        """
        Args:
            coordinator: `HOST:PORT` of its control socket.
            key: the job key; None for a job on loopback without one.
            timeouts: limits on waiting.
            on_message: called on the link's own thread; must return at once.
        """
        self._on_message = on_message
        self._channel = ControlChannel(coordinator, key, timeouts, TO_LAUNCHER, self)
        self._rendezvous = Rendezvous(self._channel, timeouts)
        self._registered = False
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
            ClosedError: `close` was called meanwhile.
        """
        hello = LauncherHello(
            host=clip_line(host),
            address=address,
            slots=slots,
            master_port=master_port,
            encrypt_data=encrypt_data,
            session=new_session(),
        )
        self._rendezvous.greet(hello, Waiting)
        return self._rendezvous.wait_for(Assignment, "the job's launchers did not come together")

    def worker_exited(self, worker_id: int, code: int, reason: str) -> None:
        """Report that a worker's process ended.

        Args:
            worker_id: one of those that this launcher was assigned.
            code: its exit code as a shell would give it: 128 + the signal for a killed process.
            reason: how it ended, in words.
        """
        self._channel.send(WorkerExited(worker_id=worker_id, code=code, reason=clip(reason)))

    def close(self) -> None:
        """End the link; a `register` that still waits raises. Safe to call again."""
        self._over = True
        self._channel.send(LauncherLeaving())
        self._rendezvous.fail(ClosedError("the link to the coordinator was closed"))
        self._channel.close(LAST_WORDS_S)

    # Called by the channel, on its thread.

    def on_message(self, message: Any) -> None:
        match message:
            case JobEvent():
                self._on_message(message)
            case JobFailed() | JobDone():
                first, self._over = not self._over, True
                if first:
                    self._on_message(message)
            case Assignment():
                self._registered = True
                self._rendezvous.deliver(message)
            case _:
                self._rendezvous.deliver(message)

    def on_gone(self, error: CoordinatorUnreachableError) -> None:
        self._rendezvous.fail(error)
        if self._registered and not self._over:
            _log.warning("%s; the workers go on without it", error)
            self._on_message(CoordinatorLost(str(error)))
