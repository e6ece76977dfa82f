"""The coordinator's decisions about a ring that goes on: losses, departures, joiners, its own restart."""

from __future__ import annotations

from typing import Any

import pytest

from ringps.membership.coordinator import CoordinatorSettings
from ringps.membership.feuds import MEMORY_S, Feuds, Suspicion
from ringps.membership.plan import JobPlan
from ringps.membership.quorum import JOINER_PATIENCE_S
from ringps.membership.returning import NUMBERS_SKIPPED, Returning
from ringps.membership.roster import MAX_REPLACED, Phase, Roster
from ringps.membership.vacancies import Vacancies
from ringps.wire.control import (
    Admitting,
    AllLeft,
    Ask,
    Assignment,
    Bound,
    CallReport,
    Departing,
    Dispute,
    Expel,
    Expelled,
    Failing,
    Feed,
    Form,
    Inquire,
    JobDone,
    JobFailed,
    Joiners,
    LauncherHello,
    Leaving,
    Left,
    Lost,
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
)
from ringps.wire.rules import Seat
from tests.quorum_job import TIMEOUTS, Job, hello_of, session_of


class ElasticJob(Job):
    """A job whose ring goes on with `min_workers` members; every worker's launcher is `l0`."""

    def __init__(self, world_size: int | None = 3, min_workers: int = 1) -> None:
        super().__init__(world_size, min_workers=min_workers)
        self.pids: dict[int, int] = {}

    def exit(self, worker_id: int, code: int, *, launcher: int = 0) -> None:
        """The launcher reports the end of the first process of a worker."""
        self.beating.discard(worker_id)
        super().exit(worker_id, code, launcher=launcher)

    def bind_all(self, *peers: str) -> None:
        """These answer the newest `Prepare` that they were told."""
        for peer in peers:
            generation = self.heard(peer, Prepare)[-1].generation
            self.say(peer, Bound(generation=generation, address=f"tcp://{peer}"))

    def members(self, peer: str) -> list[int]:
        """The worker ids in the newest `Prepare` that a peer was told."""
        return [seat.worker_id for seat in self.heard(peer, Prepare)[-1].members]

    def reason(self, peer: str) -> str:
        """Why there is the newest generation that a peer was told of."""
        reason: str = self.heard(peer, Prepare)[-1].reason
        return reason

    def event(self, name: str) -> dict[str, Any]:
        """The last event of this name."""
        return [event for event in self.events if event["event"] == name][-1]

    def join(self, worker_id: int, peer: str, **changes: Any) -> None:
        """A new process says hello."""
        self.say(peer, hello_of(worker_id, peer, **{"pid": 2000 + worker_id, **changes}))

    def ends(self, worker_id: int, pid: int, code: int) -> None:
        """The launcher reports the end of a certain process."""
        reason = f"process exited with code {code}"
        self.say("l0", WorkerExited(worker_id=worker_id, pid=pid, code=code, reason=reason))

    def offer(self, *peers: str, step: int = 120, joiners: tuple[int, ...] = (2,)) -> None:
        """These members pause."""
        for peer in peers:
            message = Offer(
                generation=self.quorum.generation, step=step, joiners=joiners, address=f"{peer}:1"
            )
            self.say(peer, message)


def elastic(world_size: int = 3, min_workers: int = 1) -> ElasticJob:
    """A job whose elastic ring has formed, with what was said until then forgotten."""
    job = ElasticJob(world_size, min_workers)
    job.launch(0, world_size, host="node-a")
    peers = [f"w{worker_id}" for worker_id in range(world_size)]
    for worker_id in range(world_size):
        job.hello(worker_id)
    job.bind_all(*peers)
    assert job.told(Form) == peers
    assert not job.refused
    job.sent.clear()
    job.events.clear()
    return job


def vacated(min_workers: int = 1) -> ElasticJob:
    """As `elastic`, of three, with worker 2 lost, the other two formed again, and joiners taken."""
    job = elastic(3, min_workers)
    job.exit(2, 137)
    job.bind_all("w0", "w1")
    job.say("w0", Admitting(generation=2))
    return job


def feeding(*, joiners: int = 1) -> ElasticJob:
    """As `elastic`, of three or four, with those from worker 2 on replaced by `j2`... that are being fed."""
    job = elastic(2 + joiners)
    for worker_id in range(2, 2 + joiners):
        job.exit(worker_id, 137)
    job.bind_all("w0", "w1")
    for worker_id in range(2, 2 + joiners):
        job.join(worker_id, f"j{worker_id}")
        job.say(f"j{worker_id}", Ready())
    job.offer("w0", "w1", joiners=tuple(range(2, 2 + joiners)))
    assert job.told(Feed) == [f"j{worker_id}" for worker_id in range(2, 2 + joiners)]
    return job


class TestSettings:
    def test_the_minimum_is_at_most_the_world_size(self) -> None:
        assert CoordinatorSettings(world_size=4, min_workers=4).min_workers == 4
        with pytest.raises(ValueError, match="from 1 to 4, the world_size, not 5"):
            CoordinatorSettings(world_size=4, min_workers=5)
        with pytest.raises(ValueError, match="min_workers must be from 1 to 4"):
            CoordinatorSettings(world_size=4, min_workers=0)
        with pytest.raises(ValueError, match="from 1 to 1024, not 2000"):
            CoordinatorSettings(min_workers=2000)

    def test_all_workers_as_the_minimum_make_a_fixed_ring(self) -> None:
        job = elastic(3, min_workers=3)
        job.exit(2, 137)
        assert job.told(Lost) == ["w0", "w1"]
        assert not job.told(Prepare)

    def test_workers_are_told_whether_the_ring_goes_on(self) -> None:
        job = ElasticJob(3, 2)
        job.hello(0)
        assert job.heard("w0", Welcome) == [
            Welcome(heartbeat_port=4242, elastic=True, min_workers=2, running=0)
        ]


class TestLosing:
    def test_the_others_form_the_next_generation(self) -> None:
        job = elastic()
        job.exit(1, 137)
        assert job.told(Prepare) == ["w0", "w2"]
        assert not job.told(Lost)
        assert job.members("w0") == [0, 2]
        assert job.reason("w0") == "rank 1 (worker 1 on node-a) lost: process killed by signal 9"
        assert job.event("worker_lost") == {
            "event": "worker_lost",
            "generation": 1,
            "worker_id": 1,
            "rank": 1,
            "host": "node-a",
            "reason": "process killed by signal 9",
        }
        job.bind_all("w0", "w2")
        form = Form(generation=2, addresses=("tcp://w0", "tcp://w2"))
        assert job.heard("w0", Form) == job.heard("w2", Form) == [form]
        generation = job.event("generation")
        assert (generation["generation"], generation["reason"]) == (2, job.reason("w0"))
        assert [member["worker_id"] for member in generation["members"]] == [0, 2]
        assert not job.told(JobFailed)

    def test_every_way_to_be_lost(self) -> None:
        job = elastic(5)
        job.exit(1, 0)
        assert "before it called ringps.shutdown()" in job.reason("w0")
        job.bind_all("w0", "w2", "w3", "w4")
        job.say("w2", Failing(reason="ValueError: bad label", blames=0))
        assert job.reason("w0").endswith("lost: ValueError: bad label")
        job.bind_all("w0", "w3", "w4")
        job.beating -= {1, 2, 3}
        job.sleep(3.5)
        assert "no heartbeat" in job.reason("w0")
        assert job.members("w0") == [0, 4]
        job.exit(2, 1)
        job.exit(3, 137)
        assert job.quorum.generation == 4
        assert not job.told(JobFailed) and not job.refused

    def test_those_lost_together_are_lost_in_one_generation(self) -> None:
        job = elastic(4)
        job.sleep(0.5)
        job.beating -= {1, 2}
        job.sleep(3.3)
        assert job.quorum.generation == 2
        assert "rank 1 (" in job.reason("w0") and "; rank 2 (" in job.reason("w0")

    def test_a_loss_while_forming_begins_the_next_number_at_once(self) -> None:
        job = elastic(4)
        job.exit(1, 137)
        job.bind_all("w0", "w2")
        job.exit(3, 137)
        assert job.quorum.generation == 3
        assert job.members("w0") == [0, 2]
        job.say("w0", Bound(generation=2, address="tcp://late"))
        assert job.refused == ["frame of another generation"]
        job.bind_all("w0", "w2")
        assert job.heard("w0", Form) == [Form(generation=3, addresses=("tcp://w0", "tcp://w2"))]

    def test_the_order_of_hosts_stays(self) -> None:
        job = ElasticJob(4)
        for worker_id, host in ((3, "b"), (0, "a"), (1, "b"), (2, "a")):
            job.hello(worker_id, host=host)
        assert job.members("w0") == [1, 3, 0, 2]
        job.bind_all("w0", "w1", "w2", "w3")
        job.say("w1", Failing(reason="", blames=None))
        assert job.members("w0") == [3, 0, 2]

    def test_too_few_remain(self) -> None:
        job = elastic(3, min_workers=2)
        job.exit(2, 137)
        job.bind_all("w0", "w1")
        job.exit(1, 137)
        reason = "process killed by signal 9; 1 of at least 2 workers (--min-workers) remain"
        assert job.heard("w0", Lost) == [
            Lost(generation=2, rank=1, worker_id=1, host="node-a", reason=reason)
        ]
        assert job.heard("l0", JobFailed) == [
            JobFailed(worker_id=1, rank=1, host="node-a", code=137, reason=reason)
        ]
        assert job.heard("w0", Prepare)[-1].generation == 2
        job.exit(0, 1)
        assert job.finished == ["a worker failed"]

    def test_a_failure_that_is_too_many_waits_for_its_exit_code(self) -> None:
        job = elastic(2, min_workers=1)
        job.exit(0, 137)
        job.say("w1", Failing(reason="ValueError: x", blames=None))
        assert not job.told(JobFailed)
        job.exit(1, 3)
        failed = job.heard("l0", JobFailed)[0]
        assert failed.code == 3
        assert failed.reason == (
            "process exited with code 3: ValueError: x; 0 of at least 1 workers (--min-workers) remain"
        )

    def test_before_the_first_generation_it_ends_the_job(self) -> None:
        job = ElasticJob(3)
        job.launch(0, 3)
        job.hello(0)
        job.hello(1)
        job.exit(1, 1)
        assert job.told(Lost) == ["w0"]
        job = ElasticJob(2)
        job.launch(0, 2)
        job.hello(0)
        job.hello(1)
        job.exit(1, 1)  # told to prepare, but never formed
        assert job.told(Lost) == ["w0"]
        assert job.quorum.generation == 1

    def test_one_that_blames_itself_is_the_cause(self) -> None:
        job = elastic(2)
        job.exit(0, 137)
        job.say("w1", Failing(reason="ValueError: x", blames=1))
        job.exit(1, 3)
        assert job.heard("l0", JobFailed)[0].code == 3

    def test_one_that_has_left_an_earlier_generation_answers_nothing(self) -> None:
        job = elastic(3)
        job.say("w0", Leaving(generation=1, completed=9))
        job.exit(1, 137)
        job.say("w0", CallReport(generation=2, sequence=1, call="barrier()"))
        assert job.refused == ["message out of turn"]

    def test_once_some_are_done_any_number_may_finish(self) -> None:
        job = elastic(3, min_workers=2)
        job.say("w0", Leaving(generation=1, completed=9))
        job.exit(1, 137)
        assert job.told(Prepare) == ["w2"]
        job.bind_all("w2")
        job.say("w2", Leaving(generation=2, completed=1))
        assert sorted(job.told(AllLeft)) == ["w0", "w2"]
        job.exit(0, 0)
        assert not job.told(JobDone)
        job.exit(2, 0)
        assert job.told(JobDone) == ["l0"]

    def test_if_only_those_that_are_done_remain_the_job_is_done(self) -> None:
        job = elastic(2)
        job.say("w0", Leaving(generation=1, completed=9))
        job.exit(1, 137)
        assert job.told(AllLeft) == ["w0"]
        assert job.event("worker_lost")["worker_id"] == 1
        job.exit(0, 0)
        assert job.told(JobDone) == ["l0"]
        assert not job.told(JobFailed)

    def test_a_failure_after_shutdown_counts(self) -> None:
        job = elastic(2)
        job.say("w0", Leaving(generation=1, completed=9))
        job.exit(0, 9)
        assert job.heard("l0", JobFailed)[0].code == 9

    def test_disputes_end_with_their_generation(self) -> None:
        job = elastic(3)
        job.say("w0", Dispute(generation=1, sequence=7))
        assert len(job.told(Inquire)) == 3
        job.exit(2, 137)
        job.sleep(5.0)
        assert not job.told(Verdict)
        job.bind_all("w0", "w1")
        job.say("w0", Dispute(generation=2, sequence=7))
        assert len(job.told(Inquire)) == 5

    def test_a_member_that_is_back_hears_of_the_current_generation_only(self) -> None:
        job = elastic()
        job.exit(2, 137)
        job.sent.clear()
        job.say("new", hello_of(1, "w1", generation=1))
        assert [type(message) for _, message in job.sent] == [Welcome, Prepare]
        job.say("new", Ask())
        job.say("w0", Bound(generation=2, address="tcp://w0"))
        job.say("new", Ask())
        assert [waiting.reason for waiting in job.heard("new", Waiting)] == [
            "generation 2 forms, but some do not listen for data yet: worker 0, 1",
            "generation 2 forms, but some do not listen for data yet: worker 1",
        ]


class TestExpelling:
    def test_the_silent_are_ended_and_told_once_a_second(self) -> None:
        job = elastic()
        job.sleep(0.5)
        job.beating.remove(2)
        job.sleep(3.3)
        expel = job.heard("l0", Expel)
        assert [(entry.worker_id, entry.pid) for entry in expel] == [(2, 1002)]
        assert not job.told(Expelled)
        for _ in range(25):
            job.sleep(0.1)
            job.beat(2, generation=1)
        told = job.heard("w2", Expelled)
        assert len(told) == 3
        assert told[0].generation == 2 and "no heartbeat for 3.0 s" in told[0].reason
        job.say("new", hello_of(2, "w2", generation=1))
        assert len(job.heard("new", Expelled)) == 1
        job.sleep(1.1)
        job.say("new", Leaving(generation=1, completed=0))
        assert job.refused[-1] == "worker was taken for lost"
        assert len(job.heard("new", Expelled)) == 2
        assert job.quorum.generation == 2

    def test_a_launcher_that_is_back_is_told_again_until_the_process_has_ended(self) -> None:
        job = elastic()
        job.beating.remove(2)
        job.sleep(3.6)
        job.launch(0, 3, host="node-a", peer="back")
        assert len(job.heard("back", Expel)) == 1
        job.say("back", WorkerExited(worker_id=2, pid=1002, code=137, reason="killed"))
        job.launch(0, 3, host="node-a", peer="again")
        assert not job.heard("again", Expel)
        assert not job.refused

    def test_whoever_exits_by_itself_is_not_expelled(self) -> None:
        job = elastic()
        job.exit(2, 137)
        job.say("w1", Failing(reason="", blames=None))
        assert not job.told(Expel)
        job.beat(2, generation=1)
        job.beat(1, generation=1)
        assert not job.told(Expelled)


class TestPlaces:
    def test_are_announced_once_members_take_joiners(self) -> None:
        job = elastic()
        job.exit(2, 137)
        job.bind_all("w0", "w1")
        assert not job.told(Replaceable)
        job.say("w0", Admitting(generation=1))  # crossed the new generation
        expected = Replaceable(worker_id=2, reason="process killed by signal 9")
        assert job.heard("l0", Replaceable) == [expected]
        job.say("w1", Admitting(generation=2))
        job.sleep(1.0)
        assert len(job.told(Replaceable)) == 1
        job.exit(1, 1)
        assert [entry.worker_id for entry in job.heard("l0", Replaceable)] == [2, 1]
        assert not job.refused

    def test_are_announced_again_to_a_launcher_that_is_back(self) -> None:
        job = vacated()
        job.launch(0, 3, host="node-a", peer="back")
        assert [entry.worker_id for entry in job.heard("back", Replaceable)] == [2]
        job.join(2, "j2")
        job.launch(0, 3, host="node-a", peer="again")
        assert not job.heard("again", Replaceable)

    def test_go_to_the_launcher_that_has_them(self) -> None:
        job = ElasticJob(2)
        job.launch(0, 1)
        job.launch(1, 1)
        job.hello(0)
        job.hello(1)
        job.bind_all("w0", "w1")
        job.say("w0", Admitting(generation=1))
        job.exit(1, 137, launcher=1)
        assert job.told(Replaceable) == ["l1"]

    def test_are_announced_again_if_the_new_process_ends_before_it_says_hello(self) -> None:
        job = vacated()
        job.ends(2, 2002, 1)
        job.ends(2, 2002, 1)  # said again on a new connection
        assert job.refused == ["exit reported before"]
        assert [entry.worker_id for entry in job.heard("l0", Replaceable)] == [2, 2]
        assert job.event("joiner_lost")["reason"] == "process exited with code 1"
        job.ends(2, 0, 127)  # could not be started
        job.ends(2, 0, 127)
        assert len(job.told(Replaceable)) == 4
        assert job.quorum.generation == 2

    def test_are_not_announced_when_the_job_ends(self) -> None:
        job = elastic(3, min_workers=2)
        job.say("w0", Admitting(generation=1))
        for worker_id in range(2):
            job.say(f"w{worker_id}", Departing(generation=job.quorum.generation, step=3))
        assert [entry.worker_id for entry in job.heard("l0", Replaceable)] == [0]
        job.sleep(2.0)
        assert len(job.told(Replaceable)) == 1

    def test_without_a_launcher_nobody_can_be_told(self) -> None:
        job = ElasticJob(2)
        for worker_id in range(2):
            job.hello(worker_id)
        job.bind_all("w0", "w1")
        job.say("w0", Admitting(generation=1))
        job.say("w1", Failing(reason="", blames=None))
        assert job.quorum.generation == 2
        assert not job.told(Replaceable)

    def test_one_that_was_taken_and_is_free_again_is_news(self) -> None:
        vacancies = Vacancies()
        assert vacancies.announce({1: "a"}) == []
        vacancies.wanted = True
        assert [entry.worker_id for entry in vacancies.announce({1: "a"})] == [1]
        assert vacancies.announce({1: "a"}) == []
        assert vacancies.announce({}) == [] and vacancies.told() == []
        assert [entry.reason for entry in vacancies.announce({1: "b"})] == ["b"]


class TestJoining:
    def test_from_hello_to_member(self) -> None:
        job = vacated()
        job.sent.clear()
        job.join(2, "j2")
        assert job.heard("j2", Welcome) == [
            Welcome(heartbeat_port=4242, elastic=True, min_workers=1, running=2)
        ]
        job.say("j2", Ask())
        assert "the ring of 2 members has not yet paused" in job.heard("j2", Waiting)[0].reason
        assert not job.told(Joiners)
        job.say("j2", Ready())
        joiners = Joiners(generation=2, worker_ids=(2,))
        assert job.heard("w0", Joiners) == job.heard("w1", Joiners) == [joiners]
        job.offer("w0")
        assert not job.told(Feed)
        job.offer("w1")
        feed = Feed(
            generation=2,
            step=120,
            servers=("w0:1", "w1:1"),
            token_public="p" * 40,
            token_secret="s" * 40,
        )
        assert job.heard("j2", Feed) == [feed]
        assert job.members("j2") == job.members("w0") == [0, 1, 2]
        assert job.reason("w0") == "worker 2 joins after step 120"
        assert job.quorum.members == 3
        with pytest.raises(IndexError):
            job.event("worker_joined")
        job.bind_all("w0", "w1", "j2")
        assert job.event("worker_joined")["worker_id"] == 2
        assert job.event("worker_joined")["step"] == 120
        assert job.event("generation")["generation"] == 3
        assert job.heard("w0", Joiners)[-1] == Joiners(generation=3, worker_ids=())
        assert not job.refused

    def test_a_taken_id_is_refused(self) -> None:
        job = vacated()
        job.join(1, "x")
        assert job.heard("x", Refused)[0].reason.startswith("worker id 1 is taken by process 1001 on node-a")
        job.join(2, "j2")
        job.join(2, "y", pid=3)
        assert job.heard("y", Refused)[0].reason.startswith("worker id 2 is taken by process 2002 on node-a")
        job.join(3, "z")
        assert job.refused == ["worker id taken", "worker id taken", "worker id out of range"]

    def test_one_that_has_finished_is_not_replaced(self) -> None:
        job = elastic()
        job.say("w1", Leaving(generation=1, completed=3))
        job.join(1, "x")
        assert job.refused == ["worker id taken"]

    def test_another_script_is_refused(self) -> None:
        job = vacated()
        job.join(2, "x", program="0123456789abcdef")
        assert job.refused == ["another script"]
        assert "another script (0123456789ab..) than the ring (script)" in job.heard("x", Refused)[0].reason
        job.join(2, "y", program="")
        assert "another script (none) than the ring (script)" in job.heard("y", Refused)[0].reason

    def test_a_process_that_was_taken_for_lost_is_refused(self) -> None:
        job = vacated()
        job.join(2, "x", generation=1, members=(Seat(2, "node-a", 2002),))
        assert job.refused == ["generation is over"]
        assert job.heard("x", Refused)[0].reason == (
            "generation 1 is over, the ring is at 2; this process was taken for lost: start a new one"
        )

    def test_only_a_joiner_is_ready(self) -> None:
        job = ElasticJob(3)
        job.hello(0)
        job.say("w0", Ready())
        assert job.refused == ["message out of turn"]

    def test_a_session_cannot_be_taken_over(self) -> None:
        job = vacated()
        job.join(2, "x", session=session_of("w1"))
        assert job.refused == ["session taken"]

    def test_a_fixed_ring_takes_nobody(self) -> None:
        job = elastic(2, min_workers=2)
        job.join(1, "x")
        assert "joining later is not possible" in job.heard("x", Refused)[0].reason
        for message in (
            Suspect(generation=1, worker_id=1, forming=False, reason=""),
            Departing(generation=1, step=1),
            Offer(generation=1, step=1, joiners=(1,), address="a"),
        ):
            job.say("w0", message)
        assert job.refused[1:] == ["the ring is fixed"] * 3
        job.say("w0", Admitting(generation=1))
        assert len(job.refused) == 4
        assert job.quorum.generation == 1

    def test_the_list_of_joiners_follows_them(self) -> None:
        job = elastic(4)
        job.exit(3, 137)
        job.exit(2, 137)
        job.bind_all("w0", "w1")
        job.join(3, "j3")
        job.say("j3", Ready())
        job.join(2, "j2")
        job.say("j2", Ready())
        job.say("j2", Ready())
        job.ends(3, 2003, 1)
        lists = [joiners.worker_ids for joiners in job.heard("w0", Joiners)]
        assert lists == [(3,), (2, 3), (2,)]
        job.say("back", hello_of(0, "w0", generation=3))
        assert [joiners.worker_ids for joiners in job.heard("back", Joiners)] == [(2,)]

    @pytest.mark.parametrize("how", ["exit", "silence", "failing"])
    def test_the_end_of_a_joiner_is_no_failure(self, how: str) -> None:
        job = vacated(min_workers=2)
        job.join(2, "j2")
        job.say("j2", Ready())
        if how == "exit":
            job.ends(2, 2002, 1)
        elif how == "failing":
            job.say("j2", Failing(reason="ValueError: x", blames=None))
            job.ends(2, 2002, 1)
        else:
            job.beating.discard(2)
            job.sleep(JOINER_PATIENCE_S - 0.5)
            assert not job.heard("l0", Expel)
            job.sleep(1.0)
            assert [(expel.worker_id, expel.pid) for expel in job.heard("l0", Expel)] == [(2, 2002)]
        assert job.event("joiner_lost")["worker_id"] == 2
        assert job.heard("w0", Joiners)[-1].worker_ids == ()
        assert len(job.heard("l0", Replaceable)) == 2
        assert job.quorum.generation == 2
        assert not job.told(JobFailed)
        job.join(2, "k2", pid=3002)
        assert job.heard("k2", Welcome)

    def test_the_exit_of_the_one_before_does_not_count_for_its_successor(self) -> None:
        job = elastic()
        job.beating.remove(2)
        job.sleep(3.5)
        job.join(2, "j2")
        job.beat(2, generation=1, peer="w2")
        assert len(job.heard("w2", Expelled)) == 1
        job.exit(2, 137)
        job.say("j2", Ready())
        job.bind_all("w0", "w1")
        assert job.heard("w0", Joiners)[-1].worker_ids == (2,)
        assert job.members("w0") == [0, 1]
        assert job.quorum.generation == 2

    def test_one_that_comes_when_all_is_done_hears_so(self) -> None:
        job = vacated()
        for worker_id in range(2):
            job.say(f"w{worker_id}", Leaving(generation=2, completed=3))
        job.join(2, "j2")
        assert job.told(AllLeft) == ["w0", "w1", "j2"]
        job.exit(0, 0)
        job.exit(1, 0)
        assert not job.told(JobDone)
        job.ends(2, 2002, 1)
        assert job.told(JobDone) == ["l0"]

    def test_one_that_waits_at_the_end_hears_so(self) -> None:
        job = vacated()
        job.join(2, "j2")
        job.say("j2", Ready())
        for worker_id in range(2):
            job.say(f"w{worker_id}", Leaving(generation=2, completed=3))
        assert job.heard("j2", AllLeft)

    def test_the_number_of_processes_that_are_remembered_is_bounded(self) -> None:
        job = vacated()
        for number in range(MAX_REPLACED + 20):
            job.join(2, f"j{number}", pid=5000 + number)
            job.say(f"j{number}", Failing(reason="", blames=None))
        assert len(list(job.quorum._state.roster.replaced())) == MAX_REPLACED
        assert len(list(job.quorum._state.roster.greeted())) == MAX_REPLACED + 3
        job.say("j3", Ready())
        assert job.refused == ["peer is no part of this job"]


class TestHanging:
    def test_who_does_not_come_to_a_new_generation_is_lost(self) -> None:
        job = elastic()
        job.exit(2, 137)
        job.bind_all("w0")
        job.sleep(TIMEOUTS.op_timeout_s - 1)
        assert job.members("w0") == [0, 1]
        job.sleep(2)
        assert job.members("w0") == [0]
        assert "has not come to the new generation for 300 s (op_timeout_s)" in job.reason("w0")
        assert [(expel.worker_id, expel.pid) for expel in job.heard("l0", Expel)] == [(1, 1001)]
        assert job.heard("w1", Expelled)

    def test_every_generation_has_its_own_time(self) -> None:
        job = elastic(4)
        job.exit(3, 137)
        job.sleep(TIMEOUTS.op_timeout_s - 1)
        job.exit(2, 137)
        job.sleep(2)
        assert job.members("w0") == [0, 1]

    def test_a_joiner_that_ends_slowly_after_the_job_is_not_lost(self) -> None:
        job = vacated()
        job.join(2, "j2")
        job.say("j2", Ready())
        for worker_id in range(2):
            job.say(f"w{worker_id}", Leaving(generation=2, completed=3))
        assert job.heard("j2", AllLeft)
        job.beating.clear()
        job.sleep(TIMEOUTS.heartbeat_timeout_s + 1)
        assert not job.heard("l0", Expel)


class TestNewMachines:
    def lost_machine(self) -> ElasticJob:
        """Of two machines with two workers each, the second has gone silent; its launcher says nothing."""
        job = ElasticJob(4, 1)
        job.launch(0, 2, host="node-a")
        job.launch(1, 2, host="node-b")
        for worker_id in range(4):
            job.hello(worker_id, host="node-a" if worker_id < 2 else "node-b")
        job.bind_all("w0", "w1", "w2", "w3")
        job.say("w0", Admitting(generation=1))
        job.beating -= {2, 3}
        job.sleep(3.5)
        assert job.members("w0") == [0, 1]
        job.bind_all("w0", "w1")
        return job

    def test_one_takes_the_place_of_a_machine_that_is_gone(self) -> None:
        job = self.lost_machine()
        job.launch(2, 2, host="node-c")
        [assignment] = job.heard("l2", Assignment)
        assert (assignment.first_worker_id, assignment.world_size) == (2, 4)
        assert [one.worker_id for one in job.heard("l2", Replaceable)] == [2, 3]
        job.join(2, "j2", host="node-c")
        job.say("j2", Ready())
        assert job.heard("w0", Joiners)[-1].worker_ids == (2,)
        job.say("l2", WorkerExited(worker_id=2, pid=2002, code=1, reason="x"))
        assert job.event("joiner_lost")["worker_id"] == 2

    def test_a_smaller_one_takes_a_part_of_it(self) -> None:
        job = self.lost_machine()
        job.launch(2, 1, host="node-c")
        assert job.heard("l2", Assignment)[0].first_worker_id == 2
        job.launch(3, 1, host="node-d")
        assert job.heard("l3", Assignment)[0].first_worker_id == 3

    def test_a_larger_one_is_refused_and_so_is_one_while_the_machine_is_there(self) -> None:
        job = self.lost_machine()
        job.launch(2, 3, host="node-c")
        assert "at least as many as its own (3)" in job.heard("l2", Refused)[0].reason
        job = vacated()
        job.launch(2, 1, host="node-c")
        assert job.heard("l2", Refused)

    def test_the_launcher_of_the_lost_machine_has_no_say_any_more(self) -> None:
        job = self.lost_machine()
        job.launch(2, 2, host="node-c")
        assert "not among them (any more)" in job.heard("l1", Refused)[-1].reason
        job.say("l1", WorkerExited(worker_id=2, pid=1002, code=1, reason="late"))
        assert job.refused[-1] == "peer is no part of this job"


class TestFeeding:
    def test_offers_of_different_steps_do_not_count_together(self) -> None:
        job = vacated()
        job.join(2, "j2")
        job.say("j2", Ready())
        job.offer("w0", step=120)
        job.offer("w1", step=121)
        assert not job.told(Feed)
        job.offer("w0", step=121)
        assert [feed.step for feed in job.heard("j2", Feed)] == [121]

    def test_if_nobody_waits_any_more_the_members_go_on(self) -> None:
        job = vacated()
        job.offer("w0", "w1")
        assert job.told(Resume) == ["w0", "w1"]
        assert job.heard("w0", Resume)[0].generation == 2
        job.offer("w0")  # the offers before are void
        assert len(job.told(Resume)) == 2

    def test_only_those_that_all_have_offered_to_are_fed(self) -> None:
        job = elastic(4)
        job.exit(2, 137)
        job.exit(3, 137)
        job.bind_all("w0", "w1")
        for worker_id in (2, 3):
            job.join(worker_id, f"j{worker_id}")
            job.say(f"j{worker_id}", Ready())
        job.offer("w0", joiners=(2, 3))
        job.offer("w1", joiners=(3,))
        assert job.told(Feed) == ["j3"]

    def test_the_feed_comes_before_the_generation(self) -> None:
        job = feeding()
        told = [type(message) for to, message in job.sent if to == "j2"]
        assert told.index(Feed) < told.index(Prepare)

    def test_all_that_wait_join_together(self) -> None:
        job = feeding(joiners=2)
        assert job.quorum.generation == 4
        assert job.reason("j3") == "workers 2, 3 join after step 120"
        assert job.members("j3") == [0, 1, 2, 3]
        assert job.heard("j2", Feed) == job.heard("j3", Feed)

    def test_one_with_other_settings_is_turned_away_when_the_generation_could_form(self) -> None:
        job = feeding()
        for peer, address in (("w0", "auto/1 a"), ("w1", "auto/1 b"), ("j2", "auto/2 c")):
            job.say(peer, Bound(generation=job.quorum.generation, address=address))
        assert "auto/2 instead of auto/1" in job.heard("j2", Expelled)[0].reason
        assert [(expel.worker_id, expel.pid) for expel in job.heard("l0", Expel)] == [(2, 2002)]
        assert "worker_joined" not in [event["event"] for event in job.events]
        job.sleep(0.1)
        assert job.members("w0") == [0, 1]
        job.bind_all("w0", "w1")
        assert job.event("generation")["generation"] == job.quorum.generation

    def test_a_loss_while_it_fetches_is_one_of_any_generation(self) -> None:
        job = feeding()
        job.exit(1, 137)
        assert job.members("w0") == job.members("j2") == [0, 2]
        assert "rank 1 (worker 1 on node-a) lost" in job.reason("j2")

    def test_a_joiner_that_lost_its_connection_is_told_again(self) -> None:
        job = feeding()
        job.say("back", hello_of(2, "j2", pid=2002))
        assert job.heard("back", Feed) == job.heard("j2", Feed)
        assert job.members("back") == [0, 1, 2]

    def test_a_member_that_lost_its_connection_is_told_again(self) -> None:
        job = vacated()
        job.offer("w0", "w1")
        job.say("back", hello_of(0, "w0", generation=2))
        assert len(job.heard("back", Resume)) == 1
        job.offer("back", step=121)
        job.say("again", hello_of(0, "w0", generation=2))
        assert not job.heard("again", Resume)

    def test_one_that_dies_while_its_generation_forms_is_a_lost_member(self) -> None:
        job = feeding()
        job.ends(2, 2002, 1)
        assert job.members("w0") == [0, 1]
        assert job.quorum.generation == 4
        job.bind_all("w0", "w1")
        assert "worker_joined" not in [event["event"] for event in job.events]
        assert job.event("worker_lost")["worker_id"] == 2

    def test_a_member_that_finishes_is_not_waited_for(self) -> None:
        job = vacated()
        job.join(2, "j2")
        job.say("j2", Ready())
        job.offer("w0")
        job.say("w1", Leaving(generation=2, completed=3))
        assert job.heard("j2", Feed)[0].servers == ("w0:1",)


class TestDeparting:
    def test_the_rest_goes_on(self) -> None:
        job = elastic()
        job.say("w1", Departing(generation=1, step=40))
        assert job.told(Prepare) == ["w0", "w2"]
        assert job.reason("w0") == "rank 1 (worker 1 on node-a) left after step 40"
        event = job.event("worker_left")
        assert (event["worker_id"], event["step"]) == (1, 40)
        assert event["reason"] == "asked to leave (SIGTERM)"
        job.bind_all("w0", "w2")
        job.say("w0", Admitting(generation=2))
        job.exit(1, 143)
        assert [entry.worker_id for entry in job.heard("l0", Replaceable)] == [1]
        assert not job.told(JobFailed) and not job.told(Lost)
        job.join(1, "j1")
        assert job.heard("j1", Welcome)
        for peer in ("w0", "w2"):
            job.say(peer, Leaving(generation=2, completed=1))
        assert sorted(job.told(AllLeft)) == ["j1", "w0", "w2"]

    def test_one_may_leave_while_another_generation_forms(self) -> None:
        job = elastic(4)
        job.exit(3, 137)
        job.say("w1", Departing(generation=1, step=40))
        assert job.quorum.generation == 3
        assert job.members("w0") == [0, 2]
        job.say("w0", Departing(generation=9, step=40))
        assert job.refused == ["frame of another generation"]

    def test_all_that_leave_one_by_one_stop_the_job(self) -> None:
        job = elastic(3, min_workers=2)
        for worker_id in range(3):
            job.say(f"w{worker_id}", Departing(generation=1, step=40))
            job.sleep(0.2)
        reason = "every worker was asked to leave (SIGTERM)"
        assert job.heard("l0", JobFailed) == [
            JobFailed(worker_id=2, rank=1, host="node-a", code=143, reason=reason)
        ]
        assert not job.told(Lost)
        for worker_id in range(3):
            job.exit(worker_id, 143)
        assert job.finished == ["a worker failed"]

    def test_joiners_hear_that_the_job_is_over(self) -> None:
        job = vacated()
        job.join(2, "j2")
        job.say("w0", Departing(generation=2, step=1))
        job.say("w1", Departing(generation=2, step=1))
        assert job.told(AllLeft) == ["j2"]

    def test_too_few_remain_and_do_not_leave(self) -> None:
        job = elastic(3, min_workers=2)
        job.say("w0", Departing(generation=1, step=40))
        job.bind_all("w1", "w2")
        job.say("w1", Departing(generation=2, step=40))
        job.sleep(0.8)
        assert not job.told(Lost)
        job.sleep(0.4)
        reason = "asked to leave (SIGTERM); 1 of at least 2 workers (--min-workers) remain"
        assert job.heard("w2", Lost)[0].reason == reason
        failed = job.heard("l0", JobFailed)[0]
        assert (failed.worker_id, failed.code, failed.reason) == (1, 143, reason)

    def test_too_few_remain_and_one_of_them_dies(self) -> None:
        job = elastic(3, min_workers=2)
        job.say("w0", Departing(generation=1, step=40))
        job.say("w1", Departing(generation=2, step=40))
        job.exit(2, 9)
        failed = job.heard("l0", JobFailed)[0]
        assert (failed.worker_id, failed.code) == (2, 9)

    def test_the_last_to_train_may_leave_when_others_are_done(self) -> None:
        job = elastic(2)
        job.say("w0", Leaving(generation=1, completed=3))
        job.say("w1", Departing(generation=1, step=3))
        assert job.told(AllLeft) == ["w0"]
        job.exit(0, 0)
        job.exit(1, 143)
        assert job.told(JobDone) == ["l0"]


class TestSuspecting:
    def suspect(self, job: ElasticJob, peer: str, accused: int, *, forming: bool = False) -> None:
        message = Suspect(
            generation=job.quorum.generation,
            worker_id=accused,
            forming=forming,
            reason="connection closed",
        )
        job.say(peer, message)

    def again(self, job: ElasticJob, *suspicions: tuple[str, int]) -> None:
        """These suspicions come, are believed, and those told to prepare do."""
        for peer, accused in suspicions:
            self.suspect(job, peer, accused)
        job.sleep(0.3)
        for peer in ("w0", "w1", "w2", "w3"):
            prepared = job.heard(peer, Prepare)
            if prepared and prepared[-1].generation == job.quorum.generation:
                job.bind_all(peer)

    def test_certain_news_comes_first(self) -> None:
        job = elastic()
        self.suspect(job, "w0", 1)
        job.exit(1, 137)
        job.sleep(1.0)
        assert job.quorum.generation == 2
        assert "lost: process killed" in job.reason("w0")

    def test_without_news_the_same_members_form_again(self) -> None:
        job = elastic()
        self.suspect(job, "w0", 1)
        assert not job.told(Prepare)
        job.sleep(0.2)
        assert job.members("w0") == [0, 1, 2]
        assert job.reason("w1") == (
            "rank 0 cannot reach rank 1 (worker 1 on node-a): connection closed; nobody is known to be lost"
        )
        job.sleep(5.0)
        assert job.quorum.generation == 2
        assert not job.told(Expelled)

    def test_the_second_time_one_is_excluded(self) -> None:
        job = elastic(4)
        self.again(job, ("w0", 1))
        self.again(job, ("w1", 0))
        assert job.members("w0") == [0, 2, 3]
        assert "the connection between them failed again" in job.reason("w0")
        assert "rank 1 (worker 1 on node-a) lost: excluded: rank 1 cannot reach rank 0" in job.reason("w0")
        assert job.heard("w1", Expelled)[0].reason.startswith("excluded: ")
        assert [(expel.worker_id, expel.pid) for expel in job.heard("l0", Expel)] == [(1, 1001)]
        assert set(job.refused) == {"heartbeat of a worker that is gone"}

    def test_whoever_quarrels_with_more_is_excluded(self) -> None:
        job = elastic(4)
        self.again(job, ("w0", 3))
        self.again(job, ("w1", 0))
        self.again(job, ("w3", 0))
        assert job.members("w1") == [1, 2, 3]
        assert "more of the members" in job.reason("w1")

    def test_a_complaint_about_a_complainer_is_a_consequence(self) -> None:
        job = elastic(4)
        self.again(job, ("w1", 0), ("w0", 3), ("w3", 0))
        self.again(job, ("w1", 0))
        assert job.members("w0") == [0, 1, 2, 3]
        self.again(job, ("w2", 0), ("w0", 1))
        assert job.members("w2") == [1, 2, 3]
        assert "rank 0 cannot reach rank 1" in job.reason("w2")

    def test_old_quarrels_are_forgotten(self) -> None:
        job = elastic()
        self.again(job, ("w0", 1))
        job.sleep(MEMORY_S + 1)
        self.again(job, ("w0", 1))
        assert job.members("w0") == [0, 1, 2]

    def test_a_successor_does_not_inherit_quarrels(self) -> None:
        feuds = Feuds(0.1)
        hosts = {0: "a", 1: "a"}
        feuds.suspect(Suspicion(0, 1, "", 0.0))
        assert feuds.judge(0.1, hosts) is not None
        feuds.forget(1)
        feuds.suspect(Suspicion(0, 1, "", 1.0))
        ruling = feuds.judge(1.1, hosts)
        assert ruling is not None and ruling.excluded == ()

    def test_two_machines_between_which_nothing_passes(self) -> None:
        job = ElasticJob(5, 1)
        job.launch(0, 5, host="node-a")
        for worker_id in range(5):
            job.hello(worker_id, host="node-a" if worker_id in (0, 3) else "node-b")
        job.bind_all("w0", "w1", "w2", "w3", "w4")
        self.suspect(job, "w2", 3)
        job.sleep(0.3)
        assert len(job.members("w0")) == 5
        job.bind_all("w0", "w1", "w2", "w3", "w4")
        self.suspect(job, "w4", 0, forming=True)
        self.suspect(job, "w3", 2, forming=True)
        job.sleep(0.3)
        assert job.members("w1") == [1, 2, 4]
        assert "nothing passes between node-b and node-a" in job.reason("w1")
        assert sorted(expel.worker_id for expel in job.heard("l0", Expel)) == [0, 3]

    def test_a_first_generation_that_does_not_form_is_tried_again(self) -> None:
        job = elastic(3)
        self.suspect(job, "w2", 1, forming=True)
        job.sleep(0.3)
        assert job.members("w0") == [0, 1, 2]

    def test_whoever_has_left_is_asked_nothing(self) -> None:
        job = elastic(3, min_workers=2)
        job.say("w2", Departing(generation=1, step=1))
        job.bind_all("w0", "w1")
        job.say("w1", Departing(generation=2, step=1))
        job.say("w0", Dispute(generation=2, sequence=1))
        job.say("w0", CallReport(generation=2, sequence=1, call="barrier()"))
        assert job.heard("w0", Verdict)[0].calls == ("barrier()", "left the ring when it was asked to")
        job.say("w1", CallReport(generation=2, sequence=1, call="late"))
        assert job.refused == ["answer to no open inquiry"]

    def test_exclusion_respects_the_minimum(self) -> None:
        job = elastic(3, min_workers=2)
        job.exit(2, 137)
        job.bind_all("w0", "w1")
        self.again(job, ("w0", 1))
        self.suspect(job, "w0", 1)
        job.sleep(0.3)
        assert "1 of at least 2 workers" in job.heard("w0", Lost)[0].reason

    def test_what_is_not_looked_into(self) -> None:
        job = elastic()
        job.say("w0", Suspect(generation=0, worker_id=1, forming=False, reason=""))
        self.suspect(job, "w0", 0)
        self.suspect(job, "w0", 7)
        job.say("w2", Leaving(generation=1, completed=1))
        self.suspect(job, "w0", 2)
        job.exit(1, 137)
        self.suspect(job, "w0", 1)
        job.sleep(1.0)
        assert job.refused == [
            "frame of another generation",
            "suspect is no other member",
            "suspect is no other member",
            "suspect is no other member",
            "message out of turn",
        ]
        assert job.quorum.generation == 2


class TestNotes:
    def test_go_to_the_events_file(self) -> None:
        job = elastic()
        job.say("w1", Noted(event={"event": "straggler", "factor": 1.7, "worker_id": 0}))
        assert job.event("straggler") == {
            "event": "straggler",
            "factor": 1.7,
            "generation": 1,
            "worker_id": 1,
        }

    def test_of_other_kinds_or_from_others_are_refused(self) -> None:
        job = vacated()
        job.join(2, "j2")
        job.events.clear()
        job.say("w1", Noted(event={"event": "worker_lost"}))
        job.say("w1", Noted(event={"factor": 1.0}))
        job.say("w1", Noted(event={"event": "straggler", **{f"x{i}": 0 for i in range(40)}}))
        job.say("j2", Noted(event={"event": "straggler"}))
        assert job.refused == ["note of an unknown kind"] * 3 + ["message out of turn"]
        assert not job.events


class TestEnding:
    def test_those_lost_on_the_way_do_not_matter(self) -> None:
        job = vacated()
        for worker_id in range(2):
            job.say(f"w{worker_id}", Leaving(generation=2, completed=3))
        assert job.told(AllLeft) == ["w0", "w1"]
        job.exit(0, 0)
        job.exit(1, 0)
        assert job.told(JobDone) == ["l0"]

    def test_a_process_whose_end_nobody_reports_is_not_waited_for_for_ever(self) -> None:
        job = elastic()
        job.beating.remove(2)
        job.sleep(3.5)
        job.bind_all("w0", "w1")
        for worker_id in range(2):
            job.say(f"w{worker_id}", Leaving(generation=2, completed=3))
        job.exit(0, 0)
        job.exit(1, 0)
        job.sleep(TIMEOUTS.shutdown_timeout_s - 0.5)
        assert not job.told(JobDone)
        job.sleep(1.0)
        assert job.told(JobDone) == ["l0"]

    def test_plain_scripts_end_as_ever(self) -> None:
        job = ElasticJob(2)
        job.launch(0, 2)
        job.exit(1, 0)
        job.exit(0, 0)
        assert job.told(JobDone) == ["l0"]
        job = ElasticJob(2)
        job.launch(0, 2)
        job.exit(1, 3)
        assert job.heard("l0", JobFailed)[0].code == 3

    def test_without_launchers_it_ends_when_all_have_left(self) -> None:
        job = ElasticJob(2)
        for worker_id in range(2):
            job.hello(worker_id)
        job.bind_all("w0", "w1")
        job.say("w1", Failing(reason="", blames=None))
        job.bind_all("w0")
        job.say("w0", Leaving(generation=2, completed=3))
        assert job.finished == ["all workers have left"]


SEATS = tuple(Seat(worker_id, "node-a", 1000 + worker_id) for worker_id in range(4))


class TestRestart:
    """The coordinator is new; the workers are not."""

    def back(self, job: ElasticJob, *worker_ids: int, **changes: Any) -> None:
        for worker_id in worker_ids:
            values: dict[str, Any] = {"generation": 5, "members": SEATS, **changes}
            job.say(f"w{worker_id}", hello_of(worker_id, f"w{worker_id}", **values))
            job.beating.add(worker_id)

    def launcher_back(
        self, job: Job, first: int = 0, slots: int = 4, *, index: int = 0, size: int = 4
    ) -> None:
        hello = LauncherHello(
            host=f"node-{index}",
            address="10.0.0.1",
            slots=slots,
            master_port=29500,
            encrypt_data=False,
            first_worker_id=first,
            world_size=size,
            session=session_of(f"l{index}"),
        )
        job.say(f"l{index}", hello)

    def restored(self, min_workers: int = 2) -> ElasticJob:
        job = ElasticJob(None, min_workers)
        self.launcher_back(job)
        self.back(job, 0, 1, 2, 3)
        job.sent.clear()
        job.events.clear()
        return job

    def test_a_majority_brings_the_ring_back(self) -> None:
        job = ElasticJob(4, 2)
        self.launcher_back(job)
        assert job.heard("l0", Assignment)[0].first_worker_id == 0
        self.back(job, 0, 2)
        words = "2 of 4 members of generation 5 are back"
        assert job.heard("w2", Waiting)[0].reason == f"{words}, a majority is needed"
        job.say("w0", Ask())
        assert job.heard("w0", Waiting)[-1].reason == f"{words}, a majority is needed"
        assert job.quorum.generation == 0
        self.back(job, 1)
        assert job.quorum.generation == 5
        assert job.told(Welcome) == ["w0", "w2", "w1"]
        assert not job.told(Prepare)
        event = job.event("coordinator_restored")
        assert event["reason"] == "3 of 4 members of generation 5 are back"
        assert [member["worker_id"] for member in event["members"]] == [0, 1, 2, 3]
        self.back(job, 3)
        assert job.heard("w3", Welcome)
        job.sleep(5.0)
        assert job.quorum.generation == 5 and job.quorum.members == 4
        assert not job.refused

    def test_without_the_size_of_the_job_it_waits_for_a_launcher(self) -> None:
        job = ElasticJob(None, 2)
        self.back(job, 0, 1, 2, 3)
        assert job.quorum.generation == 0
        self.launcher_back(job)
        assert job.quorum.generation == 5
        assert job.quorum._state.elastic

    def test_whoever_does_not_come_back_is_lost(self) -> None:
        job = ElasticJob(4, 2)
        self.launcher_back(job)
        self.back(job, 0, 1, 2)
        job.sleep(2.8)
        assert job.quorum.generation == 5
        job.sleep(0.6)
        assert job.quorum.generation == 5 + NUMBERS_SKIPPED + 1
        assert job.members("w0") == [0, 1, 2]
        assert "did not come back after the coordinator was restarted" in job.reason("w0")
        self.back(job, 3)
        assert job.heard("w3", Expelled)[0].generation == job.quorum.generation
        assert job.refused == ["generation is over"]

    def test_exits_that_waited_are_counted(self) -> None:
        job = ElasticJob(None, 2)
        self.launcher_back(job)
        job.ends(3, 1003, 137)
        job.ends(3, 1003, 137)
        assert job.refused == ["exit reported before"]
        self.back(job, 0, 1)
        assert job.members("w0") == [0, 1, 2]  # three of four are accounted for
        assert "worker 3 on node-a) lost: process exited with code 137" in job.reason("w0")
        assert "and 1 ended meanwhile" in job.event("coordinator_restored")["reason"]

    def test_an_exit_of_an_earlier_process_is_no_loss(self) -> None:
        job = ElasticJob(None, 2)
        self.launcher_back(job)
        job.ends(3, 77, 137)
        self.back(job, 0, 1, 2, 3)
        assert job.quorum.generation == 5
        assert not job.told(Prepare)

    def test_whose_end_its_launcher_tells_of_is_replaced_at_once(self) -> None:
        job = ElasticJob(None, 2)
        self.launcher_back(job)
        self.back(job, 0, 1, members=SEATS[:3])
        job.say("w0", Admitting(generation=5))
        assert not job.told(Replaceable)
        job.ends(3, 77, 137)
        assert [told.worker_id for told in job.heard("l0", Replaceable)] == [3]
        job.sleep(3.2)
        assert [told.worker_id for told in job.heard("l0", Replaceable)] == [3, 2]

    def test_one_that_finished_meanwhile_has_left(self) -> None:
        job = ElasticJob(None, 2)
        self.launcher_back(job)
        job.ends(3, 1003, 0)
        self.back(job, 0, 1)
        assert job.heard("w0", Left) == [Left(generation=5, rank=3, completed=0)]
        assert job.quorum.generation == 5

    def test_exits_of_a_job_without_a_ring_are_judged_a_little_later(self) -> None:
        job = ElasticJob(None, 2)
        self.launcher_back(job)
        job.ends(3, 1003, 7)
        assert not job.told(JobFailed)
        job.sleep(3.2)
        assert job.heard("l0", JobFailed)[0].code == 7

    def test_too_few_ended_workers_leave_a_majority_open(self) -> None:
        job = ElasticJob(4, 2)
        self.back(job, 0, 1)
        job.sleep(60.0)
        assert job.quorum.generation == 0
        assert not job.told(JobFailed) and not job.told(Lost)

    def test_the_newest_generation_heard_of_counts(self) -> None:
        job = ElasticJob(4, 2)
        self.back(job, 0, 1, generation=4)
        self.back(job, 2, members=SEATS[2:])
        assert job.quorum.generation == 0
        self.back(job, 3, members=SEATS[2:])
        assert job.quorum.generation == 5
        assert job.told(Expelled) == ["w0", "w1"]
        assert job.event("coordinator_restored")["members"][0]["worker_id"] == 2

    def test_a_member_that_missed_the_newest_generation_brings_another(self) -> None:
        job = ElasticJob(4, 2)
        self.back(job, 0, 1)
        self.back(job, 2, generation=4)
        assert job.quorum.generation == 5 + NUMBERS_SKIPPED + 1
        assert job.members("w0") == [0, 1, 2, 3]
        assert "worker 2 on node-a) is back from generation 4, not 5" in job.reason("w0")
        job.bind_all("w0", "w1", "w2")
        self.back(job, 3, generation=5)
        job.bind_all("w3")
        assert len(job.told(Form)) == 4

    def test_a_member_that_knows_a_later_generation_is_overruled(self) -> None:
        job = ElasticJob(4, 2)
        self.back(job, 0, 1, 2)
        self.back(job, 3, generation=40)
        assert job.quorum.generation == 40 + NUMBERS_SKIPPED + 1
        assert job.members("w0") == [0, 1, 2, 3]

    def test_what_members_say_meanwhile_is_not_lost(self) -> None:
        job = ElasticJob(None, 2)
        self.launcher_back(job)
        self.back(job, 0)
        job.say("w0", Admitting(generation=5))
        job.say("w0", Leaving(generation=5, completed=8))
        self.back(job, 1, 2)
        assert [left.rank for left in job.heard("w1", Left)] == [0]
        job.exit(3, 137)
        assert [entry.worker_id for entry in job.heard("l0", Replaceable)] == [3]

    def test_one_whose_script_was_done_before_is_not_expelled(self) -> None:
        job = ElasticJob(4, 2)
        self.back(job, 0, generation=4)
        job.say("w0", Leaving(generation=4, completed=8))
        self.back(job, 2, 3, members=SEATS[1:])
        assert not job.told(Expelled)
        for worker_id in (2, 3):
            job.say(f"w{worker_id}", Leaving(generation=5, completed=2))
        self.back(job, 1, members=SEATS[1:])
        job.say("w1", Leaving(generation=5, completed=2))
        assert sorted(job.told(AllLeft)) == ["w0", "w1", "w2", "w3"]

    def test_a_new_process_waits_and_becomes_a_joiner(self) -> None:
        job = ElasticJob(4, 2)
        self.launcher_back(job)
        job.join(3, "j3")
        assert job.heard("j3", Welcome)[0].running == 0
        job.say("j3", Ready())
        self.back(job, 0, 1, members=SEATS[:3])
        assert job.heard("j3", Welcome)[1].running == 3
        # It is ready, but a feeding needs a token that this coordinator has given out.
        assert job.members("w0") == [0, 1, 2]
        assert "has no token" in job.reason("w0")
        self.back(job, 2, members=SEATS[:3])
        job.bind_all("w0", "w1", "w2")
        assert job.heard("w0", Joiners)[-1].worker_ids == (3,)
        job.offer("w0", "w1", "w2", joiners=(3,))
        assert job.members("j3") == [0, 1, 2, 3]
        assert not job.refused

    def test_a_new_process_in_a_member_s_place_is_refused(self) -> None:
        job = ElasticJob(4, 2)
        job.join(2, "x")
        self.back(job, 0, 1, 3)
        assert "taken by process 1002" in job.heard("x", Refused)[0].reason
        job.say("x", Ready())
        assert job.refused == ["worker id taken", "peer is no part of this job"]

    def test_places_nobody_has_are_announced_when_others_had_time_to_come_back(self) -> None:
        job = ElasticJob(None, 2)
        self.launcher_back(job)
        self.back(job, 0, 1, 2, members=SEATS[:3])
        job.say("w0", Admitting(generation=5))
        assert not job.told(Replaceable)
        job.sleep(3.2)
        assert [entry.worker_id for entry in job.heard("l0", Replaceable)] == [3]
        job.join(3, "j3")
        assert job.heard("j3", Welcome)[0].running == 3

    def test_a_loss_afterwards_is_survived(self) -> None:
        job = self.restored()
        job.exit(3, 137)
        assert job.members("w0") == [0, 1, 2]
        assert job.quorum.generation > 5

    def test_a_fixed_ring_comes_back_too_and_stays_fixed(self) -> None:
        job = self.restored(min_workers=4)
        assert job.quorum.generation == 5
        job.join(2, "x")
        job.exit(3, 137)
        assert job.refused == ["the ring is complete; joining later is not possible in this version"]
        assert job.told(Lost) == ["w0", "w1", "w2"]

    def test_a_fixed_ring_cannot_mend_what_its_members_disagree_about(self) -> None:
        job = ElasticJob(4, 4)
        self.back(job, 0, 1, 2)
        self.back(job, 3, generation=4)
        assert "is back from generation 4, not 5" in job.heard("w0", Lost)[0].reason
        assert job.quorum.generation == 5

    def test_nonsense_that_was_kept_is_refused_then(self) -> None:
        job = ElasticJob(4, 2)
        self.back(job, 0)
        job.say("w0", Ready())
        assert not job.refused
        self.back(job, 1, 2)
        assert job.refused == ["message out of turn"]

    def test_before_the_first_generation_all_begins_anew(self) -> None:
        job = ElasticJob(None, 2)
        self.launcher_back(job, slots=2, size=2)
        job.hello(0)
        job.hello(1)
        # A worker may have been told to prepare generation 1 by the coordinator before.
        assert job.heard("w0", Prepare)[0].generation == NUMBERS_SKIPPED + 1

    def test_who_cannot_be_taken_back(self) -> None:
        job = ElasticJob(4, 2)
        self.back(job, 0, members=SEATS[1:])
        assert job.heard("w0", Refused)[0].reason == "worker is no member of the ring that it names"
        self.back(job, 1, 2)
        job.say("x", hello_of(3, "x", generation=5, members=SEATS, session=session_of("w1")))
        assert job.refused[-1] == "session taken"
        job.join(3, "j3")
        job.say("y", hello_of(0, "y", generation=5, members=SEATS, session=session_of("j3")))
        assert job.refused[1:] == ["session taken", "session taken"]
        job.say("j3", Ask())
        assert "of 4 members of generation 5 are back" in job.heard("j3", Waiting)[0].reason
        assert job.quorum.generation == 0

    def test_a_ring_that_does_not_fit_the_job_is_refused(self) -> None:
        job = ElasticJob(3, 2)
        self.back(job, 0, 1, 2)
        assert job.told(Refused) == ["w0", "w1", "w2"]
        assert "not among 0..2" in job.heard("w0", Refused)[0].reason
        assert job.quorum.generation == 0

    def test_what_is_kept_meanwhile_is_bounded(self) -> None:
        job = ElasticJob(4, 2)
        self.back(job, 0)
        for _ in range(40):
            job.say("w0", Admitting(generation=5))
        assert job.refused == ["too many messages before the ring is back"] * 24
        returning = Returning()
        answers = []
        for number in range(2100):
            hello = hello_of(0, str(number), generation=1, members=SEATS)
            answers.append(returning.take(b"", hello))
        assert answers.count("too many workers come back") == 2100 - 2048
        exited = [WorkerExited(worker_id=0, pid=pid, code=0, reason="") for pid in range(4200)]
        assert [returning.keep_exit(entry) for entry in exited].count(None) == 4096

    def test_a_connection_that_breaks_meanwhile_is_made_again(self) -> None:
        job = ElasticJob(4, 2)
        self.back(job, 0)
        job.say("w0", Leaving(generation=5, completed=8))
        job.say("again", hello_of(0, "w0", generation=5, members=SEATS))
        self.back(job, 1, 2)
        assert job.heard("again", Welcome) and not job.heard("w0", Welcome)
        assert job.heard("w1", Left)[0].completed == 8

    def test_launchers_get_back_what_they_had(self) -> None:
        job = Job(None)
        job.launch(7, 2)
        self.launcher_back(job, 2, 2, index=1)
        assert "complete" in job.heard("l7", Refused)[0].reason
        self.launcher_back(job, 0, 2, index=0)
        assert [job.heard(f"l{index}", Assignment)[0].first_worker_id for index in (0, 1)] == [0, 2]
        assert job.quorum.launchers == 2
        self.launcher_back(job, 1, 2, index=2)
        self.launcher_back(job, 0, 2, index=3, size=5)
        self.launcher_back(job, 3, 2, index=4)
        reasons = [job.heard(f"l{index}", Refused)[0].reason for index in (2, 3, 4)]
        assert "another one has some of them" in reasons[0]
        assert "this job has 4 workers, and this launcher's had 5" in reasons[1]
        assert "given worker ids 3..4, and this job has 4 workers" in reasons[2]
        job.launch(9, 1)
        assert "launchers are complete" in job.heard("l9", Refused)[0].reason


def test_a_process_is_told_from_those_before_it() -> None:
    roster = Roster()
    first = roster.admit(hello_of(1, "a", pid=10))
    assert roster.of_process(1, 99) is first  # its launcher calls it so
    first.phase = Phase.GONE
    second = roster.admit(hello_of(1, "b", pid=11), Phase.JOINING)
    assert roster.of_process(1, 10) is first
    assert roster.of_process(1, 11) is second
    assert roster.of_process(1, 99) is None


def test_a_plan_names_owners() -> None:
    plan = JobPlan(2, 1.0)
    assert plan.owner_of(0) is None
