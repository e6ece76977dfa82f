"""`DistributedOptimizer` with a model on a GPU, each case compared with one process on the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

import ringps
from ringps.collectives import current
from ringps.kernels.digest import digest
from tests.gpu.card import Card
from tests.gpu.cases import main, needs_a_gpu
from tests.training import filled, numbers

STEPS, BATCH = 5, 8
"""Samples of each rank."""

Loss = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
Step = Callable[[int], None]


def small(model: torch.nn.Module) -> torch.nn.Module:
    """With parameters for which training converges."""
    with torch.no_grad():
        for parameter in filled(model).parameters():
            parameter.mul_(0.2)
    return model


def mlp() -> torch.nn.Module:
    layers = (torch.nn.Linear(6, 400), torch.nn.Tanh(), torch.nn.Linear(400, 300), torch.nn.Linear(300, 2))
    return small(torch.nn.Sequential(*layers))


def images() -> torch.nn.Module:
    layers = (torch.nn.Conv2d(3, 16, 3), torch.nn.Tanh(), torch.nn.Conv2d(16, 8, 3), torch.nn.Flatten())
    model = small(torch.nn.Sequential(*layers, torch.nn.Linear(8 * 4 * 4, 2)))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def squares(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return model(inputs).float().square().mean()  # type: ignore[no-any-return]


def batches(step: int, *shape: int) -> list[torch.Tensor]:
    """Of every rank, on the CPU."""
    return [
        numbers(*shape, seed=100 * step + rank, dtype=torch.float32) for rank in range(ringps.world_size())
    ]


def plain_and_wrapped(
    card: Card, model: torch.nn.Module, rate: float = 0.02
) -> tuple[torch.nn.Module, torch.optim.Optimizer, ringps.DistributedOptimizer]:
    """The same model a second time, with an optimizer of its own; and that of the first, distributed."""
    twin = copy.deepcopy(model)
    card.adopt(model)
    card.adopt(twin)
    momentum = {"momentum": 0.9}
    plain = torch.optim.SGD(twin.parameters(), lr=rate, **momentum)
    inner = torch.optim.SGD(model.parameters(), lr=rate, **momentum)
    wrapped = ringps.DistributedOptimizer(inner, model, bucket_cap_bytes=200_000, first_bucket_bytes=20_000)
    return twin, plain, wrapped


def compare(model: torch.nn.Module, twin: torch.nn.Module, tolerance: float = 1e-4) -> None:
    """All ranks have the same bits, and they are about the twin's."""
    own = digest(*(one.detach() for one in model.parameters()))
    assert len(set(current().gather_bytes(own))) == 1, "ranks hold different parameters"
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            one.detach().cpu(),
            other.detach().cpu(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda s, n=name: n + s,
        )


def like_one_process(card: Card) -> None:
    """On the batches of all ranks at once."""
    model = mlp()
    twin, plain, wrapped = plain_and_wrapped(card, model)
    for step in range(STEPS):
        every = batches(step, BATCH, 6)
        for one, optimizer, inputs in (
            (model, wrapped, every[ringps.rank()]),
            (twin, plain, torch.cat(every)),
        ):
            optimizer.zero_grad()
            squares(one, card.inputs(inputs)).backward()
            optimizer.step()
    compare(model, twin)


def clipped(card: Card) -> None:
    """By the norm of the gradients of all ranks."""
    model = mlp()
    twin, plain, wrapped = plain_and_wrapped(card, model)
    for step in range(STEPS):
        every = batches(step, BATCH, 6)
        norms = []
        for one, optimizer, inputs in (
            (model, wrapped, every[ringps.rank()]),
            (twin, plain, torch.cat(every)),
        ):
            optimizer.zero_grad()
            squares(one, card.inputs(inputs)).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(one.parameters(), 0.05))
            optimizer.step()
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=1e-4)
        assert norms[0] > 0.05, "there was nothing to clip"
    compare(model, twin)


def channels_last(card: Card) -> None:
    """Weights and gradients that lie in memory in another order than their indices."""
    model = images()
    twin, plain, wrapped = plain_and_wrapped(card, model, rate=0.01)
    for step in range(STEPS):
        every = batches(step, BATCH, 3, 8, 8)
        for one, optimizer, inputs in (
            (model, wrapped, every[ringps.rank()]),
            (twin, plain, torch.cat(every)),
        ):
            optimizer.zero_grad()
            squares(one, card.inputs(inputs).contiguous(memory_format=torch.channels_last)).backward()
            optimizer.step()
    weight = next(model.parameters())
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    compare(model, twin, 1e-3)


def bfloat16(card: Card) -> None:
    """In autocast."""
    model = mlp()
    twin, plain, wrapped = plain_and_wrapped(card, model)
    for step in range(STEPS):
        every = batches(step, BATCH, 6)
        for one, optimizer, inputs in (
            (model, wrapped, every[ringps.rank()]),
            (twin, plain, torch.cat(every)),
        ):
            optimizer.zero_grad()
            with torch.autocast(card.type, dtype=torch.bfloat16):
                loss = squares(one, card.inputs(inputs))
            loss.backward()
            optimizer.step()
    compare(model, twin, 2e-2)


def scaled(card: Card) -> None:
    """float16 with a GradScaler: where one rank's gradients overflow, no rank applies that step."""
    model = mlp()
    _, _, wrapped = plain_and_wrapped(card, model)
    scaler = torch.amp.GradScaler(card.type, init_scale=8.0, growth_interval=2)
    scales = []
    for step in range(4):
        inputs = card.inputs(batches(step, BATCH, 6)[ringps.rank()])
        wrapped.zero_grad()
        with torch.autocast(card.type, dtype=torch.float16):
            loss = squares(model, inputs)
        spoiled = ringps.rank() == ringps.world_size() - 1 and step == 1
        scaler.scale(loss * (float("inf") if spoiled else 1.0)).backward()
        before = digest(*(one.detach() for one in model.parameters()))
        scaler.step(wrapped)
        scaler.update()
        assert (digest(*(one.detach() for one in model.parameters())) == before) == (step == 1)
        scales.append(scaler.get_scale())
    assert scales == [8.0, 4.0, 4.0, 8.0]
    compare(model, model)


def graphed_callables(card: Card) -> None:
    """Forward and backward are replayed graphs; gradients arrive as ever."""
    needs_a_gpu()
    model = mlp()
    twin = copy.deepcopy(model)
    card.adopt(model)
    card.adopt(twin)
    sample = card.inputs(batches(99, BATCH, 6)[0])
    graphed: Any = torch.cuda.make_graphed_callables(model, (sample,))  # type: ignore[no-untyped-call]
    plain = torch.optim.SGD(twin.parameters(), lr=0.02)
    wrapped = ringps.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.02), model)
    for step in range(STEPS):
        every = batches(step, BATCH, 6)
        for one, optimizer, inputs in (
            (graphed, wrapped, every[ringps.rank()]),
            (twin, plain, torch.cat(every)),
        ):
            optimizer.zero_grad()
            squares(one, card.inputs(inputs)).backward()
            optimizer.step()
    compare(model, twin)


def captured_backward(card: Card) -> None:
    """A step's forward and backward as one graph; `reduce()` after each replay."""
    needs_a_gpu()
    model = mlp()
    twin, plain, wrapped = plain_and_wrapped(card, model)
    static = card.inputs(batches(0, BATCH, 6)[ringps.rank()])
    with card.other_stream() as stream:
        for _ in range(3):  # libraries are set up, outside of the capture
            wrapped.zero_grad()
            squares(model, static).backward()
    assert stream is not None
    torch.cuda.current_stream().wait_stream(stream)
    wrapped.zero_grad()
    graph = torch.cuda.CUDAGraph()
    # Threads of the ring's may ask about events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        squares(model, static).backward()
    for step in range(STEPS):
        every = batches(step, BATCH, 6)
        static.copy_(every[ringps.rank()])
        wrapped.zero_grad()
        graph.replay()
        wrapped.reduce()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        assert norm > 0
        wrapped.step()
        plain.zero_grad()
        squares(twin, card.inputs(torch.cat(every))).backward()
        plain.step()
    compare(model, twin)


def on_two_streams(card: Card) -> None:
    """Halves of the model work on streams of their own, and so do their gradients."""
    first, last = mlp(), mlp()
    model = torch.nn.ModuleList([first, last])
    twin, plain, wrapped = plain_and_wrapped(card, model)

    def loss_of(pair: Any, inputs: torch.Tensor, apart: bool) -> torch.Tensor:
        one = pair[0](inputs)
        if not apart:
            return (one + pair[1](inputs)).square().mean()  # type: ignore[no-any-return]
        with card.other_stream() as stream:
            other = pair[1](inputs)
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        return (one + other).square().mean()  # type: ignore[no-any-return]

    for step in range(STEPS):
        every = batches(step, BATCH, 6)
        for pair, optimizer, inputs in (
            (model, wrapped, every[ringps.rank()]),
            (twin, plain, torch.cat(every)),
        ):
            optimizer.zero_grad()
            loss_of(pair, card.inputs(inputs), pair is model).backward()
            optimizer.step()
    compare(model, twin)


CASES = {
    one.__name__: one
    for one in (
        like_one_process,
        clipped,
        channels_last,
        bfloat16,
        scaled,
        on_two_streams,
        graphed_callables,
        captured_backward,
    )
}

if __name__ == "__main__":
    main(CASES)
