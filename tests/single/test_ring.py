"""The pure ring: partition, schedule and machine, without tensors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringps.errors import FrameError
from ringps.ring import schedule
from ringps.ring.machine import RingMachine, SendChunk
from ringps.ring.partition import Slice, chunk, chunk_count, chunk_numel, partition
from ringps.ring.schedule import Action, Content, Schedule

world_sizes = st.integers(1, 9)
numels = st.integers(0, 200)


@given(numels, world_sizes)
def test_partition_is_balanced_and_covers_everything_once(numel: int, world_size: int) -> None:
    slices = partition(numel, world_size)
    assert [i for part in slices for i in range(*part)] == list(range(numel))
    sizes = [part.numel for part in slices]
    assert max(sizes) - min(sizes) <= 1


@given(numels, st.integers(1, 64))
def test_chunks_cover_a_slice_once_and_an_empty_slice_has_one(numel: int, piece: int) -> None:
    part = Slice(5, 5 + numel)
    chunks = [chunk(part, i, piece) for i in range(chunk_count(part, piece))]
    assert len(chunks) >= 1
    assert [i for one in chunks for i in range(*one)] == list(range(*part))
    assert all(one.numel == piece for one in chunks[:-1])


@given(st.integers(0, 10**9), world_sizes, st.sampled_from([1, 2, 4, 8]), st.sampled_from([64, 2**18, 2**22]))
def test_chunks_are_neither_tiny_nor_above_the_limit(
    numel: int, world_size: int, itemsize_bytes: int, limit_bytes: int
) -> None:
    slices = partition(numel, world_size)
    chunk_bytes = chunk_numel(slices, itemsize_bytes, limit_bytes) * itemsize_bytes
    assert min(limit_bytes, 2**21) - itemsize_bytes < chunk_bytes <= limit_bytes
    if chunk_bytes > 2**21:
        assert chunk_count(slices[0], chunk_bytes // itemsize_bytes) >= 4


def simulate(plans: list[Schedule], slices: tuple[Slice, ...], chunk_numel: int, order: st.DataObject):
    """Run all ranks' machines; values are sets of ranks per element. Delivery order is arbitrary
    among the links, first-in first-out on each."""
    world_size = len(plans)
    machines = [RingMachine(plan, slices, chunk_numel) for plan in plans]
    numel = slices[-1].stop
    result: list[list[frozenset[int] | None]] = [[None] * numel for _ in plans]
    links: list[list[tuple[SendChunk, list[frozenset[int]]]]] = [[] for _ in plans]

    def own(rank: int, send: SendChunk) -> list[frozenset[int]]:
        return [frozenset({rank})] * (send.stop - send.start)

    for rank, machine in enumerate(machines):
        for send in machine.start():
            links[(rank + 1) % world_size].append((send, own(rank, send)))
    while any(links):
        rank = order.draw(st.sampled_from([i for i, link in enumerate(links) if link]))
        send, values = links[rank].pop(0)
        take = machines[rank].expect(send.step, send.chunk)
        assert (take.start, take.stop, take.content) == (send.start, send.stop, send.content)
        machines[rank].took(send.step, send.chunk)
        if take.action is not Action.STORE:
            assert all(rank not in value for value in values), "a rank's input combined twice"
            values = [value | {rank} for value in values]
        if take.action is not Action.COMBINE:
            result[rank][take.start : take.stop] = values
        if take.forward is not None:
            links[(rank + 1) % world_size].append((take.forward, values))
    assert all(machine.done and machine.sends_given for machine in machines)
    return result


@given(world_sizes, st.integers(0, 40), st.integers(1, 8), st.data())
def test_all_reduce_combines_every_rank_once_everywhere(
    world_size: int, numel: int, chunk_numel: int, data: st.DataObject
) -> None:
    plans = [schedule.all_reduce(rank, world_size) for rank in range(world_size)]
    result = simulate(plans, partition(numel, world_size), chunk_numel, data)
    everyone = frozenset(range(world_size))
    if world_size > 1:
        assert result == [[everyone] * numel] * world_size


@given(world_sizes, st.integers(0, 40), st.integers(1, 8), st.data())
def test_reduce_scatter_leaves_slice_i_on_rank_i(
    world_size: int, numel: int, chunk_numel: int, data: st.DataObject
) -> None:
    slices = partition(numel, world_size)
    plans = [schedule.reduce_scatter(rank, world_size) for rank in range(world_size)]
    result = simulate(plans, slices, chunk_numel, data)
    everyone = frozenset(range(world_size))
    if world_size > 1:
        for rank, part in enumerate(slices):
            expected = [everyone if i in range(*part) else None for i in range(numel)]
            assert result[rank] == expected


@given(st.integers(2, 9), st.data())
def test_broadcast_passes_through_everyone_but_the_last(world_size: int, data: st.DataObject) -> None:
    src = data.draw(st.integers(0, world_size - 1))
    plans = [schedule.broadcast(rank, world_size, src) for rank in range(world_size)]
    result = simulate(plans, (Slice(0, 10),), 3, data)
    for rank in range(world_size):
        assert result[rank] == ([None] * 10 if rank == src else [frozenset({src})] * 10)
    assert sum(bool(plan.first) for plan in plans) == 1
    forwards = sum(receive.forward is not None for plan in plans for receive in plan.receives)
    assert forwards == world_size - 2


@given(st.integers(2, 9), st.data())
def test_what_a_rank_sends_is_what_its_neighbour_expects(world_size: int, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([schedule.all_reduce, schedule.reduce_scatter, schedule.all_gather]))
    for rank in range(world_size):
        plan = kind(rank, world_size)
        sends = [*plan.first, *(r.forward for r in plan.receives if r.forward is not None)]
        neighbour = kind((rank + 1) % world_size, world_size)
        assert sends == [(r.step, r.slice, r.content) for r in neighbour.receives]


def test_first_hop_of_a_reduction_carries_inputs_and_later_ones_partial_sums() -> None:
    contents = [receive.content for receive in schedule.all_reduce(0, 4).receives]
    assert contents == [Content.INPUT, *[Content.PARTIAL] * 2, *[Content.RESULT] * 3]


def test_a_chunk_twice_or_unknown_is_refused_and_changes_nothing() -> None:
    machine = RingMachine(schedule.all_reduce(0, 3), partition(9, 3), 2)
    machine.took(0, 0)
    for step, index, reason in [
        (0, 0, "duplicate"),
        (4, 0, "no such"),
        (0, 2, "no such"),
        (-1, 0, "no such"),
    ]:
        with pytest.raises(FrameError, match=reason):
            machine.expect(step, index)
    assert machine.missing() == "waits for chunk 1 of 2 in step 0 of 4"


def test_schedules_are_as_recorded(golden: object) -> None:
    lines = []
    for world_size in (1, 2, 3, 4):
        for rank in range(world_size):
            for name in ("reduce_scatter", "all_gather", "all_reduce"):
                lines += describe(name, getattr(schedule, name)(rank, world_size), rank, world_size)
            broadcast = schedule.broadcast(rank, world_size, 1 % world_size)
            lines += describe("broadcast(src=1)", broadcast, rank, world_size)
    golden("schedules.txt", "\n".join(lines) + "\n")  # type: ignore[operator]


def describe(name: str, plan: Schedule, rank: int, world_size: int) -> list[str]:
    lines = [f"{name} rank {rank} of {world_size}"]
    lines += [f"  step {s.step}: send slice {s.slice} ({s.content.value})" for s in plan.first]
    for r in plan.receives:
        line = f"  step {r.step}: receive slice {r.slice} ({r.content.value}), {r.action.value}"
        if r.forward:
            line += f", send it in step {r.forward.step} ({r.forward.content.value})"
        lines.append(line)
    return lines
