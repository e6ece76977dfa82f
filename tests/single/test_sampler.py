"""Which samples a rank trains: the order, the shares, the sampler and its position."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from ringps.data import ElasticBatchSampler
from ringps.data.assignment import Permutation, batch_positions, global_batch, share, steps_per_epoch

GOLDEN = [[718, 918, 527, 667, 803, 963], [10487, 9609, 7381, 5559, 5371, 875]]


def chi_square(counts: Counter[Any], outcomes: list[Any]) -> float:
    expected = counts.total() / len(outcomes)
    return sum((counts[outcome] - expected) ** 2 / expected for outcome in outcomes)


def improbable(degrees: int) -> float:
    """A chi-square value that uniform draws exceed about once in a million times."""
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3


@given(st.integers(), st.integers(0, 10**6), st.integers(1, 2000))
def test_an_epoch_holds_every_sample_once(seed: int, epoch: int, length: int) -> None:
    assert sorted(Permutation(seed, epoch, length)) == list(range(length))


def test_huge_datasets_need_no_memory() -> None:
    order = Permutation(1, 2, 10**12)
    drawn = {order[position] for position in range(10**12 - 1000, 10**12)}
    assert len(drawn) == 1000
    assert min(drawn) < 10**11 and max(drawn) > 9 * 10**11


@pytest.mark.parametrize("length", [10, 100, 1000])
@pytest.mark.parametrize("position", [0, 7])
def test_any_sample_may_come_at_any_position(length: int, position: int) -> None:
    by_seed = Counter(Permutation(seed, 0, length)[position] for seed in range(10_000))
    by_epoch = Counter(Permutation(0, epoch, length)[position] for epoch in range(10_000))
    assert chi_square(by_seed, list(range(length))) < improbable(length - 1)
    assert chi_square(by_epoch, list(range(length))) < improbable(length - 1)


def test_all_orders_of_few_samples_are_about_equally_likely() -> None:
    orders = Counter(tuple(Permutation(seed, 3, 4)) for seed in range(10_000))
    assert chi_square(orders, list(permutations(range(4)))) < improbable(23)


def test_neighbours_are_not_related() -> None:
    order = list(Permutation(5, 0, 1000))
    gaps = Counter((after - before) % 1000 // 100 for before, after in pairwise(order))
    assert chi_square(gaps, list(range(10))) < improbable(9)


def test_seeds_and_epochs_give_different_orders() -> None:
    heads = {
        tuple(Permutation(seed, epoch, 10_000)[at] for at in range(4))
        for seed in range(-20, 20)
        for epoch in range(20)
    }
    assert len(heads) == 800


def test_the_order_is_fixed_for_all_time() -> None:
    assert global_batch(0, 0, 0, 1000, 6) == GOLDEN[0]
    assert global_batch(-3, 7, 2, 12345, 6) == GOLDEN[1]
    assert global_batch(0, 0, 1, 10, 4, shuffle=False) == [4, 5, 6, 7]


@given(st.integers(1, 300), st.integers(1, 50), st.booleans(), st.booleans())
def test_batches_partition_the_epoch(length: int, size: int, drop: bool, shuffle: bool) -> None:
    steps = steps_per_epoch(length, size, drop_last=drop)
    batches = [global_batch(1, 2, step, length, size, shuffle=shuffle) for step in range(steps)]
    drawn = [sample for batch in batches for sample in batch]
    assert len(drawn) == len(set(drawn)) == (length // size * size if drop else length)
    assert all(len(batch) == size for batch in batches[:-1])


@given(st.integers(0, 100), st.integers(1, 20))
def test_shares_are_contiguous_and_even(length: int, world_size: int) -> None:
    batch = list(range(length))
    parts = [share(batch, rank, world_size) for rank in range(world_size)]
    assert [sample for part in parts for sample in part] == batch
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_does_not_exist_is_an_error() -> None:
    with pytest.raises(IndexError):
        Permutation(0, 0, 3)[3]
    with pytest.raises(IndexError):
        batch_positions(3, 10, 4)
    with pytest.raises(ValueError, match="rank 2"):
        share([1], 2, 2)


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 103

    def __getitem__(self, index: int) -> int:
        return index


def sampler(rank: int = 0, world_size: int = 1, **changes: Any) -> ElasticBatchSampler:
    options: dict[str, Any] = {"dataset_len": 103, "global_batch_size": 10, "drop_last": False}
    return ElasticBatchSampler(**(options | changes), place=lambda: (rank, world_size))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_every_global_batch(workers: int, world_size: int) -> None:
    loaders = [
        DataLoader(Numbers(), batch_sampler=sampler(rank, world_size, seed=4), num_workers=workers)
        for rank in range(world_size)
    ]
    for epoch in range(2):
        steps = list(zip(*(map(torch.Tensor.tolist, loader) for loader in loaders), strict=True))
        assert len(steps) == len(loaders[0]) == 11
        for number, shares in enumerate(steps):
            assert sum(shares, []) == global_batch(4, epoch, number, 103, 10)


def test_a_batch_that_leaves_a_rank_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="raise global_batch_size or start fewer workers"):
        sampler(world_size=11)
    with pytest.raises(ValueError, match="set drop_last=True or change global_batch_size"):
        sampler(world_size=4)
    assert len(sampler(world_size=4, drop_last=True)) == 10
    with pytest.raises(ValueError, match="do not fill one global batch"):
        sampler(global_batch_size=200, drop_last=True)
    with pytest.raises(ValueError, match="at least 1"):
        sampler(dataset_len=0)


def test_the_epoch_advances_and_can_be_set() -> None:
    batches = sampler()
    first, second = list(batches), list(batches)
    assert (batches.epoch, batches.step) == (2, 0)
    assert first != second
    batches.set_epoch(0)
    assert list(batches) == first
    assert list(batches) == second
    with pytest.raises(ValueError, match="epoch"):
        batches.set_epoch(-1)


def test_iterating_again_goes_on_where_it_was_left() -> None:
    whole, broken = sampler(), sampler()
    seen = []
    for batch in broken:
        seen.append(batch)
        if len(seen) == 4:
            break
    broken.set_epoch(0)
    assert broken.state_dict()["step"] == 4
    assert seen + list(broken) == list(whole)


def test_a_saved_position_is_restored_for_another_world_size() -> None:
    saved = sampler(seed=9)
    iterator = iter(saved)
    for _ in range(4):
        next(iterator)
    state = saved.state_dict()
    rest = list(iterator)
    shares = []
    for rank in range(2):
        restored = sampler(rank, 2, seed=9)
        restored.load_state_dict(state)
        shares.append(list(restored))
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == rest


def test_a_state_of_other_data_is_refused() -> None:
    state = sampler(seed=1).state_dict()
    with pytest.raises(ValueError, match="seed=1, but it is 2"):
        sampler(seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="step 11"):
        sampler(seed=1).load_state_dict(state | {"step": 11})


def test_with_a_consumer_the_position_is_what_it_has_trained() -> None:
    batches = sampler()
    batches.track()
    loader = iter(DataLoader(Numbers(), batch_sampler=batches, num_workers=1, prefetch_factor=4))
    assert batches.take() is not None
    assert batches.state_dict()["step"] == 1
    next(loader)
    taken = batches.take()
    assert taken is not None and (taken.step, taken.local_samples, taken.total_samples) == (1, 10, 10)
    for _ in loader:
        pass
    assert batches.state_dict()["step"] == 2
    rest = list(batches)
    assert rest == [global_batch(0, 0, step, 103, 10) for step in range(2, 11)]
    while batches.take() is not None:
        pass
    assert (batches.epoch, batches.step) == (1, 0)


def test_what_an_abandoned_iteration_read_ahead_is_forgotten() -> None:
    batches = sampler()
    batches.track()
    abandoned = iter(batches)
    next(abandoned)
    fresh = iter(batches)
    next(abandoned)
    assert batches.take() is None
    next(fresh)
    taken = batches.take()
    assert taken is not None and taken.step == 0
