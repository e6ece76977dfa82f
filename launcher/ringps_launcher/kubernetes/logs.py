"""`ringps logs`: the output of a job's pods, merged, each line marked with its worker's id."""

from __future__ import annotations

import argparse
import heapq
import io
import os
import sys
import threading
import time
from collections.abc import Iterator

from ringps_launcher.kubernetes import names, observe, show
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import ClusterError, ForbiddenError, NotFoundError
from ringps_launcher.kubernetes.fields import Object, holds, number
from ringps_launcher.kubernetes.following import Followed
from ringps_launcher.kubernetes.sources import COORDINATOR_ID, Source, chosen, read_line, unprefixed
from ringps_launcher.output import prefix_of, wants_colour


class Printer:
    """Writes marked lines, each at once and whole. May be used from several threads."""

    def __init__(self, out: io.RawIOBase | io.BytesIO, *, coloured: bool) -> None:
        """`out` has no buffer: its lock might be held by a thread that never ends."""
        self._out = out
        self._coloured = coloured
        self._lock = threading.Lock()
        self.broken = False
        """Nobody reads any more."""

    def line(self, worker_id: int, line: bytes) -> None:
        """Write a line of this worker, or of the coordinator."""
        prefix = (
            f"[{names.COORDINATOR}] ".encode()
            if worker_id == COORDINATOR_ID
            else prefix_of(worker_id, coloured=self._coloured)
        )
        with self._lock:
            if self.broken:
                return
            try:
                rest = memoryview(prefix + unprefixed(line, worker_id) + b"\n")
                while rest:
                    rest = rest[self._out.write(rest) or 0 :]
            except BrokenPipeError:
                self.broken = True


def run(options: argparse.Namespace) -> int:
    """Print what was asked for; the exit code."""
    if options.follow and options.previous:
        raise ValueError("--previous is about what has ended: leave out --follow")
    cluster = Cluster.connect(options.context, options.namespace)
    job = observe.job_called(cluster, options.name)
    _check_ranks(job, options.ranks)
    sys.stdout.flush()
    with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as out:
        printer = Printer(out, coloured=out.isatty() and wants_colour(os.environ))
        if options.follow and not (holds(job, "Complete") or holds(job, "Failed")):
            Followed(
                cluster,
                options.name,
                printer,
                ranks=frozenset(options.ranks),
                coordinator=options.coordinator,
                tail=options.tail,
                since_s=options.since,
                say=say,
            ).follow()
            return 0
        return recorded(
            cluster,
            options.name,
            printer,
            ranks=frozenset(options.ranks),
            coordinator=options.coordinator,
            previous=options.previous,
            tail=options.tail,
            since_s=options.since,
        )


def recorded(
    cluster: Cluster,
    name: str,
    printer: Printer,
    *,
    ranks: frozenset[int] = frozenset(),
    coordinator: bool = False,
    previous: bool = False,
    tail: int | None = None,
    since_s: int | None = None,
) -> int:
    """Print what the pods have written until now, in the order of the nodes' clocks; the exit code."""
    pods = cluster.list("Pod", labels=names.selector(name))
    sources = chosen(pods, ranks, coordinator=coordinator, previous=previous)
    if not sources:
        say(_nothing(cluster, name, previous=previous))
        return 1
    failures: list[str] = []

    def lines(source: Source) -> Iterator[tuple[int, int, bytes]]:
        latest = 0
        try:
            stream = cluster.logs(
                source.pod,
                container=source.container,
                previous=source.previous,
                tail=tail,
                since_s=since_s,
                timestamps=True,
            )
            with stream:
                for line in stream:
                    stamp, words = read_line(line)
                    # A clock that was set back must not tear a worker's own lines apart.
                    latest = max(latest, stamp or 0)
                    yield latest, source.worker_id, words
        except ForbiddenError:
            raise
        except NotFoundError:
            failures.append(f"the output of {source.who} is gone with its pod {source.pod}")
        except ClusterError as error:
            failures.append(f"the output of {source.who} cannot be read: {error}")

    for _, worker_id, words in heapq.merge(*map(lines, sources), key=lambda entry: entry[:2]):
        printer.line(worker_id, words)
        if printer.broken:
            return 0
    for failure in failures:
        say(failure)
    return 1 if failures else 0


def say(text: str) -> None:
    """A line of our own."""
    print(f"ringps: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _check_ranks(job: Object, ranks: list[int]) -> None:
    workers = number(job, "spec", "completions")
    wrong = [rank for rank in ranks if not 0 <= rank < workers]
    if wrong:
        raise ValueError(f"--rank {wrong[0]}: the job's workers are 0 to {workers - 1}")


def _nothing(cluster: Cluster, name: str, *, previous: bool) -> str:
    if previous:
        return (
            f"there is no earlier output of job {name}: no container was started again, and no pod replaced"
        )
    view = show.job(cluster, name, time.time())
    reason = f": {view.reasons[0].line}" if view.reasons else ""
    return f"job {name} has no output (it is {view.status}){reason}"
