"""What the model says of the library's algorithms: the time of an all_reduce, and of a training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import link_model
import step_model
from link_model import Cluster
from report import MIB
from ringps.config import Exchange
from ringps.ring import schedule
from ringps.ring.partition import Slice, chunk_numel, partition
from ringps.ring.schedule import Schedule

RING, DOUBLING, HIERARCHICAL = "ring", "recursive-doubling", "hierarchical"
ALGORITHMS = (RING, DOUBLING, HIERARCHICAL)
ITEMSIZE_BYTES = 4
_EVENTS_UP_TO = 16
"""World sizes of which every event is followed; beyond, the model goes by steps."""
_PIECE_BYTES = 4 * MIB
"""Of a tensor, what passes the stages of the hierarchical algorithm one behind the other."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A data-parallel training step of one worker."""

    compute_s: float
    """Forward and backward, without any communication."""

    gradient_bytes: int
    bucket_bytes: int = 25 * MIB
    """Gradients that are reduced in one all_reduce."""

    backward_share: float = 2 / 3
    """Of compute_s. The gradients become ready evenly during it."""


@dataclass(frozen=True)
class StepTime:
    """A predicted training step."""

    seconds: float
    efficiency: float
    """Time of the computation alone per time of the step."""

    overlap: float
    """Part of the communication that is hidden behind the computation."""


def all_reduce_s(algorithm: str, size_bytes: int, world_size: int, cluster: Cluster) -> float:
    """Seconds from the call, at the same time on all ranks, until the last of them has the result.

    Args:
        algorithm: one of ALGORITHMS.
        size_bytes: of a float32 tensor.
        world_size: number of workers.
        cluster: where they run.

    Raises:
        ValueError: the hosts cannot be filled for the hierarchical algorithm, or no such algorithm.
    """
    if world_size == 1:
        return 0.0
    numel = max(1, size_bytes // ITEMSIZE_BYTES)
    if algorithm == RING:
        # Slices differ by an element at most. Made equal, all ranks do the same, which saves the model work.
        equal = math.ceil(numel / world_size) * world_size
        return _time(schedule.all_reduce, partition(equal, world_size), world_size, cluster)
    if algorithm == DOUBLING:
        return _time(schedule.recursive_doubling, (Slice(0, numel),), world_size, cluster)
    if algorithm == HIERARCHICAL:
        return _hierarchical_s(numel, world_size, cluster)
    raise ValueError(f"no algorithm {algorithm!r}; choose one of {', '.join(ALGORITHMS)}")


def all_gather_s(
    size_bytes: int, world_size: int, cluster: Cluster, *, chunk_bytes: int | None = None
) -> float:
    """Likewise, of an all_gather whose output has `size_bytes`, in chunks of at most `chunk_bytes`.

    Its own part a rank copies to the output first, which costs about what a combination does.
    """
    slices = partition(size_bytes, world_size)
    own_s = size_bytes / world_size * cluster.costs_of(world_size).combine_s_per_byte
    return own_s + _time(
        schedule.all_gather, slices, world_size, cluster, itemsize_bytes=1, chunk_bytes=chunk_bytes
    )


def cheapest(size_bytes: int, world_size: int, cluster: Cluster) -> tuple[str, float]:
    """The algorithm that takes the least time, and that time in seconds."""
    times_s = {
        name: all_reduce_s(name, size_bytes, world_size, cluster) for name in fitting(world_size, cluster)
    }
    name = min(times_s, key=times_s.__getitem__)
    return name, times_s[name]


def fitting(world_size: int, cluster: Cluster) -> list[str]:
    """The algorithms that so many workers can use."""
    several = 1 < cluster.workers_per_host <= world_size and world_size % cluster.workers_per_host == 0
    return [name for name in ALGORITHMS if several or name != HIERARCHICAL]


def step_time(training: Training, all_reduce: Callable[[int], float]) -> StepTime:
    """A step in which buckets are reduced one after the other while backward still runs.

    Args:
        training: what a worker computes.
        all_reduce: seconds that a bucket of so many bytes takes.
    """
    sizes_bytes = [training.bucket_bytes] * (training.gradient_bytes // training.bucket_bytes)
    if rest := training.gradient_bytes % training.bucket_bytes:
        sizes_bytes.append(rest)
    backward_s = training.backward_share * training.compute_s
    times_s = {size: all_reduce(size) for size in set(sizes_bytes)}
    ready_s = training.compute_s - backward_s
    end_s = 0.0
    for size in sizes_bytes:
        ready_s += backward_s * size / training.gradient_bytes
        end_s = max(end_s, ready_s) + times_s[size]
    end_s = max(end_s, training.compute_s)
    spent_s = sum(times_s[size] for size in sizes_bytes)
    hidden = 1 - (end_s - training.compute_s) / spent_s if spent_s else 1.0
    return StepTime(end_s, training.compute_s / end_s, hidden)


def _time(
    schedule_of: Callable[[int, int], Schedule],
    slices: Sequence[Slice],
    world_size: int,
    cluster: Cluster,
    *,
    itemsize_bytes: int = ITEMSIZE_BYTES,
    chunk_bytes: int | None = None,
) -> float:
    piece = chunk_numel(tuple(slices), itemsize_bytes, chunk_bytes or Exchange().chunk_bytes)
    if world_size <= _EVENTS_UP_TO:
        schedules = [schedule_of(rank, world_size) for rank in range(world_size)]
        return max(link_model.finish_times(schedules, slices, piece, itemsize_bytes, cluster))
    return float(
        step_model.finish_times(schedule_of, slices, piece, itemsize_bytes, world_size, cluster).max()
    )


def _hierarchical_s(numel: int, world_size: int, cluster: Cluster) -> float:
    """Reduce-scatter through shared memory, a ring per local rank between hosts, all-gather likewise.

    Each worker combines its slice of all inputs of its host, then its ring reduces it, then it copies the
    others' slices. Pieces of the tensor pass these stages one behind the other: the slowest stage works
    all the time, and the others are waited for once.
    """
    local = cluster.workers_per_host
    if world_size % local or local == 1:
        raise ValueError(f"{world_size} workers do not fill hosts of {local}, 2 or more")
    size_bytes, hosts = numel * ITEMSIZE_BYTES, world_size // local
    costs = cluster.costs_of(world_size)
    pieces = max(1, math.ceil(size_bytes / _PIECE_BYTES))
    reduce_s = size_bytes * costs.combine_s_per_byte
    gather_s = size_bytes * (local - 1) / local * costs.combine_s_per_byte
    # A flag that a neighbour polls takes no system call; chunk_s bounds what it costs to look at it.
    meet_s = 2 * costs.chunk_s
    inside_s = reduce_s + gather_s + pieces * meet_s
    if hosts == 1:
        return costs.call_s + inside_s
    # Every local rank's ring gets its share of the host's link; those of a host share all its cores.
    link = replace(
        cluster.link,
        bytes_per_s=cluster.link.bytes_per_s / local,
        burst_bytes=cluster.link.burst_bytes / local,
    )
    scaled = replace(cluster, link=link, costs=costs, workers_per_host=1, cores=None)
    lanes_s = all_reduce_s(RING, math.ceil(size_bytes / local), hosts, scaled)
    first_s = inside_s / pieces
    return max(lanes_s + first_s, inside_s + lanes_s / pieces)
