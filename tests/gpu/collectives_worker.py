"""Collectives on a GPU's tensors, each compared with the same in the CPU's memory."""

from __future__ import annotations

import torch

import ringps
from ringps.collectives import current
from ringps.kernels.cpu import REDUCE_OPS, check_reducible
from ringps.kernels.digest import Digest
from ringps.worker_env import configure
from tests.gpu.card import Card
from tests.gpu.cases import main

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
SIZES = (0, 1, 7, 1000, 9001, 300_001)
WITH_ALL_OPS = (torch.float32, torch.bfloat16, torch.int32, torch.bool)
"""The others are summed only: each pair of dtype and op is a kernel that is yet to be compiled."""
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""By NCCL, which adds these in their own precision, and where slices are cut differently."""


def values(numel: int, dtype: torch.dtype = torch.float32, rank: int | None = None) -> torch.Tensor:
    """A rank's (this one's), on the CPU."""
    rank = ringps.rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    found = torch.rand(numel, generator=generator) * 8
    return found > 4 if dtype is torch.bool else found.to(dtype)


def ops_of(dtype: torch.dtype) -> list[str]:
    found = []
    for op in REDUCE_OPS:
        try:
            found.append(check_reducible(dtype, op))
        except ValueError:
            continue
    return list(found)


def assert_as_on_the_cpu(there: torch.Tensor, here: torch.Tensor) -> None:
    """To the bit by CUDA IPC and where nothing is rounded."""
    found = there.cpu()
    if configure().transport == "cuda_ipc" or here.dtype not in FLOATS:
        assert torch.equal(found, here), (here.dtype, here.numel(), (found != here).sum())
    else:
        tolerance = TOLERANCE.get(here.dtype, 1e-5)
        torch.testing.assert_close(found, here, rtol=tolerance, atol=tolerance)


def assert_alike(*tensors: torch.Tensor) -> None:
    """All ranks have the same bits."""
    for tensor in tensors:
        own = Digest()
        own.add(tensor.detach().cpu().contiguous())
        assert len(set(current().gather_bytes(own.value()))) == 1, (tensor.dtype, tensor.shape)


def all_reduce(card: Card) -> None:
    for dtype in DTYPES:
        for op in ops_of(dtype) if dtype in WITH_ALL_OPS else ("sum",):
            for numel in SIZES if op == "sum" else SIZES[3:5]:
                here = values(numel, dtype)
                there = card.copy(here)
                ringps.all_reduce(there, op)
                ringps.all_reduce(here, op)
                assert_as_on_the_cpu(there, here)
                assert_alike(there)


def reduce_scatter(card: Card) -> None:
    for dtype in DTYPES:
        for numel in SIZES:
            many = values(numel * ringps.world_size(), dtype)
            here, op = torch.zeros(numel, dtype=dtype), "max" if dtype is torch.bool else "sum"
            there = card.copy(here)
            ringps.reduce_scatter(there, card.copy(many), op)
            ringps.reduce_scatter(here, many, op)
            assert_as_on_the_cpu(there, here)


def all_gather(card: Card) -> None:
    for dtype in DTYPES:
        for numel in SIZES:
            own = values(numel, dtype)
            there = card.copy(torch.zeros(numel * ringps.world_size(), dtype=dtype))
            ringps.all_gather(there, card.copy(own))
            wanted = torch.cat([values(numel, dtype, rank) for rank in range(ringps.world_size())])
            assert torch.equal(there.cpu(), wanted), (dtype, numel)


def broadcast(card: Card) -> None:
    for dtype in DTYPES:
        for numel in SIZES:
            for src in range(ringps.world_size()):
                there = card.copy(values(numel, dtype))
                ringps.broadcast(there, src)
                assert torch.equal(there.cpu(), values(numel, dtype, src)), (dtype, numel, src)


def in_the_background(card: Card) -> None:
    """Several at once, amid others in the CPU's memory and work of the GPU's; inputs are unharmed."""
    sizes = (300_001, 3, 50_000)
    inputs = [card.copy(values(numel)) for numel in sizes]
    outputs = [card.copy(torch.full((numel,), torch.nan)) for numel in sizes]
    digests = [Digest() for _ in sizes]
    handles = []
    for output, given, hashed in zip(outputs, inputs, digests, strict=True):
        handles.append(current().all_reduce_into(output, given, "mean", digest=hashed))
        beside = torch.full((3,), float(ringps.rank()))
        ringps.all_reduce(beside)
        assert beside.tolist() == [sum(range(ringps.world_size()))] * 3
        card.busy()
    for handle in handles:
        handle.wait(20)
    for numel, given, output, hashed in zip(sizes, inputs, outputs, digests, strict=True):
        assert torch.equal(given.cpu(), values(numel))
        here = values(numel)
        ringps.all_reduce(here, "mean")
        assert_as_on_the_cpu(output, here)
        assert hashed.fed
        assert len(set(current().gather_bytes(hashed.value()))) == 1
    first, last = card.copy(values(1000)), card.copy(values(1001))
    pending = [ringps.all_reduce(one, async_op=True) for one in (first, last)]
    for one in reversed(pending):
        assert one is not None
        one.wait(20)
    for there, numel in ((first, 1000), (last, 1001)):
        here = values(numel)
        ringps.all_reduce(here)
        assert_as_on_the_cpu(there, here)


def strided(card: Card) -> None:
    base = values(6 * 1000).view(6, 1000)
    for view in (lambda one: one[:, ::2], lambda one: one.mT, lambda one: one[1:5, 3:700]):
        whole, here = card.copy(base), view(base.clone()).contiguous()
        ringps.all_reduce(view(whole))
        ringps.all_reduce(here)
        assert_as_on_the_cpu(view(whole).contiguous(), here)
        changed = view(torch.zeros(6, 1000, dtype=torch.bool).logical_not_())
        kept = torch.ones(6, 1000, dtype=torch.bool)
        view(kept).logical_and_(~changed)
        assert torch.equal(whole.cpu()[kept], base[kept]), "what lies between was changed"


def of_the_ring(card: Card) -> None:
    """Memory that peers can open; one of its tensors after the other."""
    for numel in (1000, 300_001, 1000):
        there = current().empty_beside(card.copy(torch.zeros(1)), numel, torch.float32)
        here = values(numel)
        there.copy_(here)
        ringps.all_reduce(there)
        ringps.all_reduce(here)
        assert_as_on_the_cpu(there, here)


def on_other_streams(card: Card) -> None:
    """A slow producer on another stream; the result is there for all of them."""
    for place in ("inside", "behind"):
        there, here = card.copy(torch.zeros(300_001)), values(300_001)
        given = card.copy(here)
        with card.other_stream() as stream:
            card.busy()
            there.copy_(given)
            if place == "inside":
                ringps.all_reduce(there)
        if place == "behind":
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)
            ringps.all_reduce(there)
        with card.other_stream():
            seen = there.clone()
        ringps.all_reduce(here)
        assert_as_on_the_cpu(seen, here)


CASES = {
    one.__name__: one
    for one in (
        all_reduce,
        reduce_scatter,
        all_gather,
        broadcast,
        in_the_background,
        strided,
        of_the_ring,
        on_other_streams,
    )
}

if __name__ == "__main__":
    main(CASES)
