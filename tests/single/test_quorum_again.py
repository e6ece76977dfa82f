"""The coordinator's decisions about a job that stops at a checkpoint, and one that goes on from it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ringps.membership.coordinator import CoordinatorSettings
from ringps.membership.early_exits import PATIENCE_S
from ringps.membership.notes import NOTES
from ringps.membership.restarts import RingRestarts
from ringps.membership.returning import NUMBERS_SKIPPED
from ringps.membership.waiting_room import WaitingRoom
from ringps.wire.control import (
    AllLeft,
    Ask,
    Assignment,
    Bound,
    Failing,
    Form,
    JobDone,
    JobFailed,
    LauncherHello,
    LauncherLeaving,
    Leaving,
    Lost,
    Noted,
    Prepare,
    Refused,
    Replaceable,
    Waiting,
    WorkerExited,
)
from ringps.wire.rules import MAX_WORKERS, Seat
from ringps.worker_env import SUSPENDED_CODE
from tests.quorum_job import Job, hello_of, session_of

SAVED = Noted(event={"event": "checkpoint_saved", "step": 3, "directory": "ckpt"})


def ring(
    world_size: int = 2, *, least: int | None = None, launchers: int = 1, **changes: Any
) -> tuple[Job, list[str]]:
    """A job whose ring has formed and has saved a checkpoint, and the peers of its workers; `launchers` have
    an equal part each."""
    job = Job(world_size, min_workers=world_size if least is None else least, **changes)
    form(job, world_size, launchers)
    job.say("w0", SAVED)
    assert not job.refused
    job.sent.clear()
    job.events.clear()
    return job, [f"w{worker_id}" for worker_id in range(world_size)]


def form(job: Job, world_size: int, launchers: int = 1) -> None:
    for index in range(launchers):
        job.launch(index, world_size // launchers, host=f"node-{index}")
    for worker_id in range(world_size):
        job.hello(worker_id, host=f"node-{worker_id * launchers // world_size}")
    for worker_id in range(world_size):
        generation = job.heard(f"w{worker_id}", Prepare)[-1].generation
        job.say(f"w{worker_id}", Bound(generation=generation, address=f"tcp://w{worker_id}"))
    assert job.told(Form)[-world_size:] == [f"w{worker_id}" for worker_id in range(world_size)]


def leaves(job: Job, peer: str, *, suspended: bool = True) -> None:
    leaving = Leaving(generation=job.quorum.generation, completed=9, suspended=suspended)
    job.say(peer, leaving)
    job.beating.discard(int(peer[1:]))


def exits(job: Job, worker_id: int, code: int = SUSPENDED_CODE, *, launcher: int = 0, **changes: Any) -> None:
    job.beating.discard(worker_id)
    values = {"pid": 1000 + worker_id, "reason": f"process exited with code {code}", **changes}
    job.say(f"l{launcher}", WorkerExited(worker_id=worker_id, code=code, **values))


ORDERS = list(itertools.permutations(["leave 0", "leave 1", "exit 0", "exit 1"]))
FIXED_AND_ELASTIC = pytest.mark.parametrize("least", [2, 1], ids=["fixed", "elastic"])


class TestStoppingAtACheckpoint:
    @FIXED_AND_ELASTIC
    @pytest.mark.parametrize("order", ORDERS, ids=", ".join)
    def test_in_whatever_order_the_words_come(self, least: int, order: tuple[str, ...]) -> None:
        job, _ = ring(2, least=least)
        for step in order:
            what, worker_id = step.split()
            if what == "leave":
                leaves(job, f"w{worker_id}")
            else:
                exits(job, int(worker_id))
            job.sleep(PATIENCE_S / 10)
        assert job.heard("l0", JobDone) == [JobDone(suspended=True)]
        assert (job.finished, job.suspended) == (["all workers have exited"], [True])
        assert not job.told(JobFailed) and not job.told(Lost) and not job.told(Replaceable)
        assert not job.refused
        assert "worker_lost" not in [event["event"] for event in job.events]

    @FIXED_AND_ELASTIC
    def test_words_that_never_come_while_others_say_the_same(self, least: int) -> None:
        job, _ = ring(2, least=least)
        leaves(job, "w0")
        exits(job, 0)
        exits(job, 1)
        job.sleep(PATIENCE_S + 0.2)
        assert job.heard("l0", JobDone) == [JobDone(suspended=True)]

    def test_words_that_never_come_from_anybody_are_a_failure(self) -> None:
        job, _ = ring(2)
        exits(job, 1)
        job.sleep(PATIENCE_S - 0.2)
        assert not job.told(JobFailed) and not job.told(Lost)
        job.sleep(0.4)
        assert job.heard("w0", Lost)[0].reason == "process exited with code 75"
        assert job.heard("l0", JobFailed)[0].code == SUSPENDED_CODE

    def test_words_that_never_come_are_a_loss_to_an_elastic_ring(self) -> None:
        job, _ = ring(3, least=1)
        exits(job, 2)
        job.sleep(PATIENCE_S + 0.2)
        assert job.events[-1]["event"] == "worker_lost"
        assert [seat.worker_id for seat in job.heard("w0", Prepare)[-1].members] == [0, 1]
        assert not job.told(JobFailed)

    def test_an_exit_that_waits_for_words_is_reported_once(self) -> None:
        job, _ = ring(2)
        exits(job, 1)
        exits(job, 1)
        assert job.refused == ["exit reported before"]
        leaves(job, "w1")
        exits(job, 1)
        assert job.refused == ["exit reported before"] * 2

    def test_silence_meanwhile_is_no_loss(self) -> None:
        job, _ = ring(2)
        job.sleep(2.9)
        job.beating.discard(1)
        job.sleep(2.5)
        exits(job, 1)
        job.sleep(0.8)  # its last beat is longer ago than heartbeat_timeout_s
        leaves(job, "w1")
        leaves(job, "w0")
        exits(job, 0)
        assert job.heard("l0", JobDone) == [JobDone(suspended=True)]

    def test_whoever_says_why_it_fails_has_failed(self) -> None:
        job, _ = ring(2)
        job.say("w1", Failing(reason="OSError: disk full", blames=None))
        exits(job, 1)
        assert job.heard("l0", JobFailed)[0].reason == "process exited with code 75: OSError: disk full"

    @FIXED_AND_ELASTIC
    @pytest.mark.parametrize(
        ("suspended", "code"), [(False, SUSPENDED_CODE), (True, 1), (True, 137), (False, 1)]
    )
    def test_another_end_after_shutdown_is_a_failure_as_ever(
        self, least: int, suspended: bool, code: int
    ) -> None:
        job, peers = ring(2, least=least)
        for peer in peers:
            leaves(job, peer, suspended=suspended)
        exits(job, 0, 0)
        exits(job, 1, code)
        assert job.heard("l0", JobFailed)[0].code == code
        assert not job.told(JobDone)

    def test_one_that_is_lost_on_the_way_does_not_matter_to_an_elastic_ring(self) -> None:
        job, _ = ring(3, least=1)
        leaves(job, "w0")
        leaves(job, "w1")
        exits(job, 2, 137)
        exits(job, 0)
        exits(job, 1)
        assert job.heard("l0", JobDone) == [JobDone(suspended=True)]

    def test_a_job_without_launchers(self) -> None:
        job = Job(2)
        for worker_id in range(2):
            job.hello(worker_id)
        for worker_id in range(2):
            job.bind(worker_id)
        leaves(job, "w0")
        leaves(job, "w1")
        assert job.told(AllLeft) == ["w0", "w1"]
        assert (job.finished, job.suspended) == (["all workers have left"], [True])

    def test_a_job_that_ran_to_its_end_did_not_stop(self) -> None:
        job, peers = ring(2)
        for worker_id, peer in enumerate(peers):
            leaves(job, peer, suspended=False)
            exits(job, worker_id, 0)
        assert job.heard("l0", JobDone) == [JobDone(suspended=False)]
        assert job.suspended == [False]

    def test_one_that_ended_while_no_coordinator_was_there(self) -> None:
        job = Job(None, min_workers=2)
        seats = tuple(Seat(worker_id, "node-a", 1000 + worker_id) for worker_id in range(3))
        back = LauncherHello(
            host="node-a",
            address="a",
            slots=3,
            master_port=1,
            encrypt_data=False,
            first_worker_id=0,
            world_size=3,
            session=session_of("l0"),
        )
        job.say("l0", back)
        exits(job, 2)
        for worker_id in range(2):
            peer = f"w{worker_id}"
            job.say(peer, hello_of(worker_id, peer, generation=5, members=seats))
            job.say(peer, Leaving(generation=5, completed=9, suspended=True))
        for worker_id in range(2):
            exits(job, worker_id)
        job.sleep(4.0)
        assert job.heard("l0", JobDone) == [JobDone(suspended=True)]


class TestNotes:
    @pytest.mark.parametrize(
        "name",
        ["checkpoint_saved", "checkpoint_failed", "checkpoint_late", "checkpoint_skipped", "restored"],
    )
    @FIXED_AND_ELASTIC
    def test_members_of_every_ring_may_have_them_written_down(self, least: int, name: str) -> None:
        job, _ = ring(2, least=least)
        job.say("w1", Noted(event={"event": name, "step": 4}))
        [event] = job.events
        assert event == {"event": name, "step": 4, "generation": 1, "worker_id": 1}
        assert name in NOTES and not job.refused


class TestStartingTheRingAgain:
    def fail(self, job: Job, worker_id: int = 1, **changes: Any) -> JobFailed:
        exits(job, worker_id, 137, reason="killed", **changes)
        failed: JobFailed = job.heard("l0", JobFailed)[-1]
        return failed

    @pytest.mark.parametrize("name", ["checkpoint_saved", "restored"])
    def test_a_failure_after_a_checkpoint(self, name: str) -> None:
        job = Job(2, min_workers=2, restarts=RingRestarts(3))
        form(job, 2)
        job.say("w0", Noted(event={"event": name, "step": 3}))
        failed = self.fail(job)
        assert (failed.restarts, failed.code, failed.reason) == (True, 137, "killed")
        assert job.events[-1] == {
            "event": "ring_restarting",
            "reason": "rank 1 (worker 1 on node-0) failed: killed",
            "restarts_left": 2,
            "delay_s": 0.2,
        }
        assert job.again == []
        exits(job, 0, 1)
        assert (job.again, job.finished) == ([0.2], [])

    @pytest.mark.parametrize("name", ["checkpoint_failed", "checkpoint_late", "checkpoint_skipped"])
    def test_without_a_checkpoint_it_is_the_end(self, name: str) -> None:
        job = Job(2, min_workers=2, restarts=RingRestarts(3))
        form(job, 2)
        job.say("w0", Noted(event={"event": name, "step": 3}))
        failed = self.fail(job)
        assert (failed.restarts, failed.reason) == (False, "killed")
        exits(job, 0, 1)
        assert (job.again, job.finished) == ([], ["a worker failed"])

    def test_a_ring_that_gave_its_checkpoints_up_is_not_started_again(self) -> None:
        job, _ = ring(2, restarts=RingRestarts(3))
        job.say("w0", Noted(event={"event": "checkpoints_given_up", "reason": "a later run goes on"}))
        assert not self.fail(job).restarts

    def test_an_elastic_ring_of_which_too_few_remain(self) -> None:
        job, _ = ring(3, least=2, restarts=RingRestarts(1))
        exits(job, 2, 137)
        assert not job.told(JobFailed)
        exits(job, 1, 137)
        failed = job.heard("l0", JobFailed)[0]
        assert failed.restarts and "1 of at least 2 workers (--min-workers) remain" in failed.reason
        exits(job, 0, 1)
        assert job.again == [0.2]

    def test_a_budget_that_is_used_up(self) -> None:
        restarts = RingRestarts(1)
        job, _ = ring(2, restarts=restarts)
        assert self.fail(job).restarts
        job, _ = ring(2, restarts=restarts, first_generation=12)
        failed = self.fail(job)
        assert (failed.restarts, failed.reason) == (
            False,
            "killed; the restarts are used up (--max-restarts 1)",
        )
        exits(job, 0, 1)
        assert (job.again, job.finished, job.suspended) == ([], ["a worker failed"], [False])

    def test_if_another_counts_the_restarts_it_is_told_that_one_is_worth_it(self) -> None:
        job, _ = ring(2)
        assert self.fail(job).restarts
        exits(job, 0, 1)
        assert (job.again, job.finished) == ([], ["a worker failed"])
        assert "ring_restarting" not in [event["event"] for event in job.events]

    def test_not_if_its_launcher_was_told_to_stop(self) -> None:
        job, _ = ring(2, restarts=RingRestarts(3))
        assert not self.fail(job, stopping=True).restarts

    def test_not_without_a_launcher_to_start_workers(self) -> None:
        job = Job(2, min_workers=2, restarts=RingRestarts(3))
        for worker_id in range(2):
            job.hello(worker_id)
        for worker_id in range(2):
            job.bind(worker_id)
        job.say("w0", SAVED)
        job.say("w1", Failing(reason="why", blames=None))
        assert (job.again, job.finished) == ([], ["a worker failed"])

    def test_the_delay_grows_while_the_ring_fails_soon_after_its_workers_were_started(self) -> None:
        restarts = RingRestarts(9)
        delays = []
        now_s = 100.0
        for ran_s in (1.0, 1.0, 61.0, 1.0):
            job = Job(2, min_workers=2, restarts=restarts, now_s=now_s)
            job.sleep(100.0)  # nobody has come: this does not count
            form(job, 2)
            job.say("w0", SAVED)
            job.sleep(ran_s)
            assert self.fail(job).restarts
            exits(job, 0, 1)
            delays += job.again
            now_s = job.now_s
        assert delays == [0.2, 0.4, 0.2, 0.4]

    # What comes after it.

    def hello(self, peer: str, **changes: Any) -> LauncherHello:
        values: dict[str, Any] = {"host": "node-0", "slots": 1, "first_worker_id": None, "world_size": None}
        return LauncherHello(
            address="a",
            master_port=1,
            encrypt_data=False,
            session=session_of(peer),
            **{**values, **changes},
        )

    def ending(self) -> Job:
        """Of two launchers; the worker of the first has ended, and that of the second has not yet."""
        job, _ = ring(2, launchers=2, restarts=RingRestarts(3))
        exits(job, 0, 137)
        assert job.told(JobFailed) == ["l0", "l1"]
        job.say("l0", LauncherLeaving())
        job.sent.clear()
        return job

    def test_launchers_that_are_early_wait_for_it(self) -> None:
        job = self.ending()
        job.say("again", self.hello("again"))
        job.say("again", Ask())
        assert [type(message) for _, message in job.sent] == [Waiting, Waiting]
        job.say("again", Bound(generation=1, address="a"))
        assert job.refused == ["message out of turn"]
        assert job.quorum.launchers == 1
        exits(job, 1, 1, launcher=1)
        assert job.again == [0.2]
        assert [peer for peer, _ in job.quorum.waiting_launchers] == [b"again"]

    def test_one_on_a_new_connection_waits_once_and_one_that_goes_away_no_more(self) -> None:
        job = self.ending()
        job.say("a", self.hello("a"))
        job.say("b", self.hello("b"))
        job.say("new", self.hello("a"))
        assert [peer for peer, _ in job.quorum.waiting_launchers] == [b"b", b"new"]
        job.say("b", LauncherLeaving())
        assert [peer for peer, _ in job.quorum.waiting_launchers] == [b"new"]

    def test_a_launcher_whose_workers_still_end_is_told_again(self) -> None:
        job = self.ending()
        again = self.hello("l1", host="node-1", first_worker_id=1, world_size=2)
        job.say("reconnected", again)
        assert job.heard("reconnected", JobFailed)[0].restarts
        assert job.quorum.waiting_launchers == []

    def test_no_more_wait_than_a_job_can_have(self) -> None:
        room = WaitingRoom()
        hello = self.hello("x")
        for number in range(MAX_WORKERS):
            assert room.enter(b"%d" % number, self.hello(f"x{number}"), "") is None
        assert room.enter(b"x", hello, "") == "too many launchers wait for the next start"
        assert b"x" not in room

    def test_generations_are_numbered_on(self) -> None:
        job, _ = ring(2, restarts=RingRestarts(3))
        assert job.quorum.next_generation == 1 + NUMBERS_SKIPPED + 1
        after, _ = ring(2, first_generation=job.quorum.next_generation)
        assert after.quorum.generation == 12
        assert after.quorum.next_generation == 12 + NUMBERS_SKIPPED + 1

    def test_a_start_in_which_nothing_formed_uses_no_numbers(self) -> None:
        assert Job(2, first_generation=12).quorum.next_generation == 12

    @pytest.mark.parametrize("formed", [False, True])
    @FIXED_AND_ELASTIC
    def test_workers_of_an_earlier_start_are_over(self, least: int, formed: bool) -> None:
        job = Job(2, min_workers=least, first_generation=12)
        job.launch(0, 2)
        if formed:
            form_workers(job)
        seats = tuple(Seat(worker_id, "node-a", 1000 + worker_id) for worker_id in range(2))
        for worker_id in range(2):
            old = f"old{worker_id}"
            job.say(old, hello_of(worker_id, old, generation=1, members=seats))
            [refused] = job.heard(old, Refused)
            assert "generation 1 is over, the whole ring was started again" in refused.reason
        assert job.refused == ["generation is over"] * 2
        if not formed:
            form_workers(job)
        assert job.quorum.generation == 12

    def test_a_launcher_of_an_earlier_start_is_refused(self) -> None:
        job = Job(2, min_workers=2, first_generation=12)
        job.say("old", self.hello("old", slots=2, first_worker_id=0, world_size=2))
        assert "the whole ring was started again" in job.heard("old", Refused)[0].reason
        job.launch(0, 2)
        assert job.heard("l0", Assignment)[0].world_size == 2

    def test_a_launcher_of_this_start_comes_back_as_ever(self) -> None:
        job, _ = ring(2, first_generation=12)
        job.say("new", self.hello("l0", slots=2, first_worker_id=0, world_size=2))
        assert job.heard("new", Assignment)[0].first_worker_id == 0

    def test_a_coordinator_s_settings_are_checked(self) -> None:
        with pytest.raises(ValueError, match="max_restarts must be at least 0, not -1"):
            CoordinatorSettings(max_restarts=-1)
        with pytest.raises(ValueError, match="first_generation must be at least 1, not 0"):
            CoordinatorSettings(first_generation=0)


def form_workers(job: Job) -> None:
    """Two workers form the first generation of this start."""
    for worker_id in range(2):
        job.hello(worker_id)
    for worker_id in range(2):
        generation = job.heard(f"w{worker_id}", Prepare)[-1].generation
        job.say(f"w{worker_id}", Bound(generation=generation, address="a"))
    assert job.told(Form) == ["w0", "w1"]


class TestRingRestarts:
    def delays(self, restarts: RingRestarts, *ran_s: float) -> list[float]:
        now_s, delays = 0.0, []
        for duration_s in ran_s:
            restarts.began(now_s)
            now_s += duration_s
            planned, _ = restarts.plan(now_s)
            assert planned is not None
            delays.append(planned.delay_s)
        return delays

    def test_the_delay_doubles_up_to_its_limit_while_the_ring_fails_soon(self) -> None:
        ran_s = [1.0] * 4 + [59.9, 1.0, 1.0, 60.0, 1.0]
        assert self.delays(RingRestarts(9), *ran_s) == pytest.approx(
            [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 0.2, 0.4]
        )
        assert max(self.delays(RingRestarts(2000), *[0.0] * 2000)) == 10.0

    def test_the_times_are_parameters(self) -> None:
        restarts = RingRestarts(9, first_delay_s=1.0, longest_delay_s=3.0, settled_s=5.0)
        assert self.delays(restarts, 0.0, 0.0, 0.0, 5.0, 0.0) == [1.0, 2.0, 3.0, 1.0, 2.0]

    def test_the_budget_is_shared_with_what_was_spent_on_something_else(self) -> None:
        restarts = RingRestarts(3)
        planned, words = restarts.plan(0.0, spent=1)
        assert planned is not None and planned.restarts_left == 1
        assert words == "starting the whole ring again from the latest checkpoint (1 of 3 restarts left)"
        assert restarts.plan(0.0, spent=2) == (None, "the restarts are used up (--max-restarts 3)")
        assert restarts.plan(0.0, spent=5)[0] is None
        assert restarts.plan(0.0, spent=1)[0] is not None
        assert restarts.planned == 2
        assert restarts.plan(0.0, spent=1)[0] is None

    def test_a_ring_whose_start_was_not_seen_did_not_fail_soon(self) -> None:
        restarts = RingRestarts(9)
        assert self.delays(restarts, 0.0, 0.0) == [0.2, 0.4]
        planned, _ = restarts.plan(1.0)
        assert planned is not None and planned.delay_s == 0.2

    def test_none_at_all(self) -> None:
        assert RingRestarts(0).plan(0.0) == (None, "the restarts are used up (--max-restarts 0)")
