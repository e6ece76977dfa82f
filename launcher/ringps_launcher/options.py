"""PURE: what `ringps run` was asked for, besides the job itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where it runs and what it writes."""

    python: str
    """The interpreter that runs the workers."""

    host: str
    """Name of this machine."""

    join: str | None = None
    """`HOST:PORT` of the coordinator to join, or None to run on this machine alone."""

    key_file: str | None = None
    """The job key, needed to join."""

    address: str | None = None
    """IP address at which the other machines reach this one; None to find it out."""

    place: int | None = None
    """In a pod of a cluster: the id of its worker. Then this launcher outlives coordinators and starts of the
    ring, and ends when the job does or its pod must go."""

    events: str | None = None
    """The events file."""

    log_dir: str | None = None
    """Directory for the ranks' raw output."""
