"""Worker processes of this machine: spawn, signal, reap."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from ringps_launcher.guard import Guard
from ringps_launcher.plan import Seat

_GATE = str(Path(__file__).with_name("gate.py"))


class WorkerProcess:
    """One worker, leader of a session and process group of its own.

    Its standard input is empty, its standard output and error are pipes to us.
    """

    def __init__(self, seat: Seat, command: Sequence[str], guard: Guard) -> None:
        """Start it; `guard` watches over it before its program runs.

        Raises:
            OSError: the system cannot start another process.
        """
        self.seat = seat
        self._guard = guard
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", _GATE, *command],
            env=dict(seat.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.pid = self._process.pid
        try:
            self.pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._process.kill()
            self._process.communicate()
            raise
        guard.watch(self.pid)
        self._open_gate()
        for pipe in (self.stdout, self.stderr):
            os.set_blocking(pipe, False)

    @property
    def stdout(self) -> int:
        return _descriptor(self._process.stdout)

    @property
    def stderr(self) -> int:
        return _descriptor(self._process.stderr)

    def terminate(self) -> None:
        """Send SIGTERM to the worker alone: its children are its own to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the worker and every process that it left in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Once `pidfd` is readable: kill what the worker left behind, and take its return code,
        negative for a signal."""
        # While the leader is unreaped nobody else can be given the group's number.
        self.kill()
        self._guard.unwatch(self.pid)
        return self._process.wait()

    def close(self) -> None:
        """Close our ends of its pipes; the process has been reaped."""
        os.close(self.pidfd)
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def _open_gate(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead already, which its pidfd tells
            os.write(pipe.fileno(), b"g")
        pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)


def _descriptor(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    return pipe.fileno()
