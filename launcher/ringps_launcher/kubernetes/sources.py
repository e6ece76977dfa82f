"""PURE: whose output `ringps logs` prints, and how a line of it is read and marked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.fields import (
    Object,
    component_of,
    created,
    mapping,
    mappings,
    name_of,
    number,
    text,
    time_of,
    worker_id_of,
)

_STAMP = re.compile(
    rb"(?P<second>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(?P<fraction>\d{1,9}))?"
    rb"(?:Z|(?P<sign>[+-])(?P<hours>\d\d):(?P<minutes>\d\d)) "
)

COORDINATOR_ID = -1
"""Stands for the coordinator where others have their worker id."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The output of one container."""

    worker_id: int
    pod: str
    uid: str
    container: str
    instance: int = 0
    """How often the container was started before, in this pod."""
    previous: bool = False
    """Of the instance before that one."""

    @property
    def is_coordinator(self) -> bool:
        return self.worker_id == COORDINATOR_ID

    @property
    def who(self) -> str:
        """For messages."""
        return names.COORDINATOR if self.is_coordinator else f"worker {self.worker_id}"


def chosen(
    pods: Iterable[Object], ranks: Collection[int], *, coordinator: bool, previous: bool = False
) -> list[Source]:
    """Whose output is wanted: of each worker, the newest pod that has started.

    Args:
        pods: of one job.
        ranks: worker ids; empty for all.
        coordinator: the coordinator's too.
        previous: instead, what came before the present one: the container's instance before it, else the pod
            before it, as long as there is one.
    """
    of: dict[int, list[Object]] = {}
    for pod in sorted(pods, key=lambda pod: (created(pod), name_of(pod))):
        worker_id = id_of(pod)
        if worker_id is None or (worker_id == COORDINATOR_ID and not coordinator):
            continue
        if worker_id == COORDINATOR_ID or not ranks or worker_id in ranks:
            of.setdefault(worker_id, []).append(pod)
    found = []
    for _, own in sorted(of.items()):
        source = _previous(own) if previous else next(filter(None, map(source_of, reversed(own))), None)
        if source is not None:
            found.append(source)
    return found


def id_of(pod: Object) -> int | None:
    """A pod's worker id, or `COORDINATOR_ID`; None if it is neither's."""
    return COORDINATOR_ID if component_of(pod) == names.COORDINATOR else worker_id_of(pod)


def source_of(pod: Object) -> Source | None:
    """The present output of a pod; None if its container was never started."""
    worker_id, container = id_of(pod), component_of(pod)
    if worker_id is None:
        return None
    status = _status(pod)
    states = (mapping(status, "state"), mapping(status, "lastState"))
    if not any(isinstance(state.get(key), Mapping) for state in states for key in ("running", "terminated")):
        return None
    return Source(
        worker_id=worker_id,
        pod=name_of(pod),
        uid=text(pod, "metadata", "uid"),
        container=container,
        instance=number(status, "restartCount"),
    )


def is_running(pod: Object) -> bool:
    """Whether its container runs."""
    return isinstance(mapping(_status(pod), "state").get("running"), Mapping)


def has_ended(pod: Object) -> bool:
    """Whether it will write nothing more."""
    return text(pod, "status", "phase") in ("Succeeded", "Failed")


def read_line(line: bytes) -> tuple[int | None, bytes]:
    """A line of a log with timestamps: nanoseconds since 1970 (None if there are none), and the rest."""
    stamp = _STAMP.match(line)
    if stamp is None:
        return None, line
    second = time_of(stamp["second"].decode() + "Z") or 0.0
    offset_s = 0
    if stamp["sign"]:
        offset_s = int(stamp["hours"]) * 3600 + int(stamp["minutes"]) * 60
        offset_s = -offset_s if stamp["sign"] == b"-" else offset_s
    fraction = int((stamp["fraction"] or b"0").ljust(9, b"0"))
    return (int(second) - offset_s) * 1_000_000_000 + fraction, line[stamp.end() :]


def unprefixed(line: bytes, worker_id: int) -> bytes:
    """Without the mark that the launcher in the pod puts before its worker's lines: ours takes its place."""
    return line.rstrip(b"\r").removeprefix(b"[%d] " % worker_id) if worker_id >= 0 else line.rstrip(b"\r")


def _previous(own: list[Object]) -> Source | None:
    """`own` are the pods of one worker, the oldest first."""
    for position in range(len(own) - 1, -1, -1):
        present = source_of(own[position])
        if present is None:
            continue
        if number(_status(own[position]), "restartCount"):
            return Source(
                worker_id=present.worker_id,
                pod=present.pod,
                uid=present.uid,
                container=present.container,
                instance=present.instance - 1,
                previous=True,
            )
        return next(filter(None, map(source_of, reversed(own[:position]))), None)
    return None


def _status(pod: Object) -> Object:
    for status in mappings(pod, "status", "containerStatuses"):
        if status.get("name") == component_of(pod):
            return status
    return {}
