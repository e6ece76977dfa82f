"""What the operator makes of pods, nodes and the worker Job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringps_launcher.kubernetes import reconcile as module
from ringps_launcher.kubernetes.endings import CAUSES, Ending, classify
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

JOB = WorkerJob(uid="job-1")
ALIVE = {name: Node(name=name, zone="z1", rack="r1") for name in ("n1", "n2")}
DEAD_NODE_S = 20.0


def pod(worker_id: int = 0, **details: Any) -> Pod:
    known = {
        "uid": f"uid-of-{worker_id}-abcdefgh",
        "name": f"job-{worker_id}-abcde",
        "worker_id": worker_id,
        "owner": JOB.uid,
        "node": "n1",
        "phase": "Running",
    }
    return Pod(**{**known, **details})


class World:
    """A cluster that the operator looks at again and again."""

    def __init__(self, *pods: Pod) -> None:
        self.pods = {one.worker_id: one for one in pods}
        self.job: WorkerJob | None = JOB
        self.nodes: dict[str, Node] = dict(ALIVE)
        self.nodes_readable = True
        self.memory = Memory()
        self.now_s = 1000.0

    def look(self, after_s: float = 0.0) -> list[Action]:
        self.now_s += after_s
        observed = Observed(
            pods=tuple(self.pods.values()),
            job=self.job,
            nodes=self.nodes,
            nodes_readable=self.nodes_readable,
        )
        return reconcile(observed, self.memory, self.now_s, dead_node_s=DEAD_NODE_S)

    def change(self, worker_id: int, **details: Any) -> None:
        self.pods[worker_id] = replace(self.pods[worker_id], **details)


def only(actions: list[Action], *kinds: type) -> list[Action]:
    return [action for action in actions if isinstance(action, kinds)]


# Reading objects.


def test_a_pod_is_read_from_its_object() -> None:
    thing = {
        "metadata": {
            "uid": "u",
            "name": "job-3-x",
            "annotations": {"batch.kubernetes.io/job-completion-index": "3"},
            "labels": {"topology.kubernetes.io/zone": "z"},
            "deletionTimestamp": "2026-01-01T00:00:00Z",
            "deletionGracePeriodSeconds": 75,
            "ownerReferences": [{"uid": "other"}, {"uid": "job-1", "controller": True}],
        },
        "spec": {"nodeName": "n1"},
        "status": {
            "phase": "Failed",
            "reason": "Evicted",
            "message": "no room",
            "conditions": [
                {"type": "Ready", "status": "False"},
                {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"},
            ],
            "containerStatuses": [
                {"name": "sidecar", "state": {"terminated": {"exitCode": 9}}},
                {"name": "worker", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}},
            ],
        },
    }
    assert Pod.of(thing) == Pod(
        uid="u",
        name="job-3-x",
        worker_id=3,
        owner="job-1",
        node="n1",
        zone="z",
        phase="Failed",
        deleted=True,
        grace_s=75.0,
        disruption="PreemptionByScheduler",
        status_reason="Evicted",
        status_message="no room",
        exit_code=137,
        exit_reason="OOMKilled",
    )


@pytest.mark.parametrize("index", [None, "", "-1", "x", "²", 7])
def test_what_is_no_workers_pod_is_left_out(index: object) -> None:
    assert Pod.of({"metadata": {"annotations": {"batch.kubernetes.io/job-completion-index": index}}}) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["metadata", "status", "spec", "conditions", "labels", "taints", "name"]), inner
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["metadata", "spec", "status"]), json_values))
def test_objects_of_any_shape_are_read(thing: dict[str, Any]) -> None:
    Pod.of(thing)
    Node.of(thing)
    WorkerJob.of(thing)


@pytest.mark.parametrize(
    ("thing", "dead"),
    [
        ({"status": {"conditions": [{"type": "Ready", "status": "True"}]}}, False),
        ({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}, False),
        ({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}, True),
        ({"spec": {"taints": [{"key": "node.kubernetes.io/unreachable"}]}}, True),
        ({"spec": {"taints": [{"key": "node.kubernetes.io/out-of-service"}]}}, True),
        ({"spec": {"taints": [{"key": "node.kubernetes.io/not-ready"}]}}, False),
    ],
)
def test_a_node_is_dead_if_nobody_hears_of_it(thing: dict[str, Any], dead: bool) -> None:
    assert Node.of(thing).dead is dead


@pytest.mark.parametrize(
    ("labels", "rack"),
    [
        ({}, ""),
        ({"topology.kubernetes.io/rack": "b"}, "b"),
        ({"topology.kubernetes.io/rack": "b", "topology.ringps.dev/rack": "a"}, "a"),
        ({"cloud.provider.com/topology-rack": "c"}, "c"),
    ],
)
def test_the_rack_is_the_first_label_that_there_is(labels: dict[str, str], rack: str) -> None:
    assert Node.of({"metadata": {"labels": labels}}).rack == rack


# Causes.


@pytest.mark.parametrize(
    ("details", "cause", "counts"),
    [
        ({"exit_code": 0, "phase": "Succeeded"}, "", False),
        ({"exit_code": 1}, "failed", True),
        ({"exit_code": 127}, "failed", True),
        ({"exit_code": 128, "exit_reason": "StartError"}, "failed", True),
        ({"exit_code": 70}, "", False),
        ({"exit_code": 74}, "failed", True),
        ({"exit_code": 75}, "suspended", False),
        ({"exit_code": 134}, "killed", True),
        ({"exit_code": 137}, "killed", True),
        ({"exit_code": 139}, "killed", True),
        ({"exit_code": 143}, "killed", True),
        ({"exit_code": 137, "exit_reason": "OOMKilled"}, "out of memory", True),
        ({"exit_code": 255, "exit_reason": "Unknown"}, "node lost", False),
        ({"exit_code": 137, "exit_reason": "ContainerStatusUnknown"}, "node lost", False),
        ({"exit_code": 143, "deleted": True}, "evicted", False),
        ({"exit_code": 75, "deleted": True}, "suspended", False),
        ({"exit_code": 1, "deleted": True}, "evicted", False),
        ({"exit_code": 75, "disruption": "PreemptionByScheduler", "deleted": True}, "preempted", False),
        ({"exit_code": 137, "disruption": "PreemptionByScheduler"}, "preempted", False),
        ({"exit_code": 143, "disruption": "EvictionByEvictionAPI"}, "drained", False),
        ({"exit_code": 143, "disruption": "DeletionByTaintManager"}, "evicted", False),
        ({"disruption": "DeletionByPodGC"}, "node lost", False),
        ({"disruption": "NodeLost"}, "node lost", False),
        ({"disruption": "SomethingNew", "disruption_message": "m"}, "evicted", False),
        ({"disruption": "TerminationByKubelet", "status_reason": "Evicted"}, "evicted", False),
        (
            {
                "disruption": "TerminationByKubelet",
                "status_reason": "Evicted",
                "status_message": 'Usage of EmptyDir volume "shm" exceeds the limit "1Gi". ',
            },
            "evicted",
            True,
        ),
        ({"disruption": "TerminationByKubelet", "status_reason": "Terminated"}, "drained", False),
        (
            {
                "disruption": "TerminationByKubelet",
                "disruption_message": "Pod was terminated in response to imminent node shutdown.",
            },
            "drained",
            False,
        ),
        ({"disruption": "TerminationByKubelet", "status_reason": "Preempting"}, "preempted", False),
        ({"status_reason": "OutOfcpu"}, "evicted", False),
    ],
)
def test_why_a_pod_ended(details: dict[str, Any], cause: str, counts: bool) -> None:
    ending = classify(pod(**{"phase": "Failed", **details}), ALIVE["n1"], suspended=False)
    assert (ending.cause, ending.counts) == (cause, counts), ending
    assert ending.words
    assert ending.cause in (*CAUSES, "")


def test_a_pod_that_is_deleted_while_the_job_is_suspended_was_suspended() -> None:
    assert classify(pod(deleted=True, exit_code=143), None, suspended=True).cause == "suspended"


@pytest.mark.parametrize("node", [Node(name="n1", gone=True), Node(name="n1", unreachable=True)])
def test_a_disruption_on_a_dead_node_is_a_lost_node(node: Node) -> None:
    ending = classify(pod(disruption="DeletionByTaintManager", deleted=True), node, suspended=False)
    assert ending.cause == "node lost"
    assert not ending.counts


# Places.


def test_a_pod_is_placed_once_its_node_is_known() -> None:
    world = World(pod(0, node=""))
    world.nodes = {}
    assert world.look() == []
    world.change(0, node="n1")
    assert world.look() == [LookAtNode("n1")]
    assert world.look(1.0) == []
    world.nodes = dict(ALIVE)
    assert world.look() == [Place("job-0-abcde", ("z1", "r1", "n1"))]
    assert world.look(1.0) == []


def test_a_node_that_could_not_be_read_is_asked_for_again() -> None:
    world = World(pod())
    world.nodes = {}
    assert only(world.look(), LookAtNode)
    assert only(world.look(4.9), LookAtNode) == []
    assert only(world.look(0.2), LookAtNode) == [LookAtNode("n1")]


def test_without_the_right_to_read_nodes_the_pods_own_label_counts() -> None:
    world = World(pod(zone="z9"))
    world.nodes, world.nodes_readable = {}, False
    assert world.look() == [Place("job-0-abcde", ("z9", "", "n1"))]


# Notices.


def test_a_preempted_pod_is_asked_to_leave_once() -> None:
    world = World(pod(0), pod(1))
    world.look()
    world.change(1, disruption="PreemptionByScheduler")
    assert only(world.look(), AskToLeave) == [AskToLeave(((1, "job-1-abcde"),), "preempted by the scheduler")]
    world.change(1, deleted=True, grace_s=75.0)
    assert only(world.look(1.0), AskToLeave) == []
    # Its successor has the same worker id, and is not meant.
    world.pods[1] = pod(1, uid="another-uid", name="job-1-fghij")
    assert only(world.look(1.0), AskToLeave) == []


def test_pods_that_go_for_one_reason_are_asked_together() -> None:
    world = World(*(pod(i, disruption="EvictionByEvictionAPI") for i in range(3)), pod(3, deleted=True))
    assert only(world.look(), AskToLeave) == [
        AskToLeave(tuple((i, f"job-{i}-abcde") for i in range(3)), "evicted through the API (a drain)"),
        AskToLeave(((3, "job-3-abcde"),), "its pod was deleted"),
    ]


def test_nobody_is_asked_who_does_not_run() -> None:
    world = World(pod(0, phase="Pending", deleted=True), pod(1, phase="Failed", deleted=True, exit_code=75))
    assert only(world.look(), AskToLeave) == []


def test_a_suspended_job_leaves_as_a_whole_each_time() -> None:
    world = World(pod(0), pod(1, disruption="PreemptionByScheduler"))
    world.look()
    world.job = replace(JOB, suspended=True)
    both = ((0, "job-0-abcde"), (1, "job-1-abcde"))
    assert only(world.look(), AskToLeave) == [AskToLeave(both, "the job is suspended")]
    assert only(world.look(1.0), AskToLeave) == []
    world.job = JOB
    assert only(world.look(1.0), AskToLeave) == []
    world.job = replace(JOB, suspended=True)
    assert only(world.look(1.0), AskToLeave) == [AskToLeave(both, "the job is suspended")]


@pytest.mark.parametrize("job", [None, replace(JOB, deleted=True)])
def test_a_deleted_job_leaves_as_a_whole(job: WorkerJob | None) -> None:
    world = World(pod(0))
    world.look()
    world.job = job
    assert only(world.look(), AskToLeave) == [AskToLeave(((0, "job-0-abcde"),), "the job was deleted")]


def test_a_job_that_was_never_there_is_not_deleted() -> None:
    world = World(pod(0))
    world.job = None
    assert only(world.look(), AskToLeave) == []


# Ends.


def test_a_crash_is_charged_once() -> None:
    world = World(pod(2))
    world.look()
    world.change(2, phase="Failed", exit_code=137)
    actions = world.look()
    gone = world.pods[2]
    ending = Ending("killed", "killed by signal 9", counts=True)
    assert actions == [
        Lost("job-2-abcde", "pod job-2-abcde: killed by signal 9"),
        Ended(gone, ending),
        Charge(2, "job-2-abcde", "killed", "pod job-2-abcde: killed by signal 9"),
    ]
    assert world.look(1.0) == []


def test_a_launcher_that_ended_is_lost_before_its_pod_says_why() -> None:
    world = World(pod())
    world.look()
    world.change(0, exit_code=137)
    assert [type(action) for action in world.look()] == [Lost]
    world.change(0, phase="Failed", disruption="PreemptionByScheduler")
    assert only(world.look(), Lost, Charge) == []


def test_a_pod_that_vanishes_is_lost_and_not_charged() -> None:
    world = World(pod())
    world.look()
    world.pods.clear()
    actions = world.look()
    assert [type(action) for action in actions] == [Lost, Ended]
    ended = actions[1]
    assert isinstance(ended, Ended)
    assert (ended.ending.cause, ended.ending.counts) == ("evicted", False)
    assert world.look(1.0) == []


def test_what_was_counted_is_not_counted_by_the_next_coordinator() -> None:
    world = World(pod(0, phase="Failed", exit_code=1), pod(1, uid="new-uid", phase="Failed", exit_code=1))
    first = World(pod(0, phase="Failed", exit_code=1))
    assert only(first.look(), Charge)
    world.memory = Memory.after(first.memory.seen, forgetful=False)
    actions = world.look()
    assert only(actions, Charge) == [
        Charge(1, "job-1-abcde", "failed", "pod job-1-abcde: exited with code 1")
    ]
    assert len(only(actions, Lost)) == 2


def test_a_list_of_counted_pods_that_is_too_long_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SEEN", 3)
    ended = [pod(i, uid=f"{i:08d}-aaaa-rest", phase="Failed", exit_code=1) for i in range(5)]
    world = World(*ended)
    assert len(only(world.look(), Charge)) == 5
    assert only(world.look(1.0), Charge) == []
    assert world.memory.seen == tuple(f"{i:08d}-aaaa" for i in (2, 3, 4))
    assert world.memory.forgetful
    after = World(*ended, pod(5))
    after.memory = Memory.after(world.memory.seen, forgetful=True)
    assert only(after.look(), Charge, Ended) == []
    after.change(5, phase="Failed", exit_code=1)
    assert [charge.worker_id for charge in only(after.look(), Charge) if isinstance(charge, Charge)] == [5]


def test_pods_of_an_earlier_job_of_this_name_are_not_ours() -> None:
    world = World(pod(0, owner="job-0", phase="Failed", exit_code=1, disruption="PreemptionByScheduler"))
    assert world.look() == []


def test_a_failed_job_is_given_up_once() -> None:
    world = World()
    world.job = WorkerJob.of(
        {
            "metadata": {"uid": "job-1"},
            "status": {
                "conditions": [
                    {
                        "type": "Failed",
                        "status": "True",
                        "reason": "BackoffLimitExceeded",
                        "message": "Job has reached the specified backoff limit",
                    }
                ]
            },
        }
    )
    words = "the worker Job failed: BackoffLimitExceeded: Job has reached the specified backoff limit"
    assert world.look() == [GiveUp(words)]
    assert world.look(1.0) == []


# Dead nodes.


def stuck(node: Node | None) -> World:
    """A pod that terminates, with 10 s of grace, on that node."""
    world = World(pod())
    world.look()
    world.change(0, deleted=True, grace_s=10.0)
    world.nodes = {} if node is None else {"n1": node}
    world.look()
    return world


@pytest.mark.parametrize("node", [Node(name="n1", gone=True), Node(name="n1", unreachable=True)])
def test_a_pod_on_a_dead_node_is_deleted_by_force_when_it_is_overdue(node: Node) -> None:
    world = stuck(node)
    assert only(world.look(19.9), ForceDelete) == []
    forced = only(world.look(0.2), ForceDelete)
    assert [action.pod.uid for action in forced if isinstance(action, ForceDelete)] == ["uid-of-0-abcdefgh"]
    assert only(world.look(14.0), ForceDelete) == []
    assert only(world.look(1.1), ForceDelete) != []
    world.pods.clear()
    assert only(world.look(1.0), Lost) != []
    assert only(world.look(60.0), ForceDelete) == []


def test_the_grace_of_a_pod_is_not_waited_for_if_its_node_was_dead_before() -> None:
    world = World(pod())
    world.nodes = {"n1": Node(name="n1", unreachable=True)}
    world.look()
    world.look(100.0)
    world.change(0, deleted=True, grace_s=70.0)
    world.look()
    assert only(world.look(4.9), ForceDelete) == []
    assert only(world.look(0.2), ForceDelete) != []


@pytest.mark.parametrize(
    ("by", "forced"), [("DeletionByTaintManager", True), ("EvictionByEvictionAPI", False)]
)
def test_without_the_right_to_see_nodes_the_taint_manager_is_believed(by: str, forced: bool) -> None:
    world = World(pod())
    world.nodes, world.nodes_readable = {}, False
    world.look()
    world.change(0, deleted=True, grace_s=10.0, disruption=by)
    world.look()
    assert only(world.look(34.9), ForceDelete) == []
    assert bool(only(world.look(0.2), ForceDelete)) is forced


def test_a_pod_that_has_run_for_a_while_is_not_held_against_its_successor() -> None:
    world = World(pod(delayed=True))
    world.look()
    assert only(world.look(29.9), Forgive) == []
    [forgiven] = only(world.look(0.2), Forgive)
    assert isinstance(forgiven, Forgive)
    assert forgiven.pod.name == world.pods[0].name
    assert only(world.look(1.0), Forgive) == []
    assert only(world.look(30.0), Forgive) != [], "it may have failed"
    world.change(0, delayed=False)
    assert only(world.look(60.0), Forgive) == []


@pytest.mark.parametrize(
    "change", [{"phase": "Pending"}, {"deleted": True}, {"disruption": "X"}, {"exit_code": 1}]
)
def test_only_pods_that_run_and_stay_are_forgiven(change: dict[str, Any]) -> None:
    world = World(pod(delayed=True, **change))
    for _ in range(5):
        assert only(world.look(30.0), Forgive) == []


@pytest.mark.parametrize(
    ("ending", "forgiven"),
    [
        ({"exit_code": 143, "disruption": "PreemptionByScheduler"}, True),
        ({"exit_code": 143, "deleted": True}, True),
        ({"exit_code": 75}, True),
        ({"disruption": "NodeLost"}, True),
        ({"exit_code": 255, "exit_reason": "Unknown"}, True),
        ({"exit_code": 137}, False),
        ({"exit_code": 137, "exit_reason": "OOMKilled"}, False),
        ({"exit_code": 1}, False),
        ({"exit_code": 70}, False),
        ({"status_reason": "OutOfcpu"}, False),
    ],
)
def test_a_pod_that_the_cluster_took_early_is_forgiven_once_it_has_ended(
    ending: dict[str, Any], forgiven: bool
) -> None:
    world = World(pod(delayed=True, tracked=True))
    world.look()
    world.change(0, phase="Failed", **ending)
    assert bool(only(world.look(1.0), Forgive)) is forgiven
    assert only(world.look(1.0), Forgive) == []
    assert bool(only(world.look(5.0), Forgive)) is forgiven, "it may have failed"
    world.change(0, tracked=False)
    assert only(world.look(5.0), Forgive) == [], "its successor is there"


@pytest.mark.parametrize("node", [None, ALIVE["n1"]])
def test_nothing_is_deleted_by_force_whose_node_is_fine_or_unknown(node: Node | None) -> None:
    world = stuck(node)
    for _ in range(20):
        assert only(world.look(30.0), ForceDelete) == []


def test_a_dead_node_of_which_nothing_is_known_any_more_may_be_alive() -> None:
    world = stuck(Node(name="n1", unreachable=True))
    world.nodes = {}
    assert only(world.look(60.0), ForceDelete) == []


def test_a_node_that_comes_back_begins_anew() -> None:
    world = stuck(Node(name="n1", unreachable=True))
    world.nodes = dict(ALIVE)
    world.look(15.0)
    world.nodes = {"n1": Node(name="n1", unreachable=True)}
    assert only(world.look(15.0), ForceDelete) == []
    assert only(world.look(19.9), ForceDelete) == []
    assert only(world.look(0.2), ForceDelete) != []


def test_the_node_of_a_terminating_pod_is_looked_at_again_and_again() -> None:
    world = stuck(ALIVE["n1"])
    looks = sum(len(only(world.look(1.0), LookAtNode)) for _ in range(20))
    assert looks == 4


# Level-triggered.

changes = st.fixed_dictionaries(
    {},
    optional={
        "phase": st.sampled_from(["Pending", "Running", "Failed", "Succeeded"]),
        "deleted": st.booleans(),
        "disruption": st.sampled_from(["", "PreemptionByScheduler", "DeletionByTaintManager"]),
        "exit_code": st.sampled_from([None, 0, 1, 75, 137]),
        "node": st.sampled_from(["n1", "n2"]),
    },
)


@given(st.lists(st.tuples(st.integers(0, 2), changes | st.none(), st.booleans()), max_size=25))
def test_nothing_is_said_twice_and_memory_is_bounded(
    story: list[tuple[int, dict[str, Any] | None, bool]],
) -> None:
    world = World()
    made = 0
    told: list[Action] = []
    for worker_id, change, looks in story:
        if change is None or worker_id not in world.pods:
            made += 1
            world.pods[worker_id] = pod(worker_id, uid=f"{made:013d}-x", name=f"job-{worker_id}-{made}")
        else:
            world.change(worker_id, **change)
        if looks:
            told += world.look(1.0)
            assert only(world.look(), AskToLeave, Charge, Ended, Lost, Place) == []
    told += world.look(1.0)
    lost = [action.host for action in told if isinstance(action, Lost)]
    assert len(lost) == len(set(lost))
    counted = [action.pod.uid for action in told if isinstance(action, Ended)]
    assert len(counted) == len(set(counted))
    asked = [leaver for action in told if isinstance(action, AskToLeave) for leaver in action.pods]
    assert len(asked) == len(set(asked))
    memory, uids = world.memory, {one.uid for one in world.pods.values()}
    tables = (memory.asked, memory.lost, set(memory.placed), set(memory.terminating_s), set(memory.pods))
    assert all(table <= uids for table in tables)
    assert {short[:13] for short in memory.counted} <= {uid[:13] for uid in uids}
