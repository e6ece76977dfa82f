"""What `ringps ls` and `ringps status` make of a job's objects and of the coordinator's document."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.report import job_report, jobs_table, next_commands
from ringps_launcher.kubernetes.table import duration, ranges, rate, table
from ringps_launcher.kubernetes.view import JobView, Snapshot, look
from tests.conftest import Golden
from tests.kubernetes_objects import (
    NAME,
    NOW,
    Object,
    condition,
    coordinator,
    coordinator_job,
    job,
    stamp,
    unplaced,
    worker,
)

FULL = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."


def document(phase: str = "running", size: int = 4, **changes: Any) -> Object:
    """As the coordinator writes it."""
    return {
        "version": 1,
        "phase": phase,
        "reason": "",
        "generation": 3,
        "world_size": 4,
        "min_workers": 2,
        "since": NOW - 120,
        "updated": NOW - 2,
        "step": 1200,
        "samples_per_s": 540.25,
        "steps_per_s": 2.11,
        "checkpoint": {"step": 1100, "t": NOW - 35, "where": "/checkpoints"},
        "members": [
            {
                "rank": rank,
                "worker_id": (rank + 1) % size,
                "pod": f"{NAME}-{(rank + 1) % size}-aaaaa",
                "node": "n1",
                "zone": "a",
                "rack": "",
            }
            for rank in range(size)
        ],
        "joining": [],
        "restarts": {"preempted": 1, "out of memory": 1, "failed": 0, "ring": 0},
        "budget": {"used": 1, "max": 10},
        "events": [{"t": NOW - 150, "text": "worker 2 lost: process exited by signal 9"}],
        **changes,
    }


def config(found: Object | str | None, verdict: str = "") -> Object:
    data = {names.VERDICT_ENTRY: verdict}
    if found is not None:
        data[names.STATUS_ENTRY] = found if isinstance(found, str) else json.dumps(found)
    return {"data": data}


def view(job_: Object, *pods: Object, status: Object | None = None, **more: Any) -> JobView:
    return look(Snapshot(job=job_, pods=pods, status=status, **more), NOW)


def running(*, pods: int = 4, **changes: Any) -> JobView:
    workers = [worker(index) for index in range(pods)]
    return view(job(), coordinator(), *workers, status=config(document(**changes)))


def ended(code: int) -> Object:
    return {"terminated": {"exitCode": code, "reason": "Completed" if code == 0 else "Error"}}


DONE = condition("Complete", True)
FAILED = condition(
    "Failed", True, "PodFailurePolicy", "Container worker failed with exit code 70", at=NOW - 30
)

SITUATIONS: dict[str, JobView] = {
    "running": running(),
    "a member is leaving, another one joins": view(
        job(),
        coordinator(),
        worker(0),
        worker(1),
        worker(2, "Running", condition("DisruptionTarget", True, "PreemptionByScheduler"), deleted=NOW + 40),
        worker(3, suffix="bbbbb", age_s=5),
        status=config(document("running", 3, joining=[3])),
    ),
    "too few nodes": view(
        job(),
        coordinator(),
        worker(0),
        worker(1),
        unplaced(2, FULL),
        unplaced(3, FULL),
        status=config(
            document(
                "waiting",
                members=[],
                reason="2 of 4 worker pods run",
                step=None,
                checkpoint=None,
                generation=0,
            )
        ),
        unseen=("nodes: list Node objects: nodes is forbidden",),
    ),
    "nothing of the coordinator yet": view(job(age_s=1), coordinator=coordinator_job(), status=config(None)),
    "the coordinator is silent": running(updated=NOW - 400),
    "suspended": view(
        job(suspend=True),
        worker(0, "Failed", state=ended(75)),
        status=config(document("waiting", members=[], reason="the job is suspended")),
    ),
    "being suspended": view(
        job(suspend=True),
        worker(0, deleted=NOW + 70),
        status=config(document("stopping", 1, reason="the job is suspended")),
    ),
    "queued": view(job(suspend=True, queue="team"), status=config(None)),
    "done": view(
        {**job(4, DONE, age_s=900), "status": {"conditions": [DONE], "completionTime": stamp(NOW - 60)}},
        *(worker(index, "Succeeded", state=ended(0)) for index in range(4)),
        status=config(document("done", members=[]), "done"),
    ),
    "failed": view(
        job(4, FAILED, age_s=900),
        worker(0, "Failed", state=ended(70)),
        worker(1, "Failed", state={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}),
        status=config(document("failed", members=[]), "failed: worker 1 was lost 11 times: out of memory"),
    ),
    "failed before the coordinator said a word": view(
        job(
            4,
            condition("Failed", True, "BackoffLimitExceeded", "Job has reached the specified backoff limit"),
        ),
        status=config(None),
    ),
}


@pytest.mark.parametrize(
    ("situation", "status", "summary"),
    [
        ("running", "running", ""),
        (
            "a member is leaving, another one joins",
            "running",
            "worker 2: its pod is ending (preempted by the",
        ),
        ("too few nodes", "waiting", "workers 2, 3: the only node does not fit"),
        ("nothing of the coordinator yet", "pending", ""),
        ("the coordinator is silent", "running", ""),
        ("suspended", "suspended", "it is suspended"),
        ("being suspended", "stopping", "the job is suspended"),
        ("queued", "queued", "it waits in queue team"),
        ("done", "done", ""),
        ("failed", "failed", "worker 1 was lost 11 times: out of memory"),
        ("failed before the coordinator said a word", "failed", "its program cannot be started"),
    ],
)
def test_status_and_summary(situation: str, status: str, summary: str) -> None:
    found = SITUATIONS[situation]
    assert found.status == status
    assert found.summary.startswith(summary)
    assert bool(found.summary) == bool(summary)


def test_the_reports_and_the_table(golden: Golden) -> None:
    parts = []
    for situation, found in SITUATIONS.items():
        lines = "\n".join(job_report(found, NOW, place=["-N", "ml"]))
        parts.append(f"=== {situation}\n{lines}\n")
    listed = jobs_table(list(SITUATIONS.values()), NOW, with_namespace=True)
    parts.append("\n".join(["=== ls -A", *listed, ""]))
    golden("kubernetes_status.txt", "\n".join(parts))


def test_json_holds_the_document_and_what_was_found_out(golden: Golden) -> None:
    found = SITUATIONS["too few nodes"].as_json(NOW)
    golden("kubernetes_status.json", json.dumps(found, indent=2) + "\n")


def test_members_whose_pods_are_gone_are_marked() -> None:
    found = running(pods=3)
    assert {member.worker_id: member.note for member in found.members}[3] == "its pod is gone"


def test_members_keep_their_place_when_pods_may_not_be_read() -> None:
    found = look(Snapshot(job=job(), pods=None, status=config(document()), unseen=("pods: no",)), NOW)
    assert [member.note for member in found.members] == [""] * 4
    assert found.reasons == ()
    assert found.status == "pending"
    active = job()
    active["status"]["active"] = 4
    assert look(Snapshot(job=active, pods=None, status=config(document())), NOW).status == "running"


def test_a_verdict_counts_before_the_job_controller_has_noticed() -> None:
    assert view(job(), worker(0), status=config(document(), "failed: bits differ")).status == "failed"
    assert view(job(), worker(0), status=config(document(), "done")).status == "done"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"x"', '{"members": 3, "events": [1], "checkpoint": "x", "restarts": 1}']
)
def test_a_damaged_document_is_no_reason_to_fail(text: str) -> None:
    found = view(job(), worker(0), status=config(text))
    assert job_report(found, NOW, place=[])
    assert jobs_table([found], NOW, with_namespace=False)
    json.dumps(found.as_json(NOW))


def test_a_job_that_is_being_removed() -> None:
    gone = job()
    gone["metadata"]["deletionTimestamp"] = stamp(NOW)
    assert view(gone, worker(0)).status == "cancelling"


def test_the_next_commands_lead_to_the_same_job() -> None:
    assert next_commands(SITUATIONS["running"], ["--context", "x", "-N", "ml"])[0] == (
        "ringps logs --context x -N ml -f digits"
    )
    assert next_commands(SITUATIONS["suspended"], [])[0] == "ringps resume digits"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0s"),
        (59.4, "59s"),
        (60, "1m"),
        (200, "3m20s"),
        (3600, "1h"),
        (18_420, "5h7m"),
        (188_000, "2d4h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_and_tables() -> None:
    assert [rate(value) for value in (0.1234, 12.34, 1234.5)] == ["0.12", "12.3", "1234"]
    assert ranges([5, 0, 1, 2, 7, 8]) == "0-2, 5, 7, 8"
    assert table(["A", "N"], [["x", "10"], ["yy", "9"]], right=("N",)) == ["A    N", "x   10", "yy   9"]
