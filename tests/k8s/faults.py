"""Many faults of many kinds, one after the other, on one job of pods.

The plan follows from a seed; whom a fault hits also depends on who trains when its turn comes. A fault that
could hit nobody just then waits; none takes the last member that trains, but for a suspension. Nothing waits
for the consequences of the one before, so faults meet.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.errors import NotFoundError
from tests.k8s.job import Job, Pods
from tests.k8s.kubelet.node import Node
from tests.k8s.trail import Member, Trail

GPUS = 2
"""Of each node that has any."""

DECK = {
    "kill pod": 3,
    "kill process": 4,
    "delete pod": 3,
    "evict pod": 1,
    "node evicts pod": 2,
    "drain node": 2,
    "node reboots": 1,
    "node vanishes": 1,
    "node is replaced": 1,
    "freeze pod": 2,
    "delete coordinator": 2,
    "kill coordinator": 2,
    "API server away": 2,
    "API server away, and": 1,
    "suspend": 2,
    "preempt": 1,
}
LOCAL = ("kill pod", "kill process", "freeze pod", "kill coordinator")
"""What happens without the API server."""

SPARING = ("delete coordinator", "kill coordinator", "API server away", "suspend")
"""What takes no member, or all of them."""

LASTS_S = {
    "drain node": (3.0, 10.0),
    "node reboots": (3.0, 4.0),
    "node vanishes": (18.0, 25.0),
    "node is replaced": (5.0, 15.0),
    "freeze pod": (5.0, 5.0),
    "API server away": (5.0, 9.0),
    "API server away, and": (7.0, 10.0),
    "preempt": (5.0, 12.0),
}
"""For how long, at least and at most."""

_LOOK_S = 0.2
_TRAINS_S = 2.0
"""A member that has committed nothing for so long may not train just now."""
_GONE_S = 120.0
"""Whom a fault took is no member any more after that time."""
_LIMIT_S = 150.0
_PREEMPTED_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One fault of the plan."""

    kind: str
    second: str
    """What happens besides while the API server is away."""
    steps: int
    """How many are to be committed before it."""
    members: int
    """How many are to train before it."""
    lasts_s: float
    seed: int


def draw(seed: int) -> list[Planned]:
    """All faults of the deck, in the order in which they are to happen."""
    drawn = random.Random(seed)
    kinds = [kind for kind, count in DECK.items() for _ in range(count)]
    drawn.shuffle(kinds)
    return [
        Planned(
            kind=kind,
            second=drawn.choice(LOCAL) if kind.endswith("and") else "",
            steps=drawn.randint(10, 20),
            members=1 if kind in SPARING else drawn.choice((2, 2, 2, 2, 3)),
            lasts_s=drawn.uniform(*LASTS_S.get(kind, (0.0, 0.0))),
            seed=drawn.getrandbits(32),
        )
        for kind in kinds
    ]


@dataclass(frozen=True, kw_only=True)
class _Later:
    """What ends a fault."""

    at_s: float
    what: str
    do: Callable[[], None]
    needs_api: bool = True


class Campaign:
    """Carries out a plan. All on one thread: whatever waits here also ends the faults whose time has come."""

    def __init__(self, pods: Pods, job: Job, taker: Callable[[str, str, int], None]) -> None:
        """`taker` makes a pod of higher priority with a name, on a node, that wants some GPUs."""
        assert job.directory is not None
        self._pods = pods
        self._job = job
        self._taker = taker
        self._fleet = pods.fleet
        self._drawn = random.Random()
        self._began_s = time.monotonic()
        self._later: list[_Later] = []
        self._doomed: dict[Member, float] = {}
        """Who is about to go, or will not be seen to train; until when."""
        self._owed: dict[Member, tuple[str, float]] = {}
        """Who must be no member any more, because of what, and by when."""
        self._busy: set[str] = set()
        """Nodes on which a fault goes on."""
        self._api_there = True
        self._looked_s = 0.0
        self.trail = Trail(job.directory)
        self.history: list[str] = []
        self.done: Counter[str] = Counter()

    def run(self, plan: Iterable[Planned]) -> None:
        for number, planned in enumerate(plan, 1):
            at = self.trail.last_step
            self.until(
                partial(self._ready, at, planned),
                f"before fault {number} ({planned.kind}): from step {at} on {planned.steps} more, and "
                f"{planned.members} members",
            )
            self._drawn = random.Random(planned.seed)
            self.until(partial(self._fault, planned), f"somebody whom {planned.kind} can hit")
            self.done[planned.kind] += 1

    def mend(self) -> None:
        """End what still goes on."""
        self.until(lambda: not self._later and not self._owed, "all faults are over, and have had effect")

    def until(self, found: Callable[[], object], what: str, limit_s: float = _LIMIT_S) -> None:
        end_s = time.monotonic() + limit_s
        while True:
            self.trail.read()
            assert not self.trail.repeated, (
                f"the ring has gone back: steps {self.trail.repeated[:5]} came again"
            )
            self._tend()
            if found():
                return
            assert time.monotonic() < end_s, f"not within {limit_s:g} s: {what}; {self}"
            time.sleep(_LOOK_S)

    def note(self, text: str) -> None:
        """Something happened."""
        line = f"{time.monotonic() - self._began_s:6.1f} s, step {self.trail.last_step:5}: {text}"
        self.history.append(line)
        print(line, flush=True)

    def __str__(self) -> str:
        members = ", ".join(f"{worker_id} in {pod}" for worker_id, pod, _ in self.trail.members)
        ago_s = time.time() - self.trail.committed_at_s
        return (
            f"step {self.trail.last_step} was committed {ago_s:.1f} s ago by [{members}]; "
            f"about to go: {sorted(self._doomed)}; to be gone: {sorted(self._owed)}; "
            f"still to come: {[later.what for later in self._later]}"
        )

    # What goes on.

    def _ready(self, at: int, planned: Planned) -> bool:
        return self.trail.last_step >= at + planned.steps and len(self._safe()) >= planned.members

    def _tend(self) -> None:
        now_s = time.monotonic()
        for later in sorted(self._later, key=lambda later: later.at_s):
            if later.at_s <= now_s and (self._api_there or not later.needs_api):
                self._later.remove(later)
                later.do()
                self.note(f"  {later.what}")
        self._doomed = {who: until_s for who, until_s in self._doomed.items() if until_s > now_s}
        for who, (why, by_s) in list(self._owed.items()):
            if who not in self.trail.members:
                del self._owed[who]
            assert now_s < by_s, f"worker {who[0]} in {who[1]} trains on after: {why}; {self}"
        if self._api_there and now_s - self._looked_s > 5:
            self._looked_s = now_s
            assert self._job.condition() != "Failed", f"the job has failed; {self}"

    def _in(self, seconds: float, what: str, do: Callable[[], None], *, needs_api: bool = True) -> None:
        self._later.append(_Later(at_s=time.monotonic() + seconds, what=what, do=do, needs_api=needs_api))

    def _safe(self) -> list[Member]:
        """Who trains, and is not about to go."""
        if time.time() - self.trail.committed_at_s > _TRAINS_S:
            return []
        return [who for who in self.trail.members if who not in self._doomed and self._runs(who[1])]

    def _runs(self, name: str) -> bool:
        with contextlib.suppress(LookupError):
            pod = self._fleet.pod(name, self._pods.namespace)
            return bool(pod.running()) and "deletionTimestamp" not in pod.object["metadata"]
        return False

    def _node(self, pod: str) -> Node:
        [node] = [
            node
            for node in self._fleet.nodes.values()
            for one in node.pods
            if one.key == (self._pods.namespace, pod)
        ]
        return node

    def _taken(self, members: Iterable[Member], why: str) -> None:
        for who in members:
            self._doomed[who] = time.monotonic() + _GONE_S
            self._owed[who] = (why, time.monotonic() + _GONE_S)

    # Whom to hit.

    def _victim(self) -> Member | None:
        safe = self._safe()
        return self._drawn.choice(safe) if len(safe) > 1 else None

    def _crowded(self) -> tuple[Node, list[Member]] | None:
        """A node with members, without which there still are some."""
        safe = self._safe()
        by_node: dict[str, list[Member]] = {}
        for who in safe:
            node = self._node(who[1])
            if node.name not in self._busy:
                by_node.setdefault(node.name, []).append(who)
        found = sorted(name for name, there in by_node.items() if len(there) < len(safe))
        if not found:
            return None
        name = self._drawn.choice(found)
        return self._fleet.nodes[name], by_node[name]

    def _coordinator(self) -> str:
        prefix = f"{names.coordinator(self._job.name)}-"
        for node in self._fleet.nodes.values():
            for pod in node.pods if node.runs else ():
                namespace, name = pod.key
                if namespace == self._pods.namespace and name.startswith(prefix) and self._runs(name):
                    return name
        return ""

    # The faults. Each says what it did; "" if it could not do it now.

    def _fault(self, planned: Planned) -> str:
        kind = planned.kind.removesuffix(", and")
        if kind not in LOCAL and not self._api_there:
            return ""
        do: dict[str, Callable[[Planned], str]] = {
            "kill pod": self._kill_pod,
            "kill process": self._kill_process,
            "delete pod": self._delete_pod,
            "evict pod": self._evict_pod,
            "node evicts pod": self._node_evicts_pod,
            "drain node": self._drain_node,
            "node reboots": self._node_vanishes,
            "node vanishes": self._node_vanishes,
            "node is replaced": self._node_is_replaced,
            "freeze pod": self._freeze_pod,
            "delete coordinator": self._delete_coordinator,
            "kill coordinator": self._kill_coordinator,
            "API server away": self._stop_api,
            "suspend": self._suspend,
            "preempt": self._preempt,
        }
        try:
            said = do[kind](planned)
        except (LookupError, NotFoundError):  # whom it was to hit has ended just then
            return ""
        if said:
            self.note(f"{kind}: {said}; {len(self._safe())} of {len(self.trail.members)} members are to stay")
        return said

    def _kill_pod(self, planned: Planned) -> str:
        if (who := self._victim()) is None:
            return ""
        self._fleet.kill_pod(who[1], namespace=self._pods.namespace)
        self._taken([who], planned.kind)
        return who[1]

    def _kill_process(self, planned: Planned) -> str:
        if (who := self._victim()) is None:
            return ""
        # The launcher has the script's name in its command line too.
        found = [
            pid
            for pid, command in self._fleet.processes(who[1], self._pods.namespace).items()
            if "train.py" in command and "ringps run" not in command
        ]
        if not found:
            return ""
        killed = self._fleet.kill_process(
            who[1], "python /etc/ringps/code/train.py", namespace=self._pods.namespace
        )
        assert killed == found, (killed, found)
        self._taken([who], planned.kind)
        return f"worker {who[0]} in {who[1]}"

    def _delete_pod(self, planned: Planned) -> str:
        if (who := self._victim()) is None:
            return ""
        self._pods.api.delete("Pod", who[1])
        self._taken([who], planned.kind)
        return who[1]

    def _evict_pod(self, planned: Planned) -> str:
        if (who := self._victim()) is None:
            return ""
        self._evict(who[1])
        self._taken([who], planned.kind)
        return who[1]

    def _node_evicts_pod(self, planned: Planned) -> str:
        if (who := self._victim()) is None:
            return ""
        self._fleet.evict(who[1], namespace=self._pods.namespace)
        self._taken([who], planned.kind)
        return who[1]

    def _drain_node(self, planned: Planned) -> str:
        if (found := self._crowded()) is None:
            return ""
        node, members = found
        self._pods.api.patch("Node", node.name, {"spec": {"unschedulable": True}})
        for pod in node.pods:
            if pod.key[0] == self._pods.namespace and not pod.over:
                with contextlib.suppress(NotFoundError):
                    self._evict(pod.key[1])
        self._taken(members, planned.kind)
        self._busy.add(node.name)

        def uncordon() -> None:
            self._pods.api.patch("Node", node.name, {"spec": {"unschedulable": None}})
            self._busy.remove(node.name)

        self._in(planned.lasts_s, f"{node.name} takes pods again", uncordon)
        return f"{node.name} with workers {_ids(members)}"

    def _node_vanishes(self, planned: Planned) -> str:
        if (found := self._crowded()) is None:
            return ""
        node, members = found
        self._fleet.vanish_node(node)
        self._taken(members, planned.kind)
        self._busy.add(node.name)

        def come_back() -> None:
            self._fleet.return_node(node)
            self._busy.remove(node.name)

        self._in(planned.lasts_s, f"{node.name} is back", come_back)
        return f"{node.name} with workers {_ids(members)}, for {planned.lasts_s:.0f} s"

    def _node_is_replaced(self, planned: Planned) -> str:
        if (found := self._crowded()) is None:
            return ""
        node, members = found
        self._fleet.delete_node(node)
        self._taken(members, planned.kind)
        self._busy.add(node.name)
        other = f"{node.name}-anew"

        def add() -> None:
            self._fleet.add(other, cpu="4", memory="16Gi", gpus=GPUS)

        self._in(planned.lasts_s, f"{other} is there", add)
        return f"{node.name} with workers {_ids(members)} is deleted"

    def _freeze_pod(self, planned: Planned) -> str:
        if (who := self._victim()) is None:
            return ""
        self._fleet.freeze_pod(who[1], self._pods.namespace)
        # Without a coordinator, or while one looks for the truth, it may be a member still when it thaws.
        self._doomed[who] = time.monotonic() + planned.lasts_s + 5

        def thaw() -> None:
            with contextlib.suppress(LookupError):  # it may have been ended meanwhile
                self._fleet.thaw_pod(who[1], self._pods.namespace)

        self._in(planned.lasts_s, f"{who[1]} thaws", thaw, needs_api=False)
        return who[1]

    def _delete_coordinator(self, planned: Planned) -> str:
        if name := self._coordinator():
            self._pods.api.delete("Pod", name)
        return name

    def _kill_coordinator(self, planned: Planned) -> str:
        if name := self._coordinator():
            self._fleet.kill_pod(name, namespace=self._pods.namespace)
        return name

    def _stop_api(self, planned: Planned) -> str:
        self._pods.plane.stop_api()
        self._api_there = False

        def start() -> None:
            self._pods.plane.start_api()
            self._api_there = True

        self._in(planned.lasts_s, "the API server is there again", start, needs_api=False)
        said = [f"for {planned.lasts_s:.0f} s"]
        if planned.second:
            self.until(lambda: self._second(planned, said), f"somebody whom {planned.second} can hit")
        return "; meanwhile ".join(said)

    def _second(self, planned: Planned, said: list[str]) -> bool:
        do = {
            "kill pod": self._kill_pod,
            "kill process": self._kill_process,
            "freeze pod": self._freeze_pod,
            "kill coordinator": self._kill_coordinator,
        }
        assert not self._api_there, f"nobody whom {planned.second} could hit while the API server was away"
        if whom := do[planned.second](planned):
            said.append(f"{planned.second}: {whom}")
        return bool(whom)

    def _suspend(self, planned: Planned) -> str:
        said = self._pods.ringps("suspend", self._job.name, limit_s=_LIMIT_S).stdout
        self.trail.read()
        left = [pod for pod in self._job.pods() if pod["status"]["phase"] == "Running"]
        assert not left, [pod["metadata"]["name"] for pod in left]
        self._pods.ringps("resume", self._job.name)
        return said.strip()

    def _preempt(self, planned: Planned) -> str:
        found = self._crowded()
        if found is None or not self._is_fit(found[0].name):
            return ""
        node = found[0].name
        used = sum(
            int(container["resources"].get("requests", {}).get("nvidia.com/gpu", 0))
            for pod in self._pods.api.list("Pod", fields=f"spec.nodeName={node}")
            if pod["status"].get("phase") not in ("Succeeded", "Failed")
            for container in pod["spec"]["containers"]
        )
        if not used:
            return ""
        name = f"taker-{self.done[planned.kind]}-{planned.seed}"
        self._taker(name, node, GPUS - used + 1)
        victims: list[str] = []

        def look() -> bool:
            victims[:] = [
                pod["metadata"]["name"]
                for pod in self._job.pods()
                if pod["spec"].get("nodeName") == node
                for condition in pod["status"].get("conditions") or ()
                if condition["type"] == "DisruptionTarget" and condition["reason"] == "PreemptionByScheduler"
                if "deletionTimestamp" in pod["metadata"]
            ]
            return bool(victims)

        end_s = time.monotonic() + _PREEMPTED_S
        while not look():
            if time.monotonic() > end_s:  # one went by itself just then
                self._pods.api.delete("Pod", name, grace_s=0)
                return ""
            time.sleep(_LOOK_S)
        self._taken([who for who in self.trail.members if who[1] in victims], planned.kind)
        self._in(planned.lasts_s, f"{name} goes", lambda: self._pods.api.delete("Pod", name, grace_s=0))
        return f"{' and '.join(victims)} on {node}"

    def _is_fit(self, node: str) -> bool:
        found: dict[str, Any] = self._pods.api.get("Node", node)
        return not found["spec"].get("unschedulable") and not found["spec"].get("taints")

    def _evict(self, pod: str) -> None:
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
        self._pods.api.create(body, subresource="eviction")


def _ids(members: Iterable[Member]) -> str:
    return ", ".join(str(worker_id) for worker_id, *_ in sorted(members))
