"""PURE: what the operator looks at: pods, nodes and the worker Job, taken from the API server's objects.

Objects are read leniently: what is missing or of another shape counts as not said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.topology import rack_of, zone_of

_UNREACHABLE = "node.kubernetes.io/unreachable"
_OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
_DEFAULT_GRACE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A worker's pod."""

    uid: str
    name: str
    worker_id: int
    owner: str = ""
    """The uid of the Job that it is of."""
    node: str = ""
    """Where it was bound to; "" before."""
    zone: str = ""
    """The zone by its own label, which newer API servers set."""
    phase: str = "Pending"
    deleted: bool = False
    """Whether it is being deleted."""
    grace_s: float = 0.0
    """If so: how long its processes are given."""
    disruption: str = ""
    """The reason of its DisruptionTarget condition, if that is true."""
    disruption_message: str = ""
    status_reason: str = ""
    """Why it is in this phase, in the kubelet's word for it ("Evicted")."""
    status_message: str = ""
    delayed: bool = False
    """Whether the Job controller will wait longer for its successor, because pods before it ended early."""
    tracked: bool = False
    """Whether the Job controller holds on to it, as it does until it has made its successor."""
    exit_code: int | None = None
    """Of its launcher, once that has ended."""
    exit_reason: str = ""
    """The kubelet's word for that end ("OOMKilled")."""

    @property
    def terminal(self) -> bool:
        """Whether the pod has ended for good, and nothing more will be said of how."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def stopped(self) -> bool:
        """Whether its launcher runs no more; the pod may have to say yet why."""
        return self.terminal or self.exit_code is not None

    @classmethod
    def of(cls, thing: Mapping[str, Any]) -> Pod | None:
        """From an object; None if it is no worker's."""
        metadata, spec, status = (_mapping(thing, key) for key in ("metadata", "spec", "status"))
        labels, annotations = _mapping(metadata, "labels"), _mapping(metadata, "annotations")
        index = annotations.get(names.INDEX_ANNOTATION) or labels.get(names.INDEX_ANNOTATION)
        if not (isinstance(index, str) and index.isascii() and index.isdecimal()):
            return None
        disruption = _true_condition(status, "DisruptionTarget")
        ended = _terminated(status)
        code = ended.get("exitCode")
        return cls(
            uid=_text(metadata, "uid"),
            name=_text(metadata, "name"),
            worker_id=int(index),
            owner=_owner(metadata),
            node=_text(spec, "nodeName"),
            zone=zone_of(labels),
            phase=_text(status, "phase") or "Pending",
            deleted=bool(metadata.get("deletionTimestamp")),
            grace_s=_seconds(metadata.get("deletionGracePeriodSeconds")),
            disruption="" if disruption is None else _text(disruption, "reason") or "unknown",
            disruption_message="" if disruption is None else _text(disruption, "message"),
            status_reason=_text(status, "reason"),
            status_message=_text(status, "message"),
            delayed=annotations.get(names.IGNORED_FAILURES_ANNOTATION, "0") != "0",
            tracked=names.TRACKING_FINALIZER in _texts(metadata, "finalizers"),
            exit_code=code if isinstance(code, int) else None,
            exit_reason=_text(ended, "reason"),
        )


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster."""

    name: str
    zone: str = ""
    rack: str = ""
    gone: bool = False
    """Whether the cluster has no such node any more."""
    unreachable: bool = False
    """Whether its kubelet has not been heard of for a while."""

    @property
    def dead(self) -> bool:
        """Whether nobody on that machine looks after its pods. One that is merely not ready still does."""
        return self.gone or self.unreachable

    @classmethod
    def of(cls, thing: Mapping[str, Any]) -> Node:
        """From an object."""
        metadata, spec, status = (_mapping(thing, key) for key in ("metadata", "spec", "status"))
        labels = _mapping(metadata, "labels")
        silent = any(
            condition.get("type") == "Ready" and condition.get("status") == "Unknown"
            for condition in _mappings(status, "conditions")
        )
        tainted = any(
            taint.get("key") in (_UNREACHABLE, _OUT_OF_SERVICE) for taint in _mappings(spec, "taints")
        )
        return cls(
            name=_text(metadata, "name"),
            zone=zone_of(labels),
            rack=rack_of(labels),
            unreachable=silent or tainted,
        )


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """The Job that makes the workers' pods."""

    uid: str
    suspended: bool = False
    deleted: bool = False
    """Whether it is being deleted, or is gone."""
    failure: str = ""
    """Why it has failed, so that it makes no pods any more."""

    @classmethod
    def of(cls, thing: Mapping[str, Any]) -> WorkerJob:
        """From an object."""
        metadata, spec, status = (_mapping(thing, key) for key in ("metadata", "spec", "status"))
        failed = _true_condition(status, "Failed") or _true_condition(status, "FailureTarget")
        failure = ""
        if failed is not None:
            words = (_text(failed, "reason"), _text(failed, "message"))
            failure = ": ".join(filter(None, words)) or "no reason given"
        return cls(
            uid=_text(metadata, "uid"),
            suspended=spec.get("suspend") is True,
            deleted=bool(metadata.get("deletionTimestamp")),
            failure=failure,
        )


def _mapping(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, Mapping) else {}


def _mappings(parent: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = parent.get(key)
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def _text(parent: Mapping[str, Any], key: str) -> str:
    value = parent.get(key)
    return value if isinstance(value, str) else ""


def _texts(parent: Mapping[str, Any], key: str) -> list[str]:
    value = parent.get(key)
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _seconds(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else _DEFAULT_GRACE_S


def _true_condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    for condition in _mappings(status, "conditions"):
        if condition.get("type") == kind and condition.get("status") == "True":
            return condition
    return None


def _terminated(status: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the launcher's container ended; empty if it has not."""
    containers = _mappings(status, "containerStatuses")
    containers.sort(key=lambda entry: entry.get("name") != names.WORKER)
    return _mapping(_mapping(containers[0], "state"), "terminated") if containers else {}


def _owner(metadata: Mapping[str, Any]) -> str:
    for owner in _mappings(metadata, "ownerReferences"):
        if owner.get("controller") is True:
            return _text(owner, "uid")
    return ""
