"""What is looked at before a job is created, so that a mistake is one line and not a half-made job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ringps_launcher.kubernetes import demand, names
from ringps_launcher.kubernetes.bundle import Bundle, Object
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import (
    ClusterError,
    ExistsError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
)

_NO_DRY_RUN = "does not support dry run"


def check(cluster: Cluster, bundle: Bundle, say: Callable[[str], None], *, needs: bool = True) -> None:
    """Raises `ClusterError` for the first thing that would keep the job from being created, or (with `needs`)
    from ever running. What is only worth knowing is said, and so is what we have no right to look at."""
    check_ = _Check(cluster, bundle, say)
    check_.namespace()
    check_.name()
    if needs:
        check_.priority_classes()
        check_.runtime_class()
        check_.quotas()
        check_.devices()
        check_.queue()
        check_.claims()
        check_.secrets()
    check_.objects()
    if needs:
        check_.pods()
    check_.say_what_is_unseen()


def check_gang(wanted: Object, created: Object) -> None:
    """Raises if the API server dropped the gang field of the worker Job: it does so without a word."""
    if wanted["spec"].get("scheduling") and not (created.get("spec") or {}).get("scheduling"):
        raise ClusterError(
            "--gang: this API server dropped the Job's field spec.scheduling (its feature gate "
            "WorkloadWithJob is off), so the workers would be scheduled one by one; leave --gang out, or use "
            "Kueue (--queue)"
        )


class _Check:
    def __init__(self, cluster: Cluster, bundle: Bundle, say: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._bundle = bundle
        self._say = say
        self._unseen: list[str] = []
        self._pods = [(job["metadata"]["name"], job["spec"]["template"]) for job in bundle.jobs()]

    def say_what_is_unseen(self) -> None:
        if self._unseen:
            self._say(f"not checked, for lack of rights: {', '.join(self._unseen)}")

    def namespace(self) -> None:
        place = self._bundle.namespace
        with self._allowed(""):
            try:
                self._cluster.get("Namespace", place)
            except NotFoundError as error:
                raise _no_namespace(place) from error

    def name(self) -> None:
        """That no Job has the name; of the other objects, their creation tells."""
        name, place = self._bundle.name, self._bundle.namespace
        with self._allowed(""):
            try:
                job = self._cluster.get("Job", name)
            except NotFoundError:
                return
            raise ExistsError(_taken(job, name, place))

    def priority_classes(self) -> None:
        for job, template in self._pods:
            wanted = template["spec"].get("priorityClassName")
            if not wanted or wanted.startswith("system-"):
                continue
            option = "--priority-class" if job == self._bundle.name else "--coordinator-priority-class"
            with self._allowed("priority classes"):
                try:
                    self._cluster.get("PriorityClass", wanted)
                except NotFoundError as error:
                    raise NotFoundError(
                        f"there is no PriorityClass {wanted}: create it (kubectl apply -k k8s/base makes "
                        f"those of ringps), or name another with {option} ('' for none)"
                    ) from error

    def runtime_class(self) -> None:
        wanted = self._bundle.worker_job["spec"]["template"]["spec"].get("runtimeClassName")
        if wanted:
            with self._allowed("runtime classes"):
                try:
                    self._cluster.get("RuntimeClass", wanted)
                except NotFoundError as error:
                    raise NotFoundError(
                        f"there is no RuntimeClass {wanted}: correct --runtime-class, or leave it out"
                    ) from error

    def quotas(self) -> None:
        with self._allowed("quotas"):
            short = demand.shortages(self._bundle, self._cluster.list("ResourceQuota"))
            if short:
                more = f" (and {len(short) - 1} more shortages)" if len(short) > 1 else ""
                raise ForbiddenError(
                    f"{short[0]}{more}; ask for fewer or smaller workers, or wait until other jobs end"
                )

    def devices(self) -> None:
        for device, wanted in demand.devices(self._bundle.worker_job).items():
            with self._allowed("nodes"):
                offered: dict[str, int] = {}
                for node in self._cluster.list("Node"):
                    for name, amount in ((node.get("status") or {}).get("allocatable") or {}).items():
                        if "/" in name and not name.startswith(("hugepages", "attachable")):
                            offered[name] = offered.get(name, 0) + int(amount)
                self._check_device(device, wanted, {name: count for name, count in offered.items() if count})

    def _check_device(self, device: str, wanted: int, offered: dict[str, int]) -> None:
        if device not in offered:
            others = f"they offer {', '.join(sorted(offered))}" if offered else "they offer no devices at all"
            raise NotFoundError(
                f"no node offers {device}: {others}; correct --gpu-resource, or install the device plugin "
                "(if such nodes come only once they are asked for: --no-check)"
            )
        if wanted > offered[device]:
            self._say(f"all nodes together have {offered[device]} {device}, and the job asks for {wanted}")

    def queue(self) -> None:
        queue = self._bundle.worker_job["metadata"]["labels"].get(names.QUEUE_LABEL)
        if not queue:
            return
        with self._allowed("the queue"):
            try:
                self._cluster.raw("/apis/kueue.x-k8s.io")
            except NotFoundError as error:
                raise NotFoundError(
                    f"--queue {queue}: Kueue is not installed in this cluster; install it, or leave it out"
                ) from error
            try:
                self._cluster.get("LocalQueue", queue)
            except NotFoundError as error:
                known = sorted(one["metadata"]["name"] for one in self._cluster.list("LocalQueue"))
                raise NotFoundError(
                    f"there is no LocalQueue {queue} in namespace {self._bundle.namespace}; "
                    f"it has: {', '.join(known) or 'none'}"
                ) from error

    def claims(self) -> None:
        spec = self._bundle.worker_job["spec"]["template"]["spec"]
        for volume in spec.get("volumes") or ():
            claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
            if not claim:
                continue
            with self._allowed("volumes"):
                try:
                    found = self._cluster.get("PersistentVolumeClaim", claim)
                except NotFoundError as error:
                    raise NotFoundError(
                        f"there is no PersistentVolumeClaim {claim} in namespace {self._bundle.namespace}: "
                        "create it, or correct --volume"
                    ) from error
                modes = set((found.get("spec") or {}).get("accessModes") or ())
                if self._bundle.workers > 1 and modes and modes <= {"ReadWriteOnce", "ReadWriteOncePod"}:
                    self._say(f"claim {claim} is {min(modes)}: workers can run on one node only")

    def secrets(self) -> None:
        spec = self._bundle.worker_job["spec"]["template"]["spec"]
        wanted: list[tuple[str, str, str]] = [
            (pull["name"], "", "--image-pull-secret") for pull in spec.get("imagePullSecrets") or ()
        ]
        for container in spec["containers"]:
            for variable in container.get("env") or ():
                source = (variable.get("valueFrom") or {}).get("secretKeyRef")
                if source and not source.get("optional"):
                    wanted.append((source["name"], source["key"], "--secret-env"))
        for secret, key, option in wanted:
            with self._allowed("secrets"):
                try:
                    found = self._cluster.get("Secret", secret)
                except NotFoundError as error:
                    raise NotFoundError(
                        f"there is no Secret {secret} in namespace {self._bundle.namespace}: create it, or "
                        f"correct {option}"
                    ) from error
                if key and key not in (found.get("data") or {}):
                    known = ", ".join(sorted(found.get("data") or {})) or "none"
                    raise NotFoundError(f"Secret {secret} has no key {key}; it has: {known}")

    def objects(self) -> None:
        """Have the API server check every object, and our rights to create it, without storing it."""
        for manifest in self._bundle.manifests:
            kind, name = manifest["kind"], manifest["metadata"]["name"]
            try:
                created = self._cluster.create(manifest, dry_run=True)
            except NotFoundError as error:
                if "namespaces " in str(error):
                    raise _no_namespace(self._bundle.namespace) from error
                if kind != "RoleBinding":
                    raise
                # Its Role is not there yet, and the API server wants to see what we would give away.
                self._check_right(kind)
            except ExistsError as error:
                raise ExistsError(self._taken(kind, name)) from error
            except InvalidError as error:
                if _NO_DRY_RUN not in str(error):
                    raise
            else:
                if manifest is self._bundle.worker_job:
                    check_gang(manifest, created)

    def pods(self) -> None:
        """The same for a pod of each Job: Pod Security, limit ranges and quota judge pods, not Jobs."""
        for job, template in self._pods:
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    **template["metadata"],
                    "name": f"{job}-check",
                    "namespace": self._bundle.namespace,
                },
                # Its own account is not there yet.
                "spec": {**template["spec"], "serviceAccountName": "default"},
            }
            try:
                self._cluster.create(pod, dry_run=True)
            except ForbiddenError as error:
                said = str(error)
                if " cannot create resource " in said or "service account" in said:
                    continue
                raise ForbiddenError(
                    f"the pods of Job {job} would be refused: {said.split(': ', 1)[-1]}"
                ) from error
            except InvalidError as error:
                if _NO_DRY_RUN not in str(error):
                    raise

    def _check_right(self, kind: str) -> None:
        allowed, _ = self._cluster.can_i("create", kind)
        if not allowed:
            raise ForbiddenError(
                f"you may not create {kind} objects in namespace {self._bundle.namespace}; ask the cluster's "
                "administrator for this right"
            )

    def _taken(self, kind: str, name: str) -> str:
        job, place = self._bundle.name, self._bundle.namespace
        try:
            found: dict[str, Any] = self._cluster.get(kind, name)
        except ClusterError:
            found = {}
        return _taken({"kind": kind, **found}, job, place, name)

    @contextmanager
    def _allowed(self, subject: str) -> Iterator[None]:
        """What we may not look at is left to the API server; `subject` is then said to be unchecked."""
        try:
            yield
        except ForbiddenError as error:
            if error.status != 403:  # our own finding, or bad credentials
                raise
            if subject and subject not in self._unseen:
                self._unseen.append(subject)


def _no_namespace(name: str) -> NotFoundError:
    return NotFoundError(
        f"there is no namespace {name}: create it (kubectl create namespace {name}), or give another with -N"
    )


def _taken(found: Object, job: str, namespace: str, name: str | None = None) -> str:
    kind = found.get("kind", "Job")
    called = f"{kind} {name or job}"
    labels = (found.get("metadata") or {}).get("labels") or {}
    if labels.get(names.INSTANCE_LABEL) != job or labels.get(names.NAME_LABEL) != names.APPLICATION:
        return f"namespace {namespace} has a {called} already, of something else: choose another --name"
    if kind == "Job" and name is None:
        return (
            f"there is a job {job} in namespace {namespace} already: choose another --name, or remove it "
            f"with `ringps cancel {job} -N {namespace}`"
        )
    return (
        f"namespace {namespace} has {called} of an earlier job {job}: remove it with "
        f"`ringps cancel {job} -N {namespace}`, or choose another --name"
    )
