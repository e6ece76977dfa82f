"""The workers of this machine in the loop: their exits and their output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from ringps_launcher.console import Console
from ringps_launcher.guard import Guard
from ringps_launcher.local import WorkerProcess
from ringps_launcher.loop import Loop
from ringps_launcher.output import Logs, RawLog, Stream
from ringps_launcher.plan import Seat

_READ_BYTES = 64 * 1024
_LARGEST_PIPE_BYTES = 1024 * 1024  # fs.pipe-max-size

OnExit = Callable[[Seat, int], None]
"""Called with a worker's seat and its return code, negative for a signal."""


class Crew:
    """Starts workers and forwards what they print, until each has exited and been reaped."""

    def __init__(self, loop: Loop, guard: Guard, console: Console, logs: Logs, on_exit: OnExit) -> None:
        self._loop = loop
        self._guard = guard
        self._console = console
        self._logs = logs
        self._on_exit = on_exit
        self._running: dict[int, WorkerProcess] = {}
        self._exited: list[WorkerProcess] = []
        self._pipes: list[Pipe] = []

    def start(self, seat: Seat, command: Sequence[str]) -> int:
        """Start a worker; returns its process id. A replacement goes on in its predecessor's log.

        Raises:
            OSError: the system cannot start another process.
            SetupError: its log file cannot be written.
        """
        self._retire(seat.worker_id)
        log = self._logs.open(seat.rank)
        worker = WorkerProcess(seat, command, self._guard)
        self._running[seat.worker_id] = worker
        self._loop.add_reader(worker.pidfd, partial(self._reap, worker))
        for descriptor, stream in (
            (worker.stdout, self._console.stdout_of(seat.rank)),
            (worker.stderr, self._console.stderr_of(seat.rank)),
        ):
            pipe = Pipe(seat.worker_id, descriptor, stream, log, self._loop, self._console)
            self._pipes.append(pipe)
        return worker.pid

    def terminate(self, worker_ids: Iterable[int]) -> None:
        """Send SIGTERM to these workers."""
        for worker_id in worker_ids:
            self._running[worker_id].terminate()

    def kill(self, worker_ids: Iterable[int]) -> None:
        """Kill these workers and their children."""
        for worker_id in worker_ids:
            self._running[worker_id].kill()

    def watch(self) -> None:
        """Read from the workers whose output is being read; call between two rounds of the loop."""
        self._pipes = [pipe for pipe in self._pipes if not pipe.ended]
        for pipe in self._pipes:
            pipe.watch()

    def finish(self) -> None:
        """All workers have exited: pass on what they printed last, without waiting for more.

        A pipe that does not end is held open by a process that left its worker's group.
        """
        for pipe in self._pipes:
            pipe.finish()
        self._pipes.clear()

    def close(self) -> None:
        """Kill and reap every worker that still runs, and close all descriptors."""
        for worker in self._running.values():
            worker.kill()
        for worker in [*self._running.values()]:
            self._loop.remove(worker.pidfd)
            worker.reap()
            self._exited.append(worker)
        self._running.clear()
        self.finish()
        for worker in self._exited:
            worker.close()

    def _retire(self, worker_id: int) -> None:
        """Pass on what a predecessor in this seat printed last, and give its descriptors back."""
        for pipe in self._pipes:
            if pipe.worker_id == worker_id:
                pipe.finish()
        self._pipes = [pipe for pipe in self._pipes if not pipe.ended]
        for worker in [worker for worker in self._exited if worker.seat.worker_id == worker_id]:
            worker.close()
            self._exited.remove(worker)

    def _reap(self, worker: WorkerProcess) -> None:
        self._loop.remove(worker.pidfd)
        status = worker.reap()
        del self._running[worker.seat.worker_id]
        self._exited.append(worker)
        self._on_exit(worker.seat, status)


class Pipe:
    """A worker's stdout or stderr, read as long as the reader of ours keeps up."""

    def __init__(
        self,
        worker_id: int,
        descriptor: int,
        stream: Stream,
        log: RawLog | None,
        loop: Loop,
        console: Console,
    ) -> None:
        self.worker_id = worker_id
        self._descriptor = descriptor
        self._stream = stream
        self._log = log
        self._loop = loop
        self._console = console
        self._watched = False
        self.ended = False

    def watch(self) -> None:
        """Start or stop reading, as the reader's pace has it."""
        wanted = not self.ended and not self._stream.stalled
        if wanted and not self._watched:
            self._loop.add_reader(self._descriptor, self._read)
        elif self._watched and not wanted:
            self._loop.remove(self._descriptor)
        self._watched = wanted

    def finish(self) -> None:
        """Read what lies in the pipe, at most a pipe full, and stop."""
        for _ in range(_LARGEST_PIPE_BYTES // _READ_BYTES):
            if self.ended or not self._read():
                break
        self._end()

    def _read(self) -> bool:
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._end()
            return False
        if self._log is not None and (trouble := self._log.write(data)):
            self._console.say(trouble)
        self._stream.feed(data)
        return True

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self._stream.finish()
            self.watch()
