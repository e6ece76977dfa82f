"""PURE: whether a node takes a pod that was bound to it, as the kubelet decides that anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil
from typing import Any

from tests.k8s.kubelet.quantity import amount

_UNSUPPORTED = ("initContainers", "ephemeralContainers", "hostNetwork", "hostPID", "hostIPC")


def refusal(
    pod: Mapping[str, Any], others: Sequence[Mapping[str, Any]], capacity: Mapping[str, str]
) -> tuple[str, str] | None:
    """Reason and message of the status of a pod that does not fit beside the others, which run already."""
    for field in _UNSUPPORTED:
        if pod["spec"].get(field):
            return "UnexpectedAdmissionError", f"the kubelet for tests does not support spec.{field}"
    wanted = {**requests(pod), "pods": Fraction(1)}
    for name, needed in wanted.items():
        used = sum((requests(other).get(name, Fraction(name == "pods")) for other in others), Fraction())
        room = amount(capacity.get(name, "0"))
        if needed > 0 and used + needed > room:
            scale = 1000 if name == "cpu" else 1
            numbers = [ceil(each * scale) for each in (needed, used, room)]
            return f"OutOf{name}", (
                f"Node didn't have enough resource: {name}, requested: {numbers[0]}, used: {numbers[1]}, "
                f"capacity: {numbers[2]}"
            )
    return None


def requests(pod: Mapping[str, Any]) -> dict[str, Fraction]:
    """What the containers of a pod ask for in all."""
    total: dict[str, Fraction] = {}
    for container in pod["spec"]["containers"]:
        resources = container.get("resources") or {}
        asked = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
        for name, text in asked.items():
            total[name] = total.get(name, Fraction()) + amount(text)
    return total
