"""Reads what there is to know about jobs. What we have no right to look at is left out, and said."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import ClusterError, ForbiddenError, NotFoundError
from ringps_launcher.kubernetes.fields import (
    Object,
    component_of,
    is_owned_by,
    label,
    mapping,
    name_of,
    text,
)
from ringps_launcher.kubernetes.view import Snapshot

T = TypeVar("T")


def job_called(cluster: Cluster, name: str) -> Object:
    """The worker Job of the job `name`.

    Raises:
        NotFoundError: there is none; the message names those that there are.
    """
    job: Object = {}
    if names.DNS_LABEL.fullmatch(name):
        with contextlib.suppress(NotFoundError):
            job = cluster.get("Job", name)
    if component_of(job) == names.WORKER and label(job, names.INSTANCE_LABEL) == name:
        return job
    known = sorted(name_of(one) for one in cluster.list("Job", labels=names.selector(None, names.WORKER)))
    raise NotFoundError(
        f"there is no job {name} in namespace {cluster.namespace}; there are: {', '.join(known) or 'none'}"
    )


def one(cluster: Cluster, name: str) -> Snapshot:
    """All about one job."""
    job = job_called(cluster, name)
    eyes = _Eyes()
    coordinator = names.coordinator(name)
    return Snapshot(
        job=job,
        coordinator=eyes.see("the coordinator's Job", lambda: cluster.get("Job", coordinator)),
        pods=eyes.see("pods", lambda: cluster.list("Pod", labels=names.selector(name))),
        status=eyes.see("the status", lambda: cluster.get("ConfigMap", names.status_map(name))),
        events=eyes.see("events", lambda: _events(cluster, (name, coordinator))) or [],
        quotas=eyes.see("quotas", lambda: cluster.list("ResourceQuota")) or [],
        nodes=eyes.see("nodes", lambda: cluster.list("Node")),
        workload=_workload(cluster, job, eyes),
        unseen=tuple(eyes.unseen),
    )


def every(cluster: Cluster, *, all_namespaces: bool) -> list[Snapshot]:
    """What can be read at once about all jobs of the namespace, or of all namespaces."""
    eyes = _Eyes()

    def found(kind: str, component: str | None = None) -> list[Object]:
        labels = names.selector(None, component)
        return list(cluster.list(kind, labels=labels, all_namespaces=all_namespaces))

    jobs = found("Job")
    workers = [job for job in jobs if component_of(job) == names.WORKER]
    coordinators = {_key(job): job for job in jobs if component_of(job) == names.COORDINATOR}
    seen = eyes.see("pods", lambda: found("Pod"))
    pods: dict[tuple[str, str], list[Object]] = {}
    for pod in seen or ():
        pods.setdefault(_key(pod), []).append(pod)
    maps = {
        (text(config, "metadata", "namespace"), name_of(config)): config
        for config in eyes.see("the status of jobs", lambda: found("ConfigMap")) or []
    }
    snapshots = []
    for job in sorted(workers, key=lambda job: (text(job, "metadata", "namespace"), name_of(job))):
        namespace, name = _key(job)
        snapshots.append(
            Snapshot(
                job=job,
                coordinator=coordinators.get((namespace, name)),
                pods=None if seen is None else pods.get((namespace, name), []),
                status=maps.get((namespace, names.status_map(name))),
                unseen=tuple(eyes.unseen),
            )
        )
    return snapshots


def with_surroundings(
    cluster: Cluster, snapshots: Sequence[Snapshot], *, all_namespaces: bool
) -> list[Snapshot]:
    """The same jobs, with what tells why they wait."""
    eyes = _Eyes()
    events = (
        eyes.see(
            "events", lambda: cluster.list("Event", fields="type=Warning", all_namespaces=all_namespaces)
        )
        or []
    )
    quotas = eyes.see("quotas", lambda: cluster.list("ResourceQuota", all_namespaces=all_namespaces)) or []
    nodes = eyes.see("nodes", lambda: cluster.list("Node"))
    full = []
    for snapshot in snapshots:
        namespace, _ = _key(snapshot.job)
        full.append(
            replace(
                snapshot,
                events=_of_namespace(events, namespace),
                quotas=_of_namespace(quotas, namespace),
                nodes=nodes,
                workload=_workload(cluster, snapshot.job, eyes),
            )
        )
    return [replace(snapshot, unseen=(*snapshot.unseen, *eyes.unseen)) for snapshot in full]


class _Eyes:
    """Looks at things, and remembers what it was not allowed to look at."""

    def __init__(self) -> None:
        self.unseen: list[str] = []

    def see(self, what: str, read: Callable[[], T]) -> T | None:
        """What `read` gives; None if there is none, or if we may not."""
        try:
            return read()
        except NotFoundError:
            return None
        except ForbiddenError as error:
            line = f"{what}: {error}"
            if line not in self.unseen:
                self.unseen.append(line)
            return None


def _events(cluster: Cluster, jobs: Iterable[str]) -> list[Object]:
    """Warnings of the namespace, and all that is said about the two Jobs."""
    found: list[Object] = list(cluster.list("Event", fields="type=Warning"))
    for job in jobs:
        found += cluster.list(
            "Event", fields=f"type=Normal,involvedObject.kind=Job,involvedObject.name={job}"
        )
    return found


def _workload(cluster: Cluster, job: Object, eyes: _Eyes) -> Object | None:
    """Kueue's object for the job, if it is in a queue."""
    if not label(job, names.QUEUE_LABEL):
        return None
    namespace = text(job, "metadata", "namespace") or None
    try:
        found = eyes.see("Kueue's Workloads", lambda: cluster.list("Workload", namespace=namespace)) or []
    except ClusterError as error:
        eyes.unseen.append(f"Kueue's Workloads: {error}")
        return None
    return next((workload for workload in found if is_owned_by(workload, job)), None)


def _key(thing: Object) -> tuple[str, str]:
    return text(thing, "metadata", "namespace"), label(thing, names.INSTANCE_LABEL)


def _of_namespace(things: Iterable[Object], namespace: str) -> list[Object]:
    return [thing for thing in things if mapping(thing, "metadata").get("namespace") == namespace]
