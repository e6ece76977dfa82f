"""`DistributedOptimizer` with models on pretended GPUs: the bits of the CPU, losses amid a step, graphs,
scalers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from ringps import DistributedOptimizer
from ringps.collectives import ElasticCommunicator
from ringps.config import Config, Exchange, Recovery, TransportName
from ringps.errors import LayoutMismatchError
from ringps.testing.pretend import PretendAccelerator
from tests.elastic_rings import Connected, ElasticRing, Killed, bytes_of, listening
from tests.pretended import WayOf, gpus
from tests.training import filled, numbers

SMALL = Exchange(staging_bytes=4096, chunk_bytes=1024)
WAYS: dict[str, tuple[WayOf, TransportName]] = {
    "nccl": ("nccl", "auto"),
    "cuda_ipc": ("cuda_ipc", "auto"),
    "staged": ("staged", "auto"),
    "staged over tcp": ("staged", "tcp"),
}
STEPS = 5

way = pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)


@contextmanager
def elastic(
    size: int, how: tuple[WayOf, TransportName], *, every: int = 1, seed: int | None = 5
) -> Iterator[tuple[ElasticRing, list[PretendAccelerator]]]:
    """Workers on one host, with a pretended GPU each."""
    kind, transport = how
    network = Connected(Config(transport=transport, exchange=SMALL), ["here"] * size)
    try:
        with gpus(size, kind, seed=seed) as made:
            yield ElasticRing(size, Recovery(check_parameters_every=every), network=network), made
    finally:
        network.close()


def model_of(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    layers = (torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 30), torch.nn.Linear(30, 2))
    return filled(torch.nn.Sequential(*layers)).to(dtype)


def train(
    worker_id: int,
    ring: ElasticCommunicator,
    gpu: PretendAccelerator | None,
    upset: Callable[[int, int], None] = lambda worker_id, step: None,
    dtype: torch.dtype = torch.float32,
) -> bytes:
    """A few steps of AdamW, with clipping; the parameters' bits."""
    model = model_of(dtype)
    if gpu is not None:
        gpu.adopt(model)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    optimizer = DistributedOptimizer(
        inner, model, communicator=ring, bucket_cap_bytes=3000, first_bucket_bytes=1000
    )
    for step in range(1, STEPS + 1):
        upset(worker_id, step)
        optimizer.zero_grad()
        inputs = numbers(4, 6, seed=100 * step + worker_id, dtype=torch.float32).to(dtype)
        model(inputs).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=False)
        optimizer.step()
    return b"".join(bytes_of(one) for one in model.parameters())


def on_the_cpu(size: int, dtype: torch.dtype, *, doubling_bytes: int) -> bytes:
    """What the same training gives in the CPU's memory."""
    exchange = replace(SMALL, doubling_bytes=doubling_bytes)
    network = Connected(Config(exchange=exchange), ["here"] * size)
    try:
        ring = ElasticRing(size, Recovery(check_parameters_every=1), network=network)
        results = ring.run(lambda worker_id, comm: train(worker_id, comm, None, dtype=dtype))
    finally:
        network.close()
    assert len(set(results.values())) == 1
    return results[0]


@way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_gives_the_bits_of_the_cpu(how: tuple[WayOf, TransportName], dtype: torch.dtype) -> None:
    with elastic(3, how) as (ring, made):
        results = ring.run(lambda worker_id, comm: train(worker_id, comm, made[worker_id], dtype=dtype))
    assert len(set(results.values())) == 1
    if how[0] == "staged":
        assert results[0] == on_the_cpu(3, dtype, doubling_bytes=SMALL.doubling_bytes)
    elif how[0] == "cuda_ipc":
        # Always in the order of the ring, also what is small.
        assert results[0] == on_the_cpu(3, dtype, doubling_bytes=0)


@way
@pytest.mark.parametrize("point", ["step", "bucket", "vote", "voted", "committed"])
def test_a_worker_that_is_lost_amid_a_step(how: tuple[WayOf, TransportName], point: str) -> None:
    """The others finish that very step, on their GPUs, with the same bits."""
    killed: list[str] = []

    def kill(worker_id: int, reached: str, passed: dict[str, Any]) -> None:
        if worker_id == 1 and reached == point and passed.get("step") == 3 and not killed:
            killed.append(reached)
            raise Killed

    with elastic(3, how) as (ring, made), listening(kill):
        results = ring.run(lambda worker_id, comm: train(worker_id, comm, made[worker_id]))
    assert killed == [point]
    assert set(results) == {0, 2}
    assert len(set(results.values())) == 1
    assert [comm.elastic_statistics().generations for comm in ring.communicators[::2]] == [1, 1]


@way
def test_parameters_that_differ_are_healed(how: tuple[WayOf, TransportName]) -> None:
    models: dict[int, torch.nn.Module] = {}

    def script(worker_id: int, ring: ElasticCommunicator) -> bytes:
        model = models[worker_id] = model_of()
        made[worker_id].adopt(model)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(inner, model, communicator=ring)
        for step in range(3):
            if worker_id == 1 and step == 1:
                with torch.no_grad():
                    next(model.parameters()).add_(1e-3)
            optimizer.zero_grad()
            model(numbers(4, 6, seed=worker_id, dtype=torch.float32)).sum().backward()
            optimizer.step()
        return b"".join(bytes_of(one) for one in model.parameters())

    with elastic(3, how) as (ring, made):
        assert len(set(ring.run(script).values())) == 1
    assert [note["what"] for note in ring.notes] == ["parameters"]


def test_gradients_on_the_gpu_and_in_the_cpus_memory_have_buckets_of_their_own() -> None:
    def script(worker_id: int, ring: ElasticCommunicator) -> int:
        model = model_of()
        made[worker_id].adopt(model[2])
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, communicator=ring
        )
        for _ in range(2):
            model(numbers(4, 6, seed=worker_id, dtype=torch.float32)).sum().backward()
            optimizer.step()
        return optimizer.statistics().buckets

    with elastic(2, WAYS["cuda_ipc"]) as (ring, made):
        assert ring.run(script) == {0: 2, 1: 2}


def test_a_model_on_the_gpu_at_some_ranks_only_is_named() -> None:
    def script(worker_id: int, ring: ElasticCommunicator) -> None:
        model = model_of()
        if worker_id:
            made[worker_id].adopt(model)
        with pytest.raises(LayoutMismatchError, match=r"0\.weight.*on a GPU"):
            DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, communicator=ring)

    with elastic(2, WAYS["staged"]) as (ring, made):
        ring.run(script)


@pytest.mark.parametrize("explicit", [True, False])
def test_gradients_of_a_replayed_graph_are_reduced(explicit: bool) -> None:
    """What a replay does: it writes to the memory that gradients had when the backward was captured."""

    def script(worker_id: int, ring: ElasticCommunicator) -> list[float]:
        model = filled(torch.nn.Linear(1, 1, bias=False))
        with torch.no_grad():
            model.weight.fill_(0)
        gpu = made[worker_id]
        gpu.adopt(model)
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), model, communicator=ring
        )
        with pytest.raises(RuntimeError, match="no backward was captured"):
            optimizer.reduce()
        gpu.recording = True
        model(torch.ones(1, 1)).sum().backward()
        gpu.recording = False
        static = model.weight.grad
        assert static is not None
        seen = []
        for step in range(3):
            optimizer.zero_grad()
            static.fill_(worker_id + step)
            if explicit:
                optimizer.reduce()
                assert model.weight.grad is not None
                seen.append(float(model.weight.grad))
            optimizer.step()
            assert float(static) == worker_id + step
        return [*seen, float(model.weight.detach())]

    with elastic(2, WAYS["cuda_ipc"]) as (ring, made):
        for found in ring.run(script).values():
            assert found == ([0.5, 1.5, 2.5] if explicit else []) + [-4.5]


@way
def test_a_step_that_a_scaler_skips_is_skipped_by_all(how: tuple[WayOf, TransportName]) -> None:
    """One rank's gradients overflow: the sum does at all, and none applies it."""

    def script(worker_id: int, ring: ElasticCommunicator) -> tuple[list[float], float, bytes]:
        model = model_of()
        made[worker_id].adopt(model)
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, communicator=ring
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        scales = []
        for step in range(4):
            optimizer.zero_grad()
            loss = model(numbers(4, 6, seed=worker_id, dtype=torch.float32)).square().mean()
            scaler.scale(loss * (float("inf") if worker_id == step == 1 else 1.0)).backward()
            before = bytes_of(model[0].weight)
            scaler.step(optimizer)
            scaler.update()
            assert (bytes_of(model[0].weight) == before) == (step == 1)
            scales.append(scaler.get_scale())
        return scales, 0.0, b"".join(bytes_of(one) for one in model.parameters())

    with elastic(2, how) as (ring, made):
        results = ring.run(script)
    assert results[0] == results[1]
    assert results[0][0] == [8.0, 4.0, 4.0, 8.0]
