"""Every collective of a ring whose members are all on one host."""

from __future__ import annotations

from typing import Protocol

import torch

from ringps.collectives.backend import Work
from ringps.collectives.call import Call
from ringps.collectives.shm.group import LocalGroup
from ringps.collectives.shm.signals import Signals
from ringps.errors import RingpsError


class DeviceExecutor(Protocol):
    """What carries out collectives on tensors of a GPU."""

    def perform(self, key: tuple[int, int], work: Work) -> None:
        """Return when the output is there. `key`: sequence and signature of the call."""


class SharedMemory:
    """A `collectives.serial.Executor` over a `LocalGroup`, which belongs to it."""

    def __init__(self, group: LocalGroup) -> None:
        self.group = group
        self.device: DeviceExecutor | None = None
        """Carries out what lies on a GPU."""

    @property
    def signals(self) -> Signals:
        return self.group.signals

    def perform(self, sequence: int, call: Call, work: Work, *, spin: bool) -> None:
        group = self.group
        group.spin = spin
        key = sequence, call.signature
        if work.device is not None:
            assert self.device is not None
            self.device.perform(key, work)
        elif work.kind == "all_reduce":
            group.all_reduce(key, work.source, work.output, work.op, group.size, work.digest)
        elif work.kind == "reduce_scatter":
            group.reduce_scatter(key, work.source, work.output, work.op, group.size)
        elif work.kind == "all_gather":
            group.all_gather(key, work.source, work.output)
        elif work.kind == "broadcast":
            group.broadcast(key, work.output, work.src)
        else:
            assert work.kind == "barrier"
            group.barrier(key)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        return self.group.allocate(size_bytes)

    def interrupt(self, error: RingpsError) -> None:
        """Whoever waits is told by `signals`."""

    def close(self) -> None:
        self.group.close()
