"""A training state of which parts lie on a GPU: made equal, compared, offered, loaded; and random numbers.

The GPU is a pretended one, or torch's device without memory where all that counts is where a tensor is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import ringps
from ringps import device
from ringps.buckets import agree
from ringps.checkpoint.tree import State, flatten
from ringps.collectives import Communicator, current
from ringps.collectives.elastic import Change
from ringps.errors import LayoutMismatchError
from ringps.optim import randomness, replicate
from ringps.optim.placement import placed_like
from ringps.testing.memory_ring import run_ring
from ringps.testing.pretend import PretendAccelerator
from tests.same import assert_same
from tests.training import filled, numbers


@pytest.fixture
def gpu() -> Iterator[PretendAccelerator]:
    found = PretendAccelerator()
    forget = device.use(found)
    yield found
    forget()


# Made equal, and compared.


def tensors_of(rank: int, gpu: PretendAccelerator) -> list[torch.Tensor]:
    """All kinds, every other one on the GPU."""
    generator = torch.Generator().manual_seed(rank)
    wide = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return [
        torch.tensor(float(rank)),
        gpu.copy(torch.tensor([rank % 2 == 0] * 3)),
        wide.mT,
        gpu.copy(wide.bfloat16()),
        torch.full((1, 4), rank, dtype=torch.int16).expand(3, 4),
        gpu.copy(torch.full((7,), rank, dtype=torch.uint8)),
        torch.empty(0, 3),
        gpu.copy(torch.complex(wide, -wide)),
    ]


class Recorder:
    """A ring of two whose rank 0 this is; or rank 1, which plays what rank 0 has recorded."""

    world_size = 2

    def __init__(self, played: list[torch.Tensor] | None = None) -> None:
        self.recorded: list[torch.Tensor] = []
        self._played = None if played is None else iter(played)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> None:
        if self._played is not None:
            tensor.copy_(next(self._played))
        self.recorded.append(tensor.clone())


@pytest.mark.parametrize("pack_bytes", [8 * 1024 * 1024, 256, 1])
def test_all_get_the_sources_values_wherever_they_lie(
    gpu: PretendAccelerator, monkeypatch: pytest.MonkeyPatch, pack_bytes: int
) -> None:
    monkeypatch.setattr(replicate, "_PACK_BYTES", pack_bytes)
    source, other = tensors_of(0, gpu), tensors_of(1, gpu)
    recorder: Any = Recorder()
    replicate.replicate(recorder, source)
    assert_same(source, tensors_of(0, gpu))
    player: Any = Recorder(recorder.recorded)
    replicate.replicate(player, other)
    assert_same(other, source)
    if pack_bytes > 256:
        # What is on the GPU does not travel through the CPU's memory, nor the other way round.
        assert [one.numel() for one in recorder.recorded] == [64 + 256 + 64, 64 + 64 + 64 + 512]


def test_a_ring_half_on_gpus_is_an_error_that_names_it(gpu: PretendAccelerator) -> None:
    def build(ring: Communicator) -> None:
        model = filled(torch.nn.Linear(3, 2))
        if ring.rank == 1:
            gpu.adopt(model)
        agree(ring, list(replicate.describe_model(list(model.named_parameters()))))

    with pytest.raises(LayoutMismatchError) as caught:
        run_ring(2, build)
    assert (
        'at "weight": rank 0 has float32[2, 3], trainable; rank 1 has float32[2, 3] on a GPU, trainable'
        in str(caught.value)
    )


# Offered, and loaded.


class Taking:
    """An `Admission` that takes what is offered."""

    def __init__(self) -> None:
        self.offered: State | None = None
        self.withdrawn = False

    def offer(self, step: int, joiners: tuple[int, ...], state: State) -> bool:
        self.offered = state
        return True

    def withdraw(self) -> None:
        self.withdrawn = True


@pytest.fixture
def ring() -> Iterator[None]:
    ringps.init()
    yield
    ringps.shutdown()


class Average:
    """A part with tensors, which does not care where those are that it is given."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "of": [("a", 1)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tensor = state_dict["tensor"]


@pytest.mark.usefixtures("ring")
def test_an_offer_holds_copies_of_what_is_on_the_gpu(gpu: PretendAccelerator) -> None:
    model = torch.nn.Sequential(filled(torch.nn.Linear(3, 4)), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    wrapped = ringps.DistributedOptimizer(optimizer, model)
    state = ringps.TrainState(model=model, optimizer=wrapped, average=Average(torch.ones(9)))
    for _ in range(2):
        wrapped.zero_grad()
        model(torch.randn(6, 3)).square().sum().backward()
        wrapped.step()
    for found in optimizer.state.values():
        found.update({name: gpu.copy(found[name]) for name in ("exp_avg", "exp_avg_sq")})
    expected = flatten(state.shared(current().raw))
    admission: Any = Taking()
    communicator: Any = current()
    assert state._offer(communicator, admission, Change(1, (5,), (), (0,)), None)
    offered = admission.offered
    assert offered.skeleton == expected.skeleton
    assert_same(offered.tensors, expected.tensors)
    away = [gpu.owns(one) for one in expected.tensors]
    assert sum(away) == 2 * 4
    assert not any(map(gpu.owns, offered.tensors))
    for one, live, copied in zip(offered.tensors, expected.tensors, away, strict=True):
        if copied:
            assert one.data_ptr() != live.data_ptr()


@pytest.mark.usefixtures("ring")
def test_what_is_on_the_gpu_is_saved_and_restored_there(gpu: PretendAccelerator, tmp_path: Path) -> None:
    def build(seed: int) -> tuple[torch.nn.Module, ringps.DistributedOptimizer, ringps.TrainState]:
        model = torch.nn.Sequential(filled(torch.nn.Linear(3, 4), seed), torch.nn.BatchNorm1d(4))
        gpu.adopt(model)
        inner = torch.optim.AdamW(model.parameters(), lr=0.1)
        optimizer = ringps.DistributedOptimizer(inner, model)
        return model, optimizer, ringps.TrainState(model=model, optimizer=optimizer)

    model, optimizer, state = build(0)
    with ringps.Checkpointer(tmp_path, state, every_steps=2) as ckpt:
        for _, batch in ckpt.steps([numbers(5, 3, dtype=torch.float32)], until=3):
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()
    other, _, restored = build(1)
    with ringps.Checkpointer(tmp_path, restored) as ckpt:
        assert ckpt.restored_step == 3
        assert list(ckpt.steps([0], until=3)) == []  # its own buffers are loaded here
    assert_same(restored.state_dict(), state.state_dict())
    assert all(gpu.owns(tensor) for tensor in (*other.parameters(), *other.buffers()))


def test_loaded_tensors_go_where_those_before_them_are() -> None:
    there = torch.empty(2, device="meta")
    state = OrderedDict(a=torch.ones(2), b=[torch.ones(2), {"c": torch.ones(2)}, 3], d=(torch.ones(2),), e=4)
    state._metadata = {"": 1}  # type: ignore[attr-defined]
    live = {"a": there, "b": [torch.zeros(2), {"c": there}, 3], "d": (there,), "e": 4}
    found = placed_like(state, lambda: live)
    assert type(found) is OrderedDict
    assert found._metadata == {"": 1}
    assert list(found) == ["a", "b", "d", "e"]
    moved = [found["a"], found["b"][1]["c"], found["d"][0]]
    assert [one.device.type for one in moved] == ["meta"] * 3
    assert found["b"][0] is state["b"][0]
    assert state["a"].is_cpu and state["b"][1]["c"].is_cpu, "the given state stays as it is"


@pytest.mark.parametrize("live", [None, {}, {"a": 1, "b": []}, [], {"a": torch.ones(1), "b": [2, None]}])
def test_what_has_no_counterpart_stays_where_it_is(live: Any) -> None:
    state = {"a": torch.ones(2), "b": [1, torch.ones(2)]}
    assert placed_like(state, lambda: live) is state


def test_a_part_without_tensors_is_not_asked_for_its_state() -> None:
    state = {"position": [1, (2, 3)], "name": "x"}
    assert placed_like(state, lambda: pytest.fail("asked")) is state


@pytest.mark.usefixtures("ring")
def test_a_loaded_option_of_the_optimizer_and_parts_are_where_they_were() -> None:
    model = filled(torch.nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    average = Average(torch.ones(2))
    state = ringps.TrainState(
        model=model, optimizer=ringps.DistributedOptimizer(optimizer, model), average=average
    )
    saved = state.state_dict()
    saved["optimizer"]["param_groups"][0]["lr"] = torch.tensor(0.25)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device="meta")
    average.tensor = torch.ones(2, device="meta")
    state.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"].device.type == "meta"
    assert average.tensor.device.type == "meta"


# Random numbers.


class OnGpu(NamedTuple):
    """As much of a tensor as is asked for."""

    device: torch.device
    is_cuda: bool = True


class Generators:
    """CUDA's, of a machine with so many GPUs."""

    def __init__(self, patch: pytest.MonkeyPatch, count: int, current: int) -> None:
        self.states = [torch.tensor([index], dtype=torch.uint8) for index in range(count)]
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: current)
        patch.setattr(torch.cuda, "get_rng_state", lambda gpu: self.states[gpu.index].clone())
        patch.setattr(torch.cuda, "set_rng_state", self._set)

    def _set(self, state: torch.Tensor, gpu: torch.device) -> None:
        self.states[gpu.index] = state

    def values(self) -> list[int]:
        return [int(state) for state in self.states]


def on(*indices: int) -> Any:
    return [OnGpu(torch.device("cuda", index)) for index in indices]


def test_random_numbers_go_on_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    Generators(monkeypatch, 8, current=5)
    captured = randomness.capture(None, on(5, 5))
    assert [int(state) for state in captured["cuda"]] == [5], "of this process's GPU only"
    fewer = Generators(monkeypatch, 1, current=0)
    randomness.restore(captured, None, on(0))
    assert fewer.values() == [5]
    more = Generators(monkeypatch, 4, current=2)
    randomness.restore(captured, None, on(2))
    assert more.values() == [0, 1, 5, 3]


def test_the_models_gpu_comes_before_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    Generators(monkeypatch, 4, current=0)
    captured = randomness.capture(None, [torch.ones(1), *on(3, 3)])
    assert [int(state) for state in captured["cuda"]] == [3, 0]
    other = Generators(monkeypatch, 4, current=1)
    randomness.restore(captured, None, on(1))
    assert other.values() == [0, 3, 2, 3], "its own; the rest has nowhere to go"


def test_a_job_on_the_cpu_does_not_start_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object) -> None:
        pytest.fail("CUDA was asked for something")

    for name in (
        "_lazy_init",
        "is_available",
        "device_count",
        "current_device",
        "get_rng_state",
        "set_rng_state",
    ):
        monkeypatch.setattr(torch.cuda, name, started)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    parameters = [torch.ones(1)]
    captured = randomness.capture(None, parameters)
    assert "cuda" not in captured
    captured["cuda"] = [torch.zeros(16, dtype=torch.uint8)]  # saved where there were GPUs
    randomness.restore(captured, None, parameters)
