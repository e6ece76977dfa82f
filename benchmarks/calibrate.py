"""The model's costs from measurement, and how well it then predicts other measured points.

Costs come from two hosts without shaped links, rates of shaped links from plain TCP streams over them; no
all_reduce over a shaped link takes part in either. Those are what predictions are judged by.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import NamedTuple

import predict
from hosts import Hosts, Measured, Point, Shape
from link_model import Cluster, Costs, Link
from report import KIB, MIB
from ringps.config import MOST_DOUBLING_BYTES

BAR = 0.15
UNSHAPED = Link(bytes_per_s=1e12)
"""As fast as the kernel passes bytes on: what limits them then is `Costs.copy_s_per_byte`."""
_FINE_BYTES = 64 * KIB
_LEAST, _MOST = 0.0, 1.0
_MOST_SWEEPS, _HALVINGS = 60, 50


class Sample(NamedTuple):
    """A point on two hosts, to fit costs to."""

    point: Point
    algorithm: str = predict.RING
    chunk_bytes: int | None = None


@dataclass(frozen=True)
class Judged:
    """A point that took no part in the fit."""

    world_size: int
    gbit_per_s: float
    measured: Measured
    predicted_s: float

    @property
    def error(self) -> float:
        """Of the prediction, in parts of what was measured."""
        return self.predicted_s / self.measured.median_s - 1


SAMPLED = {
    "latency_s": Sample(Point("all_reduce", KIB)),
    "call_s": Sample(Point("all_reduce", KIB), predict.DOUBLING),
    "chunk_s": Sample(Point("all_gather", 4 * MIB), chunk_bytes=_FINE_BYTES),
    "copy_s_per_byte": Sample(Point("all_reduce", 4 * MIB)),
    "combine_s_per_byte": Sample(Point("all_gather", 4 * MIB)),
}
"""What each cost is set by. The all_reduce copies twice as much as it combines, the all_gather as much:
with these two the other way around the fit would not converge."""


def sample() -> dict[Sample, float]:
    """Measure what the costs are fitted to, in seconds; takes about twenty of them."""
    found = {}
    kinds = dict.fromkeys((one.algorithm, one.chunk_bytes) for one in SAMPLED.values())
    with Hosts(2, None) as hosts:
        for algorithm, chunk_bytes in kinds:
            kind = (algorithm, chunk_bytes)
            chosen = [one for one in SAMPLED.values() if (one.algorithm, one.chunk_bytes) == kind]
            settings = settings_of(algorithm)
            if chunk_bytes is not None:
                settings["RINGPS_CHUNK_BYTES"] = chunk_bytes
            measured = hosts.measure([one.point for one in chosen], settings=settings, seconds=2.0)
            found.update({one: times.median_s for one, times in zip(chosen, measured, strict=True)})
    return found


def settings_of(algorithm: str) -> dict[str, object]:
    """What makes the library use an algorithm for any size, and one stream per link, as the model does."""
    doubling_bytes = MOST_DOUBLING_BYTES if algorithm == predict.DOUBLING else 0
    return {"RINGPS_SOCKETS_PER_LINK": 1, "RINGPS_DOUBLING_BYTES": doubling_bytes}


def fit(samples: Mapping[Sample, float]) -> Costs:
    """The costs with which the model takes as long as was measured.

    Each cost in turn is set by bisection so that its own sample comes out right, until none changes.
    A cost is 0 where its sample takes no longer than the others explain.

    Args:
        samples: seconds of each that is in SAMPLED.
    """
    costs = Costs(latency_s=1e-4, chunk_s=1e-5, copy_s_per_byte=1e-10, combine_s_per_byte=1e-10)
    for _ in range(_MOST_SWEEPS):
        before = costs
        for name, one in SAMPLED.items():
            costs = _with(costs, name, _bisect(partial(_excess, one, samples[one], costs, name)))
        if all(
            math.isclose(*pair, rel_tol=1e-6) for pair in zip(astuple(costs), astuple(before), strict=True)
        ):
            break
    return costs


def predicted_s(one: Sample, costs: Costs) -> float:
    """What the model says of a sample."""
    cluster = Cluster(link=UNSHAPED, costs=costs)
    if one.point.op == "all_reduce":
        return predict.all_reduce_s(one.algorithm, one.point.size_bytes, 2, cluster)
    return predict.all_gather_s(one.point.size_bytes, 2, cluster, chunk_bytes=one.chunk_bytes)


def _excess(one: Sample, seconds: float, costs: Costs, name: str, value: float) -> float:
    return predicted_s(one, _with(costs, name, value)) - seconds


def _with(costs: Costs, name: str, value: float) -> Costs:
    return replace(costs, **{name: value})


def _bisect(excess: Callable[[float], float]) -> float:
    least, most = _LEAST, _MOST
    if excess(least) >= 0:
        return least
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        if excess(middle) > 0:
            most = middle
        else:
            least = middle
    return (least + most) / 2


def judge(
    costs: Costs, world_size: int, rate_bit_s: float, sizes_bytes: Sequence[int], *, seconds: float = 4.0
) -> list[Judged]:
    """Measure all_reduce between hosts with shaped links, and predict it."""
    shape = Shape(rate_bit_s=rate_bit_s)
    with Hosts(world_size, shape) as hosts:
        stream = min(hosts.streams(0.7))
        points = [Point("all_reduce", size) for size in sizes_bytes]
        found = hosts.measure(points, seconds=seconds, settings=settings_of(predict.RING))
    cluster = shaped(costs, shape, stream)
    return [
        Judged(
            world_size,
            rate_bit_s / 1e9,
            one,
            predict.all_reduce_s(predict.RING, one.point.size_bytes, world_size, cluster),
        )
        for one in found
    ]


def shaped(costs: Costs, shape: Shape, stream_bytes_per_s: float) -> Cluster:
    """This machine's hosts, whose workers share its cores."""
    link = Link(bytes_per_s=stream_bytes_per_s, burst_bytes=shape.burst_bytes)
    return Cluster(link=link, costs=costs, cores=len(os.sched_getaffinity(0)))
