"""The wrapper is an optimizer: whatever is done with one works as with the one inside."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from ringps.collectives import Communicator, use
from ringps.data import ElasticBatchSampler
from ringps.optim import DistributedOptimizer
from ringps.testing import MemoryRing, run_ring
from tests.training import assert_same_bits, gradients_of, numbers, parameters_of, perceptron


def backward(model: torch.nn.Module, seed: int = 1, scale: float = 1.0) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    loss = (model(numbers(4, 6, seed=seed, dtype=dtype)) ** 2).mean() * scale
    loss.backward()
    return loss.detach()


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def alone(script: Callable[[Communicator], Any]) -> Any:
    return run_ring(1, script)[0]


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.5)],
        [3],
    ),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
}


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_schedulers_do_as_with_the_plain_optimizer(name: str) -> None:
    def rates(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[float]:
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for _ in range(7):
            backward(model)
            optimizer.step()
            scheduler.step(*[1.0] if name == "plateau" else [])
            seen.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        again = SCHEDULERS[name](optimizer)
        again.load_state_dict(scheduler.state_dict())
        assert again.state_dict() == scheduler.state_dict()
        return seen

    def script(ring: Communicator) -> list[float]:
        model = perceptron()
        return rates(DistributedOptimizer(adam(model), model, communicator=ring), model)

    plain = perceptron()
    with warnings.catch_warnings(record=True) as expected_warnings:
        warnings.simplefilter("always")
        expected = rates(adam(plain), plain)
    with warnings.catch_warnings(record=True) as seen_warnings:
        warnings.simplefilter("always")
        assert run_ring(2, script) == [expected] * 2
    unique = {str(one.message) for one in expected_warnings}
    assert {str(one.message) for one in seen_warnings} == unique


def test_a_scheduler_of_the_inner_optimizer_goes_on_working() -> None:
    def script(ring: Communicator) -> float:
        model = perceptron()
        inner = adam(model)
        scheduler = lr_scheduler.StepLR(inner, 1)
        optimizer = DistributedOptimizer(inner, model, communicator=ring)
        backward(model)
        optimizer.step()
        scheduler.step()
        return float(optimizer.param_groups[0]["lr"])

    assert alone(script) == pytest.approx(0.001)


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_on_one_rank_makes_all_skip_the_step(fused: bool) -> None:
    def script(ring: Communicator) -> list[torch.Tensor]:
        model = perceptron(dtype=torch.float32)
        inner = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        optimizer = DistributedOptimizer(inner, model, communicator=ring)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scales = []
        for step in range(4):
            before = parameters_of(model)
            optimizer.zero_grad()
            factor = float("inf") if (step, ring.rank) == (1, 2) else 1.0
            loss = (model(numbers(4, 6, seed=ring.rank, dtype=torch.float32)) ** 2).mean()
            scaler.scale(loss * factor).backward()
            if step == 2:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            same = all(map(torch.equal, before, parameters_of(model)))
            assert same == (step == 1)
        assert scales == [64.0, 32.0, 32.0, 32.0]
        assert optimizer.statistics().steps == 3
        return parameters_of(model)

    assert_same_bits(run_ring(3, script))


def test_states_are_those_of_the_plain_optimizer_both_ways() -> None:
    def script(ring: Communicator) -> None:
        model, plain_model = perceptron(), perceptron()
        plain = adam(plain_model)
        optimizer = DistributedOptimizer(adam(model), model, communicator=ring)
        for one, other in ((optimizer, plain), (plain, optimizer)):
            backward(model)
            backward(plain_model)
            optimizer.step()
            plain.step()
            assert_equal_states(optimizer.state_dict(), plain.state_dict())
            other.load_state_dict(copy.deepcopy(one.state_dict()))
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"] = 0.5
        backward(model)
        backward(plain_model)
        optimizer.step()
        plain.step()
        assert_same_bits([parameters_of(model), parameters_of(plain_model)])

    alone(script)


def assert_equal_states(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["param_groups"] == other["param_groups"]
    torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)


def test_everything_else_is_the_inner_optimizers() -> None:
    def script(ring: Communicator) -> None:
        model = perceptron()
        inner = torch.optim.SGD(
            [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[3].weight}], 0.5
        )
        optimizer = DistributedOptimizer(inner, model, communicator=ring)
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert optimizer.param_groups is inner.param_groups
        assert optimizer.state is inner.state
        assert optimizer.defaults is inner.defaults
        assert repr(inner) in repr(optimizer)
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = optimizer.no_such_thing

        called: list[str] = []
        handles = [
            optimizer.register_step_pre_hook(lambda *_: called.append("before step")),
            optimizer.register_step_post_hook(lambda *_: called.append("after step")),
            optimizer.register_state_dict_pre_hook(lambda *_: called.append("before state")),
            optimizer.register_state_dict_post_hook(lambda *_: called.append("after state")),
            optimizer.register_load_state_dict_pre_hook(lambda *_: called.append("before load")),
            optimizer.register_load_state_dict_post_hook(lambda *_: called.append("after load")),
        ]
        backward(model)
        for _ in range(2):
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            for handle in handles:
                handle.remove()
        assert called == [
            f"{when} {what}" for what in ("step", "state", "load") for when in ("before", "after")
        ]

    alone(script)


def test_it_cannot_be_copied_pickled_or_wrapped_again() -> None:
    def script(ring: Communicator) -> None:
        model = perceptron()
        optimizer = DistributedOptimizer(adam(model), model, communicator=ring)
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="save its state_dict"):
                attempt(optimizer)
        with pytest.raises(ValueError, match="wrapped already"):
            DistributedOptimizer(optimizer, model, communicator=ring)
        with pytest.raises(ValueError, match="accumulate_steps must be at least 1"):
            DistributedOptimizer(adam(model), model, accumulate_steps=0, communicator=ring)

    alone(script)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_closure_gives_the_mean_loss(world_size: int) -> None:
    def script(ring: Communicator) -> list[torch.Tensor]:
        model = perceptron()
        optimizer = DistributedOptimizer(adam(model), model, communicator=ring)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            return backward(model, seed=ring.rank)

        loss = optimizer.step(closure)
        assert isinstance(optimizer.step(lambda: float(closure())), float)
        assert optimizer.step(lambda: closure() and None) is None
        return [loss, *parameters_of(model)]

    ranks = run_ring(world_size, script)
    assert_same_bits(ranks)
    losses = [backward(perceptron(), seed=rank) for rank in range(world_size)]
    torch.testing.assert_close(ranks[0][0], torch.stack(losses).mean())


def test_steps_are_reported_and_counted() -> None:
    steps: list[int] = []

    class Reporting:
        def __init__(self, ring: Communicator) -> None:
            self._ring = ring

        def __getattr__(self, name: str) -> Any:
            return getattr(self._ring, name)

        def record_step(self, step: int) -> None:
            if self._ring.rank == 0:
                steps.append(step)

    def script(ring: Communicator) -> None:
        model = perceptron()
        optimizer = DistributedOptimizer(
            adam(model),
            model,
            accumulate_steps=2,
            communicator=Reporting(ring),
        )
        for _ in range(3):
            backward(model)
            backward(model)
            optimizer.step()
        statistics = optimizer.statistics()
        assert (statistics.steps, statistics.passes, statistics.late_passes) == (3, 3, 0)
        assert statistics.buckets == 1
        assert statistics.bucket_bytes > sum(one.nbytes for one in model.parameters())
        assert statistics.wait_s > 0

    run_ring(2, script)
    assert steps == [1, 2, 3]


def test_the_ring_is_the_processes_by_default() -> None:
    model = perceptron()
    with MemoryRing(1) as ring:
        use(ring.communicators[0])
        try:
            optimizer = DistributedOptimizer(adam(model), model)
            backward(model)
            optimizer.step()
        finally:
            use(None)
    assert optimizer.statistics().steps == 1


def test_alone_gradients_are_left_as_they_are() -> None:
    def script(ring: Communicator) -> None:
        model, plain = perceptron(), perceptron()
        DistributedOptimizer(adam(model), model, communicator=ring)
        optimizer = DistributedOptimizer(adam(model), model, communicator=ring)
        for one in (model, plain):
            backward(one)
            backward(one)
        assert all(map(torch.equal, gradients_of(model), gradients_of(plain)))
        optimizer.step()
        assert optimizer.statistics().bucket_bytes == 0

    alone(script)


def test_every_backward_needs_a_batch_of_the_sampler() -> None:
    def script(ring: Communicator) -> None:
        model = perceptron()
        sampler = ElasticBatchSampler(20, 4, place=lambda: (ring.rank, ring.world_size))
        optimizer = DistributedOptimizer(adam(model), model, sampler=sampler, communicator=ring)
        optimizer.step()
        batches = iter(sampler)
        next(batches)
        backward(model)
        assert sampler.step == 1
        with pytest.raises(RuntimeError, match="more often than the sampler yielded"):
            backward(model)
        next(batches)
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        next(batches)
        optimizer.step()
        assert sampler.step == 3

    run_ring(2, script)


def test_a_rank_that_skips_its_batch_stays_in_step_with_the_sampler() -> None:
    def script(ring: Communicator) -> list[torch.Tensor]:
        model = perceptron()
        sampler = ElasticBatchSampler(17, 5, seed=1, place=lambda: (ring.rank, ring.world_size))
        optimizer = DistributedOptimizer(adam(model), model, sampler=sampler, communicator=ring)
        data = numbers(17, 6)
        for number, batch in enumerate(sampler):
            optimizer.zero_grad()
            if (number, ring.rank) != (1, 0):
                (model(data[batch]) ** 2).mean().backward()
            optimizer.step()
        assert (sampler.epoch, sampler.step) == (1, 0)
        return parameters_of(model)

    assert_same_bits(run_ring(2, script))
