"""`ringps coordinator`: serve one job, and end with its exit code."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringps import worker_env
from ringps.membership import Coordinator, CoordinatorSettings, JobKey, starting_again
from ringps_launcher import stimuli
from ringps_launcher.console import Console
from ringps_launcher.events import Journal
from ringps_launcher.loop import Loop, stop_signals
from ringps_launcher.network import parse_address
from ringps_launcher.outcome import Saved, stopped_at

SETTLE_S = 3.0
"""Without a number of workers: how long no launcher may have come before the job starts."""

_FLUSH_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `ringps coordinator` was asked for."""

    bind: str
    """`HOST:PORT` to listen on; port 0 is any."""

    key_file: str
    """The job key; written if it does not exist."""

    workers: int | None = None
    """Workers of the whole job, or None for those of the launchers that come."""

    min_workers: int = 1
    """With how many workers the ring still goes on."""

    max_restarts: int = 3
    """How often the whole ring is started again."""

    encrypt_data: bool = False
    """Encrypt data connections too."""

    events: str | None = None
    """The events file."""


def serve(options: Options, environ: Mapping[str, str]) -> int:
    """Serve until the job is over; returns the exit code.

    Raises:
        RingpsError: it could not start.
        ValueError: a `RINGPS_*` setting in `environ` is malformed.
    """
    with ExitStack() as stack:
        return Service(options, environ, stack).run()


class Service:
    """All that one `ringps coordinator` holds. `stack` undoes it, on whatever way out."""

    def __init__(self, options: Options, environ: Mapping[str, str], stack: ExitStack) -> None:
        self._options = options
        self._stops: deque[int] = deque()
        self._happened: deque[dict[str, Any]] = deque()
        self._over = False
        self._saved: Saved | None = None
        self._loop = Loop()
        stack.callback(self._loop.close)
        self._loop.catch_signals(stop_signals(), self._stops.append)
        self._console = Console(self._loop, coloured=False)
        stack.callback(self._console.say_what_is_logged())
        self._journal = Journal(options.events, self._console.say)
        stack.callback(self._journal.close)
        host, port = parse_address(options.bind)
        settings = CoordinatorSettings(
            host=host,
            port=port,
            world_size=options.workers,
            min_workers=options.min_workers,
            max_restarts=options.max_restarts,
            settle_s=SETTLE_S,
            encrypt_data=options.encrypt_data,
            timeouts=worker_env.configure(environ).timeouts,
        )
        self._coordinator = Coordinator(settings, load_or_write_key(options.key_file), self._receive)
        waiter = threading.Thread(target=self._wait, name="ringps-job-over", daemon=True)
        stack.callback(waiter.join)
        stack.callback(self._coordinator.close)
        self._coordinator.start()
        waiter.start()

    def run(self) -> int:
        self._console.print(f"coordinator listens on {self._coordinator.address}")
        if self._options.workers is None:
            self._console.say(
                "without -n the job is made up of the launchers that come until none has come "
                f"for {SETTLE_S:g} s"
            )
        while not self._over and not self._stops:
            self._console.watch()
            self._loop.run_once(None)
            while self._happened:
                self._note(self._happened.popleft())
        code = self._outcome()
        self._console.finish(_FLUSH_S, give_up=lambda: False)
        return code

    def _outcome(self) -> int:
        failure = self._coordinator.failure
        if failure is not None:
            self._console.say(
                f"rank {failure.rank} (worker {failure.worker_id} on {failure.host}) failed: {failure.reason}"
            )
            return failure.code
        if self._stops:
            number = self._stops.popleft()
            self._console.say(f"stopped: got {signal.Signals(number).name}")
            return 128 + number
        if self._coordinator.suspended:
            self._console.say(stopped_at(self._saved))
            return worker_env.SUSPENDED_CODE
        return 0

    def _note(self, event: dict[str, Any]) -> None:
        self._journal.write(event)
        meaning = stimuli.from_job_event(event)
        if isinstance(meaning, stimuli.CheckpointSaved):
            self._saved = meaning.saved
        elif event["event"] == "ring_restarting":
            outlook = starting_again(event["restarts_left"], self._options.max_restarts)
            self._console.say(f"{event['reason']}; {outlook}")

    def _receive(self, event: dict[str, Any]) -> None:
        """On the coordinator's thread."""
        self._loop.post(lambda: self._happened.append(event))

    def _wait(self) -> None:
        """On a thread of its own."""
        self._coordinator.wait()
        self._loop.post(self._end)

    def _end(self) -> None:
        self._over = True


def load_or_write_key(path: str) -> JobKey:
    """The key in the file, or a new one that is written there.

    Raises:
        SetupError: the file cannot be read or written, or is open to other users.
    """
    if not Path(path).exists():
        JobKey.generate().save(path)
    return JobKey.load(path)
