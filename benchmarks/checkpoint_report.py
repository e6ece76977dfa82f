"""What is said about the rows of the checkpoint benchmark: a table, and how they stand to their bars."""

from __future__ import annotations

from collections.abc import Sequence

from checkpoint_steps import SAVING, STEP
from checkpoint_turns import APPLIED, COPY, DURABLE, LOADED, READ, RINGPS, STALL, TORCH, WRITE
from report import Row, Table

CEILINGS = {STALL: COPY, DURABLE: WRITE, LOADED: READ}
"""What nobody can be faster than who does the same with one part for each rank, by op."""
STALL_COPIES_BAR = 1.3
"""A stall takes at most so many times a copy of as many bytes."""
STALL_TORCH_BAR = 0.2
"""And at most this part of torch.save's."""
RESTORE_TORCH_BAR = 1.0
LOST_BAR = 0.03
"""Of the steps that are trained without saves."""


def table(rows: Sequence[Row]) -> Table:
    """A line per row."""
    titles = ("op", "n", "backend", "MB", "ms", "min", "max", "GB/s", "ceiling", "vs torch", "other")
    lines = [
        (
            one.op,
            str(one.world_size),
            one.backend,
            f"{one.bytes / 1e6:.4g}",
            *(f"{us / 1e3:.4g}" for us in (one.time_us, one.time_us_min, one.time_us_max)),
            f"{one.algbw_gbps:.3g}" if one.op != STEP else "",
            _times(one, _beside(one, rows, CEILINGS.get(one.op, ""))),
            _times(one, _beside(one, rows, TORCH)),
            _other(one),
        )
        for one in rows
    ]
    return Table(titles, lines)


def markdown(rows: Sequence[Row]) -> str:
    """The table, and what it says about the bars, for a page."""
    return "\n".join([table(rows).markdown(), "", *(f"- {said}" for said in verdicts(rows))])


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the measurements say about the bars, a line each."""
    said = []
    for one in rows:
        where = f"{one.op}, n = {one.world_size}"
        copy, torch = _beside(one, rows, COPY), _beside(one, rows, TORCH)
        if one.backend == RINGPS and one.op == STALL and copy and torch:
            said += [
                _verdict(f"{where}, in plain copies", one.time_us / copy.time_us, STALL_COPIES_BAR),
                _verdict(f"{where}, as a part of torch.save's", one.time_us / torch.time_us, STALL_TORCH_BAR),
            ]
        if one.backend == RINGPS and one.op in (LOADED, APPLIED) and torch:
            said.append(
                _verdict(
                    f"{where}, as a part of torch.load's", one.time_us / torch.time_us, RESTORE_TORCH_BAR
                )
            )
        if one.backend == SAVING:
            facts = one.env
            lost = facts["lost"]
            assert isinstance(lost, float)
            said.append(_verdict(f"part of the steps lost with saves on {facts['place']}", lost, LOST_BAR))
            if facts["saves_whole"] != facts["saves_asked"]:
                said.append(
                    f"{facts['place']} DID NOT KEEP UP: of {facts['saves_asked']} saves "
                    f"{facts['saves_whole']} were whole before their block was over"
                )
    return said


def _verdict(what: str, value: float, bar: float) -> str:
    return f"{what}: {value:.3g}, {'within' if value <= bar else 'ABOVE'} the bar of {bar:g}"


def _beside(one: Row, rows: Sequence[Row], backend: str) -> Row | None:
    """The row of the same point and another backend."""
    found = [
        other
        for other in rows
        if (other.op, other.world_size, other.backend) == (one.op, one.world_size, backend)
    ]
    return found[0] if found and found[0] is not one else None


def _times(one: Row, other: Row | None) -> str:
    return f"{one.time_us / other.time_us:.2f}x" if other else ""


def _other(one: Row) -> str:
    facts = one.env
    said = []
    if "own_ms" in facts:
        said.append(f"own count {facts['own_ms']} ms")
    if "place" in facts:
        said.append(f"{facts['model']}, {facts['place']}")
    if one.backend == SAVING:
        said.append(
            f"lost {facts['lost']:.2%} ({facts['lost_min']:.2%} to {facts['lost_max']:.2%}), "
            f"stall {facts['stall_ms']} ms, {facts['saves_whole']} of {facts['saves_asked']} saves"
        )
    return "; ".join(said)
