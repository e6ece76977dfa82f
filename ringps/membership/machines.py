"""PURE: what the cluster tells a coordinator of its machines, and what follows for their workers.

A machine that is gone is gone for certain, so its workers need not be silent first.
"""

from __future__ import annotations

from ringps.membership.catching_up import warn_launchers
from ringps.membership.ending import Ending
from ringps.membership.ends import Ends
from ringps.membership.events import Charged, Fenced, Outside, Placed, Recorded, Vanished, Warned
from ringps.membership.launchers import Launchers
from ringps.membership.restoration import Restoration
from ringps.membership.roster import BEATING, Worker
from ringps.membership.state import JobState


class Machines:
    """Acts upon the events of `events.Outside`."""

    def __init__(
        self, state: JobState, ending: Ending, ends: Ends, restoration: Restoration, launchers: Launchers
    ) -> None:
        self._state = state
        self._ending = ending
        self._ends = ends
        self._restoration = restoration
        self._launchers = launchers

    def handle(self, event: Outside, now_s: float) -> None:
        """The cluster says something."""
        around, plan = self._state.surroundings, self._state.plan
        match event:
            case Fenced(held=held):
                around.fenced = held
            case Placed(host=host, place=place):
                around.put(host, place)
            case Warned(pods=pods, reason=reason):
                fresh = {host for _, host in pods if around.warn(host, reason)}
                sessions = [offer.session for offer in plan.offers if offer.hello.host in fresh]
                warn_launchers(self._state, sessions)
            case Vanished(host=host, reason=reason):
                around.bury(host, reason)
                self._restoration.bury(host)
                for worker in self._state.roster.inside(BEATING):
                    if worker.host == host and not self._restoration.forget(worker):
                        self._ends.vanish(worker, reason, now_s)
                self._launchers.vanish(host)
            case Charged(worker_id=worker_id, reason=reason, host=host):
                if 0 <= worker_id < (plan.world_size or 0):
                    self._state.charge(self._process(worker_id, host), reason, by_machine=True)
            case Recorded():
                # Without a verdict of ours, somebody else's was written down: nobody must hear ours.
                around.recorded = around.recorded or self._ending.verdict is not None

    def _process(self, worker_id: int, host: str) -> Worker:
        """Which one failed on this host. What it reported itself is not counted again, and nothing is held
        against its successor."""
        newest, replaced = self._state.roster.get(worker_id), self._state.roster.replaced()
        known = [worker for worker in replaced if worker.worker_id == worker_id]
        known += [] if newest is None else [newest]
        for worker in reversed(known):
            ended = worker.vacant or worker.exited is not None
            if worker.host == host if host else ended:
                return worker
        return Worker(worker_id, host=host)
