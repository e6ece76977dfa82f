"""The files in `k8s/` that are made from others, or are only read elsewhere."""

from __future__ import annotations

import argparse
import fnmatch
import re
import shlex
from pathlib import Path

import pytest
import yaml

from ringps_launcher.kubernetes import options
from ringps_launcher.kubernetes.resources import manifests
from ringps_launcher.kubernetes.spec import JobSpec
from ringps_launcher.kubernetes.yaml import to_yaml

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "k8s/examples"
NO_KEY = "no key: `ringps submit` makes one\n"
COMMANDS = re.findall(r"```\nringps (render .*?)```", (EXAMPLES / "README.md").read_text(), re.DOTALL)


def spec_of(command: str) -> JobSpec:
    parser = argparse.ArgumentParser()
    options.add_commands(parser.add_subparsers())
    parsed = parser.parse_args(shlex.split(command))
    return options.job_spec(parsed, name=parsed.name, namespace=parsed.namespace)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[4])
def test_examples_are_what_their_commands_print(
    command: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    spec = spec_of(command)
    path = EXAMPLES / f"{spec.name}.yaml"
    rendered = to_yaml(manifests(spec, NO_KEY))
    if request.config.getoption("--regenerate"):
        path.write_text(rendered)
    assert path.read_text() == rendered, f"{path} differs from its command; if that is meant, --regenerate it"


def test_every_example_has_its_command() -> None:
    made = {path.stem for path in EXAMPLES.glob("*.yaml")} - {"claim", "queue"}
    assert made == {command.split()[4] for command in COMMANDS}


def test_examples_use_what_is_shipped() -> None:
    classes = yaml.safe_load_all((ROOT / "k8s/base/priority-classes.yaml").read_text())
    shipped = {found["metadata"]["name"] for found in classes}
    config = yaml.safe_load((ROOT / "k8s/scheduler/scheduler-config.yaml").read_text())
    profiles = {profile["schedulerName"] for profile in config["profiles"]}
    claim = yaml.safe_load((EXAMPLES / "claim.yaml").read_text())
    queues = {
        found["metadata"]["name"] for found in yaml.safe_load_all((EXAMPLES / "queue.yaml").read_text())
    }
    for command in COMMANDS:
        spec = spec_of(command)
        assert {spec.priority_class, spec.coordinator_priority_class} <= shipped | {""}
        assert spec.scheduler in profiles | {""}
        assert spec.queue in queues | {""}
        assert {volume for volume, _ in spec.volumes} <= {claim["metadata"]["name"]}
        if spec.program.startswith("/app/"):
            assert (ROOT / spec.program.removeprefix("/app/")).is_file()


def test_users_hold_every_right_that_they_hand_to_a_coordinator() -> None:
    """The API server refuses a Role with rights that its maker lacks."""
    documents = yaml.safe_load_all((ROOT / "k8s/base/user.yaml").read_text())
    users = next(found for found in documents if found["kind"] == "Role")["rules"]
    for found in manifests(spec_of(COMMANDS[0]), NO_KEY):
        if found["kind"] != "Role":
            continue
        for rule in found["rules"]:
            held = {
                verb
                for mine in users
                if set(rule["apiGroups"]) <= set(mine["apiGroups"])
                and set(rule["resources"]) <= set(mine["resources"])
                for verb in mine["verbs"]
            }
            assert set(rule["verbs"]) <= held, rule


def test_the_image_is_made_of_what_the_build_context_lets_through() -> None:
    dockerfile = (ROOT / "k8s/Dockerfile").read_text()
    ignored = (ROOT / "k8s/Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--)(.*)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    assert "*" in ignored and any(fnmatch.fnmatch("a/job.key", line) for line in ignored)


def test_the_image_has_the_user_that_pods_run_as() -> None:
    dockerfile = (ROOT / "k8s/Dockerfile").read_text()
    user = spec_of(COMMANDS[0]).run_as_user
    assert re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE) == [f"{user}:{user}"]
    assert f"useradd --uid {user}" in dockerfile
