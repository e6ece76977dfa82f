"""Plots of the benchmarks' rows, as files. matplotlib is loaded when the first one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from report import Row

_MARKERS = "os^Dvx"


def bandwidths(rows: Sequence[Row]) -> Any:
    """Bus bandwidth of all_reduce over size: a panel per world size, a curve per backend."""
    world_sizes = sorted({one.world_size for one in rows})
    figure, panels = _figure(len(world_sizes))
    for axes, world_size in zip(panels, world_sizes, strict=True):
        chosen = [one for one in rows if one.world_size == world_size]
        for number, name in enumerate(dict.fromkeys(_label(one, chosen) for one in chosen)):
            curve = sorted((one for one in chosen if _label(one, chosen) == name), key=lambda one: one.bytes)
            axes.plot(
                [one.bytes for one in curve],
                [one.busbw_gbps for one in curve],
                marker=_MARKERS[number % len(_MARKERS)],
                linestyle="--" if curve[0].backend == "gloo" else "-",
                label=name,
            )
        ticks = sorted({one.bytes for one in chosen})
        axes.set(xscale="log", yscale="log", xlabel="size", title=f"all_reduce, {world_size} workers")
        axes.set_xticks(ticks, [report.human_bytes(size) for size in ticks], rotation=45, fontsize="small")
        axes.minorticks_off()
        axes.legend(fontsize="small")
    panels[0].set_ylabel("bus bandwidth, GB/s")
    return figure


def added_time(rows: Sequence[Row]) -> Any:
    """What communication adds to a training step: a panel per model, bars per world size and backend."""
    models = list(dict.fromkeys(str(one.env.get("model", "")) for one in rows))
    figure, panels = _figure(len(models))
    for axes, model in zip(panels, models, strict=True):
        chosen = [one for one in rows if str(one.env.get("model", "")) == model]
        world_sizes = sorted({one.world_size for one in chosen})
        communicating = [one for one in chosen if one.backend != report.WITHOUT]
        names = list(dict.fromkeys(_label(one, chosen) for one in communicating))
        width = 0.8 / max(1, len(names))
        for number, name in enumerate(names):
            bars = {
                world_sizes.index(one.world_size) + number * width: added / 1e3
                for one in communicating
                if _label(one, chosen) == name and (added := report.added_us(one, rows)) is not None
            }
            drawn = axes.bar(list(bars), list(bars.values()), width=0.95 * width, label=name)
            axes.bar_label(drawn, fmt="%.0f", fontsize="small")
        middles = [place + 0.4 - width / 2 for place in range(len(world_sizes))]
        axes.set_xticks(middles, [f"{n} workers" for n in world_sizes])
        axes.set(title=model)
        axes.margins(y=0.3)  # room for the legend
        axes.legend(fontsize="small")
    panels[0].set_ylabel("time that communication adds to a step, ms")
    return figure


def efficiency(rows: Sequence[Row]) -> Any | None:
    """The simulator's efficiency over workers: a panel per link, a curve per backend; None without any."""
    found = [one for one in rows if isinstance(one.env.get("efficiency"), int | float)]
    if not found:
        return None
    links = list(dict.fromkeys(one.env.get("gbit_per_s") for one in found))
    figure, panels = _figure(len(links), panel_width=3.2, sharey=True)
    ticks = sorted({one.world_size for one in found})
    for axes, link in zip(panels, links, strict=True):
        chosen = [one for one in found if one.env.get("gbit_per_s") == link]
        for number, name in enumerate(dict.fromkeys(one.backend for one in chosen)):
            curve = sorted((one for one in chosen if one.backend == name), key=lambda one: one.world_size)
            axes.plot(
                [one.world_size for one in curve],
                [one.env["efficiency"] for one in curve],
                marker=_MARKERS[number % len(_MARKERS)],
                label=name,
            )
        title = "predicted" if link is None else f"{link:g} Gbit/s per host"
        axes.set(xscale="log", xlabel="workers", ylim=(0, 1.05), title=title)
        axes.set_xticks(ticks, [str(n) for n in ticks], rotation=45, fontsize="small")
        axes.minorticks_off()
    panels[0].set_ylabel("efficiency of a training step")
    panels[0].legend(fontsize="small")
    return figure


def recovery(rows: Sequence[Row]) -> Any:
    """What each harm and each join costs: a bar per operation from the least to the most, on a log axis."""
    chosen = [one for one in rows if not one.op.startswith(("step_", "commit_"))]
    figure, (axes,) = _figure(1, panel_width=7.5)
    names = [f"{one.op} ({one.env['model']})" for one in chosen]
    for place, one in enumerate(chosen):
        axes.plot([one.time_us_min / 1e3, one.time_us_max / 1e3], [place, place], color="C0", linewidth=2)
        axes.plot([one.time_us / 1e3], [place], marker="o", color="C0")
        bar_ms = one.env.get("bar_ms")
        if isinstance(bar_ms, int | float):
            axes.plot([bar_ms], [place], marker="|", color="C3", markersize=14)
    axes.set_yticks(range(len(chosen)), names, fontsize="small")
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="ms: least, median, most; red: the bar, less a normal step")
    return figure


def goodput(rows: Sequence[Row]) -> Any:
    """Samples trained over time, and lost again: a curve per backend and schedule."""
    figure, (axes,) = _figure(1, panel_width=7.5)
    for one in rows:
        curve = one.env.get("curve")
        assert isinstance(curve, list)
        style = "-" if one.op == "with_kills" else ":"
        label = f"{one.backend}, {one.op.replace('_', ' ')}"
        axes.plot([point[0] for point in curve], [point[1] for point in curve], style, label=label)
    axes.set(xlabel="seconds since the first step", ylabel="samples trained and not lost")
    axes.legend(fontsize="small")
    return figure


def checkpoints(rows: Sequence[Row]) -> Any:
    """Times to save and to restore: a panel per operation, bars per world size and backend."""
    chosen = [one for one in rows if one.op.startswith(("save_", "restore"))]
    ops = list(dict.fromkeys(one.op for one in chosen))
    figure, panels = _figure(max(1, len(ops)), panel_width=4.5)
    for axes, op in zip(panels, ops, strict=False):
        points = [one for one in chosen if one.op == op]
        world_sizes = sorted({one.world_size for one in points})
        names = list(dict.fromkeys(one.backend for one in points))
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            bars = {
                world_sizes.index(one.world_size) + number * width: one.time_us / 1e3
                for one in points
                if one.backend == name
            }
            drawn = axes.bar(list(bars), list(bars.values()), width=0.95 * width, label=name)
            axes.bar_label(drawn, fmt="%.0f", fontsize="small")
        middles = [place + 0.4 - width / 2 for place in range(len(world_sizes))]
        axes.set_xticks(middles, [f"n = {n}" for n in world_sizes])
        axes.set(title=op)
        axes.margins(y=0.3)  # room for the legend
        axes.legend(fontsize="small")
    panels[0].set_ylabel("ms")
    return figure


def save(figure: Any, path: Path) -> None:
    """Write the figure, as what the name's ending says, and drop it."""
    pyplot = report.load_pyplot()
    # No date and no random ids, so that the same rows give the same file; letters as text, which is small.
    with pyplot.rc_context({"svg.hashsalt": "ringps", "svg.fonttype": "none"}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _figure(panels: int, panel_width: float = 5.5, *, sharey: bool = False) -> tuple[Any, list[Any]]:
    pyplot = report.load_pyplot()
    size = (panel_width * panels, 4)
    figure, grid = pyplot.subplots(1, panels, figsize=size, squeeze=False, sharey=sharey)
    for axes in grid[0]:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, list(grid[0])


def _label(one: Row, rows: Sequence[Row]) -> str:
    """The backend; with the run that it belongs to if there are several of the name."""
    runs = {other.env.get("transport") for other in rows if other.backend == one.backend}
    return f"{one.backend} (beside {one.env['transport']})" if len(runs) > 1 else one.backend
