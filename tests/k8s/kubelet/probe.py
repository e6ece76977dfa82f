"""Readiness probes of running containers: tcpSocket and exec."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from typing import Any

from tests.k8s.kubelet.container import Container
from tests.k8s.kubelet.network import Attachment, inside

_ENTER = ("--mount", "--uts", "--ipc", "--pid", "--root", "--wd")


def supported(probe: Mapping[str, Any]) -> bool:
    return "tcpSocket" in probe or "exec" in probe


class Prober:
    """Probes in a thread of its own until it is closed, and calls `changed` whenever `ready` has changed."""

    def __init__(
        self,
        probe: Mapping[str, Any],
        spec: Mapping[str, Any],
        container: Container,
        attachment: Attachment,
        changed: Callable[[], None],
    ) -> None:
        self.ready = False
        self.problem = ""
        self._probe = probe
        self._spec = spec
        self._container = container
        self._attachment = attachment
        self._changed = changed
        self._closed = threading.Event()
        self.held = False
        """While held nothing is probed, as if the machine stood still."""
        self._thread = threading.Thread(target=self._run, name="kubelet-probe", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Does not wait for a probe under way; its outcome counts no more."""
        self._closed.set()

    def _run(self) -> None:
        successes = failures = 0
        self._closed.wait(self._probe.get("initialDelaySeconds", 0))
        while not self._closed.is_set():
            if not self.held:
                try:
                    self._try()
                except OSError as error:
                    successes, failures = 0, failures + 1
                    self.problem = str(error)
                else:
                    successes, failures = successes + 1, 0
                enough = successes >= self._probe.get("successThreshold", 1)
                ready = enough or (self.ready and failures < self._probe.get("failureThreshold", 3))
                if ready != self.ready and not self._closed.is_set() and not self.held:
                    self.ready = ready
                    self._changed()
            self._closed.wait(self._probe.get("periodSeconds", 10))

    def _try(self) -> None:
        """Raises `OSError` if the container is not ready."""
        limit_s = float(self._probe.get("timeoutSeconds", 1))
        if "tcpSocket" in self._probe:
            self._attachment.connect(self._port(self._probe["tcpSocket"]["port"]), limit_s)
            return
        container, namespace = self._container, self._attachment.namespace
        if container.pid is None or namespace is None:
            raise OSError("the container does not run")
        argv = ["nsenter", f"--target={container.pid}", *_ENTER, "--", *self._probe["exec"]["command"]]
        inside(namespace, lambda: _execute(argv, container, limit_s))

    def _port(self, port: int | str) -> int:
        if isinstance(port, int):
            return port
        for declared in self._spec.get("ports") or ():
            if declared.get("name") == port:
                return int(declared["containerPort"])
        raise OSError(f"couldn't find port: {port}")


def _execute(argv: list[str], container: Container, limit_s: float) -> None:
    process = subprocess.Popen(
        argv,
        env=dict(container.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise OSError(f"command timed out after {limit_s:g} s") from None
    if code != 0:
        raise OSError(f"command exited with {code}")
