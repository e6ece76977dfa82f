"""Training under faults: nothing hangs, and no step and no sample is lost or done twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringps.testing.job import Ended, FaultyJob, JobHung, run_job
from ringps.testing.nursery import Nursery
from ringps.testing.plan import KINDS, Fault, FaultPlan, Moment
from tests.chaos import ledgers
from tests.chaos.campaign import ENVIRON, SAMPLES, SCRIPT, Campaign
from tests.launching import run, script

pytestmark = pytest.mark.timeout(170)  # a campaign on busy cores; a hang is noticed long before


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as one:
        yield one


def train(
    nursery: Nursery, directory: Path, *faults: Fault, steps: int, workers: int = 3, transport: str = "tcp"
) -> Ended:
    """Train under these faults; all of them have happened, and everything was trained."""
    plan = FaultPlan(faults)
    arguments = (str(directory), "--steps", str(steps), "--samples", str(SAMPLES), "--workers", str(workers))
    job = FaultyJob(
        script=SCRIPT,
        workers=workers,
        plan=plan,
        directory=directory,
        arguments=arguments,
        environ={**ENVIRON, "RINGPS_TRANSPORT": transport},
    )
    ended = run_job(job, nursery)
    assert ended.failure is None
    plan.check_fired(job.record.read_text())
    ledgers.check(directory, steps=steps, samples=SAMPLES)
    return ended


def reasons(ended: Ended) -> list[str]:
    """Of all generations but the first."""
    return [event["reason"] for event in ended.events if event["event"] == "generation"][1:]


@pytest.mark.parametrize(("transport", "count"), [("shm", 70), ("tcp", 70), ("both", 60)])
def test_two_hundred_random_faults(nursery: Nursery, tmp_path: Path, transport: str, count: int) -> None:
    campaign = Campaign(seed=20, count=count, transport=transport)
    kinds = {fault.kind for fault in campaign.plan().faults}
    assert kinds == {kind for kind in KINDS if transport != "shm" or kind != "corrupt_frame"}
    campaign.run(nursery, tmp_path)


def test_a_link_that_falls_silent(nursery: Nursery, tmp_path: Path) -> None:
    cut = Fault(kind="cut", at=Moment(point="chunk", step=20), worker_id=1, silent=True)
    ended = train(nursery, tmp_path, cut, steps=120)
    assert len(reasons(ended)) == 1
    assert "cannot reach" in reasons(ended)[0]
    (fired,) = FaultPlan.read_record((tmp_path / "fired.jsonl").read_text())
    reformed_s = [event["t"] for event in ended.events if event["event"] == "generation"][1]
    assert reformed_s - fired.t > 0.9, "silence is noticed by its length, here silent_link_s=1"
    assert [code for _, code in ended.exits] == [0, 0, 0], "nobody is replaced for a link"


@pytest.mark.parametrize(
    ("direction", "transport"), [("both", "tcp"), ("in", "tcp"), ("out", "tcp"), ("both", "shm")]
)
def test_a_connection_that_breaks(nursery: Nursery, tmp_path: Path, direction: Any, transport: str) -> None:
    point = "chunk" if transport == "tcp" else "phase"
    cut = Fault(kind="cut", at=Moment(point=point, step=20), worker_id=1, direction=direction)
    ended = train(nursery, tmp_path, cut, steps=120, transport=transport)
    assert len(reasons(ended)) == 1
    assert "cannot reach" in reasons(ended)[0]
    assert [code for _, code in ended.exits] == [0, 0, 0], "nobody is replaced for a link"


def test_a_worker_that_stays_stopped_is_replaced(nursery: Nursery, tmp_path: Path) -> None:
    stop = Fault(kind="stop", at=Moment(point="vote", step=20), worker_id=1)
    ended = train(nursery, tmp_path, stop, steps=200)
    assert "no heartbeat" in reasons(ended)[0]
    assert "worker 1 joins" in reasons(ended)[1]
    assert ended.exits[0] == (1, -9)


def test_wrong_bits_are_found_and_named(nursery: Nursery, tmp_path: Path) -> None:
    faults = (
        Fault(kind="corrupt_bucket", at=Moment(point="reduced", step=10, bucket=1), worker_id=2, position=3),
        Fault(kind="corrupt_parameters", at=Moment(point="step", step=15), worker_id=1, position=3),
    )
    ended = train(nursery, tmp_path, *faults, steps=40, transport="shm")
    found = [event for event in ended.events if event["event"] == "diverged"]
    assert [(event["step"], event["what"], event["worker_ids"]) for event in found] == [
        (10, "reduced bits", [2]),
        (15, "parameters", [1]),
    ]
    assert not reasons(ended), "nobody has to go for wrong bits"


def test_a_fault_that_is_never_reached_makes_the_run_fail(nursery: Nursery, tmp_path: Path) -> None:
    late = Fault(kind="kill", at=Moment(point="vote", step=1000), worker_id=0)
    with pytest.raises(AssertionError, match="1 of 1 faults were never reached: number 0: kill of worker 0"):
        train(nursery, tmp_path, late, steps=80, workers=2)


def test_a_job_that_hangs_is_noticed(nursery: Nursery, tmp_path: Path) -> None:
    hanging = tmp_path / "hanging.py"
    hanging.write_text("import signal\nprint('here it hangs', flush=True)\nsignal.pause()\n")
    job = FaultyJob(script=hanging, workers=1, plan=FaultPlan(), directory=tmp_path / "job", stall_s=1.0)
    with pytest.raises(JobHung, match=r"here it hangs[\s\S]*hanging.py\", line 3"):
        run_job(job, nursery)


def test_faults_under_the_command(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        """
        import torch, ringps
        ringps.init()
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        opt = ringps.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        state = ringps.TrainState(model=model, optimizer=opt)
        for step, _ in state.steps(range(1000), until=30):
            opt.zero_grad()
            model(torch.ones(1, 4)).sum().backward()
            opt.step()
        print("end", step, ringps.world_size(), ringps.generation())
        """,
    )
    plan = FaultPlan(
        (
            Fault(kind="delay", at=Moment(point="boundary", step=3), worker_id=0, seconds=0.01),
            Fault(kind="kill", at=Moment(point="voted", step=9), worker_id=1),
        )
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    record = tmp_path / "fired.jsonl"
    faulty = ("-m", "ringps.testing.faulty", "--plan", tmp_path / "plan.json", "--record", record, program)
    done = run("run", "-n", "2", "--max-restarts", "0", "--events", tmp_path / "events.jsonl", *faulty)
    assert done.code == 0, done.err
    assert "end 30 1 2" in done.out
    plan.check_fired(record.read_text())
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["worker_id"] for event in events if event["event"] == "worker_lost"] == [1]
