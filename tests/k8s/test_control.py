"""`ringps suspend`, `resume` and `cancel` against a real API server, with queues and gangs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import ClusterError
from ringps_launcher.kubernetes.yaml import from_yaml
from tests.k8s.commands import NO_CLASS, SMALL, Run, nothing_is_left, objects, submitted
from tests.k8s.controlplane import ControlPlane
from tests.k8s.waiting import eventually


@pytest.fixture
def kueue(control_plane: ControlPlane, api: Cluster) -> Iterator[None]:
    """Kueue's kinds, and one LocalQueue; Kueue itself is what the test does."""
    made = []
    for kind, plural in (("LocalQueue", "localqueues"), ("Workload", "workloads")):
        schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        version = {"name": "v1beta2", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
        spec = {
            "group": "kueue.x-k8s.io",
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural},
            "versions": [version],
        }
        metadata = {
            "name": f"{plural}.kueue.x-k8s.io",
            "annotations": {"api-approved.kubernetes.io": "unapproved, for tests"},
        }
        api.create(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": metadata,
                "spec": spec,
            }
        )
        made.append(metadata["name"])
    for kind in ("LocalQueue", "Workload"):
        eventually(lambda kind=kind: is_served(api, kind), f"{kind} objects are served")  # type: ignore[misc]
    api.create({"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": {"name": "team"}})
    yield
    for name in made:
        api.delete("CustomResourceDefinition", name)
    eventually(lambda: not is_served(api, "Workload"), "Kueue's kinds are gone")


def is_served(api: Cluster, kind: str) -> bool:
    try:
        api.list(kind)
    except ClusterError:
        return False
    return True


def test_kueue_rules_over_suspension(kueue: None, ringps: Run, api: Cluster) -> None:
    words = "there is no LocalQueue other in namespace"
    ringps.refuses("submit", "--name", "queued", *SMALL, *NO_CLASS, "--queue", "other", "x.py", words=words)
    submitted(ringps, "queued", "--queue", "team")
    job = api.get("Job", "queued")
    assert job["spec"]["suspend"] is True
    ringps.refuses("suspend", "queued", words="Kueue rules over job queued (queue team), but has no Workload")
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "queued", "uid": job["metadata"]["uid"]}
    metadata = {"name": "job-queued-1", "ownerReferences": [owner]}
    api.create(
        {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "Workload",
            "metadata": metadata,
            "spec": {"active": True},
        }
    )
    assert ringps("suspend", "queued") == 0, ringps.err
    assert "job queued is suspended" in ringps.out
    assert api.get("Workload", "job-queued-1")["spec"]["active"] is False
    assert ringps("suspend", "queued") == 0
    assert "suspended already" in ringps.out
    assert ringps("resume", "queued") == 0
    assert api.get("Workload", "job-queued-1")["spec"]["active"] is True
    assert api.get("Job", "queued")["spec"]["suspend"] is True  # Kueue's to change


def test_a_job_in_a_queue_without_kueue(ringps: Run, api: Cluster) -> None:
    submitted(ringps, "queued", "--queue", "team", "--no-check")
    ringps.refuses(
        "suspend", "queued", words="Kueue rules over job queued (queue team), but is not installed"
    )
    assert ringps("cancel", "queued") == 0


def test_a_gang(control_plane: ControlPlane, ringps: Run, api: Cluster) -> None:
    gates = {"GenericWorkload": True, "WorkloadWithJob": True}
    with control_plane.configured(gates=gates, apis=("scheduling.k8s.io/v1beta1",)):
        submitted(ringps, "gang", "--gang")
        assert api.get("Job", "gang")["spec"]["scheduling"]
        assert ringps("cancel", "gang") == 0, ringps.err
        nothing_is_left(api, "gang")


def test_jobs_that_do_not_exist(ringps: Run, api: Cluster) -> None:
    for command in ("suspend", "resume", "cancel"):
        ringps.refuses(command, "nope", words="there is no job nope in namespace")
    submitted(ringps, "there")
    for command in ("suspend", "resume", "cancel"):
        for name in ("nope", "", "..", "there,", "there/status", "there-coordinator"):
            ringps.refuses(command, name, words="there are: there")
    assert "Job/there" in objects(api, "there")


def test_objects_of_others_are_never_cancelled(ringps: Run, api: Cluster) -> None:
    job = {
        "completions": 1,
        "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "a", "image": "b"}]}},
    }
    api.create({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "theirs"}, "spec": job})
    ringps.refuses("cancel", "theirs", words="there is no job theirs")
    ringps.refuses("suspend", "theirs", words="there is no job theirs")
    api.get("Job", "theirs")


def test_suspend_and_resume(ringps: Run, api: Cluster) -> None:
    submitted(ringps, "pause")
    workers = names.selector("pause", names.WORKER)
    eventually(lambda: len(api.list("Pod", labels=workers)) == 2, "there are two worker pods")
    assert ringps("suspend", "pause") == 0, ringps.err
    assert "job pause is suspended without a checkpoint" in ringps.out
    assert not api.list("Pod", labels=workers)
    assert ringps("suspend", "pause") == 0
    assert "suspended already" in ringps.out
    assert ringps("resume", "pause") == 0
    eventually(lambda: len(api.list("Pod", labels=workers)) == 2, "the workers are back")
    assert ringps("resume", "pause") == 0
    assert "is not suspended" in ringps.out


def test_suspend_says_at_which_checkpoint(ringps: Run, api: Cluster) -> None:
    submitted(ringps, "saved")
    document = {"phase": "waiting", "checkpoint": {"step": 120, "t": 1.0, "where": "/ckpt/step-120"}}
    api.patch("ConfigMap", "saved-status", {"data": {"status.json": json.dumps(document)}})
    assert ringps("suspend", "saved") == 0
    assert "suspended at the checkpoint of step 120 (/ckpt/step-120)" in ringps.out
    assert ringps("resume", "saved") == 0
    assert "goes on at the checkpoint of step 120" in ringps.out


def pods_counted(api: Cluster, name: str) -> int:
    status = api.get("Job", name)["status"]
    return int(status.get("active") or 0) + int(status.get("terminating") or 0)


def test_a_finished_job_is_not_suspended(ringps: Run, api: Cluster) -> None:
    submitted(ringps, "over")
    now = "2026-01-01T00:00:00Z"
    api.patch("Job", "over", {"spec": {"suspend": True}})
    eventually(lambda: not pods_counted(api, "over"), "no pod is left")
    end = [
        {"type": kind, "status": "True", "lastTransitionTime": now, "reason": "x", "message": "x"}
        for kind in ("FailureTarget", "Failed")
    ]
    api.patch("Job", "over", {"status": {"startTime": now, "conditions": end}}, subresource="status")
    ringps.refuses("suspend", "over", words="job over has failed")
    ringps.refuses("resume", "over", words="job over has failed")
    assert ringps("cancel", "over") == 0
    nothing_is_left(api, "over")


def test_cancel_leaves_nothing_behind(ringps: Run, api: Cluster) -> None:
    submitted(ringps, "ends")
    submitted(ringps, "stays")
    eventually(lambda: len(api.list("Pod", labels=names.selector("ends"))) == 3, "all pods are there")
    assert ringps("cancel", "ends") == 0, ringps.err
    nothing_is_left(api, "ends")
    assert "Job/stays" in objects(api, "stays")


@pytest.mark.parametrize("kept", [1, 2, 6, 11, 12])
def test_cancel_of_a_half_made_job(ringps: Run, api: Cluster, kept: int) -> None:
    """What a submission leaves that was killed after `kept` objects."""
    assert ringps("render", "--name", "half", *SMALL, *NO_CLASS, "x.py") == 0
    for manifest in from_yaml(ringps.out)[:kept]:
        api.create(manifest)
    assert ringps("cancel", "half") == 0, ringps.err
    nothing_is_left(api, "half")


def test_no_kubeconfig(namespace: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ringps = Run(tmp_path / "nothing", namespace, capfd)
    for command in (
        ("submit", "--name", "a", *SMALL, "x.py"),
        ("suspend", "a"),
        ("resume", "a"),
        ("cancel", "a"),
    ):
        ringps.refuses(*command, words="there is no kubeconfig at ")
