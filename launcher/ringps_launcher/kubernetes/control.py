"""`ringps suspend`, `resume` and `cancel`: a job that is there is stopped, goes on, or is removed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.bundle import KINDS
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import (
    ClusterError,
    ForbiddenError,
    NotFoundError,
    UnreachableError,
)
from ringps_launcher.kubernetes.fields import Object, holds
from ringps_launcher.kubernetes.observe import job_called

_POLL_S = 0.5
_MARGIN_S = 60.0
"""For a kubelet and the API server, beyond the time that a pod may take to end."""
_STATUS_S = 5.0
"""The coordinator publishes its status at most this much later."""


def suspend(options: argparse.Namespace) -> int:
    """Stop the job at a checkpoint; the exit code."""
    with Cluster.connect(options.context, options.namespace) as cluster:
        return _suspend(cluster, options)


def _suspend(cluster: Cluster, options: argparse.Namespace) -> int:
    job = job_called(cluster, options.name)
    _refuse_if_over(job)
    if _is_suspended(cluster, job):
        print(f"job {options.name} is suspended already")
    else:
        _set_suspended(cluster, job, True)
    if options.no_wait:
        print(f"job {options.name} is to stop at a checkpoint")
        return 0
    limit_s = _limit_s(job, options.wait)
    if not _wait(lambda: not _pods(cluster, options.name, names.WORKER), limit_s):
        left = ", ".join(_pods(cluster, options.name, names.WORKER))
        _say(f"job {options.name} is suspended, but after {limit_s:.0f} s there still are its pods {left}")
        return 1
    _wait(lambda: _status(cluster, options.name).get("phase") not in ("running", "stopping"), _STATUS_S)
    print(f"job {options.name} is suspended {_checkpoint(_status(cluster, options.name))}")
    return 0


def resume(options: argparse.Namespace) -> int:
    """Let a suspended job go on; the exit code."""
    with Cluster.connect(options.context, options.namespace) as cluster:
        return _resume(cluster, options)


def _resume(cluster: Cluster, options: argparse.Namespace) -> int:
    job = job_called(cluster, options.name)
    _refuse_if_over(job)
    if not _is_suspended(cluster, job):
        print(f"job {options.name} is not suspended")
        return 0
    _set_suspended(cluster, job, False)
    where = _checkpoint(_status(cluster, options.name))
    print(f"job {options.name} goes on {where}, once it has room for its pods")
    return 0


def cancel(options: argparse.Namespace) -> int:
    """Remove the job and all that belongs to it, also what is left of a half-made one; the exit code."""
    with Cluster.connect(options.context, options.namespace) as cluster:
        return _cancel(cluster, options)


def _cancel(cluster: Cluster, options: argparse.Namespace) -> int:
    try:
        job = job_called(cluster, options.name)
    except NotFoundError:
        if not names.DNS_LABEL.fullmatch(options.name) or not _has_remains(cluster, options.name):
            raise
        job = {}
    limit_s = _limit_s(job, options.wait)
    if job:
        cluster.delete("Job", options.name, uid=job["metadata"]["uid"])
    refused = _delete_rest(cluster, options.name)
    if refused and not job:
        raise ForbiddenError(refused)  # with a Job, the others are its dependents, and go with it
    if options.no_wait:
        print(f"job {options.name} is being removed")
        return 0
    if not _wait(lambda: not _pods(cluster, options.name), limit_s):
        left = ", ".join(_pods(cluster, options.name))
        _say(
            f"job {options.name} is removed, but after {limit_s:.0f} s there still are its pods {left}; if "
            f"their node is dead: kubectl delete pod -n {cluster.namespace} --force NAME"
        )
        return 1
    print(f"job {options.name} is removed")
    return 0


def _refuse_if_over(job: Object) -> None:
    for condition, end in (("Complete", "is done"), ("Failed", "has failed")):
        if holds(job, condition):
            raise ClusterError(f"job {job['metadata']['name']} {end}: there is nothing to suspend or resume")


# -- suspension


def _is_suspended(cluster: Cluster, job: Object) -> bool:
    if not _queue(job):
        return bool(job["spec"].get("suspend"))
    return (_workload(cluster, job).get("spec") or {}).get("active") is False


def _set_suspended(cluster: Cluster, job: Object, suspended: bool) -> None:
    """Of a job in a queue, Kueue sets the Job's own field, and would undo what we set."""
    if _queue(job):
        workload = _workload(cluster, job)
        cluster.patch("Workload", workload["metadata"]["name"], {"spec": {"active": not suspended}})
    else:
        metadata = job["metadata"]
        cluster.patch(
            "Job", metadata["name"], {"metadata": {"uid": metadata["uid"]}, "spec": {"suspend": suspended}}
        )


def _queue(job: Object) -> str:
    return str((job["metadata"].get("labels") or {}).get(names.QUEUE_LABEL) or "")


def _workload(cluster: Cluster, job: Object) -> Object:
    """Kueue's object for the Job."""
    metadata = job["metadata"]
    rules = f"Kueue rules over job {metadata['name']} (queue {_queue(job)})"
    try:
        found = cluster.list("Workload")
    except NotFoundError as error:
        raise NotFoundError(
            f"{rules}, but is not installed in this cluster: nobody admits the job; cancel it, and submit it "
            "without --queue"
        ) from error
    for workload in found:
        owners = workload["metadata"].get("ownerReferences") or ()
        if any(owner.get("uid") == metadata["uid"] for owner in owners):
            return workload
    raise NotFoundError(f"{rules}, but has no Workload for it (yet): is its controller running?")


# -- removal


def _has_remains(cluster: Cluster, name: str) -> bool:
    """Whether any object of the job is left, as far as we may look."""
    for kind in KINDS:
        try:
            if cluster.list(kind, labels=names.selector(name)):
                return True
        except ForbiddenError:
            continue
    return False


def _delete_rest(cluster: Cluster, name: str) -> str:
    """Delete by label, the Jobs first; what the API server refused, in its words."""
    refused = ""
    for kind in reversed(KINDS):
        try:
            cluster.delete_all(kind, labels=names.selector(name))
        except ForbiddenError as error:
            refused = refused or str(error)
    return refused


# -- looking


def _pods(cluster: Cluster, name: str, component: str | None = None) -> list[str]:
    """The names of pods that are not at their end yet."""
    found = cluster.list("Pod", labels=names.selector(name, component))
    over = ("Succeeded", "Failed") if component else ()  # of a suspended job, those that failed stay
    return [pod["metadata"]["name"] for pod in found if (pod.get("status") or {}).get("phase") not in over]


def _status(cluster: Cluster, name: str) -> Object:
    """The coordinator's status document; empty if there is none."""
    try:
        data = cluster.get("ConfigMap", names.status_map(name)).get("data") or {}
        document = json.loads(data.get(names.STATUS_ENTRY) or "{}")
    except (ClusterError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _checkpoint(status: Object) -> str:
    checkpoint = status.get("checkpoint")
    if not isinstance(checkpoint, dict):
        return "without a checkpoint"
    return f"at the checkpoint of step {checkpoint.get('step')} ({checkpoint.get('where')})"


def _limit_s(job: Object, wait_s: float | None) -> float:
    """How long the job's pods may take to end."""
    if wait_s is not None:
        return wait_s
    pod = ((job.get("spec") or {}).get("template") or {}).get("spec") or {}
    return float(pod.get("terminationGracePeriodSeconds") or 0) + _MARGIN_S


def _wait(is_so: Callable[[], bool], limit_s: float) -> bool:
    """Wait until it is so. That the API server does not answer for a while is no end."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            if is_so():
                return True
        except UnreachableError:
            if time.monotonic() >= deadline:
                raise
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(_POLL_S, left_s))


def _say(text: str) -> None:
    print(f"ringps: {text}", file=sys.stderr, flush=True)
