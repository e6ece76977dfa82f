"""Who coordinates the job: never two at once, and somebody soon."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from ringps_launcher.kubernetes import lease as lease_module
from ringps_launcher.kubernetes.election import DURATION_S, MARGIN_S, Decision, Election, Record
from ringps_launcher.kubernetes.errors import (
    ClusterError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    UnreachableError,
)
from ringps_launcher.kubernetes.lease import Lease
from ringps_launcher.kubernetes.outages import Outages
from ringps_launcher.kubernetes.publisher import WRITER_ANNOTATION, Publisher
from tests.k8s.waiting import eventually

NAME = "job-coordinator"


class Server:
    """An API server's objects, with versions as it keeps them."""

    def __init__(self, **objects: dict[str, Any]) -> None:
        self.objects = objects
        self.fails: ClusterError | None = None
        self.before_patch: Callable[[], None] = lambda: None
        self.after_patch: Callable[[], None] = lambda: None
        self.patches: list[dict[str, Any]] = []
        self.lock = threading.RLock()
        self._version = 0
        for thing in objects.values():
            self._stamp(thing)

    def get(self, kind: str, name: str) -> dict[str, Any]:
        with self.lock:
            if self.fails is not None:
                raise self.fails
            if kind not in self.objects:
                raise NotFoundError(f"get {kind} {name}: not found")
            return copy.deepcopy(self.objects[kind])

    def patch(self, kind: str, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        self.before_patch()
        with self.lock:
            if self.fails is not None:
                raise self.fails
            if kind not in self.objects:
                raise NotFoundError(f"change {kind} {name}: not found")
            thing = self.objects[kind]
            version = patch.get("metadata", {}).get("resourceVersion")
            if version is not None and version != thing["metadata"]["resourceVersion"]:
                raise ConflictError(f"change {kind} {name}: the object has been modified")
            _merge(thing, patch)
            self._stamp(thing)
            self.patches.append(patch)
            answer = copy.deepcopy(thing)
        self.after_patch()
        return answer

    def _stamp(self, thing: dict[str, Any]) -> None:
        self._version += 1
        thing.setdefault("metadata", {})["resourceVersion"] = str(self._version)
        thing["metadata"].setdefault("uid", "uid-1")


def _merge(thing: dict[str, Any], patch: dict[str, Any]) -> None:
    for key, value in patch.items():
        if isinstance(value, dict):
            _merge(thing.setdefault(key, {}), value)
        else:
            thing[key] = value


class Clock:
    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def fresh() -> Server:
    return Server(Lease={"spec": {}})


def candidate(
    server: Server, identity: str, clock: Clock, said: list[str] | None = None, time_of_day: float = 0.0
) -> Lease:
    outages = Outages([].append if said is None else said.append)
    election = Election(identity)
    begun_s = clock()
    return Lease(
        server,
        NAME,
        election,
        outages,
        clock=clock,
        time_of_day=lambda: time_of_day + clock() - begun_s,
    )


# One candidate.


def test_an_unheld_lease_is_taken_at_once_and_renewed() -> None:
    server, clock = fresh(), Clock()
    lease = candidate(server, "a/1", clock, time_of_day=1_700_000_000.25)
    assert not lease.held
    assert lease.attempt()[0] is Decision.TAKE
    assert server.objects["Lease"]["spec"] == {
        "holderIdentity": "a/1",
        "leaseDurationSeconds": 15,
        "acquireTime": "2023-11-14T22:13:20.250000Z",
        "renewTime": "2023-11-14T22:13:20.250000Z",
        "leaseTransitions": 1,
    }
    clock.now_s += 5
    assert lease.attempt()[0] is Decision.RENEW
    assert server.objects["Lease"]["spec"]["leaseTransitions"] == 1
    assert len(server.patches) == 2


def test_it_is_held_for_less_than_its_duration_from_when_the_request_began() -> None:
    server, clock = fresh(), Clock()
    lease = candidate(server, "a/1", clock)

    def slow() -> None:
        clock.now_s += 4

    server.before_patch = slow
    lease.attempt()
    assert lease.held_until_s == 100.0 + DURATION_S - MARGIN_S
    clock.now_s = lease.held_until_s - 0.01
    assert lease.held
    clock.now_s = lease.held_until_s
    assert not lease.held


def test_without_an_api_server_it_runs_out_and_is_back_with_it() -> None:
    server, clock, said = fresh(), Clock(), list[str]()
    lease = candidate(server, "a/1", clock, said)
    lease.attempt()
    server.fails = UnreachableError("nobody answers")
    for _ in range(20):
        clock.now_s += 1
        assert lease.attempt()[0] is None
    assert not lease.held
    server.fails = None
    assert lease.attempt()[0] is Decision.RENEW
    assert lease.held
    assert said == [
        "nobody answers; training goes on, trying again",
        "the API server answers again",
    ]


def test_a_renewal_whose_answer_got_lost_is_found_out() -> None:
    server, clock = fresh(), Clock()
    lease = candidate(server, "a/1", clock)
    lease.attempt()

    def lose() -> None:
        raise UnreachableError("no answer")

    server.after_patch = lose
    clock.now_s += 5
    assert lease.attempt()[0] is None
    server.after_patch = lambda: None
    clock.now_s += 1
    assert lease.attempt()[0] is Decision.RENEW
    assert lease.held_until_s == clock.now_s + DURATION_S - MARGIN_S


def test_no_right_to_it_is_said_once_with_its_message() -> None:
    server, said = fresh(), list[str]()
    server.fails = ForbiddenError("cannot get Lease")
    lease = candidate(server, "a/1", Clock(), said)
    for _ in range(3):
        assert lease.attempt() == (None, "cannot get Lease")
    assert said == ["cannot get Lease"]


# Several.


def test_a_holder_that_renews_is_waited_for() -> None:
    server, clock = fresh(), Clock()
    first, second = candidate(server, "a/1", clock), candidate(server, "b/2", clock)
    first.attempt()
    for _ in range(20):
        assert second.attempt() == (Decision.WAIT, "a/1 has the Lease")
        clock.now_s += 5
        first.attempt()
    assert not second.held


def test_a_dead_holder_is_replaced_by_what_we_saw_whatever_its_clock_said() -> None:
    server, clock = fresh(), Clock()
    candidate(server, "a/1", clock, time_of_day=1e9).attempt()
    clock.now_s += 1000  # nobody has looked
    second = candidate(server, "b/2", clock, time_of_day=2e9)
    assert second.attempt()[0] is Decision.WAIT
    clock.now_s += DURATION_S - 0.1
    assert second.attempt()[0] is Decision.WAIT
    server.patch("Lease", NAME, {"metadata": {"annotations": {"note": "not a renewal"}}})
    clock.now_s += 0.2
    assert second.attempt() == (Decision.TAKE, "a/1 has not renewed the Lease")
    assert server.objects["Lease"]["spec"]["leaseTransitions"] == 2


def test_a_longer_promise_of_the_holder_is_kept() -> None:
    server, clock = fresh(), Clock()
    candidate(server, "a/1", clock).attempt()
    server.patch("Lease", NAME, {"spec": {"leaseDurationSeconds": 60}})
    second = candidate(server, "b/2", clock)
    second.attempt()
    clock.now_s += 59
    assert second.attempt()[0] is Decision.WAIT
    clock.now_s += 2
    assert second.attempt()[0] is Decision.TAKE


def test_the_same_pod_takes_it_back_at_once() -> None:
    server, clock = fresh(), Clock()
    candidate(server, "a/1", clock).attempt()
    again = candidate(server, "a/1", clock)
    assert again.attempt()[0] is Decision.RENEW
    assert again.held


def test_a_released_lease_is_taken_at_once() -> None:
    server, clock = fresh(), Clock()
    first, second = candidate(server, "a/1", clock), candidate(server, "b/2", clock)
    first.attempt()
    assert second.attempt()[0] is Decision.WAIT
    first.close()
    assert not first.held
    assert second.attempt()[0] is Decision.TAKE


def test_what_is_not_held_is_not_released() -> None:
    server, clock = fresh(), Clock()
    first, second = candidate(server, "a/1", clock), candidate(server, "b/2", clock)
    first.attempt()
    second.attempt()
    clock.now_s += DURATION_S
    assert second.attempt()[0] is Decision.TAKE
    first.close()
    assert server.objects["Lease"]["spec"]["holderIdentity"] == "b/2"


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ({"spec": {"holderIdentity": "b/2"}}, "b/2 has the Lease now"),
        ({"spec": {"leaseTransitions": 3}}, "another coordinator had the Lease meanwhile"),
        (
            {"spec": {"holderIdentity": "", "leaseTransitions": 3}},
            "another coordinator had the Lease meanwhile",
        ),
        ({"metadata": {"uid": "uid-2"}}, "the Lease was deleted and made anew"),
    ],
)
def test_a_holder_that_was_replaced_is_told_so(patch: dict[str, Any], reason: str) -> None:
    server, clock = fresh(), Clock()
    lease = candidate(server, "a/1", clock)
    lease.attempt()
    server.patch("Lease", NAME, patch)
    assert lease.attempt()[0] is None  # its version is not the newest
    assert lease.attempt() == (Decision.LOST, reason)


def test_of_two_that_write_at_once_one_fails() -> None:
    server, clock = fresh(), Clock()
    first, second = candidate(server, "a/1", clock), candidate(server, "b/2", clock)
    between: list[Any] = []

    def overtake() -> None:
        server.before_patch = lambda: None
        between.append(second.attempt()[0])

    server.before_patch = overtake
    assert first.attempt()[0] is None
    assert between == [Decision.TAKE]
    assert first.attempt()[0] is Decision.WAIT
    assert (first.held, second.held) == (False, True)


@pytest.mark.parametrize("seed", range(20))
def test_no_two_ever_hold_it(seed: int) -> None:
    """Candidates die, freeze, are cut off and come back, with clocks that run up to 1 % fast or slow."""
    chance = random.Random(seed)
    server = fresh()
    clocks = [Clock(chance.uniform(0, 1e6)) for _ in range(3)]
    speeds = [chance.uniform(0.99, 1.01) for _ in clocks]
    leases = [candidate(server, f"{at}/0", clock) for at, clock in enumerate(clocks)]
    cut = [False] * 3
    held = 0
    for turn in range(1500):
        for clock, speed in zip(clocks, speeds, strict=True):
            clock.now_s += 0.5 * speed
        for at, lease in enumerate(leases):
            if chance.random() < 0.02:
                cut[at] = not cut[at]
            if chance.random() < 0.002:
                leases[at] = candidate(server, f"{at}/{turn}", clocks[at])
            if chance.random() < 0.4:
                server.fails = UnreachableError("cut off") if cut[at] else None
                if lease.attempt()[0] is Decision.LOST:
                    leases[at] = candidate(server, f"{at}/{turn}", clocks[at])
                server.fails = None
        holders = [at for at, lease in enumerate(leases) if lease.held]
        assert len(holders) <= 1, (seed, turn, holders)
        held += len(holders)
    assert held > 300


def test_odd_records_are_read() -> None:
    assert Record.of({}).holder == ""
    assert Record.of({"spec": {"leaseTransitions": "x", "holderIdentity": None}}).transitions == 0


# On threads.


def test_acquire_waits_for_its_turn_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RETRY_S", 0.01)
    server, clock, said = fresh(), Clock(), list[str]()
    first, second = candidate(server, "a/1", clock), candidate(server, "b/2", clock)
    first.attempt()
    stop, got = threading.Event(), list[bool]()
    thread = threading.Thread(target=lambda: got.append(second.acquire(stop, said.append)))
    thread.start()
    eventually(lambda: said, "it says that it waits", every_s=0.01)
    first.close()
    thread.join(10)
    assert got == [True]
    assert said == ["waiting for Lease job-coordinator: a/1 has the Lease"]
    stopped = threading.Event()
    stopped.set()
    assert not candidate(server, "c/3", clock).acquire(stopped, said.append)


def test_keep_renews_and_tells_of_a_loss_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.01)
    monkeypatch.setattr(lease_module, "RETRY_S", 0.01)
    server, clock, lost = fresh(), Clock(), list[str]()
    lease = candidate(server, "a/1", clock)
    lease.attempt()
    lease.keep(lost.append)
    eventually(lambda: len(server.patches) > 3, "it renews", every_s=0.01)
    server.patch("Lease", NAME, {"spec": {"holderIdentity": "b/2"}})
    eventually(lambda: lost, "it notices", every_s=0.01)
    assert not lease.held
    lease.close()
    assert lost == ["b/2 has the Lease now"]
    assert server.objects["Lease"]["spec"]["holderIdentity"] == "b/2"


# The status ConfigMap, which only the holder writes.


class Scribe:
    """A publisher that writes what `text` is."""

    def __init__(self, server: Server, term: str = "a/1") -> None:
        self.text = "{}"
        self.holds = True
        self.said: list[str] = []
        self.publisher = Publisher(
            server,
            "job-status",
            lambda: {"status.json": self.text},
            lambda: self.holds,
            Outages(self.said.append),
            clock=time.monotonic,
        )
        self.left = self.publisher.claim(term)


def status_server() -> Server:
    return Server(ConfigMap={"data": {"verdict": ""}})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PRESSING_S": 0.01, "_RETRY_S": 0.02, "_REFUSED_RETRY_S": 0.05}.items():
        monkeypatch.setattr(f"ringps_launcher.kubernetes.publisher.{name}", value)


def written(server: Server) -> list[str]:
    return [patch["data"]["status.json"] for patch in server.patches if "data" in patch]


def test_only_the_newest_state_is_written_and_not_too_often() -> None:
    server = status_server()
    scribe = Scribe(server)
    scribe.publisher.start()
    for at in range(100):
        scribe.text = str(at)
        number = scribe.publisher.nudge()
    assert scribe.publisher.wait(number)
    scribe.publisher.close()
    assert written(server)[-1] == "99"
    assert len(written(server)) <= 2
    assert server.objects["ConfigMap"]["metadata"]["annotations"] == {WRITER_ANNOTATION: "a/1"}
    assert server.objects["ConfigMap"]["data"]["verdict"] == ""


def test_a_write_waits_for_an_api_server_that_is_away() -> None:
    server = status_server()
    scribe = Scribe(server)
    server.fails = UnreachableError("nobody answers")
    scribe.publisher.start()
    number = scribe.publisher.nudge(pressing=True)
    eventually(lambda: scribe.said, "it has tried", every_s=0.01)
    scribe.text = "newer"
    server.fails = None
    assert scribe.publisher.wait(number)
    assert written(server) == ["newer"]
    scribe.publisher.close()
    assert len(scribe.said) == 2


def test_without_the_lease_nothing_is_written() -> None:
    server = status_server()
    scribe = Scribe(server)
    scribe.holds = False
    scribe.publisher.start()
    scribe.publisher.nudge(pressing=True)
    scribe.publisher.close()
    assert written(server) == []


def test_a_write_of_an_earlier_coordinator_that_was_held_up_is_refused() -> None:
    server = status_server()
    old = Scribe(server)

    def overtaken() -> None:
        server.before_patch = lambda: None
        old.holds = False
        Scribe(server, "b/2")

    server.before_patch = overtaken
    old.publisher.start()
    old.publisher.nudge(pressing=True)
    eventually(lambda: not old.holds, "it was overtaken", every_s=0.01)
    old.publisher.close()
    assert written(server) == []
    assert server.objects["ConfigMap"]["metadata"]["annotations"] == {WRITER_ANNOTATION: "b/2"}


def test_somebody_elses_change_does_not_stop_the_holder() -> None:
    server = status_server()
    scribe = Scribe(server)
    server.patch("ConfigMap", "job-status", {"metadata": {"labels": {"a": "b"}}})
    scribe.publisher.start()
    assert scribe.publisher.wait(scribe.publisher.nudge(pressing=True))
    scribe.publisher.close()
    assert written(server) == ["{}"]


@pytest.mark.parametrize("error", [NotFoundError("no such ConfigMap"), ForbiddenError("no right")])
def test_a_write_that_can_never_be_does_not_block_the_jobs_end(error: ClusterError) -> None:
    server = status_server()
    scribe = Scribe(server)
    server.fails = error
    scribe.publisher.start()
    assert not scribe.publisher.wait(scribe.publisher.nudge(pressing=True))
    scribe.publisher.close()
    assert scribe.said == [str(error)]


def test_what_is_not_written_yet_is_written_on_close() -> None:
    server = status_server()
    scribe = Scribe(server)
    scribe.publisher.start()
    assert scribe.publisher.wait(scribe.publisher.nudge(pressing=True))
    scribe.text = "last words"
    scribe.publisher.nudge()
    scribe.publisher.close()
    assert written(server)[-1] == "last words"


def test_close_ends_whoever_waits() -> None:
    server = status_server()
    scribe = Scribe(server)
    server.fails = UnreachableError("nobody answers")
    scribe.publisher.start()
    got: list[bool] = []
    thread = threading.Thread(target=lambda: got.append(scribe.publisher.wait(scribe.publisher.nudge())))
    thread.start()
    eventually(lambda: scribe.said, "it has tried", every_s=0.01)
    scribe.publisher.close()
    thread.join(10)
    assert got == [False]
