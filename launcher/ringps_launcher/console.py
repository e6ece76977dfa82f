"""What this process prints: the workers' lines and its own, on stdout and stderr."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ringps_launcher.loop import Loop
from ringps_launcher.output import Sink, Stream, open_sinks


class Console:
    """Our two output streams in the loop: written as fast as their readers read, never waited for."""

    def __init__(self, loop: Loop, *, coloured: bool) -> None:
        self._loop = loop
        self._coloured = coloured
        self._out, self._err = open_sinks()
        self._watched: set[int] = set()

    @property
    def broken(self) -> bool:
        """A reader of ours went away."""
        return self._out.broken or self._err.broken

    def say(self, text: str) -> None:
        """Print a line of our own to stderr."""
        self._err.write(f"ringps: {text}\n".encode(errors="backslashreplace"))

    def print(self, text: str) -> None:
        """Print a line of our own to stdout."""
        self._out.write(f"{text}\n".encode(errors="backslashreplace"))

    def say_what_is_logged(self) -> Callable[[], None]:
        """Say what the library logs as a warning or worse; returns what ends that."""
        handler = _Handler(lambda line: self._loop.post(lambda: self.say(line)))
        logger = logging.getLogger("ringps")
        logger.addHandler(handler)
        return lambda: logger.removeHandler(handler)

    def stdout_of(self, rank: int) -> Stream:
        """Where this rank's stdout goes."""
        return Stream(rank, self._out, coloured=self._coloured)

    def stderr_of(self, rank: int) -> Stream:
        """Where this rank's stderr goes."""
        return Stream(rank, self._err, coloured=self._coloured)

    def watch(self) -> None:
        """Have the loop write what waits; call between two rounds of the loop."""
        for sink in (self._out, self._err):
            if sink.pending_bytes and sink.descriptor not in self._watched:
                self._loop.add_writer(sink.descriptor, sink.flush)
                self._watched.add(sink.descriptor)
            elif not sink.pending_bytes and sink.descriptor in self._watched:
                self._unwatch(sink)

    def finish(self, limit_s: float | None, give_up: Callable[[], bool]) -> None:
        """Wait until all is written, but no longer than the limit, and not once `give_up()`."""
        end_s = None if limit_s is None else time.monotonic() + limit_s
        while (self._out.pending_bytes or self._err.pending_bytes) and not give_up():
            left_s = None if end_s is None else end_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                break
            self.watch()
            self._loop.run_once(left_s)
        self.watch()

    def lost(self) -> str | None:
        """Why some of the output could not be written, if that happened."""
        return self._out.lost or self._err.lost

    def _unwatch(self, sink: Sink) -> None:
        self._loop.remove(sink.descriptor)
        self._watched.discard(sink.descriptor)


class _Handler(logging.Handler):
    """Called on whatever thread logs."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(self.format(record))
