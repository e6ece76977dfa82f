"""Collectives on a GPU through the host's memory, for where its memory cannot be reached by peers.

A tensor goes piece by piece: down into a pinned buffer, through the host's backend (TCP, ZeroMQ, shared
memory), and up again. A few pieces are under way at a time, so that the wire works while the GPU copies
others down and up; the GPU's two copy engines work beside each other and beside its kernels. The host's
backend is given all pieces at once, each with a gate that opens when it has come down, so the order of calls
is the script's on all ranks.

::

    piece   0    down | wire | up
            1           down | wire | up
            2                  down | wire | up
            4 (buffer of 0)               down | wire | up
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from ringps.collectives.backend import Backend, Work
from ringps.collectives.device.way import DeviceHandle, Pending, conclude, look_at, name_of
from ringps.collectives.gate import Gate
from ringps.collectives.handle import Handle
from ringps.device import Accelerator, Mark
from ringps.errors import RingpsError

_SLOTS = 4
"""Pieces under way: one comes down, one is on the wire, one goes up, and one waits for the wire."""

_CLOSE_S = 5.0
"""How long copies may still take."""

Copy = tuple[torch.Tensor, torch.Tensor]
"""From, to."""


@dataclass(frozen=True)
class Piece:
    """What the host's backend does at a time; sizes in elements."""

    down: tuple[tuple[int, int, int], ...]
    """Start and stop in the source, and the place in the slot's input; nothing on a rank that only
    receives."""

    up: tuple[tuple[int, int, int], ...]
    """Start in the output; start and stop in the slot's output."""

    source_numel: int
    output_numel: int


def pieces_of(kind: str, numel: int, most: int, world_size: int, *, sends: bool) -> Iterator[Piece]:
    """Cut a collective.

    Args:
        kind: as `Work.kind`.
        numel: elements of the smaller of source and output.
        most: elements of a slot's buffer.
        world_size: number of ranks.
        sends: of a broadcast: this rank is its root.
    """
    spread = world_size if kind in ("all_gather", "reduce_scatter") else 1
    step = max(1, most // spread)
    for start in range(0, numel, step) if numel else (0,):
        stop = min(start + step, numel)
        part = stop - start
        one = ((start, stop, 0),)
        if kind == "reduce_scatter":
            down = tuple(
                (rank * numel + start, rank * numel + stop, rank * part) for rank in range(world_size)
            )
            yield Piece(down, ((start, 0, part),), world_size * part, part)
        elif kind == "all_gather":
            up = tuple((rank * numel + start, rank * part, (rank + 1) * part) for rank in range(world_size))
            yield Piece(one, up, part, world_size * part)
        elif kind == "broadcast":
            yield Piece(one if sends else (), () if sends else ((start, 0, part),), part, part)
        else:
            yield Piece(one, ((start, 0, part),), part, part)


@dataclass
class _Slot:
    """Two pinned buffers, of which one piece after the other makes use."""

    input: torch.Tensor
    output: torch.Tensor
    free: Gate = field(default_factory=lambda: Gate(0))
    """Opens when the piece that has it now has gone up."""


class Staging:
    """A `way.Way` through a host's backend."""

    def __init__(
        self, host: Backend, device: Accelerator, rank: int, world_size: int, piece_bytes: int
    ) -> None:
        """
        Args:
            host: carries the pieces.
            device: whose tensors they are of.
            rank: this one.
            world_size: number of ranks.
            piece_bytes: size of a buffer.
        """
        self._host = host
        self._device = device
        self._rank = rank
        self._world_size = world_size
        self._piece_bytes = max(piece_bytes // 64 * 64, 64 * world_size)
        self._down = device.stream("down")
        self._up = device.stream("up")
        self._slots: list[_Slot] = []
        self._unpin: Callable[[], None] | None = None
        self._next = 0
        self._lock = threading.Lock()
        self._closed = False
        self._pending = Pending()

    def start(self, work: Work) -> Handle:
        ready = self._device.here().mark()
        numel = min(work.source.numel(), work.output.numel())
        most = self._piece_bytes // work.source.itemsize
        sends = work.src == self._rank
        pieces = list(pieces_of(work.kind, numel, most, self._world_size, sends=sends))
        handles = [
            self._start(work, piece, ready, f"{work.label or work.kind}, piece {number}")
            for number, piece in enumerate(pieces[:-1], 1)
        ]
        # Its handle ends after this one's last copy; whoever waits for that has waited for the others.
        ended = Gate()
        handles.append(self._start(work, pieces[-1], ready, f"{work.label or work.kind}, last piece", ended))
        handle = DeviceHandle(name_of(work), handles, partial(look_at, self._down, self._up))
        self._pending.add(handle)
        ended.on_open(lambda: self._conclude(work, handle))
        return handle

    def interrupt(self, error: RingpsError) -> None:
        self._pending.fail(error)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            unpin, self._unpin, self._slots = self._unpin, None, []
        if unpin is None:
            return
        # Copies of what was interrupted may be under way still, and those that end now may begin others.
        for stream in (self._up, self._down):
            passed = threading.Event()
            stream.notify(passed.set)
            passed.wait(_CLOSE_S)
        unpin()

    def _conclude(self, work: Work, handle: Handle) -> None:
        # What was hashed is what came over the wire.
        conclude(work._replace(digest=None), self._up, partial(self._pending.settle, handle))

    def _start(self, work: Work, piece: Piece, ready: Mark, label: str, ended: Gate | None = None) -> Handle:
        """Give one piece to the host's backend; `ended` opens when its way up is in the stream."""
        slot = self._take_slot()
        before, slot.free = slot.free, Gate()
        dtype = work.source.dtype
        source = slot.input.view(dtype)[: piece.source_numel]
        output = slot.output.view(dtype)[: piece.output_numel]
        if work.kind == "broadcast":
            source = output
        down = [(work.source[start:stop], source[at : at + stop - start]) for start, stop, at in piece.down]
        up = [(output[start:stop], work.output[at : at + stop - start]) for at, start, stop in piece.up]
        gate = Gate()
        before.on_open(partial(self._bring_down, down, ready, gate))
        return self._host.start(
            Work(
                kind=work.kind,
                source=source,
                output=output,
                op=work.op,
                src=work.src,
                label=f"{label} of {work.dtype}{list(work.shape)} on the GPU",
                shape=source.shape,
                dtype=work.dtype,
                finish=partial(self._bring_up, work, output, up, ready, slot.free, ended),
                gate=gate,
            )
        )

    def _bring_down(self, copies: Sequence[Copy], ready: Mark, gate: Gate) -> None:
        """The slot is free: fill it."""
        if not copies:
            gate.step()
            return
        self._down.after(ready)
        self._down.run(partial(_copy, copies))
        self._down.notify(gate.step)

    def _bring_up(
        self,
        work: Work,
        output: torch.Tensor,
        copies: Sequence[Copy],
        ready: Mark,
        free: Gate,
        ended: Gate | None,
    ) -> None:
        """The piece has its result; on the thread that has it."""
        if work.digest is not None:
            work.digest.add(output)
        with self._lock:
            if self._closed:
                return
            # What the script's stream still does to the output comes before.
            self._up.after(ready)
            if copies:
                self._up.run(partial(_copy, copies))
            self._up.notify(free.step)
        if ended is not None:
            ended.step()

    def _take_slot(self) -> _Slot:
        """The next one, which may be in use."""
        with self._lock:
            if not self._slots:
                # In one, for a page of memory can be pinned once only.
                memory = self._host.allocate(2 * _SLOTS * self._piece_bytes)
                self._unpin = self._device.pin(memory)
                halves = memory.view(_SLOTS, 2, self._piece_bytes)
                self._slots = [_Slot(input=one[0], output=one[1]) for one in halves]
            slot = self._slots[self._next]
            self._next = (self._next + 1) % _SLOTS
            return slot


def _copy(copies: Sequence[Copy]) -> None:
    for source, target in copies:
        target.copy_(source, non_blocking=True)
