"""Where the scheduler puts workers with the profile that we ship, and whom it evicts for others.

The nodes are objects alone: a bound pod never runs. What counts is to which node it is bound.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.resources import Manifest, manifests
from ringps_launcher.kubernetes.spec import JobSpec
from tests.k8s.bare_nodes import GPU, bare_nodes
from tests.k8s.controlplane import ControlPlane
from tests.k8s.reachable import Reachable
from tests.k8s.waiting import eventually
from tests.support import require

K8S = Path(__file__).parents[2] / "k8s"
GPUS = 4
"""Of each node."""

Nodes = Callable[..., None]


@pytest.fixture(scope="module")
def profiles(cluster: Reachable) -> Iterator[None]:
    """One scheduler with the shipped configuration and, to compare, the profile that every cluster has."""
    require(isinstance(cluster, ControlPlane), "an existing cluster's scheduler is not ours to configure")
    assert isinstance(cluster, ControlPlane)
    config = yaml.safe_load((K8S / "scheduler/scheduler-config.yaml").read_text())
    config["profiles"].append({"schedulerName": "default-scheduler"})
    # No kubelet gives a sign of life.
    with cluster.configured(scheduler=config, node_grace_s=3600.0):
        yield


@pytest.fixture
def classes(cluster: Reachable) -> Iterator[None]:
    """The shipped priority classes."""
    shipped = list(yaml.safe_load_all((K8S / "base/priority-classes.yaml").read_text()))
    there = {found["metadata"]["name"] for found in cluster.api.list("PriorityClass")}
    with contextlib.ExitStack() as stack:
        for each in shipped:
            name = each["metadata"]["name"]
            if name not in there:
                cluster.api.create(each)
                stack.callback(cluster.api.delete, "PriorityClass", name)
        yield


@pytest.fixture
def nodes(profiles: None, cluster: Reachable) -> Iterator[Nodes]:
    """Makes nodes that are ready, called `a1`, `a2`, `b1` after their zones."""
    with contextlib.ExitStack() as stack:

        def add(*wanted: str) -> None:
            stack.enter_context(bare_nodes(cluster.api, *wanted, gpus=GPUS))

        yield add


@pytest.fixture
def api(cluster: Reachable, nodes: Nodes, namespace: str) -> Iterator[Cluster]:
    api = cluster.connect(namespace)
    yield api
    # While there is a Job, it holds on to its pods, of which no kubelet says that they have ended.
    for each in api.list("Job"):
        api.delete("Job", each["metadata"]["name"])


def job(namespace: str, name: str, **settings: Any) -> JobSpec:
    base = JobSpec(
        name=name,
        namespace=namespace,
        image="ringps:1",
        program="train.py",
        workers=1,
        gpus=1,
        coordinator_priority_class="",
    )
    return replace(base, **settings)


def place(api: Cluster, spec: JobSpec) -> list[str]:
    """Start a job, and wait until the scheduler has put its workers somewhere: their nodes."""
    for each in manifests(spec, "key"):
        api.create(each)
    workers = names.selector(spec.name, names.WORKER)

    def where() -> list[str]:
        return [found["spec"].get("nodeName", "") for found in api.list("Pod", labels=workers)]

    return eventually(
        lambda: where() if len(where()) == spec.workers and all(where()) else [],
        f"{spec.workers} workers of {spec.name} are placed",
    )


def pod(name: str, *, gpus: int, priority: str = "", **spec: Any) -> Manifest:
    """Any pod that takes GPUs; several, as other people's workloads may."""
    room = {GPU: str(gpus)}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            **({"priorityClassName": priority} if priority else {}),
            "containers": [
                {
                    "name": "main",
                    "image": "other:1",
                    "resources": {"requests": {"cpu": "1", **room}, "limits": room},
                    "securityContext": {
                        "runAsNonRoot": True,
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                }
            ],
            **spec,
        },
    }


def run(api: Cluster, manifest: Manifest, started: str) -> None:
    """Have a pod placed and say, as a kubelet would, since when it runs."""
    name = manifest["metadata"]["name"]
    api.create(manifest)
    eventually(lambda: api.get("Pod", name)["spec"].get("nodeName"), f"pod {name} is placed")
    status = {"phase": "Running", "startTime": f"2026-01-01T{started}:00Z"}
    api.patch("Pod", name, {"status": status}, subresource="status")


def condition(api: Cluster, name: str, kind: str) -> dict[str, Any]:
    conditions = api.get("Pod", name)["status"].get("conditions", [])
    return next((found for found in conditions if found["type"] == kind), {})


def waits(api: Cluster, name: str) -> str:
    """Why the scheduler cannot place a pod; empty as long as it has not tried."""
    found = condition(api, name, "PodScheduled")
    return str(found.get("message", "")) if found.get("status") == "False" else ""


def victims(api: Cluster) -> list[str]:
    """The pods that the scheduler evicts."""
    return sorted(
        found["metadata"]["name"]
        for found in api.list("Pod")
        if "deletionTimestamp" in found["metadata"]
        and any(each.get("reason") == "PreemptionByScheduler" for each in found["status"]["conditions"])
    )


def test_single_gpu_jobs_leave_whole_nodes_free(api: Cluster, nodes: Nodes, namespace: str) -> None:
    nodes("a1", "a2", "a3")
    used = [place(api, job(namespace, f"single-{number}", scheduler="ringps")) for number in range(3)]
    assert len({node for (node,) in used}) == 1, used
    api.create(pod("whole", gpus=GPUS, schedulerName="ringps"))
    whole = eventually(lambda: api.get("Pod", "whole")["spec"].get("nodeName"), "a pod with 4 GPUs is placed")
    assert whole not in used[0]


def test_the_default_profile_scatters_them(api: Cluster, nodes: Nodes, namespace: str) -> None:
    nodes("a1", "a2", "a3")
    used = [place(api, job(namespace, f"single-{number}")) for number in range(3)]
    assert len({node for (node,) in used}) == 3, used
    api.create(pod("whole", gpus=GPUS))
    assert "Insufficient nvidia.com/gpu" in eventually(lambda: waits(api, "whole"), "it is tried")


def test_a_gap_is_filled_before_an_empty_node_is_begun(api: Cluster, nodes: Nodes, namespace: str) -> None:
    nodes("a1", "a2", "a3")
    run(
        api,
        pod("most", gpus=3, schedulerName="ringps", nodeSelector={"kubernetes.io/hostname": "a2"}),
        "10:00",
    )
    run(
        api,
        pod("few", gpus=1, schedulerName="ringps", nodeSelector={"kubernetes.io/hostname": "a3"}),
        "10:00",
    )
    placed = [place(api, job(namespace, f"single-{number}", scheduler="ringps")) for number in range(4)]
    assert placed == [["a2"], ["a3"], ["a3"], ["a3"]]


def test_workers_of_one_job_share_a_node(api: Cluster, nodes: Nodes, namespace: str) -> None:
    nodes("a1", "a2", "b1", "b2")
    assert len(set(place(api, job(namespace, "ring", workers=GPUS, scheduler="ringps")))) == 1
    assert len(set(place(api, job(namespace, "other", workers=GPUS, scheduler="ringps")))) == 1


def test_a_job_stays_in_its_zone_though_a_fuller_node_is_elsewhere(
    api: Cluster, nodes: Nodes, namespace: str
) -> None:
    nodes("a1", "a2", "b1")
    for node, gpus in (("a1", 3), ("b1", 2)):
        where = {"kubernetes.io/hostname": node}
        run(api, pod(f"on-{node}", gpus=gpus, schedulerName="ringps", nodeSelector=where), "10:00")
    assert sorted(place(api, job(namespace, "ring", workers=2, scheduler="ringps"))) == ["a1", "a2"]


def test_jobs_without_gpus_are_spread_by_the_cluster_s_own_profile(
    api: Cluster, nodes: Nodes, namespace: str
) -> None:
    nodes("a1", "a2", "a3")
    used = [place(api, job(namespace, f"cpu-{number}", gpus=0, cpu="4")) for number in range(3)]
    assert len({node for (node,) in used}) == 3, used


def test_the_lowest_priority_is_evicted_first_and_then_who_started_last(
    classes: None, api: Cluster, nodes: Nodes
) -> None:
    nodes("a1")
    run(api, pod("plain-new", gpus=1), "13:00")
    run(api, pod("low-new", gpus=1, priority="ringps-low"), "12:00")
    run(api, pod("low-old", gpus=1, priority="ringps-low"), "11:00")
    run(api, pod("high-new", gpus=1, priority="ringps-high"), "14:00")
    api.create(pod("first", gpus=1, priority="ringps-high", schedulerName="ringps"))
    assert eventually(lambda: victims(api), "somebody is evicted") == ["low-new"]
    assert condition(api, "low-new", "DisruptionTarget")["status"] == "True"
    assert eventually(lambda: api.get("Pod", "first")["status"].get("nominatedNodeName"), "it has a place")
    api.delete("Pod", "low-new", grace_s=0)  # the kubelet's word that it has ended
    eventually(lambda: api.get("Pod", "first")["spec"].get("nodeName"), "it is placed")
    assert victims(api) == []

    api.create(pod("second", gpus=1, priority="ringps-high", schedulerName="ringps"))
    assert eventually(lambda: victims(api), "somebody is evicted") == ["low-old"]
    api.delete("Pod", "low-old", grace_s=0)
    eventually(lambda: api.get("Pod", "second")["spec"].get("nodeName"), "it is placed")

    api.create(pod("third", gpus=1, priority="ringps-high", schedulerName="ringps"))
    assert eventually(lambda: victims(api), "somebody is evicted") == ["plain-new"]


def test_of_equal_victims_the_node_of_the_last_started_is_taken(
    classes: None, api: Cluster, nodes: Nodes
) -> None:
    nodes("a1", "a2", "a3")
    for node, started in (("a1", "12:00"), ("a2", "14:00"), ("a3", "10:00")):
        run(
            api,
            pod(
                f"low-{node}", gpus=GPUS, priority="ringps-low", nodeSelector={"kubernetes.io/hostname": node}
            ),
            started,
        )
    api.create(pod("high", gpus=GPUS, priority="ringps-high", schedulerName="ringps"))
    assert eventually(lambda: victims(api), "somebody is evicted") == ["low-a2"]


@pytest.mark.parametrize("priority", ["ringps-low", "ringps-coordinator"])
def test_who_evicts_nobody(classes: None, api: Cluster, nodes: Nodes, priority: str) -> None:
    nodes("a1")
    run(api, pod("low", gpus=GPUS, priority="ringps-low"), "12:00")
    api.create(pod("next", gpus=1, priority=priority, schedulerName="ringps"))
    assert "Insufficient nvidia.com/gpu" in eventually(lambda: waits(api, "next"), "it is tried")
    assert "nominatedNodeName" not in api.get("Pod", "next")["status"]
    assert victims(api) == []


def test_a_gang_starts_whole_and_gets_its_members_replaced(
    control_plane: ControlPlane, api: Cluster, nodes: Nodes, namespace: str
) -> None:
    """With the Job's own field, where a control plane has it."""
    gates = {"GenericWorkload": True, "WorkloadWithJob": True}
    with control_plane.configured(gates=gates, apis=("scheduling.k8s.io/v1beta1",)):
        nodes("a1")
        for each in manifests(job(namespace, "gang", workers=GPUS + 1, gang=True, scheduler="ringps"), "key"):
            api.create(each)
        workers = names.selector("gang", names.WORKER)

        def pods() -> dict[str, Manifest]:
            found = {each["metadata"]["name"]: each for each in api.list("Pod", labels=workers)}
            return {name: each for name, each in found.items() if each["status"]["phase"] != "Failed"}

        def placed() -> int:
            return sum("nodeName" in each["spec"] for each in pods().values())

        # That it was tried and refused: until then, that nobody is placed says nothing.
        eventually(lambda: any(waits(api, name) for name in pods()), "the gang is refused")
        assert placed() == 0
        nodes("a2")
        eventually(lambda: placed() == GPUS + 1, "the whole gang is placed")

        lost = min(pods())
        disrupted = {"type": "DisruptionTarget", "status": "True", "reason": "Test"}
        conditions = [*pods()[lost]["status"]["conditions"], disrupted]
        failed = {"phase": "Failed", "conditions": conditions}
        api.patch("Pod", lost, {"status": failed}, subresource="status")
        eventually(lambda: lost not in pods() and placed() == GPUS + 1, "one is replaced alone")
        for each in api.list("Job"):
            api.delete("Job", each["metadata"]["name"])
        eventually(lambda: not api.list("Job"), "the gang is over while the control plane knows gangs")
