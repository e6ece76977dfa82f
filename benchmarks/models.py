"""What the training benchmark trains.

B sequences or samples of a batch, T tokens of context, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs, and a class for each of the model's outputs."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, and the batches that one worker trains it with."""

    name: str
    build: Callable[[], nn.Module]
    """The model maps inputs to logits of shape (targets, classes)."""
    draw: Callable[[torch.Generator], Batch]
    learning_rate: float


class GPT(nn.Module):
    """A decoder-only transformer (Radford et al., 2019) with the embedding as its last layer, too."""

    def __init__(self, *, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.mask: torch.Tensor
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens_bt: torch.Tensor) -> torch.Tensor:
        x_btd = self.tokens(tokens_bt) + self.positions
        for block in self.blocks:
            x_btd = block(x_btd, src_mask=self.mask, is_causal=True)
        return functional.linear(self.norm(x_btd), self.tokens.weight).flatten(0, 1)


def mlp(width: int, layers: int) -> nn.Module:
    """Square linear layers, with a ReLU between any two."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        linear = nn.Linear(width, width)
        nn.init.normal_(linear.weight, std=(2 / width) ** 0.5)  # keeps the variance (He et al., 2015)
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def gpt_workload(
    name: str, *, width: int = 256, layers: int = 9, context: int = 64, batch: int = 2
) -> Workload:
    """About 7 million parameters in 110 tensors: many small gradients."""
    vocabulary = 256

    def draw(generator: torch.Generator) -> Batch:
        text = torch.randint(vocabulary, (batch, context + 1), generator=generator)
        return text[:, :-1], text[:, 1:].flatten()

    return Workload(
        name=name,
        build=lambda: GPT(vocabulary=vocabulary, context=context, width=width, layers=layers, heads=4),
        draw=draw,
        learning_rate=0.05,
    )


def mlp_workload(name: str, *, width: int = 2048, layers: int = 12, batch: int = 16) -> Workload:
    """About 50 million parameters in 24 tensors: little computation for each gradient."""

    def draw(generator: torch.Generator) -> Batch:
        inputs = torch.randn(batch, width, generator=generator)
        return inputs, torch.randint(width, (batch,), generator=generator)

    return Workload(name=name, build=lambda: mlp(width, layers), draw=draw, learning_rate=0.01)


WORKLOADS = {
    one.name: one
    for one in (
        gpt_workload("gpt"),
        mlp_workload("mlp"),
        gpt_workload("gpt-tiny", width=32, layers=2, context=16),
        mlp_workload("mlp-tiny", width=128, layers=3, batch=4),
    )
}
"""By the name that `--models` takes; the tiny ones are for trying out."""
