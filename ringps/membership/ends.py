"""PURE: how a worker's part in the job ends: it leaves, it fails, or its process exits.

The three reach the coordinator in any order, since a worker speaks over its own connection and its
launcher over another.
"""

from __future__ import annotations

from ringps.membership.early_exits import EarlyExits
from ringps.membership.ending import Ending
from ringps.membership.roster import JOINERS, SEATED, Phase, Worker
from ringps.membership.state import JobState
from ringps.membership.succession import Succession
from ringps.wire.control import Failing, WorkerExited, clip
from ringps.worker_env import SUSPENDED_CODE


class Ends:
    """Takes note of the end of each worker, and has decided what it means for the ring."""

    def __init__(self, state: JobState, succession: Succession, ending: Ending) -> None:
        self._state = state
        self._succession = succession
        self._ending = ending
        self._early = EarlyExits()

    def leave(self, worker: Worker, completed: int, now_s: float, *, suspended: bool) -> None:
        """A member called shutdown(), or left because the job stops at a checkpoint."""
        state = self._state
        assert worker.rank is not None
        worker.phase, worker.completed, worker.suspended = Phase.LEFT, completed, suspended
        state.detector.forget(worker.worker_id)
        self._succession.leave(worker)
        state.inquiries.know(worker.rank, worker.absence() or "")
        state.out.tell_all(state.ring.members, state.ring.left(worker), but=worker)
        if state.ring.all_left:
            self._ending.all_left(now_s)
        if (exited := self._early.take(worker)) is not None:
            self._judge(worker, exited, now_s)

    def exit(self, exited: WorkerExited, now_s: float) -> str | None:
        """A launcher reports the end of a process. None, or why that does not count."""
        state = self._state
        worker: Worker | None = state.roster[exited.worker_id]
        if state.survives:
            worker = state.roster.of_process(exited.worker_id, exited.pid)
            if worker is None or worker.phase is Phase.AWAITED:
                refused = self._succession.lose_unheard(exited)
                if refused is None and _failed_by_itself(exited):
                    state.charge(Worker(exited.worker_id), exited.reason)
                return refused
        assert worker is not None
        if state.settings.pods and worker.adopted and worker.pid != exited.pid:
            return "exit of another process"  # one that came while the ring was not back yet
        if worker.exited is not None or worker in self._early:
            return "exit reported before"
        member = worker.phase is Phase.MEMBER and worker.session
        if exited.code == SUSPENDED_CODE and member and worker.failing is None:
            state.detector.forget(worker.worker_id)
            self._early.hold(worker, exited, now_s)
        else:
            self._judge(worker, exited, now_s)
        return None

    def judge_early(self, now_s: float) -> None:
        """Judge the exits of those whose last words have not come in time."""
        for worker, exited in self._early.take_due(now_s):
            self._judge(worker, exited, now_s)

    def fail_by_its_word(self, worker: Worker, failing: Failing, now_s: float) -> None:
        """A worker says that it fails, and why."""
        worker.failing = failing
        blames = failing.blames
        if blames is not None and not self._may_have_failed(blames, worker):
            blames = None
        # Its launcher will tell the exit code; without one, nobody will.
        code = 1 if self._state.plan.host_of(worker.worker_id) is None else None
        self.fail(worker, failing.reason, now_s, code=code, blames=blames)

    def vanish(self, worker: Worker, reason: str, now_s: float) -> None:
        """A worker's machine is gone for certain."""
        worker.exited = worker.exited or WorkerExited(
            worker_id=worker.worker_id, pid=worker.pid, code=1, reason=clip(reason), stopping=True
        )
        if worker.phase is not Phase.LEFT:
            self.fail(worker, reason, now_s, code=1)

    def fail(
        self, worker: Worker, reason: str, now_s: float, *, code: int | None, blames: int | None = None
    ) -> None:
        """A worker failed. An elastic ring goes on without it, if it can."""
        if self._state.survives and worker.phase in JOINERS:
            self._succession.lose_joiner(worker, reason)
        elif self._state.survives and worker.phase in SEATED:
            self._succession.lose(worker, reason, now_s, code=code, blames=blames)
        elif not worker.departed or self._state.ring.lost is not None:
            self._ending.blame(worker, reason, now_s, code=code, blames=blames)
            if blames is None and worker.phase is not Phase.LEFT:
                # If it blames another, that one's own end is about to be noticed, and says more.
                self._ending.lose(worker, reason)

    def _may_have_failed(self, blamed: int, by: Worker) -> bool:
        """Whether that worker's end may explain this one's. Of one that left in order, or whose loss the
        ring survived, it does not."""
        if blamed == by.worker_id or blamed not in self._state.roster:
            return False
        phase = self._state.roster[blamed].phase
        return phase is not Phase.LEFT and not (phase is Phase.GONE and self._state.survives)

    def _judge(self, worker: Worker, exited: WorkerExited, now_s: float) -> None:
        worker.exited = exited
        before, reason = worker.phase, exited.reason
        if self._state.survives and worker.vacant:
            failing = worker.failing
            alone = failing is not None and failing.blames is None and not worker.expelled
            if failing is not None and alone and _failed_by_itself(exited):
                self._state.charge(worker, f"{reason}: {failing.reason}")
            return
        if exited.code == SUSPENDED_CODE:
            if before is Phase.LEFT and worker.suspended:
                return
            # Its own words are lost, perhaps because no coordinator was there; the others' say the same.
            if before is Phase.MEMBER and (self._ending.suspended or not worker.session):
                self.leave(worker, 0, now_s, suspended=True)
                return
        if exited.code == 0:
            if before is Phase.LEFT:
                return
            if before is Phase.AWAITED:  # a script without a ring; if others form one, it is missed then
                worker.phase = Phase.GONE
                return
            if before is Phase.MEMBER and not worker.session:  # it was done while no coordinator was there
                self.leave(worker, 0, now_s, suspended=False)
                return
            reason = f"{reason} before it called ringps.shutdown()"
        if worker.failing is not None:
            reason = f"{reason}: {worker.failing.reason}"
        if self._state.survives and _failed_by_itself(exited):
            self._state.charge(worker, reason)
        self.fail(worker, reason + worker.shortfall, now_s, code=exited.code or 1)


def _failed_by_itself(exited: WorkerExited) -> bool:
    return not exited.stopping and exited.code not in (0, SUSPENDED_CODE)
