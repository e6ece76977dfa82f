"""PURE: log files of containers, in the format of the container runtime interface, and what is asked of them.

A line is `TIME STREAM F|P TEXT`; P marks a piece of a line that goes on in the next.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which part of a log is asked for."""

    tail: int | None = None
    since_s: float | None = None
    """Unix time of the oldest line."""
    timestamps: bool = False
    limit_bytes: int | None = None


def wanted(query: Mapping[str, str], now_s: float) -> Wanted:
    """From the query of a request to the kubelet. Raises `ValueError`."""
    since_s = None
    if query.get("sinceSeconds"):
        since_s = now_s - int(query["sinceSeconds"])
    elif query.get("sinceTime"):
        since_s = datetime.datetime.fromisoformat(query["sinceTime"].replace("Z", "+00:00")).timestamp()
    return Wanted(
        tail=int(query["tailLines"]) if query.get("tailLines") else None,
        since_s=since_s,
        timestamps=query.get("timestamps") == "true",
        limit_bytes=int(query["limitBytes"]) if query.get("limitBytes") else None,
    )


class Reader:
    """Turns what is read from a log file, piece by piece, into what is sent."""

    def __init__(self, want: Wanted) -> None:
        self._want = want
        self._rest = b""
        self._room = want.limit_bytes
        self._within_line = False

    def first(self, content: bytes) -> bytes:
        """All that there is at the start, of which only the tail may be wanted."""
        lines = self._lines(content)
        if self._want.tail is not None:
            lines = _tail(lines, self._want.tail)
        return self._joined(iter(lines))

    def more(self, content: bytes) -> bytes:
        """What has come since."""
        return self._joined(iter(self._lines(content)))

    @property
    def full(self) -> bool:
        return self._room == 0

    def _lines(self, content: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + content).split(b"\n")
        return lines

    def _joined(self, lines: Iterator[bytes]) -> bytes:
        out = b""
        for line in lines:
            stamp, _, tag, text = (line.split(b" ", 3) + [b""] * 3)[:4]
            if self._want.since_s is not None and _seconds(stamp) < self._want.since_s:
                continue
            if self._want.timestamps and not self._within_line:
                out += stamp + b" "
            self._within_line = tag == b"P"
            out += text if self._within_line else text + b"\n"
        if self._room is not None:
            out = out[: self._room]
            self._room -= len(out)
        return out


def _tail(lines: list[bytes], count: int) -> list[bytes]:
    """The last whole lines, pieces counted as one."""
    if count == 0:
        return []
    starts = [i for i in range(len(lines)) if i == 0 or lines[i - 1].split(b" ", 3)[2] != b"P"]
    return lines[starts[-count] :] if len(starts) > count else lines


def _seconds(stamp: bytes) -> float:
    whole, _, fraction = stamp.decode("ascii").rstrip("Z").partition(".")
    at = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    return at.timestamp() + float(f"0.{fraction or 0}")
