"""The planner of buckets, and the comparison of layouts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringps.buckets.agreement import first_difference
from ringps.buckets.layout import ALIGNMENT_BYTES, ParameterSpec, plan

SIZES = {"float32": 4, "float64": 8, "bfloat16": 2}


def spec(numel: int, dtype: str = "float32") -> ParameterSpec:
    return ParameterSpec(numel=numel, dtype=dtype, itemsize_bytes=SIZES[dtype])


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[ParameterSpec], list[int], int, int]:
    shapes = draw(st.lists(st.tuples(st.integers(0, 500), st.sampled_from(sorted(SIZES))), max_size=40))
    order = draw(st.permutations(range(len(shapes))))
    return [spec(*shape) for shape in shapes], order, draw(st.integers(1, 2000)), draw(st.integers(1, 500))


@given(problems())
def test_every_parameter_lies_in_one_place(problem: tuple[list[ParameterSpec], list[int], int, int]) -> None:
    specs, order, cap_bytes, first_cap_bytes = problem
    buckets = plan(specs, order, cap_bytes=cap_bytes, first_cap_bytes=first_cap_bytes)
    placed = [slot.parameter for bucket in buckets for slot in bucket.slots]
    assert sorted(placed) == sorted(order)
    arrival = {parameter: rank for rank, parameter in enumerate(order)}
    completed = [max(arrival[slot.parameter] for slot in bucket.slots) for bucket in buckets]
    assert completed == sorted(completed), "buckets come in the order in which they become complete"
    for bucket in buckets:
        itemsize = SIZES[bucket.dtype]
        arrivals = [arrival[slot.parameter] for slot in bucket.slots]
        assert arrivals == sorted(arrivals)
        end = 0
        for slot in bucket.slots:
            assert specs[slot.parameter].dtype == bucket.dtype
            assert slot.stop - slot.start == specs[slot.parameter].numel
            assert slot.start >= end and slot.start * itemsize % ALIGNMENT_BYTES == 0
            end = slot.stop
        assert bucket.flags_start >= end
        assert bucket.numel == bucket.flags_start + len(bucket.slots) + 1
        cap = first_cap_bytes if arrivals[0] == 0 else cap_bytes
        assert len(bucket.slots) == 1 or end * itemsize <= cap


@given(problems())
def test_a_bucket_is_closed_only_for_its_reason(
    problem: tuple[list[ParameterSpec], list[int], int, int],
) -> None:
    specs, order, cap_bytes, first_cap_bytes = problem
    buckets = plan(specs, order, cap_bytes=cap_bytes, first_cap_bytes=first_cap_bytes)
    for dtype in SIZES:
        same = [bucket for bucket in buckets if bucket.dtype == dtype]
        assert [bucket.closed_by for bucket in same] == ["cap"] * (len(same) - 1) + ["end"] * bool(same)


def test_the_first_bucket_is_small() -> None:
    buckets = plan([spec(16)] * 10, range(9, -1, -1), cap_bytes=256, first_cap_bytes=64)
    assert [len(bucket.slots) for bucket in buckets] == [1, 4, 4, 1]
    assert [slot.parameter for slot in buckets[1].slots] == [8, 7, 6, 5]


def test_dtypes_that_alternate_do_not_break_buckets_up() -> None:
    specs = [spec(16, dtype) for dtype in ("float32", "bfloat16") * 4]
    buckets = plan(specs, range(8), cap_bytes=4096, first_cap_bytes=4096)
    assert [bucket.dtype for bucket in buckets] == ["float32", "bfloat16"]


def test_an_order_must_name_every_parameter_once() -> None:
    with pytest.raises(ValueError, match="order"):
        plan([spec(1)] * 2, [0, 0], cap_bytes=1, first_cap_bytes=1)


def test_differences_are_told_by_name_and_rank() -> None:
    a, b, c, d = ("a", "float32[1]"), ("b", "float32[2]"), ("c", "float32[3]"), ("b", "float32[5]")
    assert (
        first_difference([[a, b], [a, d], [a, b], [a, c]])
        == 'the ranks differ at "b": ranks 0, 2 have float32[2]; rank 1 has float32[5]; rank 3 has nothing '
        "of that name. Build the same model and optimizer on every rank"
    )
    assert 'at "b": rank 0 has float32[2]; rank 1 has nothing' in first_difference([[a, b], [a]])
    assert 'at "b": rank 0 has nothing of that name; rank 1 has' in first_difference([[a], [a, b]])
    assert 'at "b": rank 0 has nothing of that name; rank 1 has' in first_difference([[a, c], [a, b, c]])
    assert 'at "a": rank 0 has float32[1]; rank 1 has it at another place' in first_difference(
        [[a, b], [b, a]]
    )
