"""The status document: what a coordinator publishes of its job, and takes over from the one before."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringps_launcher.kubernetes import earlier
from ringps_launcher.kubernetes.earlier import Earlier
from ringps_launcher.kubernetes.endings import CAUSES, Ending
from ringps_launcher.kubernetes.rates import StepRate
from ringps_launcher.kubernetes.sightings import Pod
from ringps_launcher.kubernetes.status import PHASES, JobFacts, Status

FACTS = JobFacts(world_size=3, min_workers=2, max_restarts=10)
ENTRIES = {"status_entry": "status.json", "seen_entry": "seen", "verdict_entry": "verdict"}
NOW_S = 1000.0


def status(before: Earlier | None = None) -> Status:
    return Status(FACTS, before or Earlier(), NOW_S)


def pod(worker_id: int, phase: str = "Running", **details: Any) -> Pod:
    return Pod(uid=f"uid-{worker_id}", name=f"job-{worker_id}", worker_id=worker_id, phase=phase, **details)


def generation(number: int, *worker_ids: int, reason: str = "all have come") -> dict[str, Any]:
    members = [
        {"rank": rank, "worker_id": worker_id, "host": f"job-{worker_id}", "pid": 7}
        for rank, worker_id in enumerate(worker_ids)
    ]
    return {"event": "generation", "generation": number, "members": members, "reason": reason}


def sight(subject: Status, *pods: Pod, suspended: bool = False, now_s: float = NOW_S) -> None:
    places = {one.name: ("z1", "r1", f"n{one.worker_id}") for one in pods}
    subject.sighted(pods, places, suspended=suspended, now_s=now_s)


def texts(document: dict[str, Any]) -> list[str]:
    return [event["text"] for event in document["events"]]


def test_the_whole_document_of_a_new_job() -> None:
    assert status().document(NOW_S + 1) == {
        "version": 1,
        "phase": "waiting",
        "reason": "0 of 3 worker pods run",
        "generation": 0,
        "world_size": 3,
        "min_workers": 2,
        "since": 1000.0,
        "updated": 1001.0,
        "step": None,
        "samples_per_s": None,
        "steps_per_s": None,
        "checkpoint": None,
        "members": [],
        "joining": [],
        "restarts": dict.fromkeys([*CAUSES, "ring"], 0),
        "budget": {"used": 0, "max": 10},
        "events": [],
    }


def test_a_job_that_trains() -> None:
    subject = status()
    sight(subject, pod(0), pod(1), pod(2, "Pending"))
    assert subject.document(NOW_S)["reason"] == "2 of 3 worker pods run"
    sight(subject, pod(0), pod(1), pod(2))
    before = subject.pressing
    subject.fold(generation(1, 1, 0), NOW_S + 5)
    assert subject.pressing != before
    subject.fold({"event": "training", "global_batch": 64}, NOW_S + 5)
    for second in range(20):
        subject.fold({"event": "step_committed", "step": 4 * second}, NOW_S + 5 + second)
    subject.fold({"event": "checkpoint_saved", "step": 70, "directory": "/ckpt"}, NOW_S + 25)
    document = subject.document(NOW_S + 25)
    assert (document["phase"], document["generation"], document["since"]) == ("running", 1, NOW_S + 5)
    assert document["members"] == [
        {"rank": 0, "worker_id": 1, "pod": "job-1", "node": "n1", "zone": "z1", "rack": "r1"},
        {"rank": 1, "worker_id": 0, "pod": "job-0", "node": "n0", "zone": "z1", "rack": "r1"},
    ]
    assert document["joining"] == [2]
    assert (document["step"], document["steps_per_s"], document["samples_per_s"]) == (76, 4.0, 256.0)
    assert document["checkpoint"] == {"step": 70, "t": NOW_S + 25, "where": "/ckpt"}
    assert texts(document) == ["generation 1 of 2 workers: all have come"]
    json.dumps(document, allow_nan=False)


def test_losses_and_the_whole_ring_starting_again() -> None:
    subject = status()
    sight(subject, pod(0), pod(1))
    subject.fold(generation(1, 0, 1), NOW_S)
    subject.fold({"event": "worker_lost", "worker_id": 1, "reason": "killed"}, NOW_S + 1)
    assert [member["worker_id"] for member in subject.document(NOW_S)["members"]] == [0]
    assert subject.document(NOW_S)["phase"] == "running"
    subject.fold({"event": "ring_restarting", "reason": "too few", "restarts_left": 7}, NOW_S + 2)
    document = subject.document(NOW_S + 2)
    assert (document["phase"], document["reason"]) == ("waiting", "the whole ring starts again: too few")
    assert document["members"] == []
    assert document["restarts"]["ring"] == 1
    assert document["budget"] == {"used": 3, "max": 10}
    subject.fold(generation(14, 0, 1), NOW_S + 3)
    assert subject.document(NOW_S + 3)["phase"] == "running"
    subject.fold({"event": "worker_left", "worker_id": 0, "step": 9, "reason": "asked"}, NOW_S + 4)
    subject.fold({"event": "worker_left", "worker_id": 1, "step": 9, "reason": "asked"}, NOW_S + 4)
    document = subject.document(NOW_S + 4)
    assert (document["phase"], document["reason"]) == ("waiting", "no worker is left: asked")


def test_ends_of_pods_are_counted_by_cause() -> None:
    subject = status()
    subject.ended(pod(0), Ending("preempted", "preempted by the scheduler"), NOW_S)
    subject.ended(pod(1), Ending("out of memory", "out of memory", counts=True), NOW_S)
    subject.ended(pod(2), Ending("", "its work is done"), NOW_S)
    document = subject.document(NOW_S)
    assert {cause: count for cause, count in document["restarts"].items() if count} == {
        "preempted": 1,
        "out of memory": 1,
    }
    assert document["budget"]["used"] == 1
    assert texts(document) == [
        "worker 0 (pod job-0): preempted by the scheduler",
        "worker 1 (pod job-1): out of memory",
    ]
    # The coordinator's own count is the one that holds.
    subject.fold({"event": "something_new", "restarts_left": 10}, NOW_S)
    assert subject.document(NOW_S)["budget"]["used"] == 0


def test_a_job_is_suspended_and_resumed() -> None:
    subject = status()
    sight(subject, pod(0), pod(1))
    subject.fold(generation(1, 0, 1), NOW_S)
    sight(subject, pod(0), pod(1), suspended=True, now_s=NOW_S + 1)
    document = subject.document(NOW_S + 1)
    assert (document["phase"], document["reason"]) == ("stopping", "the job is suspended")
    subject.fold(generation(2, 0), NOW_S + 2)
    assert subject.document(NOW_S + 2)["phase"] == "stopping"
    sight(subject, pod(0, "Failed"), suspended=True, now_s=NOW_S + 3)
    document = subject.document(NOW_S + 3)
    assert (document["phase"], document["reason"]) == ("waiting", "the job is suspended")
    assert document["members"] == []
    sight(subject, now_s=NOW_S + 4)
    document = subject.document(NOW_S + 4)
    assert (document["phase"], document["reason"]) == ("waiting", "0 of 3 worker pods run")
    assert texts(document)[-1] == "the job is resumed"


@pytest.mark.parametrize(
    ("verdict", "phase", "reason"),
    [("done", "done", ""), ("failed: rank 1: oops: no", "failed", "rank 1: oops: no")],
)
def test_a_verdict_is_the_last_word(verdict: str, phase: str, reason: str) -> None:
    subject = status()
    subject.fold(generation(1, 0, 1, 2), NOW_S)
    subject.judge(verdict, NOW_S + 1)
    subject.fold(generation(2, 0), NOW_S + 2)
    sight(subject, pod(0), suspended=True)
    document = subject.document(NOW_S + 2)
    assert (document["phase"], document["reason"], subject.verdict) == (phase, reason, verdict)


def test_the_next_coordinator_goes_on_from_what_was_published() -> None:
    first = status()
    first.fold(generation(5, 0, 1, 2), NOW_S)
    first.fold({"event": "step_committed", "step": 31}, NOW_S)
    first.fold({"event": "checkpoint_saved", "step": 30, "directory": "s3://b/c"}, NOW_S)
    first.ended(pod(1), Ending("killed", "killed by signal 9", counts=True), NOW_S)
    document = first.document(NOW_S)
    data = {
        "status.json": json.dumps(document),
        "seen": earlier.seen_text(("abc", "def"), forgetful=True),
        "verdict": "",
    }
    before = earlier.read(data, **ENTRIES)
    assert (before.generation, before.budget_used, before.seen, before.forgetful) == (
        5,
        1,
        ("abc", "def"),
        True,
    )
    after = Status(FACTS, before, NOW_S + 60).document(NOW_S + 60)
    assert (after["phase"], after["members"]) == ("waiting", [])
    for key in ("generation", "step", "checkpoint", "restarts", "budget", "events"):
        assert after[key] == document[key], key


def test_a_coordinator_that_takes_the_ring_over_is_running() -> None:
    subject = status(Earlier(generation=7))
    subject.fold({**generation(5, 0, 1), "event": "coordinator_restored"}, NOW_S)
    document = subject.document(NOW_S)
    assert (document["phase"], document["generation"], len(document["members"])) == ("running", 7, 2)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"status.json": "{", "seen": 3, "verdict": None},
        {"status.json": "[]"},
        {"status.json": '{"version": 99, "generation": 5}'},
        {"status.json": "[" * 100_000},
    ],
)
def test_a_damaged_document_counts_as_none(data: dict[str, Any]) -> None:
    assert earlier.read(data, **ENTRIES) == Earlier()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["step", "t", "where", "text", "used", "max", "killed"]), inner)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["generation", "step", "checkpoint", "restarts", "budget", "events", "members"]),
        values,
    )
)
def test_any_document_gives_one_that_can_be_published(document: dict[str, Any]) -> None:
    data = {"status.json": json.dumps({"version": 1, **document})}
    after = Status(FACTS, earlier.read(data, **ENTRIES), NOW_S).document(NOW_S)
    json.dumps(after, allow_nan=False)
    assert after["phase"] in PHASES


KINDS = [
    "generation", "coordinator_restored", "worker_lost", "worker_left", "worker_joined", "joiner_lost",
    "step_committed", "training", "checkpoint_saved", "restored", "ring_restarting", "waiting", "diverged",
    "checkpoint_failed", "checkpoints_given_up", "coordinator_error", "recovered",
]  # fmt: skip
fields = st.dictionaries(
    st.sampled_from(
        ["generation", "members", "worker_id", "step", "global_batch", "restarts_left", "reason"]
    ),
    values,
)


@given(st.lists(st.tuples(st.sampled_from(KINDS), fields), max_size=30))
def test_events_of_any_shape_are_folded_and_the_document_stays_small(
    story: list[tuple[str, dict[str, Any]]],
) -> None:
    subject = status()
    for at, (kind, details) in enumerate(story):
        subject.fold({"event": kind, **details}, NOW_S + at)
    document = subject.document(NOW_S + 100)
    assert document["phase"] in PHASES
    assert document["budget"]["used"] >= 0
    assert len(document["events"]) <= 20
    assert all(len(text) <= 300 for text in texts(document))


def test_long_texts_are_cut_to_one_line() -> None:
    subject = status()
    subject.tell("a\nb" + "x" * 1000, NOW_S)
    (text,) = texts(subject.document(NOW_S))
    assert text.startswith("a b")
    assert len(text) == 300


# Rates.


def test_a_rate_needs_two_points() -> None:
    rate = StepRate()
    assert rate.per_s(0.0) is None
    rate.note(5, 0.0)
    assert rate.per_s(1.0) is None
    rate.note(7, 1.0)
    assert rate.per_s(1.0) == 2.0


def test_a_rate_is_of_the_last_seconds() -> None:
    rate = StepRate()
    for second in range(30):
        rate.note(second, float(second))
    for second in range(30, 60):
        rate.note(29 + 10 * (second - 29), float(second))
    assert rate.per_s(60.0) == pytest.approx(10.0)


def test_slow_steps_have_a_rate_too() -> None:
    rate = StepRate()
    for step in range(5):
        rate.note(step, 60.0 * step)
    assert rate.per_s(60.0 * 4 + 50) == pytest.approx(1 / 60)


def test_a_rate_ends_when_no_step_comes_or_the_job_goes_back() -> None:
    rate = StepRate()
    for step in range(10):
        rate.note(step, float(step))
    assert rate.per_s(10.0) == 1.0
    assert rate.per_s(30.0) is None
    rate.note(3, 31.0)
    assert rate.per_s(31.0) is None
    rate.note(5, 32.0)
    assert rate.per_s(32.0) == 2.0


def test_a_process_that_failed_in_a_pod_that_goes_on_counts_by_cause_too() -> None:
    found = status()
    charged = {"event": "restart_charged", "worker_id": 2, "reason": "exit code 1", "restarts_left": 9}
    found.fold({**charged, "by_machine": False}, NOW_S)
    found.fold({**charged, "by_machine": True, "restarts_left": 8}, NOW_S)  # its pod is counted when it ends
    document = found.document(NOW_S)
    assert document["restarts"]["failed"] == 1
    assert document["budget"]["used"] == FACTS.max_restarts - 8
    assert document["events"][0]["text"] == "worker 2 failed: exit code 1; 9 restarts left"
