"""Fault plans: what they mean, that they survive JSON, and that a fault which is not reached is noticed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ringps import probe
from ringps.testing import faults
from ringps.testing.plan import KINDS, TRAINING, Fault, FaultPlan, Fired, Moment

EVERY_KIND = dict.fromkeys(KINDS, 1)


@pytest.fixture
def record(tmp_path: Path) -> Any:
    yield tmp_path / "fired.jsonl"
    faults.disarm()


def a_line(fault: int, *, step: int = 1, generation: int = 1, t: float = 0.0) -> Fired:
    return Fired(fault=fault, worker_id=0, pid=1, step=step, generation=generation, t=t)


def delay(**at: Any) -> Fault:
    return Fault(kind="delay", at=Moment(**at), worker_id=1, seconds=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_a_random_plan_survives_json(seed: int) -> None:
    draw = random.Random(seed).randrange
    plan = FaultPlan.random(draw, workers=4, steps=100, count=50, kinds=EVERY_KIND, buckets=3)
    assert len(plan.faults) == 50
    assert FaultPlan.from_json(plan.to_json()) == plan
    again = FaultPlan.random(
        random.Random(seed).randrange, workers=4, steps=100, count=50, kinds=EVERY_KIND, buckets=3
    )
    assert again == plan, "a seed gives one plan"


def test_random_plans_come_to_every_kind_and_point() -> None:
    draw = random.Random(1).randrange
    plan = FaultPlan.random(draw, workers=4, steps=100, count=2000, kinds=EVERY_KIND)
    assert {fault.kind for fault in plan.faults} == set(KINDS)
    assert {fault.at.point for fault in plan.faults} == set(TRAINING)
    assert {fault.at.since_step for fault in plan.faults} == set(range(1, 101))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"kind": "melt", "at": Moment(point="step")}, "no fault 'melt'"),
        ({"kind": "delay", "at": Moment(point="step")}, "delay needs seconds"),
        ({"kind": "cut", "at": Moment(point="step")}, "cut happens at chunk or phase, not at step"),
        ({"kind": "cut", "at": Moment(point="phase"), "silent": True}, "silent concerns"),
        ({"kind": "kill", "at": Moment(point="step"), "steps": 0}, "steps 1 or more"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Fault(**values)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"point": "lunch"}, "no point 'lunch'"),
        ({"point": "vote", "bucket": 1}, "has no bucket"),
        ({"point": "vote", "generation": 1}, "has no generation"),
        ({"point": "vote", "occurrence": 0}, "at least 1"),
    ],
)
def test_a_moment_that_cannot_be_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Moment(**values)


@pytest.mark.parametrize("text", ["[{}]", '[{"kind": "kill"}]', '{"a": 1}', "nonsense", '[{"at": 3}]'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        FaultPlan.from_json(text)


def test_a_fault_happens_once_at_its_moment(record: Path) -> None:
    plan = FaultPlan((delay(point="bucket", step=2, bucket=1), delay(point="vote", since_step=2)))
    faults.arm(plan, 1, record)
    for step in (1, 2, 3):
        for bucket in (0, 1):
            probe.reached("bucket", step=step, bucket=bucket, attempt=0)
        probe.reached("vote", step=step, attempt=0)
    assert [(one.fault, one.step) for one in plan.read_record(record.read_text())] == [(0, 2), (1, 2)]
    plan.check_fired(record.read_text())


def test_occurrences_are_counted(record: Path) -> None:
    plan = FaultPlan((delay(point="phase", since_step=2, occurrence=3),))
    faults.arm(plan, 1, record)
    for step in (1, 2):
        probe.reached("vote", step=step, attempt=0)
        for _ in range(2):
            probe.reached("phase", connections=[])
    assert plan.unfired(record.read_text())
    probe.reached("phase", connections=[])
    plan.check_fired(record.read_text())


def test_a_fault_that_was_not_reached_is_an_error(record: Path) -> None:
    plan = FaultPlan((delay(point="vote", step=1), delay(point="vote", step=9)))
    faults.arm(plan, 1, record)
    probe.reached("vote", step=1, attempt=0)
    with pytest.raises(AssertionError, match="1 of 2 faults were never reached: number 1: delay of worker 1"):
        plan.check_fired(record.read_text())


def test_a_fault_of_another_worker_does_not_happen_here(record: Path) -> None:
    plan = FaultPlan((delay(point="vote"),))
    faults.arm(plan, 2, record)
    probe.reached("vote", step=1, attempt=0)
    assert plan.fired(record.read_text()) == []


def test_a_replacement_does_not_repeat_what_happened(record: Path) -> None:
    plan = FaultPlan((delay(point="vote"),))
    for _ in range(2):  # the second stands for a later process of this worker
        faults.arm(plan, 1, record)
        probe.reached("vote", step=1, attempt=0)
    assert len(plan.fired(record.read_text())) == 1


def test_of_several_workers_one_gets_the_fault(record: Path) -> None:
    plan = FaultPlan((Fault(kind="delay", at=Moment(point="vote"), seconds=1e-6),))
    armed = [faults.Armed(plan, worker_id, record) for worker_id in range(3)]
    for one in armed:
        one.on_reached("vote", {"step": 1, "attempt": 0})
    assert [one.worker_id for one in plan.read_record(record.read_text())] == [0]


def test_a_slow_worker_is_slow_for_some_steps(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    plan = FaultPlan((Fault(kind="slow", at=Moment(point="step", step=2), seconds=0.5, steps=2),))
    faults.arm(plan, 0, record)
    for step in range(1, 6):
        probe.reached("step", step=step, attempt=0, parameters=[])
    assert slept == [0, 0.5, 0.5, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_corruption_changes_one_bit_of_one_element(record: Path, dtype: torch.dtype) -> None:
    bucket = torch.ones(8, dtype=dtype)
    parameters = [torch.nn.Parameter(torch.ones(2, 3, dtype=dtype)), torch.nn.Parameter(torch.ones(3))]
    plan = FaultPlan(
        (
            Fault(kind="corrupt_bucket", at=Moment(point="reduced"), position=11),
            Fault(kind="corrupt_parameters", at=Moment(point="step"), position=4),
        )
    )
    faults.arm(plan, 0, record)
    probe.reached("reduced", step=1, bucket=0, tensor=bucket, attempt=0)
    probe.reached("step", step=1, attempt=0, parameters=parameters)
    assert (bucket != 1).nonzero().tolist() == [[3]]
    assert (parameters[0] != 1).nonzero().tolist() == [[1, 1]]
    assert bool((parameters[1] == 1).all())


@pytest.mark.parametrize("part", ["header", "payload"])
def test_a_frame_is_changed_and_the_sender_keeps_its_own(record: Path, part: Any) -> None:
    plan = FaultPlan((Fault(kind="corrupt_frame", at=Moment(point="chunk"), part=part, position=5),))
    faults.arm(plan, 0, record)
    sent = {"header": bytes(48), "payload": memoryview(bytearray(3))}
    passed = probe.reached("chunk", **sent, peer=1, outgoing=[], incoming=[])
    changed = {name for name in sent if bytes(passed[name]) != bytes(sent[name])}
    assert changed == {part}
    assert sum(bytes(passed[part])) == 1
    assert not any(sent[part])


def test_members_are_counted_before_one_is_taken() -> None:
    careful = Fault(kind="kill", at=Moment(point="vote"), least_members=2)
    pause = Fault(kind="stop", at=Moment(point="vote"), seconds=0.5)
    plan = FaultPlan(
        (careful, Fault(kind="corrupt_parameters", at=Moment(point="step")), careful, careful, pause)
    )

    def permits(*record: Fired, members: int = 4, step: int = 9, now: float = 100.0) -> bool:
        return plan.permits(careful, record, members=members, generation=5, step=step, now=now)[0]

    assert permits()
    assert not permits(members=1)
    assert permits(a_line(0, generation=5), a_line(2, generation=5))
    assert not permits(a_line(0, generation=5), a_line(2, generation=5), a_line(3, generation=6))
    assert permits(a_line(0, generation=4), a_line(2, generation=4), a_line(3, generation=4)), (
        "replaced since"
    )
    assert not permits(a_line(1, step=8, generation=4), members=3), "it may not have been healed yet"
    assert permits(a_line(1, step=6, generation=4), members=3)
    assert not permits(a_line(4, t=99.0, generation=1), members=2), "it may be stopped yet"
    assert permits(a_line(4, t=97.0, generation=5), members=2)
    reckless = Fault(kind="kill", at=Moment(point="vote"))
    assert plan.permits(reckless, [], members=1, generation=5, step=9, now=100.0)[0]


def test_a_last_line_that_is_being_written_does_not_count() -> None:
    whole = a_line(0).line()
    assert FaultPlan.read_record(whole + whole[:10]) == [a_line(0)]
