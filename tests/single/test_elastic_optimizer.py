"""`DistributedOptimizer` in an elastic ring of threads: losses amid a step, parameters that differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ringps import DistributedOptimizer
from ringps.collectives import ElasticCommunicator
from ringps.collectives.backend import Work
from ringps.config import Recovery
from ringps.data.sampler import ElasticBatchSampler
from ringps.errors import DivergedError, PeerLostError
from tests.elastic_rings import ElasticRing, Killed, bytes_of, listening
from tests.training import filled

ALWAYS = Recovery(check_parameters_every=1)
SAMPLES = 24
INPUTS = filled(torch.nn.Linear(3, SAMPLES), seed=4).weight.detach().clone()


class Trainer:
    """A tiny model on one rank. Each of its samples' gradients is that sample itself."""

    def __init__(self, ring: ElasticCommunicator, *, sampled: bool = False) -> None:
        self.ring = ring
        self.model = filled(torch.nn.Linear(3, 1, bias=False))
        self.sampler: ElasticBatchSampler | None = None
        if sampled:
            self.sampler = ElasticBatchSampler(
                SAMPLES, 12, shuffle=False, place=lambda: (ring.rank, ring.world_size)
            )
        inner = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.5)
        self.optimizer = DistributedOptimizer(inner, self.model, sampler=self.sampler, communicator=ring)

    def step(self, samples: list[int]) -> torch.Tensor:
        """Train these; the gradient that was applied."""
        self.optimizer.zero_grad()
        self.model(INPUTS[samples]).mean().backward()
        gradient = self.model.weight.grad
        assert gradient is not None
        found = gradient.clone()
        self.optimizer.step()
        return found


def mean_of(samples: list[int]) -> torch.Tensor:
    return INPUTS[samples].mean(0, keepdim=True)


def sick_at(worker_id: int, step: int) -> Callable[[int, Trainer, int], None]:
    """Worker `worker_id` finds its parameters changed before that step."""

    def upset(own: int, trainer: Trainer, now: int) -> None:
        if own == worker_id and now == step:
            with torch.no_grad():
                trainer.model.weight[0, 1] += 1e-6

    return upset


def train(upset: Callable[[int, Trainer, int], None], steps: int = 3) -> Callable[..., Any]:
    """A script: one sample a rank and step, that of its worker's id; all gradients, and the parameters."""

    def script(worker_id: int, ring: ElasticCommunicator) -> tuple[list[torch.Tensor], bytes]:
        trainer = Trainer(ring)
        gradients = []
        for step in range(1, steps + 1):
            upset(worker_id, trainer, step)
            gradients.append(trainer.step([worker_id]))
        return gradients, bytes_of(trainer.model.weight)

    return script


@pytest.mark.parametrize("size", [3, 4])
def test_parameters_that_differ_are_healed_and_that_rank_sits_out_the_step(size: int) -> None:
    ring = ElasticRing(size, ALWAYS)
    results = ring.run(train(sick_at(1, 2)))
    everyone, others = list(range(size)), [one for one in range(size) if one != 1]
    for gradients, _ in results.values():
        for gradient, samples in zip(gradients, (everyone, others, everyone), strict=True):
            torch.testing.assert_close(gradient, mean_of(samples))
    assert len({parameters for _, parameters in results.values()}) == 1
    assert ring.notes == [{"event": "diverged", "step": 2, "what": "parameters", "worker_ids": [1]}]


def test_without_a_majority_nobody_can_tell_whose_parameters_are_right() -> None:
    def script(worker_id: int, ring: ElasticCommunicator) -> tuple[str, tuple[int, ...]]:
        with pytest.raises(DivergedError, match="nobody can tell which rank is right") as caught:
            train(sick_at(1, 2))(worker_id, ring)
        return str(caught.value), caught.value.worker_ids

    for text, wrong in ElasticRing(2, ALWAYS).run(script).values():
        assert "Restart from a checkpoint" in text
        assert wrong == ()


def test_parameters_that_differ_end_the_job_where_that_is_wanted() -> None:
    def script(worker_id: int, ring: ElasticCommunicator) -> tuple[str, tuple[int, ...]]:
        with pytest.raises(DivergedError) as caught:
            train(sick_at(1, 2))(worker_id, ring)
        return str(caught.value), caught.value.worker_ids

    stop = Recovery(check_parameters_every=1, on_divergence="stop")
    for text, wrong in ElasticRing(3, stop).run(script).values():
        assert "rank 1 (worker 1 on here) (on_divergence=stop)" in text
        assert wrong == (1,)


def test_parameters_are_compared_as_often_as_asked() -> None:
    """A difference stays unnoticed until the next comparison."""
    ring = ElasticRing(3, Recovery(check_parameters_every=4))
    ring.run(train(sick_at(2, 2), steps=5))
    assert [note["step"] for note in ring.notes] == [4]
    never = ElasticRing(3, Recovery(check_parameters_every=0))
    results = never.run(train(sick_at(2, 2), steps=5))
    assert never.notes == []
    assert results[0][1] == results[1][1] != results[2][1]


def test_momentum_is_healed_too() -> None:
    def upset(own: int, trainer: Trainer, step: int) -> None:
        if own == 0 and step == 2:
            trainer.optimizer.state[trainer.model.weight]["momentum_buffer"].mul_(3)

    results = ElasticRing(3, ALWAYS).run(train(upset, steps=4))
    assert len({parameters for _, parameters in results.values()}) == 1


@pytest.mark.parametrize("at", ["bucket", "vote"])
@pytest.mark.parametrize("victim", [0, 1, 2, 3])
def test_a_member_is_lost_in_the_step_in_which_another_was_healed(victim: int, at: str) -> None:
    """Who sits out is a worker, whatever its rank is after the loss."""
    sick = 2

    def listen(worker_id: int, point: str, passed: dict[str, Any]) -> None:
        if point == at and passed["step"] == 2 and passed["attempt"] == 1 and worker_id == victim:
            raise Killed

    ring = ElasticRing(4, ALWAYS)
    with listening(listen):
        results = ring.run(train(sick_at(sick, 2)))
    assert len({parameters for _, parameters in results.values()}) == 1
    gradient = next(iter(results.values()))[0][1]
    left = [one for one in range(4) if one not in (victim, sick)]
    before = [one for one in range(4) if one != sick]
    assert any(torch.allclose(gradient, mean_of(samples)) for samples in (left, before)), gradient


def test_survivors_that_missed_the_votes_still_find_out_whose_parameters_were_wrong() -> None:
    """Worker 0 dies with all votes in its hands; no other has them, and all hold the same result."""
    voting: set[int] = set()

    def listen(worker_id: int, point: str, passed: dict[str, Any]) -> None:
        if point == "vote" and passed["step"] == 2 and passed["attempt"] == 0:
            voting.add(worker_id)

    def tamper(worker_id: int, when: str, work: Work) -> None:
        if when == "after" and worker_id in voting:
            voting.remove(worker_id)
            if worker_id == 0:
                raise Killed
            raise PeerLostError(rank=0, worker_id=0, host="here", reason="a test")

    ring = ElasticRing(4, ALWAYS, tamper=tamper)
    with listening(listen):
        results = ring.run(train(sick_at(2, 2)))
    assert results.keys() == {1, 2, 3}
    for gradients, _ in results.values():
        torch.testing.assert_close(gradients[1], mean_of([1, 3]))
    assert len({parameters for _, parameters in results.values()}) == 1
    assert [note["step"] for note in ring.notes if note["event"] == "diverged"] == [2]


def sampled(upset: Callable[[int, Trainer, int], None], steps: int) -> Callable[..., Any]:
    """A script: batches of a sampler that is asked anew before each step, and what it has booked."""

    def script(worker_id: int, ring: ElasticCommunicator) -> tuple[list[torch.Tensor], int, int, bytes]:
        trainer = Trainer(ring, sampled=True)
        assert trainer.sampler is not None
        trainer.sampler.redraws = True
        gradients, owed = [], 0
        for step in range(1, steps + 1):
            samples = next(iter(trainer.sampler))
            upset(worker_id, trainer, step)
            gradients.append(trainer.step(samples))
            owed = max(owed, trainer.sampler.statistics().owed_samples)
        return gradients, owed, trainer.sampler.epoch, bytes_of(trainer.model.weight)

    return script


def test_samples_of_a_rank_that_sat_out_are_trained_later() -> None:
    ring = ElasticRing(3, ALWAYS)
    results = ring.run(sampled(sick_at(1, 1), 3))
    for gradients, owed, epoch, _ in results.values():
        torch.testing.assert_close(gradients[0], mean_of([*range(4), *range(8, 12)]))
        torch.testing.assert_close(gradients[1], mean_of(list(range(12, 24))))
        torch.testing.assert_close(gradients[2], mean_of(list(range(4, 8))))
        assert (owed, epoch) == (4, 1)
    assert len({one[3] for one in results.values()}) == 1


@pytest.mark.parametrize("at", ["bucket", "vote"])
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_samples_count_once_if_a_member_is_lost_when_another_was_healed(victim: int, at: str) -> None:
    def listen(worker_id: int, point: str, passed: dict[str, Any]) -> None:
        if point == at and passed["step"] == 1 and passed["attempt"] == 1 and worker_id == victim:
            raise Killed

    def script(worker_id: int, ring: ElasticCommunicator) -> tuple[list[int], torch.Tensor, bytes]:
        trainer = Trainer(ring, sampled=True)
        sampler = trainer.sampler
        assert sampler is not None
        sampler.redraws = True
        counts, total, before = [], torch.zeros(1, 3), 0
        for step in range(1, 9):
            samples = next(iter(sampler))
            sick_at(2, 1)(worker_id, trainer, step)
            gradient = trainer.step(samples)
            after = SAMPLES if sampler.epoch else sampler.statistics().trained_samples
            counts.append(after - before)
            total, before = total + (after - before) * gradient, after
            if sampler.epoch:
                break
        return counts, total, bytes_of(trainer.model.weight)

    with listening(listen):
        results = ElasticRing(4, ALWAYS).run(script)
    for counts, total, _ in results.values():
        # Who has not heard of the difference before the loss finds it in the next step.
        assert sum(counts) == SAMPLES
        assert len(counts) in (3, 4)
        torch.testing.assert_close(total, INPUTS.sum(0, keepdim=True))
    assert len({one[2] for one in results.values()}) == 1


@pytest.mark.parametrize("point", ["step", "bucket", "vote", "voted", "committed"])
def test_a_step_that_loses_a_member_is_finished_by_the_others(point: str) -> None:
    def listen(worker_id: int, at: str, passed: dict[str, Any]) -> None:
        if at == point and passed["step"] == 2 and worker_id == 1:
            raise Killed

    ring = ElasticRing(3)
    with listening(listen):
        results = ring.run(train(lambda *_: None))
    assert set(results) == {0, 2}
    assert len({parameters for _, parameters in results.values()}) == 1
    for gradients, _ in results.values():
        assert len(gradients) == 3
        torch.testing.assert_close(gradients[0], mean_of([0, 1, 2]))
        torch.testing.assert_close(gradients[2], mean_of([0, 2]))
        given = ([0, 2], [0, 1, 2])
        possible = {"step": given[:1], "bucket": given[:1], "vote": given}.get(point, given[1:])
        assert any(torch.allclose(gradients[1], mean_of(samples)) for samples in possible)


@pytest.mark.parametrize("size", [2, 3])
def test_a_bit_that_flips_in_a_bucket_is_never_applied(size: int) -> None:
    flipped: list[str] = []

    def tamper(worker_id: int, when: str, work: Work) -> None:
        if when == "reduced" and worker_id == 0 and work.label == "step 2, bucket 0" and not flipped:
            flipped.append(work.label)
            work.output.view(torch.uint8)[0] ^= 1

    ring = ElasticRing(size, tamper=tamper)
    results = ring.run(train(lambda *_: None))
    for gradients, _ in results.values():
        assert all(torch.allclose(gradient, mean_of(list(range(size)))) for gradient in gradients)
        assert torch.equal(gradients[0], gradients[1])
    assert flipped
    assert len({parameters for _, parameters in results.values()}) == 1
    assert ring.notes == [{"event": "diverged", "step": 2, "what": "reduced bits", "worker_ids": [0]}]
