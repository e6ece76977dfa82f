"""PURE: how an elastic ring goes on when a member is lost, leaves, complains or joins.

All that comes to its end in a new generation: of those that remain, or with those that joined. A
ring with fewer members than the minimum does not go on, unless some have left because their
scripts are done: then the job is ending, and whoever remains may finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringps.membership.ending import STOPPED_CODE, Ending
from ringps.membership.feuds import Feuds, Suspicion
from ringps.membership.joining import GiveUp, Join, Joining
from ringps.membership.roster import Phase, Worker
from ringps.membership.state import JobState
from ringps.membership.vacancies import Vacancies
from ringps.wire.control import (
    Expel,
    Expelled,
    Feed,
    Joiners,
    Offer,
    Resume,
    Suspect,
    WorkerExited,
    clip,
)

STOP_PATIENCE_S = 1.0
"""Too few remain after one was asked to leave: for how long the others may yet be asked too."""

REMINDER_INTERVAL_S = 1.0
"""How often one that was taken for lost is told so, at most."""

_ASKED = "asked to leave (SIGTERM)"


@dataclass(frozen=True)
class _Change:
    """Why the generation cannot go on as it is."""

    words: str
    worker: Worker | None
    """Who is gone; None if nobody is."""
    reason: str
    code: int | None
    blames: int | None
    since_s: float


class Succession:
    """Decides on generations after the first one of an elastic ring."""

    def __init__(self, state: JobState, ending: Ending) -> None:
        timeouts = state.settings.timeouts
        self._state = state
        self._ending = ending
        self._feuds = Feuds(timeouts.closed_connection_s)
        self._joining = Joining()
        self._vacancies = Vacancies()
        self._changes: list[_Change] = []
        self._joined: dict[Worker, tuple[int, str]] = {}
        self._joiners_told: tuple[int, tuple[int, ...]] = (0, ())
        self._resume: Resume | None = None
        self._forming: tuple[int, float] = (0, 0.0)
        """Number of the generation that is forming, and since when."""
        self._unheard: dict[int, int] = {}
        self._unheard_until_s = float("-inf")

    # What happens to members.

    def lose(
        self, worker: Worker, reason: str, now_s: float, *, code: int | None, blames: int | None = None
    ) -> None:
        """A member is gone."""
        self._end(worker, Phase.GONE, reason)
        self._changes.append(_Change(f"{worker.name} lost: {reason}", worker, reason, code, blames, now_s))

    def depart(self, worker: Worker, step: int, now_s: float) -> None:
        """A member was asked to leave, and does so after this step."""
        self._end(worker, Phase.LEFT, _ASKED)
        worker.departed = True
        self._state.emit_end("worker_left", worker, _ASKED, step=step)
        words = f"{worker.name} left after step {step}"
        self._changes.append(_Change(words, worker, _ASKED, STOPPED_CODE, None, now_s))

    def leave(self, worker: Worker) -> None:
        """A member's script is done. The others stay as they are."""
        self._feuds.forget(worker.worker_id)

    def disturb(self, reason: str, now_s: float) -> None:
        """The generation cannot go on, though nobody is gone."""
        self._changes.append(_Change(reason, None, reason, None, None, now_s))

    def suspect(self, accuser: Worker, suspect: Suspect, now_s: float) -> str | None:
        """A member cannot reach another. None, or the reason for not looking into it."""
        accused = self._state.roster.get(suspect.worker_id)
        if accused is None or accused is accuser or accused not in self._state.ring.remaining:
            return "suspect is no other member"
        entry = Suspicion(
            accuser.worker_id, accused.worker_id, suspect.reason, now_s, forming=suspect.forming
        )
        self._feuds.suspect(entry)
        return None

    def expel(self, worker: Worker) -> None:
        """This worker was taken for lost, and its process may still run: end it."""
        worker.expelled = True
        owner = self._state.plan.owner_of(worker.worker_id)
        if owner is not None and worker.exited is None:
            self._state.out.send_to(owner, _order(worker))

    def remind(self, worker: Worker, now_s: float, *, at_once: bool = False) -> None:
        """A worker that is gone speaks: it is told that it was taken for lost, now and then."""
        due = at_once or now_s - worker.expelled_told_s >= REMINDER_INTERVAL_S
        if worker.expelled and due:
            worker.expelled_told_s = now_s
            expelled = Expelled(generation=self._state.ring.number, reason=clip(worker.end))
            self._state.out.tell(worker, expelled)

    # What happens to joiners.

    def admit_joiners(self) -> None:
        """A member's script takes new workers from now on."""
        self._vacancies.wanted = True

    def ready(self, worker: Worker) -> None:
        """A joiner waits for the state. It says so again on every connection."""
        if worker.phase is Phase.JOINING:
            worker.phase = Phase.READY

    def offer(self, worker: Worker, offer: Offer) -> None:
        """A member pauses, and serves its state."""
        self._joining.offer(worker.worker_id, offer)

    def lose_joiner(self, worker: Worker, reason: str) -> None:
        """A joiner is gone; the ring goes on without it."""
        self._end(worker, Phase.GONE, reason)
        self._state.emit_end("joiner_lost", worker, clip(reason))

    def lose_unheard(self, exited: WorkerExited) -> str | None:
        """A process ended that was to take its id, before it said hello. None, or why it does not count."""
        worker_id = exited.worker_id
        if exited.pid and self._unheard.get(worker_id) == exited.pid:
            return "exit reported before"
        self._unheard[worker_id] = exited.pid
        self._vacancies.renew(worker_id)
        generation = self._state.ring.number
        self._state.emit("joiner_lost", generation=generation, worker_id=worker_id, reason=exited.reason)
        return None

    def abandoned(self) -> frozenset[int]:
        """Worker ids that nobody has, and whose launcher is gone: it has left, or did not end the process
        that it was told to."""
        if not self._state.running:
            return frozenset()
        state = self._state
        gone = set()
        for worker_id in range(state.plan.world_size or 0):
            worker = state.roster.get(worker_id)
            if worker is not None and worker.vacant:
                silent = worker.expelled and worker.exited is None and not worker.reassigned
                if silent or state.plan.owner_of(worker_id) not in state.launchers:
                    gone.add(worker_id)
        return frozenset(gone)

    def await_unheard(self, until_s: float) -> None:
        """Worker ids of which nothing was heard may be taken by processes that come back by then."""
        self._unheard_until_s = until_s

    # What follows.

    def turn_away(self, now_s: float) -> bool:
        """Of a generation that could form: exclude joiners that were started with other settings than the
        members; whether there are any. The members could not exchange data with them."""
        members = [worker for worker in self._state.ring.members if worker.feed is None]
        joiners = [worker for worker in self._state.ring.members if worker.feed is not None]
        usual = {_settings(worker) for worker in members}
        strange = [worker for worker in joiners if usual and _settings(worker) not in usual]
        for worker in strange:
            self.lose(
                worker,
                f"started with other settings than the ring ({_settings(worker)} instead of "
                f"{', '.join(sorted(usual))}: --transport, and a word that stands for the RINGPS_* "
                "variables of the exchange); start it with the same",
                now_s,
                code=1,
            )
            self.expel(worker)
            self.remind(worker, now_s, at_once=True)
        return bool(strange)

    def wait_for_members(self, now_s: float) -> None:
        """Of a generation that is to form: who does not come for too long is lost."""
        ring, limit_s = self._state.ring, self._state.settings.timeouts.op_timeout_s
        if ring.formed or not self._state.running:
            self._forming = (0, now_s)
        elif self._forming[0] != ring.number:
            self._forming = (ring.number, now_s)
        elif now_s >= self._forming[1] + limit_s:
            for worker in ring.members:
                if worker.phase is Phase.PREPARED:
                    self.lose(
                        worker,
                        f"it has not come to the new generation for {limit_s:g} s (op_timeout_s): its script "
                        "hangs, or does something else for so long",
                        now_s,
                        code=1,
                    )
                    self.expel(worker)
                    self.remind(worker, now_s, at_once=True)

    def formed(self) -> None:
        """A generation has formed: some have joined with it."""
        for worker in self._state.ring.members:
            worker.feed = None
        for worker, (step, reason) in self._joined.items():
            if worker.phase is Phase.MEMBER:
                self._state.emit_end("worker_joined", worker, reason, step=step)
        self._joined.clear()

    def settle_changes(self, now_s: float) -> None:
        """Losses, departures and complaints lead to another generation, or to the end."""
        if not self._state.running:
            return
        if not self._changes:
            self._judge(now_s)
        if self._changes:
            self._resolve(now_s)

    def advance(self, now_s: float) -> None:
        """Joiners, and places for them."""
        state = self._state
        if not state.running or self._changes or self._ending.verdict is not None:
            return
        if state.ring.formed:
            self._advance_joining(now_s)
        if self._vacancies.wanted:
            for replaceable in self._vacancies.announce(self._vacant(now_s)):
                owner = state.plan.owner_of(replaceable.worker_id)
                if owner is not None:
                    state.out.send_to(owner, replaceable)

    def catch_up(self, worker: Worker) -> None:
        """Tell a worker that is back what it may have missed of all this."""
        state = self._state
        if not state.running:
            return
        if worker.feed is not None:
            state.out.tell(worker, worker.feed)
        if worker.phase is Phase.MEMBER:
            generation = state.ring.number
            state.out.tell(worker, Joiners(generation=generation, worker_ids=self._joiner_ids()))
            # A member that pauses waits for news about its own offer, and must not take this for it.
            pauses = self._joining.pauses(worker.worker_id)
            if self._resume is not None and self._resume.generation == generation and not pauses:
                state.out.tell(worker, self._resume)

    def catch_up_launcher(self, session: str) -> None:
        """Tell a launcher that is back what it may have missed of all this."""
        state = self._state
        for worker in (*state.roster.replaced(), *state.roster.everybody()):
            if worker.expelled and worker.exited is None and state.plan.owns(session, worker.worker_id):
                state.out.send_to(session, _order(worker))
        if state.running:
            for replaceable in self._vacancies.told():
                if state.plan.owns(session, replaceable.worker_id):
                    state.out.send_to(session, replaceable)

    # Inside.

    def _end(self, worker: Worker, phase: Phase, reason: str) -> None:
        worker.phase, worker.end = phase, reason
        self._state.detector.forget(worker.worker_id)
        self._feuds.forget(worker.worker_id)

    def _judge(self, now_s: float) -> None:
        remaining = self._state.ring.remaining
        ruling = self._feuds.judge(now_s, {worker.worker_id: worker.host for worker in remaining})
        if ruling is None:
            return
        roster = self._state.roster
        accuser, accused = roster[ruling.first.accuser], roster[ruling.first.accused]
        complaint = f"rank {accuser.rank} cannot reach {accused.name}: {ruling.first.reason}; {ruling.reason}"
        if not ruling.excluded:
            self._reform(remaining, complaint)
        for worker_id in ruling.excluded:
            excluded = roster[worker_id]
            self.lose(excluded, f"excluded: {complaint}", now_s, code=1)
            self.expel(excluded)
            self.remind(excluded, now_s, at_once=True)

    def _resolve(self, now_s: float) -> None:
        state, changes = self._state, self._changes
        remaining = state.ring.remaining
        ending = any(
            worker.phase is Phase.LEFT and not worker.departed for worker in state.roster.everybody()
        )
        least = state.settings.min_workers or 0
        ends = [change for change in changes if change.worker is not None]
        departures = [change for change in ends if change.worker is not None and change.worker.departed]
        if ends and not state.surroundings.fenced and not state.ring.has_majority:
            return  # the others may go on with another coordinator; this one waits until it is certain
        if remaining and (len(remaining) >= least or ending or not ends):
            self._announce_losses()
            self._changes = []
            self._reform(remaining, "; ".join(change.words for change in changes))
        elif ending:
            self._announce_losses()
            self._changes = []
            self._ending.all_left(now_s)
        elif not remaining and len(departures) == len(changes):
            self._changes = []
            last = departures[-1].worker
            assert last is not None
            self._ending.stopped(last, now_s)
        elif not remaining or not departures or now_s >= departures[0].since_s + STOP_PATIENCE_S:
            self._changes = []
            self._fail(
                changes, f"; {len(remaining)} of at least {least} workers (--min-workers) remain", now_s
            )

    def _fail(self, changes: Sequence[_Change], shortfall: str, now_s: float) -> None:
        """Too few remain: the job fails, because of the first loss if there was one."""
        ends = [(change, change.worker) for change in changes if change.worker is not None]
        ends.sort(key=lambda end: end[1].departed)
        for change, worker in ends:
            worker.shortfall = shortfall
            reason = change.reason + shortfall
            self._ending.blame(worker, reason, now_s, code=change.code, blames=change.blames)
        first, worker = ends[0]
        self._ending.lose(worker, first.reason + shortfall)

    def _announce_losses(self) -> None:
        for change in self._changes:
            if change.worker is not None and not change.worker.departed:
                self._state.emit_end("worker_lost", change.worker, clip(change.reason))

    def _reform(self, members: Sequence[Worker], reason: str) -> None:
        self._joining.void()
        self._resume = None
        self._feuds.settle()
        self._state.prepare(members, reason)

    def _advance_joining(self, now_s: float) -> None:
        state, ring = self._state, self._state.ring
        ready = state.roster.inside({Phase.READY})
        if ready and ring.token is None:
            reason = "workers wait to join, and the coordinator, which was restarted, has no token for them"
            self._reform(ring.remaining, reason)
            return
        self._tell_joiners()
        match self._joining.decide(ring.remaining, ready):
            case Join(step, servers, joiners, reason):
                assert ring.token is not None
                feed = Feed(
                    generation=ring.number,
                    step=step,
                    servers=servers,
                    token_public=ring.token[0],
                    token_secret=ring.token[1],
                )
                for worker in joiners:
                    worker.feed = feed
                    state.detector.hurry(worker.worker_id)
                state.out.tell_all(joiners, feed)
                self._joined.update((worker, (step, reason)) for worker in joiners)
                self._reform([*ring.remaining, *joiners], reason)
            case GiveUp(reason):
                self._joining.void()
                self._resume = Resume(generation=ring.number, reason=reason)
                state.out.tell_all(ring.remaining, self._resume)

    def _tell_joiners(self) -> None:
        ring = self._state.ring
        ids = self._joiner_ids()
        if self._joiners_told != (ring.number, ids):
            if ids or self._joiners_told[1]:
                self._state.out.tell_all(ring.remaining, Joiners(generation=ring.number, worker_ids=ids))
            self._joiners_told = (ring.number, ids)

    def _joiner_ids(self) -> tuple[int, ...]:
        return tuple(worker.worker_id for worker in self._state.roster.inside({Phase.READY}))

    def _vacant(self, now_s: float) -> dict[int, str]:
        vacant = {}
        for worker_id in range(self._state.plan.world_size or 0):
            worker = self._state.roster.get(worker_id)
            if worker_id in self._state.surroundings.forsaken:
                continue
            if worker is None or worker.phase is Phase.AWAITED:
                # One whose end its launcher told of cannot come back.
                if now_s >= self._unheard_until_s or worker_id in self._unheard:
                    vacant[worker_id] = "no process of this worker takes part"
            elif worker.vacant:
                vacant[worker_id] = worker.end
        return vacant


def _settings(worker: Worker) -> str:
    """What a worker's address says of its settings."""
    word, space, _ = worker.address.partition(" ")
    return word if space else ""


def _order(worker: Worker) -> Expel:
    return Expel(worker_id=worker.worker_id, pid=worker.pid, reason=clip(worker.end))
