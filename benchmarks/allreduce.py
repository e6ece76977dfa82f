"""How long does an all-reduce take, by size, compared with PyTorch's gloo?

    python benchmarks/allreduce.py -n 2,4               # starts the workers itself
    ringps run -n 2 benchmarks/allreduce.py             # what it starts

Both backends run in the same worker processes, one thread each, and take turns from one repetition to
the next, so that whatever else the machine does meets both alike. All ranks meet at a barrier before
each repetition, and its time is that of the slowest rank. Every result is compared with the exact sum.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed

import report
import ringps
from report import KIB, MIB
from ringps import worker_env

SIZES_BYTES = [KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB]
BASELINE = "gloo"
BACKENDS: dict[str, Callable[[torch.Tensor], object]] = {
    "ringps-tcp": ringps.all_reduce,
    "gloo": torch.distributed.all_reduce,
}


def measure(size_bytes: int, options: argparse.Namespace) -> list[report.Row]:
    """A row per backend; the same on all ranks."""
    n = ringps.world_size()
    # Whole numbers below 2^24: float32 adds them exactly, in any order.
    pattern = torch.arange(size_bytes // 4, dtype=torch.float32) % 1021
    expected = pattern * n + sum(range(n))
    tensor = torch.empty_like(pattern)

    def once(backend: str) -> float:
        torch.add(pattern, ringps.rank(), out=tensor)
        ringps.barrier()
        start_s = time.perf_counter()
        BACKENDS[backend](tensor)
        elapsed_s = time.perf_counter() - start_s
        if not torch.equal(tensor, expected):
            wrong = int((tensor != expected).sum())
            raise SystemExit(f"{backend}: {wrong} of {len(tensor)} elements are wrong at {size_bytes} bytes")
        return elapsed_s

    order = list(BACKENDS)
    warm_s = torch.tensor([[once(backend) for backend in order] for _ in range(2)])
    ringps.all_reduce(warm_s, "max")
    repeats = int(options.seconds / warm_s[-1].sum().item())
    repeats = min(max(repeats, options.min_repeats), options.max_repeats)

    times_s = torch.zeros(repeats, len(order))
    for repetition in range(repeats):
        for column in range(len(order)):
            turn = (repetition + column) % len(order)
            times_s[repetition, turn] = once(order[turn])
    ringps.all_reduce(times_s, "max")
    return [
        report.all_reduce_row(backend, size_bytes, "float32", n, times_s[:, column].tolist())
        for column, backend in enumerate(order)
    ]


def work(options: argparse.Namespace) -> list[report.Row]:
    """Measure everything, as one of the workers."""
    torch.set_num_threads(1)
    ringps.init()
    torch.distributed.init_process_group("gloo")
    rows = []
    for size_bytes in options.sizes:
        rows += measure(size_bytes, options)
        if ringps.rank() == 0:
            pair = ", ".join(f"{row.backend} {row.time_us:.0f} us" for row in rows[-len(BACKENDS) :])
            print(f"{report.human_bytes(size_bytes)}: {pair}", file=sys.stderr, flush=True)
    torch.distributed.destroy_process_group()
    leads = ringps.rank() == 0
    ringps.shutdown()
    return rows if leads else []


def start_workers(world_size: int, options: argparse.Namespace) -> list[report.Row]:
    """Run this script under `ringps run` and collect its rows."""
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows.json"
        command = [sys.executable, "-m", "ringps_launcher", "run", "-n", str(world_size), __file__, "--quiet"]
        for option in ("seconds", "min_repeats", "max_repeats"):
            command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
        command += ["--sizes", ",".join(map(str, options.sizes)), "--json", str(rows)]
        print(f"{world_size} workers:", file=sys.stderr, flush=True)
        code = subprocess.run(command, check=False).returncode
        if code:
            sys.exit(code)
        return report.read_json(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of all_reduce by size, ringps against gloo.")
    parser.add_argument("-n", "--workers", type=_numbers, metavar="N,N", help="world sizes (default: 2,4)")
    parser.add_argument("--sizes", type=_sizes, default=SIZES_BYTES, help="such as 1K,16M (default: to 256M)")
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long to measure each size")
    parser.add_argument("--min-repeats", type=int, default=7)
    parser.add_argument("--max-repeats", type=int, default=500)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the bandwidths there")
    parser.add_argument("--quiet", action="store_true", help="print no table")
    options = parser.parse_args()
    if options.plot:
        report.load_pyplot()  # not after minutes of measuring

    launched = worker_env.read() is not None
    if launched and options.workers:
        parser.error("under `ringps run` its -n is the world size")
    rows = []
    if launched:
        rows = work(options)
    else:
        for world_size in options.workers or [2, 4]:
            rows += start_workers(world_size, options)
    if not rows:
        return
    if not options.quiet:
        print(report.table(rows, BASELINE), flush=True)
    if options.json:
        report.write_json(options.json, rows)
    if options.plot:
        report.plot(options.plot, rows)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _sizes(text: str) -> list[int]:
    units = {"K": KIB, "M": MIB}
    return [
        int(part[:-1]) * units[part[-1]] if part[-1:] in units else int(part)
        for part in text.upper().split(",")
    ]


if __name__ == "__main__":
    main()
