"""Each sample once per epoch, whoever is lost and whoever joins."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from ringps.data import NO_SHARE, BatchShare, ElasticBatchSampler, Row
from ringps.data.assignment import Permutation, global_batch
from ringps.data.division import Division


class Habit(NamedTuple):
    """How a rank's loop goes about its iterators."""

    depth: int
    redraws: bool

    @property
    def late(self) -> bool:
        """It draws no batch for good before the one ahead of it has committed."""
        return self.redraws or not self.depth


class Worker:
    """One rank's sampler and the loop that iterates over it, `depth` batches read ahead."""

    def __init__(self, ring: Ring, habit: Habit, place: tuple[int, int]) -> None:
        self.habit = habit
        self.place = 0, 1
        self.sampler = ElasticBatchSampler(*ring.shape, drop_last=ring.drop_last, place=lambda: self.place)
        self.place = place
        self.sampler.track(accounts=True)
        self.sampler.redraws = habit.redraws
        self._iterator: Iterator[list[int]] | None = None
        self._ahead: list[list[int]] = []

    def renew(self) -> None:
        self._iterator, self._ahead = None, []

    def train(self) -> tuple[BatchShare, list[int]]:
        """One backward: the share and the samples that it was of."""
        if self.sampler.redraws and self.sampler.stale:
            self.renew()
        self._fill()
        if not self._ahead:
            self._iterator = iter(self.sampler)
            self._fill()
        samples = self._ahead.pop(0)
        share = self.sampler.take()
        assert share is not None
        assert len(samples) == max(share.local_samples, 1)
        return share, samples

    def _fill(self) -> None:
        while self._iterator is not None and len(self._ahead) <= self.habit.depth:
            try:
                self._ahead.append(next(self._iterator))
            except StopIteration:
                self._iterator = None


class Ring:
    """Workers in rank order, and what they have trained in committed steps."""

    def __init__(self, dataset_len: int, size: int, drop_last: bool, habits: list[Habit]) -> None:
        self.shape = dataset_len, size, 3
        self.drop_last = drop_last
        self.expected = dataset_len // size * size if drop_last else dataset_len
        self.trained: dict[int, Counter[int]] = {}
        self.constant = True
        """Whether no rank draws ahead what a loss may change."""
        self.carries = False
        """Whether a step's backward passes may belong to two epochs."""
        self.workers: list[Worker] = []
        self.start(habits)

    @property
    def first(self) -> ElasticBatchSampler:
        return self.workers[0].sampler

    def step(self, window: int = 1, lost: frozenset[int] = frozenset()) -> None:
        """`window` backward passes of every rank, then a commit without the ranks `lost`."""
        drawn = [[worker.train() for worker in self.workers] for _ in range(window)]
        self._check_contents(drawn)
        kept = [rank for rank in range(len(self.workers)) if rank not in lost]
        rows = [self.workers[rank].sampler.rows() for rank in kept]
        assert {len(own) for own in rows} == {window}
        for number in range(window):
            self._commit([own[number] for own in rows], drawn[number], kept)
        self.workers = [self.workers[rank] for rank in kept]
        for rank, worker in enumerate(self.workers):
            worker.place = rank, len(self.workers)

    def start(self, habits: list[Habit]) -> None:
        self.workers = [Worker(self, habit, (rank, len(habits))) for rank, habit in enumerate(habits)]

    def join(self, habit: Habit, at: int) -> None:
        joiner = Worker(self, habit, (0, 1))
        joiner.sampler.load_state_dict(self._packed(), joining=True)
        self.workers.insert(at, joiner)
        for rank, worker in enumerate(self.workers):
            worker.place = rank, len(self.workers)

    def divide(self) -> None:
        for worker in self.workers:
            worker.sampler.divide(*worker.place)

    def restart(self, habits: list[Habit]) -> None:
        """All processes end; others load the state."""
        state = self._packed()
        self.start(habits)
        for worker in self.workers:
            worker.sampler.load_state_dict(state)

    def _packed(self) -> dict[str, Any]:
        unpacked: dict[str, Any] = msgpack.unpackb(msgpack.packb(self.first.state_dict()))
        return unpacked

    def _commit(self, rows: list[Row], drawn: list[tuple[BatchShare, list[int]]], kept: list[int]) -> None:
        survivor = self.workers[kept[0]].sampler
        before = survivor.statistics()
        total = drawn[0][0].total_samples
        if self.constant and total < self.shape[1]:
            assert before.trained_samples + total == self.expected, "a small batch that is not the last"
        for rank in kept:
            share, samples = drawn[rank]
            if share.local_samples:
                self.trained.setdefault(share.epoch, Counter()).update(samples)
        packed = [struct.pack("<6q", *row) for row in rows]
        account = [struct.unpack("<6q", row) for row in packed]
        for position, rank in enumerate(kept):
            self.workers[rank].sampler.committed(account, position)
        after = survivor.statistics()
        covered = sum(row.stop - row.start for row in rows)
        if after.epoch == before.epoch:
            assert after.trained_samples == before.trained_samples + covered
            planned = min((after.step) * self.shape[1], self.expected)
            assert after.trained_samples + after.owed_samples == planned or not self.constant
        else:
            assert before.trained_samples + covered == self.expected or not self.constant
        assert len({repr(self.workers[rank].sampler.state_dict()) for rank in kept}) == 1

    def _check_contents(self, drawn: list[list[tuple[BatchShare, list[int]]]]) -> None:
        """Full global batches are what they are without losses."""
        length, size, seed = self.shape
        for shares in drawn:
            assert len({(share.epoch, share.step, share.total_samples) for share, _ in shares}) == 1
            epoch, step = shares[0][0][:2]
            if step < length // size:
                whole = global_batch(seed, epoch, step, length, size)
                for share, samples in shares:
                    if share.local_samples:
                        assert samples == whole[share.start : share.start + share.local_samples]

    def check(self) -> None:
        """Compare what was trained since the first epoch with what should have been."""
        length, size, seed = self.shape
        epoch, step, state = self.first.epoch, self.first.step, self._packed()
        due: Counter[int] = Counter()
        for number in range(epoch + 1):
            order = Permutation(seed, number, length)
            whole = number < epoch
            wanted = Counter(
                order[at] for at in range(self.expected if whole else min(step * size, self.expected))
            )
            due += wanted
            if whole and not self.carries:
                assert self.trained[number] == wanted, f"epoch {number}"
        owed = [piece for batch in [*state["owed"], state["carried"]] for piece in batch]
        assert sum(stop - start for _, start, stop in owed) == self.first.statistics().owed_samples
        for number, start, stop in owed:
            assert number == epoch or self.carries
            due.subtract(Permutation(seed, number, length)[at] for at in range(start, stop))
        assert sum(self.trained.values(), Counter()) == due


HABITS = st.builds(Habit, st.integers(0, 5), st.booleans())


@settings(max_examples=300)
@given(st.data())
def test_every_sample_is_trained_exactly_once_in_its_epoch(data: st.DataObject) -> None:
    habits = data.draw(st.lists(HABITS, min_size=1, max_size=5), label="habits")
    size = data.draw(st.integers(len(habits), 12), label="size")
    drop_last = data.draw(st.booleans(), label="drop_last")
    length = data.draw(st.integers(size, 60), label="length")
    window = data.draw(st.sampled_from([1, 1, 1, 2, 3]), label="window")
    ring = Ring(length, size, drop_last, habits)
    ring.carries = window > 1
    changes = 0
    while ring.first.epoch < 3:
        change = data.draw(
            st.sampled_from(["none", "none", "none", "loss", "loss", "join", "break", "restart"])
        )
        if changes == 15:
            change = "none"
        changes += change != "none"
        ranks = len(ring.workers)
        lost: frozenset[int] = frozenset()
        if change == "loss" and ranks > 1:
            lost = data.draw(st.frozensets(st.integers(0, ranks - 1), min_size=1, max_size=ranks - 1))
        elif change == "join" and ranks < 7:
            ring.join(data.draw(HABITS), data.draw(st.integers(0, ranks)))
            if all(worker.habit.late for worker in ring.workers) and data.draw(st.booleans()):
                ring.divide()
        elif change == "break":
            for rank in data.draw(st.frozensets(st.integers(0, ranks - 1))):
                ring.workers[rank].renew()
        elif change == "restart":
            ring.restart(data.draw(st.lists(HABITS, min_size=1, max_size=7)))
        ring.constant &= window == 1 and all(worker.habit.late for worker in ring.workers)
        ring.step(window, lost)
    ring.check()


def lose(ring: Ring, *lost: int) -> None:
    ring.step(lost=frozenset(lost))


def ring_of(world_size: int, length: int, size: int, *, depth: int = 0, redraws: bool = True) -> Ring:
    return Ring(length, size, False, [Habit(depth, redraws)] * world_size)


def test_what_a_lost_rank_did_not_contribute_comes_with_the_tail() -> None:
    ring = ring_of(4, 42, 8, depth=3)
    ring.step()
    lose(ring, 1, 3)
    assert ring.first.statistics().owed_samples == 4
    totals = []
    while ring.first.epoch == 0:
        _, step = ring.first.epoch, ring.first.step
        ring.step()
        totals.append((step, ring.trained[0].total()))
    # A tail of 2, and the 4 that are owed.
    assert totals == [(2, 20), (3, 28), (4, 36), (5, 42)]
    assert ring.first.statistics() == ring.workers[1].sampler.statistics()
    assert (ring.first.step, ring.first.statistics().owed_samples) == (0, 0)
    ring.check()


def test_a_new_membership_holds_from_the_step_after_the_first_it_commits() -> None:
    ring = ring_of(4, 80, 8, depth=3)
    lose(ring, 0)
    assert [worker.sampler.stale for worker in ring.workers] == [True] * 3
    assert [worker.train()[0][2:] for worker in ring.workers] == [(0, 2, 8), (2, 3, 8), (5, 3, 8)]


def test_without_new_iterators_it_holds_from_the_first_batch_that_no_rank_has_drawn() -> None:
    habits = [Habit(0, False), Habit(2, False), Habit(1, False)]
    ring = Ring(81, 9, False, habits)
    lose(ring, 2)
    assert not any(worker.sampler.stale for worker in ring.workers)
    shares = [[worker.train()[0].local_samples for worker in ring.workers] for _ in range(3)]
    assert shares == [[3, 3], [3, 3], [4, 5]]


def test_a_change_comes_sooner_when_what_was_drawn_ahead_is_given_up() -> None:
    division = Division(1, 4)
    division.change(0, 3, since=(0, 9), trained=(0, 2))
    assert [division.at((0, step)) for step in (8, 9)] == [(1, 4), (0, 3)]
    division.change(0, 3, since=(0, 4), trained=(0, 3))
    assert [division.at((0, step)) for step in (3, 4)] == [(1, 4), (0, 3)]
    division.settle()
    assert division.at((0, 0)) == (0, 3)


def test_a_joining_rank_counts_from_its_second_step_on() -> None:
    ring = ring_of(2, 100, 8, depth=2)
    ring.step()
    ring.join(Habit(4, True), 0)
    joiner = ring.first
    ring.step()
    assert joiner.statistics().padded_shares > 0
    assert joiner.statistics().owed_samples == 0
    padded = joiner.statistics().padded_shares
    assert [worker.train()[0].local_samples for worker in ring.workers] == [2, 3, 3]
    assert joiner.statistics().padded_shares == padded


def test_a_rank_that_joins_between_two_steps_of_all_counts_at_once() -> None:
    ring = ring_of(2, 100, 8, depth=2)
    ring.step()
    ring.join(Habit(4, True), 0)
    ring.divide()
    assert [worker.train()[0].local_samples for worker in ring.workers] == [2, 3, 3]


def test_more_ranks_than_samples_get_padding() -> None:
    ring = ring_of(1, 5, 2)
    ring.join(Habit(0, True), 1)
    ring.join(Habit(0, True), 2)
    ring.step()
    drawn = [worker.train() for worker in ring.workers]
    assert [share.local_samples for share, _ in drawn] == [0, 1, 1]
    assert all(len(samples) == 1 for _, samples in drawn)


def test_a_stale_batch_is_refused_where_new_iterators_were_promised() -> None:
    worker = ring_of(2, 80, 8).workers[0]
    iterator = iter(worker.sampler)
    next(iterator), next(iterator)
    assert worker.sampler.take() is not None
    worker.sampler.committed(worker.sampler.rows(), 0)
    assert worker.sampler.stale
    with pytest.raises(
        RuntimeError, match="samples 0 to 4 of 8, and would be samples 0 to 8 of 8 now; iterate"
    ):
        worker.sampler.take()
    iterator = iter(worker.sampler)
    assert len(next(iterator)) == 8
    taken = worker.sampler.take()
    assert taken is not None and taken.step == 1


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        (
            [(0, 0, 0, 4, 0, 1), (0, 1, 4, 8, 0, 1)],
            ValueError,
            r"epoch 0 step 0 by ranks \[0\]; epoch 0 step 1",
        ),
        ([(0, 0, 0, 5, 0, 1), (0, 0, 4, 8, 0, 1)], RuntimeError, "ranks 0 and 1 both trained samples 4 to 5"),
        ([(0, 0, 4, 8, 0, 1), (0, 0, 0, 6, 0, 1)], RuntimeError, "ranks 1 and 0 both trained samples 4 to 6"),
        ([(0, 1, 0, 4, 0, 2), (0, 1, 4, 8, 0, 2)], RuntimeError, "step 1 of epoch 0 came too early: step 0"),
        (
            [(0, 0, 0, 4, 0, 1), (0, 0, 4, 9, 0, 1)],
            ValueError,
            "rank 1 accounts for samples 4 to 9 of a batch",
        ),
        ([(0, 0, 4, 0, 0, 1), (0, 0, 4, 8, 0, 1)], ValueError, "rank 0 accounts for samples 4 to 0"),
    ],
)
def test_an_account_that_cannot_be_is_refused_and_books_nothing(
    rows: list[tuple[int, ...]], error: type[Exception], says: str
) -> None:
    sampler = ring_of(2, 80, 8).first
    before = sampler.state_dict()
    with pytest.raises(error, match=says):
        sampler.committed(rows, 0)
    assert sampler.state_dict() == before


def test_samples_that_were_trained_are_refused() -> None:
    sampler = ring_of(1, 80, 8).first
    sampler.committed([(0, 0, 0, 8, 0, 1)], 0)
    with pytest.raises(RuntimeError, match="step 0 of epoch 0 was trained already: step 1"):
        sampler.committed([(0, 0, 0, 8, 0, 1)], 0)
    assert sampler.statistics().trained_samples == 8


def test_a_rank_without_a_batch_owes_its_share() -> None:
    sampler = ring_of(2, 80, 8).first
    sampler.committed([(0, 0, 0, 4, 0, 1), NO_SHARE], 0)
    assert sampler.statistics().owed_samples == 4
    sampler.committed([NO_SHARE, NO_SHARE], 0)
    assert sampler.step == 1


def test_accounts_are_kept_on_request() -> None:
    sampler = ElasticBatchSampler(80, 8, place=lambda: (0, 1))
    sampler.track()
    with pytest.raises(RuntimeError, match=r"call track\(accounts=True\)"):
        sampler.committed([NO_SHARE], 0)


def test_a_loader_that_had_ended_gets_what_was_lost_last_with_its_next_iteration() -> None:
    ring = ring_of(2, 16, 8, depth=3, redraws=False)
    ring.step()
    lose(ring, 1)
    assert (ring.first.epoch, ring.first.step) == (0, 2)
    ring.step()
    assert (ring.first.epoch, ring.first.step) == (1, 0)
    ring.check()


def test_set_epoch_takes_along_what_is_owed_when_the_epoch_is_through() -> None:
    ring = ring_of(2, 16, 8)
    ring.carries, ring.constant = True, False
    ring.step()
    lose(ring, 0)
    ring.first.set_epoch(1)
    ring.workers[0].renew()
    assert (ring.first.step, ring.first.statistics().owed_samples) == (0, 4)
    for _ in range(3):
        ring.step()
    assert (ring.first.epoch, ring.first.step) == (2, 0)
    ring.check()


def test_set_epoch_gives_up_an_epoch_that_is_not_through() -> None:
    ring = ring_of(2, 16, 8)
    lose(ring, 0)
    ring.first.set_epoch(1)
    assert ring.first.statistics().owed_samples == 0


def test_a_state_saved_without_a_ledger_is_loaded() -> None:
    sampler = ring_of(1, 83, 8).first
    state = sampler.state_dict() | {"step": 3}
    for name in ("trained_samples", "owed", "carried"):
        del state[name]
    sampler.load_state_dict(state)
    assert sampler.statistics().trained_samples == 24
    assert sampler.state_dict()["owed"] == []
    assert len(list(sampler)) == 8


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"step": -1},
        {"step": 11},
        {"owed": [[[0, 0, 84]]]},
        {"owed": [[[0, 5, 5]]]},
        {"owed": [[], [[0, 0, 9]]]},
        {"owed": [[], []]},
        {"carried": [[-1, 0, 1]]},
    ],
)
def test_a_state_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    sampler = ring_of(1, 83, 8).first
    before = sampler.state_dict()
    with pytest.raises(ValueError):
        sampler.load_state_dict(before | change)
    assert sampler.state_dict() == before


def test_owed_samples_are_trained_without_accounts_too() -> None:
    ring = ring_of(2, 20, 8)
    lose(ring, 0)
    plain = ElasticBatchSampler(20, 8, 3, place=lambda: (0, 1))
    plain.load_state_dict(ring.first.state_dict())
    batches = list(plain)
    assert list(map(len, batches)) == [8, 8]
    assert (plain.epoch, plain.step) == (1, 0)
    assert ring.trained[0] + Counter(sum(batches, [])) == Counter(range(20))


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 91

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("redraws", [False, True])
def test_loader_workers_read_ahead_while_a_rank_is_lost(redraws: bool) -> None:
    places = [(rank, 3) for rank in range(3)]
    samplers = [ElasticBatchSampler(91, 8, 5, place=lambda rank=rank: places[rank]) for rank in range(3)]
    loaders = []
    for sampler in samplers:
        sampler.track(accounts=True)
        sampler.redraws = redraws
        loaders.append(DataLoader(Numbers(), batch_sampler=sampler, num_workers=2, prefetch_factor=2))
    alive = [0, 1, 2]
    running = [iter(loader) for loader in loaders]
    trained: Counter[int] = Counter()
    renewed = 0
    while samplers[0].epoch == 0:
        for rank in alive:
            batch = next(running[rank], None)
            if batch is None or (redraws and samplers[rank].stale and not samplers[rank].rows()):
                running[rank] = iter(loaders[rank])
                batch = next(running[rank])
                renewed += 1
            share = samplers[rank].take()
            assert share is not None
            trained.update(batch.tolist() if share.local_samples else [])
        if samplers[0].step == 4:
            alive.remove(1)
            lost = samplers[1].rows()[0]
            order = Permutation(5, 0, 91)
            trained.subtract(order[lost.step * 8 + at] for at in range(lost.start, lost.stop))
            places[2] = 1, 2
            places[0] = 0, 2
        account = [samplers[rank].rows()[0] for rank in alive]
        for position, rank in enumerate(alive):
            samplers[rank].committed(account, position)
    assert len(alive) == 2
    assert +trained == Counter(range(91))
    assert renewed == (2 if redraws else 0)
