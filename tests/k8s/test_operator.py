"""The operator against a real API server, Job controller and scheduler, with no more rights than its pod has.

The test itself plays the kubelets: what matters is what the operator makes of what the API server says.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ringps_launcher.kubernetes import names, reconcile
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.operator import Operator, OperatorSettings
from ringps_launcher.kubernetes.resources import manifests
from ringps_launcher.kubernetes.spec import JobSpec
from ringps_launcher.kubernetes.status import JobFacts
from tests.k8s.controlplane import ControlPlane
from tests.k8s.waiting import eventually

JOB = "train"
COORDINATOR = names.coordinator(JOB)
WORKERS = 2


class Core:
    """A coordinator that only listens."""

    def __init__(self) -> None:
        self.fences: list[bool] = []
        self.places: dict[str, tuple[str, ...]] = {}
        self.asked: list[tuple[tuple[tuple[int, str], ...], str]] = []
        self.charges: list[tuple[int, str]] = []
        self.gone: dict[str, str] = {}
        self.given_up: list[str] = []

    def fence(self, held: bool) -> None:
        self.fences.append(held)

    def place(self, host: str, place: tuple[str, ...]) -> None:
        self.places[host] = place

    def ask_to_leave(self, pods: Sequence[tuple[int, str]], reason: str) -> None:
        self.asked.append((tuple(pods), reason))

    def charge(self, worker_id: int, host: str, cause: str, reason: str) -> None:
        self.charges.append((worker_id, cause))

    def lost(self, host: str, reason: str) -> None:
        self.gone[host] = reason

    def give_up(self, reason: str) -> None:
        self.given_up.append(reason)


class Coordinator:
    """An operator in a pod of its own, and the core that it talks to."""

    def __init__(self, api: Cluster, identity: str) -> None:
        self.core = Core()
        self.said: list[str] = []
        self.deposed: list[str] = []
        facts = JobFacts(world_size=WORKERS, min_workers=1, max_restarts=5)
        settings = OperatorSettings(name=JOB, identity=identity, facts=facts, dead_node_s=1.0)
        self.operator = Operator(settings, api, self.said.append, self.deposed.append)
        self.stop = threading.Event()
        self.ready = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        if self.operator.wait_for_lease(self.stop):
            self.operator.start(self.core)
            self.ready.set()

    def begin(self) -> None:
        self._thread.start()

    def start(self) -> Coordinator:
        self.begin()
        assert self.ready.wait(30), self.said
        return self

    def close(self) -> None:
        self.stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.operator.close()


class Job:
    """The job's objects, and the kubelets that run its pods, played by the test."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self.plane = plane
        self.api = plane.connect(namespace)
        self.namespace = namespace

    def pods(self) -> dict[int, dict[str, Any]]:
        """The newest pod of each worker."""
        found = self.api.list("Pod", labels=names.selector(JOB, names.WORKER))
        found.sort(key=lambda pod: pod["metadata"]["creationTimestamp"])
        return {int(pod["metadata"]["annotations"][names.INDEX_ANNOTATION]): pod for pod in found}

    def await_successor(self, worker_id: int, name: str) -> None:
        """Wait for another pod of the worker than `name`."""

        def there() -> bool:
            pod = self.pods().get(worker_id)
            return pod is not None and pod["metadata"]["name"] != name

        eventually(there, f"a successor of {name} is made")

    def run(self) -> dict[int, str]:
        """All pods run; their names by worker id."""

        def bound() -> dict[int, dict[str, Any]]:
            pods = self.pods()
            fine = len(pods) == WORKERS and all(pod["spec"].get("nodeName") for pod in pods.values())
            return pods if fine else {}

        pods = eventually(bound, "all pods are bound")
        for pod in pods.values():
            self.set(pod["metadata"]["name"], phase="Running")
        return {worker_id: pod["metadata"]["name"] for worker_id, pod in pods.items()}

    def end(self, name: str, code: int) -> None:
        """A pod's launcher ends."""
        terminated = {"exitCode": code, "startedAt": None, "finishedAt": None, "containerID": "x://y"}
        container = {
            "name": names.WORKER,
            "image": "i",
            "imageID": "i",
            "ready": False,
            "restartCount": 0,
            "state": {"terminated": terminated},
        }
        phase = "Failed" if code else "Succeeded"
        self.set(name, phase=phase, containerStatuses=[container])

    def set(self, name: str, **status: Any) -> None:
        self.api.patch("Pod", name, {"status": status}, subresource="status")

    def status(self) -> dict[str, Any]:
        data = self.api.get("ConfigMap", names.status_map(JOB)).get("data") or {}
        return dict(json.loads(data.get(names.STATUS_ENTRY) or "{}"))

    def verdict(self) -> str:
        return str(self.api.get("ConfigMap", names.status_map(JOB))["data"][names.VERDICT_ENTRY])

    def holder(self) -> str:
        return str(self.api.get("Lease", COORDINATOR)["spec"].get("holderIdentity") or "")


@pytest.fixture(scope="module")
def quiet(cluster: Any) -> Iterator[None]:
    """No node is taken for dead unless a test says so."""
    with cluster.configured(node_grace_s=3600.0):
        yield


@pytest.fixture
def machines(quiet: None, control_plane: ControlPlane) -> Iterator[list[str]]:
    """Two nodes that are ready."""
    api = control_plane.api
    with contextlib.ExitStack() as stack:
        for name, rack in (("m1", "r1"), ("m2", "r2")):
            labels = {"topology.kubernetes.io/zone": "z", "topology.ringps.dev/rack": rack}
            stack.callback(api.delete, "Node", name)
            api.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}})
            room = {"cpu": "1500m", "memory": "8Gi", "pods": "20"}
            ready = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
            status = {"capacity": room, "allocatable": room, "conditions": [ready]}
            api.patch("Node", name, {"status": status}, subresource="status")
        yield ["m1", "m2"]


@pytest.fixture
def job(machines: list[str], control_plane: ControlPlane, namespace: str) -> Job:
    """A job's objects, without the coordinator's pod."""
    spec = JobSpec(
        name=JOB,
        namespace=namespace,
        image="i",
        program="train.py",
        workers=WORKERS,
        coordinator_priority_class="",
    )
    job = Job(control_plane, namespace)
    for manifest in manifests(spec, "no key"):
        if (manifest["kind"], manifest["metadata"]["name"]) != ("Job", COORDINATOR):
            job.api.create(manifest)
    return job


Start = Callable[..., Coordinator]


@pytest.fixture
def credentials(job: Job, control_plane: ControlPlane) -> Path:
    """A kubeconfig with the rights of the coordinator's pod."""
    token = control_plane.kubectl(
        "create", "token", COORDINATOR, "--duration", "1h", namespace=job.namespace
    ).stdout.strip()
    return control_plane._kubeconfig(f"{job.namespace}-{COORDINATOR}", {"token": token}, job.namespace)


@pytest.fixture
def reads_nodes(job: Job, control_plane: ControlPlane) -> Iterator[None]:
    """The coordinators of this namespace may look at nodes, as `k8s/base` lets those of its own."""
    name = f"nodes-{job.namespace}"
    group = "rbac.authorization.k8s.io"
    rules = [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}]
    subject = {"kind": "ServiceAccount", "name": COORDINATOR, "namespace": job.namespace}
    role = {"apiGroup": group, "kind": "ClusterRole", "name": name}
    common = {"apiVersion": f"{group}/v1", "metadata": {"name": name}}
    api = control_plane.api
    api.create({**common, "kind": "ClusterRole", "rules": rules})
    try:
        api.create({**common, "kind": "ClusterRoleBinding", "roleRef": role, "subjects": [subject]})
        yield
    finally:
        api.delete("ClusterRoleBinding", name)
        api.delete("ClusterRole", name)


@pytest.fixture
def start(job: Job, credentials: Path, control_plane: ControlPlane) -> Iterator[Start]:
    """Makes coordinators, which end with the test."""
    with contextlib.ExitStack() as stack:

        def make(identity: str = "pod-a/1") -> Coordinator:
            coordinator = Coordinator(control_plane.connect(job.namespace, credentials), identity)
            stack.callback(coordinator.close)
            return coordinator

        yield make


def test_it_places_pods_publishes_and_counts(job: Job, start: Start, reads_nodes: None) -> None:
    coordinator = start().start()
    core = coordinator.core
    assert job.holder() == "pod-a/1"
    pods = job.run()
    eventually(lambda: len(core.places) == WORKERS, "the pods are placed")
    nodes = {worker_id: pod["spec"]["nodeName"] for worker_id, pod in job.pods().items()}
    assert core.places == {pods[i]: ("z", "r" + nodes[i][1], nodes[i]) for i in pods}
    eventually(lambda: core.fences == [True], "the Lease is held")
    members = [{"rank": i, "worker_id": i, "host": pods[i], "pid": 1} for i in pods]
    coordinator.operator.note(
        {"event": "generation", "generation": 1, "members": members, "reason": "all have come"}
    )
    status = eventually(lambda: job.status().get("phase") == "running" and job.status(), "it is published")
    assert [member["node"] for member in status["members"]] == [nodes[i] for i in sorted(nodes)]
    job.end(pods[1], 137)
    eventually(lambda: core.charges, "the crash is charged")
    assert core.charges == [(1, "killed")]
    eventually(lambda: pods[1] in core.gone, "its pod is lost")
    status = eventually(lambda: job.status()["restarts"]["killed"] and job.status(), "it is counted")
    assert status["budget"] == {"used": 1, "max": 5}
    # Its successor comes, and the next coordinator does not count the same end again.
    job.await_successor(1, pods[1])
    coordinator.close()
    eventually(lambda: job.holder() == "", "the Lease is released")
    again = start("pod-b/2").start()
    assert again.operator.earlier.budget_used == 1
    assert again.operator.recorded_verdict() == ""
    eventually(lambda: pods[1] in again.core.gone, "the next one looks at the pods")
    assert again.core.charges == []


def test_it_warns_of_preemption_drains_and_suspension(job: Job, start: Start, reads_nodes: None) -> None:
    core = start().start().core
    pods = job.run()
    eventually(lambda: len(core.places) == WORKERS, "the pods are seen")
    job.api.create(
        {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pods[0], "namespace": job.namespace},
        },
        subresource="eviction",
    )
    eventually(lambda: core.asked, "the evicted one is asked to leave")
    assert core.asked == [(((0, pods[0]),), "evicted through the API (a drain)")]
    job.end(pods[0], 75)
    eventually(lambda: pods[0] in core.gone, "it is gone")
    eventually(lambda: job.status()["restarts"]["drained"] == 1, "it is counted as drained")
    assert core.charges == []
    job.await_successor(0, pods[0])
    pods = job.run()
    eventually(lambda: pods[0] in core.places, "the successor is seen")
    job.api.patch("Job", JOB, {"spec": {"suspend": True}})
    eventually(lambda: {reason for _, reason in core.asked} >= {"the job is suspended"}, "all are asked")
    everybody = [leavers for leavers, reason in core.asked if reason == "the job is suspended"]
    assert {leaver for leavers in everybody for leaver in leavers} <= set(pods.items())
    for name in pods.values():
        job.end(name, 75)
    status = eventually(
        lambda: (found := job.status())["reason"] == "the job is suspended" and found, "it says so"
    )
    assert status["phase"] == "waiting"
    assert core.charges == []


def test_a_failed_job_is_given_up(job: Job, start: Start) -> None:
    core = start().start().core
    pods = job.run()
    job.end(pods[0], 70)
    reasons = eventually(lambda: core.given_up, "it is given up")
    assert "PodFailurePolicy" in reasons[0]


def test_a_pod_on_a_dead_node_is_cleared_and_replaced(job: Job, start: Start, reads_nodes: None) -> None:
    coordinator = start().start()
    pods = job.run()
    eventually(lambda: len(coordinator.core.places) == WORKERS, "the pods are seen")
    node = job.pods()[0]["spec"]["nodeName"]
    unknown = {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}
    job.api.patch("Node", node, {"status": {"conditions": [unknown]}}, subresource="status")
    # Of the pod on the living node, which terminates too, nobody but its kubelet may say that it has ended.
    for name in pods.values():
        job.api.delete("Pod", name, grace_s=1)
    eventually(lambda: pods[0] in coordinator.core.gone, "it is cleared", limit_s=60)
    job.await_successor(0, pods[0])
    assert job.pods()[1]["metadata"]["name"] == pods[1]
    assert pods[1] not in coordinator.core.gone
    eventually(lambda: job.status()["restarts"]["node lost"] == 1, "it is counted")
    assert coordinator.core.charges == []
    assert any("deleting it by force" in line for line in coordinator.said)


def test_a_pod_that_runs_well_is_not_held_against_its_successor(
    job: Job, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Job controller counts, on each pod, those before it that were taken away."""
    monkeypatch.setattr(reconcile, "SETTLED_S", 1.0)
    start("pod-a/1").start()
    first = job.run()[0]
    job.end(first, 137)
    job.await_successor(0, first)
    successor = job.run()[0]

    def ignored() -> str:
        annotations = job.pods()[0]["metadata"]["annotations"]
        return str(annotations[names.IGNORED_FAILURES_ANNOTATION])

    assert job.pods()[0]["metadata"]["name"] == successor
    eventually(lambda: ignored() == "0", "the count is 0 again")


def test_without_the_right_to_see_nodes_it_says_so_once_and_goes_on(job: Job, start: Start) -> None:
    coordinator = start().start()
    pods = job.run()
    eventually(lambda: len(coordinator.core.places) == WORKERS, "the pods are placed")
    assert {place[1] for place in coordinator.core.places.values()} == {""}
    nodes = {pod["spec"]["nodeName"] for pod in job.pods().values()}
    assert {place[2] for place in coordinator.core.places.values()} == nodes
    told = [line for line in coordinator.said if "pods on dead nodes are not cleared" in line]
    assert len(told) == 1
    assert pods


def test_the_api_server_goes_away_and_comes_back(
    job: Job, start: Start, reads_nodes: None, control_plane: ControlPlane
) -> None:
    coordinator = start().start()
    core, operator = coordinator.core, coordinator.operator
    pods = job.run()
    eventually(lambda: len(core.places) == WORKERS, "the pods are seen")
    control_plane.stop_api()
    eventually(lambda: core.fences == [True, False], "the Lease runs out", limit_s=40)
    written: list[bool] = []
    waiter = threading.Thread(target=lambda: written.append(operator.record_verdict("failed: a reason")))
    waiter.start()
    operator.note({"event": "step_committed", "step": 5})
    control_plane.start_api()
    eventually(lambda: core.fences == [True, False, True], "the Lease is held again", limit_s=40)
    waiter.join(30)
    assert written == [True]
    assert job.verdict() == "failed: a reason"
    assert (job.status()["phase"], job.status()["step"]) == ("failed", 5)
    job.end(pods[0], 1)
    eventually(lambda: core.charges == [(0, "failed")], "it watches again", limit_s=40)
    assert coordinator.deposed == []
    assert sum("cannot be reached" in line or "try again" in line for line in coordinator.said) <= 3
    coordinator.close()
    assert start("pod-b/2").start().operator.recorded_verdict() == "failed: a reason"


def test_another_coordinator_waits_and_a_deposed_one_is_told(job: Job, start: Start) -> None:
    first = start().start()
    second = start("pod-b/2")
    second.begin()
    eventually(lambda: second.said, "the second waits")
    assert second.said == ["waiting for Lease train-coordinator: pod-a/1 has the Lease"]
    assert not second.ready.is_set()
    first.close()
    assert second.ready.wait(10)
    assert job.holder() == "pod-b/2"
    job.api.patch("Lease", COORDINATOR, {"spec": {"holderIdentity": "pod-c/3"}})
    eventually(lambda: second.deposed, "it is told", limit_s=20)
    assert second.deposed == ["pod-c/3 has the Lease now"]
    assert not second.operator.held


def test_the_status_of_a_job_whose_configmap_is_gone_does_not_block_its_end(job: Job, start: Start) -> None:
    job.api.delete("ConfigMap", names.status_map(JOB))
    coordinator = start().start()
    assert not coordinator.operator.record_verdict("done")
    assert any("nobody will see this job's status" in line for line in coordinator.said)
