"""Follows the output of a job's pods as it is written: a thread for each container, and for those that come
in their place, until the job is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import (
    ClusterError,
    ConflictError,
    ExpiredError,
    InvalidError,
    NotFoundError,
    UnreachableError,
)
from ringps_launcher.kubernetes.fields import Object, holds, text
from ringps_launcher.kubernetes.sources import (
    COORDINATOR_ID,
    Source,
    chosen,
    has_ended,
    id_of,
    is_running,
    read_line,
    source_of,
)
from ringps_launcher.kubernetes.stream import Stream

_WATCH_S = 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.7, 10.0
"""How often one looks whether the job is over, while no pod of it runs."""
_RETRY_S = 1.0
_OVERLAP_S = 60
"""Asked for once more after an interruption: what counts is when the request reaches the node."""
_END_S = 1.0
"""A thread that waits for our own reader does not end in time; the process can."""
_DRAIN_S = 5.0
"""What a pod wrote last may come a little after its end; a dead node's never comes."""


class Lines(Protocol):
    """Where lines go."""

    broken: bool

    def line(self, worker_id: int, line: bytes) -> None: ...


@dataclass
class _Printed:
    """How far one container's output is printed."""

    until_ns: int = 0
    """Time of the last line, in nanoseconds since 1970."""


class Followed:
    """The output of one job."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        lines: Lines,
        *,
        ranks: Collection[int] = (),
        coordinator: bool = False,
        tail: int | None = None,
        since_s: int | None = None,
        say: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self._name = name
        self._lines = lines
        self._ranks = ranks
        self._coordinator = coordinator
        self._tail = tail
        self._since_s = since_s
        self._say = say
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._met: set[tuple[str, int]] = set()
        """Pod uid and instance of its container: these are followed, or were passed over."""
        self._is_new = True
        self._streams: dict[Source, Stream[bytes]] = {}
        self._watch: Stream[Any] | None = None
        self._ends = threading.Event()
        self._trouble: ClusterError | None = None
        self._outage_told = False
        self._alive: set[str] = set()
        """The uids of the workers' pods that have not ended."""
        self._version = ""
        self._pause_s = _FIRST_PAUSE_S

    def follow(self) -> None:
        """Print until the job is over, or nobody reads any more.

        Raises:
            ClusterError: what is asked for is not allowed.
        """
        try:
            while not self._ends.is_set():
                over = self._patiently(self._is_over)
                self._patiently(self._look)
                if over:
                    self._join(_DRAIN_S)
                    break
                self._patiently(self._wait)
        finally:
            self.close()
            self._join(_END_S)
        if self._trouble is not None:
            raise self._trouble

    def close(self) -> None:
        """End `follow`; from any thread."""
        self._ends.set()
        with self._lock:
            streams: list[Stream[Any]] = list(self._streams.values())
            if self._watch is not None:
                streams.append(self._watch)
        for stream in streams:
            stream.close()

    # -- the main thread: which pods there are

    def _look(self) -> None:
        """Meet the pods that there are; of those that are there at the start, the newest of each worker."""
        pods, self._version = self._cluster.list_with_version("Pod", labels=names.selector(self._name))
        if self._is_new:
            newest = chosen(pods, self._ranks, coordinator=self._coordinator)
            passed_over = [source for source in map(source_of, pods) if source and source not in newest]
            self._met.update((source.uid, source.instance) for source in passed_over)
        self._alive = {text(pod, "metadata", "uid") for pod in pods if _counts(pod)}
        for pod in pods:
            self._meet(pod)
        self._is_new = False

    def _wait(self) -> None:
        """Until all workers have ended: it may be over then. While there are none, look now and then."""
        if self._alive:
            self._pause_s = _FIRST_PAUSE_S
        else:
            self._pause_s = min(_LONGEST_PAUSE_S, self._pause_s * 1.5)
        watch = self._cluster.watch(
            "Pod",
            labels=names.selector(self._name),
            resource_version=self._version,
            timeout_s=_WATCH_S if self._alive else self._pause_s,
        )
        with self._lock:
            self._watch = watch
        with watch:
            if self._ends.is_set():
                return
            for kind, pod in watch:
                was_busy = bool(self._alive)
                uid = text(pod, "metadata", "uid")
                if kind == "DELETED":
                    self._alive.discard(uid)
                    self._part(uid)
                else:
                    (self._alive.add if _counts(pod) else self._alive.discard)(uid)
                    self._meet(pod)
                if self._ends.is_set() or (was_busy and not self._alive):
                    return

    def _meet(self, pod: Object) -> None:
        """Follow the pod's container, if it is one of those that are asked for, and new."""
        worker_id = id_of(pod)
        if worker_id is None or (worker_id == COORDINATOR_ID and not self._coordinator):
            return
        if worker_id != COORDINATOR_ID and self._ranks and worker_id not in self._ranks:
            return
        source = source_of(pod)
        if source is None or (source.uid, source.instance) in self._met:
            return
        self._met.add((source.uid, source.instance))
        # Of what begins while we look on, nothing is left out.
        tail = self._tail if self._is_new else None
        thread = threading.Thread(
            target=self._read, args=(source, tail), name=f"logs-{source.pod}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _part(self, uid: str) -> None:
        """The pod is gone: end what still waits for its node."""
        with self._lock:
            streams = [stream for source, stream in self._streams.items() if source.uid == uid]
        for stream in streams:
            timer = threading.Timer(_DRAIN_S, stream.close)
            timer.daemon = True
            timer.start()

    def _is_over(self) -> bool:
        try:
            job = self._cluster.get("Job", self._name)
        except NotFoundError:
            return True
        return holds(job, "Complete") or holds(job, "Failed")

    def _patiently(self, action: Callable[[], bool | None]) -> bool:
        """Do it; while the API server is away, try again later."""
        try:
            done = bool(action())
        except ExpiredError:
            return False
        except UnreachableError as error:
            if not self._outage_told and not self._ends.is_set():
                self._say(f"{error}; trying again until it answers")
            self._outage_told = True
            self._ends.wait(_RETRY_S)
            return False
        self._outage_told = False
        return done

    def _join(self, limit_s: float) -> None:
        end = time.monotonic() + limit_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    # -- the other threads: one container each

    def _read(self, source: Source, tail: int | None) -> None:
        try:
            self._read_to_its_end(source, tail)
        except ClusterError as error:
            self._trouble = self._trouble or error
            self.close()
        finally:
            with self._lock:
                self._streams.pop(source, None)

    def _read_to_its_end(self, source: Source, tail: int | None) -> None:
        """Returns when the container has ended, or its pod is gone."""
        printed = _Printed()
        while not self._ends.is_set():
            try:
                self._read_on(source, printed, tail)
                if self._has_ended(source):
                    return
            except NotFoundError:
                return
            except (UnreachableError, InvalidError, ConflictError):
                # Its node, or the API server, is away; or the container is not quite there yet.
                if self._is_gone(source):
                    return
            self._ends.wait(_RETRY_S)

    def _read_on(self, source: Source, printed: _Printed, tail: int | None) -> None:
        """Print what was written after what is printed, until the container ends or the connection does."""
        since_s = self._since_s
        if printed.until_ns:
            since_s, tail = max(0, round(time.time() - printed.until_ns / 1e9)) + _OVERLAP_S, None
        stream = self._cluster.logs(
            source.pod,
            container=source.container,
            follow=True,
            tail=tail,
            since_s=since_s,
            timestamps=True,
        )
        with self._lock:
            self._streams[source] = stream
        with stream:
            if self._ends.is_set():
                return
            for line in stream:
                stamp, words = read_line(line)
                if self._ends.is_set():
                    return
                if stamp is None or stamp > printed.until_ns:
                    printed.until_ns = max(printed.until_ns, stamp or 0)
                    self._lines.line(source.worker_id, words)
                    if self._lines.broken:
                        self.close()

    def _has_ended(self, source: Source) -> bool:
        """Whether this instance of the container runs no more: else, only the connection has ended."""
        pod = self._cluster.get("Pod", source.pod)
        present = source_of(pod)
        if text(pod, "metadata", "uid") != source.uid or present is None:
            return True
        return present.instance != source.instance or not is_running(pod)

    def _is_gone(self, source: Source) -> bool:
        try:
            return text(self._cluster.get("Pod", source.pod), "metadata", "uid") != source.uid
        except NotFoundError:
            return True
        except UnreachableError:
            return False


def _counts(pod: Object) -> bool:
    """Whether it is a worker's pod that may still write."""
    return id_of(pod) not in (None, COORDINATOR_ID) and not has_ended(pod)
