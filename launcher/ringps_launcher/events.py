"""The events file: one JSON object a line."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from typing import Any

from ringps.errors import SetupError


class EventLog:
    """Appends events to a file, each as one whole line as soon as it happens. Thread-safe."""

    def __init__(self, path: str) -> None:
        """Open or create the file.

        Raises:
            SetupError: it cannot be written.
        """
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._end_torn_line()
        except OSError as error:
            raise SetupError(f"cannot write events to {path}: {error.strerror}") from error

    def write(self, event: dict[str, Any]) -> None:
        """Append an event; `t`, in seconds since the epoch, is added where it is missing.

        Raises:
            OSError: the file cannot be written any more (disk full, say).
        """
        line = json.dumps({"t": round(time.time(), 6), **event}).encode() + b"\n"
        written = os.write(self._descriptor, line)
        while written < len(line):
            written += os.write(self._descriptor, line[written:])

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _end_torn_line(self) -> None:
        """A writer that was killed may have left half a line, which ours must not continue."""
        status = os.fstat(self._descriptor)
        is_file = stat.S_ISREG(status.st_mode) and status.st_size
        if is_file and os.pread(self._descriptor, 1, status.st_size - 1) != b"\n":
            os.write(self._descriptor, b"\n")


class Journal:
    """A command's events file, if it has one. A command goes on without a file that cannot be written."""

    def __init__(self, path: str | None, say: Callable[[str], None]) -> None:
        """Open the file.

        Args:
            path: the file; None for none.
            say: tells the user, should it be cut off.

        Raises:
            SetupError: it cannot be written.
        """
        self._path = path
        self._say = say
        self._log = None if path is None else EventLog(path)

    def write(self, event: dict[str, Any]) -> None:
        """Append an event, if there is a file."""
        if self._log is None:
            return
        try:
            self._log.write(event)
        except OSError as error:
            self.close()
            self._say(f"{self._path} is cut off here: {error.strerror}")

    def close(self) -> None:
        """Close the file. Safe to call again."""
        log, self._log = self._log, None
        if log is not None:
            log.close()
