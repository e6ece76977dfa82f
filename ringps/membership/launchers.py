"""PURE: launchers come, wait, take their seats in the plan, report exits and go.

Of pods, a launcher waits while a living process has its place, and while the ring forms for the first
time: whoever comes then is no part of it. One that is back has workers that run, so it is taken in at
once, whatever the ring does: what it reports of them is awaited.
"""

from __future__ import annotations

from ringps.membership.catching_up import catch_up_launcher, warn_launchers
from ringps.membership.ending import Ending
from ringps.membership.ends import Ends
from ringps.membership.placed import PlacedPlan
from ringps.membership.restoration import Restoration
from ringps.membership.roster import Phase
from ringps.membership.state import JobState
from ringps.membership.succession import Succession
from ringps.membership.waiting_room import NEXT_START, WaitingRoom
from ringps.wire.control import (
    Ask,
    FromLauncher,
    FromWorker,
    JobDone,
    LauncherHello,
    LauncherLeaving,
    Refused,
    Waiting,
    WorkerExited,
    clip,
)

_OUT_OF_TURN = "message out of turn"


class Launchers:
    """Who starts the job's workers. What a method returns is None, or the reason for refusing a message."""

    def __init__(
        self, state: JobState, succession: Succession, ending: Ending, ends: Ends, restoration: Restoration
    ) -> None:
        self._state = state
        self._succession = succession
        self._ending = ending
        self._ends = ends
        self._restoration = restoration
        self._waiting_room = WaitingRoom()
        self._missing = ""

    @property
    def waiting(self) -> list[tuple[bytes, LauncherHello]]:
        """Those that have come too early, and from which peer."""
        return self._waiting_room.all()

    def waits(self, peer: bytes) -> bool:
        """Whether one that waits is at this peer."""
        return peer in self._waiting_room

    # Messages.

    def greet(self, peer: bytes, hello: LauncherHello, now_s: float) -> str | None:
        """A launcher says hello, for the first time or on a new connection."""
        state = self._state
        if hello.session not in state.launchers:
            if hello.session in state.peers:
                return "session taken"
            over = self._is_over(hello)
            early = None if over and state.settings.pods else self._why_early(hello, now_s)
            if early is not None:
                return self._wait(peer, hello, early)
            if over:
                reason = "the whole ring was started again, and its workers here are not in it: start anew"
                state.out.send(peer, Refused(reason=reason))
                return "generation is over"
            detail = self._seat(hello, now_s)
            if detail is not None:
                state.out.send(peer, Refused(reason=clip(detail)))
                return "no room for this launcher"
        state.peers.write_down(hello.session, peer)
        catch_up_launcher(state, self._succession, self._ending, hello.session)
        return None

    def hear(self, session: str, message: FromWorker | FromLauncher, now_s: float) -> str | None:
        """One that has its seat says more."""
        state = self._state
        match message:
            case Ask():
                state.out.send_to(session, Waiting(reason=clip(state.plan.waiting_for())))
            case LauncherLeaving():
                state.plan.withdraw(session)
                if self._started_nothing(session):
                    self._vacate(session)
                state.launchers.discard(session)
                state.peers.cross_out(session)
            case WorkerExited(worker_id=worker_id):
                if not state.plan.owns(session, worker_id):
                    return "launcher does not own this worker"
                if self._restoration.keeps_exits(now_s):
                    return self._restoration.keep_exit(message)
                return self._ends.exit(message, now_s)
            case _:
                return _OUT_OF_TURN
        return None

    def hear_waiting(self, peer: bytes, message: FromWorker | FromLauncher) -> str | None:
        """One that waits says more."""
        match message:
            case Ask():
                self._state.out.send(peer, Waiting(reason=clip(self._waiting_room.reason_of(peer))))
            case LauncherLeaving():
                self._waiting_room.leave(peer)
            case WorkerExited():
                return self._waiting_room.keep(peer, message)
            case _:
                return _OUT_OF_TURN
        return None

    # What else happens.

    def vanish(self, host: str) -> None:
        """This machine is gone: nobody waits for workers that were never heard of there."""
        for peer, hello in self._waiting_room.all():
            if hello.host == host:
                self._waiting_room.leave(peer)
        for offer in self._state.plan.offers:
            if offer.hello.host == host and self._started_nothing(offer.session):
                self._vacate(offer.session)

    def displace(self, worker_id: int, host: str, now_s: float) -> None:
        """A pod is there in the place of another, of which nobody will report anything any more. (A cluster
        makes no pod before the one before it of the same index has ended.)"""
        worker = self._state.roster.get(worker_id)
        if worker is None or worker.host == host:
            return
        if worker.unheard:
            self._ends.vanish(worker, "its pod was replaced while no coordinator was there", now_s)
        if worker.vacant:
            worker.pid = 0

    def settle(self, now_s: float) -> None:
        """Complete the plan if it is time."""
        state = self._state
        if not state.plan.settle(now_s):
            return
        if state.restarts is not None:
            state.restarts.began(now_s)
        self._assign()

    def seat_waiting(self, now_s: float) -> None:
        """Those whose time has come take their seats; all hear of the job's end."""
        if self._state.ended and self._state.settings.pods:
            self._outlive(now_s)
        verdict = self._ending.verdict
        over = verdict is not None and self._ending.told and self._ending.restart is None
        if isinstance(verdict, JobDone) and verdict.suspended:
            over = False  # the next start is theirs
        for peer, hello in self._waiting_room.all():
            if verdict is not None and over:
                self._waiting_room.leave(peer)
                self._state.out.send(peer, verdict)
            elif self._why_early(hello, now_s) is None:
                exits = self._waiting_room.leave(peer)
                refusals = [self.greet(peer, hello, now_s)]
                if hello.session in self._state.launchers:
                    refusals += [self.hear(hello.session, exited, now_s) for exited in exits]
                for refused in filter(None, refusals):
                    self._state.out.refuse(refused)

    def tell_what_is_missing(self, now_s: float) -> None:
        """Of pods: a line for the events file while no ring is there for want of them."""
        state = self._state
        settled = state.plan.complete and state.plan.ready(now_s)
        there = settled or state.ring.number > 0 or self._ending.verdict is not None
        waits_for = "" if there else state.plan.waiting_for()
        if waits_for != self._missing:
            self._missing = waits_for
            if waits_for:
                state.emit("waiting", reason=clip(waits_for))

    # Inside.

    def _assign(self) -> None:
        """Tell all that have seats which ids are theirs."""
        plan = self._state.plan
        for session in plan.launchers:
            self._state.out.send_to(session, plan.assignment(session))
        warn_launchers(self._state, plan.launchers)

    def _outlive(self, now_s: float) -> None:
        """All scripts are done. Where a pod is there in the place of another whose exit is still awaited,
        perhaps nobody is left to report it."""
        hellos = [hello for _, hello in self._waiting_room.all()]
        hellos += [offer.hello for offer in self._state.plan.offers]
        for hello in hellos:
            for worker_id in range(hello.place or 0, (hello.place or 0) + hello.slots):
                worker = self._state.roster.get(worker_id)
                done = worker is not None and worker.phase is Phase.LEFT and worker.exited is None
                if worker is not None and done and worker.host != hello.host:
                    self._ends.vanish(worker, f"{hello.host} has come in its place", now_s)

    def _is_over(self, hello: LauncherHello) -> bool:
        """Whether it comes with workers of an earlier start of the ring."""
        settings = self._state.settings
        started_again = settings.again if settings.pods else settings.first_generation > 1
        return started_again and hello.first_worker_id is not None

    def _why_early(self, hello: LauncherHello, now_s: float) -> str | None:
        """Why this launcher has to wait before it can take part; None if it need not."""
        state, plan = self._state, self._state.plan
        placed = isinstance(plan, PlacedPlan) and hello.place is not None
        if self._ending.restart is not None and not (placed and hello.first_worker_id is not None):
            return NEXT_START
        if not isinstance(plan, PlacedPlan) or hello.place is None:
            return None
        if (end := state.surroundings.end_of(hello.host)) is not None:
            return f"{hello.host} is gone: {end}"
        if hello.first_worker_id is None:
            if state.ring.lost is not None or self._ending.verdict is not None or state.ended:
                return "the ring is about to end"
            if state.ring.number and not state.ring.formed_once:
                return "the ring forms; it takes new workers once it has"
            for worker_id in range(hello.place, hello.place + hello.slots):
                if worker_id in state.surroundings.forsaken:
                    return f"worker {worker_id} has failed and the restarts are used up; nobody replaces it"
        return plan.busy(hello, self._holder, now_s)

    def _holder(self, worker_id: int) -> str | None:
        """The host of the process that has this worker id."""
        worker = self._state.roster.get(worker_id)
        if worker is None or worker.phase is Phase.AWAITED or worker.unheard:
            return None
        return None if worker.vacant and self._state.survives else worker.host

    def _wait(self, peer: bytes, hello: LauncherHello, reason: str) -> str | None:
        refused = self._waiting_room.enter(peer, hello, reason)
        if refused is None:
            self._state.out.send(peer, Waiting(reason=clip(reason)))
        return refused

    def _seat(self, hello: LauncherHello, now_s: float) -> str | None:
        """It has a part in the plan from now on."""
        state = self._state
        abandoned, dealt = self._succession.abandoned(), state.plan.complete
        detail = state.plan.offer(hello, now_s, abandoned)
        if detail is not None:
            return detail
        if state.plan.complete and not dealt:
            self._assign()  # it is back, which shows that the ids are dealt out: also to those before it
        state.launchers.add(hello.session)
        if state.settings.pods:
            for at in range(hello.slots):
                self.displace((hello.place or 0) + at, hello.host, now_s)
        for worker_id in abandoned:
            if state.plan.owns(hello.session, worker_id):
                state.roster[worker_id].reassigned = True
        for session in state.plan.take_evicted():
            reason = "the job's launchers are complete, and this one is not among them (any more)"
            state.out.send_to(session, Refused(reason=reason))
            self._forget(session)
        self._restoration.launcher_came(now_s)
        return None

    def _started_nothing(self, session: str) -> bool:
        """Of pods: whether nothing was ever heard of this launcher's workers."""
        state = self._state
        mine = [offer for offer in state.plan.offers if offer.session == session]
        ids = [offer.first_worker_id + at for offer in mine for at in range(offer.hello.slots)]
        workers = [worker for worker_id in ids if (worker := state.roster.get(worker_id)) is not None]
        unheard = all(worker.phase is Phase.AWAITED and worker.exited is None for worker in workers)
        return state.settings.pods and bool(mine) and unheard

    def _vacate(self, session: str) -> None:
        plan = self._state.plan
        assert isinstance(plan, PlacedPlan)
        plan.vacate(session)
        self._forget(session)

    def _forget(self, session: str) -> None:
        self._state.launchers.discard(session)
        self._state.peers.cross_out(session)
