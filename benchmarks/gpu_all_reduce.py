"""How long does an all-reduce of GPU tensors take? A worker of `ringps run`; gpu.py starts it.

All workers use GPU 0 over `cuda_ipc`, `zmq`, `tcp` and `shm`, and one each over `nccl`. Variants take turns
in the same processes, as in allreduce.py; every result is compared with the exact sum outside of the timed
region.

What limits `cuda_ipc` on one GPU is its memory. Of S bytes among n ranks, each rank reads n slices of S/n,
writes its slice of the result, and reads and writes the other n - 1: S (3 - 1/n) bytes a rank, so the GPU
moves S (3n - 1). Tensors that go through the host are compared with tensors of the host's over the same
transport.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import gpu_device
import gpu_memory
import gpu_report
import ringps
import workers
from gpu_device import Card
from gpu_report import GpuRow
from report import MIB
from ringps import worker_env

SIZES_BYTES = {
    "cuda_ipc": (MIB, 16 * MIB, 256 * MIB),
    "nccl": (MIB, 16 * MIB, 256 * MIB),
    "staged": (4 * MIB, 64 * MIB, 256 * MIB),
}
_IPC_BAR = 0.60
_STAGED_BAR, _STAGED_BAR_BYTES = 0.90, 64 * MIB
"""For zmq, from so many bytes on."""
_BYTES_IN_A_ROW = 64 * MIB
_MOST_CALLS_IN_A_ROW = 10
_WARM_ROUNDS = 2


@dataclass(frozen=True)
class Variant:
    """Where the tensor lies."""

    name: str
    empty: Callable[[int], torch.Tensor]
    """Makes one of so many float32 elements."""


def variants(card: Card, transport: str) -> list[Variant]:
    """What is compared over one ring; the first is what the bar is for."""

    def plain(numel: int) -> torch.Tensor:
        return card.copy(torch.zeros(numel))

    if transport == "cuda_ipc":
        shared = Variant("cuda_ipc, ringps.empty", lambda numel: card.shared(numel, torch.float32))
        return [shared, Variant("cuda_ipc", plain)]
    if transport == "nccl":
        return [Variant("nccl by ringps", plain)]
    return [
        Variant(f"staged over {transport}", plain),
        Variant(f"{transport} on the host", lambda numel: ringps.empty(numel, torch.float32)),
    ]


def times_of(card: Card, chosen: list[Variant], size_bytes: int, limits: workers.Limits) -> list[list[float]]:
    """Seconds of an all-reduce, by variant. Collective."""
    n = ringps.world_size()
    # Whole numbers below 2^24: float32 adds them exactly, in any order.
    pattern = torch.arange(size_bytes // 4, dtype=torch.float32) % 1021
    calls = min(max(_BYTES_IN_A_ROW // size_bytes, 1), _MOST_CALLS_IN_A_ROW)
    # In place each further call multiplies by n; exact where that is a power of two.
    expected = (pattern * n + sum(range(n))) * n ** (calls - 1)
    exactly = n & (n - 1) == 0 or calls == 1

    def turn_of(variant: Variant) -> Callable[[], float]:
        tensor = variant.empty(len(pattern))
        beside = pattern if tensor.is_cpu else pattern.to(tensor.device)
        wanted = expected if tensor.is_cpu else expected.to(tensor.device)

        def turn() -> float:
            torch.add(beside, ringps.rank(), out=tensor)
            card.synchronize()
            ringps.barrier()
            start_s = time.perf_counter()
            for _ in range(calls):
                ringps.all_reduce(tensor)
            elapsed_s = (time.perf_counter() - start_s) / calls
            if not torch.equal(tensor, wanted) and (exactly or not torch.allclose(tensor, wanted)):
                wrong = int((tensor != wanted).sum())
                raise SystemExit(
                    f"{variant.name}: {wrong} of {len(tensor)} elements are wrong at {size_bytes} bytes"
                )
            return elapsed_s

        return turn

    return workers.take_turns([turn_of(one) for one in chosen], _WARM_ROUNDS, limits)


def measure(card: Card, transport: str, copy_bytes_per_s: float, limits: workers.Limits) -> list[GpuRow]:
    """Rows of all sizes; the same on all ranks."""
    n = ringps.world_size()
    chosen = variants(card, transport)
    rows = []
    for full_bytes in SIZES_BYTES.get(transport, SIZES_BYTES["staged"]):
        size_bytes = card.size(full_bytes)
        found = times_of(card, chosen, size_bytes, limits)
        for place, (variant, times_s) in enumerate(zip(chosen, found, strict=True)):
            ceiling_s = bar = None
            if transport == "cuda_ipc":
                ceiling_s = size_bytes * (3 * n - 1) / copy_bytes_per_s
                bar = _IPC_BAR if place == 0 else None
            elif transport != "nccl" and place == 0:
                ceiling_s = statistics.median(found[1])
                bar = _STAGED_BAR if transport == "zmq" and full_bytes >= _STAGED_BAR_BYTES else None
            rows.append(
                gpu_report.measured(
                    "all_reduce",
                    backend=variant.name,
                    size_bytes=size_bytes,
                    dtype="float32",
                    world_size=n,
                    times_s=times_s,
                    rehearsal=card.rehearsal,
                    ceiling_s=ceiling_s,
                    bar=bar,
                    facts={"transport": transport},
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="all_reduce of GPU tensors, as one of the workers.")
    gpu_device.add_options(parser)
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long to measure each point")
    options = parser.parse_args()
    env = worker_env.read()
    if env is None:
        sys.exit("gpu_all_reduce.py: start it by `ringps run`, or all of the benchmark by gpu.py")
    torch.set_num_threads(1)
    ringps.init()
    each_its_own = env.transport == "nccl"
    card = gpu_device.card(options.rehearse, ringps.local_rank() if each_its_own else 0)
    # The others wait: rank 0 has the GPU to itself.
    bandwidth = torch.zeros(1, dtype=torch.float64)
    if ringps.rank() == 0:
        bandwidth += gpu_memory.copy_bytes_per_s(card)
    ringps.broadcast(bandwidth, 0)
    limits = workers.Limits(seconds=options.seconds, min_repeats=3, max_repeats=100)
    if card.rehearsal:
        limits = workers.Limits(seconds=0.0, min_repeats=2, max_repeats=2)
    rows = measure(card, env.transport, bandwidth.item(), limits)
    leads = ringps.rank() == 0
    ringps.shutdown()
    if leads:
        gpu_report.write(options.json, rows)


if __name__ == "__main__":
    main()
