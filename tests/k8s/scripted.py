"""Jobs of ours whose containers run a shell script in the place of `ringps`."""

from __future__ import annotations

from typing import Any

from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.resources import manifests
from ringps_launcher.kubernetes.spec import JobSpec
from tests.k8s.commands import IMAGE

SERVES = f"exec python3 -m http.server {names.CONTROL_PORT}"
"""A coordinator that is ready, as far as anybody can see from outside."""


def create(
    api: Cluster, name: str, script: str, *, workers: int = 2, coordinator: str = SERVES, **spec: Any
) -> None:
    """Create a job; in `script`, $JOB_COMPLETION_INDEX is the worker id."""
    asked = {
        "image": IMAGE,
        "cpu": "100m",
        "memory": "256Mi",
        "shm": "16Mi",
        "coordinator_priority_class": "",
        "checkpoint_budget_s": 1,
        **spec,
    }
    job = JobSpec(name=name, namespace=api.namespace, program="train.py", workers=workers, **asked)
    for manifest in manifests(job, "no key"):
        if manifest["kind"] == "Job":
            is_worker = manifest["metadata"]["name"] == name
            container = manifest["spec"]["template"]["spec"]["containers"][0]
            container["command"] = ["sh", "-c", script if is_worker else coordinator]
        api.create(manifest)
