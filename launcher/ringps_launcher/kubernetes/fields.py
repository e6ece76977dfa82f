"""PURE: reading the API server's objects leniently: what is missing or misshapen counts as not said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ringps_launcher.kubernetes import names

Object = Mapping[str, Any]

_TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(\.\d+)?(?:Z|\+00:00)")


def mapping(parent: Object, *path: str) -> Object:
    """The mapping at this path; empty if there is none."""
    value: Any = parent
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def mappings(parent: Object, *path: str) -> list[Object]:
    """The mappings in the list at this path."""
    value = mapping(parent, *path[:-1]).get(path[-1])
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def text(parent: Object, *path: str) -> str:
    """The text at this path, or ""."""
    value = mapping(parent, *path[:-1]).get(path[-1])
    return value if isinstance(value, str) else ""


def number(parent: Object, *path: str) -> int:
    """The whole number at this path, or 0."""
    value = mapping(parent, *path[:-1]).get(path[-1])
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def name_of(thing: Object) -> str:
    """An object's name."""
    return text(thing, "metadata", "name")


def label(thing: Object, key: str) -> str:
    """A label's value, or ""."""
    return text(thing, "metadata", "labels", key)


def component_of(thing: Object) -> str:
    """`worker` or `coordinator`."""
    return label(thing, names.COMPONENT_LABEL)


def worker_id_of(pod: Object) -> int | None:
    """The completion index of a worker's pod."""
    index = text(pod, "metadata", "annotations", names.INDEX_ANNOTATION) or label(pod, names.INDEX_ANNOTATION)
    return int(index) if index.isascii() and index.isdecimal() else None


def condition(thing: Object, kind: str) -> Object:
    """The condition of this type, whatever its status; empty if there is none."""
    for entry in mappings(thing, "status", "conditions"):
        if entry.get("type") == kind:
            return entry
    return {}


def holds(thing: Object, kind: str) -> bool:
    """Whether the condition of this type is true."""
    return condition(thing, kind).get("status") == "True"


def is_owned_by(thing: Object, owner: Object) -> bool:
    """Whether `owner` is among the object's owners."""
    uid = text(owner, "metadata", "uid")
    return bool(uid) and any(
        entry.get("uid") == uid for entry in mappings(thing, "metadata", "ownerReferences")
    )


def time_of(stamp: object) -> float | None:
    """Seconds since 1970 of a timestamp in an object."""
    found = _TIME.fullmatch(stamp) if isinstance(stamp, str) else None
    if found is None:
        return None
    year, month, day, hour, minute, second = map(int, found.groups()[:6])
    days = _days(year, month, day)
    return ((days * 24 + hour) * 60 + minute) * 60 + second + float(found[7] or 0)


def created(thing: Object) -> float:
    """When an object was created, in seconds since 1970; 0 if that is not said."""
    return time_of(mapping(thing, "metadata").get("creationTimestamp")) or 0.0


def last_seen(event: Object) -> float:
    """When an Event happened last, in seconds since 1970; 0 if that is not said."""
    stamps = (
        mapping(event, "series").get("lastObservedTime"),
        event.get("lastTimestamp"),
        event.get("eventTime"),
        event.get("firstTimestamp"),
        mapping(event, "metadata").get("creationTimestamp"),
    )
    times = [time_of(stamp) for stamp in stamps]
    return next((time for time in times if time), 0.0)


def one_line(words: str) -> str:
    """A text that others may have had a hand in: in one line, and without control characters."""
    line = " ".join(words.split())
    return line if line.isprintable() else ascii(line)[1:-1]


def _days(year: int, month: int, day: int) -> int:
    """Days since 1970-01-01; the year is taken to begin in March, so that the leap day is its last."""
    year -= month <= 2
    month = (month + 9) % 12
    of_year = (153 * month + 2) // 5 + day - 1
    return year * 365 + year // 4 - year // 100 + year // 400 + of_year - 719_468
