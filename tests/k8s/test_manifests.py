"""A real API server takes what is rendered and what lies in `k8s/`, from an administrator or a user."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ringps_launcher.guard import Guard
from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import ClusterError, ForbiddenError
from ringps_launcher.kubernetes.resources import Manifest, manifests
from ringps_launcher.kubernetes.spec import JobSpec, Toleration
from ringps_launcher.kubernetes.yaml import from_yaml, to_yaml
from tests.k8s.bare_nodes import bare_nodes
from tests.k8s.component import Component
from tests.k8s.controlplane import ControlPlane
from tests.k8s.reachable import Reachable
from tests.k8s.waiting import eventually

K8S = Path(__file__).parents[2] / "k8s"
KEY = f"ringps-job-key-1\n{'p' * 40}\n{'s' * 40}\n"
GANG = {"gates": {"GenericWorkload": True, "WorkloadWithJob": True}, "apis": ("scheduling.k8s.io/v1beta1",)}

SMALL = JobSpec(
    name="small",
    namespace="ringps",
    image="ringps:1",
    program="train.py",
    workers=2,
    coordinator_priority_class="",
)
FULL = replace(
    SMALL,
    name="full",
    arguments=("--lr", "1e3", "$(HOME)", "y"),
    files=(("train.py", "import os\n\nprint(os)\n"), ("notes.txt", "no end of line, trailing blanks  ")),
    workers=8,
    transport="nccl",
    encrypt_data=True,
    gpus=1,
    cpu="1500m",
    memory="8G",
    shm="1.5Gi",
    checkpoint_dir="/checkpoints/a",
    volumes=(("checkpoints", "/checkpoints"), ("data", "/data")),
    env=(("A.b-c", "1e3"), ("EMPTY", ""), ("NO", "no"), ("OMP_NUM_THREADS", "2")),
    secret_env=(("TOKEN", "hub", "token"),),
    scheduler="ringps",
    node_selector=(("gpu", "h200"), ("kubernetes.io/os", "linux")),
    tolerations=(Toleration(key="a", value="b", effect="NoExecute"), Toleration(key="c")),
    image_pull_policy="Always",
    image_pull_secret="registry",
    ttl_s=0,
)
SPECS = pytest.mark.parametrize(
    "spec",
    [
        SMALL,
        FULL,
        replace(SMALL, name="queued", queue="team", is_module=True, program="package.train"),
        replace(SMALL, name="a" * names.MAX_NAME, workers=1024),
    ],
    ids=lambda spec: spec.name[:6],
)


def dry_run(api: Cluster, objects: list[Manifest]) -> list[Manifest]:
    return [api.create(each, dry_run=True) for each in objects]


def kept(sent: Any, got: Any, where: str = "") -> list[str]:
    """The paths of `sent` that the server dropped or changed."""
    if isinstance(sent, dict):
        if not isinstance(got, dict):
            return [where]
        return [path for key in sent for path in kept(sent[key], got.get(key), f"{where}.{key}")]
    if isinstance(sent, list):
        if not isinstance(got, list) or len(sent) != len(got):
            return [where]
        pairs = enumerate(zip(sent, got, strict=True))
        return [path for index, (a, b) in pairs for path in kept(a, b, f"{where}[{index}]")]
    same = sent == got or (not sent and got is None)
    return [] if same else [f"{where}: {sent!r} is {got!r}"]


@SPECS
def test_the_server_takes_every_object_and_keeps_every_field(
    cluster: Reachable, namespace: str, spec: JobSpec
) -> None:
    objects = manifests(replace(spec, namespace=namespace), KEY)
    for sent, got in zip(objects, dry_run(cluster.connect(namespace), objects), strict=True):
        sent.pop("stringData", None)  # kept as `data`
        normal = json.loads(json.dumps(sent).replace('"1.5Gi"', '"1536Mi"'))
        assert kept(normal, got) == [], sent["kind"]


@SPECS
def test_kubectl_reads_the_yaml_as_we_do(cluster: Reachable, namespace: str, spec: JobSpec) -> None:
    objects = manifests(replace(spec, namespace=namespace), KEY)
    rendered = to_yaml(objects)
    done = cluster.kubectl(
        "create", "--dry-run=client", "--validate=strict", "-o", "json", "-f", "-", stdin=rendered
    )
    decoder, text, read = json.JSONDecoder(), done.stdout, []
    while text.strip():
        found, end = decoder.raw_decode(text.lstrip())
        text = text.lstrip()[end:]
        read += found.get("items", [found])
    assert read == objects


def test_pods_keep_to_the_restricted_level(cluster: Reachable, namespace: str) -> None:
    """Asked by pods themselves: of a Job, the server only warns."""
    api = cluster.connect(namespace)
    objects = manifests(replace(FULL, namespace=namespace), KEY)
    for each in objects:
        if each["kind"] in ("ServiceAccount", "Secret"):
            api.create(each)
    for each in objects[-2:]:
        template = each["spec"]["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}}
        api.create({**pod, "spec": template["spec"]}, dry_run=True)
        loose = json.loads(json.dumps(template["spec"]))
        del loose["containers"][0]["securityContext"]
        with pytest.raises(ForbiddenError, match="restricted"):
            api.create({**pod, "spec": loose}, dry_run=True)


def test_jobs_make_their_pods_with_stable_names(cluster: Reachable, namespace: str) -> None:
    api = cluster.connect(namespace)
    for each in manifests(replace(SMALL, namespace=namespace), KEY):
        api.create(each)
    workers = names.selector("small", names.WORKER)
    pods = eventually(
        lambda: found if len(found := api.list("Pod", labels=workers)) == 2 else [], "two workers"
    )
    assert sorted(pod["spec"]["hostname"] for pod in pods) == ["small-0", "small-1"]
    for pod in pods:
        index = pod["metadata"]["annotations"][names.INDEX_ANNOTATION]
        assert pod["spec"]["hostname"] == f"small-{index}"
        assert pod["spec"]["subdomain"] == "small"
        variables = {entry["name"] for entry in pod["spec"]["containers"][0]["env"]}
        assert {"POD_NAME", "POD_IP", "NODE_NAME", "JOB_COMPLETION_INDEX"} <= variables
        seconds = {entry["key"]: entry.get("tolerationSeconds") for entry in pod["spec"]["tolerations"]}
        assert seconds["node.kubernetes.io/unreachable"] == 20, "admission adds 300 where nothing is said"
    eventually(lambda: api.list("Pod", labels=names.selector("small", names.COORDINATOR)), "the coordinator")


def test_the_coordinators_rights_are_enough_and_no_more(cluster: Reachable, namespace: str) -> None:
    admin = cluster.connect(namespace)
    for each in manifests(replace(SMALL, namespace=namespace), KEY):
        admin.create(each)
    token = cluster.kubectl("create", "token", "small-coordinator", namespace=namespace).stdout.strip()
    kubeconfig = cluster._kubeconfig(f"{namespace}-coordinator", {"token": token}, namespace)
    api = cluster.connect(namespace, kubeconfig)
    api.patch("Lease", "small-coordinator", {"spec": {"holderIdentity": "me"}})
    api.patch("ConfigMap", "small-status", {"data": {"verdict": "done"}})
    assert [job["metadata"]["name"] for job in api.list("Job", fields="metadata.name=small")] == ["small"]
    with api.watch("Job", fields="metadata.name=small", timeout_s=1) as events:
        assert next(iter(events))[0] == "ADDED"
    workers = names.selector("small", names.WORKER)
    pods = eventually(lambda: api.list("Pod", labels=workers), "a worker")
    failed = {"phase": "Failed", "reason": "NodeLost"}
    api.patch("Pod", pods[0]["metadata"]["name"], {"status": failed}, subresource="status")
    api.delete("Pod", pods[0]["metadata"]["name"], grace_s=0, uid=pods[0]["metadata"]["uid"])
    for forbidden in (
        lambda: api.get("Secret", "small-key"),
        lambda: api.list("Job"),
        lambda: api.patch("Job", "small", {"spec": {"suspend": True}}),
        lambda: api.list("ConfigMap"),
        lambda: api.patch("Lease", "other", {"spec": {}}),
        lambda: api.create({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}}),
    ):
        with pytest.raises(ForbiddenError):
            forbidden()


def test_a_server_without_the_gang_field_drops_it(control_plane: ControlPlane, namespace: str) -> None:
    """Without a word: that is why `submit` reads it back."""
    gang = manifests(replace(SMALL, namespace=namespace, gang=True), KEY)[-1]
    assert "scheduling" in gang["spec"]
    assert "scheduling" not in control_plane.connect(namespace).create(gang, dry_run=True)["spec"]


def test_a_server_with_the_gang_field_keeps_it(control_plane: ControlPlane, namespace: str) -> None:
    with control_plane.configured(**GANG):
        gang = manifests(replace(SMALL, namespace=namespace, gang=True), KEY)[-1]
        made = control_plane.connect(namespace).create(gang, dry_run=True)
        assert made["spec"]["scheduling"]["schedulingPolicy"] == {"gang": {"minCount": 2}}


@pytest.fixture
def installed(control_plane: ControlPlane) -> Iterator[ControlPlane]:
    """`k8s/base` as an administrator applies it."""
    control_plane.kubectl("apply", "-k", K8S / "base")
    try:
        eventually(
            lambda: control_plane.api.list("ServiceAccount", namespace="ringps"), "the namespace is furnished"
        )
        yield control_plane
    finally:
        control_plane.kubectl("delete", "-k", K8S / "base", "--wait=false", "--ignore-not-found")
        eventually(lambda: gone(control_plane.api), "namespace ringps is gone")


def gone(api: Cluster) -> bool:
    return not [each for each in api.list("Namespace") if each["metadata"]["name"] == "ringps"]


def test_a_user_may_start_jobs_and_end_them(installed: ControlPlane) -> None:
    user = installed.kubeconfig_of("alice", "ringps-users")
    api = installed.connect("ringps", user)
    objects = manifests(replace(SMALL, coordinator_priority_class="ringps-coordinator"), KEY)
    for each in objects:
        # Before there is the Role, the binding's dry run cannot be: the server looks into it.
        if each["kind"] != "RoleBinding":
            api.create(each, dry_run=True)
    for each in objects:
        api.create(each)
    eventually(lambda: api.list("Pod", labels=names.selector("small", names.COORDINATOR)), "a coordinator")
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "small", "uid": uid(api)}
    for each in objects[:-1]:
        api.patch(each["kind"], each["metadata"]["name"], {"metadata": {"ownerReferences": [owner]}})
    for change in (True, False):
        api.patch("Job", "small", {"spec": {"suspend": change}})
    for kind in ("Node", "PriorityClass", "RuntimeClass", "StorageClass", "Event", "ResourceQuota"):
        api.list(kind)
    for each in reversed(objects):
        api.delete_all(each["kind"], labels=names.selector("small"))
    assert api.list("Job", labels=names.selector("small")) == []
    with pytest.raises(ForbiddenError):
        api.list("Pod", namespace="default")
    with pytest.raises(ForbiddenError):
        api.list("Secret")


def uid(api: Cluster) -> str:
    return str(api.get("Job", "small")["metadata"]["uid"])


def test_coordinators_may_read_nodes_but_others_not(installed: ControlPlane, namespace: str) -> None:
    for where, allowed in (("ringps", True), (namespace, False)):
        path = installed.service_account(where, "coordinator")
        found, _ = installed.connect(where, path).can_i("get", "Node", "any")
        assert found is allowed, where


def test_nobody_gets_more_than_the_user_had(installed: ControlPlane) -> None:
    """A user may make Roles, but none with rights that he lacks."""
    api = installed.connect("ringps", installed.kubeconfig_of("alice", "ringps-users"))
    role = next(each for each in manifests(SMALL, KEY) if each["kind"] == "Role")
    role["rules"].append({"apiGroups": [""], "resources": ["secrets"], "verbs": ["list"]})
    with pytest.raises(ForbiddenError):
        api.create(role, dry_run=True)


def test_the_second_scheduler_is_applied(control_plane: ControlPlane) -> None:
    done = control_plane.kubectl(
        "apply", "--dry-run=server", "--validate=strict", "-k", K8S / "scheduler"
    ).stdout
    assert "deployment.apps/ringps-scheduler created" in done


def test_the_second_scheduler_places_pods_with_its_own_rights(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    """As shipped, beside the cluster's own scheduler; but that the kubeconfig comes from outside."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(control_plane.configured(node_grace_s=3600.0))
        stack.enter_context(bare_nodes(control_plane.api, "a1", gpus=1))
        rights = list(yaml.safe_load_all((K8S / "scheduler/rbac.yaml").read_text()))
        control_plane.apply(*rights)
        for each in rights:
            where = each["metadata"].get("namespace")
            stack.callback(control_plane.api.delete, each["kind"], each["metadata"]["name"], namespace=where)
        token = control_plane.kubectl("create", "token", "ringps-scheduler", namespace="kube-system").stdout
        kubeconfig = control_plane._kubeconfig("ringps-scheduler", {"token": token.strip()})
        config = yaml.safe_load((K8S / "scheduler/scheduler-config.yaml").read_text())
        config["clientConnection"] = {"kubeconfig": str(kubeconfig)}
        path = tmp_path / "scheduler.json"
        path.write_text(json.dumps(config))
        ours = (f"--config={path}", f"--authentication-kubeconfig={kubeconfig}")
        command = [control_plane.assets / "kube-scheduler", *ours, "--secure-port=0"]
        guard = stack.enter_context(contextlib.closing(Guard()))
        scheduler = Component(
            "ringps-scheduler", command, guard=guard, log=tmp_path / "scheduler.log", environ={}
        )
        scheduler.start()
        stack.callback(scheduler.stop)
        api = control_plane.connect(namespace)
        for each in manifests(replace(SMALL, namespace=namespace, scheduler="ringps"), KEY):
            api.create(each)
        workers = names.selector("small", names.WORKER)
        scheduler.wait_until(
            lambda: [each["spec"].get("nodeName") for each in api.list("Pod", labels=workers)] == ["a1"] * 2,
            30.0,
        )
        lease = control_plane.api.get("Lease", "ringps-scheduler", "kube-system")
        stack.callback(control_plane.api.delete, "Lease", "ringps-scheduler", namespace="kube-system")
        assert lease["spec"]["holderIdentity"]
        assert "forbidden" not in (tmp_path / "scheduler.log").read_text()
        for each in api.list("Job"):
            api.delete("Job", each["metadata"]["name"])


def test_examples_are_applied(installed: ControlPlane) -> None:
    for path in sorted((K8S / "examples").glob("*.yaml")):
        if path.name == "queue.yaml":  # kinds that only a cluster with Kueue has
            continue
        installed.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", path)


def test_files_are_yaml_that_our_reader_takes() -> None:
    for path in sorted(K8S.rglob("*.yaml")):
        assert from_yaml(path.read_text()), path
    assert os.path.exists(K8S / "base/kustomization.yaml")


def test_what_is_wrong_is_refused(cluster: Reachable, namespace: str) -> None:
    """The dry run that these tests trust does notice."""
    worker = manifests(replace(SMALL, namespace=namespace), KEY)[-1]
    worker["spec"]["podReplacementPolicy"] = "TerminatingOrFailed"
    with pytest.raises(ClusterError, match="podReplacementPolicy"):
        cluster.connect(namespace).create(worker, dry_run=True)
