"""PURE: what an earlier coordinator left in the status document, for the next one to go on from.

Anybody who may write the ConfigMap could have changed it, so what is not as we write it counts as not there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ringps_launcher.kubernetes.endings import CAUSES

VERSION = 1
"""Of the status document."""

RING = "ring"
"""Restarts of the whole ring, among those counted by cause."""

MOST_EVENTS = 20
_LONGEST = 1000
_MOST_COUNTED = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """The part of it that goes on."""

    generation: int = 0
    """The newest that was written down; more may have been formed since."""
    step: int | None = None
    checkpoint: Mapping[str, Any] | None = None
    """`{"step", "t", "where"}` of the newest one."""
    restarts: Mapping[str, int] = field(default_factory=dict)
    """By cause."""
    budget_used: int = 0
    events: tuple[Mapping[str, Any], ...] = ()
    seen: tuple[str, ...] = ()
    """Pods whose end was counted."""
    forgetful: bool = False
    """Whether there were more of those than are remembered."""
    verdict: str = ""
    """"done" or "failed: REASON" if the job is over."""


def read(data: Mapping[str, Any], *, status_entry: str, seen_entry: str, verdict_entry: str) -> Earlier:
    """From the data of the ConfigMap; all empty if nothing was written yet."""
    document = _parsed(data.get(status_entry))
    budget, restarts = document.get("budget"), document.get("restarts")
    step, events = document.get("step"), document.get("events")
    used = budget.get("used") if isinstance(budget, dict) else None
    seen, verdict = data.get(seen_entry), data.get(verdict_entry)
    words = seen.split() if isinstance(seen, str) else []
    forgetful = words[:1] == ["..."]
    return Earlier(
        generation=_count(document.get("generation")) or 0,
        step=_count(step),
        checkpoint=_checkpoint(document.get("checkpoint")),
        restarts={
            cause: count
            for cause in (*CAUSES, RING)
            if isinstance(restarts, dict) and (count := _count(restarts.get(cause)))
        },
        budget_used=_count(used) or 0,
        events=tuple(filter(None, map(_event, events[-MOST_EVENTS:]))) if isinstance(events, list) else (),
        seen=tuple(words[1:] if forgetful else words),
        forgetful=forgetful,
        verdict=verdict if isinstance(verdict, str) else "",
    )


def seen_text(seen: tuple[str, ...], *, forgetful: bool) -> str:
    """How `seen` is written down."""
    return " ".join((*(("...",) if forgetful else ()), *seen))


def _parsed(text: object) -> dict[str, Any]:
    try:
        document = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) and document.get("version") == VERSION else {}


def _count(value: object) -> int | None:
    fine = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_COUNTED
    return value if fine else None  # type: ignore[return-value]


def _checkpoint(value: object) -> Mapping[str, Any] | None:
    if not isinstance(value, dict):
        return None
    step, time_s, where = _count(value.get("step")), value.get("t"), value.get("where")
    if step is None or not _is_time(time_s) or not isinstance(where, str):
        return None
    return {"step": step, "t": time_s, "where": where[:_LONGEST]}


def _event(value: object) -> Mapping[str, Any] | None:
    if not isinstance(value, dict):
        return None
    time_s, text = value.get("t"), value.get("text")
    if not _is_time(time_s) or not isinstance(text, str):
        return None
    return {"t": time_s, "text": text[:_LONGEST]}


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
