"""Who is in the ring.

Belongs here: the coordinator with its pure core (`quorum` and the modules it decides with), and
the links by which workers and launchers talk to it. Does not: gradients, and what a lost worker
means for a collective (`collectives`). Launchers use this front and nothing behind it, so
importing it must stay cheap: no torch.
"""

from __future__ import annotations

from ringps.membership.client import JobOver, Listener, WorkerLink
from ringps.membership.coordinator import Coordinator, CoordinatorSettings, CoordinatorStatistics
from ringps.membership.launcher_link import (
    CoordinatorBack,
    CoordinatorLost,
    LauncherLink,
    LauncherMessage,
)
from ringps.membership.restarts import RingRestarts, starting_again
from ringps.transport.keys import JobKey
from ringps.wire.control import Assignment, Expel, JobDone, JobEvent, JobFailed, Replaceable

__all__ = [
    "Assignment",
    "Coordinator",
    "CoordinatorBack",
    "CoordinatorLost",
    "CoordinatorSettings",
    "CoordinatorStatistics",
    "Expel",
    "JobDone",
    "JobEvent",
    "JobFailed",
    "JobKey",
    "JobOver",
    "LauncherLink",
    "LauncherMessage",
    "Listener",
    "Replaceable",
    "RingRestarts",
    "WorkerLink",
    "starting_again",
]
