"""A backend for tensors anywhere: on the CPU by the host's backend, on a GPU by one of three ways."""

from __future__ import annotations

import sys
import threading
from typing import Any

import msgpack
import torch

from ringps.collectives.backend import Backend, EngineStatistics, Work
from ringps.collectives.communicator import Communicator
from ringps.collectives.device.choice import Equipment, WayName, choose_way
from ringps.collectives.device.cuda_ipc import CudaIpc, IpcWay
from ringps.collectives.device.nccl import NcclWay
from ringps.collectives.device.staging import Staging
from ringps.collectives.device.way import Alone, Way
from ringps.collectives.handle import Handle
from ringps.collectives.shm.executor import SharedMemory
from ringps.config import Config
from ringps.device import Accelerator
from ringps.errors import ClosedError, RingpsError, SetupError
from ringps.ring.lanes import hosts
from ringps.ring.topology import Generation

_said: set[tuple[str, str]] = set()
"""What this process has told people of ways and reasons: once each."""


class DeviceBackend:
    """A `collectives.backend.Backend` around the host's, which belongs to it.

    How GPUs exchange data is settled among the members at their first collective on one: until then a job
    that trains on the CPU pays nothing for it. Thread-safe.
    """

    def __init__(
        self, host: Backend, view: Generation, config: Config, local: SharedMemory | None = None
    ) -> None:
        """
        Args:
            host: the generation's, for tensors in the CPU's memory.
            view: who is in the ring.
            config: settings.
            local: what carries the host's collectives out, if all members share memory.
        """
        self._host = host
        self._view = view
        self._config = config
        self._local = local
        self._lock = threading.RLock()
        self._way: Way | None = None
        self._device: Accelerator | None = None
        self._error: RingpsError | None = None
        self._newest: Handle | None = None
        """Of the last collective on the GPU; those before it end before it."""

    @property
    def host(self) -> Backend:
        """For tensors in the CPU's memory."""
        return self._host

    def run(self, work: Work) -> None:
        if work.device is None:
            self._host.run(work)
        else:
            self.start(work).wait()

    def start(self, work: Work) -> Handle:
        if work.device is None:
            return self._host.start(work)
        with self._lock:
            if self._way is None:
                self._way = self._settle(work.device)
                self._device = work.device
                if self._error is not None:
                    self._way.interrupt(self._error)
            assert self._device is work.device
            self._newest = self._way.start(work)
            return self._newest

    def allocate(self, size_bytes: int) -> torch.Tensor:
        return self._host.allocate(size_bytes)

    def fail(self, error: RingpsError) -> None:
        # The host's first: it is what a forming way waits with.
        self._host.fail(error)
        self._error = self._error or error
        way = self._way
        if way is not None:
            way.interrupt(error)

    def peer_left(self, rank: int, completed: int) -> None:
        self._host.peer_left(rank, completed)

    def verdict(self, sequence: int, calls: tuple[str, ...]) -> None:
        self._host.verdict(sequence, calls)

    def describe(self, sequence: int) -> str:
        return self._host.describe(sequence)

    def drain(self) -> None:
        if self._newest is not None:
            self._newest.wait()
        self._host.drain()

    @property
    def completed(self) -> int:
        return self._host.completed

    def close(self) -> None:
        # For a thread that connects or enqueues just now.
        self._error = self._error or ClosedError("the ring was shut down by this process")
        self._host.close()
        with self._lock:
            if self._way is not None:
                self._way.close()

    def statistics(self) -> EngineStatistics:
        return self._host.statistics()

    # Settling how; collective.

    def _settle(self, device: Accelerator) -> Way:
        """The way that all members take.

        Raises:
            SetupError: on all, if what was asked for cannot be had.
            RingpsError: the ring broke.
        """
        if self._error is not None:
            raise self._error
        if self._view.world_size == 1:
            return Alone(device)
        equipment = [Equipment(**one) for one in self._exchange(_equipment(device))]
        failed: list[WayName] = []
        while True:
            name, reason = choose_way(self._config.transport, equipment, hosts(self._view), failed)
            way, trouble = self._build(name, device)
            troubles: list[str] = self._exchange(trouble)
            if not any(troubles):
                assert way is not None
                self._say(name, reason)
                return way
            if way is not None:
                way.close()
            rank = next(rank for rank, one in enumerate(troubles) if one)
            found = f"{name} does not work at rank {rank}: {troubles[rank]}"
            if self._config.transport != "auto" or name == "staged":
                raise SetupError(f"GPU tensors: {found}")
            self._say(name, found)
            failed.append(name)

    def _build(self, name: WayName, device: Accelerator) -> tuple[Way | None, str]:
        """A way, or why there is none at this rank."""
        try:
            if name == "nccl":
                return self._connect(device), ""
            if name == "cuda_ipc":
                return self._open_memory(device), ""
        except (RuntimeError, MemoryError) as error:
            return None, str(error)
        return self._staging(device), ""

    def _staging(self, device: Accelerator) -> Way:
        rank, size = self._view.rank, self._view.world_size
        return Staging(self._host, device, rank, size, self._config.exchange.staging_bytes)

    def _connect(self, device: Accelerator) -> Way:
        library = device.nccl()
        unique_id = b""
        trouble = None
        if self._view.rank == 0:
            try:
                unique_id = library.unique_id()
            except RuntimeError as error:
                trouble = error
        unique_id = self._exchange(unique_id)[0]
        if trouble is not None:
            raise trouble
        if not unique_id:
            raise RuntimeError("rank 0 could not begin")
        limit_s = self._config.timeouts.reform_timeout_s + self._config.timeouts.connect_timeout_s
        ring = library.connect(unique_id, self._view.world_size, self._view.rank, self._check, limit_s)
        timeouts = self._config.timeouts
        return NcclWay(self._host, device, ring, self._staging(device), op_timeout_s=timeouts.op_timeout_s)

    def _open_memory(self, device: Accelerator) -> Way:
        local, memory = self._local, device.peer_memory
        assert local is not None and memory is not None
        executor = CudaIpc(local.group, device, self._view)
        local.device = executor
        sample = memory.allocate(1)
        shown = memory.find(sample)
        assert shown is not None
        others: list[tuple[bytes, int]] = self._exchange(tuple(shown))
        for rank, (handle, offset_bytes) in enumerate(others):
            if rank != self._view.rank:
                memory.open(handle, offset_bytes + 1)

        def detach() -> None:
            local.device = None
            executor.close()

        # The way keeps the sample, which others may have yet to open.
        return IpcWay(self._host, device, sample, detach)

    def _exchange(self, own: Any) -> list[Any]:
        """What each member has; plain values."""
        gathered = Communicator(self._view, self._host).gather_bytes(msgpack.packb(own))
        return [msgpack.unpackb(raw) for raw in gathered]

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _say(self, name: str, reason: str) -> None:
        if self._view.rank == 0 and (name, reason) not in _said:
            _said.add((name, reason))
            print(f"ringps: GPU tensors: {name} ({reason})", file=sys.stderr)


def _equipment(device: Accelerator) -> dict[str, Any]:
    nccl, missing = None, ""
    try:
        nccl = device.nccl().version
    except SetupError as error:
        missing = str(error)
    return {
        "device": device.identity,
        "nccl": nccl,
        "no_nccl": missing,
        "shares": device.peer_memory is not None,
    }
