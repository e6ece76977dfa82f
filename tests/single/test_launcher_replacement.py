from __future__ import annotations

import pytest

from ringps_launcher.replacement import Planned, Replacements


def plan(replacements: Replacements, worker_id: int, now_s: float) -> Planned:
    planned, reason = replacements.plan(worker_id, now_s)
    assert planned is not None, reason
    return planned


def test_all_workers_share_the_budget() -> None:
    replacements = Replacements(2)
    first, reason = replacements.plan(4, 1.0)
    assert first == Planned(worker_id=4, restart=1, delay_s=0.2, due_s=1.2, restarts_left=1)
    assert reason == "a new one starts in 0.2 s (1 of 2 restarts left)"
    assert plan(replacements, 5, 1.0).restarts_left == 0
    third, reason = replacements.plan(6, 1.0)
    assert third is None
    assert reason == "the restarts are used up (--max-restarts 2), the others go on"


def test_no_restart_at_all() -> None:
    planned, reason = Replacements(0).plan(0, 0.0)
    assert planned is None and "--max-restarts 0" in reason


def test_each_is_started_once_its_time_has_come() -> None:
    replacements = Replacements(9)
    assert replacements.due_s is None
    a, b = plan(replacements, 4, 0.0), plan(replacements, 5, 0.1)
    assert (replacements.waiting, replacements.due_s) == ({4, 5}, a.due_s)
    assert replacements.take_due(0.15) == []
    assert replacements.take_due(a.due_s) == [a]
    assert (replacements.waiting, replacements.due_s, replacements.started) == ({5}, b.due_s, 1)
    assert replacements.take_due(10.0) == [b]
    assert (replacements.due_s, replacements.started) == (None, 2)


def failures(replacements: Replacements, worker_id: int, runs_s: list[float]) -> list[float]:
    """The delays before replacements that run so long each."""
    now_s, delays_s = 0.0, []
    for run_s in runs_s:
        planned = plan(replacements, worker_id, now_s)
        delays_s.append(planned.delay_s)
        assert replacements.take_due(planned.due_s) == [planned]
        now_s = planned.due_s + run_s
        replacements.ended(worker_id, now_s)
    return delays_s


def test_quick_failures_double_the_delay_up_to_a_limit() -> None:
    delays_s = failures(Replacements(2000), 0, [1.0] * 2000)
    assert delays_s[:8] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0])
    assert set(delays_s[6:]) == {10.0}


def test_a_replacement_that_ran_for_long_resets_the_delay() -> None:
    assert failures(Replacements(9), 0, [1.0, 59.9, 60.0, 1.0, 1.0]) == pytest.approx(
        [0.2, 0.4, 0.8, 0.2, 0.4]
    )


def test_each_worker_has_a_delay_and_a_count_of_its_own() -> None:
    replacements = Replacements(9)
    failures(replacements, 0, [1.0, 1.0])
    other = plan(replacements, 1, 100.0)
    assert (other.delay_s, other.restart) == (0.2, 1)
    assert plan(replacements, 0, 100.0).restart == 3


def test_the_times_are_parameters() -> None:
    replacements = Replacements(9, first_delay_s=1.0, longest_delay_s=3.0, settled_s=5.0)
    assert failures(replacements, 0, [0.0, 0.0, 0.0, 5.0, 0.0]) == [1.0, 2.0, 3.0, 3.0, 1.0]


def test_the_end_of_a_first_process_changes_nothing() -> None:
    replacements = Replacements(1)
    replacements.ended(0, 1000.0)
    assert plan(replacements, 0, 1000.0).delay_s == 0.2


def test_nothing_is_started_once_cancelled() -> None:
    replacements = Replacements(9)
    plan(replacements, 0, 0.0)
    replacements.cancel()
    assert (replacements.waiting, replacements.due_s, replacements.take_due(100.0)) == (frozenset(), None, [])


def test_earlier_starts_of_the_ring_have_spent_some_of_the_budget() -> None:
    replacements = Replacements(3, spent=1)
    assert (replacements.spent, replacements.left) == (1, 2)
    assert plan(replacements, 0, 0.0).restarts_left == 1
    assert plan(replacements, 1, 0.0).restarts_left == 0
    assert replacements.plan(2, 0.0)[0] is None
    assert (replacements.spent, replacements.left) == (3, 0)
    assert Replacements(1, spent=2).left == 0


def test_what_is_cancelled_is_not_spent() -> None:
    replacements = Replacements(3)
    plan(replacements, 0, 0.0)
    replacements.take_due(1.0)
    plan(replacements, 1, 1.0)
    replacements.cancel()
    replacements.cancel()
    assert (replacements.spent, replacements.left, replacements.started) == (1, 2, 1)
