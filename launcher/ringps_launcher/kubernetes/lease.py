"""Holds the coordinator's Lease: asks the API server as `election` decides, and renews it on a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from ringps_launcher.kubernetes.election import (
    RENEW_S,
    RETRY_S,
    Decision,
    Election,
    Record,
    claim,
    release,
)
from ringps_launcher.kubernetes.errors import ClusterError, ConflictError
from ringps_launcher.kubernetes.outages import Outages

REQUEST_S = 4.0
"""How long one request may take: shorter than the time from a renewal to the Lease's end."""

_WHO = "lease"


class Api(Protocol):
    """What is needed of the API server."""

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """One object."""

    def patch(self, kind: str, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        """Change it; `ConflictError` if it is not the version that the patch names."""


class Lease:
    """This process's part in the election."""

    def __init__(
        self,
        api: Api,
        name: str,
        election: Election,
        outages: Outages,
        *,
        clock: Callable[[], float],
        time_of_day: Callable[[], float],
    ) -> None:
        """
        Args:
            api: to be asked with short timeouts (`REQUEST_S`).
            name: of the Lease, which exists.
            election: decides.
            outages: is told of failed requests.
            clock: monotonic.
            time_of_day: seconds since the epoch; only ever written, for people to read.
        """
        self._api = api
        self._name = name
        self._election = election
        self._outages = outages
        self._clock = clock
        self._time_of_day = time_of_day
        self._known: Record | None = None
        self._term = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether it is certain that no other coordinator rules. Never waits."""
        return self._election.held(self._clock())

    @property
    def held_until_s(self) -> float:
        """When that ends unless the Lease is renewed."""
        return self._election.held_until_s

    @property
    def term(self) -> str:
        """A word for this holding of the Lease that no other holding has; "" before there is one."""
        return self._term

    def attempt(self) -> tuple[Decision | None, str]:
        """Take or renew the Lease if that can be. Raises nothing of the API server's.

        Returns:
            What was done, or what stands against it (`WAIT`, `LOST`); None if the API server did not
            answer or another was faster. And why.
        """
        record, self._known = self._known, None
        try:
            if record is None:
                record = Record.of(self._api.get("Lease", self._name))
            decision, reason = self._election.decide(record, self._clock())
            if decision in (Decision.TAKE, Decision.RENEW):
                asked_s = self._clock()
                patch = claim(self._election, record, decision, _timestamp(self._time_of_day()))
                self._known = Record.of(self._api.patch("Lease", self._name, patch))
                self._election.renewed(self._known, asked_s)
                self._term = self._term or f"{self._election.identity}/{self._known.version}"
        except ConflictError as error:
            return None, str(error)  # it is read again, then there is more to say
        except ClusterError as error:
            self._outages.failed(_WHO, error)
            return None, str(error)
        self._outages.worked(_WHO)
        return decision, reason

    def acquire(self, stop: threading.Event, say: Callable[[str], None]) -> bool:
        """Wait for our turn, for ever; False if `stop` was set first."""
        said = ""
        while not stop.is_set():
            decision, reason = self.attempt()
            if decision in (Decision.TAKE, Decision.RENEW):
                return True
            if decision is Decision.WAIT and reason != said:
                said = reason
                say(f"waiting for Lease {self._name}: {reason}")
            stop.wait(RETRY_S)
        return False

    def keep(self, on_lost: Callable[[str], None]) -> None:
        """Renew it from now on, on a thread. `on_lost` is called there if another has taken it; no more
        attempts are made then."""
        self._thread = threading.Thread(target=self._keep, args=(on_lost,), name="ringps-lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop renewing, and let another have it at once. Call it when nothing is coordinated any more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        held, known = self.held, self._known
        self._election.given_up()
        if held and known is not None:
            try:
                self._api.patch("Lease", self._name, release(known, _timestamp(self._time_of_day())))
            except ClusterError:
                pass  # then it runs out

    def _keep(self, on_lost: Callable[[str], None]) -> None:
        wait_s = RENEW_S
        while not self._stop.wait(wait_s):
            decision, reason = self.attempt()
            if decision is Decision.LOST:
                self._election.given_up()
                on_lost(reason)
                return
            # Another was faster: who, is known at once.
            wait_s = RENEW_S if decision is not None else RETRY_S


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
