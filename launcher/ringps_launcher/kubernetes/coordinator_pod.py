"""`ringps coordinator --pod NAME`: the coordinator of a job on a cluster, and the operator beside it.

The coordinator forms the ring; the operator talks to the API server, and each tells the other what it
must know. Nobody is served before the Lease is held, so two never rule. The end of the job is written
down before any worker hears of it, so a coordinator that takes this one's place knows of it too; this one
stays until all workers' pods have heard.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from ringps import worker_env
from ringps.errors import SetupError
from ringps.membership import (
    Charged,
    Coordinator,
    CoordinatorSettings,
    Fenced,
    JobKey,
    Placed,
    Recorded,
    Vanished,
    Warned,
)
from ringps_launcher.console import Console
from ringps_launcher.coordinate import Options
from ringps_launcher.events import Journal
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import ClusterError, ForbiddenError, NotFoundError
from ringps_launcher.kubernetes.fields import holds
from ringps_launcher.kubernetes.operator import Operator, OperatorSettings
from ringps_launcher.kubernetes.status import JobFacts
from ringps_launcher.loop import Loop, stop_signals
from ringps_launcher.network import parse_address

PATIENCE_S = 30.0
"""With `--min-workers` pods there: how long no further one may have come before the ring starts without."""

_LOOK_S = 1.0
"""How often it is looked whether all workers' pods have heard that the job is over."""
_LEFT_S = 60.0
"""For how long, at most, where that cannot be told: the Job is suspended, or we may not look at it."""
_FLUSH_S = 1.0


def serve(name: str, options: Options, dead_node_s: float, environ: Mapping[str, str]) -> int:
    """Serve the job `name` until it is over; returns the exit code: 0, also if the job failed, and 128 + the
    signal if this pod must go before.

    Raises:
        RingpsError: it could not start.
        ValueError: a `RINGPS_*` setting in `environ` is malformed.
    """
    with ExitStack() as stack:
        return CoordinatorPod(name, options, dead_node_s, environ, stack).run()


class _Core:
    """What the operator tells the coordinator. Its methods may be called from any thread."""

    def __init__(self, tell: Callable[[Any], None], give_up: Callable[[str], None]) -> None:
        self._tell = tell
        self.give_up = give_up

    def fence(self, held: bool) -> None:
        self._tell(Fenced(held=held))

    def place(self, host: str, place: tuple[str, ...]) -> None:
        self._tell(Placed(host=host, place=place))

    def ask_to_leave(self, pods: Sequence[tuple[int, str]], reason: str) -> None:
        self._tell(Warned(pods=tuple(pods), reason=reason))

    def charge(self, worker_id: int, host: str, cause: str, reason: str) -> None:
        self._tell(Charged(worker_id=worker_id, host=host, reason=f"{cause}: {reason}"))

    def lost(self, host: str, reason: str) -> None:
        self._tell(Vanished(host=host, reason=reason))


class CoordinatorPod:
    """All that the pod holds. `stack` undoes it, on whatever way out."""

    def __init__(
        self, name: str, options: Options, dead_node_s: float, environ: Mapping[str, str], stack: ExitStack
    ) -> None:
        self._name = name
        self._options = options
        self._stack = stack
        self._timeouts = worker_env.configure(environ).timeouts
        self._key = JobKey.load(options.key_file)
        self._stops: deque[int] = deque()
        self._stopping = threading.Event()
        self._given_up = ""
        self._verdict = ""
        self._loop = Loop()
        stack.callback(self._loop.close)
        self._loop.catch_signals(stop_signals(), self._stop)
        self._console = Console(self._loop, coloured=False)
        stack.callback(self._console.say_what_is_logged())
        self._journal = Journal(options.events, self._console.say)
        stack.callback(self._journal.close)
        assert options.workers is not None
        facts = JobFacts(
            world_size=options.workers,
            min_workers=options.min_workers,
            max_restarts=options.max_restarts,
        )
        self._cluster = Cluster.connect(in_cluster=True)
        identity = f"{_required(environ, 'POD_NAME')}/{_required(environ, 'POD_UID')}"
        settings = OperatorSettings(name=name, identity=identity, facts=facts, dead_node_s=dead_node_s)
        self._operator = Operator(settings, self._cluster, self._say, self._lease_lost)
        self._threads: list[threading.Thread] = []
        stack.callback(self._join)
        stack.callback(self._operator.close)

    def run(self) -> int:
        if not self._wait_for_lease():
            return self._stopped()
        coordinator = self._coordinator()
        self._tell = coordinator.tell
        self._stack.callback(coordinator.close)
        coordinator.start()
        self._operator.start(_Core(coordinator.tell, self._give_up))
        self._say(f"coordinator of {self._name} listens on {coordinator.address}")
        self._verdict = self._operator.recorded_verdict()
        while not self._stops and not self._verdict:
            self._turn()
        if not self._stops:
            self._say(f"the job has ended: {self._verdict}")
            self._in_background("ringps-last-pods", self._wait_for_pods)
        while not self._stops:
            self._turn()
        return self._stopped()

    def _coordinator(self) -> Coordinator:
        host, port = parse_address(self._options.bind)
        earlier = self._operator.earlier
        if earlier.generation:
            self._say(f"following on a coordinator that had formed generation {earlier.generation}")
        settings = CoordinatorSettings(
            host=host,
            port=port,
            world_size=self._options.workers,
            min_workers=self._options.min_workers,
            max_restarts=self._options.max_restarts,
            settle_s=PATIENCE_S,
            encrypt_data=self._options.encrypt_data,
            timeouts=self._timeouts,
            first_generation=max(1, earlier.generation),
            follows=earlier.generation > 0,
            pods=True,
            failures=earlier.budget_used,
            verdict=self._operator.recorded_verdict(),
        )
        return Coordinator(settings, self._key, self._note, self._on_verdict)

    # On the main thread.

    def _wait_for_lease(self) -> bool:
        held: list[bool] = []

        def wait() -> None:
            held.append(self._operator.wait_for_lease(self._stopping))
            self._loop.post(lambda: None)

        self._in_background("ringps-wait-for-lease", wait)
        while not held and not self._stops:
            self._turn()
        return bool(held) and held[0]

    def _turn(self) -> None:
        self._console.watch()
        self._loop.run_once(None)

    def _stop(self, number: int) -> None:
        self._stops.append(number)
        self._stopping.set()

    def _stopped(self) -> int:
        number = self._stops.popleft() if self._stops else signal.SIGTERM
        self._stopping.set()
        if number:
            self._console.say(f"stopped: got {signal.Signals(number).name}")
        self._console.finish(_FLUSH_S, give_up=lambda: False)
        return 128 + number if number else 0

    def _join(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    # On other threads.

    def _say(self, text: str) -> None:
        self._loop.post(lambda: self._console.say(text))

    def _note(self, event: dict[str, Any]) -> None:
        """On the coordinator's thread."""
        self._operator.note(event)
        self._loop.post(lambda: self._journal.write(event))

    def _on_verdict(self, verdict: str) -> None:
        """On the coordinator's thread."""
        self._in_background("ringps-verdict", lambda: self._record(verdict))

    def _give_up(self, reason: str) -> None:
        """The Job makes no pods any more. The job may have failed by its own verdict, which comes first."""
        if not self._given_up:
            self._given_up = reason
            self._in_background("ringps-given-up", lambda: self._record(f"failed: {reason}"))

    def _record(self, verdict: str) -> None:
        if self._verdict:
            return
        if not self._operator.record_verdict(verdict) and self._stopping.is_set():
            return

        def over() -> None:
            self._verdict = self._verdict or verdict
            self._tell(Recorded())

        self._loop.post(over)

    def _wait_for_pods(self) -> None:
        """Until the worker Job is finished or gone: then all its pods have heard."""
        waited_s = 0.0
        while not self._stopping.wait(_LOOK_S):
            waited_s += _LOOK_S
            untold = False
            try:
                job = self._cluster.get("Job", self._name)
            except NotFoundError:
                break
            except ForbiddenError:
                untold = True
            except ClusterError:
                continue
            else:
                if holds(job, "Complete") or holds(job, "Failed"):
                    break
                untold = bool((job.get("spec") or {}).get("suspend"))
            if untold and waited_s >= _LEFT_S:
                break
        self._loop.post(lambda: self._stop(0))

    def _lease_lost(self, reason: str) -> None:
        """Another coordinator rules: nothing more must come from this one."""
        os.write(2, f"ringps: {reason}; ending at once\n".encode(errors="backslashreplace"))
        os._exit(1)

    def _in_background(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()


def _required(environ: Mapping[str, str], name: str) -> str:
    try:
        return environ[name]
    except KeyError:
        raise SetupError(f"{name} is not set: --pod is for pods that `ringps submit` makes") from None
