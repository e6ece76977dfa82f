"""Which checkpoints belong to the history, and which are deleted."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringps.checkpoint.lineage import (
    NOTHING,
    UNKNOWN,
    Base,
    Lineage,
    Point,
    decode_claim,
    encode_claim,
    history,
)
from ringps.checkpoint.manifest import Aside, Entry, aside_name, entry_name
from ringps.checkpoint.retention import Retention, to_delete


def lineage(checkpoints: dict[int, list[int]], claims: dict[int, Base]) -> Lineage:
    return history([(run, step) for run, steps in checkpoints.items() for step in steps], claims)


def test_a_run_and_those_that_it_went_on_from() -> None:
    found = lineage(
        {1: [10, 20], 2: [30, 40, 50], 3: [45, 55]},
        {1: NOTHING, 2: Point(1, 20), 3: Point(2, 40)},
    )
    assert found.history == [(3, 55), (3, 45), (2, 40), (2, 30), (1, 20), (1, 10)]
    assert found.left_out == {Point(2, 50): ("run 3 went on from step 40", True)}


def test_a_run_that_was_superseded_is_passed_over() -> None:
    found = lineage({1: [10], 2: [20], 3: [15]}, {1: NOTHING, 2: Point(1, 10), 3: Point(1, 10)})
    assert found.history == [(3, 15), (1, 10)]
    assert found.left_out == {Point(2, 20): ("run 3 went on from run 1", True)}


def test_what_the_newest_run_went_on_from_bounds_all_older_ones() -> None:
    found = lineage({1: [10, 20], 2: [25], 3: []}, {1: NOTHING, 2: Point(1, 20), 3: Point(1, 10)})
    assert found.history == [(1, 10)]
    assert found.left_out.keys() == {(1, 20), (2, 25)}


def test_a_run_that_began_from_nothing_ends_the_history() -> None:
    found = lineage({1: [10], 2: [5]}, {1: NOTHING, 2: NOTHING})
    assert found.history == [(2, 5)]
    assert found.left_out == {Point(1, 10): ("run 2 began from nothing", False)}


def test_a_run_that_never_restored_anything_is_passed_over() -> None:
    found = lineage({1: [10, 20]}, {1: NOTHING, 2: UNKNOWN, 3: UNKNOWN})
    assert found.history == [(1, 20), (1, 10)]


def test_a_completed_run_without_checkpoints_counts() -> None:
    assert lineage({1: [10, 20]}, {1: NOTHING, 2: Point(1, 10)}).history == [(1, 10)]


def test_lost_claims_leave_everything_restorable() -> None:
    assert lineage({1: [10, 20], 4: [30]}, {}).history == [(4, 30), (1, 20), (1, 10)]


def test_a_run_of_unknown_base_went_on_from_before_its_first_step() -> None:
    found = lineage({1: [10, 20, 30], 2: [25, 35]}, {1: NOTHING})
    assert found.history == [(2, 35), (2, 25), (1, 20), (1, 10)]
    assert found.left_out == {Point(1, 30): ("run 2 went on from a step before 25", True)}


def test_a_base_that_is_gone_does_not_hide_what_is_older() -> None:
    found = lineage({1: [10, 20], 5: [50]}, {1: NOTHING, 5: Point(3, 40)})
    assert found.history == [(5, 50), (1, 20), (1, 10)]


def test_a_claim_of_a_younger_base_counts_as_unknown() -> None:
    found = lineage({1: [10], 2: [20]}, {1: NOTHING, 2: Point(2, 15)})
    assert found.history == [(2, 20), (1, 10)]


def test_nothing_has_no_history() -> None:
    assert history([], {}) == Lineage([], {})


@dataclass
class Training:
    """A job that is started again and again, and the truth about who trained what."""

    timelines: dict[int, list[int]] = field(default_factory=dict)
    """By run: which run trained each step, as far as it has come."""

    saved: dict[Point, list[int]] = field(default_factory=dict)
    """What the checkpoints that exist hold."""

    claims: dict[int, Base] = field(default_factory=dict)

    def start(self, choice: int, completes: bool) -> None:
        run = len(self.claims) + 1
        options = history(self.saved, self.claims).history
        if not completes:
            self.claims[run] = UNKNOWN
        elif not options:
            self.claims[run], self.timelines[run] = NOTHING, []
        else:
            base = options[choice % len(options)]  # the newest may be damaged
            self.claims[run], self.timelines[run] = base, list(self.saved[base])

    def save(self, choice: int, steps: int) -> None:
        """Any run goes on for some steps, and saves; also one that was superseded long ago."""
        if self.timelines:
            run = sorted(self.timelines)[choice % len(self.timelines)]
            self.timelines[run] += [run] * steps
            self.saved[Point(run, len(self.timelines[run]))] = list(self.timelines[run])

    def delete(self, choice: int) -> None:
        if self.saved:
            del self.saved[sorted(self.saved)[choice % len(self.saved)]]

    def prune(self, choice: int, keep: int) -> None:
        if self.saved:
            own = sorted(self.saved)[choice % len(self.saved)]
            found = history(self.saved, self.claims)
            doomed = {deletion.name for deletion in to_delete(found, (), Retention(keep=keep), own)}
            self.saved = {
                point: timeline
                for point, timeline in self.saved.items()
                if entry_name(point.step, point.run) not in doomed
            }

    @property
    def expected(self) -> list[Point]:
        """The checkpoints whose past is the past of the newest run, newest first."""
        if not self.timelines:
            return []
        current = self.timelines[max(self.timelines)]
        return sorted(
            (point for point, past in self.saved.items() if past == current[: len(past)]),
            key=lambda point: -point.step,
        )


SMALL = st.integers(0, 8)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), SMALL, st.integers(0, 3).map(bool)),
        st.tuples(st.just("save"), SMALL, st.integers(1, 3)),
        st.tuples(st.just("save"), st.just(-1), st.integers(1, 3)),  # the newest run, mostly
        st.tuples(st.just("delete"), SMALL),
        st.tuples(st.just("prune"), SMALL, st.integers(1, 3)),
    ),
    max_size=40,
)


def trained(actions: list[tuple[Any, ...]]) -> Training:
    training = Training()
    for name, *arguments in actions:
        getattr(training, name)(*arguments)
    return training


@given(ACTIONS)
def test_the_history_is_the_past_of_the_newest_run(actions: list[tuple[Any, ...]]) -> None:
    training = trained(actions)
    found = history(training.saved, training.claims)
    assert found.history == training.expected
    assert sorted([*found.history, *found.left_out]) == sorted(training.saved)


@given(ACTIONS, st.sets(st.integers(1, 10)))
def test_whatever_claims_are_lost_the_newest_run_is_restorable(
    actions: list[tuple[Any, ...]], lost: set[int]
) -> None:
    training = trained(actions)
    claims = {run: base for run, base in training.claims.items() if run not in lost}
    found = history(training.saved, claims)
    assert sorted([*found.history, *found.left_out]) == sorted(training.saved)
    steps = [point.step for point in found.history]
    assert steps == sorted(set(steps), reverse=True)
    newest = max(training.saved, default=None)
    if newest is not None and newest.run == max(training.timelines):
        assert found.history[0] == newest


@given(ACTIONS, st.data())
def test_deleting_spares_what_is_newer_and_what_is_to_be_kept(
    actions: list[tuple[Any, ...]], data: st.DataObject
) -> None:
    training = trained(actions)
    if not training.saved:
        return
    own = data.draw(st.sampled_from(sorted(training.saved)))
    busy = data.draw(st.sets(st.sampled_from(sorted(training.saved)), max_size=2))
    retention = Retention(keep=data.draw(st.integers(1, 3)), keep_every=data.draw(st.sampled_from([None, 4])))
    found = history(training.saved, training.claims)
    busy_names = {entry_name(step, run) for run, step in busy}
    doomed = [deletion.name for deletion in to_delete(found, (), retention, own, busy_names)]
    gone = {point for point in training.saved if entry_name(point.step, point.run) in doomed}
    older = [point for point in found.history if point <= own]
    assert len(gone) == len(doomed)
    assert all(point < own for point in gone)
    assert not gone & busy
    assert not gone & set(older[: retention.keep])
    if retention.keep_every:
        assert not any(point.step % 4 == 0 for point in gone & set(older))
    expected = {point for point in older[retention.keep :] if not retention.keep_every or point.step % 4}
    assert gone & set(older) == expected - busy


# Deleting.


def deleted(
    found: Lineage,
    own: tuple[int, int],
    *unfinished: Aside | Entry,
    retention: Retention = Retention(keep=2),  # noqa: B008 - it is frozen
    busy: Collection[str] = (),
) -> dict[str, str]:
    return dict(to_delete(found, unfinished, retention, own, busy))


def test_the_newest_are_kept_and_those_of_every_so_many_steps() -> None:
    found = lineage({1: [10, 20, 30, 40, 50]}, {1: NOTHING})
    assert deleted(found, (1, 50)) == {entry_name(step, 1): "2 newer ones are kept" for step in (10, 20, 30)}
    kept = Retention(keep=1, keep_every=20)
    assert list(deleted(found, (1, 50), retention=kept)) == [entry_name(10, 1), entry_name(30, 1)]
    assert list(deleted(found, (1, 50), busy=[entry_name(10, 1)])) == [entry_name(20, 1), entry_name(30, 1)]


def test_a_superseded_run_deletes_nothing_of_its_successor() -> None:
    found = lineage({1: [10, 20, 30], 2: [21, 22, 23, 24]}, {1: NOTHING, 2: Point(1, 20)})
    assert deleted(found, (1, 30)) == {}


def test_what_a_superseded_run_saved_late_goes() -> None:
    found = lineage({1: [10, 20, 30], 2: [25]}, {1: NOTHING, 2: Point(1, 20)})
    assert deleted(found, (2, 25)) == {
        entry_name(10, 1): "2 newer ones are kept",
        entry_name(30, 1): "it is not in the history: run 2 went on from step 20",
    }


def test_what_is_left_of_a_past_that_nothing_replaced_stays() -> None:
    found = lineage({1: [10, 20, 30], 2: [5]}, {1: NOTHING, 2: NOTHING})
    assert deleted(found, (2, 5)) == {}


def test_unfinished_ones_go_if_they_are_older() -> None:
    found = lineage({2: [50]}, {2: NOTHING})
    unfinished = [
        Aside(90, 1, 1),
        Aside(40, 2, 3),
        Aside(50, 2, 3),
        Aside(60, 2, 3),
        Aside(10, 3, 9),
        Entry(45, 2),
    ]
    assert deleted(found, (2, 50), *unfinished) == {
        aside_name(90, 1, 1): "run 1 did not finish it",
        aside_name(40, 2, 3): "this run has given it up",
        entry_name(45, 2): "this run has given it up",
    }
    assert aside_name(40, 2, 3) not in deleted(found, (2, 50), *unfinished, busy=[aside_name(40, 2, 3)])


def test_the_oldest_go_first() -> None:
    found = lineage({1: [10, 20], 2: [15, 16, 17]}, {1: NOTHING, 2: Point(1, 10)})
    names = list(deleted(found, (2, 17), Aside(12, 2, 1)))
    assert names == [entry_name(10, 1), entry_name(20, 1), aside_name(12, 2, 1), entry_name(15, 2)]


@pytest.mark.parametrize("settings", [{"keep": 0}, {"keep": -1}, {"keep_every": 0}])
def test_impossible_retention_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Retention(**settings)


# Claims.


@pytest.mark.parametrize(
    ("base", "expected"),
    [((6, 80), Point(6, 80)), (None, NOTHING), (UNKNOWN, UNKNOWN), ((1, 0), Point(1, 0))],
)
def test_claims_are_decoded(base: Any, expected: Base) -> None:
    assert decode_claim(encode_claim(7, base), 7) == expected


def test_claims_as_they_lie_on_disk() -> None:
    assert encode_claim(7, (6, 80)) == b'{"run": 7, "base": [6, 80]}\n'
    assert encode_claim(7, None) == b'{"run": 7, "base": null}\n'
    assert encode_claim(7) == b'{"run": 7}\n'


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON"),
        (b'{"run": 7, "base', "not JSON"),
        (b"[7]", "not the claim of run 7"),
        (b'{"run": 8, "base": null}', "not the claim of run 7"),
        (b'{"run": 7, "base": [7, 1]}', "older run"),
        (b'{"run": 7, "base": [0, 1]}', "older run"),
        (b'{"run": 7, "base": [6, -1]}', "older run"),
        (b'{"run": 7, "base": [6]}', "no checkpoint"),
        (b'{"run": 7, "base": "unknown"}', "no checkpoint"),
        (b'{"run": 7, "base": [6, 8.0]}', "no checkpoint"),
        (b" " * 5000, "longer than"),
    ],
)
def test_wrong_claims_are_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_claim(raw, 7)
