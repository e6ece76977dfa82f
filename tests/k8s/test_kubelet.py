"""The kubelet for tests against a real control plane: its pods run, end and fail as real ones do."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.commands import IMAGE
from tests.k8s.controlplane import ControlPlane
from tests.k8s.kubelet import Fleet, Image
from tests.k8s.waiting import eventually

Object = dict[str, Any]

SAFE = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""What the restricted Pod Security Standard asks for."""


class Cluster:
    """The cluster as these tests use it: one namespace, objects by name."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self.plane = plane
        self.api = plane.api
        self.namespace = namespace

    def create(self, manifest: Object) -> Object:
        manifest.setdefault("apiVersion", "v1")
        if manifest["kind"] != "PersistentVolume":
            manifest["metadata"].setdefault("namespace", self.namespace)
        return self.api.create(manifest)

    def run(self, name: str, script: str, *, container: Object | None = None, **spec: Any) -> Object:
        """Create a pod with one container that runs a shell script."""
        one = {
            "name": "c",
            "image": IMAGE,
            "command": ["sh", "-c", script],
            "securityContext": SAFE,
            **(container or {}),
        }
        whole = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 5, "containers": [one], **spec}
        labels = {"name": name}
        return self.create({"kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": whole})

    def pod(self, name: str) -> Object:
        return self.api.get("Pod", name, self.namespace)

    def pods(self) -> list[Object]:
        return self.api.list("Pod", namespace=self.namespace)

    def phase(self, name: str) -> str:
        return str(self.pod(name)["status"].get("phase"))

    def state(self, name: str) -> Object:
        """The state of the pod's container; empty before its node has taken it."""
        statuses = self.pod(name)["status"].get("containerStatuses") or [{"state": {}}]
        found: Object = statuses[0]["state"]
        return found

    def waits_for(self, name: str) -> str:
        return str(self.state(name).get("waiting", {}).get("reason"))

    def until(self, name: str, *phases: str) -> Object:
        """The pod, once it is in one of these phases."""
        eventually(lambda: self.phase(name) in phases, f"{name} is {' or '.join(phases)}")
        return self.pod(name)

    def until_gone(self, name: str) -> None:
        def gone() -> bool:
            return name not in [pod["metadata"]["name"] for pod in self.pods()]

        eventually(gone, f"{name} is gone")

    def ended(self, name: str) -> Object:
        """How the pod's container ended."""
        pod = self.until(name, "Succeeded", "Failed")
        found: Object = pod["status"]["containerStatuses"][0]["state"]["terminated"]
        return found

    def log(self, name: str, *options: str) -> str:
        return self.plane.kubectl("logs", name, *options, namespace=self.namespace).stdout

    def until_logged(self, name: str, text: str) -> None:
        def logged() -> bool:
            asked = self.plane.kubectl("logs", name, namespace=self.namespace, check=False)
            return text in asked.stdout

        eventually(logged, f"{name} has logged {text!r}")


@pytest.fixture
def here(control_plane: ControlPlane, namespace: str) -> Cluster:
    return Cluster(control_plane, namespace)


@pytest.fixture
def node(nodes: Fleet) -> Fleet:
    """A fleet with one node, `n1`."""
    nodes.add("n1")
    return nodes


def condition(pod: Object, kind: str) -> Object:
    return next((c for c in pod["status"].get("conditions", []) if c["type"] == kind), {"status": "missing"})


def seconds(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def python(source: str) -> Object:
    return {"command": ["python", "-u", "-c", source]}


# What a container finds.


def test_a_pod_runs_and_says_how_it_ended(here: Cluster, node: Fleet) -> None:
    here.run("good", "echo hello; exit 0")
    here.run("bad", "exit 75")
    ended = here.ended("good")
    assert (ended["exitCode"], ended["reason"]) == (0, "Completed")
    good = here.pod("good")
    assert good["status"]["phase"] == "Succeeded"
    assert condition(good, "Ready")["reason"] == "PodCompleted"
    assert condition(good, "PodScheduled")["status"] == "True"
    assert good["status"]["podIP"].startswith("10.244.") and good["status"]["hostIP"].startswith("127.")
    assert seconds(good["status"]["startTime"]) <= seconds(ended["finishedAt"])
    ended = here.ended("bad")
    assert (ended["exitCode"], ended["reason"]) == (75, "Error")
    assert here.pod("bad")["status"]["phase"] == "Failed"
    assert here.log("good") == "hello\n"


def test_environment_volumes_and_names(here: Cluster, node: Fleet, tmp_path: Path) -> None:
    (tmp_path / "claimed").mkdir()
    secret = {"key": base64.b64encode(b"hidden").decode(), "other": ""}
    here.create({"kind": "Secret", "metadata": {"name": "s"}, "data": secret})
    here.create({"kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"a.py": "print(1)", "B": "b"}})
    _claim(here, tmp_path / "claimed")
    container = {
        "env": [
            {"name": "INDEX", "value": "3"},
            {"name": "JOINED", "value": "$(INDEX)-$(POD)-$(NOBODY)"},
            {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "key"}}},
            {"name": "MEM", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}}},
        ],
        "envFrom": [{"configMapRef": {"name": "m"}}],
        "args": ["$(INDEX)"],
        "resources": {"limits": {"memory": "64Mi", "cpu": "100m"}},
        "workingDir": "/made/here",
        "volumeMounts": [
            {"name": "key", "mountPath": "/etc/ringps/key", "readOnly": True},
            {"name": "code", "mountPath": "/etc/ringps/code"},
            {"name": "claim", "mountPath": "/checkpoints"},
            {"name": "scratch", "mountPath": "/scratch"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    volumes = [
        {
            "name": "key",
            "secret": {"secretName": "s", "defaultMode": 0o400, "items": [_item("key", "job.key")]},
        },
        {"name": "code", "configMap": {"name": "m"}},
        {"name": "claim", "persistentVolumeClaim": {"claimName": "claim"}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "32Mi"}},
    ]
    script = """
        echo "$JOINED $IP $NODE $KEY $MEM $B $0 $(hostname) $(pwd) $KUBERNETES_SERVICE_HOST"
        cat /etc/ringps/key/job.key; stat -c ' %a' /etc/ringps/key/job.key; ls /etc/ringps/key
        python /etc/ringps/code/a.py
        echo kept > /checkpoints/file; echo x > /scratch/x; echo lost > /etc/lost; echo lost > /new-file
        df --output=size -k /dev/shm | tail -1; touch /etc/ringps/key/new 2>/dev/null || echo read-only
        echo $$$$; grep -c : /proc/net/dev
    """
    here.run("all", script, container=container, volumes=volumes, hostname="host-name")
    assert here.ended("all")["exitCode"] == 0, here.log("all")
    lines = here.log("all").split("\n")
    address = here.pod("all")["status"]["podIP"]
    resolved = f"3-$(POD)-$(NOBODY) {address} n1 hidden 67108864 b 3 host-name /made/here 10.96.0.1"
    assert lines[0] == resolved, "a variable is known to those that come after it"
    assert lines[1:4] == ["hidden 400", "job.key", "1"]
    assert [line.strip() for line in lines[4:8]] == ["32768", "read-only", "1", "2"]
    assert (tmp_path / "claimed" / "file").read_text() == "kept\n"
    for path in ("/etc/ringps", "/checkpoints", "/scratch", "/etc/lost", "/new-file", "/made"):
        assert not os.path.exists(path), f"{path} is on this machine now"


def _item(key: str, path: str) -> Object:
    return {"key": key, "path": path}


def _claim(here: Cluster, path: Path) -> None:
    """A bound claim `claim` on a directory of this machine."""
    common = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    name = f"{here.namespace}-volume"
    volume = {"capacity": {"storage": "1Gi"}, "hostPath": {"path": str(path)}, **common}
    here.create({"kind": "PersistentVolume", "metadata": {"name": name}, "spec": volume})
    wanted = {"resources": {"requests": {"storage": "1Gi"}}, "volumeName": name, **common}
    here.create({"kind": "PersistentVolumeClaim", "metadata": {"name": "claim"}, "spec": wanted})


def test_a_container_is_confined_as_its_security_context_says(here: Cluster, node: Fleet) -> None:
    script = "grep -E 'Cap(Eff|Bnd)|NoNewPrivs' /proc/self/status; touch /x; touch /tmp/x; touch /dev/shm/x"
    context = {**SAFE, "readOnlyRootFilesystem": True}
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]
    volumes = [{"name": "tmp", "emptyDir": {}}]
    here.run("safe", script, container={"securityContext": context, "volumeMounts": mounts}, volumes=volumes)
    here.ended("safe")
    log = here.log("safe")
    assert "NoNewPrivs:\t1" in log and log.count("0000000000000000") == 2
    assert "'/x': Read-only file system" in log and log.count("cannot touch") == 1


def test_the_official_client_finds_the_api_server_from_inside(here: Cluster, node: Fleet) -> None:
    source = (
        "import kubernetes as k; k.config.load_incluster_config(); "
        "print(k.client.AuthenticationV1Api().create_self_subject_review({}).status.user_info.username)"
    )
    here.run("client", "", container=python(source))
    assert here.ended("client")["exitCode"] == 0, here.log("client")
    assert here.log("client") == f"system:serviceaccount:{here.namespace}:default\n"


def test_pods_of_an_indexed_job_find_each_other_by_name(here: Cluster, node: Fleet) -> None:
    node.add("n2")
    selector = {"job-name": "ring"}
    here.create(
        {"kind": "Service", "metadata": {"name": "ring"}, "spec": {"clusterIP": "None", "selector": selector}}
    )
    source = """
import os, socket, time
me = int(os.environ["JOB_COMPLETION_INDEX"])
server = socket.create_server(("0.0.0.0", 7117))
while True:
    try:
        peer = socket.create_connection((f"ring-{1 - me}.ring." + os.environ["NS"] + ".svc", 7117), 2)
        break
    except OSError:
        time.sleep(0.05)
peer.sendall(b"hi")
accepted, address = server.accept()
assert accepted.recv(2) == b"hi"
print(address[0])
"""
    namespace = {"name": "NS", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}
    container = {**python(source), "name": "c", "image": IMAGE, "env": [namespace], "securityContext": SAFE}
    template = {"spec": {"restartPolicy": "Never", "subdomain": "ring", "containers": [container]}}
    spec = {"completions": 2, "parallelism": 2, "completionMode": "Indexed", "template": template}
    here.create({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "ring"}, "spec": spec})

    def complete() -> bool:
        job = here.api.get("Job", "ring", here.namespace)
        return int(job["status"].get("succeeded", 0)) == 2

    eventually(complete, "both pods have completed")
    first, second = sorted(here.pods(), key=lambda pod: str(pod["metadata"]["name"]))
    assert here.log(first["metadata"]["name"]) == second["status"]["podIP"] + "\n"
    assert here.log(second["metadata"]["name"]) == first["status"]["podIP"] + "\n"


def test_a_port_of_this_machine_can_be_exposed(here: Cluster, node: Fleet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        address, _, port = node.expose(server.getsockname()[1]).partition(":")
        here.run(
            "caller", "", container=python(f"import socket; socket.create_connection(('{address}', {port}))")
        )
        server.accept()[0].close()
    assert here.ended("caller")["exitCode"] == 0


# Logs.


def test_logs_in_parts_and_followed(here: Cluster, node: Fleet) -> None:
    here.run("talks", "for i in 1 2 3 4 5; do echo line $i; done; sleep 1; echo end; printf rest >&2")
    here.until("talks", "Running", "Succeeded")
    followed = here.log("talks", "--follow")
    assert followed == "".join(f"line {i}\n" for i in range(1, 6)) + "end\nrest\n"
    assert here.log("talks", "--tail", "2") == "end\nrest\n"
    stamped = here.log("talks", "--timestamps", "--tail", "1")
    stamp, _, text = stamped.partition(" ")
    assert text == "rest\n" and abs(seconds(stamp[:19] + "Z") - time.time()) < 60
    assert here.log("talks", "--since", "1h", "--limit-bytes", "4") == "line"


def test_the_log_of_the_run_before(here: Cluster, node: Fleet) -> None:
    here.run(
        "again",
        "[ -e /scratch/f ] && echo second && exec sleep 1000; touch /scratch/f; echo first; exit 3",
        container={"volumeMounts": [{"name": "v", "mountPath": "/scratch"}]},
        volumes=[{"name": "v", "emptyDir": {}}],
        restartPolicy="OnFailure",
    )
    here.until_logged("again", "second")
    assert here.log("again", "--previous") == "first\n"
    found = here.pod("again")["status"]["containerStatuses"][0]
    assert found["restartCount"] == 1 and found["lastState"]["terminated"]["exitCode"] == 3
    assert here.phase("again") == "Running"


def test_asking_for_a_log_that_is_not_there_says_why(here: Cluster, node: Fleet) -> None:
    here.run("waits", "true", container={"image": "nobody/has:this"})
    eventually(lambda: here.waits_for("waits") != "None", "the node has taken it")
    asked = here.plane.kubectl("logs", "waits", namespace=here.namespace, check=False)
    assert asked.returncode != 0 and "waiting to start" in asked.stderr


# Pods that cannot start.


def test_images(here: Cluster, node: Fleet) -> None:
    here.run("later", "true", container={"image": "late/image:1"})
    here.run("wrong", "true", container={"image": "late/Image:"})
    here.run("never", "true", container={"image": "late/other:1", "imagePullPolicy": "Never"})
    eventually(lambda: here.waits_for("later") == "ErrImagePull", "the image is not there")
    eventually(lambda: here.waits_for("later") == "ImagePullBackOff", "the node waits before it tries again")
    eventually(lambda: here.waits_for("wrong") == "InvalidImageName", "the name is wrong")
    eventually(lambda: here.waits_for("never") == "ErrImageNeverPull", "the image may not be pulled")
    assert here.phase("later") == "Pending"
    node.images["late/image:1"] = Image()
    assert here.ended("later")["exitCode"] == 0


def test_configuration_that_comes_late(here: Cluster, node: Fleet) -> None:
    entry = {"name": "K", "valueFrom": {"secretKeyRef": {"name": "late", "key": "k"}}}
    here.run("env", "true", container={"env": [entry]})
    here.run(
        "mount",
        "cat /s/k",
        container={"volumeMounts": [{"name": "v", "mountPath": "/s"}]},
        volumes=[{"name": "v", "secret": {"secretName": "late"}}],
    )
    eventually(lambda: here.waits_for("env") == "CreateContainerConfigError", "the Secret is missing")
    assert 'secret "late" not found' in here.state("env")["waiting"]["message"]
    eventually(lambda: here.waits_for("mount") == "ContainerCreating", "the node has taken it")

    def told() -> bool:
        events = here.api.list("Event", namespace=here.namespace)
        return any(e["reason"] == "FailedMount" and "not found" in e["message"] for e in events)

    eventually(told, "there is an event about the mount")
    here.create({"kind": "Secret", "metadata": {"name": "late"}, "stringData": {"k": "v"}})
    assert here.ended("env")["exitCode"] == 0
    assert here.ended("mount")["exitCode"] == 0 and here.log("mount") == "v\n"


def test_a_command_that_is_not_there(here: Cluster, node: Fleet) -> None:
    here.run("nothing", "", container={"command": ["no-such-command"]})
    ended = here.ended("nothing")
    assert (ended["exitCode"], ended["reason"]) == (128, "StartError")
    assert 'exec: "no-such-command": executable file not found in $PATH' in ended["message"]


def test_a_pod_that_the_node_has_no_room_for_is_refused(here: Cluster, nodes: Fleet) -> None:
    nodes.add("n1", gpus=1)
    gpu = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    here.run("first", "sleep 1000", container=gpu, nodeName="n1")
    here.until("first", "Running")
    here.run("second", "sleep 1000", container=gpu, nodeName="n1")
    refused = here.until("second", "Failed")
    assert refused["status"]["reason"] == "OutOfnvidia.com/gpu"
    assert "requested: 1, used: 1, capacity: 1" in refused["status"]["message"]


# Ends.


def test_the_main_process_is_asked_to_end_and_has_its_time(here: Cluster, node: Fleet) -> None:
    source = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print("saved"), sys.exit(75)))
print("ready")
while True:
    signal.pause()
"""
    here.run("polite", "", container=python(source))
    here.until_logged("polite", "ready")
    with _last_seen(here, "polite") as seen:
        here.api.delete("Pod", "polite", namespace=here.namespace)
        here.until_gone("polite")
    status = seen()["status"]
    assert status["phase"] == "Failed", "its phase is final before it goes"
    assert status["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 75


def test_who_does_not_listen_is_killed_when_the_time_is_over(here: Cluster, node: Fleet) -> None:
    # As pid 1 without a handler it does not even hear the signal.
    here.run("deaf", "sleep 1000 & wait", terminationGracePeriodSeconds=1)
    here.until("deaf", "Running")
    asked_s = time.monotonic()
    with _last_seen(here, "deaf") as seen:
        here.api.delete("Pod", "deaf", namespace=here.namespace)
        here.until_gone("deaf")
    assert time.monotonic() - asked_s >= 1.0
    assert seen()["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 137


def test_a_shorter_time_counts_also_afterwards(here: Cluster, node: Fleet) -> None:
    here.run("deaf", "sleep 1000 & wait", terminationGracePeriodSeconds=600)
    here.until("deaf", "Running")
    here.api.delete("Pod", "deaf", namespace=here.namespace)
    assert "deletionTimestamp" in here.pod("deaf")["metadata"]
    here.api.delete("Pod", "deaf", namespace=here.namespace, grace_s=1)
    here.until_gone("deaf")


def test_a_pod_deleted_by_force_does_not_run_on(here: Cluster, node: Fleet) -> None:
    here.run("forced", "sleep 1000 & wait", terminationGracePeriodSeconds=1)
    here.until("forced", "Running")
    processes = eventually(lambda: node.processes("forced"), "it has processes")
    here.plane.kubectl("delete", "pod", "forced", "--force", "--grace-period=0", namespace=here.namespace)
    eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in processes), "its processes are gone")


def test_eviction_and_drain_end_pods_in_order(here: Cluster, node: Fleet) -> None:
    script = "trap 'exit 75' TERM; echo ready; while :; do sleep 0.1; done"
    here.run("drained", script)
    here.until_logged("drained", "ready")
    with _last_seen(here, "drained") as seen:
        here.plane.kubectl("drain", "n1", "--force", "--ignore-daemonsets", "--timeout=20s")
    assert condition(seen(), "DisruptionTarget")["reason"] == "EvictionByEvictionAPI"
    assert seen()["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 75


@contextlib.contextmanager
def _last_seen(here: Cluster, name: str) -> Iterator[Callable[[], Object]]:
    """Remembers the last version of a pod that there was; ask after it has gone."""
    found: list[Object] = []
    gone = threading.Event()
    version = here.api.raw(f"/api/v1/namespaces/{here.namespace}/pods")["metadata"]["resourceVersion"]
    mine = here.plane.connect()

    def follow() -> None:
        for kind, pod in mine.watch(
            "Pod",
            fields=f"metadata.name={name}",
            namespace=here.namespace,
            resource_version=version,
            timeout_s=60,
        ):
            found.append(pod)
            if kind == "DELETED":
                gone.set()
                return

    thread = threading.Thread(target=follow)
    thread.start()

    def last() -> Object:
        thread.join(30)
        assert gone.is_set(), f"the watch has not seen {name} go"
        return found[-1]

    try:
        yield last
    finally:
        thread.join(60)
        mine.close()


# Restarts and readiness.


def test_failing_containers_are_started_again_ever_later(here: Cluster, node: Fleet) -> None:
    here.run("loops", "exit 1", restartPolicy="OnFailure")

    def backs_off() -> bool:
        status = here.pod("loops")["status"].get("containerStatuses") or [{"restartCount": 0}]
        return int(status[0]["restartCount"]) >= 2 and here.waits_for("loops") == "CrashLoopBackOff"

    eventually(backs_off, "it waits before the third start")
    status = here.pod("loops")["status"]
    assert status["phase"] == "Running" and condition(here.pod("loops"), "Ready")["status"] == "False"
    first, last = seconds(status["startTime"]), status["containerStatuses"][0]["lastState"]["terminated"]
    assert seconds(last["finishedAt"]) - first >= 1  # it waited for one second and more, less rounding


def test_a_pod_is_ready_while_its_port_answers_and_only_then_has_a_name(here: Cluster, node: Fleet) -> None:
    source = """
import os, socket, time
while not os.path.exists("/shared/open"):
    time.sleep(0.05)
server = socket.create_server(("0.0.0.0", 7117))
print("open")
while not os.path.exists("/shared/close"):
    time.sleep(0.05)
server.close()
time.sleep(1000)
"""
    shared = {"volumeMounts": [{"name": "v", "mountPath": "/shared"}]}
    probe = {"tcpSocket": {"port": "control"}, "periodSeconds": 1, "failureThreshold": 1}
    ports = [{"name": "control", "containerPort": 7117}]
    spec = {"clusterIP": "None", "selector": {"name": "server"}}
    here.create({"kind": "Service", "metadata": {"name": "server"}, "spec": spec})
    container = {**python(source), **shared, "readinessProbe": probe, "ports": ports}
    here.run("server", "", container=container, volumes=[{"name": "v", "emptyDir": {}}])
    here.until("server", "Running")

    def ready() -> bool:
        return condition(here.pod("server"), "Ready")["status"] == "True"

    def touch(file: str) -> None:
        (node.pod("server").volume("v") / file).touch()

    here.run(
        "asks", "until getent hosts server; do sleep 0.1; done; while getent hosts server; do sleep 0.1; done"
    )
    here.until("asks", "Running")
    assert not ready() and here.log("asks") == ""
    touch("open")
    eventually(ready, "the port answers")
    here.until_logged("asks", here.pod("server")["status"]["podIP"])
    touch("close")
    eventually(lambda: not ready(), "the port answers no more")
    assert here.ended("asks")["exitCode"] in (0, 2)


def test_readiness_by_a_command(here: Cluster, node: Fleet) -> None:
    probe = {"exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 1}
    here.run("slow", "sleep 1; touch /tmp/ready; exec sleep 1000", container={"readinessProbe": probe})
    eventually(lambda: condition(here.pod("slow"), "Ready")["status"] == "True", "the file is there")
    since = condition(here.pod("slow"), "Ready")["lastTransitionTime"]
    assert seconds(since) >= seconds(here.state("slow")["running"]["startedAt"])


# Faults of pods.


def test_crashes(here: Cluster, node: Fleet) -> None:
    for name in ("killed", "oom", "evicted"):
        here.run(name, "sleep 1000 & wait")
    for name in ("killed", "oom", "evicted"):
        here.until(name, "Running")
        eventually(lambda name=name: len(node.processes(name)) == 2, "it has its child")
    node.kill_pod("killed")
    node.oom_kill("oom")
    node.evict("evicted", "The node was low on resource: memory.")
    ended = here.ended("killed")
    assert (ended["exitCode"], ended["reason"]) == (137, "Error")
    ended = here.ended("oom")
    assert (ended["exitCode"], ended["reason"]) == (137, "OOMKilled")
    evicted = here.until("evicted", "Failed")
    assert evicted["status"]["reason"] == "Evicted"
    assert condition(evicted, "DisruptionTarget")["reason"] == "TerminationByKubelet"
    with pytest.raises(LookupError, match="nothing of pod killed runs"):
        node.kill_pod("killed")


def test_a_pod_that_somebody_calls_failed_does_not_run_on(here: Cluster, node: Fleet) -> None:
    here.run("p", "sleep 1000 & wait", terminationGracePeriodSeconds=1)
    here.until("p", "Running")
    processes = list(node.processes("p"))
    failed = {"status": {"phase": "Failed", "reason": "NodeLost"}}
    with here.plane.connect(here.namespace) as connection:
        connection.patch("Pod", "p", failed, subresource="status")
    eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in processes), "it has ended")
    ended = eventually(lambda: here.state("p").get("terminated"), "its node has said how")
    assert ended["exitCode"] == 137 and here.pod("p")["status"]["reason"] == "NodeLost"


def test_one_process_of_a_pod_can_be_killed(here: Cluster, node: Fleet) -> None:
    here.run("parent", "n=1234; sleep $n & wait $!; echo child ended with $?; exit 3")
    here.until("parent", "Running")
    eventually(lambda: "sleep 1234" in node.processes("parent").values(), "its child runs")
    with pytest.raises(LookupError, match="no process"):
        node.kill_process("parent", "no such thing")
    assert node.kill_process("parent", "sleep 1234", signal.SIGKILL)
    assert here.ended("parent")["exitCode"] == 3
    assert "child ended with 137\n" in here.log("parent")


def test_a_frozen_pod_stands_still_and_goes_on(here: Cluster, node: Fleet) -> None:
    here.run("counts", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done")
    here.until_logged("counts", "3\n")
    node.freeze_pod("counts")
    before = here.log("counts", "--tail", "1")
    time.sleep(0.5)  # nothing may happen in this time
    assert here.log("counts", "--tail", "1") == before
    node.thaw_pod("counts")
    eventually(lambda: here.log("counts", "--tail", "1") != before, "it counts on")


# Faults of nodes and of the API server.


def test_pods_run_on_while_the_api_server_is_away(here: Cluster, node: Fleet) -> None:
    here.run("ends", "sleep 2; exit 75")
    here.run("lasts", "echo started; exec sleep 1000")
    here.until("ends", "Running")
    here.until_logged("lasts", "started")
    here.plane.stop_api()
    slot = node.pod("ends").slots[0]
    eventually(lambda: slot.ended is not None, "it ends without an API server")
    assert node.processes("lasts")
    here.plane.start_api()
    assert here.ended("ends")["exitCode"] == 75
    assert here.phase("lasts") == "Running" and node.pod("lasts").slots[0].restarts == 0
    here.run("later", "exit 0")
    assert here.ended("later")["exitCode"] == 0


def test_a_node_that_hangs_is_lost_and_ends_its_pods_when_it_is_back(here: Cluster, nodes: Fleet) -> None:
    nodes.add("n1", heartbeat_s=0.5)
    nodes.add("n2", pods=0)  # where no node lives, none is held to be dead
    tolerations = [
        {
            "key": f"node.kubernetes.io/{what}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": 0,
        }
        for what in ("not-ready", "unreachable")
    ]
    here.run("p", "trap 'exit 75' TERM; echo up; while :; do sleep 0.1; done", tolerations=tolerations)
    here.until_logged("p", "up")
    nodes.freeze_node("n1")
    eventually(lambda: _node_ready(here, "n1") == "Unknown", "the node is not heard of")
    eventually(lambda: "deletionTimestamp" in here.pod("p")["metadata"], "the pod is to go")
    assert condition(here.pod("p"), "DisruptionTarget")["reason"] == "DeletionByTaintManager"
    assert here.phase("p") == "Running" and nodes.processes("p")
    with _last_seen(here, "p") as seen:
        nodes.thaw_node("n1")
        here.until_gone("p")
    assert seen()["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 75
    eventually(lambda: _node_ready(here, "n1") == "True", "the node is back")


def test_a_node_without_power_is_silent_and_comes_back_empty(here: Cluster, node: Fleet) -> None:
    node.add("n2")
    server = """
import socket
server = socket.create_server(("0.0.0.0", 7117))
accepted = []
while True:
    accepted.append(server.accept())
"""
    here.run("server", "", container=python(server), nodeName="n2")
    here.until("server", "Running")
    address = here.pod("server")["status"]["podIP"]
    client = f"""
import socket, time
while True:
    try:
        peer = socket.create_connection(("{address}", 7117), 5)
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
print("connected")
peer.settimeout(3)
try:
    print("heard", peer.recv(1))
except TimeoutError:
    print("silence")
"""
    here.run("client", "", container=python(client), nodeName="n1")
    here.until_logged("client", "connected")
    pids = list(node.processes("server"))
    node.vanish_node("n2")
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert here.phase("server") == "Running", "nobody has said that it ended"
    assert here.ended("client")["exitCode"] == 0
    assert here.log("client").endswith("silence\n"), here.log("client")
    node.return_node("n2")
    ended = here.ended("server")
    assert (ended["exitCode"], ended["reason"]) == (255, "Unknown")
    here.run("next", "true", nodeName="n2")
    assert here.ended("next")["exitCode"] == 0


def test_a_node_can_be_taken_away(here: Cluster, node: Fleet) -> None:
    here.run("p", "sleep 1000")
    here.until("p", "Running")
    pids = list(node.processes("p"))
    node.delete_node("n1")
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert "n1" not in [found["metadata"]["name"] for found in here.api.list("Node")]
    assert here.phase("p") == "Running"


def _node_ready(here: Cluster, name: str) -> str:
    return str(condition(here.api.get("Node", name), "Ready")["status"])


def test_no_pod_survives_the_process_of_its_kubelet(runs_pods: None, tmp_path: Path) -> None:
    program = """
import json, os, sys, time
from pathlib import Path
from tests.k8s.kubelet.container import Container, Launch
from tests.k8s.kubelet.network import Network
directory = Path(sys.argv[1])
network = Network(())
place = network.join()
launch = Launch(
    argv=["sh", "-c", "sleep 1000 & sleep 1000"], environ={"PATH": os.environ["PATH"]}, cwd="/", hostname="h",
    network=place.namespace, root=directory / "root", log=directory / "log.log", files={}, mounts=[],
    read_only=False, drop_capabilities=True, no_new_privileges=True, groups=[],
)
container = Container(launch, lambda: None)
while container.pid is None:
    time.sleep(0.01)
print(json.dumps(container.pid), flush=True)
time.sleep(1000)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        assert process.stdout is not None
        pid = json.loads(process.stdout.readline())
        with os.scandir(f"/proc/{pid}/task") as tasks:
            assert list(tasks)
        children = Path(f"/proc/{pid}/task/{pid}/children")
        child = int(eventually(children.read_text, "the container has a second process").split()[0])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    eventually(lambda: not os.path.exists(f"/proc/{pid}"), "the command is gone")
    eventually(lambda: not os.path.exists(f"/proc/{child}"), "its child is gone")
