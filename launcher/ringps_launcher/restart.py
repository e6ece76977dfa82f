"""PURE: what to do when a worker exits, the coordinator speaks, a signal comes or time passes.

What a lost worker means for the job is the coordinator's to say. Either the job failed: the others
get a moment to raise their own errors and are then stopped, and the launcher ends with the exit
code of the worker that caused it all, or the whole ring is started again. Or the ring goes on without
the worker; then another one is started in its place, once the ring takes new workers and the lost
process is reaped, and while the budget lasts.

Workers that exit with `SUSPENDED_CODE` have saved a checkpoint, at which the job stops: they may do so
because the launcher passed SIGTERM on to them, or one on another machine did. Once all have, the
coordinator says that the job stopped there, and not that it failed.

::

    RUNNING ──the job failed, or no word came──> DRAINING ──drain_s──> STOPPING ──grace_s──> KILLING
     │ ^ └───────────SIGINT, SIGTERM, broken output─────────────────────^                   ^ ^
     │ └─a worker is to be replaced─┐       └──drain_s, the ring is started again───────────│─┘
     │                                                                  └──── second Ctrl-C ┘
     any, once no worker is left ──> WAITING (for the coordinator's word) ──> ENDED
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping

from ringps.worker_env import SUSPENDED_CODE
from ringps_launcher.losses import Losses
from ringps_launcher.outcome import Failure, Outcome, Saved, describe_stop
from ringps_launcher.replacement import Replacements
from ringps_launcher.stimuli import (
    Action,
    CheckpointSaved,
    CoordinatorBack,
    CoordinatorLost,
    Event,
    Expel,
    JobDone,
    JobFailed,
    Kill,
    LossNoted,
    Replaceable,
    Report,
    Restarting,
    RingFormed,
    Say,
    Start,
    StopAsked,
    Terminate,
    TimePassed,
    WorkerExited,
    WorkerStarted,
)

DRAIN_S = 2.0
"""How long the other workers may go on after the job failed, to raise their own errors."""

PATIENCE_S = 1.0
"""How long no worker may run here before we say what we are still waiting for."""


class Phase(enum.Enum):
    RUNNING = enum.auto()
    DRAINING = enum.auto()
    STOPPING = enum.auto()
    KILLING = enum.auto()
    WAITING = enum.auto()
    ENDED = enum.auto()


class Supervision:
    """Decides for the workers of one machine, in one start of the ring. Feed it events; carry out what it
    returns."""

    def __init__(
        self,
        ranks: Mapping[int, int],
        *,
        host: str,
        grace_s: float,
        verdict_s: float,
        replacements: Replacements,
        alone: bool,
        stays: bool = False,
    ) -> None:
        """
        Args:
            ranks: rank of each worker id of this machine.
            host: this machine's name.
            grace_s: from SIGTERM to SIGKILL.
            verdict_s: how long to wait for the coordinator's word on a worker that failed.
            replacements: whether and when lost workers are replaced.
            alone: whether these workers are the whole job, so that `replacements` has the budget also for
                starting the whole ring again. Otherwise the coordinator has one.
            stays: wait for a coordinator however long it is away, and for its word: another one takes its
                place. Else what is known here decides after a while.
        """
        self._ranks = dict(ranks)
        self._running: dict[int, int | None] = dict.fromkeys(ranks)
        self._host = host
        self._grace_s = grace_s
        self._verdict_s = verdict_s
        self._replacements = replacements
        self._alone = alone
        self._stays = stays
        self._phase = Phase.RUNNING
        self._deadline_s: float | None = None
        self._losses = Losses()
        self._replace_on_exit: dict[int, str] = {}
        self._expelled: dict[int, str] = {}
        self._abandoned: set[int] = set()
        self._succeeded: set[int] = set()
        self._suspended: set[int] = set()
        """Those that stopped at a checkpoint."""
        self._failed_in_the_end = False
        """Whether a worker failed after the end was decided on."""
        self._saved: Saved | None = None
        self._last_failure: Failure | None = None
        self._verdict: Failure | None = None
        self._restarts = False
        """Whether the coordinator would have the ring started again."""
        self._stop: int | None = None
        """The signal that ends the job, if one does."""
        self._stop_asked_for: int | None = None
        """The signal that asked for it, be it after the job had failed."""
        self._job_done: JobDone | None = None
        self._coordinator_lost = False

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def deadline_s(self) -> float | None:
        """When to feed the next `TimePassed`, on the clock of `handle`'s `now_s`."""
        dues_s = [self._deadline_s, self._word_due_s]
        if self._may_start:
            dues_s.append(self._replacements.due_s)
        return min((due_s for due_s in dues_s if due_s is not None), default=None)

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, or None while it has not."""
        if self._phase is not Phase.ENDED:
            return None
        replaced = self._replacements.started
        if self._is_suspended:
            return Outcome(
                code=SUSPENDED_CODE,
                signal=self._stop,
                suspended=True,
                saved=self._saved,
                losses=self._losses.survived,
                replaced=replaced,
            )
        if self._stop is not None:
            return Outcome(code=128 + self._stop, signal=self._stop)
        failure = self._verdict
        if failure is None and self._job_done is None:
            failure = self._failure_here()
        if failure is not None:
            if self._stays and self._restarts and self._stop_asked_for is not None:
                return Outcome(code=128 + self._stop_asked_for, signal=self._stop_asked_for)
            # A worker that left early with 0 can be the cause; the job failed all the same.
            restarts = self._restarts and self._stop_asked_for is None
            return Outcome(code=failure.code or 1, failure=failure, restarts=restarts)
        return Outcome(code=0, losses=self._losses.survived, replaced=replaced)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take one event in; what is to be done, in order."""
        match event:
            case WorkerStarted():
                self._running[event.worker_id] = event.pid
                self._losses.started(event.worker_id)
                return []
            case CheckpointSaved():
                self._saved = event.saved
                return []
            case WorkerExited():
                return self._worker_exited(event, now_s)
            case JobFailed():
                if self._verdict is None:
                    self._verdict, self._restarts = event.failure, event.restarts
                return self._drain(now_s)
            case JobDone():
                return self._on_job_done(event, now_s)
            case LossNoted():
                return self._loss_noted(event, now_s)
            case RingFormed():
                return self._ring_formed(event.worker_ids)
            case Replaceable():
                return self._on_replaceable(event, now_s)
            case Expel():
                return self._expel(event)
            case CoordinatorLost():
                return self._on_coordinator_lost(now_s)
            case CoordinatorBack():
                self._coordinator_lost = False
                return [Say(text="the coordinator is back")]
            case StopAsked():
                return self._stop_asked(event, now_s)
            case TimePassed():
                return self._time_passed(now_s)

    # Losses and replacements.

    def _worker_exited(self, event: WorkerExited, now_s: float) -> list[Action]:
        worker_id = event.worker_id
        pid = self._running.pop(worker_id)
        self._replacements.ended(worker_id, now_s)
        reason = event.reason
        if (why := self._expelled.pop(worker_id, None)) is not None:
            reason += f" by its launcher: {why}"
        if self._stop is not None:
            reason += f" (its launcher was told to stop: {describe_stop(self._stop)})"
        report = Report(
            worker_id=worker_id,
            pid=pid or 0,
            code=event.code,
            reason=reason,
            stopping=self._stop is not None,
        )
        word = self._replace_on_exit.pop(worker_id, None)
        if event.code == 0:
            self._succeeded.add(worker_id)
        elif event.code == SUSPENDED_CODE:
            self._suspended.add(worker_id)
        in_order = event.code in (0, SUSPENDED_CODE)
        if self._phase is not Phase.RUNNING or self._job_done:
            self._failed_in_the_end = self._failed_in_the_end or not in_order
            return [report, *self._settle(now_s)]
        if in_order:
            return [report, *(self._settle(now_s) if word is None else self._replace(worker_id, word, now_s))]
        failure = Failure(
            worker_id=worker_id,
            rank=self._ranks[worker_id],
            host=self._host,
            code=event.code,
            reason=reason,
        )
        self._last_failure = failure
        self._losses.failed(failure, now_s + self._verdict_s)
        if word is not None:
            return [report, *self._replace(worker_id, word, now_s)]
        if self._coordinator_lost:
            return [report, *self._go_on_without_word(), *self._settle(now_s)]
        return [report, *self._settle(now_s)]

    def _loss_noted(self, event: LossNoted, now_s: float) -> list[Action]:
        awaited = self._losses.note(event.worker_id, left=event.left)
        if awaited and self._phase is Phase.WAITING:
            self._enter(Phase.WAITING, now_s + PATIENCE_S)
        return []

    def _ring_formed(self, members: frozenset[int]) -> list[Action]:
        for worker_id in members:  # it was said of the process before it
            self._replace_on_exit.pop(worker_id, None)
        return self._say_of(self._losses.formed(members), "the others go on")

    def _on_replaceable(self, event: Replaceable, now_s: float) -> list[Action]:
        worker_id = event.worker_id
        ending = self._job_done or self._phase not in (Phase.RUNNING, Phase.WAITING)
        if ending or worker_id not in self._ranks:
            return []
        if worker_id in self._running:
            self._replace_on_exit[worker_id] = event.reason
            return []
        if worker_id in self._replacements.waiting or worker_id in self._abandoned:
            return []  # a coordinator that was restarted, or a new connection to it, says it again
        return self._replace(worker_id, event.reason, now_s)

    def _replace(self, worker_id: int, reason: str, now_s: float) -> list[Action]:
        """A worker is gone that the ring goes on without. `reason` is the coordinator's."""
        how = self._how(worker_id)
        self._succeeded.discard(worker_id)
        self._suspended.discard(worker_id)
        reason = self._losses.survive(worker_id, reason)
        planned, outlook = self._replacements.plan(worker_id, now_s)
        said = Say(text=f"worker {worker_id} {how}: {reason}; {outlook}")
        if planned is None:
            self._abandoned.add(worker_id)
            return [said, *self._settle(now_s)]
        self._enter(Phase.RUNNING, None)
        restarting = Restarting(
            worker_id=worker_id, delay_s=planned.delay_s, restarts_left=planned.restarts_left
        )
        return [restarting, said]

    def _how(self, worker_id: int) -> str:
        return "left" if worker_id in self._succeeded or self._losses.left(worker_id) else "lost"

    @property
    def _may_start(self) -> bool:
        """Without a coordinator, a replacement would only find that nobody lets it into the ring."""
        return self._phase is Phase.RUNNING and not self._coordinator_lost

    def _start_replacements(self, now_s: float) -> list[Action]:
        due = self._replacements.take_due(now_s)
        self._running.update((planned.worker_id, None) for planned in due)
        return [Start(worker_id=planned.worker_id, restart=planned.restart) for planned in due]

    def _expel(self, event: Expel) -> list[Action]:
        if self._running.get(event.worker_id) != event.pid:
            return []  # that process is gone; another may run in its place
        self._expelled[event.worker_id] = event.reason
        self._losses.note(event.worker_id, left=False)
        return [
            Say(text=f"killing worker {event.worker_id}: the others went on without it: {event.reason}"),
            Kill(worker_ids=(event.worker_id,)),
        ]

    def _on_coordinator_lost(self, now_s: float) -> list[Action]:
        self._coordinator_lost = True
        return [*self._go_on_without_word(), *self._settle(now_s)]

    def _go_on_without_word(self) -> list[Action]:
        """No word can come now on the workers that failed, so none is awaited."""
        if not self._running:
            return []
        outlook = "the others go on, and the coordinator, once it is back, decides whether it is replaced"
        return self._say_of(self._losses.await_no_word(), outlook)

    def _say_of(self, failures: list[Failure], outlook: str) -> list[Action]:
        said: list[Action] = []
        for failure in failures:
            end = f"worker {failure.worker_id} {self._how(failure.worker_id)}: {failure.reason}"
            said.append(Say(text=f"{end}; {outlook}"))
        return said

    # The end.

    def _on_job_done(self, done: JobDone, now_s: float) -> list[Action]:
        self._job_done = done
        self._replacements.cancel()
        self._losses.survive_all()
        return self._drain(now_s)

    def _drain(self, now_s: float) -> list[Action]:
        self._replacements.cancel()
        if self._phase is Phase.RUNNING:
            self._enter(Phase.DRAINING, now_s + DRAIN_S)
        return self._settle(now_s)

    def _stop_asked(self, event: StopAsked, now_s: float) -> list[Action]:
        self._stop_asked_for = event.number
        failed = self._verdict is not None or self._word_due_s is not None
        if self._phase in (Phase.RUNNING, Phase.WAITING) and not failed:
            self._stop = event.number
        self._replacements.cancel()
        if self._phase is Phase.WAITING or (self._phase is Phase.RUNNING and not self._running):
            return self._end()
        if self._phase in (Phase.RUNNING, Phase.DRAINING):
            return [Say(text=self._stopping_text(event.number)), *self._terminate(now_s)]
        # `timeout` and others send SIGTERM twice; only a person at a keyboard is that impatient.
        if self._phase is Phase.STOPPING and event.number == signal.SIGINT:
            return self._kill("asked again")
        return []

    def _time_passed(self, now_s: float) -> list[Action]:
        if self._word_due_s is not None and now_s >= self._word_due_s:
            return self._give_up_on_word(now_s)
        if self._may_start:
            return self._start_replacements(now_s)
        if self._deadline_s is None or now_s < self._deadline_s:
            return []
        if self._phase is Phase.DRAINING:
            if self._will_start_again:
                return self._kill("the whole ring is started again")
            return [*self._say_who_is_late(), *self._terminate(now_s)]
        if self._phase is Phase.STOPPING:
            return self._kill(f"not gone {self._grace_s:g} s after SIGTERM")
        if self._phase is Phase.WAITING and self._stop is None and (self._stays or not self._losses.unjudged):
            self._deadline_s = None
            return [Say(text="no worker runs here any more; waiting for those of the other machines")]
        return self._end() if self._phase is Phase.WAITING else []

    @property
    def _word_due_s(self) -> float | None:
        """When the coordinator's word on a failure is overdue; None while none is awaited."""
        if self._stays or self._phase not in (Phase.RUNNING, Phase.WAITING):
            return None
        return self._losses.word_due_s

    def _give_up_on_word(self, now_s: float) -> list[Action]:
        if self._phase is Phase.WAITING:
            return self._end()
        overdue = ", ".join(str(failure.worker_id) for failure in self._losses.unjudged)
        silence = f"no word from the coordinator on worker {overdue} for {self._verdict_s:g} s"
        return [Say(text=f"{silence}; stopping the others"), *self._drain(now_s)]

    def _say_who_is_late(self) -> list[Action]:
        if not self._job_done:
            return []
        late = ", ".join(str(worker_id) for worker_id in self._running)
        return [Say(text=f"the job is done; stopping worker {late}, which it did without")]

    def _terminate(self, now_s: float) -> list[Action]:
        self._enter(Phase.STOPPING, now_s + self._grace_s)
        return [Terminate(worker_ids=tuple(self._running))]

    def _kill(self, reason: str) -> list[Action]:
        self._enter(Phase.KILLING, None)
        ranks = ", ".join(str(self._ranks[worker_id]) for worker_id in self._running)
        return [
            Say(text=f"killing rank {ranks}: {reason}"),
            Kill(worker_ids=tuple(self._running)),
        ]

    def _settle(self, now_s: float) -> list[Action]:
        """Once no worker is left here, end as soon as it is known how the whole job went."""
        without_word = self._coordinator_lost and not self._stays
        to_come = self._replacements.waiting and not without_word
        if self._running or to_come or self._phase is Phase.ENDED:
            return []
        if self._verdict or self._job_done or without_word:
            return self._end()
        if self._stop is not None and not self._suspended:
            return self._end()
        if self._phase is not Phase.WAITING:
            for_word = self._stop is not None or (self._losses.unjudged and not self._stays)
            self._enter(Phase.WAITING, now_s + (self._verdict_s if for_word else PATIENCE_S))
        return []

    @property
    def _is_suspended(self) -> bool:
        """Whether the job stopped at a checkpoint: the coordinator's word, or without it the workers'."""
        if self._job_done is not None:
            return self._job_done.suspended
        if self._verdict is not None or self._failed_in_the_end or self._losses.unjudged:
            return False
        return bool(self._suspended)

    @property
    def _will_start_again(self) -> bool:
        """Whether the workers end only to be started again, as far as is known."""
        affordable = not self._alone or self._replacements.left > 0
        return self._restarts and self._stop_asked_for is None and affordable

    def _failure_here(self) -> Failure | None:
        """How it went by what is known here, without a word of the coordinator on the whole job."""
        if unjudged := self._losses.unjudged:
            return unjudged[0]
        return None if self._succeeded else self._last_failure

    def _end(self) -> list[Action]:
        self._enter(Phase.ENDED, None)
        return []

    def _enter(self, phase: Phase, deadline_s: float | None) -> None:
        self._phase = phase
        self._deadline_s = deadline_s

    def _stopping_text(self, number: int) -> str:
        hint = "; Ctrl-C again kills them at once" if number == signal.SIGINT else ""
        workers = f"{len(self._running)} worker" + ("s" if len(self._running) != 1 else "")
        return f"{describe_stop(number)}: stopping {workers}{hint}"
