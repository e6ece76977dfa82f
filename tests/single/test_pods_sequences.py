"""Whatever happens to pods, their cluster and the coordinator, in whatever order: what must always hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ringps.membership.events import Charged, Fenced, Outside, Placed, Recorded, Vanished, Warned
from ringps.membership.restarts import RingRestarts
from ringps.membership.surroundings import Budget, Surroundings
from ringps.wire.control import (
    Admitting,
    AllLeft,
    Assignment,
    Beat,
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
    Offer,
    Prepare,
    Ready,
    Refused,
    Replaceable,
    Suspect,
    Welcome,
    WorkerExited,
)
from ringps.wire.rules import Seat
from ringps.worker_env import SUSPENDED_CODE
from tests.quorum_job import Job, hello_of, session_of

MOST = 4
BUDGET = 2


@dataclass(eq=False)
class Pod:
    """A launcher with at most one worker's process, and their two links."""

    name: str
    place: int
    alive: bool = True
    told: bool = False
    """Whether the coordinator was told that it is gone."""
    peer: str = ""
    session: str = ""
    placed: bool = False
    """Whether it has its assignment."""
    stops: bool = False
    """Whether it was asked to leave."""
    over: bool = False
    """Whether it heard how the job ended, for good."""
    ended: WorkerExited | None = None
    """How its last process ended, if none runs."""
    pid: int = 0
    """0 while no process runs."""
    wpeer: str = ""
    wsession: str = ""
    generation: int = 0
    members: tuple[Seat, ...] = ()
    prepare: Prepare | None = None
    left: bool = False
    joins: bool = False
    ready: bool = False
    finished: bool = False
    """Whether its process knows that it takes no part any more."""


@dataclass
class World:
    world_size: int
    least: int
    job: Job = field(init=False)
    around: Surroundings = field(init=False)
    pods: list[Pod] = field(default_factory=list)
    """The pods that were ever there; the last of a place is the one that the cluster knows of."""
    count: int = 0
    newest: int = 0
    """The last generation that any worker has formed; it is written down."""
    prepared: dict[int, Prepare] = field(default_factory=dict)
    """By number: what this coordinator had members prepare."""
    verdict: str = ""
    """As it is written down."""
    asked: str = ""
    """The verdict that this coordinator wants written down."""
    used: int = 0
    seen: int = 0

    def __post_init__(self) -> None:
        self.job = self.rule(100.0)
        for place in range(self.world_size):
            self.create(place)

    def rule(self, now_s: float) -> Job:
        """A coordinator that knows what is written down, and nothing else."""
        self.around = Surroundings(Budget(BUDGET, self.used))
        self.asked, self.seen = "", 0
        self.prepared = {}
        return Job(
            self.world_size,
            min_workers=self.least,
            settle_s=3.0,
            now_s=now_s,
            pods=True,
            first_generation=max(1, self.newest),
            follows=self.newest > 0,
            verdict=self.verdict,
            restarts=RingRestarts(None),
            surroundings=self.around,
        )

    def create(self, place: int) -> None:
        self.count += 1
        pod = Pod(f"pod-{place}-{self.count}", place)
        self.pods.append(pod)
        self.greet(pod)

    @property
    def current(self) -> list[Pod]:
        return [self.of(place) for place in range(self.world_size)]

    def of(self, place: int) -> Pod:
        return next(pod for pod in reversed(self.pods) if pod.place == place)

    def tell(self, event: Outside) -> None:
        self.job.take(self.job.quorum.handle(event, self.job.now_s))

    # What happens. A pod may be one that the cluster has forgotten.

    def act(self, action: str, which: int, other: int) -> None:
        if action in WORLDLY:
            getattr(self, action)(which, other)
        else:
            able = [pod for pod in self.pods if pod.alive and self.able(action, pod)]
            if able:
                getattr(self, action)(able[which % len(able)], other)
        self.settle()

    def able(self, action: str, pod: Pod) -> bool:
        runs = pod.pid > 0 and not pod.finished
        member = runs and pod.generation > 0 and not pod.left
        prepared = runs and pod.prepare is not None and pod.prepare.generation > pod.generation
        match action:
            case "bind":
                return prepared
            case "leave" | "suspect" | "offer":
                return member and not prepared
            case "admit" | "depart" | "note":
                return member
            case "fail" | "greet_worker":
                return runs
            case "get_ready":
                return runs and pod.joins and pod.generation == 0
            case "exit":
                return pod.pid > 0
        return not pod.over

    def greet(self, pod: Pod, _: int = 0) -> None:
        """Its launcher's connection is made, for the first time or again."""
        self.count += 1
        pod.session = pod.session or session_of(f"l{self.count}")
        pod.peer = f"{pod.name}/{self.count}"
        hello = LauncherHello(
            host=pod.name,
            address="a",
            slots=1,
            master_port=1,
            encrypt_data=False,
            first_worker_id=pod.place if pod.placed else None,
            world_size=self.world_size if pod.placed else None,
            place=pod.place,
            session=pod.session,
        )
        self.job.say(pod.peer, hello)
        if pod.ended is not None and pod.placed:
            self.job.say(pod.peer, pod.ended)

    def greet_worker(self, pod: Pod, _: int = 0) -> None:
        self.count += 1
        pod.wpeer = f"{pod.name}#{self.count}"
        hello = hello_of(
            pod.place,
            "",
            host=pod.name,
            pid=pod.pid,
            generation=pod.generation,
            members=pod.members,
            session=pod.wsession,
        )
        self.job.say(pod.wpeer, hello)
        if pod.ready:
            self.job.say(pod.wpeer, Ready())
        if pod.left:
            self.job.say(pod.wpeer, Leaving(generation=pod.generation, completed=1))

    def start(self, pod: Pod) -> None:
        self.count += 1
        pod.pid = 7 + self.count % 3  # every pod counts for itself, so they are alike
        pod.wsession = session_of(f"s{self.count}")
        pod.generation, pod.members, pod.prepare, pod.ended = 0, (), None, None
        pod.left = pod.joins = pod.ready = pod.finished = False
        if self.count % 4:  # else it has not got so far yet
            self.greet_worker(pod)

    def bind(self, pod: Pod, _: int) -> None:
        assert pod.prepare is not None
        self.job.say(pod.wpeer, Bound(generation=pod.prepare.generation, address=pod.wpeer))

    def leave(self, pod: Pod, other: int) -> None:
        pod.left = True
        leaving = Leaving(generation=pod.generation, completed=1, suspended=other % 2 == 1)
        self.job.say(pod.wpeer, leaving)

    def suspect(self, pod: Pod, other: int) -> None:
        suspect = Suspect(
            generation=pod.generation, worker_id=other % self.world_size, forming=other > 3, reason="closed"
        )
        self.job.say(pod.wpeer, suspect)

    def offer(self, pod: Pod, other: int) -> None:
        joiners = tuple(range(self.world_size))
        offer = Offer(generation=pod.generation, step=other % 2, joiners=joiners, address=pod.wpeer)
        self.job.say(pod.wpeer, offer)

    def admit(self, pod: Pod, _: int) -> None:
        self.job.say(pod.wpeer, Admitting(generation=pod.generation))

    def depart(self, pod: Pod, _: int) -> None:
        self.job.say(pod.wpeer, Departing(generation=pod.generation, step=1))
        pod.finished = True

    def note(self, pod: Pod, other: int) -> None:
        name = ("checkpoint_saved", "restored", "training", "checkpoints_given_up")[other % 4]
        self.job.say(pod.wpeer, Noted(event={"event": name, "step": 1}))

    def get_ready(self, pod: Pod, _: int) -> None:
        pod.ready = True
        self.job.say(pod.wpeer, Ready())

    def fail(self, pod: Pod, other: int) -> None:
        blames = other if other < self.world_size else None
        self.job.say(pod.wpeer, Failing(reason="an error", blames=blames))
        pod.finished = True

    def exit(self, pod: Pod, other: int) -> None:
        self.end(pod, (0, 1, 137, SUSPENDED_CODE)[other % 4])

    def end(self, pod: Pod, code: int) -> None:
        pod.ended = WorkerExited(
            worker_id=pod.place, pid=pod.pid, code=code, reason="it ended", stopping=pod.stops
        )
        pod.pid = 0
        self.job.say(pod.peer, pod.ended)

    def ask(self, pod: Pod, _: int) -> None:
        """It gets SIGTERM."""
        self.tell(Warned(pods=((pod.place, pod.name),), reason="preempted"))

    def cut(self, pod: Pod, _: int) -> None:
        """The cluster takes it for gone, and has another one in its place, while it goes on."""
        self.bury(pod)
        self.create(pod.place)

    def kill(self, pod: Pod, other: int) -> None:
        """It is gone, and the operator sees that sooner or later; another one takes its place at once."""
        pod.alive = False
        if other % 2:
            self.bury(pod)
        if other % 3 == 0:
            self.tell(Charged(worker_id=pod.place, reason="out of memory", host=pod.name))
        if other > 1 and pod is self.of(pod.place):
            self.create(pod.place)

    def bury(self, pod: Pod) -> None:
        self.settle()
        pod.told = True
        self.tell(Vanished(host=pod.name, reason="gone"))

    # Of the world.

    def replace(self, which: int, _: int) -> None:
        pod = self.of(which % self.world_size)
        if not pod.alive:
            if not pod.told:
                self.bury(pod)
            self.create(pod.place)

    def place(self, which: int, other: int) -> None:
        pod = self.of(which % self.world_size)
        self.tell(Placed(host=pod.name, place=("za"[other % 2], "", "node")))

    def fence(self, which: int, _: int) -> None:
        self.tell(Fenced(held=which % 4 > 0))

    def record(self, _: int, __: int) -> None:
        if self.asked and not self.verdict:
            self.verdict = self.asked
            self.tell(Recorded())

    def greet_all(self, _: int, __: int) -> None:
        for pod in self.pods:
            if pod.alive and not pod.over:
                if pod.pid and not pod.finished:
                    self.greet_worker(pod)
                self.greet(pod)

    def bind_all(self, _: int, __: int) -> None:
        for pod in self.pods:
            if pod.alive and self.able("bind", pod):
                self.bind(pod, 0)

    def offer_all(self, which: int, __: int) -> None:
        for pod in self.pods:
            if pod.alive and self.able("get_ready", pod):
                self.get_ready(pod, 0)
        for pod in self.pods:
            if pod.alive and self.able("offer", pod):
                self.admit(pod, 0)
                self.offer(pod, which)

    def leave_all(self, which: int, __: int) -> None:
        for pod in self.pods:
            if pod.alive and self.able("leave", pod):
                self.leave(pod, which)
        self.settle()
        for pod in self.pods:
            if pod.alive and pod.pid and pod.left:
                self.end(pod, SUSPENDED_CODE if which % 2 else 0)

    def tick(self, which: int, _: int) -> None:
        for _unused in range((1, 4, 35, 80)[which % 4]):
            self.job.now_s += 0.1
            for pod in self.pods:
                if pod.alive and pod.pid and pod.wpeer and not pod.finished:
                    self.beat(pod)
            self.job.tick()
            self.settle()

    def beat(self, pod: Pod) -> None:
        self.count += 1
        self.job.beat_again(
            Beat(
                worker_id=pod.place,
                session=pod.wsession,
                generation=pod.generation,
                step=0,
                count=self.count,
            )
        )

    def restart(self, which: int, other: int) -> None:
        """Another coordinator rules; some come back at once."""
        self.job = self.rule(self.job.now_s)
        for pod in self.pods:
            pod.prepare = None
        alive = [pod for pod in self.pods if pod.alive and not pod.over]
        for pod in alive[which % 3 :]:
            if other % 2 and pod.pid and not pod.finished:
                self.greet_worker(pod)
            self.greet(pod)

    # What they hear of it.

    def settle(self) -> None:
        """Everybody reads, and acts upon it as launchers and workers do."""
        while self.seen < len(self.job.sent):
            to, message = self.job.sent[self.seen]
            self.seen += 1
            self.check(message)
            for pod in self.pods:
                if pod.alive and not pod.over and to == pod.peer:
                    self.hear_launcher(pod, message)
                elif pod.alive and pod.pid and to == pod.wpeer:
                    self.hear_worker(pod, message)
        for record in self.job.records:
            assert not self.asked and not self.verdict, "a verdict more than once"
            assert record == "done" or record.startswith("failed: ")
            self.asked = record
        self.job.records.clear()
        assert self.around.budget is not None
        self.used = self.around.budget.used
        assert self.used <= BUDGET + 1
        if self.job.again:
            self.start_again()

    def start_again(self) -> None:
        """As the coordinator does it."""
        assert not self.job.finished and not self.asked
        quorum, now_s = self.job.quorum, self.job.now_s
        self.around.recorded = False
        self.seen = 0
        self.job = Job(
            self.world_size,
            min_workers=self.least,
            settle_s=3.0,
            now_s=now_s,
            pods=True,
            first_generation=quorum.next_generation,
            again=True,
            restarts=RingRestarts(None),
            surroundings=self.around,
        )
        for peer, hello in quorum.waiting_launchers:
            self.job.say(peer.decode(), hello)
        self.settle()

    def hear_launcher(self, pod: Pod, message: Any) -> None:
        match message:
            case Assignment() if not pod.placed:
                assert message.first_worker_id == pod.place
                pod.placed = True
                self.start(pod)
            case Replaceable(worker_id=worker_id) if pod.placed and not pod.pid and not pod.stops:
                assert worker_id == pod.place
                self.start(pod)
            case Evict(worker_id=worker_id):
                assert worker_id == pod.place
                pod.stops = True
            case JobDone(suspended=True) | JobFailed(restarts=True):
                self.begin_anew(pod)
            case Refused() if pod.placed:
                self.begin_anew(pod)
            case JobDone() | JobFailed():
                kind = "done" if isinstance(message, JobDone) else f"failed: {message.reason}"
                assert self.verdict == kind, "told before it is written down"
                pod.over = True

    def begin_anew(self, pod: Pod) -> None:
        if pod.pid:
            self.end(pod, 137)
        self.job.say(pod.peer, LauncherLeaving())
        pod.session, pod.placed, pod.ended = "", False, None
        self.greet(pod)

    def hear_worker(self, pod: Pod, message: Any) -> None:
        match message:
            case Welcome(running=running):
                pod.joins = running > 0
            case Prepare() if message.generation > pod.generation:
                pod.prepare = message
            case Form() if message.generation > pod.generation:
                assert pod.prepare is not None
                if pod.prepare.generation == message.generation:
                    pod.generation, pod.members = message.generation, pod.prepare.members
                    self.newest = max(self.newest, pod.generation)
            case Lost() | Expelled() | Refused() | AllLeft():
                pod.finished = True

    # What must hold.

    def check(self, message: Any) -> None:
        if not isinstance(message, Prepare):
            return
        known = self.prepared.get(message.generation)
        if known is not None:  # it is said again
            assert known.members == message.members
            return
        self.prepared[message.generation] = message
        assert message.generation > self.newest, "a number that was given out before"
        assert message.reason
        ids = [seat.worker_id for seat in message.members]
        assert len(set(ids)) == len(ids)
        for seat in message.members:
            assert self.around.end_of(seat.host) is None, "a member whose machine is gone"

    def check_views(self) -> None:
        """Nobody has two views of one generation, and no two living processes of one id are in one."""
        views: dict[int, tuple[Seat, ...]] = {}
        for pod in self.pods:
            if pod.alive and pod.pid and pod.generation:
                assert views.setdefault(pod.generation, pod.members) == pod.members

    def finish(self) -> None:
        """From here on nothing goes wrong any more: the job must come to its end."""
        self.tell(Fenced(held=True))
        for turn in range(60):
            if self.verdict and all(pod.over for pod in self.current):
                return
            for pod in list(self.pods):
                if pod.alive and pod is not self.of(pod.place):
                    pod.alive = False
                if not pod.alive and not pod.told:
                    self.bury(pod)
            for place, pod in enumerate(self.current):
                if pod.alive and pod.stops and not pod.over:
                    pod.alive = False
                    self.bury(pod)
                if not pod.alive or pod.told:
                    pod.alive = False
                    self.create(place)
            if turn == 0:  # every connection that broke is made again
                self.greet_all(0, 0)
                self.settle()
            for pod in self.current:
                if pod.pid and pod.finished:
                    self.end(pod, 0 if pod.left else 1)
                elif pod.pid and pod.prepare is None and not pod.joins:
                    self.greet_worker(pod)
            self.settle()
            for _unused in range(4):
                self.bind_all(0, 0)
                self.settle()
                self.offer_all(0, 0)
                self.settle()
            self.record(0, 0)
            self.leave_all(0, 0)
            self.tick(3, 0)
            self.record(0, 0)
            self.settle()
        raise AssertionError(f"the job hangs: {self.job.events[-5:]}")


WORLDLY = (
    "replace",
    "place",
    "fence",
    "record",
    "greet_all",
    "bind_all",
    "offer_all",
    "leave_all",
    "tick",
    "restart",
)
ACTIONS = (
    *WORLDLY,
    "bind_all",
    "bind_all",
    "offer_all",
    "tick",
    "tick",
    "replace",
    "greet",
    "greet_worker",
    "bind",
    "leave",
    "suspect",
    "offer",
    "admit",
    "depart",
    "note",
    "get_ready",
    "fail",
    "exit",
    "exit",
    "ask",
    "cut",
    "kill",
    "kill",
    "kill",
)
STEPS = st.tuples(st.sampled_from(ACTIONS), st.integers(0, 7), st.integers(0, 5))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, MOST), st.integers(1, MOST), st.booleans(), st.lists(STEPS, max_size=40))
def test_whatever_happens(
    world_size: int, least: int, begun: bool, steps: list[tuple[str, int, int]]
) -> None:
    world = World(world_size, min(least, world_size))
    start = [("tick", 0, 0), ("greet_all", 0, 0), ("bind_all", 0, 0)] if begun else []
    for action, which, other in start + steps:
        world.act(action, which, other)
        world.check_views()
    world.finish()
