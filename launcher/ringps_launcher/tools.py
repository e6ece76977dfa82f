"""What a launcher keeps over all starts of the ring: its loop, console, guard, events file and logs."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack

from ringps.errors import SetupError
from ringps_launcher.console import Console
from ringps_launcher.events import Journal
from ringps_launcher.guard import Guard
from ringps_launcher.loop import Loop, stop_signals
from ringps_launcher.options import Options
from ringps_launcher.output import Logs, wants_colour


class Tools:
    """`stack` gives them back, on whatever way out."""

    def __init__(self, options: Options, environ: Mapping[str, str], stack: ExitStack) -> None:
        """
        Raises:
            SetupError: the events file or the log directory cannot be written.
        """
        self.stops: deque[int] = deque()
        """The signals that asked us to end and were not acted upon yet."""
        self.loop = Loop()
        stack.callback(self.loop.close)
        self.loop.catch_signals(stop_signals(), self.stops.append)
        self.console = Console(self.loop, coloured=wants_colour(environ))
        stack.callback(self.console.say_what_is_logged())
        self.journal = Journal(options.events, self.console.say)
        stack.callback(self.journal.close)
        if options.log_dir is not None:
            _make_log_dir(options.log_dir)
        self.logs = Logs(options.log_dir)
        stack.callback(self.logs.close)
        self.guard = Guard()
        stack.callback(self.guard.close)
        self.loop.add_reader(self.guard.pidfd, self._guard_died)

    def turn(self, timeout_s: float | None) -> None:
        """Wait for something to happen, and let it."""
        broken = self.console.broken
        self.console.watch()
        self.loop.run_once(timeout_s)
        if self.console.broken and not broken:
            self.stops.append(signal.SIGPIPE)

    def pause(self, duration_s: float) -> None:
        """Wait that long, or until somebody asks us to end."""
        end_s = time.monotonic() + duration_s
        while not self.stops and (left_s := end_s - time.monotonic()) > 0:
            self.turn(left_s)

    def _guard_died(self) -> None:
        self.loop.remove(self.guard.pidfd)
        self.guard.replace()
        self.loop.add_reader(self.guard.pidfd, self._guard_died)
        self.console.say("the guard process was killed; started another")


def _make_log_dir(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot make the log directory {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise SetupError(f"the log directory {path} is not writable; choose another --log-dir")
