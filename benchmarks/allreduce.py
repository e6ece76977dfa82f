"""How long does an all-reduce take, by size, compared with PyTorch's gloo?

    python benchmarks/allreduce.py -n 2,4               # starts the workers itself, once per transport
    ringps run -n 2 benchmarks/allreduce.py             # what it starts

All backends of a run use the same worker processes, one thread each, and take turns from one repetition
to the next, so that whatever else the machine does meets them alike. A process has one ring with one
transport, so each transport is a run of its own, with gloo beside it: compare within a run. All ranks
meet at a barrier before each repetition, and its time is that of the slowest rank. A repetition calls
small all-reduces several times in a row and counts their mean, as nccl-tests do: ranks do not leave a
barrier at the same moment, and with a single call that would count more than the call. Every result is
compared with the exact sum, outside of the timed region.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed

import plots
import report
import ringps
import workers
from report import KIB, MIB

SIZES_BYTES = [KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 32 * MIB, 64 * MIB, 256 * MIB]
BASELINE = "gloo"
_BYTES_IN_A_ROW = 128 * MIB
_MOST_CALLS_IN_A_ROW = 20


@dataclass(frozen=True)
class Backend:
    """A way to add up tensors of all ranks, in place."""

    name: str
    all_reduce: Callable[[torch.Tensor], object]
    empty: Callable[[int], torch.Tensor] | None = None
    """Makes a tensor of so many float32 elements, if it must be of a special kind."""


def backends(transport: str) -> list[Backend]:
    """What is compared over one ring."""
    found = [Backend(f"ringps-{transport}", ringps.all_reduce)]
    if transport in ("shm", "auto"):
        shared = Backend(f"ringps-{transport}-empty", ringps.all_reduce, _shared_empty)
        found.append(shared)
    return [*found, Backend(BASELINE, torch.distributed.all_reduce)]


def measure(size_bytes: int, transport: str, limits: workers.Limits) -> list[report.Row]:
    """A row per backend; the same on all ranks."""
    n = ringps.world_size()
    # Whole numbers below 2^24: float32 adds them exactly, in any order.
    pattern = torch.arange(size_bytes // 4, dtype=torch.float32) % 1021
    expected = pattern * n + sum(range(n))
    calls = min(max(_BYTES_IN_A_ROW // size_bytes, 1), _MOST_CALLS_IN_A_ROW)
    # In place each further call multiplies by n.
    expected *= n ** (calls - 1)
    exactly = n & (n - 1) == 0 or calls == 1
    ordinary = torch.empty_like(pattern)

    def turn_of(backend: Backend) -> Callable[[], float]:
        tensor = ordinary if backend.empty is None else backend.empty(len(pattern))

        def turn() -> float:
            torch.add(pattern, ringps.rank(), out=tensor)
            ringps.barrier()
            start_s = time.perf_counter()
            for _ in range(calls):
                backend.all_reduce(tensor)
            elapsed_s = (time.perf_counter() - start_s) / calls
            if not torch.equal(tensor, expected) and (exactly or not torch.allclose(tensor, expected)):
                wrong = int((tensor != expected).sum())
                raise SystemExit(
                    f"{backend.name}: {wrong} of {len(tensor)} elements are wrong at {size_bytes} bytes"
                )
            return elapsed_s

        return turn

    compared = backends(transport)
    times_s = workers.take_turns([turn_of(backend) for backend in compared], 2, limits)
    return [
        report.all_reduce_row(backend.name, size_bytes, "float32", n, times, {"transport": transport})
        for backend, times in zip(compared, times_s, strict=True)
    ]


def work(options: argparse.Namespace) -> list[report.Row]:
    """Measure everything, as one of the workers; rank 0 gets the rows."""
    torch.set_num_threads(1)
    ringps.init()
    torch.distributed.init_process_group("gloo")
    rows = []
    for size_bytes in options.sizes:
        found = measure(size_bytes, options.transport[0], workers.limits(options))
        rows += found
        if ringps.rank() == 0:
            times = ", ".join(f"{row.backend} {row.time_us:.0f} us" for row in found)
            print(f"{report.human_bytes(size_bytes)}: {times}", file=sys.stderr, flush=True)
    torch.distributed.destroy_process_group()
    leads = ringps.rank() == 0
    ringps.shutdown()
    return rows if leads else []


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of all_reduce by size, ringps against gloo.")
    workers.add_options(parser, transports=["tcp", "shm"], seconds=3.0, min_repeats=5, max_repeats=500)
    parser.add_argument("--sizes", type=_sizes, default=SIZES_BYTES, help="such as 1K,16M (default: to 256M)")
    options = parser.parse_args()
    if options.plot:
        report.load_pyplot()  # not after minutes of measuring

    sizes = f"--sizes={','.join(map(str, options.sizes))}"
    rows = workers.collect(parser, options, __file__, work, [sizes])
    if not rows:
        return
    if not options.quiet:
        print(report.table(rows, BASELINE), flush=True)
    if options.json:
        report.write_json(options.json, rows)
    if options.plot:
        plots.save(plots.bandwidths(rows), options.plot)


def _shared_empty(numel: int) -> torch.Tensor:
    return ringps.empty(numel, torch.float32)


def _sizes(text: str) -> list[int]:
    units = {"K": KIB, "M": MIB}
    return [
        int(part[:-1]) * units[part[-1]] if part[-1:] in units else int(part)
        for part in text.upper().split(",")
    ]


if __name__ == "__main__":
    main()
