"""A fixture that fails a test which leaves something behind: a process, a thread, a listening
port, a unix socket or a temporary file.

`tests/parallel/conftest.py` imports it, which makes it run around every test there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import TypeVar

import pytest

Found = TypeVar("Found", bound=Sized)

MARKER = "RINGPS_TEST_MARKER"
"""In the environment of every process that a test starts, directly or not."""

_PATIENCE_S = 10.0  # a killed process may take a moment to disappear on a busy machine


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Checks after the test that it left nothing behind."""
    marker = uuid.uuid4().hex
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv(MARKER, marker)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    # torch's compiler makes its cache when it is imported, and keeps it.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    threads = set(threading.enumerate())
    listening = own_listening_sockets()
    yield
    remaining = eventually_none(lambda: processes_with(marker))
    for pid in remaining:
        _kill(pid)
    found = {
        "processes": list(remaining.values()),
        "threads": eventually_none(lambda: _own_threads() - threads),
        "listening sockets": eventually_none(lambda: own_listening_sockets() - listening),
        "temporary files": [str(path) for path in temporary.rglob("*")],
    }
    found = {what: things for what, things in found.items() if things}
    assert not found, f"left behind: {found}"


def processes_with(marker: str) -> dict[int, str]:
    """Processes that were started with this marker in their environment, by process id."""
    found: dict[int, str] = {}
    wanted = f"{MARKER}={marker}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = f"{entry.name}: {command.decode(errors='replace')}"
            except OSError:
                continue  # gone meanwhile, or another user's
    return found


def own_listening_sockets() -> set[str]:
    """Sockets of this process that listen, on a port or a path."""
    inodes: dict[str, str] = {}
    for table, state_column, listening, inode_column in (
        ("tcp", 3, "0A", 9),
        ("tcp6", 3, "0A", 9),
        ("unix", 3, "00010000", 6),
    ):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[state_column] == listening:
                inodes[f"socket:[{columns[inode_column]}]"] = f"{table} {line.strip()}"
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if target in inodes:
            found.add(inodes[target].split()[0] + " " + target)
    return found


def eventually_none(look: Callable[[], Found]) -> Found:
    """What `look` still finds when it stops changing for the better."""
    end_s = time.monotonic() + _PATIENCE_S
    while (found := look()) and time.monotonic() < end_s:
        time.sleep(0.01)
    return found


def _own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("ringps")}


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
