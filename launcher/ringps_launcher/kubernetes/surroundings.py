"""PURE: what is around a job's pods: Events about them, and the nodes as far as we may look at them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ringps_launcher.kubernetes.fields import Object, holds, last_seen, mapping, name_of


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """As of `now`, in seconds since 1970."""

    events: Sequence[Object]
    nodes: Sequence[Object] | None
    """None if we may not look at them."""
    now: float

    def latest(self, kind: str, name: str, reasons: Iterable[str]) -> Object | None:
        """The last Event about an object that gives one of these reasons."""
        wanted = set(reasons)
        found = [
            event
            for event in self.events
            if event.get("reason") in wanted and _is_about(mapping(event, "involvedObject"), kind, name)
        ]
        return max(found, key=last_seen, default=None)

    def trouble_with(self, node: str) -> str:
        """`gone` or `not ready`; "" if the node is fine, or nobody can say."""
        if self.nodes is None or not node:
            return ""
        found = next((entry for entry in self.nodes if name_of(entry) == node), None)
        if found is None:
            return "gone"
        return "" if holds(found, "Ready") else "not ready"


def _is_about(thing: Object, kind: str, name: str) -> bool:
    return thing.get("kind") == kind and thing.get("name") == name
