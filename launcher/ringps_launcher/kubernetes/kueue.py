"""PURE: what Kueue says about a job that it holds back.

Conditions of a Workload: https://kueue.sigs.k8s.io/docs/concepts/workload/
"""

from __future__ import annotations

from ringps_launcher.kubernetes.fields import Object, condition, holds, mapping, mappings, one_line, text
from ringps_launcher.kubernetes.obstacles import Obstacle


def explain(workload: Object | None, queue: str, name: str) -> Obstacle:
    """Why the suspended job `name` waits in LocalQueue `queue`."""
    if workload is None:
        return Obstacle(
            "queue",
            f"it waits in queue {queue}, and no Workload of Kueue's is to be seen for it",
            f"if that lasts, check that Kueue runs here: ringps doctor --queue {queue}",
        )
    if mapping(workload, "spec").get("active") is False:
        return Obstacle("suspended", f"it is suspended, in queue {queue}", f"ringps resume {name}")
    if holds(workload, "Admitted"):
        return Obstacle("queue", f"Kueue has admitted it from queue {queue}, and starts it now")
    evicted, reserved = condition(workload, "Evicted"), condition(workload, "QuotaReserved")
    if reserved.get("status") == "True":
        open_checks = [
            f"{text(check, 'name')}{_detail(check)}"
            for check in mappings(workload, "status", "admissionChecks")
            if check.get("state") != "Ready"
        ]
        checks = ", ".join(open_checks) or "its admission checks"
        return Obstacle("queue", f"queue {queue} has room, but Kueue still waits for {checks}")
    before = (
        f"evicted by Kueue ({one_line(text(evicted, 'message'))}); " if holds(workload, "Evicted") else ""
    )
    said = one_line(text(reserved, "message"))
    if text(reserved, "reason") == "Inadmissible" or "doesn't exist" in said or "is inactive" in said:
        return Obstacle(
            "queue",
            f"{before}Kueue cannot admit it from queue {queue}: {said}",
            "check --queue, and what the cluster's administrator has set up",
        )
    return Obstacle(
        "queue",
        f"{before}it waits in queue {queue}" + (f": {said}" if said else ""),
        "Kueue starts it when there is room",
    )


def _detail(check: Object) -> str:
    said = one_line(text(check, "message"))
    return f" ({said})" if said else ""
