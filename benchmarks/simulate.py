"""How long would an all-reduce and a training step take on hundreds of hosts, and which algorithm suits?

    python benchmarks/simulate.py                       # with costs measured before, see docs/simulation.md
    sudo python benchmarks/simulate.py --measure        # measure this machine's, and judge the model by them

Executes every rank's schedule, the one that the library runs, over a model of links and processors.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import calibrate
import plots
import predict
import report
from calibrate import Judged
from hosts import TCP_SHARE, HostsError
from link_model import Cluster, Costs, Link
from predict import Training
from report import KIB, MIB, Row

WORKERS = [2, 8, 64, 512, 4096]
SIZES_BYTES = [KIB, 64 * KIB, MIB, 16 * MIB, 128 * MIB, 1024 * MIB]
GBITS = [1.0, 10.0, 100.0, 400.0]
COSTS = Costs(latency_s=5e-5, chunk_s=5e-5, copy_s_per_byte=5e-10, combine_s_per_byte=2e-10, call_s=1e-4)
"""The order of magnitude of an idle core like those of docs/simulation.md, rounded; no fit is as good."""
JUDGED = [
    (2, 1e9, [256 * KIB, 4 * MIB, 64 * MIB]),
    (3, 1e9, [MIB, 16 * MIB]),
    (4, 1e9, [256 * KIB, 4 * MIB, 64 * MIB]),
    (2, 1e8, [256 * KIB, 4 * MIB]),
    (4, 1e8, [256 * KIB, 4 * MIB]),
]
"""World size, bit/s and sizes of what the model is judged by."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is predicted for."""

    workers: Sequence[int]
    sizes_bytes: Sequence[int]
    gbits: Sequence[float]
    workers_per_host: int
    network_s: float
    costs: Costs
    training: Training

    def clusters(self) -> Iterator[tuple[int, float, Cluster]]:
        """World size, Gbit/s of a host's link, and the hosts: at least two, so that links matter."""
        for gbit in self.gbits:
            link = Link(bytes_per_s=gbit * 1e9 / 8 * TCP_SHARE, latency_s=self.network_s)
            for world_size in self.workers:
                local = min(self.workers_per_host, world_size // 2)
                while world_size % local:
                    local -= 1
                yield world_size, gbit, Cluster(link=link, costs=self.costs, workers_per_host=local)


def all_reduces(scene: Scene) -> list[Row]:
    """A row per world size, size, link and algorithm."""
    rows = []
    for world_size, gbit, cluster in scene.clusters():
        for size in scene.sizes_bytes:
            times_s = {
                name: predict.all_reduce_s(name, size, world_size, cluster)
                for name in predict.fitting(world_size, cluster)
            }
            best = min(times_s, key=times_s.__getitem__)
            for name, seconds in times_s.items():
                facts = {**_facts(gbit, cluster), "cheapest": name == best}
                rows.append(_row(name, "all_reduce", size, world_size, seconds, facts))
    return rows


def training_steps(scene: Scene) -> list[Row]:
    """Per world size and link a row of the flat ring, and one of the cheapest algorithm for each bucket."""
    rows = []
    for world_size, gbit, cluster in scene.clusters():
        ways = {
            predict.RING: lambda size: predict.all_reduce_s(predict.RING, size, world_size, cluster),  # noqa: B023
            "cheapest": lambda size: predict.cheapest(size, world_size, cluster)[1],  # noqa: B023
        }
        for name, way in ways.items():
            step = predict.step_time(scene.training, way)
            facts = {
                **_facts(gbit, cluster),
                "compute_s": scene.training.compute_s,
                "bucket_bytes": scene.training.bucket_bytes,
                "efficiency": round(step.efficiency, 4),
                "overlap": round(step.overlap, 4),
            }
            rows.append(
                _row(name, "train_step", scene.training.gradient_bytes, world_size, step.seconds, facts)
            )
    return rows


def judged_rows(judged: Sequence[Judged], costs: Costs) -> list[Row]:
    """A row per measured point, with its prediction."""
    return [
        report.row(
            bench="simulate",
            backend="measured",
            op="all_reduce",
            size_bytes=one.measured.point.size_bytes,
            dtype="float32",
            world_size=one.world_size,
            times_s=one.measured.times_s,
            facts={
                "gbit_per_s": one.gbit_per_s,
                "predicted_us": round(one.predicted_s * 1e6, 2),
                "error": round(one.error, 4),
                "costs": asdict(costs),
            },
        )
        for one in judged
    ]


def judged_table(judged: Sequence[Judged]) -> report.Table:
    """A line per measured point."""
    titles = ("n", "Gbit/s", "size", "measured ms", "min", "max", "predicted ms", "error")
    lines = []
    for one in judged:
        times_s = one.measured.times_s
        cells = (one.measured.median_s, min(times_s), max(times_s), one.predicted_s)
        lines.append(
            (
                str(one.world_size),
                f"{one.gbit_per_s:g}",
                report.human_bytes(one.measured.point.size_bytes),
                *(f"{seconds * 1e3:.2f}" for seconds in cells),
                f"{one.error:+.1%}",
            )
        )
    return report.Table(titles, lines)


def all_reduce_table(rows: Sequence[Row]) -> report.Table:
    """A line per point, a column per algorithm."""
    titles = ("Gbit/s", "n", "per host", "size", *(f"{name} ms" for name in predict.ALGORITHMS), "cheapest")
    points: dict[tuple[object, ...], dict[str, Row]] = {}
    for one in rows:
        key = (one.env["gbit_per_s"], one.world_size, one.bytes)
        points.setdefault(key, {})[one.backend] = one
    lines = []
    for found in points.values():
        times = [f"{found[name].time_us / 1e3:.3f}" if name in found else "" for name in predict.ALGORITHMS]
        best = next(name for name, one in found.items() if one.env["cheapest"])
        one = found[best]
        cells = (f"{one.env['gbit_per_s']:g}", str(one.world_size), str(one.env["workers_per_host"]))
        lines.append((*cells, report.human_bytes(one.bytes), *times, best))
    return report.Table(titles, lines)


def training_table(rows: Sequence[Row]) -> report.Table:
    """A line per predicted step."""
    titles = ("Gbit/s", "n", "per host", "algorithm", "step ms", "efficiency", "hidden")
    return report.Table(
        titles,
        [
            (
                f"{one.env['gbit_per_s']:g}",
                str(one.world_size),
                str(one.env["workers_per_host"]),
                one.backend,
                f"{one.time_us / 1e3:.1f}",
                f"{one.env['efficiency']:.1%}",
                f"{one.env['overlap']:.0%}",
            )
            for one in rows
        ],
    )


def measure() -> tuple[Costs, list[Judged]]:
    """Fit costs on this machine, and judge the model by other points.

    Raises:
        SystemExit: hosts cannot be made here.
    """
    try:
        costs = calibrate.fit(calibrate.sample())
        print(f"fitted: {_described(costs)}", file=sys.stderr, flush=True)
        judged = []
        for world_size, rate_bit_s, sizes_bytes in JUDGED:
            judged += calibrate.judge(costs, world_size, rate_bit_s, sizes_bytes)
            print(f"{world_size} hosts at {rate_bit_s / 1e9:g} Gbit/s: done", file=sys.stderr, flush=True)
    except HostsError as error:
        sys.exit(f"simulate.py --measure: {error}")
    return costs, judged


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict all_reduce and training steps from a link model.")
    add = parser.add_argument
    add("--measure", action="store_true", help="fit costs on this machine, as root; some three minutes")
    add("-n", "--workers", type=_numbers, default=WORKERS, metavar="N,N", help="world sizes")
    add("--sizes", type=_sizes, default=SIZES_BYTES, metavar="SIZE,SIZE", help="such as 64K,1M,1G")
    add("--gbit", type=_rates, default=GBITS, metavar="G,G", help="rates of a host's link")
    add("--workers-per-host", type=int, default=8, metavar="L", help="fewer where that leaves one host")
    add(
        "--network-us",
        type=float,
        default=5.0,
        help="from one host to another, beside the workers' own costs",
    )
    add("--compute-ms", type=float, default=500.0, help="forward and backward of a worker's step")
    add("--gradient-mib", type=int, default=500, help="gradients of a worker")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    add("--plot", type=Path, metavar="FILE", help="draw the efficiency there")
    options = parser.parse_args()
    if min(options.workers) < 2 or options.workers_per_host < 1:
        parser.error("a ring has at least 2 workers, and a host at least 1")
    if options.plot:
        report.load_pyplot()  # not after minutes of measuring
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    rows = []
    costs = COSTS
    if options.measure:
        costs, judged = measure()
        rows += judged_rows(judged, costs)
        print(judged_table(judged).text())
        worst = max(judged, key=lambda one: abs(one.error))
        print(f"worst error {worst.error:+.1%}, bar {calibrate.BAR:.0%}\n", flush=True)
    scene = Scene(
        workers=options.workers,
        sizes_bytes=options.sizes,
        gbits=options.gbit,
        workers_per_host=options.workers_per_host,
        network_s=options.network_us / 1e6,
        costs=costs,
        training=Training(compute_s=options.compute_ms / 1e3, gradient_bytes=options.gradient_mib * MIB),
    )
    reduced, trained = all_reduces(scene), training_steps(scene)
    rows += reduced + trained
    print(f"costs: {_described(costs)}\n")
    print(all_reduce_table(reduced).text())
    print(f"\ntraining: {options.compute_ms:g} ms of computation, {options.gradient_mib} MiB of gradients")
    print(training_table(trained).text())
    if options.json:
        report.write_json(options.json, rows)
    if options.plot:
        plots.save(plots.efficiency(rows), options.plot)


def _row(
    backend: str, op: str, size_bytes: int, world_size: int, seconds: float, facts: dict[str, object]
) -> Row:
    return report.row(
        bench="simulate",
        backend=backend,
        op=op,
        size_bytes=size_bytes,
        dtype="float32",
        world_size=world_size,
        times_s=[seconds],
        facts=facts,
    )


def _facts(gbit: float, cluster: Cluster) -> dict[str, object]:
    return {
        "gbit_per_s": gbit,
        "workers_per_host": cluster.workers_per_host,
        "network_s": cluster.link.latency_s,
        "costs": asdict(cluster.costs),
    }


def _described(costs: Costs) -> str:
    return (
        f"{costs.call_s * 1e6:.1f} us per call, latency {costs.latency_s * 1e6:.1f} us, "
        f"{costs.chunk_s * 1e6:.1f} us per chunk, "
        f"{costs.copy_s_per_byte * 1e9:.3f} ns per byte copied, "
        f"{costs.combine_s_per_byte * 1e9:.3f} ns per byte combined"
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _rates(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _sizes(text: str) -> list[int]:
    units = {"K": KIB, "M": MIB, "G": 1024 * MIB}
    return [
        int(part[:-1]) * units[part[-1]] if part[-1:] in units else int(part)
        for part in text.upper().split(",")
    ]


if __name__ == "__main__":
    main()
