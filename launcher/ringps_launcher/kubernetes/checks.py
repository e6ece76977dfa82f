"""Checks of what a job's objects need: the API server, our rights, admission. All by dry runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.bundle import KINDS
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import ExistsError, ForbiddenError, InvalidError, NotFoundError
from ringps_launcher.kubernetes.fields import label, mapping, mappings, name_of, text
from ringps_launcher.kubernetes.findings import FAIL, OK, UNSEEN, WARN, Finding
from ringps_launcher.kubernetes.resources import Manifest, manifests
from ringps_launcher.kubernetes.spec import JobSpec

OLDEST, STABLE = (1, 29), (1, 31)
"""Minor versions: podReplacementPolicy of Jobs is on by default, and podFailurePolicy is stable."""

_JOB = "ringps-doctor"
_LEVEL_LABEL = "pod-security.kubernetes.io/enforce"
_PRIORITY_CLASSES = ("ringps-coordinator", "ringps-high", "ringps-low")
_BASE = "kubectl apply -k k8s/base"

_RIGHTS: tuple[tuple[str, str, str, str], ...] = (
    *(("create", kind, "", "submit") for kind in KINDS),
    *(("delete", kind, "", "cancel") for kind in KINDS),
    ("patch", "Job", "", "suspend and resume"),
    ("list", "Job", "", "ls"),
    ("list", "ConfigMap", "", "ls"),
    *((verb, "Pod", "", "status and logs") for verb in ("list", "watch")),
    ("get", "Pod", "log", "logs"),
    ("list", "Event", "", "status"),
)
"""Verb, kind, subresource, and the command that needs it."""


@dataclass(frozen=True, kw_only=True)
class Patient:
    """What is checked, and for which jobs."""

    cluster: Cluster
    gpu_resource: str
    queue: str
    """LocalQueue of Kueue that jobs are to use; may be empty."""
    now: float
    """Seconds since 1970."""

    @property
    def namespace(self) -> str:
        return self.cluster.namespace

    def job(self, *, gang: bool = False) -> list[Manifest]:
        """A small job's objects. They are for dry runs only: their key is none."""
        spec = JobSpec(
            name=_JOB,
            namespace=self.namespace,
            image=_JOB,
            program="train.py",
            workers=2,
            gang=gang,
            coordinator_priority_class="",
        )
        return manifests(spec, "")


def api_server(patient: Patient) -> Iterator[Finding]:
    """Whether it answers, and is new enough."""
    version = patient.cluster.raw("/version")
    git = str(version.get("gitVersion") or "?")
    found = re.match(r"v(\d+)\.(\d+)", git)
    words = f"{git} at {patient.cluster.server}, namespace {patient.namespace}"
    if found is None:
        yield Finding(WARN, f"{words}: this is no version that ringps knows")
    elif (present := (int(found[1]), int(found[2]))) < OLDEST:
        yield Finding(FAIL, words, "Jobs need podReplacementPolicy: at least Kubernetes 1.29, better 1.31")
    elif present < STABLE:
        yield Finding(WARN, words, "podFailurePolicy of Jobs is stable from 1.31 on")
    else:
        yield Finding(OK, words)


def rights(patient: Patient) -> Iterator[Finding]:
    """What the commands need."""
    missing: dict[str, list[str]] = {}
    for verb, kind, subresource, command in _RIGHTS:
        allowed, _ = patient.cluster.can_i(verb, kind, subresource=subresource)
        if not allowed:
            missing.setdefault(command, []).append(f"{verb} {kind}{f'/{subresource}' if subresource else ''}")
    if not missing:
        yield Finding(OK, f"all that the commands need in namespace {patient.namespace}")
    for command, needed in missing.items():
        yield Finding(
            FAIL if command == "submit" else WARN,
            f"ringps {command} is not possible: you may not {', '.join(dict.fromkeys(needed))}",
            "ask the administrator to bind you to Role ringps-user of k8s/base in this namespace",
        )


def objects(patient: Patient) -> Iterator[Finding]:
    """Whether the API server takes a job's objects, which it is not to store."""
    refused: list[Finding] = []
    manifests = patient.job()
    for manifest in manifests:
        kind = manifest["kind"]
        try:
            patient.cluster.create(manifest, dry_run=True)
        except ExistsError:
            pass  # somebody's job is called so: then it was taken before
        except NotFoundError as error:
            if f'namespaces "{patient.namespace}"' in str(error):
                yield _no_namespace(patient)
                return
            # Its Role is not there, since it was not stored; what it gives away was judged with the Role.
            if kind != "RoleBinding":
                refused.append(Finding(FAIL, str(error)))
        except (ForbiddenError, InvalidError) as error:
            refused.append(Finding(FAIL, f"{kind} {name_of(manifest)} is refused: {error}"))
    yield from refused or [Finding(OK, f"the {len(manifests)} objects of a job are accepted (dry run)")]


def pods(patient: Patient) -> Iterator[Finding]:
    """Whether a job's pods pass what judges pods: Pod Security, limit ranges, webhooks, quota."""
    level = _level(patient)
    for manifest in patient.job():
        if manifest["kind"] == "Job":
            yield _pod(patient, manifest, level)


def _pod(patient: Patient, job: Manifest, level: str) -> Finding:
    component = label(job, names.COMPONENT_LABEL)
    template = job["spec"]["template"]
    # Its own account is not there; the namespace's default one always is.
    spec = {**template["spec"], "serviceAccountName": "default"}
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "name": f"{_JOB}-{component}", "namespace": patient.namespace},
        "spec": spec,
    }
    try:
        taken = patient.cluster.create(pod, dry_run=True)
    except NotFoundError:
        return _no_namespace(patient)
    except (ForbiddenError, InvalidError) as error:
        said = str(error)
        if " cannot create resource " in said:
            return _judged_by_level(component, level)
        full = "exceeded quota" in said
        return Finding(WARN if full else FAIL, f"a {component} pod is refused: {said.split(': ', 1)[-1]}")
    gates = [text(gate, "name") for gate in mappings(taken, "spec", "schedulingGates")]
    if gates:
        return Finding(
            WARN, f"{component} pods get scheduling gates ({', '.join(gates)}): somebody must lift them"
        )
    if component == names.WORKER and not _has_shared_memory(taken):
        return Finding(
            WARN,
            "worker pods are accepted, but not with their /dev/shm in memory",
            "see which webhook changes them; the transport shm needs it",
        )
    extra = " with /dev/shm in memory" if component == names.WORKER else ""
    return Finding(
        OK, f"a {component} pod is accepted{extra} (dry run; Pod Security level: {level or 'not known'})"
    )


def _judged_by_level(component: str, level: str) -> Finding:
    if level in ("restricted", "baseline", "privileged"):
        return Finding(
            OK,
            f"{component} pods keep to Pod Security level restricted, and the namespace demands {level} "
            "(you may not create pods, so there was no dry run)",
        )
    return Finding(
        UNSEEN, f"whether {component} pods are accepted: you may neither create pods nor see why not"
    )


def _level(patient: Patient) -> str:
    """The Pod Security level that the namespace demands; "" if it cannot be seen."""
    try:
        namespace = patient.cluster.get("Namespace", patient.namespace)
    except (ForbiddenError, NotFoundError):
        return ""
    return label(namespace, _LEVEL_LABEL) or "privileged"


def _has_shared_memory(pod: Manifest) -> bool:
    return any(
        mapping(volume, "emptyDir").get("medium") == "Memory" for volume in mappings(pod, "spec", "volumes")
    )


def gang(patient: Patient) -> Iterator[Finding]:
    """Whether the API server keeps the Job's gang field, or drops it without a word."""
    wanted = patient.job(gang=True)[-1]
    wanted["metadata"]["name"] = f"{_JOB}-gang"
    try:
        kept = patient.cluster.create(wanted, dry_run=True)
    except NotFoundError:
        return
    if mapping(kept, "spec", "scheduling"):
        yield Finding(OK, "the Job's own gang field is kept: --gang can be used")
    else:
        yield Finding(
            OK,
            "the Job's own gang field (alpha, from Kubernetes 1.37 on) is dropped: leave --gang out",
            "to start all or none: Kueue (--queue), or feature gates GenericWorkload and WorkloadWithJob",
        )


def priority_classes(patient: Patient) -> Iterator[Finding]:
    """Whether those are there that k8s/base makes."""
    there, missing = [], []
    for name in _PRIORITY_CLASSES:
        try:
            patient.cluster.get("PriorityClass", name)
            there.append(name)
        except NotFoundError:
            missing.append(name)
    if there:
        yield Finding(OK, ", ".join(there))
    if _PRIORITY_CLASSES[0] in missing:
        yield Finding(
            FAIL,
            f"there is no PriorityClass {_PRIORITY_CLASSES[0]}, which coordinators have by default",
            f"{_BASE}, or submit with --coordinator-priority-class ''",
        )
    if rest := [name for name in missing if name != _PRIORITY_CLASSES[0]]:
        yield Finding(WARN, f"there is no PriorityClass {' and no '.join(rest)}", _BASE)


def node_reader(patient: Patient) -> Iterator[Finding]:
    """Whether coordinators of this namespace may look at nodes."""
    namespace = patient.namespace
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": f"system:serviceaccount:{namespace}:{names.coordinator(_JOB)}",
            "groups": [
                "system:serviceaccounts",
                f"system:serviceaccounts:{namespace}",
                "system:authenticated",
            ],
            "resourceAttributes": {"verb": "get", "resource": "nodes"},
        },
    }
    answer = patient.cluster.request(
        "POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", body=review
    )
    if mapping(answer, "status").get("allowed") is True:
        yield Finding(OK, f"coordinators in namespace {namespace} may look at nodes")
    else:
        yield Finding(
            WARN,
            f"coordinators in namespace {namespace} may not look at nodes: rings are not ordered by "
            "rack, and pods on dead nodes are given up later",
            f"bind ClusterRole ringps-node-reader of k8s/base to group system:serviceaccounts:{namespace}",
        )


def _no_namespace(patient: Patient) -> Finding:
    return Finding(
        FAIL,
        f"there is no namespace {patient.namespace}",
        f"kubectl create namespace {patient.namespace}, or {_BASE} and -N ringps",
    )
