"""The simulator: limits in which its times are known, and its two ways to compute them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringps.ring import schedule
from ringps.ring.partition import Slice, chunk_numel, partition
from ringps.ring.schedule import Schedule

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MIB = 1024 * 1024


def load(name: str) -> Any:
    """A module beside the benchmark scripts, which import each other by plain names."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


model, stepwise, predict = load("link_model"), load("step_model"), load("predict")
FREE = model.Costs(latency_s=0.0, chunk_s=0.0, copy_s_per_byte=0.0, combine_s_per_byte=0.0)
COSTS = model.Costs(latency_s=2e-4, chunk_s=5e-5, copy_s_per_byte=4e-10, combine_s_per_byte=3e-10)
GIGABIT = model.Link(bytes_per_s=1.2e8, latency_s=5e-6)


def cluster(costs: Any = COSTS, link: Any = GIGABIT, **more: Any) -> Any:
    return model.Cluster(costs=costs, link=link, **more)


def both(
    schedule_of: Callable[[int, int], Schedule], slices: tuple[Slice, ...], n: int, hosts: Any
) -> tuple[list[float], list[float]]:
    """Each rank's time, event by event and step by step."""
    piece = chunk_numel(slices, 4, MIB)
    events = model.finish_times([schedule_of(rank, n) for rank in range(n)], slices, piece, 4, hosts)
    return events, stepwise.finish_times(schedule_of, slices, piece, 4, n, hosts).tolist()


@pytest.mark.parametrize("n", [2, 3, 8, 48])
def test_without_latency_a_ring_is_as_fast_as_its_links(n: int) -> None:
    size = 64 * n * 1024
    found = predict.all_reduce_s("ring", size, n, cluster(FREE, model.Link(bytes_per_s=1e8)))
    assert found == pytest.approx(2 * (n - 1) / n * size / 1e8, rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 8, 48])
def test_latency_counts_once_per_hop(n: int) -> None:
    costs = model.Costs(latency_s=1e-3, chunk_s=0.0, copy_s_per_byte=0.0, combine_s_per_byte=0.0)
    link = model.Link(bytes_per_s=1e15, latency_s=1e-4)
    assert predict.all_reduce_s("ring", 1024, n, cluster(costs, link)) == pytest.approx(
        2 * (n - 1) * 1.1e-3, rel=1e-6
    )


@pytest.mark.parametrize(("n", "steps"), [(2, 1), (8, 3), (64, 6), (1024, 10), (3, 2), (6, 3), (7, 4)])
def test_doubling_takes_as_many_steps_as_the_logarithm(n: int, steps: int) -> None:
    """Otherwise up to two more: the rest is folded in while others exchange already, and told at the end."""
    costs = model.Costs(latency_s=1e-3, chunk_s=0.0, copy_s_per_byte=0.0, combine_s_per_byte=0.0)
    found = predict.all_reduce_s("recursive-doubling", 1024, n, cluster(costs, model.Link(bytes_per_s=1e15)))
    assert found == pytest.approx(steps * 1e-3, rel=1e-6)


def test_a_combination_costs_what_it_says() -> None:
    costs = model.Costs(latency_s=0.0, chunk_s=0.0, copy_s_per_byte=0.0, combine_s_per_byte=1e-9)
    # Of the two steps of two ranks the first combines half of the bytes.
    found = predict.all_reduce_s("ring", MIB, 2, cluster(costs, model.Link(bytes_per_s=1e15)))
    assert found == pytest.approx(MIB / 2 * 1e-9, rel=1e-4)


def test_copying_limits_a_fast_link_and_adds_nothing_to_a_slow_one() -> None:
    costs = model.Costs(latency_s=0.0, chunk_s=0.0, copy_s_per_byte=1e-9, combine_s_per_byte=0.0)
    for rate, limit in ((1e8, 1e8), (1e12, 1e9)):
        found = predict.all_reduce_s("ring", MIB, 2, cluster(costs, model.Link(bytes_per_s=rate)))
        assert found == pytest.approx(MIB / limit, rel=1e-9)


def test_an_idle_token_bucket_lets_its_burst_through() -> None:
    link = model.Link(bytes_per_s=1e6, burst_bytes=1000)
    found = predict.all_reduce_s("recursive-doubling", 4000, 2, cluster(FREE, link))
    assert found == pytest.approx(3e-3)


def test_workers_that_share_cores_slow_each_other_down() -> None:
    own = predict.all_reduce_s("ring", 1024, 4, cluster())
    shared = predict.all_reduce_s("ring", 1024, 4, cluster(cores=2))
    assert shared == pytest.approx(2 * own, rel=0.05)


@settings(max_examples=60)
@given(
    n=st.integers(2, 24),
    numel=st.integers(0, 3_000_000),
    local=st.sampled_from([1, 1, 2, 4]),
    rate=st.sampled_from([1e7, 1e8, 1e10]),
)
def test_events_and_steps_agree_on_rings(n: int, numel: int, local: int, rate: float) -> None:
    link = model.Link(bytes_per_s=rate, latency_s=5e-6, burst_bytes=1000.0)
    hosts = cluster(link=link, workers_per_host=local)
    events, steps = both(schedule.all_reduce, partition(numel, n), n, hosts)
    assert steps == pytest.approx(events, rel=1e-9)


@pytest.mark.parametrize(("n", "local"), [(64, 1), (64, 4), (60, 6), (33, 1)])
@pytest.mark.parametrize("size", [256, 1 << 21])
def test_skipped_steps_are_like_those_that_are_not(n: int, local: int, size: int) -> None:
    events, steps = both(schedule.all_reduce, partition(size * n // 8, n), n, cluster(workers_per_host=local))
    assert steps == pytest.approx(events, rel=1e-7)


@pytest.mark.parametrize(("n", "local"), [(2, 1), (8, 1), (16, 4), (64, 8)])
@pytest.mark.parametrize("numel", [1, 1000, 1_000_000])
def test_events_and_steps_agree_on_doubling(n: int, local: int, numel: int) -> None:
    hosts = cluster(workers_per_host=local)
    events, steps = both(schedule.recursive_doubling, (Slice(0, numel),), n, hosts)
    assert steps == pytest.approx(events, rel=1e-9)


@pytest.mark.parametrize("n", [3, 5, 6, 7, 12, 13])
def test_events_and_steps_agree_on_small_tensors_of_any_number_of_ranks(n: int) -> None:
    events, steps = both(schedule.recursive_doubling, (Slice(0, 2000),), n, cluster())
    assert max(steps) == pytest.approx(max(events), rel=0.02)


def test_workers_of_a_host_share_its_link() -> None:
    link = model.Link(bytes_per_s=1e8)
    alone = predict.all_reduce_s("recursive-doubling", MIB, 2, cluster(FREE, link))
    shared = predict.all_reduce_s("recursive-doubling", MIB, 4, cluster(FREE, link, workers_per_host=2))
    assert shared == pytest.approx(2 * alone, rel=1e-9)


@pytest.mark.parametrize(("n", "local"), [(4, 2), (16, 4), (64, 8)])
def test_on_shared_links_the_hierarchical_algorithm_wins(n: int, local: int) -> None:
    hosts = cluster(workers_per_host=local)
    flat, hierarchical = (predict.all_reduce_s(name, 64 * MIB, n, hosts) for name in ("ring", "hierarchical"))
    between = n // local
    # What crosses a host's link: 2 (n - 1) / n of the tensor, or 2 (h - 1) / h.
    ideal = (2 * (between - 1) / between) / (2 * (n - 1) / n)
    assert ideal <= hierarchical / flat < 1.25 * ideal


def test_small_tensors_of_many_workers_double_and_large_ones_go_round() -> None:
    assert predict.cheapest(1024, 1024, cluster())[0] == "recursive-doubling"
    assert predict.cheapest(1024 * MIB, 8, cluster())[0] == "ring"


@pytest.mark.timeout(30)
def test_thousands_of_workers_take_seconds() -> None:
    for name in ("ring", "recursive-doubling", "hierarchical"):
        assert predict.all_reduce_s(name, 64 * MIB, 4096, cluster(workers_per_host=8)) > 0


def test_a_step_hides_what_is_reduced_while_backward_runs() -> None:
    training = predict.Training(compute_s=3.0, gradient_bytes=4 * MIB, bucket_bytes=MIB, backward_share=2 / 3)
    # Buckets are ready at 1.5, 2, 2.5 and 3 s.
    quick = predict.step_time(training, lambda _: 0.25)
    assert quick.seconds == pytest.approx(3.25)
    assert quick.efficiency == pytest.approx(3 / 3.25)
    assert quick.overlap == pytest.approx(0.75)
    slow = predict.step_time(training, lambda _: 1.0)
    assert slow.seconds == pytest.approx(1.5 + 4.0)
    assert predict.step_time(training, lambda _: 0.0).efficiency == 1.0


def test_a_fit_finds_the_costs_that_made_its_samples() -> None:
    calibrate = load("calibrate")
    made = model.Costs(**{**asdict(COSTS), "call_s": 1.5e-4})
    found = calibrate.fit({one: calibrate.predicted_s(one, made) for one in calibrate.SAMPLED.values()})
    for one in calibrate.SAMPLED.values():
        assert calibrate.predicted_s(one, found) == pytest.approx(calibrate.predicted_s(one, made), rel=0.01)
    # Latency and chunks explain much the same: what a hop costs is told apart from the rest, they hardly are.
    assert found.latency_s + found.chunk_s == pytest.approx(made.latency_s + made.chunk_s, rel=0.05)
    assert found.copy_s_per_byte == pytest.approx(made.copy_s_per_byte, rel=0.15)


@pytest.mark.parametrize("bad", [{"workers_per_host": 0}, {"cores": 0}])
def test_a_cluster_that_cannot_be_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="no such cluster"):
        cluster(**bad)
