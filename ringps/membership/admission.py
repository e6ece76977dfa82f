"""PURE: may a worker that says hello take part?"""

from __future__ import annotations

from collections import Counter

from ringps.membership.roster import Worker
from ringps.membership.state import JobState
from ringps.wire.control import Hello

COMPLETE = "the ring is complete; joining later is not possible in this version"

_SHOWN = 12


def refusal(state: JobState, hello: Hello) -> tuple[str, str] | None:
    """Why a new process may not take part: in a fixed phrase, and in words for its user."""
    if 0 < hello.generation < state.settings.first_generation:
        return (
            "generation is over",
            f"generation {hello.generation} is over, the whole ring was started again since then; "
            "this process is no part of it: start a new one",
        )
    if state.ring.number and state.ring.lost is None and not state.survives:
        return COMPLETE, COMPLETE
    if hello.session in state.peers:
        return "session taken", "another process has this session"
    world_size = state.plan.world_size
    if world_size is None:
        return (
            "job size not known yet",
            "the size of the job is not known before its launchers have come; "
            "start workers with `ringps run`, or give the coordinator a world size",
        )
    if hello.worker_id >= world_size:
        return (
            "worker id out of range",
            f"worker id {hello.worker_id} is not one of 0..{world_size - 1}, the workers of this job",
        )
    if state.survives and hello.generation > 0:
        return (
            "generation is over",
            f"generation {hello.generation} is over, the ring is at {state.ring.number}; "
            "this process was taken for lost: start a new one",
        )
    holder = state.roster.taken(hello.worker_id, replaceable=state.survives)
    if holder is not None:
        return (
            "worker id taken",
            f"worker id {hello.worker_id} is taken by {holder}; give each worker an id of its own",
        )
    return other_program(state, hello.program) if state.running else None


def other_program(state: JobState, program: str) -> tuple[str, str] | None:
    """Why a process that runs this script may not join a ring that runs already."""
    given = Counter(worker.program for worker in state.ring.remaining if worker.program is not None)
    if not given or program in given.most_common(1)[0]:
        return None
    expected = given.most_common(1)[0][0]
    return (
        "another script",
        f"this worker runs another script ({_short(program)}) than the ring ({_short(expected)}); "
        "start it with the same one",
    )


def member_adopted_as(state: JobState, hello: Hello) -> Worker | None:
    """The member of a ring that was taken over that this process is, if nobody else has come as it."""
    worker = state.roster.get(hello.worker_id)
    if worker is None or worker.session or worker.exited is not None or worker.vacant:
        return None
    same = (worker.host, worker.pid) == (hello.host, hello.pid)
    return worker if worker.adopted and same else None


def _short(program: str) -> str:
    if not program:
        return "none"
    return program if len(program) <= _SHOWN else f"{program[:_SHOWN]}.."
