"""PURE: the objects of one job, checked to be one whole job of ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ringps_launcher.kubernetes import names

Object = Mapping[str, Any]

KINDS = (
    "Secret",
    "ConfigMap",
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "Lease",
    "NetworkPolicy",
    "Service",
    "Job",
)
"""The kinds of objects that a job is made of."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """All objects of a job, in the order in which they are created."""

    name: str
    """The job's name."""

    namespace: str
    """Where all of them live."""

    manifests: tuple[Object, ...]
    """The worker Job is the last."""

    @property
    def worker_job(self) -> Object:
        """The Indexed Job of the workers."""
        return self.manifests[-1]

    @property
    def workers(self) -> int:
        """How many workers there are to be."""
        return int(self.worker_job["spec"]["parallelism"])

    def jobs(self) -> Iterator[Object]:
        """Both Jobs."""
        return (manifest for manifest in self.manifests if manifest["kind"] == "Job")


def bundle(manifests: Iterable[Object]) -> Bundle:
    """The job that these objects make up.

    Raises:
        ValueError: they are not one whole job, as `ringps render` prints it.
    """
    found = list(manifests)
    if not found:
        raise ValueError("there is no object in it")
    for number, manifest in enumerate(found, 1):
        _check_object(number, manifest)
    jobs = {_component(manifest): manifest for manifest in found if manifest["kind"] == "Job"}
    if set(jobs) != {names.WORKER, names.COORDINATOR} or sum(one["kind"] == "Job" for one in found) != 2:
        raise ValueError(
            "it must hold the Job of the workers and the Job of the coordinator, and no other Job"
        )
    worker_job = jobs[names.WORKER]
    name, namespace = worker_job["metadata"]["name"], worker_job["metadata"]["namespace"]
    names.check_name(name)
    _check_together(found, name, namespace)
    _check_jobs(worker_job, jobs[names.COORDINATOR], name)
    others = [manifest for manifest in found if manifest is not worker_job]
    return Bundle(name=name, namespace=namespace, manifests=(*others, worker_job))


def _check_object(number: int, manifest: Object) -> None:
    kind, metadata = manifest.get("kind"), manifest.get("metadata")
    if kind not in KINDS:
        raise ValueError(f"object {number} is of kind {kind!r}, of which a job has none")
    if not isinstance(manifest.get("apiVersion"), str) or not isinstance(metadata, Mapping):
        raise ValueError(f"object {number} ({kind}) lacks apiVersion or metadata")
    for field in ("name", "namespace"):
        if not isinstance(metadata.get(field), str) or not metadata[field]:
            raise ValueError(f"object {number} ({kind}) has no metadata.{field}")
    if not isinstance(metadata.get("labels"), Mapping):
        raise ValueError(f"object {number} ({kind} {metadata['name']}) has no labels")


def _check_together(manifests: list[Object], name: str, namespace: str) -> None:
    seen: set[tuple[str, str]] = set()
    for manifest in manifests:
        metadata = manifest["metadata"]
        called = f"{manifest['kind']} {metadata['name']}"
        if metadata["namespace"] != namespace:
            raise ValueError(f"{called} is of namespace {metadata['namespace']}, the workers of {namespace}")
        wanted = names.labels(name)
        if any(metadata["labels"].get(label) != value for label, value in wanted.items()):
            raise ValueError(f"{called} has not the labels of job {name}: it could not be found again")
        identity = (manifest["kind"], metadata["name"])
        if identity in seen:
            raise ValueError(f"{called} is there twice")
        seen.add(identity)


def _check_jobs(worker_job: Object, coordinator_job: Object, name: str) -> None:
    if coordinator_job["metadata"]["name"] != names.coordinator(name):
        raise ValueError(f"the coordinator's Job must be called {names.coordinator(name)}")
    for job in (worker_job, coordinator_job):
        called = f"Job {job['metadata']['name']}"
        try:
            labels, spec = job["spec"]["template"]["metadata"]["labels"], job["spec"]["template"]["spec"]
            workers, containers = job["spec"]["parallelism"], spec["containers"]
            whole = isinstance(workers, int) and all(isinstance(one, Mapping) for one in containers)
        except (KeyError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"{called} is no whole Job: it lacks parallelism, or its pods their containers")
        if labels.get(names.INSTANCE_LABEL) != name or labels.get(names.COMPONENT_LABEL) != _component(job):
            raise ValueError(f"the pods of {called} have not the labels of job {name}")


def _component(manifest: Object) -> str:
    return str(manifest["metadata"]["labels"].get(names.COMPONENT_LABEL))
