"""What gradients come out of a backward, whatever the ranks' models do in it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from ringps.collectives import Communicator, Handle
from ringps.errors import CollectiveMismatchError, LayoutMismatchError, PeerLostError
from ringps.optim import DistributedOptimizer
from ringps.testing import MemoryRing, run_ring
from tests.training import (
    assert_same_bits,
    filled,
    gradients_of,
    mean_gradients,
    numbers,
    parameters_of,
    perceptron,
)

Loss = Callable[[torch.nn.Module], torch.Tensor]


def wrap(model: torch.nn.Module, ring: Communicator, **options: Any) -> DistributedOptimizer:
    """SGD in small buckets."""
    options = {"bucket_cap_bytes": 256, "first_bucket_bytes": 64} | options
    return DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, communicator=ring, **options
    )


def square(rank: int) -> Loss:
    """A loss on data of that rank's own."""
    return lambda model: (model(numbers(4, 6, seed=100 + rank)) ** 2).mean()


def backward(loss: torch.Tensor) -> None:
    loss.backward()


class Branches(torch.nn.Module):
    """Uses what it is told to, in the order in which it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Linear(6, 6).double() for _ in range(4))
        filled(self)

    def forward(self, value: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        for index in order:
            value = torch.tanh(self.parts[index](value))
        return value


def branches(rank: int, *order: int) -> Loss:
    return lambda model: model(numbers(2, 6, seed=rank), order).square().sum()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_backward_returns_with_the_mean_in_grad(world_size: int) -> None:
    def script(ring: Communicator) -> list[Any]:
        model = perceptron()
        optimizer = wrap(model, ring)
        results = []
        for _ in range(3):
            optimizer.zero_grad()
            backward(square(ring.rank)(model))
            results.append(gradients_of(model))
        return results

    expected = mean_gradients(perceptron(), [square(rank) for rank in range(world_size)])
    ranks = run_ring(world_size, script)
    for step in range(3):
        assert_same_bits([results[step] for results in ranks])
        torch.testing.assert_close(ranks[0][step], expected)


def test_local_gradients_stay_unharmed_in_the_input() -> None:
    class Recorder:
        """A ring that keeps what goes into each reduction."""

        def __init__(self, ring: Communicator) -> None:
            self._ring = ring
            self.inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

        def __getattr__(self, name: str) -> Any:
            return self if name == "raw" else getattr(self._ring, name)

        def all_reduce_into(self, output: torch.Tensor, input: torch.Tensor, *args: Any, **kw: Any) -> Handle:
            self.inputs.append((input, input.clone()))
            return self._ring.all_reduce_into(output, input, *args, **kw)

    def script(ring: Communicator) -> None:
        recorder = Recorder(ring)
        model = perceptron()
        optimizer = wrap(model, recorder)
        for _ in range(2):
            recorder.inputs.clear()
            backward(square(ring.rank)(model))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            assert len(recorder.inputs) > 2
            for now, then in recorder.inputs:
                assert torch.equal(now, then)
            optimizer.step()
            optimizer.zero_grad()

    run_ring(2, script)


def test_a_second_backward_adds_to_the_reduced_gradients() -> None:
    def script(ring: Communicator) -> list[torch.Tensor | None]:
        model = perceptron()
        optimizer = wrap(model, ring)
        for _ in range(3):
            backward(square(ring.rank)(model))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        backward(square(ring.rank)(model))
        optimizer.zero_grad(set_to_none=False)
        optimizer.load_state_dict(optimizer.state_dict())
        for _ in range(2):
            backward(square(ring.rank)(model))
        return gradients_of(model)

    stepped = perceptron()
    first = mean_gradients(stepped, [square(0), square(1)])
    with torch.no_grad():
        for parameter, gradient in zip(stepped.parameters(), first, strict=True):
            assert gradient is not None
            parameter -= 0.1 * 3 * gradient
    expected = [2 * one for one in mean_gradients(stepped, [square(0), square(1)]) if one is not None]
    ranks = run_ring(2, script)
    assert_same_bits(ranks)
    torch.testing.assert_close(ranks[0], expected)


def test_parameters_without_a_gradient_on_some_ranks_count_as_zero_there() -> None:
    orders = [(0, 1), (1, 2), (1,)]

    def script(ring: Communicator) -> list[Any]:
        model = Branches()
        optimizer = wrap(model, ring)
        results = []
        for _ in range(3):
            optimizer.zero_grad()
            backward(branches(ring.rank, *orders[ring.rank])(model))
            results.append(gradients_of(model))
            optimizer.step()
        return results

    expected = mean_gradients(Branches(), [branches(rank, *order) for rank, order in enumerate(orders)])
    ranks = run_ring(3, script)
    torch.testing.assert_close(ranks[0][0], expected)
    for step in range(3):
        used = [results[step][:6] for results in ranks]
        assert_same_bits(used)
        assert all(results[step][6:] == [None, None] for results in ranks), "used by nobody"


def test_ranks_may_use_their_layers_in_different_orders() -> None:
    orders = [(0, 1, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1)]

    def script(ring: Communicator) -> list[torch.Tensor]:
        model = Branches()
        optimizer = wrap(model, ring)
        for _ in range(4):
            optimizer.zero_grad()
            backward(branches(ring.rank, *orders[ring.rank])(model))
            optimizer.step()
        return parameters_of(model)

    assert_same_bits(run_ring(3, script))


ORDERS = st.lists(st.integers(0, 3), unique=True, max_size=4).map(tuple)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 3).flatmap(lambda n: st.lists(st.tuples(*[ORDERS] * n), min_size=1, max_size=4)))
def test_whatever_ranks_do_in_a_step_its_mean_is_applied(steps: list[tuple[tuple[int, ...], ...]]) -> None:
    """Each rank uses any layers in any order, or makes no backward at all."""
    world_size = len(steps[0])

    def script(ring: Communicator) -> list[torch.Tensor]:
        model = Branches()
        optimizer = wrap(model, ring)
        for orders in steps:
            optimizer.zero_grad()
            if order := orders[ring.rank]:
                backward(branches(ring.rank, *order)(model))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return parameters_of(model)

    model = Branches()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for orders in steps:
        losses = [branches(rank, *order) for rank, order in enumerate(orders) if order]
        for parameter, gradient in zip(model.parameters(), mean_gradients(model, losses), strict=True):
            parameter.grad = None if gradient is None else gradient * (len(losses) / world_size)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        sgd.step()

    ranks = run_ring(world_size, script)
    assert_same_bits(ranks)
    torch.testing.assert_close(ranks[0], parameters_of(model))


def test_buckets_follow_the_order_in_which_rank_0_gets_its_gradients() -> None:
    def script(ring: Communicator) -> list[str]:
        labels: list[str] = []

        class Recorder:
            def __getattr__(self, name: str) -> Any:
                return self if name == "raw" else getattr(ring, name)

            def all_reduce_into(self, *args: Any, label: str, **kw: Any) -> Handle:
                arrived = sum(one.grad is not None for one in model.parameters())
                labels.append(f"{label} after {arrived}")
                return ring.all_reduce_into(*args, label=label, **kw)

        model = Branches()
        optimizer = wrap(model, Recorder(), bucket_cap_bytes=400)
        for _ in range(2):
            optimizer.zero_grad()
            backward(branches(ring.rank, 3, 2, 1, 0)(model))
            optimizer.step()
        assert optimizer.statistics().buckets == 5
        return labels

    for labels in run_ring(2, script):
        # At first the last layers are expected first, but they come last.
        assert labels[0] == "step 1, bucket 0 after 7"
        second = [label for label in labels if label.startswith("step 2")]
        assert [label.split()[-1] for label in second] == ["1", "3", "5", "7", "8"]


@pytest.mark.parametrize("idle", [0, 1])
def test_a_rank_without_a_backward_joins_in_step(idle: int) -> None:
    def script(ring: Communicator) -> list[torch.Tensor]:
        model = perceptron()
        optimizer = wrap(model, ring)
        for step in range(4):
            optimizer.zero_grad()
            if ring.rank != idle or step == 2:
                backward(square(ring.rank)(model))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
        assert optimizer.statistics().late_passes == (3 if ring.rank == idle else 0)
        return parameters_of(model)

    ranks = run_ring(3, script)
    assert_same_bits(ranks)

    model = perceptron()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        losses = [square(rank) for rank in range(3) if rank != idle or step == 2]
        gradients = mean_gradients(model, losses)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert gradient is not None
            parameter.grad = gradient * len(losses) / 3
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        sgd.step()
    torch.testing.assert_close(ranks[0], parameters_of(model))


def test_a_step_in_which_nobody_made_a_backward_changes_nothing() -> None:
    def script(ring: Communicator) -> None:
        model = perceptron()
        optimizer = wrap(model, ring)
        before = parameters_of(model)
        for _ in range(2):
            optimizer.step()
            assert gradients_of(model) == [None] * 7
        assert_same_bits([before, parameters_of(model)])
        backward(square(ring.rank)(model))
        optimizer.step()

    run_ring(2, script)


def test_gradients_that_a_script_computed_itself_are_reduced_in_step() -> None:
    def script(ring: Communicator) -> list[torch.Tensor]:
        model = perceptron()
        optimizer = wrap(model, ring)
        gradients = torch.autograd.grad(square(ring.rank)(model), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return [one for one in gradients_of(model) if one is not None]

    expected = mean_gradients(perceptron(), [square(0), square(1)])
    for gradients in run_ring(2, script):
        torch.testing.assert_close(gradients, expected)


def test_step_reduces_what_an_accumulation_left() -> None:
    def script(ring: Communicator) -> list[torch.Tensor | None]:
        model = perceptron()
        optimizer = wrap(model, ring, accumulate_steps=3)
        for _ in range(2):
            backward(square(ring.rank)(model))
        optimizer.step()
        gradients = gradients_of(model)
        optimizer.zero_grad()
        with optimizer.no_sync():
            backward(square(ring.rank)(model))
            local = gradients_of(model)
        torch.testing.assert_close(local, mean_gradients(model, [square(ring.rank)]))
        optimizer.step()
        return gradients

    doubled: list[Loss] = [lambda model, rank=rank: 2 * square(rank)(model) for rank in range(2)]
    expected = mean_gradients(perceptron(), doubled)
    for gradients in run_ring(2, script):
        torch.testing.assert_close(gradients, expected)


class Failing(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise KeyError("user error")


@pytest.mark.parametrize("layer", [0, 4, 6])
@pytest.mark.parametrize("zeroes", [True, False])
def test_the_backward_after_one_that_raised_works(layer: int, zeroes: bool) -> None:
    """Buckets of the layers behind the failing one were launched, on all ranks."""

    def script(ring: Communicator) -> list[torch.Tensor | None]:
        model = perceptron()
        optimizer = wrap(model, ring)
        for _ in range(2):
            value = model[:layer](numbers(4, 6).requires_grad_())
            with pytest.raises(KeyError, match="user error"):
                backward(model[layer:](Failing.apply(value)).sum())
            if zeroes:
                optimizer.zero_grad()
            else:
                model.zero_grad()
            backward(square(ring.rank)(model))
            gradients = gradients_of(model)
            optimizer.zero_grad()
        return gradients

    expected = mean_gradients(perceptron(), [square(0), square(1)])
    for gradients in run_ring(2, script):
        torch.testing.assert_close(gradients, expected)


def test_one_rank_may_repeat_a_backward_that_raised_before_anything_was_sent() -> None:
    def script(ring: Communicator) -> list[torch.Tensor | None]:
        model = perceptron()
        optimizer = wrap(model, ring)
        if ring.rank == 1:
            with pytest.raises(KeyError, match="user error"):
                backward(Failing.apply(model(numbers(4, 6))).sum())
        backward(square(ring.rank)(model))
        optimizer.step()
        return gradients_of(model)

    expected = mean_gradients(perceptron(), [square(0), square(1)])
    for gradients in run_ring(2, script):
        torch.testing.assert_close(gradients, expected)


def test_a_backward_more_on_one_rank_is_an_error() -> None:
    def script(ring: Communicator) -> None:
        model = perceptron()
        optimizer = wrap(model, ring)
        for _ in range(2):
            backward(square(ring.rank)(model))
            if ring.rank == 0:
                backward(square(ring.rank)(model))
            optimizer.step()

    with pytest.raises(CollectiveMismatchError, match=r"step 1, pass 2, bucket 0"):
        run_ring(2, script)


@pytest.mark.parametrize("moment", ["backward", "step"])
def test_a_lost_rank_is_raised_as_it_is(moment: str) -> None:
    ready = threading.Barrier(2)

    def script(rank: int, ring: Communicator) -> None:
        model = perceptron()
        optimizer = wrap(model, ring)
        backward(square(rank)(model))
        optimizer.step()
        ready.wait()
        if rank == 1:
            memory.lose(1, "it was told to")
            return
        for _ in range(2):
            act = optimizer.step if moment == "step" else lambda: backward(square(rank)(model))
            with pytest.raises(PeerLostError, match=r"rank 1 .* lost: it was told to") as caught:
                act()
            assert caught.value.blames == 1
            optimizer.zero_grad()
        done.append(True)

    done: list[bool] = []
    with MemoryRing(2) as memory:
        threads = [
            threading.Thread(target=script, args=(rank, memory.communicators[rank])) for rank in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert done


class Checkpointed(torch.nn.Module):
    def __init__(self, reentrant: bool, *, head: bool, skip: int = -1) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Linear(6, 6).double() for _ in range(4))
        self.head = torch.nn.Linear(6, 1).double() if head else torch.nn.Identity()
        self.reentrant = reentrant
        self.skip = skip
        filled(self)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = value.requires_grad_()
        for index, part in enumerate(self.parts):
            if index != self.skip:
                value = torch.tanh(checkpoint(part, value, use_reentrant=self.reentrant))
        return self.head(value)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("accumulate_steps", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_activation_checkpointing(
    reentrant: bool, head: bool, accumulate_steps: int, world_size: int
) -> None:
    def script(ring: Communicator) -> list[torch.Tensor | None]:
        model = Checkpointed(reentrant, head=head)
        optimizer = wrap(model, ring, accumulate_steps=accumulate_steps)
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(accumulate_steps):
                backward(square(ring.rank)(model) / accumulate_steps)
            gradients = gradients_of(model)
            optimizer.step()
            assert optimizer.statistics().late_passes == 0
            with torch.no_grad():
                filled(model)
        return gradients

    plain = Checkpointed(False, head=head)
    expected = mean_gradients(plain, [square(rank) for rank in range(world_size)])
    for gradients in run_ring(world_size, script):
        torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_reentrant_backward_whose_end_cannot_be_seen_is_an_error(world_size: int) -> None:
    def script(ring: Communicator) -> None:
        model = Checkpointed(True, head=False, skip=2)
        optimizer = wrap(model, ring)
        backward(square(ring.rank)(model))
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            optimizer.step()
        ring.barrier()

    run_ring(world_size, script)


def test_layers_shared_among_reentrant_checkpoints_are_an_error() -> None:
    def script(ring: Communicator) -> None:
        model = Checkpointed(True, head=True)
        model.parts[1] = model.parts[3]
        optimizer = wrap(model, ring)
        with pytest.raises(RuntimeError, match=r'"parts\.1\.(weight|bias)" got a second gradient'):
            backward(square(ring.rank)(model))
        ring.barrier()
        optimizer.zero_grad()

    run_ring(2, script)


class Tied(torch.nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 6, sparse=sparse)
        self.output = torch.nn.Linear(6, 5)
        if not sparse:
            self.output.weight = self.embedding.weight
        filled(self)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.embedding(tokens))


def tokens(rank: int) -> Loss:
    return lambda model: model(torch.tensor([rank, 1])).square().sum()


def test_tied_weights_count_once() -> None:
    def script(ring: Communicator) -> list[torch.Tensor | None]:
        model = Tied()
        optimizer = wrap(model, ring)
        for _ in range(2):
            optimizer.zero_grad()
            backward(tokens(ring.rank)(model))
        return gradients_of(model)

    expected = mean_gradients(Tied(), [tokens(rank) for rank in range(3)])
    for gradients in run_ring(3, script):
        torch.testing.assert_close(gradients, expected)


def test_sparse_gradients_are_refused_by_name() -> None:
    def script(ring: Communicator) -> None:
        model = Tied(sparse=True)
        optimizer = wrap(model, ring)
        with pytest.raises(ValueError, match=r'gradient of "embedding\.weight" is sparse'):
            backward(tokens(ring.rank)(model))
        ring.barrier()
        optimizer.zero_grad()

    run_ring(2, script)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), "real floating-point"),
        (torch.ones(2, device="meta"), "one is on meta"),
        (torch.nn.parameter.UninitializedParameter(), "has no shape yet"),
    ],
)
def test_parameters_that_cannot_be_reduced_are_refused_by_name(parameter: torch.Tensor, message: str) -> None:
    model = torch.nn.Module()
    model.odd = parameter if isinstance(parameter, torch.nn.Parameter) else torch.nn.Parameter(parameter)
    with pytest.raises(ValueError, match=f'"odd".*{message}'):
        run_ring(1, lambda ring: wrap(model, ring))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_dtypes_may_be_mixed(world_size: int) -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float64, torch.float16, torch.float32]

    def make() -> torch.nn.ParameterList:
        return torch.nn.ParameterList(
            torch.nn.Parameter(numbers(5 + index, seed=index).to(dtype)) for index, dtype in enumerate(dtypes)
        )

    def loss(rank: int) -> Loss:
        return lambda model: sum(((rank + 1) * one.double()).sum() for one in model.parameters())

    def script(ring: Communicator) -> list[torch.Tensor]:
        model = make()
        optimizer = wrap(model, ring)
        for _ in range(2):
            optimizer.zero_grad()
            backward(loss(ring.rank)(model))
        gradients = [one for one in gradients_of(model) if one is not None]
        optimizer.step()
        return [*gradients, *parameters_of(model)]

    ranks = run_ring(world_size, script)
    assert_same_bits(ranks)
    mean = (world_size + 1) / 2
    for gradient, dtype in zip(ranks[0][:5], dtypes, strict=True):
        assert gradient.dtype == dtype
        assert torch.equal(gradient, torch.full_like(gradient, mean))


def test_training_in_bfloat16_keeps_ranks_equal() -> None:
    def script(ring: Communicator) -> list[torch.Tensor]:
        model = perceptron(ring.rank, torch.bfloat16)
        optimizer = wrap(model, ring)
        for step in range(5):
            optimizer.zero_grad()
            backward((model(numbers(4, 6, seed=step * 9 + ring.rank, dtype=torch.bfloat16)) ** 2).mean())
            optimizer.step()
        return parameters_of(model)

    ranks = run_ring(3, script)
    assert_same_bits(ranks)
    assert all(one.isfinite().all() for one in ranks[0])


def test_gradients_have_the_strides_of_their_parameters() -> None:
    def make() -> torch.nn.Module:
        model = filled(torch.nn.Conv2d(3, 4, 2).double()).to(memory_format=torch.channels_last)
        model.gap = torch.nn.Parameter(numbers(6, 4)[::2, ::2])
        return model

    def loss(rank: int) -> Loss:
        return lambda model: (
            model(numbers(2, 3, 5, 5, seed=rank)).square().sum() + (rank * model.gap**2).sum()
        )

    def script(ring: Communicator) -> list[torch.Tensor | None]:
        model = make()
        optimizer = wrap(model, ring)
        for _ in range(2):
            optimizer.zero_grad()
            backward(loss(ring.rank)(model))
        assert model.weight.grad.stride() == model.weight.stride()
        return gradients_of(model)

    expected = mean_gradients(make(), [loss(rank) for rank in range(3)])
    for gradients in run_ring(3, script):
        torch.testing.assert_close(gradients, expected)


def test_parameters_and_buffers_are_made_equal_to_rank_0s() -> None:
    def make(rank: int) -> torch.nn.Module:
        model = filled(torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.BatchNorm1d(3)), rank)
        model[1].running_mean.fill_(rank)
        model.register_buffer("mask", torch.tensor([rank == 0, True]))
        model.register_buffer("count", torch.tensor(rank + 7))
        model.register_buffer("rounded", numbers(3, seed=rank).half())
        model.register_buffer("phase", torch.complex(numbers(2, seed=rank), numbers(2, seed=rank + 9)))
        model.register_buffer("turned", numbers(4, 5, seed=rank).t())
        model.register_buffer("expanded", numbers(1, 3, seed=rank).expand(2, 3))
        model.register_buffer("large", numbers(1100, 1000, seed=rank))
        model.register_buffer("hidden", numbers(2, seed=rank), persistent=False)
        model.extra = torch.nn.Parameter(numbers(3, seed=rank), requires_grad=False)
        return model

    def script(ring: Communicator) -> list[torch.Tensor]:
        model = make(ring.rank)
        wrap(model, ring)
        return [*parameters_of(model), *(one.clone() for one in model.buffers())]

    first = make(0)
    expected = [*first.parameters(), *first.buffers()]
    for tensors in run_ring(3, script):
        assert len(tensors) == len(expected) == 5 + 3 + 8
        assert_same_bits([tensors, expected])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: model.append(torch.nn.Linear(2, 2)),
            '"6.weight": ranks 0, 2 have nothing of that name; rank 1 has float32',
        ),
        (lambda model: model.register_buffer("more", torch.ones(1)), '"more": '),
        (
            lambda model: model[5].bias.requires_grad_(False),
            '"5.bias": ranks 0, 2 have float64.3., trainable; ',
        ),
        (
            lambda model: model[3].to(torch.float32),
            '"3.weight": ranks 0, 2 have float64.* rank 1 has float32',
        ),
    ],
)
def test_models_that_differ_are_an_error_on_every_rank(
    change: Callable[[torch.nn.Sequential], object], message: str
) -> None:
    def script(ring: Communicator) -> None:
        model = perceptron()
        if ring.rank == 1:
            change(model)
        with pytest.raises(LayoutMismatchError, match=f"the ranks differ at {message}"):
            wrap(model, ring)
        ring.barrier()

    run_ring(3, script)


def test_optimizers_that_differ_are_an_error_on_every_rank() -> None:
    def script(ring: Communicator) -> None:
        model = perceptron()
        for make in (
            lambda: torch.optim.SGD(model.parameters(), lr=0.1 + ring.rank),
            lambda: (torch.optim.SGD, torch.optim.Adam)[ring.rank](model.parameters(), lr=0.1),
            lambda: torch.optim.SGD(
                [{"params": [one]} for one in model.parameters()] if ring.rank else model.parameters()
            ),
        ):
            with pytest.raises(LayoutMismatchError, match=r"optimizer|param_groups"):
                DistributedOptimizer(make(), model, communicator=ring)
        with pytest.raises(LayoutMismatchError, match="options of DistributedOptimizer"):
            wrap(model, ring, accumulate_steps=1 + ring.rank)
        ring.barrier()

    run_ring(2, script)


def test_layers_may_be_frozen_and_unfrozen() -> None:
    """By turns: part of the layers, others only, all; with or without the optimizer's zero_grad."""

    def train(model: torch.nn.Sequential, rank: int, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        for step, trainable in enumerate([(0, 3, 5), (5,), (0, 3), (0, 2, 3, 5), (0, 3, 5)] * 2):
            for index, layer in enumerate(model):
                layer.requires_grad_(index in trainable)
            (optimizer if step < 5 else model).zero_grad()
            backward(square(rank)(model))
            optimizer.step()
        return parameters_of(model)

    def script(ring: Communicator) -> list[torch.Tensor]:
        model = perceptron()
        return train(model, 5, wrap(model, ring))

    alone = perceptron()
    expected = train(alone, 5, torch.optim.SGD(alone.parameters(), lr=0.1))
    ranks = run_ring(2, script)
    assert_same_bits(ranks)
    torch.testing.assert_close(ranks[0], expected)


def test_layers_unfrozen_on_one_rank_only_are_an_error() -> None:
    def script(ring: Communicator) -> None:
        model = perceptron()
        model[0].requires_grad_(False)
        optimizer = wrap(model, ring)
        backward(square(ring.rank)(model))
        optimizer.step()
        model[0 if ring.rank else 2].requires_grad_(ring.rank == 1)
        with pytest.raises(LayoutMismatchError, match=r'"0\.weight" float64|"0\.weight": '):
            backward(square(ring.rank)(model))
        ring.barrier()

    run_ring(2, script)


def test_groups_may_be_added() -> None:
    def script(ring: Communicator) -> list[torch.Tensor]:
        model = perceptron()
        sgd = torch.optim.SGD(model[5].parameters(), lr=0.1)
        optimizer = DistributedOptimizer(sgd, model, communicator=ring)
        for step in range(3):
            model.zero_grad()
            backward(square(ring.rank)(model))
            optimizer.step()
            if step == 0:
                optimizer.add_param_group({"params": list(model[:5].parameters()), "lr": 0.01})
        return parameters_of(model)

    assert_same_bits(run_ring(2, script))


def test_dropping_the_optimizer_takes_its_hooks_away() -> None:
    def script(ring: Communicator) -> None:
        model = perceptron()
        optimizer = wrap(model, ring)
        backward(square(ring.rank)(model))
        ring.barrier()
        del optimizer
        backward(square(ring.rank)(model))
        assert not model[0].weight._post_accumulate_grad_hooks

    gc.disable()
    try:
        run_ring(2, script)
    finally:
        gc.enable()


def test_two_optimizers_may_share_a_backward() -> None:
    """As in adversarial training: the first model's gradients come through the second."""

    def script(ring: Communicator) -> list[torch.Tensor]:
        first, second = perceptron(), torch.nn.Linear(3, 1).double()
        optimizers = wrap(first, ring), wrap(second, ring)
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
                backward(second(first(numbers(4, 6, seed=ring.rank))).square().mean())
                optimizer.step()
        return parameters_of(first) + parameters_of(second)

    assert_same_bits(run_ring(2, script))
