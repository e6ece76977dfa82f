"""The coordinator's decisions about a job whose launchers are pods: they have fixed places, come and go, and
the job outlives them all, and its coordinators too."""

from __future__ import annotations

from typing import Any

import pytest

from ringps.membership.events import Charged, Fenced, Outside, Placed, Recorded, Vanished, Warned
from ringps.membership.placed import OUSTED_S
from ringps.membership.restarts import RingRestarts
from ringps.membership.restoration import RETURN_PATIENCE_S
from ringps.membership.returning import NUMBERS_SKIPPED
from ringps.membership.surroundings import Budget, Surroundings
from ringps.wire.control import (
    Admitting,
    AllLeft,
    Ask,
    Assignment,
    Bound,
    Departing,
    Evict,
    Expelled,
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
from ringps.wire.rules import Seat
from ringps.worker_env import SUSPENDED_CODE
from tests.quorum_job import TIMEOUTS, Job, hello_of, session_of

SETTLE_S = 5.0
SHUTDOWN_S = TIMEOUTS.shutdown_timeout_s


class Pods(Job):
    """A job of pods. A pod `p0` runs worker 0: its launcher's peer is `p0`, its worker's `w0`, both on host
    `p0`; the next pod of that place is `p0b` with `w0b`, and so on."""

    def __init__(
        self, world_size: int = 3, least: int | None = None, *, budget: Budget | None = None, **changes: Any
    ) -> None:
        self.around = changes.pop("surroundings", None) or Surroundings(budget or Budget(3))
        changes.setdefault("restarts", RingRestarts(None))
        super().__init__(
            world_size,
            min_workers=world_size if least is None else least,
            settle_s=SETTLE_S,
            pods=True,
            surroundings=self.around,
            **changes,
        )
        self.world_size = world_size
        self.pids: dict[str, int] = {}

    def tell(self, event: Outside) -> None:
        self.take(self.quorum.handle(event, self.now_s))

    def pod(self, name: str, *, back: bool = False, session: str = "", peer: str = "") -> None:
        """The launcher of a pod says hello."""
        place = int(name[1])
        hello = LauncherHello(
            host=name,
            address="10.0.0.1",
            slots=1,
            master_port=29500,
            encrypt_data=False,
            first_worker_id=place if back else None,
            world_size=self.world_size if back else None,
            place=place,
            session=session_of(session or name),
        )
        self.say(peer or name, hello)

    def worker(self, name: str, pid: int = 7, *, peer: str = "", **changes: Any) -> None:
        """A worker's process says hello; all pods have the same pids."""
        worker_id = int(name[1])
        peer = peer or "w" + name[1:]
        hello = hello_of(worker_id, "w" + name[1:], host=name, pid=pid, **changes)
        self.say(peer, hello)
        self.beating.add(worker_id)

    def bind_all(self, *names: str) -> None:
        for name in names:
            peer = "w" + name[1:]
            generation = self.heard(peer, Prepare)[-1].generation
            self.say(peer, Bound(generation=generation, address=f"tcp://{peer}"))

    def leave(self, *names: str, suspended: bool = False) -> None:
        for name in names:
            self.beating.discard(int(name[1]))
            leaving = Leaving(generation=self.quorum.generation, completed=9, suspended=suspended)
            self.say("w" + name[1:], leaving)

    def exits(self, name: str, code: int, *, pid: int = 7, stopping: bool = False, peer: str = "") -> None:
        """A pod's launcher reports an exit."""
        reason = f"process exited with code {code}"
        exited = WorkerExited(worker_id=int(name[1]), pid=pid, code=code, reason=reason, stopping=stopping)
        self.say(peer or name, exited)

    def all_exit(self, code: int, *names: str) -> None:
        for name in names:
            self.exits(name, code)

    def members(self, peer: str) -> list[int]:
        return [seat.worker_id for seat in self.heard(peer, Prepare)[-1].members]

    def names(self) -> list[str]:
        return [event["event"] for event in self.events]

    def again_with(self, least: int | None = None) -> Pods:
        """The next start of the ring, as the coordinator begins it."""
        assert self.again
        self.around.recorded = False
        after = Pods(
            self.world_size,
            least,
            surroundings=self.around,
            first_generation=self.quorum.next_generation,
            again=True,
            now_s=self.now_s,
        )
        for peer, hello in self.quorum.waiting_launchers:
            after.say(peer.decode(), hello)
        return after


def running(world_size: int = 3, least: int = 1, **changes: Any) -> Pods:
    """A ring of pods `p0`, `p1`... that has formed and takes joiners."""
    job = Pods(world_size, least, **changes)
    names = [f"p{worker_id}" for worker_id in range(world_size)]
    for name in names:
        job.pod(name)
    assert job.told(Assignment) == names
    for name in names:
        job.worker(name)
    job.bind_all(*names)
    assert job.told(Form) == [f"w{name[1:]}" for name in names]
    if least < world_size:
        job.say("w0", Admitting(generation=job.quorum.generation))
    assert not job.refused
    job.sent.clear()
    job.events.clear()
    return job


def restarted(
    world_size: int = 3, least: int = 1, *, back: str = "", launchers: str = "", **changes: Any
) -> Pods:
    """Another coordinator takes the place of one that had formed generation 5; the workers and launchers
    with these ids come back at once."""
    job = Pods(world_size, least, **{"first_generation": 5, "follows": True, **changes})
    for digit in launchers:
        job.pod(f"p{digit}", back=True)
    for digit in back:
        come_back(job, f"p{digit}")
    return job


def come_back(job: Pods, name: str, generation: int = 5) -> None:
    seats = tuple(Seat(worker_id, f"p{worker_id}", 7) for worker_id in range(job.world_size))
    job.worker(name, generation=generation, members=seats)


FIXED_AND_ELASTIC = pytest.mark.parametrize("least", [3, 1], ids=["fixed", "elastic"])


class TestPlaces:
    @FIXED_AND_ELASTIC
    def test_in_whatever_order_they_come(self, least: int) -> None:
        job = Pods(3, least)
        for name in ("p2", "p0", "p1"):
            assert not job.told(Assignment)
            job.pod(name)
        given = {
            peer: message.first_worker_id for peer, message in job.sent if isinstance(message, Assignment)
        }
        assert given == {"p0": 0, "p1": 1, "p2": 2}

    def test_places_that_the_job_does_not_have(self) -> None:
        job = Pods(3)
        job.pod("p3")
        job.launch(0, 1)
        assert (
            job.heard("p3", Refused)[0].reason
            == "this launcher has worker ids 3..3, and the job has 3 workers"
        )
        assert "start its launchers with --worker-id" in job.heard("l0", Refused)[0].reason
        assert job.quorum.launchers == 0

    def test_an_elastic_ring_starts_without_those_that_do_not_come(self) -> None:
        job = Pods(3, 2)
        job.pod("p0")
        job.pod("p2")
        job.sleep(SETTLE_S - 0.2)
        assert not job.told(Assignment)
        assert job.events[-1]["reason"] == "2 of 3 workers' pods have come (missing: worker 1)"
        job.sleep(0.4)
        assert job.told(Assignment) == ["p0", "p2"]
        job.worker("p0")
        job.worker("p2")
        assert job.members("w0") == [0, 2]
        assert job.heard("w0", Prepare)[0].reason == "2 of 3 workers have come, and no other for 5 s"

    def test_fewer_than_it_needs_wait_however_long(self) -> None:
        job = Pods(3, 2)
        job.pod("p0")
        job.sleep(10 * SETTLE_S)
        assert not job.told(Assignment)

    def test_one_that_comes_while_the_first_ring_forms_waits_until_it_has(self) -> None:
        """Its worker would be refused by a ring that is complete."""
        job = Pods(3, 2)
        job.pod("p0")
        job.pod("p2")
        job.sleep(SETTLE_S + 0.2)
        job.worker("p0")
        job.worker("p2")
        job.pod("p1")
        job.say("p1", Ask())
        assert [type(message) for message in job.heard("p1", object)] == [Waiting, Waiting]
        job.bind_all("p0", "p2")
        assert job.told(Form) == ["w0", "w2"]
        assert job.heard("p1", Assignment)

    def test_one_that_comes_before_the_first_ring_forms_is_waited_for(self) -> None:
        job = Pods(3, 2)
        job.pod("p0")
        job.pod("p2")
        job.sleep(SETTLE_S + 0.2)
        job.worker("p0")
        job.pod("p1")
        job.worker("p2")
        assert not job.told(Prepare)
        job.worker("p1")
        assert job.members("w0") == [0, 1, 2]

    @pytest.mark.parametrize("how", ["vanished", "left"])
    @pytest.mark.parametrize("complete", [False, True])
    def test_a_launcher_that_is_gone_before_its_worker_came(self, how: str, complete: bool) -> None:
        job = Pods(3, 2)
        job.pod("p0")
        job.pod("p1")
        if complete:
            job.pod("p2")
            job.worker("p0")
            job.worker("p2")
        job.tell(Vanished(host="p1", reason="gone")) if how == "vanished" else job.say(
            "p1", LauncherLeaving()
        )
        if complete:
            job.sleep(SETTLE_S + 0.2)
            assert job.members("w0") == [0, 2]
        else:
            job.sleep(SETTLE_S + 0.2)
            assert not job.told(Assignment)
        assert not job.told(Lost)

    def test_a_fixed_ring_waits_for_the_successor_of_one_that_is_gone(self) -> None:
        job = Pods(3)
        for name in ("p0", "p1", "p2"):
            job.pod(name)
        job.worker("p0")
        job.worker("p2")
        job.tell(Vanished(host="p1", reason="gone"))
        job.sleep(SETTLE_S + 0.2)
        assert not job.told(Prepare)
        assert job.events[-1]["reason"].endswith("(missing: worker 1)")
        job.pod("p1b")
        assert job.heard("p1b", Assignment)[0].first_worker_id == 1
        job.worker("p1b")
        assert job.members("w0") == [0, 1, 2]

    def test_a_pod_that_is_gone_without_a_word_is_succeeded_too(self) -> None:
        job = Pods(2)
        job.pod("p0")
        job.pod("p1")
        job.pod("p1b")
        assert job.told(Refused) == ["p1"]
        assert job.told(Assignment) == ["p0", "p1", "p1b"]

    def test_two_living_pods_of_one_place_do_not_take_turns(self) -> None:
        job = Pods(2)
        job.pod("p0")
        job.pod("p1")
        job.pod("p1b")
        job.pod("p1", session="again", peer="again")
        assert not job.heard("again", Assignment)
        assert "p1b has come in the place of p1" in job.heard("again", Waiting)[0].reason
        job.tell(Vanished(host="p1b", reason="gone"))
        assert job.heard("again", Assignment)

    def test_one_that_had_to_go_may_come_again_after_a_while(self) -> None:
        """The other one may have died, and no operator may know of it."""
        job = Pods(2)
        for name in ("p0", "p1", "p1b"):
            job.pod(name)
        job.pod("p1", session="again", peer="again")
        job.sleep(OUSTED_S - 1)
        assert not job.heard("again", Assignment)
        job.sleep(2.0)
        assert job.heard("again", Assignment)

    def test_a_machine_that_is_gone_gets_no_place(self) -> None:
        job = Pods(2)
        job.tell(Vanished(host="p1", reason="its node is gone"))
        job.pod("p1")
        assert job.heard("p1", Waiting)[0].reason == "p1 is gone: its node is gone"
        assert job.quorum.launchers == 0

    def test_places_make_the_ring_order(self) -> None:
        job = Pods(4)
        for worker_id, zone in enumerate("baba"):
            job.tell(Placed(host=f"p{worker_id}", place=(zone, "", f"n{worker_id}")))
            job.pod(f"p{worker_id}")
        for worker_id in range(4):
            job.worker(f"p{worker_id}")
        assert job.members("w0") == [1, 3, 0, 2]


class TestWarnings:
    REASON = "preempted by the scheduler"

    def warn(self, job: Pods, name: str = "p1") -> None:
        job.tell(Warned(pods=((int(name[1]), name),), reason=self.REASON))

    def test_a_pod_is_asked_to_leave_once(self) -> None:
        job = running()
        self.warn(job)
        self.warn(job)
        assert job.heard("p1", Evict) == [Evict(worker_id=1, reason=self.REASON)]

    def test_never_its_successor(self) -> None:
        job = running()
        self.warn(job, "p1a")
        assert not job.told(Evict)

    def test_one_that_comes_later_and_one_on_a_new_connection(self) -> None:
        job = Pods(2)
        self.warn(job)
        job.pod("p1")
        assert not job.told(Evict)
        job.pod("p0")
        assert job.told(Evict) == ["p1"]
        job.pod("p1", peer="new")
        assert job.told(Evict) == ["p1", "new"]


class TestVanishing:
    def test_a_member_is_lost_at_once(self) -> None:
        job = running()
        job.tell(Vanished(host="p1", reason="pod p1: drained"))
        assert job.members("w0") == [0, 2]
        assert [event["reason"] for event in job.events] == ["pod p1: drained"]
        assert not job.told(Expelled)
        job.pod("p1b")
        assert job.heard("p1b", Assignment)

    def test_its_successor_is_not(self) -> None:
        job = running()
        job.tell(Vanished(host="p1", reason="gone"))
        job.bind_all("p0", "p2")
        job.pod("p1b")
        job.worker("p1b")
        job.tell(Vanished(host="p1", reason="gone again"))
        job.sleep(1.0)
        assert job.quorum.generation == 2
        assert job.names().count("worker_lost") == 1 and "joiner_lost" not in job.names()

    def test_between_preparing_and_forming(self) -> None:
        job = running(4)
        job.tell(Vanished(host="p1", reason="gone"))
        job.bind_all("p0")
        job.tell(Vanished(host="p2", reason="gone"))
        assert job.members("w0") == [0, 3]
        job.bind_all("p0", "p3")
        assert job.heard("w0", Form)[-1].generation == 3

    @pytest.mark.parametrize("bound", [False, True])
    def test_while_the_first_ring_forms(self, bound: bool) -> None:
        job = Pods(2, 1)
        for name in ("p0", "p1"):
            job.pod(name)
            job.worker(name)
        if bound:
            job.bind_all("p1")
        job.tell(Vanished(host="p1", reason="gone"))
        assert job.told(Lost) == ["w0"]
        assert job.heard("p0", JobFailed)[0].restarts
        job.exits("p0", 1)
        assert job.again == [0.2] and "restart_charged" not in job.names()

    def test_a_joiner(self) -> None:
        job = running()
        job.tell(Vanished(host="p1", reason="gone"))
        job.bind_all("p0", "p2")
        job.pod("p1b")
        job.worker("p1b")
        job.tell(Vanished(host="p1b", reason="gone"))
        assert job.names()[-1] == "joiner_lost"
        job.pod("p1c")
        assert job.heard("p1c", Assignment)

    def test_one_whose_script_is_done_holds_up_nobody(self) -> None:
        for least in (2, 1):
            job = running(2, least)
            job.leave("p0", "p1")
            job.exits("p0", 0)
            assert not job.records
            job.tell(Vanished(host="p1", reason="gone"))
            assert job.records == ["done"]

    def test_a_fixed_ring_starts_again_without_a_charge(self) -> None:
        job = running(3, 3)
        job.tell(Vanished(host="p1", reason="gone"))
        assert job.told(Lost) == ["w0", "w2"]
        job.pod("p1b")
        assert job.heard("p1b", Waiting) and not job.heard("p1b", Assignment)
        job.all_exit(1, "p0", "p2")
        assert job.again == [0.2] and "restart_charged" not in job.names()
        after = job.again_with()
        after.pod("p0", session="anew0", peer="p0")
        after.pod("p2", session="anew2", peer="p2")
        assert sorted(after.told(Assignment)) == ["p0", "p1b", "p2"]

    def test_a_pod_that_waits_for_its_place(self) -> None:
        job = running(3, 3)
        job.tell(Vanished(host="p1", reason="gone"))
        job.pod("p1b")
        job.tell(Vanished(host="p1b", reason="gone"))
        assert job.quorum.waiting_launchers == []

    def test_everybody(self) -> None:
        for least in (3, 1):
            job = running(3, least)
            for worker_id in range(3):
                job.beating.discard(worker_id)
                job.tell(Vanished(host=f"p{worker_id}", reason="gone"))
            job.sleep(SHUTDOWN_S + 1)
            assert job.again == [0.2] and not job.records


class TestBudget:
    def test_each_failure_counts_once(self) -> None:
        job = running()
        job.exits("p1", 1)
        job.tell(Vanished(host="p1", reason="failed"))
        job.tell(Charged(worker_id=1, reason="failed", host="p1"))
        assert job.around.budget is not None and job.around.budget.used == 1

    def test_an_exception_in_an_elastic_ring_counts(self) -> None:
        """The worker's own words come first, and end its membership."""
        job = running()
        job.say("w1", Failing(reason="ValueError: x", blames=None))
        job.exits("p1", 1)
        assert [event["restarts_left"] for event in job.events if event["event"] == "restart_charged"] == [2]

    @pytest.mark.parametrize("how", ["blames another", "was silent", "was told to stop", "departed"])
    def test_what_does_not_count(self, how: str) -> None:
        job = running()
        match how:
            case "blames another":
                job.say("w1", Failing(reason="PeerLostError", blames=2))
            case "was silent":
                job.sleep(0.5)
                job.beating.discard(1)
                job.sleep(3.5)
            case "departed":
                job.say("w1", Departing(generation=1, step=3))
        job.exits("p1", 1, stopping=how == "was told to stop")
        job.sleep(0.2)
        assert "restart_charged" not in job.names()

    def test_failures_of_pods_that_nobody_heard_of_count_each(self) -> None:
        job = running()
        for name in ("p1", "p1b", "p1c"):
            job.tell(Vanished(host=name, reason="out of memory"))
            job.tell(Charged(worker_id=1, reason="out of memory", host=name))
        assert job.around.budget is not None and job.around.budget.used == 3

    def test_nothing_is_held_against_a_successor(self) -> None:
        """A coordinator that was restarted hears late of a pod's end."""
        for host in ("p1a", ""):
            job = running()
            job.tell(Charged(worker_id=1, reason="out of memory", host=host))
            job.exits("p1", 1)
            assert job.around.budget is not None and job.around.budget.used == 2

    def test_once_it_is_used_up_nobody_takes_the_place(self) -> None:
        job = running(3, 1, budget=Budget(0))
        job.exits("p1", 1)
        job.bind_all("p0", "p2")
        assert not job.told(Replaceable)
        job.tell(Vanished(host="p1", reason="gone"))
        job.pod("p1b")
        assert "nobody replaces it" in job.heard("p1b", Waiting)[0].reason
        job.leave("p0", "p2")
        job.all_exit(0, "p0", "p2")
        job.tell(Recorded())
        assert sorted(job.told(JobDone)) == ["p0", "p1", "p1b", "p2"]

    def test_it_ends_a_fixed_ring(self) -> None:
        job = running(2, 2, budget=Budget(0))
        job.exits("p1", 3)
        [record] = job.records
        assert record == "failed: process exited with code 3; the restarts are used up (--max-restarts 0)"
        assert not job.told(JobFailed)
        job.tell(Recorded())
        assert job.told(JobFailed) == ["p0", "p1"]
        assert not job.heard("p0", JobFailed)[0].restarts

    def test_a_fixed_ring_whose_pods_are_killed_ends_too(self) -> None:
        """That the pod's end counts is known only once the ring is about to start again."""
        job = running(2, 2, budget=Budget(0))
        job.tell(Vanished(host="p1", reason="out of memory"))
        assert job.heard("p0", JobFailed)[0].restarts
        job.tell(Charged(worker_id=1, reason="out of memory", host="p1"))
        job.exits("p0", 1)
        after = job.again_with()
        after.pod("p0", session="anew", peer="anew")
        after.tick()
        assert after.records == ["failed: out of memory; the restarts are used up (--max-restarts 0)"]
        after.tell(Recorded())
        after.tick()
        assert not after.heard("anew", JobFailed)[0].restarts

    @FIXED_AND_ELASTIC
    def test_pods_that_fail_before_any_ring_end_the_job(self, least: int) -> None:
        job = Pods(3, least, budget=Budget(1))
        job.pod("p0")
        for count, name in enumerate(("p1", "p1b", "p2", "p2b")):
            job.tell(Charged(worker_id=int(name[1]), reason="out of memory", host=name))
            job.tick()
            # An elastic ring can do with fewer, until too few are left.
            assert bool(job.records) is (least == 3 and count >= 1)
        if least == 1:
            job.tell(Charged(worker_id=0, reason="out of memory", host="p0"))
            job.tick()
        assert job.records == ["failed: out of memory; the restarts are used up (--max-restarts 1)"]

    def test_what_the_cluster_takes_is_replaced_even_after_that(self) -> None:
        job = running(4, 2, budget=Budget(0))
        job.exits("p3", 1)
        job.bind_all("p0", "p1", "p2")
        job.tell(Vanished(host="p2", reason="preempted"))
        job.bind_all("p0", "p1")
        job.tell(Vanished(host="p1", reason="preempted"))
        assert job.heard("p0", JobFailed)[0].restarts and not job.records

    def test_an_elastic_ring_that_always_fails_ends(self) -> None:
        job = Pods(2, 1, budget=Budget(2))
        for start in range(3):
            for worker_id in range(2):
                job.pod(f"p{worker_id}", session=f"{start}-{worker_id}")
            job.exits("p1", 3)
            job.exits("p0", 3)
            if start < 2:
                job = job.again_with(1)
        assert len(job.records) == 1 and "used up (--max-restarts 2)" in job.records[0]


class TestTheEnd:
    def done(self, least: int = 1) -> Pods:
        job = running(2, least)
        job.leave("p0", "p1")
        job.all_exit(0, "p0", "p1")
        return job

    @pytest.mark.parametrize("least", [2, 1])
    def test_nobody_hears_of_it_before_it_is_written_down(self, least: int) -> None:
        job = self.done(least)
        job.pod("p1b")
        job.sleep(SHUTDOWN_S + 1)
        assert job.records == ["done"] and not job.told(JobDone)
        job.tell(Recorded())
        job.tell(Recorded())
        assert sorted(job.told(JobDone)) == ["p0", "p1", "p1b"]
        assert job.finished == ["all workers have exited"]

    def test_what_comes_after_the_verdict_changes_nothing(self) -> None:
        job = self.done(2)
        job.say("w0", Failing(reason="too late", blames=None))
        job.sleep(TIMEOUTS.heartbeat_timeout_s + 1)
        assert job.records == ["done"]
        job.tell(Recorded())
        assert not job.told(JobFailed)

    def test_another_s_verdict_is_not_taken_for_ours(self) -> None:
        job = running(2)
        job.tell(Recorded())
        job.leave("p0", "p1")
        job.all_exit(0, "p0", "p1")
        assert job.records == ["done"] and not job.told(JobDone)

    @pytest.mark.parametrize("back", [False, True])
    def test_a_later_coordinator_knows_of_it(self, back: bool) -> None:
        job = Pods(2, verdict="failed: why")
        job.pod("p0", back=back)
        [failed] = job.heard("p0", JobFailed)
        assert (failed.reason, failed.restarts) == ("why", False)
        job = Pods(2, verdict="done")
        job.pod("p0", back=back)
        assert job.heard("p0", JobDone) == [JobDone(suspended=False)]
        assert not job.records

    def test_an_elastic_ring_of_which_one_never_joined(self) -> None:
        job = Pods(3, 2)
        job.pod("p0")
        job.pod("p2")
        job.sleep(SETTLE_S + 0.2)
        for name in ("p0", "p2"):
            job.worker(name)
        job.bind_all("p0", "p2")
        job.pod("p1")
        assert job.heard("p1", Assignment)
        job.leave("p0", "p2")
        job.worker("p1")
        assert job.heard("w1", AllLeft)
        job.all_exit(0, "p0", "p2")
        job.tell(Recorded())
        assert sorted(job.told(JobDone)) == ["p0", "p1", "p2"]

    @FIXED_AND_ELASTIC
    def test_stopping_at_a_checkpoint_is_not_the_end(self, least: int) -> None:
        job = running(3, least)
        job.leave("p1", suspended=True)
        job.exits("p1", SUSPENDED_CODE)
        job.pod("p1b")
        assert not job.heard("p1b", Assignment)
        job.leave("p0", "p2", suspended=True)
        job.all_exit(SUSPENDED_CODE, "p0", "p2")
        assert job.heard("p0", JobDone) == [JobDone(suspended=True)]
        assert job.again == [0.0] and not job.records and not job.finished
        assert [peer for peer, _ in job.quorum.waiting_launchers] == [b"p1b"]  # it need not come again
        after = job.again_with(least)
        after.pod("p0", session="a", peer="p0")
        after.pod("p2", session="b", peer="p2")
        assert sorted(after.told(Assignment)) == ["p0", "p1b", "p2"]

    def test_a_ring_that_gave_its_checkpoints_up_fails_for_good(self) -> None:
        job = running(2, 2)
        job.say("w0", Noted(event={"event": "checkpoints_given_up", "reason": "a later run goes on"}))
        job.tell(Vanished(host="p1", reason="gone"))
        assert job.records == ["failed: gone"]

    def test_a_launcher_of_an_earlier_start_starts_anew(self) -> None:
        job = running(2, 2)
        job.tell(Vanished(host="p1", reason="gone"))
        job.exits("p0", 1)
        after = job.again_with()
        after.pod("p0", back=True, peer="reconnected")
        assert "start anew" in after.heard("reconnected", Refused)[0].reason


class TestAnotherCoordinator:
    def test_numbers_only_grow(self) -> None:
        for formed in (1, 5):
            job = restarted(2, 2, first_generation=formed)
            for name in ("p0", "p1"):
                job.pod(name)
                job.worker(name)
            assert job.quorum.generation == formed + NUMBERS_SKIPPED + 1
        job = Pods(2)
        for name in ("p0", "p1"):
            job.pod(name)
            job.worker(name)
        assert job.quorum.generation == 1

    def test_nor_if_nothing_has_formed_since(self) -> None:
        job = restarted(2, 2)
        assert job.quorum.next_generation == 5 + NUMBERS_SKIPPED + 1
        job.pod("p0")
        job.pod("p1")
        job.exits("p0", 1)
        job.exits("p1", 1)
        after = job.again_with()
        for name in ("p0", "p1"):
            after.pod(name)
            after.worker(name)
        assert after.quorum.generation == 5 + NUMBERS_SKIPPED + 1

    def test_new_launchers_that_came_before_one_that_is_back_get_their_ids_with_it(self) -> None:
        job = restarted(4, 1)
        job.pod("p2")
        job.pod("p0")
        assert not job.told(Assignment)
        job.pod("p1", back=True)
        given = {
            name: [told.first_worker_id for told in job.heard(name, Assignment)]
            for name in ("p0", "p1", "p2")
        }
        assert given == {"p0": [0], "p1": [1], "p2": [2]}
        job.pod("p3", back=True)
        assert sorted(job.told(Assignment)) == ["p0", "p1", "p2", "p3"]

    def test_a_ring_does_not_form_of_those_that_come_back_first(self) -> None:
        """Before the first generation has formed, all say hello again, one after the other."""
        for least in (3, 1):
            job = Pods(3, least)
            for worker_id in range(3):
                job.pod(f"p{worker_id}", back=True)
                job.worker(f"p{worker_id}")
                assert bool(job.told(Prepare)) is (worker_id == 2)
            assert job.members("w0") == [0, 1, 2]

    def test_the_job_is_not_done_with_those_that_come_back_first(self) -> None:
        job = restarted(3, 1)
        job.pod("p0", back=True)
        job.exits("p0", 0)
        job.sleep(TIMEOUTS.heartbeat_timeout_s + 1)
        assert not job.records
        for name in ("p1", "p2"):
            job.pod(name, back=True)
            job.exits(name, 0)
        job.sleep(TIMEOUTS.heartbeat_timeout_s + 0.5)
        assert job.records == ["done"]

    @FIXED_AND_ELASTIC
    def test_a_launcher_that_is_back_later_than_the_end_is_heard(self, least: int) -> None:
        job = restarted(3, least, back="012", launchers="01")
        job.leave("p0", "p1", "p2")
        job.all_exit(0, "p0", "p1")
        job.sleep(1.0)
        assert not job.records
        job.pod("p2", back=True)
        job.exits("p2", 0)
        assert not job.refused
        assert job.records == ["done"]

    @FIXED_AND_ELASTIC
    def test_those_whose_scripts_are_done_need_not_come_back(self, least: int) -> None:
        job = restarted(3, least, back="012")
        job.leave("p0", "p1", "p2")
        for name in ("p0", "p1", "p2"):
            assert not job.records
            job.tell(Vanished(host=name, reason="drained"))
        assert job.records == ["done"]

    def test_a_successor_shows_that_one_whose_script_is_done_is_gone(self) -> None:
        job = restarted(2, 1, back="01", launchers="0")
        job.leave("p0", "p1")
        job.exits("p0", 0)
        job.sleep(1.0)
        assert not job.records
        job.pod("p1b")
        job.tick()
        assert job.records == ["done"]

    def test_what_a_launcher_reports_while_it_waits_is_kept(self) -> None:
        job = restarted(2, 1, back="01", launchers="0")
        for name in ("p1", "p1b"):
            job.pod(name, back=True)
        assert "still; waiting for its end" in job.heard("p1b", Waiting)[0].reason
        job.exits("p1b", 3, pid=9)
        job.exits("p0b", 3, peer="p1b")
        assert job.refused == ["launcher does not own this worker"]
        job.tell(Vanished(host="p1", reason="gone"))
        assert job.heard("p1b", Assignment)
        assert job.names()[-2:] == ["joiner_lost", "restart_charged"]

    def test_a_launcher_that_is_back_later_than_a_failure_is_heard(self) -> None:
        job = restarted(3, 3, back="012", launchers="01")
        job.exits("p1", 1)
        assert job.told(Lost)
        job.pod("p2", back=True)
        assert job.heard("p2", JobFailed)[0].restarts
        job.exits("p2", 1)
        job.exits("p0", 1)
        assert job.again == [0.2] and not job.refused

    def test_members_that_are_known_to_be_gone_count_as_accounted_for(self) -> None:
        job = restarted(3, 1)
        job.tell(Vanished(host="p1", reason="its node is gone"))
        come_back(job, "p0")
        assert job.members("w0") == [0, 2]  # worker 2 may yet come
        job.sleep(RETURN_PATIENCE_S - 1)
        assert job.members("w0") == [0, 2]
        job.sleep(1.5)
        assert job.members("w0") == [0]
        assert {event["reason"] for event in job.events if event["event"] == "worker_lost"} >= {
            "its node is gone"
        }

    @pytest.mark.parametrize("successor", [("p1b", 7), ("p1", 8)], ids=["another pod", "another process"])
    def test_members_whose_place_another_process_has(self, successor: tuple[str, int]) -> None:
        job = restarted(2, 1)
        name, pid = successor
        job.pod("p0", back=True)
        job.pod(name)
        peer = "j1"
        job.worker(name, pid, peer=peer, session=session_of("j1"))
        come_back(job, "p0")
        assert job.members("w0") == [0]
        assert not job.heard(peer, Refused)
        job.bind_all("p0")
        assert job.quorum.generation == 5 + NUMBERS_SKIPPED + 1
        assert "restart_charged" not in job.names()

    def test_a_fixed_ring_whose_places_others_have_starts_again(self) -> None:
        job = restarted(3, 3)
        for name in ("p1b", "p2b"):
            job.pod(name)
            job.worker(name)
        job.pod("p0", back=True)
        come_back(job, "p0")
        assert job.heard("p0", JobFailed)[0].restarts
        assert job.heard("w0", Lost)
        assert "restart_charged" not in job.names()

    def test_a_minority_is_never_enough(self) -> None:
        """The others may go on with the earlier coordinator, which needs no Lease for that."""
        job = restarted(3, 1, back="0", launchers="0")
        job.sleep(600.0)
        assert "coordinator_restored" not in job.names()
        job.tell(Vanished(host="p1", reason="gone"))
        assert "coordinator_restored" in job.names()

    def test_what_the_cluster_says_counts_only_with_the_lease(self) -> None:
        job = restarted(3, 1)
        job.tell(Fenced(held=False))
        job.tell(Vanished(host="p1", reason="gone"))
        come_back(job, "p0")
        job.sleep(60.0)
        assert "coordinator_restored" not in job.names()

    @pytest.mark.parametrize("how", ["vanishes", "fails", "is silent"])
    @pytest.mark.parametrize("least", [5, 1], ids=["fixed", "elastic"])
    def test_a_new_pod_that_is_gone_does_not_end_the_ring_that_comes_back(self, how: str, least: int) -> None:
        job = restarted(5, least, back="0", launchers="0")
        job.pod("p1b")
        job.worker("p1b")
        match how:
            case "vanishes":
                job.tell(Vanished(host="p1b", reason="gone"))
            case "fails":
                job.say("w1b", Failing(reason="an error", blames=None))
            case "is silent":
                job.beating.discard(1)
                job.sleep(TIMEOUTS.heartbeat_timeout_s + 1)
        assert not job.told(Lost) and not job.told(JobFailed)
        come_back(job, "p2")
        come_back(job, "p3")
        assert "coordinator_restored" in job.names()

    def test_one_that_comes_back_from_a_machine_that_is_gone_does_not_count(self) -> None:
        job = restarted(3, 1, back="0")
        job.tell(Vanished(host="p0", reason="gone"))
        come_back(job, "p0")  # on a new connection
        assert "session taken" not in job.refused
        job.sleep(60.0)
        assert "coordinator_restored" not in job.names()

    def test_a_minority_waits_for_the_fence(self) -> None:
        job = running(4, 1)
        job.tell(Fenced(held=False))
        job.tell(Vanished(host="p2", reason="gone"))
        assert job.members("w0") == [0, 1, 3]  # they have not formed: they are half of those that have
        job.tell(Vanished(host="p3", reason="gone"))
        job.sleep(1.0)
        assert job.members("w0") == [0, 1, 3]
        job.tell(Fenced(held=True))
        assert job.members("w0") == [0, 1]

    def test_nothing_forms_first_without_the_fence(self) -> None:
        job = Pods(2)
        job.tell(Fenced(held=False))
        for name in ("p0", "p1"):
            job.pod(name)
            job.worker(name)
        job.sleep(1.0)
        assert not job.told(Prepare)
        job.tell(Fenced(held=True))
        assert job.told(Prepare) == ["w0", "w1"]

    @pytest.mark.parametrize("who", ["launcher", "worker"])
    @FIXED_AND_ELASTIC
    def test_a_member_that_has_not_come_back_is_lost_once_its_place_is_taken(
        self, who: str, least: int
    ) -> None:
        job = restarted(3, least, back="02", launchers="02")
        assert "coordinator_restored" in job.names()
        if who == "launcher":
            job.pod("p1b")
        else:
            job.worker("p1b", peer="j1", session=session_of("j1"))
        [lost] = [event for event in job.events if event["event"] == "worker_lost"]
        assert (lost["worker_id"], lost["host"]) == (1, "p1")
        assert bool(job.told(Lost)) is (least == 3)
        assert "restart_charged" not in job.names()

    def test_one_that_has_come_back_is_not(self) -> None:
        job = restarted(3, 1, back="012", launchers="02")
        job.pod("p1b")
        job.worker("p1b", peer="j1", session=session_of("j1"))
        assert not job.heard("p1b", Assignment) and job.heard("j1", Refused)
        assert "worker_lost" not in job.names()
        job.pod("p1", back=True)
        job.exits("p1", 1)
        assert job.names()[-2:] == ["restart_charged", "worker_lost"]

    def test_zombies_of_an_earlier_ring(self) -> None:
        job = running(2)
        job.tell(Vanished(host="p1", reason="gone"))
        job.bind_all("p0")
        seats = (Seat(0, "p0", 7), Seat(1, "p1", 7))
        job.worker("p1", peer="zombie", generation=1, members=seats)
        assert not job.heard("zombie", Prepare)
        assert job.quorum.generation == 2

    def test_reports_of_a_process_of_the_same_number_in_another_pod(self) -> None:
        """Every pod counts its processes for itself."""
        job = running()
        job.tell(Vanished(host="p1", reason="gone"))
        job.bind_all("p0", "p2")
        job.pod("p1b")
        job.exits("p1b", 1)  # it had the number of the one before it, and never said hello
        assert job.names()[-2:] == ["joiner_lost", "restart_charged"]
        assert not job.refused
