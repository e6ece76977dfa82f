"""Running the `ringps` command in tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "ringps_launcher"]
MEMBER = """
from ringps import worker_env
from ringps.membership import WorkerLink

class Deaf:
    def on_lost(self, error): pass
    def on_changed(self, error): pass

link = WorkerLink(worker_env.read(), worker_env.configure().timeouts, Deaf())
link.join(lambda token, encrypt: "tcp://127.0.0.1:9")
print("pid", os.getpid())
signal.pause()
"""
"""A script that joins the ring and waits there, without loading torch."""

_SILENCE_S = 50.0
_LIMIT_S = 45.0  # below the tests' own limit, so that it is reported with the output so far


@dataclass
class Finished:
    """What a command left on its way out."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of stderr."""
        return self.err.rstrip("\n").rpartition("\n")[2]


@dataclass
class Ringps:
    """A `ringps` command that runs; killed at the end of a `with` block."""

    process: subprocess.Popen[str]
    seen: list[str] = field(default_factory=list)

    @property
    def out(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def expect(self, text: str) -> str:
        """Read stdout up to the line that contains `text`; a command that says nothing for long is killed."""
        for line in self._lines():
            self.seen.append(line)
            if text in line:
                return line.rstrip("\n")
        raise AssertionError(f"no {text!r} in the output: {self.seen} {self.finish()}")

    def _lines(self) -> Iterator[str]:
        while True:
            watch = threading.Timer(_SILENCE_S, self.process.kill)
            watch.start()
            line = self.out.readline()
            watch.cancel()
            if not line:
                return
            yield line

    def expect_all(self, *texts: str) -> list[str]:
        """Read stdout until each of the texts has come, in any order; their lines in this order."""
        found: dict[str, str] = {}
        while len(found) < len(texts):
            line = self.expect("")
            found.update({text: line for text in texts if text in line})
        return [found[text] for text in texts]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self) -> Finished:
        """Wait for the end; what it printed since the last `expect`."""
        out, err = self.process.communicate(timeout=_LIMIT_S)
        return Finished(self.process.returncode, out or "", err or "")

    def __enter__(self) -> Ringps:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def start(
    *arguments: str | Path,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    within: tuple[str, ...] = (),
) -> Ringps:
    """Start `ringps ARGUMENTS`; `within` is a command that runs it, such as `ip netns exec`."""
    paths = [str(ROOT), str(ROOT / "launcher"), os.environ.get("PYTHONPATH", "")]
    return Ringps(
        subprocess.Popen(
            [*within, *COMMAND, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(environ or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="surrogateescape",
            process_group=0,  # as a shell with job control does
        )
    )


def run(
    *arguments: str | Path, environ: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Finished:
    """Run `ringps ARGUMENTS` to its end."""
    with start(*arguments, environ=environ, cwd=cwd) as command:
        return command.finish()


def script(directory: Path, text: str, name: str = "script.py") -> Path:
    """Write a worker's script. `RANK` and some modules are there for it."""
    path = directory / name
    path.write_text(
        "import os, sys, time, signal, subprocess\nRANK = int(os.environ['RANK'])\n" + textwrap.dedent(text)
    )
    return path


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it goes between open and read
        return False


def eventually_gone(pid: int) -> bool:
    """Whether a process that is being killed has gone; waits for it."""
    end_s = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end_s:
        time.sleep(0.005)
    return not alive(pid)
