"""Why a job waits. The messages of the scheduler and the Job controller are those of Kubernetes 1.37."""

from __future__ import annotations

from typing import Any

import pytest

from ringps_launcher.kubernetes import fields, names, placement, refusals
from ringps_launcher.kubernetes.explain import Reason, why, workers_text
from tests.kubernetes_objects import (
    NAME,
    NOW,
    Object,
    condition,
    coordinator,
    coordinator_job,
    event,
    job,
    node,
    unplaced,
    worker,
)

NOT_HELPFUL = "preemption: 0/5 nodes are available: 5 Preemption is not helpful for scheduling."


def reasons(
    *pods: Object, of: Object | None = None, events: tuple[Object, ...] = (), **more: Any
) -> list[Reason]:
    return why(of or job(len(pods)), [coordinator(), *pods], events, now=NOW, **more)


def lines(found: list[Reason]) -> list[str]:
    return [reason.line for reason in found]


def test_a_job_that_runs_waits_for_nothing() -> None:
    assert reasons(*(worker(index) for index in range(4))) == []


# -- the scheduler


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            "0/5 nodes are available: 1 node(s) were unschedulable, 2 Insufficient nvidia.com/gpu, 2 "
            "node(s) had "
            f"untolerated taint(s). {NOT_HELPFUL}",
            "none of the 5 nodes fits: 2 do not have 1 nvidia.com/gpu free, 1 is cordoned, 2 have taints "
            "that it "
            "does not tolerate; wait until other jobs end, ask for less, or add nodes",
        ),
        (
            "0/5 nodes are available: 1 node(s) were unschedulable, 2 Insufficient cpu, 2 Insufficient "
            "memory, 2 "
            f"node(s) had untolerated taint(s). {NOT_HELPFUL}",
            "none of the 5 nodes fits: 2 do not have 1 cpu free, 2 do not have 2Gi memory free, 1 is "
            "cordoned, 2 "
            "have taints that it does not tolerate; wait until other jobs end, ask for less, or add nodes",
        ),
        (
            "0/5 nodes are available: 1 node(s) were unschedulable, 2 node(s) didn't match Pod's node "
            f"affinity/selector, 2 node(s) had untolerated taint(s). {NOT_HELPFUL}",
            "none of the 5 nodes fits: 1 is cordoned, 2 do not match --node-selector, 2 have taints that it "
            "does "
            "not tolerate",
        ),
        (
            "0/5 nodes are available: 1 node(s) didn't match Pod's node affinity/selector, 1 node(s) didn't "
            "match "
            "pod topology spread constraints (missing required label), 1 node(s) were unschedulable, 2 "
            "node(s) had "
            f"untolerated taint(s). {NOT_HELPFUL}",
            "none of the 5 nodes fits: 1 does not match --node-selector, 1 would break its topology spread "
            "constraints, 1 is cordoned, 2 have taints that it does not tolerate",
        ),
        (
            "0/5 nodes are available: 1 Insufficient nvidia.com/gpu, 1 node(s) were unschedulable, 2 "
            "Insufficient "
            "cpu, 2 node(s) had untolerated taint(s). preemption: found a potential placement for pod on "
            "node "
            "gpu-1, preempting 1 victims",
            "1 pod of lower priority must first leave gpu-1; nothing to do: they have their grace period to "
            "stop",
        ),
        (
            '0/5 nodes are available: persistentvolumeclaim "gone" not found. not found',
            "there is no PersistentVolumeClaim gone; create it, or correct --volume",
        ),
        (
            "0/5 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found",
            "its PersistentVolumeClaim has no volume yet; see `kubectl describe pvc`: is there a "
            "StorageClass that "
            "provides volumes?",
        ),
        (
            "0/1 nodes are available: 1 node(s) had volume node affinity conflict. preemption: 0/1 nodes are "
            "available: 1 Preemption is not helpful for scheduling.",
            "the only node does not fit: its volume cannot be reached from 1",
        ),
        ("no nodes available to schedule pods", "the cluster has no nodes; add nodes"),
        (
            "pod group is unschedulable, minCount (5) cannot be satisfied: 2 scheduled, 2 remaining, pod "
            "group "
            "preemption: No preemption victims found for incoming preemptor",
            "all 5 workers are to start together, and there is no room for them; only 2 would find a node; "
            "wait "
            "until other jobs end, or submit it with fewer workers or without --gang",
        ),
        (
            "0/3 nodes are available: 3 node(s) had untolerated taint {node.kubernetes.io/not-ready: }. "
            "preemption: 0/3 nodes are available: 3 Preemption is not helpful for scheduling.",
            "none of the 3 nodes fits: 3 have taints that it does not tolerate "
            "(node.kubernetes.io/not-ready); "
            "nodes that are not ready must come back, or be replaced",
        ),
        (
            'running "VolumeBinding" filter plugin: timed out\nwaiting for the API',
            'the scheduler says: running "VolumeBinding" filter plugin: timed out waiting for the API',
        ),
    ],
)
def test_the_scheduler_in_plain_words(message: str, told: str) -> None:
    (found,) = reasons(unplaced(0, message))
    assert found.line == f"worker 0: {told}"


def test_nodes_that_may_be_looked_at_say_more() -> None:
    message = (
        "0/3 nodes are available: 1 Insufficient nvidia.com/gpu, 2 node(s) had untolerated taint(s). "
        "preemption: 0/3 nodes are available: 3 Preemption is not helpful for scheduling."
    )
    gpu_taint = {"key": "nvidia.com/gpu", "value": "x", "effect": "NoSchedule"}
    soft = {"key": "soft", "effect": "PreferNoSchedule"}
    nodes = [node("a", gpus=4), node("b", gpus=4, taints=(gpu_taint,)), node("c", taints=(gpu_taint, soft))]
    (found,) = reasons(unplaced(0, message), nodes=nodes)
    assert found.kind == "resources"
    assert "taints that it does not tolerate (nvidia.com/gpu=x:NoSchedule)" in found.words
    assert found.advice == (
        "wait until other jobs end, or submit with a higher --priority-class; if it may run there: "
        "--toleration nvidia.com/gpu=x:NoSchedule"
    )


def test_a_tolerated_taint_is_not_blamed() -> None:
    taint = {"key": "team", "value": "a", "effect": "NoSchedule"}
    pod = unplaced(0, "", spec={"tolerations": [{"key": "team", "operator": "Equal", "value": "a"}]})
    message = "0/1 nodes are available: 1 node(s) had untolerated taint(s)."
    found = placement.explain(pod, message, [node("a", taints=(taint,))])
    assert "(" not in found.words


@pytest.mark.parametrize(
    ("nodes", "advice"),
    [
        ([node("a", cpu="4")], "no node offers nvidia.com/gpu: check its name (--gpu-resource), and whether"),
        ([node("a", gpus=1)], "wait until other jobs end, or submit with a higher --priority-class"),
    ],
)
def test_what_the_nodes_offer_decides_the_advice(nodes: list[Object], advice: str) -> None:
    message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    assert placement.explain(unplaced(0, message), message, nodes).advice.startswith(advice)


def test_a_pod_larger_than_any_node() -> None:
    message = "0/1 nodes are available: 1 Insufficient cpu."
    pod = unplaced(0, message)
    pod["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "6500m"}}
    found = placement.explain(pod, message, [node("a", cpu="4")])
    assert found.words == "the only node does not fit: 1 does not have 6500m cpu free"
    assert found.advice == "no node is that large, the largest has 4 cpu: ask for less"


def test_a_selector_that_no_node_matches() -> None:
    message = "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."
    pod = unplaced(0, message, spec={"nodeSelector": {"pool": "x"}})
    assert placement.explain(pod, message, [node("a")]).advice == "no node has the label pool=x"


def test_a_scheduler_that_never_looked() -> None:
    pod = worker(0, "Pending", node="", spec={"schedulerName": "ringps"})
    assert lines(reasons(pod)) == [
        "worker 0: scheduler ringps has not looked at it; check that it runs, or that --scheduler names one "
        "that does"
    ]
    young = worker(0, "Pending", node="", age_s=1.0)
    assert [reason.kind for reason in reasons(young)] == ["starting"]


def test_a_pod_whose_gang_is_not_complete_is_not_looked_at() -> None:
    pod = worker(0, "Pending", node="", spec={"schedulingGroup": {"podGroupName": "x"}})
    assert [reason.kind for reason in reasons(pod)] == ["gang"]


def test_scheduling_gates() -> None:
    gated = condition(
        "PodScheduled", False, "SchedulingGated", "Scheduling is blocked due to non-empty scheduling gates"
    )
    pod = worker(0, "Pending", gated, node="", spec={"schedulingGates": [{"name": "example.com/gate"}]})
    assert lines(reasons(pod)) == [
        "worker 0: scheduling gate example.com/gate is not lifted; whoever set it must lift it"
    ]


def test_a_nominated_node() -> None:
    pod = unplaced(0, "0/1 nodes are available: 1 Insufficient cpu.", nominatedNodeName="n7")
    assert reasons(pod)[0].text == "worker 0: pods of lower priority must first leave n7"


# -- the API server and its admission

QUOTA = (
    'Error creating: pods "digits-1-q2wjw" is forbidden: exceeded quota: team, requested: '
    "pods=1,requests.cpu=2, "
    "used: pods=2,requests.cpu=3, limited: pods=2,requests.cpu=4"
)


@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        (
            QUOTA,
            "quota",
            "quota team has no room (pods: 2 of 2 used, 1 more wanted; requests.cpu: 3 of 4 used, 2 more "
            "wanted)",
        ),
        (
            'Error creating: pods "x" is forbidden: failed quota: team: must specify limits.cpu for: worker',
            "quota",
            "quota team wants every pod to say its limits.cpu for: worker",
        ),
        (
            'Error creating: pods "prio-0-" is forbidden: no PriorityClass with name gone was found',
            "admission",
            "there is no PriorityClass gone",
        ),
        (
            'Error creating: pods "sa-0-" is forbidden: error looking up service account default/gone: '
            'serviceaccount "gone" not found',
            "rights",
            "there is no ServiceAccount gone",
        ),
        (
            'Error creating: pods "pss-0-5rk9q" is forbidden: violates PodSecurity "restricted:latest": '
            'runAsNonRoot != true (pod or container "worker" must set securityContext.runAsNonRoot=true)',
            "admission",
            "the namespace's Pod Security level restricted:latest does not allow its pods: runAsNonRoot != "
            "true "
            '(pod or container "worker" must set securityContext.runAsNonRoot=true)',
        ),
        (
            'Error creating: admission webhook "policy.example.com" denied the request: no label team',
            "admission",
            "webhook policy.example.com refuses its pods: no label team",
        ),
        (
            'Error creating: pods "x" is forbidden: maximum memory usage per Pod is 1Gi, but limit is 2Gi',
            "admission",
            "its pods are refused: maximum memory usage per Pod is 1Gi, but limit is 2Gi",
        ),
    ],
)
def test_pods_that_the_api_server_refuses(message: str, kind: str, words: str) -> None:
    found = refusals.explain(message)
    assert (found.kind, found.words) == (kind, words)


def test_workers_without_a_pod_are_told_of_with_the_quota_as_it_is_now() -> None:
    quota = {"metadata": {"name": "team"}, "status": {"used": {"pods": "1"}, "hard": {"pods": "3"}}}
    failed = event("Job", NAME, "FailedCreate", QUOTA)
    (found,) = reasons(worker(0), of=job(4), events=(failed,), quotas=[quota])
    assert found.who == "workers 1-3"
    assert "pods: 1 of 3 used, 1 more wanted" in found.words


def test_an_old_refusal_is_no_reason_once_all_pods_are_there() -> None:
    failed = event("Job", NAME, "FailedCreate", QUOTA)
    assert reasons(worker(0), worker(1), events=(failed,)) == []


def test_an_old_refusal_is_not_told_after_a_later_success() -> None:
    failed = event("Job", NAME, "FailedCreate", QUOTA, age_s=300)
    made = event("Job", NAME, "SuccessfulCreate", "Created pod: digits-0-aaaaa", age_s=20, warning=False)
    (found,) = reasons(worker(0), of=job(2), events=(failed, made))
    assert found.kind == "missing"


def test_a_job_without_any_pods_yet() -> None:
    young = why(job(2, age_s=1.0), [], [], now=NOW)
    assert young == []
    old = why(job(2), [], [], now=NOW, coordinator=coordinator_job())
    assert lines(old) == [
        "coordinator: Job digits-coordinator has no pod",
        "all 2 workers: the Job controller has made no pod yet",
    ]


# -- containers


@pytest.mark.parametrize(
    ("reason", "message", "told"),
    [
        (
            "ErrImagePull",
            'failed to pull image: "registry.example/x": not found',
            "image ringps/test:1 cannot be pulled: failed to pull image: "
            '"registry.example/x": not found; check --image, and --image-pull-secret if the registry wants '
            "a login",
        ),
        ("InvalidImageName", "couldn't parse", "ringps/test:1 is no image's name; correct --image"),
        (
            "CreateContainerConfigError",
            'secret "token" not found',
            'its container cannot be made: secret "token" not found; create the Secret, or correct '
            "--secret-env",
        ),
        (
            "CreateContainerConfigError",
            "couldn't find key k in Secret ml/token",
            "its container cannot be made: couldn't find key k in Secret ml/token; create the Secret, or "
            "correct "
            "--secret-env",
        ),
        (
            "CreateContainerError",
            'exec: "ringps": executable file not found in $PATH',
            'its container cannot be made: exec: "ringps": executable file not found in $PATH; the image '
            "must have "
            "`ringps` on its PATH",
        ),
    ],
)
def test_containers_that_do_not_start(reason: str, message: str, told: str) -> None:
    pods = [worker(i, "Pending", state={"waiting": {"reason": reason, "message": message}}) for i in range(3)]
    assert lines(reasons(*pods)) == [f"all 3 workers: {told}"]


def test_an_image_that_is_tried_again_later_keeps_its_reason() -> None:
    pod = worker(
        0, "Pending", state={"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling"}}
    )
    name = pod["metadata"]["name"]
    told = event("Pod", name, "Failed", 'Failed to pull image "ringps/test:1": no such host', age_s=30)
    later = event("Pod", name, "Failed", "Error: ImagePullBackOff", age_s=90)
    (found,) = reasons(pod, events=(told, later))
    assert found.words == (
        'image ringps/test:1 cannot be pulled: Failed to pull image "ringps/test:1": no such host'
    )


def test_a_volume_that_cannot_be_mounted() -> None:
    pod = worker(0, "Pending", state={"waiting": {"reason": "ContainerCreating"}})
    message = 'MountVolume.SetUp failed for volume "key" : secret "digits-key" not found'
    (found,) = reasons(pod, events=(event("Pod", pod["metadata"]["name"], "FailedMount", message),))
    assert (found.kind, found.words) == ("volumes", f"a volume cannot be mounted: {message}")
    assert found.advice == "create what it names, or cancel the job and submit it anew"


def test_a_pod_on_a_node_that_went_away_before_it_started() -> None:
    pod = worker(0, "Pending", state={"waiting": {"reason": "ContainerCreating"}})
    assert reasons(pod, nodes=[node("n1", ready=False)])[0].text == "worker 0: its node n1 is not ready"
    assert reasons(pod, nodes=[])[0].text == "worker 0: its node n1 is gone"
    assert reasons(pod)[0].text == "worker 0: its container is being made"


# -- the coordinator


def test_the_coordinator_comes_first_whatever_else_is_wrong() -> None:
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}
    last = {"exitCode": 1, "message": "x\nringps: no right to update Lease digits-coordinator\n"}
    pod = coordinator(ready=False, state=waiting, restarts=3, terminated=last)
    found = why(
        job(1, suspend=False), [pod, unplaced(0, "0/1 nodes are available: 1 Insufficient cpu.")], [], now=NOW
    )
    assert lines(found)[0] == (
        "coordinator: it ended 4 times, the last time with exit code 1 (no right to update Lease "
        "digits-coordinator), and starts again after a pause; see `ringps logs digits --coordinator "
        "--previous`"
    )
    assert found[1].kind == "resources"


def test_a_coordinator_that_does_not_serve() -> None:
    found = why(job(1), [coordinator(ready=False, restarts=1), worker(0)], [], now=NOW)
    assert lines(found) == [
        "coordinator: it runs (started 2 times), but does not serve yet; if that lasts, see `ringps logs "
        "digits "
        "--coordinator`"
    ]


def test_a_coordinator_that_has_failed_or_is_refused() -> None:
    failed = coordinator_job(condition("Failed", True, "BackoffLimitExceeded", "too many"))
    (found,) = why(job(1), [worker(0)], [], now=NOW, coordinator=failed)
    assert found.words == "its Job has failed (too many), so nobody forms the ring"
    name = names.coordinator(NAME)
    refused = event(
        "Job", name, "FailedCreate", 'pods "x" is forbidden: no PriorityClass with name p was found'
    )
    (found,) = why(job(1), [worker(0)], [refused], now=NOW, coordinator=coordinator_job())
    assert (found.who, found.kind) == ("coordinator", "admission")


# -- suspension and queues


def workload(*conditions: Object, active: bool = True, **status: Any) -> Object:
    return {
        "metadata": {"name": "job-digits", "ownerReferences": [{"uid": "uid-digits"}]},
        "spec": {"active": active, "queueName": "team"},
        "status": {"conditions": list(conditions), **status},
    }


PENDING = (
    "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor "
    "default, 2 more needed"
)


def test_suspended_by_a_user() -> None:
    assert lines(why(job(2, suspend=True), [], [], now=NOW)) == ["it is suspended; ringps resume digits"]


@pytest.mark.parametrize(
    ("held", "kind", "words"),
    [
        (None, "queue", "it waits in queue team, and no Workload of Kueue's is to be seen for it"),
        (workload(active=False), "suspended", "it is suspended, in queue team"),
        (
            workload(condition("QuotaReserved", False, "Pending", PENDING)),
            "queue",
            f"it waits in queue team: {PENDING}",
        ),
        (
            workload(condition("QuotaReserved", False, "Inadmissible", "LocalQueue team doesn't exist")),
            "queue",
            "Kueue cannot admit it from queue team: LocalQueue team doesn't exist",
        ),
        (
            workload(
                condition("QuotaReserved", False, "Pending", "Preempted to accommodate a workload"),
                condition("Evicted", True, "Preempted", "Preempted to accommodate a workload (UID: 1)"),
            ),
            "queue",
            "evicted by Kueue (Preempted to accommodate a workload (UID: 1)); it waits in queue team: "
            "Preempted to "
            "accommodate a workload",
        ),
        (
            workload(
                condition("QuotaReserved", True),
                admissionChecks=[{"name": "prov", "state": "Pending", "message": "waiting for nodes"}],
            ),
            "queue",
            "queue team has room, but Kueue still waits for prov (waiting for nodes)",
        ),
        (
            workload(condition("QuotaReserved", True), condition("Admitted", True)),
            "queue",
            "Kueue has admitted it from queue team, and starts it now",
        ),
    ],
)
def test_held_back_by_kueue(held: Object | None, kind: str, words: str) -> None:
    (found,) = why(job(2, suspend=True, queue="team"), [], [], workload=held, now=NOW)
    assert (found.kind, found.words) == (kind, words)


# -- pods that end


def test_a_pod_that_cannot_end_on_a_dead_node() -> None:
    pod = worker(1, deleted=NOW - 30)
    found = reasons(worker(0), pod, nodes=[node("n1", ready=False)])
    assert lines(found) == [
        "worker 1: its pod cannot end, since its node n1 is not ready; the coordinator gives it up soon; "
        "else, once "
        "it is off for certain: kubectl delete node n1"
    ]
    assert reasons(worker(0), pod, nodes=[])[0].words.endswith("n1 is gone")


def test_a_pod_that_is_ending_in_time() -> None:
    preempted = condition("DisruptionTarget", True, "PreemptionByScheduler", "preempting to accommodate")
    found = reasons(worker(0), worker(1, "Running", preempted, deleted=NOW + 40))
    assert lines(found) == [
        "worker 1: its pod is ending (preempted by the scheduler), and has 40 s more for that"
    ]


def test_a_pod_that_is_about_to_be_taken_away() -> None:
    preempted = condition("DisruptionTarget", True, "PreemptionByScheduler", "preempting to accommodate")
    assert lines(reasons(worker(0, "Running", preempted))) == [
        "worker 0: its pod is preempted by the scheduler"
    ]


def test_a_worker_whose_program_cannot_start() -> None:
    ended = {
        "terminated": {"exitCode": 2, "reason": "Error", "message": "a\nringps: there is no script x.py\n"}
    }
    (found,) = reasons(worker(0), worker(1, "Failed", state=ended))
    assert found.line == (
        "worker 1: its last pod failed: exited with code 2 (there is no script x.py); the next comes after "
        "a pause; "
        "see `ringps logs digits --rank 1`"
    )


def test_the_deadline() -> None:
    failed = condition("Failed", True, "DeadlineExceeded", "Job was active longer than specified deadline")
    assert [reason.kind for reason in why(job(2, failed), [], [], now=NOW)] == ["deadline"]
    assert why(job(2, condition("Failed", True, "BackoffLimitExceeded")), [], [], now=NOW) == []
    assert why(job(2, condition("Complete", True)), [], [], now=NOW) == []


# -- the whole


def test_the_same_obstacle_is_told_once_and_the_most_important_first() -> None:
    full = "0/1 nodes are available: 1 Insufficient cpu."
    pulling = {"waiting": {"reason": "ErrImagePull", "message": "not found"}}
    found = reasons(
        unplaced(0, full),
        worker(1, "Pending", state=pulling),
        unplaced(2, full),
        unplaced(3, full),
        worker(4),
    )
    assert [(reason.who, reason.kind) for reason in found] == [
        ("worker 1", "image"),
        ("workers 0, 2, 3", "resources"),
    ]


def test_misshapen_objects_are_no_reason_to_fail() -> None:
    odd: list[Object] = [
        {},
        {"metadata": None, "spec": [], "status": "x"},
        {"status": {"conditions": [1, None]}},
    ]
    assert why({}, odd, [{"involvedObject": 3}, {}], [{}], [{}], {}, now=NOW) is not None


def test_control_characters_do_not_reach_the_terminal() -> None:
    pod = worker(
        0, "Pending", state={"waiting": {"reason": "ErrImagePull", "message": "\x1b[31mred\n\nline"}}
    )
    (found,) = reasons(pod)
    assert found.line.isprintable()


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([2], "worker 2"),
        ([0, 1, 2, 5], "workers 0-2, 5"),
        ([0, 1], "workers 0, 1"),
        (range(8), "all 8 workers"),
    ],
)
def test_workers_in_words(ids: list[int], told: str) -> None:
    assert workers_text(ids, 8) == told


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:00Z", 0.0),
        ("2026-11-28T17:49:08Z", 1795888148.0),
        ("2024-02-29T12:00:00.250000Z", 1709208000.25),
        ("2100-03-01T00:00:00+00:00", 4107542400.0),
        ("yesterday", None),
        (None, None),
    ],
)
def test_timestamps(text: object, seconds: float | None) -> None:
    assert fields.time_of(text) == seconds
