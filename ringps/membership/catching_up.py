"""PURE: what somebody is told who is new here, or whose connection is. They skip what they know."""

from __future__ import annotations

from collections.abc import Iterable

from ringps.membership.ending import Ending
from ringps.membership.roster import JOINERS, Worker
from ringps.membership.state import JobState
from ringps.membership.succession import Succession
from ringps.wire.control import AllLeft, Evict, Waiting, Welcome, clip


def catch_up(state: JobState, succession: Succession, worker: Worker) -> None:
    """Tell a worker all that concerns it."""
    ring = state.ring
    joins = worker.phase in JOINERS
    welcome = Welcome(
        heartbeat_port=state.settings.heartbeat_port,
        elastic=state.elastic,
        min_workers=state.settings.min_workers or 0,
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


def warn_launchers(state: JobState, sessions: Iterable[str]) -> None:
    """Tell these launchers if their machines are about to be taken away, once they have workers."""
    concerned = frozenset(sessions)
    for offer in state.plan.offers:
        reason = state.surroundings.warning_of(offer.hello.host)
        if reason is not None and offer.session in concerned and state.plan.complete:
            state.out.send_to(offer.session, Evict(worker_id=offer.first_worker_id, reason=clip(reason)))


def catch_up_launcher(state: JobState, succession: Succession, ending: Ending, session: str) -> None:
    """Tell a launcher all that concerns it."""
    state.out.send_to(session, Waiting(reason=clip(state.plan.waiting_for())))
    if state.plan.complete:
        state.out.send_to(session, state.plan.assignment(session))
    succession.catch_up_launcher(session)
    warn_launchers(state, [session])
    if ending.verdict is not None and ending.told:
        state.out.send_to(session, ending.verdict)
