"""The blocking side of joining: say hello, then wait for what the coordinator makes of it."""

from __future__ import annotations

import queue
import secrets
import time
from typing import Any, TypeVar

from ringps.config import Timeouts
from ringps.errors import PeerLostError, RefusedError, SetupError
from ringps.membership.channel import ControlChannel
from ringps.wire.control import Ask, Hello, LauncherHello, Lost, Refused, Waiting

Answer = TypeVar("Answer")

_LAST_QUESTION_S = 1.0


class Rendezvous:
    """Messages cross from the channel's thread (`deliver`, `fail`) to the caller's (the rest)."""

    def __init__(self, channel: ControlChannel, timeouts: Timeouts) -> None:
        self._channel = channel
        self._timeouts = timeouts
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._deadline_s = 0.0

    def deliver(self, message: Any) -> None:
        """The coordinator said something."""
        self._inbox.put(message)

    def fail(self, error: Exception) -> None:
        """Whoever waits shall raise this."""
        self._inbox.put(error)

    def greet(self, hello: Hello | LauncherHello, answer: type[Answer]) -> Answer:
        """Connect, say hello and wait for the first `answer`.

        Raises:
            CoordinatorUnreachableError: nobody is there, or nobody answers within `connect_timeout_s`.
            AuthenticationError: the coordinator holds another key.
            RefusedError: it said no.
            PeerLostError: the ring has lost a worker already.
        """
        self._channel.open(hello)
        now_s = time.monotonic()
        self._deadline_s = now_s + self._timeouts.rendezvous_timeout_s
        try:
            return self._wait_for(answer, now_s + self._timeouts.connect_timeout_s)
        except TimeoutError:
            raise self._channel.unreachable() from None

    def next(self, answer: type[Answer], limit_s: float) -> Answer:
        """The next `answer` that is delivered.

        Raises:
            TimeoutError: none was within `limit_s`.
            RingpsError: as `greet`.
        """
        return self._wait_for(answer, time.monotonic() + limit_s)

    def wait_for(self, answer: type[Answer], goal: str) -> Answer:
        """Wait for an `answer`, until `rendezvous_timeout_s` after the hello.

        Args:
            goal: what should have come about, for the error's message.

        Raises:
            SetupError: it did not; the message says what the coordinator is waiting for.
            RefusedError, PeerLostError: as `greet`.
        """
        try:
            return self._wait_for(answer, self._deadline_s)
        except TimeoutError:
            raise SetupError(
                f"{goal} within {self._timeouts.rendezvous_timeout_s:g} s: {self._who_is_missing()}"
            ) from None

    def _who_is_missing(self) -> str:
        self._channel.send(Ask())
        try:
            return self._wait_for(Waiting, time.monotonic() + _LAST_QUESTION_S).reason
        except (TimeoutError, RefusedError, PeerLostError):
            return "the coordinator does not say why"

    def _wait_for(self, answer: type[Answer], deadline_s: float) -> Answer:
        while True:
            try:
                found = self._inbox.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None
            match found:
                case Exception():
                    raise found
                case Refused(reason=reason):
                    raise RefusedError(f"the coordinator at {self._channel.coordinator} refuses us: {reason}")
                case Lost():
                    raise lost_error(found)
            if isinstance(found, answer):
                return found


def new_session() -> str:
    """A random name for this process towards the coordinator, hard to guess for all others."""
    return secrets.token_hex(16)


def lost_error(lost: Lost) -> PeerLostError:
    """The error that tells a worker what `Lost` told its link."""
    return PeerLostError(rank=lost.rank, worker_id=lost.worker_id, host=lost.host, reason=lost.reason)
