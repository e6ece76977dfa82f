"""Carries out a fault plan in this process.

`arm` listens to the moments that the library passes through (`ringps.probe`). Where one of the plan's faults
is due, it is written down in the record file, and then it happens.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ringps import probe
from ringps.collectives import current
from ringps.errors import ClosedError
from ringps.testing.plan import Fault, FaultPlan, Fired, Moment

Process = tuple[int, int]
"""Worker and process id."""

_SO_ATTACH_FILTER = 26
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)
"""One instruction of classic BPF: return 0, which is how many bytes of a packet are kept."""


def arm(plan: FaultPlan, worker_id: int, record: Path | str) -> None:
    """From now on, faults that the plan has for this worker happen in this process.

    Args:
        plan: of the whole job.
        worker_id: this worker.
        record: the job's record file. A fault that is in it already does not happen again.
    """
    probe.listener = Armed(plan, worker_id, Path(record)).on_reached


def disarm() -> None:
    """No more faults."""
    probe.listener = None


class Armed:
    """A plan at work in this process. Moments come from several threads."""

    def __init__(self, plan: FaultPlan, worker_id: int, record: Path) -> None:
        self._plan = plan
        self._worker_id = worker_id
        self._record = record
        self._lock = threading.Lock()
        self._seen: dict[int, int] = {}
        """How often each fault's moment has come."""
        self._slow: list[tuple[int, float]] = []
        """Step at which a slow spell ends, and its seconds."""
        self._helpers: list[subprocess.Popen[bytes]] = []
        self._holders: frozenset[Process] = frozenset()
        """Those who held the training state when this process committed last."""
        self._descriptor = os.open(record, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        lines = plan.read_record(record.read_text())
        happened = {one.fault for one in lines}
        self._step = max((one.step for one in lines), default=0)
        self._left: dict[str, dict[int, Fault]] = {}
        """Faults that may yet happen here, by point."""
        for index, fault in enumerate(plan.faults):
            if fault.worker_id in (None, worker_id) and index not in happened:
                self._left.setdefault(fault.at.point, {})[index] = fault

    def on_reached(self, point: str, passed: dict[str, Any]) -> None:
        """This process is at that point."""
        with self._lock:
            self._step = passed.get("step", self._step)
            if point == "committed":
                self._holders = _members()[0]
            left = self._left.get(point, {})
            due = [(index, fault) for index, fault in left.items() if self._is_due(index, fault.at, passed)]
            claimed = [fault for index, fault in due if self._claim(index, fault, passed)]
        for fault in claimed:
            self._carry_out(fault, passed)
        if point == "step" and not passed["attempt"]:
            self._slow = [(until, seconds) for until, seconds in self._slow if until > self._step]
            time.sleep(sum(seconds for _, seconds in self._slow))

    def _is_due(self, index: int, moment: Moment, passed: dict[str, Any]) -> bool:
        if not moment.matches(moment.point, self._step, passed):
            return False
        self._seen[index] = self._seen.get(index, 0) + 1
        if moment.since_step is None:
            return self._seen[index] == moment.occurrence
        return self._seen[index] >= moment.occurrence

    def _claim(self, index: int, fault: Fault, passed: dict[str, Any]) -> bool:
        """Write down that it happens, unless it did already, in another process, or must wait."""
        if fault.kind == "cut" and not _connections(fault, passed):
            return False
        if fault.kind == "corrupt_frame" and not _leaves_now(passed["outgoing"]):
            return False
        members, generation = _members()
        expendable = not self._holders and fault.kind != "corrupt_parameters"
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            record = self._plan.read_record(self._record.read_text())
            if any(one.fault == index for one in record):
                del self._left[fault.at.point][index]
                return False
            now = time.time()
            well = len(members & self._holders)
            if fault.kind == "corrupt_parameters" and well < len(members):
                return False  # a worker that joins would get the wrong ones
            permitted, _ = self._plan.permits(
                fault, record, members=well, generation=generation, step=self._step, now=now
            )
            if not (permitted or expendable):
                return False
            fired = Fired(
                fault=index,
                worker_id=self._worker_id,
                pid=os.getpid(),
                step=self._step,
                generation=max(generation, passed.get("generation", 0)),
                t=now,
            )
            os.write(self._descriptor, fired.line().encode())
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        del self._left[fault.at.point][index]
        return True

    def _carry_out(self, fault: Fault, passed: dict[str, Any]) -> None:
        match fault.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                self._stop(fault.seconds)
            case "leave":
                os.kill(os.getpid(), signal.SIGTERM)
            case "delay":
                time.sleep(fault.seconds)
            case "slow":
                self._slow.append((self._step + fault.steps, fault.seconds))
            case "cut":
                for connection in _connections(fault, passed):
                    _break(connection, silent=fault.silent)
            case "corrupt_frame":
                _corrupt_frame(fault, passed)
            case "corrupt_bucket":
                _flip(passed["tensor"], fault.position)
            case "corrupt_parameters":
                parameters = passed["parameters"]
                _flip(parameters[fault.position % len(parameters)], fault.position)

    def _stop(self, seconds: float) -> None:
        if seconds:
            # A process of its own, since all threads of this one stop.
            resume = ["/bin/sh", "-c", 'sleep "$0"; kill -CONT "$1"', f"{seconds:.3f}", str(os.getpid())]
            self._helpers = [helper for helper in self._helpers if helper.poll() is None]
            self._helpers.append(subprocess.Popen(resume, stdin=subprocess.DEVNULL))
        os.kill(os.getpid(), signal.SIGSTOP)


def _members() -> tuple[frozenset[Process], int]:
    """The members of this process's generation, and its number."""
    try:
        generation = current().generation
    except ClosedError:
        return frozenset(), 0
    return frozenset((member.worker_id, member.pid) for member in generation.members), generation.number


def _connections(fault: Fault, passed: dict[str, Any]) -> list[socket.socket]:
    """What a cut breaks."""
    if "connections" in passed:
        connections: list[socket.socket] = passed["connections"]
        return connections[:1]
    outgoing: list[socket.socket] = [] if fault.direction == "in" else passed["outgoing"]
    incoming: list[socket.socket] = [] if fault.direction == "out" else passed["incoming"]
    return [*outgoing, *incoming]


def _leaves_now(outgoing: list[socket.socket]) -> bool:
    """Whether there is room for the frame, so that it is sent as it is passed on."""
    poller = select.poll()
    for connection in outgoing:
        poller.register(connection, select.POLLOUT)
    return len(poller.poll(0)) == len(outgoing)


def _break(connection: socket.socket, *, silent: bool) -> None:
    if silent:
        # Data and acknowledgements that arrive are lost: to both ends the other one has fallen silent.
        program = ctypes.create_string_buffer(_DROP_ALL, len(_DROP_ALL))
        order = struct.pack("HP", 1, ctypes.addressof(program))
        connection.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, order)
    elif connection.family == socket.AF_UNIX:
        connection.shutdown(socket.SHUT_RDWR)
    else:
        # connect(AF_UNSPEC) resets a connection, and leaves the descriptor to its owner.
        libc = ctypes.CDLL(None, use_errno=True)
        nowhere = struct.pack("H14x", socket.AF_UNSPEC)
        if libc.connect(connection.fileno(), nowhere, len(nowhere)):
            raise OSError(ctypes.get_errno(), "cannot reset a connection")


def _corrupt_frame(fault: Fault, passed: dict[str, Any]) -> None:
    part = bytearray(passed[fault.part])
    if not part:  # an empty payload
        fault_part, part = "header", bytearray(passed["header"])
    else:
        fault_part = fault.part
    part[fault.position % len(part)] ^= 1
    passed[fault_part] = bytes(part) if fault_part == "header" else memoryview(part)


def _flip(tensor: torch.Tensor, position: int) -> None:
    """Flip the lowest bit of an element, unnoticed by autograd, as memory does."""
    flat = tensor.data.view(-1)
    element = flat[position % flat.numel() :][:1]
    element.view(torch.uint8)[0] ^= 1
