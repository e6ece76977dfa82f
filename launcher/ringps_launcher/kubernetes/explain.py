"""PURE: why a job waits, in plain words, from what the cluster says in conditions and events.

The same obstacle of several pods is told once. What everything else waits for comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ringps_launcher.kubernetes import endings, kueue, names, pending, refusals, sightings
from ringps_launcher.kubernetes.fields import (
    Object,
    component_of,
    condition,
    created,
    holds,
    label,
    last_seen,
    mapping,
    mappings,
    name_of,
    number,
    one_line,
    text,
    time_of,
    worker_id_of,
)
from ringps_launcher.kubernetes.obstacles import ORDER, Obstacle
from ringps_launcher.kubernetes.surroundings import Surroundings
from ringps_launcher.kubernetes.table import ranges

_LATE_S = 5.0
"""How long after the end of its grace period a pod that is still there is told of."""
_SLACK_S = 1.0
"""Events have whole seconds: of two in one second, nobody knows which came first."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One thing that a job waits for."""

    kind: str
    """One of `obstacles.ORDER`."""

    who: str
    """Which part of the job: "all 4 workers", "worker 2", "coordinator"; "" for the whole."""

    words: str
    """What it waits for."""

    advice: str
    """What to do; may be empty."""

    @property
    def text(self) -> str:
        """Who and what, in one line."""
        return f"{self.who}: {self.words}" if self.who else self.words

    @property
    def line(self) -> str:
        """Who, what and what to do, in one line."""
        return f"{self.text}; {self.advice}" if self.advice else self.text


_Who = tuple[str, int | None]
"""Component and worker id; ("", None) is the whole job."""
_JOB: _Who = ("", None)
_COORDINATOR: _Who = (names.COORDINATOR, None)
_Found = tuple[_Who, Obstacle]


def why(
    job: Object,
    pods: Sequence[Object],
    events: Sequence[Object],
    quotas: Sequence[Object] = (),
    nodes: Sequence[Object] | None = None,
    workload: Object | None = None,
    *,
    now: float,
    coordinator: Object | None = None,
) -> list[Reason]:
    """Why not all of the job runs, the most important reason first; empty if there is nothing to wait for.

    Args:
        job: the worker Job.
        pods: all pods of the job, the coordinator's too.
        events: Events about any of these.
        quotas: the namespace's ResourceQuotas.
        nodes: all nodes; None if we may not look at them.
        workload: Kueue's Workload for the job, if there is one.
        now: seconds since 1970.
        coordinator: the coordinator's Job; None if it is not known.
    """
    name = name_of(job)
    workers = number(job, "spec", "completions") or number(job, "spec", "parallelism")
    around = Surroundings(events=events, nodes=nodes, now=now)
    if holds(job, "Failed") or holds(job, "FailureTarget"):
        failed = condition(job, "Failed") or condition(job, "FailureTarget")
        if failed.get("reason") != "DeadlineExceeded":
            return []
        return _told([(_JOB, Obstacle("deadline", "it ran longer than its deadline allows"))], workers)
    if holds(job, "Complete") or text(job, "metadata", "deletionTimestamp"):
        return []
    alive = [pod for pod in pods if text(pod, "status", "phase") not in ("Succeeded", "Failed")]
    if mapping(job, "spec").get("suspend") is True:
        return _told([(_JOB, _suspended(job, workload)), *_ending(alive, around)], workers)
    return _told(
        [
            *_coordinator(job, coordinator, alive, quotas, around),
            *_missing(job, pods, workers, quotas, around),
            *_waiting(alive, around, name),
            *_ending(alive, around),
        ],
        workers,
    )


def _suspended(job: Object, workload: Object | None) -> Obstacle:
    name, queue = name_of(job), label(job, names.QUEUE_LABEL)
    if queue:
        return kueue.explain(workload, queue, name)
    return Obstacle("suspended", "it is suspended", f"ringps resume {name}")


def _coordinator(
    job: Object,
    coordinator: Object | None,
    alive: Sequence[Object],
    quotas: Sequence[Object],
    around: Surroundings,
) -> Iterator[_Found]:
    """A coordinator without a pod."""
    name = name_of(job)
    if any(component_of(pod) == names.COORDINATOR for pod in alive):
        return
    if coordinator is not None and holds(coordinator, "Failed"):
        message = one_line(text(condition(coordinator, "Failed"), "message"))
        yield (
            _COORDINATOR,
            Obstacle(
                "coordinator",
                f"its Job has failed ({message}), so nobody forms the ring",
                f"see `ringps logs {name} --coordinator`, then cancel the job and submit it anew",
            ),
        )
    elif coordinator is None or not holds(coordinator, "Complete"):
        own = names.coordinator(name)
        if refused := around.latest("Job", own, ("FailedCreate",)):
            yield _COORDINATOR, refusals.explain(text(refused, "message"), quotas)
        elif around.now - created(job) > pending.SETTLED_S:
            yield _COORDINATOR, Obstacle("coordinator", f"Job {own} has no pod")


def _missing(
    job: Object, pods: Sequence[Object], workers: int, quotas: Sequence[Object], around: Surroundings
) -> Iterator[_Found]:
    """Workers without a pod."""
    name = name_of(job)
    there = {worker_id_of(pod) for pod in pods if text(pod, "status", "phase") != "Failed"}
    absent = [index for index in range(workers) if index not in there]
    refused = around.latest("Job", name, ("FailedCreate",))
    made = around.latest("Job", name, ("SuccessfulCreate",))
    still_refused = refused is not None and (made is None or last_seen(made) <= last_seen(refused) + _SLACK_S)
    for index in absent:
        if refused is not None and still_refused:
            yield (names.WORKER, index), refusals.explain(text(refused, "message"), quotas)
        elif crashed := _crashed(name, index, pods):
            yield (names.WORKER, index), crashed
        elif around.now - created(job) > pending.SETTLED_S:
            yield (names.WORKER, index), Obstacle("missing", "the Job controller has made no pod yet")


def _crashed(name: str, index: int, pods: Iterable[Object]) -> Obstacle | None:
    """What is to be said of a worker whose last pod has failed."""
    last = max((pod for pod in pods if worker_id_of(pod) == index), key=created, default=None)
    seen = None if last is None else sightings.Pod.of(last)
    if last is None or seen is None:
        return None
    ending = endings.classify(seen, None, suspended=False)
    if not ending.counts:
        return Obstacle("missing", f"its last pod is gone ({ending.words}), the next one is not made yet")
    said = next(
        (
            pending.last_words(text(status, "state", "terminated", "message"))
            for status in mappings(last, "status", "containerStatuses")
        ),
        "",
    )
    return Obstacle(
        "crashed",
        f"its last pod failed: {ending.words}{f' ({said})' if said else ''}; the next comes after a pause",
        f"see `ringps logs {name} --rank {index}`",
    )


def _waiting(alive: Iterable[Object], around: Surroundings, name: str) -> Iterator[_Found]:
    for pod in alive:
        if not text(pod, "metadata", "deletionTimestamp"):
            found = pending.explain(pod, around, name)
            if found is not None:
                yield _who(pod), found


def _ending(alive: Iterable[Object], around: Surroundings) -> Iterator[_Found]:
    """Pods that are being deleted: the successor of a worker starts only once its pod is gone."""
    for pod in alive:
        deadline = time_of(mapping(pod, "metadata").get("deletionTimestamp"))
        if deadline is not None:
            yield _who(pod), _ends(pod, around.now - deadline, around)


def _ends(pod: Object, late_s: float, around: Surroundings) -> Obstacle:
    node = text(pod, "spec", "nodeName")
    if late_s > _LATE_S and (trouble := around.trouble_with(node)):
        return Obstacle(
            "dead node",
            f"its pod cannot end, since its node {node} is {trouble}",
            f"the coordinator gives it up soon; else, once it is off for certain: kubectl delete node {node}",
        )
    if late_s > _LATE_S:
        return Obstacle("ending", f"its pod should have ended {round(late_s)} s ago", f"see node {node}")
    seen = sightings.Pod.of(pod)
    notice = endings.notice(seen, None, suspended=False) if seen and seen.disruption else None
    cause = f" ({notice.words})" if notice else ""
    return Obstacle("ending", f"its pod is ending{cause}, and has {max(0, round(-late_s))} s more for that")


def _who(pod: Object) -> _Who:
    if component_of(pod) == names.COORDINATOR:
        return _COORDINATOR
    return names.WORKER, worker_id_of(pod)


def _told(found: Iterable[_Found], workers: int) -> list[Reason]:
    """Each thing once, with all whom it concerns."""
    concerned: dict[tuple[str, Obstacle], set[int]] = {}
    for (component, index), what in found:
        concerned.setdefault((component, what), set()).update(() if index is None else (index,))
    reasons = [
        Reason(
            kind=what.kind,
            who=workers_text(indexes, workers) if component == names.WORKER else component,
            words=what.words,
            advice=what.advice,
        )
        for (component, what), indexes in concerned.items()
    ]
    # Without a coordinator nothing begins, whatever else is wrong.
    return sorted(
        reasons, key=lambda reason: (reason.who not in ("", names.COORDINATOR), ORDER.index(reason.kind))
    )


def workers_text(worker_ids: Iterable[int], workers: int) -> str:
    """Some of the workers, by id: "worker 2", "workers 0-2, 5", "all 4 workers"."""
    wanted = sorted(set(worker_ids))
    if len(wanted) == 1:
        return f"worker {wanted[0]}"
    if len(wanted) == workers:
        return f"all {workers} workers"
    return f"workers {ranges(wanted)}"
