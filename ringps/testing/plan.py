"""PURE: which faults happen to which worker, and when; and which of them did happen.

A plan is a list of faults. Every worker of a job gets the whole plan, and one record file for all of them: a
fault is written down there before it acts, so that it happens once in a job, also if the process that it
happened to is replaced. A fault that was never reached is not in the record: whoever runs a plan has to look
(`FaultPlan.unfired`), or a test that meant to break something would pass because nothing broke.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Kind = Literal[
    "kill", "stop", "cut", "delay", "slow", "leave", "corrupt_frame", "corrupt_bucket", "corrupt_parameters"
]
Direction = Literal["both", "in", "out"]
Draw = Callable[[int], int]
"""Gives a number from 0 to n - 1, such as `random.Random(seed).randrange`."""

AT_STEPS = ("step", "bucket", "reduced", "vote", "voted", "committed", "boundary")
AT_EXCHANGES = ("chunk", "phase")
AT_GENERATIONS = ("prepare", "bound", "connected", "handshake")
AT_JOINS = ("offer", "fetch", "fed")
AT_SAVES = ("save_write", "save_publish", "saved", "restore")
TRAINING = (*AT_STEPS, *AT_EXCHANGES, *AT_GENERATIONS, *AT_JOINS)
"""The moments of every job; those `AT_SAVES` come in jobs with checkpoints only."""
POINTS = (*TRAINING, *AT_SAVES)
"""Names of the moments; `ringps.probe` says what they are."""

_ONLY_AT: dict[str, tuple[str, ...]] = {
    "cut": AT_EXCHANGES,
    "slow": ("step",),
    "corrupt_frame": ("chunk",),
    "corrupt_bucket": ("reduced",),
    "corrupt_parameters": ("step",),
}
"""Some kinds need what is passed at these points."""

KINDS: tuple[Kind, ...] = (
    "kill", "stop", "cut", "delay", "slow", "leave", "corrupt_frame", "corrupt_bucket", "corrupt_parameters",
)  # fmt: skip

_COSTS_MEMBERS = {"kill": 1, "stop": 1, "cut": 1, "leave": 1, "corrupt_parameters": 2}
"""How many members a fault may take from its generation at most. Parameters that are wrong take one, and
another that was right is needed to outvote it."""
_HEALED_AFTER_STEPS = 3
_RECOVERED_AFTER_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A point in the life of a worker."""

    point: str
    """One of `POINTS`."""

    step: int | None = None
    """In this optimizer step, counted from 1."""

    since_step: int | None = None
    """In this step or any later one. Where a point has no step, it is the last one that the worker was in; of
    a new process, that of the last fault."""

    bucket: int | None = None
    """At this bucket, at the points `bucket` and `reduced`."""

    generation: int | None = None
    """In this generation, at the points that have one."""

    occurrence: int = 1
    """The so-manieth time that all of this is true in one process."""

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ValueError(f"there is no point {self.point!r}; choose one of {', '.join(POINTS)}")
        if self.bucket is not None and self.point not in ("bucket", "reduced"):
            raise ValueError(f"point {self.point!r} has no bucket; use bucket or reduced")
        if self.generation is not None and self.point not in AT_GENERATIONS:
            raise ValueError(f"point {self.point!r} has no generation; use one of {AT_GENERATIONS}")
        if self.occurrence < 1:
            raise ValueError(f"occurrence must be at least 1, not {self.occurrence}")

    def matches(self, point: str, step: int, passed: Mapping[str, Any]) -> bool:
        """Whether a worker that is at `point` now, last in `step`, is there. Counts no occurrences."""
        return (
            point == self.point
            and self.step in (None, step)
            and (self.since_step is None or step >= self.since_step)
            and self.bucket in (None, passed.get("bucket"))
            and self.generation in (None, passed.get("generation"))
        )


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to a worker at a moment."""

    kind: Kind
    """
    - `kill`: the process kills itself (SIGKILL).
    - `stop`: it stops (SIGSTOP), and goes on after `seconds`; never if that is 0.
    - `cut`: its data connections to one neighbour break: with a reset (RST), or, if `silent`, by dropping
      whatever arrives on them. Over shared memory the connection that tells of a death closes.
    - `delay`: it blocks for `seconds`.
    - `slow`: it blocks for `seconds` in each of `steps` steps.
    - `leave`: it sends itself SIGTERM.
    - `corrupt_frame`: a bit of a frame's `part` is flipped on its way.
    - `corrupt_bucket`: a bit of a reduced bucket is flipped in this worker's memory.
    - `corrupt_parameters`: a bit of a parameter is flipped there.
    """

    at: Moment
    """When."""

    worker_id: int | None = None
    """To whom; None: whoever gets there first."""

    seconds: float = 0.0
    """See `kind`."""

    steps: int = 1
    """See `kind`."""

    direction: Direction = "both"
    """Which connections `cut` breaks: those on which this worker sends, those on which it receives, or both.
    Over shared memory there is one for both."""

    silent: bool = False
    """See `kind`."""

    part: Literal["header", "payload"] = "header"
    """See `kind`."""

    position: int = 0
    """Which byte or element is changed, modulo their number."""

    least_members: int = 0
    """Waits for the next such moment unless so many members that hold the training state are certainly well,
    this one included. A worker that does not hold it yet can be spared."""

    def __post_init__(self) -> None:
        allowed = _ONLY_AT.get(self.kind, POINTS)
        if self.kind not in KINDS:
            raise ValueError(f"there is no fault {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.at.point not in allowed:
            raise ValueError(f"{self.kind} happens at {' or '.join(allowed)}, not at {self.at.point}")
        if self.seconds < 0 or self.steps < 1 or self.position < 0:
            raise ValueError("seconds and position must be 0 or more, steps 1 or more")
        if self.kind in ("delay", "slow") and not self.seconds:
            raise ValueError(f"{self.kind} needs seconds")
        if self.silent and (self.kind != "cut" or self.at.point != "chunk"):
            raise ValueError("silent concerns a cut of TCP connections, at chunk, only")


@dataclass(frozen=True, kw_only=True)
class Fired:
    """A line of the record: this fault happened."""

    fault: int
    """Its position in the plan."""

    worker_id: int
    pid: int
    step: int
    generation: int
    t: float
    """Seconds since 1970."""

    def line(self) -> str:
        """As JSON, with the newline."""
        return json.dumps(asdict(self)) + "\n"


@dataclass(frozen=True)
class FaultPlan:
    """Faults that are to happen in one job."""

    faults: tuple[Fault, ...] = field(default=())

    def to_json(self) -> str:
        """What `from_json` reads; what has its default is left out."""
        return json.dumps([_plain(fault) for fault in self.faults], indent=1)

    @classmethod
    def from_json(cls, text: str) -> FaultPlan:
        """
        Raises:
            ValueError: it is not a plan; says why.
        """
        try:
            entries = json.loads(text)
            faults = [Fault(**{**entry, "at": Moment(**entry["at"])}) for entry in entries]
        except (TypeError, KeyError) as error:
            raise ValueError(f"this is no fault plan: {error}") from error
        return cls(tuple(faults))

    @staticmethod
    def read_record(text: str) -> list[Fired]:
        """The lines of a record file; a last line that is not whole yet is left out."""
        whole = text[: text.rfind("\n") + 1]
        return [Fired(**json.loads(line)) for line in whole.splitlines()]

    def fired(self, record: str) -> list[Fault]:
        """The faults that happened, in the order in which they did, by a record file's text."""
        return [self.faults[one.fault] for one in self.read_record(record)]

    def unfired(self, record: str) -> list[tuple[int, Fault]]:
        """Position and fault of those that did not happen."""
        happened = {one.fault for one in self.read_record(record)}
        return [(index, fault) for index, fault in enumerate(self.faults) if index not in happened]

    def check_fired(self, record: str) -> None:
        """
        Raises:
            AssertionError: some faults did not happen; the message says which.
        """
        left = self.unfired(record)
        if left:
            shown = "; ".join(f"number {index}: {_words(fault)}" for index, fault in left[:10])
            raise AssertionError(f"{len(left)} of {len(self.faults)} faults were never reached: {shown}")

    def permits(
        self, fault: Fault, record: Sequence[Fired], *, members: int, generation: int, step: int, now: float
    ) -> tuple[bool, str]:
        """Whether enough members are left for `fault` to happen now, and the reason.

        Args:
            fault: one of the plan's.
            record: what has happened so far.
            members: of the worker's generation, those that are known to hold the training state.
            generation: its number.
            step: the worker's step.
            now: seconds since 1970.
        """
        if not fault.least_members:
            return True, "it does not ask for members"
        well = members
        for one in record:
            other = self.faults[one.fault]
            match other.kind:
                case "corrupt_parameters":
                    ails = one.step > step - _HEALED_AFTER_STEPS
                case "stop" if other.seconds:
                    ails = one.t > now - other.seconds - _RECOVERED_AFTER_S
                case _:
                    ails = one.generation >= generation
            if ails:
                well -= _COSTS_MEMBERS.get(other.kind, 0)
        verdict = well >= fault.least_members
        return verdict, f"{well} members of generation {generation} are certainly well"

    @classmethod
    def random(
        cls,
        draw: Draw,
        *,
        workers: int,
        steps: int,
        count: int,
        kinds: Mapping[Kind, int],
        points: Iterable[str] = TRAINING,
        stop_s: float = 0.2,
        buckets: int = 1,
    ) -> FaultPlan:
        """Faults at random moments, spread evenly over the steps.

        None of them takes the last member, or the majority of those whose parameters are right. They happen
        in the step that was drawn or later, so that all are reached in a job that goes on long enough.

        Args:
            draw: gives random numbers.
            workers: worker ids are 0 to workers - 1.
            steps: the last one in which a fault may be due.
            count: number of faults.
            kinds: how often each kind is to be drawn, relative to the others.
            points: moments to draw from.
            stop_s: longest stop and delay.
            buckets: number of buckets.

        Raises:
            ValueError: none of `points` suits a kind.
        """
        lots = [kind for kind, weight in kinds.items() for _ in range(weight)]
        suited = {kind: [p for p in points if p in _ONLY_AT.get(kind, POINTS)] for kind in set(lots)}
        for kind, possible in suited.items():
            if not possible:
                raise ValueError(
                    f"{kind} happens at {' or '.join(_ONLY_AT[kind])}, which is not among the points"
                )
        faults = []
        for index in range(count):
            kind = lots[draw(len(lots))]
            point = suited[kind][draw(len(suited[kind]))]
            shared = kind == "corrupt_parameters" or point in AT_JOINS or point == "save_publish"
            moment = Moment(
                point=point,
                since_step=1 + index * steps // count,
                bucket=draw(buckets) if point in ("bucket", "reduced") else None,
                occurrence=1 + draw(6) if point in AT_EXCHANGES else 1,
            )
            seconds = 0.0
            if kind in ("stop", "delay"):
                seconds = stop_s * (1 + draw(100)) / 100
            elif kind == "slow":
                seconds = 0.002 * (1 + draw(5))
            directions: tuple[Direction, ...] = ("both", "in", "out")
            cost = _COSTS_MEMBERS.get(kind, 0)
            faults.append(
                Fault(
                    kind=kind,
                    at=moment,
                    worker_id=None if shared else draw(workers),
                    seconds=seconds,
                    steps=1 + draw(5) if kind == "slow" else 1,
                    direction=directions[draw(3)] if kind == "cut" else "both",
                    part="payload" if kind == "corrupt_frame" and draw(2) else "header",
                    position=draw(1 << 16) if kind.startswith("corrupt") else 0,
                    # A worker that does not hold the state yet can be spared.
                    least_members=1 + cost if cost and point not in ("fetch", "fed") else 0,
                )
            )
        return cls(tuple(faults))


def _plain(fault: Fault) -> dict[str, Any]:
    values = {
        one.name: getattr(fault, one.name) for one in fields(fault) if getattr(fault, one.name) != one.default
    }
    at = fault.at
    values["at"] = {
        one.name: getattr(at, one.name) for one in fields(at) if getattr(at, one.name) != one.default
    }
    return values


def _words(fault: Fault) -> str:
    whom = "any worker" if fault.worker_id is None else f"worker {fault.worker_id}"
    return f"{fault.kind} of {whom} at {json.dumps(_plain(fault)['at'])}"
