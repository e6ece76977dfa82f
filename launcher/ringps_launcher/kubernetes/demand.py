"""PURE: what a job takes of a namespace's quotas and of the nodes' devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from ringps_launcher.kubernetes import quantities
from ringps_launcher.kubernetes.bundle import Bundle
from ringps_launcher.kubernetes.kinds import kind_of

Object = Mapping[str, Any]

_COMPUTE = ("cpu", "memory", "ephemeral-storage")
_COUNTED = ("configmaps", "secrets", "services", "pods")
_GIB = 1 << 30


def per_pod(template: Object) -> dict[str, Fraction]:
    """What one pod takes, under the names that a ResourceQuota has for it."""
    taken = {"pods": Fraction(1), "count/pods": Fraction(1)}

    def add(name: str, quantity: Any) -> None:
        taken[name] = taken.get(name, Fraction(0)) + quantities.parse(str(quantity))

    for container in template["spec"]["containers"]:
        resources = container.get("resources") or {}
        limits = resources.get("limits") or {}
        for resource, quantity in {**limits, **(resources.get("requests") or {})}.items():
            add(f"requests.{resource}", quantity)
            if resource in _COMPUTE:
                add(resource, quantity)
        for resource, quantity in limits.items():
            add(f"limits.{resource}", quantity)
    return taken


def devices(job: Object) -> dict[str, int]:
    """How many of each device (nvidia.com/gpu) all pods of a Job ask for."""
    pod = per_pod(job["spec"]["template"])
    found = {
        name.removeprefix("requests."): value for name, value in pod.items() if name.startswith("requests.")
    }
    return {name: int(value * job["spec"]["parallelism"]) for name, value in found.items() if "/" in name}


def shortages(bundle: Bundle, quotas: Iterable[Object]) -> list[str]:
    """What the job needs more of than the quotas have left, in words."""
    found = []
    for quota in quotas:
        status = quota.get("status") or {}
        hard = status.get("hard") or (quota.get("spec") or {}).get("hard") or {}
        used = status.get("used") or {}
        needed = _needed(bundle, quota)
        for resource, limit in sorted(hard.items()):
            most, taken = quantities.parse(str(limit)), quantities.parse(str(used.get(resource, "0")))
            wanted = needed.get(resource, Fraction(0))
            left = max(most - taken, Fraction(0))
            if wanted > left:
                found.append(
                    f"ResourceQuota {quota['metadata']['name']}: the job needs {_amount(resource, wanted)} "
                    f"{resource}, and {_amount(resource, left)} of "
                    f"{_amount(resource, most)} are left"
                )
    return found


def _needed(bundle: Bundle, quota: Object) -> dict[str, Fraction]:
    needed: dict[str, Fraction] = {}

    def add(resource: str, amount: Fraction) -> None:
        needed[resource] = needed.get(resource, Fraction(0)) + amount

    for job in bundle.jobs():
        template = job["spec"]["template"]
        if _in_scope(template, quota):
            for resource, amount in per_pod(template).items():
                add(resource, amount * job["spec"]["parallelism"])
    for manifest in bundle.manifests:
        kind = kind_of(manifest["kind"])
        add(f"count/{kind.plural}" + (f".{kind.group}" if kind.group else ""), Fraction(1))
        if kind.plural in _COUNTED:
            add(kind.plural, Fraction(1))
    return needed


def _in_scope(template: Object, quota: Object) -> bool:
    """Whether the quota counts such pods; ours have requests, and no deadline."""
    spec = quota.get("spec") or {}
    selector = (spec.get("scopeSelector") or {}).get("matchExpressions") or []
    terms = [{"scopeName": scope, "operator": "Exists"} for scope in spec.get("scopes") or []] + list(
        selector
    )
    return all(_matches(template["spec"], term) for term in terms)


def _matches(pod: Object, term: Object) -> bool:
    scope = term.get("scopeName")
    if scope in ("BestEffort", "Terminating", "CrossNamespacePodAffinity"):
        return False
    if scope != "PriorityClass":
        return True
    chosen, values = pod.get("priorityClassName") or "", term.get("values") or []
    return {
        "In": chosen in values,
        "NotIn": chosen not in values,
        "Exists": bool(chosen),
        "DoesNotExist": not chosen,
    }.get(str(term.get("operator")), True)


def _amount(resource: str, value: Fraction) -> str:
    if "memory" in resource or "storage" in resource:
        return f"{float(value / _GIB):.4g}Gi"
    return f"{float(value):.6g}"
