"""The options of the Kubernetes commands: parsing only. What a command does is loaded when it runs."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ringps_launcher.kubernetes.spec import JobSpec, Toleration

_TRANSPORTS = ("auto", "shm", "tcp", "zmq", "nccl", "cuda_ipc")
_PULL_POLICIES = ("Always", "IfNotPresent", "Never")


def add_commands(commands: Any) -> None:
    """Add the commands to the parser's sub-commands."""

    def command(name: str, text: str) -> Any:
        return commands.add_parser(name, help=f"{text} (Kubernetes)", allow_abbrev=False)

    _add_submit(command("submit", "start a job"))
    _add_render(command("render", "print the objects of a job, and create nothing"))
    _add_ls(command("ls", "list the jobs"))
    _add_status(command("status", "show a job, and why it waits"))
    _add_logs(command("logs", "print the output of a job's workers"))
    _add_suspend(command("suspend", "stop a job at a checkpoint, to be resumed"))
    _add_resume(command("resume", "let a suspended job go on"))
    _add_cancel(command("cancel", "end a job and remove all of it"))
    _add_doctor(command("doctor", "check that a cluster is ready for jobs"))


def job_spec(options: argparse.Namespace, *, name: str, namespace: str) -> JobSpec:
    """The job that the options ask for; a `ValueError` of one line if it cannot be."""
    return JobSpec(
        name=name,
        namespace=namespace,
        image=options.image,
        program=options.script,
        is_module=options.module,
        arguments=tuple(options.arguments or ()),
        files=tuple(options.file),
        workers=options.workers,
        min_workers=options.min_workers,
        max_restarts=options.max_restarts,
        transport=options.transport,
        encrypt_data=options.encrypt_data,
        gpus=options.gpus,
        gpu_resource=options.gpu_resource,
        cpu=options.cpu,
        memory=options.memory,
        shm=options.shm,
        checkpoint_dir=options.checkpoint_dir,
        volumes=tuple(options.volume),
        checkpoint_budget_s=options.checkpoint_budget,
        env=tuple(options.env),
        secret_env=tuple(options.secret_env),
        priority_class=options.priority_class,
        coordinator_priority_class=options.coordinator_priority_class,
        queue=options.queue,
        gang=options.gang,
        scheduler=options.scheduler,
        node_selector=tuple(options.node_selector),
        tolerations=tuple(options.toleration),
        dead_node_s=options.dead_node_s,
        runtime_class=options.runtime_class,
        image_pull_policy=options.image_pull_policy,
        image_pull_secret=options.image_pull_secret,
        ttl_s=options.ttl,
        run_as_user=options.run_as_user,
    )


# -- one function a command


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "ringps submit --image IMAGE -n N [options] [-m] SCRIPT [ARGUMENT ...]\n"
        "       ringps submit -f FILE [--wait S | --no-wait]"
    )
    parser.description = (
        "Start N workers, each a pod that runs SCRIPT in a container of IMAGE, and a coordinator. "
        "If anything is wrong with it, nothing is left behind."
    )
    parser.set_defaults(handler=_submit, parser=parser)
    _add_cluster(parser)
    job = _add_job(parser)
    parser.add_argument(
        "-f",
        dest="manifest",
        metavar="FILE",
        action=_Manifest,
        default=None,
        job=job,
        help="create what `ringps render` wrote to FILE (- for stdin), instead of a job made of options",
    )
    _add_waiting(parser, "until the coordinator runs", default_s=60.0)
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not look first for quota, nodes with GPUs, volumes and other things that the job needs; for "
        "those that come only once they are asked for",
    )


def _add_render(parser: argparse.ArgumentParser) -> None:
    parser.usage = "ringps render --image IMAGE -n N [options] [-m] SCRIPT [ARGUMENT ...]"
    parser.description = (
        "Print, as YAML, what `ringps submit` with the same options would create. The cluster is not asked "
        "anything. The output contains the job's key: keep it as secret as a password."
    )
    parser.set_defaults(handler=_render, parser=parser)
    _add_cluster(parser)
    _add_job(parser)


def _add_ls(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_ls)
    _add_cluster(parser)
    parser.add_argument("-A", "--all-namespaces", action="store_true", help="the jobs of all namespaces")
    _add_json(parser)


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_status)
    _add_cluster(parser)
    _add_json(parser)
    _add_name(parser)


def _add_logs(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print the output of all workers, each line with its worker's id before it."
    parser.set_defaults(handler=_logs)
    _add_cluster(parser)
    add = parser.add_argument
    add(
        "--rank",
        dest="ranks",
        type=int,
        action="append",
        default=[],
        metavar="R",
        help="only the worker with this id (its pod's completion index, which never changes; the position in "
        "the ring may); may be given several times",
    )
    add("--coordinator", action="store_true", help="the coordinator's output too")
    add("--previous", action="store_true", help="of the container or pod before the present one")
    add("-f", "--follow", action="store_true", help="go on as more is written, until the job is over")
    add("--tail", type=int, default=None, metavar="N", help="only the last N lines of each worker")
    add("--since", type=int, default=None, metavar="S", help="only what is not older than S seconds")
    _add_name(parser)


def _add_suspend(parser: argparse.ArgumentParser) -> None:
    parser.description = "Have the workers save a checkpoint and end; `ringps resume` goes on from there."
    parser.set_defaults(handler=_suspend)
    _add_cluster(parser)
    _add_waiting(parser, "until it has stopped", default_s=None)
    _add_name(parser)


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_resume)
    _add_cluster(parser)
    _add_name(parser)


def _add_cancel(parser: argparse.ArgumentParser) -> None:
    parser.description = "End the job, and delete every object of it. Checkpoints stay."
    parser.set_defaults(handler=_cancel)
    _add_cluster(parser)
    _add_waiting(parser, "until its pods are gone", default_s=None)
    _add_name(parser)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_doctor)
    _add_cluster(parser)
    parser.add_argument(
        "--gpu-resource",
        metavar="RESOURCE",
        default="nvidia.com/gpu",
        help="what GPUs are counted as (default: nvidia.com/gpu)",
    )
    parser.add_argument("--queue", metavar="NAME", default="", help="a Kueue LocalQueue that jobs will use")
    _add_json(parser)


# -- groups of options


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-N", "--namespace", metavar="NS", default=None, help="namespace (default: the context's)"
    )
    parser.add_argument(
        "--context", metavar="NAME", default=None, help="context in the kubeconfig (default: the current one)"
    )


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the job's name")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_waiting(parser: argparse.ArgumentParser, until: str, *, default_s: float | None) -> None:
    usual = f"{default_s:.0f}" if default_s is not None else "as long as its pods may take to end"
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=default_s,
        metavar="S",
        help=f"wait at most S seconds {until} (default: {usual})",
    )
    parser.add_argument("--no-wait", action="store_true", help=f"do not wait {until}")


def _add_job(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options that make a job, and their actions."""
    actions: list[argparse.Action] = []

    def add(*flags: str, **settings: Any) -> None:
        actions.append(parser.add_argument(*flags, **settings))

    def pairs(flag: str, form: str, parse: Any, text: str) -> None:
        add(flag, metavar=form, action="append", default=[], type=parse, help=f"{text}; may be repeated")

    add("--name", metavar="NAME", default=None, help="the job's name (default: SCRIPT's and four letters)")
    add("--image", metavar="IMAGE", required=True, help="container image with ringps and SCRIPT in it")
    add("-n", "--workers", type=int, required=True, metavar="N", help="workers; each is a pod")
    add(
        "--min-workers",
        type=int,
        default=1,
        metavar="M",
        help="the ring goes on as long as M workers are left (default: 1); M = N makes it a fixed ring",
    )
    add("-m", "--module", action="store_true", help="SCRIPT is a module's name, as for python -m")
    pairs("--file", "LOCAL", _file, "a local text file for the workers; SCRIPT may be its base name")
    add(
        "--max-restarts",
        type=int,
        default=10,
        metavar="R",
        help="failures after which the job is failed (default: 10); preemptions do not count",
    )
    add("--transport", choices=_TRANSPORTS, default="auto", help="how data travels (default: auto)")
    add("--encrypt-data", action="store_true", help="encrypt data connections too, not only control")
    add("--gpus", type=int, default=0, metavar="N", help="GPUs of each worker: 0 (default) or 1")
    add(
        "--gpu-resource",
        metavar="RESOURCE",
        default="nvidia.com/gpu",
        help="what a GPU is counted as (default: nvidia.com/gpu)",
    )
    add("--cpu", metavar="CORES", default="1", help="cores that each worker asks for (default: 1)")
    add("--memory", metavar="BYTES", default="2Gi", help="memory of each worker (default: 2Gi)")
    add("--shm", metavar="BYTES", default="1Gi", help="of that, room in /dev/shm (default: 1Gi)")
    add(
        "--checkpoint-dir",
        metavar="DIR",
        default=None,
        help="where ringps.Checkpointer saves: a path on a --volume, or a URL",
    )
    pairs("--volume", "CLAIM:PATH", _volume, "mount a PersistentVolumeClaim")
    add(
        "--checkpoint-budget",
        type=int,
        default=60,
        metavar="S",
        help="the longest time that a checkpoint may take when pods are told to stop (default: 60)",
    )
    pairs("--env", "K=V", _pair, "an environment variable for the workers")
    pairs("--secret-env", "K=SECRET:KEY", _secret_env, "an environment variable from a Secret")
    add("--priority-class", metavar="NAME", default="", help="PriorityClass of the workers")
    add(
        "--coordinator-priority-class",
        metavar="NAME",
        default="ringps-coordinator",
        help="PriorityClass of the coordinator (default: ringps-coordinator; '' for the cluster's default)",
    )
    add("--queue", metavar="NAME", default="", help="Kueue LocalQueue that admits the job")
    add("--gang", action="store_true", help="schedule all workers or none, by the Job's own gang field")
    add("--scheduler", metavar="NAME", default="", help="scheduler of the workers")
    pairs("--node-selector", "K=V", _pair, "label of the nodes for the workers")
    pairs("--toleration", "KEY[=VALUE][:EFFECT]", _toleration, "taint of nodes that may be used")
    add(
        "--dead-node-s",
        type=int,
        default=20,
        metavar="S",
        help="after how long a silent node's pods are given up (default: 20)",
    )
    add("--runtime-class", metavar="NAME", default="", help="RuntimeClass of the workers")
    add("--image-pull-policy", choices=_PULL_POLICIES, default="", help="when the image is pulled")
    add("--image-pull-secret", metavar="NAME", default="", help="Secret to pull the image with")
    add("--ttl", type=int, default=None, metavar="S", help="remove the job S seconds after its end")
    add(
        "--run-as-user", type=int, default=65532, metavar="UID", help="user of all processes (default: 65532)"
    )
    add(
        "--key-file",
        metavar="FILE",
        default=None,
        help="the job's key, written if it does not exist (default: a new key, which no file holds)",
    )
    add("script", metavar="SCRIPT", help="script or module (-m) in the image, or base name of a --file")
    add("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="handed to the script")
    return actions


class _Manifest(argparse.Action):
    """`-f FILE`: then no other option makes the job, and none of them is required."""

    def __init__(self, *, job: list[argparse.Action], **settings: Any) -> None:
        super().__init__(**settings)
        self._job = job

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        namespace.manifest = values
        namespace.job_actions = self._job
        for action in self._job:
            action.required = False


def _refuse_job_options(options: argparse.Namespace) -> None:
    for action in options.job_actions:
        if getattr(options, action.dest) not in (action.default, None, []):
            flag = action.option_strings[-1] if action.option_strings else action.metavar
            options.parser.error(f"-f FILE is the whole job: leave {flag} out")


# -- what an option's text means


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text} seconds is no sensible time")
    return seconds


def _file(path: str) -> tuple[str, str]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return os.path.basename(path), file.read()
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{path} is no text file; put it into the image") from None
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}: {error.strerror}") from None


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form K=V")
    return key, value


def _volume(text: str) -> tuple[str, str]:
    claim, _, path = text.partition(":")
    if not claim or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form CLAIM:PATH")
    return claim, path


def _secret_env(text: str) -> tuple[str, str, str]:
    variable, _, source = text.partition("=")
    secret, _, key = source.partition(":")
    if not variable or not secret or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form K=SECRET:KEY")
    return variable, secret, key


def _toleration(text: str) -> Toleration:
    try:
        return Toleration.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--toleration ")) from None


# -- what the commands do


def _submit(options: argparse.Namespace) -> int:
    from ringps_launcher.kubernetes import submit

    if options.manifest is not None:
        _refuse_job_options(options)
    return submit.submit(options)


def _render(options: argparse.Namespace) -> int:
    from ringps_launcher.kubernetes import submit

    return submit.render(options)


def _ls(options: argparse.Namespace) -> int:
    from ringps_launcher.kubernetes import show

    return show.ls(options)


def _status(options: argparse.Namespace) -> int:
    from ringps_launcher.kubernetes import show

    return show.status(options)


def _logs(options: argparse.Namespace) -> int:
    from ringps_launcher.kubernetes import logs

    return logs.run(options)


def _suspend(options: argparse.Namespace) -> int:
    from ringps_launcher.kubernetes import control

    return control.suspend(options)


def _resume(options: argparse.Namespace) -> int:
    from ringps_launcher.kubernetes import control

    return control.resume(options)


def _cancel(options: argparse.Namespace) -> int:
    from ringps_launcher.kubernetes import control

    return control.cancel(options)


def _doctor(options: argparse.Namespace) -> int:
    from ringps_launcher.kubernetes import doctor

    return doctor.run(options)
