"""PURE: where a worker is, from the largest failure domain to the smallest. The ring's order follows it."""

from __future__ import annotations

from collections.abc import Mapping

ZONE_LABEL = "topology.kubernetes.io/zone"

RACK_LABELS = (
    "topology.ringps.dev/rack",
    "topology.kubernetes.io/rack",
    "cloud.provider.com/topology-rack",
)
"""A node's rack is the first of these that it has. Kubernetes itself defines none; ours goes first, so that
an administrator can overrule a provider."""

Place = tuple[str, str, str]
"""Zone, rack and node; "" where one is not known."""


def zone_of(labels: Mapping[str, object]) -> str:
    """The zone by the labels of a node, or of a pod."""
    return _first(labels, (ZONE_LABEL,))


def rack_of(labels: Mapping[str, object]) -> str:
    """The rack by the labels of a node."""
    return _first(labels, RACK_LABELS)


def _first(labels: Mapping[str, object], keys: tuple[str, ...]) -> str:
    for key in keys:
        value = labels.get(key)
        if isinstance(value, str) and value:
            return value
    return ""
