"""PURE: a job as people see it, put together from its objects and from the coordinator's status document.

The objects say what is to run and what runs; the document says what the ring does. Either may be missing or
old: then the view says so, and shows what the other knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ringps_launcher.kubernetes import endings, kueue, names, pending, sightings
from ringps_launcher.kubernetes.explain import Reason, why
from ringps_launcher.kubernetes.fields import (
    Object,
    component_of,
    condition,
    created,
    holds,
    label,
    mapping,
    mappings,
    name_of,
    number,
    one_line,
    text,
    time_of,
    worker_id_of,
)
from ringps_launcher.kubernetes.surroundings import Surroundings

STALE_S = 30.0
"""The coordinator writes its document at least every 10 s while it works."""

_OVER = ("done", "failed")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What was read from the API server about one job, at one time."""

    job: Object
    """The worker Job."""
    coordinator: Object | None = None
    """The coordinator's Job."""
    pods: Sequence[Object] | None = ()
    """None if they may not be read."""
    status: Object | None = None
    """The status ConfigMap."""
    events: Sequence[Object] = ()
    quotas: Sequence[Object] = ()
    nodes: Sequence[Object] | None = None
    """None if they may not be read."""
    workload: Object | None = None
    unseen: tuple[str, ...] = ()
    """What could not be looked at, and why; one line each."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A worker in the ring."""

    rank: int
    worker_id: int
    pod: str
    node: str
    zone: str
    rack: str
    note: str = ""
    """What is odd about its pod."""


@dataclass(frozen=True, kw_only=True)
class Outsider:
    """A pod that is not in the ring."""

    pod: str
    worker_id: int | None
    """None for the coordinator's."""
    node: str
    state: str
    """`pending`, `starting`, `running`, `joining`, `ending`, `stopped`, `failed`, `done`."""
    why: str


@dataclass(frozen=True, kw_only=True)
class JobView:
    """What `ls` and `status` show. Times are seconds since 1970."""

    name: str
    namespace: str
    status: str
    """`pending` (pods are missing or do not start), `waiting` (for the ring to form), `running`, `stopping`,
    `suspended`, `queued` (Kueue holds it back), `cancelling`, `done` or `failed`."""
    summary: str
    """Why it is so, in one line; empty when it runs as it should."""
    reasons: tuple[Reason, ...]
    workers: int
    min_workers: int
    created: float
    ended: float | None
    stale_s: float | None
    """Age of the status document if nobody keeps it up to date though somebody should."""
    document: Mapping[str, Any]
    """The coordinator's status document; empty if there is none."""
    members: tuple[Member, ...]
    outsiders: tuple[Outsider, ...]
    unseen: tuple[str, ...]

    @property
    def is_over(self) -> bool:
        """Whether nothing of it will run any more."""
        return self.status in _OVER

    def as_json(self, now: float) -> dict[str, Any]:
        """For programs."""
        document = {key: value for key, value in self.document.items() if key not in ("members", "version")}
        return {
            **document,
            "name": self.name,
            "namespace": self.namespace,
            "status": self.status,
            "summary": self.summary,
            "world_size": self.workers,
            "min_workers": self.min_workers,
            "age_s": round(now - self.created, 3),
            "ended": self.ended,
            "stale_s": self.stale_s,
            "waits_for": [
                {"kind": r.kind, "who": r.who, "what": r.words, "advice": r.advice} for r in self.reasons
            ],
            "members": [vars(member) for member in self.members],
            "other_pods": [vars(outsider) for outsider in self.outsiders],
            "unseen": list(self.unseen),
        }


def look(snapshot: Snapshot, now: float) -> JobView:
    """The job as of `now`."""
    job = snapshot.job
    document = _document(snapshot.status)
    verdict = text(snapshot.status or {}, "data", names.VERDICT_ENTRY)
    suspended = mapping(job, "spec").get("suspend") is True
    reasons = _reasons(snapshot, now)
    status = _status(snapshot, document, verdict)
    stale_s = _stale_s(document, status, now)
    members = (
        _members(document, snapshot.pods, suspended=suspended)
        if status not in (*_OVER, "suspended", "queued")
        else ()
    )
    return JobView(
        name=name_of(job),
        namespace=text(job, "metadata", "namespace"),
        status=status,
        summary=_summary(snapshot, status, verdict, document, reasons),
        reasons=reasons,
        workers=_workers(job),
        min_workers=_annotated(job, names.MIN_WORKERS_ANNOTATION, 1),
        created=created(job),
        ended=_ended(job),
        stale_s=stale_s,
        document=document,
        members=members,
        outsiders=_outsiders(snapshot, members, document, now),
        unseen=snapshot.unseen,
    )


def _reasons(snapshot: Snapshot, now: float) -> tuple[Reason, ...]:
    found = why(
        snapshot.job,
        snapshot.pods or (),
        snapshot.events,
        snapshot.quotas,
        snapshot.nodes,
        snapshot.workload,
        now=now,
        coordinator=snapshot.coordinator,
    )
    if snapshot.pods is None:  # that none is seen does not mean that there are none
        found = [reason for reason in found if not reason.who]
    return tuple(found)


def _document(config: Object | None) -> Mapping[str, Any]:
    """What the coordinator wrote; nothing of it if it is no JSON object."""
    try:
        found = json.loads(text(config or {}, "data", names.STATUS_ENTRY) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _status(snapshot: Snapshot, document: Mapping[str, Any], verdict: str) -> str:
    job = snapshot.job
    if text(job, "metadata", "deletionTimestamp"):
        return "cancelling"
    if holds(job, "Complete") or verdict == "done":
        return "done"
    if holds(job, "Failed") or holds(job, "FailureTarget") or verdict.startswith("failed"):
        return "failed"
    alive = number(job, "status", "active") > 0
    if snapshot.pods is not None:
        alive = any(
            component_of(pod) == names.WORKER and text(pod, "status", "phase") not in ("Succeeded", "Failed")
            for pod in snapshot.pods
        )
    if mapping(job, "spec").get("suspend") is True:
        if alive:
            return "stopping"
        queued = label(job, names.QUEUE_LABEL) and kueue_holds(snapshot.workload)
        return "queued" if queued else "suspended"
    phase = text(document, "phase")
    if phase in ("running", "stopping") and alive:
        return phase
    return "waiting" if alive and phase else "pending"


def kueue_holds(workload: Object | None) -> bool:
    """Whether a suspended job waits for Kueue, and not for a user."""
    return workload is None or kueue.explain(workload, "", "").kind == "queue"


def _summary(
    snapshot: Snapshot,
    status: str,
    verdict: str,
    document: Mapping[str, Any],
    reasons: Sequence[Reason],
) -> str:
    job = snapshot.job
    if status == "failed":
        _, _, reason = verdict.partition("failed: ")
        return one_line(reason) or _failure(job, reasons)
    if status == "done":
        return ""
    if status == "cancelling":
        return "it is being removed"
    told = reasons[0].text if reasons else ""
    said = one_line(text(document, "reason"))
    if status == "running":
        # Why the present generation was formed is no news once it trains.
        return told
    if status == "stopping":
        return said or told
    return told or said


def _failure(job: Object, reasons: Sequence[Reason]) -> str:
    failed = condition(job, "Failed") or condition(job, "FailureTarget")
    reason, message = text(failed, "reason"), one_line(text(failed, "message"))
    if reason == "DeadlineExceeded" and reasons:
        return reasons[0].words
    if reason == "BackoffLimitExceeded":
        return "its program cannot be started: too many pods ended at once"
    return message or reason or "no reason given"


def _stale_s(document: Mapping[str, Any], status: str, now: float) -> float | None:
    updated = document.get("updated")
    if status not in ("running", "stopping", "waiting") or not isinstance(updated, (int, float)):
        return None
    age = now - updated
    return round(age, 1) if age > STALE_S else None


def _members(
    document: Mapping[str, Any], pods: Sequence[Object] | None, *, suspended: bool
) -> tuple[Member, ...]:
    """In ring order."""
    pod_of = {name_of(pod): pod for pod in pods or ()}
    found = []
    for entry in mappings(document, "members"):
        name = text(entry, "pod")
        pod = pod_of.get(name)
        found.append(
            Member(
                rank=number(entry, "rank"),
                worker_id=number(entry, "worker_id"),
                pod=name,
                node=text(entry, "node") or text(pod or {}, "spec", "nodeName"),
                zone=text(entry, "zone"),
                rack=text(entry, "rack"),
                note="" if pods is None else _note(pod, suspended),
            )
        )
    return tuple(sorted(found, key=lambda member: member.rank))


def _note(pod: Object | None, suspended: bool) -> str:
    if pod is None:
        return "its pod is gone"
    seen = sightings.Pod.of(pod)
    if seen is None:
        return ""
    if seen.stopped:
        return endings.classify(seen, None, suspended=suspended).words
    notice = endings.notice(seen, None, suspended=suspended)
    return f"leaving: {notice.words}" if notice else ""


def _outsiders(
    snapshot: Snapshot, members: Sequence[Member], document: Mapping[str, Any], now: float
) -> tuple[Outsider, ...]:
    inside = {member.pod for member in members}
    joining = document.get("joining")
    waiting = set(joining) if isinstance(joining, list) else set()
    around = Surroundings(events=snapshot.events, nodes=snapshot.nodes, now=now)
    found = []
    for pod in sorted(
        snapshot.pods or (), key=lambda pod: (component_of(pod), worker_id_of(pod) or 0, created(pod))
    ):
        if name_of(pod) not in inside:
            state, reason = _state(pod, around, name_of(snapshot.job), waiting)
            found.append(
                Outsider(
                    pod=name_of(pod),
                    worker_id=None if component_of(pod) == names.COORDINATOR else worker_id_of(pod),
                    node=text(pod, "spec", "nodeName"),
                    state=state,
                    why=reason,
                )
            )
    return tuple(found)


def _state(pod: Object, around: Surroundings, job: str, joining: set[Any]) -> tuple[str, str]:
    phase = text(pod, "status", "phase")
    if phase == "Succeeded":
        return "done", ""
    if phase == "Failed":
        return _end_of(pod)
    if text(pod, "metadata", "deletionTimestamp"):
        seen = sightings.Pod.of(pod)
        notice = endings.notice(seen, None, suspended=False) if seen else None
        return "ending", notice.words if notice else ""
    obstacle = pending.explain(pod, around, job)
    if phase == "Running":
        if obstacle:
            return "running", obstacle.words
        return ("joining" if worker_id_of(pod) in joining else "running"), ""
    if text(pod, "spec", "nodeName"):
        return "starting", obstacle.words if obstacle else ""
    return "pending", obstacle.words if obstacle else ""


def _end_of(pod: Object) -> tuple[str, str]:
    seen = sightings.Pod.of(pod)
    if seen is not None:
        ending = endings.classify(seen, None, suspended=False)
        return ("stopped" if ending.cause == "suspended" else "failed"), ending.words
    for status in mappings(pod, "status", "containerStatuses"):
        if code := number(status, "state", "terminated", "exitCode"):
            return "failed", f"exited with code {code}"
    return "failed", one_line(text(pod, "status", "message") or text(pod, "status", "reason"))


def _workers(job: Object) -> int:
    return number(job, "spec", "completions") or _annotated(job, names.WORKERS_ANNOTATION, 0)


def _annotated(job: Object, annotation: str, default: int) -> int:
    value = text(job, "metadata", "annotations", annotation)
    return int(value) if value.isascii() and value.isdecimal() else default


def _ended(job: Object) -> float | None:
    done = time_of(mapping(job, "status").get("completionTime"))
    failed = condition(job, "Failed")
    if done is None and failed.get("status") == "True":
        done = time_of(failed.get("lastTransitionTime"))
    return done
