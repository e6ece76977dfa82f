"""What is said about the rows of the recovery benchmark: a table, and how they stand to their bars."""

from __future__ import annotations

from collections.abc import Sequence

from report import Row, Table

BARS_S = {
    "sigkill_next_step": 0.5,
    "sigkill_noticed": 0.05,
    "sigstop_noticed": 3.0,
    "cut_noticed": 0.2,
    "silent_link_noticed": 3.0,
    "join_pause": 1.0,
}
"""What each is to stay below; a next step and a pause, without a normal step."""
COMMIT_SHARE_BAR = 0.02


def table(rows: Sequence[Row]) -> Table:
    """A line per operation."""
    titles = (
        "op",
        "model",
        "n",
        "ms",
        "min",
        "max",
        "times",
        "step ms",
        "above a step",
        "at most",
        "bar",
        "load",
    )
    lines = []
    for one in rows:
        facts = one.env
        lines.append(
            (
                one.op,
                str(facts["model"]),
                str(one.world_size),
                *(f"{us / 1e3:.4g}" for us in (one.time_us, one.time_us_min, one.time_us_max)),
                str(one.repeats),
                *(
                    _number(facts.get(name))
                    for name in ("step_ms", "above_step_ms", "above_step_ms_max", "bar_ms", "load_1m")
                ),
            )
        )
    return Table(titles, lines)


def markdown(rows: Sequence[Row]) -> str:
    """The table, and what it says about the bars, for a page."""
    return "\n".join([table(rows).markdown(), "", *(f"- {said}" for said in verdicts(rows))])


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the measurements say about the bars, a line each."""
    said = []
    for one in rows:
        bar = one.env.get("bar_ms")
        if isinstance(bar, float):
            worst = one.env.get("above_step_ms_max", one.time_us_max / 1e3)
            assert isinstance(worst, float)
            held = "below" if worst < bar else "ABOVE"
            said.append(f"{one.op}: at most {worst:.4g} ms, {held} the bar of {bar:g} ms")
    by_op = {one.op: one for one in rows}
    parts = [by_op[f"commit_{part}"] for part in ("hash", "account", "vote") if f"commit_{part}" in by_op]
    if parts:
        share = sum(_float(one.env["share_of_cpu"]) for one in parts)
        held = "below" if share < COMMIT_SHARE_BAR else "ABOVE"
        clock_ms = sum(one.time_us for one in parts) / 1e3
        said.append(
            f"hashes, accounts and votes: {share:.2%} of what a step takes of a core, {held} the bar of "
            f"{COMMIT_SHARE_BAR:.0%}; {clock_ms:.2f} of {parts[0].env['whole_step_ms']} ms with waiting"
        )
    if {"step_elastic", "step_fixed"} <= set(by_op):
        ratio = by_op["step_elastic"].time_us / by_op["step_fixed"].time_us
        said.append(f"an elastic step takes {ratio:.3f} of a fixed one's time, from jobs in turns")
    if "join_fetch" in by_op:
        fetch = by_op["join_fetch"]
        size = _float(fetch.env["fetched_bytes"])
        said.append(f"a joiner fetched {size / 1e6:.0f} MB in {fetch.time_us / 1e6:.2f} s")
    return said


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _float(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
