"""What the coordinator's pod does besides coordinating: it holds the Lease, watches the job's pods and its
Job, tells the coordinator what follows from them, publishes the status, and clears dead nodes.

Decisions are made in the PURE `reconcile`, `election` and `status`. Each request to the API server is made on
a thread that may wait for it; the thread that decides never waits, and the coordinator's own threads only
leave notes here. Training needs none of this: while the API server is away, everything is tried again.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ringps_launcher.kubernetes import earlier as earlier_status
from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.earlier import Earlier
from ringps_launcher.kubernetes.election import RETRY_S, Election
from ringps_launcher.kubernetes.endings import NODE_LOST
from ringps_launcher.kubernetes.errors import (
    ClusterError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
)
from ringps_launcher.kubernetes.lease import REQUEST_S, Lease
from ringps_launcher.kubernetes.outages import Outages
from ringps_launcher.kubernetes.publisher import Publisher
from ringps_launcher.kubernetes.reconcile import (
    Action,
    AskToLeave,
    Charge,
    Ended,
    ForceDelete,
    Forgive,
    GiveUp,
    LookAtNode,
    Lost,
    Memory,
    Observed,
    Place,
    reconcile,
)
from ringps_launcher.kubernetes.sightings import Node, Pod, WorkerJob
from ringps_launcher.kubernetes.status import JobFacts, Status
from ringps_launcher.kubernetes.topology import Place as Where
from ringps_launcher.kubernetes.watcher import Watcher

SEEN_ENTRY = "seen"
"""Entry of the status ConfigMap: the pods whose end was counted."""

_TICK_S = 1.0
_MOST_NOTES = 10_000
_MOST_ERRANDS = 4096
_RIGHTS_S = 10.0
"""How long a missing right is waited for, before what an earlier coordinator has left counts as lost."""
_TRACEBACKS = 10


class Core(Protocol):
    """The coordinator, as far as the cluster concerns it. Every method returns at once, and may be told the
    same again."""

    def fence(self, held: bool) -> None:
        """Whether the Lease is held for certain, so that no other coordinator rules."""

    def place(self, host: str, place: tuple[str, ...]) -> None:
        """Where a pod is, from the largest failure domain to the smallest."""

    def ask_to_leave(self, pods: Sequence[tuple[int, str]], reason: str) -> None:
        """These workers, each in this pod, are to leave after the step that they are in."""

    def charge(self, worker_id: int, host: str, cause: str, reason: str) -> None:
        """A pod ended in a way that counts against the budget."""

    def lost(self, host: str, reason: str) -> None:
        """Nothing of this pod runs any more."""

    def give_up(self, reason: str) -> None:
        """No pod will be made any more: the job has failed."""


@dataclass(frozen=True, kw_only=True)
class OperatorSettings:
    """Which job it is, and what was asked for."""

    name: str
    """Of the job."""
    identity: str
    """POD_NAME/POD_UID of the coordinator's pod."""
    facts: JobFacts
    dead_node_s: float = 20.0
    """For how long a node must be seen dead before its pods are deleted by force."""


class Operator:
    """In this order: `wait_for_lease`, `recorded_verdict` and `earlier`, `start`, `close`."""

    def __init__(
        self,
        settings: OperatorSettings,
        cluster: Cluster,
        say: Callable[[str], None],
        on_lease_lost: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        time_of_day: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            settings: the job.
            cluster: the API server, in the job's namespace.
            say: tells whoever reads the coordinator's output; called on any thread.
            on_lease_lost: called on a thread of the operator when another coordinator rules. This process
                must end at once, with a code that has it started again, and tell workers nothing more.
            clock: monotonic.
            time_of_day: seconds since the epoch.
        """
        self._settings = settings
        self._say = say
        self._on_lease_lost = on_lease_lost
        self._clock = clock
        self._time_of_day = time_of_day
        self._cluster = cluster.within(REQUEST_S)
        self._outages = Outages(say)
        self._lease = Lease(
            self._cluster,
            names.coordinator(settings.name),
            Election(settings.identity),
            self._outages,
            clock=clock,
            time_of_day=time_of_day,
        )
        self._publisher = Publisher(
            self._cluster,
            names.status_map(settings.name),
            self._data,
            lambda: self._lease.held,
            self._outages,
            clock,
        )
        workers = _Selection(cluster, "Pod", labels=names.selector(settings.name, names.WORKER))
        job = _Selection(cluster, "Job", fields=f"metadata.name={settings.name}")
        self._pods = Watcher("pods", workers, Pod.of, self._wake, self._outages)
        self._jobs = Watcher("job", job, WorkerJob.of, self._wake, self._outages)
        self._errands: queue.Queue[LookAtNode | ForceDelete | Forgive | None] = queue.Queue(_MOST_ERRANDS)
        self._notes: deque[Mapping[str, Any]] = deque(maxlen=_MOST_NOTES)
        self._bell = threading.Condition()
        self._rung = False
        self._closing = False
        self._lock = threading.Lock()
        """Guards all that is decided upon: what follows here."""
        self._earlier = Earlier()
        self._memory = Memory()
        self._status = Status(settings.facts, self._earlier, time_of_day())
        self._nodes: dict[str, Node] = {}
        self._nodes_readable = True
        self._places: dict[str, Where] = {}
        self._before: Observed | None = None
        self._core: Core | None = None
        self._fenced: bool | None = None
        self._bugs = 0
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._decide, "ringps-operator"), (self._run_errands, "ringps-errands"))
        ]

    # Before the coordinator serves.

    def wait_for_lease(self, stop: threading.Event) -> bool:
        """Wait until this is the coordinator that rules, for ever; then read what the one before has left.
        Only after that may anybody be served. False if `stop` was set first, or the Lease was lost again."""
        if not self._lease.acquire(stop, self._say):
            return False
        self._lease.keep(self._on_lease_lost)
        refusable_s = self._clock() + _RIGHTS_S
        while not stop.is_set():
            if not self._lease.held:
                stop.wait(RETRY_S)
                continue
            try:
                data = self._publisher.claim(self._lease.term)
            except (NotFoundError, ForbiddenError, InvalidError) as error:
                # An API server that has just started may not know of all rights yet.
                if not isinstance(error, ForbiddenError) or self._clock() >= refusable_s:
                    self._say(f"{error}; nobody will see this job's status")
                    return True
            except ConflictError:
                pass
            except ClusterError as error:
                self._outages.failed("status", error)
            else:
                self._go_on_from(data)
                return True
            stop.wait(RETRY_S)
        return False

    def recorded_verdict(self) -> str:
        """ "" while the job goes on, else "done" or "failed: REASON": an earlier coordinator's last word."""
        return self._earlier.verdict

    @property
    def earlier(self) -> Earlier:
        """What an earlier coordinator left."""
        return self._earlier

    @property
    def held(self) -> bool:
        """Whether the Lease is held for certain. Never waits."""
        return self._lease.held

    # While it serves.

    def start(self, core: Core) -> None:
        """Watch, decide and publish from now on."""
        self._core = core
        self._publisher.start()
        for thread in self._threads:
            thread.start()
        self._pods.start()
        self._jobs.start()

    def note(self, event: Mapping[str, Any]) -> None:
        """A line of the coordinator's for the events file. From any thread; never waits."""
        self._notes.append(event)
        self._wake()

    def record_verdict(self, verdict: str) -> bool:
        """Write down how the job ended: "done" or "failed: REASON". Waits for as long as that takes, also
        while the API server is away. False if it cannot be written, or after `close`."""
        with self._lock:
            self._fold_notes()
            self._status.judge(verdict, self._time_of_day())
        return self._publisher.wait(self._publisher.nudge(pressing=True))

    def close(self) -> None:
        """End every thread, publish once more, and let another coordinator rule. Nobody may be served any
        more when this is called. Safe to call again."""
        with self._bell:
            first, self._closing = not self._closing, True
            self._bell.notify_all()
        if not first:
            return
        self._pods.close()
        self._jobs.close()
        try:
            self._errands.put_nowait(None)
        except queue.Full:
            pass  # it looks at `_closing` after every errand
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._publisher.close()
        self._lease.close()

    # Inside.

    def _go_on_from(self, data: Mapping[str, Any]) -> None:
        with self._lock:
            self._earlier = earlier_status.read(
                data,
                status_entry=names.STATUS_ENTRY,
                seen_entry=SEEN_ENTRY,
                verdict_entry=names.VERDICT_ENTRY,
            )
            self._memory = Memory.after(self._earlier.seen, forgetful=self._earlier.forgetful)
            self._status = Status(self._settings.facts, self._earlier, self._time_of_day())

    def _wake(self) -> None:
        with self._bell:
            self._rung = True
            self._bell.notify_all()

    def _data(self) -> dict[str, str]:
        """On the publisher's thread."""
        with self._lock:
            document = self._status.document(self._time_of_day())
            verdict = self._status.verdict
            seen = earlier_status.seen_text(self._memory.seen, forgetful=self._memory.forgetful)
        return {
            names.STATUS_ENTRY: json.dumps(document, ensure_ascii=False),
            names.VERDICT_ENTRY: verdict,
            SEEN_ENTRY: seen,
        }

    # On the thread that decides.

    def _decide(self) -> None:
        while not self._closing:
            try:
                self._look()
            except Exception:  # a bug of ours must not end the job's coordination
                self._report_bug()
            with self._bell:
                now_s = self._clock()
                wait_s = _TICK_S
                if self._lease.held_until_s > now_s:
                    wait_s = min(wait_s, self._lease.held_until_s - now_s)
                self._bell.wait_for(lambda: self._rung or self._closing, wait_s)
                self._rung = False

    def _look(self) -> None:
        core = self._core
        assert core is not None
        held = self._lease.held
        if held is not self._fenced:
            self._fenced = held
            core.fence(held)
        pods, jobs = self._pods.views, self._jobs.views
        with self._lock:
            before = self._status.pressing
            news = self._fold_notes()
            actions: list[Action] = []
            if pods is not None and jobs is not None:
                observed = Observed(
                    pods=pods,
                    job=jobs[0] if jobs else None,
                    nodes=self._nodes,
                    nodes_readable=self._nodes_readable,
                )
                actions = self._reconcile(observed)
                news = news or bool(actions) or observed != self._before
                self._before = observed
            pressing = self._status.pressing != before
        for action in actions:
            self._carry_out(action, core)
        if news or pressing:
            self._publisher.nudge(pressing=pressing)

    def _fold_notes(self) -> bool:
        news = bool(self._notes)
        while self._notes:
            self._status.fold(self._notes.popleft(), self._time_of_day())
        return news

    def _reconcile(self, observed: Observed) -> list[Action]:
        now_s = self._time_of_day()
        actions = reconcile(observed, self._memory, self._clock(), dead_node_s=self._settings.dead_node_s)
        for action in actions:
            match action:
                case Place(host, place):
                    self._places[host] = place
                case Ended(pod, ending):
                    self._status.ended(pod, ending, now_s)
                case AskToLeave(leavers, reason):
                    who = ", ".join(str(worker_id) for worker_id, _ in leavers)
                    self._status.tell(f"asked to leave: worker {who}: {reason}", now_s)
                case ForceDelete(_, reason) | GiveUp(reason):
                    self._status.tell(reason, now_s)
        present = {pod.name for pod in observed.pods}
        self._places = {host: place for host, place in self._places.items() if host in present}
        suspended = observed.job is not None and observed.job.suspended
        self._status.sighted(observed.pods, self._places, suspended=suspended, now_s=now_s)
        nodes = {pod.node for pod in observed.pods}
        self._nodes = {name: node for name, node in self._nodes.items() if name in nodes}
        return actions

    def _carry_out(self, action: Action, core: Core) -> None:
        match action:
            case Place(host, place):
                core.place(host, place)
            case AskToLeave(pods, reason):
                core.ask_to_leave(pods, reason)
            case Charge(worker_id, host, cause, reason):
                core.charge(worker_id, host, cause, reason)
            case Lost(host, reason):
                core.lost(host, reason)
            case GiveUp(reason):
                core.give_up(reason)
            case LookAtNode() | ForceDelete() | Forgive():
                try:
                    self._errands.put_nowait(action)
                except queue.Full:
                    pass  # it is decided upon again

    def _report_bug(self) -> None:
        self._bugs += 1
        if self._bugs <= _TRACEBACKS:
            print("ringps: internal error in the operator:", file=sys.stderr)
            traceback.print_exc()

    # On the thread for errands.

    def _run_errands(self) -> None:
        while not self._closing and (errand := self._errands.get()) is not None:
            try:
                match errand:
                    case LookAtNode(name):
                        self._look_at_node(name)
                    case ForceDelete(pod, reason):
                        self._force_delete(pod, reason)
                    case Forgive(pod):
                        self._forgive(pod)
            except Exception:
                self._report_bug()

    def _look_at_node(self, name: str) -> None:
        node: Node | None = None
        readable = True
        try:
            node = Node.of(self._cluster.get("Node", name))
        except NotFoundError:
            node = Node(name=name, gone=True)
        except ForbiddenError as error:
            readable = False
            without = "without it, zones and racks are not known and pods on dead nodes are not cleared"
            self._outages.failed("nodes", ForbiddenError(f"{error}; {without}"))
        except ClusterError as error:
            self._outages.failed("nodes", error)
        with self._lock:
            self._nodes_readable = readable
            nodes = dict(self._nodes)
            before = nodes.pop(name, None)  # what cannot be confirmed is not relied upon
            if node is not None:
                if node.gone and before is not None:
                    node = replace(node, zone=before.zone, rack=before.rack)
                nodes[name] = node
            self._nodes = nodes
        self._wake()

    def _forgive(self, pod: Pod) -> None:
        if not self._lease.held:
            return
        metadata = {"uid": pod.uid, "annotations": {names.IGNORED_FAILURES_ANNOTATION: "0"}}
        try:
            # As part of the status, for which there is a right that leaves the rest of pods alone.
            self._cluster.patch("Pod", pod.name, {"metadata": metadata}, subresource="status")
        except (NotFoundError, ConflictError, InvalidError):
            pass  # it is another pod by now, or none
        except ClusterError as error:
            self._outages.failed("delays", error)

    def _force_delete(self, pod: Pod, reason: str) -> None:
        if not self._lease.held:
            return
        self._say(f"{reason}: deleting it by force")
        try:
            if not pod.terminal:
                self._cluster.patch("Pod", pod.name, _failed(pod), subresource="status")
            self._cluster.delete("Pod", pod.name, grace_s=0, uid=pod.uid)
        except (NotFoundError, ConflictError, InvalidError):
            pass  # it is another pod by now, or none
        except ClusterError as error:
            self._outages.failed("dead nodes", error)


class _Selection:
    """Objects of one kind, in the cluster's namespace."""

    def __init__(self, cluster: Cluster, kind: str, *, labels: str = "", fields: str = "") -> None:
        self._cluster = cluster
        self._kind = kind
        self._labels = labels
        self._fields = fields

    def list(self) -> tuple[list[dict[str, Any]], str]:
        return self._cluster.list_with_version(self._kind, labels=self._labels, fields=self._fields)

    def watch(self, version: str, timeout_s: float) -> Any:
        return self._cluster.watch(
            self._kind,
            labels=self._labels,
            fields=self._fields,
            resource_version=version,
            timeout_s=timeout_s,
        )


def _failed(pod: Pod) -> list[dict[str, Any]]:
    """The JSON patch of a pod's status by which it has failed, as Kubernetes' own pod collector does it."""
    patch: list[dict[str, Any]] = [
        {"op": "test", "path": "/metadata/uid", "value": pod.uid},
        {"op": "add", "path": "/status/phase", "value": "Failed"},
    ]
    if not pod.disruption:
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": NODE_LOST,
            "message": "its node does not answer, so its end cannot be confirmed",
        }
        patch.append({"op": "add", "path": "/status/conditions/-", "value": condition})
    return patch
