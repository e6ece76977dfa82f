"""`ringps doctor` against a real API server: as its administrator, and with few rights."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ringps_launcher.cli import main
from ringps_launcher.kubernetes import findings
from ringps_launcher.kubernetes.checks import Patient
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.doctor import CHECKS, examine
from ringps_launcher.kubernetes.findings import Finding
from tests.k8s.conftest import new_namespace
from tests.k8s.controlplane import ControlPlane
from tests.k8s.kubelet.fleet import Fleet
from tests.k8s.reachable import Reachable

Levels = dict[str, list[Finding]]


def found(api: Cluster, *, queue: str = "", gpu_resource: str = "nvidia.com/gpu") -> Levels:
    """The findings by the name of their check."""
    patient = Patient(cluster=api, gpu_resource=gpu_resource, queue=queue, now=time.time())
    by_name: Levels = {}
    for name, finding in examine(patient):
        by_name.setdefault(name, []).append(finding)
    return by_name


def levels(checked: Levels, name: str) -> list[str]:
    return [finding.level for finding in checked[name]]


def words(checked: Levels, name: str) -> str:
    return " | ".join(finding.words for finding in checked[name])


def test_an_administrator_of_an_empty_cluster(api: Cluster) -> None:
    checked = found(api)
    assert list(checked) == [name for name, _ in CHECKS]
    for name in ("API server", "rights", "objects", "pods", "gang", "quota", "Kueue"):
        assert set(levels(checked, name)) == {"ok"}, words(checked, name)
    assert (
        "a worker pod is accepted with /dev/shm in memory (dry run; Pod Security level: restricted)"
        in words(checked, "pods")
    )
    assert "is dropped: leave --gang out" in words(checked, "gang")
    assert levels(checked, "priority classes")[0] == "fail"
    assert levels(checked, "node reader") == ["warn"]
    assert levels(checked, "nodes") == ["fail"]
    assert levels(checked, "GPUs") == ["warn"]
    assert levels(checked, "storage") == ["warn"]
    assert levels(checked, "scheduler") == ["unseen"]
    assert levels(checked, "metrics") == ["warn"]
    assert levels(checked, "NetworkPolicy") == ["unseen"]


def test_nothing_is_left_behind(api: Cluster) -> None:
    found(api)
    for kind in ("Job", "Secret", "Role", "RoleBinding", "Lease", "Service", "NetworkPolicy", "Pod"):
        assert api.list(kind) == []


def test_what_is_set_up_is_found(nodes: Fleet, api: Cluster, control_plane: ControlPlane) -> None:
    nodes.add("n1", gpus=4)
    nodes.add("n2", taints=({"key": "team", "value": "a", "effect": "NoSchedule"},))
    api.create(
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "team"},
            "spec": {"hard": {"pods": "0", "configmaps": "9"}},
        }
    )
    classes = ("ringps-coordinator", "ringps-high", "ringps-low")
    for name in classes:
        api.create(
            {
                "apiVersion": "scheduling.k8s.io/v1",
                "kind": "PriorityClass",
                "metadata": {"name": name},
                "value": 5,
            }
        )
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": f"nodes-{api.namespace}"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node"},
        "subjects": [
            {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "Group",
                "name": f"system:serviceaccounts:{api.namespace}",
            }
        ],
    }
    api.create(binding)
    try:
        checked = found(api)
        assert levels(checked, "priority classes") == ["ok"]
        assert levels(checked, "node reader") == ["ok"]
        assert words(checked, "nodes").startswith("2 of 2 nodes can take pods")
        assert words(checked, "GPUs") == "4 nvidia.com/gpu on 1 node, 4 of them free"
        assert "they offer nvidia.com/gpu" in words(found(api, gpu_resource="amd.com/gpu"), "GPUs")
        while "used up for pods" not in words(
            checked, "quota"
        ):  # the quota controller counts in its own time
            checked = found(api)
        assert levels(checked, "pods") == ["warn", "warn"]
        assert "exceeded quota: team" in words(checked, "pods")
    finally:
        for name in classes:
            api.delete("PriorityClass", name)
        api.delete("ClusterRoleBinding", f"nodes-{api.namespace}")


def test_a_queue_and_a_namespace_that_are_not_there(api: Cluster, cluster: Reachable) -> None:
    assert levels(found(api, queue="team"), "Kueue") == ["fail"]
    with cluster.connect("nowhere-at-all") as connection:
        checked = found(connection)
    assert words(checked, "objects") == "there is no namespace nowhere-at-all"
    assert set(levels(checked, "pods")) == {"fail"}


def test_a_namespace_that_is_stricter_than_it_can_be_met(api: Cluster) -> None:
    limits = [{"type": "Pod", "max": {"memory": "1Gi"}}]
    api.create(
        {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}, "spec": {"limits": limits}}
    )
    checked = found(api)
    assert "fail" in levels(checked, "pods")
    assert "maximum memory usage per Pod is 1Gi" in words(checked, "pods")


def test_a_namespace_without_a_level_of_pod_security(cluster: Reachable, namespace: str) -> None:
    with (
        new_namespace(cluster, f"{namespace}-open", "privileged"),
        cluster.connect(f"{namespace}-open") as connection,
    ):
        assert "Pod Security level: privileged" in words(found(connection), "pods")


@pytest.mark.timeout(180)
def test_a_gang_field_that_is_kept(control_plane: ControlPlane, namespace: str) -> None:
    gates = {"GenericWorkload": True, "WorkloadWithJob": True}
    with (
        control_plane.configured(gates=gates, apis=("scheduling.k8s.io/v1beta1",)),
        control_plane.connect(namespace) as connection,
    ):
        assert words(found(connection), "gang") == "the Job's own gang field is kept: --gang can be used"


def test_few_rights(cluster: Reachable, namespace: str) -> None:
    rules = [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list", "create"]}]
    with cluster.connect(namespace, cluster.service_account(namespace, "few", rules)) as connection:
        checked = found(connection)
    assert set(levels(checked, "rights")) == {"fail", "warn"}
    assert "ringps submit is not possible: you may not create Secret, create ConfigMap" in words(
        checked, "rights"
    )
    assert "create Job" not in words(checked, "rights")
    assert set(levels(checked, "objects")) == {"fail"}
    for name in (
        "node reader",
        "nodes",
        "GPUs",
        "runtime class",
        "quota",
        "storage",
        "priority classes",
        "pods",
    ):
        assert set(levels(checked, name)) == {"unseen"}, words(checked, name)


def test_output_and_exit_code(
    cluster: Reachable, namespace: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    capfd.readouterr()
    assert main(["doctor", "-N", namespace]) == 1
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines()[0].startswith("ok      API server")
    assert out.splitlines()[-1].startswith("jobs cannot run here yet: ")
    assert main(["doctor", "-N", namespace, "--json"]) == 1
    document = json.loads(capfd.readouterr().out)
    assert document["ok"] is False
    assert {entry["level"] for entry in document["checks"]} <= {"ok", "warn", "fail", "unseen"}


def test_an_api_server_that_is_away_is_the_only_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "x", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
    }
    (tmp_path / "config").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    capfd.readouterr()
    assert main(["doctor"]) == 1
    out, _ = capfd.readouterr()
    assert "cannot be reached" in out.splitlines()[0]
    assert findings.OK not in out.split()
