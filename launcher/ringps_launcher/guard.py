"""The launcher's end of the guard process (see `guard_process`)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = Path(__file__).with_name("guard_process.py")


class Guard:
    """Keeps a process running that cleans up should this one be killed.

    Everything written to the pipe reaches the guard even if this process dies right after the
    write, so `watch` is in force as soon as it returns.
    """

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._paths: set[str] = set()
        self._start()

    @property
    def pidfd(self) -> int:
        """Readable once the guard process has died; then call `replace`."""
        return self._pidfd

    def watch(self, group: int) -> None:
        """Have the process group killed if this process dies."""
        self._groups.add(group)
        self._tell(f"watch {group}")

    def unwatch(self, group: int) -> None:
        """The group was killed. Call this before reaping its leader, while its number cannot be
        given to a stranger."""
        self._groups.discard(group)
        self._tell(f"unwatch {group}")

    def remove(self, path: str) -> None:
        """Have the directory removed when this process ends, however that happens."""
        self._paths.add(path)
        self._tell(f"remove {os.fsencode(path).hex()}")

    def replace(self) -> None:
        """Start another guard in place of one that died."""
        self._stop()
        self._start()
        for group in self._groups:
            self._tell(f"watch {group}")
        for path in self._paths:
            self._tell(f"remove {os.fsencode(path).hex()}")

    def close(self) -> None:
        """Let the guard do its work and wait until it has."""
        self._stop()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        self._pidfd = os.pidfd_open(self._process.pid)

    def _stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        os.close(self._pidfd)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        # Broken when the guard died: its pidfd says so to our loop, which calls replace().
        with contextlib.suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), line.encode("ascii") + b"\n")
