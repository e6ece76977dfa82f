"""PURE: how a job ends: all have left, all were asked to leave, or a failure that it cannot survive.

After such a failure the whole ring can be started again, if there is a checkpoint to go on from.
"""

from __future__ import annotations

from ringps.membership.causes import Failure, RootCause
from ringps.membership.restarts import RingRestart
from ringps.membership.roster import JOINERS, Phase, Worker
from ringps.membership.state import JobState
from ringps.wire.control import AllLeft, JobDone, JobFailed, Lost, clip, clip_line
from ringps.wire.rules import MAX_CALL_BYTES

STOPPED_CODE = 143
"""As a shell gives it for a process that SIGTERM ended."""


class Ending:
    """Decides when the job is over and with what verdict, and sees that all hear of it."""

    def __init__(self, state: JobState) -> None:
        self._state = state
        self._causes = RootCause(state.settings.timeouts.heartbeat_timeout_s)
        self._patient_until_s = float("inf")
        self._finished = False
        self.verdict: JobFailed | JobDone | None = _recalled(state.settings.verdict)
        """What the launchers are told in the end."""
        self.told = self.verdict is not None
        """Whether they have been."""
        self.restart: RingRestart | None = None
        """The next start of the ring that this coordinator is to serve; None if there is none."""

    def blame(
        self, worker: Worker, reason: str, now_s: float, *, code: int | None, blames: int | None = None
    ) -> None:
        """A failure that the job does not survive, or more about one: the root cause is looked for."""
        self._causes.note(worker.worker_id, reason, now_s, code=code, blames=blames)

    def lose(self, worker: Worker, reason: str) -> None:
        """The ring ends with this worker. Only the first is announced: the others follow from it."""
        state, ring = self._state, self._state.ring
        if worker.phase is not Phase.GONE:
            state.detector.forget(worker.worker_id)
        worker.phase = Phase.GONE
        if worker.rank is not None and worker in ring.members:
            state.inquiries.know(worker.rank, clip_line(f"lost: {reason}", MAX_CALL_BYTES))
        if ring.lost is not None:
            return
        lost = ring.lost = Lost(
            generation=ring.number,
            rank=state.rank(worker),
            worker_id=worker.worker_id,
            host=state.host(worker),
            reason=clip(reason),
        )
        concerned = list(state.roster.greeted())
        for other in concerned:
            state.out.tell(other, lost)
        if concerned:
            state.emit_end("worker_lost", worker, lost.reason)

    def all_left(self, now_s: float) -> None:
        """No member is left that trains: whoever waits for the end, or to join, may go."""
        state = self._state
        if state.ended:
            return
        state.ended = True
        self._patient_until_s = now_s + state.settings.timeouts.shutdown_timeout_s
        state.tell_step(now_s, at_once=True)
        others = [worker for worker in state.roster.everybody() if worker not in state.ring.members]
        waiting = [
            worker
            for worker in (*state.ring.members, *others)
            if worker.phase in JOINERS or (worker.phase is Phase.LEFT and not worker.departed)
        ]
        for worker in waiting:
            if worker.phase in JOINERS:  # it ends now, and that may take a while without beats
                state.detector.forget(worker.worker_id)
        state.out.tell_all(waiting, AllLeft(generation=state.ring.number))

    def stopped(self, worker: Worker, now_s: float) -> None:
        """All members were asked to leave; this one was the last."""
        self.all_left(now_s)
        self.blame(worker, "every worker was asked to leave (SIGTERM)", now_s, code=STOPPED_CODE)

    def advance(self, now_s: float) -> None:
        """What follows from the state as it now is."""
        state = self._state
        self._fail_if_too_many_are_forsaken(now_s)
        root = self._causes.decide(now_s)
        if root is not None and self.verdict is None:
            worker = state.roster[root.worker_id]
            state.tell_step(now_s, at_once=True)
            self._decide(self._failed(worker, root, now_s))
        settled = state.plan.complete and state.plan.ready(now_s)
        # Of pods, those of all members may be gone before they have come back to another coordinator.
        settled = settled or (state.ended and state.settings.pods)
        all_exited = settled and self._all_exited(now_s)
        if self.verdict is not None and not self.told:
            self._tell(now_s)
        if self._causes.decided:
            over = all_exited or not state.launchers or now_s >= self._patient_until_s
            if self.told and over:
                self._finish("a worker failed")
        elif self._causes.failed:
            pass  # which one was the root cause is about to be decided
        elif all_exited and self.verdict is None:
            state.tell_step(now_s, at_once=True)
            self._decide(JobDone(suspended=self.suspended))
            self._tell(now_s)
        elif state.ended and not state.launchers and not state.settings.pods:
            self._finish("all workers have left")

    def _fail_if_too_many_are_forsaken(self, now_s: float) -> None:
        """Of a ring that is yet to form: those that wait would wait for ever."""
        state = self._state
        hopeless = bool(state.surroundings.forsaken) and not state.enough_may_come
        if not hopeless or state.ring.formed_once or self.verdict is not None or self._causes.failed:
            return
        worker_id, reason = next(reversed(state.surroundings.forsaken.items()))
        self.blame(state.roster[worker_id], reason, now_s, code=1)
        self.lose(state.roster[worker_id], reason)

    def _decide(self, verdict: JobFailed | JobDone) -> None:
        """How the job, or this start of its ring, ends. Where other coordinators may follow on this one, none
        of the workers must hear of the end of the job before those would."""
        state = self._state
        self.verdict = verdict
        if not state.settings.pods or self.restart is not None:
            state.surroundings.recorded = True
        elif isinstance(verdict, JobFailed):
            state.out.record(f"failed: {verdict.reason}")
        elif verdict.suspended:
            state.surroundings.recorded = True
        else:
            state.out.record("done")

    def _tell(self, now_s: float) -> None:
        state, verdict = self._state, self.verdict
        if verdict is None or not state.surroundings.recorded:
            return
        self.told = True
        state.out.send_all(state.plan.launchers, verdict)
        if isinstance(verdict, JobDone):
            self._finish("all workers have exited")
        else:
            self._patient_until_s = now_s + state.settings.timeouts.shutdown_timeout_s

    @property
    def suspended(self) -> bool:
        """Whether the members that were the last left because the job stops at a checkpoint."""
        return any(worker.suspended for worker in self._state.roster.everybody())

    def _failed(self, worker: Worker, root: Failure, now_s: float) -> JobFailed:
        state, reason = self._state, root.reason
        if worker.exited is not None and not worker.exited.stopping and not worker.departed:
            state.charge(worker, reason)
        restarts = self._restartable(worker)
        budget = state.surroundings.budget
        if budget is not None and not restarts and not state.given_up and budget.words not in reason:
            reason = f"{reason}; {budget.words}"
        if restarts and state.restarts is not None:
            self.restart, words = state.restarts.plan(now_s)
            restarts = self.restart is not None
            if not restarts:
                reason = f"{reason}; {words}"
        failed = JobFailed(
            worker_id=root.worker_id,
            rank=state.rank(worker),
            host=state.host(worker),
            code=root.code or 1,
            reason=clip(reason),
            restarts=restarts,
        )
        if self.restart is not None:
            state.emit(
                "ring_restarting",
                reason=clip(
                    f"rank {failed.rank} (worker {failed.worker_id} on {failed.host}) failed: {reason}"
                ),
                restarts_left=self.restart.restarts_left,
                delay_s=self.restart.delay_s,
            )
        return failed

    def _restartable(self, worker: Worker) -> bool:
        """Whether the ring can be started again after this worker's failure: there are a checkpoint to go
        on from and launchers that start workers, and nobody had asked it to stop. Of pods, others follow on
        them, with a checkpoint or without one, while the budget lasts; what the cluster takes away is
        replaced even after that."""
        if self._state.settings.pods:
            budget = self._state.surroundings.budget
            own = budget is not None and budget.exhausted and worker.charged
            return not (self._state.given_up or own) and self._state.enough_may_come
        asked = worker.departed or (worker.exited is not None and worker.exited.stopping)
        return self._state.resumable and bool(self._state.launchers) and not asked

    def _all_exited(self, now_s: float) -> bool:
        state, roster = self._state, self._state.roster
        if not state.survives:
            members = {worker.worker_id for worker in state.ring.members}
            workers = [roster.get(worker_id) for worker_id in {*state.plan.expected, *members}]
            # A pod is gone with its launcher, and nobody is left to tell of the exit.
            gone = {Phase.GONE} if state.settings.pods else frozenset()
            over = [one is not None and (one.exited is not None or one.phase in gone) for one in workers]
            return bool(over) and all(over)
        if not state.ended:
            return False
        running = [worker for worker in roster.everybody() if worker.session and worker.exited is None]
        if now_s >= self._patient_until_s or state.settings.pods:
            # Of those lost or told to go on the way, an exit that was not seen by now never will be.
            running = [worker for worker in running if worker.phase is Phase.LEFT and not worker.departed]
        return not running

    def _finish(self, reason: str) -> None:
        if self._finished:
            return
        self._finished = True
        if self.restart is not None:
            self._state.out.start_again(self.restart.delay_s)
        elif self._state.settings.pods and self.suspended and not self._causes.failed:
            self._state.out.start_again(0.0)
        else:
            self._state.out.finish(reason, suspended=self.suspended and not self._causes.failed)


def _recalled(verdict: str) -> JobFailed | JobDone | None:
    """What an earlier coordinator wrote down."""
    kind, _, reason = verdict.partition(": ")
    if not kind:
        return None
    if kind == "done":
        return JobDone()
    return JobFailed(worker_id=0, rank=0, host="an earlier pod", code=1, reason=clip(reason))
