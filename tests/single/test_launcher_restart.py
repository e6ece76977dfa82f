from __future__ import annotations

import signal

import pytest

from ringps_launcher.outcome import Failure, Loss, Outcome, Saved
from ringps_launcher.replacement import Replacements
from ringps_launcher.restart import DRAIN_S, PATIENCE_S, Phase, Supervision
from ringps_launcher.stimuli import (
    Action,
    CheckpointSaved,
    CoordinatorBack,
    CoordinatorLost,
    Expel,
    JobDone,
    JobFailed,
    Kill,
    LossNoted,
    Replaceable,
    Report,
    Restarting,
    RingFormed,
    Say,
    Start,
    StopAsked,
    Terminate,
    TimePassed,
    WorkerExited,
    WorkerStarted,
    from_job_event,
)

GRACE_S = 10.0
VERDICT_S = 5.0
LOCAL = Failure(worker_id=5, rank=15, host="node-b", code=3, reason="why")
REMOTE = Failure(worker_id=0, rank=0, host="node-a", code=137, reason="process killed by signal 9")
INT, TERM = StopAsked(number=signal.SIGINT), StopAsked(number=signal.SIGTERM)


def supervise(workers: int = 3, max_restarts: int = 3, *, alone: bool = True) -> Supervision:
    """Of workers 4, 5, ... with ranks 14, 15, ... and process ids 104, 105, ..."""
    ranks = {4 + i: 14 + i for i in range(workers)}
    job = Supervision(
        ranks,
        host="node-b",
        grace_s=GRACE_S,
        verdict_s=VERDICT_S,
        replacements=Replacements(max_restarts),
        alone=alone,
    )
    for worker_id in ranks:
        assert job.handle(WorkerStarted(worker_id=worker_id, pid=100 + worker_id), 0.0) == []
    return job


def gone(worker_id: int, code: int = 0, reason: str = "why") -> WorkerExited:
    return WorkerExited(worker_id=worker_id, code=code, reason=reason)


def report(worker_id: int, code: int = 0, reason: str = "why", pid: int | None = None) -> Report:
    return Report(worker_id=worker_id, pid=100 + worker_id if pid is None else pid, code=code, reason=reason)


def replaceable(worker_id: int, reason: str = "the coordinator's words") -> Replaceable:
    return Replaceable(worker_id=worker_id, reason=reason)


def said(actions: list[Action]) -> list[str]:
    """What the user is told, if that is all that is done."""
    assert all(isinstance(action, Say) for action in actions), actions
    return [action.text for action in actions if isinstance(action, Say)]


def lose_and_replace(job: Supervision, worker_id: int, now_s: float, pid: int) -> None:
    """The worker fails, and its replacement runs at once."""
    job.handle(gone(worker_id, 3), now_s)
    job.handle(replaceable(worker_id), now_s)
    due_s = job.deadline_s
    assert due_s is not None
    [start] = job.handle(TimePassed(), due_s)
    assert isinstance(start, Start)
    job.handle(WorkerStarted(worker_id=worker_id, pid=pid), due_s)


def test_success_is_known_only_once_the_whole_job_is_done() -> None:
    job = supervise(2)
    assert job.handle(gone(4), 1.0) == [report(4)]
    assert job.handle(gone(5), 2.0) == [report(5)]
    assert (job.outcome, job.deadline_s) == (None, 2.0 + PATIENCE_S)
    [text] = said(job.handle(TimePassed(), 2.0 + PATIENCE_S))
    assert "other machines" in text
    assert job.deadline_s is None
    assert job.handle(JobDone(), 1000.0) == []
    assert job.outcome == Outcome(code=0)


def test_a_failed_job_drains_then_stops_then_kills() -> None:
    job = supervise()
    job.handle(gone(5, 3), 0.0)
    assert job.handle(JobFailed(failure=LOCAL), 0.0) == []
    assert (job.phase, job.deadline_s) == (Phase.DRAINING, DRAIN_S)
    assert job.handle(TimePassed(), DRAIN_S - 0.1) == []
    assert job.handle(TimePassed(), DRAIN_S) == [Terminate(worker_ids=(4, 6))]
    assert job.handle(gone(4, 143), DRAIN_S) == [report(4, 143)]
    say, kill = job.handle(TimePassed(), DRAIN_S + GRACE_S)
    assert isinstance(say, Say) and "rank 16" in say.text
    assert kill == Kill(worker_ids=(6,))
    assert job.deadline_s is None
    job.handle(gone(6, 137), 20.0)
    assert job.outcome == Outcome(code=3, failure=LOCAL)


def test_what_a_failure_means_is_the_coordinator_s_to_say() -> None:
    job = supervise()
    assert job.handle(gone(5, 3), 1.0) == [report(5, 3)]
    assert (job.phase, job.deadline_s) == (Phase.RUNNING, 1.0 + VERDICT_S)
    assert job.handle(TimePassed(), 0.9 + VERDICT_S) == []


def test_without_any_word_the_others_are_drained() -> None:
    job = supervise(2)
    job.handle(gone(5, 3), 0.0)
    [text] = said(job.handle(TimePassed(), VERDICT_S))
    assert "no word from the coordinator on worker 5" in text
    assert (job.phase, job.deadline_s) == (Phase.DRAINING, VERDICT_S + DRAIN_S)
    assert job.handle(TimePassed(), VERDICT_S + DRAIN_S) == [Terminate(worker_ids=(4,))]
    job.handle(gone(4, 143), 10.0)
    job.handle(TimePassed(), 10.0)
    assert job.outcome == Outcome(code=3, failure=LOCAL)


def test_without_any_word_and_any_other_worker_it_is_the_end() -> None:
    job = supervise(2)
    job.handle(gone(4), 0.0)
    assert job.handle(gone(5, 3), 1.0) == [report(5, 3)]
    assert (job.phase, job.deadline_s) == (Phase.WAITING, 1.0 + VERDICT_S)
    job.handle(TimePassed(), 1.0 + VERDICT_S)
    assert job.outcome == Outcome(code=3, failure=LOCAL)


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
    say, terminate = job.handle(event, 5.0)
    assert isinstance(say, Say) and "2 workers" in say.text
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


# Replacements.


def test_a_lost_worker_is_replaced_after_a_moment() -> None:
    job = supervise()
    job.handle(gone(5, 137, "process killed by signal 9 (SIGKILL)"), 1.0)
    assert job.handle(replaceable(5), 2.0) == [
        Restarting(worker_id=5, delay_s=0.2, restarts_left=2),
        Say(
            text="worker 5 lost: process killed by signal 9 (SIGKILL); "
            "a new one starts in 0.2 s (2 of 3 restarts left)"
        ),
    ]
    assert job.deadline_s == 2.2, "and no word is awaited any more"
    assert job.handle(TimePassed(), 2.1) == []
    assert job.handle(TimePassed(), 2.2) == [Start(worker_id=5, restart=1)]
    assert (job.phase, job.deadline_s) == (Phase.RUNNING, None)
    job.handle(WorkerStarted(worker_id=5, pid=1005), 2.2)
    for worker_id in (4, 5, 6):
        pid = 1005 if worker_id == 5 else None
        assert job.handle(gone(worker_id), 9.0) == [report(worker_id, pid=pid)]
    job.handle(JobDone(), 9.0)
    loss = Loss(worker_id=5, reason="process killed by signal 9 (SIGKILL)")
    assert job.outcome == Outcome(code=0, losses=(loss,), replaced=1)


def test_a_replacement_waits_until_the_lost_process_is_reaped() -> None:
    job = supervise()
    assert job.handle(replaceable(5), 1.0) == []
    assert job.deadline_s is None
    told, restarting, say = job.handle(gone(5, 137), 4.0)
    assert told == report(5, 137)
    assert isinstance(restarting, Restarting)
    assert isinstance(say, Say) and say.text.startswith("worker 5 lost: why; ")
    assert job.handle(TimePassed(), 4.2) == [Start(worker_id=5, restart=1)]


def test_one_that_left_in_order_is_replaced_if_the_coordinator_says_so() -> None:
    job = supervise(2)
    assert job.handle(gone(5, 0), 0.0) == [report(5)]
    assert job.deadline_s is None, "no word need come"
    _, say = job.handle(replaceable(5, "left after step 9"), 0.0)
    assert isinstance(say, Say) and say.text.startswith("worker 5 left: left after step 9; a new one")
    assert job.handle(TimePassed(), 0.2) == [Start(worker_id=5, restart=1)]


def test_the_only_worker_here_is_replaced_too() -> None:
    job = supervise(1)
    job.handle(gone(4, 3), 0.0)
    assert job.phase is Phase.WAITING
    job.handle(replaceable(4), 0.5)
    assert job.phase is Phase.RUNNING
    assert job.handle(TimePassed(), 0.7) == [Start(worker_id=4, restart=1)]
    assert job.outcome is None


def test_said_again_a_loss_is_still_one() -> None:
    job = supervise(max_restarts=1)
    job.handle(gone(5, 3), 0.0)
    job.handle(replaceable(5), 0.0)
    assert job.handle(replaceable(5), 0.1) == []
    job.handle(gone(6, 3), 0.0)
    [text] = said(job.handle(replaceable(6), 0.1))
    assert text == "worker 6 lost: why; the restarts are used up (--max-restarts 1), the others go on"
    assert job.handle(replaceable(6), 0.2) == []
    assert job.handle(replaceable(99), 0.2) == [], "no worker of this machine"


def test_without_restarts_left_here_the_others_are_waited_for() -> None:
    job = supervise(1, max_restarts=0)
    job.handle(gone(4, 3), 0.0)
    job.handle(replaceable(4), 0.1)
    assert (job.phase, job.outcome) == (Phase.WAITING, None)
    [text] = said(job.handle(TimePassed(), VERDICT_S))
    assert "other machines" in text
    job.handle(JobDone(), 1000.0)
    assert job.outcome == Outcome(code=0, losses=(Loss(worker_id=4, reason="why"),))


def test_a_replacement_that_fails_is_replaced_later_each_time() -> None:
    job = supervise(2)
    lose_and_replace(job, 5, 0.0, pid=205)
    assert job.handle(gone(5, 1), 1.0) == [report(5, 1, pid=205)]
    restarting, _ = job.handle(replaceable(5), 1.0)
    assert restarting == Restarting(worker_id=5, delay_s=0.4, restarts_left=1)
    assert job.handle(TimePassed(), 1.4) == [Start(worker_id=5, restart=2)]
    # It cannot even be started: there is no process to name.
    assert job.handle(gone(5, 126), 1.4) == [report(5, 126, pid=0)]


def test_a_failed_job_takes_no_replacements() -> None:
    job = supervise(2)
    job.handle(gone(5, 3), 0.0)
    job.handle(replaceable(5), 0.0)
    job.handle(JobFailed(failure=REMOTE), 0.1)
    assert job.handle(TimePassed(), 1.0) == []
    assert job.handle(replaceable(5), 1.0) == []
    job.handle(gone(4, 1), 1.0)
    assert job.outcome == Outcome(code=137, failure=REMOTE)


def test_a_job_that_is_done_takes_no_replacements() -> None:
    job = supervise(2)
    job.handle(gone(5, 3), 0.0)
    job.handle(replaceable(5), 0.0)
    job.handle(gone(4), 0.1)
    assert job.outcome is None
    job.handle(JobDone(), 0.1)
    assert job.outcome == Outcome(code=0, losses=(Loss(worker_id=5, reason="why"),))


def test_a_replacement_that_came_too_late_is_stopped_and_does_no_harm() -> None:
    job = supervise(2)
    lose_and_replace(job, 5, 0.0, pid=205)
    job.handle(gone(4), 1.0)
    assert job.handle(JobDone(), 1.0) == []
    say, terminate = job.handle(TimePassed(), 1.0 + DRAIN_S)
    assert isinstance(say, Say) and "worker 5" in say.text
    assert terminate == Terminate(worker_ids=(5,))
    job.handle(gone(5, 143), 4.0)
    assert job.outcome == Outcome(code=0, losses=(Loss(worker_id=5, reason="why"),), replaced=1)


def test_a_loss_on_which_no_word_came_before_the_job_was_done_is_one() -> None:
    job = supervise(2)
    job.handle(gone(4), 0.0)
    job.handle(gone(5, 3), 0.0)
    job.handle(JobDone(), 0.1)
    assert job.outcome == Outcome(code=0, losses=(Loss(worker_id=5, reason="why"),))


@pytest.mark.parametrize("others", [0, 1])
def test_a_signal_takes_back_a_replacement_that_waits(others: int) -> None:
    job = supervise(1 + others)
    job.handle(gone(4, 3), 0.0)
    job.handle(replaceable(4), 0.0)
    job.handle(INT, 0.1)
    if others:
        assert job.handle(TimePassed(), 1.0) == []
        job.handle(gone(5, 143), 1.0)
    assert job.outcome == Outcome(code=130, signal=signal.SIGINT)


# What the coordinator's events tell.


def test_what_a_line_of_the_events_file_means() -> None:
    for name in ("worker_lost", "worker_left", "joiner_lost"):
        noted = LossNoted(worker_id=5, left=name == "worker_left")
        assert from_job_event({"event": name, "worker_id": 5, "rank": 1}) == noted
    members = [{"rank": 0, "worker_id": 4}, {"rank": 1, "worker_id": 7}]
    formed = from_job_event({"event": "generation", "generation": 2, "members": members})
    assert formed == RingFormed(worker_ids=frozenset({4, 7}))
    for event in (
        {"event": "step_committed", "worker_id": 5},
        {"event": "worker_lost", "worker_id": "5"},
        {"event": "generation", "members": 3},
        {},
    ):
        assert from_job_event(event) is None


@pytest.mark.parametrize("noted_first", [False, True])
def test_a_ring_that_takes_no_new_workers_goes_on_without_a_replacement(noted_first: bool) -> None:
    job = supervise(2)
    steps = [gone(5, 3), LossNoted(worker_id=5)]
    for event in reversed(steps) if noted_first else steps:
        job.handle(event, 0.0)
    assert job.deadline_s is None, "the coordinator knows; there may be no other word"
    formed = RingFormed(worker_ids=frozenset({4}))
    assert said(job.handle(formed, 1.0)) == ["worker 5 lost: why; the others go on"]
    assert job.handle(formed, 2.0) == []
    job.handle(gone(4), 9.0)
    job.handle(JobDone(), 9.0)
    assert job.outcome == Outcome(code=0, losses=(Loss(worker_id=5, reason="why"),))


def test_one_that_was_asked_to_leave_is_not_called_lost() -> None:
    job = supervise(3)
    for worker_id in (5, 6):
        job.handle(LossNoted(worker_id=worker_id, left=True), 0.0)
        job.handle(gone(worker_id, 143), 0.1)
    [text] = said(job.handle(RingFormed(worker_ids=frozenset({4, 6})), 0.2))
    assert text == "worker 5 left: why; the others go on"
    job.handle(LossNoted(worker_id=5, left=True), 0.0)
    _, say = job.handle(replaceable(5, "asked to leave"), 0.3)
    assert isinstance(say, Say) and say.text.startswith("worker 5 left: asked to leave; a new one")


def test_it_may_take_new_workers_later() -> None:
    job = supervise(2)
    job.handle(gone(5, 3), 0.0)
    job.handle(LossNoted(worker_id=5), 0.0)
    restarting, say = job.handle(replaceable(5), 99.0)
    assert isinstance(restarting, Restarting)
    assert isinstance(say, Say) and say.text.startswith("worker 5 lost: why; a new one")


def test_the_ring_may_go_on_elsewhere_alone() -> None:
    job = supervise(1)
    job.handle(gone(4, 3), 0.0)
    assert job.phase is Phase.WAITING
    job.handle(LossNoted(worker_id=4), 0.1)
    [text] = said(job.handle(TimePassed(), VERDICT_S))
    assert "other machines" in text
    assert (job.phase, job.deadline_s) == (Phase.WAITING, None)
    job.handle(JobFailed(failure=REMOTE), 1000.0)
    assert job.outcome == Outcome(code=137, failure=REMOTE)


def test_what_was_said_of_a_process_does_not_count_for_the_next_one() -> None:
    job = supervise(2)
    job.handle(LossNoted(worker_id=5), 0.0)
    lose_and_replace(job, 5, 0.0, pid=205)
    job.handle(gone(5, 1), 9.0)
    assert job.deadline_s == 9.0 + VERDICT_S


def test_a_member_that_ends_well_is_not_replaced_for_what_was_said_before_it_joined() -> None:
    job = supervise(2)
    lose_and_replace(job, 5, 0.0, pid=205)
    job.handle(replaceable(5), 1.0)  # said again on a new connection, before it was heard of
    job.handle(RingFormed(worker_ids=frozenset({4, 5})), 2.0)
    assert job.handle(gone(5), 9.0) == [report(5, pid=205)]
    assert job.deadline_s is None


# Expulsion.


def test_an_expelled_process_is_killed_and_the_reason_goes_with_it() -> None:
    job = supervise()
    say, kill = job.handle(Expel(worker_id=5, pid=105, reason="no heartbeat for 5 s"), 1.0)
    assert isinstance(say, Say) and "no heartbeat for 5 s" in say.text
    assert kill == Kill(worker_ids=(5,))
    [told] = job.handle(gone(5, 137, "process killed"), 1.0)
    assert isinstance(told, Report)
    assert told.reason == ("process killed by its launcher: no heartbeat for 5 s")


@pytest.mark.parametrize("pid", [0, 105, 99999])
def test_only_the_process_that_is_meant_is_expelled(pid: int) -> None:
    job = supervise()
    lose_and_replace(job, 5, 0.0, pid=205)
    assert job.handle(Expel(worker_id=5, pid=pid, reason="frozen"), 1.0) == []
    assert job.handle(Expel(worker_id=5, pid=205, reason="frozen"), 1.0)[-1] == Kill(worker_ids=(5,))


# A coordinator that is away.


def test_a_loss_without_a_coordinator_ends_nothing() -> None:
    job = supervise()
    job.handle(CoordinatorLost(), 0.0)
    told, say = job.handle(gone(5, 3), 1.0)
    assert told == report(5, 3), "waits in the link until the coordinator is back"
    assert isinstance(say, Say)
    assert say.text.startswith("worker 5 lost: why; the others go on")
    assert (job.phase, job.deadline_s) == (Phase.RUNNING, None)
    assert said(job.handle(CoordinatorBack(), 50.0)) == ["the coordinator is back"]
    assert job.deadline_s is None
    restarting, _ = job.handle(replaceable(5), 51.0)
    assert isinstance(restarting, Restarting)


def test_a_coordinator_that_is_lost_before_its_word_ends_nothing() -> None:
    job = supervise()
    job.handle(gone(5, 3), 1.0)
    [text] = said(job.handle(CoordinatorLost(), 2.0))
    assert text.startswith("worker 5 lost: why; the others go on")
    assert (job.phase, job.deadline_s) == (Phase.RUNNING, None)


def test_replacements_are_not_started_while_nobody_would_let_them_in() -> None:
    job = supervise()
    job.handle(gone(5, 3), 0.0)
    job.handle(replaceable(5), 0.0)
    job.handle(CoordinatorLost(), 0.1)
    assert job.handle(TimePassed(), 1.0) == []
    assert job.deadline_s is None
    job.handle(CoordinatorBack(), 9.0)
    assert job.deadline_s is not None and job.deadline_s <= 9.0
    assert job.handle(TimePassed(), 9.0) == [Start(worker_id=5, restart=1)]


def test_without_a_coordinator_and_workers_a_replacement_that_waits_does_not_matter() -> None:
    job = supervise(1)
    job.handle(gone(4, 3), 0.0)
    job.handle(replaceable(4), 0.0)
    job.handle(CoordinatorLost(), 0.1)
    assert job.outcome is not None and job.outcome.code == 3, "none here came to a good end"


def test_without_a_coordinator_those_that_ended_well_count() -> None:
    job = supervise(2, max_restarts=0)
    job.handle(gone(4, 3), 0.0)
    job.handle(replaceable(4), 0.0)
    job.handle(CoordinatorLost(), 0.1)
    job.handle(gone(5), 1.0)
    assert job.outcome == Outcome(code=0, losses=(Loss(worker_id=4, reason="why"),))


def test_ctrl_c_after_a_loss_that_nobody_judged_is_ctrl_c() -> None:
    job = supervise(2)
    job.handle(CoordinatorLost(), 0.0)
    job.handle(gone(4, 3), 0.0)
    job.handle(INT, 1.0)
    job.handle(gone(5, 130), 1.0)
    assert job.outcome == Outcome(code=130, signal=signal.SIGINT)


# Stopping at a checkpoint.

SAVED = Saved(step=300, directory="ckpt")
SUSPENDED = 75


def suspended(number: int | None = None, saved: Saved | None = SAVED) -> Outcome:
    return Outcome(code=SUSPENDED, signal=number, suspended=True, saved=saved)


@pytest.mark.parametrize("stop", [INT, TERM])
def test_asked_to_stop_the_workers_may_do_so_at_a_checkpoint(stop: StopAsked) -> None:
    job = supervise(2)
    _, terminate = job.handle(stop, 0.0)
    assert terminate == Terminate(worker_ids=(4, 5))
    assert job.handle(CheckpointSaved(saved=SAVED), 1.0) == []
    [reported] = job.handle(gone(4, SUSPENDED), 2.0)
    assert isinstance(reported, Report) and reported.stopping
    job.handle(gone(5, SUSPENDED), 2.0)
    assert (job.outcome, job.phase, job.deadline_s) == (None, Phase.WAITING, 2.0 + VERDICT_S)
    job.handle(JobDone(suspended=True), 2.1)
    assert job.outcome == suspended(stop.number)


def test_workers_may_stop_at_a_checkpoint_because_another_launcher_was_asked() -> None:
    job = supervise(2)
    assert job.handle(gone(4, SUSPENDED), 0.0) == [report(4, SUSPENDED)]
    assert job.handle(TimePassed(), VERDICT_S + 1.0) == [], "it is no failure on which a word is awaited"
    job.handle(gone(5, SUSPENDED), 20.0)
    [text] = said(job.handle(TimePassed(), 20.0 + PATIENCE_S))
    assert "other machines" in text
    job.handle(JobDone(suspended=True), 1000.0)
    assert job.outcome == suspended(saved=None)


def test_that_the_job_stopped_may_be_known_before_the_last_worker_here_has_ended() -> None:
    job = supervise(1)
    job.handle(JobDone(suspended=True), 0.0)
    assert (job.outcome, job.phase) == (None, Phase.DRAINING)
    job.handle(gone(4, SUSPENDED), 0.1)
    assert job.outcome == suspended(saved=None)


@pytest.mark.parametrize("when", ["before", "meanwhile", "after", "never"])
def test_without_a_coordinator_the_workers_themselves_say_that_they_stopped(when: str) -> None:
    job = supervise(2)
    job.handle(CheckpointSaved(saved=SAVED), 0.0)
    if when == "before":
        job.handle(CoordinatorLost(), 0.0)
    job.handle(TERM, 0.0)
    job.handle(gone(4, SUSPENDED), 1.0)
    if when == "meanwhile":
        job.handle(CoordinatorLost(), 1.5)
    job.handle(gone(5, SUSPENDED), 2.0)
    if when == "after":
        job.handle(CoordinatorLost(), 2.5)
    if when == "never":
        assert job.handle(TimePassed(), 1.9 + VERDICT_S) == []
        assert job.outcome is None
        assert job.handle(TimePassed(), 2.0 + VERDICT_S) == []
    assert job.outcome == suspended(signal.SIGTERM)


def test_without_a_coordinator_and_unasked_they_say_so_too() -> None:
    job = supervise(1)
    job.handle(CoordinatorLost(), 0.0)
    job.handle(gone(4, SUSPENDED), 1.0)
    assert job.outcome == suspended(saved=None)


@pytest.mark.parametrize("last", [143, 137, 1])
def test_without_the_coordinator_s_word_one_that_failed_means_that_the_job_did_not_stop_there(
    last: int,
) -> None:
    job = supervise(2)
    job.handle(TERM, 0.0)
    job.handle(gone(4, SUSPENDED), 1.0)
    job.handle(gone(5, last), 2.0)
    assert job.outcome is None, "the ring may have gone on without it"
    job.handle(TimePassed(), 2.0 + VERDICT_S)
    assert job.outcome == Outcome(code=143, signal=signal.SIGTERM)


def test_the_coordinator_s_word_counts_whatever_became_of_one_that_the_ring_did_without() -> None:
    job = supervise(2)
    job.handle(TERM, 0.0)
    job.handle(gone(4, SUSPENDED), 1.0)
    job.handle(gone(5, 137), 2.0)
    job.handle(JobDone(suspended=True), 2.1)
    assert job.outcome == suspended(signal.SIGTERM, saved=None)


def test_a_job_that_failed_did_not_stop_at_a_checkpoint() -> None:
    job = supervise(2)
    job.handle(TERM, 0.0)
    job.handle(gone(4, SUSPENDED), 1.0)
    job.handle(JobFailed(failure=REMOTE), 1.5)
    job.handle(gone(5, SUSPENDED), 2.0)
    assert job.outcome == Outcome(code=143, signal=signal.SIGTERM)


def test_a_job_that_was_done_when_it_was_asked_to_stop_is_as_ever() -> None:
    job = supervise(1)
    job.handle(TERM, 0.0)
    job.handle(gone(4, 0), 1.0)
    assert job.outcome == Outcome(code=143, signal=signal.SIGTERM)


def test_asked_again_while_it_waits_for_the_coordinator_s_word_it_ends() -> None:
    job = supervise(1)
    job.handle(INT, 0.0)
    job.handle(gone(4, SUSPENDED), 1.0)
    job.handle(INT, 1.5)
    assert job.outcome == suspended(signal.SIGINT, saved=None)


def test_a_worker_that_exits_so_and_is_lost_to_the_ring_is_replaced() -> None:
    job = supervise(2)
    job.handle(gone(5, SUSPENDED), 0.0)
    job.handle(LossNoted(worker_id=5), 1.0)
    restarting, say = job.handle(replaceable(5), 1.0)
    assert isinstance(restarting, Restarting) and isinstance(say, Say)
    assert say.text.startswith("worker 5 lost: the coordinator's words")


def test_a_worker_that_exits_so_and_has_failed_ends_the_job_with_its_code() -> None:
    job = supervise(1)
    failure = Failure(worker_id=4, rank=14, host="node-b", code=SUSPENDED, reason="why")
    job.handle(gone(4, SUSPENDED), 0.0)
    job.handle(JobFailed(failure=failure), 1.0)
    assert job.outcome == Outcome(code=SUSPENDED, failure=failure)


def test_the_newest_checkpoint_is_named() -> None:
    job = supervise(1)
    for step in (100, 200, 300):
        job.handle(CheckpointSaved(saved=Saved(step=step, directory="ckpt")), 0.0)
    job.handle(gone(4, SUSPENDED), 1.0)
    job.handle(JobDone(suspended=True), 1.0)
    assert job.outcome == suspended()


@pytest.mark.parametrize(
    ("event", "meaning"),
    [
        (
            {"event": "checkpoint_saved", "step": 300, "directory": "ckpt", "worker_id": 0},
            CheckpointSaved(saved=SAVED),
        ),
        ({"event": "checkpoint_saved", "step": "300", "directory": "ckpt"}, None),
        ({"event": "checkpoint_saved", "step": 300}, None),
        ({"event": "restored", "step": 300, "directory": "ckpt"}, None),
    ],
)
def test_what_the_coordinator_s_events_say_of_checkpoints(
    event: dict[str, object], meaning: CheckpointSaved | None
) -> None:
    assert from_job_event(event) == meaning


# Starting the whole ring again.


@pytest.mark.parametrize("alone", [True, False])
def test_before_the_ring_is_started_again_the_others_drain_and_are_killed(alone: bool) -> None:
    job = supervise(3, alone=alone)
    job.handle(gone(5, 3), 0.0)
    assert job.handle(JobFailed(failure=LOCAL, restarts=True), 0.0) == []
    job.handle(gone(4, 1), 1.0)
    say, kill = job.handle(TimePassed(), DRAIN_S)
    assert say == Say(text="killing rank 16: the whole ring is started again")
    assert kill == Kill(worker_ids=(6,))
    job.handle(gone(6, 137), DRAIN_S + 0.1)
    assert job.outcome == Outcome(code=3, failure=LOCAL, restarts=True)


def test_alone_without_restarts_left_the_others_are_stopped_as_ever() -> None:
    job = supervise(2, max_restarts=1)
    lose_and_replace(job, 5, 0.0, 205)
    job.handle(gone(5, 3), 1.0)
    job.handle(JobFailed(failure=LOCAL, restarts=True), 1.0)
    assert job.handle(TimePassed(), 1.0 + DRAIN_S) == [Terminate(worker_ids=(4,))]
    job.handle(gone(4, 143), 5.0)
    assert job.outcome == Outcome(code=3, failure=LOCAL, restarts=True), "the budget has the last word"


def test_of_several_machines_the_coordinator_has_the_budget() -> None:
    job = supervise(2, max_restarts=0, alone=False)
    job.handle(JobFailed(failure=REMOTE, restarts=True), 0.0)
    _, kill = job.handle(TimePassed(), DRAIN_S)
    assert kill == Kill(worker_ids=(4, 5))


def test_a_replacement_that_was_to_come_does_not_count_when_the_ring_is_started_again() -> None:
    job = supervise(2, max_restarts=1)
    job.handle(gone(5, 3), 0.0)
    job.handle(replaceable(5), 0.0)
    job.handle(JobFailed(failure=LOCAL, restarts=True), 0.1)
    assert isinstance(job.handle(TimePassed(), 0.1 + DRAIN_S)[1], Kill)


@pytest.mark.parametrize("when", ["before the failure", "while it drains", "while they are killed"])
def test_asked_to_stop_the_ring_is_not_started_again(when: str) -> None:
    job = supervise(2)
    if when == "before the failure":
        job.handle(TERM, 0.0)
    job.handle(JobFailed(failure=REMOTE, restarts=True), 0.0)
    if when == "while it drains":
        assert job.handle(TERM, 0.1)[1] == Terminate(worker_ids=(4, 5))
    else:
        job.handle(TimePassed(), DRAIN_S)
    if when == "while they are killed":
        assert job.handle(TERM, DRAIN_S) == []
    job.handle(gone(4, 137), 3.0)
    job.handle(gone(5, 137), 3.0)
    outcome = job.outcome
    assert outcome is not None and not outcome.restarts
    assert outcome.code == (143 if when == "before the failure" else 137)
