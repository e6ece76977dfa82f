"""The Kubernetes commands' options: what they mean, and that a mistake is one line and exit code 2."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ringps_launcher.cli import _parser, main
from ringps_launcher.kubernetes.bundle import bundle
from ringps_launcher.kubernetes.options import job_spec
from ringps_launcher.kubernetes.spec import JobSpec, Toleration
from ringps_launcher.kubernetes.yaml import from_yaml

pytest.importorskip("kubernetes")

LEAST = ("--image", "i", "-n", "2")


@pytest.fixture(autouse=True)
def without_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-kubeconfig"))


def spec_of(*arguments: str) -> JobSpec:
    options = _parser().parse_args(["submit", *arguments])
    return job_spec(options, name="a", namespace="ns")


def mistake(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """What is said about it, in one line."""
    assert main(list(arguments)) == code
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith("ringps: ") and err.count("\n") == 1, err
    return err


def test_the_least() -> None:
    wanted = JobSpec(name="a", namespace="ns", image="i", workers=2, program="train.py")
    assert spec_of(*LEAST, "train.py") == wanted


def test_everything(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_bytes(b"print()\r\n")
    arguments = (
        *("--image", "i", "-n", "8", "--min-workers", "4", "-m", "--file", str(file), "--max-restarts", "3"),
        *("--transport", "nccl", "--encrypt-data", "--gpus", "1", "--gpu-resource", "amd.com/gpu"),
        *("--cpu", "4", "--memory", "8Gi", "--shm", "2Gi", "--checkpoint-dir", "/data/ckpt"),
        *("--volume", "claim:/data", "--volume", "other:/more", "--checkpoint-budget", "120"),
        *("--env", "A=b=c", "--env", "D=", "--secret-env", "E=secret:key", "--priority-class", "high"),
        *("--coordinator-priority-class", "", "--gang", "--scheduler", "mine", "--node-selector", "a.b/c=d"),
        *("--toleration", "k=v:NoExecute", "--toleration", "any", "--dead-node-s", "30"),
        *("--runtime-class", "nvidia", "--image-pull-policy", "Always", "--image-pull-secret", "pull"),
        *("--ttl", "3600", "--run-as-user", "1000", "train", "--lr", "-1", "-n", "--image"),
    )
    assert spec_of(*arguments) == JobSpec(
        name="a",
        namespace="ns",
        image="i",
        program="train",
        is_module=True,
        arguments=("--lr", "-1", "-n", "--image"),
        files=(("train.py", "print()\r\n"),),
        workers=8,
        min_workers=4,
        max_restarts=3,
        transport="nccl",
        encrypt_data=True,
        gpus=1,
        gpu_resource="amd.com/gpu",
        cpu="4",
        memory="8Gi",
        shm="2Gi",
        checkpoint_dir="/data/ckpt",
        volumes=(("claim", "/data"), ("other", "/more")),
        checkpoint_budget_s=120,
        env=(("A", "b=c"), ("D", "")),
        secret_env=(("E", "secret", "key"),),
        priority_class="high",
        coordinator_priority_class="",
        gang=True,
        scheduler="mine",
        node_selector=(("a.b/c", "d"),),
        tolerations=(Toleration(key="k", value="v", effect="NoExecute"), Toleration(key="any")),
        dead_node_s=30,
        runtime_class="nvidia",
        image_pull_policy="Always",
        image_pull_secret="pull",
        ttl_s=3600,
        run_as_user=1000,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "required: --image, -n/--workers, SCRIPT"),
        (("-n", "2", "x.py"), "required: --image"),
        (("--image", "i", "x.py"), "required: -n/--workers"),
        (LEAST, "required: SCRIPT"),
        (("--image", "i", "-n", "two", "x.py"), "invalid int value: 'two'"),
        (("--image", "i", "-n", "0", "x.py"), "-n must be from 1 to"),
        ((*LEAST, "--min-workers", "3", "x.py"), "--min-workers must be from 1 to the 2 of -n, not 3"),
        ((*LEAST, "--gpus", "2", "x.py"), "--gpus must be 0 or 1"),
        ((*LEAST, "--name", "A_b", "x.py"), "--name 'A_b'"),
        ((*LEAST, "-N", "A_b", "x.py"), "--namespace 'A_b'"),
        ((*LEAST, "--memory", "much", "x.py"), "--memory 'much' is no Kubernetes quantity"),
        ((*LEAST, "--env", "A", "x.py"), "argument --env: 'A' is not of the form K=V"),
        ((*LEAST, "--secret-env", "A=b", "x.py"), "not of the form K=SECRET:KEY"),
        ((*LEAST, "--volume", "claim", "x.py"), "not of the form CLAIM:PATH"),
        ((*LEAST, "--toleration", "a:Never", "x.py"), "argument --toleration: "),
        ((*LEAST, "--transport", "mpi", "x.py"), "invalid choice: 'mpi'"),
        ((*LEAST, "--file", "/no/such/file", "x.py"), "cannot read /no/such/file: No such file"),
        ((*LEAST, "--checkpoint-dir", "/ckpt", "x.py"), "is on no --volume"),
    ],
)
@pytest.mark.parametrize("command", ["submit", "render"])
def test_mistakes(
    capfd: pytest.CaptureFixture[str], command: str, arguments: tuple[str, ...], words: str
) -> None:
    said = mistake(capfd, command, *arguments)
    assert words in said
    assert f"see `ringps {command} --help`" in said


def test_an_option_that_does_not_exist(capfd: pytest.CaptureFixture[str]) -> None:
    assert "unrecognized arguments: --imag" in mistake(capfd, "submit", *LEAST, "--imag", "j", "x.py")


def test_a_file_that_is_no_text(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"\xff\xfe\x00")
    assert "is no text file; put it into the image" in mistake(
        capfd, "render", *LEAST, "--file", str(file), "x"
    )


@pytest.mark.parametrize(
    "others",
    [
        ("--image", "i"),
        ("-n", "2"),
        ("--gang",),
        ("--env", "A=b"),
        ("--name", "a"),
        ("--ttl", "0"),
        ("x.py",),
    ],
)
def test_a_manifest_is_the_whole_job(capfd: pytest.CaptureFixture[str], others: tuple[str, ...]) -> None:
    said = mistake(capfd, "submit", "-f", "job.yaml", *others)
    flag = {"-n": "--workers", "x.py": "SCRIPT"}.get(others[0], others[0])
    assert f"-f FILE is the whole job: leave {flag} out" in said


def test_a_manifest_needs_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    said = mistake(capfd, "submit", "-N", "ns", "--no-wait", "-f", "/no/such/job.yaml", code=1)
    assert "cannot read /no/such/job.yaml: No such file or directory" in said


@pytest.mark.parametrize("command", ["status", "logs", "suspend", "resume", "cancel"])
def test_commands_that_need_a_name(capfd: pytest.CaptureFixture[str], command: str) -> None:
    assert "required: NAME" in mistake(capfd, command)


def test_logs() -> None:
    options = _parser().parse_args(["logs", "-f", "--rank", "1", "--rank", "3", "--tail", "5", "a"])
    assert (options.ranks, options.follow, options.tail, options.since) == ([1, 3], True, 5, None)
    assert (options.previous, options.coordinator, options.name) == (False, False, "a")


# -- render


def rendered(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["render", *arguments]) == 0
    out, err = capfd.readouterr()
    assert not err
    return out


def test_render_needs_no_cluster_and_says_the_same_again(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = (*LEAST, "--name", "a", "--key-file", str(tmp_path / "key"), "train.py", "--lr", "0.1")
    first = rendered(capfd, *arguments)
    assert rendered(capfd, *arguments) == first
    job = bundle(from_yaml(first))
    assert (job.name, job.namespace, job.workers) == ("a", "default", 2)
    key = (tmp_path / "key").read_text()
    assert key.split()[-1] in first
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_each_render_has_a_key_and_a_name_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    one, other = (bundle(from_yaml(rendered(capfd, *LEAST, "my_train.py"))) for _ in range(2))
    assert one.name != other.name
    assert one.name.startswith("my-train-")
    assert one.manifests[0]["stringData"] != other.manifests[0]["stringData"]


def test_the_namespace_is_the_contexts(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text(
        "current-context: a\n"
        "clusters: [{name: c, cluster: {server: 'https://127.0.0.1:1'}}]\n"
        "users: [{name: u, user: {}}]\n"
        "contexts: [{name: a, context: {namespace: one, cluster: c, user: u}},"
        " {name: b, context: {namespace: two, cluster: c, user: u}}]\n"
    )
    monkeypatch.setenv("KUBECONFIG", str(config))
    for options, wanted in (((), "one"), (("--context", "b"), "two"), (("-N", "three"), "three")):
        text = rendered(capfd, *options, *LEAST, "x.py")
        assert bundle(from_yaml(text)).namespace == wanted
    assert "has no context 'c'" in mistake(capfd, "render", "--context", "c", *LEAST, "x.py", code=1)


def test_a_key_that_others_can_read(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    key = tmp_path / "key"
    rendered(capfd, *LEAST, "--key-file", str(key), "x.py")
    key.chmod(0o644)
    said = mistake(capfd, "render", *LEAST, "--key-file", str(key), "x.py", code=1)
    assert "can be read by other users" in said


# -- without the extra


@pytest.mark.parametrize("package", ["kubernetes", "yaml"])
@pytest.mark.parametrize(
    "command", [("render", *LEAST, "x.py"), ("submit", *LEAST, "x.py"), ("cancel", "a"), ("suspend", "a")]
)
def test_without_the_extra(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], package: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'ringps[kubernetes]'" in mistake(capfd, *command, code=1)


def test_other_commands_do_not_load_it() -> None:
    code = (
        "import sys, ringps_launcher.cli as cli\n"
        "cli._parser().parse_args(['run', '-n', '1', 'x.py'])\n"
        "sys.exit(any(name in sys.modules for name in ('kubernetes', 'yaml', 'zmq', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- files that are no job


def test_what_is_not_one_whole_job(capfd: pytest.CaptureFixture[str]) -> None:
    whole = from_yaml(rendered(capfd, *LEAST, "--name", "a", "x.py"))
    cases: list[tuple[Any, str]] = []

    def case(words: str, change: Any) -> None:
        manifests = copy.deepcopy(whole)
        cases.append((change(manifests) or manifests, words))

    case("and no other Job", lambda all_: all_[:-1])
    case("and no other Job", lambda all_: [*all_, all_[-1]])
    case("is there twice", lambda all_: [*all_[:1], *all_])
    case("has no labels", lambda all_: all_[0]["metadata"].pop("labels") and None)
    case("has no metadata.namespace", lambda all_: all_[0]["metadata"].pop("namespace") and None)
    case("is of namespace x", lambda all_: all_[0]["metadata"].update(namespace="x"))
    case("has not the labels of job a", lambda all_: all_[1]["metadata"].update(labels={}))
    case("is no whole Job", lambda all_: all_[-1].update(spec={}))
    case("is no whole Job", lambda all_: all_[-1]["spec"].update(template=[]))
    case("have not the labels", lambda all_: all_[-1]["spec"]["template"]["metadata"].update(labels={}))
    case("must be called a-coordinator", lambda all_: all_[-2]["metadata"].update(name="b"))
    case("kind 'Pod'", lambda all_: [*all_, {"kind": "Pod"}])
    case("kind None", lambda all_: [{}])
    case("lacks apiVersion", lambda all_: [{"kind": "Job", "metadata": []}])
    for manifests, words in cases:
        with pytest.raises(ValueError, match=words) as caught:
            bundle(manifests)
        assert "\n" not in str(caught.value)
    assert bundle(whole[::-1]).manifests[-1] == whole[-1]  # the worker Job is created last all the same
