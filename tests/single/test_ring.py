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
    assert min(limit_bytes, 2**19) - itemsize_bytes < chunk_bytes <= limit_bytes
    if chunk_bytes > 2**19:
        assert chunk_count(max(slices, key=lambda part: part.numel), chunk_bytes // itemsize_bytes) >= 2


Values = list[tuple[int, ...]]
"""For each element the ranks whose inputs are in it, in the order in which they were combined."""


def simulate(
    plans: list[Schedule], slices: tuple[Slice, ...], chunk_numel: int, order: st.DataObject
) -> list[list[tuple[int, ...] | None]]:
    """Run all ranks' machines. Delivery order is arbitrary among the links, first-in first-out on each."""
    machines = [RingMachine(plan, slices, chunk_numel) for plan in plans]
    numel = slices[-1].stop
    result: list[list[tuple[int, ...] | None]] = [[None] * numel for _ in plans]
    has: list[Values] = [[(rank,)] * numel for rank in range(len(plans))]
    links: dict[tuple[int, int], list[tuple[SendChunk, Values]]] = {}

    def put(rank: int, send: SendChunk, values: Values) -> None:
        links.setdefault((rank, send.peer), []).append((send, values))

    for rank, machine in enumerate(machines):
        for send in machine.start():
            put(rank, send, [(rank,)] * (send.stop - send.start))
    while any(links.values()):
        deliverable = [
            ends
            for ends, link in links.items()
            if link and machines[ends[1]].ready(link[0][0].step, link[0][0].chunk)
        ]
        sender, rank = order.draw(st.sampled_from(deliverable))
        send, values = links[sender, rank].pop(0)
        take = machines[rank].expect(send.step, send.chunk)
        assert take[1:5] == (send.start, send.stop, send.content, sender)
        machines[rank].took(send.step, send.chunk)
        if take.action is not Action.STORE:
            own = has[rank][take.start : take.stop]
            for ours, theirs in zip(own, values, strict=True):
                assert not set(ours) & set(theirs), "a rank's input combined twice"
            if plans[rank].accumulates:
                pairs = zip(own, values, strict=True) if rank < sender else zip(values, own, strict=True)
                values = has[rank][take.start : take.stop] = [first + second for first, second in pairs]
            else:
                values = [theirs + ours for theirs, ours in zip(values, own, strict=True)]
        if take.action is not Action.COMBINE:
            result[rank][take.start : take.stop] = values
        if take.forward is not None:
            put(rank, take.forward, values)
    assert all(machine.done and machine.sends_given for machine in machines)
    return result


@given(world_sizes, st.integers(0, 40), st.integers(1, 8), st.data())
def test_all_reduce_combines_every_rank_once_everywhere(
    world_size: int, numel: int, chunk_numel: int, data: st.DataObject
) -> None:
    plans = [schedule.all_reduce(rank, world_size) for rank in range(world_size)]
    result = simulate(plans, partition(numel, world_size), chunk_numel, data)
    if world_size > 1:
        assert all(sorted(value or ()) == list(range(world_size)) for value in result[0])
        assert result == [result[0]] * world_size


@given(st.integers(1, 17), st.integers(0, 3), st.data())
def test_recursive_doubling_combines_every_rank_once_and_in_rank_order(
    world_size: int, numel: int, data: st.DataObject
) -> None:
    plans = [schedule.recursive_doubling(rank, world_size) for rank in range(world_size)]
    result = simulate(plans, (Slice(0, numel),), data.draw(st.integers(1, 4)), data)
    if world_size > 1:
        assert result == [[tuple(range(world_size))] * numel] * world_size


@given(st.integers(2, 4096), st.data())
def test_recursive_doubling_takes_a_logarithmic_number_of_steps(world_size: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, world_size - 1))
    plan = schedule.recursive_doubling(rank, world_size)
    steps = [receive.step for receive in plan.receives]
    assert steps == sorted(set(steps))
    power_of_two = world_size & (world_size - 1) == 0
    assert max(steps) < world_size.bit_length() - 1 + (0 if power_of_two else 2)
    for receive in plan.receives:
        theirs = schedule.recursive_doubling(receive.peer, world_size)
        sends = [*theirs.first, *(r.forward for r in theirs.receives if r.forward is not None)]
        assert (receive.step, 0, receive.content, rank) in sends


@pytest.mark.parametrize("rank", [-1, 5])
def test_a_rank_outside_of_the_ring_has_no_schedule(rank: int) -> None:
    for make in (schedule.all_reduce, schedule.recursive_doubling):
        with pytest.raises(ValueError, match=r"is not in 0\.\.4"):
            make(rank, 5)


@given(world_sizes, st.integers(0, 40), st.integers(1, 8), st.data())
def test_reduce_scatter_leaves_slice_i_on_rank_i(
    world_size: int, numel: int, chunk_numel: int, data: st.DataObject
) -> None:
    slices = partition(numel, world_size)
    plans = [schedule.reduce_scatter(rank, world_size) for rank in range(world_size)]
    result = simulate(plans, slices, chunk_numel, data)
    everyone = list(range(world_size))
    if world_size > 1:
        for rank, part in enumerate(slices):
            for i, value in enumerate(result[rank]):
                assert value is None if i not in range(*part) else sorted(value or ()) == everyone


@given(st.integers(2, 9), st.data())
def test_broadcast_passes_through_everyone_but_the_last(world_size: int, data: st.DataObject) -> None:
    src = data.draw(st.integers(0, world_size - 1))
    plans = [schedule.broadcast(rank, world_size, src) for rank in range(world_size)]
    result = simulate(plans, (Slice(0, 10),), 3, data)
    for rank in range(world_size):
        assert result[rank] == ([None] * 10 if rank == src else [(src,)] * 10)
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
        right = (rank + 1) % world_size
        assert sends == [(r.step, r.slice, r.content, right) for r in neighbour.receives]
        assert {r.peer for r in neighbour.receives} == {rank}
        assert plan.peers == {right, (rank - 1) % world_size}


def test_a_step_that_builds_upon_another_waits_for_it() -> None:
    machine = RingMachine(schedule.recursive_doubling(0, 4), (Slice(0, 2),), 1)
    assert machine.ready(0, 0)
    assert not machine.ready(1, 0)
    machine.took(0, 0)
    assert machine.ready(1, 0)
    assert not machine.ready(1, 1)


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


def test_recursive_doubling_is_as_recorded(golden: object) -> None:
    lines = []
    for world_size in (1, 2, 3, 4, 6, 8):
        for rank in range(world_size):
            plan = schedule.recursive_doubling(rank, world_size)
            lines += describe("recursive_doubling", plan, rank, world_size)
    golden("recursive_doubling.txt", "\n".join(lines) + "\n")  # type: ignore[operator]


def describe(name: str, plan: Schedule, rank: int, world_size: int) -> list[str]:
    lines = [f"{name} rank {rank} of {world_size}"]
    for s in plan.first:
        lines.append(f"  step {s.step}: send slice {s.slice} ({s.content.value}) to rank {s.peer}")
    for r in plan.receives:
        line = f"  step {r.step}: receive slice {r.slice} ({r.content.value}) from rank {r.peer}"
        line += f", {r.action.value}"
        if r.forward:
            line += f", send it in step {r.forward.step} ({r.forward.content.value}) to rank {r.forward.peer}"
        lines.append(line)
    return lines
