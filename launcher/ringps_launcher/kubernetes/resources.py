"""PURE: a job's objects, as the API server takes them.

The worker Job is the last: what it needs is there when its first pod starts. Failures of pods are judged by
its podFailurePolicy (https://kubernetes.io/docs/tasks/job/pod-failure-policy/): the coordinator counts them
against the job's own budget, so the Job counts only programs that cannot even start.
"""

from __future__ import annotations

import json
import math
from typing import Any

from ringps.worker_env import FAILED_CODE, SUSPENDED_CODE
from ringps_launcher.kubernetes import names, quantities
from ringps_launcher.kubernetes.spec import JobSpec

Manifest = dict[str, Any]

SIGNAL_CODES = (134, 137, 139, 143)
"""Exit codes of a worker pod whose process died of SIGABRT, SIGKILL, SIGSEGV or SIGTERM."""
UNSEEN_CODE = 255
"""What a container runtime says of a container whose end it has not seen: its node stopped."""

WORKER_BACKOFF_LIMIT = 6
"""Pods that end in any other way before the Job gives up: the program cannot be started."""
COORDINATOR_BACKOFF_LIMIT = 100

_ARCHITECTURE_LABELS = ("kubernetes.io/arch", "kubernetes.io/os")
_UNPRIVILEGED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
_SCRATCH: list[Manifest] = [{"name": "tmp", "mountPath": "/tmp"}]


def manifests(spec: JobSpec, key: str) -> list[Manifest]:
    """The job's objects in the order in which they are created; the same for the same arguments.

    Args:
        spec: the job.
        key: the text of the key file; in no object but the Secret.
    """
    objects = [
        _key_secret(spec, key),
        _object(spec, "v1", "ConfigMap", names.status_map(spec.name), data={names.VERDICT_ENTRY: ""}),
        *([_code(spec)] if spec.files else []),
        _service_account(spec, spec.name, names.WORKER),
        _service_account(spec, names.coordinator(spec.name), names.COORDINATOR),
        _role(spec),
        _role_binding(spec),
        _object(
            spec,
            "coordination.k8s.io/v1",
            "Lease",
            names.coordinator(spec.name),
            names.COORDINATOR,
            spec={},
        ),
        _network_policy(spec),
        _worker_service(spec),
        _coordinator_service(spec),
        _coordinator_job(spec),
        _worker_job(spec),
    ]
    # Whoever changes one of them (an owner, a label) must change no other: through JSON, they share no part.
    copied: list[Manifest] = json.loads(json.dumps(objects))
    return copied


def _object(
    spec: JobSpec, version: str, kind: str, name: str, component: str | None = None, /, **content: Any
) -> Manifest:
    metadata = {"name": name, "namespace": spec.namespace, "labels": names.labels(spec.name, component)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **content}


def _key_secret(spec: JobSpec, key: str) -> Manifest:
    return _object(
        spec,
        "v1",
        "Secret",
        names.key_secret(spec.name),
        type="Opaque",
        immutable=True,
        stringData={names.KEY_ENTRY: key},
    )


def _code(spec: JobSpec) -> Manifest:
    return _object(
        spec, "v1", "ConfigMap", names.code_map(spec.name), immutable=True, data=dict(sorted(spec.files))
    )


def _service_account(spec: JobSpec, name: str, component: str) -> Manifest:
    return _object(spec, "v1", "ServiceAccount", name, component, automountServiceAccountToken=False)


def _role(spec: JobSpec) -> Manifest:
    """What the coordinator may do. Pods are named by nobody, so rights to them cannot be held to one job."""

    def rule(group: str, resource: str, verbs: list[str], *only: str) -> Manifest:
        named = {"resourceNames": list(only)} if only else {}
        return {"apiGroups": [group], "resources": [resource], **named, "verbs": verbs}

    coordinator = names.coordinator(spec.name)
    return _object(
        spec,
        "rbac.authorization.k8s.io/v1",
        "Role",
        coordinator,
        names.COORDINATOR,
        rules=[
            rule("coordination.k8s.io", "leases", ["get", "update", "patch"], coordinator),
            rule("", "configmaps", ["get", "patch"], names.status_map(spec.name)),
            rule("batch", "jobs", ["get", "list", "watch"], spec.name),
            rule("", "pods", ["get", "list", "watch", "delete"]),
            # The Job controller replaces a pod on a dead node only once somebody says that it has failed.
            rule("", "pods/status", ["patch"]),
            rule("", "events", ["create"]),
        ],
    )


def _role_binding(spec: JobSpec) -> Manifest:
    coordinator = names.coordinator(spec.name)
    return _object(
        spec,
        "rbac.authorization.k8s.io/v1",
        "RoleBinding",
        coordinator,
        names.COORDINATOR,
        roleRef={"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": coordinator},
        subjects=[{"kind": "ServiceAccount", "name": coordinator, "namespace": spec.namespace}],
    )


def _network_policy(spec: JobSpec) -> Manifest:
    """Only the job's own pods reach its pods; these may reach out, to data sets and storage."""
    pods = {"matchLabels": names.labels(spec.name)}
    return _object(
        spec,
        "networking.k8s.io/v1",
        "NetworkPolicy",
        spec.name,
        spec={
            "podSelector": pods,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": pods}]}],
        },
    )


def _worker_service(spec: JobSpec) -> Manifest:
    return _object(
        spec,
        "v1",
        "Service",
        spec.name,
        names.WORKER,
        spec={
            "clusterIP": "None",
            # A worker that is told to stop still trains its last step, and must be found meanwhile.
            "publishNotReadyAddresses": True,
            "selector": names.labels(spec.name, names.WORKER),
        },
    )


def _coordinator_service(spec: JobSpec) -> Manifest:
    ports = (
        (names.CONTROL_PORT_NAME, names.CONTROL_PORT),
        (names.HEARTBEAT_PORT_NAME, names.HEARTBEAT_PORT),
    )
    return _object(
        spec,
        "v1",
        "Service",
        names.coordinator(spec.name),
        names.COORDINATOR,
        spec={
            "clusterIP": "None",
            # Of two coordinators, the one that is ready holds the Lease.
            "publishNotReadyAddresses": False,
            "selector": names.labels(spec.name, names.COORDINATOR),
            "ports": [
                {"name": name, "port": port, "targetPort": name, "protocol": "TCP"} for name, port in ports
            ],
        },
    )


def _coordinator_job(spec: JobSpec) -> Manifest:
    name = names.coordinator(spec.name)
    labels = names.labels(spec.name, names.COORDINATOR)
    pod = {
        "serviceAccountName": name,
        "automountServiceAccountToken": True,
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": 15,
        **_common(spec, spec.coordinator_priority_class),
        # It has no use for GPUs or whatever else its workers' nodes are chosen for.
        **_optional("nodeSelector", {k: v for k, v in spec.node_selector if k in _ARCHITECTURE_LABELS}),
        "tolerations": _tolerations(spec, gpus=0),
        "containers": [_coordinator_container(spec)],
        "volumes": [_key_volume(spec), {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}],
    }
    return _object(
        spec,
        "batch/v1",
        "Job",
        name,
        names.COORDINATOR,
        spec={
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": COORDINATOR_BACKOFF_LIMIT,
            # A successor starts while the pod on a dead node still terminates: the Lease keeps them apart.
            "podReplacementPolicy": "TerminatingOrFailed",
            **_ttl(spec),
            "template": {
                "metadata": {
                    "labels": labels,
                    # It may move at any time, but its scratch volume would keep the node in use.
                    "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "true"},
                },
                "spec": pod,
            },
        },
    )


def _coordinator_container(spec: JobSpec) -> Manifest:
    command = [
        *("ringps", "coordinator", "--pod", spec.name, "--bind", f"0.0.0.0:{names.CONTROL_PORT}"),
        *("--key-file", names.KEY_FILE, "-n", str(spec.workers), "--min-workers", str(spec.min_workers)),
        *("--max-restarts", str(spec.max_restarts), "--dead-node-s", str(spec.dead_node_s)),
        *(["--encrypt-data"] if spec.encrypt_data else []),
    ]
    return {
        "name": names.COORDINATOR,
        "image": spec.image,
        **_optional("imagePullPolicy", spec.image_pull_policy),
        "command": command,
        "env": [
            _field("POD_NAME", "metadata.name"),
            _field("POD_NAMESPACE", "metadata.namespace"),
            _field("POD_UID", "metadata.uid"),
            {"name": "HOME", "value": "/tmp"},
            # Who is silent for too long is the coordinator's to say.
            *({"name": n, "value": _literal(v)} for n, v in spec.env if n.startswith("RINGPS_")),
        ],
        "ports": [
            {"name": names.CONTROL_PORT_NAME, "containerPort": names.CONTROL_PORT, "protocol": "TCP"},
            {"name": names.HEARTBEAT_PORT_NAME, "containerPort": names.HEARTBEAT_PORT, "protocol": "TCP"},
        ],
        "readinessProbe": {
            "tcpSocket": {"port": names.CONTROL_PORT_NAME},
            "periodSeconds": 1,
            "timeoutSeconds": 1,
            "failureThreshold": 2,
        },
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
        "securityContext": _UNPRIVILEGED,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [_KEY_MOUNT, *_SCRATCH],
    }


def _worker_job(spec: JobSpec) -> Manifest:
    job = _object(
        spec,
        "batch/v1",
        "Job",
        spec.name,
        names.WORKER,
        spec={
            "completionMode": "Indexed",
            "completions": spec.workers,
            "parallelism": spec.workers,
            "backoffLimit": WORKER_BACKOFF_LIMIT,
            # By index, or every pod that is taken away would double the wait for the next of any index.
            "backoffLimitPerIndex": WORKER_BACKOFF_LIMIT,
            "maxFailedIndexes": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules()},
            "suspend": bool(spec.queue),
            **_ttl(spec),
            **_optional("scheduling", _gang(spec)),
            "template": {
                "metadata": {"labels": names.labels(spec.name, names.WORKER)},
                "spec": _worker_pod(spec),
            },
        },
    )
    if spec.queue:
        job["metadata"]["labels"][names.QUEUE_LABEL] = spec.queue
    job["metadata"]["annotations"] = {
        names.WORKERS_ANNOTATION: str(spec.workers),
        names.MIN_WORKERS_ANNOTATION: str(spec.min_workers),
    }
    return job


def _failure_rules() -> list[Manifest]:
    """In their order; an exit that none of them names counts against the backoff limit."""

    def exits(action: str, *codes: int) -> Manifest:
        values = {"containerName": names.WORKER, "operator": "In", "values": list(codes)}
        return {"action": action, "onExitCodes": values}

    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        exits("Ignore", SUSPENDED_CODE),
        exits("FailJob", FAILED_CODE),
        exits("Ignore", *SIGNAL_CODES, UNSEEN_CODE),
    ]


def _gang(spec: JobSpec) -> Manifest:
    """All workers or none: the first ring is formed once all of them are there."""
    return {"schedulingPolicy": {"gang": {"minCount": spec.workers}}} if spec.gang else {}


def _worker_pod(spec: JobSpec) -> Manifest:
    return {
        "serviceAccountName": spec.name,
        "automountServiceAccountToken": False,
        "restartPolicy": "Never",
        "subdomain": spec.name,
        "terminationGracePeriodSeconds": spec.pod_grace_s,
        **_common(spec, spec.priority_class),
        **_optional("schedulerName", spec.scheduler),
        **_optional("runtimeClassName", spec.runtime_class),
        **_optional("nodeSelector", dict(spec.node_selector)),
        "affinity": {
            "podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": _close_together(spec)}
        },
        "tolerations": _tolerations(spec, spec.gpus),
        "containers": [_worker_container(spec)],
        "volumes": [
            _key_volume(spec),
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": spec.shm}},
            *([{"name": "code", "configMap": {"name": names.code_map(spec.name)}}] if spec.files else []),
            *(
                {"name": f"volume-{index}", "persistentVolumeClaim": {"claimName": claim}}
                for index, (claim, _) in enumerate(spec.volumes)
            ),
        ],
    }


def _close_together(spec: JobSpec) -> list[Manifest]:
    """Neighbours in the ring are best on one host, else in one zone; a worker elsewhere beats none."""
    workers = {"matchLabels": names.labels(spec.name, names.WORKER)}
    return [
        {"weight": weight, "podAffinityTerm": {"labelSelector": workers, "topologyKey": key}}
        for key, weight in (("topology.kubernetes.io/zone", 100), ("kubernetes.io/hostname", 50))
    ]


def _worker_container(spec: JobSpec) -> Manifest:
    gpus = {spec.gpu_resource: str(spec.gpus)} if spec.gpus else {}
    module_among_files = spec.is_module and f"{spec.program}.py" in dict(spec.files)
    return {
        "name": names.WORKER,
        "image": spec.image,
        **_optional("imagePullPolicy", spec.image_pull_policy),
        "command": _worker_command(spec),
        **_optional("workingDir", names.CODE_DIR if module_among_files else ""),
        "env": _worker_env(spec),
        "resources": {
            "requests": {"cpu": spec.cpu, "memory": spec.memory, **gpus},
            "limits": {"memory": spec.memory, **gpus},
        },
        "securityContext": _UNPRIVILEGED,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            _KEY_MOUNT,
            *_SCRATCH,
            {"name": "shm", "mountPath": "/dev/shm"},
            *([{"name": "code", "mountPath": names.CODE_DIR, "readOnly": True}] if spec.files else []),
            *({"name": f"volume-{index}", "mountPath": path} for index, (_, path) in enumerate(spec.volumes)),
        ],
    }


def _worker_command(spec: JobSpec) -> list[str]:
    return [
        *("ringps", "run", "-n", "1", "--pod", "--worker-id", "$(JOB_COMPLETION_INDEX)"),
        *("--join", names.coordinator_address(spec.name, spec.namespace), "--key-file", names.KEY_FILE),
        *("--address", "$(POD_IP)", "--host", "$(POD_NAME)", "--grace", str(spec.launcher_grace_s)),
        *(["--transport", spec.transport] if spec.transport != "auto" else []),
        *(["--encrypt-data"] if spec.encrypt_data else []),
        *(["--checkpoint-dir", _literal(spec.checkpoint_dir)] if spec.checkpoint_dir is not None else []),
        *(["-m"] if spec.is_module else []),
        *map(_literal, (spec.script, *spec.arguments)),
    ]


def _worker_env(spec: JobSpec) -> list[Manifest]:
    defaults = {
        # The root file system is read-only, and caches of compiled kernels go to the user's home.
        "HOME": "/tmp",
        # torch names its cache after the user, and fails where the image knows no name for the id.
        "USER": "ringps",
        # A process sees all cores of its node, however few the pod asked for.
        "OMP_NUM_THREADS": str(max(1, math.floor(quantities.parse(spec.cpu)))),
    }
    chosen = {variable for variable, *_ in (*spec.env, *spec.secret_env)}
    return [
        _field("POD_NAME", "metadata.name"),
        _field("POD_IP", "status.podIP"),
        _field("NODE_NAME", "spec.nodeName"),
        *({"name": name, "value": value} for name, value in defaults.items() if name not in chosen),
        *({"name": name, "value": _literal(value)} for name, value in spec.env),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
            for name, secret, key in spec.secret_env
        ),
    ]


def _common(spec: JobSpec, priority_class: str) -> Manifest:
    """What both kinds of pods have; Pod Security level "restricted" lets them pass."""
    identity = spec.run_as_user
    return {
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": identity,
            "runAsGroup": identity,
            "fsGroup": identity,
            # A claim with many checkpoints would otherwise be walked through at every start.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **_optional("priorityClassName", priority_class),
        **_optional("imagePullSecrets", [{"name": spec.image_pull_secret}] if spec.image_pull_secret else []),
    }


def _tolerations(spec: JobSpec, gpus: int) -> list[Manifest]:
    """Explicit for dead nodes: by default, their pods are given up only after 300 s."""
    given: list[Manifest] = []
    for toleration in spec.tolerations:
        matches = (
            {"operator": "Exists"}
            if toleration.value is None
            else {"operator": "Equal", "value": toleration.value}
        )
        given.append({"key": toleration.key, **matches, **_optional("effect", toleration.effect)})
    if gpus:
        vendor = spec.gpu_resource.partition("/")[0]
        taints = [
            {"key": key, "operator": "Exists", "effect": "NoSchedule"}
            for key in dict.fromkeys((f"{vendor}/gpu", spec.gpu_resource))
        ]
        given = [*taints, *(entry for entry in given if entry not in taints)]
    dead = [
        {
            "key": f"node.kubernetes.io/{condition}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": spec.dead_node_s,
        }
        for condition in ("not-ready", "unreachable")
    ]
    return [*dead, *given]


_KEY_MOUNT: Manifest = {"name": "key", "mountPath": names.KEY_DIR, "readOnly": True}


def _key_volume(spec: JobSpec) -> Manifest:
    return {"name": "key", "secret": {"secretName": names.key_secret(spec.name), "defaultMode": 0o400}}


def _field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _ttl(spec: JobSpec) -> Manifest:
    return {} if spec.ttl_s is None else {"ttlSecondsAfterFinished": spec.ttl_s}


def _optional(field: str, value: Any) -> Manifest:
    return {field: value} if value else {}


def _literal(text: str) -> str:
    """Keeps the kubelet from expanding `$(NAME)` in a user's text; `$$` stands for `$`."""
    return text.replace("$", "$$")
