"""The shim of a container: starts its command in namespaces of its own, keeps its log, and outlives it.

Run by path with `python -I shim.py`. Standard input: a line of JSON, what to run (see `container.py`), then
orders, one a line: `signal N` for the command itself, `all N` for every process in the container. Standard
output: lines of JSON: {"started": pid}, or {"error": text} if the command could not be started, and last
{"exited": code, "signal": n}. If the standard input ends, the container is killed; if the shim is killed, so
is the container.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import system

_LINE_BYTES = 16384
"""The longest line that a log holds in one piece."""


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    orders = b""
    while b"\n" not in orders:
        data = os.read(0, 65536)
        if not data:
            return
        orders += data
    line, _, orders = orders.partition(b"\n")
    wanted = json.loads(line)
    if wanted["network"] is not None:
        system.setns(wanted["network"], system.NEW_NETWORK)
        os.close(wanted["network"])
    system.unshare(system.NEW_PIDS | system.NEW_NAMES | system.NEW_IPC)
    stdout, stderr, error, go = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            system.die_with_parent()
            os.close(go[1])
            if os.read(go[0], 1):  # else the shim is gone already
                _become(wanted, stdout[1], stderr[1])
        except BaseException as problem:
            os.write(error[1], str(problem).encode()[:4000] or b"unknown")
        finally:
            os._exit(128)
    for end in (stdout[1], stderr[1], error[1], go[0]):
        os.close(end)
    os.write(go[1], b"g")
    os.close(go[1])
    problem = b""
    while data := os.read(error[0], 4096):  # until exec closes it
        problem += data
    if problem:
        os.waitpid(pid, 0)
        _report({"error": problem.decode(errors="replace")})
        return
    _report({"started": pid})
    status = _Shim(pid, wanted["log"], {stdout[0]: "stdout", stderr[0]: "stderr"}, orders).watch()
    code = os.waitstatus_to_exitcode(status)
    _report({"exited": code if code >= 0 else 128 - code, "signal": max(0, -code)})


class _Shim:
    """Watches over the running container."""

    def __init__(self, pid: int, log: str, streams: dict[int, str], orders: bytes) -> None:
        self._pid = pid
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._streams = streams
        self._partial = dict.fromkeys(streams, b"")
        self._orders = orders
        self._poll = select.poll()

    def watch(self) -> int:
        """Until the command has ended; how it did."""
        ended = os.pidfd_open(self._pid)
        for descriptor in (0, ended, *self._streams):
            self._poll.register(descriptor, select.POLLIN)
        self._obey()
        running = True
        while running:
            for descriptor, _ in self._poll.poll():
                if descriptor == 0:
                    self._listen()
                elif descriptor == ended:
                    running = False
                elif descriptor in self._streams:
                    self._copy(descriptor)
        # With the command, which is its pid 1, the kernel has killed all the rest: the pipes end.
        for descriptor in list(self._streams):
            while descriptor in self._streams:
                self._copy(descriptor)
        return os.waitpid(self._pid, 0)[1]

    def _listen(self) -> None:
        data = os.read(0, 4096)
        if not data:
            self._poll.unregister(0)
            os.kill(self._pid, signal.SIGKILL)
        self._orders += data
        self._obey()

    def _obey(self) -> None:
        *lines, self._orders = self._orders.split(b"\n")
        for line in lines:
            order, _, number = line.partition(b" ")
            if order == b"signal":
                os.kill(self._pid, int(number))
            elif order == b"all":
                self._signal_all(int(number))

    def _signal_all(self, number: int) -> None:
        """Also those that are forked meanwhile: until there is nobody new."""
        namespace = os.readlink(f"/proc/{self._pid}/ns/pid")
        done: set[int] = set()
        while True:
            new = [pid for pid in _inside(namespace) if pid not in done]
            for pid in new:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                done.add(pid)
            if not new:
                return

    def _copy(self, descriptor: int) -> None:
        """Move what the container wrote into the log, in the format that kubelets read."""
        data = os.read(descriptor, 65536)
        stream = self._streams[descriptor]
        now_ns = time.time_ns()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_ns // 10**9))
        head = f"{stamp}.{now_ns % 10**9:09d}Z {stream} ".encode()
        *lines, rest = (self._partial[descriptor] + data).split(b"\n")
        if not data:
            del self._streams[descriptor]
            self._poll.unregister(descriptor)
            if rest:
                lines.append(rest)
            rest = b""
        out = b""
        for line in lines:
            while len(line) > _LINE_BYTES:
                out += head + b"P " + line[:_LINE_BYTES] + b"\n"
                line = line[_LINE_BYTES:]
            out += head + b"F " + line + b"\n"
        while len(rest) > _LINE_BYTES:
            out += head + b"P " + rest[:_LINE_BYTES] + b"\n"
            rest = rest[_LINE_BYTES:]
        self._partial[descriptor] = rest
        if out:
            os.write(self._log, out)


def _inside(namespace: str) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                    found.append(int(name))
    return found


def _become(wanted: dict[str, Any], stdout: int, stderr: int) -> None:
    """Turn this process into the container's command. Raises `OSError`."""
    import socket

    import rootfs

    os.setsid()
    system.unshare(system.NEW_MOUNTS)
    socket.sethostname(wanted["hostname"])
    rootfs.enter(wanted["root"], wanted["files"], wanted["mounts"], wanted["cwd"], wanted["read_only"])
    program = _program(wanted["argv"][0], wanted["environ"].get("PATH", ""))
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # what Python and the shim ignore
    os.umask(0o022)
    if wanted["groups"]:
        os.setgroups(wanted["groups"])
    if wanted["drop_capabilities"]:
        system.drop_capabilities()
    if wanted["no_new_privileges"]:
        system.no_new_privileges()
    try:
        os.execve(program, wanted["argv"], wanted["environ"])
    except OSError as problem:
        raise OSError(f'exec: "{wanted["argv"][0]}": {(problem.strerror or "").lower()}') from None


def _program(name: str, path: str) -> str:
    if "/" in name:
        return name
    for directory in path.split(":"):
        program = os.path.join(directory, name)
        if os.path.isfile(program) and os.access(program, os.X_OK):
            return program
    raise OSError(f'exec: "{name}": executable file not found in $PATH')


def _report(event: dict[str, Any]) -> None:
    try:
        os.write(1, json.dumps(event).encode() + b"\n")
    except BrokenPipeError:
        pass  # who started the shim is gone; the container is ended all the same


if __name__ == "__main__":
    main()
