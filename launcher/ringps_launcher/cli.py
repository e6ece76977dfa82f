"""The command line: parsing and printing only."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ringps.errors import RingpsError
from ringps_launcher.job import Job
from ringps_launcher.kubernetes import options as kubernetes
from ringps_launcher.options import Options

_USAGE_ERROR = 2
_FAILURE = 1

_MIN_WORKERS = (
    "when a worker is lost, the ring goes on in the same processes as long as M workers are left "
    "(default: 1); with as many as the job has, it is a fixed ring: the first loss ends the job"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    _open_standard_descriptors()
    try:
        options = _parser().parse_args(argv)
        return int(options.handler(options))
    except UsageError as error:
        _complain(f"{error}; see `{error.program} --help`")
        return _USAGE_ERROR
    except (RingpsError, ValueError, OSError) as error:
        _complain(str(error))
        return _FAILURE
    except KeyboardInterrupt:
        return 130


class UsageError(Exception):
    """The command line cannot be understood."""

    def __init__(self, message: str, program: str = "ringps") -> None:
        super().__init__(message)
        self.program = program


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.prog)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        from importlib import metadata  # slow to load, and only needed here

        print(f"ringps {metadata.version('ringps')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ringps", description="Data-parallel training in a ring.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser, required=True)
    _add_run(commands.add_parser("run", help="run a script in several workers", allow_abbrev=False))
    _add_coordinator(
        commands.add_parser("coordinator", help="let launchers on several machines meet", allow_abbrev=False)
    )
    _add_checkpoints(
        commands.add_parser("checkpoints", help="list, verify or export checkpoints", allow_abbrev=False)
    )
    kubernetes.add_commands(commands)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_run)
    parser.usage = "ringps run -n N [options] [-m] SCRIPT [ARGUMENT ...]"
    parser.description = (
        "Start N workers on this machine, each of which runs SCRIPT. Alone, they are the whole "
        "job; with --join they are this machine's part of it."
    )
    add = parser.add_argument
    add("-n", "--workers", type=_count, required=True, metavar="N", help="workers on this machine")
    add("-m", "--module", action="store_true", help="SCRIPT is a module's name, as for python -m")
    add(
        "--transport",
        choices=("auto", "shm", "tcp", "zmq", "nccl", "cuda_ipc"),
        default="auto",
        help="how data travels (default: auto); nccl and cuda_ipc are about tensors on GPUs, and leave all "
        "else to auto",
    )
    add("--encrypt-data", action="store_true", help="encrypt data connections too, not only control")
    add(
        "--min-workers",
        type=_count,
        metavar="M",
        help=f"{_MIN_WORKERS}. Of a job on several machines, `ringps coordinator` is told.",
    )
    add(
        "--max-restarts",
        type=_restarts,
        default=3,
        metavar="R",
        help="lost workers that are replaced on this machine, all in all (default: 3); meanwhile, the ring "
        "goes on without them. When too few are left and there is a checkpoint, the whole ring is started "
        "again from it, which counts as one, too; of a job on several machines, `ringps coordinator` has a "
        "number of its own for that.",
    )
    add(
        "--checkpoint-dir",
        metavar="DIR",
        type=_directory,
        help="where ringps.Checkpointer saves, unless the script names a directory; a path or a URL",
    )
    add("--join", metavar="HOST:PORT", type=_address, help="the coordinator of a job on several machines")
    add("--key-file", metavar="FILE", help="the job key that the coordinator wrote; goes with --join")
    add(
        "--address",
        metavar="IP",
        type=_ip,
        help="where the other machines reach this one (default: found out)",
    )
    add("--host", metavar="NAME", help="this machine's name in messages (default: its host name)")
    add(
        "--pod",
        action="store_true",
        help="this launcher is a pod of a cluster: with --join and --worker-id, it waits for a coordinator "
        "as long as it takes, and ends when the job does (`ringps submit` writes this)",
    )
    add("--worker-id", type=_step, metavar="ID", help="of the first worker here; goes with --pod")
    add("--events", metavar="FILE", help="append what happens, one JSON object a line")
    add("--log-dir", metavar="DIR", help="write each rank's output to DIR/rank-R.log too, over older ones")
    add(
        "--grace",
        metavar="SECONDS",
        type=_seconds,
        default=10.0,
        help="time from SIGTERM to SIGKILL (default: 10); a job that is to stop at a checkpoint must have "
        "finished it within this time",
    )
    add("script", metavar="SCRIPT", help="Python script, or module with -m")
    add("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="handed to the script")


def _add_coordinator(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_coordinator)
    parser.description = (
        "Serve one job: launchers join with `ringps run --join`. Ends with the job, with its exit code."
    )
    add = parser.add_argument
    add("--bind", metavar="HOST:PORT", type=_address, required=True, help="where to listen")
    add(
        "--key-file",
        metavar="FILE",
        required=True,
        help="the job key; written if it does not exist, then to be copied to the other machines",
    )
    add(
        "-n",
        "--workers",
        type=_count,
        metavar="TOTAL",
        help="workers of the whole job (default: of those launchers that come soon after each other)",
    )
    add("--min-workers", type=_count, default=1, metavar="M", help=_MIN_WORKERS)
    add(
        "--max-restarts",
        type=_restarts,
        default=3,
        metavar="R",
        help="how often the whole ring is started again, from the latest checkpoint, when too few workers "
        "are left (default: 3)",
    )
    add("--encrypt-data", action="store_true", help="encrypt data connections too, not only control")
    add("--events", metavar="FILE", help="append what happens, one JSON object a line")
    add(
        "--pod",
        metavar="NAME",
        help="this is the coordinator's pod of the job NAME in a cluster (`ringps submit` writes this)",
    )
    add(
        "--dead-node-s",
        type=_seconds,
        metavar="SECONDS",
        default=20.0,
        help="with --pod: for how long a node must be dead before its pods are deleted (default: 20)",
    )


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.description = "Look into a checkpoint directory. DIR is a path, or a URL such as s3://BUCKET/PATH."
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser, required=True)
    ls = commands.add_parser("ls", help="list the checkpoints in a directory", allow_abbrev=False)
    verify = commands.add_parser("verify", help="read all files and check their hashes", allow_abbrev=False)
    export = commands.add_parser("export", help="write one in another format", allow_abbrev=False)
    ls.description = "List the checkpoints in DIR. Of their files only the sizes are looked at."
    verify.description = "Read every byte of the checkpoints in DIR; exits with 1 if anything is damaged."
    export.description = (
        "Write the training state of a checkpoint to OUT: a file for torch.load, or a directory for "
        "torch.distributed.checkpoint."
    )
    for command, handler in ((ls, _ls), (verify, _verify), (export, _export)):
        command.set_defaults(handler=handler)
        command.add_argument("directory", metavar="DIR", help="the checkpoint directory: a path or URL")
    for command in (ls, verify):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    newest = "the newest one that is whole"
    for command, default in ((verify, "all"), (export, newest)):
        command.add_argument(
            "--step", type=_step, metavar="N", help=f"the checkpoints of step N (default: {default})"
        )
    add = export.add_argument
    add("out", metavar="OUT", help="the file or directory to write; it must not exist")
    formats = ("torch", "dcp")
    add("--format", choices=formats, default="torch", help="what to write (default: torch)")
    add("--force", action="store_true", help="replace OUT if it exists")


def _ls(options: argparse.Namespace) -> int:
    from ringps_launcher import checkpoints

    return checkpoints.ls(options.directory, as_json=options.json)


def _verify(options: argparse.Namespace) -> int:
    from ringps_launcher import checkpoints

    return checkpoints.verify(options.directory, options.step, as_json=options.json)


def _export(options: argparse.Namespace) -> int:
    from ringps_launcher import checkpoints

    return checkpoints.export(
        options.directory, options.out, options.step, options.format, force=options.force
    )


def _run(options: argparse.Namespace) -> int:
    if not options.module:
        _check_script(options.script)
    if (options.join is None) != (options.key_file is None):
        raise UsageError("--join and --key-file go together", "ringps run")
    if options.pod != (options.worker_id is not None) or (options.pod and options.join is None):
        raise UsageError("--pod, --worker-id and --join go together", "ringps run")
    if options.address is not None and options.join is None:
        raise UsageError("--address goes with --join", "ringps run")
    if options.join is not None and options.min_workers is not None:
        raise UsageError("with --join, --min-workers goes to `ringps coordinator`", "ringps run")
    _check_min_workers(options, "ringps run")
    job = Job(
        program=options.script,
        arguments=tuple(options.arguments),
        is_module=options.module,
        workers=options.workers,
        transport=options.transport,
        encrypt_data=options.encrypt_data,
        grace_s=options.grace,
        min_workers=options.min_workers or 1,
        max_restarts=options.max_restarts,
        checkpoint_dir=options.checkpoint_dir,
    )
    from ringps_launcher import supervise  # loads ZeroMQ: only once the arguments are right

    return supervise.run(
        job,
        Options(
            python=sys.executable,
            host=options.host or socket.gethostname(),
            join=options.join,
            key_file=options.key_file,
            address=options.address,
            place=options.worker_id,
            events=options.events,
            log_dir=options.log_dir,
        ),
        os.environ,
    )


def _coordinator(options: argparse.Namespace) -> int:
    _check_min_workers(options, "ringps coordinator")
    if options.pod is not None and options.workers is None:
        raise UsageError("with --pod, give the number of workers (-n)", "ringps coordinator")
    from ringps_launcher import coordinate

    chosen = coordinate.Options(
        bind=options.bind,
        key_file=options.key_file,
        workers=options.workers,
        min_workers=options.min_workers,
        max_restarts=options.max_restarts,
        encrypt_data=options.encrypt_data,
        events=options.events,
    )
    if options.pod is None:
        return coordinate.serve(chosen, os.environ)
    from ringps_launcher.kubernetes import coordinator_pod

    return coordinator_pod.serve(options.pod, chosen, options.dead_node_s, os.environ)


def _check_min_workers(options: argparse.Namespace, program: str) -> None:
    wanted, workers = options.min_workers, options.workers
    if wanted is not None and workers is not None and wanted > workers:
        raise UsageError(f"--min-workers {wanted} is above -n {workers}: the job has no more", program)


def _check_script(path: str) -> None:
    if os.path.isdir(path):
        raise UsageError(f"{path} is a directory; name a script, or a module with -m", "ringps run")
    if not os.path.exists(path):
        raise UsageError(f"there is no script {path}", "ringps run")
    if not os.access(path, os.R_OK):
        raise UsageError(f"script {path} cannot be read", "ringps run")


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if count < 1:
        raise argparse.ArgumentTypeError(f"at least 1 worker is needed, not {count}")
    return count


def _step(text: str) -> int:
    try:
        step = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if step < 0:
        raise argparse.ArgumentTypeError(f"there is no step {step}")
    return step


def _restarts(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if count < 0:
        raise argparse.ArgumentTypeError(f"0 restarts is the least, not {count}")
    return count


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text} seconds is no sensible time")
    return seconds


def _directory(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty name is no directory")
    return text if "://" in text else os.path.abspath(text)


def _ip(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from None


def _address(text: str) -> str:
    from ringps_launcher.network import parse_address

    try:
        parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _complain(message: str) -> None:
    line = " ".join(message.split())
    with contextlib.suppress(OSError):  # nobody is there to read it
        os.write(2, f"ringps: {line}\n".encode(errors="backslashreplace"))


def _open_standard_descriptors() -> None:
    """Started with one of them closed, we would hand out its number to some other file."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
