"""N ranks at batch B/N train the parameters that one process trains at batch B."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from ringps.collectives import Communicator
from ringps.data import ElasticBatchSampler
from ringps.optim import DistributedOptimizer
from ringps.testing import run_ring
from tests.training import assert_same_bits, numbers, parameters_of, perceptron

STEPS = 50
BATCH = 12

OPTIMIZERS: dict[str, Callable[[Iterator[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    place: tuple[int, int],
    *,
    clip: bool,
    micro_batches: int,
    scheduled: bool,
    no_sync: bool = False,
) -> list[torch.Tensor]:
    """A training script as people write it; `place` says which part of each batch it takes."""
    rank, world_size = place
    dtype = next(model.parameters()).dtype
    inputs = numbers(STEPS, micro_batches, BATCH, 6, seed=2, dtype=dtype)
    targets = numbers(STEPS, micro_batches, BATCH, 3, seed=3, dtype=dtype)
    part = slice(BATCH * rank // world_size, BATCH * (rank + 1) // world_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS) if scheduled else None
    for step in range(STEPS):
        optimizer.zero_grad()

        def backward(micro: int, step: int = step) -> None:
            output = model(inputs[step, micro, part])
            loss = mse_loss(output, targets[step, micro, part]) / micro_batches
            loss.backward()

        for micro in range(micro_batches):
            if no_sync and isinstance(optimizer, DistributedOptimizer) and micro + 1 < micro_batches:
                with optimizer.no_sync():
                    backward(micro)
            else:
                backward(micro)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return parameters_of(model)


PLAIN = (False, 1, False, False)
ACCUMULATE = (True, 3, True, False)
NO_SYNC = (True, 2, True, True)


@pytest.mark.parametrize(
    ("world_size", "name", "clip", "micro_batches", "scheduled", "no_sync"),
    [
        *((3, name, *options) for name in sorted(OPTIMIZERS) for options in (PLAIN, ACCUMULATE)),
        *((world_size, "adamw", *options) for world_size in (1, 2, 4) for options in (ACCUMULATE, NO_SYNC)),
    ],
)
def test_training_equals_one_process(
    world_size: int, name: str, clip: bool, micro_batches: int, scheduled: bool, no_sync: bool
) -> None:
    alone = perceptron()
    options = {"clip": clip, "micro_batches": micro_batches, "scheduled": scheduled, "no_sync": no_sync}
    expected = train(alone, OPTIMIZERS[name](alone.parameters()), (0, 1), **options)

    def script(ring: Communicator) -> list[torch.Tensor]:
        model = perceptron(seed=ring.rank)
        optimizer = DistributedOptimizer(
            OPTIMIZERS[name](model.parameters()),
            model,
            accumulate_steps=1 if no_sync else micro_batches,
            bucket_cap_bytes=512,
            first_bucket_bytes=64,
            communicator=ring,
        )
        return train(model, optimizer, (ring.rank, ring.world_size), **options)

    ranks = run_ring(world_size, script)
    assert_same_bits(ranks)
    torch.testing.assert_close(ranks[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_training_in_float32_equals_one_process(name: str) -> None:
    alone = perceptron(dtype=torch.float32)
    options = {"clip": True, "micro_batches": 1, "scheduled": True}
    expected = train(alone, OPTIMIZERS[name](alone.parameters()), (0, 1), **options)

    def script(ring: Communicator) -> list[torch.Tensor]:
        model = perceptron(seed=ring.rank, dtype=torch.float32)
        optimizer = DistributedOptimizer(OPTIMIZERS[name](model.parameters()), model, communicator=ring)
        return train(model, optimizer, (ring.rank, ring.world_size), **options)

    ranks = run_ring(3, script)
    assert_same_bits(ranks)
    torch.testing.assert_close(ranks[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulate_steps", [1, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_uneven_shares_are_weighted_by_their_samples(
    world_size: int, accumulate_steps: int, workers: int
) -> None:
    """Batches of 10 among 3 or 4 ranks, and a last one of 7, which comes inside an accumulation."""
    dataset = TensorDataset(numbers(47, 6, seed=2), numbers(47, 3, seed=3))
    # The ranks are threads: while one forks, others hold locks, which nobody would release in the child.
    clean = multiprocessing.get_context("forkserver")
    clean.set_forkserver_preload(["torch"])

    def script(ring: Communicator | None) -> list[torch.Tensor]:
        place = (0, 1) if ring is None else (ring.rank, ring.world_size)
        model = perceptron()
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        sampler = ElasticBatchSampler(len(dataset), 10, seed=5, place=lambda: place)
        if ring is not None:
            optimizer = DistributedOptimizer(
                optimizer, model, sampler=sampler, accumulate_steps=accumulate_steps, communicator=ring
            )
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            multiprocessing_context=clean if workers else None,
        )
        backwards = 0
        for _ in range(3):
            for inputs, targets in loader:
                loss = mse_loss(model(inputs), targets) / accumulate_steps
                loss.backward()
                backwards += 1
                if backwards % accumulate_steps == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        assert (sampler.epoch, sampler.step) == (3, 0)
        return parameters_of(model)

    expected = script(None)
    ranks = run_ring(world_size, script)
    assert_same_bits(ranks)
    torch.testing.assert_close(ranks[0], expected, rtol=1e-9, atol=1e-9)


def lbfgs(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=6, line_search_fn="strong_wolfe")


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_line_searches_take_the_same_decisions_everywhere(world_size: int, sampled: bool) -> None:
    inputs, targets = numbers(36, 6, seed=2), numbers(36, 3, seed=3)

    def train_lbfgs(
        model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[list[int]]
    ) -> list[torch.Tensor]:
        losses = []
        for batch in batches:

            def closure(batch: list[int] = batch) -> torch.Tensor:
                optimizer.zero_grad()
                loss = mse_loss(model(inputs[batch]), targets[batch])
                loss.backward()
                return loss

            losses.append(torch.as_tensor(optimizer.step(closure)).detach())
        return [*parameters_of(model), *losses]

    def script(ring: Communicator) -> list[torch.Tensor]:
        model = perceptron(seed=ring.rank)
        place = (ring.rank, ring.world_size)
        sampler = ElasticBatchSampler(36, 9, seed=5, place=lambda: place)
        optimizer = DistributedOptimizer(
            lbfgs(model), model, sampler=sampler if sampled else None, communicator=ring
        )
        return train_lbfgs(model, optimizer, list(sampler) if sampled else halves(*place))

    def halves(rank: int, world_size: int) -> list[list[int]]:
        size = 12 // world_size
        return [list(range(start + rank * size, start + (rank + 1) * size)) for start in (0, 12, 24)]

    alone = perceptron()
    whole = list(ElasticBatchSampler(36, 9, seed=5, place=lambda: (0, 1))) if sampled else halves(0, 1)
    expected = train_lbfgs(alone, lbfgs(alone), whole)
    ranks = run_ring(world_size, script)
    assert_same_bits(ranks)
    torch.testing.assert_close(ranks[0], expected, rtol=1e-6, atol=1e-6)
