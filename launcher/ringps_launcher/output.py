"""The workers' output: prefixed whole lines on our own stdout and stderr, raw bytes in log files."""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Mapping
from pathlib import Path

from ringps.errors import SetupError
from ringps_launcher.lines import LineSplitter

HIGH_WATER_BYTES = 256 * 1024
"""With more than this waiting to be written, the workers are not read from: they wait, as they
would if they wrote to our reader themselves."""

_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)


class Sink:
    """One of our own output streams. Never blocks, whatever its reader does.

    The descriptor is left in blocking mode, since its open file is shared with whoever started
    us: a pipe or terminal that polls as writable takes PIPE_BUF bytes without blocking.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.is_terminal = os.isatty(descriptor)
        self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._pending = bytearray()
        self._broken = False
        self._lost: str | None = None

    @property
    def broken(self) -> bool:
        """Nobody can read any more what we write; writes are thrown away."""
        return self._broken

    @property
    def lost(self) -> str | None:
        """Why some output could not be written though somebody would read it (disk full, say)."""
        return self._lost

    @property
    def pending_bytes(self) -> int:
        """Accepted but not yet written."""
        return len(self._pending)

    def write(self, data: bytes) -> None:
        """Accept bytes and write what can be written now."""
        if not self._broken:
            self._pending += data
            self.flush()

    def flush(self) -> None:
        """Write what can be written now."""
        try:
            while self._pending and self._writable():
                size = len(self._pending) if self._is_file else select.PIPE_BUF
                written = os.write(self.descriptor, self._pending[:size])
                del self._pending[:written]
        except BlockingIOError:
            pass  # whoever shares the open file with us made it non-blocking
        except OSError as error:
            self._pending.clear()
            if error.errno in (errno.EPIPE, errno.EIO):  # EIO: the terminal vanished
                self._broken = True
            else:
                self._lost = error.strerror

    def _writable(self) -> bool:
        if self._is_file:
            return True
        poller = select.poll()
        poller.register(self.descriptor, select.POLLOUT)
        return bool(poller.poll(0))


def open_sinks(stdout: int = 1, stderr: int = 2) -> tuple[Sink, Sink]:
    """Sinks for our stdout and stderr: the same one twice if both lead to the same place, or
    lines of the two could be torn by each other."""
    out = Sink(stdout)
    a, b = os.fstat(stdout), os.fstat(stderr)
    same = (a.st_dev, a.st_ino, a.st_rdev) == (b.st_dev, b.st_ino, b.st_rdev)
    return out, out if same else Sink(stderr)


def prefix_of(rank: int, *, coloured: bool) -> bytes:
    """What stands before each line of this rank."""
    prefix = f"[{rank}]"
    if coloured:
        prefix = f"\x1b[{_COLOURS[rank % len(_COLOURS)]}m{prefix}\x1b[0m"
    return prefix.encode() + b" "


def wants_colour(environ: Mapping[str, str]) -> bool:
    """Whether terminals get colours: see https://no-color.org."""
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


class Stream:
    """The way of one worker's stdout or stderr to a sink."""

    def __init__(self, rank: int, sink: Sink, *, coloured: bool) -> None:
        self._prefix = prefix_of(rank, coloured=coloured and sink.is_terminal)
        self._sink = sink
        self._lines = LineSplitter()

    @property
    def stalled(self) -> bool:
        """The reader does not keep up: read nothing more from the worker for now."""
        return self._sink.pending_bytes > HIGH_WATER_BYTES

    def feed(self, data: bytes) -> None:
        self._print(self._lines.feed(data))

    def finish(self) -> None:
        self._print(self._lines.finish())

    def _print(self, lines: list[bytes]) -> None:
        if lines:
            self._sink.write(b"".join(self._prefix + line + b"\n" for line in lines))


class RawLog:
    """A worker's stdout and stderr as it wrote them, in one file."""

    def __init__(self, directory: str, rank: int) -> None:
        """Create the file, over that of an earlier job.

        Raises:
            SetupError: it cannot be written.
        """
        self.path = str(Path(directory) / f"rank-{rank}.log")
        self._broken = False
        try:
            os.makedirs(directory, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise SetupError(
                f"cannot write logs to {directory}: {error.strerror} ({error.filename})"
            ) from error

    def write(self, data: bytes) -> str | None:
        """Append; training goes on without its log if the disk is full. Returns what went wrong,
        once."""
        if self._broken:
            return None
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            self._broken = True
            return f"{self.path} is cut off here: {error.strerror}"
        return None

    def close(self) -> None:
        os.close(self._descriptor)


class Logs:
    """The log files of all ranks that run here, each opened once and kept over all processes of its rank."""

    def __init__(self, directory: str | None) -> None:
        """`directory` is where they are; None for no logs."""
        self._directory = directory
        self._of: dict[int, RawLog] = {}

    def open(self, rank: int) -> RawLog | None:
        """This rank's log.

        Raises:
            SetupError: it cannot be written.
        """
        if self._directory is not None and rank not in self._of:
            self._of[rank] = RawLog(self._directory, rank)
        return self._of.get(rank)

    def path_of(self, rank: int) -> str | None:
        """Path of this rank's log, if it has one."""
        log = self._of.get(rank)
        return None if log is None else log.path

    def close(self) -> None:
        for log in self._of.values():
            log.close()
