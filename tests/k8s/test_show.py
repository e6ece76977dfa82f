"""`ringps ls` and `ringps status` against a real API server, scheduler and Job controller."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ringps_launcher.cli import main
from ringps_launcher.kubernetes import names, show
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import NotFoundError
from ringps_launcher.kubernetes.view import JobView
from tests.k8s.controlplane import ControlPlane
from tests.k8s.kubelet.fleet import Fleet
from tests.k8s.reachable import Reachable
from tests.k8s.scripted import create
from tests.k8s.waiting import eventually

RUNS = "trap 'exit 75' TERM; sleep 1000 & wait"


def look(api: Cluster, name: str = "digits") -> JobView:
    return show.job(api, name, time.time())


def until(api: Cluster, is_so: Callable[[JobView], object], what: str, *, limit_s: float = 30.0) -> JobView:
    """The job, once it is so."""
    found: list[JobView] = []

    def looks_so() -> bool:
        found[:] = [look(api)]
        return bool(is_so(found[0]))

    eventually(looks_so, what, limit_s=limit_s)
    return found[0]


ALL = "all 2 workers"


def waits_for(kind: str, who: str | None = None) -> Callable[[JobView], bool]:
    return lambda view: any(reason.kind == kind and who in (None, reason.who) for reason in view.reasons)


def report(api: Cluster, *, status: str, members: int = 0, verdict: str = "", **more: object) -> None:
    """Write what a coordinator would."""
    pods = sorted(
        pod["metadata"]["name"] for pod in api.list("Pod", labels=names.selector("digits", "worker"))
    )
    now = time.time()
    document = {
        "version": 1,
        "phase": status,
        "since": now - 10,
        "updated": now,
        "generation": 1,
        "step": 7,
        "samples_per_s": 12.5,
        "members": [
            {"rank": rank, "worker_id": rank, "pod": pod, "node": "n1", "zone": "z1", "rack": ""}
            for rank, pod in enumerate(pods[:members])
        ],
        **more,
    }
    data = {names.STATUS_ENTRY: json.dumps(document), names.VERDICT_ENTRY: verdict}
    api.patch("ConfigMap", names.status_map("digits"), {"data": data})


# -- why it waits: what no node runs


def test_a_cluster_without_nodes(api: Cluster) -> None:
    create(api, "digits", RUNS)
    view = until(api, waits_for("nodes", ALL), "the scheduler has looked")
    assert view.status == "pending"
    assert [reason.text for reason in view.reasons] == [
        "coordinator: the cluster has no nodes",
        "all 2 workers: the cluster has no nodes",
    ]


def test_a_quota_that_is_full(api: Cluster) -> None:
    hard = {"pods": "2", "requests.memory": "2Gi"}
    api.create(
        {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team"}, "spec": {"hard": hard}}
    )
    eventually(lambda: api.get("ResourceQuota", "team").get("status", {}).get("used"), "the quota is counted")
    create(api, "digits", RUNS, workers=4)
    view = until(api, waits_for("quota"), "pods are refused")
    (quota,) = [reason for reason in view.reasons if reason.kind == "quota"]
    assert quota.words == "quota team has no room (pods: 2 of 2 used, 1 more wanted)"
    assert quota.who.startswith("workers ")


def test_a_priority_class_and_a_level_of_pod_security(api: Cluster) -> None:
    create(api, "digits", RUNS, priority_class="gone")
    view = until(api, waits_for("admission", ALL), "pods are refused")
    (reason,) = [reason for reason in view.reasons if reason.kind == "admission"]
    assert reason.line == (
        "all 2 workers: there is no PriorityClass gone; create it, or submit with another --priority-class"
    )


def test_a_suspended_job_and_one_that_is_not_there(api: Cluster) -> None:
    create(api, "digits", RUNS)
    api.patch("Job", "digits", {"spec": {"suspend": True}})
    view = until(api, lambda view: view.status == "suspended", "it has no pods")
    assert view.reasons[0].line == "it is suspended; ringps resume digits"
    with pytest.raises(NotFoundError, match=r"there is no job other in namespace \S+; there are: digits"):
        look(api, "other")


def test_a_queue_without_kueue(api: Cluster) -> None:
    create(api, "digits", RUNS, queue="team")
    view = until(api, waits_for("queue"), "it is held back")
    assert view.status == "queued"
    assert "no Workload of Kueue's is to be seen" in view.summary


# -- what runs


def test_gpus_that_nobody_offers_and_a_node_that_is_too_small(nodes: Fleet, api: Cluster) -> None:
    nodes.add("n1", cpu="2")
    create(api, "digits", RUNS, gpus=1)
    view = until(api, waits_for("resources", ALL), "the scheduler has looked")
    (reason,) = [reason for reason in view.reasons if reason.kind == "resources"]
    assert reason.text == "all 2 workers: the only node does not fit: 1 does not have 1 nvidia.com/gpu free"
    assert reason.advice.startswith("no node offers nvidia.com/gpu: check its name (--gpu-resource)")


def test_taints_are_named(nodes: Fleet, api: Cluster) -> None:
    nodes.add("n1", taints=({"key": "team", "value": "a", "effect": "NoSchedule"},))
    create(api, "digits", RUNS)
    view = until(api, waits_for("taints", ALL), "the scheduler has looked")
    workers = [reason for reason in view.reasons if reason.who == "all 2 workers"]
    assert [reason.line for reason in workers] == [
        "all 2 workers: the only node does not fit: 1 has taints that it does not tolerate "
        "(team=a:NoSchedule); if it may run there: --toleration team=a:NoSchedule"
    ]


def test_an_image_that_is_not_there_and_a_secret_that_is_missing(nodes: Fleet, api: Cluster) -> None:
    nodes.add("n1")
    create(api, "digits", RUNS, image="nobody/has:it", coordinator="true")
    view = until(api, waits_for("image", ALL), "the image is missed")
    assert any(reason.text.startswith("all 2 workers: image nobody/has:it cannot") for reason in view.reasons)
    create(api, "other", RUNS, secret_env=(("TOKEN", "gone", "k"),))
    eventually(
        lambda: any(reason.kind == "configuration" for reason in look(api, "other").reasons), "it is missed"
    )
    (reason,) = [reason for reason in look(api, "other").reasons if reason.kind == "configuration"]
    assert "gone" in reason.words
    assert reason.advice == "create the Secret, or correct --secret-env"


def test_from_start_to_end(
    nodes: Fleet,
    api: Cluster,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cluster: Reachable,
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    where = ["-N", api.namespace]
    nodes.add("n1")
    create(api, "digits", "trap 'exit 0' TERM; sleep 1000 & wait")
    until(api, lambda view: [o.state for o in view.outsiders].count("running") == 3, "all pods run")
    report(api, status="running", members=2)
    view = until(api, lambda view: not view.reasons, "the coordinator serves")
    assert view.status == "running"
    assert [(member.rank, member.zone, member.note) for member in view.members] == [
        (0, "z1", ""),
        (1, "z1", ""),
    ]

    capfd.readouterr()
    assert main(["ls", *where]) == 0
    head, row = capfd.readouterr().out.splitlines()
    assert head.split() == ["NAME", "STATUS", "WORKERS", "STEP", "RATE", "AGE", "RESTARTS", "REASON"]
    assert row.split()[:6] == ["digits", "running", "2/2", "7", "12.5", "samples/s"]
    assert main(["status", *where, "digits"]) == 0
    told = capfd.readouterr().out
    assert "job digits in namespace" in told
    assert f"  ringps suspend -N {api.namespace} digits" in told
    assert main(["ls", "-A", "--json"]) == 0
    assert [job["name"] for job in json.loads(capfd.readouterr().out)] == ["digits"]

    for index in range(2):
        (pod,) = [m.pod for m in view.members if m.worker_id == index]
        nodes.kill_process(pod, "sleep", 15)
    report(api, status="done", verdict="done")
    api.delete("Job", names.coordinator("digits"))
    view = until(api, lambda view: view.ended, "the Job is complete")
    assert (view.status, view.members) == ("done", ())
    assert {outsider.state for outsider in view.outsiders if outsider.worker_id is not None} == {"done"}
    assert main(["status", *where, "digits", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["status"] == "done"


def test_a_job_that_has_failed_and_a_program_that_cannot_start(nodes: Fleet, api: Cluster) -> None:
    nodes.add("n1")
    create(api, "digits", "exit 70", workers=1)
    view = until(api, lambda view: view.status == "failed", "the Job has failed")
    assert "70" in view.summary
    report(api, status="failed", verdict="failed: rank 0: loss is NaN")
    assert look(api).summary == "rank 0: loss is NaN"
    create(api, "other", "echo 'ringps: there is no script x.py' >&2; exit 2", workers=1)
    eventually(
        lambda: any(reason.kind == "crashed" for reason in look(api, "other").reasons), "its pod has failed"
    )
    (reason,) = [reason for reason in look(api, "other").reasons if reason.kind == "crashed"]
    assert reason.text.startswith("worker 0: its last pod failed: exited with code 2")


def test_a_pod_on_a_node_that_vanished(nodes: Fleet, api: Cluster, control_plane: ControlPlane) -> None:
    nodes.add("n1")
    doomed = nodes.add("n2", labels={"pool": "gpu"})
    create(api, "digits", RUNS, workers=1, node_selector=(("pool", "gpu"),), dead_node_s=1)
    until(api, lambda view: [o.state for o in view.outsiders].count("running") == 2, "all pods run")
    nodes.vanish_node(doomed)
    view = until(api, waits_for("dead node"), "the pod is late", limit_s=90)
    (reason,) = [reason for reason in view.reasons if reason.kind == "dead node"]
    assert "its pod cannot end, since its node n2 is not ready" in reason.text


# -- rights


@pytest.fixture
def reader(cluster: Reachable, namespace: str) -> Path:
    """Somebody who may see jobs and their status, and nothing else."""
    read = ["get", "list"]
    return cluster.service_account(
        namespace,
        "reader",
        [
            {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": read},
            {"apiGroups": [""], "resources": ["configmaps"], "verbs": read},
        ],
    )


def test_what_may_not_be_looked_at_is_said(cluster: Reachable, api: Cluster, reader: Path) -> None:
    create(api, "digits", RUNS)
    with cluster.connect(api.namespace, reader) as connection:
        view = look(connection)
        assert [line.partition(":")[0] for line in view.unseen] == ["pods", "events", "quotas", "nodes"]
        assert view.reasons == ()
        (listed,) = show.jobs(connection, time.time())
        assert listed.status == view.status


def test_no_rights_at_all_is_one_line(
    cluster: Reachable, namespace: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.service_account(namespace, "nobody")))
    capfd.readouterr()
    for command in (["ls"], ["status", "digits"]):
        assert main([*command, "-N", namespace]) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert "cannot" in err
