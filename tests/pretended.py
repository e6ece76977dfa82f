"""Workers with pretended GPUs, as threads of this process; and an NCCL for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from ringps import device
from ringps.kernels.fold import fold_of
from ringps.testing.pretend import PretendAccelerator

_LIMIT_S = 30.0

WayOf = Literal["nccl", "cuda_ipc", "staged"]


class Hub:
    """Where the members of a pretended NCCL communicator meet."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.given: dict[int, dict[int, torch.Tensor]] = {}
        self.taken: dict[int, int] = {}
        self.connected = 0


class PretendNccl:
    """A `device.NcclLibrary` for threads: all of a process share its hubs."""

    version = (2, 99, 1)
    _hubs: dict[bytes, Hub] = {}  # noqa: RUF012
    _lock = threading.Lock()
    _made = 0

    def __init__(self, *, connects: bool = True) -> None:
        self._connects = connects
        self.rings: list[PretendRing] = []

    def unique_id(self) -> bytes:
        with self._lock:
            PretendNccl._made += 1
            return b"hub %d" % self._made

    def supports(self, dtype: torch.dtype, op: str) -> bool:
        return dtype not in (torch.int16, torch.bool)

    def connect(
        self, unique_id: bytes, size: int, rank: int, check: Callable[[], None], limit_s: float
    ) -> PretendRing:
        if not self._connects:
            raise RuntimeError("the pretended network is down")
        with self._lock:
            hub = self._hubs.setdefault(unique_id, Hub())
        with hub.changed:
            hub.connected += 1
            hub.changed.notify_all()
            while hub.connected < size:
                check()
                hub.changed.wait(0.01)
        self.rings.append(PretendRing(hub, size, rank))
        return self.rings[-1]


class PretendRing:
    """A `device.NcclRing`. As in NCCL, what is under way never ends by itself once a member is gone."""

    def __init__(self, hub: Hub, size: int, rank: int) -> None:
        self._hub = hub
        self._size = size
        self._rank = rank
        self._calls = 0
        self.aborted = False
        self.trouble: str | None = None

    def all_reduce(self, send: torch.Tensor, recv: torch.Tensor, op: str, stream_key: int) -> None:
        inputs = self._swap(send)
        if inputs is not None:
            recv.copy_(_fold(inputs, op))

    def reduce_scatter(self, send: torch.Tensor, recv: torch.Tensor, op: str, stream_key: int) -> None:
        inputs = self._swap(send)
        if inputs is not None:
            recv.copy_(_fold(inputs, op).chunk(self._size)[self._rank])

    def all_gather(self, send: torch.Tensor, recv: torch.Tensor, stream_key: int) -> None:
        inputs = self._swap(send)
        if inputs is not None:
            recv.copy_(torch.cat(inputs))

    def broadcast(self, tensor: torch.Tensor, src: int, stream_key: int) -> None:
        inputs = self._swap(tensor)
        if inputs is not None:
            tensor.copy_(inputs[src])

    def error(self) -> str | None:
        return self.trouble

    def abort(self) -> None:
        with self._hub.changed:
            self.aborted = True
            self._hub.changed.notify_all()

    def _swap(self, own: torch.Tensor) -> list[torch.Tensor] | None:
        hub = self._hub
        with hub.changed:
            self._calls += 1
            given = hub.given.setdefault(self._calls, {})
            given[self._rank] = own.clone()
            hub.changed.notify_all()
            # Ranks that mean different things hang.
            hub.changed.wait_for(
                lambda: (
                    self.aborted
                    or (len(given) == self._size and len({one.numel() for one in given.values()}) == 1)
                )
            )
            if self.aborted:
                return None
            return [given[rank] for rank in range(self._size)]


def _fold(inputs: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    fold = fold_of(inputs[0].dtype, op)  # type: ignore[arg-type]
    out = torch.empty_like(inputs[0])
    blocks = [fold.of(one) for one in inputs]
    partial = fold.partial_of(fold.scratch(out.numel()))
    fold.partial(blocks[0], blocks[1], partial)
    for block in blocks[2:]:
        fold.partial(partial, block, partial)
    fold.finish(partial, fold.of(out), len(inputs))
    return out


@contextmanager
def gpus(count: int, way: WayOf, *, seed: int | None = None) -> Iterator[list[PretendAccelerator]]:
    """A pretended GPU for each of `count` workers, such that "auto" takes `way` on one host."""
    shared = way != "nccl"
    made = [
        PretendAccelerator(
            "the only one" if shared else f"number {rank}",
            seed=None if seed is None else seed + rank,
            nccl=PretendNccl() if way == "nccl" else None,
            shares=way == "cuda_ipc",
        )
        for rank in range(count)
    ]
    undo = [device.use(one) for one in made]
    try:
        yield made
    finally:
        for forget in undo:
            forget()
        for one in made:
            one.close()
        assert [one.failures() for one in made] == [[]] * count
