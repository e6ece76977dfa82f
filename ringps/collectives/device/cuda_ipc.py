"""Collectives among the workers of one host, straight from each other's GPU memory.

Several workers may share a GPU. Each opens its peers' allocations once (CUDA IPC); rank i reduces slice i
from all inputs to its own output, and then copies the other slices from the peers' outputs. Inputs are only
read, and every byte has one writer, so a worker that died or hangs can spoil nothing.

The GPU never waits for another process: a kernel that does so hangs with whom it waits for, and so does an
event of a process that was killed. Each worker waits for its own GPU, and then for its peers in shared
memory, by the phases of `collectives.shm`:

====== ==========================================================================================
meet   my source is there; where it lies, and where my slice of the result will lie
phase  my slice of the result is there
phase  I have copied the others' slices: memory may be overwritten
====== ==========================================================================================

Elements are combined in the order of the ring: the bits are those of large tensors in the host's memory.

Tensors that peers cannot open (of torch's allocator) are copied to memory that they can, on the GPU.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from ringps.collectives.backend import Backend, Work
from ringps.collectives.device.way import DeviceHandle, fetch_hash, look_at, name_of
from ringps.collectives.gate import Gate
from ringps.collectives.handle import Handle
from ringps.collectives.shm.group import LocalGroup
from ringps.device import Accelerator, Exported, PeerMemory
from ringps.errors import CollectiveError, PeerLostError, RingpsError
from ringps.kernels.cpu import ReduceOp
from ringps.kernels.cuda.fold import fold
from ringps.ring.partition import partition
from ringps.ring.topology import Generation

_PLACE = struct.Struct("<B64sQQ")
"""Length of the handle, handle, offset and size in bytes."""


class _Place(NamedTuple):
    """Where something lies that peers read."""

    memory: Exported
    size_bytes: int

    def pack(self) -> bytes:
        handle, offset = self.memory
        return _PLACE.pack(len(handle), handle, offset, self.size_bytes)

    @classmethod
    def unpack(cls, raw: bytes) -> _Place:
        length, handle, offset, size = _PLACE.unpack(raw)
        return cls(Exported(handle[:length], offset), size)


class CudaIpc:
    """Does the work, for `shm.executor.SharedMemory`, on the thread that does all of the group's."""

    def __init__(self, group: LocalGroup, device: Accelerator, view: Generation) -> None:
        """
        Args:
            group: this host's members, all of the ring.
            view: likewise.
            device: has memory that peers can open.
        """
        memory = device.peer_memory
        assert memory is not None
        self._group = group
        self._view = view
        self._memory: PeerMemory = memory
        self._stream = device.stream("reduce")

    def perform(self, key: tuple[int, int], work: Work) -> None:
        """Carry `work` out, whose source is there; returns when the output is."""
        if work.kind == "all_reduce":
            self._all_reduce(key, work)
        elif work.kind == "reduce_scatter":
            self._reduce_scatter(key, work)
        else:
            assert work.kind in ("all_gather", "broadcast")
            self._copy(key, work)

    def close(self) -> None:
        """Close the peers' memory."""
        self._memory.forget()

    def _all_reduce(self, key: tuple[int, int], work: Work) -> None:
        group, itemsize = self._group, work.source.itemsize
        slices = partition(work.source.numel(), group.size)
        mine = slices[group.local]
        result = work.output[mine.start : mine.stop]
        shown, shown_result = self._show(work.source), self._show(result, fill=False)
        others = self._meet(key, shown, shown_result)
        sources = self._open([source for source, _ in others], shown, work.source.dtype)
        self._fold(sources, mine.start, mine.stop, shown_result, work.op)
        if shown_result is not result:
            self._stream.run(lambda: result.copy_(shown_result))
        self._wait()
        group.phase()
        results = self._open([place for _, place in others], shown_result, work.output.dtype)
        for local, part in enumerate(slices):
            if local != group.local and part.numel:
                if results[local].nbytes != part.numel * itemsize:
                    raise CollectiveError(f"member {local} of this host offers a result of another size")
                self._stream.run(partial(work.output[part.start : part.stop].copy_, results[local]))
        self._end(work)

    def _reduce_scatter(self, key: tuple[int, int], work: Work) -> None:
        shown = self._show(work.source)
        others = self._meet(key, shown, shown)
        sources = self._open([source for source, _ in others], shown, work.source.dtype)
        numel = work.output.numel()
        start = self._group.local * numel
        self._fold(sources, start, start + numel, work.output, work.op)
        self._end(work)

    def _copy(self, key: tuple[int, int], work: Work) -> None:
        group = self._group
        shown = self._show(work.source)
        others = self._meet(key, shown, shown)
        sources = self._open([source for source, _ in others], shown, work.source.dtype)
        numel = work.source.numel()
        for local, source in enumerate(sources):
            if source.numel() != numel:
                raise CollectiveError(f"member {local} of this host offers a tensor of another size")
            if work.kind == "all_gather":
                self._stream.run(partial(work.output[local * numel : (local + 1) * numel].copy_, source))
            elif local == work.src != group.local:
                self._stream.run(partial(work.output.copy_, source))
        self._end(work)

    def _end(self, work: Work) -> None:
        if work.back is not None:
            self._stream.run(work.back)
        hashed = fetch_hash(work.output, self._stream) if work.digest is not None else None
        self._wait()
        if work.digest is not None and hashed is not None:
            work.digest.give(hashed())
        self._group.phase()

    def _wait(self) -> None:
        self._stream.mark().wait()

    def _show(self, tensor: torch.Tensor, *, fill: bool = True) -> torch.Tensor:
        """The tensor, or a copy of it that peers can open."""
        if not tensor.numel() or self._memory.find(tensor) is not None:
            return tensor
        room = self._memory.allocate(tensor.nbytes).view(tensor.dtype)
        if fill:
            self._stream.run(lambda: room.copy_(tensor))
            self._wait()
        return room

    def _meet(
        self, key: tuple[int, int], source: torch.Tensor, result: torch.Tensor
    ) -> list[tuple[_Place, _Place]]:
        """Tell each other where sources and results lie; by member."""
        group = self._group
        own = self._place(source).pack() + self._place(result).pack()
        everyones = torch.empty(len(own) * group.size, dtype=torch.uint8)
        group.all_gather(key, torch.frombuffer(bytearray(own), dtype=torch.uint8), everyones)
        raw = everyones.numpy().tobytes()
        half = _PLACE.size
        return [
            (_Place.unpack(raw[at : at + half]), _Place.unpack(raw[at + half : at + 2 * half]))
            for at in range(0, len(raw), 2 * half)
        ]

    def _place(self, tensor: torch.Tensor) -> _Place:
        found = self._memory.find(tensor) if tensor.numel() else None
        return _Place(found or Exported(b"", 0), tensor.nbytes)

    def _open(self, places: list[_Place], own: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        found = []
        for local, (exported, size_bytes) in enumerate(places):
            if local == self._group.local or not size_bytes:
                found.append(own if local == self._group.local else own[:0])
                continue
            end = exported.offset_bytes + size_bytes
            try:
                memory = self._memory.open(exported.handle, end)
            except RuntimeError as error:  # it worked when the ring formed: the process has gone
                member = self._view.members[local]
                raise PeerLostError(
                    rank=local,
                    worker_id=member.worker_id,
                    host=member.host,
                    reason=f"its GPU memory cannot be opened any more ({error})",
                ) from error
            found.append(memory[exported.offset_bytes : end].view(dtype))
        return found

    def _fold(
        self, sources: list[torch.Tensor], start: int, stop: int, out: torch.Tensor, op: ReduceOp
    ) -> None:
        if start == stop:
            return
        if any(source.numel() < stop for source in sources):
            raise CollectiveError("a member of this host offers a tensor that is too short")
        ordered = [sources[local][start:stop] for local in self._group.order]
        self._stream.run(lambda: fold(ordered, out, op, self._group.size))


class IpcWay:
    """A `way.Way`: the host's backend carries these out in the order of all its calls."""

    def __init__(
        self, host: Backend, device: Accelerator, sample: torch.Tensor, detach: Callable[[], None]
    ) -> None:
        """
        Args:
            host: its executor knows a `CudaIpc`.
            device: whose tensors they are on.
            sample: kept as long as this.
            detach: takes the `CudaIpc` from the executor.
        """
        self._host = host
        self._device = device
        self._sample = sample
        self._detach = detach
        self._marks = device.stream("down")

    def start(self, work: Work) -> Handle:
        gate = Gate()
        self._marks.after(self._device.here().mark())
        self._marks.notify(gate.step)
        carried = self._host.start(work._replace(gate=gate))
        handle = DeviceHandle(name_of(work), [carried], partial(look_at, self._marks))
        handle._settle()  # there is nothing to it but its part
        return handle

    def interrupt(self, error: RingpsError) -> None:
        """The host's backend ends what is under way."""

    def close(self) -> None:
        self._detach()
