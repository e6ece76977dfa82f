"""Who is persistently slower than the others, by everyone's times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringps.optim.stragglers import _WARM_UP_STEPS, Straggler, StragglerWatch

STEPS = 10
IDS = (3, 5, 8)


def observe(
    watch: StragglerWatch, count: int, *times_ms: int, ids: tuple[int, ...] = IDS
) -> list[tuple[int, str]]:
    """The same times for `count` steps; who is named, in which of them, and how."""
    named = []
    for step in range(count):
        named += [(step, reason) for _, reason in watch.observe(ids, [1000 * one for one in times_ms])]
    return named


def test_equal_ranks_are_none() -> None:
    watch = StragglerWatch(1.5, STEPS)
    assert observe(watch, 100, 1000, 1000, 1400) == []
    assert watch.current == ()


def test_a_slow_rank_is_named_once_after_as_many_steps_as_asked() -> None:
    watch = StragglerWatch(1.5, STEPS)
    [(step, reason)] = observe(watch, 100, 1000, 3000, 1200)
    assert step == _WARM_UP_STEPS + STEPS - 1
    assert (
        reason
        == "3000.0 ms for its own part of a step, 1100.0 ms the median of the others (over about 10 steps)"
    )
    [one] = watch.current
    assert one.worker_id == 5
    assert one.factor == pytest.approx(3000 / 1100)


def test_one_slow_step_is_no_straggler() -> None:
    watch = StragglerWatch(1.5, STEPS)
    observe(watch, 40, 1000, 1000, 1000)
    assert observe(watch, 1, 1000, 1000, 5000) == []
    assert observe(watch, 60, 1000, 1000, 1000) == []
    assert watch.current == ()


def test_where_steps_are_short_it_takes_seconds_to_be_named() -> None:
    """In a few dozen short steps the system's scheduling alone makes one process slower than another."""
    watch = StragglerWatch(1.5, STEPS)
    [(step, _)] = observe(watch, 1000, 10, 30, 10)
    assert 5000 <= 30 * (step + 1 - _WARM_UP_STEPS) < 5030


def test_the_first_steps_do_not_count() -> None:
    watch = StragglerWatch(1.5, STEPS)
    observe(watch, _WARM_UP_STEPS, 1000, 10**6, 1000)
    assert observe(watch, 100, 1000, 1000, 1000) == []


def test_who_gets_faster_is_none_any_more_and_can_be_named_again() -> None:
    watch = StragglerWatch(1.5, STEPS)
    assert len(observe(watch, 50, 1000, 1000, 2000)) == 1
    assert observe(watch, 100, 1000, 1000, 1000) == []
    assert watch.current == ()
    assert len(observe(watch, 100, 1000, 1000, 2000)) == 1


def test_who_is_about_as_slow_as_the_limit_is_not_named_over_and_over() -> None:
    watch = StragglerWatch(1.5, STEPS)
    assert len(observe(watch, 50, 1000, 1000, 1600)) == 1
    named = [observe(watch, 30, 1000, 1000, time_ms) for time_ms in (1400, 1600) * 5]
    assert sum(named, []) == []
    assert [one.worker_id for one in watch.current] == [8]


def test_the_slowest_comes_first() -> None:
    watch = StragglerWatch(1.5, STEPS)
    observe(watch, 50, 1000, 2000, 4000, 1000, 1000, ids=(1, 2, 3, 4, 5))
    assert [one.worker_id for one in watch.current] == [3, 2]


def test_a_worker_that_is_gone_is_forgotten_and_starts_anew_when_it_returns() -> None:
    watch = StragglerWatch(1.5, STEPS)
    observe(watch, 50, 1000, 1000, 3000)
    observe(watch, 1, 1000, 1000, ids=IDS[:2])
    assert watch.current == ()
    [(step, _)] = observe(watch, 100, 1000, 1000, 3000)
    assert step == _WARM_UP_STEPS + STEPS - 1


def test_a_new_worker_is_compared_once_it_has_warmed_up() -> None:
    watch = StragglerWatch(1.5, STEPS)
    observe(watch, 50, 1000, 1000, ids=IDS[:2])
    [(step, _)] = observe(watch, 100, 1000, 1000, 3000)
    assert step == _WARM_UP_STEPS + STEPS - 1


@pytest.mark.parametrize("time_ms", [0, 1, 10**6])
def test_a_worker_alone_is_compared_with_nobody(time_ms: int) -> None:
    watch = StragglerWatch(1.5, STEPS)
    assert observe(watch, 100, time_ms, ids=IDS[:1]) == []


def test_times_of_nothing_are_no_reason_to_name_anybody() -> None:
    assert observe(StragglerWatch(1.5, STEPS), 100, 0, 0, 0) == []


@given(
    st.lists(st.lists(st.integers(0, 10**7), min_size=3, max_size=3), min_size=1, max_size=60),
    st.floats(1.1, 4),
    st.integers(1, 15),
)
def test_who_is_named_is_current_and_every_rank_comes_to_the_same(
    times: list[list[int]], factor: float, steps: int
) -> None:
    here, there = StragglerWatch(factor, steps), StragglerWatch(factor, steps)
    for number, times_us in enumerate(times, start=1):
        before = {one.worker_id for one in here.current}
        named = here.observe(IDS, times_us)
        assert named == there.observe(IDS, times_us)
        current = {one.worker_id for one in here.current}
        assert {one.worker_id for one, _ in named} == current - before
        assert not named or number >= _WARM_UP_STEPS + steps
        assert all(isinstance(one, Straggler) and one.factor >= factor for one, _ in named)
