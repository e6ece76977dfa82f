"""What the other tests here stand on: the control plane, by what its parts do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import ForbiddenError, UnreachableError
from tests.k8s.controlplane import ControlPlane
from tests.k8s.reachable import Reachable
from tests.k8s.waiting import eventually

ROOT = Path(__file__).parents[2]

CONTAINER = {
    "name": "main",
    "image": "test:1",
    "securityContext": {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    },
}


def job(name: str, workers: int, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": workers,
            "parallelism": workers,
            "template": {"spec": {"restartPolicy": "Never", "containers": [CONTAINER]}},
            **spec,
        },
    }


def condition(thing: dict[str, Any], kind: str) -> dict[str, Any]:
    found = [each for each in thing.get("status", {}).get("conditions", ()) if each["type"] == kind]
    return found[0] if found else {}


def test_pods_of_a_job_wait_for_a_node_and_go_with_it(api: Cluster) -> None:
    api.create(job("ring", 3))

    pods = eventually(lambda: _scheduled_or_not(api, 3), "the scheduler has looked at 3 pods")

    indices = {pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] for pod in pods}
    assert indices == {"0", "1", "2"}
    for pod in pods:
        assert pod["status"]["phase"] == "Pending"
        reason = condition(pod, "PodScheduled")
        assert (reason["status"], reason["reason"]) == ("False", "Unschedulable")
        assert "no nodes available" in reason["message"]
    api.delete("Job", "ring")
    eventually(lambda: not api.list("Pod"), "the garbage collector has removed the pods")


def _scheduled_or_not(api: Cluster, count: int) -> list[dict[str, Any]]:
    pods = api.list("Pod", labels="batch.kubernetes.io/job-name=ring")
    done = len(pods) == count and all(condition(pod, "PodScheduled") for pod in pods)
    return pods if done else []


def test_the_restricted_standard_is_enforced(api: Cluster) -> None:
    bare = job("bare", 1)
    bare["spec"]["template"]["spec"]["containers"] = [{"name": "main", "image": "test:1"}]
    api.create(bare)

    def refused() -> list[str]:
        return [event["message"] for event in api.list("Event") if event["reason"] == "FailedCreate"]

    assert (
        "violates PodSecurity" in eventually(refused, "the Job controller says that its pod was refused")[0]
    )


def test_a_service_account_may_do_what_its_role_says(cluster: Reachable, namespace: str) -> None:
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]

    reader = cluster.connect(kubeconfig=cluster.service_account(namespace, "reader", rules))

    assert reader.namespace == namespace
    assert reader.list("Pod") == []
    assert reader.can_i("list", "Pod")[0]
    assert not reader.can_i("create", "Pod")[0]
    with pytest.raises(ForbiddenError):
        reader.list("Secret")
    with pytest.raises(ForbiddenError):
        reader.list("Pod", namespace="default")
    reader.close()


def test_a_user_with_a_certificate(control_plane: ControlPlane, namespace: str) -> None:
    node = control_plane.connect(namespace, control_plane.kubeconfig_of("system:node:n1", "system:nodes"))

    manifest = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}}
    try:
        assert node.create(manifest)["metadata"]["name"] == "n1"
        with pytest.raises(ForbiddenError):
            node.create({**manifest, "metadata": {"name": "n2"}})
    finally:
        control_plane.api.delete("Node", "n1")
    node.close()


def test_the_api_server_comes_back_with_what_it_held(control_plane: ControlPlane, namespace: str) -> None:
    api = control_plane.connect(namespace)
    made = api.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kept"}})

    control_plane.stop_api()
    try:
        with pytest.raises(UnreachableError):
            api.get("ConfigMap", "kept")
    finally:
        control_plane.start_api()

    assert api.get("ConfigMap", "kept")["metadata"]["uid"] == made["metadata"]["uid"]
    api.create(job("ring", 1))
    eventually(lambda: _scheduled_or_not(api, 1), "controllers and scheduler have found the API server again")


def test_without_its_controllers_a_job_has_no_pods(control_plane: ControlPlane, namespace: str) -> None:
    api = control_plane.connect(namespace)
    control_plane.stop_controllers()
    try:
        api.create(job("ring", 1))
        assert api.list("Pod") == []
        assert "startTime" not in api.get("Job", "ring").get("status", {})
    finally:
        control_plane.start_controllers()
    eventually(lambda: api.list("Pod"), "the Job controller has made the pod")


def test_another_scheduler_configuration(control_plane: ControlPlane, namespace: str) -> None:
    api = control_plane.connect(namespace)
    template = {"spec": {"restartPolicy": "Never", "schedulerName": "ours", "containers": [CONTAINER]}}
    api.create(job("ring", 1, template=template))

    pod = eventually(lambda: api.list("Pod"), "the Job controller has made the pod")[0]
    assert not condition(pod, "PodScheduled")
    with control_plane.configured(scheduler={"profiles": [{"schedulerName": "ours"}]}):
        eventually(lambda: _scheduled_or_not(api, 1), "the scheduler of this name has looked at the pod")


def test_the_gang_field_is_kept_where_its_gate_is_on(control_plane: ControlPlane, namespace: str) -> None:
    api = control_plane.connect(namespace)
    gang = job("ring", 2, scheduling={"schedulingPolicy": {"gang": {"minCount": 2}}})

    assert "scheduling" not in api.create(gang, dry_run=True)["spec"]
    gates = {"GenericWorkload": True, "WorkloadWithJob": True}
    with control_plane.configured(gates=gates, apis=("scheduling.k8s.io/v1beta1",)):
        assert api.create(gang)["spec"]["scheduling"] == gang["spec"]["scheduling"]
        eventually(lambda: _scheduled_or_not(api, 2), "the Job controller has made the gang")


def test_a_node_that_says_nothing_is_tainted(control_plane: ControlPlane, namespace: str) -> None:
    api = control_plane.connect(namespace)
    api.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "silent"}})
    try:

        def taints() -> set[str]:
            return {each["key"] for each in api.get("Node", "silent")["spec"].get("taints", ())}

        eventually(lambda: "node.kubernetes.io/unreachable" in taints(), "the node counts as unreachable")
    finally:
        api.delete("Node", "silent")


def test_what_a_killed_test_run_had_started_dies_with_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=30
    )

    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    eventually(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), f"process {pid} is gone")


_KILLED = """
import os, pathlib, signal, sys, threading
from ringps_launcher.guard import Guard
from tests.k8s.component import Component

log = pathlib.Path(sys.argv[1], "log")
sleeper = Component("sleeper", ["sleep", "600"], guard=Guard(), log=log, environ={})
thread = threading.Thread(target=sleeper.start)
thread.start()
thread.join()
assert sleeper.running  # though the thread that started it is gone
print(sleeper.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("strict", [False, True])
def test_without_binaries_it_says_what_is_missing(tmp_path: Path, strict: bool) -> None:
    environ = {
        **os.environ,
        "KUBEBUILDER_ASSETS": str(tmp_path),
        "RINGPS_TEST_NO_SKIP": "1" if strict else "",
    }
    environ.pop("RINGPS_TEST_KUBECONFIG", None)
    test = f"{Path(__file__).relative_to(ROOT)}::{test_the_restricted_standard_is_enforced.__name__}"

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == (1 if strict else 0), done.stdout
    assert ("1 error" if strict else "1 skipped") in done.stdout
    assert f"no Kubernetes control plane: {tmp_path} lacks etcd, kube-apiserver" in done.stdout
    assert "make k8s-testenv" in done.stdout
