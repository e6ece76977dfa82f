"""Control messages: what workers, launchers and the coordinator tell each other.

A message is one frame: the msgpack array ``[protocol version, name, {field: value}]``
(https://msgpack.org). The rule that a field must pass is written in its type annotation; the
schema below is built from those, and both `encode` and `decode` apply it. A frame is accepted only
if it has exactly the fields of its message and each of them passes.

Each direction has a vocabulary (`TO_COORDINATOR`, `HEARTBEATS`, `TO_WORKER`, `TO_LAUNCHER`); a
message that does not belong there is as wrong as garbage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, get_type_hints

import msgpack

from ringps.errors import FrameError
from ringps.wire.rules import (
    MAX_CALL_BYTES,
    MAX_NAME_BYTES,
    MAX_REASON_BYTES,
    MAX_WORKERS,
    Call,
    ExitCode,
    Flag,
    Invalid,
    KeyHalf,
    Name,
    Number,
    Pid,
    Port,
    Rank,
    Reason,
    Rule,
    Seat,
    Session,
    WorkerId,
    WorldSize,
    listing,
    name,
    optional,
    plain_map,
    seat,
    text,
    whole,
    worker_id,
)

PROTOCOL_VERSION = 4

MAX_FRAME_BYTES = 256 * 1024

OTHER_VERSION = "other protocol version"
"""The reason of the `FrameError` for a frame of another protocol version."""

_LIMITS = {
    "max_array_len": MAX_WORKERS,
    "max_map_len": 64,
    "max_str_len": MAX_REASON_BYTES,
    "max_bin_len": 0,
    "max_ext_len": 0,
}


# From a worker.


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """A worker wants to be a member."""

    worker_id: WorkerId
    host: Name
    pid: Pid
    generation: Number
    """The last generation that this worker was a member of; 0 for none."""
    members: Annotated[tuple[Seat, ...], listing(seat, low=0)]
    """The members of that generation, in ring order: a coordinator that was restarted learns of them."""
    program: Annotated[str, text(0, MAX_NAME_BYTES)]
    """Names the script that the worker runs by its contents; "" if it has none."""
    session: Session = field(repr=False)
    """Drawn at random by the sender; known to nobody else, it proves that a new connection or a
    heartbeat is the same process's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """The worker's data socket listens; the answer to `Prepare`."""

    generation: Number
    address: Name


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """Who is missing? `Waiting` answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispute:
    """Ranks seem to have called different collectives as number `sequence`."""

    generation: Number
    sequence: Number


@dataclass(frozen=True, kw_only=True, slots=True)
class CallReport:
    """What this rank called as collective number `sequence`; the answer to `Inquire`."""

    generation: Number
    sequence: Number
    call: Call


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaving:
    """The worker called shutdown() after `completed` collectives."""

    generation: Number
    completed: Number
    suspended: Flag = False
    """It leaves because the job stops at a checkpoint, to go on from there another time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failing:
    """The worker is about to exit with an error, because of worker `blames` if not its own."""

    reason: Reason
    blames: Annotated[int | None, optional(worker_id)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """A member cannot be reached over the data connections of this generation."""

    generation: Number
    worker_id: WorkerId
    forming: Flag
    """It was never met, though the generation was to form; else a connection to it broke."""
    reason: Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitting:
    """This member's script takes new workers between its steps from now on."""

    generation: Number


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A joining worker has built its model and waits for the ring's state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """This member has applied `step`, pauses, and serves its state to `joiners` at `address`."""

    generation: Number
    step: Number
    joiners: Annotated[tuple[int, ...], listing(worker_id)]
    address: Name


@dataclass(frozen=True, kw_only=True, slots=True)
class Departing:
    """This member was asked to leave (SIGTERM), has applied `step`, and leaves before the next one."""

    generation: Number
    step: Number


@dataclass(frozen=True, kw_only=True, slots=True)
class Noted:
    """A line for the events file; `event` has a field of that name."""

    event: Annotated[dict[str, Any], plain_map]


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """A worker is alive. `count` grows with every beat, so that none can be replayed."""

    worker_id: WorkerId
    session: Session = field(repr=False)
    generation: Number
    step: Number
    count: Number


# From a launcher.


@dataclass(frozen=True, kw_only=True, slots=True)
class LauncherHello:
    """A launcher offers `slots` workers on its machine."""

    host: Name
    address: Name
    slots: WorldSize
    master_port: Port
    encrypt_data: Flag
    first_worker_id: Annotated[int | None, optional(worker_id)]
    """Of the assignment that it was given before the coordinator was restarted; None without one."""
    world_size: Annotated[int | None, optional(whole(1, MAX_WORKERS))]
    """Likewise."""
    place: Annotated[int | None, optional(worker_id)] = None
    """The first worker id of its slots, where not the coordinator deals them out (a pod has its index); else
    None."""
    session: Session = field(repr=False)
    """As in `Hello`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LauncherLeaving:
    """The launcher goes away; its offer stands no more if it was not used yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerExited:
    """A worker's process ended. `code` as a shell gives it (128 + signal), `reason` in words."""

    worker_id: WorkerId
    pid: Pid
    code: ExitCode
    reason: Reason
    stopping: Flag = False
    """Whether its launcher had been told to stop by then."""


# To a worker (Refused and Waiting also to a launcher).


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome:
    """The worker is expected; it must send heartbeats to this port from now on."""

    heartbeat_port: Port
    elastic: Flag
    """Whether the ring goes on when a member is lost."""
    min_workers: Annotated[int, whole(0, MAX_WORKERS)] = 0
    """With how many members; 0 where only with all."""
    running: Annotated[int, whole(0, MAX_WORKERS)]
    """0 if the worker takes part in the ring's first formation; else how many members run already, whose
    state it is to get."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """The sender may not take part, and why."""

    reason: Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """Who or what the coordinator is waiting for, in words."""

    reason: Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepare:
    """A generation is to form: listen for data connections with this token, and answer `Bound`.

    The one before it is over. A later `Prepare` takes the place of an earlier one."""

    generation: Number
    reason: Reason
    """Why there is a new generation."""
    members: Annotated[tuple[Seat, ...], listing(seat)]
    """In ring order."""
    token_public: KeyHalf
    token_secret: KeyHalf = field(repr=False)
    encrypt: Flag


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """All listen: connect. `addresses[rank]`."""

    generation: Number
    addresses: Annotated[tuple[str, ...], listing(name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """A member is gone, and the ring cannot go on. `generation` is 0 while none is formed."""

    generation: Number
    rank: Rank
    worker_id: WorkerId
    host: Name
    reason: Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Expelled:
    """The others took this worker for lost, and went on without it."""

    generation: Number
    reason: Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Joiners:
    """All workers that are `Ready`; takes the place of what was said before. To members."""

    generation: Number
    worker_ids: Annotated[tuple[int, ...], listing(worker_id, low=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """Get the state of `step` from these servers (`HOST:PORT`), with this token. To a joining worker, which
    is a member of the generation after `generation`: a `Prepare` follows."""

    generation: Number
    step: Number
    servers: Annotated[tuple[str, ...], listing(name)]
    token_public: KeyHalf
    token_secret: KeyHalf = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """Nobody joins now: members that pause go on in this generation."""

    generation: Number
    reason: Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """A member called shutdown() after `completed` collectives."""

    generation: Number
    rank: Rank
    completed: Number


@dataclass(frozen=True, kw_only=True, slots=True)
class AllLeft:
    """Every member called shutdown(), or left. To joining workers too: the job is over."""

    generation: Number


@dataclass(frozen=True, kw_only=True, slots=True)
class Inquire:
    """What did you call as collective number `sequence`?"""

    generation: Number
    sequence: Number


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What everybody called as collective number `sequence`: `calls[rank]`."""

    generation: Number
    sequence: Number
    calls: Annotated[tuple[str, ...], listing(text(0, MAX_CALL_BYTES))]


# To a launcher.


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """A launcher's part in the plan of the whole job."""

    first_worker_id: WorkerId
    """It starts the workers from this id on, as many as it offered slots."""
    world_size: WorldSize
    """Workers of the whole job."""
    host_index: Rank
    """Its position among the launchers."""
    host_count: WorldSize
    """Number of launchers."""
    master_address: Name
    """Address of the first launcher's machine (torch.distributed's MASTER_ADDR)."""
    master_port: Port
    """A port that the first launcher found free there (MASTER_PORT)."""
    hosts: Annotated[tuple[str, ...], listing(name)]
    """Host names of the launchers, by `host_index`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replaceable:
    """A worker is lost or has left, and the ring would take another process in its place."""

    worker_id: WorkerId
    reason: Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Expel:
    """The others went on without this worker: end its process, if there is one."""

    worker_id: WorkerId
    pid: Pid
    reason: Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Evict:
    """This worker's machine is about to be taken away: have it leave, as if the launcher got SIGTERM."""

    worker_id: WorkerId
    reason: Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEvent:
    """A line for the events file."""

    event: Annotated[dict[str, Any], plain_map]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFailed:
    """The worker whose failure ended the job; all other failures follow from it."""

    worker_id: WorkerId
    rank: Rank
    host: Name
    code: ExitCode
    """What the job should exit with: never 0."""
    reason: Reason
    restarts: Flag = False
    """Whether the whole ring is started again, from the latest checkpoint: end the workers, and register
    again. To the only launcher of a job with a coordinator of its own: whether that is worth it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobDone:
    """The job came to a good end: all workers exited with code 0, but for those that the ring did without."""

    suspended: Flag = False
    """Whether it stopped at a checkpoint instead of running to its end; workers that did exited with
    `worker_env.SUSPENDED_CODE`."""


FromWorker = (
    Hello
    | Bound
    | Ask
    | Dispute
    | CallReport
    | Leaving
    | Failing
    | Suspect
    | Admitting
    | Ready
    | Offer
    | Departing
    | Noted
)
FromLauncher = LauncherHello | LauncherLeaving | WorkerExited
ToWorker = (
    Welcome
    | Refused
    | Waiting
    | Prepare
    | Form
    | Lost
    | Expelled
    | Joiners
    | Feed
    | Resume
    | Left
    | AllLeft
    | Inquire
    | Verdict
)
ToLauncher = Refused | Waiting | Assignment | Replaceable | Expel | Evict | JobEvent | JobFailed | JobDone
Message = FromWorker | FromLauncher | Beat | ToWorker | ToLauncher


class _Schema(NamedTuple):
    name: str
    build: Callable[..., Any]
    rules: Mapping[str, Rule]


def _schema_of(message: type) -> _Schema:
    hints = get_type_hints(message, include_extras=True)
    rules = {entry.name: hints[entry.name].__metadata__[0] for entry in fields(message)}
    return _Schema(message.__name__, message, MappingProxyType(rules))


Vocabulary = Mapping[str, _Schema]


def _vocabulary(union: Any) -> Vocabulary:
    return MappingProxyType({message.__name__: _schema_of(message) for message in union.__args__})


TO_COORDINATOR = _vocabulary(FromWorker | FromLauncher)
HEARTBEATS: Vocabulary = MappingProxyType({"Beat": _schema_of(Beat)})
TO_WORKER = _vocabulary(ToWorker)
TO_LAUNCHER = _vocabulary(ToLauncher)
EVERYTHING = _vocabulary(Message)


def encode(message: Message) -> bytes:
    """The frame of a message.

    Raises:
        ValueError: a field breaks its rule, or the frame would be longer than `MAX_FRAME_BYTES`.
    """
    schema = EVERYTHING[type(message).__name__]
    values = {entry: getattr(message, entry) for entry in schema.rules}
    for entry, rule in schema.rules.items():
        try:
            rule(values[entry])
        except Invalid as problem:
            raise ValueError(f"{schema.name}.{entry}: {problem}") from None
    frame: bytes = msgpack.packb([PROTOCOL_VERSION, schema.name, values])
    if len(frame) > MAX_FRAME_BYTES:
        raise ValueError(f"{schema.name}: the frame has {len(frame)} bytes, more than {MAX_FRAME_BYTES}")
    return frame


def decode(frame: bytes, vocabulary: Vocabulary) -> Any:
    """The message in a frame, one of those in `vocabulary`.

    Raises:
        FrameError: the frame is anything else. Its reason is one of a fixed, small set of phrases.
    """
    kind, values = _unpack(frame)
    schema = vocabulary.get(kind)
    if schema is None:
        raise FrameError("message not expected here" if kind in EVERYTHING else "unknown message")
    if values.keys() != schema.rules.keys():
        raise FrameError(f"{kind}: wrong set of fields")
    checked = {}
    for entry, rule in schema.rules.items():
        try:
            checked[entry] = rule(values[entry])
        except Invalid as problem:
            raise FrameError(f"{kind}.{entry}: {problem}") from None
    return schema.build(**checked)


def clip(text: str, limit_bytes: int = MAX_REASON_BYTES) -> str:
    """`text` made to fit a text field: unprintable characters replaced, too long a text cut."""
    printable = "".join(c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    raw = printable.encode(errors="replace")
    if len(raw) <= limit_bytes:
        return raw.decode()
    return raw[: limit_bytes - 3].decode(errors="ignore") + "..."


def clip_line(text: str, limit_bytes: int = MAX_NAME_BYTES) -> str:
    """As `clip`, on a single line."""
    return clip(" ".join(text.splitlines()), limit_bytes)


def _unpack(frame: bytes) -> tuple[str, dict[str, Any]]:
    if len(frame) > MAX_FRAME_BYTES:
        raise FrameError("frame too long")
    if not frame:
        raise FrameError("empty frame")
    try:
        envelope = msgpack.unpackb(frame, raw=False, strict_map_key=True, **_LIMITS)
    except (ValueError, RecursionError):  # every error of msgpack's own is a ValueError
        raise FrameError("not msgpack within limits") from None
    if type(envelope) is not list or len(envelope) != 3 or type(envelope[0]) is not int:
        raise FrameError("not an envelope")
    version, kind, values = envelope
    if version != PROTOCOL_VERSION:
        raise FrameError(OTHER_VERSION)
    if type(kind) is not str or type(values) is not dict:
        raise FrameError("not an envelope")
    return kind, values
