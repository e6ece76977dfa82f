"""Control messages: they survive the wire, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any, get_type_hints

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringps.errors import FrameError
from ringps.wire import control, rules
from ringps.wire.control import (
    EVERYTHING,
    HEARTBEATS,
    TO_COORDINATOR,
    TO_LAUNCHER,
    TO_WORKER,
    Admitting,
    AllLeft,
    Ask,
    Assignment,
    Beat,
    Bound,
    CallReport,
    Departing,
    Dispute,
    Evict,
    Expel,
    Expelled,
    Failing,
    Feed,
    Form,
    Hello,
    Inquire,
    JobDone,
    JobEvent,
    JobFailed,
    Joiners,
    LauncherHello,
    LauncherLeaving,
    Leaving,
    Left,
    Lost,
    Message,
    Noted,
    Offer,
    Prepare,
    Ready,
    Refused,
    Replaceable,
    Resume,
    Suspect,
    Verdict,
    Waiting,
    Welcome,
    WorkerExited,
    clip,
    clip_line,
    decode,
    encode,
)
from ringps.wire.rules import MAX_WORKERS, Seat

EXAMPLES: tuple[Message, ...] = (
    Hello(
        worker_id=3,
        host="node-a",
        pid=4711,
        generation=5,
        members=(Seat(3, "node-a", 4711),),
        program="ab12cd34",
        session="0123456789abcdef" * 2,
    ),
    Bound(generation=1, address="tcp://10.0.0.1:5555"),
    Ask(),
    Dispute(generation=1, sequence=17),
    CallReport(generation=1, sequence=17, call="all_reduce(1048576 x float32, sum)"),
    Leaving(generation=1, completed=100, suspended=True),
    Failing(reason="ValueError: Größe\n  in line 2", blames=None),
    Suspect(generation=1, worker_id=2, forming=False, reason="connection closed"),
    Admitting(generation=1),
    Ready(),
    Offer(generation=1, step=7, joiners=(3,), address="10.0.0.1:6666"),
    Departing(generation=1, step=7),
    Noted(event={"event": "straggler", "factor": 1.7}),
    Beat(worker_id=3, session="0123456789abcdef" * 2, generation=1, step=9, count=40),
    LauncherHello(
        host="node-a",
        address="10.0.0.1",
        slots=4,
        master_port=29500,
        encrypt_data=True,
        first_worker_id=4,
        world_size=8,
        place=4,
        session="0123456789abcdef" * 2,
    ),
    LauncherLeaving(),
    WorkerExited(
        worker_id=3, pid=4711, code=137, reason="process killed by signal 9 (SIGKILL)", stopping=True
    ),
    Welcome(heartbeat_port=4243, elastic=True, min_workers=2, running=3),
    Refused(reason="worker id 3 is taken"),
    Waiting(reason="1 of 4 workers has not come: worker 3"),
    Prepare(
        generation=1,
        reason="all 2 workers have come",
        members=(Seat(0, "node-a", 1), Seat(1, "node-b", 2)),
        token_public="p" * 40,
        token_secret="s" * 40,
        encrypt=False,
    ),
    Form(generation=1, addresses=("tcp://10.0.0.1:5555", "tcp://10.0.0.2:5555")),
    Lost(generation=1, rank=2, worker_id=2, host="node-a", reason="no heartbeat for 3.0 s"),
    Expelled(generation=2, reason="no heartbeat for 3.0 s"),
    Joiners(generation=2, worker_ids=(2, 3)),
    Feed(
        generation=2,
        step=7,
        servers=("10.0.0.1:6666", "10.0.0.2:6666"),
        token_public="p" * 40,
        token_secret="s" * 40,
    ),
    Resume(generation=2, reason="the workers that were to join are lost"),
    Left(generation=1, rank=2, completed=100),
    AllLeft(generation=1),
    Inquire(generation=1, sequence=17),
    Verdict(generation=1, sequence=17, calls=("barrier()", "no answer")),
    Assignment(
        first_worker_id=4,
        world_size=8,
        host_index=1,
        host_count=2,
        master_address="10.0.0.1",
        master_port=29500,
        hosts=("node-a", "node-b"),
    ),
    Replaceable(worker_id=2, reason="process killed by signal 9"),
    Expel(worker_id=2, pid=4711, reason="no heartbeat for 3.0 s"),
    Evict(worker_id=2, reason="preempted by the scheduler"),
    JobEvent(event={"t": 1.5, "event": "step_committed", "step": 3, "members": [{"rank": 0}]}),
    JobFailed(
        worker_id=2, rank=2, host="node-a", code=137, reason="process killed by signal 9", restarts=True
    ),
    JobDone(suspended=True),
)

_FLAGS = ("encrypt", "encrypt_data", "elastic", "forming", "suspended", "stopping", "restarts")
_MAY_BE_EMPTY = {("Hello", "members"), ("Joiners", "worker_ids")}

_PHRASES = (
    "empty frame|frame too long|not msgpack within limits|not an envelope|other protocol version|"
    "unknown message|message not expected here|[A-Za-z]+: wrong set of fields|"
    r"[A-Za-z]+\.[a-z_]+: (not a whole number|out of range|not a truth value|not text|not UTF-8|"
    "wrong length|control character|not 40 Z85 characters|not 32 hexadecimal digits|not a list|"
    "not a seat|not finite|nested too deep|not plain data|not a map)"
)

STRATEGIES: dict[Any, st.SearchStrategy[Any]] = {
    rules.WorkerId: st.integers(0, MAX_WORKERS - 1),
    rules.WorldSize: st.integers(1, MAX_WORKERS),
    rules.Number: st.integers(0, 2**53),
    rules.Pid: st.integers(0, 2**32 - 1),
    rules.Port: st.integers(1, 65535),
    rules.ExitCode: st.integers(0, 255),
    rules.Flag: st.booleans(),
    rules.Name: st.text(min_size=1, max_size=20).map(lambda text: clip_line(text) or "-"),
    rules.Call: st.text(max_size=20).map(lambda text: clip_line(text, 240)),
    rules.Reason: st.text(max_size=40).map(clip),
    rules.Session: st.text(alphabet="0123456789abcdef", min_size=32, max_size=32),
    rules.KeyHalf: st.text(alphabet=sorted(rules._Z85), min_size=40, max_size=40),
}


def of(message: Any, **values: Any) -> bytes:
    """The frame of `message` with fields changed, unchecked."""
    fields = {entry.name: getattr(message, entry.name) for entry in dataclasses.fields(message)}
    packed: bytes = msgpack.packb([control.PROTOCOL_VERSION, type(message).__name__, {**fields, **values}])
    return packed


def refusal(frame: bytes, vocabulary: control.Vocabulary = EVERYTHING) -> str:
    with pytest.raises(FrameError) as caught:
        decode(frame, vocabulary)
    assert re.fullmatch(_PHRASES, caught.value.reason), caught.value.reason
    return caught.value.reason


def test_there_is_an_example_of_every_message() -> None:
    assert {type(message).__name__ for message in EXAMPLES} == set(EVERYTHING)


def test_the_bytes_are_those_recorded(golden: Callable[[str, str], None]) -> None:
    frames = {type(message).__name__: encode(message).hex() for message in EXAMPLES}
    golden("control.json", json.dumps(frames, indent=1) + "\n")


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
class TestEveryMessage:
    def test_survives_the_wire(self, message: Message) -> None:
        assert decode(encode(message), EVERYTHING) == message

    def test_is_taken_in_its_own_direction_only(self, message: Message) -> None:
        name = type(message).__name__
        for vocabulary in (TO_COORDINATOR, HEARTBEATS, TO_WORKER, TO_LAUNCHER):
            if name in vocabulary:
                assert decode(encode(message), vocabulary) == message
            else:
                assert refusal(encode(message), vocabulary) == "message not expected here"

    def test_is_refused_without_any_one_field(self, message: Message) -> None:
        for entry in dataclasses.fields(message):
            kind, name, values = msgpack.unpackb(of(message))
            del values[entry.name]
            reason = refusal(msgpack.packb([kind, name, values]))
            assert reason == f"{name}: wrong set of fields"

    def test_is_refused_with_a_field_too_many(self, message: Message) -> None:
        assert refusal(of(message, more=1)).endswith(": wrong set of fields")

    @pytest.mark.parametrize("wrong", [-1, 2**60, 0.5, "\x1b[2J", [[[[[1]]]]], [], {"a": -1}, True])
    def test_is_refused_with_a_field_of_the_wrong_kind(self, message: Message, wrong: Any) -> None:
        name = type(message).__name__
        for entry in dataclasses.fields(message):
            if entry.name in _FLAGS and wrong is True:
                continue
            if entry.name == "event" and isinstance(wrong, dict):
                continue
            if (name, entry.name) in _MAY_BE_EMPTY and wrong == []:
                continue
            frame = of(message, **{entry.name: wrong})
            assert refusal(frame).startswith(f"{name}.{entry.name}: ")
            with pytest.raises(ValueError, match=rf"{name}\.{entry.name}: "):
                encode(dataclasses.replace(message, **{entry.name: wrong}))

    def test_is_refused_with_a_text_too_long(self, message: Message) -> None:
        for entry in dataclasses.fields(message):
            frame = of(message, **{entry.name: "x" * (rules.MAX_REASON_BYTES + 1)})
            refusal(frame)
            with pytest.raises(ValueError, match=rf"{type(message).__name__}\.{entry.name}: "):
                encode(dataclasses.replace(message, **{entry.name: "x" * (rules.MAX_REASON_BYTES + 1)}))

    def test_is_refused_when_cut_short(self, message: Message) -> None:
        frame = encode(message)
        for length in range(len(frame)):
            refusal(frame[:length])
        assert refusal(frame + b"\x00") == "not msgpack within limits"

    def test_is_refused_in_another_protocol_version(self, message: Message) -> None:
        _, name, values = msgpack.unpackb(of(message))
        assert (
            refusal(msgpack.packb([control.PROTOCOL_VERSION + 1, name, values])) == "other protocol version"
        )
        assert refusal(msgpack.packb([True, name, values])) == "not an envelope"


@st.composite
def any_message(draw: st.DrawFn) -> Any:
    schema = EVERYTHING[draw(st.sampled_from(sorted(EVERYTHING)))]
    hints = get_type_hints(schema.build, include_extras=True)
    example = next(message for message in EXAMPLES if type(message) is schema.build)
    values = {
        name: draw(STRATEGIES.get(hint, st.just(getattr(example, name)))) for name, hint in hints.items()
    }
    return schema.build(**values)


@given(any_message())
def test_any_valid_message_survives_the_wire(message: Any) -> None:
    assert decode(encode(message), EVERYTHING) == message


@given(st.sampled_from(EXAMPLES), st.data())
def test_a_changed_frame_is_refused_or_another_valid_message(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(frame), EVERYTHING)
    except FrameError:
        refusal(bytes(frame))
    else:
        assert decode(encode(found), EVERYTHING) == found


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(frame: bytes) -> None:
    refusal(frame)


@pytest.mark.parametrize(
    "frame",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of four billion
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\xdb\xff\xff\xff\xff",  # a string of as many bytes
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\x91" * 200_000 + b"\x01",
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\xc4\x01a",
        b"\x81\x01\x02",
        b"\xa1\xff",
    ],
)
def test_frames_that_aim_at_the_parser_are_refused(frame: bytes) -> None:
    assert refusal(frame) == "not msgpack within limits"


def test_a_frame_above_the_limit_is_refused_unread() -> None:
    assert refusal(b"\x93" + b"\x00" * control.MAX_FRAME_BYTES) == "frame too long"


def test_the_longest_messages_fit_into_a_frame() -> None:
    host = "h" * rules.MAX_NAME_BYTES
    everybody = range(MAX_WORKERS)
    for message in (
        Prepare(
            generation=2**53,
            reason="r" * rules.MAX_REASON_BYTES,
            members=tuple(Seat(worker_id, host, 2**32 - 1) for worker_id in everybody),
            token_public="p" * 40,
            token_secret="s" * 40,
            encrypt=True,
        ),
        Form(generation=2**53, addresses=(host,) * MAX_WORKERS),
        Verdict(generation=2**53, sequence=2**53, calls=("c" * rules.MAX_CALL_BYTES,) * MAX_WORKERS),
        JobEvent(
            event={
                "members": [
                    {"rank": rank, "worker_id": rank, "host": host, "pid": 2**32 - 1} for rank in everybody
                ]
            }
        ),
    ):
        assert decode(encode(message), EVERYTHING) == message


def test_a_list_longer_than_any_ring_is_refused() -> None:
    refusal(of(Form(generation=1, addresses=("tcp://a",)), addresses=["tcp://a"] * (MAX_WORKERS + 1)))


def test_not_finite_numbers_are_refused() -> None:
    assert refusal(of(JobEvent(event={}), event={"t": float("nan")})) == "JobEvent.event: not finite"


def test_secrets_do_not_show() -> None:
    shown = "".join(map(repr, EXAMPLES))
    assert "s" * 40 not in shown
    assert "0123456789abcdef" not in shown


@given(st.text(alphabet=st.characters(), max_size=500), st.integers(10, 100))
def test_clipped_text_fits(text: str, limit_bytes: int) -> None:
    assert len(clip(text, limit_bytes).encode()) <= limit_bytes
    assert "\n" not in clip_line(text, limit_bytes)
    encode(Refused(reason=clip(text)))


def test_clip_leaves_short_text_alone() -> None:
    assert clip("Größe: 3\nline 2") == "Größe: 3\nline 2"
    assert clip("\x1b[31mred \udcff") == "\ufffd[31mred \ufffd"
    assert clip("x" * 3000).endswith("x...")
