"""PURE: the status of a pod, from what its containers do; the rules are the kubelet's."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]

FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 10.0
FINAL = ("Succeeded", "Failed")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of a container that has ended."""

    code: int
    reason: str
    started_at_s: float
    ended_at_s: float
    id: str = ""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class View:
    """What is known of one container."""

    name: str
    image: str
    waiting: tuple[str, str] | None = None
    """Reason and message, while it neither runs nor has ended for good."""
    running_since_s: float | None = None
    ended: Run | None = None
    """Its latest run, if that has ended."""
    before: Run | None = None
    """The run before the present one."""
    ready: bool = False
    restarts: int = 0
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Phase, reason and message that are not up to the containers: refused, or evicted."""

    reason: str
    message: str
    disruption: bool = False
    """Whether the condition DisruptionTarget belongs to it."""


def backoff_s(restarts: int) -> float:
    """How long a container waits before it is started again, after that many restarts."""
    return float(min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(restarts, 10)))


def restarts(policy: str, code: int) -> bool:
    """Whether a container that ended with this code is started again."""
    return policy == "Always" or (policy == "OnFailure" and code != 0)


def phase(policy: str, views: Sequence[View], *, ending: bool) -> str:
    """The phase that follows from the containers. `ending`: the pod's end has been asked for."""
    running = sum(view.running_since_s is not None for view in views)
    stopped = [view.ended or view.before for view in views if view.running_since_s is None]
    ended = [run for run in stopped if run is not None]
    if len(ended) < len(stopped):
        return "Failed" if ending and not running else "Pending"
    if running:
        return "Running"
    if not ending and any(restarts(policy, run.code) for run in ended):
        return "Running"
    return "Succeeded" if all(run.code == 0 for run in ended) else "Failed"


def status(
    pod: Mapping[str, Any],
    views: Sequence[View],
    *,
    now_s: float,
    started_at_s: float,
    host_ip: str,
    pod_ip: str | None,
    ending: bool,
    verdict: Verdict | None,
) -> Object:
    """The whole status that the kubelet answers for, without the times of transitions."""
    policy = pod["spec"].get("restartPolicy", "Always")
    now = phase(policy, views, ending=ending)
    over = all(view.running_since_s is None for view in views)
    if verdict is not None and over:
        now = "Failed"
    final = now in FINAL
    out: Object = {
        "phase": now,
        "observedGeneration": pod["metadata"].get("generation", 0),
        "hostIP": host_ip,
        "hostIPs": [{"ip": host_ip}, {"$patch": "replace"}],
        "startTime": timestamp(started_at_s),
        "conditions": _conditions(views, now, sandbox=pod_ip is not None),
    }
    if verdict is not None and final:
        out |= {"reason": verdict.reason, "message": verdict.message}
    if pod_ip is not None:
        out["podIP"] = pod_ip
        out["podIPs"] = [{"ip": pod_ip}, {"$patch": "replace"}]
    if verdict is None or verdict.disruption:  # a pod that was refused never had containers
        out["containerStatuses"] = [container_status(view, final=final) for view in views]
    if verdict is not None and verdict.disruption and final:
        out["conditions"].append(
            _condition("DisruptionTarget", True, "TerminationByKubelet", verdict.message)
        )
    for condition in out["conditions"]:
        condition["observedGeneration"] = out["observedGeneration"]
    stamp_transitions(out, pod.get("status") or {}, now_s)
    return out


def stamp_transitions(new: Object, old: Mapping[str, Any], now_s: float) -> None:
    """Conditions that have not changed keep the time since when they hold."""
    before = {condition["type"]: condition for condition in old.get("conditions") or ()}
    for condition in new["conditions"]:
        same = before.get(condition["type"])
        kept = same is not None and same["status"] == condition["status"] and "lastTransitionTime" in same
        condition["lastTransitionTime"] = same["lastTransitionTime"] if kept and same else timestamp(now_s)


def container_status(view: View, *, final: bool) -> Object:
    if view.waiting is not None and not (final and view.before is None):
        state: Object = {"waiting": {"reason": view.waiting[0], **_text(view.waiting[1])}}
    elif view.running_since_s is not None:
        state = {"running": {"startedAt": timestamp(view.running_since_s)}}
    elif view.ended is not None:
        state = {"terminated": _terminated(view.ended)}
    else:
        state = {"waiting": {"reason": "ContainerCreating"}}
    last = view.before or (view.ended if view.waiting is not None else None)
    return {
        "name": view.name,
        "image": view.image,
        "imageID": view.image if view.id else "",
        **({"containerID": view.id} if view.id else {}),
        "state": state,
        "lastState": {"terminated": _terminated(last)} if last is not None else {},
        "ready": view.ready and view.running_since_s is not None,
        "started": view.running_since_s is not None,
        "restartCount": view.restarts,
    }


def timestamp(at_s: float) -> str:
    return datetime.datetime.fromtimestamp(int(at_s), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _conditions(views: Sequence[View], now: str, *, sandbox: bool) -> list[Object]:
    if now in FINAL:
        reason = "PodCompleted" if now == "Succeeded" else "PodFailed"
        ready = [_condition(kind, False, reason) for kind in ("Ready", "ContainersReady")]
    else:
        lacking = [view.name for view in views if not view.ready or view.running_since_s is None]
        message = f"containers with unready status: [{' '.join(lacking)}]"
        ready = [
            _condition(
                kind, not lacking, "ContainersNotReady" if lacking else None, message if lacking else None
            )
            for kind in ("Ready", "ContainersReady")
        ]
    return [
        _condition("PodReadyToStartContainers", sandbox and now not in FINAL),
        _condition("Initialized", True, "PodCompleted" if now == "Succeeded" else None),
        *ready,
    ]


def _condition(kind: str, holds: bool, reason: str | None = None, message: str | None = None) -> Object:
    # Nulls take away what an earlier patch had set.
    return {"type": kind, "status": str(holds), "reason": reason, "message": message, "lastProbeTime": None}


def _terminated(run: Run) -> Object:
    return {
        "exitCode": run.code,
        "reason": run.reason,
        **_text(run.message),
        "startedAt": timestamp(run.started_at_s),
        "finishedAt": timestamp(run.ended_at_s),
        **({"containerID": run.id} if run.id else {}),
    }


def _text(message: str) -> Object:
    return {"message": message} if message else {}
