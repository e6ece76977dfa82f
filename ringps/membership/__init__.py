"""Who is in the ring.

Belongs here: the coordinator with its pure core (`quorum` and the modules it decides with), and
the links by which workers and launchers talk to it. Does not: gradients, and what a lost worker
means for a collective (`collectives`). Launchers use this front and nothing behind it, so
importing it must stay cheap: no torch.
"""

from __future__ import annotations

from ringps.membership.client import JobOver, Listener, WorkerLink
from ringps.membership.coordinator import Coordinator, CoordinatorSettings, CoordinatorStatistics
from ringps.membership.events import Charged, Fenced, Placed, Recorded, Vanished, Warned
from ringps.membership.launcher_link import (
    CoordinatorBack,
    CoordinatorLost,
    JobEnded,
    LauncherLink,
    LauncherMessage,
)
from ringps.membership.restarts import RingRestarts, starting_again
from ringps.transport.keys import JobKey
from ringps.wire.control import Assignment, Evict, Expel, JobDone, JobEvent, JobFailed, Replaceable

__all__ = [
    "Assignment",
    "Charged",
    "Coordinator",
    "CoordinatorBack",
    "CoordinatorLost",
    "CoordinatorSettings",
    "CoordinatorStatistics",
    "Evict",
    "Expel",
    "Fenced",
    "JobDone",
    "JobEnded",
    "JobEvent",
    "JobFailed",
    "JobKey",
    "JobOver",
    "LauncherLink",
    "LauncherMessage",
    "Listener",
    "Placed",
    "Recorded",
    "Replaceable",
    "RingRestarts",
    "Vanished",
    "Warned",
    "WorkerLink",
    "starting_again",
]
