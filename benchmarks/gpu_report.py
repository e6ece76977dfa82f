"""What the GPU benchmark's rows say: a point, the ceiling beside it, and how it stands to its bar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import report
from report import NO_FACTS, Row, Table

BENCH = "gpu"

Outcome = Literal["measured", "rehearsal", "n/a", "failed"]


@dataclass(frozen=True, kw_only=True)
class GpuRow(Row):
    """A row. One that was not measured has times of 0."""

    outcome: Outcome
    why: str
    """Why it was not measured; "" if it was."""
    ceiling_us: float | None
    """What it would take if the bytes that it must move went at the bandwidth of a large copy, or what it is
    compared with takes."""
    bar: float | None
    """What is to be reached: a part of the ceiling, or seconds at most."""
    reached: float | None
    """The same as measured."""
    unit: Literal["", "s"]
    """Of `bar` and `reached`."""

    @property
    def holds(self) -> bool | None:
        """Whether the bar is reached; None if there is none."""
        if self.bar is None or self.reached is None:
            return None
        return self.reached <= self.bar if self.unit == "s" else self.reached >= self.bar


def measured(
    op: str,
    *,
    backend: str,
    size_bytes: int,
    dtype: str,
    times_s: Sequence[float],
    rehearsal: bool,
    world_size: int = 1,
    ceiling_s: float | None = None,
    bar: float | None = None,
    reached_s: float | None = None,
    facts: Mapping[str, object] = NO_FACTS,
) -> GpuRow:
    """A row of what was measured.

    Args:
        op: what was done.
        backend: by what.
        size_bytes: that `algbw_gbps` counts.
        dtype: of the elements.
        times_s: one per repetition.
        rehearsal: they mean nothing.
        world_size: number of ranks.
        ceiling_s: see `GpuRow.ceiling_us`; what is reached is the part of it.
        bar: what is to be reached.
        reached_s: seconds to compare with `bar` instead.
        facts: for `env`.
    """
    base = report.row(
        bench=BENCH,
        backend=backend,
        op=op,
        size_bytes=size_bytes,
        dtype=dtype,
        world_size=world_size,
        times_s=times_s,
        facts=facts,
    )
    reached = reached_s
    if ceiling_s is not None and base.time_us > 0:
        reached = 1e6 * ceiling_s / base.time_us
    return GpuRow(
        **vars(base),
        outcome="rehearsal" if rehearsal else "measured",
        why="",
        ceiling_us=None if ceiling_s is None else round(1e6 * ceiling_s, 3),
        bar=bar,
        reached=None if reached is None else round(reached, 4),
        unit="" if reached_s is None else "s",
    )


def absent(
    op: str, why: str, *, outcome: Literal["n/a", "failed"], backend: str = "", world_size: int = 1
) -> GpuRow:
    """A row of what was not measured, and why."""
    return GpuRow(
        bench=BENCH,
        backend=backend,
        op=op,
        bytes=0,
        dtype="",
        world_size=world_size,
        repeats=0,
        time_us=0.0,
        time_us_min=0.0,
        time_us_max=0.0,
        algbw_gbps=0.0,
        busbw_gbps=0.0,
        env=report.environment(),
        outcome=outcome,
        why=why,
        ceiling_us=None,
        bar=None,
        reached=None,
        unit="",
    )


def write(path: Path, rows: Sequence[GpuRow]) -> None:
    """Write a list of rows, each with whether it `holds`."""
    path.write_text(json.dumps([{**asdict(one), "holds": one.holds} for one in rows], indent=1) + "\n")


def read(path: Path) -> list[GpuRow]:
    """What `write` wrote."""
    rows = json.loads(path.read_text())
    return [GpuRow(**{name: value for name, value in row.items() if name != "holds"}) for row in rows]


def table(rows: Sequence[GpuRow]) -> Table:
    """A line per row that was measured."""
    titles = ("op", "backend", "n", "size", "dtype", "time us", "min", "max", "GB/s", "ceiling us")
    lines = [
        (
            one.op,
            one.backend,
            str(one.world_size),
            report.human_bytes(one.bytes),
            one.dtype,
            *(f"{us:.4g}" for us in (one.time_us, one.time_us_min, one.time_us_max)),
            f"{one.algbw_gbps:.4g}",
            "" if one.ceiling_us is None else f"{one.ceiling_us:.4g}",
            "" if one.reached is None else f"{one.reached:.3g} {one.unit}".strip(),
            "" if one.bar is None else f"{one.bar:g} {one.unit}".strip(),
            {None: "", True: "yes", False: "NO"}[one.holds] if one.outcome == "measured" else one.outcome,
        )
        for one in rows
        if one.outcome in ("measured", "rehearsal")
    ]
    return Table((*titles, "reached", "bar", "holds"), lines)


def missing(rows: Sequence[GpuRow]) -> list[str]:
    """A line per row that was not measured: what, and why."""
    return [
        f"{one.op} {one.backend}, n = {one.world_size}: {one.outcome}: {one.why}"
        for one in rows
        if one.outcome in ("n/a", "failed")
    ]
