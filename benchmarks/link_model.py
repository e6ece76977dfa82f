"""PURE: how long a collective takes over given links, event by event.

The model is that of Hockney, "The communication challenge for MPP: Intel Paragon and Meiko CS-2" (1994),
a latency per message and a bandwidth per link, with what a data-parallel step adds to it: a cost per chunk
and per combined byte on each rank's processor, and links that the workers of a host share. What ranks do
is not modelled: every rank's schedule is executed by the state machine that the library runs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from enum import IntEnum

from ringps.ring.machine import RingMachine, SendChunk
from ringps.ring.partition import Slice, chunk_count
from ringps.ring.schedule import Action, Schedule


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins a host to a network that does not block; both directions are alike and independent."""

    bytes_per_s: float
    """Payload, after the headers of Ethernet, IP and TCP."""

    latency_s: float = 0.0
    """From the first bit sent to its arrival at another host."""

    burst_bytes: float = 0.0
    """What a link that was idle lets through at once: 0 but for shaped ones."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a chunk costs the processor of a rank."""

    latency_s: float
    """From the call that sends a message until the thread that waits for it has it, without any link."""

    chunk_s: float
    """Busy time per chunk that is received, and sent on if it is."""

    copy_s_per_byte: float
    """Through sockets; while bytes arrive, so it limits a link's rate and adds nothing to a slower one's."""

    combine_s_per_byte: float
    """Busy time per byte of a chunk that is combined with own values, once all of it has come."""

    call_s: float = 0.0
    """Once per collective, before anything is sent."""

    def __post_init__(self) -> None:
        if min(astuple(self)) < 0:
            raise ValueError(f"no cost is negative: {self}")

    def times(self, factor: float) -> Costs:
        """Processors that are `factor` times as slow."""
        return Costs(**{entry.name: factor * getattr(self, entry.name) for entry in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hosts that are all alike, with consecutive ranks on each."""

    link: Link
    costs: Costs
    workers_per_host: int = 1
    cores: int | None = None
    """Processor cores that all workers share; None: each has its own. Ranks of a ring do the same at the
    same time, so with more workers than cores everything that a rank does takes longer in proportion."""

    def __post_init__(self) -> None:
        counts = (self.workers_per_host, 1 if self.cores is None else self.cores)
        if min(counts) < 1 or self.link.bytes_per_s <= 0:
            raise ValueError(f"no such cluster: {self}")

    def costs_of(self, world_size: int) -> Costs:
        """Costs when so many workers run."""
        return self.costs.times(max(1.0, world_size / self.cores)) if self.cores else self.costs

    def with_link(self, link: Link) -> Cluster:
        """The same hosts on another link."""
        return replace(self, link=link)


class _Stage:
    """Something that bytes pass in order and at a limited rate: a token bucket, that of ITU-T I.371."""

    __slots__ = ("burst_s", "free_s", "s_per_byte")

    def __init__(self, s_per_byte: float, burst_bytes: float = 0.0) -> None:
        self.s_per_byte = s_per_byte
        self.burst_s = burst_bytes * s_per_byte
        self.free_s = 0.0

    def passed(self, ready_s: float, size_bytes: int) -> float:
        """When the last of `size_bytes` has passed that are there from `ready_s` on."""
        self.free_s = max(self.free_s, ready_s) + size_bytes * self.s_per_byte
        return max(ready_s, self.free_s - self.burst_s)


class _Kind(IntEnum):
    SEND = 0
    ARRIVE = 1


class _Rank:
    """A rank's machine, and where its processor stands."""

    def __init__(self, schedule: Schedule, slices: Sequence[Slice], chunk_numel: int) -> None:
        self.machine = RingMachine(schedule, slices, chunk_numel)
        self.free_s = 0.0
        self.arrived_s: dict[tuple[int, int], float] = {}
        # Chunks are taken in this order; one that comes early waits on its link.
        self.order = [
            (receive.step, index)
            for receive in schedule.receives
            for index in range(chunk_count(slices[receive.slice], chunk_numel))
        ]
        self.taken = 0

    def next_arrived(self) -> tuple[int, int] | None:
        if self.taken == len(self.order) or self.order[self.taken] not in self.arrived_s:
            return None
        return self.order[self.taken]


def finish_times(
    schedules: Sequence[Schedule],
    slices: Sequence[Slice],
    chunk_numel: int,
    itemsize_bytes: int,
    cluster: Cluster,
) -> list[float]:
    """When each rank has its result, in seconds after all have called the collective.

    Args:
        schedules: one per rank.
        slices: how the tensor is cut, in elements.
        chunk_numel: elements per chunk.
        itemsize_bytes: size of an element on the wire.
        cluster: hosts and links; rank r is on host r // workers_per_host.
    """
    world_size = len(schedules)
    costs, link = cluster.costs_of(world_size), cluster.link
    ranks = [_Rank(schedule, slices, chunk_numel) for schedule in schedules]
    hosts = [rank // cluster.workers_per_host for rank in range(world_size)]
    ports = [[_Stage(1 / link.bytes_per_s, link.burst_bytes) for _ in range(hosts[-1] + 1)] for _ in range(2)]
    sockets = [[_Stage(costs.copy_s_per_byte) for _ in range(world_size)] for _ in range(2)]
    events: list[tuple[float, _Kind, int, int, int, SendChunk | None]] = []

    def work(rank: int, from_s: float, seconds: float) -> float:
        ranks[rank].free_s = max(ranks[rank].free_s, from_s) + seconds
        return ranks[rank].free_s

    def send(time_s: float, rank: int, chunk: SendChunk) -> None:
        peer, size_bytes = chunk.peer, (chunk.stop - chunk.start) * itemsize_bytes
        path, wire_s = [sockets[0][rank], sockets[1][peer]], 0.0
        if hosts[rank] != hosts[peer]:
            path += [ports[0][hosts[rank]], ports[1][hosts[peer]]]
            wire_s = link.latency_s
        # Bytes flow through all stages at once, so the slowest decides.
        passed_s = max(stage.passed(time_s, size_bytes) for stage in path)
        arrives_s = passed_s + costs.latency_s + wire_s
        heapq.heappush(events, (arrives_s, _Kind.ARRIVE, chunk.step, chunk.chunk, peer, None))

    def take_all(rank: int) -> None:
        me = ranks[rank]
        while (key := me.next_arrived()) is not None:
            step, index = key
            take = me.machine.expect(step, index)
            me.machine.took(step, index)
            me.taken += 1
            size_bytes = (take.stop - take.start) * itemsize_bytes
            combined = 0.0 if take.action is Action.STORE else size_bytes * costs.combine_s_per_byte
            done_s = work(rank, me.arrived_s.pop(key), costs.chunk_s + combined)
            if take.forward is not None:
                forward = take.forward
                heapq.heappush(events, (done_s, _Kind.SEND, forward.step, forward.chunk, rank, forward))

    for rank, me in enumerate(ranks):
        for chunk in me.machine.start():
            ready_s = work(rank, costs.call_s, costs.chunk_s)
            heapq.heappush(events, (ready_s, _Kind.SEND, chunk.step, chunk.chunk, rank, chunk))
    while events:
        time_s, _, step, index, rank, outgoing = heapq.heappop(events)
        if outgoing is not None:
            send(time_s, rank, outgoing)
        else:
            ranks[rank].arrived_s[step, index] = time_s
            take_all(rank)
    assert all(me.machine.done for me in ranks), "a schedule waits for what nobody sends"
    return [me.free_s for me in ranks]
