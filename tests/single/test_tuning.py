"""Bucket sizes are tried on the first steps, and the best is kept, alike on all ranks."""

from __future__ import annotations

import copy

import pytest
import torch

import ringps
from ringps.buckets.tuning import CANDIDATES_BYTES, MIB, CapTuner
from ringps.collectives import Communicator
from ringps.testing import run_ring

DURATIONS_S = {2 * MIB: 0.3, 8 * MIB: 0.1, 25 * MIB: 0.2, 64 * MIB: 0.4}


def test_every_candidate_gets_its_passes_and_the_first_of_each_does_not_count() -> None:
    tuner = CapTuner(10**9, passes_each=3)
    assert tuner.candidates == CANDIDATES_BYTES
    caps = []
    while not tuner.tried:
        caps.append(tuner.cap_bytes)
        first = len(caps) % 3 == 1
        tuner.record(9.0 if first else DURATIONS_S[tuner.cap_bytes])
    assert caps == [cap for cap in CANDIDATES_BYTES for _ in range(3)]
    assert tuner.durations_s() == list(DURATIONS_S.values())
    cap, reason = tuner.choose(tuner.durations_s())
    assert cap == 8 * MIB
    assert "8 MiB 100.0 ms" in reason
    assert tuner.cap_bytes == CANDIDATES_BYTES[-1]


@pytest.mark.parametrize(
    ("total_bytes", "candidates"),
    [(1, [2]), (2 * MIB, [2]), (2 * MIB + 1, [2, 8]), (30 * MIB, [2, 8, 25, 64]), (10**9, [2, 8, 25, 64])],
)
def test_candidates_that_hold_everything_count_as_one(total_bytes: int, candidates: list[int]) -> None:
    assert [cap // MIB for cap in CapTuner(total_bytes).candidates] == candidates


def test_the_slowest_rank_decides() -> None:
    tuner = CapTuner(10**9)
    assert tuner.choose([0.4, 0.3, 0.2, 0.5])[0] == 25 * MIB


def test_training_with_tuned_buckets_is_the_same_training() -> None:
    """3 MiB of gradients: two candidates, and then one of them for good."""

    torch.manual_seed(0)
    untrained = torch.nn.Sequential(*(torch.nn.Linear(280, 280, dtype=torch.float64) for _ in range(5)))

    def train(cap: int | str) -> list[tuple[torch.Tensor, int, int]]:
        def script(ring: Communicator) -> tuple[torch.Tensor, int, int]:
            model = copy.deepcopy(untrained)
            plain = torch.optim.SGD(model.parameters(), lr=0.01)
            optimizer = ringps.DistributedOptimizer(
                plain,
                model,
                bucket_cap_bytes=cap,  # type: ignore[arg-type]
                communicator=ring,
            )
            generator = torch.Generator().manual_seed(ring.rank)
            for _ in range(12):
                inputs = torch.randn(4, 280, generator=generator, dtype=torch.float64)
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                optimizer.step()
            weights = torch.cat([one.detach().flatten() for one in model.parameters()])
            return weights, optimizer.statistics().cap_bytes, optimizer.statistics().buckets

        return run_ring(2, script)

    tuned, fixed = train("auto"), train(8 * MIB)
    for (weights, cap_bytes, _), (wanted, _, _) in zip(tuned, fixed, strict=True):
        torch.testing.assert_close(weights, wanted, rtol=1e-12, atol=1e-12)
        assert cap_bytes in (2 * MIB, 8 * MIB)
    assert tuned[0][1:] == tuned[1][1:]
    assert torch.equal(tuned[0][0], tuned[1][0])


def test_another_word_than_auto_is_refused() -> None:
    def script(ring: Communicator) -> None:
        model = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match="a number of bytes or \"auto\", not 'big'"):
            ringps.DistributedOptimizer(
                torch.optim.SGD(model.parameters()),
                model,
                bucket_cap_bytes="big",  # type: ignore[arg-type]
                communicator=ring,
            )

    run_ring(1, script)
