"""PURE: how the start of a job goes, told from its pods and events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

from ringps_launcher.kubernetes import names

Object = Mapping[str, Any]

_BAD_IMAGE = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
}
_BAD_CONTAINER = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
_AGAIN = "again and again"
_NOT_STARTED = {"StartError", "ContainerCannotRun"}
_LASTING_REFUSALS = ("exceeded quota", "violates PodSecurity", "is forbidden", "is invalid", "must specify")


class Start(Enum):
    """How far a job has come."""

    RUNS = "runs"
    """The coordinator serves."""
    WAITS = "waits"
    """Not yet, and nothing is wrong but time and room."""
    FAILED = "failed"
    """It cannot start; the reason says what to do."""


class Judgement(NamedTuple):
    """How far a job has come, and why."""

    state: Start
    reason: str
    pod: str = ""
    """Whose log says more, where its container has left no message."""
    container: str = ""


def judge(jobs: Iterable[Object], pods: Iterable[Object], events: Iterable[Object]) -> Judgement:
    """How far the job has come: from its two Jobs, its pods, and the events about the Jobs."""
    pods = list(pods)
    for pod in pods:
        for status in _containers(pod):
            wrong = _wrong(pod, status)
            if wrong:
                logged = wrong.endswith(_AGAIN)
                pod_name = pod["metadata"]["name"] if logged else ""
                return Judgement(Start.FAILED, wrong, pod_name, str(status.get("name", "")))
    refused = _refused(jobs, pods, events)
    if refused:
        return Judgement(Start.FAILED, refused)
    coordinators = [pod for pod in pods if _component(pod) == names.COORDINATOR]
    if any(_is_ready(pod) for pod in coordinators):
        return Judgement(Start.RUNS, "")
    if not coordinators:
        return Judgement(Start.WAITS, "its pod is not created yet")
    return Judgement(Start.WAITS, _why(coordinators[-1]))


def _wrong(pod: Object, status: Object) -> str:
    waiting = (status.get("state") or {}).get("waiting") or {}
    reason, message = waiting.get("reason") or "", " ".join(str(waiting.get("message") or "").split())
    image = status.get("image") or _image(pod)
    if reason in _BAD_IMAGE:
        detail = f": {message}" if message else ""
        return (
            f"the image {image} cannot be pulled ({reason}{detail}); correct --image, or give an "
            "--image-pull-secret"
        )
    if reason in _BAD_CONTAINER:
        hint = "; is ringps installed in the image?" if reason == "RunContainerError" else ""
        return f"the container of pod {pod['metadata']['name']} cannot be made ({reason}): {message}{hint}"
    ended = (status.get("lastState") or {}).get("terminated") or (status.get("state") or {}).get("terminated")
    code = (ended or {}).get("exitCode")
    said = " ".join(str((ended or {}).get("message") or "").split())[-300:]
    called = f"pod {pod['metadata']['name']}"
    if code and (ended or {}).get("reason") in _NOT_STARTED:
        return f"{called} cannot start its program: {said}; is ringps installed in the image {image}?"
    if code and status.get("restartCount", 0) >= 2:
        return f"{called} ends with exit code {code} {_AGAIN}" + (f": {said}" if said else "")
    return ""


def _refused(jobs: Iterable[Object], pods: list[Object], events: Iterable[Object]) -> str:
    """Why the Job controller cannot create pods, if it cannot create even the first of a Job."""
    events = list(events)
    for job in jobs:
        component = _component(job)
        if any(_component(pod) == component for pod in pods):
            continue
        for event in events:
            about = event.get("involvedObject") or {}
            message = " ".join(str(event.get("message") or "").split())
            is_it = about.get("uid") == job["metadata"]["uid"] and event.get("reason") == "FailedCreate"
            if (
                is_it
                and "service account" not in message
                and any(word in message for word in _LASTING_REFUSALS)
            ):
                return f"the pods of Job {job['metadata']['name']} are refused: {message[:500]}"
    return ""


def _why(pod: Object) -> str:
    status = pod.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"no node for its pod yet: {' '.join(str(condition.get('message') or '').split())}"
    for container in _containers(pod):
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason"):
            return f"its container is not up yet ({waiting['reason']})"
    return (
        "its pod has a node, and starts"
        if (pod.get("spec") or {}).get("nodeName")
        else "its pod has no node yet"
    )


def _is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    ready = any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)
    # A job of a few seconds may be over before we look.
    return ready or (pod.get("status") or {}).get("phase") == "Succeeded"


def _containers(pod: Object) -> list[Object]:
    return list((pod.get("status") or {}).get("containerStatuses") or ())


def _image(pod: Object) -> str:
    return str(((pod.get("spec") or {}).get("containers") or [{}])[0].get("image", ""))


def _component(found: Object) -> str:
    return str(((found.get("metadata") or {}).get("labels") or {}).get(names.COMPONENT_LABEL))
