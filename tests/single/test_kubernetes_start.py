"""How a job's start is judged, and what it takes of quotas."""

from __future__ import annotations

from typing import Any

import pytest

from ringps_launcher.kubernetes import demand, names
from ringps_launcher.kubernetes.bundle import Bundle, bundle
from ringps_launcher.kubernetes.launch import Start, judge
from ringps_launcher.kubernetes.resources import manifests
from ringps_launcher.kubernetes.spec import JobSpec


def a_job(**settings: Any) -> Bundle:
    given: dict[str, Any] = {"workers": 4, "cpu": "500m", "memory": "1Gi", "shm": "100Mi", **settings}
    return bundle(manifests(JobSpec(name="a", namespace="ns", image="i", program="x.py", **given), "key"))


def quota(hard: dict[str, str], used: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "team"},
        "spec": {"hard": hard, **spec},
        "status": {"hard": hard, "used": used or {}},
    }


@pytest.mark.parametrize(
    ("hard", "used", "words"),
    [
        ({"pods": "5"}, {}, None),
        ({"pods": "4"}, {}, "needs 5 pods, and 4 of 4 are left"),
        ({"pods": "10"}, {"pods": "7"}, "needs 5 pods, and 3 of 10 are left"),
        ({"count/pods": "4"}, {}, "needs 5 count/pods"),
        ({"cpu": "2050m"}, {}, None),
        ({"requests.cpu": "2"}, {}, "needs 2.05 requests.cpu, and 2 of 2 are left"),
        ({"limits.memory": "4Gi"}, {}, "needs 4.25Gi limits.memory, and 4Gi of 4Gi are left"),
        ({"memory": "8Gi"}, {"memory": "5Gi"}, "needs 4.125Gi memory, and 3Gi of 8Gi are left"),
        ({"count/jobs.batch": "1"}, {}, "needs 2 count/jobs.batch"),
        ({"services": "1"}, {}, "needs 2 services"),
        ({"persistentvolumeclaims": "0", "requests.nvidia.com/gpu": "0"}, {}, None),
        ({"pods": "3"}, {"pods": "9"}, "and 0 of 3 are left"),
    ],
)
def test_quotas(hard: dict[str, str], used: dict[str, str], words: str | None) -> None:
    short = demand.shortages(a_job(), [quota(hard, used)])
    if words is None:
        assert not short
    else:
        (line,) = short
        assert words in line and line.startswith("ResourceQuota team: ")


def test_a_quota_on_gpus() -> None:
    job = a_job(gpus=1)
    (line,) = demand.shortages(
        job, [quota({"requests.nvidia.com/gpu": "8"}, {"requests.nvidia.com/gpu": "5"})]
    )
    assert "needs 4 requests.nvidia.com/gpu, and 3 of 8 are left" in line
    assert demand.devices(job.worker_job) == {"nvidia.com/gpu": 4}
    assert demand.devices(a_job().worker_job) == {}


@pytest.mark.parametrize(
    ("spec", "counted"),
    [
        ({"scopes": ["BestEffort"]}, 0),
        ({"scopes": ["NotBestEffort", "NotTerminating"]}, 5),
        ({"scopes": ["Terminating"]}, 0),
        ({"scopes": ["PriorityClass"]}, 5),
        ({"operator": "In", "values": ["low"]}, 4),
        ({"operator": "NotIn", "values": ["low"]}, 1),
        ({"operator": "DoesNotExist"}, 0),
        ({"operator": "Exists"}, 5),
    ],
)
def test_a_quota_counts_the_pods_in_its_scope(spec: dict[str, Any], counted: int) -> None:
    if "operator" in spec:
        spec = {"scopeSelector": {"matchExpressions": [{"scopeName": "PriorityClass", **spec}]}}
    short = demand.shortages(a_job(priority_class="low"), [quota({"pods": "0"}, **spec)])
    assert [f"needs {counted} pods" in line for line in short] == ([True] if counted else [])


# -- the start


def pod(component: str, **status: Any) -> dict[str, Any]:
    labels = names.labels("a", component)
    spec = {"nodeName": "n", "containers": [{"name": component, "image": "i"}]}
    return {"metadata": {"name": f"a-{component}-x", "labels": labels}, "spec": spec, "status": status}


def waiting(reason: str, message: str = "", **status: Any) -> dict[str, Any]:
    return {
        "containerStatuses": [
            {"image": "i", "state": {"waiting": {"reason": reason, "message": message}}, **status}
        ]
    }


def a_worker_job() -> dict[str, Any]:
    return {"metadata": {"name": "a", "uid": "u", "labels": names.labels("a", names.WORKER)}}


def refusal(message: str, uid: str = "u") -> dict[str, Any]:
    return {"reason": "FailedCreate", "message": message, "involvedObject": {"uid": uid, "name": "a"}}


READY = {"conditions": [{"type": "Ready", "status": "True"}]}
UNSCHEDULED = {
    "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are\navailable"}]
}


@pytest.mark.parametrize(
    ("pods", "events", "state", "words"),
    [
        ([], [], Start.WAITS, "its pod is not created yet"),
        ([pod("coordinator", **READY)], [], Start.RUNS, ""),
        ([pod("coordinator", phase="Succeeded")], [], Start.RUNS, ""),
        ([pod("worker", **READY)], [], Start.WAITS, "its pod is not created yet"),
        (
            [pod("coordinator", **UNSCHEDULED)],
            [],
            Start.WAITS,
            "no node for its pod yet: 0/3 nodes are available",
        ),
        ([pod("coordinator", **waiting("ContainerCreating"))], [], Start.WAITS, "ContainerCreating"),
        ([pod("coordinator", phase="Pending")], [], Start.WAITS, "has a node, and starts"),
        (
            [pod("coordinator", **waiting("ErrImagePull", "not\nfound"))],
            [],
            Start.FAILED,
            "the image i cannot be pulled (ErrImagePull: not found)",
        ),
        (
            [pod("coordinator", **READY), pod("worker", **waiting("ImagePullBackOff"))],
            [],
            Start.FAILED,
            "the image i cannot be pulled (ImagePullBackOff)",
        ),
        (
            [pod("worker", **waiting("CreateContainerConfigError", "secret not found"))],
            [],
            Start.FAILED,
            "cannot be made (CreateContainerConfigError): secret not found",
        ),
        (
            [pod("coordinator", **waiting("RunContainerError", "no such file"))],
            [],
            Start.FAILED,
            "is ringps installed in the image?",
        ),
        (
            [],
            [refusal("exceeded quota: team")],
            Start.FAILED,
            "the pods of Job a are refused: exceeded quota",
        ),
        ([], [refusal("exceeded quota: team", uid="earlier")], Start.WAITS, ""),
        ([], [refusal("error looking up service account ns/a: is forbidden")], Start.WAITS, ""),
        ([], [refusal("timeout")], Start.WAITS, ""),
        ([pod("worker"), pod("coordinator", **READY)], [refusal("exceeded quota: team")], Start.RUNS, ""),
    ],
)
def test_the_start(
    pods: list[dict[str, Any]], events: list[dict[str, Any]], state: Start, words: str
) -> None:
    found, reason, *_ = judge([a_worker_job()], pods, events)
    assert found is state, reason
    assert words in reason and "\n" not in reason


def test_an_image_without_the_program() -> None:
    ended = {"exitCode": 128, "reason": "StartError", "message": 'exec: "ringps": executable file not found'}
    status = {"containerStatuses": [{"image": "i", "restartCount": 0, "state": {"terminated": ended}}]}
    state, reason, *_ = judge([a_worker_job()], [pod("worker", **status)], [])
    assert state is Start.FAILED
    assert 'exec: "ringps": executable file not found; is ringps installed in the image i?' in reason


def test_a_coordinator_that_ends_again_and_again() -> None:
    ended = {"terminated": {"exitCode": 2, "message": "ringps: unrecognized\narguments"}}
    status = waiting("CrashLoopBackOff", restartCount=2, lastState=ended)
    state, reason, *_ = judge([a_worker_job()], [pod("coordinator", **status)], [])
    assert state is Start.FAILED
    assert reason == (
        "pod a-coordinator-x ends with exit code 2 again and again: ringps: unrecognized arguments"
    )
    status = waiting("CrashLoopBackOff", restartCount=2, lastState={"terminated": {"exitCode": 1}}, name="c")
    found = judge([a_worker_job()], [pod("coordinator", **status)], [])
    assert (found.state, found.pod, found.container) == (Start.FAILED, "a-coordinator-x", "c")
    status = waiting("CrashLoopBackOff", restartCount=1, lastState=ended)
    assert judge([a_worker_job()], [pod("coordinator", **status)], [])[0] is Start.WAITS
