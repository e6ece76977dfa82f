"""`ringps submit` and `ringps render`: a job's objects, created all or none, or printed."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import string
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ringps.membership import JobKey
from ringps_launcher.kubernetes import names, preflight
from ringps_launcher.kubernetes.bundle import Bundle, bundle
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.creation import Creation
from ringps_launcher.kubernetes.errors import ClusterError, ForbiddenError, UnreachableError
from ringps_launcher.kubernetes.launch import Judgement, Start, judge
from ringps_launcher.kubernetes.login import context_namespace, require_client
from ringps_launcher.kubernetes.options import job_spec
from ringps_launcher.kubernetes.resources import manifests
from ringps_launcher.kubernetes.spec import JobSpec

_POLL_S = 0.5


def render(options: argparse.Namespace) -> int:
    """Print the job's objects; the exit code."""
    require_client()
    from ringps_launcher.kubernetes.yaml import to_yaml

    spec = _spec(options)
    sys.stdout.write(to_yaml(manifests(spec, key_text(options.key_file))))
    sys.stdout.flush()
    return 0


def submit(options: argparse.Namespace) -> int:
    """Create the job, and wait until its coordinator runs; the exit code."""
    require_client()
    job = _bundle(options)
    with Cluster.connect(options.context, job.namespace) as cluster, _terminable():
        start(cluster, job, wait_s=0 if options.no_wait else options.wait, check_needs=not options.no_check)
    _print_next(job, options.context)
    return 0


def start(cluster: Cluster, job: Bundle, *, wait_s: float, check_needs: bool = True) -> None:
    """Create the job's objects, and wait at most `wait_s` until the coordinator runs.

    After any exception none of the objects is left, or the message names those that are."""
    preflight.check(cluster, job, _say, needs=check_needs)
    creation = Creation(cluster)
    try:
        created = [creation.create(manifest) for manifest in job.manifests]
        preflight.check_gang(job.worker_job, created[-1])
        creation.give_to(created[-1])
        _tell(f"job {job.name} is created in namespace {job.namespace}: workers: {job.workers}")
        if wait_s:
            jobs = [one for one in created if one["kind"] == "Job"]
            _wait(cluster, job, jobs, wait_s)
    except BaseException as error:
        _roll_back(creation, job, error)


def key_text(path: str | None) -> str:
    """The text of the key file at `path`, which is written if it does not exist; without one, of a new key.

    Raises:
        SetupError: it cannot be read or written, is open to others, or is no key file."""
    if path is None:
        with tempfile.TemporaryDirectory(prefix="ringps-") as directory:
            return key_text(os.path.join(directory, names.KEY_ENTRY))
    file = Path(path)
    if not file.exists():
        JobKey.generate().save(file)
    JobKey.load(file)
    return file.read_text(encoding="ascii")


def _spec(options: argparse.Namespace) -> JobSpec:
    namespace = options.namespace or context_namespace(options.context) or "default"
    letters = "".join(secrets.choice(string.ascii_lowercase) for _ in range(4))
    name = options.name if options.name is not None else names.name_from(options.script, letters)
    try:
        return job_spec(options, name=name, namespace=namespace)
    except ValueError as error:
        options.parser.error(str(error))
        raise


def _bundle(options: argparse.Namespace) -> Bundle:
    if options.manifest is not None:
        return _read_bundle(options.manifest, options.namespace)
    spec = _spec(options)
    if not spec.is_module and spec.script == spec.program and os.path.isfile(spec.program):
        _say(f"{spec.program} is taken from the image; to run this machine's file, add --file {spec.program}")
    return bundle(manifests(spec, key_text(options.key_file)))


def _read_bundle(path: str, namespace: str | None) -> Bundle:
    from ringps_launcher.kubernetes.yaml import from_yaml

    called = "stdin" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        job = bundle(from_yaml(data.decode()))
    except OSError as error:
        raise ClusterError(f"cannot read {called}: {error.strerror}") from error
    except ValueError as error:
        reason = "it is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ClusterError(f"{called} is no job that `ringps render` wrote: {reason}") from error
    if namespace is not None and namespace != job.namespace:
        raise ClusterError(
            f"{called} is a job in namespace {job.namespace}: -N {namespace} cannot change that"
        )
    return job


def _wait(cluster: Cluster, job: Bundle, jobs: list[dict[str, Any]], wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            pods = cluster.list("Pod", labels=names.selector(job.name))
            found = judge(jobs, pods, _events(cluster))
        except UnreachableError as error:  # the job is there; that we cannot see it now is no harm to it
            found = Judgement(Start.WAITS, str(error))
        except ForbiddenError as error:
            _say(f"the job is created, but its start cannot be watched: {error}")
            return
        if found.state is Start.FAILED:
            raise ClusterError(found.reason + _last_line(cluster, found))
        if found.state is Start.RUNS:
            _tell("its coordinator runs")
            return
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            break
        time.sleep(min(_POLL_S, left_s))
    _say(
        f"the coordinator does not run yet: {found.reason}; the job starts by itself once it can "
        f"(`ringps status {job.name} -N {job.namespace}` says more)"
    )


def _last_line(cluster: Cluster, found: Judgement) -> str:
    """What the pod that it is about said last."""
    if not found.pod:
        return ""
    try:
        with cluster.logs(found.pod, container=found.container, tail=1) as log:
            return "".join(f": {line.decode(errors='replace')[:300]}" for line in log)
    except ClusterError:
        return ""


def _events(cluster: Cluster) -> list[dict[str, Any]]:
    try:
        return cluster.list("Event", fields="involvedObject.kind=Job,reason=FailedCreate")
    except ForbiddenError:
        return []


def _roll_back(creation: Creation, job: Bundle, error: BaseException) -> NoReturn:
    if not creation.count:
        raise error
    with _undisturbed():
        left = creation.roll_back()
    if left:
        after = (
            f"what was created could not be removed all: {', '.join(left)}; run "
            f"`ringps cancel {job.name} -N {job.namespace}`"
        )
    else:
        after = "what was created is removed again"
    if isinstance(error, ClusterError):
        raise type(error)(f"{error}; {after}", reason=error.reason, status=error.status) from error
    _say(f"interrupted: {after}")
    raise error


def _print_next(job: Bundle, context: str | None) -> None:
    where = f"{job.name} -N {job.namespace}" + (f" --context {context}" if context else "")
    for command, purpose in (
        ("status", "how it goes, and why it waits"),
        ("logs -f", "its output"),
        ("suspend", "stop it at a checkpoint"),
        ("cancel", "end and remove it"),
    ):
        _tell(f"  {f'ringps {command} {where}':<60} # {purpose}")


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # the job goes on, whether somebody reads this or not
        print(text, flush=True)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"ringps: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends us as Ctrl-C does: with everything removed again."""
    with _handling(signal.SIGTERM, signal.default_int_handler):
        yield


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Neither signal cuts off what is inside; it is bounded."""
    with _handling(signal.SIGTERM, signal.SIG_IGN), _handling(signal.SIGINT, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handling(number: signal.Signals, handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
