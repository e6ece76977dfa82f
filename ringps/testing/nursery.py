"""Processes that start in milliseconds: forked from one that has torch loaded already.

A campaign that kills workers by the hundred would spend its time importing torch. A *nursery* is a process
that has done so, and has no threads; each worker is a fork of it, with a session, an environment and a log
file of its own. Everything else is as in a process that was started anew, but for its end: after the exit
handlers it is gone at once.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ringps.testing import faulty

_MAX_ORDER_BYTES = 1 << 17
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Exit:
    """A worker's process has ended."""

    pid: int
    code: int
    """Negative for a signal."""


class Nursery:
    """A nursery, as whoever started it sees it. `close`, or the end of a `with` block, ends all of it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ringps.testing.nursery", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **single},
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours
        self._answers: list[int] = []
        self._answered = threading.Condition()
        self._ended = False
        self.on_exit: Callable[[Exit], None] = lambda ended: None
        """Called on a thread of the nursery's own for each process that ended."""
        self._thread = threading.Thread(target=self._listen, name="ringps-nursery", daemon=True)
        self._thread.start()

    def start(self, arguments: Sequence[str], environ: Mapping[str, str], log: Path) -> int:
        """Fork a process that does what `python -m ringps.testing.faulty ARGUMENTS` does.

        Args:
            arguments: see there.
            environ: in addition to the nursery's own environment.
            log: gets what the process prints.

        Returns:
            Its process id.

        Raises:
            ChildProcessError: the nursery has ended.
        """
        order = {"arguments": list(arguments), "environ": dict(environ), "log": str(log)}
        with self._answered:
            self._socket.send(json.dumps(order).encode())
            self._answered.wait_for(lambda: self._answers or self._ended)
            if not self._answers:
                raise ChildProcessError("the nursery has ended; what it printed says why")
            return self._answers.pop()

    def close(self) -> None:
        """Kill all of its processes, and the nursery."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait()
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _listen(self) -> None:
        while raw := self._receive():
            message = json.loads(raw)
            if "code" in message:
                self.on_exit(Exit(message["pid"], message["code"]))
                continue
            with self._answered:
                self._answers.append(message["pid"])
                self._answered.notify_all()
        with self._answered:
            self._ended = True
            self._answered.notify_all()

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_MAX_ORDER_BYTES)
        except OSError:
            return b""


# What follows runs in the nursery.


def _serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork as ordered; in the forked process: its order. None once whoever ordered is gone."""
    running: dict[int, int] = {}
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    while True:
        for descriptor, _ in poller.poll():
            if descriptor != connection.fileno():
                poller.unregister(descriptor)
                _reap(running.pop(descriptor), descriptor, connection)
                continue
            raw = connection.recv(_MAX_ORDER_BYTES)
            if not raw:
                for descriptor, pid in running.items():
                    _end(pid)
                    os.close(descriptor)
                return None
            pid = os.fork()
            if not pid:
                for descriptor in running:
                    os.close(descriptor)
                connection.close()
                order: dict[str, Any] = json.loads(raw)
                return order
            watched = os.pidfd_open(pid)
            running[watched] = pid
            poller.register(watched, select.POLLIN)
            connection.send(json.dumps({"pid": pid}).encode())


def _reap(pid: int, descriptor: int, connection: socket.socket) -> None:
    code = _end(pid)
    os.close(descriptor)
    try:
        connection.send(json.dumps({"pid": pid, "code": code}).encode())
    except OSError:
        pass  # nobody listens any more, which the next turn notices


def _end(pid: int) -> int:
    """Kill a process with all that it started, and reap it."""
    for kill in (os.kill, os.killpg):  # it may have no group yet
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _become(order: dict[str, Any]) -> None:
    """In the forked process: be the worker that was ordered."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.update(order["environ"])
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os._exit(_run(order["arguments"]))


def _run(arguments: Sequence[str]) -> int:
    """Run the script up to its exit handlers; returns the exit code.

    What the interpreter would do after them takes seconds, now that so much is loaded.
    """
    code = 0
    try:
        faulty.main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.last_type, sys.last_value, sys.last_traceback = sys.exc_info()
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _warm_up() -> None:
    """Load all that a training script is going to load, without starting a thread."""
    importlib.import_module("ringps.runtime")
    torch.set_num_threads(1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)  # a backward would start autograd's threads
    optimizer = torch.optim.AdamW([parameter])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    optimizer.step()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(2, 1)))
    assert len(list(loader)) == 2
    gc.collect()
    gc.freeze()  # or the collector of every fork would copy all memory by visiting it
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"the nursery has {threads} threads, of which a fork would have one")


def _main() -> None:
    _warm_up()
    order = _serve(socket.socket(fileno=int(sys.argv[1])))
    if order is None:
        os._exit(0)
    _become(order)


if __name__ == "__main__":
    _main()
