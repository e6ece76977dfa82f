"""All-reduces of GPU tensors by PyTorch's own means: symmetric memory's two-shot kernel, and NCCL.

A worker of `ringps run -n 2 gpu_symmetric.py --by symmetric`. Times are of whole calls in a row, from a
barrier to the end of the device's work; each counts as long as its slowest rank took.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

import torch
from torch import distributed

import gpu_device
import gpu_report
from gpu_all_reduce import SIZES_BYTES
from gpu_report import GpuRow
from ringps import worker_env

_CALLS = 5
_REPEATS = 15
_SHARING_NCCL = (2, 30)
"""The first version of which ranks may share a GPU."""

AllReduce = Callable[[], object]


class Unavailable(Exception):
    """Cannot be had here; says why."""


def symmetric(numel: int, device: torch.device) -> tuple[torch.Tensor, AllReduce]:
    """A tensor of symmetric memory, and its all-reduce in place."""
    from torch.distributed import _symmetric_memory

    world = distributed.group.WORLD
    assert world is not None
    name = world.group_name
    try:
        tensor = _symmetric_memory.empty(numel, dtype=torch.float32, device=device)
        _symmetric_memory.rendezvous(tensor, name)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        raise Unavailable(f"no symmetric memory: {_first_line(error)}") from error
    return tensor, lambda: torch.ops.symm_mem.two_shot_all_reduce_(tensor, "sum", name)


def nccl(numel: int, device: torch.device) -> tuple[torch.Tensor, AllReduce]:
    """A tensor, and its all-reduce in place by NCCL."""
    tensor = torch.zeros(numel, device=device)
    return tensor, lambda: distributed.all_reduce(tensor)


def measure(by: str, index: int) -> list[GpuRow]:
    """Rows of all sizes; the same on all ranks.

    Raises:
        Unavailable: it cannot be had.
    """
    card = gpu_device.Gpu(index)
    rank, n = distributed.get_rank(), distributed.get_world_size()
    rows = []
    for size_bytes in SIZES_BYTES["cuda_ipc"]:
        pattern = torch.arange(size_bytes // 4, dtype=torch.float32, device=card.device) % 1021
        tensor, all_reduce = (symmetric if by == "symmetric" else nccl)(len(pattern), card.device)
        own, wanted = pattern + rank, pattern * n + sum(range(n))
        times_s = torch.zeros(_REPEATS, dtype=torch.float64)
        tensor.copy_(own)
        try:
            all_reduce()
            card.synchronize()
        except RuntimeError as error:
            raise Unavailable(f"{by} does not work here: {_first_line(error)}") from error
        if not torch.equal(tensor, wanted):
            raise SystemExit(f"{by}: the sum is wrong at {size_bytes} bytes")
        for repetition in range(_REPEATS):
            tensor.copy_(own)
            card.synchronize()
            distributed.barrier()
            start_s = time.perf_counter()
            for _ in range(_CALLS):
                all_reduce()
            card.synchronize()
            times_s[repetition] = (time.perf_counter() - start_s) / _CALLS
        slowest = times_s.to(card.device) if distributed.get_backend() == "nccl" else times_s
        distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
        names = {"symmetric": "symmetric memory, two-shot", "nccl": "nccl by torch"}
        rows.append(
            gpu_report.measured(
                "all_reduce",
                backend=names.get(by, "nccl by torch, one GPU"),
                size_bytes=size_bytes,
                dtype="float32",
                world_size=n,
                times_s=slowest.tolist(),
                rehearsal=False,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="all_reduce by PyTorch, as one of the workers.")
    gpu_device.add_options(parser)
    parser.add_argument("--by", choices=("symmetric", "nccl", "nccl-shared"), required=True)
    options = parser.parse_args()
    if worker_env.read() is None:
        sys.exit("gpu_symmetric.py: start it by `ringps run`, or all of the benchmark by gpu.py")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    try:
        if options.rehearse:
            raise Unavailable("it needs a GPU")
        version = tuple(torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
        if options.by == "nccl-shared" and version < _SHARING_NCCL:
            raise Unavailable(f"NCCL {'.'.join(map(str, version))} wants a GPU for each rank; 2.30 does not")
        index = local_rank if options.by == "nccl" else 0
        torch.cuda.set_device(index)
        distributed.init_process_group("gloo" if options.by == "symmetric" else "nccl")
        try:
            rows = measure(options.by, index)
        except distributed.DistBackendError as error:
            raise Unavailable(f"{options.by} does not work here: {_first_line(error)}") from error
    except Unavailable as why:
        rows = [
            gpu_report.absent(
                "all_reduce", str(why), outcome="n/a", backend=options.by, world_size=world_size
            )
        ]
    if rank == 0:
        gpu_report.write(options.json, rows)
    sys.stdout.flush()
    # A communicator that failed can hang when it is destroyed.
    os._exit(0)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().partition("\n")[0][:160]


if __name__ == "__main__":
    main()
