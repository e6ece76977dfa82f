"""How far all ranks are with a save, and what follows: every row, and that no rank is left behind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringps.checkpoint.lanes import Next, Said, Stage, Task, assign, decide

WRITE, PUBLISH = Task(Stage.WRITE, 10, 1), Task(Stage.PUBLISH, 10, 1)
IDLE, AT_WORK = Said(None, False, ""), Said(WRITE, True, "")
DONE, FAILED = Said(WRITE, False, ""), Said(WRITE, False, "no space left")


@pytest.mark.parametrize(
    ("said", "generation", "following", "why"),
    [
        ([IDLE, IDLE], 1, Next.BEGIN, "nothing is under way"),
        ([IDLE, Said(None, True, "")], 1, Next.WAIT, "rank 1 is still at work"),  # at one given up
        ([AT_WORK, DONE], 1, Next.WAIT, "rank 0 is still at work"),
        ([FAILED, AT_WORK], 1, Next.WAIT, "rank 1 is still at work"),
        ([DONE, DONE], 1, Next.ADVANCE, "all ranks are done"),
        ([Said(PUBLISH, False, "")] * 3, 1, Next.ADVANCE, "all ranks are done"),
        ([DONE, FAILED], 1, Next.FAIL, "rank 1: no space left"),
        ([FAILED, FAILED], 1, Next.FAIL, "rank 0: no space left; rank 1: no space left"),
        ([DONE, IDLE], 1, Next.DROP, "the ranks are not at the same save: some came later"),
        ([DONE, Said(PUBLISH, False, "")], 1, Next.DROP, "the ranks are not at the same save"),
        ([DONE, DONE._replace(task=WRITE._replace(step=20))], 1, Next.DROP, "the ranks are not at the same"),
        ([AT_WORK, IDLE], 2, Next.DROP, "the ranks are not at the same save: some came later"),
        ([AT_WORK, DONE], 2, Next.DROP, "it began in generation 1, and this is 2"),
        ([FAILED, FAILED], 2, Next.DROP, "it began in generation 1, and this is 2"),
        ([IDLE, IDLE], 2, Next.BEGIN, "nothing is under way"),
    ],
)
def test_what_follows(said: list[Said], generation: int, following: Next, why: str) -> None:
    found, words = decide(said, generation)
    assert found is following
    assert words.startswith(why)


tasks = st.none() | st.builds(
    Task, st.sampled_from(Stage), st.sampled_from([10, 20]), st.sampled_from([1, 2])
)
saids = st.builds(Said, tasks, st.booleans(), st.sampled_from(["", "no space left"]))


@given(st.lists(saids, min_size=1, max_size=4), st.sampled_from([1, 2]))
def test_an_advance_needs_all_and_only_what_is_under_way_is_dropped(
    said: list[Said], generation: int
) -> None:
    following, why = decide(said, generation)
    assert why
    assert decide(said[::-1], generation)[0] is following, "no rank counts for more than another"
    alike = len({one.task for one in said}) == 1
    idle = not any(one.busy for one in said)
    if following is Next.ADVANCE:
        assert alike and idle and said[0].task is not None
        assert said[0].task.generation == generation
        assert not any(one.error for one in said)
    elif following is Next.BEGIN:
        assert alike and idle and said[0].task is None
    elif following is Next.FAIL:
        assert alike and idle and any(one.error for one in said)
    elif following is Next.DROP:
        assert any(one.task is not None for one in said)
    else:
        assert alike and not idle


@dataclass
class Rank:
    """A rank as `Saver` keeps its lane."""

    task: Task | None = None
    busy: bool = False
    error: str = ""
    ended: list[tuple[str, int]] = field(default_factory=list)

    def said(self) -> Said:
        return Said(self.task, self.busy, "" if self.task is None or self.busy else self.error)

    def start(self, task: Task) -> None:
        assert not self.busy, "one task at a time"
        self.task, self.busy, self.error = task, True, ""

    def follow(self, following: Next, generation: int, step: int) -> None:
        if following is Next.DROP:
            self.task = None
        elif following is Next.FAIL:
            assert self.task is not None
            self.ended.append(("failed", self.task.step))
            self.task = None
        elif following is Next.ADVANCE:
            assert self.task is not None
            if self.task.stage is Stage.PUBLISH:
                self.ended.append(("saved", self.task.step))
                self.task = None
            else:
                self.start(self.task._replace(stage=Stage.PUBLISH))
        elif following is Next.BEGIN:
            self.start(Task(Stage.WRITE, step, generation))


events = st.lists(
    st.one_of(
        st.tuples(st.just("end"), st.integers(0, 3), st.sampled_from(["", "", "no space left"])),
        st.tuples(st.sampled_from(["lose", "join"]), st.integers(0, 3), st.just("")),
        st.tuples(st.just("meet"), st.just(0), st.just("")),
    ),
    max_size=60,
)


@given(st.integers(1, 4), events)
def test_all_ranks_go_through_the_same_saves(world_size: int, sequence: list[tuple[str, int, str]]) -> None:
    """Whenever threads end, fail, and members come and go: who hears the same does the same, and no save
    counts as made on one rank and not on another that was there from its beginning."""
    ranks, generation = [Rank() for _ in range(world_size)], 1
    for step, (what, who, error) in enumerate(sequence, 1):
        one = ranks[who % len(ranks)]
        if what == "end":
            one.busy, one.error = False, error
        elif what == "lose" and len(ranks) > 1:
            ranks.remove(one)
            generation += 1
        elif what == "join" and len(ranks) < 4:
            ranks.append(Rank(ended=list(ranks[0].ended)))
            generation += 1
        elif what == "meet":
            following, _ = decide([rank.said() for rank in ranks], generation)
            for rank in ranks:
                rank.follow(following, generation, step)
            assert len({rank.task for rank in ranks}) == 1
            assert all(rank.task is None or rank.task.generation == generation for rank in ranks)
    assert all(rank.ended == ranks[0].ended for rank in ranks)
    # Everybody goes on to an end: threads do, and nobody comes any more.
    for rank in ranks:
        rank.busy = False
    for _ in range(4):
        following, _ = decide([rank.said() for rank in ranks], generation)
        assert following is not Next.WAIT
        if following is Next.BEGIN:
            break
        for rank in ranks:
            rank.follow(following, generation, 0)
            rank.busy = False
    else:
        pytest.fail("a save does not come to an end")


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(0, 1000), max_size=12),
    st.lists(st.sets(st.text("abc", min_size=1, max_size=3)), min_size=1, max_size=4),
)
def test_files_go_to_those_who_can_read_them(needed: dict[str, int], held: list[set[str]]) -> None:
    holders = [frozenset(one) for one in held]
    chosen, why = assign(needed, holders)
    lost = {name for name in needed if not any(name in one for one in held)}
    if lost:
        assert chosen == {}
        assert any(why == f"no rank can read {name} any more" for name in lost)
        return
    assert chosen.keys() == needed.keys()
    assert all(name in holders[rank] for name, rank in chosen.items())
    assert assign(dict(reversed(needed.items())), holders) == (chosen, why), "on every rank alike"


def test_files_are_spread_by_their_sizes() -> None:
    sizes = {"a": 100, "b": 60, "c": 50, "d": 5, "e": 5}
    everywhere = frozenset(sizes)
    chosen, _ = assign(sizes, [everywhere, everywhere])
    load = Counter[int]()
    for name, rank in chosen.items():
        load[rank] += sizes[name]
    assert load == {0: 110, 1: 110}
    only = frozenset("ab")
    assert assign(sizes, [only, everywhere])[0] == {"a": 0, "b": 1, "c": 1, "d": 1, "e": 1}
