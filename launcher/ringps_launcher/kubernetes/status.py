"""PURE: the status document, folded from the coordinator's events and from what the operator sees.

`docs/kubernetes.md` has its fields. What is not known is null; nothing in it is guessed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from ringps_launcher.kubernetes.earlier import MOST_EVENTS, RING, VERSION, Earlier
from ringps_launcher.kubernetes.endings import CAUSES, Ending
from ringps_launcher.kubernetes.rates import StepRate
from ringps_launcher.kubernetes.sightings import Pod
from ringps_launcher.kubernetes.topology import Place

WAITING, RUNNING, STOPPING, DONE, FAILED = "waiting", "running", "stopping", "done", "failed"
PHASES = (WAITING, RUNNING, STOPPING, DONE, FAILED)

SUSPENDED = "the job is suspended"

_LONGEST = 300
_LONGEST_REASON = 1000
_NOWHERE: Place = ("", "", "")


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What was asked for."""

    world_size: int
    min_workers: int
    max_restarts: int


class Status:
    """The job as it is to be shown. Times are seconds since the epoch."""

    def __init__(self, facts: JobFacts, earlier: Earlier, now_s: float) -> None:
        self._facts = facts
        self._phase = WAITING
        self._reason = ""
        self._since_s = now_s
        self._generation = earlier.generation
        self._step = earlier.step
        self._rate = StepRate()
        self._global_batch: int | None = None
        self._checkpoint = earlier.checkpoint
        self._members: list[dict[str, Any]] = []
        self._restarts = Counter(earlier.restarts)
        self._used = earlier.budget_used
        self._events = deque(earlier.events, maxlen=MOST_EVENTS)
        self._verdict = earlier.verdict
        self._places: dict[str, Place] = {}
        self._pods: tuple[Pod, ...] = ()
        self._suspended = False

    @property
    def pressing(self) -> tuple[str, int]:
        """What is to be published at once when it changes."""
        return self._phase, self._generation

    @property
    def verdict(self) -> str:
        """ "" while the job goes on, else "done" or "failed: REASON"."""
        return self._verdict

    # What happens.

    def fold(self, event: Mapping[str, Any], now_s: float) -> None:
        """A line of the coordinator's for the events file. Of a kind unknown here, it changes nothing."""
        left = event.get("restarts_left")
        if _is_count(left):
            self._used = max(0, self._facts.max_restarts - left)
        fold = _FOLDS.get(str(event.get("event")))
        if fold is not None:
            fold(self, event, now_s)
        words = _WORDS.get(str(event.get("event")))
        if words is not None:
            self._tell(words(event), now_s)

    def sighted(
        self, pods: Iterable[Pod], places: Mapping[str, Place], *, suspended: bool, now_s: float
    ) -> None:
        """The pods as they are, where they are by name, and whether the job is suspended."""
        self._pods = tuple(pods)
        self._places = dict(places)
        was, self._suspended = self._suspended, suspended
        if self._over:
            return
        alive = any(not pod.stopped for pod in self._pods)
        if suspended and not was:
            self._tell(SUSPENDED, now_s)
        if was and not suspended:
            self._tell("the job is resumed", now_s)
            if self._phase == STOPPING or self._reason == SUSPENDED:
                self._enter(WAITING, "", now_s)
        elif suspended and self._phase == RUNNING:
            self._enter(STOPPING, SUSPENDED, now_s)
        elif suspended and (self._phase == WAITING or not alive):
            self._enter(WAITING, SUSPENDED, now_s)
        if not alive:
            self._members = []
            self._rate.reset()

    def ended(self, pod: Pod, ending: Ending, now_s: float) -> None:
        """A pod has ended."""
        if ending.cause:
            self._restarts[ending.cause] += 1
            self._tell(f"worker {pod.worker_id} (pod {pod.name}): {ending.words}", now_s)
        if ending.counts:
            # What the coordinator says next of the budget overrides this.
            self._used += 1

    def tell(self, text: str, now_s: float) -> None:
        """Something else that people want to know."""
        self._tell(text, now_s)

    def judge(self, verdict: str, now_s: float) -> None:
        """The job is over: "done" or "failed: REASON"."""
        self._verdict = verdict
        phase, _, reason = verdict.partition(": ")
        self._enter(DONE if phase == DONE else FAILED, reason, now_s)
        self._tell(verdict, now_s)
        self._members = []
        self._rate.reset()

    def document(self, now_s: float) -> dict[str, Any]:
        """As it is published."""
        steps_per_s = self._rate.per_s(now_s) if self._phase in (RUNNING, STOPPING) else None
        samples_per_s = None
        if steps_per_s is not None and self._global_batch is not None:
            samples_per_s = round(steps_per_s * self._global_batch, 3)
        return {
            "version": VERSION,
            "phase": self._phase,
            "reason": self._reason or self._waits_for(),
            "generation": self._generation,
            "world_size": self._facts.world_size,
            "min_workers": self._facts.min_workers,
            "since": round(self._since_s, 3),
            "updated": round(now_s, 3),
            "step": self._step,
            "samples_per_s": samples_per_s,
            "steps_per_s": None if steps_per_s is None else round(steps_per_s, 4),
            "checkpoint": None if self._checkpoint is None else dict(self._checkpoint),
            "members": [self._member(member) for member in self._members],
            "joining": self._joining(),
            "restarts": {cause: self._restarts[cause] for cause in (*CAUSES, RING)},
            "budget": {"used": self._used, "max": self._facts.max_restarts},
            "events": [dict(event) for event in self._events],
        }

    # Inside.

    @property
    def _over(self) -> bool:
        return self._phase in (DONE, FAILED)

    def _enter(self, phase: str, reason: str, now_s: float) -> None:
        if self._over and phase not in (DONE, FAILED):
            return
        if phase != self._phase:
            self._phase, self._since_s = phase, now_s
        self._reason = _clip(reason, _LONGEST_REASON)

    def _tell(self, text: str, now_s: float) -> None:
        self._events.append({"t": round(now_s, 3), "text": _clip(text, _LONGEST)})

    def _waits_for(self) -> str:
        if self._phase != WAITING:
            return ""
        running = sum(pod.phase == "Running" and not pod.stopped for pod in self._pods)
        return f"{running} of {self._facts.world_size} worker pods run"

    def _member(self, member: Mapping[str, Any]) -> dict[str, Any]:
        zone, rack, node = self._places.get(member["pod"], _NOWHERE)
        return {**member, "node": node, "zone": zone, "rack": rack}

    def _joining(self) -> list[int]:
        if self._phase not in (RUNNING, STOPPING):
            return []
        members = {member["pod"] for member in self._members}
        return sorted(
            {
                pod.worker_id
                for pod in self._pods
                if pod.phase == "Running" and not (pod.stopped or pod.deleted) and pod.name not in members
            }
        )

    # One for each kind of event.

    def _formed(self, event: Mapping[str, Any], now_s: float) -> None:
        generation, members = event.get("generation"), event.get("members")
        if _is_count(generation):
            self._generation = max(self._generation, generation)
        self._members = [
            {"rank": entry.get("rank"), "worker_id": entry.get("worker_id"), "pod": str(entry.get("host"))}
            for entry in (members if isinstance(members, (list, tuple)) else ())
            if isinstance(entry, Mapping)
        ]
        phase, reason = (STOPPING, SUSPENDED) if self._suspended else (RUNNING, str(event.get("reason", "")))
        self._enter(phase, reason, now_s)

    def _gone(self, event: Mapping[str, Any], now_s: float) -> None:
        worker_id = event.get("worker_id")
        before, self._members = (
            self._members,
            [member for member in self._members if member["worker_id"] != worker_id],
        )
        if before and not self._members:
            self._rate.reset()
            reason = SUSPENDED if self._suspended else f"no worker is left: {event.get('reason', '')}"
            self._enter(WAITING, reason, now_s)

    def _stepped(self, event: Mapping[str, Any], now_s: float) -> None:
        step = event.get("step")
        if _is_count(step):
            self._step = step
            self._rate.note(step, now_s)

    def _trains(self, event: Mapping[str, Any], now_s: float) -> None:
        batch = event.get("global_batch")
        self._global_batch = batch if _is_count(batch) else None

    def _saved(self, event: Mapping[str, Any], now_s: float) -> None:
        step, where = event.get("step"), event.get("directory")
        if _is_count(step) and isinstance(where, str):
            self._checkpoint = {"step": step, "t": round(now_s, 3), "where": _clip(where, _LONGEST_REASON)}

    def _restored(self, event: Mapping[str, Any], now_s: float) -> None:
        step = event.get("step")
        if _is_count(step):
            self._step = step
            self._rate.reset()

    def _charged(self, event: Mapping[str, Any], now_s: float) -> None:
        if event.get("by_machine") is not True:  # pods are counted when they end
            self._restarts["failed"] += 1

    def _restarting(self, event: Mapping[str, Any], now_s: float) -> None:
        self._restarts[RING] += 1
        self._members = []
        self._rate.reset()
        self._enter(WAITING, f"the whole ring starts again: {event.get('reason', '')}", now_s)

    def _waits(self, event: Mapping[str, Any], now_s: float) -> None:
        self._members = []
        self._rate.reset()
        self._enter(WAITING, SUSPENDED if self._suspended else str(event.get("reason", "")), now_s)


_FOLDS: dict[str, Callable[[Status, Mapping[str, Any], float], None]] = {
    "generation": Status._formed,
    "coordinator_restored": Status._formed,
    "worker_lost": Status._gone,
    "worker_left": Status._gone,
    "step_committed": Status._stepped,
    "training": Status._trains,
    "checkpoint_saved": Status._saved,
    "restored": Status._restored,
    "restart_charged": Status._charged,
    "ring_restarting": Status._restarting,
    "waiting": Status._waits,
}

_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "generation": lambda e: f"generation {e.get('generation')} of {_length(e)}: {e.get('reason')}",
    "coordinator_restored": lambda e: f"the coordinator took the ring over: {e.get('reason')}",
    "worker_lost": lambda e: f"worker {e.get('worker_id')} lost: {e.get('reason')}",
    "worker_left": lambda e: f"worker {e.get('worker_id')} left after step {e.get('step')}",
    "worker_joined": lambda e: f"worker {e.get('worker_id')} joined: {e.get('reason')}",
    "restart_charged": lambda e: (
        f"worker {e.get('worker_id')} failed: {e.get('reason')}; {e.get('restarts_left')} restarts left"
    ),
    "joiner_lost": lambda e: f"worker {e.get('worker_id')} lost before it joined: {e.get('reason')}",
    "restored": lambda e: f"restored step {e.get('step')} from {e.get('directory')}",
    "ring_restarting": lambda e: f"the whole ring starts again: {e.get('reason')}",
    "waiting": lambda e: f"waiting: {e.get('reason')}",
    "diverged": lambda e: f"bits differ at step {e.get('step')}: {e.get('what')} of {e.get('worker_ids')}",
    "checkpoint_failed": lambda e: f"the checkpoint of step {e.get('step')} failed: {e.get('reason')}",
    "checkpoints_given_up": lambda e: f"no more checkpoints: {e.get('reason')}",
    "coordinator_error": lambda e: f"internal error in the coordinator: {e.get('reason')}",
}


def _length(event: Mapping[str, Any]) -> str:
    members = event.get("members")
    count = len(members) if isinstance(members, (list, tuple)) else 0
    return "1 worker" if count == 1 else f"{count} workers"


def _clip(text: str, longest: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
