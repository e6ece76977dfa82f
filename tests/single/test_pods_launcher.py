"""What a launcher does in a pod: the pod stays as long as the job, whatever becomes of workers and others."""

from __future__ import annotations

import signal

import pytest

from ringps.worker_env import SUSPENDED_CODE
from ringps_launcher.outcome import Failure, Outcome
from ringps_launcher.replacement import Replacements
from ringps_launcher.restart import DRAIN_S, PATIENCE_S, Phase, Supervision
from ringps_launcher.stimuli import (
    CoordinatorBack,
    CoordinatorLost,
    JobDone,
    JobFailed,
    Kill,
    Replaceable,
    Restarting,
    Say,
    Start,
    StopAsked,
    Terminate,
    TimePassed,
    WorkerExited,
    WorkerStarted,
)

VERDICT_S = 5.0
LONG_S = 1e6
FAILED = Failure(worker_id=1, rank=1, host="pod-1", code=3, reason="why")
TERM = StopAsked(number=signal.SIGTERM)


def pod() -> Supervision:
    """A launcher whose only worker runs."""
    job = Supervision(
        {1: 1},
        host="pod-1",
        grace_s=10.0,
        verdict_s=VERDICT_S,
        replacements=Replacements(None),
        alone=False,
        stays=True,
    )
    job.handle(WorkerStarted(worker_id=1, pid=8), 0.0)
    return job


def ends(job: Supervision, code: int, now_s: float = 1.0) -> None:
    job.handle(WorkerExited(worker_id=1, code=code, reason="why"), now_s)


@pytest.mark.parametrize("code", [0, 3, 137, SUSPENDED_CODE])
@pytest.mark.parametrize("lost", [False, True])
def test_it_waits_for_the_coordinator_s_word_however_long(code: int, lost: bool) -> None:
    job = pod()
    if lost:
        job.handle(CoordinatorLost(), 0.5)
    ends(job, code)
    if not lost:
        job.handle(CoordinatorLost(), 2.0)
    job.handle(TimePassed(), LONG_S)
    assert (job.phase, job.outcome, job.deadline_s) == (Phase.WAITING, None, None)
    job.handle(CoordinatorBack(), LONG_S)
    job.handle(JobDone(), LONG_S)
    assert job.outcome is not None and job.outcome.code == 0


def test_it_says_once_that_it_waits() -> None:
    job = pod()
    ends(job, 0)
    assert job.deadline_s == 1.0 + PATIENCE_S
    [said] = job.handle(TimePassed(), 1.0 + PATIENCE_S)
    assert isinstance(said, Say) and "waiting" in said.text
    assert job.handle(TimePassed(), LONG_S) == []


def test_a_running_worker_is_left_alone_while_no_coordinator_is_there() -> None:
    job = pod()
    job.handle(CoordinatorLost(), 1.0)
    assert job.handle(TimePassed(), LONG_S) == []
    assert job.phase is Phase.RUNNING


def test_its_worker_is_replaced_as_often_as_the_coordinator_says() -> None:
    job = pod()
    now_s = 1.0
    for restart in range(1, 31):
        ends(job, 3, now_s)
        restarting, said = job.handle(Replaceable(worker_id=1, reason="lost"), now_s)
        assert isinstance(restarting, Restarting) and restarting.restarts_left is None
        assert isinstance(said, Say) and "restarts left" not in said.text
        due_s = job.deadline_s
        assert due_s is not None and due_s - now_s < 10.1
        assert job.handle(TimePassed(), due_s) == [Start(worker_id=1, restart=restart)]
        job.handle(WorkerStarted(worker_id=1, pid=8 + restart), due_s)
        now_s = due_s + 1.0


def test_none_is_started_while_no_coordinator_is_there() -> None:
    job = pod()
    ends(job, 3)
    job.handle(Replaceable(worker_id=1, reason="lost"), 1.0)
    job.handle(CoordinatorLost(), 1.0)
    assert job.handle(TimePassed(), LONG_S) == []
    job.handle(CoordinatorBack(), LONG_S)
    assert job.handle(TimePassed(), LONG_S) == [Start(worker_id=1, restart=1)]


def test_the_next_start_of_the_ring_ends_this_one_at_once() -> None:
    job = pod()
    job.handle(JobFailed(failure=FAILED, restarts=True), 1.0)
    actions = job.handle(TimePassed(), 1.0 + DRAIN_S)
    assert Kill(worker_ids=(1,)) in actions
    ends(job, 137, 4.0)
    assert job.outcome == Outcome(code=3, failure=FAILED, restarts=True)


def test_the_verdict_ends_it() -> None:
    job = pod()
    ends(job, 3)
    job.handle(JobFailed(failure=FAILED, restarts=False), 2.0)
    assert job.outcome == Outcome(code=3, failure=FAILED, restarts=False)


def test_stopping_with_all_others_at_a_checkpoint() -> None:
    job = pod()
    ends(job, SUSPENDED_CODE)
    job.handle(JobDone(suspended=True), 2.0)
    assert job.outcome == Outcome(code=SUSPENDED_CODE, suspended=True)
    assert job.outcome.signal is None  # its pod stays


class TestAskedToLeave:
    """Its pod goes, and must not look as if the job had failed."""

    def test_a_worker_that_leaves(self) -> None:
        job = pod()
        assert Terminate(worker_ids=(1,)) in job.handle(TERM, 1.0)
        ends(job, 143, 2.0)
        assert job.outcome == Outcome(code=143, signal=signal.SIGTERM)

    def test_a_worker_that_saves_a_checkpoint(self) -> None:
        job = pod()
        job.handle(TERM, 1.0)
        ends(job, SUSPENDED_CODE, 2.0)
        assert job.outcome is None
        job.handle(TimePassed(), 2.0 + VERDICT_S)  # there may be no coordinator
        assert job.outcome == Outcome(code=SUSPENDED_CODE, signal=signal.SIGTERM, suspended=True)

    @pytest.mark.parametrize("code", [0, 3, 137])
    def test_while_it_waits_for_a_word(self, code: int) -> None:
        job = pod()
        ends(job, code)
        job.handle(CoordinatorLost(), 2.0)
        job.handle(TERM, 3.0)
        assert job.outcome == Outcome(code=143, signal=signal.SIGTERM)

    def test_while_the_ring_is_about_to_start_again(self) -> None:
        job = pod()
        job.handle(JobFailed(failure=FAILED, restarts=True), 1.0)
        job.handle(TERM, 1.5)
        ends(job, 143, 2.0)
        assert job.outcome == Outcome(code=143, signal=signal.SIGTERM)

    def test_after_the_verdict_it_tells_of_that(self) -> None:
        job = pod()
        job.handle(JobFailed(failure=FAILED, restarts=False), 1.0)
        job.handle(TERM, 1.5)
        ends(job, 143, 2.0)
        assert job.outcome is not None and job.outcome.failure == FAILED and not job.outcome.restarts

    def test_twice(self) -> None:
        """The cluster says so, and the kubelet a moment later."""
        job = pod()
        job.handle(TERM, 1.0)
        assert job.handle(TERM, 1.1) == []
        assert job.phase is Phase.STOPPING
