"""Whatever happens to workers, launchers and the coordinator, in whatever order: what must always hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ringps.wire.control import (
    Admitting,
    AllLeft,
    Bound,
    Departing,
    Expelled,
    Failing,
    Form,
    JobDone,
    JobFailed,
    LauncherHello,
    Leaving,
    Lost,
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
from tests.quorum_job import Job, hello_of, session_of

MOST = 4


@dataclass
class Process:
    """A worker's process and its link, as far as they matter here."""

    peer: str
    worker_id: int
    pid: int
    generation: int = 0
    members: tuple[Seat, ...] = ()
    prepare: Prepare | None = None
    ready: bool = False
    joins: bool = False
    frozen: bool = False
    over: bool = False
    """It knows that it takes no part any more."""
    heard: int = 0
    """How many of the messages of this coordinator it has read."""


@dataclass
class World:
    """A job of up to `MOST` workers with one launcher; coordinators come and go."""

    world_size: int
    least: int
    job: Job = field(init=False)
    processes: list[Process] = field(default_factory=list)
    ended: dict[int, WorkerExited] = field(default_factory=dict)
    """By pid: the processes whose end the launcher knows of."""
    prepared: list[Prepare] = field(default_factory=list)
    formed: list[Form] = field(default_factory=list)
    failed: int = 0
    """How many failures were announced."""
    finishing: bool = False
    """Whether some worker's script is done."""
    coordinators: int = 0

    def __post_init__(self) -> None:
        self.start_coordinator(None)
        for worker_id in range(self.world_size):
            self.processes.append(Process(f"w{worker_id}", worker_id, 1000 + worker_id))

    def start_coordinator(self, first_worker_id: int | None) -> None:
        now_s = self.job.now_s if hasattr(self, "job") else 100.0
        self.reported: set[int] = set()
        self.newest = 0
        self.coordinators += 1
        token = f"{self.coordinators:040}"
        self.job = Job(self.world_size, min_workers=self.least, token=token)
        self.job.now_s = now_s
        self.seen = 0
        hello = LauncherHello(
            host="node-a",
            address="a",
            slots=self.world_size,
            master_port=1,
            encrypt_data=False,
            first_worker_id=first_worker_id,
            world_size=None if first_worker_id is None else self.world_size,
            session=session_of("l0"),
        )
        self.job.say("l0", hello)

    # What may happen. Every action names a process by its place among those that can do it.

    def act(self, action: str, which: int, other: int) -> None:
        able = [process for process in self.processes if self.able(action, process)]
        if action in WORLDLY:
            getattr(self, action)(which)
        elif able:
            getattr(self, action)(able[which % len(able)], other)
        self.read_all()

    def able(self, action: str, process: Process) -> bool:
        if process.pid in self.ended or process.over:
            return action == "exit" and process.pid not in self.ended
        if process.frozen:
            return action in ("thaw", "exit")
        prepared = process.prepare is not None and process.prepare.generation > process.generation
        match action:
            case "bind":
                return prepared
            case "offer" | "leave" | "suspect":
                return process.generation > 0 and not prepared
            case "admit" | "depart":
                return process.generation > 0
            case "get_ready":
                return process.joins and process.generation == 0
            case "thaw":
                return False
        return True

    def bind(self, process: Process, _: int) -> None:
        assert process.prepare is not None
        self.say(process, Bound(generation=process.prepare.generation, address=process.peer))

    def offer(self, process: Process, step: int) -> None:
        joiners = tuple(range(self.world_size))
        offer = Offer(generation=process.generation, step=step % 2, joiners=joiners, address=process.peer)
        self.say(process, offer)

    def leave(self, process: Process, other: int) -> None:
        self.finishing = True
        leaving = Leaving(generation=process.generation, completed=1, suspended=other % 2 == 1)
        self.say(process, leaving)

    def suspect(self, process: Process, other: int) -> None:
        accused = other % self.world_size
        suspect = Suspect(
            generation=process.generation, worker_id=accused, forming=other % 2 == 1, reason="closed"
        )
        self.say(process, suspect)

    def admit(self, process: Process, _: int) -> None:
        self.say(process, Admitting(generation=process.generation))

    def depart(self, process: Process, _: int) -> None:
        self.say(process, Departing(generation=process.generation, step=1))
        process.over = True

    def get_ready(self, process: Process, _: int) -> None:
        process.ready = True
        self.say(process, Ready())

    def fail(self, process: Process, other: int) -> None:
        blames = other if other < self.world_size else None
        self.say(process, Failing(reason="an error", blames=blames))
        process.over = True

    def exit(self, process: Process, other: int) -> None:
        code = (0, 1, 137)[other % 3]
        exited = WorkerExited(worker_id=process.worker_id, pid=process.pid, code=code, reason="it ended")
        self.ended[process.pid] = exited
        self.report(exited)

    def freeze(self, process: Process, _: int) -> None:
        process.frozen = True

    def thaw(self, process: Process, _: int) -> None:
        process.frozen = False

    def greet(self, process: Process, _: int) -> None:
        """Its connection is made for the first time, or again."""
        peer = f"{process.peer.rstrip('+')}{'+' * (process.peer.count('+') + 1)}"
        process.peer, process.heard = peer, len(self.job.sent)
        hello = hello_of(
            process.worker_id,
            "",
            pid=process.pid,
            generation=process.generation,
            members=process.members,
            session=session_of(str(process.pid)),
        )
        self.say(process, hello)
        if process.ready:
            self.say(process, Ready())

    # Of the world.

    def greet_all(self, _: int) -> None:
        for process in self.processes:
            if self.able("greet", process):
                self.greet(process, 0)

    def bind_all(self, _: int) -> None:
        self.read_all()
        for process in self.processes:
            if self.able("bind", process):
                self.bind(process, 0)

    def offer_all(self, which: int) -> None:
        for process in self.processes:
            if self.able("offer", process):
                self.offer(process, which)

    def tick(self, which: int) -> None:
        for _ in range((1, 2, 8, 35)[which % 4]):
            self.job.now_s += 0.1
            for process in self.processes:
                if self.able("beat", process):
                    self.job.beat(
                        process.worker_id,
                        generation=process.generation,
                        peer=str(process.pid),
                    )
            self.job.tick()

    def replace(self, which: int) -> None:
        """The launcher starts a process for a place that it heard is free."""
        places = [entry.worker_id for entry in self.job.heard("l0", Replaceable)]
        if places:
            worker_id = places[which % len(places)]
            pid = 2000 + len(self.processes)
            self.processes.append(Process(f"j{pid}", worker_id, pid))
            self.greet(self.processes[-1], 0)

    def join(self, which: int) -> None:
        """All that a launcher, a joiner and the members do so that it joins; `which` cuts it short."""
        self.replace(which)
        for step in range(which):
            self.read_all()
            for process in self.processes:
                if step == 0 and self.able("get_ready", process):
                    self.get_ready(process, 0)
            if step == 1:
                self.offer_all(1)
            elif step >= 2:
                self.bind_all(0)

    def restart(self, which: int) -> None:
        """Another coordinator takes over; some come back at once."""
        self.start_coordinator(0)
        for process in self.processes:
            process.heard = 0
        latest = {exited.worker_id: exited for exited in self.ended.values()}
        for exited in latest.values():
            self.report(exited)
        for process in self.processes[which % 3 :]:
            if self.able("greet", process):
                self.greet(process, 0)

    def report(self, exited: WorkerExited) -> None:
        self.reported.add(exited.pid)
        if exited.code == 0 and self.coordinators > 1:  # it may have been done while no coordinator was there
            self.finishing = True
        self.job.say("l0", exited)

    # What they hear of it.

    def say(self, process: Process, message: Any) -> None:
        self.job.say(process.peer, message)

    def read_all(self) -> None:
        for process in self.processes:
            if self.able("read", process):
                for to, message in self.job.sent[process.heard :]:
                    if to == process.peer:
                        self.read(process, message)
                process.heard = len(self.job.sent)
        self.check()

    def read(self, process: Process, message: Any) -> None:
        match message:
            case Welcome(running=running):
                process.joins = running > 0
            case Prepare():
                if message.generation > process.generation:
                    process.prepare = message
            case Form() if message.generation > process.generation:
                assert process.prepare is not None
                if process.prepare.generation == message.generation:
                    process.generation, process.members = message.generation, process.prepare.members
                    process.ready = False
            case Lost() | Expelled() | Refused() | AllLeft():
                process.over = True

    # What must hold.

    def check(self) -> None:
        new, self.seen = self.job.sent[self.seen :], len(self.job.sent)
        for _, message in new:
            match message:
                case Prepare() if message not in self.prepared:
                    self.check_prepare(message)
                case Form() if message not in self.formed:
                    self.check_form(message)
        verdicts = {message for _, message in self.job.sent if isinstance(message, (JobDone, JobFailed))}
        assert len(verdicts) <= 1
        assert len(self.job.finished) <= 1
        views: dict[int, tuple[Seat, ...]] = {}
        for process in self.processes:
            if process.pid not in self.ended and process.generation:
                assert views.setdefault(process.generation, process.members) == process.members

    def check_prepare(self, prepare: Prepare) -> None:
        assert prepare.generation > self.newest
        self.newest = prepare.generation
        pids = [seat.pid for seat in prepare.members]
        assert self.reported.isdisjoint(pids), "a member that is known to have ended"
        ids = [seat.worker_id for seat in prepare.members]
        assert len(set(ids)) == len(ids)
        assert prepare.reason
        if len(prepare.members) < min(self.least, self.world_size):
            assert self.finishing
        self.prepared.append(prepare)

    def check_form(self, form: Form) -> None:
        prepared = [prepare for prepare in self.prepared if prepare.generation == form.generation]
        assert len(prepared[-1].members) == len(form.addresses)
        assert form.generation == self.newest
        pids = {seat.pid for seat in prepared[-1].members}
        for process in self.processes:
            if process.pid in pids and process.pid not in self.ended:
                assert process.generation <= form.generation
        self.formed.append(form)


WORLDLY = ("restart", "replace", "offer_all", "greet_all", "bind_all", "tick", "join")
ACTIONS = (
    *WORLDLY,
    *WORLDLY[3:],
    *WORLDLY[4:],
    "greet",
    "bind",
    "offer",
    "leave",
    "suspect",
    "suspect",
    "admit",
    "depart",
    "get_ready",
    "fail",
    "exit",
    "exit",
    "freeze",
    "thaw",
)
STEPS = st.tuples(st.sampled_from(ACTIONS), st.integers(0, 7), st.integers(0, 5))


@settings(max_examples=400)
@given(st.integers(1, MOST), st.integers(1, MOST), st.booleans(), st.lists(STEPS, max_size=80))
def test_whatever_happens(
    world_size: int, least: int, begun: bool, steps: list[tuple[str, int, int]]
) -> None:
    world = World(world_size, min(least, world_size))
    start = [("greet_all", 0, 0), ("bind_all", 0, 0), ("admit", 0, 0)] if begun else []
    for action, which, other in start + steps:
        world.act(action, which, other)
