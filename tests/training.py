"""Small models and data for tests of training; the same at every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

M = TypeVar("M", bound=torch.nn.Module)


def filled(model: M, seed: int = 0) -> M:
    """Give a model parameters of its own, whatever torch's global generator did."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.5)
    return model


def perceptron(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    """6 inputs, 3 outputs, 7 parameters."""
    layers = (
        torch.nn.Linear(6, 9),
        torch.nn.Tanh(),
        torch.nn.LayerNorm(9),
        torch.nn.Linear(9, 8, bias=False),
        torch.nn.Tanh(),
        torch.nn.Linear(8, 3),
    )
    return filled(torch.nn.Sequential(*layers), seed).to(dtype)


def numbers(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def parameters_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Copies."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def gradients_of(model: torch.nn.Module) -> list[torch.Tensor | None]:
    """Copies."""
    return [None if one.grad is None else one.grad.clone() for one in model.parameters()]


def assert_same_bits(ranks: Sequence[Sequence[torch.Tensor]]) -> None:
    """All ranks hold the same tensors."""
    for others in ranks[1:]:
        for one, other in zip(ranks[0], others, strict=True):
            assert torch.equal(one, other)


def mean_gradients(
    model: torch.nn.Module, losses: Sequence[Callable[[torch.nn.Module], torch.Tensor]]
) -> list[torch.Tensor | None]:
    """What one process gets for the mean of `losses`."""
    for parameter in model.parameters():
        parameter.grad = None
    for loss in losses:
        (loss(model) / len(losses)).backward()
    return gradients_of(model)
