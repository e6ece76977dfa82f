"""PURE: one thing that keeps a job, or a pod of it, from running."""

from __future__ import annotations

from dataclasses import dataclass

ORDER = (
    "deadline",
    "suspended",
    "queue",
    "coordinator",
    "quota",
    "admission",
    "rights",
    "image",
    "configuration",
    "volumes",
    "crashed",
    "gate",
    "gang",
    "preempting",
    "resources",
    "taints",
    "nodes",
    "scheduler",
    "other",
    "dead node",
    "disrupted",
    "missing",
    "starting",
    "ending",
)
"""Kinds of obstacles, the most important first."""


@dataclass(frozen=True)
class Obstacle:
    """What is in the way, and what to do about it."""

    kind: str
    """One of `ORDER`."""

    words: str
    """What is in the way, as "it ..." or about the cluster."""

    advice: str = ""
    """What to do; may be empty."""
