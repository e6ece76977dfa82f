"""PURE: what a job on Kubernetes is asked for, as `ringps submit` and `ringps render` understand it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from ringps_launcher.kubernetes import names, quantities

MAX_WORKERS = 1024
"""As many as a ring may have."""

MAX_FILES_BYTES = 900 * 1024
"""A ConfigMap holds 1 MiB; the rest is left for what surrounds the files."""

LAUNCHER_MARGIN_S = 10
"""How much longer than a checkpoint may take the launcher waits before it kills its worker."""
POD_MARGIN_S = 15
"""How much longer than a checkpoint may take the kubelet waits before it kills the launcher."""

Transport = Literal["auto", "shm", "tcp", "zmq", "nccl", "cuda_ipc"]
PullPolicy = Literal["", "Always", "IfNotPresent", "Never"]
Effect = Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"]

OWN_ENV = frozenset(
    {
        *("POD_NAME", "POD_IP", "NODE_NAME", "JOB_COMPLETION_INDEX"),
        *("RINGPS_COORDINATOR", "RINGPS_KEY_FILE", "RINGPS_WORKER_ID", "RINGPS_HOST", "RINGPS_ADDRESS"),
        *("RINGPS_LOCAL_RANK", "RINGPS_LOCAL_WORLD_SIZE", "RINGPS_TRANSPORT", "RINGPS_CHECKPOINT_DIR"),
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    }
)
"""Variables that the pod or the launcher sets; a user's value would be overwritten, or break the job."""

_OWN_PATHS = ("/", "/dev", "/dev/shm", "/etc", "/etc/ringps", names.KEY_DIR, names.CODE_DIR, "/proc", "/tmp")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")
_ENV_NAME = re.compile(r"[-._A-Za-z][-._A-Za-z0-9]*")
_ENTRY_NAME = re.compile(r"[-._A-Za-z0-9]{1,253}")


@dataclass(frozen=True, kw_only=True)
class Toleration:
    """A taint that the job's pods put up with."""

    key: str
    """The taint's key."""

    value: str | None = None
    """The taint's value, or None for any."""

    effect: Effect = ""
    """The taint's effect, or empty for any."""

    def __post_init__(self) -> None:
        _check_qualified("--toleration", self.key)
        _check_label_value("--toleration", self.value or "")
        _check_choice("--toleration: effect", self.effect, get_args(Effect))

    @classmethod
    def parse(cls, text: str) -> Toleration:
        """From `KEY[=VALUE][:EFFECT]`.

        Raises:
            ValueError: it is not of that form.
        """
        taint, colon, effect = text.partition(":")
        if colon and not effect:
            raise ValueError(f"--toleration {text!r} is not of the form KEY[=VALUE][:EFFECT]")
        key, equals, value = taint.partition("=")
        return cls(key=key, value=value if equals else None, effect=effect)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """A whole job. Worker id = completion index of the worker Job; one worker process in each pod."""

    name: str
    """A DNS label of at most 40 characters; every object's name begins with it."""

    namespace: str
    """Where all of it lives."""

    image: str
    """Container image, with ringps and the program in it."""

    program: str
    """A script's path or a module's name inside the image, or the name of one of `files`."""

    is_module: bool = False
    """Run the program as `python -m` does."""

    arguments: tuple[str, ...] = ()
    """Handed to the program unchanged."""

    files: tuple[tuple[str, str], ...] = ()
    """(name, text) of local files, mounted at /etc/ringps/code."""

    workers: int
    """Worker pods, and the ring's size when all are there."""

    min_workers: int = 1
    """With how many workers the ring still goes on; all of them: a fixed ring."""

    max_restarts: int = 10
    """Failures, preemptions not counted, after which the job is failed."""

    transport: Transport = "auto"
    """How the workers' data travels."""

    encrypt_data: bool = False
    """Encrypt data connections too, not only control connections."""

    gpus: int = 0
    """GPUs of each worker: 0 or 1, since a worker is one process."""

    gpu_resource: str = "nvidia.com/gpu"
    """The resource that a GPU is counted as."""

    cpu: str = "1"
    """Cores that each worker requests; it may use more where they are idle."""

    memory: str = "2Gi"
    """Each worker's memory, requested and at most. What lies in /dev/shm counts too."""

    shm: str = "1Gi"
    """Room in each worker's /dev/shm; less than `memory`."""

    checkpoint_dir: str | None = None
    """Where `ringps.Checkpointer` saves: a path on one of `volumes`, or a URL."""

    volumes: tuple[tuple[str, str], ...] = ()
    """(PersistentVolumeClaim, path) mounted in every worker."""

    checkpoint_budget_s: int = 60
    """The longest time that a checkpoint may take after a pod was told to stop."""

    env: tuple[tuple[str, str], ...] = ()
    """(variable, value) for the workers."""

    secret_env: tuple[tuple[str, str, str], ...] = ()
    """(variable, Secret, key in it) for the workers."""

    priority_class: str = ""
    """PriorityClass of the workers; empty for the cluster's default."""

    coordinator_priority_class: str = "ringps-coordinator"
    """PriorityClass of the coordinator; empty for the cluster's default."""

    queue: str = ""
    """The Kueue LocalQueue that admits the workers; empty to do without Kueue."""

    gang: bool = False
    """Schedule the workers all or none, by the Job's own `scheduling` field."""

    scheduler: str = ""
    """Scheduler of the workers; empty for the cluster's default."""

    node_selector: tuple[tuple[str, str], ...] = ()
    """(label, value) of the nodes that the workers may run on."""

    tolerations: tuple[Toleration, ...] = ()
    """Taints of nodes that the job may run on all the same."""

    dead_node_s: int = 20
    """How long a node may be unreachable before its pods are given up."""

    runtime_class: str = ""
    """RuntimeClass of the workers; empty for the cluster's default."""

    image_pull_policy: PullPolicy = ""
    """When the image is pulled; empty for the cluster's default."""

    image_pull_secret: str = ""
    """Secret to pull the image with; empty for none."""

    ttl_s: int | None = None
    """How long a finished job is kept; None for ever."""

    run_as_user: int = 65532
    """User and group id of all processes; not root."""

    def __post_init__(self) -> None:
        names.check_name(self.name)
        if not names.DNS_LABEL.fullmatch(self.namespace) or len(self.namespace) > 63:
            raise ValueError(f"--namespace {self.namespace!r} is no DNS label")
        _check_text("--image", self.image)
        if not self.image or re.search(r"\s", self.image):
            raise ValueError(f"--image {self.image!r} is no image's name")
        self._check_program()
        self._check_ring()
        self._check_resources()
        self._check_storage()
        self._check_environment()
        self._check_placement()

    @property
    def pod_grace_s(self) -> int:
        """terminationGracePeriodSeconds of a worker pod."""
        return self.checkpoint_budget_s + POD_MARGIN_S

    @property
    def launcher_grace_s(self) -> int:
        """What the launcher leaves its worker between SIGTERM and SIGKILL."""
        return self.checkpoint_budget_s + LAUNCHER_MARGIN_S

    @property
    def script(self) -> str:
        """What the launcher is told to run: of `files`, the path where they are mounted."""
        is_file = not self.is_module and self.program in dict(self.files)
        return f"{names.CODE_DIR}/{self.program}" if is_file else self.program

    def _check_program(self) -> None:
        if not self.program or self.program.startswith("-"):
            raise ValueError(f"name a script or module to run, not {self.program!r}")
        for text in (self.program, *self.arguments):
            _check_text("SCRIPT and its arguments", text)
        _check_unique("--file", (name for name, _ in self.files))
        for name, text in self.files:
            _check_text(f"--file {name}", text)
            if not _ENTRY_NAME.fullmatch(name) or name == "." or name.startswith(".."):
                raise ValueError(
                    f"--file {name!r}: only letters, digits, '-', '_' and '.' can be in its name"
                )
        size = sum(len(name.encode()) + len(text.encode()) for name, text in self.files)
        if size > MAX_FILES_BYTES:
            raise ValueError(
                f"--file: {size} bytes are too many, at most {MAX_FILES_BYTES} fit into a ConfigMap; "
                "put them into the image"
            )

    def _check_ring(self) -> None:
        _check_range("-n", self.workers, 1, MAX_WORKERS)
        if not 1 <= self.min_workers <= self.workers:
            raise ValueError(
                f"--min-workers must be from 1 to the {self.workers} of -n, not {self.min_workers}"
            )
        _check_range("--max-restarts", self.max_restarts, 0, 1_000_000)
        _check_choice("--transport", self.transport, get_args(Transport))
        _check_range("--checkpoint-budget", self.checkpoint_budget_s, 1, 86_400)
        _check_range("--dead-node-s", self.dead_node_s, 0, 86_400)
        if self.ttl_s is not None:
            _check_range("--ttl", self.ttl_s, 0, 2**31 - 1)

    def _check_resources(self) -> None:
        if self.gpus not in (0, 1):
            raise ValueError(
                f"--gpus must be 0 or 1, not {self.gpus}: a worker is one process with one GPU; "
                f"for more GPUs take more workers (-n)"
            )
        _check_qualified("--gpu-resource", self.gpu_resource)
        if "/" not in self.gpu_resource:
            raise ValueError(f"--gpu-resource {self.gpu_resource!r} is not of the form VENDOR/NAME")
        _quantity("--cpu", self.cpu)
        memory, shm = _quantity("--memory", self.memory), _quantity("--shm", self.shm)
        if shm >= memory:
            raise ValueError(
                f"--shm {self.shm} must be less than --memory {self.memory}: it is a part of it, "
                "and the worker needs memory besides"
            )
        _check_range("--run-as-user", self.run_as_user, 1, 2**31 - 1)
        _check_choice("--image-pull-policy", self.image_pull_policy, get_args(PullPolicy))

    def _check_storage(self) -> None:
        _check_unique("--volume: path", (path for _, path in self.volumes))
        for claim, path in self.volumes:
            _check_subdomain("--volume", claim)
            _check_path("--volume", path)
            if ":" in path or path in _OWN_PATHS or path.startswith(("/etc/ringps/", "/dev/", "/proc/")):
                raise ValueError(
                    f"--volume {claim}:{path}: nothing can be mounted there; choose another path"
                )
        place = self.checkpoint_dir
        if place is None:
            return
        _check_text("--checkpoint-dir", place)
        if "://" in place:
            return
        _check_path("--checkpoint-dir", place)
        if not any(place == path or place.startswith(f"{path}/") for _, path in self.volumes):
            raise ValueError(
                f"--checkpoint-dir {place} is on no --volume and would be lost with the pod; "
                f"add --volume CLAIM:{place}, or give a URL such as s3://BUCKET/PATH"
            )

    def _check_environment(self) -> None:
        _check_unique("--env and --secret-env", (entry[0] for entry in (*self.env, *self.secret_env)))
        for variable, value in self.env:
            _check_variable("--env", variable)
            _check_text(f"--env {variable}", value)
        for variable, secret, key in self.secret_env:
            _check_variable("--secret-env", variable)
            _check_subdomain("--secret-env", secret)
            if not _ENTRY_NAME.fullmatch(key):
                raise ValueError(f"--secret-env {variable}: {key!r} is no key of a Secret")

    def _check_placement(self) -> None:
        for option, value in (
            ("--priority-class", self.priority_class),
            ("--coordinator-priority-class", self.coordinator_priority_class),
            ("--scheduler", self.scheduler),
            ("--runtime-class", self.runtime_class),
            ("--image-pull-secret", self.image_pull_secret),
        ):
            if value:
                _check_subdomain(option, value)
        if self.queue:
            _check_subdomain("--queue", self.queue)
            _check_label_value("--queue", self.queue)
        if self.queue and self.gang:
            raise ValueError(
                "--queue and --gang exclude each other: Kueue admits all workers or none already"
            )
        _check_unique("--node-selector", (label for label, _ in self.node_selector))
        for label, value in self.node_selector:
            _check_qualified("--node-selector", label)
            _check_label_value("--node-selector", value)


def _check_range(option: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{option} must be from {low} to {high}, not {value}")


def _check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(filter(None, choices))}, not {value!r}")


def _check_text(option: str, value: str) -> None:
    """What the API server takes as text, and an argument or variable can hold."""
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{option} must be UTF-8 text without NUL bytes")


def _check_unique(option: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{option}: {value} is given twice")
        seen.add(value)


def _check_path(option: str, path: str) -> None:
    _check_text(option, path)
    parts = path.split("/")
    if parts[0] or not all(parts[1:]) or {".", ".."} & set(parts):
        raise ValueError(
            f"{option} {path!r} must be an absolute path without '.', '..' and doubled or final '/'"
        )


def _check_subdomain(option: str, value: str) -> None:
    if not _SUBDOMAIN.fullmatch(value) or len(value) > 253:
        raise ValueError(f"{option} {value!r} is no name of a Kubernetes object")


def _check_qualified(option: str, key: str) -> None:
    """The form of keys of labels and taints, and of names of resources: [DOMAIN/]NAME."""
    prefix, slash, name = key.rpartition("/")
    if slash:
        _check_subdomain(option, prefix)
    if not _LABEL_NAME.fullmatch(name):
        raise ValueError(f"{option} {key!r} is not of the form [DOMAIN/]NAME")


def _check_label_value(option: str, value: str) -> None:
    if value and not _LABEL_NAME.fullmatch(value):
        raise ValueError(
            f"{option} {value!r} is no value of a label (letters, digits, '-', '_', '.'; at most 63)"
        )


def _check_variable(option: str, variable: str) -> None:
    if not _ENV_NAME.fullmatch(variable) or variable.startswith(".."):
        raise ValueError(f"{option} {variable!r} is no variable's name")
    if variable in OWN_ENV:
        raise ValueError(f"{option} {variable} is set by ringps; leave it out")


def _quantity(option: str, text: str) -> Fraction:
    try:
        return quantities.count(text)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from None
