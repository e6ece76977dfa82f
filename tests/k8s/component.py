"""A server process of a control plane: started, stopped and started again, always with the same arguments."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ringps_launcher.guard import Guard
from tests.leftovers import MARKER

_STOP_S = 10.0


class StartError(Exception):
    """A component did not start; the message has the end of its log."""


class Component:
    """One process. The guard kills it should this process die, whichever thread had started it."""

    def __init__(
        self, name: str, command: Sequence[str | Path], *, guard: Guard, log: Path, environ: Mapping[str, str]
    ) -> None:
        self.name = name
        self.command = [str(word) for word in command]
        self.log = log
        self._guard = guard
        self._environ = dict(environ)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} does not run"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and not self._ended(0)

    def start(self) -> None:
        assert self._process is None, f"{self.name} runs already"
        # A test that starts it again does not own it: it outlives the test.
        environ = {k: v for k, v in os.environ.items() if k not in (MARKER, "KUBECONFIG")} | self._environ
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.log.parent,
                env=environ,
                start_new_session=True,
            )
        self._guard.watch(self._process.pid)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it; nothing is said if it has ended already."""
        if self._process is None:
            return
        for each in (number, signal.SIGKILL):
            # Our child, not waited for yet: the number is still its own.
            os.killpg(self._process.pid, each)
            if self._ended(_STOP_S):
                break
        self._guard.unwatch(self._process.pid)
        self._process.wait()
        self._process = None

    def wait_until(self, ready: Callable[[], bool], limit_s: float) -> None:
        """Wait until `ready`; `StartError` if it ends or the time is over before."""
        end = time.monotonic() + limit_s
        while not ready():
            if self._ended(0.05):
                raise StartError(f"{self.name} ended; {self.tail()}")
            if time.monotonic() > end:
                raise StartError(f"{self.name} is not ready after {limit_s:g} s; {self.tail()}")

    def tail(self, lines: int = 25) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return f"the end of {self.log}:\n" + "\n".join(text.splitlines()[-lines:])

    def _ended(self, limit_s: float) -> bool:
        """Whether it ends within the time; it is left to be waited for."""
        assert self._process is not None
        ended = os.pidfd_open(self._process.pid)
        try:
            return bool(select.select([ended], [], [], limit_s)[0])
        finally:
            os.close(ended)


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports below those that the kernel gives to outgoing connections: they stay free over a restart."""
    found: list[int] = []
    for port in random.sample(range(20000, 30000), 200):
        with socket.socket() as candidate:
            try:
                candidate.bind((host, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise StartError(f"found no {count} free ports of {host} in 200 tries")
