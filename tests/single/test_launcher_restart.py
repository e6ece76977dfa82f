from __future__ import annotations

import signal

import pytest

from ringps_launcher.restart import (
    DRAIN_S,
    PATIENCE_S,
    CoordinatorLost,
    Failure,
    JobDone,
    JobFailed,
    Kill,
    Outcome,
    Phase,
    Report,
    Say,
    StopAsked,
    Supervision,
    Terminate,
    TimePassed,
    WorkerExited,
    describe_exit,
    exit_code,
    last_line,
)

GRACE_S = 10.0
VERDICT_S = 5.0
REMOTE = Failure(worker_id=0, rank=0, host="node-a", code=137, reason="process killed by signal 9")
INT, TERM = StopAsked(number=signal.SIGINT), StopAsked(number=signal.SIGTERM)


def supervise(workers: int = 3) -> Supervision:
    """Of workers 4, 5, ... with ranks 14, 15, ..."""
    ranks = {4 + i: 14 + i for i in range(workers)}
    return Supervision(ranks, host="node-b", grace_s=GRACE_S, verdict_s=VERDICT_S)


def gone(worker_id: int, code: int = 0, reason: str = "why") -> WorkerExited:
    return WorkerExited(worker_id=worker_id, code=code, reason=reason)


def report(worker_id: int, code: int = 0, reason: str = "why") -> Report:
    return Report(worker_id=worker_id, code=code, reason=reason)


def test_success_is_known_only_once_the_whole_job_is_done() -> None:
    job = supervise(2)
    assert job.handle(gone(4), 1.0) == [report(4)]
    assert job.handle(gone(5), 2.0) == [report(5)]
    assert (job.outcome, job.deadline_s) == (None, 2.0 + PATIENCE_S)
    [said] = job.handle(TimePassed(), 2.0 + PATIENCE_S)
    assert isinstance(said, Say) and "other machines" in said.text
    assert job.deadline_s is None
    assert job.handle(JobDone(), 1000.0) == []
    assert job.outcome == Outcome(code=0)


def test_a_failure_drains_then_stops_then_kills() -> None:
    job = supervise()
    assert job.handle(gone(5, 3), 0.0) == [report(5, 3)]
    assert (job.phase, job.deadline_s) == (Phase.DRAINING, DRAIN_S)
    assert job.handle(TimePassed(), DRAIN_S - 0.1) == []
    assert job.handle(TimePassed(), DRAIN_S) == [Terminate(worker_ids=(4, 6))]
    assert job.handle(gone(4, 143), DRAIN_S) == [report(4, 143)]
    said, kill = job.handle(TimePassed(), DRAIN_S + GRACE_S)
    assert isinstance(said, Say) and "rank 16" in said.text
    assert kill == Kill(worker_ids=(6,))
    assert job.deadline_s is None
    job.handle(gone(6, 137), 20.0)
    assert job.phase is Phase.WAITING, "the coordinator may know better who was first"
    job.handle(TimePassed(), 20.0 + VERDICT_S)
    failure = Failure(worker_id=5, rank=15, host="node-b", code=3, reason="why")
    assert job.outcome == Outcome(code=3, failure=failure)


def test_the_coordinator_decides_who_failed_first() -> None:
    job = supervise(1)
    job.handle(gone(4, 1), 0.0)
    job.handle(JobFailed(failure=REMOTE), 0.1)
    assert job.outcome == Outcome(code=137, failure=REMOTE)


def test_a_failure_elsewhere_stops_the_workers_here() -> None:
    job = supervise(1)
    assert job.handle(JobFailed(failure=REMOTE), 0.0) == []
    assert job.handle(TimePassed(), DRAIN_S) == [Terminate(worker_ids=(4,))]
    job.handle(gone(4, 143), DRAIN_S)
    assert job.outcome == Outcome(code=137, failure=REMOTE)


def test_the_first_verdict_stands() -> None:
    job = supervise(1)
    job.handle(JobFailed(failure=REMOTE), 0.0)
    other = Failure(worker_id=1, rank=1, host="node-a", code=1, reason="later")
    job.handle(JobFailed(failure=other), 0.0)
    job.handle(gone(4), 0.0)
    assert job.outcome == Outcome(code=137, failure=REMOTE)


def test_a_worker_that_left_early_with_0_still_fails_the_job() -> None:
    cause = Failure(worker_id=0, rank=0, host="node-a", code=0, reason="left early")
    job = supervise(1)
    job.handle(JobFailed(failure=cause), 0.0)
    job.handle(gone(4), 0.0)
    assert job.outcome == Outcome(code=1, failure=cause)


@pytest.mark.parametrize("code", [0, 3])
def test_without_a_coordinator_what_happened_here_counts(code: int) -> None:
    job = supervise(2)
    assert job.handle(CoordinatorLost(), 0.0) == [], "training goes on"
    job.handle(gone(4, code), 1.0)
    job.handle(gone(5, 0), 1.0)
    assert job.outcome is not None and job.outcome.code == code


def test_a_coordinator_lost_while_only_it_is_awaited() -> None:
    job = supervise(1)
    job.handle(gone(4), 0.0)
    job.handle(CoordinatorLost(), 0.0)
    assert job.outcome == Outcome(code=0)


@pytest.mark.parametrize(("event", "code"), [(INT, 130), (TERM, 143)])
def test_a_signal_stops_all_workers(event: StopAsked, code: int) -> None:
    job = supervise(2)
    said, terminate = job.handle(event, 5.0)
    assert isinstance(said, Say) and "2 workers" in said.text
    assert terminate == Terminate(worker_ids=(4, 5))
    assert job.deadline_s == 5.0 + GRACE_S
    [told] = job.handle(gone(4, 143), 5.1)
    assert isinstance(told, Report) and "told to stop" in told.reason
    job.handle(JobFailed(failure=REMOTE), 5.1)
    job.handle(gone(5), 5.2)
    assert job.outcome == Outcome(code=code, signal=event.number)


def test_a_second_ctrl_c_kills_but_a_second_sigterm_does_not() -> None:
    job = supervise(1)
    job.handle(TERM, 0.0)
    assert job.handle(TERM, 0.0) == []
    assert job.handle(INT, 0.0)[-1] == Kill(worker_ids=(4,))
    assert job.handle(INT, 0.0) == []


def test_a_signal_after_a_failure_hurries_but_does_not_hide_it() -> None:
    job = supervise(2)
    job.handle(gone(4, 3), 0.0)
    assert job.handle(INT, 0.0)[-1] == Terminate(worker_ids=(5,))
    job.handle(gone(5, 143), 0.0)
    job.handle(CoordinatorLost(), 0.0)
    assert job.outcome is not None and job.outcome.code == 3


def test_a_signal_while_waiting_for_other_machines_ends_at_once() -> None:
    job = supervise(1)
    job.handle(gone(4), 0.0)
    job.handle(TERM, 0.0)
    assert job.outcome == Outcome(code=143, signal=signal.SIGTERM)


def test_exit_codes_and_reasons() -> None:
    assert [exit_code(status) for status in (0, 3, -9)] == [0, 3, 137]
    assert describe_exit(3) == "process exited with code 3"
    assert describe_exit(-9) == "process killed by signal 9 (SIGKILL)"
    assert describe_exit(-40) == "process killed by signal 40"


def test_the_last_line_says_who_why_and_where() -> None:
    ended = Outcome(code=137, failure=REMOTE)
    line = last_line(ended, log=None, local=False)
    assert line is not None
    assert line.startswith("rank 0 (worker 0 on node-a) failed: process killed by signal 9; ")
    assert line.endswith("launcher on node-a")
    assert "--log-dir" in (last_line(ended, log=None, local=True) or "")
    assert "logs/rank-0.log" in (last_line(ended, log="logs/rank-0.log", local=True) or "")
    assert last_line(Outcome(code=0), log=None, local=False) is None
    assert last_line(Outcome(code=130, signal=2), log=None, local=False) == "stopped: got SIGINT"
