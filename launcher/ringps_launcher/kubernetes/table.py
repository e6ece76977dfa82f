"""PURE: tables, times and amounts, as the commands print them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

_UNITS = ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> list[str]:
    """Lines of a table; the columns named in `right` are numbers."""
    lines = [head, *rows]
    widths = [max(len(row[column]) for row in lines) for column in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, head, strict=True)
        ).rstrip()
        for row in lines
    ]


def duration(seconds: float) -> str:
    """Short, in the largest two units: `45s`, `3m20s`, `5h7m`, `2d4h`."""
    left = max(0, round(seconds))
    if left < 60:
        return f"{left}s"
    for unit_s, unit, part_s, part in _UNITS:
        if left >= unit_s:
            rest = left % unit_s // part_s
            return f"{left // unit_s}{unit}{f'{rest}{part}' if rest else ''}"
    raise AssertionError("the smallest unit is a minute")


def rate(per_s: float) -> str:
    """A rate with three significant digits, and without an exponent."""
    if per_s >= 100:
        return f"{per_s:.0f}"
    return f"{per_s:.1f}" if per_s >= 10 else f"{per_s:.2f}"


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        part for run in runs for part in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))
    )
