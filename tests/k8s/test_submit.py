"""`ringps submit` and `render` against a real API server: all or nothing is there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.bundle import KINDS, bundle
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import ClusterError, UnreachableError
from ringps_launcher.kubernetes.submit import start
from ringps_launcher.kubernetes.yaml import from_yaml, to_yaml
from tests.k8s.commands import IMAGE, NO_CLASS, SMALL, Run, nothing_is_left, objects, submitted
from tests.k8s.controlplane import ControlPlane
from tests.k8s.kubelet.fleet import Fleet
from tests.k8s.kubelet.images import Image
from tests.k8s.reachable import Reachable
from tests.k8s.waiting import eventually

# -- what is created


def test_render_prints_byte_for_byte_what_submit_creates(
    ringps: Run, api: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "train.py"
    source.write_text("print('hello')\n")
    arguments = (
        *("--name", "same", *SMALL, *NO_CLASS, "--key-file", str(tmp_path / "job.key")),
        *("--file", str(source), "--env", "A=b", "train.py", "--lr", "1e3"),
    )
    assert ringps("render", *arguments) == 0
    rendered = ringps.out
    created: list[Mapping[str, Any]] = []
    create = Cluster.create

    def recording(self: Cluster, manifest: Mapping[str, Any], *, dry_run: bool = False, **rest: Any) -> Any:
        if not dry_run:
            created.append(json.loads(json.dumps(manifest)))
        return create(self, manifest, dry_run=dry_run, **rest)

    monkeypatch.setattr(Cluster, "create", recording)
    assert ringps("submit", "--no-wait", *arguments) == 0, ringps.err
    assert to_yaml(one for one in created if one["kind"] in KINDS) == rendered
    monkeypatch.undo()
    assert ringps("cancel", "same") == 0
    nothing_is_left(api, "same")
    file = tmp_path / "job.yaml"
    file.write_text(rendered)
    created.clear()
    monkeypatch.setattr(Cluster, "create", recording)
    assert ringps("submit", "--no-wait", "-f", str(file)) == 0, ringps.err
    assert to_yaml(one for one in created if one["kind"] in KINDS) == rendered


def test_all_other_objects_go_with_the_worker_job(ringps: Run, api: Cluster) -> None:
    submitted(ringps, "owned")
    there = objects(api, "owned")
    for kind in KINDS:
        assert any(one.startswith(f"{kind}/") for one in there), kind
    job = api.get("Job", "owned")
    for one in there:
        kind, _, name = one.partition("/")
        if kind == "Pod" or one == "Job/owned":
            continue
        (owner,) = api.get(kind, name)["metadata"]["ownerReferences"]
        assert owner["uid"] == job["metadata"]["uid"], one
    api.delete("Job", "owned")
    nothing_is_left(api, "owned")


def test_submit_says_the_next_commands_and_why_the_job_waits(ringps: Run, api: Cluster) -> None:
    code = ringps("submit", "--name", "waits", *SMALL, *NO_CLASS, "--wait", "2", "/app/train.py")
    assert code == 0, ringps.err
    for command in ("status", "logs -f", "suspend", "cancel"):
        assert f"ringps {command} waits -N {ringps.namespace}" in ringps.out
    assert "the coordinator does not run yet: " in ringps.err
    assert "node" in ringps.err


def test_the_key_is_in_the_secret_and_said_nowhere(ringps: Run, api: Cluster, tmp_path: Path) -> None:
    key = tmp_path / "job.key"
    submitted(ringps, "secret", "--key-file", str(key))
    secret = key.read_text().split()[-1]
    assert secret not in ringps.out + ringps.err
    for one in objects(api, "secret"):
        kind, _, name = one.partition("/")
        if kind != "Secret":
            assert secret not in json.dumps(api.get(kind, name)), one


# -- what is refused leaves nothing behind


def test_no_such_namespace(ringps: Run) -> None:
    ringps.refuses(
        "submit", "--name", "a", *SMALL, "x.py", words="there is no namespace nowhere", namespace="nowhere"
    )


def test_name_in_use(ringps: Run, api: Cluster) -> None:
    submitted(ringps, "taken")
    before = objects(api, "taken")
    line = ringps.refuses(
        "submit", "--name", "taken", *SMALL, *NO_CLASS, "x.py", words="there is a job taken"
    )
    assert f"ringps cancel taken -N {ringps.namespace}" in line
    assert set(before) <= set(objects(api, "taken"))


def test_a_name_of_something_else(ringps: Run, api: Cluster) -> None:
    api.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "theirs"}})
    words = "has a ServiceAccount theirs already, of something else: choose another --name"
    ringps.refuses("submit", "--name", "theirs", *SMALL, *NO_CLASS, "x.py", words=words)
    assert not objects(api, "theirs")
    api.get("ServiceAccount", "theirs")


def test_the_rest_of_an_earlier_job(ringps: Run, api: Cluster) -> None:
    left = {"name": "half-status", "labels": names.labels("half")}
    api.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": left})
    words = "has ConfigMap half-status of an earlier job half: remove it with `ringps cancel half"
    ringps.refuses("submit", "--name", "half", *SMALL, *NO_CLASS, "x.py", words=words)
    assert objects(api, "half") == ["ConfigMap/half-status"]
    assert ringps("cancel", "half") == 0, ringps.err
    nothing_is_left(api, "half")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--priority-class", "nope"), "there is no PriorityClass nope"),
        (("--runtime-class", "nope"), "there is no RuntimeClass nope"),
        (("--queue", "nope"), "Kueue is not installed in this cluster"),
        (("--volume", "nope:/data"), "there is no PersistentVolumeClaim nope in namespace"),
        (("--secret-env", "A=nope:key"), "there is no Secret nope in namespace"),
        (("--image-pull-secret", "nope"), "correct --image-pull-secret"),
        (("--gpus", "1", "--gpu-resource", "example.com/tpu"), "no node offers example.com/tpu"),
        (("--gang",), "--gang: this API server dropped the Job's field spec.scheduling"),
    ],
)
def test_what_the_cluster_does_not_have(
    ringps: Run, api: Cluster, options: tuple[str, ...], words: str
) -> None:
    ringps.refuses("submit", "--name", "bad", *SMALL, *NO_CLASS, *options, "x.py", words=words)
    assert not objects(api, "bad")


def test_without_the_coordinators_priority_class(ringps: Run, api: Cluster) -> None:
    wanted = ("--coordinator-priority-class", "nope")
    line = ringps.refuses("submit", "--name", "bad", *SMALL, *wanted, "x.py", words="no PriorityClass nope")
    assert "--coordinator-priority-class" in line
    assert not objects(api, "bad")


def test_a_secret_without_the_key(ringps: Run, api: Cluster) -> None:
    api.create(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"a": "hidden"}}
    )
    line = ringps.refuses(
        "submit",
        "--name",
        "bad",
        *SMALL,
        *NO_CLASS,
        "--secret-env",
        "A=s:b",
        "x.py",
        words="has no key b; it has: a",
    )
    assert "hidden" not in line


def test_what_is_not_checked_with_no_check(ringps: Run, api: Cluster) -> None:
    submitted(ringps, "later", "--no-check", "--gpus", "1", "--gpu-resource", "example.com/tpu")
    assert "Job/later" in objects(api, "later")


def quota(api: Cluster, **hard: str) -> None:
    api.create(
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "team"},
            "spec": {"hard": {name.replace("_", "."): value for name, value in hard.items()}},
        }
    )
    eventually(lambda: api.get("ResourceQuota", "team").get("status", {}).get("used"), "the quota is counted")


def test_more_workers_than_quota(ringps: Run, api: Cluster) -> None:
    quota(api, pods="2")
    words = "ResourceQuota team: the job needs 3 pods, and 2 of 2 are left"
    ringps.refuses("submit", "--name", "many", *SMALL, *NO_CLASS, "x.py", words=words)
    assert not objects(api, "many")


def test_a_quota_that_lasts_for_the_whole_job(ringps: Run, api: Cluster) -> None:
    quota(api, pods="3", requests_memory="2Gi")
    submitted(ringps, "fits")


def test_more_memory_than_quota(ringps: Run, api: Cluster) -> None:
    quota(api, limits_memory="600Mi")
    ringps.refuses("submit", "--name", "many", *SMALL, *NO_CLASS, "x.py", words="needs 0.75Gi limits.memory")
    assert not objects(api, "many")


def test_a_quota_on_what_our_pods_do_not_say(ringps: Run, api: Cluster) -> None:
    quota(api, limits_cpu="10")
    line = ringps.refuses(
        "submit", "--name", "many", *SMALL, *NO_CLASS, "x.py", words="must specify limits.cpu"
    )
    assert "would be refused" in line
    assert not objects(api, "many")


def test_a_pod_that_a_limit_range_forbids(ringps: Run, api: Cluster) -> None:
    limits = [{"type": "Container", "max": {"memory": "100Mi"}}]
    metadata = {"name": "small"}
    api.create({"apiVersion": "v1", "kind": "LimitRange", "metadata": metadata, "spec": {"limits": limits}})
    words = "maximum memory usage per Container is 100Mi"
    ringps.refuses("submit", "--name", "big", *SMALL, *NO_CLASS, "x.py", words=words)
    assert not objects(api, "big")


def test_a_refused_pod_is_seen_when_it_was_not_foreseen(ringps: Run, api: Cluster) -> None:
    quota(api, limits_cpu="10")
    arguments = ("submit", "--name", "blind", *SMALL, *NO_CLASS, "--no-check", "--wait", "30", "x.py")
    line = ringps.refuses(*arguments, words="are refused: ")
    assert "must specify limits.cpu" in line
    assert "what was created is removed again" in line
    nothing_is_left(api, "blind")


def test_no_rights(
    cluster: Reachable, namespace: str, api: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    ringps = Run(cluster.service_account(namespace, "few", rules), namespace, capfd)
    ringps.refuses("submit", "--name", "mine", *SMALL, "x.py", words="cannot create resource")
    assert not objects(api, "mine")


def test_the_rights_of_the_shipped_role_suffice(
    cluster: Reachable, namespace: str, api: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "k8s" / "base" / "user.yaml").read_text()
    (role,) = [one for one in from_yaml(text) if one["kind"] == "Role"]
    ringps = Run(cluster.service_account(namespace, "person", role["rules"]), namespace, capfd)
    submitted(ringps, "mine")
    assert "not checked, for lack of rights" not in ringps.err
    assert ringps("suspend", "mine") == 0, ringps.err
    assert ringps("resume", "mine") == 0, ringps.err
    assert ringps("cancel", "mine") == 0, ringps.err
    nothing_is_left(api, "mine")
    classes = ("--priority-class", "nobody-knows")
    words = "no PriorityClass with name nobody-knows was found"
    ringps.refuses("submit", "--name", "unseen", *SMALL, *NO_CLASS, *classes, "x.py", words=words)
    assert "ringps: not checked, for lack of rights: priority classes" in ringps.err
    nothing_is_left(api, "unseen")


def test_rights_that_end_half_way(
    cluster: Reachable, namespace: str, api: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every dry run passes; then a create is refused, as by a webhook. What was made before is removed."""
    ringps = Run(cluster.kubeconfig, namespace, capfd)
    with refusing_jobs(api, namespace):
        code = ringps("submit", "--name", "half", *SMALL, *NO_CLASS, "--no-wait", "x.py")
    assert code == 1
    assert "no Jobs today" in ringps.err
    nothing_is_left(api, "half")


@contextlib.contextmanager
def refusing_jobs(api: Cluster, namespace: str) -> Iterator[None]:
    create = Cluster.create

    def refuse(self: Cluster, manifest: Mapping[str, Any], *, dry_run: bool = False, **rest: Any) -> Any:
        if manifest["kind"] == "Job" and not dry_run:
            raise ClusterError("create Job: no Jobs today")
        return create(self, manifest, dry_run=dry_run, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cluster, "create", refuse)
        yield


def test_an_answer_that_is_lost_leaves_nothing_behind(ringps: Run, api: Cluster) -> None:
    """The Job is created, but we never hear of it."""
    create = Cluster.create

    def deaf(self: Cluster, manifest: Mapping[str, Any], *, dry_run: bool = False, **rest: Any) -> Any:
        created = create(self, manifest, dry_run=dry_run, **rest)
        if manifest["metadata"]["name"] == "lost" and manifest["kind"] == "Job" and not dry_run:
            raise UnreachableError("create Job: the answer is lost")
        return created

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cluster, "create", deaf)
        assert ringps("submit", "--name", "lost", *SMALL, *NO_CLASS, "--no-wait", "x.py") == 1
    assert "the answer is lost; what was created is removed again" in ringps.err
    nothing_is_left(api, "lost")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_waits(
    cluster: Reachable, api: Cluster, namespace: str, number: signal.Signals
) -> None:
    command = ["submit", "-N", namespace, "--name", "cut", *SMALL, *NO_CLASS, "--wait", "60", "x.py"]
    environ = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig)}
    with subprocess.Popen(
        [sys.executable, "-m", "ringps_launcher", *command],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert "job cut is created" in process.stdout.readline()
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "interrupted: what was created is removed again" in err
    assert "Traceback" not in err
    nothing_is_left(api, "cut")


def test_the_api_server_is_away(
    control_plane: ControlPlane, namespace: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ringps = Run(control_plane.kubeconfig, namespace, capfd)
    control_plane.stop_api()
    try:
        for command in (
            ("submit", "--name", "a", *SMALL, "x.py"),
            ("suspend", "a"),
            ("resume", "a"),
            ("cancel", "a"),
        ):
            ringps.refuses(*command, words="cannot be reached: ")
    finally:
        control_plane.start_api()


def test_the_api_server_goes_away_half_way(
    control_plane: ControlPlane, namespace: str, api: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    """It stops before the Jobs are created, and is back while we remove the rest."""
    ringps = Run(control_plane.kubeconfig, namespace, capfd)
    create, delete = Cluster.create, Cluster.delete
    refused: list[str] = []

    def stopping(self: Cluster, manifest: Mapping[str, Any], *, dry_run: bool = False, **rest: Any) -> Any:
        if manifest["kind"] == "Job" and not dry_run:
            control_plane.stop_api()
        return create(self, manifest, dry_run=dry_run, **rest)

    def starting(self: Cluster, kind: str, name: str, **rest: Any) -> None:
        try:
            delete(self, kind, name, **rest)
        except UnreachableError as error:
            refused.append(str(error))
            if len(refused) == 1:
                control_plane.start_api()
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cluster, "create", stopping)
        patch.setattr(Cluster, "delete", starting)
        assert ringps("submit", "--name", "gone", *SMALL, *NO_CLASS, "--no-wait", "x.py") == 1
    assert refused
    assert "cannot be reached" in ringps.err
    assert "what was created is removed again" in ringps.err
    nothing_is_left(api, "gone")


def test_what_could_not_be_removed_is_named(
    ringps: Run, api: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(self: Cluster, kind: str, name: str, **rest: Any) -> None:
        raise ClusterError("no deletions today")

    monkeypatch.setattr(Cluster, "delete", no)
    with refusing_jobs(api, ringps.namespace):
        assert ringps("submit", "--name", "stuck", *SMALL, *NO_CLASS, "--no-wait", "x.py") == 1
    assert "could not be removed all: " in ringps.err
    assert "Secret stuck-key" in ringps.err
    assert f"run `ringps cancel stuck -N {ringps.namespace}`" in ringps.err
    monkeypatch.undo()
    assert ringps("cancel", "stuck") == 0
    nothing_is_left(api, "stuck")


# -- on nodes that run pods

SERVES = """#!{python}
import signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
listener = socket.create_server(("0.0.0.0", 7117)) if sys.argv[1] == "coordinator" else None
signal.pause()
"""
ENDS = """#!{python}
import sys
sys.exit("ringps: no such option: --pod") if sys.argv[1] == "coordinator" else sys.exit(143)
"""


@pytest.fixture
def binaries() -> Iterator[Path]:
    """A directory that pods see, too: their /tmp is their own."""
    directory = Path(tempfile.mkdtemp(prefix="ringps-test-", dir="/var/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def an_image(directory: Path, program: str | None) -> Image:
    """An image in which the command `ringps` is this program, or missing."""
    if program is not None:
        command = directory / "ringps"
        command.write_text(program.format(python=sys.executable))
        command.chmod(0o755)
    return Image(path=(str(directory),))


def test_the_coordinator_runs(nodes: Fleet, ringps: Run, api: Cluster, binaries: Path) -> None:
    nodes.add("n1")
    nodes.images[IMAGE] = an_image(binaries, SERVES)
    assert ringps("submit", "--name", "runs", *SMALL, *NO_CLASS, "x.py") == 0, ringps.err
    assert "its coordinator runs" in ringps.out
    assert not ringps.err
    (coordinator,) = api.list("Pod", labels=names.selector("runs", names.COORDINATOR))
    assert coordinator["status"]["phase"] == "Running"
    assert ringps("suspend", "runs") == 0, ringps.err
    assert not api.list("Pod", labels=names.selector("runs", names.WORKER), fields="status.phase=Running")
    assert ringps("cancel", "runs") == 0, ringps.err
    assert not objects(api, "runs")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("registry.example/none:1", "the image registry.example/none:1 cannot be pulled (ErrImagePull"),
        ("Not A Name", "--image 'Not A Name' is no image's name"),
        ("bad:/name", "the image bad:/name cannot be pulled (InvalidImageName"),
    ],
)
def test_an_image_that_cannot_be_pulled(
    nodes: Fleet, ringps: Run, api: Cluster, image: str, words: str
) -> None:
    nodes.add("n1")
    given = (*SMALL[2:], "--image", image, *NO_CLASS)
    code = ringps("submit", "--name", "none", *given, "x.py")
    assert code == (2 if " " in image else 1)
    assert words.replace("ErrImagePull", "") in ringps.err.replace("ErrImagePull", "").replace(
        "ImagePullBackOff", ""
    )
    assert ringps.err.count("\n") == 1
    nothing_is_left(api, "none")


@pytest.mark.parametrize(
    ("program", "words"),
    [(None, "is ringps installed in the image ringps/test:1?"), (ENDS, "ringps: no such option: --pod")],
)
def test_an_image_that_is_of_no_use(
    nodes: Fleet, ringps: Run, api: Cluster, binaries: Path, program: str | None, words: str
) -> None:
    nodes.add("n1")
    nodes.images[IMAGE] = an_image(binaries, program)
    line = ringps.refuses("submit", "--name", "useless", *SMALL, *NO_CLASS, "x.py", words=words)
    assert "what was created is removed again" in line
    nothing_is_left(api, "useless")


def test_gpus(nodes: Fleet, ringps: Run, api: Cluster) -> None:
    nodes.add("n1", gpus=1)
    wrong = ("--gpus", "1", "--gpu-resource", "amd.com/gpu")
    words = "no node offers amd.com/gpu: they offer nvidia.com/gpu; correct --gpu-resource"
    ringps.refuses("submit", "--name", "gpus", *SMALL, *NO_CLASS, *wrong, "x.py", words=words)
    assert not objects(api, "gpus")
    submitted(ringps, "gpus", "--gpus", "1")
    assert "all nodes together have 1 nvidia.com/gpu, and the job asks for 2" in ringps.err


# -- files


def test_a_file_that_is_no_job(ringps: Run, api: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    ringps.refuses("submit", "-f", str(file), words=f"cannot read {file}")
    for text, words in (
        ("a: [", "this is not YAML"),
        ("", "there is no object in it"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n", "kind 'Pod', of which a job has none"),
    ):
        file.write_text(text)
        ringps.refuses("submit", "-f", str(file), words=words)


def test_a_file_of_another_namespace(ringps: Run, api: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    assert ringps("render", "--name", "a", *SMALL, "x.py", namespace="elsewhere") == 0
    file.write_text(ringps.out)
    ringps.refuses("submit", "-f", str(file), words="is a job in namespace elsewhere")


def test_a_changed_file_keeps_its_changes(ringps: Run, api: Cluster, tmp_path: Path) -> None:
    assert ringps("render", "--name", "edited", *SMALL, *NO_CLASS, "x.py") == 0
    changed = from_yaml(ringps.out)
    changed[-1]["spec"]["template"]["spec"]["containers"][0]["image"] = "another:2"
    with start_without_waiting(api, changed):
        job = api.get("Job", "edited")
        assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "another:2"


@contextlib.contextmanager
def start_without_waiting(api: Cluster, manifests: list[dict[str, Any]]) -> Iterator[None]:
    start(api, bundle(manifests), wait_s=0)
    yield
