"""What the benchmarks' results look like: rows, tables, plots."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import zmq

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured point. Bandwidths are in GB/s (10^9 bytes), times in microseconds."""

    bench: str
    backend: str
    op: str
    bytes: int
    dtype: str
    world_size: int
    repeats: int
    time_us: float
    """Median over the repetitions; each counts as long as its slowest rank took."""
    time_us_min: float
    time_us_max: float
    algbw_gbps: float
    """bytes / time"""
    busbw_gbps: float
    """What the busiest link carried: for all_reduce, algbw * 2 (n - 1) / n (as nccl-tests define it)."""
    env: dict[str, object]


def all_reduce_row(
    backend: str, size_bytes: int, dtype: str, world_size: int, times_s: Sequence[float]
) -> Row:
    """A row of `times_s`, one per repetition."""
    median_s = statistics.median(times_s)
    algbw_gbps = size_bytes / median_s / 1e9
    return Row(
        bench="allreduce",
        backend=backend,
        op="all_reduce",
        bytes=size_bytes,
        dtype=dtype,
        world_size=world_size,
        repeats=len(times_s),
        time_us=round(median_s * 1e6, 2),
        time_us_min=round(min(times_s) * 1e6, 2),
        time_us_max=round(max(times_s) * 1e6, 2),
        algbw_gbps=round(algbw_gbps, 6),
        busbw_gbps=round(algbw_gbps * 2 * (world_size - 1) / world_size, 6),
        env=environment(),
    )


@cache
def environment() -> dict[str, object]:
    """The machine and the software that was measured."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyzmq": zmq.pyzmq_version(),
        "libzmq": zmq.zmq_version(),
        "commit": _commit(),
    }


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write a list of rows."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read_json(path: Path) -> list[Row]:
    """What `write_json` wrote."""
    return [Row(**row) for row in json.loads(path.read_text())]


def table(rows: Sequence[Row], baseline: str) -> str:
    """A line per row; the last column is how much faster than `baseline` at that size and world size."""
    titles = ("n", "size", "backend", "time us", "min", "max", "algbw GB/s", "busbw GB/s", f"vs {baseline}")
    lines = [titles]
    base = {(row.world_size, row.bytes): row for row in rows if row.backend == baseline}
    for row in rows:
        against = base.get((row.world_size, row.bytes))
        lines.append(
            (
                str(row.world_size),
                human_bytes(row.bytes),
                row.backend,
                f"{row.time_us:.0f}",
                f"{row.time_us_min:.0f}",
                f"{row.time_us_max:.0f}",
                f"{row.algbw_gbps:.3f}",
                f"{row.busbw_gbps:.3f}",
                f"{against.time_us / row.time_us:.2f}x" if against else "",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    text = []
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        text.append("  ".join(cells))
    return "\n".join(text)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw bus bandwidth over size, a curve per backend and world size."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for backend, world_size in sorted({(row.backend, row.world_size) for row in rows}):
        curve = [row for row in rows if (row.backend, row.world_size) == (backend, world_size)]
        sizes, bandwidths = [row.bytes for row in curve], [row.busbw_gbps for row in curve]
        axes.plot(sizes, bandwidths, marker="o", label=f"{backend}, n={world_size}")
    ticks = sorted({row.bytes for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="size", ylabel="bus bandwidth, GB/s", title="all_reduce")
    axes.set_xticks(ticks, [human_bytes(size) for size in ticks], rotation=45, fontsize="small")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def load_pyplot() -> Any:
    """matplotlib's pyplot, drawing to files.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install 'ringps[bench]'")
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def human_bytes(size: int) -> str:
    """1024 -> "1 KiB"."""
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _commit() -> str | None:
    """The commit of the working tree, with a "+" if it was changed since; None outside of git."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout else "")
