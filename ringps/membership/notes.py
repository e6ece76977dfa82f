"""PURE: what members have written into the events file, and what it says of the job."""

from __future__ import annotations

from ringps.membership.roster import Worker
from ringps.membership.state import JobState

RESUMABLE = frozenset({"checkpoint_saved", "restored"})
"""Notes after which there is a checkpoint that the ring can be started again from..."""

GIVEN_UP = "checkpoints_given_up"
"""...and the one after which it is not to be: a later run goes on from it, or too many saves have failed."""

NOTES = RESUMABLE | {
    GIVEN_UP,
    "training",
    "straggler",
    "diverged",
    "recovered",
    "state_fetched",
    "checkpoint_failed",
    "checkpoint_late",
    "checkpoint_skipped",
}
"""The events that members may have written into the events file."""

_MAX_NOTE_FIELDS = 32


def note(state: JobState, worker: Worker, event: dict[str, object]) -> str | None:
    """A member has something written down. None, or the reason for refusing it."""
    name = event.get("event")
    if name not in NOTES or len(event) > _MAX_NOTE_FIELDS:
        return "note of an unknown kind"
    details = {key: value for key, value in event.items() if key != "event"}
    details |= {"generation": state.ring.number, "worker_id": worker.worker_id}
    if name in RESUMABLE or name == GIVEN_UP:
        state.resumable = name != GIVEN_UP
        state.given_up = name == GIVEN_UP
    state.emit(str(name), **details)
    return None
