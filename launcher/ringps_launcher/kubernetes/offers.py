"""Checks of what a cluster offers to jobs: nodes, GPUs, room, storage, queues, schedulers."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from ringps_launcher.kubernetes.checks import Patient
from ringps_launcher.kubernetes.errors import ForbiddenError, NotFoundError, UnreachableError
from ringps_launcher.kubernetes.fields import (
    Object,
    condition,
    holds,
    mapping,
    mappings,
    name_of,
    one_line,
    text,
    time_of,
)
from ringps_launcher.kubernetes.findings import FAIL, OK, UNSEEN, WARN, Finding
from ringps_launcher.kubernetes.placement import amount, quantity_text
from ringps_launcher.kubernetes.table import duration

_SCHEDULER = "ringps"
_SCHEDULER_LEASE = ("ringps-scheduler", "kube-system")
_LEASE_S = 60.0
_DEFAULT_STORAGE = "storageclass.kubernetes.io/is-default-class"
_ENDED = ("Succeeded", "Failed")


def nodes(patient: Patient) -> Iterator[Finding]:
    """Whether there are any that pods can run on."""
    found = patient.cluster.list("Node")
    usable = [node for node in found if _is_usable(node)]
    if not usable:
        yield Finding(
            FAIL, f"none of {len(found)} nodes is ready and not cordoned", "see `kubectl get nodes`"
        )
        return
    cores, memory = (sum(_allocatable(node, key) for node in usable) for key in ("cpu", "memory"))
    words = (
        f"{len(usable)} of {len(found)} nodes can take pods, with "
        f"{float(cores):g} cores and {float(memory) / 2**30:.1f} GiB in all"
    )
    yield Finding(OK if len(usable) == len(found) else WARN, words)


def gpus(patient: Patient) -> Iterator[Finding]:
    """How many GPUs are offered, and how many of them are free."""
    resource = patient.gpu_resource
    usable = [node for node in patient.cluster.list("Node") if _is_usable(node)]
    offered = {name_of(node): _allocatable(node, resource) for node in usable}
    total = sum(offered.values())
    if not total:
        known = sorted(
            {key for node in usable for key in mapping(node, "status", "allocatable") if "/" in key}
        )
        others = f"; they offer {', '.join(known)}" if known else ""
        yield Finding(
            WARN,
            f"no node offers {resource}{others}: only jobs without GPUs can run",
            "install the GPUs' device plugin, or name what it offers with --gpu-resource",
        )
        return
    holders = sum(1 for count in offered.values() if count)
    words = f"{total} {resource} on {holders} node{'s' if holders > 1 else ''}"
    try:
        pods = patient.cluster.list("Pod", all_namespaces=True)
    except ForbiddenError:
        yield Finding(
            OK, f"{words}; how many are free cannot be seen (no right to list pods of all namespaces)"
        )
        return
    used = sum(
        _requested(pod, resource)
        for pod in pods
        if text(pod, "spec", "nodeName") in offered and text(pod, "status", "phase") not in _ENDED
    )
    yield Finding(OK, f"{words}, {max(Fraction(0), total - used)} of them free")


def runtime_class(patient: Patient) -> Iterator[Finding]:
    """Whether GPU containers may need one."""
    known = sorted(name_of(found) for found in patient.cluster.list("RuntimeClass"))
    if "nvidia" in known:
        yield Finding(OK, "there is nvidia: where it is not the nodes' default, use --runtime-class nvidia")
    else:
        yield Finding(
            OK,
            f"none is called nvidia ({', '.join(known) or 'there are none'}): fine if GPUs come without one",
        )


def quota(patient: Patient) -> Iterator[Finding]:
    """How much room the namespace's quotas leave."""
    quotas = patient.cluster.list("ResourceQuota")
    if not quotas:
        yield Finding(OK, f"namespace {patient.namespace} has no quota")
    for found in quotas:
        hard, used = mapping(found, "status", "hard"), mapping(found, "status", "used")
        left = {key: amount(hard[key]) - amount(used.get(key, "0")) for key in hard}
        full = sorted(key for key, room in left.items() if room <= 0)
        words = ", ".join(
            f"{quantity_text(max(Fraction(0), room))} of {hard[key]} {key}"
            for key, room in sorted(left.items())
        )
        if full:
            yield Finding(
                WARN,
                f"quota {name_of(found)} is used up for {', '.join(full)}: new jobs wait",
                "wait until other jobs end, or have it raised",
            )
        else:
            yield Finding(OK, f"quota {name_of(found)} leaves {words}")


def storage(patient: Patient) -> Iterator[Finding]:
    """Where checkpoints can go."""
    claims = patient.cluster.list("PersistentVolumeClaim")
    bound = sorted(name_of(claim) for claim in claims if text(claim, "status", "phase") == "Bound")
    loose = sorted(name_of(claim) for claim in claims if text(claim, "status", "phase") != "Bound")
    if bound:
        yield Finding(OK, f"claims for --volume: {', '.join(bound)}")
    if loose:
        yield Finding(WARN, f"claims without a volume yet: {', '.join(loose)}", "see `kubectl describe pvc`")
    classes = patient.cluster.list("StorageClass")
    default = [
        name_of(found)
        for found in classes
        if mapping(found, "metadata", "annotations").get(_DEFAULT_STORAGE) == "true"
    ]
    if classes:
        names = ", ".join(sorted(map(name_of, classes)))
        yield Finding(OK, f"storage classes: {names} (default: {', '.join(default) or 'none'})")
    elif not bound:
        yield Finding(
            WARN,
            "there is neither a storage class nor a claim with a volume",
            "save checkpoints to a URL (--checkpoint-dir s3://...), or set up storage",
        )


def kueue(patient: Patient) -> Iterator[Finding]:
    """Whether Kueue is there, and the queue that jobs are to use."""
    try:
        patient.cluster.raw("/apis/kueue.x-k8s.io")
    except NotFoundError:
        if patient.queue:
            yield Finding(
                FAIL, f"Kueue is not installed: --queue {patient.queue} would wait for ever", "install Kueue"
            )
        else:
            yield Finding(OK, "not installed: submit without --queue")
        return
    queues = {name_of(found): found for found in patient.cluster.list("LocalQueue")}
    if patient.queue and patient.queue not in queues:
        yield Finding(
            FAIL,
            f"there is no LocalQueue {patient.queue} in namespace {patient.namespace}; "
            f"it has: {', '.join(sorted(queues)) or 'none'}",
            "create it, or name another",
        )
    for name, found in sorted(queues.items()):
        if patient.queue in ("", name):
            active = condition(found, "Active")
            if active and not holds(found, "Active"):
                yield Finding(
                    FAIL if patient.queue else WARN,
                    f"LocalQueue {name} is not active: {one_line(text(active, 'message'))}",
                )
            else:
                yield Finding(
                    OK, f"LocalQueue {name} (of ClusterQueue {text(found, 'spec', 'clusterQueue')})"
                )
    if not queues and not patient.queue:
        yield Finding(OK, f"installed, but namespace {patient.namespace} has no LocalQueue")


def scheduler(patient: Patient) -> Iterator[Finding]:
    """Whether the shipped one runs. Profiles cannot be seen, but it holds a Lease."""
    hint = f"a pod that names a scheduler which does not run waits for ever (--scheduler {_SCHEDULER})"
    name, place = _SCHEDULER_LEASE
    try:
        lease = patient.cluster.get("Lease", name, place)
    except (ForbiddenError, NotFoundError) as error:
        seen = "has no Lease" if isinstance(error, NotFoundError) else "may run"
        yield Finding(
            UNSEEN,
            f"schedulers' profiles cannot be seen; that of k8s/scheduler {seen} in {place}: {hint}",
            "to pack GPU pods: kubectl apply -k k8s/scheduler, or the same profile in the cluster's own",
        )
        return
    age = patient.now - (time_of(mapping(lease, "spec").get("renewTime")) or 0.0)
    if text(lease, "spec", "holderIdentity") and age < _LEASE_S:
        yield Finding(OK, f"the one of k8s/scheduler runs: --scheduler {_SCHEDULER} packs GPU pods")
    else:
        yield Finding(WARN, f"the one of k8s/scheduler is silent for {duration(age)}: {hint}", "see its pods")


def metrics(patient: Patient) -> Iterator[Finding]:
    """Whether `kubectl top` works. Nothing of ours needs it."""
    try:
        patient.cluster.raw("/apis/metrics.k8s.io/v1beta1")
    except (NotFoundError, UnreachableError):
        yield Finding(
            WARN, "no metrics API: `kubectl top` shows nothing of what jobs use", "install metrics-server"
        )
    else:
        yield Finding(OK, "the metrics API is there: `kubectl top pods` shows what jobs use")


def network_policy(patient: Patient) -> Iterator[Finding]:
    """Whether somebody enforces it: nobody says."""
    yield Finding(
        UNSEEN,
        "whether the cluster's network enforces NetworkPolicies; jobs authenticate each connection anyway",
    )


def _is_usable(node: Object) -> bool:
    return holds(node, "Ready") and mapping(node, "spec").get("unschedulable") is not True


def _allocatable(node: Object, resource: str) -> Fraction:
    return amount(mapping(node, "status", "allocatable").get(resource, "0"))


def _requested(pod: Object, resource: str) -> Fraction:
    total = Fraction(0)
    for container in mappings(pod, "spec", "containers"):
        total += amount(mapping(container, "resources", "requests").get(resource, "0"))
    return total
