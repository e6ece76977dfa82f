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

from ringps.membership import disputes
from ringps.membership.admission import refusal
from ringps.membership.catching_up import catch_up
from ringps.membership.ending import Ending
from ringps.membership.ends import Ends
from ringps.membership.events import Action, Beaten, Event, QuorumSettings, Received, Tick
from ringps.membership.launchers import Launchers
from ringps.membership.machines import Machines
from ringps.membership.notes import note
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
from ringps.wire.control import (
    Admitting,
    Ask,
    Beat,
    Bound,
    CallReport,
    Departing,
    Dispute,
    Failing,
    FromLauncher,
    FromWorker,
    Hello,
    LauncherHello,
    Leaving,
    Noted,
    Offer,
    Ready,
    Refused,
    Suspect,
    Waiting,
    clip,
)

JOINER_PATIENCE_S = 30.0
"""How long a worker that is to join may be silent before it is a member."""

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
        self._launchers = Launchers(state, self._succession, self._ending, self._ends, self._restoration)
        self._machines = Machines(state, self._ending, self._ends, self._restoration, self._launchers)

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
        return max(self._state.first_number, self._ring.number + NUMBERS_SKIPPED + 1)

    @property
    def waiting_launchers(self) -> list[tuple[bytes, LauncherHello]]:
        """Those that have come for the next start of the ring, and from which peer; its quorum is to hear
        their hellos."""
        return self._launchers.waiting

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
                self._machines.handle(event, now_s)
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
                if self._peers.session_of(peer) is not None:
                    return _SAID_BEFORE
                return self._launchers.greet(peer, message, now_s)
        session = self._peers.session_of(peer)
        if session is not None and session in self._state.launchers:
            return self._launchers.hear(session, message, now_s)
        if self._launchers.waits(peer):
            return self._launchers.hear_waiting(peer, message)
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
                return disputes.open_one(self._state, sequence, now_s)
            case CallReport(sequence=sequence, call=call):
                return disputes.answer(self._state, worker, sequence, call)
            case Leaving():
                self._ends.leave(worker, message.completed, now_s, suspended=message.suspended)
            case Failing():
                if not self._restoration.forget(worker):
                    self._ends.fail_by_its_word(worker, message, now_s)
            case Noted(event=event):
                return note(self._state, worker, event)
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
        if (end := self._state.surroundings.end_of(hello.host)) is not None:
            self._out.send(peer, Refused(reason=clip(f"{hello.host} is gone: {end}")))
            return "machine is gone"
        if self._restoration.concerns(hello):
            return self._restoration.take(peer, hello, now_s)
        if self._settings.pods:
            self._launchers.displace(hello.worker_id, hello.host, now_s)
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

    # What follows from the state as it now is.

    def _follow_up(self, now_s: float) -> None:
        self._launchers.settle(now_s)
        self._restore(now_s)
        self._ends.judge_early(now_s)
        self._lose_the_silent(now_s)
        self._succession.wait_for_members(now_s)
        self._succession.settle_changes(now_s)
        self._advance_formation(now_s)
        self._succession.advance(now_s)
        disputes.settle(self._state, now_s)
        self._state.tell_step(now_s)
        self._ending.advance(now_s)
        self._launchers.seat_waiting(now_s)
        if self._settings.pods:
            self._launchers.tell_what_is_missing(now_s)

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
            if self._restoration.under_way and worker.phase is Phase.WAITING:
                self._detector.watch(worker_id, now_s)  # judged once the ring is back that it waits for
                continue
            if not worker.session:
                reason = "it did not come back after the coordinator was restarted"
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
            and (not self._settings.pods or (self._plan.complete and self._plan.ready(now_s)))
            and self._waiting.issuperset(self._plan.expected)
            and not self._restoration.under_way
            and self._state.surroundings.fenced
        ):
            came = len(self._waiting)
            reason = f"all {world_size} workers have come"
            if came < world_size:
                silent_s = self._settings.settle_s
                reason = f"{came} of {world_size} workers have come, and no other for {silent_s:g} s"
            self._state.prepare(self._roster.inside({Phase.WAITING}), reason)

    @property
    def _waiting(self) -> set[int]:
        return {worker.worker_id for worker in self._roster.inside({Phase.WAITING})}
