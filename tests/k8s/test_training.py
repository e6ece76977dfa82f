"""Real training in pods, on the real control plane with the real scheduler."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.k8s.commands import IMAGE
from tests.k8s.controlplane import ControlPlane
from tests.k8s.job import SMALL, Job, Pods
from tests.k8s.kubelet import Fleet
from tests.k8s.waiting import eventually
from tests.launching import ROOT

pytestmark = pytest.mark.timeout(300)

Say = Callable[[str], None]


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Say:
    """Print a figure, though the test passes."""

    def write(text: str) -> None:
        with capfd.disabled():
            print(f"\n{text}", flush=True)

    return write


@pytest.fixture
def pods(control_plane: ControlPlane, namespace: str, nodes: Fleet, tmp_path: Path) -> Iterator[Pods]:
    """Two nodes in two zones."""
    for index, zone in enumerate(("a", "b")):
        labels = {"topology.kubernetes.io/zone": zone, "topology.ringps.dev/rack": f"r{index}"}
        nodes.add(f"node-{index}", labels=labels, cpu="4", memory="16Gi", gpus=4)
    made = Pods(control_plane, namespace, nodes, tmp_path)
    made.let_coordinators_see_nodes()
    yield made
    made.close()


def test_digits_come_to_the_same_accuracy_as_on_one_machine(pods: Pods) -> None:
    digits = ROOT / "examples" / "digits.py"
    local = subprocess.run(
        [sys.executable, "-m", "ringps_launcher", "run", "-n", "4", str(digits)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    done = pods.ringps("submit", "--name", "digits", "--image", IMAGE, "-n", "4", *SMALL, str(digits))
    assert "ringps status" in done.stdout
    job = Job(pods, "digits")
    job.until_complete()
    logs = pods.ringps("logs", "digits").stdout
    accuracies = [re.findall(r"accuracy[^0-9]*([0-9.]+)", text)[-1] for text in (local.stdout, logs)]
    assert accuracies[0] == accuracies[1], (local.stdout, logs)
    assert job.status()["phase"] == "done"
    places = [member["zone"] for member in job.status()["members"]]
    assert places == sorted(places)


def test_the_scheduler_preempts_one_worker(pods: Pods, say: Say) -> None:
    """A pod of higher priority takes its node's GPUs; when that one is gone, there are four again."""
    for name, value in (("low", 10), ("high", 1000)):
        priority_class(pods, f"{pods.namespace}-{name}", value)
    job = pods.train(
        "preempted", 4, "--gpus", "1", "--min-workers", "2", "--priority-class", f"{pods.namespace}-low",
    )  # fmt: skip
    job.until_step(30)
    job.until_members(0, 1, 2, 3)
    # 8 GPUs in all, 4 in use: one that wants 4 + 1 of a node's finds room only by preempting.
    before = {pod["metadata"]["name"] for pod in job.pods()}
    takers = [gpu_pod(pods, f"taker-{index}", gpus, "high") for index, gpus in enumerate(free(pods, job))]
    job.until_members_count(3)
    at = job.ledger.last_step
    job.until_step(at + 40)
    assert job.ledger.rollbacks == 0
    gap_s = job.ledger.longest_gap_s()
    say(f"one of 4 preempted: the longest gap of the others was {gap_s:.2f} s above a step")
    assert gap_s < 10, "they waited for something that they need not wait for"
    for taker in takers:
        pods.api.delete("Pod", taker, grace_s=0)
    job.until_members(0, 1, 2, 3)
    assert len({pod["metadata"]["name"] for pod in job.pods()} - before) == 1
    assert job.status()["restarts"]["preempted"] == 1
    assert job.status()["budget"]["used"] == 0
    job.finish()
    assert job.ledger.rollbacks == 0
    assert 4 in job.ledger.worlds() and 3 in job.ledger.worlds()


def test_a_suspended_job_goes_on_with_the_same_bits(pods: Pods) -> None:
    """Suspended and resumed, and all its pods evicted at once, against a job that nobody disturbed."""
    digests = []
    for name in ("whole", "suspended", "evicted"):
        job = pods.train(name, 3, "--min-workers", "3", script=("--until", "120"))
        if name != "whole":
            job.until_step(30)
        if name == "suspended":
            said = pods.ringps("suspend", name).stdout
            assert "step" in said, said
            assert not [pod for pod in job.pods() if pod["status"]["phase"] == "Running"]
            held = job.ledger.last_step
            assert held < 120
            pods.ringps("resume", name)
        if name == "evicted":
            for pod in job.pods():
                pods.api.create(eviction(pod["metadata"]["name"]), subresource="eviction")
        job.until_complete()
        job.ledger.check()
        assert job.ledger.rollbacks == 0, "an agreed checkpoint is that of the last step"
        digests.append(job.ledger.digest())
    assert len(set(digests)) == 1


def test_a_worker_is_killed_and_a_node_drained(pods: Pods, nodes: Fleet) -> None:
    nodes.add("node-2", labels={"topology.kubernetes.io/zone": "b"}, cpu="4", memory="16Gi")
    job = pods.train("killed", 4)
    job.until_step(30)
    nodes.kill_pod(job.pod(2))
    job.until_members_count(3)
    job.until_members(0, 1, 2, 3)
    drained = job.node_of(job.pod(1))
    pods.plane.kubectl(
        "drain", drained, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=80s"
    )
    job.until_members(0, 1, 2, 3)
    assert drained not in {member["node"] for member in job.status()["members"]}
    pods.plane.kubectl("uncordon", drained)
    job.finish()
    assert job.ledger.rollbacks == 0
    status = job.status()
    assert status["restarts"]["killed"] == 1
    assert status["budget"]["used"] == 1


def test_a_node_vanishes(pods: Pods, nodes: Fleet) -> None:
    """Nobody says anything any more; its pods are cleared away, and their successors join elsewhere."""
    # Two to a node, which two others leave no room for more.
    for index, node in enumerate(("node-0", "node-1")):
        gpu_pod(pods, f"filler-{index}", 2, node=node)
    job = pods.train("vanished", 4, "--gpus", "1", "--dead-node-s", "5", "--checkpoint-budget", "5")
    job.until_step(30)
    nodes.add("node-2", cpu="4", memory="16Gi", gpus=4)
    coordinator = job.node_of(job.coordinator())
    gone = next(name for name in ("node-0", "node-1") if name != coordinator)
    lost = [m["worker_id"] for m in job.status()["members"] if m["node"] == gone]
    assert lost, job.status()
    nodes.vanish_node(gone)
    job.until_members(*(worker_id for worker_id in range(4) if worker_id not in lost))
    job.until_members(0, 1, 2, 3, limit_s=120)
    job.finish()
    assert job.ledger.rollbacks == 0
    assert job.status()["budget"]["used"] == 0


def test_the_coordinator_is_deleted_and_then_killed(pods: Pods, nodes: Fleet) -> None:
    job = pods.train("headless", 3)
    job.until_step(30)
    first = job.coordinator()
    pods.api.delete("Pod", first)
    job.until(lambda: job.coordinator_if_any() not in ("", first), "another coordinator runs")
    job.until_step(job.ledger.last_step + 20)
    nodes.kill_pod(job.pod(1))
    job.until_members_count(2)
    job.until_members(0, 1, 2)
    nodes.kill_pod(job.coordinator())
    nodes.kill_pod(job.pod(2))
    job.until_members(0, 1, 2, limit_s=120)
    job.finish()
    assert job.ledger.rollbacks == 0


def test_the_api_server_is_away_for_a_minute(pods: Pods, control_plane: ControlPlane, nodes: Fleet) -> None:
    """A worker that is lost meanwhile is lost to the ring at once, and replaced once there is a server."""
    job = pods.train("alone", 3)
    job.until_step(30)
    victim = job.pod(1)
    control_plane.stop_api()
    began = time.monotonic()
    before = job.ledger.last_step
    nodes.kill_pod(victim, namespace=pods.namespace)
    eventually(lambda: job.ledger.last_step > before + 100, "training goes on", limit_s=60)
    while time.monotonic() < began + 60:
        time.sleep(0.5)
    control_plane.start_api()
    job.until_members(0, 1, 2, limit_s=120)
    job.finish()
    assert job.ledger.rollbacks == 0
    assert 2 in job.ledger.worlds()


def test_from_submit_to_the_first_step(pods: Pods, say: Say) -> None:
    """How long it takes, and how much of it the pods take to start, and torch to load."""
    began = time.time()
    job = pods.train("quick", 2, script=("--until", "30"))
    job.until_complete()
    ledger = job.ledger
    containers = [pod["status"]["containerStatuses"][0]["state"]["terminated"] for pod in job.pods()]
    ran = max(datetime.fromisoformat(one["startedAt"]).timestamp() for one in containers)
    loaded = max(line["t"] for line in ledger.of("start"))
    committed = min(line["t"] for line in ledger.of("commit"))
    say(
        f"submit to the first step of 2 workers: {committed - began:.1f} s; the last container ran after "
        f"{ran - began:.0f} s, its script had loaded torch after {loaded - began:.1f} s. Without ringps or "
        f"pods, two processes that load torch and make an optimizer take {torch_alone_s(2):.1f} s"
    )
    ledger.check()
    assert began < ran <= loaded < committed


def torch_alone_s(processes: int) -> float:
    """What the start of as many scripts takes on this machine."""
    source = "import torch; torch.optim.AdamW(torch.nn.Linear(8, 1).parameters())"
    began = time.monotonic()
    started = [subprocess.Popen([sys.executable, "-c", source]) for _ in range(processes)]
    assert [process.wait() for process in started] == [0] * processes
    return time.monotonic() - began


def priority_class(pods: Pods, name: str, value: int) -> None:
    pods.plane.apply(
        {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": name},
            "value": value,
        }
    )


def free(pods: Pods, job: Job) -> list[int]:
    """GPUs of pods that leave room for all but one of the job's: one more than a node has free, and all that
    the other has."""
    used = {"node-0": 0, "node-1": 0}
    for pod in job.pods():
        used[pod["spec"]["nodeName"]] += 1
    crowded = max(used, key=lambda name: used[name])
    other = next(name for name in used if name != crowded)
    return [gpus for gpus in (4 - used[other], 4 - used[crowded] + 1) if gpus]


def gpu_pod(pods: Pods, name: str, gpus: int, priority: str = "", node: str = "") -> str:
    quantity = {"nvidia.com/gpu": str(gpus), "cpu": "100m"}
    pods.api.create(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {
                **({"priorityClassName": f"{pods.namespace}-{priority}"} if priority else {}),
                **({"nodeSelector": {"kubernetes.io/hostname": node}} if node else {}),
                "terminationGracePeriodSeconds": 0,
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 65532,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        "name": "sleep",
                        "image": IMAGE,
                        "command": ["sleep", "1000"],
                        "resources": {"requests": quantity, "limits": {"nvidia.com/gpu": str(gpus)}},
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "capabilities": {"drop": ["ALL"]},
                        },
                    }
                ],
            },
        }
    )
    return name


def eviction(pod: str) -> dict[str, object]:
    return {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
