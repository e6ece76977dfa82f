"""The kubelet's end of a running container: its shim, and what became of it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHIM = Path(__file__).with_name("shim.py")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What to run, and in what surroundings."""

    argv: list[str]
    environ: Mapping[str, str]
    cwd: str
    hostname: str
    network: int
    """A descriptor of the network namespace."""
    root: Path
    """An empty directory, where the root is mounted; not seen outside the container."""
    log: Path
    files: Mapping[str, str]
    """Files that the kubelet writes, path to content."""
    mounts: list[dict[str, Any]]
    read_only: bool
    drop_capabilities: bool
    no_new_privileges: bool
    groups: list[int]


_PASSED = (
    *("argv", "cwd", "hostname", "network", "mounts"),
    *("read_only", "drop_capabilities", "no_new_privileges", "groups"),
)
"""What the shim gets as it is."""


@dataclass(frozen=True)
class Ended:
    """How a container ended, and when (unix time)."""

    code: int
    signal: int
    at_s: float
    problem: str = ""
    """Why it could not even be started."""


class Container:
    """One run of a container. A thread calls `changed` when it runs and when it has ended."""

    def __init__(self, launch: Launch, changed: Callable[[], None]) -> None:
        self.id = f"process://{uuid.uuid4().hex}"
        self.log = launch.log
        self.environ = launch.environ
        self.pid: int | None = None
        """Its command's process id on this machine, once it runs."""
        self.started_at_s = 0.0
        self.ended: Ended | None = None
        self._changed = changed
        self._lock = threading.Lock()
        launch.root.mkdir(parents=True, exist_ok=True)
        with open(launch.log.with_suffix(".shim"), "wb") as complaints:
            self._shim = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SHIM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                cwd="/",
                pass_fds=(launch.network,),
                start_new_session=True,
            )
        wanted = {
            **{name: getattr(launch, name) for name in _PASSED},
            "environ": dict(launch.environ),
            "files": dict(launch.files),
            "root": str(launch.root),
            "log": str(launch.log),
        }
        self._tell(json.dumps(wanted))
        self._reader = threading.Thread(target=self._read, name="kubelet-container", daemon=True)
        self._reader.start()

    def signal(self, number: int) -> None:
        """Signal the command itself, which is pid 1 in the container."""
        self._tell(f"signal {number}")

    def signal_all(self, number: int) -> None:
        """Signal every process in the container."""
        self._tell(f"all {number}")

    def kill(self) -> None:
        """End the command at once; the kernel then ends the rest."""
        self._tell(f"signal {int(signal.SIGKILL)}")

    def close(self) -> None:
        """Kill it if it still runs, and wait until nothing of it is left."""
        with self._lock:
            assert self._shim.stdin is not None
            with contextlib.suppress(OSError):
                self._shim.stdin.close()
        self._reader.join()

    def _tell(self, line: str) -> None:
        with self._lock:
            assert self._shim.stdin is not None
            if not self._shim.stdin.closed:
                with contextlib.suppress(BrokenPipeError):
                    self._shim.stdin.write(line.encode() + b"\n")
                    self._shim.stdin.flush()

    def _read(self) -> None:
        ended: Ended | None = None
        assert self._shim.stdout is not None
        for line in self._shim.stdout:
            event = json.loads(line)
            if "started" in event:
                self.started_at_s = time.time()
                self.pid = event["started"]
                self._changed()
            elif "error" in event:
                ended = Ended(128, 0, time.time(), event["error"])
            else:
                ended = Ended(event["exited"], event["signal"], time.time())
        self._shim.wait()
        self._shim.stdout.close()
        with self._lock, contextlib.suppress(OSError):
            assert self._shim.stdin is not None
            self._shim.stdin.close()
        if ended is None and self.pid is None:
            complaint = self.log.with_suffix(".shim").read_text(errors="replace").strip().splitlines()
            ended = Ended(128, 0, time.time(), f"the shim failed: {complaint[-1] if complaint else 'killed'}")
        self.ended = ended or Ended(137, 9, time.time())
        self._changed()
