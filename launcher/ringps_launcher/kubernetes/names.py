"""PURE: how the objects of a job are called, labelled and reached.

Everything that a command or the operator looks up by name or label comes from here.
"""

from __future__ import annotations

import re

MAX_NAME = 40
"""Characters of a job's name: what the Job controller appends to it still fits into a DNS label (63)."""

NAME_LABEL = "app.kubernetes.io/name"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
INSTANCE_LABEL = "app.kubernetes.io/instance"
COMPONENT_LABEL = "app.kubernetes.io/component"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""Names the Kueue LocalQueue that admits the worker Job."""

IGNORED_FAILURES_ANNOTATION = "batch.kubernetes.io/job-index-ignored-failure-count"
"""Of a pod: how many before it of its index ended in ways that the failure policy ignores. The Job controller
sets it, and goes by it when it waits before it makes the next one."""

TRACKING_FINALIZER = "batch.kubernetes.io/job-tracking"
"""Of a pod: the Job controller has yet to count its end or, with a limit per index, to make its successor."""

INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
"""Set by the Job controller on every pod of an Indexed Job, as annotation and as label: the worker id."""

WORKERS_ANNOTATION = "ringps.dev/workers"
MIN_WORKERS_ANNOTATION = "ringps.dev/min-workers"

APPLICATION = "ringps"
WORKER = "worker"
COORDINATOR = "coordinator"
"""Components, and the names of their containers."""

CONTROL_PORT = 7117
HEARTBEAT_PORT = 7118
CONTROL_PORT_NAME = "control"
HEARTBEAT_PORT_NAME = "heartbeat"

KEY_ENTRY = "job.key"
"""The Secret's only entry: the key file's text."""
STATUS_ENTRY = "status.json"
VERDICT_ENTRY = "verdict"
"""Entries of the status ConfigMap."""

KEY_DIR = "/etc/ringps/key"
KEY_FILE = f"{KEY_DIR}/{KEY_ENTRY}"
CODE_DIR = "/etc/ringps/code"

DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""A DNS label as Services before Kubernetes 1.37 demand it: it begins with a letter (RFC 1035)."""


def coordinator(name: str) -> str:
    """The coordinator's Job, Service, ServiceAccount, Role, RoleBinding and Lease."""
    return f"{name}-coordinator"


def key_secret(name: str) -> str:
    """The Secret with the job key."""
    return f"{name}-key"


def status_map(name: str) -> str:
    """The ConfigMap that the coordinator writes."""
    return f"{name}-status"


def code_map(name: str) -> str:
    """The ConfigMap with the user's local files."""
    return f"{name}-code"


def labels(name: str, component: str | None = None) -> dict[str, str]:
    """What every object of the job bears; with its component where it is of one."""
    common = {NAME_LABEL: APPLICATION, MANAGED_BY_LABEL: APPLICATION, INSTANCE_LABEL: name}
    return common if component is None else {**common, COMPONENT_LABEL: component}


def selector(name: str | None = None, component: str | None = None) -> str:
    """A label selector for the objects of job `name` (None: of all jobs), or those of one component."""
    wanted = {NAME_LABEL: APPLICATION}
    if name is not None:
        wanted[INSTANCE_LABEL] = name
    if component is not None:
        wanted[COMPONENT_LABEL] = component
    return ",".join(f"{key}={value}" for key, value in wanted.items())


def coordinator_address(name: str, namespace: str) -> str:
    """`HOST:PORT` that workers join."""
    return f"{coordinator(name)}.{namespace}.svc:{CONTROL_PORT}"


def worker_host(name: str, namespace: str, worker_id: int) -> str:
    """The DNS name of a worker, which its successors bear too."""
    return f"{name}-{worker_id}.{name}.{namespace}.svc"


def check_name(name: str) -> None:
    """A job's name is a DNS label that leaves room for what is appended.

    Raises:
        ValueError: it is not.
    """
    if not DNS_LABEL.fullmatch(name) or len(name) > MAX_NAME:
        raise ValueError(
            f"--name {name!r} must be at most {MAX_NAME} lower-case letters, digits and '-', "
            "begin with a letter and not end with '-'"
        )


def name_from(program: str, suffix: str) -> str:
    """A job's name made of a script's or module's last part, and a `suffix` that makes it unique."""
    stem = program.rstrip("/").rpartition("/")[2].removesuffix(".py").rpartition(".")[2]
    stem = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")
    if not stem[:1].isalpha():
        stem = f"job-{stem}".strip("-")
    return f"{stem[: MAX_NAME - len(suffix) - 1].rstrip('-')}-{suffix}"
