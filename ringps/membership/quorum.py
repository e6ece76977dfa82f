"""PURE: the coordinator's decisions. Events and the time go in, actions come out.

The first generation forms when all workers have come. A *fixed* ring ends with the first loss. An
*elastic* one, which can do with fewer members, goes on in further generations (`succession`).

Formation has two phases. First all members are told to `Prepare`: to listen for data connections.
When every one is `Bound`, all are told to `Form`: to connect. So nobody connects to an address
where nobody listens yet.

Who sends is decided by the connection (`peers`), and for heartbeats by the session in them, so a
frame that a stranger replays is refused, whatever it says. A process whose connection broke says
hello again and is told once more what it may have missed. If the coordinator itself was restarted,
it takes the ring over from those who come back (`restoration`). A quorum serves one start of the
ring; after a failure from which the whole ring is started again, another one serves the next.
"""

from __future__ import annotations

from collections.abc import Callable

from ringps.membership.admission import refusal
from ringps.membership.catching_up import catch_up, catch_up_launcher
from ringps.membership.ending import Ending
from ringps.membership.ends import Ends
from ringps.membership.events import (
    Action,
    Beaten,
    Charged,
    Event,
    Fenced,
    Outside,
    Placed,
    QuorumSettings,
    Received,
    Recorded,
    Tick,
    Vanished,
    Warned,
)
from ringps.membership.placed import PlacedPlan
from ringps.membership.restarts import RingRestarts
from ringps.membership.restoration import Restoration
from ringps.membership.returning import NUMBERS_SKIPPED
from ringps.membership.roster import (
    ACTIVE,
    BEATING,
    IN_RENDEZVOUS,
    JOINERS,
    SEATED,
    TAKING_PART,
    Phase,
    Worker,
    names,
)
from ringps.membership.state import JobState
from ringps.membership.succession import Succession
from ringps.membership.surroundings import Surroundings
from ringps.membership.waiting_room import NEXT_START, WaitingRoom
from ringps.wire.control import (
    Admitting,
    Ask,
    Beat,
    Bound,
    CallReport,
    Departing,
    Dispute,
    Evict,
    Failing,
    FromLauncher,
    FromWorker,
    Hello,
    Inquire,
    LauncherHello,
    LauncherLeaving,
    Leaving,
    Noted,
    Offer,
    Ready,
    Refused,
    Suspect,
    Verdict,
    Waiting,
    WorkerExited,
    clip,
)

JOINER_PATIENCE_S = 30.0
"""How long a worker that is to join may be silent before it is a member."""

RESUMABLE = frozenset({"checkpoint_saved", "restored"})
"""Notes after which there is a checkpoint that the ring can be started again from..."""

GIVEN_UP = "checkpoints_given_up"
"""...and the one after which it is not to be: a later run goes on from it, or too many saves have failed."""

NOTES = RESUMABLE | {
    GIVEN_UP,
    "training",
    "straggler",
    "diverged",
    "recovered",
    "state_fetched",
    "checkpoint_failed",
    "checkpoint_late",
    "checkpoint_skipped",
}
"""The events that members may have written into the events file."""

_MAX_NOTE_FIELDS = 32

_WHEN: dict[type, frozenset[Phase]] = {
    Ask: IN_RENDEZVOUS | JOINERS,
    Bound: frozenset({Phase.PREPARED, Phase.BOUND}),
    Dispute: frozenset({Phase.MEMBER}),
    CallReport: frozenset({Phase.MEMBER, Phase.LEFT}),
    Leaving: frozenset({Phase.MEMBER}),
    Failing: BEATING,
    Suspect: frozenset({Phase.MEMBER}),
    Admitting: SEATED,
    Ready: JOINERS | {Phase.WAITING},
    Offer: frozenset({Phase.MEMBER}),
    Departing: SEATED,
    Noted: SEATED,
}
"""The phases in which a worker may say something."""

_ANY_GENERATION = (Admitting, Departing)
"""What stays true if another generation has begun meanwhile."""

_ELASTIC = (Suspect, Ready, Offer, Departing)
"""What makes sense only in a ring that goes on."""

_OUT_OF_TURN = "message out of turn"
_UNKNOWN_PEER = "peer is no part of this job"
_OTHER_GENERATION = "frame of another generation"
_SAID_BEFORE = "hello said before"
_FIXED = "the ring is fixed"
_GONE = "worker was taken for lost"
_OVER = "generation is over"


class Quorum:
    """The state machine of one job's coordinator, for one start of the ring.

    Args:
        settings: what the coordinator was told.
        new_token: gives a fresh CURVE key pair, public and secret half, for each generation.
        restarts: how often the whole ring may be started again, over all quorums of the job; None if
            whoever serves the job counts that, and goes by `JobFailed.restarts`.
        surroundings: what is known of the job's cluster, over all quorums of the job.
    """

    def __init__(
        self,
        settings: QuorumSettings,
        new_token: Callable[[], tuple[str, str]],
        restarts: RingRestarts | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        self._settings = settings
        self._state = state = JobState(settings, new_token, restarts, surroundings)
        self._plan, self._roster, self._ring = state.plan, state.roster, state.ring
        self._peers, self._out, self._detector = state.peers, state.out, state.detector
        self._ending = Ending(state)
        self._succession = Succession(state, self._ending)
        self._ends = Ends(state, self._succession, self._ending)
        self._restoration = Restoration(state, self._succession, self._ending)
        self._waiting_room = WaitingRoom()
        self._missing = ""

    @property
    def generation(self) -> int:
        """Number of the generation that is being formed or has formed; 0 before."""
        return self._ring.number

    @property
    def members(self) -> int:
        """Workers that are members or wait for the first generation, and neither left nor are gone."""
        return self._roster.count(*TAKING_PART)

    @property
    def launchers(self) -> int:
        """Launchers that take part now."""
        return len(self._state.launchers)

    @property
    def next_generation(self) -> int:
        """The first number that the next start of the ring may use: members that were lost may have been
        told of generations after this one."""
        return max(self._settings.first_generation, self._ring.number + NUMBERS_SKIPPED + 1)

    @property
    def waiting_launchers(self) -> list[tuple[bytes, LauncherHello]]:
        """Those that have come for the next start of the ring, and from which peer; its quorum is to hear
        their hellos."""
        return self._waiting_room.all()

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """What follows from an event at `now_s`, on any monotonic clock."""
        refused = None
        match event:
            case Tick():
                self._follow_up(now_s)
            case Beaten(beat):  # what follows from it can wait for the next tick
                refused = self._on_beat(beat, now_s)
            case Received(peer, message):
                refused = self._on_message(peer, message, now_s)
                if refused is None:
                    self._follow_up(now_s)
            case _:
                self._on_outside(event, now_s)
                self._follow_up(now_s)
        if refused is not None:
            self._out.refuse(refused)
        return self._out.take()

    # Messages. Every handler returns None, or the reason for refusing the message.

    def _on_message(self, peer: bytes, message: FromWorker | FromLauncher, now_s: float) -> str | None:
        match message:
            case Hello():
                return self._on_hello(peer, message, now_s)
            case LauncherHello():
                return self._on_launcher_hello(peer, message, now_s)
        session = self._peers.session_of(peer)
        if session in self._state.launchers:
            return self._on_launcher(session, message, now_s)
        if peer in self._waiting_room:
            return self._on_waiting_launcher(peer, message)
        if self._restoration.holds(session):
            return self._restoration.hold(peer, session, message)
        worker = self._roster.of_session(session)
        if worker is None:
            return _UNKNOWN_PEER
        if worker.expelled:
            self._succession.remind(worker, now_s)
            return _GONE
        if worker.phase not in _WHEN.get(type(message), ()):
            return _OUT_OF_TURN
        if isinstance(message, Ready) and worker.phase is Phase.WAITING:
            return self._restoration.early_ready(worker)
        if isinstance(message, _ELASTIC) and not self._state.running:
            return _OUT_OF_TURN if self._state.elastic else _FIXED
        generation = getattr(message, "generation", self._ring.number)
        if generation > self._ring.number or (
            generation < self._ring.number and not isinstance(message, _ANY_GENERATION)
        ):
            return _OTHER_GENERATION
        return self._on_worker(worker, message, now_s)

    def _on_worker(self, worker: Worker, message: FromWorker | FromLauncher, now_s: float) -> str | None:
        match message:
            case Ask():
                self._out.tell(worker, Waiting(reason=clip(self._waits_for(worker))))
            case Bound(address=address):
                worker.address, worker.phase = address, Phase.BOUND
            case Dispute(sequence=sequence):
                return self._on_dispute(sequence, now_s)
            case CallReport(sequence=sequence, call=call):
                return self._on_call_report(worker, sequence, call)
            case Leaving():
                self._ends.leave(worker, message.completed, now_s, suspended=message.suspended)
            case Failing():
                self._on_failing(worker, message, now_s)
            case Noted(event=event):
                return self._on_noted(worker, event)
            case Suspect():
                return self._succession.suspect(worker, message, now_s)
            case Admitting():
                self._succession.admit_joiners()
            case Ready():
                self._succession.ready(worker)
            case Offer():
                self._succession.offer(worker, message)
            case Departing(step=step):
                self._succession.depart(worker, step, now_s)
        return None

    def _on_hello(self, peer: bytes, hello: Hello, now_s: float) -> str | None:
        if self._peers.session_of(peer) is not None:
            return _SAID_BEFORE
        known = self._roster.of_session(hello.session)
        if known is not None and known.worker_id == hello.worker_id:
            self._peers.write_down(hello.session, peer)
            if known.expelled and self._ring.lost is None:
                self._succession.remind(known, now_s, at_once=True)
            else:
                catch_up(self._state, self._succession, known)
            return None
        if self._restoration.concerns(hello):
            return self._restoration.take(peer, hello, now_s)
        why_not = refusal(self._state, hello)
        if why_not is not None:
            reason, detail = why_not
            self._out.send(peer, Refused(reason=clip(detail)))
            return reason
        if self._ring.lost is not None:
            self._out.send(peer, self._ring.lost)
            return None
        self._peers.write_down(hello.session, peer)
        joins = self._state.survives
        worker = self._roster.admit(hello, Phase.JOINING if joins else Phase.WAITING)
        for session in self._roster.prune():
            self._peers.cross_out(session)
        # Nobody waits for one that joins, and importing a script's modules may hold up its beats for seconds.
        patience_s = max(JOINER_PATIENCE_S, self._settings.timeouts.heartbeat_timeout_s)
        self._detector.watch(hello.worker_id, now_s, patience_s=patience_s if joins else None)
        catch_up(self._state, self._succession, worker)
        return None

    def _waits_for(self, worker: Worker) -> str:
        ring, world_size = self._ring, self._plan.world_size or 0
        if self._restoration.under_way:
            return self._restoration.waits_for
        if worker.phase in JOINERS:
            running = len(ring.remaining)
            return f"the ring of {running} members has not yet paused between two steps to let workers join"
        if ring.formed_once:
            unbound = [seated.worker_id for seated in ring.members if seated.phase is Phase.PREPARED]
            return f"generation {ring.number} forms, but some do not listen for data yet: {names(unbound)}"
        return self._roster.waiting_for(world_size, ring.members)

    def _on_dispute(self, sequence: int, now_s: float) -> str | None:
        members = self._ring.members
        known = [worker.absence() for worker in members]
        ask, reason = self._state.inquiries.open(sequence, known, now_s)
        if not ask:
            return reason
        for worker in members:
            if worker.absence() is None:
                self._out.tell(worker, Inquire(generation=self._ring.number, sequence=sequence))
        return None

    def _on_call_report(self, worker: Worker, sequence: int, call: str) -> str | None:
        if worker.rank is None or worker not in self._ring.members:
            return _OUT_OF_TURN
        return self._state.inquiries.answer(sequence, worker.rank, call)

    def _on_failing(self, worker: Worker, failing: Failing, now_s: float) -> None:
        worker.failing = failing
        blames = failing.blames
        if blames is not None and not self._may_have_failed(blames, worker):
            blames = None
        # Its launcher will tell the exit code; without one, nobody will.
        code = 1 if self._plan.host_of(worker.worker_id) is None else None
        self._ends.fail(worker, failing.reason, now_s, code=code, blames=blames)

    def _on_noted(self, worker: Worker, event: dict[str, object]) -> str | None:
        name = event.get("event")
        if name not in NOTES or len(event) > _MAX_NOTE_FIELDS:
            return "note of an unknown kind"
        details = {key: value for key, value in event.items() if key != "event"}
        details |= {"generation": self._ring.number, "worker_id": worker.worker_id}
        if name in RESUMABLE or name == GIVEN_UP:
            self._state.resumable = name != GIVEN_UP
            self._state.given_up = name == GIVEN_UP
        self._state.emit(str(name), **details)
        return None

    # Launchers.

    def _on_launcher_hello(self, peer: bytes, hello: LauncherHello, now_s: float) -> str | None:
        if self._peers.session_of(peer) is not None:
            return _SAID_BEFORE
        if hello.session not in self._state.launchers:
            if hello.session in self._peers:
                return "session taken"
            early = self._why_early(hello)
            if early is not None:
                return self._on_early_launcher(peer, hello, early)
            settings = self._settings
            started_again = settings.again if settings.pods else settings.first_generation > 1
            if hello.first_worker_id is not None and started_again:
                reason = "the whole ring was started again, and its workers here are not in it: start anew"
                self._out.send(peer, Refused(reason=reason))
                return _OVER
            abandoned = self._succession.abandoned()
            detail = self._plan.offer(hello, now_s, abandoned)
            if detail is not None:
                self._out.send(peer, Refused(reason=clip(detail)))
                return "no room for this launcher"
            self._state.launchers.add(hello.session)
            if self._settings.pods:
                self._succeed(hello)
            for worker_id in abandoned:
                if self._plan.owns(hello.session, worker_id):
                    self._roster[worker_id].reassigned = True
            self._evict()
            self._restoration.launcher_came(now_s)
        self._peers.write_down(hello.session, peer)
        catch_up_launcher(self._state, self._succession, self._ending, hello.session)
        return None

    def _why_early(self, hello: LauncherHello) -> str | None:
        """Why this launcher has to wait before it can take part; None if it need not."""
        if self._ending.restart is not None:
            return NEXT_START
        plan = self._plan
        if not isinstance(plan, PlacedPlan) or hello.place is None:
            return None
        if self._ring.lost is not None or self._ending.verdict is not None or self._state.ended:
            return "the ring is about to end"
        return plan.busy(hello, self._holder)

    def _holder(self, worker_id: int) -> str | None:
        """The host of the process that has this worker id."""
        if worker_id in self._state.forsaken:
            return "a pod that failed"
        worker = self._roster.get(worker_id)
        if worker is None or worker.phase is Phase.AWAITED:
            return None
        return None if worker.vacant and self._state.survives else worker.host

    def _succeed(self, hello: LauncherHello) -> None:
        """This launcher is there in the place of others, whose processes nobody will report any more."""
        for at in range(hello.slots):
            worker = self._roster.get((hello.place or 0) + at)
            if worker is not None and worker.host != hello.host:
                worker.pid = 0

    def _seat_waiting(self, now_s: float) -> None:
        """Launchers whose time has come."""
        for peer, hello in self._waiting_room.all():
            verdict = self._ending.verdict
            if verdict is not None and self._ending.told and self._ending.restart is None:
                self._waiting_room.leave(peer)
                self._out.send(peer, verdict)
            elif self._why_early(hello) is None:
                self._waiting_room.leave(peer)
                refused = self._on_launcher_hello(peer, hello, now_s)
                if refused is not None:
                    self._out.refuse(refused)

    def _on_early_launcher(self, peer: bytes, hello: LauncherHello, reason: str) -> str | None:
        """It has come for the next start of the ring, or for a place that is taken."""
        refused = self._waiting_room.enter(peer, hello, reason)
        if refused is None:
            self._out.send(peer, Waiting(reason=clip(reason)))
        return refused

    def _on_waiting_launcher(self, peer: bytes, message: FromWorker | FromLauncher) -> str | None:
        match message:
            case Ask():
                self._out.send(peer, Waiting(reason=clip(self._waiting_room.reason_of(peer))))
            case LauncherLeaving():
                self._waiting_room.leave(peer)
            case _:
                return _OUT_OF_TURN
        return None

    def _evict(self) -> None:
        for session in self._plan.take_evicted():
            reason = "the job's launchers are complete, and this one is not among them (any more)"
            self._out.send_to(session, Refused(reason=reason))
            self._state.launchers.discard(session)
            self._peers.cross_out(session)

    def _on_launcher(self, session: str, message: FromWorker | FromLauncher, now_s: float) -> str | None:
        match message:
            case Ask():
                self._out.send_to(session, Waiting(reason=clip(self._plan.waiting_for())))
            case LauncherLeaving():
                self._plan.withdraw(session)
                self._state.launchers.discard(session)
                self._peers.cross_out(session)
            case WorkerExited(worker_id=worker_id):
                if not self._plan.owns(session, worker_id):
                    return "launcher does not own this worker"
                if self._restoration.keeps_exits(now_s):
                    return self._restoration.keep_exit(message)
                return self._ends.exit(message, now_s)
            case _:
                return _OUT_OF_TURN
        return None

    # Heartbeats.

    def _on_beat(self, beat: Beat, now_s: float) -> str | None:
        worker = self._roster.of_session(beat.session)
        if worker is None:
            return _UNKNOWN_PEER
        if beat.worker_id != worker.worker_id:
            return "heartbeat for another worker"
        if worker.phase not in BEATING:
            self._succession.remind(worker, now_s)
            return "heartbeat of a worker that is gone"
        last = worker.beat
        if last is not None and beat.count <= last.count:
            return "heartbeat replayed"
        if beat.generation > self._ring.number or (last is not None and beat.generation < last.generation):
            return _OTHER_GENERATION
        worker.beat = beat
        if worker.phase in ACTIVE:
            self._detector.heard(worker.worker_id, now_s)
        self._state.step = max(self._state.step, beat.step)
        return None

    # The cluster.

    def _on_outside(self, event: Outside, now_s: float) -> None:
        around = self._state.surroundings
        match event:
            case Fenced(held=held):
                around.fenced = held
            case Placed(host=host, place=place):
                around.put(host, place)
            case Warned(pods=pods, reason=reason):
                fresh = {host for _, host in pods if around.warn(host, reason)}
                for offer in self._plan.offers:
                    if offer.hello.host in fresh:
                        evict = Evict(worker_id=offer.first_worker_id, reason=clip(reason))
                        self._out.send_to(offer.session, evict)
            case Vanished(host=host, reason=reason):
                for worker in self._roster.inside(BEATING):
                    if worker.host == host:
                        self._vanish(worker, reason, now_s)
            case Charged(worker_id=worker_id, reason=reason):
                if worker_id < (self._plan.world_size or 0):
                    self._state.charge(self._roster[worker_id], reason)
            case Recorded():
                around.recorded = True

    def _vanish(self, worker: Worker, reason: str, now_s: float) -> None:
        """A worker's machine is gone."""
        exited = WorkerExited(
            worker_id=worker.worker_id, pid=worker.pid, code=1, reason=clip(reason), stopping=True
        )
        if worker.phase is not Phase.LEFT:
            self._ends.fail(worker, reason, now_s, code=1)
        worker.exited = worker.exited or exited

    # What follows from the state as it now is.

    def _follow_up(self, now_s: float) -> None:
        if self._plan.settle(now_s):
            if self._state.restarts is not None:
                self._state.restarts.began(now_s)
            for session in self._plan.launchers:
                self._out.send_to(session, self._plan.assignment(session))
        self._restore(now_s)
        self._ends.judge_early(now_s)
        self._lose_the_silent(now_s)
        self._succession.wait_for_members(now_s)
        self._succession.settle_changes(now_s)
        self._advance_formation(now_s)
        self._succession.advance(now_s)
        for sequence, calls in self._state.inquiries.settle(now_s):
            verdict = Verdict(generation=self._ring.number, sequence=sequence, calls=calls)
            self._out.tell_all(self._ring.members, verdict)
        self._state.tell_step(now_s)
        self._ending.advance(now_s)
        self._seat_waiting(now_s)
        if self._settings.pods:
            self._tell_what_is_missing()

    def _tell_what_is_missing(self) -> None:
        """While no ring is there."""
        waits_for = "" if self._plan.complete or self._ending.verdict else self._plan.waiting_for()
        if waits_for != self._missing:
            self._missing = waits_for
            if waits_for:
                self._state.emit("waiting", reason=clip(waits_for))

    def _restore(self, now_s: float) -> None:
        for peer, message in self._restoration.take_over(now_s):
            refused = self._on_message(peer, message, now_s)
            if refused is not None:
                self._out.refuse(refused)
        for exited in self._restoration.take_exits(now_s):
            refused = self._ends.exit(exited, now_s)
            if refused is not None:
                self._out.refuse(refused)

    def _lose_the_silent(self, now_s: float) -> None:
        for worker_id, silence in self._detector.silent(now_s):
            worker, reason = self._roster[worker_id], silence
            if not worker.session:
                timeout_s = self._settings.timeouts.heartbeat_timeout_s
                reason = f"it did not come back within {timeout_s:.1f} s after the coordinator was restarted"
            survives = self._state.survives
            self._ends.fail(worker, reason, now_s, code=1)
            if survives:
                self._succession.expel(worker)

    def _advance_formation(self, now_s: float) -> None:
        ring, world_size = self._ring, self._plan.world_size
        if ring.lost is not None or ring.formed or not any(self._roster.greeted()):
            return
        gone = None if ring.formed_once else self._roster.gone()
        if gone is not None:  # with code 0, or the ring would be lost already
            reason = "process exited with code 0 without joining the ring, for which others wait"
            self._ends.fail(gone, reason, now_s, code=1)
        elif ring.bound:
            if self._succession.turn_away(now_s):
                return
            self._state.form()
            self._succession.formed()
        elif (
            ring.number == 0
            and world_size is not None
            and (self._plan.complete or not self._settings.pods)
            and self._roster.count(Phase.WAITING) == len(self._plan.expected)
            and not self._restoration.under_way
            and self._state.surroundings.fenced
        ):
            came = len(self._plan.expected)
            reason = f"all {world_size} workers have come"
            if came < world_size:
                silent_s = self._settings.settle_s
                reason = f"{came} of {world_size} workers have come, and no other for {silent_s:g} s"
            self._state.prepare(self._roster.inside({Phase.WAITING}), reason)

    def _may_have_failed(self, blamed: int, by: Worker) -> bool:
        """Whether that worker's end may explain this one's. Of one that left in order, or whose loss the
        ring survived, it does not."""
        if blamed == by.worker_id or blamed not in self._roster:
            return False
        phase = self._roster[blamed].phase
        return phase is not Phase.LEFT and not (phase is Phase.GONE and self._state.survives)
