"""PURE: what goes into the coordinator's core, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ringps.config import Timeouts
from ringps.wire.control import Beat, FromLauncher, FromWorker, ToLauncher, ToWorker


@dataclass(frozen=True, kw_only=True)
class QuorumSettings:
    """What the coordinator was told about the job."""

    world_size: int | None
    """Workers of the job; None to go by the launchers that come."""

    settle_s: float
    """Without a world size: how long no launcher may have come before the job starts."""

    encrypt_data: bool
    """Whether data connections are encrypted even if no launcher asks for it."""

    heartbeat_port: int
    """Where workers send their heartbeats."""

    timeouts: Timeouts

    min_workers: int | None = None
    """With how many members the ring goes on after a loss; None: with all of them only."""

    first_generation: int = 1
    """Number of the first generation; above 1 where the whole ring was started before, and all earlier
    generations are over."""

    pods: bool = False
    """Whether launchers are pods of a cluster: each comes with its worker ids, may be replaced at any time,
    and the job outlives them all. See `placed`."""

    follows: bool = False
    """Of pods: whether an earlier coordinator has formed generation `first_generation`, whose members may
    come back, and perhaps later ones."""

    again: bool = False
    """Of pods: whether this coordinator has served a start of the ring before this one."""

    verdict: str = ""
    """Of pods: how the job ended under an earlier coordinator, "done" or "failed: REASON"; else ""."""


# Events.


@dataclass(frozen=True)
class Received:
    """A control message came from a peer."""

    peer: bytes
    message: FromWorker | FromLauncher


@dataclass(frozen=True)
class Beaten:
    """A heartbeat came. It proves by itself whose it is."""

    beat: Beat


@dataclass(frozen=True)
class Tick:
    """Time went by."""


@dataclass(frozen=True)
class Fenced:
    """Whether an arbiter says that no other coordinator may rule this job."""

    held: bool


@dataclass(frozen=True)
class Placed:
    """Where a launcher's machine stands, from the largest failure domain to the smallest."""

    host: str
    place: tuple[str, ...]


@dataclass(frozen=True)
class Warned:
    """These machines are about to be taken away."""

    pods: tuple[tuple[int, str], ...]
    """Worker ids and the hosts where they run."""
    reason: str


@dataclass(frozen=True)
class Vanished:
    """This machine is gone for certain."""

    host: str
    reason: str


@dataclass(frozen=True)
class Charged:
    """A worker's machine failed, which counts against the job's budget of restarts."""

    worker_id: int
    reason: str
    host: str = ""
    """The machine, so that what its worker reported itself is not counted again; "" if it is not known."""


@dataclass(frozen=True)
class Recorded:
    """The verdict is written down where the next coordinator finds it."""


Outside = Fenced | Placed | Warned | Vanished | Charged | Recorded
"""What the cluster tells a coordinator."""

Event = Received | Beaten | Tick | Outside


# Actions.


@dataclass(frozen=True)
class Send:
    """Send a message to a peer, if it is there to take it."""

    peer: bytes
    message: ToWorker | ToLauncher


@dataclass(frozen=True)
class Emit:
    """Something happened that belongs into the events file; tell these launchers too."""

    event: dict[str, Any]
    launchers: tuple[bytes, ...]


@dataclass(frozen=True)
class Refuse:
    """The event was not acted upon; `reason` is one of a small, fixed set of phrases."""

    reason: str


@dataclass(frozen=True)
class Finish:
    """The job is over; everything that has to be said about it was said before."""

    reason: str
    suspended: bool = False
    """Whether it stopped at a checkpoint."""


@dataclass(frozen=True)
class StartAgain:
    """This start of the ring is over, and another one follows; nothing more comes of this quorum."""

    delay_s: float


@dataclass(frozen=True)
class Record:
    """Write the verdict down; once `Recorded` comes, everybody is told."""

    verdict: str


Action = Send | Emit | Refuse | Finish | StartAgain | Record
