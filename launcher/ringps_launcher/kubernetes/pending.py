"""PURE: why a pod that is there does not run: no node, no image, no volume, no container."""

from __future__ import annotations

import re

from ringps_launcher.kubernetes import endings, names, placement, sightings
from ringps_launcher.kubernetes.fields import (
    Object,
    component_of,
    condition,
    created,
    holds,
    mapping,
    mappings,
    name_of,
    number,
    one_line,
    text,
)
from ringps_launcher.kubernetes.obstacles import Obstacle
from ringps_launcher.kubernetes.surroundings import Surroundings

SETTLED_S = 5.0
"""What is so for a shorter time is on its way."""

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_CONTAINER = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError")
_VOLUME = ("FailedMount", "FailedAttachVolume", "FailedMapVolume")
_SANDBOX = ("FailedCreatePodSandBox", "NetworkNotReady")


def explain(pod: Object, around: Surroundings, job: str) -> Obstacle | None:
    """What is in the way of this pod of `job`; None if it runs as it should."""
    disrupted = condition(pod, "DisruptionTarget")
    if disrupted.get("status") == "True":
        return _disrupted(pod, text(disrupted, "message"))
    if not text(pod, "spec", "nodeName"):
        return _unplaced(pod, around)
    for status in mappings(pod, "status", "containerStatuses"):
        if found := _container(pod, status, around, job):
            return found
    if text(pod, "status", "phase") == "Pending":
        return _starting(pod, around)
    if component_of(pod) == names.COORDINATOR and not holds(pod, "Ready"):
        return _not_serving(pod, job)
    return None


def _disrupted(pod: Object, message: str) -> Obstacle:
    seen = sightings.Pod.of(pod)
    notice = endings.notice(seen, None, suspended=False) if seen else None
    return Obstacle("disrupted", f"its pod is {notice.words}" if notice else one_line(message))


def _unplaced(pod: Object, around: Surroundings) -> Obstacle:
    placed = condition(pod, "PodScheduled")
    reason = text(placed, "reason")
    if not placed:
        if around.now - created(pod) < SETTLED_S:
            return Obstacle("starting", "it has no node yet")
        if mapping(pod, "spec", "schedulingGroup"):
            return Obstacle("gang", placement.GANG_INCOMPLETE, placement.GANG_ADVICE)
        scheduler = text(pod, "spec", "schedulerName") or "default-scheduler"
        return Obstacle(
            "scheduler",
            f"scheduler {scheduler} has not looked at it",
            "check that it runs, or that --scheduler names one that does",
        )
    if reason == "SchedulingGated":
        gates = ", ".join(text(gate, "name") for gate in mappings(pod, "spec", "schedulingGates"))
        return Obstacle("gate", f"scheduling gate {gates} is not lifted", "whoever set it must lift it")
    found = placement.explain(pod, text(placed, "message"), around.nodes)
    nominated = text(pod, "status", "nominatedNodeName")
    if nominated and found.kind != "preempting":
        return Obstacle(
            "preempting",
            f"pods of lower priority must first leave {nominated}",
            "nothing to do: they have their grace period to stop",
        )
    return found


def _container(pod: Object, status: Object, around: Surroundings, job: str) -> Obstacle | None:
    waiting = mapping(status, "state", "waiting")
    reason, message = text(waiting, "reason"), one_line(text(waiting, "message"))
    if reason in _IMAGE:
        return _no_image(pod, status, reason, message, around)
    if reason in _CONTAINER:
        return Obstacle(
            "configuration",
            f"its container cannot be made: {message or reason}",
            _advice_for_configuration(message),
        )
    if reason == "CrashLoopBackOff":
        return _ends_again_and_again(pod, status, job)
    if reason in ("", "ContainerCreating", "PodInitializing"):
        return None
    return Obstacle("other", f"its container waits: {reason} {message}".rstrip())


def _no_image(pod: Object, status: Object, reason: str, message: str, around: Surroundings) -> Obstacle:
    image = _image_of(pod, text(status, "name")) or text(status, "image")
    if reason == "InvalidImageName":
        return Obstacle("image", f"{image} is no image's name", "correct --image")
    if reason == "ImagePullBackOff":  # says only that it waits before the next try
        event = around.latest("Pod", name_of(pod), ("Failed",))
        said = one_line(text(event or {}, "message"))
        message = said if said.startswith("Failed to pull") else ""
    return Obstacle(
        "image",
        f"image {image} cannot be pulled" + (f": {message}" if message else ""),
        "check --image, and --image-pull-secret if the registry wants a login",
    )


def _ends_again_and_again(pod: Object, status: Object, job: str) -> Obstacle:
    is_coordinator = component_of(pod) == names.COORDINATOR
    last = mapping(status, "lastState", "terminated")
    said = last_words(text(last, "message"))
    return Obstacle(
        "coordinator" if is_coordinator else "crashed",
        f"it ended {number(status, 'restartCount') + 1} times, the last time with exit code "
        f"{number(last, 'exitCode')}{f' ({said})' if said else ''}, and starts again after a pause",
        f"see `ringps logs {job}{' --coordinator' if is_coordinator else ''} --previous`",
    )


def _starting(pod: Object, around: Surroundings) -> Obstacle:
    node = text(pod, "spec", "nodeName")
    if volume := around.latest("Pod", name_of(pod), _VOLUME):
        message = one_line(text(volume, "message"))
        return Obstacle("volumes", f"a volume cannot be mounted: {message}", _advice_for_volume(message))
    if sandbox := around.latest("Pod", name_of(pod), _SANDBOX):
        message = one_line(text(sandbox, "message"))
        return Obstacle("other", f"node {node} cannot make it: {message}", f"see the logs of node {node}")
    if trouble := around.trouble_with(node):
        return Obstacle("dead node", f"its node {node} is {trouble}")
    return Obstacle("starting", "its container is being made")


def _not_serving(pod: Object, job: str) -> Obstacle:
    restarts = max(
        (number(status, "restartCount") for status in mappings(pod, "status", "containerStatuses")), default=0
    )
    again = f" (started {restarts + 1} times)" if restarts else ""
    return Obstacle(
        "coordinator",
        f"it runs{again}, but does not serve yet",
        f"if that lasts, see `ringps logs {job} --coordinator`",
    )


def last_words(message: str) -> str:
    """The last line of a container's termination message."""
    lines = message.strip().splitlines()
    return one_line(lines[-1]).removeprefix("ringps: ") if lines else ""


def _advice_for_configuration(message: str) -> str:
    if re.search(r"secret .* not found|couldn't find key .* in Secret", message):
        return "create the Secret, or correct --secret-env"
    if "configmap" in message.lower():
        return "cancel the job and submit it anew"
    if "runAsNonRoot" in message:
        return "use an image, or --run-as-user, that is not root"
    if "executable file not found" in message:
        return "the image must have `ringps` on its PATH"
    return ""


def _advice_for_volume(message: str) -> str:
    if "secret" in message or "configmap" in message:
        return "create what it names, or cancel the job and submit it anew"
    return "see `kubectl describe pvc`, and whether another node still uses the volume"


def _image_of(pod: Object, container: str) -> str:
    for entry in mappings(pod, "spec", "containers"):
        if entry.get("name") == container:
            return text(entry, "image")
    return ""
