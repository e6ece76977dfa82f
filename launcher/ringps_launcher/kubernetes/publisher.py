"""Writes the status ConfigMap, on a thread: the newest state only, and never more often than is useful.

Only the coordinator that holds the Lease may write. The first thing that a new one does is to put its term
into the ConfigMap; from then on, a write of an earlier one that was held up on the way is refused, for every
write names the version that it is about.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from ringps_launcher.kubernetes.errors import (
    ClusterError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
)
from ringps_launcher.kubernetes.lease import Api
from ringps_launcher.kubernetes.outages import Outages

INTERVAL_S = 2.0
"""From one write to the next."""

PRESSING_S = 0.2
"""The same for what is to be seen at once."""

HEARTBEAT_S = 10.0
"""It is written so often even when nothing changes, so that one sees that somebody looks after it."""

BYTES_PER_S = 50_000
"""The statuses of large rings are written less often."""

WRITER_ANNOTATION = "ringps.dev/coordinator"

_RETRY_S = 1.0
_REFUSED_RETRY_S = 10.0
_WHO = "status"
_REFUSALS = (NotFoundError, ForbiddenError, InvalidError)


class Publisher:
    """The writer of one ConfigMap, which exists."""

    def __init__(
        self,
        api: Api,
        name: str,
        build: Callable[[], Mapping[str, str]],
        may_write: Callable[[], bool],
        outages: Outages,
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            api: to be asked with short timeouts.
            name: of the ConfigMap.
            build: gives the data as it is now; entries that it leaves out stay as they are.
            may_write: whether the Lease is held.
            outages: is told of failed requests.
            clock: monotonic.
        """
        self._api = api
        self._name = name
        self._build = build
        self._may_write = may_write
        self._outages = outages
        self._clock = clock
        self._version = ""
        self._term = ""
        self._changed = threading.Condition()
        self._wanted = 0
        self._pressing = False
        self._written = 0
        self._refused = 0
        """Up to which number it was refused for good."""
        self._next_s = 0.0
        self._soonest_s = 0.0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ringps-status", daemon=True)

    def claim(self, term: str) -> Mapping[str, Any]:
        """Become its writer; what an earlier one has left. Raises `ClusterError`; then it is tried again
        before the first write.

        Args:
            term: a word for this holding of the Lease that no other holding has.
        """
        self._term = term
        thing = self._api.get("ConfigMap", self._name)
        metadata = {
            "resourceVersion": _version(thing),
            "annotations": {WRITER_ANNOTATION: term},
        }
        self._version = _version(self._api.patch("ConfigMap", self._name, {"metadata": metadata}))
        self._outages.worked(_WHO)
        data = thing.get("data")
        return data if isinstance(data, Mapping) else {}

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def nudge(self, *, pressing: bool = False) -> int:
        """Something has changed. Never waits; returns a number for `wait`."""
        with self._changed:
            self._wanted += 1
            self._pressing = self._pressing or pressing
            self._changed.notify_all()
            return self._wanted

    def wait(self, number: int) -> bool:
        """Wait until what had changed at that `nudge` is written. False if it cannot be (the ConfigMap is
        gone, or we have no right to write it), or after `close`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._written >= number or self._refused >= number or self._closing
            )
            return self._written >= number

    def close(self) -> None:
        """Write once more what is not written yet, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    # On its thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closing and (wait_s := self._due_s() - self._clock()) > 0:
                    self._changed.wait(min(wait_s, HEARTBEAT_S))
                last, dirty = self._closing, self._wanted > self._written
                number, self._pressing = self._wanted, False
            if self._may_write() and (dirty or not last):
                self._write(number)
            else:
                self._soonest_s = self._next_s = self._clock() + _RETRY_S
            if last:
                return

    def _due_s(self) -> float:
        if self._wanted == self._written:
            return self._next_s - INTERVAL_S + HEARTBEAT_S
        return self._soonest_s if self._pressing else self._next_s

    def _write(self, number: int) -> None:
        data = dict(self._build())
        interval_s = max(INTERVAL_S, sum(map(len, data.values())) / BYTES_PER_S)
        soonest_s = PRESSING_S
        refused = False
        try:
            if not self._version:
                self.claim(self._term)
            self._version = _version(self._api.patch("ConfigMap", self._name, self._patch(data)))
        except ConflictError:
            interval_s = soonest_s = PRESSING_S if self._read_again() else _RETRY_S
        except ClusterError as error:
            refused = isinstance(error, _REFUSALS)
            if isinstance(error, NotFoundError):
                self._version = ""
            interval_s, soonest_s = _REFUSED_RETRY_S if refused else _RETRY_S, _RETRY_S
            self._outages.failed(_WHO, error)
        else:
            self._outages.worked(_WHO)
            with self._changed:
                self._written = number
        now_s = self._clock()
        with self._changed:
            self._next_s, self._soonest_s = now_s + interval_s, now_s + soonest_s
            if self._written < number and not refused:
                self._pressing = True
            if refused:
                self._refused = number
            self._changed.notify_all()

    def _patch(self, data: dict[str, str]) -> dict[str, Any]:
        metadata = {"resourceVersion": self._version, "annotations": {WRITER_ANNOTATION: self._term}}
        return {"metadata": metadata, "data": data}

    def _read_again(self) -> bool:
        """Somebody else wrote: read what is there now. Whether that may be overwritten, the Lease says: it
        is asked again before the next write. False if it could not be read."""
        try:
            thing = self._api.get("ConfigMap", self._name)
        except ClusterError as error:
            self._outages.failed(_WHO, error)
            return False
        self._version = _version(thing)
        return True


def _version(thing: Mapping[str, Any]) -> str:
    return str((thing.get("metadata") or {}).get("resourceVersion") or "")
