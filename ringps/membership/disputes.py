"""PURE: a member disputes what the others called, and all are asked; `inquiry` keeps their answers."""

from __future__ import annotations

from ringps.membership.roster import Worker
from ringps.membership.state import JobState
from ringps.wire.control import Inquire, Verdict


def open_one(state: JobState, sequence: int, now_s: float) -> str | None:
    """A member disputes a collective. None, or the reason for not looking into it."""
    members = state.ring.members
    ask, reason = state.inquiries.open(sequence, [worker.absence() for worker in members], now_s)
    if not ask:
        return reason
    for worker in members:
        if worker.absence() is None:
            state.out.tell(worker, Inquire(generation=state.ring.number, sequence=sequence))
    return None


def answer(state: JobState, worker: Worker, sequence: int, call: str) -> str | None:
    """What a member called. None, or the reason for not counting it."""
    if worker.rank is None or worker not in state.ring.members:
        return "message out of turn"
    return state.inquiries.answer(sequence, worker.rank, call)


def settle(state: JobState, now_s: float) -> None:
    """Tell all members what is known now."""
    for sequence, calls in state.inquiries.settle(now_s):
        verdict = Verdict(generation=state.ring.number, sequence=sequence, calls=calls)
        state.out.tell_all(state.ring.members, verdict)
