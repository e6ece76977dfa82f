"""`TrainState` in a ring of one: its loop, its state, and its complaints."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ringps
from ringps.checkpoint.tree import flatten, unflatten
from tests.training import filled, numbers, parameters_of

SAMPLES = 22
BATCH = 5


@pytest.fixture(autouse=True)
def ring() -> Iterator[None]:
    ringps.init()
    yield
    ringps.shutdown()


class Job:
    """A script's objects."""

    def __init__(self, seed: int = 0) -> None:
        self.model = torch.nn.Sequential(
            filled(torch.nn.Linear(3, 4), seed), torch.nn.BatchNorm1d(4), filled(torch.nn.Linear(4, 1), seed)
        )
        inner = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.sampler = ringps.ElasticBatchSampler(SAMPLES, BATCH, seed=2)
        self.optimizer = ringps.DistributedOptimizer(inner, self.model, sampler=self.sampler)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        self.loader = DataLoader(
            TensorDataset(numbers(SAMPLES, 3, dtype=torch.float32), torch.arange(SAMPLES)),
            batch_sampler=self.sampler,
        )
        self.state = ringps.TrainState(
            model=self.model,
            optimizer=self.optimizer,
            sampler=self.sampler,
            scheduler=self.schedule,
            scaler=self.scaler,
        )

    def train(self, inputs: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(inputs).square().mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()

    def run(self, until: int) -> tuple[list[int], list[list[int]]]:
        """The steps that were yielded, and the samples of each."""
        steps, samples = [], []
        for step, (inputs, indices) in self.state.steps(self.loader, until=until):
            self.train(inputs)
            steps.append(step)
            samples.append(indices.tolist())
        return steps, samples


def test_steps_count_from_one_and_end_with_the_last() -> None:
    job = Job()
    assert job.state.step == 0
    assert job.run(3)[0] == [1, 2, 3]
    assert job.state.step == 3
    assert job.run(3)[0] == []
    assert job.run(5)[0] == [4, 5]


def test_the_loader_is_iterated_over_again_for_each_epoch() -> None:
    job = Job()
    steps, samples = job.run(12)
    assert steps == list(range(1, 13))
    assert [len(batch) for batch in samples] == [5, 5, 5, 5, 2, 5, 5, 5, 5, 2, 5, 5]
    first, second = sum(samples[:5], []), sum(samples[5:10], [])
    assert sorted(first) == sorted(second) == list(range(SAMPLES))
    assert first != second
    assert (job.sampler.epoch, job.sampler.step) == (2, 2)


def test_a_break_leaves_the_step_that_was_not_applied() -> None:
    job = Job()
    for step, (inputs, _) in job.state.steps(job.loader, until=9):
        if step == 4:
            break
        job.train(inputs)
    assert job.state.step == 3
    assert job.run(6)[0] == [4, 5, 6]


def test_any_iterable_will_do_and_no_sampler() -> None:
    model = filled(torch.nn.Linear(3, 1))
    optimizer = ringps.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    state = ringps.TrainState(model=model, optimizer=optimizer)
    found = list(state.steps(["a", "b"], until=5))
    assert found == [(1, "a"), (2, "b"), (3, "a"), (4, "b"), (5, "a")]
    assert state.state_dict().keys() == {"step", "model", "optimizer"}


def test_a_run_that_goes_on_from_a_state_is_as_one_that_never_stopped() -> None:
    whole, before, after = Job(), Job(), Job(seed=5)
    _, samples = whole.run(11)
    _, first = before.run(4)
    kept = flatten(before.state.state_dict())  # as it travels to a joining worker
    after.state.load_state_dict(unflatten(kept.skeleton, [one.clone() for one in kept.tensors]))
    assert after.state.step == 4
    steps, rest = after.run(11)
    assert steps == list(range(5, 12))
    assert first + rest == samples
    for expected, found in zip(parameters_of(whole.model), parameters_of(after.model), strict=True):
        assert torch.equal(expected, found)
    ends, again = whole.state.state_dict(), after.state.state_dict()
    for part in ("step", "sampler", "scheduler", "scaler"):
        assert ends[part] == again[part], part
    assert torch.equal(whole.model[1].running_mean, after.model[1].running_mean)


def test_the_state_has_a_part_of_each_object() -> None:
    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.count = state_dict["count"]

    job, counter = Job(), Counter()
    state = ringps.TrainState(model=job.model, optimizer=job.optimizer, sampler=job.sampler, tokens=counter)
    counter.count = 7
    kept = state.state_dict()
    assert kept.keys() == {"step", "model", "optimizer", "sampler", "tokens"}
    counter.count = 0
    state.load_state_dict(kept)
    assert counter.count == 7
    del kept["tokens"]
    with pytest.raises(KeyError, match="tokens"):
        state.load_state_dict(kept)


def test_a_part_of_the_wrong_kind_is_refused() -> None:
    job = Job()
    plain: Any = torch.optim.SGD(job.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"must be a ringps.DistributedOptimizer; wrap yours first"):
        ringps.TrainState(model=job.model, optimizer=plain)
    stateless: Any = object()
    with pytest.raises(ValueError, match=r"scheduler has no state_dict\(\) and load_state_dict\(\)"):
        ringps.TrainState(model=job.model, optimizer=job.optimizer, scheduler=stateless)
    with pytest.raises(ValueError, match=r"tokens has no state_dict"):
        ringps.TrainState(model=job.model, optimizer=job.optimizer, tokens=stateless)


def test_a_loader_without_batches_is_an_error_and_no_endless_loop() -> None:
    job = Job()
    with pytest.raises(ValueError, match="the loader yields no batch"):
        list(job.state.steps([], until=3))


def test_a_ring_that_nobody_can_leave_keeps_its_signal_handlers() -> None:
    job = Job()
    for _ in job.state.steps(["a"], until=1):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("workers", [0, 2])
def test_the_position_is_that_of_what_was_trained_without_the_optimizer_knowing_the_sampler(
    workers: int,
) -> None:
    def build() -> tuple[ringps.TrainState, DataLoader[Any]]:
        model = filled(torch.nn.Linear(3, 1))
        optimizer = ringps.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        sampler = ringps.ElasticBatchSampler(SAMPLES, BATCH, seed=2)
        data = TensorDataset(torch.arange(SAMPLES))
        loader: DataLoader[Any] = DataLoader(data, batch_sampler=sampler, num_workers=workers)
        return ringps.TrainState(model=model, optimizer=optimizer, sampler=sampler), loader

    def run(state: ringps.TrainState, loader: DataLoader[Any], until: int) -> list[list[int]]:
        return [indices.tolist() for _, (indices,) in state.steps(loader, until=until)]

    whole = run(*build(), until=12)
    state, loader = build()
    before = run(state, loader, until=7)
    saved = state.state_dict()
    assert (saved["sampler"]["epoch"], saved["sampler"]["step"]) == (1, 2), "not what was read ahead"
    state, loader = build()
    state.load_state_dict(saved)
    assert before + run(state, loader, until=12) == whole
