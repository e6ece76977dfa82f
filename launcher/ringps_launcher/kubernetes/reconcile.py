"""PURE: what the operator does about the cluster as it is now.

Level-triggered: every call looks at everything, so it does not matter what was missed in between. `Memory`
says what was done already and since when something is so. All times are of this process's own clock, which
is compared with no other machine's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ringps_launcher.kubernetes.endings import Ending, classify, notice
from ringps_launcher.kubernetes.sightings import Node, Pod, WorkerJob
from ringps_launcher.kubernetes.topology import Place as Where

_TAINTED = "DeletionByTaintManager"
"""Who deletes the pods of nodes that are not heard of."""

OVERDUE_S = 5.0
"""How long a pod must be terminating before it is deleted by force."""

SETTLED_S = 30.0
"""A pod that has run for so long was worth its start."""

LOOK_AGAIN_S = 5.0
"""How often a node is looked at while one of its pods terminates, or when it could not be read."""

LABELS_LAST_S = 300.0
"""For how long a node's labels are taken for what they were, when another pod comes to it."""

FORGIVE_AGAIN_S = 5.0
"""When a pod that was forgiven and is delayed still is forgiven again."""

DELETE_AGAIN_S = 15.0
"""When a pod that was deleted by force and is there still is deleted again."""

MOST_SEEN = 4096
"""Ended pods that one coordinator tells the next of, at most."""

_SHORT = 13


@dataclass(frozen=True, kw_only=True)
class Observed:
    """The cluster, as the last answers of the API server had it."""

    pods: tuple[Pod, ...]
    """All pods of workers."""
    job: WorkerJob | None
    """The worker Job; None if there is none (any more)."""
    nodes: Mapping[str, Node] = field(default_factory=dict)
    """Those that were looked at."""
    nodes_readable: bool = True
    """Whether we may look at nodes."""


# Actions.


@dataclass(frozen=True)
class Place:
    """Tell the coordinator where a pod is."""

    host: str
    place: Where


@dataclass(frozen=True)
class AskToLeave:
    """Tell the coordinator to let these workers leave after the step that they are in."""

    pods: tuple[tuple[int, str], ...]
    """Worker ids, and the pods that are meant: never their successors."""
    reason: str


@dataclass(frozen=True)
class Ended:
    """A pod has ended: count it."""

    pod: Pod
    ending: Ending


@dataclass(frozen=True)
class Charge:
    """Tell the coordinator that a pod ended in a way that counts against the budget."""

    worker_id: int
    host: str
    """The pod."""
    cause: str
    reason: str


@dataclass(frozen=True)
class Lost:
    """Tell the coordinator that nothing of this pod runs any more."""

    host: str
    reason: str


@dataclass(frozen=True)
class ForceDelete:
    """Remove a pod from the API server though its node has not confirmed its end.

    Its phase has to become Failed first: the Job controller replaces failed pods only."""

    pod: Pod
    reason: str


@dataclass(frozen=True)
class Forgive:
    """Have the Job controller forget the pods of this index that were taken away before this one, for each of
    which it would wait twice as long before it makes the next."""

    pod: Pod


@dataclass(frozen=True)
class LookAtNode:
    """Ask the API server for a node."""

    name: str


@dataclass(frozen=True)
class GiveUp:
    """Tell the coordinator that no pod will be made any more."""

    reason: str


Action = Place | AskToLeave | Ended | Charge | Lost | ForceDelete | Forgive | LookAtNode | GiveUp


@dataclass(kw_only=True)
class Memory:
    """What was done already, by the uid of the pod that it was done about."""

    counted: dict[str, None] = field(default_factory=dict)
    """Beginnings of the uids of pods whose end was counted, oldest first."""
    forgiving: bool = False
    """Whether what is seen ended at the first look is not counted."""
    pods: dict[str, Pod] = field(default_factory=dict)
    """As they were at the last look."""
    asked: set[str] = field(default_factory=set)
    asked_with_all: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    placed: dict[str, Where] = field(default_factory=dict)
    running_s: dict[str, float] = field(default_factory=dict)
    """Since when a pod runs, as far as was seen."""
    forgiven_s: dict[str, float] = field(default_factory=dict)
    terminating_s: dict[str, float] = field(default_factory=dict)
    deleted_s: dict[str, float] = field(default_factory=dict)
    dead_s: dict[str, float] = field(default_factory=dict)
    """Since when a node is seen dead."""
    looked_s: dict[str, float] = field(default_factory=dict)
    """When a node was asked for."""
    job_was_there: bool = False
    gave_up: bool = False

    @classmethod
    def after(cls, seen: Iterable[str], *, forgetful: bool) -> Memory:
        """What is left of an earlier coordinator's: its `seen` and `forgetful`."""
        return cls(counted=dict.fromkeys(seen), forgiving=forgetful)

    @property
    def seen(self) -> tuple[str, ...]:
        """For the next coordinator, who is not to count these again."""
        return tuple(self.counted)[-MOST_SEEN:]

    @property
    def forgetful(self) -> bool:
        """Whether there are more than those."""
        return len(self.counted) > MOST_SEEN


def reconcile(observed: Observed, memory: Memory, now_s: float, *, dead_node_s: float) -> list[Action]:
    """What follows from all that was observed.

    Args:
        observed: complete lists; before there are some, this must not be called.
        memory: changed in place.
        now_s: on any monotonic clock.
        dead_node_s: for how long a node must have been seen dead before its pods are deleted by force.
    """
    return _Pass(observed, memory, now_s, dead_node_s).run()


class _Pass:
    """One look at everything."""

    def __init__(self, observed: Observed, memory: Memory, now_s: float, dead_node_s: float) -> None:
        self._observed = observed
        self._memory = memory
        self._now_s = now_s
        self._dead_node_s = dead_node_s
        job = observed.job
        self._job = job
        self._suspended = job is not None and job.suspended
        # Pods of an earlier job of the same name may still be on their way out.
        self._pods = {
            pod.uid: pod for pod in observed.pods if job is None or not pod.owner or pod.owner == job.uid
        }
        self._actions: list[Action] = []

    def run(self) -> list[Action]:
        memory = self._memory
        vanished = [pod for uid, pod in memory.pods.items() if uid not in self._pods]
        self._watch_nodes()
        for pod in self._pods.values():
            self._place(pod)
        self._ask()
        for pod in self._pods.values():
            self._settle(pod)
        for pod in vanished:
            self._bury(pod)
        for pod in self._pods.values():
            self._force(pod)
            self._forgive(pod)
        self._judge_job()
        self._forget()
        return self._actions

    def _node(self, pod: Pod) -> Node | None:
        return self._observed.nodes.get(pod.node)

    # Nodes and places.

    def _watch_nodes(self) -> None:
        memory, now_s = self._memory, self._now_s
        for name, node in self._observed.nodes.items():
            if not node.dead:
                memory.dead_s.pop(name, None)
            else:
                memory.dead_s.setdefault(name, now_s)
        if not self._observed.nodes_readable:
            return
        due_s: dict[str, float] = {}
        for pod in self._pods.values():
            if not pod.node or (pod.stopped and not pod.deleted):
                continue
            if pod.deleted or pod.disruption or pod.node not in self._observed.nodes:
                after_s = LOOK_AGAIN_S
            elif pod.uid not in memory.placed:
                after_s = LABELS_LAST_S
            else:
                continue
            due_s[pod.node] = min(after_s, due_s.get(pod.node, after_s))
        for name, after_s in due_s.items():
            looked_s = memory.looked_s.get(name)
            if looked_s is None or now_s - looked_s >= after_s:
                memory.looked_s[name] = now_s
                self._actions.append(LookAtNode(name))

    def _place(self, pod: Pod) -> None:
        if not pod.node or pod.stopped:
            return
        node = self._node(pod)
        if node is None and self._observed.nodes_readable:
            return  # it is being looked at
        where = (node.zone or pod.zone, node.rack, pod.node) if node is not None else (pod.zone, "", pod.node)
        if self._memory.placed.get(pod.uid) != where:
            self._memory.placed[pod.uid] = where
            self._actions.append(Place(pod.name, where))

    # Pods that are to go.

    def _ask(self) -> None:
        memory = self._memory
        running = [pod for pod in self._pods.values() if pod.phase == "Running" and not pod.stopped]
        everybody = ""
        if self._suspended:
            everybody = "the job is suspended"
        elif memory.job_was_there and (self._job is None or self._job.deleted):
            everybody = "the job was deleted"
        by_reason: dict[str, list[Pod]] = {}
        for pod in running:
            if everybody:
                if pod.uid not in memory.asked_with_all:
                    memory.asked_with_all.add(pod.uid)
                    memory.asked.add(pod.uid)
                    by_reason.setdefault(everybody, []).append(pod)
                continue
            memory.asked_with_all.discard(pod.uid)
            taken = notice(pod, self._node(pod), suspended=False)
            if taken is not None and pod.uid not in memory.asked:
                memory.asked.add(pod.uid)
                by_reason.setdefault(taken.words, []).append(pod)
        for reason, pods in by_reason.items():
            ordered = sorted((pod.worker_id, pod.name) for pod in pods)
            self._actions.append(AskToLeave(tuple(ordered), reason))

    # Pods that have ended.

    def _settle(self, pod: Pod) -> None:
        if pod.stopped and pod.uid not in self._memory.lost:
            ending = classify(pod, self._node(pod), suspended=self._suspended)
            self._memory.lost.add(pod.uid)
            self._actions.append(Lost(pod.name, f"pod {pod.name}: {ending.words}"))
        if pod.terminal:
            self._count(pod)

    def _bury(self, pod: Pod) -> None:
        """It is gone from the API server."""
        gone = pod
        if not pod.terminal and not pod.deleted:
            gone = _as_deleted(pod)  # the deletion itself was missed
        ending = classify(gone, self._node(pod), suspended=self._suspended)
        if pod.uid not in self._memory.lost:
            self._actions.append(Lost(pod.name, f"pod {pod.name} is gone: {ending.words}"))
        self._count(gone)

    def _count(self, pod: Pod) -> None:
        memory, short = self._memory, pod.uid[:_SHORT]
        if short in memory.counted:
            return
        memory.counted[short] = None
        if memory.forgiving and pod.uid not in memory.pods:
            return
        ending = classify(pod, self._node(pod), suspended=self._suspended)
        self._actions.append(Ended(pod, ending))
        if ending.counts:
            self._actions.append(
                Charge(pod.worker_id, pod.name, ending.cause, f"pod {pod.name}: {ending.words}")
            )

    def _forgive(self, pod: Pod) -> None:
        memory, now_s = self._memory, self._now_s
        if pod.phase == "Running" and not (pod.stopped or pod.deleted or pod.disruption):
            innocent = now_s - memory.running_s.setdefault(pod.uid, now_s) >= SETTLED_S
        elif pod.terminal and pod.tracked:
            # Its successor waits. For how long it ran says nothing of the program if the cluster took it.
            ending = classify(pod, self._node(pod), suspended=self._suspended)
            seen = bool(pod.disruption) or pod.exit_code is not None
            innocent = seen and ending.cause != "" and not ending.counts
        else:
            return
        before_s = memory.forgiven_s.get(pod.uid)
        if innocent and pod.delayed and (before_s is None or now_s - before_s >= FORGIVE_AGAIN_S):
            memory.forgiven_s[pod.uid] = now_s
            self._actions.append(Forgive(pod))

    def _force(self, pod: Pod) -> None:
        memory, now_s = self._memory, self._now_s
        if not pod.deleted:
            memory.terminating_s.pop(pod.uid, None)
            return
        since_s = memory.terminating_s.setdefault(pod.uid, now_s)
        dead_s = memory.dead_s.get(pod.node)
        node = self._node(pod)
        if not self._observed.nodes_readable and pod.disruption == _TAINTED:
            # That its node is dead is known by who deleted it; were it alive, the pod would be gone by now.
            dead_s, node = since_s + pod.grace_s + OVERDUE_S, Node(name=pod.node, unreachable=True)
        if node is None or not node.dead or dead_s is None:
            return  # whoever is alive there will end it
        # Its grace is not waited for: the ring went on without it, and lets it do no harm should it live.
        if now_s < since_s + OVERDUE_S or now_s < dead_s + self._dead_node_s:
            return
        before_s = memory.deleted_s.get(pod.uid)
        if before_s is None or now_s - before_s >= DELETE_AGAIN_S:
            memory.deleted_s[pod.uid] = now_s
            what = "is gone" if node.gone else "is unreachable"
            reason = f"pod {pod.name} has been terminating for {now_s - since_s:.0f} s and its node {what}"
            self._actions.append(ForceDelete(pod, reason))

    def _judge_job(self) -> None:
        memory, job = self._memory, self._job
        memory.job_was_there = memory.job_was_there or job is not None
        if job is not None and job.failure and not memory.gave_up:
            memory.gave_up = True
            self._actions.append(GiveUp(f"the worker Job failed: {job.failure}"))

    # What is no longer needed.

    def _forget(self) -> None:
        memory, pods = self._memory, self._pods
        memory.pods = dict(pods)
        memory.forgiving = False
        for known in (memory.asked, memory.asked_with_all, memory.lost):
            known.intersection_update(pods)
        for table in (
            memory.placed,
            memory.terminating_s,
            memory.deleted_s,
            memory.running_s,
            memory.forgiven_s,
        ):
            for uid in [uid for uid in table if uid not in pods]:
                del table[uid]
        nodes = {pod.node for pod in pods.values()}
        for times in (memory.dead_s, memory.looked_s):
            for name in [name for name in times if name not in nodes]:
                del times[name]
        shorts = {uid[:_SHORT] for uid in pods}
        memory.counted = {short: None for short in memory.counted if short in shorts}


def _as_deleted(pod: Pod) -> Pod:
    return replace(pod, deleted=True)
