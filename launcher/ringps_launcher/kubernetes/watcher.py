"""Keeps a copy of what the API server holds of one selection of objects, on a thread.

It lists, watches from there, and lists again whenever the watch cannot go on without a gap. While the API
server is away, the copy stays as it was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from ringps_launcher.kubernetes.errors import ClusterError, ExpiredError
from ringps_launcher.kubernetes.outages import Outages

T = TypeVar("T")

WATCH_S = 120.0
"""How long one watch lasts, at most; the next goes on where it ended."""

_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 8.0
_HEALTHY_S = 5.0
"""A watch that lasted so long went well even if it had nothing to say."""


class Watch(Protocol):
    """A running watch."""

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Its events: (ADDED | MODIFIED | DELETED, object)."""

    def close(self) -> None:
        """End it, from any thread."""


class Source(Protocol):
    """A selection of objects."""

    def list(self) -> tuple[list[dict[str, Any]], str]:
        """All objects, and the version of the list. Raises `ClusterError`."""

    def watch(self, version: str, timeout_s: float) -> Watch:
        """What changes after that version. Iterating raises `ClusterError`."""


class Watcher(Generic[T]):
    """The copy of one selection."""

    def __init__(
        self,
        who: str,
        source: Source,
        view: Callable[[dict[str, Any]], T | None],
        changed: Callable[[], None],
        outages: Outages,
    ) -> None:
        """
        Args:
            who: what it watches, for threads' names and messages.
            source: the selection.
            view: what is kept of an object; None to leave it out.
            changed: called on the watcher's thread after every change; must not wait.
            outages: is told of failed requests.
        """
        self._who = who
        self._source = source
        self._view = view
        self._changed = changed
        self._outages = outages
        self._lock = threading.Lock()
        self._views: dict[str, T] | None = None
        self._version = ""
        self._watch: Watch | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"ringps-watch-{who}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def views(self) -> tuple[T, ...] | None:
        """All of them as last heard; None before the first answer."""
        with self._lock:
            return None if self._views is None else tuple(self._views.values())

    def close(self) -> None:
        """End, as soon as the request under way allows."""
        self._stop.set()
        with self._lock:
            watch = self._watch
        if watch is not None:
            watch.close()
        if self._thread.ident is not None:
            self._thread.join()

    # On its thread.

    def _run(self) -> None:
        backoff_s = 0.0
        while not self._stop.wait(backoff_s):
            try:
                if not self._version:
                    self._list()
                    self._outages.worked(self._who)
                went_well = self._follow()
                self._outages.worked(self._who)
            except ExpiredError:
                went_well, self._version = False, ""
            except ClusterError as error:
                if self._stop.is_set():
                    return
                # The watch may have broken amid an event; a list leaves no doubt.
                went_well, self._version = False, ""
                self._outages.failed(self._who, error)
            longer_s = min(_LONGEST_BACKOFF_S, max(_FIRST_BACKOFF_S, 2 * backoff_s))
            backoff_s = 0.0 if went_well else longer_s

    def _list(self) -> None:
        objects, version = self._source.list()
        with self._lock:
            self._views = {_uid(thing): view for thing in objects if (view := self._view(thing)) is not None}
            self._version = version
        self._changed()

    def _follow(self) -> bool:
        """One watch; whether it went well."""
        watch = self._source.watch(self._version, WATCH_S)
        with self._lock:
            self._watch = watch
        begun_s, heard = time.monotonic(), False
        try:
            if self._stop.is_set():
                return True
            for kind, thing in watch:
                heard = True
                self._take(kind, thing)
        finally:
            watch.close()
            with self._lock:
                self._watch = None
        # A watch that always ends at once, and says nothing, must not be asked for all the time.
        return heard or self._stop.is_set() or time.monotonic() - begun_s >= _HEALTHY_S

    def _take(self, kind: str, thing: dict[str, Any]) -> None:
        with self._lock:
            assert self._views is not None
            version = (thing.get("metadata") or {}).get("resourceVersion")
            if isinstance(version, str) and version:
                self._version = version
            if kind == "BOOKMARK":
                return
            view = None if kind == "DELETED" else self._view(thing)
            if view is None:
                self._views.pop(_uid(thing), None)
            else:
                self._views[_uid(thing)] = view
        self._changed()


def _uid(thing: dict[str, Any]) -> str:
    return str((thing.get("metadata") or {}).get("uid") or "")
