"""The objects of a job on Kubernetes, what a job may be asked for, and quantities and YAML."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ringps_launcher.kubernetes import names, quantities
from ringps_launcher.kubernetes.resources import Manifest, manifests
from ringps_launcher.kubernetes.spec import MAX_FILES_BYTES, OWN_ENV, JobSpec, Toleration
from ringps_launcher.kubernetes.yaml import from_yaml, to_yaml
from tests.conftest import Golden

KEY = f"ringps-job-key-1\n{'p' * 40}\n{'s' * 40}\n"

SMALL = JobSpec(
    name="digits-abcd",
    namespace="ringps",
    image="registry.example/ringps:1",
    program="/app/examples/digits.py",
    workers=4,
)
FULL = JobSpec(
    name="gpt",
    namespace="research",
    image="registry.example/ringps:1",
    program="train.py",
    arguments=("--device", "cuda", "--name", "run $(POD_NAME) $$", "--lr", "1e3", ""),
    files=(("train.py", "import model\n\nmodel.train()\n"), ("model.py", "def train(): ...\n")),
    workers=8,
    min_workers=4,
    max_restarts=20,
    transport="nccl",
    encrypt_data=True,
    gpus=1,
    gpu_resource="nvidia.com/mig-3g.40gb",
    cpu="7500m",
    memory="64Gi",
    shm="16Gi",
    checkpoint_dir="/checkpoints/gpt",
    volumes=(("checkpoints", "/checkpoints"), ("corpus", "/data")),
    checkpoint_budget_s=300,
    env=(("RINGPS_OP_TIMEOUT_S", "60"), ("OMP_NUM_THREADS", "3"), ("PRICE", "5$")),
    secret_env=(("TOKEN", "hub", "token"),),
    priority_class="ringps-low",
    coordinator_priority_class="",
    gang=True,
    scheduler="ringps",
    node_selector=(("kubernetes.io/arch", "amd64"), ("gpu", "h200")),
    tolerations=(
        Toleration(key="dedicated", value="training", effect="NoExecute"),
        Toleration(key="nvidia.com/gpu", effect="NoSchedule"),
        Toleration(key="spot"),
    ),
    dead_node_s=30,
    runtime_class="nvidia",
    image_pull_policy="Always",
    image_pull_secret="registry",
    ttl_s=86_400,
    run_as_user=1000,
)
QUEUED = replace(SMALL, name="queued", queue="team", program="digits", is_module=True)
SPECS = pytest.mark.parametrize("spec", [SMALL, FULL, QUEUED], ids=lambda spec: spec.name)


def by_name(spec: JobSpec) -> dict[tuple[str, str], Manifest]:
    return {(found["kind"], found["metadata"]["name"]): found for found in manifests(spec, KEY)}


def worker_job(spec: JobSpec) -> Manifest:
    return by_name(spec)["Job", spec.name]["spec"]


def worker(spec: JobSpec) -> Manifest:
    return worker_job(spec)["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(("name", "spec"), [("small", SMALL), ("full", FULL), ("queued", QUEUED)])
def test_rendered_manifests(name: str, spec: JobSpec, golden: Golden) -> None:
    golden(f"kubernetes_{name}.yaml", to_yaml(manifests(spec, KEY)))


@SPECS
def test_rendering_is_deterministic_and_leaves_its_constants_alone(spec: JobSpec) -> None:
    first = to_yaml(manifests(spec, KEY))
    scribbled = manifests(spec, KEY)
    for found in scribbled:
        found["metadata"]["labels"].clear()
        if found["kind"] == "Job":
            found["spec"]["template"]["spec"]["containers"][0]["securityContext"].clear()
            found["spec"]["template"]["spec"]["containers"][0]["volumeMounts"].clear()
        found["metadata"]["ownerReferences"] = [{"name": "owner"}]
    assert to_yaml(manifests(spec, KEY)) == first


@SPECS
def test_every_object_and_pod_is_labelled_named_after_the_job_and_in_its_namespace(spec: JobSpec) -> None:
    for found in manifests(spec, KEY):
        metadata = found["metadata"]
        assert metadata["namespace"] == spec.namespace
        assert metadata["name"] == spec.name or metadata["name"].startswith(f"{spec.name}-")
        assert names.labels(spec.name).items() <= metadata["labels"].items()
        if found["kind"] == "Job":
            template = found["spec"]["template"]["metadata"]["labels"]
            assert template == names.labels(spec.name, metadata["labels"][names.COMPONENT_LABEL])


@SPECS
def test_only_the_secret_holds_the_key(spec: JobSpec) -> None:
    holders = [
        found["kind"]
        for found in manifests(spec, KEY)
        if any(part in json.dumps(found) for part in KEY.split()[1:])
    ]
    assert holders == ["Secret"]


@SPECS
def test_what_a_pod_needs_comes_before_it_and_the_workers_come_last(spec: JobSpec) -> None:
    kinds = [(found["kind"], found["metadata"]["name"]) for found in manifests(spec, KEY)]
    assert kinds[-2:] == [("Job", f"{spec.name}-coordinator"), ("Job", spec.name)]
    assert len(set(kinds)) == len(kinds)
    for found in manifests(spec, KEY)[-2:]:
        pod = found["spec"]["template"]["spec"]
        assert ("ServiceAccount", pod["serviceAccountName"]) in kinds
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        for volume in pod["volumes"]:
            if "secret" in volume:
                assert ("Secret", volume["secret"]["secretName"]) in kinds
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in kinds


@SPECS
def test_pods_ask_for_nothing_that_the_restricted_level_forbids(spec: JobSpec) -> None:
    for found in manifests(spec, KEY)[-2:]:
        pod = found["spec"]["template"]["spec"]
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == spec.run_as_user != 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()


def test_workers_hold_no_token_and_the_coordinator_only_its_rights() -> None:
    objects = by_name(SMALL)
    assert worker_job(SMALL)["template"]["spec"]["automountServiceAccountToken"] is False
    assert objects["ServiceAccount", SMALL.name]["automountServiceAccountToken"] is False
    bound = objects["RoleBinding", f"{SMALL.name}-coordinator"]["subjects"]
    assert [subject["name"] for subject in bound] == [f"{SMALL.name}-coordinator"]
    rules = objects["Role", f"{SMALL.name}-coordinator"]["rules"]
    unnamed = {rule["resources"][0] for rule in rules if "resourceNames" not in rule}
    assert unnamed == {"pods", "pods/status", "events"}, "what is known by name is granted by name"
    assert not any("*" in rule["verbs"] or "*" in rule["resources"] for rule in rules)


@pytest.mark.parametrize(
    ("code", "action"),
    [
        *((code, "Ignore") for code in (75, 134, 137, 139, 143, 255)),
        (70, "FailJob"),
        *((code, None) for code in (1, 2, 74, 126, 127)),
    ],
)
def test_what_an_exit_code_means_to_the_job(code: int, action: str | None) -> None:
    policy = worker_job(SMALL)["podFailurePolicy"]["rules"]
    assert policy[0] == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }, "a disruption is looked for before any exit code"
    matching = [rule["action"] for rule in policy[1:] if code in rule["onExitCodes"]["values"]]
    assert matching == ([] if action is None else [action])


def test_a_users_text_reaches_the_program_unchanged() -> None:
    command = worker(FULL)["command"]
    expanded = [text.replace("$$", "$") for text in command[-len(FULL.arguments) :]]
    assert expanded == list(FULL.arguments)
    assert "$(POD_NAME)" not in command[-len(FULL.arguments) :]
    assert {"name": "PRICE", "value": "5$$"} in worker(FULL)["env"]


def test_the_users_variables_replace_defaults() -> None:
    variables = [entry["name"] for entry in worker(FULL)["env"]]
    assert len(set(variables)) == len(variables)
    assert {"name": "OMP_NUM_THREADS", "value": "3"} in worker(FULL)["env"]
    assert {"name": "OMP_NUM_THREADS", "value": "1"} in worker(replace(SMALL, cpu="500m"))["env"]
    assert {"name": "OMP_NUM_THREADS", "value": "7"} in worker(replace(FULL, env=()))["env"]


def test_times_to_stop_leave_room_for_one_checkpoint() -> None:
    pod = worker_job(FULL)["template"]["spec"]
    grace = int(worker(FULL)["command"][worker(FULL)["command"].index("--grace") + 1])
    assert FULL.checkpoint_budget_s < grace < pod["terminationGracePeriodSeconds"]


def test_scripts_from_files_and_from_the_image() -> None:
    assert "/etc/ringps/code/train.py" in worker(FULL)["command"]
    assert "/app/examples/digits.py" in worker(SMALL)["command"]
    module = replace(FULL, is_module=True, program="train")
    assert worker(module)["command"][-len(FULL.arguments) - 2 :][:2] == ["-m", "train"]
    assert worker(module)["workingDir"] == "/etc/ringps/code", "where python -m looks for it"
    assert "workingDir" not in worker(QUEUED)


def test_only_a_queued_job_starts_suspended() -> None:
    assert worker_job(QUEUED)["suspend"] is True
    assert by_name(QUEUED)["Job", "queued"]["metadata"]["labels"][names.QUEUE_LABEL] == "team"
    coordinator = by_name(QUEUED)["Job", "queued-coordinator"]
    assert names.QUEUE_LABEL not in coordinator["metadata"]["labels"]
    assert "suspend" not in coordinator["spec"]
    assert worker_job(SMALL)["suspend"] is False


def test_gpu_workers_tolerate_the_taints_of_gpu_nodes_once() -> None:
    keys = [entry["key"] for entry in worker_job(FULL)["template"]["spec"]["tolerations"]]
    assert sorted(keys) == sorted(
        [
            *("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"),
            *("nvidia.com/gpu", "nvidia.com/mig-3g.40gb", "dedicated", "spot"),
        ]
    )
    keys = [entry["key"] for entry in worker_job(SMALL)["template"]["spec"]["tolerations"]]
    assert keys == ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"]


def test_the_coordinator_goes_where_its_image_runs_but_not_after_gpus() -> None:
    pod = by_name(FULL)["Job", "gpt-coordinator"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"kubernetes.io/arch": "amd64"}
    assert not any("nvidia" in resource for resource in pod["containers"][0]["resources"]["requests"])
    assert "runtimeClassName" not in pod
    assert "schedulerName" not in pod, "a second scheduler that is away must not hold up the coordinator"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": "Digits"}, "--name"),
        ({"name": "1st"}, "--name"),
        ({"name": "a-"}, "--name"),
        ({"name": "a" * 41}, "--name"),
        ({"namespace": "a.b"}, "--namespace"),
        ({"image": ""}, "--image"),
        ({"image": "a b"}, "--image"),
        ({"program": ""}, "script"),
        ({"program": "-x"}, "script"),
        ({"arguments": ("a\0b",)}, "arguments"),
        ({"arguments": ("\udcff",)}, "UTF-8"),
        ({"workers": 0}, "-n"),
        ({"workers": 1025}, "-n"),
        ({"min_workers": 0}, "--min-workers"),
        ({"min_workers": 5}, "--min-workers must be from 1 to the 4 of -n"),
        ({"max_restarts": -1}, "--max-restarts"),
        ({"transport": "pigeon"}, "--transport"),
        ({"gpus": 2}, "--gpus .* more workers"),
        ({"gpu_resource": "gpu"}, "--gpu-resource"),
        ({"cpu": "0"}, "--cpu"),
        ({"cpu": "1 core"}, "--cpu"),
        ({"memory": "2GiB"}, "--memory"),
        ({"memory": "1Gi"}, "--shm .* less than --memory"),
        ({"shm": "-1Gi"}, "--shm"),
        ({"checkpoint_budget_s": 0}, "--checkpoint-budget"),
        ({"checkpoint_dir": "ckpt"}, "--checkpoint-dir .* absolute"),
        ({"checkpoint_dir": "/ckpt"}, "--checkpoint-dir .* --volume"),
        ({"checkpoint_dir": "/ckpts", "volumes": (("c", "/ckpt"),)}, "--checkpoint-dir .* --volume"),
        ({"volumes": (("c", "ckpt"),)}, "--volume"),
        ({"volumes": (("c", "/a/../b"),)}, "--volume"),
        ({"volumes": (("c", "/tmp"),)}, "--volume"),
        ({"volumes": (("c", "/etc/ringps/key/x"),)}, "--volume"),
        ({"volumes": (("c", "/a"), ("d", "/a"))}, "--volume.* twice"),
        ({"volumes": (("C_", "/a"),)}, "--volume"),
        ({"files": (("a/b.py", ""),)}, "--file"),
        ({"files": (("..a", ""),)}, "--file"),
        ({"files": (("a.py", ""), ("a.py", ""))}, "--file.* twice"),
        ({"files": (("a.py", "x" * MAX_FILES_BYTES),)}, "--file.* ConfigMap"),
        ({"env": (("1A", ""),)}, "--env"),
        ({"env": (("A", ""), ("A", ""))}, "--env.* twice"),
        ({"env": (("A", "\0"),)}, "--env A"),
        ({"env": (("A", ""),), "secret_env": (("A", "s", "k"),)}, "twice"),
        ({"secret_env": (("A", "S!", "k"),)}, "--secret-env"),
        ({"secret_env": (("A", "s", "k/v"),)}, "--secret-env"),
        *(({"env": ((variable, ""),)}, f"--env {variable}") for variable in sorted(OWN_ENV)),
        ({"priority_class": "High"}, "--priority-class"),
        ({"queue": "team", "gang": True}, "--queue and --gang"),
        ({"queue": "a" * 64}, "--queue"),
        ({"scheduler": "a_b"}, "--scheduler"),
        ({"node_selector": (("a//b", ""),)}, "--node-selector"),
        ({"node_selector": (("a", "b c"),)}, "--node-selector"),
        ({"node_selector": (("a", "b"), ("a", "c"))}, "--node-selector.* twice"),
        ({"dead_node_s": -1}, "--dead-node-s"),
        ({"runtime_class": "A"}, "--runtime-class"),
        ({"image_pull_policy": "Sometimes"}, "--image-pull-policy"),
        ({"image_pull_secret": "a b"}, "--image-pull-secret"),
        ({"ttl_s": -1}, "--ttl"),
        ({"run_as_user": 0}, "--run-as-user"),
    ],
)
def test_what_a_job_must_not_ask_for(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        replace(SMALL, **changed)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_checkpoints_on_a_volume_or_at_a_url() -> None:
    replace(SMALL, checkpoint_dir="/ckpt", volumes=(("c", "/ckpt"),))
    replace(SMALL, checkpoint_dir="/ckpt/run", volumes=(("c", "/ckpt"),))
    replace(SMALL, checkpoint_dir="s3://bucket/run")


def test_every_setting_shows_in_what_is_rendered() -> None:
    """An option that is taken and then forgotten would be silently worse than none."""
    base = replace(FULL, queue="", gang=False, is_module=False)
    changes = {
        "name": "other",
        "namespace": "other",
        "image": "other",
        "program": "model.py",
        "is_module": True,
        "arguments": ("other",),
        "files": (("train.py", "other"),),
        "workers": 9,
        "min_workers": 5,
        "max_restarts": 21,
        "transport": "tcp",
        "encrypt_data": False,
        "gpus": 0,
        "gpu_resource": "amd.com/gpu",
        "cpu": "8",
        "memory": "65Gi",
        "shm": "17Gi",
        "checkpoint_dir": "/data/ckpt",
        "volumes": (("other", "/checkpoints"),),
        "checkpoint_budget_s": 301,
        "env": (),
        "secret_env": (),
        "priority_class": "other",
        "coordinator_priority_class": "other",
        "queue": "other",
        "gang": True,
        "scheduler": "other",
        "node_selector": (),
        "tolerations": (),
        "dead_node_s": 31,
        "runtime_class": "other",
        "image_pull_policy": "Never",
        "image_pull_secret": "other",
        "ttl_s": 1,
        "run_as_user": 1001,
    }
    assert changes.keys() == {entry.name for entry in fields(JobSpec)}
    before = to_yaml(manifests(base, KEY))
    unseen = [name for name, value in changes.items() if render_with(base, name, value) == before]
    assert not unseen


def render_with(base: JobSpec, name: str, value: Any) -> str:
    return to_yaml(manifests(replace(base, **{name: value}), KEY))


@pytest.mark.parametrize(
    ("text", "toleration"),
    [
        ("a", Toleration(key="a")),
        ("a=b", Toleration(key="a", value="b")),
        ("a=", Toleration(key="a", value="")),
        ("x.io/a:NoSchedule", Toleration(key="x.io/a", effect="NoSchedule")),
        ("a=b:NoExecute", Toleration(key="a", value="b", effect="NoExecute")),
    ],
)
def test_tolerations(text: str, toleration: Toleration) -> None:
    assert Toleration.parse(text) == toleration


@pytest.mark.parametrize("text", ["", "=b", "a:", "a:Never", "a b", "a=b=c", "a:NoSchedule:x"])
def test_no_tolerations(text: str) -> None:
    with pytest.raises(ValueError, match="--toleration"):
        Toleration.parse(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("500m", Fraction(1, 2)),
        ("1.5", Fraction(3, 2)),
        (".5", Fraction(1, 2)),
        ("2Gi", 2 * 1024**3),
        ("2G", 2 * 1000**3),
        ("1k", 1000),
        ("1Ki", 1024),
        ("1e3", 1000),
        ("1E3", 1000),
        ("1E", 10**18),
        ("12e-1", Fraction(6, 5)),
        ("100n", Fraction(1, 10**7)),
        ("7u", Fraction(7, 10**6)),
        ("-1", -1),
        ("0.1Ei", Fraction(1024**6, 10)),
    ],
)
def test_quantities(text: str, value: Fraction | int) -> None:
    assert quantities.parse(text) == value


@pytest.mark.parametrize(
    "text", ["", "Gi", "1 Gi", "1K", "1gi", "1GiB", "1e", "1e3Gi", "0x1", "nan", "1_0", "1e99999", "१"]
)
def test_no_quantities(text: str) -> None:
    with pytest.raises(ValueError, match="no Kubernetes quantity"):
        quantities.parse(text)


@given(st.fractions(min_value=0, max_value=10**6), st.sampled_from(["", "m", "Ki", "Gi", "k", "T"]))
def test_quantities_scale(value: Fraction, suffix: str) -> None:
    text = f"{float(value):.3f}"
    assert quantities.parse(text + suffix) == Fraction(text) * quantities.parse(f"1{suffix}")


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text()),
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    )
)
@example("a\n b\n")
@example(" a\nb")
@example("\n\n")
@example("a\r\nb")
@example("a\x85b\n")
@example("# a\n- b: c\n")
def test_yaml_gives_back_what_was_written(value: Any) -> None:
    assert from_yaml(to_yaml([{"value": value}])) == [{"value": value}]


@pytest.mark.parametrize(
    "text", ["1e3", "y", "NO", "off", "0o14", "1_000", "2001-01-01", "~", ".inf", "0x1f", "null", "12:30:45"]
)
def test_text_that_looks_like_something_else_is_quoted(text: str) -> None:
    assert to_yaml([{"value": text}]) == f'---\nvalue: "{text}"\n'


def test_files_stay_readable() -> None:
    rendered = to_yaml(manifests(FULL, KEY))
    assert "  train.py: |\n    import model\n\n    model.train()\n" in rendered


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "not YAML in line 1"), ("- a", "document 1"), ("x", "1")]
)
def test_what_is_no_manifest(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        from_yaml(text)
    assert "\n" not in str(caught.value)


def test_yaml_builds_no_objects() -> None:
    with pytest.raises(ValueError, match="not YAML"):
        from_yaml("a: !!python/object/apply:os.getcwd []")
    assert yaml.SafeDumper in to_yaml.__globals__["_Dumper"].__mro__


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("train.py", "train-abcd"),
        ("/app/My_Train.v2.py", "v2-abcd"),
        ("package.module", "module-abcd"),
        ("3d.py", "job-3d-abcd"),
        ("...", "job-abcd"),
        ("a" * 100, f"{'a' * 35}-abcd"),
        ("examples/ü.py", "job-abcd"),
    ],
)
def test_default_names(program: str, name: str) -> None:
    assert names.name_from(program, "abcd") == name
    names.check_name(name)


@given(st.text())
def test_default_names_are_always_good(program: str) -> None:
    names.check_name(names.name_from(program, "abcd"))


def test_pods_have_the_longest_names_that_fit() -> None:
    longest = replace(SMALL, name="a" * names.MAX_NAME, workers=1024)
    for found in manifests(longest, KEY):
        assert len(found["metadata"]["name"]) <= 63
    assert len(f"{longest.name}-{longest.workers - 1}") <= 63
    assert len(f"{names.coordinator(longest.name)}-abcde") <= 63
