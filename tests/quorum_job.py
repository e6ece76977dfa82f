"""A coordinator's core with everybody who talks to it, without a socket or a clock."""

from __future__ import annotations

from typing import Any

from ringps.config import Timeouts
from ringps.membership.events import (
    Action,
    Beaten,
    Emit,
    Finish,
    QuorumSettings,
    Received,
    Record,
    Refuse,
    Send,
    StartAgain,
    Tick,
)
from ringps.membership.quorum import Quorum
from ringps.membership.restarts import RingRestarts
from ringps.membership.surroundings import Surroundings
from ringps.wire.control import (
    Beat,
    Bound,
    Form,
    Hello,
    LauncherHello,
    WorkerExited,
    encode,
)

TICK_S = 0.1
TIMEOUTS = Timeouts(heartbeat_timeout_s=3.0, inquiry_timeout_s=2.0, shutdown_timeout_s=5.0)


def session_of(peer: str) -> str:
    """The session of the process behind a peer."""
    return peer.encode().hex().rjust(32, "0")


def hello_of(worker_id: int, peer: str, **changes: Any) -> Hello:
    """What a fresh process says first; its peer id also makes its session."""
    values: dict[str, Any] = {
        "host": "node-a",
        "pid": 1000 + worker_id,
        "generation": 0,
        "members": (),
        "program": "script",
        "session": session_of(peer),
    }
    return Hello(worker_id=worker_id, **{**values, **changes})


class Job:
    """A quorum and everybody who talks to it. Peer ids are `w0`, `w1`... and `l0`, `l1`..."""

    def __init__(
        self,
        world_size: int | None = 3,
        *,
        settle_s: float = 1.0,
        min_workers: int | None = None,
        token: str = "p" * 40,
        restarts: RingRestarts | None = None,
        first_generation: int = 1,
        now_s: float = 100.0,
        surroundings: Surroundings | None = None,
        **settings: Any,
    ) -> None:
        """`settings` are further ones of `QuorumSettings`."""
        self.now_s = now_s
        self.sent: list[tuple[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.refused: list[str] = []
        self.finished: list[str] = []
        self.suspended: list[bool] = []
        """Of those that finished, whether they stopped at a checkpoint."""
        self.again: list[float] = []
        """After which delay the ring is started again."""
        self.records: list[str] = []
        """The verdicts that are to be written down."""
        self.counts: dict[int, int] = {}
        self.beating: set[int] = set()
        self.quorum = Quorum(
            QuorumSettings(
                world_size=world_size,
                settle_s=settle_s,
                encrypt_data=False,
                heartbeat_port=4242,
                timeouts=TIMEOUTS,
                min_workers=min_workers,
                first_generation=first_generation,
                **settings,
            ),
            lambda: (token, "s" * 40),
            restarts,
            surroundings,
        )

    def say(self, peer: str, message: Any) -> None:
        self.take(self.quorum.handle(Received(peer.encode(), message), self.now_s))

    def beat(self, worker_id: int, *, step: int = 0, generation: int = 0, peer: str | None = None) -> None:
        self.counts[worker_id] = self.counts.get(worker_id, 0) + 1
        beat = Beat(
            worker_id=worker_id,
            session=session_of(peer or f"w{worker_id}"),
            generation=generation,
            step=step,
            count=self.counts[worker_id],
        )
        self.beat_again(beat)

    def beat_again(self, beat: Beat) -> None:
        self.take(self.quorum.handle(Beaten(beat), self.now_s))

    def sleep(self, duration_s: float) -> None:
        """Time goes by in ticks, in which those in `beating` beat."""
        for _ in range(round(duration_s / TICK_S)):
            self.now_s += TICK_S
            for worker_id in sorted(self.beating):
                self.beat(worker_id, generation=self.quorum.generation)
            self.tick()

    def tick(self) -> None:
        """The coordinator looks at its clock."""
        self.take(self.quorum.handle(Tick(), self.now_s))

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(peer, message):
                    encode(message)
                    self.sent.append((peer.decode(), message))
                case Emit(event, _):
                    self.events.append(event)
                case Refuse(reason):
                    self.refused.append(reason)
                case Finish(reason, suspended):
                    self.finished.append(reason)
                    self.suspended.append(suspended)
                case StartAgain(delay_s):
                    self.again.append(delay_s)
                case Record(verdict):
                    self.records.append(verdict)

    def heard(self, peer: str, kind: type) -> list[Any]:
        """What a peer was told, of one kind."""
        return [message for to, message in self.sent if to == peer and isinstance(message, kind)]

    def told(self, kind: type) -> list[str]:
        """Who was told something of this kind, in order."""
        return [to for to, message in self.sent if isinstance(message, kind)]

    def hello(self, worker_id: int, *, host: str = "node-a", peer: str | None = None) -> None:
        peer = peer or f"w{worker_id}"
        self.say(peer, hello_of(worker_id, peer, host=host))
        self.beating.add(worker_id)

    def launch(
        self, index: int, slots: int, *, host: str | None = None, encrypt: bool = False, peer: str = ""
    ) -> None:
        message = LauncherHello(
            host=host or f"node-{index}",
            address=f"10.0.0.{index}",
            slots=slots,
            master_port=29500 + index,
            encrypt_data=encrypt,
            first_worker_id=None,
            world_size=None,
            session=session_of(f"l{index}"),
        )
        self.say(peer or f"l{index}", message)

    def bind(self, worker_id: int) -> None:
        self.say(f"w{worker_id}", Bound(generation=1, address=f"tcp://10.0.0.{worker_id}:1"))

    def exit(self, worker_id: int, code: int, *, launcher: int = 0) -> None:
        reason = (
            f"process exited with code {code}" if code < 128 else f"process killed by signal {code - 128}"
        )
        exited = WorkerExited(worker_id=worker_id, pid=1000 + worker_id, code=code, reason=reason)
        self.say(f"l{launcher}", exited)


def formed(world_size: int = 3, *, launcher: bool = False) -> Job:
    """A job whose ring has formed, with what was said until then forgotten."""
    job = Job(world_size)
    if launcher:
        job.launch(0, world_size, host="node-a")
    for worker_id in range(world_size):
        job.hello(worker_id)
    for worker_id in range(world_size):
        job.bind(worker_id)
    assert job.told(Form) == [f"w{worker_id}" for worker_id in range(world_size)]
    assert not job.refused
    job.sent.clear()
    return job
