"""`ring.commit`: its tables, and every run of the protocol among a few ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringps.ring.commit import (
    HASH_BYTES,
    MOST_JOINERS,
    NOTHING,
    STATUS_BYTES,
    VOTE_BYTES,
    Finding,
    Status,
    Step,
    Verdict,
    Vote,
    committed_by,
    common_joiners,
    judge,
    leavers,
    minority,
    resume,
)

Resume = Callable[[Sequence[Status], int], tuple[Step, str]]
Judge = Callable[[Sequence[Vote]], Verdict]

hashes = st.binary(min_size=HASH_BYTES, max_size=HASH_BYTES)
numbers = st.integers(0, 2**64 - 1)
generations = st.integers(0, 2**32 - 1)


def a_hash(text: str) -> bytes:
    return text.encode().ljust(HASH_BYTES, b".")


RIGHT, WRONG, OTHER = a_hash("right"), a_hash("wrong"), a_hash("other")


# What is sent.


@given(
    st.builds(
        Vote,
        operation=numbers,
        generation=generations,
        step=numbers,
        result=hashes,
        parameters=hashes,
        busy_us=generations,
        leaving=st.booleans(),
        joiners=st.lists(st.integers(0, 0xFFFE), max_size=MOST_JOINERS, unique=True).map(
            lambda ids: tuple(sorted(ids))
        ),
        marks=st.integers(0, 255),
    )
)
def test_a_vote_is_read_as_it_was_written(vote: Vote) -> None:
    assert len(vote.pack()) == VOTE_BYTES
    assert Vote.unpack(vote.pack()) == vote


@given(st.builds(Status, numbers, generations, st.booleans(), st.booleans(), st.booleans(), hashes, hashes))
def test_a_status_is_read_as_it_was_written(status: Status) -> None:
    assert len(status.pack()) == STATUS_BYTES
    assert Status.unpack(status.pack()) == status


def test_a_vote_names_the_first_joiners_and_the_longest_time_that_fit() -> None:
    vote = Vote(1, 1, 1, RIGHT, busy_us=1 << 40, joiners=tuple(range(20)))
    read = Vote.unpack(vote.pack())
    assert read.joiners == tuple(range(MOST_JOINERS))
    assert read.busy_us == 0xFFFFFFFF


# What votes amount to.


def votes(*results: bytes, parameters: Sequence[bytes] = ()) -> list[Vote]:
    given_parameters = parameters or [NOTHING] * len(results)
    return [
        Vote(7, 2, 5, result, parameters=own) for result, own in zip(results, given_parameters, strict=True)
    ]


@pytest.mark.parametrize(
    ("cast", "finding", "wrong", "words"),
    [
        (votes(RIGHT), Finding.COMMIT, (), "same result"),
        (votes(RIGHT, RIGHT, RIGHT), Finding.COMMIT, (), "same result"),
        (votes(RIGHT, RIGHT, parameters=[OTHER, OTHER]), Finding.COMMIT, (), "same result"),
        (votes(RIGHT, WRONG), Finding.REPEAT, (), "no bits are those of a majority"),
        (votes(RIGHT, WRONG, RIGHT), Finding.REPEAT, (1,), "rank 1 has others than the majority"),
        (votes(RIGHT, RIGHT, WRONG, WRONG), Finding.REPEAT, (), "no bits are those of a majority"),
        (
            votes(WRONG, RIGHT, RIGHT, OTHER, RIGHT),
            Finding.REPEAT,
            (0, 3),
            "ranks 0, 3 have others than the majority",
        ),
        # Parameters that differ explain results that differ.
        (votes(RIGHT, WRONG, RIGHT, parameters=[RIGHT, RIGHT, OTHER]), Finding.HEAL, (2,), "rank 2 has"),
        (votes(RIGHT, RIGHT, parameters=[RIGHT, OTHER]), Finding.HEAL, (), "no bits are"),
        (votes(RIGHT, RIGHT, parameters=[NOTHING, OTHER]), Finding.HEAL, (), "no bits are"),
    ],
)
def test_what_votes_amount_to(cast: list[Vote], finding: Finding, wrong: tuple[int, ...], words: str) -> None:
    verdict = judge(cast)
    assert (verdict.finding, verdict.wrong) == (finding, wrong)
    assert words in verdict.reason


@pytest.mark.parametrize("change", [{"operation": 8}, {"generation": 3}, {"step": 6}])
def test_votes_on_different_things_are_told_apart(change: dict[str, int]) -> None:
    first, second = votes(RIGHT, WRONG)
    verdict = judge([first, second._replace(**change)])
    assert verdict.finding is Finding.CONFUSED
    assert "rank 0: operation 7 of step 5 in generation 2" in verdict.reason
    assert f"{next(iter(change.values()))}" in verdict.reason.partition("rank 1")[2]


@given(st.lists(st.sampled_from([RIGHT, WRONG, OTHER]), min_size=1, max_size=7))
def test_a_minority_is_what_differs_from_more_than_half(cast: list[bytes]) -> None:
    most = [one for one in cast if 2 * cast.count(one) > len(cast)]
    expected = tuple(rank for rank, one in enumerate(cast) if one != most[0]) if most else ()
    assert minority(cast) == expected


def test_who_comes_and_who_goes() -> None:
    cast = [
        vote._replace(joiners=ids) for vote, ids in zip(votes(RIGHT, RIGHT), [(3, 4, 9), (4, 9)], strict=True)
    ]
    assert common_joiners(cast) == (4, 9)
    assert common_joiners([*cast, votes(RIGHT)[0]]) == ()
    assert leavers([cast[0], cast[1]._replace(leaving=True)]) == (1,)
    assert leavers(cast) == ()


# What a rank does at the beginning of a generation.


def status(
    committed: int,
    held: bytes | None = None,
    *,
    generation: int = 1,
    between: bool = False,
    parameters: bytes = NOTHING,
) -> Status:
    if held is None:
        return Status(committed, 0, False, between, False, NOTHING, NOTHING)
    return Status(committed, generation, True, between, False, held, parameters)


NEW = Status(0, 0, False, True, True, NOTHING, NOTHING)


@pytest.mark.parametrize(
    ("statuses", "forward", "words"),
    [
        ([status(4), status(4)], (False, False), "lacks the result"),
        ([status(4, RIGHT), status(4)], (False, False), "lacks the result"),
        ([status(4, RIGHT), status(4, RIGHT)], (True, True), "may have committed it"),
        ([status(4, RIGHT)], (True,), "may have committed it"),
        ([status(4, RIGHT), status(4, WRONG)], (False, False), "different results"),
        ([status(4, RIGHT), status(4, RIGHT, generation=2)], (False, False), "different results"),
        # The vote would have found that out, so nobody has committed it.
        (
            [status(4, RIGHT, parameters=RIGHT), status(4, RIGHT, parameters=OTHER)],
            (False, False),
            "different parameters",
        ),
        ([status(4, RIGHT, parameters=OTHER), status(4, RIGHT, parameters=OTHER)], (True, True), "may have"),
        ([status(4, RIGHT), status(5)], (True, False), "another member has committed it"),
        ([status(4, RIGHT), status(5, WRONG)], (True, False), "another member has committed it"),
        ([status(5), status(4, RIGHT), status(5)], (False, True, False), "have yet to commit"),
        ([status(4, between=True), status(4, between=True)], (False, False), "between two steps"),
        ([status(4, between=True), status(4)], (False, False), "lacks the result"),
        ([status(5, between=True), status(4, RIGHT)], (False, True), "have yet to commit"),
        ([NEW, status(4, RIGHT), status(4, RIGHT)], (False, True, True), "is new"),
        ([status(4, RIGHT), NEW, status(5)], (True, False, False), "another member has committed it"),
        ([status(4, between=True), NEW], (False, False), "between two steps"),
    ],
)
def test_what_a_rank_does_at_the_beginning_of_a_generation(
    statuses: list[Status], forward: tuple[bool, ...], words: str
) -> None:
    found = [resume(statuses, rank) for rank in range(len(statuses))]
    assert tuple(step is Step.FORWARD for step, _ in found) == forward
    assert words in found[0][1]


@pytest.mark.parametrize("statuses", [[status(4), status(5)], [status(3, RIGHT), status(5)]])
def test_a_rank_that_is_too_far_behind_says_so(statuses: list[Status]) -> None:
    with pytest.raises(ValueError, match=r"rank 0 has committed [34] operations and others 5, but it does"):
        resume(statuses, 0)


def test_a_new_rank_goes_on_from_the_furthest() -> None:
    assert committed_by([NEW, status(4, RIGHT), status(5)]) == 5


# Every run of the protocol.
#
# A generation is a row of exchanges: the handshake, then attempts and votes in turn. A rank gives its part to
# an exchange and waits. It may get everyone's parts as soon as all have been given, also if somebody has died
# since and others never get them. Once a later generation is formed it may go on to that one instead.
#
# Where a vote finds parameters that differ, an exchange follows in which all get those of one rank. That one
# needs nobody's part for it, and nobody needs another's than that one's.


class Part(NamedTuple):
    """What a rank gives to an exchange."""

    kind: str
    operation: int
    content: Status | Vote | bytes | None = None


class Rank(NamedTuple):
    phase: str
    """`user`: in the script. `attempt`, `vote`, `heal`, `handshake`: waits for the others' parts. `offer`:
    pauses after a step, to let somebody in. `outside`: has yet to come. `dead`."""
    committed: int = 0
    generation: int = 1
    exchange: int = 0
    """Exchanges that it has had in this generation."""
    held: tuple[int, bytes] | None = None
    between: bool = False
    joining: bool = False
    parameters: bytes = RIGHT
    """To which it applies what is committed."""
    source: int = 0
    """In `heal`: the rank whose parameters are right."""


Given = tuple[tuple[tuple[int, int, int], Part], ...]
"""By generation, exchange and rank."""


class World(NamedTuple):
    ranks: tuple[Rank, ...]
    members: tuple[tuple[int, ...], ...]
    """Of generation 1, 2, ..."""
    given: Given
    decided: tuple[tuple[bytes, bytes], ...]
    """The result of each operation that some rank, dead or alive, has committed, and its parameters."""
    deaths: int
    flips: int
    """Bits that may still be flipped."""
    breaks: int
    """Generations that may still end although nobody died."""


class Violation(AssertionError):
    """The protocol did what it must not."""


@dataclass(frozen=True)
class Protocol:
    """`ElasticCommunicator`'s use of the rules, one move at a time."""

    operations: int
    resume: Resume = resume
    judge: Judge = judge

    def start(
        self,
        ranks: int,
        *,
        deaths: int = 0,
        flips: int = 0,
        breaks: int = 0,
        joiner: bool = False,
        sick: bool = False,
    ) -> World:
        """A `joiner` comes after the first operation; rank 0 may be `sick`: its parameters are wrong."""
        first = Rank("user", parameters=WRONG if sick else RIGHT)
        everyone = [first, *[Rank("user")] * (ranks - 1), *[Rank("outside")] * joiner]
        return World(tuple(everyone), (tuple(range(ranks)),), (), (), deaths, flips, breaks)

    def moves(self, world: World) -> Iterator[World]:
        """All that may happen next."""
        latest = len(world.members)
        for number, rank in enumerate(world.ranks):
            if rank.phase in ("dead", "outside"):
                continue
            if world.deaths and len(self.alive(world)) > 1:
                yield self.regroup(self.put(world._replace(deaths=world.deaths - 1), number, Rank("dead")))
            if rank.phase == "user":
                if rank.committed < self.operations:
                    yield self.attempt(world, number, rank)
                if rank.generation < latest:  # between two steps, or amid shutdown
                    yield self.enter(world, number, rank, between=True)
            elif rank.phase == "offer":
                if rank.generation < latest:
                    yield self.enter(world, number, rank, between=True)
            else:
                yield from self.complete(world, number, rank)
                if rank.generation < latest:
                    yield self.enter(world, number, rank, between=rank.between)
        if world.breaks:
            yield self.regroup(world._replace(breaks=world.breaks - 1))
        if all(world.ranks[number].phase == "offer" for number in world.members[-1]):
            newcomer = len(world.ranks) - 1
            joining = Rank("user", joining=True)
            yield self.enter(
                self.regroup(self.put(world, newcomer, joining)), newcomer, joining, between=True
            )

    def check_end(self, world: World) -> None:
        """No move is left."""
        for number in self.alive(world):
            if world.ranks[number].committed != self.operations:
                raise Violation(f"rank {number} waits for ever: {world}")

    def alive(self, world: World) -> tuple[int, ...]:
        return tuple(n for n, one in enumerate(world.ranks) if one.phase not in ("dead", "outside"))

    def put(self, world: World, number: int, rank: Rank) -> World:
        return world._replace(ranks=(*world.ranks[:number], rank, *world.ranks[number + 1 :]))

    def regroup(self, world: World) -> World:
        """The coordinator forms the next generation of all that are alive."""
        return self.pruned(world._replace(members=(*world.members, self.alive(world))))

    def pruned(self, world: World) -> World:
        """Without parts that nobody can get any more."""
        alive = [world.ranks[number] for number in self.alive(world)]
        coming = any(one.generation < len(world.members) for one in alive)
        kept = {
            (generation, exchange)
            for generation, exchange in {key[:2] for key, _ in world.given}
            if (coming and generation == len(world.members))
            or any(one.generation == generation and one.exchange <= exchange for one in alive)
        }
        return world._replace(given=tuple(entry for entry in world.given if entry[0][:2] in kept))

    def give(self, world: World, number: int, rank: Rank, part: Part) -> World:
        entry = ((rank.generation, rank.exchange, number), part)
        return self.put(world._replace(given=tuple(sorted((*world.given, entry), key=_key))), number, rank)

    def attempt(self, world: World, number: int, rank: Rank) -> World:
        rank = rank._replace(phase="attempt", between=False)
        return self.give(world, number, rank, Part("attempt", rank.committed + 1))

    def enter(self, world: World, number: int, rank: Rank, *, between: bool) -> World:
        """Go on to the latest generation, and say how far this rank is."""
        rank = rank._replace(phase="handshake", generation=len(world.members), exchange=0, between=between)
        held = rank.held or (0, NOTHING)
        parameters = rank.parameters if rank.held else NOTHING
        own = Status(
            rank.committed, held[0], rank.held is not None, between, rank.joining, held[1], parameters
        )
        return self.pruned(self.give(world, number, rank, Part("handshake", 0, own)))

    def complete(self, world: World, number: int, rank: Rank) -> Iterator[World]:
        """The rank gets all parts of the exchange, if they have been given."""
        given = dict(world.given)
        members = world.members[rank.generation - 1]
        needed = members if rank.phase != "heal" else [rank.source]
        keys = [(rank.generation, rank.exchange, one) for one in needed]
        if not all(key in given for key in keys):
            return
        parts = [given[key] for key in keys]
        if len({part[:2] for part in parts}) > 1:
            raise Violation(f"ranks are about different things: {parts}")
        place = members.index(number)
        after = rank._replace(exchange=rank.exchange + 1)
        if rank.phase == "attempt":
            result = a_hash(f"{rank.committed + 1}.{rank.generation}.{rank.exchange}")
            yield self.vote(world, number, after, result)
            if world.flips:
                yield self.vote(world._replace(flips=world.flips - 1), number, after, b"!" + result[1:])
        elif rank.phase == "vote":
            verdict = self.judge([part.content for part in parts if isinstance(part.content, Vote)])
            finding = verdict.finding
            if finding is Finding.COMMIT:
                committed = self.commit(world, number, after)
                if rank.committed == 0 and world.ranks[-1].phase == "outside":
                    committed = self.put(committed, number, committed.ranks[number]._replace(phase="offer"))
                yield committed
            elif finding is Finding.REPEAT:
                yield self.attempt(world, number, after._replace(held=None))
            elif finding is Finding.HEAL and verdict.wrong:
                right = next(one for index, one in enumerate(members) if index not in verdict.wrong)
                healing = after._replace(phase="heal", held=None, source=right)
                part = Part("heal", rank.committed + 1, rank.parameters)
                yield self.pruned(self.give(world, number, healing, part))
            elif finding is Finding.HEAL:
                yield self.regroup(self.put(world, number, Rank("dead")))  # it ends with an error
            else:
                raise Violation(f"{finding}: {parts}")
        elif rank.phase == "heal":
            copied = parts[0].content
            assert isinstance(copied, bytes)
            yield self.pruned(self.attempt(world, number, after._replace(parameters=copied)))
        else:
            yield self.settle(
                world, number, after, place, [p.content for p in parts if isinstance(p.content, Status)]
            )

    def vote(self, world: World, number: int, rank: Rank, result: bytes) -> World:
        rank = rank._replace(phase="vote", held=(rank.generation, result))
        own = Vote(rank.committed + 1, rank.generation, rank.committed + 1, result, rank.parameters)
        return self.pruned(self.give(world, number, rank, Part("vote", rank.committed + 1, own)))

    def settle(self, world: World, number: int, rank: Rank, place: int, statuses: list[Status]) -> World:
        try:
            step, _ = self.resume(statuses, place)
        except ValueError as error:
            raise Violation(f"{error}: {statuses}") from error
        if rank.joining:
            rank = rank._replace(committed=committed_by(statuses), joining=False)
        if step is Step.FORWARD:
            return self.commit(world, number, rank)
        rank = rank._replace(held=None)
        if rank.between:
            return self.pruned(self.put(world, number, rank._replace(phase="user", between=False)))
        return self.pruned(self.attempt(world, number, rank))

    def commit(self, world: World, number: int, rank: Rank) -> World:
        if rank.held is None:
            raise Violation(f"rank {number} is to commit what it does not hold: {world}")
        applied = rank.held[1], rank.parameters
        known = world.decided[rank.committed : rank.committed + 1]
        if known and known[0] != applied:
            raise Violation(f"operation {rank.committed + 1} has two outcomes: {world}")
        decided = world.decided if known else (*world.decided, applied)
        rank = rank._replace(phase="user", committed=rank.committed + 1, held=None, between=False)
        return self.pruned(self.put(world._replace(decided=decided), number, rank))

    def explore(self, start: World) -> int:
        """Go through every world that can be reached; returns how many there are.

        Raises:
            Violation: one of them must not be.
        """
        seen, waiting = {start}, [start]
        while waiting:
            world = waiting.pop()
            ends = True
            for after in self.moves(world):
                ends = False
                if after not in seen:
                    seen.add(after)
                    waiting.append(after)
            if ends:
                self.check_end(world)
        return len(seen)


def _key(entry: tuple[tuple[int, int, int], Part]) -> tuple[int, int, int]:
    return entry[0]


@pytest.mark.parametrize(
    ("operations", "given"),
    [
        (3, {"ranks": 2, "deaths": 1, "flips": 1, "breaks": 1}),
        (3, {"ranks": 3, "deaths": 2}),
        (2, {"ranks": 3, "deaths": 2, "flips": 1}),
        (2, {"ranks": 3, "deaths": 1, "breaks": 1}),
        (2, {"ranks": 4, "deaths": 1}),
        (1, {"ranks": 4, "deaths": 2}),
        (2, {"ranks": 2, "deaths": 1, "flips": 1, "joiner": True}),
        (2, {"ranks": 2, "deaths": 1, "breaks": 1, "joiner": True}),
        (2, {"ranks": 3, "deaths": 1, "joiner": True}),
        (2, {"ranks": 3, "deaths": 1, "sick": True}),
        (2, {"ranks": 3, "flips": 1, "breaks": 1, "sick": True}),
        (1, {"ranks": 4, "deaths": 1, "sick": True}),
    ],
)
def test_no_run_commits_two_outcomes_or_waits_for_ever(operations: int, given: dict[str, Any]) -> None:
    """Every order of every rank's moves, with deaths, flipped bits, generations that end anywhere, and
    parameters that are wrong."""
    protocol = Protocol(operations)
    assert protocol.explore(protocol.start(**given)) > 100


def never_forward(statuses: Sequence[Status], rank: int) -> tuple[Step, str]:
    step, reason = resume(statuses, rank)
    return (Step.AGAIN if "may have committed" in reason else step), reason


def not_after_another(statuses: Sequence[Status], rank: int) -> tuple[Step, str]:
    step, reason = resume(statuses, rank)
    return (Step.AGAIN if "another member has committed" in reason else step), reason


def forward_with_own_result(statuses: Sequence[Status], rank: int) -> tuple[Step, str]:
    return (Step.FORWARD if statuses[rank].holds else Step.AGAIN), ""


def forward_with_any_results(statuses: Sequence[Status], rank: int) -> tuple[Step, str]:
    step, reason = resume(statuses, rank)
    return (Step.FORWARD if "different results" in reason else step), reason


def forward_with_any_parameters(statuses: Sequence[Status], rank: int) -> tuple[Step, str]:
    return resume([status._replace(parameters=NOTHING) for status in statuses], rank)


def forward_though_one_lacks_it(statuses: Sequence[Status], rank: int) -> tuple[Step, str]:
    step, reason = resume(statuses, rank)
    return (Step.FORWARD if "lacks the result" in reason else step), reason


def new_ranks_are_like_others(statuses: Sequence[Status], rank: int) -> tuple[Step, str]:
    return resume([status._replace(joining=False) for status in statuses], rank)


def commit_by_majority(votes: Sequence[Vote]) -> Verdict:
    verdict = judge(votes)
    return verdict._replace(finding=Finding.COMMIT) if verdict.wrong else verdict


def ignore_results(votes: Sequence[Vote]) -> Verdict:
    return judge([vote._replace(result=NOTHING) for vote in votes])


def ignore_parameters(votes: Sequence[Vote]) -> Verdict:
    return judge([vote._replace(parameters=NOTHING) for vote in votes])


@pytest.mark.parametrize(
    ("wrong", "given"),
    [
        (Protocol(2, resume=never_forward), {"ranks": 3, "deaths": 1}),
        (Protocol(2, resume=not_after_another), {"ranks": 3, "deaths": 1}),
        (Protocol(2, resume=forward_with_own_result), {"ranks": 3, "deaths": 1}),
        (Protocol(2, resume=forward_with_any_results), {"ranks": 3, "deaths": 1, "flips": 1}),
        (Protocol(1, resume=forward_with_any_parameters), {"ranks": 4, "deaths": 1, "sick": True}),
        (Protocol(2, resume=forward_though_one_lacks_it), {"ranks": 3, "deaths": 1}),
        (Protocol(2, resume=new_ranks_are_like_others), {"ranks": 2, "joiner": True}),
        (Protocol(2, judge=commit_by_majority), {"ranks": 3, "flips": 1}),
        (Protocol(2, judge=ignore_results), {"ranks": 2, "flips": 1}),
        (Protocol(1, judge=ignore_parameters), {"ranks": 3, "sick": True}),
    ],
)
def test_a_wrong_rule_is_found_out(wrong: Protocol, given: dict[str, Any]) -> None:
    """That the search for a bad run can find one."""
    with pytest.raises(Violation):
        wrong.explore(wrong.start(**given))
