"""PURE: who may coordinate the job, decided by a Lease of the API server.

The method is that of Kubernetes' own controllers (client-go's `leaderelection`): every write names the
version that it read, so of two that write at once one fails; and whoever waits goes by how long *it* has
seen the record unchanged, so that no two machines' clocks are compared.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

DURATION_S = 15.0
"""A holder that has not renewed for so long may be replaced."""

RENEW_S = 5.0
"""From one renewal to the next."""

RETRY_S = 1.0
"""From a failed attempt to the next."""

MARGIN_S = 3.0
"""So much earlier a holder stops to rely on the Lease than others may take it: what it decided last takes
effect in that time, and clocks of different machines do not run quite alike."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A Lease as it was read."""

    uid: str
    version: str
    holder: str
    """The identity of who has it; "" if nobody does."""
    duration_s: float
    acquired: str
    renewed: str
    transitions: int

    @classmethod
    def of(cls, thing: Mapping[str, Any]) -> Record:
        """From the API server's object; what is missing counts as empty."""
        metadata, spec = (_mapping(thing, key) for key in ("metadata", "spec"))
        duration, transitions = spec.get("leaseDurationSeconds"), spec.get("leaseTransitions")
        return cls(
            uid=str(metadata.get("uid") or ""),
            version=str(metadata.get("resourceVersion") or ""),
            holder=str(spec.get("holderIdentity") or ""),
            duration_s=float(duration) if isinstance(duration, int) else 0.0,
            acquired=str(spec.get("acquireTime") or ""),
            renewed=str(spec.get("renewTime") or ""),
            transitions=transitions if isinstance(transitions, int) else 0,
        )


class Decision(enum.Enum):
    """What to do about the Lease."""

    TAKE = "take"
    RENEW = "renew"
    WAIT = "wait"
    LOST = "lost"


class Election:
    """One candidate's view of it.

    Args:
        identity: of this pod. A container that is started again in the same pod is the same candidate.
    """

    def __init__(self, identity: str, *, duration_s: float = DURATION_S, margin_s: float = MARGIN_S) -> None:
        self.identity = identity
        self.duration_s = duration_s
        self._margin_s = margin_s
        self._seen: Record | None = None
        self._seen_s = 0.0
        self._ours: Record | None = None
        self._held_until_s = float("-inf")

    @property
    def held_until_s(self) -> float:
        """Until when it is certain that no other candidate has the Lease."""
        return self._held_until_s

    def held(self, now_s: float) -> bool:
        """Whether that is certain now."""
        return now_s < self._held_until_s

    def decide(self, record: Record, now_s: float) -> tuple[Decision, str]:
        """What to do about the Lease as it was just read, and why."""
        # The version is left out: somebody who only adds an annotation does not keep a holder alive.
        content = replace(record, version="")
        if content != self._seen:
            self._seen, self._seen_s = content, now_s
        ours = self._ours
        if ours is not None:
            if record.uid != ours.uid:
                return Decision.LOST, "the Lease was deleted and made anew"
            if record.holder not in ("", self.identity):
                return Decision.LOST, f"{record.holder} has the Lease now"
            if record.transitions != ours.transitions:
                return Decision.LOST, "another coordinator had the Lease meanwhile"
        if record.holder == self.identity:
            return Decision.RENEW, "we have the Lease"
        if not record.holder:
            return Decision.TAKE, "nobody has the Lease"
        left_s = self._seen_s + max(self.duration_s, record.duration_s) - now_s
        if left_s > 0:
            return Decision.WAIT, f"{record.holder} has the Lease"
        return Decision.TAKE, f"{record.holder} has not renewed the Lease"

    def renewed(self, record: Record, asked_s: float) -> None:
        """The API server has taken our write.

        Args:
            record: as it is now.
            asked_s: when the request was begun: others may count from then.
        """
        self._ours = record
        self._held_until_s = max(self._held_until_s, asked_s + self.duration_s - self._margin_s)

    def given_up(self) -> None:
        """The Lease is not relied upon any more."""
        self._held_until_s = float("-inf")


def claim(election: Election, record: Record, decision: Decision, now: str) -> dict[str, Any]:
    """The merge patch that takes or renews the Lease, if it is still the version that was read.

    Args:
        now: the time of day, as the API server writes it.
    """
    spec: dict[str, Any] = {
        "holderIdentity": election.identity,
        "leaseDurationSeconds": round(election.duration_s),
        "renewTime": now,
    }
    if decision is Decision.TAKE:
        spec |= {"acquireTime": now, "leaseTransitions": record.transitions + 1}
    return _patch(record, spec)


def release(record: Record, now: str) -> dict[str, Any]:
    """The merge patch that lets another candidate take the Lease at once."""
    return _patch(record, {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": now})


def _patch(record: Record, spec: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"resourceVersion": record.version}, "spec": spec}


def _mapping(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, Mapping) else {}
