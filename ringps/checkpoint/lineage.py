"""PURE: which checkpoints belong to the history of the training, so that going on from one is going on.

Each start of the whole ring is a *run*; their numbers grow. A run records in its claim from which checkpoint
it went on: its *base*. A run that was taken for lost may go on saving for a while, and what it saves late
belongs to a past that was abandoned. So the history is all of the newest run, then its base's run up to the
base's step, and so on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple

from ringps.checkpoint.manifest import MAX_NUMBER

MAX_CLAIM_BYTES = 4096


class Point(NamedTuple):
    """A checkpoint: by which run, and after which step."""

    run: int
    step: int


NOTHING: Final = "nothing"
"""The base of a run that began the training."""

UNKNOWN: Final = "unknown"
"""The base of a run that did not say: it ended before it had restored anything, or its claim was lost."""

Base = Point | Literal["nothing", "unknown"]


class LeftOut(NamedTuple):
    """Why a checkpoint is not in the history."""

    reason: str
    superseded: bool
    """Whether a later run took its place. If not, it is of a past with which nothing has to do."""


class Lineage(NamedTuple):
    """Checkpoints, divided."""

    history: list[Point]
    """Newest first."""

    left_out: dict[Point, LeftOut]


def history(checkpoints: Iterable[tuple[int, int]], claims: Mapping[int, Base]) -> Lineage:
    """Divide checkpoints into those that belong to the history, and others.

    A run of unknown base without checkpoints is passed over. One with checkpoints went on from something
    before the first of them, so that the next older run's are taken up to there.

    Args:
        checkpoints: (run, step) of each, in any order.
        claims: the base of each run that claimed its number. Of runs that are not in it, it is unknown.
    """
    steps: dict[int, list[int]] = {}
    for run, step in set(checkpoints):
        steps.setdefault(run, []).append(step)
    completed = {run for run, base in claims.items() if base != UNKNOWN}
    found: list[Point] = []
    left_out: dict[Point, LeftOut] = {}
    # Going from the newest run to the oldest: no run newer than `member` belongs to the history any more,
    # and no step after `bound`; and why.
    member, passed_over = MAX_NUMBER, LeftOut("", superseded=True)
    bound, after = MAX_NUMBER, LeftOut("", superseded=True)
    for run in sorted(steps.keys() | completed, reverse=True):
        own = sorted(steps.get(run, ()), reverse=True)
        if run > member:
            left_out.update({Point(run, step): passed_over for step in own})
            continue
        found += [Point(run, step) for step in own if step <= bound]
        left_out.update({Point(run, step): after for step in own if step > bound})
        base = claims.get(run, UNKNOWN)
        if base == NOTHING:
            member = 0
            passed_over = LeftOut(f"run {run} began from nothing", superseded=False)
        elif isinstance(base, tuple) and base[0] < run:
            member = base[0]
            passed_over = LeftOut(f"run {run} went on from run {member}", superseded=True)
            if base[1] < bound:
                bound, after = base[1], LeftOut(f"run {run} went on from step {base[1]}", superseded=True)
        elif own and own[-1] <= bound:
            bound = own[-1] - 1
            after = LeftOut(f"run {run} went on from a step before {own[-1]}", superseded=True)
    return Lineage(found, left_out)


def encode_claim(run: int, base: tuple[int, int] | Literal["unknown"] | None = UNKNOWN) -> bytes:
    """A claim as JSON.

    Args:
        run: its number.
        base: (run, step) of the checkpoint from which it went on; None if it began from nothing; unknown
            as long as it has not restored anything.
    """
    members: dict[str, object] = {"run": run}
    if base != UNKNOWN:
        members["base"] = None if base is None else list(base)
    return json.dumps(members).encode("ascii") + b"\n"


def decode_claim(raw: bytes, run: int) -> Base:
    """The base in a claim of a run.

    Raises:
        ValueError: it is no claim of that run; the message says why.
    """
    if len(raw) > MAX_CLAIM_BYTES:
        raise ValueError(f"it is longer than {MAX_CLAIM_BYTES} bytes")
    try:
        members = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON: it was cut off, or is damaged") from None
    if type(members) is not dict or members.get("run") != run:
        raise ValueError(f"it is not the claim of run {run}")
    base = members.get("base", UNKNOWN)
    if base is None:
        return NOTHING
    if "base" not in members:
        return UNKNOWN
    if type(base) is not list or len(base) != 2 or not all(type(number) is int for number in base):
        raise ValueError(f"its base {base!r} is no checkpoint")
    point = Point(*base)
    if not (0 < point.run < run and 0 <= point.step <= MAX_NUMBER):
        raise ValueError(f"its base {base!r} is no checkpoint of an older run")
    return point
