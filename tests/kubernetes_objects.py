"""Objects as a real API server has them, cut down to what is read."""

from __future__ import annotations

import datetime
from typing import Any

from ringps_launcher.kubernetes import names

Object = dict[str, Any]

NOW = 1_790_000_000.0
NAME, NAMESPACE = "digits", "ml"


def stamp(seconds: float) -> str:
    """A timestamp of the API server."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(
    kind: str, status: bool, reason: str = "", message: str = "", *, at: float = NOW - 60
) -> Object:
    return {
        "type": kind,
        "status": str(status),
        "reason": reason,
        "message": message,
        "lastTransitionTime": stamp(at),
    }


def metadata(name: str, component: str, *, age_s: float = 60.0, **more: Any) -> Object:
    return {
        "name": name,
        "namespace": NAMESPACE,
        "uid": f"uid-{name}",
        "creationTimestamp": stamp(NOW - age_s),
        "labels": names.labels(NAME, component),
        **more,
    }


def job(
    workers: int = 4, *conditions: Object, suspend: bool = False, queue: str = "", age_s: float = 60.0
) -> Object:
    about = metadata(
        NAME,
        names.WORKER,
        age_s=age_s,
        annotations={names.WORKERS_ANNOTATION: str(workers), names.MIN_WORKERS_ANNOTATION: "2"},
    )
    if queue:
        about["labels"] = {**about["labels"], names.QUEUE_LABEL: queue}
    return {
        "metadata": about,
        "spec": {"completions": workers, "parallelism": workers, "suspend": suspend},
        "status": {"conditions": list(conditions)},
    }


def coordinator_job(*conditions: Object) -> Object:
    name = names.coordinator(NAME)
    return {
        "metadata": metadata(name, names.COORDINATOR),
        "spec": {"completions": 1},
        "status": {"conditions": list(conditions)},
    }


def worker(
    index: int,
    phase: str = "Running",
    *conditions: Object,
    node: str = "n1",
    suffix: str = "aaaaa",
    age_s: float = 60.0,
    state: Object | None = None,
    deleted: float | None = None,
    spec: Object | None = None,
    **status: Any,
) -> Object:
    about = metadata(
        f"{NAME}-{index}-{suffix}",
        names.WORKER,
        age_s=age_s,
        annotations={names.INDEX_ANNOTATION: str(index)},
    )
    if deleted is not None:
        about.update(deletionTimestamp=stamp(deleted), deletionGracePeriodSeconds=75)
    container = {
        "name": names.WORKER,
        "image": "ringps/test:1",
        "restartCount": 0,
        "state": state or {"running": {}},
    }
    resources = {"requests": {"cpu": "1", "memory": "2Gi", "nvidia.com/gpu": "1"}}
    return {
        "metadata": about,
        "spec": {
            **({"nodeName": node} if node else {}),
            "schedulerName": "default-scheduler",
            "containers": [{"name": names.WORKER, "image": "ringps/test:1", "resources": resources}],
            **(spec or {}),
        },
        "status": {
            "phase": phase,
            "conditions": list(conditions),
            **({"containerStatuses": [container]} if node else {}),
            **status,
        },
    }


def unplaced(index: int, message: str, **more: Any) -> Object:
    """A pod for which the scheduler found no node."""
    return worker(
        index, "Pending", condition("PodScheduled", False, "Unschedulable", message), node="", **more
    )


def coordinator(
    phase: str = "Running", *, ready: bool = True, state: Object | None = None, restarts: int = 0, **last: Any
) -> Object:
    return {
        "metadata": metadata(f"{names.coordinator(NAME)}-xxxxx", names.COORDINATOR),
        "spec": {"nodeName": "n1", "containers": [{"name": names.COORDINATOR, "image": "ringps/test:1"}]},
        "status": {
            "phase": phase,
            "conditions": [condition("Ready", ready)],
            "containerStatuses": [
                {
                    "name": names.COORDINATOR,
                    "image": "ringps/test:1",
                    "restartCount": restarts,
                    "state": state or {"running": {}},
                    "lastState": last,
                }
            ],
        },
    }


def event(
    kind: str, name: str, reason: str, message: str, *, age_s: float = 10.0, warning: bool = True
) -> Object:
    return {
        "involvedObject": {"kind": kind, "name": name, "namespace": NAMESPACE},
        "metadata": {"namespace": NAMESPACE},
        "type": "Warning" if warning else "Normal",
        "reason": reason,
        "message": message,
        "lastTimestamp": stamp(NOW - age_s),
    }


def node(
    name: str,
    *,
    ready: bool = True,
    cpu: str = "4",
    gpus: int = 0,
    taints: tuple[Object, ...] = (),
    **labels: str,
) -> Object:
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"taints": list(taints)},
        "status": {
            "conditions": [condition("Ready", ready)],
            "allocatable": {"cpu": cpu, "memory": "8Gi", **({"nvidia.com/gpu": str(gpus)} if gpus else {})},
        },
    }
