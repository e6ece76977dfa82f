"""The coordinator's decisions, without a socket or a clock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringps.membership.causes import RootCause
from ringps.membership.detector import SilenceDetector
from ringps.membership.events import (
    Tick,
)
from ringps.membership.inquiry import MAX_OPEN, Inquiries
from ringps.membership.plan import JobPlan
from ringps.wire.control import (
    AllLeft,
    Ask,
    Assignment,
    Beat,
    Bound,
    CallReport,
    Dispute,
    Failing,
    Form,
    Inquire,
    JobDone,
    JobFailed,
    LauncherHello,
    LauncherLeaving,
    Leaving,
    Left,
    Lost,
    Message,
    Noted,
    Prepare,
    Refused,
    Verdict,
    Waiting,
    Welcome,
    WorkerExited,
)
from tests.quorum_job import TICK_S, Job, formed, hello_of, session_of


class TestForming:
    def test_takes_two_phases(self) -> None:
        job = Job(2)
        job.hello(1)
        assert job.heard("w1", Welcome) == [Welcome(heartbeat_port=4242, elastic=False, running=0)]
        assert not job.told(Prepare)
        job.hello(0)
        assert sorted(job.told(Prepare)) == ["w0", "w1"]
        job.bind(0)
        assert not job.told(Form)
        job.bind(1)
        form = Form(generation=1, addresses=("tcp://10.0.0.0:1", "tcp://10.0.0.1:1"))
        assert job.heard("w0", Form) == job.heard("w1", Form) == [form]
        assert [event["event"] for event in job.events] == ["generation"]
        assert job.events[0]["generation"] == 1
        assert job.events[0]["members"][1] == {"rank": 1, "worker_id": 1, "host": "node-a", "pid": 1001}
        assert job.events[0]["reason"] == "all 2 workers have come"

    def test_orders_by_arrival_of_the_host_then_by_worker(self) -> None:
        job = Job(4)
        for worker_id, host in ((3, "b"), (0, "a"), (1, "b"), (2, "a")):
            job.hello(worker_id, host=host)
        (prepare,) = job.heard("w0", Prepare)
        assert [seat.worker_id for seat in prepare.members] == [1, 3, 0, 2]

    def test_launchers_order_their_hosts(self) -> None:
        job = Job(2)
        job.launch(0, 1, host="a")
        job.launch(1, 1, host="b")
        job.hello(1, host="b")
        job.hello(0, host="a")
        (prepare,) = job.heard("w0", Prepare)
        assert [seat.worker_id for seat in prepare.members] == [0, 1]

    @pytest.mark.parametrize("encrypt", [False, True])
    def test_encrypts_if_a_launcher_asks(self, encrypt: bool) -> None:
        job = Job(2)
        job.launch(0, 1)
        job.launch(1, 1, encrypt=encrypt)
        job.hello(0)
        job.hello(1)
        assert job.heard("w0", Prepare)[0].encrypt is encrypt

    def test_a_late_comer_is_refused(self) -> None:
        job = formed()
        job.hello(7, peer="x")
        job.hello(1, peer="y")
        text = "the ring is complete; joining later is not possible in this version"
        assert job.heard("x", Refused) == job.heard("y", Refused) == [Refused(reason=text)]
        assert job.refused == [text, text]
        assert job.quorum.members == 3

    def test_a_worker_id_cannot_be_taken_twice(self) -> None:
        job = Job(3)
        job.hello(1, host="node-b")
        job.hello(1, peer="x")
        assert job.refused == ["worker id taken"]
        assert "taken by process 1001 on node-b" in job.heard("x", Refused)[0].reason
        assert not job.heard("w1", Refused)

    def test_an_unknown_worker_id_is_refused(self) -> None:
        job = Job(3)
        job.hello(3)
        assert job.refused == ["worker id out of range"]
        assert "worker id 3 is not one of 0..2" in job.heard("w3", Refused)[0].reason

    def test_a_worker_is_refused_while_the_size_is_unknown(self) -> None:
        job = Job(None)
        job.hello(0)
        assert job.refused == ["job size not known yet"]

    def test_a_repeated_hello_does_no_harm(self) -> None:
        job = Job(2)
        job.hello(0)
        job.hello(0)
        assert job.refused == ["hello said before"]
        assert not job.told(Refused)

    def test_whoever_asks_is_told_who_is_missing(self) -> None:
        job = Job(4)
        job.hello(1)
        job.say("w1", Ask())
        assert job.heard("w1", Waiting)[0].reason == "3 of 4 workers have not come: worker 0, 2, 3"
        for worker_id in (0, 2, 3):
            job.hello(worker_id)
        job.bind(1)
        job.say("w1", Ask())
        assert job.heard("w1", Waiting)[1].reason.endswith("do not listen for data yet: worker 0, 2, 3")

    def test_frames_of_another_generation_are_refused(self) -> None:
        job = Job(2)
        job.hello(0)
        job.hello(1)
        job.say("w0", Bound(generation=0, address="tcp://a"))
        job.say("w0", Bound(generation=2, address="tcp://a"))
        assert job.refused == ["frame of another generation"] * 2
        job.bind(0)
        job.bind(1)
        for message in (Dispute(generation=0, sequence=1), Leaving(generation=2, completed=0)):
            job.say("w0", message)
        assert job.refused == ["frame of another generation"] * 4

    def test_messages_out_of_turn_are_refused(self) -> None:
        job = Job(2)
        job.hello(0)
        for message in (
            Bound(generation=0, address="tcp://a"),
            Dispute(generation=0, sequence=0),
            CallReport(generation=0, sequence=0, call=""),
            Leaving(generation=0, completed=0),
            WorkerExited(worker_id=0, pid=1000, code=0, reason=""),
        ):
            job.say("w0", message)
        assert job.refused == ["message out of turn"] * 5

    def test_strangers_are_refused_and_not_remembered(self) -> None:
        job = formed()
        for number in range(100):
            for message in (
                Bound(generation=1, address="tcp://a"),
                Leaving(generation=1, completed=0),
                Dispute(generation=1, sequence=0),
                Failing(reason="", blames=None),
                WorkerExited(worker_id=0, pid=1000, code=1, reason=""),
                LauncherLeaving(),
                Ask(),
            ):
                job.say(f"x{number}", message)
            job.beat(0, peer=f"x{number}")
        assert job.refused == ["peer is no part of this job"] * 800
        assert not job.sent


class TestComingBack:
    """A process whose connection broke says hello from another peer id."""

    def test_a_worker_is_told_again_what_concerns_it(self) -> None:
        job = formed()
        job.say("w2", Leaving(generation=1, completed=5))
        job.sent.clear()
        hello = hello_of(1, "w1")
        job.say("new", hello)
        assert [type(message) for _, message in job.sent] == [Welcome, Prepare, Form, Left]
        assert {to for to, _ in job.sent} == {"new"}
        assert not job.refused
        job.say("w1", Leaving(generation=1, completed=5))  # what was under way on the old connection
        assert job.refused == ["peer is no part of this job"]
        job.say("new", Leaving(generation=1, completed=5))
        assert job.quorum.members == 1

    def test_a_worker_that_missed_a_loss_hears_of_it(self) -> None:
        job = formed(launcher=True)
        job.exit(2, 137)
        job.sent.clear()
        job.say("new", hello_of(1, "w1"))
        assert job.heard("new", Lost)[0].worker_id == 2

    def test_a_worker_that_missed_the_end_hears_of_it(self) -> None:
        job = formed(1)
        job.say("w0", Leaving(generation=1, completed=5))
        job.sent.clear()
        job.say("new", hello_of(0, "w0", pid=1001))
        assert job.told(AllLeft) == ["new"]

    def test_a_launcher_is_told_again_what_concerns_it(self) -> None:
        job = formed(launcher=True)
        job.exit(1, 137)
        job.sent.clear()
        job.launch(0, 3, host="node-a", peer="new")
        assert [type(message) for _, message in job.sent] == [Waiting, Assignment, JobFailed]
        assert {to for to, _ in job.sent} == {"new"}
        assert not job.refused
        job.exit(0, 0)
        assert job.refused == ["peer is no part of this job"]

    def test_a_session_belongs_to_one_worker(self) -> None:
        job = Job(3)
        job.hello(0)
        job.say("x", hello_of(1, "w0"))
        assert job.refused == ["session taken"]


class TestLosing:
    def test_an_exit_is_announced_to_all_others_at_once(self) -> None:
        job = formed(launcher=True)
        job.exit(1, 137)
        lost = Lost(generation=1, rank=1, worker_id=1, host="node-a", reason="process killed by signal 9")
        assert job.heard("w0", Lost) == job.heard("w2", Lost) == [lost]
        assert not job.heard("w1", Lost)
        assert job.events[-1]["event"] == "worker_lost"
        assert job.events[-1]["reason"] == "process killed by signal 9"

    def test_an_exit_with_code_0_is_a_loss_too(self) -> None:
        job = formed(launcher=True)
        job.exit(1, 0)
        reason = "process exited with code 0 before it called ringps.shutdown()"
        assert job.heard("w0", Lost)[0].reason == reason
        assert job.heard("l0", JobFailed) == [
            JobFailed(worker_id=1, rank=1, host="node-a", code=1, reason=reason)
        ]

    def test_silence_is_a_loss(self) -> None:
        job = formed()
        job.sleep(1.0)
        job.beating.remove(2)
        job.sleep(2.9)
        assert not job.told(Lost)
        job.sleep(0.4)
        assert job.heard("w0", Lost)[0].reason == (
            "no heartbeat for 3.0 s (process frozen or machine unreachable)"
        )
        assert job.told(Lost) == ["w0", "w1", "w2"]  # also whoever may wake up again
        assert job.finished == ["a worker failed"]

    def test_silence_from_the_start_points_at_the_port(self) -> None:
        job = formed()
        job.beating.remove(2)
        job.sleep(3.5)
        assert "firewall" in job.heard("w0", Lost)[0].reason

    def test_the_longest_silent_is_the_one(self) -> None:
        job = formed(4)
        job.sleep(0.5)
        job.beating -= {2}
        job.sleep(0.2)
        job.beating -= {1, 3}
        job.sleep(4.0)
        assert [lost.worker_id for lost in job.heard("w0", Lost)] == [2]

    def test_silence_while_we_were_stopped_ourselves_does_not_count(self) -> None:
        job = formed()
        job.sleep(1.0)
        job.now_s += 60.0
        job.sleep(1.5)
        assert not job.told(Lost)

    def test_those_who_wait_for_the_ring_are_told(self) -> None:
        job = Job(3)
        job.launch(0, 3)
        job.hello(0)
        job.hello(1)
        job.exit(1, 1)
        assert job.told(Lost) == ["w0"]
        assert job.heard("w0", Lost)[0].generation == 0
        job.hello(2)  # too late, and told so at once
        assert job.told(Lost) == ["w0", "w2"]
        assert not job.told(Prepare)

    def test_a_loss_between_the_phases_prevents_the_ring(self) -> None:
        job = Job(2)
        job.launch(0, 2)
        job.hello(0)
        job.hello(1)
        job.bind(0)
        job.exit(1, 1)
        job.bind(1)
        assert job.told(Lost) == ["w0"]
        assert not job.told(Form)

    def test_a_script_that_ends_without_joining_is_missed_by_those_who_wait(self) -> None:
        job = Job(2)
        job.launch(0, 2)
        job.exit(1, 0)
        assert not job.told(JobFailed)
        job.hello(0)
        assert "without joining the ring" in job.heard("w0", Lost)[0].reason
        assert job.heard("l0", JobFailed)[0].worker_id == 1

    def test_only_the_first_loss_is_announced(self) -> None:
        job = formed(launcher=True)
        job.exit(1, 137)
        job.exit(2, 1)
        assert [lost.worker_id for lost in job.heard("w0", Lost)] == [1]
        assert [event["event"] for event in job.events] == ["generation", "worker_lost"]

    def test_a_worker_that_says_it_fails_is_lost_before_it_exits(self) -> None:
        job = formed(launcher=True)
        job.say("w1", Failing(reason="ValueError: bad label", blames=None))
        assert job.heard("w0", Lost)[0].reason == "ValueError: bad label"
        assert not job.told(JobFailed)
        job.exit(1, 1)
        reason = "process exited with code 1: ValueError: bad label"
        assert job.heard("l0", JobFailed)[0] == JobFailed(
            worker_id=1, rank=1, host="node-a", code=1, reason=reason
        )

    def test_an_exit_after_leaving_is_no_loss(self) -> None:
        job = formed(launcher=True)
        job.say("w1", Leaving(generation=1, completed=5))
        job.exit(1, 0)
        assert not job.told(Lost)
        assert not job.told(JobFailed)

    def test_silence_after_leaving_is_no_loss(self) -> None:
        job = formed()
        job.sleep(0.5)
        job.say("w1", Leaving(generation=1, completed=5))
        job.beating.remove(1)
        job.sleep(5.0)
        assert not job.told(Lost)
        assert not job.refused


class TestHeartbeats:
    def test_a_replayed_beat_keeps_nobody_alive(self) -> None:
        job = formed()
        job.sleep(0.5)
        job.beating.remove(1)
        replayed = Beat(worker_id=1, session=session_of("w1"), generation=1, step=0, count=job.counts[1])
        for _ in range(40):
            job.beat_again(replayed)
            job.sleep(0.1)
        assert job.refused == ["heartbeat replayed"] * 31 + ["heartbeat of a worker that is gone"] * 9
        assert job.heard("w0", Lost)[0].worker_id == 1

    def test_a_beat_in_another_name_is_refused(self) -> None:
        job = formed()
        job.beat(1, peer="w0")
        assert job.refused == ["heartbeat for another worker"]

    def test_a_beat_of_another_generation_is_refused(self) -> None:
        job = formed()
        job.beat(1, generation=0)  # sent before it heard that the ring formed
        job.beat(1, generation=1)
        assert not job.refused
        job.beat(1, generation=0)
        job.beat(1, generation=2)
        assert job.refused == ["frame of another generation"] * 2

    def test_steps_are_reported_at_most_once_a_second(self) -> None:
        job = formed()
        for step in range(1, 41):
            job.now_s += TICK_S
            for worker_id in range(3):
                job.beat(worker_id, step=step, generation=1)
            job.take(job.quorum.handle(Tick(), job.now_s))
        steps = [event for event in job.events if event["event"] == "step_committed"]
        assert [event["step"] for event in steps] == pytest.approx([1, 11, 21, 31], abs=3)
        assert all(event["generation"] == 1 for event in steps)

    def test_the_last_step_is_always_reported(self) -> None:
        job = formed()
        job.beat(0, step=1, generation=1)
        job.sleep(0.1)
        job.beat(0, step=2, generation=1)
        for worker_id in range(3):
            job.say(f"w{worker_id}", Leaving(generation=1, completed=2))
        assert [event.get("step") for event in job.events if "step" in event] == [1, 2]


class TestLeaving:
    def test_the_others_hear_of_it_and_all_in_the_end(self) -> None:
        job = formed()
        job.say("w1", Leaving(generation=1, completed=5))
        left = Left(generation=1, rank=1, completed=5)
        assert job.heard("w0", Left) == job.heard("w2", Left) == [left]
        assert not job.heard("w1", Left)
        job.say("w0", Leaving(generation=1, completed=5))
        assert not job.told(AllLeft)
        job.say("w2", Leaving(generation=1, completed=5))
        assert job.told(AllLeft) == ["w0", "w1", "w2"]
        assert job.finished == ["all workers have left"]
        assert job.quorum.members == 0

    def test_twice_is_refused(self) -> None:
        job = formed()
        job.say("w1", Leaving(generation=1, completed=5))
        job.say("w1", Leaving(generation=1, completed=5))
        assert job.refused == ["message out of turn"]

    def test_a_job_is_done_when_all_have_exited(self) -> None:
        job = formed(2, launcher=True)
        for worker_id in range(2):
            job.say(f"w{worker_id}", Leaving(generation=1, completed=5))
        job.exit(0, 0)
        assert not job.told(JobDone)
        job.exit(1, 0)
        assert job.told(JobDone) == ["l0"]
        assert job.finished == ["all workers have exited"]


class TestDisputes:
    def report(self, job: Job, worker_id: int, call: str) -> None:
        job.say(f"w{worker_id}", CallReport(generation=1, sequence=7, call=call))

    def test_everybody_is_asked_and_everybody_is_told(self) -> None:
        job = formed()
        job.say("w1", Dispute(generation=1, sequence=7))
        inquire = Inquire(generation=1, sequence=7)
        assert [job.heard(f"w{worker_id}", Inquire) for worker_id in range(3)] == [[inquire]] * 3
        for worker_id in (2, 0):
            self.report(job, worker_id, f"call {worker_id}")
        assert not job.told(Verdict)
        self.report(job, 1, "call 1")
        verdict = Verdict(generation=1, sequence=7, calls=("call 0", "call 1", "call 2"))
        assert [job.heard(f"w{worker_id}", Verdict) for worker_id in range(3)] == [[verdict]] * 3

    def test_the_silent_do_not_hold_it_up(self) -> None:
        job = formed()
        job.say("w1", Dispute(generation=1, sequence=7))
        self.report(job, 1, "call 1")
        job.sleep(1.8)
        assert not job.told(Verdict)
        job.sleep(0.3)
        assert job.heard("w0", Verdict)[0].calls == ("no answer", "call 1", "no answer")
        self.report(job, 0, "late")
        assert job.refused == ["answer to no open inquiry"]

    def test_those_who_left_are_not_asked(self) -> None:
        job = formed()
        job.say("w2", Leaving(generation=1, completed=6))
        job.say("w1", Dispute(generation=1, sequence=7))
        assert job.told(Inquire) == ["w0", "w1"]
        self.report(job, 0, "call 0")
        self.report(job, 1, "call 1")
        calls = ("call 0", "call 1", "called shutdown() after 6 collectives")
        assert job.heard("w0", Verdict)[0].calls == calls

    def test_a_loss_answers_for_the_lost(self) -> None:
        job = formed(launcher=True)
        job.say("w1", Dispute(generation=1, sequence=7))
        self.report(job, 0, "call 0")
        self.report(job, 1, "call 1")
        job.exit(2, 137)
        assert job.heard("w0", Verdict)[0].calls[2] == "lost: process killed by signal 9"

    def test_a_second_dispute_about_the_same_is_not_asked_again(self) -> None:
        job = formed()
        job.say("w1", Dispute(generation=1, sequence=7))
        job.say("w2", Dispute(generation=1, sequence=7))
        for worker_id in range(3):
            self.report(job, worker_id, "call")
        job.say("w0", Dispute(generation=1, sequence=7))
        assert len(job.told(Inquire)) == len(job.told(Verdict)) == 3
        assert job.refused == ["dispute already being looked into", "dispute already settled"]

    def test_only_so_many_are_open_at_once(self) -> None:
        inquiries = Inquiries(2.0)
        answers = [inquiries.open(sequence, [None], 0.0)[0] for sequence in range(MAX_OPEN + 2)]
        assert answers == [True] * MAX_OPEN + [False] * 2
        assert inquiries.open(99, [None], 0.0) == (False, "too many disputes at once")
        assert len(inquiries.settle(2.0)) == MAX_OPEN
        assert inquiries.open(99, [None], 2.0)[0]


class TestRootCause:
    def failure(self, job: Job) -> JobFailed | None:
        failures = job.heard("l0", JobFailed)
        assert len(failures) <= 1
        return failures[0] if failures else None

    def test_exits_after_a_loss_follow_from_it(self) -> None:
        job = formed(launcher=True)
        job.exit(1, 137)
        job.exit(0, 1)
        job.exit(2, 1)
        failure = self.failure(job)
        assert failure is not None and (failure.worker_id, failure.code) == (1, 137)
        assert job.finished == ["a worker failed"]

    def test_a_worker_that_blames_another_waits_for_its_end(self) -> None:
        job = formed(launcher=True)
        job.say("w0", Failing(reason="PeerLostError: rank 1 lost", blames=1))
        job.exit(0, 1)
        assert self.failure(job) is None
        job.exit(1, 139)
        failure = self.failure(job)
        assert failure is not None and (failure.worker_id, failure.code) == (1, 139)

    def test_if_the_blamed_one_lives_on_the_blamer_is_the_cause(self) -> None:
        job = formed(launcher=True)
        job.say("w0", Failing(reason="PeerLostError: rank 1 lost", blames=1))
        job.exit(0, 1)
        job.beating.remove(0)
        job.sleep(3.2)
        failure = self.failure(job)
        assert failure is not None
        assert (failure.worker_id, failure.code) == (0, 1)
        assert failure.reason == "process exited with code 1: PeerLostError: rank 1 lost"

    def test_blaming_one_that_left_in_order_is_no_excuse(self) -> None:
        job = formed(launcher=True)
        job.say("w1", Leaving(generation=1, completed=3))
        job.say("w0", Failing(reason="PeerLeftError: rank 1 left", blames=1))
        job.exit(0, 1)
        failure = self.failure(job)
        assert failure is not None and failure.worker_id == 0

    def test_a_plain_script_fails_without_ever_joining(self) -> None:
        job = Job(2)
        job.launch(0, 2)
        job.exit(1, 3)
        failure = self.failure(job)
        assert failure is not None and (failure.worker_id, failure.code) == (1, 3)
        assert not job.finished
        job.exit(0, 143)
        assert job.finished == ["a worker failed"]

    def test_plain_scripts_end_well(self) -> None:
        job = Job(2)
        job.launch(0, 2)
        job.exit(1, 0)
        job.exit(0, 0)
        assert job.told(JobDone) == ["l0"]

    def test_every_launcher_is_told_once(self) -> None:
        job = Job(2)
        job.launch(0, 1)
        job.launch(1, 1)
        job.exit(1, 3, launcher=1)
        job.exit(0, 4)
        assert job.told(JobFailed) == ["l0", "l1"]

    def test_a_machine_that_vanished_does_not_keep_the_job_alive(self) -> None:
        job = Job(2)
        job.launch(0, 1)
        job.launch(1, 1)
        job.hello(0)
        job.exit(0, 1)
        job.sleep(4.8)
        assert not job.finished
        job.sleep(0.4)
        assert job.finished == ["a worker failed"]

    def test_a_failure_after_leaving_counts(self) -> None:
        job = formed(launcher=True)
        job.say("w1", Leaving(generation=1, completed=3))
        job.exit(1, 9)
        failure = self.failure(job)
        assert failure is not None and (failure.worker_id, failure.code) == (1, 9)
        assert not job.told(Lost)

    def test_a_chain_of_blame_is_followed(self) -> None:
        causes = RootCause(3.0)
        causes.note(0, "0", 0.0, code=1, blames=1)
        causes.note(1, "1", 0.1, code=1, blames=2)
        assert causes.decide(0.2) is None
        causes.note(2, "2", 0.2, code=9)
        root = causes.decide(0.3)
        assert root is not None and root.worker_id == 2
        assert causes.decide(9.0) is None

    def test_in_a_circle_of_blame_the_first_is_the_cause(self) -> None:
        causes = RootCause(3.0)
        causes.note(3, "3", 0.0, code=1, blames=1)
        causes.note(2, "2", 0.1, code=1, blames=1)
        causes.note(1, "1", 0.2, code=1, blames=2)
        root = causes.decide(0.3)
        assert root is not None and root.worker_id == 2

    def test_a_missing_exit_code_is_waited_for_but_not_for_ever(self) -> None:
        causes = RootCause(3.0)
        causes.note(1, "failing", 0.0, code=None)
        assert causes.decide(2.9) is None
        root = causes.decide(3.1)
        assert root is not None and root.code is None


class TestPlan:
    def test_a_known_size_starts_when_the_slots_are_there(self) -> None:
        job = Job(5)
        job.launch(0, 2)
        assert job.heard("l0", Waiting)[0].reason == (
            "launchers: 2 of 5 worker slots have come (from: node-0)"
        )
        job.sleep(10.0)
        assert not job.told(Assignment)
        job.launch(1, 3)
        assert job.heard("l1", Assignment) == [
            Assignment(
                first_worker_id=2,
                world_size=5,
                host_index=1,
                host_count=2,
                master_address="10.0.0.0",
                master_port=29500,
                hosts=("node-0", "node-1"),
            )
        ]
        assert job.heard("l0", Assignment)[0].first_worker_id == 0

    def test_an_unknown_size_settles(self) -> None:
        job = Job(None, settle_s=1.0)
        job.launch(0, 2)
        job.sleep(0.8)
        job.launch(1, 2)
        job.sleep(0.8)
        assert not job.told(Assignment)
        job.sleep(0.4)
        assert job.told(Assignment) == ["l0", "l1"]
        assert job.heard("l0", Assignment)[0].world_size == 4

    def test_launchers_of_one_host_are_neighbours(self) -> None:
        job = Job(6)
        job.launch(0, 2, host="a")
        job.launch(1, 2, host="b")
        job.launch(2, 2, host="a")
        firsts = [job.heard(f"l{index}", Assignment)[0].first_worker_id for index in range(3)]
        assert firsts == [0, 4, 2]

    def test_too_many_slots_are_refused(self) -> None:
        job = Job(3)
        job.launch(0, 2)
        job.launch(1, 2)
        assert job.refused == ["no room for this launcher"]
        reason = job.heard("l1", Refused)[0].reason
        assert reason == "the job has room for 1 more workers, and this launcher offers 2"

    def test_a_late_launcher_is_refused(self) -> None:
        job = Job(1)
        job.launch(0, 1)
        job.launch(1, 1)
        assert "the job's launchers are complete" in job.heard("l1", Refused)[0].reason

    def test_one_that_goes_away_in_time_makes_room(self) -> None:
        job = Job(2)
        job.launch(0, 1)
        job.say("l0", LauncherLeaving())
        job.launch(1, 2)
        assert job.told(Assignment) == ["l1"]

    def test_a_launcher_may_report_its_own_workers_only_and_once(self) -> None:
        job = Job(2)
        job.launch(0, 1)
        job.launch(1, 1)
        job.exit(1, 1, launcher=0)
        assert job.refused == ["launcher does not own this worker"]
        job.exit(1, 0, launcher=1)
        job.exit(1, 1, launcher=1)
        assert job.refused[1:] == ["exit reported before"]
        assert not job.told(JobFailed)

    def test_the_number_of_launchers_is_bounded(self) -> None:
        plan = JobPlan(None, 1.0)
        answers = []
        for number in range(1100):
            hello = LauncherHello(
                host="a",
                address="a",
                slots=1,
                master_port=1,
                encrypt_data=False,
                first_worker_id=None,
                world_size=None,
                session=session_of(str(number)),
            )
            answers.append(plan.offer(hello, 0.0))
        assert answers.count(None) == 1024


def test_the_detector_forgives_a_gap_of_its_own_only_once() -> None:
    detector = SilenceDetector(3.0)
    detector.watch(1, 0.0)
    assert detector.silent(50.0) == []
    assert detector.silent(50.9) == []
    assert detector.silent(51.8) == []
    assert [worker_id for worker_id, _ in detector.silent(52.2)] == [1]


# Random orders of everything that anybody may say.

PEERS = ("w0", "w1", "w2", "l0", "l1", "x")


def _words() -> Iterable[Message]:
    for worker_id in range(4):
        for session in (session_of(f"w{worker_id}"), session_of("x")):
            yield hello_of(worker_id, "", host=f"node-{worker_id % 2}", pid=1, session=session)
        for code in (0, 1, 75, 137):
            yield WorkerExited(worker_id=worker_id, pid=1, code=code, reason=f"exit {code}")
        yield Failing(reason="blames", blames=worker_id)
    for generation in range(3):
        yield Bound(generation=generation, address="tcp://a")
        yield Dispute(generation=generation, sequence=generation)
        yield CallReport(generation=generation, sequence=1, call="call")
        yield Leaving(generation=generation, completed=generation)
        yield Leaving(generation=generation, completed=generation, suspended=True)
    for slots in (1, 2, 3):
        yield LauncherHello(
            host="a",
            address="a",
            slots=slots,
            master_port=1,
            encrypt_data=False,
            first_worker_id=None,
            world_size=None,
            session=session_of(f"l{slots % 2}"),
        )
    yield Failing(reason="own fault", blames=None)
    yield LauncherLeaving()
    yield Ask()
    yield Noted(event={"event": "checkpoint_saved", "step": 3, "directory": "ckpt"})


WORDS = tuple(_words())
STEPS = st.one_of(
    st.tuples(st.sampled_from(PEERS), st.sampled_from(WORDS)),
    st.builds(
        Beat,
        worker_id=st.integers(0, 3),
        session=st.sampled_from(PEERS).map(session_of),
        generation=st.integers(0, 2),
        step=st.integers(0, 9),
        count=st.integers(0, 30),
    ),
    st.floats(0.01, 2.0),
    # What a ring that forms would say next, so that most runs get somewhere.
    st.sampled_from(["hello", "bind", "launch"]),
)


def _play(job: Job, step: Any) -> None:
    match step:
        case float():
            job.now_s += step
            job.take(job.quorum.handle(Tick(), job.now_s))
        case "hello":
            for worker_id in range(3):
                job.hello(worker_id)
        case "bind":
            for worker_id in range(3):
                job.bind(worker_id)
        case "launch":
            job.launch(0, 2)
            job.launch(1, 1)
        case Beat():
            job.beat_again(step)
        case (peer, message):
            job.say(peer, message)


@settings(max_examples=300)
@given(st.sampled_from([None, 3]), st.lists(STEPS, max_size=60))
def test_whatever_is_said_in_whatever_order(world_size: int | None, steps: list[Any]) -> None:
    job = Job(world_size, settle_s=0.0)
    numbers = [0]
    for step in steps:
        _play(job, step)
        numbers.append(job.quorum.generation)
    assert numbers == sorted(numbers)
    assert set(numbers) <= {0, 1}
    # Whoever says hello again is told again.
    assert all(job.told(JobFailed).count(peer) <= job.told(Waiting).count(peer) for peer in PEERS)
    assert len({message for _, message in job.sent if isinstance(message, JobFailed)}) <= 1
    assert len({message for _, message in job.sent if isinstance(message, Lost)}) <= 1
    assert not (job.told(JobDone) and job.told(JobFailed))
    assert len(job.finished) <= 1
    assert len(list(job.quorum._state.roster.greeted())) <= 3
    assert job.quorum.launchers <= 3
    for peer in PEERS:
        forms = set(job.heard(peer, Form))  # whoever comes back is told again
        assert len(forms) <= 1
        assert all(len(form.addresses) == len(job.heard(peer, Prepare)[0].members) for form in forms)
    if job.told(Form):
        # Nobody was lost before, everybody had bound, and everybody was told.
        assert set(job.told(Form)) == set(job.told(Prepare))
        first_form = next(place for place, (_, said) in enumerate(job.sent) if isinstance(said, Form))
        assert not any(isinstance(said, Lost) for _, said in job.sent[:first_form])
