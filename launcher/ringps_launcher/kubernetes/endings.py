"""PURE: why a pod is taken away or has ended, and whether that counts against the budget of restarts.

What the cluster does to a pod (preemption, eviction, a drain, a dead node, a suspension) never counts. What
the program does to itself counts, but for what the coordinator has learned from the launcher already.
"""

from __future__ import annotations

from dataclasses import dataclass

from ringps.worker_env import FAILED_CODE, SUSPENDED_CODE
from ringps_launcher.kubernetes.sightings import Node, Pod

CAUSES = (
    "preempted",
    "evicted",
    "drained",
    "node lost",
    "out of memory",
    "failed",
    "killed",
    "suspended",
)
"""Why a worker had to be started again, as `status` counts it."""


@dataclass(frozen=True)
class Ending:
    """Why a pod goes or went."""

    cause: str
    """One of `CAUSES`; "" if nobody has to take its place."""
    words: str
    counts: bool = False
    """Whether it counts against the budget."""


NODE_LOST = "NodeLost"
"""The reason of the DisruptionTarget condition that we give to a pod on a dead node."""

_BY_CONDITION = {
    "PreemptionByScheduler": Ending("preempted", "preempted by the scheduler"),
    "EvictionByEvictionAPI": Ending("drained", "evicted through the API (a drain)"),
    "DeletionByTaintManager": Ending("evicted", "evicted because of a taint on its node"),
    NODE_LOST: Ending("node lost", "its node is lost"),
    "DeletionByPodGC": Ending("node lost", "its node is gone"),
}
_BY_KUBELET = {
    "Evicted": Ending("evicted", "evicted by its node"),
    "Preempting": Ending("preempted", "preempted by its node for a critical pod"),
    "NodeShutdown": Ending("drained", "its node is shutting down"),
    "Terminated": Ending("drained", "its node is shutting down"),
    "Shutdown": Ending("drained", "its node is shutting down"),
    "NodeLost": Ending("node lost", "its node is lost"),
}
_UNSEEN = ("Unknown", "ContainerStatusUnknown")
"""What a container runtime and a kubelet say of a container that was not there any more when they came back.
The exit code is then made up: 255, or 137."""
_OWN_LIMIT = "exceed"
"""The kubelet's message has it when a pod used more storage than it may; else the node was short of it."""


def notice(pod: Pod, node: Node | None, *, suspended: bool) -> Ending | None:
    """Why the cluster takes this pod away or did so; None if it does not.

    Args:
        pod: as it is, or was last.
        node: its node, as far as known.
        suspended: whether the job is suspended.
    """
    known = _BY_CONDITION.get(pod.disruption)
    if node is not None and node.dead and (pod.disruption or pod.deleted or pod.phase == "Unknown"):
        return Ending("node lost", "its node is gone" if node.gone else "its node is unreachable")
    if known is not None:
        return known
    if pod.disruption == "TerminationByKubelet" or pod.status_reason in _BY_KUBELET:
        return _by_kubelet(pod)
    if pod.disruption:
        message = pod.disruption_message
        return Ending("evicted", f"disrupted ({pod.disruption})" + (f": {message}" if message else ""))
    if not pod.deleted:
        return None
    if suspended:
        return Ending("suspended", "the job is suspended")
    return Ending("evicted", "its pod was deleted")


def classify(pod: Pod, node: Node | None, *, suspended: bool) -> Ending:
    """Why a pod has ended or is gone. Arguments as in `notice`."""
    taken = notice(pod, node, suspended=suspended)
    code = pod.exit_code
    if code == 0 and pod.phase != "Failed":
        return Ending("", "its work is done")
    if taken is not None:
        if code == SUSPENDED_CODE and pod.deleted and not pod.disruption and taken.cause == "evicted":
            return Ending("suspended", "stopped at a checkpoint")
        return taken
    if code is None:
        # It never ran, or vanished: nothing that the program did.
        return Ending("evicted", f"its node did not take it ({pod.status_reason or 'no reason given'})")
    return _by_exit(code, pod.exit_reason)


def _by_exit(code: int, reason: str) -> Ending:
    if reason in _UNSEEN:
        return Ending("node lost", "its node stopped while it ran")
    if reason == "OOMKilled":
        return Ending("out of memory", "out of memory (OOMKilled): ask for more with --memory", counts=True)
    if code == SUSPENDED_CODE:
        return Ending("suspended", "stopped at a checkpoint")
    if code == FAILED_CODE:
        return Ending("", "the job failed")
    if code > 128:
        return Ending("killed", f"killed by signal {code - 128}", counts=True)
    detail = f" ({reason})" if reason not in ("", "Error") else ""
    return Ending("failed", f"exited with code {code}{detail}", counts=True)


def _by_kubelet(pod: Pod) -> Ending:
    message = pod.status_message or pod.disruption_message
    ending = _BY_KUBELET.get(pod.status_reason)
    if ending is None:
        ending = _BY_KUBELET["Shutdown" if "shutdown" in message.lower() else "Evicted"]
    if ending.cause != "evicted":
        return ending
    words = f"{ending.words}: {message.strip()}" if message else ending.words
    # A pod that fills its own volumes would do so again and again.
    return Ending("evicted", words, counts=_OWN_LIMIT in message)
