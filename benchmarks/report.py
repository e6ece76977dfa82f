"""What the benchmarks' results look like: rows of a JSON file, and tables of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import zmq

KIB, MIB = 1024, 1024 * 1024
WITHOUT = "none"
"""Backend of training steps that communicate nothing."""
DDP = "ddp"
"""What the backends that are variants of PyTorch's DistributedDataParallel begin with."""
NO_FACTS: Mapping[str, object] = MappingProxyType({})


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
    """The machine and the software, and whatever else is to be known about this point."""


@dataclass(frozen=True)
class Table:
    """Titles and as many cells in every line."""

    titles: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]

    def text(self) -> str:
        """For a terminal: columns aligned to the right."""
        every = [self.titles, *self.lines]
        widths = [max(len(line[column]) for line in every) for column in range(len(self.titles))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in every
        )

    def markdown(self) -> str:
        """For a page: columns aligned to the right too."""
        rule = ["---:"] * len(self.titles)
        escaped = [[cell.replace("|", r"\|") for cell in line] for line in [self.titles, *self.lines]]
        return "\n".join(f"| {' | '.join(line)} |" for line in [escaped[0], rule, *escaped[1:]])


def row(
    *,
    bench: str,
    backend: str,
    op: str,
    size_bytes: int,
    dtype: str,
    world_size: int,
    times_s: Sequence[float],
    facts: Mapping[str, object] = NO_FACTS,
) -> Row:
    """A row of `times_s`, one per repetition. `facts` are added to its `env`."""
    median_s = statistics.median(times_s)
    algbw_gbps = size_bytes / median_s / 1e9
    return Row(
        bench=bench,
        backend=backend,
        op=op,
        bytes=size_bytes,
        dtype=dtype,
        world_size=world_size,
        repeats=len(times_s),
        time_us=round(median_s * 1e6, 2),
        time_us_min=round(min(times_s) * 1e6, 2),
        time_us_max=round(max(times_s) * 1e6, 2),
        algbw_gbps=round(algbw_gbps, 6),
        busbw_gbps=round(algbw_gbps * 2 * (world_size - 1) / world_size, 6),
        env={**environment(), **facts},
    )


def all_reduce_row(
    backend: str,
    size_bytes: int,
    dtype: str,
    world_size: int,
    times_s: Sequence[float],
    facts: Mapping[str, object] = NO_FACTS,
) -> Row:
    """A row of all_reduce."""
    return row(
        bench="allreduce",
        backend=backend,
        op="all_reduce",
        size_bytes=size_bytes,
        dtype=dtype,
        world_size=world_size,
        times_s=times_s,
        facts=facts,
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


def bandwidths(rows: Sequence[Row], baseline: str) -> Table:
    """A line per row; the last column is how much faster than `baseline` at that point of the same run."""
    titles = ("n", "size", "backend", "time us", "min", "max", "algbw GB/s", "busbw GB/s", f"vs {baseline}")
    base = {_point(one): one for one in rows if one.backend == baseline}
    lines = []
    for one in rows:
        against = base.get(_point(one))
        lines.append(
            (
                str(one.world_size),
                human_bytes(one.bytes),
                one.backend,
                f"{one.time_us:.0f}",
                f"{one.time_us_min:.0f}",
                f"{one.time_us_max:.0f}",
                f"{one.algbw_gbps:.3g}",
                f"{one.busbw_gbps:.3g}",
                f"{against.time_us / one.time_us:.2f}x" if against else "",
            )
        )
    return Table(titles, lines)


def table(rows: Sequence[Row], baseline: str) -> str:
    """`bandwidths`, for a terminal."""
    return bandwidths(rows, baseline).text()


def added_us(one: Row, rows: Sequence[Row]) -> float | None:
    """What communication adds to a training step: its median less that of a step without any."""
    without = [other for other in rows if other.backend == WITHOUT and _point(other) == _point(one)]
    return one.time_us - without[0].time_us if without and one.backend != WITHOUT else None


def best_ddp(one: Row, rows: Sequence[Row]) -> Row | None:
    """The fastest of DDP's variants at the same point of the same run."""
    variants = [other for other in rows if other.backend.startswith(DDP) and _point(other) == _point(one)]
    return min(variants, key=lambda other: other.time_us, default=None)


def ddp_ratio(one: Row, rows: Sequence[Row]) -> float | None:
    """How many times as much the best DDP adds to a step as `one` does; None if either adds nothing."""
    ddp = best_ddp(one, rows)
    own = added_us(one, rows)
    theirs = added_us(ddp, rows) if ddp else None
    return theirs / own if own and theirs and own > 0 and theirs > 0 else None


def steps(rows: Sequence[Row]) -> Table:
    """A line per row of training steps."""
    titles = ("model", "n", "backend", "step ms", "min", "max", "added ms", "best DDP adds", "extra memory")
    lines = []
    for one in rows:
        added, ratio = added_us(one, rows), ddp_ratio(one, rows)
        memory = one.env.get("extra_memory_gradients")
        lines.append(
            (
                str(one.env.get("model", "")),
                str(one.world_size),
                one.backend,
                f"{one.time_us / 1e3:.1f}",
                f"{one.time_us_min / 1e3:.1f}",
                f"{one.time_us_max / 1e3:.1f}",
                "" if added is None else f"{added / 1e3:.1f}",
                "" if ratio is None else f"{ratio:.2f}x",
                f"{memory:.2f}" if isinstance(memory, int | float) else "",
            )
        )
    return Table(titles, lines)


def load_pyplot() -> Any:
    """matplotlib's pyplot, drawing to files.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        sys.exit("plots need matplotlib: pip install 'ringps[bench]'")
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def human_bytes(size: int) -> str:
    """1024 -> "1 KiB"."""
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def _point(one: Row) -> tuple[object, ...]:
    """What rows must have in common to be compared: they come from one run, too."""
    return one.bench, one.op, one.bytes, one.world_size, one.env.get("transport"), one.env.get("model")


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
