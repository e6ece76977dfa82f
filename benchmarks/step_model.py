"""The model of `link_model`, for thousands of ranks: one step of all ranks at a time, as numpy vectors.

Ranks take chunks in the order of (step, chunk), so all that happens in a step depends on earlier ones
alone. Where workers share a host's link, messages of one step pass it in the order in which they are
ready, and those of a later step after them; `link_model` has them pass as they come. The two agree
wherever ranks keep in step.

Shape legend: n is the number of ranks; vectors have a value per rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from link_model import Cluster, Link
from ringps.ring.partition import Slice
from ringps.ring.schedule import Action, Receive, Schedule, Send

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_NOBODY = -1


@dataclass(frozen=True)
class _Step:
    """What all ranks do in a step; each vector is [n]."""

    peer: Ints
    """Whom a rank sends to, or _NOBODY."""

    slice: Ints
    combines: Bools
    """Whether what a rank receives is combined with own values."""

    forward_step: Ints
    """The step in which a rank sends on what it receives, or _NOBODY."""


def finish_times(
    schedule_of: Callable[[int, int], Schedule],
    slices: Sequence[Slice],
    chunk_numel: int,
    itemsize_bytes: int,
    world_size: int,
    cluster: Cluster,
) -> Floats:
    """When each rank has its result, in seconds after all have called the collective.

    Args:
        schedule_of: a rank's schedule, from rank and world size. If every rank's is rank 0's with ranks
            and slices turned by its number, as in a ring, few are asked for.
        slices: how the tensor is cut, in elements.
        chunk_numel: elements per chunk.
        itemsize_bytes: size of an element on the wire.
        world_size: number of ranks, n.
        cluster: hosts and links; rank r is on host r // workers_per_host.

    Returns:
        [n] seconds.
    """
    program = _program(schedule_of, world_size)
    sizes = np.array([part.numel for part in slices], dtype=np.int64)
    walk = _Walk(program, sizes, chunk_numel, itemsize_bytes, world_size, cluster)
    even = bool((sizes == sizes[0]).all())
    # Slices meet a link between hosts once in so many steps.
    history: deque[Floats] = deque(maxlen=cluster.workers_per_host)
    number = 0
    while number < program.count:
        walk.carry_out(number)
        number += 1 + (_skip(walk, history, program.repeats[number]) if even else 0)
    assert not walk.ready, "a schedule sends what nobody receives"
    return walk.free_s


@dataclass(frozen=True)
class _Program:
    """Every rank's schedule, step by step."""

    step: Callable[[int], _Step]
    count: int
    first: list[tuple[int, Ints]]
    """Steps with sends that wait for nothing, and the ranks that make these."""

    repeats: list[int]
    """For each step, how many of the next ones are like it at all ranks, as far as is known."""


class _Walk:
    """Where all ranks stand between two steps."""

    def __init__(
        self,
        program: _Program,
        sizes: Ints,
        chunk_numel: int,
        itemsize_bytes: int,
        world_size: int,
        cluster: Cluster,
    ) -> None:
        self._program, self._sizes, self._chunk_numel = program, sizes, chunk_numel
        self._itemsize_bytes = itemsize_bytes
        self._counts = np.maximum(1, -(-sizes // chunk_numel))
        self._costs = cluster.costs_of(world_size)
        self._network = _Network(cluster, self._costs.copy_s_per_byte, world_size)
        self.free_s = np.full(world_size, self._costs.call_s)
        self.ready: dict[tuple[int, int], Floats] = {}
        """[n] seconds from which a chunk of a step may be sent, by (step, chunk)."""
        self._last = 0
        for number, ranks in program.first:
            counts = self._counts[program.step(number).slice[ranks]]
            for index in range(int(counts.max())):
                senders = ranks[counts > index]
                self.free_s[senders] += self._costs.chunk_s
                self._ready_of(number, index)[senders] = self.free_s[senders]

    def carry_out(self, number: int) -> None:
        """All that ranks do in a step."""
        self._last = number
        step, counts, costs = self._program.step(number), self._counts, self._costs
        sends = np.flatnonzero(step.peer != _NOBODY)
        for index in range(int(counts[step.slice[sends]].max(initial=0))):
            senders = sends[counts[step.slice[sends]] > index]
            takers, parts = step.peer[senders], step.slice[senders]
            numel = np.clip(self._sizes[parts] - index * self._chunk_numel, 0, self._chunk_numel)
            size_bytes = numel * self._itemsize_bytes
            ready_s = self.ready.pop((number, index))[senders]
            passed_s, wire_s = self._network.passed(senders, takers, ready_s, size_bytes)
            arrived_s = passed_s + (costs.latency_s + wire_s)
            combined_s = np.where(step.combines[takers], size_bytes * costs.combine_s_per_byte, 0.0)
            done_s = np.maximum(self.free_s[takers], arrived_s) + (costs.chunk_s + combined_s)
            self.free_s[takers] = done_s
            forwards = step.forward_step[takers]
            for later in _distinct(forwards):
                chosen = forwards == later
                self._ready_of(later, index)[takers[chosen]] = done_s[chosen]

    def state(self) -> Floats:
        """All times that what follows depends on, if everything is sent on in the next step."""
        return np.concatenate([*self._clocks(), *(self.ready[key] for key in self._keys())])

    def skip(self, steps: int, seconds: float) -> None:
        """Go on by so many steps that are like the last one and take `seconds` in all, at all ranks."""
        for clock in self._clocks():
            clock += seconds
        for key in self._keys():
            self.ready[key[0] + steps, key[1]] = self.ready.pop(key) + seconds

    def _clocks(self) -> list[Floats]:
        return [self.free_s, *self._network.busy]

    def _keys(self) -> list[tuple[int, int]]:
        return [key for key in self.ready if key[0] == self._last + 1]

    def _ready_of(self, step: int, index: int) -> Floats:
        if (step, index) not in self.ready:
            self.ready[step, index] = np.full(self.free_s.size, np.nan)
        return self.ready[step, index]


def _skip(walk: _Walk, history: deque[Floats], repeats: int) -> int:
    """Skip steps that are like the last one, if the last period moved every clock on by the same time.

    A step's times are sums and maxima of earlier ones, so if it starts later by x, it ends later by x:
    then every further period takes as long.

    Args:
        walk: where ranks stand.
        history: its states after the last steps, a period at most; changed.
        repeats: how many steps follow that are like the last one.

    Returns:
        How many steps were skipped.
    """
    period = history.maxlen or 1
    if repeats < 2 * period:
        history.clear()
        return 0
    state = walk.state()
    if history and history[0].size != state.size:
        history.clear()
    moved = state - history[0] if len(history) == period else None
    history.append(state)
    if moved is None or not moved.max() - moved.min() <= 1e-9 * moved.max():
        return 0
    steps = (repeats - 1) // period * period
    walk.skip(steps, float(moved.mean()) * (steps // period))
    history.clear()
    return steps


class _Network:
    """Stages that bytes pass, as in `link_model`: sockets of ranks, and ports of hosts."""

    def __init__(self, cluster: Cluster, copy_s_per_byte: float, world_size: int) -> None:
        self._link: Link = cluster.link
        self._copy_s_per_byte = copy_s_per_byte
        self._host = np.arange(world_size) // cluster.workers_per_host
        self._sockets = [np.zeros(world_size) for _ in range(2)]
        self._ports = [np.zeros(int(self._host[-1]) + 1) for _ in range(2)]
        self._shared = cluster.workers_per_host > 1

    @property
    def busy(self) -> list[Floats]:
        """Until when each stage is busy."""
        return [*self._sockets, *self._ports]

    def passed(
        self, senders: Ints, takers: Ints, ready_s: Floats, size_bytes: Ints
    ) -> tuple[Floats, Floats | float]:
        """When messages have passed, and how long the wire takes; all [number of messages]."""
        passed_s = ready_s.copy()
        for busy, ranks in zip(self._sockets, (senders, takers), strict=True):
            # A rank sends one message at a time and receives one.
            busy[ranks] = np.maximum(busy[ranks], ready_s) + size_bytes * self._copy_s_per_byte
            passed_s = np.maximum(passed_s, busy[ranks])
        burst_s = self._link.burst_bytes / self._link.bytes_per_s
        if not self._shared:
            for busy, ranks in zip(self._ports, (senders, takers), strict=True):
                busy[ranks] = np.maximum(busy[ranks], ready_s) + size_bytes / self._link.bytes_per_s
                passed_s = np.maximum(passed_s, busy[ranks] - burst_s)
            return passed_s, self._link.latency_s
        far = np.flatnonzero(self._host[senders] != self._host[takers])
        order = far[np.argsort(ready_s[far], kind="stable")]
        seconds = size_bytes[order] / self._link.bytes_per_s
        for busy, ranks in zip(self._ports, (senders, takers), strict=True):
            done_s = _queue(busy, self._host[ranks[order]], ready_s[order], seconds)
            passed_s[order] = np.maximum(passed_s[order], done_s - burst_s)
        wire_s = np.zeros(senders.size)
        wire_s[far] = self._link.latency_s
        return passed_s, wire_s


def _queue(busy_s: Floats, ports: Ints, ready_s: Floats, seconds: Floats) -> Floats:
    """When messages have passed their ports; all [number of messages], in the order in which they queue.

    Args:
        busy_s: until when each port is busy; changed. [number of ports]
        ports: the port of each message.
        ready_s: from when it is there.
        seconds: how long it occupies its port.
    """
    order = np.argsort(ports, kind="stable")
    grouped = ports[order]
    begins = np.ones(grouped.size, dtype=np.bool_)
    begins[1:] = grouped[1:] != grouped[:-1]
    starts = np.flatnonzero(begins)
    row = np.cumsum(begins) - 1
    column = np.arange(grouped.size) - starts[row]
    shape = (starts.size, int(column.max(initial=-1)) + 1)
    ready, needed = np.full(shape, -np.inf), np.zeros(shape)
    ready[row, column] = ready_s[order]
    needed[row, column] = seconds[order]
    # end[k] = max(end[k - 1], ready[k]) + needed[k], unrolled over the k messages of a port.
    total = np.cumsum(needed, axis=1)
    port = grouped[starts]
    latest = np.maximum.accumulate(ready - (total - needed), axis=1)
    ends = np.maximum(latest, busy_s[port][:, None]) + total
    if starts.size:
        busy_s[port] = ends[:, -1]
    passed_s = np.empty(grouped.size)
    passed_s[order] = ends[row, column]
    return passed_s


def _distinct(steps: Ints) -> list[int]:
    first = int(steps[0])
    found = [first] if (steps == first).all() else [int(step) for step in np.unique(steps)]
    return [step for step in found if step != _NOBODY]


@lru_cache(maxsize=8)
def _program(schedule_of: Callable[[int, int], Schedule], world_size: int) -> _Program:
    first = schedule_of(0, world_size)
    witnesses = {world_size - 1, world_size // 2, min(1, world_size - 1)}
    if all(schedule_of(rank, world_size) == _turned(first, rank, world_size) for rank in witnesses):
        return _turned_program(first, world_size)
    return _listed_program([schedule_of(rank, world_size) for rank in range(world_size)])


def _turned(schedule: Schedule, by: int, world_size: int) -> Schedule:
    """The schedule of the rank that is `by` ahead, if all ranks do the same."""

    def send(one: Send) -> Send:
        return one._replace(slice=(one.slice + by) % world_size, peer=(one.peer + by) % world_size)

    def receive(one: Receive) -> Receive:
        return one._replace(
            slice=(one.slice + by) % world_size,
            peer=(one.peer + by) % world_size,
            forward=None if one.forward is None else send(one.forward),
        )

    return Schedule(tuple(map(send, schedule.first)), tuple(map(receive, schedule.receives)))


def _turned_program(schedule: Schedule, world_size: int) -> _Program:
    ranks = np.arange(world_size)
    sends = {send.step: send for send in _sends(schedule)}

    def step(number: int) -> _Step:
        receive, send = schedule.receives[number], sends[number]
        later = _NOBODY if receive.forward is None else receive.forward.step
        return _Step(
            (ranks + send.peer) % world_size,
            (ranks + send.slice) % world_size,
            np.full(world_size, receive.action is not Action.STORE),
            np.full(world_size, later),
        )

    kinds = [(one.action is Action.STORE, one.forward is None) for one in schedule.receives]
    return _Program(step, len(kinds), [(one.step, ranks) for one in schedule.first], _repeats(kinds))


def _listed_program(schedules: Sequence[Schedule]) -> _Program:
    count = 1 + max((receive.step for one in schedules for receive in one.receives), default=-1)
    world_size = len(schedules)
    steps = [
        _Step(
            np.full(world_size, _NOBODY),
            np.zeros(world_size, dtype=np.int64),
            np.zeros(world_size, dtype=np.bool_),
            np.full(world_size, _NOBODY),
        )
        for _ in range(count)
    ]
    first: dict[int, list[int]] = {}
    for rank, schedule in enumerate(schedules):
        for send in schedule.first:
            first.setdefault(send.step, []).append(rank)
        for send in _sends(schedule):
            steps[send.step].peer[rank] = send.peer
            steps[send.step].slice[rank] = send.slice
        for receive in schedule.receives:
            steps[receive.step].combines[rank] = receive.action is not Action.STORE
            if receive.forward is not None:
                steps[receive.step].forward_step[rank] = receive.forward.step
    starts = [(step, np.array(ranks)) for step, ranks in sorted(first.items())]
    return _Program(steps.__getitem__, count, starts, [0] * count)


def _repeats(kinds: Sequence[tuple[bool, bool]]) -> list[int]:
    """For each step, how many follow it that are of its kind, and are followed by a step themselves."""
    found = [0] * len(kinds)
    for number in reversed(range(len(kinds) - 1)):
        alike = kinds[number] == kinds[number + 1] and not kinds[number + 1][1]
        found[number] = found[number + 1] + 1 if alike else 0
    return found


def _sends(schedule: Schedule) -> list[Send]:
    return [
        *schedule.first,
        *(receive.forward for receive in schedule.receives if receive.forward is not None),
    ]
