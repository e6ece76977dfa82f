"""PURE: what somebody is told who is new here, or whose connection is. They skip what they know."""

from __future__ import annotations

from ringps.membership.ending import Ending
from ringps.membership.roster import JOINERS, Worker
from ringps.membership.state import JobState
from ringps.membership.succession import Succession
from ringps.wire.control import AllLeft, Waiting, Welcome, clip


def catch_up(state: JobState, succession: Succession, worker: Worker) -> None:
    """Tell a worker all that concerns it."""
    ring = state.ring
    joins = worker.phase in JOINERS
    welcome = Welcome(
        heartbeat_port=state.settings.heartbeat_port,
        elastic=state.elastic,
        running=max(1, len(ring.remaining)) if joins else 0,
    )
    state.out.tell(worker, welcome)
    for message in ring.history(worker):
        state.out.tell(worker, message)
    succession.catch_up(worker)
    if ring.lost is not None:
        state.out.tell(worker, ring.lost)
    elif state.ended:
        state.out.tell(worker, AllLeft(generation=ring.number))


def catch_up_launcher(state: JobState, succession: Succession, ending: Ending, session: str) -> None:
    """Tell a launcher all that concerns it."""
    state.out.send_to(session, Waiting(reason=clip(state.plan.waiting_for())))
    if state.plan.complete:
        state.out.send_to(session, state.plan.assignment(session))
    succession.catch_up_launcher(session)
    if ending.verdict is not None:
        state.out.send_to(session, ending.verdict)
