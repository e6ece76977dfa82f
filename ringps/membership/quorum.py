"""PURE: the coordinator's decisions. Events and the time go in, actions come out.

The ring of this version is fixed: it forms once, when all workers have come, and ends with the
first loss. Formation has two phases. When every worker has said `Hello`, all are told to
`Prepare`: to listen for data connections. When every one is `Bound`, all are told to `Form`: to
connect. So nobody connects to an address where nobody listens yet.

Who sends is decided by the connection (`peers`), and for heartbeats by the session in them, so a
frame that a stranger replays is refused, whatever it says. A process whose connection broke says
hello again and is told once more what it may have missed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ringps.membership.causes import RootCause
from ringps.membership.detector import SilenceDetector
from ringps.membership.events import (
    Action,
    Beaten,
    Event,
    QuorumSettings,
    Received,
    Tick,
)
from ringps.membership.formation import Ring
from ringps.membership.inquiry import Inquiries
from ringps.membership.peers import Outbox, PeerBook
from ringps.membership.plan import JobPlan
from ringps.membership.roster import ACTIVE, BEATING, IN_RENDEZVOUS, Phase, Roster, Worker
from ringps.wire.control import (
    AllLeft,
    Ask,
    Beat,
    Bound,
    CallReport,
    Dispute,
    Failing,
    FromLauncher,
    FromWorker,
    Hello,
    Inquire,
    JobDone,
    JobFailed,
    LauncherHello,
    LauncherLeaving,
    Leaving,
    Lost,
    Refused,
    Verdict,
    Waiting,
    Welcome,
    WorkerExited,
    clip,
    clip_line,
)
from ringps.wire.rules import MAX_CALL_BYTES

STEP_EVENT_INTERVAL_S = 1.0

_WHEN: dict[type, frozenset[Phase]] = {
    Ask: IN_RENDEZVOUS,
    Bound: frozenset({Phase.PREPARED}),
    Dispute: frozenset({Phase.MEMBER}),
    CallReport: frozenset({Phase.MEMBER, Phase.LEFT}),
    Leaving: frozenset({Phase.MEMBER}),
    Failing: BEATING,
}
"""The phases in which a worker may say something."""

_OUT_OF_TURN = "message out of turn"
_UNKNOWN_PEER = "peer is no part of this job"
_OTHER_GENERATION = "frame of another generation"
_SAID_BEFORE = "hello said before"
_COMPLETE = "the ring is complete; joining later is not possible in this version"


class Quorum:
    """The state machine of one job's coordinator.

    Args:
        settings: what the coordinator was told.
        new_token: gives a fresh CURVE key pair, public and secret half, for each generation.
    """

    def __init__(self, settings: QuorumSettings, new_token: Callable[[], tuple[str, str]]) -> None:
        timeouts = settings.timeouts
        self._settings = settings
        self._new_token = new_token
        self._plan = JobPlan(settings.world_size, settings.settle_s)
        self._roster = Roster()
        self._launchers: set[str] = set()
        self._peers = PeerBook()
        self._ring = Ring()
        self._detector = SilenceDetector(timeouts.heartbeat_timeout_s)
        self._inquiries = Inquiries(timeouts.inquiry_timeout_s)
        self._causes = RootCause(timeouts.heartbeat_timeout_s)
        self._step = self._step_told = 0
        self._step_told_s = float("-inf")
        self._verdict: JobFailed | JobDone | None = None
        self._patient_until_s = float("inf")
        self._finished = False
        self._out = Outbox(self._peers)

    @property
    def generation(self) -> int:
        """Number of the generation that is being formed or has formed; 0 before."""
        return self._ring.number

    @property
    def members(self) -> int:
        """Workers that take part now: said hello, and neither left nor gone."""
        return self._roster.count(*ACTIVE)

    @property
    def launchers(self) -> int:
        """Launchers that take part now."""
        return len(self._launchers)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """What follows from an event at `now_s`, on any monotonic clock."""
        refusal = None
        match event:
            case Tick():
                self._follow_up(now_s)
            case Beaten(beat):  # what follows from it can wait for the next tick
                refusal = self._on_beat(beat, now_s)
            case Received(peer, message):
                refusal = self._on_message(peer, message, now_s)
                if refusal is None:
                    self._follow_up(now_s)
        if refusal is not None:
            self._out.refuse(refusal)
        return self._out.take()

    # Messages. Every handler returns None, or the reason for refusing the message.

    def _on_message(self, peer: bytes, message: FromWorker | FromLauncher, now_s: float) -> str | None:
        match message:
            case Hello():
                return self._on_hello(peer, message, now_s)
            case LauncherHello():
                return self._on_launcher_hello(peer, message, now_s)
        session = self._peers.session_of(peer)
        if session in self._launchers:
            return self._on_launcher(session, message, now_s)
        worker = self._roster.of_session(session)
        if worker is None:
            return _UNKNOWN_PEER
        if worker.phase not in _WHEN.get(type(message), ()):
            return _OUT_OF_TURN
        if getattr(message, "generation", self._ring.number) != self._ring.number:
            return _OTHER_GENERATION
        return self._on_worker(worker, message, now_s)

    def _on_worker(self, worker: Worker, message: FromWorker | FromLauncher, now_s: float) -> str | None:
        match message:
            case Ask():
                reason = self._roster.waiting_for(self._plan.world_size or 0)
                self._out.tell(worker, Waiting(reason=reason))
            case Bound(address=address):
                worker.address, worker.phase = address, Phase.BOUND
            case Dispute(sequence=sequence):
                return self._on_dispute(sequence, now_s)
            case CallReport(sequence=sequence, call=call):
                assert worker.rank is not None
                return self._inquiries.answer(sequence, worker.rank, call)
            case Leaving(completed=completed):
                self._on_leaving(worker, completed, now_s)
            case Failing():
                self._on_failing(worker, message, now_s)
        return None

    def _on_hello(self, peer: bytes, hello: Hello, now_s: float) -> str | None:
        if self._peers.session_of(peer) is not None:
            return _SAID_BEFORE
        known = self._roster.of_session(hello.session)
        if known is not None and known.worker_id == hello.worker_id:
            self._peers.write_down(hello.session, peer)
            self._catch_up(known)
            return None
        refusal = self._hello_refusal(hello)
        if refusal is not None:
            reason, detail = refusal
            self._out.send(peer, Refused(reason=clip(detail)))
            return reason
        if self._ring.lost is not None:
            self._out.send(peer, self._ring.lost)
            return None
        self._peers.write_down(hello.session, peer)
        self._catch_up(self._roster.admit(hello))
        self._detector.watch(hello.worker_id, now_s)
        return None

    def _hello_refusal(self, hello: Hello) -> tuple[str, str] | None:
        """Why a worker may not take part: in a fixed phrase, and in words for its user."""
        if self._ring.number and self._ring.lost is None:
            return (_COMPLETE, _COMPLETE)
        if hello.session in self._peers:
            return ("session taken", "another process has this session")
        world_size = self._plan.world_size
        if world_size is None:
            return (
                "job size not known yet",
                "the size of the job is not known before its launchers have come; "
                "start workers with `ringps run`, or give the coordinator a world size",
            )
        if hello.worker_id >= world_size:
            return (
                "worker id out of range",
                f"worker id {hello.worker_id} is not one of 0..{world_size - 1}, the workers of this job",
            )
        holder = self._roster.taken(hello.worker_id)
        if holder is not None:
            return (
                "worker id taken",
                f"worker id {hello.worker_id} is taken by {holder}; give each worker an id of its own",
            )
        return None

    def _on_dispute(self, sequence: int, now_s: float) -> str | None:
        members = self._ring.members
        known = [worker.absence() for worker in members]
        ask, reason = self._inquiries.open(sequence, known, now_s)
        if not ask:
            return reason
        for worker in members:
            if worker.absence() is None:
                self._out.tell(worker, Inquire(generation=self._ring.number, sequence=sequence))
        return None

    def _on_leaving(self, worker: Worker, completed: int, now_s: float) -> None:
        assert worker.rank is not None
        worker.phase, worker.completed = Phase.LEFT, completed
        self._detector.forget(worker.worker_id)
        self._inquiries.know(worker.rank, worker.absence() or "")
        self._out.tell_all(self._ring.members, self._ring.left(worker), but=worker)
        if self._ring.all_left:
            self._tell_step(now_s, at_once=True)
            self._out.tell_all(self._ring.members, AllLeft(generation=self._ring.number))

    def _on_failing(self, worker: Worker, failing: Failing, now_s: float) -> None:
        worker.failing = failing
        blames = failing.blames
        if blames is not None and not self._may_have_failed(blames, worker):
            blames = None
        # Its launcher will tell the exit code; without one, nobody will.
        code = 1 if self._plan.host_of(worker.worker_id) is None else None
        self._causes.note(worker.worker_id, failing.reason, now_s, code=code, blames=blames)
        if blames is None and worker.phase is not Phase.LEFT:
            # If it blames another, that one's own end is about to be noticed, and says more.
            self._lose(worker, failing.reason)

    def _on_launcher_hello(self, peer: bytes, hello: LauncherHello, now_s: float) -> str | None:
        if self._peers.session_of(peer) is not None:
            return _SAID_BEFORE
        if hello.session not in self._launchers:
            if hello.session in self._peers:
                return "session taken"
            detail = self._plan.offer(hello, now_s)
            if detail is not None:
                self._out.send(peer, Refused(reason=clip(detail)))
                return "no room for this launcher"
            self._launchers.add(hello.session)
        self._peers.write_down(hello.session, peer)
        self._catch_up_launcher(hello.session)
        return None

    def _on_launcher(self, session: str, message: FromWorker | FromLauncher, now_s: float) -> str | None:
        match message:
            case Ask():
                self._out.send_to(session, Waiting(reason=clip(self._plan.waiting_for())))
            case LauncherLeaving():
                self._plan.withdraw(session)
                self._launchers.discard(session)
                self._peers.cross_out(session)
            case WorkerExited(worker_id=worker_id):
                if not self._plan.owns(session, worker_id):
                    return "launcher does not own this worker"
                if self._roster[worker_id].exited is not None:
                    return "exit reported before"
                self._on_exit(self._roster[worker_id], message, now_s)
            case _:
                return _OUT_OF_TURN
        return None

    def _on_exit(self, worker: Worker, exited: WorkerExited, now_s: float) -> None:
        before, reason = worker.phase, exited.reason
        worker.exited = exited
        if exited.code == 0:
            if before is Phase.LEFT:
                return
            if before is Phase.AWAITED:  # a script without a ring; if others form one, it is missed then
                worker.phase = Phase.GONE
                return
            reason = f"{reason} before it called ringps.shutdown()"
        if worker.failing is not None:
            reason = f"{reason}: {worker.failing.reason}"
        self._causes.note(worker.worker_id, reason, now_s, code=exited.code or 1)
        if before is not Phase.LEFT:
            self._lose(worker, reason)

    # Heartbeats.

    def _on_beat(self, beat: Beat, now_s: float) -> str | None:
        worker = self._roster.of_session(beat.session)
        if worker is None:
            return _UNKNOWN_PEER
        if beat.worker_id != worker.worker_id:
            return "heartbeat for another worker"
        if worker.phase not in BEATING:
            return "heartbeat of a worker that is gone"
        last = worker.beat
        if last is not None and beat.count <= last.count:
            return "heartbeat replayed"
        if beat.generation > self._ring.number or (last is not None and beat.generation < last.generation):
            return _OTHER_GENERATION
        worker.beat = beat
        if worker.phase in ACTIVE:
            self._detector.heard(worker.worker_id, now_s)
        self._step = max(self._step, beat.step)
        return None

    # What follows from the state as it now is.

    def _follow_up(self, now_s: float) -> None:
        if self._plan.settle(now_s):
            for session in self._plan.launchers:
                self._out.send_to(session, self._plan.assignment(session))
        for worker_id, reason in self._detector.silent(now_s):
            self._causes.note(worker_id, reason, now_s, code=1)
            self._lose(self._roster[worker_id], reason)
        self._advance_formation(now_s)
        for sequence, calls in self._inquiries.settle(now_s):
            verdict = Verdict(generation=self._ring.number, sequence=sequence, calls=calls)
            self._out.tell_all(self._ring.members, verdict)
        self._tell_step(now_s)
        self._advance_end(now_s)

    def _advance_formation(self, now_s: float) -> None:
        ring, world_size = self._ring, self._plan.world_size
        if ring.lost is not None or ring.formed or not any(self._roster.greeted()):
            return
        gone = self._roster.gone()
        if gone is not None:  # with code 0, or the ring would be lost already
            reason = "process exited with code 0 without joining the ring, for which others wait"
            self._causes.note(gone.worker_id, reason, now_s, code=1)
            self._lose(gone, reason)
        elif ring.number == 0 and self._roster.count(Phase.WAITING) == world_size:
            self._prepare()
        elif self._roster.count(Phase.BOUND) == world_size:
            self._form()

    def _prepare(self) -> None:
        members = self._roster.in_ring_order(self._plan.hosts)
        encrypt = self._settings.encrypt_data or self._plan.encrypt_data
        self._out.tell_all(members, self._ring.prepare(members, self._new_token(), encrypt))

    def _form(self) -> None:
        ring = self._ring
        self._out.tell_all(ring.members, ring.form())
        reason = f"all {len(ring.members)} workers have come"
        self._emit("generation", generation=ring.number, members=ring.describe(), reason=reason)

    def _lose(self, worker: Worker, reason: str) -> None:
        """A worker is gone. Only the first is announced: the others follow from it."""
        worker.phase = Phase.GONE
        self._detector.forget(worker.worker_id)
        if worker.rank is not None:
            self._inquiries.know(worker.rank, clip_line(f"lost: {reason}", MAX_CALL_BYTES))
        if self._ring.lost is not None:
            return
        lost = self._ring.lost = Lost(
            generation=self._ring.number,
            rank=self._rank(worker),
            worker_id=worker.worker_id,
            host=self._host(worker),
            reason=clip(reason),
        )
        concerned = list(self._roster.greeted())
        for other in concerned:
            self._out.tell(other, lost)
        if concerned:
            self._emit(
                "worker_lost",
                generation=lost.generation,
                worker_id=lost.worker_id,
                rank=lost.rank,
                host=lost.host,
                reason=lost.reason,
            )

    def _advance_end(self, now_s: float) -> None:
        root = self._causes.decide(now_s)
        if root is not None:
            worker = self._roster[root.worker_id]
            self._tell_step(now_s, at_once=True)
            self._verdict = JobFailed(
                worker_id=root.worker_id,
                rank=self._rank(worker),
                host=self._host(worker),
                code=root.code or 1,
                reason=clip(root.reason),
            )
            self._out.send_all(self._plan.launchers, self._verdict)
            self._patient_until_s = now_s + self._settings.timeouts.shutdown_timeout_s
        all_exited = self._plan.complete and self._roster.exited() == self._plan.world_size
        if self._causes.decided:
            if all_exited or not self._launchers or now_s >= self._patient_until_s:
                self._finish("a worker failed")
        elif all_exited and not self._finished:
            self._tell_step(now_s, at_once=True)
            self._verdict = JobDone()
            self._out.send_all(self._plan.launchers, self._verdict)
            self._finish("all workers have exited")
        elif self._ring.all_left and not self._launchers:
            self._finish("all workers have left")

    def _catch_up(self, worker: Worker) -> None:
        """Tell a worker that is new here, or back, all that concerns it. It skips what it knows."""
        ring = self._ring
        self._out.tell(worker, Welcome(heartbeat_port=self._settings.heartbeat_port))
        for message in ring.history(worker):
            self._out.tell(worker, message)
        if ring.lost is not None:
            self._out.tell(worker, ring.lost)
        elif ring.all_left:
            self._out.tell(worker, AllLeft(generation=ring.number))

    def _catch_up_launcher(self, session: str) -> None:
        self._out.send_to(session, Waiting(reason=clip(self._plan.waiting_for())))
        if self._plan.complete:
            self._out.send_to(session, self._plan.assignment(session))
        if self._verdict is not None:
            self._out.send_to(session, self._verdict)

    # Small things.

    def _finish(self, reason: str) -> None:
        if not self._finished:
            self._finished = True
            self._out.finish(reason)

    def _may_have_failed(self, blamed: int, by: Worker) -> bool:
        """Whether that worker's end may explain this one's. Of one that left in order, it does not."""
        if blamed == by.worker_id or blamed not in self._roster:
            return False
        return self._roster[blamed].phase is not Phase.LEFT

    def _rank(self, worker: Worker) -> int:
        # Before the ring forms there are no ranks; with launchers they will equal the worker ids.
        return worker.worker_id if worker.rank is None else worker.rank

    def _host(self, worker: Worker) -> str:
        return worker.host or self._plan.host_of(worker.worker_id) or "an unknown host"

    def _tell_step(self, now_s: float, *, at_once: bool = False) -> None:
        """Report the newest step, seldom more often than once in `STEP_EVENT_INTERVAL_S`."""
        due = at_once or now_s - self._step_told_s >= STEP_EVENT_INTERVAL_S
        if due and self._step > self._step_told:
            self._step_told, self._step_told_s = self._step, now_s
            self._emit("step_committed", step=self._step, generation=self._ring.number)

    def _emit(self, event: str, **details: Any) -> None:
        self._out.emit(self._plan.launchers, event, **details)
